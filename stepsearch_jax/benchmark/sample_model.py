"""The models that the benchmarks of rollout and update run, with made-up weights for both sides."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from stepsearch_jax import sharding
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.run.checks import check_config
from stepsearch_jax.run.settings import describe_models

MODEL = ModelConfig(
    vocab_size=8192,
    num_layers=4,
    embed_dim=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_dim=1024,
    rope_theta=1e6,
    rope_scaling=None,
    norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    tie_embeddings=False,
    dtype=jnp.float32,
    remat="none",
    attention_block=256,
)
# Largest difference between our logits and a peer's, which spread by about 1.
LOGIT_TOLERANCE = 1e-3


def choose_models(
    config: ml_collections.ConfigDict | None, peer: str
) -> tuple[ModelConfig, ModelConfig]:
    """-> the model as the learner computes it, and as the rollout does.

    They have the config's sizes and types, or those of MODEL without a config. MODEL's learner
    keeps matrix products for the backward pass (model.remat=dots), the faster way on CPUs. Raises
    ValueError for a config without a vocabulary size, and for a model that the peer does not run.
    """
    if config is None:
        return dataclasses.replace(MODEL, remat="dots"), MODEL
    if not config.model.vocab_size:
        raise ValueError(
            "config.model.vocab_size is 0, and a benchmark reads no tokenizer: set it to the rows "
            "of the embedding"
        )
    check_config(config, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    learner, rollout = describe_models(config, config.model.vocab_size)
    if peer != "none" and (not rollout.qkv_bias or rollout.qk_norm or rollout.rope_scaling):
        raise ValueError(
            "peers run models of the form of Qwen2 only: model.qkv_bias=True, "
            "model.qk_norm=False, model.rope_scaling.kind=none"
        )
    if peer == "tunix" and {learner.dtype, rollout.dtype} != {jnp.dtype("float32")}:
        raise ValueError(
            "the peer tunix computes in float32: add --config.model.dtype=float32 "
            "--config.rollout.dtype=float32"
        )
    return learner, rollout


def box_params(model):
    """The shapes of a model's parameters, in boxes that name their logical axes."""
    method = Policy.init_all if isinstance(model, Policy) else None
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method=method)
    )


def draw_params(model, seed: int):
    """Random parameters as NumPy arrays; logits spread by about 1.

    None is 0 or 1, so that biases and norms count when two sides are compared.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, parent = path[-1].key, path[-2].key
        if name == "scale":
            return rng.normal(1, 0.1, leaf.shape).astype(np.float32)
        fan_in = leaf.shape[0 if name == "lm_head" else -1]
        if name == "kernel":  # stacked by layer; attention's output has two axes of inputs
            fan_in = leaf.shape[1] * (leaf.shape[2] if parent == "o" else 1)
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(box_params(model)))


def name_arrays(params) -> dict[str, np.ndarray]:
    """Parameters by their paths, joined by "/": what a peer's process reads."""
    return {
        "/".join(entry.key for entry in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def describe(config: ModelConfig) -> dict:
    """The config as JSON has it."""
    return dataclasses.asdict(config) | {"dtype": jnp.dtype(config.dtype).name}


def check_logits(name: str, ours: np.ndarray, peers: np.ndarray) -> float:
    """-> the largest difference.

    Raises ValueError if it is above LOGIT_TOLERANCE: then the two do not run the same model.
    """
    difference = float(np.abs(ours - peers).max()) if ours.shape == peers.shape else float("nan")
    if not difference <= LOGIT_TOLERANCE:
        raise ValueError(
            f"the logits of the peer {name} differ from ours by {difference:.1e}, more than "
            f"{LOGIT_TOLERANCE:.0e}: it runs another model"
        )
    return difference
