"""config.json of the Qwen2, Qwen3 and Llama families -> fields of `ModelConfig`.

Defaults, and which key counts where two name the same thing, are those of transformers. Whatever
the modules here do not compute is refused by its key, with what to do about it.
"""

from __future__ import annotations

import math

from stepsearch_jax.models.architecture import RopeScaling, check_sizes

ARCHITECTURES = {  # by model_type
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
SUPPORTED = "supported are qwen2 (Qwen2, Qwen2.5), qwen3 (Qwen3, dense) and llama (Llama, SmolLM2)"
CONTEXTS = {"qwen2": 32768, "qwen3": 32768, "llama": 2048}  # default max_position_embeddings
OTHER_MODEL = "choose another model"
UNQUANTIZED = "name the model that was quantized, in its original form, or a .gguf file of it"
LLAMA_HAS_NONE = "set it to null: the Llama family has full attention only"
ONE_CONFIG = "write what it holds into config.json itself, and remove the key"
# (key, the only value that is computed here, families that heed the key, what to do).
FIXED = (
    ("hidden_act", "silu", tuple(ARCHITECTURES), OTHER_MODEL),
    ("attention_bias", False, ("qwen3", "llama"), OTHER_MODEL),
    ("mlp_bias", False, ("llama",), OTHER_MODEL),
    ("is_causal", True, tuple(ARCHITECTURES), f"the model encodes texts; {OTHER_MODEL}"),
    ("sliding_window", None, ("llama",), LLAMA_HAS_NONE),
    ("attention_chunk_size", None, ("llama",), LLAMA_HAS_NONE),
    ("per_layer_config", None, tuple(ARCHITECTURES), f"layers differ; {OTHER_MODEL}"),
    ("configuration_files", None, tuple(ARCHITECTURES), ONE_CONFIG),
    ("quantization_config", None, tuple(ARCHITECTURES), UNQUANTIZED),
    ("compression_config", None, tuple(ARCHITECTURES), UNQUANTIZED),
    (
        "transformers_weights",
        None,
        tuple(ARCHITECTURES),
        "rename that file to model.safetensors, and remove the key",
    ),
)


def read_fields(raw: dict) -> dict[str, object]:
    """config.json -> fields of ModelConfig.

    Raises ValueError for what the modules here do not compute, KeyError for a missing size.
    """
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"model_type {family!r} is not supported; {SUPPORTED}")
    for key, only, families, remedy in FIXED:
        if family in families and raw.get(key, only) != only:
            raise ValueError(f"{key} is {raw[key]!r}; only {only!r} is supported: {remedy}")
    _check_windows(raw, family)
    theta, scaling = _read_rope(raw, family)
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings is {tied!r}: make it true or false")
    fields = dict(
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or (128 if family == "qwen3" else width // heads),
        ffn_dim=raw["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=tied,
    )
    check_sizes(fields)
    return fields


def _check_windows(raw: dict, family: str) -> None:
    """Raises ValueError unless every layer attends to all earlier tokens."""
    layers, kinds = raw["num_hidden_layers"], raw.get("layer_types")
    if kinds is not None and len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for {layers} layers: correct it")
    remedy = "remove layer_types"
    windowed = raw.get("use_sliding_window", False) and raw.get("sliding_window", 4096) is not None
    if kinds is None and family != "llama" and windowed:
        remedy = "set use_sliding_window to false"
        kinds = ["sliding_attention"] * max(layers - raw.get("max_window_layers", 28), 0)
    others = set(kinds or ()) - {"full_attention", "attention"}
    if others:
        raise ValueError(
            f"layers have {', '.join(sorted(map(str, others)))}; only full_attention is supported. "
            "For texts that are no longer than sliding_window it is the same: if rollout.context "
            f"is not larger, {remedy}; otherwise {OTHER_MODEL}"
        )


def _read_rope(raw: dict, family: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from older files (rope_theta, rope_scaling) or newer (rope_parameters)."""
    # One table: rope_scaling replaces rope_parameters, and the outer keys fill up what it lacks.
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    outer = {key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = {key: value for key, value in (outer | rope).items() if value is not None}
    theta = float(rope.pop("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope = {key: value for key, value in rope.items() if key not in ("rope_type", "type")}
    if not rope.pop("truncate", True) or rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            "rotary scaling with truncate=false or a partial_rotary_factor is not supported: "
            f"{OTHER_MODEL}"
        )
    # The context of the first training: the outer key counts, and without any it is today's.
    longest = raw.get("max_position_embeddings", CONTEXTS[family])
    context = rope.pop("original_max_position_embeddings", longest)
    context = raw.get("original_max_position_embeddings") or context
    scaling = _take_scaling(kind, rope, context, longest)
    if rope:
        raise ValueError(
            f"rotary scaling {kind!r} with {', '.join(sorted(rope))} is not supported: "
            "transformers ignores such keys; remove them from config.json to do the same"
        )
    return theta, scaling


def _take_scaling(kind: str, rope: dict, context: int, longest: int) -> RopeScaling | None:
    """The scaling of one kind, whose keys leave `rope`.

    context: tokens of a text in the first training; longest: max_position_embeddings.
    """
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, float(rope.pop("factor")), 0, 0.0, 0.0, 1.0)
    if kind == "llama3":
        factor = float(rope.pop("factor"))
        slow, fast = float(rope.pop("low_freq_factor")), float(rope.pop("high_freq_factor"))
        if not slow < fast:
            raise ValueError(
                f"rotary scaling 'llama3' has low_freq_factor {slow} and high_freq_factor {fast}: "
                "the latter has to be larger; correct them"
            )
        return RopeScaling(kind, factor, context, slow, fast, 1.0)
    if kind == "yarn":
        factor = float(rope.pop("factor", None) or longest / context)
        scale = rope.pop("attention_factor", None)
        mscales = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        if scale is None:
            scale = attention_factor(factor, *(mscales if all(mscales) else (1.0, 0.0)))
        slow, fast = rope.pop("beta_slow", None) or 1.0, rope.pop("beta_fast", None) or 32.0
        return RopeScaling(kind, factor, context, float(slow), float(fast), float(scale))
    if kind == "dynamic":
        raise ValueError(
            "rotary scaling 'dynamic' is not supported. It changes nothing for texts of up to "
            f"max_position_embeddings={longest} tokens: if rollout.context is not larger, remove "
            f"it from config.json; otherwise {OTHER_MODEL}"
        )
    raise ValueError(
        f"rotary scaling {kind!r} is not supported; supported are default, linear, llama3 and "
        f"yarn: {OTHER_MODEL}"
    )


def attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """By what YaRN multiplies queries and keys, if config.json does not say (Peng et al. 2023)."""
    logarithm = 0.1 * math.log(max(factor, 1.0))
    return (mscale * logarithm + 1.0) / (mscale_all_dim * logarithm + 1.0)
