"""Random episodes as arrays, and the advantage estimators as loops over Python lists (oracles)."""

from __future__ import annotations

import numpy as np

B, T, K = 6, 20, 4
ESTIMATORS = ("gae", "turn_gae", "grpo", "rloo", "turn_return")
CRITIC_FREE = ("grpo", "rloo", "turn_return")
PER_TOKEN = (
    "logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "old_values",
    "entropy",
    "token_mask",
    "action_mask",
    "turn_ids",
)


def draw_episodes(seed: int, share: float = 0.9) -> dict[str, np.ndarray]:
    """The arrays of `stepwise_ppo_loss` by name, B rows of T tokens and up to K turns.

    Rows hold a prompt, turns of actions and observations, and padding. A `share` of the actions are
    in action_mask, so that turns have holes; one row in six has no turn at all. There are up to
    three groups, one with a negative id, of any size and with their rows in any order.
    """
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    token_mask, action_mask = np.zeros((2, B, T), bool)
    turn_ids, search_end = np.full((B, T), -1, np.int32), np.full((B, K), -1, np.int32)
    for b in range(B):
        end = rng.integers(1, 4)
        for turn in range(0 if rng.random() < 1 / 6 else rng.integers(1, K + 1)):
            start, actions = end, min(T, end + rng.integers(1, 4))
            action_mask[b, start:actions] = rng.random(actions - start) < share
            end = min(T, actions + rng.integers(0, 4))
            turn_ids[b, start:end] = turn
            taken = np.flatnonzero(action_mask[b, start:actions])
            if len(taken) and rng.random() < 0.7:
                search_end[b, turn] = start + taken[-1]
        token_mask[b, :end] = True
    old = -np.abs(normal(B, T))
    return dict(
        logprobs=old + 0.3 * normal(B, T),
        old_logprobs=old,
        ref_logprobs=old + 0.2 * normal(B, T),
        values=normal(B, T),
        old_values=normal(B, T),
        entropy=np.abs(normal(B, T)),
        token_mask=token_mask,
        action_mask=action_mask,
        turn_ids=turn_ids,
        group_ids=np.array([7, -3, 40], np.int32)[rng.integers(0, 3, B)],
        search_end=search_end,
        step_rewards=normal(B, K),
        outcome_rewards=normal(B),
    )


def pad_rows_and_tokens(batch: dict, rows: int, tokens: int) -> dict:
    """The same batch with padding below and to the right; its values must not matter."""

    def pad(name, array):
        fill = False if array.dtype == bool else -1 if name in ("turn_ids", "search_end") else 7
        widths = ((0, rows), (0, tokens if name in PER_TOKEN else 0))[: array.ndim]
        return np.pad(array, widths, constant_values=fill)

    return {name: pad(name, array) for name, array in batch.items()}


def insert_observation(batch: dict, at: int, length: int) -> dict:
    """The same batch with `length` more observation tokens before token `at`.

    They belong to the turn of the token before them.
    """
    longer = {}
    for name in PER_TOKEN:
        array = batch[name]
        copied = name in ("turn_ids", "token_mask")
        token = array[:, at - 1 : at] if copied else np.zeros_like(array[:, :1])
        inserted = token.repeat(length, axis=1)
        longer[name] = np.concatenate([array[:, :at], inserted, array[:, at:]], axis=1)
    ends = batch["search_end"]
    return batch | longer | dict(search_end=ends + length * (ends >= at))


def list_turns(action_mask: np.ndarray, turn_ids: np.ndarray, b: int) -> list[list[int]]:
    """The action tokens of each turn of row b that has any."""
    turns = [
        [t for t in range(action_mask.shape[1]) if action_mask[b, t] and turn_ids[b, t] == k]
        for k in range(int(turn_ids[b].max(initial=-1)) + 1)
    ]
    return [tokens for tokens in turns if tokens]


def loop_gae(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float
) -> list[float]:
    """The definition, a sum of one-step errors for each place; float64."""
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0])]
    return [
        sum((gamma * gae_lambda) ** n * delta for n, delta in enumerate(deltas[i:]))
        for i in range(len(deltas))
    ]


def standardize(x: float, among: list[float]) -> float:
    return (x - np.mean(among)) / (np.std(among) + 1e-6)


def loop_estimate(
    rewards,
    values,
    action_mask,
    credit_mask,
    turn_ids,
    group_ids,
    *,
    estimator,
    gamma,
    gae_lambda,
    whiten_advantages,
):
    """`estimate_advantages` from its definitions.

    Returns (advantages, returns, value_mask), NumPy [B, T], float64.
    """
    shape = action_mask.shape
    advantages, returns, value_mask = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    turns = [list_turns(action_mask, turn_ids, b) for b in range(shape[0])]
    turn_rewards = [
        [sum(float(rewards[b, t]) for t in tokens) for tokens in turns[b]] for b in range(shape[0])
    ]
    for b in range(shape[0]):
        # The rows of the group that have a turn, and their summed rewards.
        members = [
            other for other in range(shape[0]) if group_ids[other] == group_ids[b] and turns[other]
        ]
        totals = {other: sum(turn_rewards[other]) for other in members}
        # Token by token, also in rows without a turn.
        if estimator == "gae":
            kept = [t for t in range(shape[1]) if credit_mask[b, t]]
            token_rewards = [float(rewards[b, t]) for t in kept]
            token_values = [float(values[b, t]) for t in kept]
            found = loop_gae(token_rewards, token_values, gamma, gae_lambda)
            for t, advantage in zip(kept, found):
                advantages[b, t], returns[b, t] = advantage, advantage + values[b, t]
                value_mask[b, t] = True
        if not turns[b]:
            continue
        # Turn by turn: the value is that of the turn's first action.
        if estimator == "turn_gae":
            first_values = [float(values[b, tokens[0]]) for tokens in turns[b]]
            found = loop_gae(turn_rewards[b], first_values, gamma, gae_lambda)
            for tokens, advantage in zip(turns[b], found):
                advantages[b, tokens] = advantage
                returns[b, tokens[0]] = advantage + values[b, tokens[0]]
                value_mask[b, tokens[0]] = True
        # Without a critic: row by row against the group, or turn by turn.
        elif estimator == "grpo":
            advantages[b, action_mask[b]] = standardize(totals[b], list(totals.values()))
        elif estimator == "rloo":
            others = [totals[other] for other in members if other != b]
            advantages[b, action_mask[b]] = totals[b] - np.mean(others) if others else 0.0
        elif estimator == "turn_return":
            following = {
                other: [
                    sum(gamma**j * reward for j, reward in enumerate(turn_rewards[other][k:]))
                    for k in range(len(turns[other]))
                ]
                for other in members
            }
            for k, tokens in enumerate(turns[b]):
                among = [found[min(k, len(found) - 1)] for found in following.values()]
                advantages[b, tokens] = standardize(following[b][k], among)
    # Whitening over all tokens that have an advantage.
    covered = credit_mask if estimator == "gae" else action_mask
    if whiten_advantages and estimator not in CRITIC_FREE and covered.any():
        kept = advantages[covered]
        advantages = np.where(covered, (advantages - kept.mean()) / np.sqrt(kept.var() + 1e-8), 0)
    return advantages, returns, value_mask
