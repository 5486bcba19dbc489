"""From a config to the static choices of the jitted programs: model sizes, settings, optimisers.
Reads no files; what is wrong with a config is found here.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import ml_collections

from stepsearch_jax.models.architecture import ModelConfig, RopeScaling
from stepsearch_jax.rl.advantages import uses_critic
from stepsearch_jax.rl.learner import LearnerSettings, make_optimizer
from stepsearch_jax.rollout.episode import RolloutSettings

# a model's vocabulary is rounded up to it, so that any sensible tensor axis divides it
VOCABULARY_MULTIPLE = 64
# demonstrations are grouped by length, a step of supervised fine-tuning takes all its rows from one
# group and is cut to its longest
LENGTH_GROUPS = 6


def round_vocabulary(size: int) -> int:
    """Rows of an embedding for a tokenizer of `size` tokens."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def describe_models(
    config: ml_collections.ConfigDict, vocab_size: int
) -> tuple[ModelConfig, ModelConfig]:
    """-> the model as the learner computes it, and as the rollout does."""
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
    """The rollout section, and the lengths that the prompt and search sections allow."""
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
    """The rl section, and what the reward section says about places."""
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
            )
        },
    )


def make_optimizers(config, iterations: int):
    """-> (policy optimiser, value optimiser, which is None with an advantage estimator that reads
    no values). iterations: of which warm-ups are shares.
    """
    steps = config.rl.minibatches * config.rl.ppo_epochs
    policy, value = (
        make_optimizer(
            o.optimizer,
            o.learning_rate,
            warmup=o.warmup,
            iterations=iterations,
            steps_per_iteration=steps,
            b1=o.b1,
            b2=o.b2,
            weight_decay=o.weight_decay,
            max_grad_norm=o.max_grad_norm,
        )
        for o in (config.policy, config.value)
    )
    return policy, value if uses_critic(config.rl.advantage) else None
