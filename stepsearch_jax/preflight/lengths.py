"""How often the loops of a rollout run that data ends, for episodes of given lengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from stepsearch_jax.rollout.state import DECODING, FREE, WAITING, RolloutSettings


@dataclasses.dataclass(frozen=True)
class EpisodeLengths:
    """Tokens of one episode: of its prompt, and (sampled, observed) of each turn.

    The last turn observes nothing.
    """

    prompt: int
    turns: tuple[tuple[int, int], ...]

    @property
    def sampled(self) -> int:
        return sum(sampled for sampled, _ in self.turns)

    @property
    def observed(self) -> int:
        return sum(observed for _, observed in self.turns)

    @property
    def total(self) -> int:
        return self.prompt + self.sampled + self.observed


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A rollout on one shard.

    prompt, sampled, searches, observed: means of an episode, the last three in tokens but for
    `searches`. outer_steps: turns of the outermost loop. steps: decode steps in all. The other
    numbers are means over the loops: decode_steps and prefill_chunks of an outer step,
    start_chunks before the first, *_blocks: blocks of the cache that attention reads in one of
    them. live: positions of the cache, of all slots, that a decode step attends to, on average.
    """

    prompt: float
    sampled: float
    searches: float
    observed: float
    outer_steps: float
    steps: float
    decode_steps: float
    decode_blocks: float
    start_chunks: float
    start_blocks: float
    prefill_chunks: float
    prefill_blocks: float
    live: float
    assumption: str  # about the episodes, for the report

    @property
    def episode_tokens(self) -> float:
        return self.prompt + self.sampled + self.observed

    def trips(self, functions: tuple[str, ...]) -> float:
        """How often a loop runs, from the functions in which it was written, innermost first.

        They stand in `rollout/episode.py` and `models/attention.py`. Raises ValueError for an
        unknown loop.
        """
        innermost, within = functions[0] if functions else "", ""
        if "decode_until_wait" in functions:
            within = "decode"
        elif "start_episodes" in functions:
            within = "start"
        elif "read_observations" in functions:
            within = "prefill"
        if innermost == "attend_cached" and within:
            return getattr(self, f"{within}_blocks")
        if innermost == "decode_until_wait":
            return self.decode_steps
        if innermost == "_prefill" and within:
            return getattr(self, f"{within}_chunks")
        if innermost == "run_shard":
            return self.outer_steps
        raise ValueError(
            f"no trip count is known for the loop of {' in '.join(functions[:4]) or 'no function'}"
        )

    def runs(self, program: str) -> float:
        """How often a program of the rollout runs, by its name in `HostPrograms`."""
        return self.outer_steps if program in ("decode", "read_observations") else 1


def longest_episode(settings: RolloutSettings) -> EpisodeLengths:
    """The longest prompt, and turns of `max_turn_tokens` with observations of
    `max_observation_tokens`, as many as the context and `max_turns` allow."""
    length, turns = settings.max_prompt_tokens, []
    for turn in range(settings.turns):
        sampled = min(settings.max_turn_tokens, settings.context - length)
        length += sampled
        behind = length + settings.max_observation_tokens
        if turn == settings.turns - 1 or behind >= settings.context:
            turns.append((sampled, 0))
            break
        turns.append((sampled, settings.max_observation_tokens))
        length = behind
    return EpisodeLengths(settings.max_prompt_tokens, tuple(turns))


def draw_episodes(lengths: Sequence[EpisodeLengths], number: int) -> list[EpisodeLengths]:
    """So many of the given episodes, equally spread over them in the order of their lengths."""
    ordered = sorted(lengths, key=lambda episode: episode.total)
    return [ordered[int((n + 0.5) / number * len(ordered))] for n in range(number)]


