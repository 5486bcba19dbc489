"""Lengths of episodes from a file: a run's metrics or transcripts, or quantiles written by hand."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from stepsearch_jax.data import atlas_grammar
from stepsearch_jax.files import read_json_lines
from stepsearch_jax.preflight.lengths import EpisodeLengths
from stepsearch_jax.prompting.templates import render_prompt
from stepsearch_jax.prompting.tokenizers import load_tokenizer

DRAWN = 64  # episodes made of quantiles
LAST = 50  # iterations of a metrics file whose mean counts
KEYS = ("prompt", "length", "searches", "observed")


def read_lengths(path: pathlib.Path, config: ml_collections.ConfigDict) -> list[EpisodeLengths]:
    """The lengths of episodes that a file describes, in one of three forms.

    A run's transcripts.jsonl: its episodes after training, in tokens of config.prompt.tokenizer. A
    run's metrics.jsonl: the means of its last iterations; every episode is alike then. A JSON
    object with the keys prompt, length (tokens of a whole episode), searches and observed (tokens
    of one search), each a number or a list of quantiles, evenly spaced from the least to the
    greatest.
    Raises ValueError or OSError, which name the file, if it has none of them, or for lengths that
    do not fit config.rollout.
    """
    rows = _read_rows(path)
    if len(rows) == 1 and set(KEYS) <= rows[0].keys():
        found = _spread(path, rows[0])
    elif rows and all("turns" in row for row in rows):
        found = _measure_transcripts(rows, config)
    else:
        found = _spread(path, _average(path, rows, config))
    longest = max(episode.total for episode in found)
    prompt, context = config.prompt.max_prompt_tokens, config.rollout.context
    if longest > context or max(episode.prompt for episode in found) > prompt:
        raise ValueError(
            f"--lengths={path}: an episode has {longest:,} tokens, more than "
            f"rollout.context={context:,}, or a longer prompt than "
            f"prompt.max_prompt_tokens={prompt:,}: raise these keys"
        )
    return found


def _read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--lengths={path} is not JSON: {error}") from error
    return [value] if isinstance(value, dict) else []


def _spread(path: pathlib.Path, quantiles: Mapping[str, Any]) -> list[EpisodeLengths]:
    """Episodes at evenly spaced quantiles; a longer one has a longer prompt and searches more."""
    places = (np.arange(DRAWN) + 0.5) / DRAWN
    drawn = {}
    for key in KEYS:
        values = np.atleast_1d(np.array(quantiles[key], float))
        if not np.isfinite(values).all() or (values < 0).any() or (np.diff(values) < 0).any():
            raise ValueError(
                f"--lengths={path}: {key} is {quantiles[key]}; it must be a number, 0 or more, or "
                "several in ascending order"
            )
        drawn[key] = np.interp(places, np.linspace(0, 1, len(values)), values)
    # A fraction of a search: so many of the neighbours search once more.
    searches = np.floor(np.cumsum(drawn["searches"]) + 1e-9)
    searches = np.diff(searches, prepend=0).astype(int)
    return [
        _make_episode(path, *numbers)
        for numbers in zip(drawn["prompt"], drawn["length"], searches, drawn["observed"])
    ]


def _make_episode(
    path: pathlib.Path, prompt: float, length: float, searches: int, observed: float
) -> EpisodeLengths:
    """Turns of equal lengths, of which all but the last search."""
    sampled = round(length) - round(prompt) - searches * round(observed)
    if round(prompt) < 1 or sampled <= searches:
        raise ValueError(
            f"--lengths={path}: an episode of {length:.0f} tokens has no room for a prompt of "
            f"{prompt:.0f} and {searches} searches of {observed:.0f}"
        )
    ends = [sampled * turn // (searches + 1) for turn in range(searches + 2)]
    return EpisodeLengths(
        round(prompt),
        tuple(
            (end - start, round(observed) if turn < searches else 0)
            for turn, (start, end) in enumerate(zip(ends, ends[1:]))
        ),
    )


def _average(
    path: pathlib.Path, rows: Sequence[Mapping[str, Any]], config: ml_collections.ConfigDict
) -> dict[str, float]:
    """What the last iterations of a metrics file say of an episode, on average."""
    wanted = ("prompt_length", "length", "searches", "action_tokens")
    rows = [row for row in rows if all(isinstance(row.get(key), (int, float)) for key in wanted)]
    if not rows:
        raise ValueError(
            f"--lengths={path} has neither the keys {', '.join(KEYS)} nor lines with the metrics "
            f"{', '.join(wanted)}, nor transcripts"
        )
    prompt, length, searches, action_tokens = (
        float(np.mean([row[key] for row in rows[-LAST:]])) for key in wanted
    )
    sampled = action_tokens / (config.rollout.prompts * config.rollout.group_size)
    observed = max(0.0, length - prompt - sampled)
    return dict(
        prompt=prompt,
        length=length,
        searches=searches,
        observed=observed / searches if searches else 0.0,
    )


def _measure_transcripts(
    rows: Sequence[Mapping[str, Any]], config: ml_collections.ConfigDict
) -> list[EpisodeLengths]:
    prompt_config = config.prompt
    words = atlas_grammar.vocabulary() if prompt_config.tokenizer == "atlas" else []
    tokenizer = load_tokenizer(prompt_config.tokenizer, words)
    count = lambda text: len(tokenizer.encode(text))
    after = [row for row in rows if row.get("when") == "after"] or rows
    return [
        EpisodeLengths(
            count(render_prompt(prompt_config.template, row["question"])),
            tuple(
                (max(1, count(turn["action"])), count(turn["observation"])) for turn in row["turns"]
            ),
        )
        for row in after
        if row["turns"]
    ]
