"""Demonstrations: scripted episodes as arrays, for supervised fine-tuning."""

from __future__ import annotations

import dataclasses

import numpy as np

from stepsearch_jax.data.atlas_kinds import name_groups
from stepsearch_jax.prompting.templates import render_prompt
from stepsearch_jax.records import Question
from stepsearch_jax.rollout.scripted import KINDS, PERFECT, run_script
from stepsearch_jax.rollout.text import encode_prompts
from stepsearch_jax.run.settings import LENGTH_GROUPS
from stepsearch_jax.run.system import System, check_searches

# Minibatches are cut to a length rounded up to this, so that few programs are compiled.
PAD_TO_MULTIPLE_OF = 64


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Scripted episodes as arrays.

    groups: token ids of names that may be exchanged for one another; empty if names have a meaning.
    """

    tokens: np.ndarray  # [n, T] int32, shortest first
    action_mask: np.ndarray  # [n, T] bool
    length: np.ndarray  # [n] int32
    groups: tuple[np.ndarray, ...]

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A minibatch of `rows` rows from one group of similar length, cut to its longest row."""
        groups = np.array_split(np.arange(len(self.length)), LENGTH_GROUPS)
        group = groups[rng.integers(LENGTH_GROUPS)]
        longest = int(self.length[group[-1]])
        padded = -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        width = min(self.tokens.shape[1], padded)
        tokens, action_mask = self.take(rng.choice(group, rows), rng)
        return tokens[:, :width], action_mask[:, :width]

    def take(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and masks of `rows`; each row has its names exchanged within their groups."""
        tokens = self.tokens[rows]
        if self.groups:
            ids = np.arange(tokens.max() + 1 + max(int(group.max()) for group in self.groups))
            new = np.tile(ids, (len(rows), 1))
            for group in self.groups:
                new[:, group] = group[np.argsort(rng.random((len(rows), len(group))), axis=1)]
            tokens = np.take_along_axis(new, tokens, axis=1).astype(np.int32)
        return tokens, self.action_mask[rows]


def demonstrate(
    system: System,
    split_name: str,
    count: int,
    *,
    single_hop: bool,
    poor_fraction: float,
    seed: int,
) -> Demonstrations:
    """Runs the script on `count` questions drawn from a split.

    single_hop: on their sub-questions instead, each asked alone.
    poor_fraction: fraction of decisions drawn by `config.sft.decision_weights`; all others are
    good, and so are those about relations that the script knows (`config.sft.known_fraction`).
    """
    # The questions: drawn without replacement, unless there are too few.
    config, rng = system.config, np.random.default_rng(seed)
    questions = list(system.splits[split_name].questions)
    if single_hop:
        questions = [
            Question(
                f"{question.uid}/{number}", sub.question, sub.answer, sub.aliases, (sub,), "1hop"
            )
            for question in questions
            for number, sub in enumerate(question.sub_questions)
        ]
    if count <= len(questions):
        rows = rng.permutation(len(questions))[:count]
    else:
        rows = rng.integers(len(questions), size=count)
    chosen = [questions[row] for row in rows]
    prompts, lengths = encode_prompts(
        [render_prompt(config.prompt.template, question.question) for question in chosen],
        [question.uid for question in chosen],
        system.tokenizer,
        config.prompt.max_prompt_tokens,
    )

    # The script runs them, with its decisions mixed from poor and perfect ones.
    poor = dict(config.sft.decision_weights)
    decision_weights = {
        kind: poor_fraction * poor.get(kind, 0.0) / sum(poor.values())
        + (1 - poor_fraction) * PERFECT.get(kind, 0.0)
        for kind in KINDS
    }
    episodes = run_script(
        chosen,
        prompts,
        lengths,
        system.source.documents,
        system.search,
        system.tokenizer,
        system.settings,
        system.environment.last_turn_warning,
        decision_weights,
        config.sft.known_fraction,
        seed,
    )
    check_searches(system)

    # Sorted by length for `draw`; names that mean nothing may be exchanged.
    order = np.argsort(episodes.length, kind="stable")
    groups = ()
    if config.sft.rename:
        groups = tuple(
            np.array([system.tokenizer.encode(f" {word}")[0] for word in words])
            for words in name_groups()
        )
    return Demonstrations(
        episodes.tokens[order], episodes.action_mask[order], episodes.length[order], groups
    )
