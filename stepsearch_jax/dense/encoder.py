"""Text encoders of the BERT family (MiniLM, E5, BGE) as a Linen module: one vector per text.

The weights come from Hugging Face folders.

Axis letters: B batch, T tokens, D embed, N heads, H head dim, F ffn, V vocabulary, L layers.
Numbers are float32; on accelerators matrix products have the platform's default precision.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax.models.huggingface import list_tensors

POOLINGS = ("mean", "cls")
FAULTS_NAMED = 8  # in an error message; the rest are counted


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder, and how a text's tokens become one vector."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    ffn_dim: int
    positions: int  # of the table of learned positions: no text has more tokens
    token_types: int
    norm_eps: float
    max_tokens: int  # a longer text is cut, [SEP] kept
    pooling: str  # mean: over all tokens | cls: the first token's vector
    normalize: bool  # to length 1, so that a dot product is a cosine


class Layer(nn.Module):
    """One layer: attention over all real tokens, then a GELU ffn (Devlin et al. 2019).

    A residual sum and LayerNorm follow each.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array):
        """x [B, T, D], mask [B, T] -> (x, None), as `nn.scan` wants it."""
        config = self.config
        B, T, D = x.shape
        heads = (B, T, config.num_heads, D // config.num_heads)
        project = lambda name: nn.Dense(D, name=name)(x).reshape(heads)
        q, k, v = project("query"), project("key"), project("value")  # [B, T, N, H]
        scores = jnp.einsum("bsnh,btnh->bnst", q, k) * heads[-1] ** -0.5
        scores = jnp.where(mask[:, None, None], scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1)  # [B, N, T, T]
        attended = jnp.einsum("bnst,btnh->bsnh", weights, v).reshape(B, T, D)
        x = x + nn.Dense(D, name="attention_out")(attended)
        x = nn.LayerNorm(config.norm_eps, name="attention_norm")(x)
        hidden = nn.gelu(nn.Dense(config.ffn_dim, name="up")(x), approximate=False)  # [B, T, F]
        x = x + nn.Dense(D, name="down")(hidden)
        return nn.LayerNorm(config.norm_eps, name="ffn_norm")(x), None


class Encoder(nn.Module):
    """Embeddings, layers (scanned: one is compiled), pooling."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """tokens [B, T] int32, right padded; length [B] int32, >= 1 -> vectors [B, D] float32."""
        config = self.config
        mask = jnp.arange(tokens.shape[1]) < length[:, None]  # [B, T]
        init = nn.initializers.normal(0.02)
        table = lambda name, rows: self.param(name, init, (rows, config.embed_dim))
        x = (
            table("words", config.vocab_size)[tokens]
            + table("positions", config.positions)[: tokens.shape[1]]
            + table("token_types", config.token_types)[0]
        )
        x = nn.LayerNorm(config.norm_eps, name="embedding_norm")(x)  # [B, T, D]
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_layers,
            in_axes=nn.broadcast,
            check_constancy_invariants=False,  # would trace the layer twice
        )
        x, _ = layers(config, name="layers")(x, mask)
        if config.pooling == "cls":
            vector = x[:, 0]
        else:
            vector = jnp.where(mask[..., None], x, 0).sum(1) / length[:, None]
        if not config.normalize:
            return vector
        return vector / jnp.maximum(jnp.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)


def read_encoder_config(folder: pathlib.Path) -> EncoderConfig:
    """The architecture in a Hugging Face folder, with pooling and length.

    The latter come from the files of sentence-transformers. Without these: mean pooling,
    normalised, the longest texts possible. Raises FileNotFoundError without config.json, and
    ValueError, naming file and key, for what is not supported.
    """
    # The architecture; other kinds of it are rejected.
    raw = _read_json(folder / "config.json")
    if raw is None:
        raise FileNotFoundError(
            f"there is no {folder / 'config.json'}: an encoder is a folder with config.json, "
            "*.safetensors and tokenizer.json"
        )
    for key, only in (
        ("model_type", "bert"),
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
    ):
        if raw.get(key, only if key != "model_type" else None) != only:
            raise ValueError(
                f"{folder / 'config.json'}: {key} is {raw.get(key)!r}; only {only!r} is supported"
            )
    # Pooling and length.
    pooling, normalize = _read_modules(folder)
    settings = _read_json(folder / "sentence_bert_config.json") or {}
    try:
        return EncoderConfig(
            vocab_size=raw["vocab_size"],
            num_layers=raw["num_hidden_layers"],
            embed_dim=raw["hidden_size"],
            num_heads=raw["num_attention_heads"],
            ffn_dim=raw["intermediate_size"],
            positions=raw["max_position_embeddings"],
            token_types=raw["type_vocab_size"],
            norm_eps=float(raw["layer_norm_eps"]),
            max_tokens=min(
                settings.get("max_seq_length") or raw["max_position_embeddings"],
                raw["max_position_embeddings"],
            ),
            pooling=pooling,
            normalize=normalize,
        )
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks the key {error}") from error


def _read_modules(folder: pathlib.Path) -> tuple[str, bool]:
    """-> (pooling, normalize) of modules.json."""
    modules = _read_json(folder / "modules.json")
    if modules is None:
        return "mean", True
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(
            f"{folder / 'modules.json'} holds {', '.join(sorted(unknown))}; supported are "
            "Transformer, Pooling and Normalize"
        )
    file = folder / kinds.get("Pooling", "") / "config.json"
    modes = [
        key
        for key, value in (_read_json(file) or {}).items()
        if key.startswith("pooling_mode") and value is True
    ]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    pooling = names.get(modes[0]) if len(modes) == 1 else None
    if pooling is None:
        raise ValueError(
            f"{file}: the pooling is {', '.join(modes) or 'not named'}; supported are "
            f"{' and '.join(POOLINGS)} alone"
        )
    return pooling, "Normalize" in kinds


def _read_json(file: pathlib.Path):
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def load_encoder(folder: pathlib.Path, config: EncoderConfig) -> dict:
    """An encoder's parameters from a folder's safetensors, as NumPy float32.

    Raises ValueError, naming the first of them, for tensors that are missing or misshapen.
    """
    tensors = list_tensors(folder)
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in tensors else ""
    faults = []

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor; zeros instead if it does not fit."""
        tensor = tensors.get(prefix + name)
        if tensor is None or tensor.shape != shape:
            faults.append(
                f"{prefix}{name} {list(shape)} is "
                f"{'missing' if tensor is None else list(tensor.shape)}"
            )
            return np.zeros(shape, np.float32)
        return np.asarray(tensor.read(), np.float32)

    # The layers, stacked. Files hold a linear map's outputs first, Flax its inputs.
    D, F = config.embed_dim, config.ffn_dim
    dense = lambda name, inputs, outputs: {
        "kernel": read(f"{name}.weight", (outputs, inputs)).T,
        "bias": read(f"{name}.bias", (outputs,)),
    }
    norm = lambda name: {"scale": read(f"{name}.weight", (D,)), "bias": read(f"{name}.bias", (D,))}
    layers = []
    for number in range(config.num_layers):
        at = f"encoder.layer.{number}"
        heads = ("query", "key", "value")
        layers.append(
            {
                **{name: dense(f"{at}.attention.self.{name}", D, D) for name in heads},
                "attention_out": dense(f"{at}.attention.output.dense", D, D),
                "attention_norm": norm(f"{at}.attention.output.LayerNorm"),
                "up": dense(f"{at}.intermediate.dense", D, F),
                "down": dense(f"{at}.output.dense", F, D),
                "ffn_norm": norm(f"{at}.output.LayerNorm"),
            }
        )
    params = {
        "embedding_norm": norm("embeddings.LayerNorm"),
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
    }
    # The tables of embeddings.
    for ours, theirs, rows in (
        ("words", "word_embeddings", config.vocab_size),
        ("positions", "position_embeddings", config.positions),
        ("token_types", "token_type_embeddings", config.token_types),
    ):
        params[ours] = read(f"embeddings.{theirs}.weight", (rows, D))
    if faults:
        more = f"; and {len(faults) - FAULTS_NAMED} more" if len(faults) > FAULTS_NAMED else ""
        raise ValueError(
            f"the encoder {folder} does not fit its config.json: "
            f"{'; '.join(faults[:FAULTS_NAMED])}{more}"
        )
    return {"params": params}
