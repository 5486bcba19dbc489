"""The whole objective as plain loops over Python floats: the oracle of `stepwise_ppo_loss`."""

from __future__ import annotations

import math

import numpy as np
from episodes import B, K, T, loop_estimate


def penalty(x: float, estimator: str) -> float:
    """KL estimate of one token with log-ratio x."""
    return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[estimator]


def loop_loss(
    batch,
    *,
    clip_low,
    clip_high,
    max_ratio=math.inf,
    aggregation,
    value_clip,
    value_coef,
    entropy_coef,
    kl_coef,
    kl_placement,
    kl_estimator,
    placement,
    outcome_overwrites,
    over_observations,
    advantage,
    **estimating,
):
    """The objective from its definition, one Python float at a time.

    step_rewards None: plain outcome-only PPO.
    """
    mask, number = batch["action_mask"], lambda name, b, t: float(batch[name][b, t])
    # Rewards of tokens.
    rewards = np.zeros(mask.shape)
    for b in range(B):
        kept, rewarded = np.flatnonzero(mask[b]), {}
        for k in range(K) if batch["step_rewards"] is not None else ():
            if batch["search_end"][b, k] >= 0:
                rewarded[int(batch["search_end"][b, k])] = number("step_rewards", b, k)
        if len(kept):
            rewarded[kept[-1]] = float(batch["outcome_rewards"][b]) + (
                0 if outcome_overwrites else rewarded.get(kept[-1], 0.0)
            )
            if placement == "merged":
                rewarded = {kept[-1]: sum(rewarded.values())}
        for t in kept:
            log_ratio = number("old_logprobs", b, t) - number("ref_logprobs", b, t)
            charged = kl_coef * penalty(log_ratio, kl_estimator)
            rewards[b, t] = rewarded.get(int(t), 0.0)
            rewards[b, t] -= charged if kl_placement == "reward" else 0.0
    # Advantages and returns.
    credit = batch["token_mask"] & (batch["turn_ids"] >= 0) if over_observations else mask
    advantages, returns, value_mask = loop_estimate(
        rewards,
        batch["old_values"],
        mask,
        credit,
        batch["turn_ids"],
        batch["group_ids"],
        estimator=advantage,
        **estimating,
    )

    # The terms of the loss, and their means.
    def mean(term, over):
        rows = [[term(b, t) for t in range(T) if over[b, t]] for b in range(B)]
        rows = [row for row in rows if row]
        if not rows:
            return 0.0
        if aggregation == "sequence_mean":
            return np.mean([np.mean(row) for row in rows])
        return np.mean(sum(rows, []))

    def policy_term(b, t):
        ratio = min(math.exp(number("logprobs", b, t) - number("old_logprobs", b, t)), max_ratio)
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        return -min(ratio * advantages[b, t], clipped * advantages[b, t])

    def value_term(b, t):
        new, old, target = number("values", b, t), number("old_values", b, t), returns[b, t]
        clipped = min(max(new, old - value_clip), old + value_clip)
        return 0.5 * max((new - target) ** 2, (clipped - target) ** 2)

    def kl_term(b, t):
        return penalty(number("logprobs", b, t) - number("ref_logprobs", b, t), kl_estimator)

    loss = mean(policy_term, mask) + value_coef * mean(value_term, value_mask)
    loss -= entropy_coef * mean(lambda b, t: number("entropy", b, t), mask)
    if kl_placement == "loss":
        loss += kl_coef * mean(kl_term, mask)
    return loss