def width_fractions(
    lengths: Sequence[int], minibatches: int, size: int, widths: Sequence[int]
) -> list[float]:
    """The fraction of micro-batches that run at each width (`rl/microbatches.py`).

    lengths: tokens of all rows; size: rows of a micro-batch, 0 = a whole minibatch.
    """
    counts = np.zeros(len(widths))
    for part in range(minibatches):
        rows = np.sort(np.array(lengths)[part::minibatches])
        longest = rows.reshape(max(1, len(rows) // size) if size else 1, -1)[:, -1]
        counts += np.bincount(np.searchsorted(widths, longest), minlength=len(widths))
    return (counts / counts.sum()).tolist()


def plan_rollout(
    settings: RolloutSettings,
    attention_block: int,
    episodes: int,
    slots: int,
    lengths: Sequence[EpisodeLengths] = (),
) -> Rollout:
    """The loops of one shard with so many episodes and slots.

    lengths: episodes of which the shard's are drawn (`draw_episodes`); none: every episode is the
    longest that the config allows.
    """
    if lengths:
        drawn = draw_episodes(lengths, episodes)
        drawn = [drawn[n] for n in np.random.default_rng(0).permutation(episodes)]
        assumption = f"episodes as long as the {len(lengths)} given ones"
    else:
        drawn = [longest_episode(settings)] * episodes
        assumption = "every episode is the longest that the config allows"
    shard = ShardLoops(settings, attention_block, drawn, slots)
    shard.run()

    mean = lambda numbers: float(np.mean(list(numbers)))
    average = lambda chunks: mean(chunks) if chunks else 0.0
    prompt, sampled, observed, searches = (
        mean(of(episode) for episode in drawn)
        for of in (
            lambda episode: episode.prompt,
            lambda episode: episode.sampled,
            lambda episode: episode.observed,
            lambda episode: len(episode.turns) - 1,
        )
    )
    return Rollout(
        prompt=prompt,
        sampled=sampled,
        searches=searches,
        observed=observed,
        outer_steps=shard.outer_steps,
        steps=len(shard.decode_blocks),
        decode_steps=len(shard.decode_blocks) / shard.outer_steps,
        decode_blocks=average(shard.decode_blocks),
        start_chunks=len(shard.start_blocks),
        start_blocks=average(shard.start_blocks),
        prefill_chunks=len(shard.prefill_blocks) / shard.outer_steps,
        prefill_blocks=average(shard.prefill_blocks),
        live=average(shard.live),
        assumption=f"{assumption}: on average {prompt:,.0f} prompt tokens, {sampled:,.0f} sampled, "
        f"{searches:.3g} searches with {observed:,.0f} observed",
    )


class ShardLoops:
    """The loops of `rollout/episode.py` on one shard, without a model: who samples and reads when.

    decode_blocks, start_blocks, prefill_blocks: blocks that attention reads in each decode step,
    and in each chunk before the first step and after it. live: cached positions of the decoding
    slots in each step.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        block: int,
        episodes: Sequence[EpisodeLengths],
        slots: int,
    ):
        self._settings, self._block, self._episodes = settings, block, episodes
        self._begun = 0
        self._phase = np.full(slots, FREE)
        self._episode = np.zeros(slots, int)
        self._length = np.ones(slots, int)  # tokens so far; the last one is not in the cache
        self._turn = np.zeros(slots, int)
        self._due = np.zeros(slots, int)  # tokens that the slot's turn still samples
        self.outer_steps = 0
        self.decode_blocks: list[int] = []
        self.start_blocks: list[int] = []
        self.prefill_blocks: list[int] = []
        self.live: list[int] = []

    def run(self) -> None:
        """Runs all episodes; the lists above grow."""
        admitted = self._admit()
        self._prefill(admitted, np.zeros_like(self._length), self._length - 1, self.start_blocks)
        while (self._phase != FREE).any() or self._left():
            self.outer_steps += 1
            self._decode()
            self._read()

    def _left(self) -> int:
        return len(self._episodes) - self._begun

    def _admit(self) -> np.ndarray:
        """Gives the next episodes to free slots -> which slots got one."""
        free = np.flatnonzero(self._phase == FREE)[: self._left()]
        for slot in free:
            episode = self._episodes[self._begun]
            self._episode[slot], self._phase[slot] = self._begun, DECODING
            self._length[slot], self._turn[slot] = episode.prompt, 0
            self._due[slot] = episode.turns[0][0]
            self._begun += 1
        return np.isin(np.arange(len(self._phase)), free)

    def _decode(self) -> None:
        while True:
            decoding = self._phase == DECODING
            waiting = (self._phase == WAITING).sum()
            waiting += min((self._phase == FREE).sum(), self._left())
            work = decoding.sum() + waiting
            if not decoding.any() or waiting >= self._settings.flush_fraction * work:
                return
            self.decode_blocks.append(math.ceil(self._length[decoding].max() / self._block))
            self.live.append(int(self._length[decoding].sum()))
            self._length += decoding
            self._due -= decoding
            for slot in np.flatnonzero(decoding & (self._due == 0)):
                turns = self._episodes[self._episode[slot]].turns
                last = self._turn[slot] == len(turns) - 1
                self._phase[slot] = FREE if last else WAITING

    def _read(self) -> None:
        """Reads observations and the prompts of the next episodes."""
        waiting = self._phase == WAITING
        first, count = self._length - 1, np.zeros_like(self._length)
        for slot in np.flatnonzero(waiting):
            turns = self._episodes[self._episode[slot]].turns
            count[slot] = turns[self._turn[slot]][1]
            self._turn[slot] += 1
            self._due[slot] = turns[self._turn[slot]][0]
        self._length += count
        self._phase[waiting] = DECODING
        admitted = self._admit()
        first = np.where(admitted, 0, first)
        count = np.where(admitted, self._length - 1, count)
        self._prefill(waiting | admitted, first, count, self.prefill_blocks)

    def _prefill(self, wanted, first, count, blocks: list[int]) -> None:
        """Chunks of the wanted slots, the longest first, `prefill_rows` of them at a time."""
        count = np.where(wanted, count, 0)
        order = np.argsort(-count, kind="stable")[: (count > 0).sum()]
        width = self._settings.prefill_tokens
        for start in range(0, len(order), self._settings.prefill_rows):
            group = order[start : start + self._settings.prefill_rows]
            for offset in range(0, count[group[0]], width):
                at_work = group[offset < count[group]]
                ends = first[at_work] + np.minimum(offset + width, count[at_work])
                blocks.append(math.ceil(ends.max() / self._block))
