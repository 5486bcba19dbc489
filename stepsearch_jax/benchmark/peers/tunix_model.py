"""Our parameters in tunix's Qwen2, and a stand-in for the tokenizer of its sampler and cluster."""

from __future__ import annotations

import importlib.metadata

import numpy as np


class Tokenizer:
    """Texts are token ids in decimal, independent of words; no id ends or pads a text."""

    def encode(self, text: str, **_) -> list[int]:
        return [int(token) for token in text.split()]

    def decode(self, ids, **_) -> str:
        return ""

    def bos_id(self):
        return None

    def eos_id(self) -> int:
        return -2

    def pad_id(self) -> int:
        return -1


def load_model(job: dict, weights: dict[str, np.ndarray]):
    """A tunix Qwen2 with our parameters (names joined by "/", layers stacked), in float32.

    Its backward pass recomputes nothing.
    """
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.qwen2 import model as qwen2

    model_config = job["model"]
    model = qwen2.Qwen2(
        qwen2.ModelConfig(
            num_layers=model_config["num_layers"],
            vocab_size=model_config["vocab_size"],
            embed_dim=model_config["embed_dim"],
            hidden_dim=model_config["ffn_dim"],
            num_heads=model_config["num_heads"],
            head_dim=model_config["head_dim"],
            num_kv_heads=model_config["num_kv_heads"],
            rope_theta=model_config["rope_theta"],
            norm_eps=model_config["norm_eps"],
            use_tied_embedding=model_config["tie_embeddings"],
            remat_config=qwen2.RematConfig.NONE,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
        ),
        rngs=nnx.Rngs(0),
    )

    def put(variable, value):
        if variable.value.shape != value.shape:
            raise ValueError(
                f"a parameter of tunix's Qwen2 has shape {variable.value.shape}, ours {value.shape}"
            )
        variable.value = jnp.asarray(value)

    trunk = "params/trunk/"
    put(model.embedder.input_embedding, weights[trunk + "embedding"])
    put(model.final_norm.w, weights[trunk + "final_norm/scale"])
    if not model_config["tie_embeddings"]:
        put(model.lm_head.w, weights["params/lm_head"])
    for i, layer in enumerate(model.layers):
        own = lambda name: weights[f"{trunk}layers/{name}"][i]  # noqa: B023 - used in this turn
        for name in "qkv":
            put(getattr(layer.attn, f"{name}_proj").w, own(f"{name}/kernel"))
            put(getattr(layer.attn, f"{name}_bias"), own(f"{name}/bias").reshape(-1))
        put(layer.attn.o_proj.w, own("o/kernel"))
        for name in ("gate", "up", "down"):
            put(getattr(layer.mlp, f"{name}_proj").kernel, own(f"{name}/kernel"))
        put(layer.input_layernorm.w, own("attention_norm/scale"))
        put(layer.post_attention_layernorm.w, own("ffn_norm/scale"))
    return model


def find_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Logits after each row of tokens [B, P] -> [B, V]."""
    import jax.numpy as jnp

    B, P = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((P, P), bool)), (B, P, P))
    return np.asarray(model(jnp.asarray(tokens), positions, None, mask)[0][:, -1])


def find_versions() -> dict[str, str]:
    """Of the packages that decide what is timed."""
    return {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")}
