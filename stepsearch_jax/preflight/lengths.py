"""Trip counts of the rollout's loops that data ends, for the longest episodes of a config."""

from __future__ import annotations

import dataclasses
import math

from stepsearch_jax.rollout.state import RolloutSettings


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A rollout on one shard in which every episode is the same.

    It has the longest prompt, turns of `max_turn_tokens` and observations of
    `max_observation_tokens`, as many as the context and `max_turns` allow. Slots go in step; when
    their episodes end all of them take the next prompts.

    prompt, sampled, observed: tokens of an episode; searches: of an episode. waves: how often the
    slots are filled. The other numbers are means over the loops: decode_steps and prefill_chunks of
    an outer step, start_chunks before the first, *_blocks: blocks of the cache that attention reads
    in one of them.
    """

    prompt: int
    sampled: int
    searches: int
    observed: int
    waves: int
    outer_steps: float
    decode_steps: float
    decode_blocks: float
    start_chunks: float
    start_blocks: float
    prefill_chunks: float
    prefill_blocks: float

    @property
    def episode_tokens(self) -> int:
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

    def describe(self) -> str:
        """The assumption about the episodes, for the report."""
        searches = f"{self.searches} search{'es' if self.searches != 1 else ''}"
        waves = f"{self.waves} wave{'s' if self.waves != 1 else ''}"
        return (
            f"every episode is the longest that the config allows: {self.prompt} prompt tokens, "
            f"{self.sampled} sampled, {searches} with {self.observed} observed; slots in step, "
            f"{waves} of episodes in them"
        )


def plan_rollout(
    settings: RolloutSettings, attention_block: int, episodes: int, slots: int
) -> Rollout:
    """The loops of one shard with so many episodes and slots."""
    context, prompt = settings.context, settings.max_prompt_tokens
    # One episode: positions of sampled tokens; (first position, tokens) of observations.
    length, sampled, observed = prompt, [], []
    for turn in range(settings.turns):
        take = min(settings.max_turn_tokens, context - length)
        sampled += range(length, length + take)
        length += take
        last = turn == settings.turns - 1
        if last or length >= context or length + settings.max_observation_tokens >= context:
            break
        observed.append((length, settings.max_observation_tokens))
        length += settings.max_observation_tokens

    # Blocks of the cache that the last token of each prefill chunk attends to.
    waves = math.ceil(episodes / slots)
    groups = math.ceil(slots / settings.prefill_rows)
    blocks = lambda position: math.ceil((position + 1) / attention_block)
    ends = lambda first, count: [
        min(first + done + settings.prefill_tokens, first + count) - 1
        for done in range(0, count, settings.prefill_tokens)
    ]
    prompts = [blocks(end) for end in ends(0, max(prompt - 1, 1))]
    observations = [blocks(end) for first, count in observed for end in ends(first - 1, count)]
    prefilled = observations * waves + prompts * (waves - 1)
    outer = waves * (len(observed) + 1)
    mean = lambda numbers: sum(numbers) / len(numbers) if numbers else 0.0
    return Rollout(
        prompt=prompt,
        sampled=len(sampled),
        searches=len(observed),
        observed=sum(count for _, count in observed),
        waves=waves,
        outer_steps=outer,
        decode_steps=waves * len(sampled) / outer,
        decode_blocks=mean([blocks(position - 1) for position in sampled]),
        start_chunks=groups * len(prompts),
        start_blocks=mean(prompts),
        prefill_chunks=groups * len(prefilled) / outer,
        prefill_blocks=mean(prefilled),
    )
