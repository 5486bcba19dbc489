"""From a config to the static choices of the jitted programs: model sizes, settings, optimisers. Reads no files; what is wrong with a config is found here."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import ml_collections

from stepsearch_jax.models.architecture import ModelConfig, RopeScaling
from stepsearch_jax.rl.advantages import uses_critic
from stepsearch_jax.rl.learner import LearnerSettings, make_optimizer
from stepsearch_jax.rollout.episode import RolloutSettings

VOCABULARY_MULTIPLE = (
    64  # a model's vocabulary is rounded up to it, so that any sensible tensor axis divides it
)
LENGTH_GROUPS = 6  # demonstrations are grouped by length, a step of imitation takes all its rows from one group and is cut to its longest


def round_vocabulary(size: int) -> int:
    """Rows of an embedding for a tokenizer of `size` tokens."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def describe_models(
    config: ml_collections.ConfigDict, vocab_size: int
) -> tuple[ModelConfig, ModelConfig]:
    """-> the model as the learner computes it, and as the rollout does."""
    m, r = config.model, config.rollout
    learner_model = ModelConfig(
        vocab_size=vocab_size,
        num_layers=m.num_layers,
        embed_dim=m.embed_dim,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.head_dim,
        ffn_dim=m.ffn_dim,
        rope_theta=m.rope_theta,
        rope_scaling=None if m.rope_scaling.kind == "none" else RopeScaling(**dict(m.rope_scaling)),
        norm_eps=m.norm_eps,
        qkv_bias=m.qkv_bias,
        qk_norm=m.qk_norm,
        tie_embeddings=m.tie_embeddings,
        dtype=jnp.dtype(m.dtype),
        remat=m.remat,
        attention_block=r.attention_block,
    )
    return learner_model, dataclasses.replace(learner_model, dtype=jnp.dtype(r.dtype), remat="none")


def rollout_settings(config: ml_collections.ConfigDict) -> RolloutSettings:
    """The rollout section, and the lengths that the prompt and search sections allow."""
    r = config.rollout
    return RolloutSettings(
        max_prompt_tokens=config.prompt.max_prompt_tokens,
        max_observation_tokens=config.search.max_observation_tokens,
        documents=config.search.k,
        **{
            key: r[key]
            for key in (
                "max_turns",
                "max_turn_tokens",
                "context",
                "top_k",
                "top_p",
                "slots",
                "flush_share",
                "prefill_rows",
                "prefill_tokens",
            )
        },
    )


def learner_settings(config: ml_collections.ConfigDict) -> LearnerSettings:
    """The rl section, and what the reward section says about places."""
    w, l = config.reward, config.rl
    return LearnerSettings(
        placement=w.placement,
        outcome_overwrites=w.outcome_overwrites,
        max_ratio=l.max_ratio if l.old_logprobs == "sampler" else math.inf,
        **{
            key: l[key]
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
                "epochs",
                "micro_rows",
            )
        },
    )


def make_optimizers(config, iterations: int):
    """-> (policy optimiser, value optimiser, which is None with an advantage estimator that reads no values). iterations: of which warm-ups are shares."""
    steps = config.rl.minibatches * config.rl.epochs
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
