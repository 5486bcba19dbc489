"""How often the loops of a rollout run that end when the data says so: from the longest episodes that a config allows."""

from __future__ import annotations

import dataclasses
import math

from stepsearch_jax.rollout.episode import RolloutSettings


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A rollout on one shard in which every episode is the same: the longest prompt, turns of `max_turn_tokens`, observations of `max_observation_tokens`, as
    many as the context and `max_turns` allow. Slots go in step; when their episodes end all of them take the next prompts.

    prompt, sampled, observed: tokens of an episode; searches: of an episode. waves: how often the slots are filled.
    The remaining numbers are means over the loops: decode_steps and prefill_chunks of an outer step, start_chunks before the first, *_blocks of the cache that
    attention reads in one of them.
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
        """How often a loop runs that was written in these functions of `rollout/episode.py` and `models/attention.py`, innermost first.

        Raises ValueError for a loop that the rollout is not known to have.
        """
        innermost = functions[0] if functions else ""
        within = (
            "decode"
            if "decode_until_wait" in functions
            else "start"
            if "start_episodes" in functions
            else "prefill"
            if "read_observations" in functions
            else ""
        )
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
        return (
            f"every episode is the longest that the config allows: {self.prompt} prompt tokens, {self.sampled} sampled, {self.searches} "
            f"search{'es' if self.searches != 1 else ''} with {self.observed} observed; slots in step, {self.waves} "
            f"wave{'s' if self.waves != 1 else ''} of episodes in them"
        )


def plan_rollout(
    settings: RolloutSettings, attention_block: int, episodes: int, slots: int
) -> Rollout:
    """The loops of one shard with so many episodes and slots."""
    context, prompt = settings.context, settings.max_prompt_tokens
    length, sampled, observed = (
        prompt,
        [],
        [],
    )  # positions of sampled tokens; (first, tokens) of observations
    for turn in range(settings.turns):
        take = min(settings.max_turn_tokens, context - length)
        sampled += range(length, length + take)
        length += take
        if (
            length >= context
            or turn == settings.turns - 1
            or length + settings.max_observation_tokens >= context
        ):
            break
        observed.append((length, settings.max_observation_tokens))
        length += settings.max_observation_tokens

    waves = math.ceil(episodes / slots)
    groups = math.ceil(slots / settings.prefill_rows)
    blocks = lambda position: math.ceil((position + 1) / attention_block)
    ends = lambda first, count: [
        min(first + done + settings.prefill_tokens, first + count) - 1
        for done in range(0, count, settings.prefill_tokens)
    ]
    prompts = [blocks(end) for end in ends(0, max(prompt - 1, 1))]
    observations = [blocks(end) for first, count in observed for end in ends(first - 1, count)]
    absorbed = observations * waves + prompts * (waves - 1)
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
        prefill_chunks=groups * len(absorbed) / outer,
        prefill_blocks=mean(absorbed),
    )
