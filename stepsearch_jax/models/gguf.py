"""Weights of the Qwen2, Qwen3 and Llama families from GGUF files, by the package `gguf`.

A checkpoint is one file; most of its matrices are quantized in blocks of few bits.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re

import numpy as np

from stepsearch_jax.models.architecture import ModelConfig, RopeScaling, check_sizes
from stepsearch_jax.models.attention import rotary_frequencies
from stepsearch_jax.models.huggingface_config import attention_factor
from stepsearch_jax.models.weights import LM_HEAD, Weights, WeightTensor

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
ROPE_FACTORS = "rope_freqs.weight"  # a divisor of each rotary frequency [H/2]
LLAMA3_CONTEXT = 8192  # that of Llama 3, in whose tokens `fit_llama3` gives its bounds
# Metadata of the architecture that change what is computed, and their value when they do not.
NEUTRAL = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "attention.sliding_window": 0,
    "attention.scale": 0.0,
    "attention.causal": True,
    "expert_count": 0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
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
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model: join them with `llama-gguf-split --merge` "
            "of llama.cpp"
        )
    tensors = {_rename(tensor.name): tensor for tensor in reader.tensors}
    shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in tensors.items()}
    try:
        fields = _read_fields(metadata, shapes)
        if ROPE_FACTORS in tensors:
            fields["rope_scaling"] = _read_rope_factors(fields, tensors.pop(ROPE_FACTORS).data)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path}: {error}") from error
    # Only the llama architecture interleaves the heads of its queries and keys.
    heads = {}
    if metadata["general.architecture"] == "llama":
        heads = {"q_proj": fields["num_heads"], "k_proj": fields["num_kv_heads"]}

    def list_tensor(name: str, tensor) -> WeightTensor:
        interleaved = heads.get(name.split(".")[-2], 0)

        def read() -> np.ndarray:
            try:
                array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise ValueError(
                    f"{path}: {name} is stored as {tensor.tensor_type.name}, which the package "
                    "gguf cannot decode: name a file with another quantization, such as Q8_0"
                ) from error
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

    for name, neutral in NEUTRAL.items():
        if fact(name, neutral) != neutral:
            raise ValueError(
                f"{family}.{name} is {fact(name)}; only {neutral} is supported: choose another "
                "model"
            )
    # Queries and keys have to be rotated as a whole.
    width, heads = fact("embedding_length"), fact("attention.head_count")
    head_dim = fact("attention.key_length", width // heads)
    if fact("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"rope.dimension_count is {fact('rope.dimension_count')}; only the whole head, "
            f"{head_dim}, is supported"
        )
    fields = dict(
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
        tie_embeddings=LM_HEAD not in shapes,
    )
    check_sizes(fields)
    return fields


def _read_scaling(fact) -> RopeScaling | None:
    """Scaling from the metadata; as in llama.cpp, a factor without a type is linear."""
    factor = float(fact("rope.scaling.factor", fact("rope.scale_linear", 1.0)))
    kind = fact("rope.scaling.type", "none" if factor in (0.0, 1.0) else "linear")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling(kind, factor, 0, 0.0, 0.0, 1.0)
    if kind == "yarn":
        context = fact("rope.scaling.original_context_length")
        slow, fast = (
            float(fact(f"rope.scaling.yarn_beta_{end}", usual))
            for end, usual in (("slow", 1.0), ("fast", 32.0))
        )
        return RopeScaling(kind, factor, context, slow, fast, attention_factor(factor))
    raise ValueError(
        f"rotary scaling {kind!r} is not supported; supported are none, linear and yarn: choose "
        "another model"
    )


def _read_rope_factors(fields: dict[str, object], factors: np.ndarray) -> RopeScaling | None:
    """The scaling that divides the rotary frequencies by `factors` [H/2], None if all are 1.

    llama.cpp writes Llama 3's scaling in this form and does not name it. Raises ValueError if they
    are not such a scaling's.
    """
    if fields["rope_scaling"] is not None:
        raise ValueError(f"{ROPE_FACTORS} beside rope.scaling.type is not supported")
    plain = ModelConfig(**fields, dtype=np.dtype("float32"), remat="none", attention_block=1)
    frequencies = np.asarray(rotary_frequencies(plain), np.float64)
    if factors.shape != frequencies.shape:
        raise ValueError(f"{ROPE_FACTORS} has {len(factors)} numbers, not {len(frequencies)}")
    if np.all(factors == 1):
        return None
    with np.errstate(all="ignore"):  # what is no number is not close, either
        scaling = fit_llama3(frequencies, factors.astype(np.float64))
        scaled = rotary_frequencies(dataclasses.replace(plain, rope_scaling=scaling))
    if not np.allclose(scaled, frequencies / factors, rtol=1e-5, atol=0):
        raise ValueError(
            f"{ROPE_FACTORS} is not Llama 3's rotary scaling, the only one that is supported in "
            "this form: name a folder in Hugging Face form instead"
        )
    return scaling


def fit_llama3(frequencies: np.ndarray, factors: np.ndarray) -> RopeScaling:
    """A scaling of kind llama3 with these divisors of these falling frequencies, both [H/2].

    Of a divided frequency a fraction is kept, which rises linearly from 0 to 1 between two bounds:
    the steepest rise between neighbours lies on that line. The divisors of another kind of scaling
    are missed.
    """
    factor = float(factors.max())
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    rises = np.diff(kept) / np.diff(frequencies)
    steepest = int(rises.argmax())
    rise, turns = rises[steepest], LLAMA3_CONTEXT / (2 * math.pi)
    zero = frequencies[steepest] - kept[steepest] / rise  # where the line begins
    slow, fast = (float(f"{turns * bound:.6g}") for bound in (zero, zero + 1 / rise))
    return RopeScaling("llama3", factor, LLAMA3_CONTEXT, slow, fast, 1.0)
