"""The environment's texts as token ids, and observations built from them by integer copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class EnvironmentTokens:
    """The environment's fixed texts, each a one-dimensional int32 array of token ids.

    An observation is `head`, then for each document its rank's prefix and the document, then
    `tail`. `nothing_found` and `search_failed` stand in the place of the documents. The two
    warnings are complete texts of their own. `ranks` has one prefix for each of the k ranks, best
    first.
    """

    head: np.ndarray
    ranks: tuple[np.ndarray, ...]
    tail: np.ndarray
    nothing_found: np.ndarray
    search_failed: np.ndarray
    invalid_warning: np.ndarray
    last_turn_warning: np.ndarray

    @property
    def minimum_budget(self) -> int:
        """Tokens of the longest observation without a single document token: k prefixes, or one of
        the two notes, between head and tail."""
        middle = max(sum(map(len, self.ranks)), len(self.nothing_found), len(self.search_failed))
        return len(self.head) + middle + len(self.tail)


def build_observation(
    environment: EnvironmentTokens, documents: Sequence[np.ndarray], budget: int
) -> np.ndarray:
    """The tokens of one observation: [n] int32, n <= budget.

    documents: token ids of at most k documents, best first; none gives the text for nothing found.
    Documents that exceed the budget together are cut at their ends: each may have an equal share,
    and what a short document leaves over goes to the others. Raises ValueError if the fixed texts
    alone exceed the budget.
    """
    if environment.minimum_budget > budget:
        raise ValueError(
            f"the observation's fixed texts take {environment.minimum_budget} tokens, "
            f"more than max_observation_tokens={budget}"
        )
    if not documents:
        return np.concatenate([environment.head, environment.nothing_found, environment.tail])
    prefixes = environment.ranks[: len(documents)]
    room = budget - len(environment.head) - len(environment.tail) - sum(map(len, prefixes))
    parts = [environment.head]
    shares = share_out([len(document) for document in documents], room)
    for prefix, document, share in zip(prefixes, documents, shares, strict=True):
        parts += [prefix, document[:share]]
    return np.concatenate([*parts, environment.tail])


def share_out(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each length fits into `room`: everything if it fits, else equal shares; what a
    short one leaves over goes to the longer ones.

    A remainder that cannot be shared goes to the best-ranked of those that are cut, one token each.
    """
    shares = list(lengths)
    shortest_first = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for done, i in enumerate(shortest_first):
        level, left_over = divmod(room, len(lengths) - done)
        if lengths[i] > level:  # this one and all longer ones are cut
            for place, cut in enumerate(sorted(shortest_first[done:])):
                shares[cut] = level + (place < left_over)
            break
        room -= lengths[i]
    return shares
