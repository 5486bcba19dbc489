"""Asks a policy questions, and shows how it searches for the answers.

    python -m stepsearch_jax.ask --workdir=DIR [--question=TEXT] [--json] [--config.key=value …]
    python -m stepsearch_jax.ask --config=atlas_quickstart

Without --question it asks for one after the other; an empty line or Ctrl-D ends it. The lines of a
file or pipe are questions, too; empty ones are passed over. The policy is the newest of the run in
DIR, or the one that the config names: sft.checkpoint, such as the shipped warm start, or
model.checkpoint. It answers greedily, as in `evaluate`, and searches the corpus of its config;
--config.data.corpus=FILE names another.
"""

from __future__ import annotations

from stepsearch_jax import cli

if __name__ == "__main__":  # before the imports that take seconds
    parser = cli.make_parser("ask", __doc__, "policy")
    parser.add_argument("--question", metavar="TEXT", help="ask this question only")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object for each question instead"
    )
    options = cli.parse_flags(parser)

import dataclasses
import io
import json
import pathlib
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np

from stepsearch_jax.prompting.templates import render_prompt
from stepsearch_jax.records import Document, Episode, Question
from stepsearch_jax.rollout.text import encode_prompts
from stepsearch_jax.run.collect import collect
from stepsearch_jax.run.folder import check_has_run, check_readable
from stepsearch_jax.run.pretrained import open_weights
from stepsearch_jax.run.start import load_newest_policy, make_sampler
from stepsearch_jax.run.system import Split, System, build_system

WIDTH = 100  # columns of the transcript
# show(the policy's text of a turn, documents that came back, whether the search succeeded)
Show = Callable[[str, Sequence[Document], bool], None]


class _ShownSearch:
    """The run's search; shows each turn of row 0, the question's, when its documents are there."""

    def __init__(self, system: System, show: Show):
        self._system, self._show = system, show
        self.take_counts = system.search.take_counts

    def __call__(self, tokens: np.ndarray, length: np.ndarray, wanted: np.ndarray):
        result = self._system.search(tokens, length, wanted)
        if wanted[0]:
            _, _, doc_ids, ok = result
            action = self._system.tokenizer.decode(tokens[0, : length[0]].tolist())
            documents = [self._system.source.documents[int(i)] for i in doc_ids[0] if i >= 0]
            self._show(action, documents, bool(ok[0]))
        return result


class Asker:
    """A policy that answers one question at a time, each in one greedy episode.

    show: called after every search. workdir: of a run; None: the config names the policy. Raises
    FileNotFoundError or ValueError, naming what to change, if the parts do not fit together.
    """

    def __init__(self, config, workdir: pathlib.Path | None, show: Show):
        open_weights(config)  # gives the config the sizes that it leaves to the checkpoint
        if workdir is not None:
            check_has_run(workdir)
            check_readable(workdir, config)
        # One episode for each device. Only the first is the question's, the others are padding.
        with config.unlocked():
            config.rollout.prompts = self._rows = len(jax.devices())
            config.rollout.group_size, config.rollout.slots = 1, 0
            config.rollout.search = "host"  # documents are shown when they come
            config.rl.advantage, config.rl.minibatches, config.rl.microbatch_size = "gae", 1, 0
            config.reward.shuffle, config.reward.step_reward = False, "gain"  # nobody reads rewards
            config.search.max_failure_fraction = 1.0  # a failed search is shown
        self._system = build_system(config, [])
        params = load_newest_policy(self._system, workdir)
        self._system = dataclasses.replace(self._system, search=_ShownSearch(self._system, show))
        self._sample, to_rollout_layout = make_sampler(self._system)
        self._params = to_rollout_layout(params)

    def ask(self, text: str) -> Episode:
        """The episode of a question. Raises ValueError for an empty, broken or too long one."""
        config, tokenizer = self._system.config, self._system.tokenizer
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the question {text!r} is not UTF-8: write it in UTF-8") from error
        prompt = render_prompt(config.prompt.template, text)
        encoded = encode_prompts([prompt], [text], tokenizer, config.prompt.max_prompt_tokens)
        split = Split([Question("asked", text, "")], *encoded)
        rows = np.full(self._rows, -1)
        rows[0] = 0
        rollout = collect(
            self._system, self._sample, self._params, split, rows, jax.random.key(0), 0.0
        )
        return rollout.episodes[0]

    def describe(self, episode: Episode) -> dict:
        """The episode as JSON has it."""
        documents = self._system.source.documents
        return {
            "question": episode.question.question,
            "answer": episode.answer,
            "finished": episode.finished,
            "truncated": episode.truncated,
            "turns": [
                {
                    "status": turn.status.name.lower(),
                    "action": turn.action,
                    "query": turn.query,
                    "search_ok": turn.search_ok,
                    "documents": [dataclasses.asdict(documents[i]) for i in turn.doc_ids],
                }
                for turn in episode.turns
            ],
        }


def show_turn(action: str, documents: Sequence[Document], ok: bool) -> None:
    """Prints a turn: what the policy wrote, and what came back."""
    print(f"\n{action.strip()}", flush=True)
    if not ok:
        print("    the search failed")
    elif not documents:
        print("    nothing was found")
    for rank, document in enumerate(documents, start=1):
        line = f"{rank}. {document.title}: {' '.join(document.text.split())}"
        print(textwrap.indent(textwrap.fill(line, WIDTH - 7, subsequent_indent="   "), "    "))


def show_end(episode: Episode) -> None:
    """Prints the last turn, and how the episode ended if there is no answer."""
    for turn in episode.turns[-1:]:
        if turn.query is None:
            print(f"\n{turn.action.strip()}")
    if not episode.finished:
        reason = "its context is full" if episode.truncated else "its turns are used up"
        print(f"\nno answer: {reason}")
    print(f"\nanswer: {episode.answer or '–'}\n", flush=True)


def read_questions(question: str | None) -> Iterator[str]:
    """The question of the flag, or those of standard input; an empty line ends a conversation."""
    if question is not None:
        yield question
        return
    if sys.stdin is None:
        return
    is_conversation = sys.stdin.isatty()
    while True:
        if is_conversation:
            print("question: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text = line.strip().removeprefix("\ufeff")  # a mark that some editors put first
        if not line or is_conversation and not text:
            return
        if text:
            yield text


def ask_all(config, workdir: pathlib.Path | None, question: str | None, as_json: bool) -> None:
    """The command. In a conversation, a question that is too long is refused and the next read."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale says
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    asker = Asker(config, workdir, (lambda *_: None) if as_json else show_turn)
    for text in read_questions(question):
        try:
            episode = asker.ask(text)
        except ValueError as error:
            if question is not None or not sys.stdin.isatty():
                raise
            print(f"stepsearch_jax: {error}", file=sys.stderr)
            continue
        if as_json:
            print(json.dumps(asker.describe(episode), ensure_ascii=False), flush=True)
        else:
            show_end(episode)


if __name__ == "__main__":
    with options.config.unlocked():  # a run of several processes is asked by one
        options.config.distributed.processes = 1
    cli.run_guarded(
        partial(ask_all, question=options.question, as_json=options.json),
        options.config,
        options.workdir,
        "ask again",
    )
