"""The rollouts that the benchmark times, and what it compares them with. Loads without jax."""

from __future__ import annotations

import dataclasses

PEERS = ("transformers", "tunix")
LOCK_STEP = "lock step"  # the other side of slots


@dataclasses.dataclass(frozen=True)
class Case:
    """What one rollout does. A turn's first token t asks for turn_tokens[t mod n] tokens in all."""

    episodes: int
    prompt: int
    turns: int
    turn_tokens: tuple[int, ...]
    observation: int
    slots: int  # episodes that run at a time; 0 = all
    flush_fraction: float  # this and the rest: config.rollout's keys of the same names
    prefill_rows: int
    prefill_tokens: int

    @property
    def context(self) -> int:
        """Tokens of the longest episode."""
        return (
            self.prompt + self.turns * max(self.turn_tokens) + (self.turns - 1) * self.observation
        )

    def resize(self, episodes: int | None) -> Case:
        """The case with so many episodes; None = as it is.

        Raises ValueError if they are no multiple of its slots.
        """
        if episodes and self.slots and episodes % self.slots:
            raise ValueError(
                f"--episodes={episodes}: the case slots compares groups of {self.slots}; choose a "
                f"multiple of {self.slots}"
            )
        return dataclasses.replace(self, episodes=episodes or self.episodes)

    @property
    def prefilled(self) -> int:
        """Tokens that are read and not sampled, without each prompt's last one.

        The first decode step reads that one.
        """
        return self.episodes * (self.prompt - 1 + (self.turns - 1) * self.observation)


# As configs/base.py, but tokens for one observation of short, a third of long's.
CONFIGURED = dict(flush_fraction=0.5, prefill_rows=16, prefill_tokens=200)
SHORT = Case(
    episodes=16, prompt=128, turns=4, turn_tokens=(64,), observation=192, slots=0, **CONFIGURED
)
LONG = Case(
    episodes=8, prompt=512, turns=6, turn_tokens=(128,), observation=600, slots=0, **CONFIGURED
)
DECODE = Case(
    episodes=64, prompt=128, turns=1, turn_tokens=(512,), observation=1, slots=0, **CONFIGURED
)
SLOTS = Case(
    episodes=64,
    prompt=128,
    turns=1,
    turn_tokens=(64, 128, 256, 512),
    observation=1,
    slots=16,
    flush_fraction=0.05,
    prefill_rows=2,
    prefill_tokens=128,
)
CASES = {
    "short": (SHORT,),
    "long": (LONG,),
    "turns": tuple(dataclasses.replace(SHORT, turns=turns) for turns in (1, 2, 4, 8)),
    "decode": (DECODE,),
    "slots": (SLOTS,),
}
