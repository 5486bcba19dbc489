"""From a config to the static settings of the jitted programs, and the optimisers.

Reads no files.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import ml_collections

from stepsearch_jax.models.architecture import ModelConfig, RopeScaling
from stepsearch_jax.rl.advantages import uses_critic
from stepsearch_jax.rl.learner import LearnerSettings, make_optimizer
from stepsearch_jax.rollout.state import RolloutSettings

# A model's vocabulary is rounded up to a multiple of this, which any sensible tensor axis divides.
VOCABULARY_MULTIPLE = 64
# Groups of demonstrations of similar length. A step of supervised fine-tuning takes all its rows
# from one group and is cut to the longest.
LENGTH_GROUPS = 6


def round_vocabulary(size: int) -> int:
    """Rows of an embedding for a tokenizer of `size` tokens."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def describe_models(
    config: ml_collections.ConfigDict, vocab_size: int
) -> tuple[ModelConfig, ModelConfig]:
    """-> (the learner's model, the rollout's model)."""
    model_config, rollout_config = config.model, config.rollout
    learner_model = ModelConfig(
        vocab_size=vocab_size,
        num_layers=model_config.num_layers,
        embed_dim=model_config.embed_dim,
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        ffn_dim=model_config.ffn_dim,
        rope_theta=model_config.rope_theta,
        rope_scaling=None
        if model_config.rope_scaling.kind == "none"
        else RopeScaling(**dict(model_config.rope_scaling)),
        norm_eps=model_config.norm_eps,
        qkv_bias=model_config.qkv_bias,
        qk_norm=model_config.qk_norm,
        tie_embeddings=model_config.tie_embeddings,
        dtype=jnp.dtype(model_config.dtype),
        remat=model_config.remat,
        attention_block=rollout_config.attention_block,
    )
    return learner_model, dataclasses.replace(
        learner_model, dtype=jnp.dtype(rollout_config.dtype), remat="none"
    )


def rollout_settings(config: ml_collections.ConfigDict) -> RolloutSettings:
    """Settings from the rollout section, with the lengths of the prompt and search sections."""
    rollout_config = config.rollout
    return RolloutSettings(
        max_prompt_tokens=config.prompt.max_prompt_tokens,
        max_observation_tokens=config.search.max_observation_tokens,
        documents=config.search.k,
        **{
            key: rollout_config[key]
            for key in (
                "max_turns",
                "max_turn_tokens",
                "context",
                "top_k",
                "top_p",
                "slots",
                "flush_fraction",
                "prefill_rows",
                "prefill_tokens",
            )
        },
    )


def learner_settings(config: ml_collections.ConfigDict) -> LearnerSettings:
    """Settings from the rl section, with the placement of rewards from the reward section."""
    reward_config, rl_config = config.reward, config.rl
    return LearnerSettings(
        placement=reward_config.placement,
        outcome_overwrites=reward_config.outcome_overwrites,
        max_ratio=rl_config.max_ratio if rl_config.old_logprobs == "sampler" else math.inf,
        **{
            key: rl_config[key]
            for key in (
                "advantage",
                "gamma",
                "gae_lambda",
                "over_observations",
                "whiten_advantages",
                "clip_low",
                "clip_high",
                "old_logprobs",
                "aggregation",
                "value_clip",
                "entropy_coef",
                "kl_placement",
                "kl_estimator",
                "kl_target",
                "kl_horizon",
                "minibatches",
                "ppo_epochs",
                "microbatch_size",
                "width_buckets",
            )
        },
    )


def make_optimizers(config, iterations: int):
    """-> (policy optimiser, value optimiser or None if rl.advantage uses no values).

    iterations: warm-ups are fractions of this number.
    """
    steps = config.rl.minibatches * config.rl.ppo_epochs
    policy, value = (
        make_optimizer(
            optimizer_config.optimizer,
            optimizer_config.learning_rate,
            warmup=optimizer_config.warmup,
            iterations=iterations,
            steps_per_iteration=steps,
            b1=optimizer_config.b1,
            b2=optimizer_config.b2,
            weight_decay=optimizer_config.weight_decay,
            max_grad_norm=optimizer_config.max_grad_norm,
        )
        for optimizer_config in (config.policy, config.value)
    )
    return policy, value if uses_critic(config.rl.advantage) else None
