"""Weights of the Qwen2, Qwen3 and Llama families from GGUF files, by the package `gguf`.

A checkpoint is one file; most of its matrices are quantized in blocks of few bits.
"""

from __future__ import annotations

import math
import pathlib
import re

import numpy as np

from stepsearch_jax.models.architecture import RopeScaling
from stepsearch_jax.models.weights import Weights, WeightTensor

NAMES = {  # GGUF -> Hugging Face, of the whole model and of a layer
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(path: pathlib.Path) -> Weights:
    """The weights of a GGUF file. No tensor is read yet; `read` gives float32.

    Raises FileNotFoundError for a missing file, and ValueError without the package, for a file that
    cannot be read, and for what is not supported.
    """
    try:
        import gguf
    except ImportError as error:
        message = f"{path} can only be read with the package gguf: pip install gguf"
        raise ValueError(message) from error
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the package raises what NumPy raises
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from error
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.")
    }
    tensors = {_rename(tensor.name): tensor for tensor in reader.tensors}
    shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in tensors.items()}
    try:
        fields = _read_fields(metadata, shapes)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # Only the llama architecture interleaves the heads of its queries and keys.
    heads = {}
    if metadata["general.architecture"] == "llama":
        heads = {"q_proj": fields["num_heads"], "k_proj": fields["num_kv_heads"]}

    def list_tensor(name: str, tensor) -> WeightTensor:
        interleaved = heads.get(name.split(".")[-2], 0)

        def read() -> np.ndarray:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            return separate_halves(array, interleaved) if interleaved else array

        return WeightTensor(path, shapes[name], read)

    listed = {name: list_tensor(name, tensor) for name, tensor in tensors.items()}
    return Weights(path, fields, listed)


def _rename(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight.

    An unknown name stays as it is and is later reported as unexpected.
    """
    layer, stem, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*?)(?:\.(weight|bias))?", name).groups()
    if stem not in NAMES:
        return name
    return f"{f'model.layers.{layer}.' if layer else ''}{NAMES[stem]}.{kind}"


def separate_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, ...]: from neighbouring coordinates of a rotary plane to separate halves.

    Files of the llama architecture hold the two coordinates of a plane side by side, in queries and
    keys. The modules here turn coordinate i against i + H/2.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _read_fields(metadata: dict, shapes: dict[str, tuple[int, ...]]) -> dict[str, object]:
    """Metadata -> fields of ModelConfig.

    Raises ValueError for what is not supported, KeyError for what is missing.
    """
    family = metadata["general.architecture"]
    if family not in ("qwen2", "qwen3", "llama"):
        raise ValueError(
            f"architecture {family!r} is not supported; supported are qwen2, qwen3 and llama"
        )

    def fact(name: str, *default):
        value = metadata.get(f"{family}.{name}", *default)
        if value is None:
            raise KeyError(f"{family}.{name}")
        return value

    # Queries and keys have to be rotated as a whole.
    width, heads = fact("embedding_length"), fact("attention.head_count")
    head_dim = fact("attention.key_length", width // heads)
    if fact("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"rope.dimension_count is {fact('rope.dimension_count')}; only the whole head, "
            f"{head_dim}, is supported"
        )
    return dict(
        vocab_size=shapes["model.embed_tokens.weight"][0],
        num_layers=fact("block_count"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=fact("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_dim=fact("feed_forward_length"),
        rope_theta=float(fact("rope.freq_base", 10000.0)),
        rope_scaling=_read_scaling(fact),
        # 1e-5 is stored as float32.
        norm_eps=float(str(np.float32(fact("attention.layer_norm_rms_epsilon")))),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings="lm_head.weight" not in shapes,
    )


def _read_scaling(fact) -> RopeScaling | None:
    kind = fact("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = float(fact("rope.scaling.factor"))
    if kind == "linear":
        return RopeScaling(kind, factor, 0, 0.0, 0.0, 1.0)
    if kind == "yarn":
        context = fact("rope.scaling.original_context_length")
        attention_factor = 0.1 * math.log(max(factor, 1.0)) + 1.0
        return RopeScaling(kind, factor, context, 1.0, 32.0, attention_factor)
    raise ValueError(
        f"rotary scaling {kind!r} is not supported; supported are none, linear and yarn"
    )
