"""The mathematics of StePPO as pure jitted functions: advantages and losses.

docs/losses.md derives them and shows their use.
"""

from stepsearch_jax.rl.advantages import (
    estimate_advantages,
    gae,
    grpo,
    rloo,
    stepwise_advantages,
    turn_gae,
    turn_return,
    uses_critic,
)
from stepsearch_jax.rl.kl import adapt_kl_coef, bounded_log_ratio, kl_penalty
from stepsearch_jax.rl.losses import (
    aggregate,
    entropy_bonus,
    kl_loss,
    loss_normalizer,
    policy_loss,
    stepwise_ppo_loss,
    value_loss,
)

__all__ = [
    "adapt_kl_coef",
    "aggregate",
    "bounded_log_ratio",
    "entropy_bonus",
    "estimate_advantages",
    "gae",
    "grpo",
    "kl_loss",
    "kl_penalty",
    "loss_normalizer",
    "policy_loss",
    "rloo",
    "stepwise_advantages",
    "stepwise_ppo_loss",
    "turn_gae",
    "turn_return",
    "uses_critic",
    "value_loss",
]
