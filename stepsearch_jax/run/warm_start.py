"""Where the policy of a run comes from before RL: pretrained weights, an earlier run, or chance;
and supervised fine-tuning of the scripted searcher on top.

Imitation runs in phases (`config.sft.phases`). A policy from scratch first learns to read: single
hops, then whole questions. The last phases spoil only the searching, so that RL has something to
improve. For a real model one phase without any spoiling is a cold start that teaches the format.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib

import jax
import numpy as np
from etils import epath

from stepsearch_jax import checkpoint
from stepsearch_jax.data.atlas_grammar import name_groups
from stepsearch_jax.files import in_bucket
from stepsearch_jax.metrics import MetricsWriter, progress
from stepsearch_jax.models.transformer import Policy, set_previous_token_heads
from stepsearch_jax.models.weights import load_policy
from stepsearch_jax.prompting.templates import render_prompt
from stepsearch_jax.records import Question
from stepsearch_jax.rl.learner import init_model_state, init_params
from stepsearch_jax.rl.sft import make_sft, make_sft_optimizer
from stepsearch_jax.rollout.scripted import KINDS, PERFECT, run_script
from stepsearch_jax.rollout.text import encode_prompts
from stepsearch_jax.run.config_file import find_file
from stepsearch_jax.run.settings import LENGTH_GROUPS
from stepsearch_jax.run.system import System, check_searches, process_rows
from stepsearch_jax.sharding import rows_to_mesh

logger = logging.getLogger("stepsearch_jax")

# minibatches are cut to a length rounded up to this, so that few programs are compiled
PAD_TO_MULTIPLE_OF = 64


def warm_start(system: System, abstract_params, specs, key: jax.Array, workdir: pathlib.Path):
    """-> the parameters with which RL starts, kept in WORKDIR/start.

    like, specs: what the parameters look like, and their PartitionSpecs
    (`learner.describe_params`). key: makes random ones, where nothing else is given.
    """
    sft_config, start, model = system.config.sft, workdir / "start", system.learner_model
    if checkpoint.has_params(start):
        return checkpoint.load_params(
            start,
            abstract_params,
            f"give the flags of the run, or remove {start}: the same command then makes it again",
        )
    if sft_config.checkpoint:
        remedy = "must name parameters of this config's model, or be empty; configs/atlas_quickstart.py:anew makes those of the quickstart again"
        params = checkpoint.load_params(
            find_checkpoint(sft_config.checkpoint),
            abstract_params,
            f"sft.checkpoint={sft_config.checkpoint} {remedy}",
        )
    elif system.weights is not None:
        logger.info("reading %s", system.weights.path)
        params = load_policy(system.weights, model, abstract_params)
    else:
        params, _ = init_params(
            Policy(model), system.mesh, dict(system.config.mesh.train_rules), key
        )
        if system.config.model.previous_token_peak:
            params = set_previous_token_heads(
                params, model, system.config.model.previous_token_peak
            )
    if sft_config.phases:
        params = fine_tune(system, params, specs, workdir)
    checkpoint.save_params(start, params)
    return params


def find_checkpoint(folder: str) -> pathlib.Path:
    """`folder` as it stands (also gs://…), or among the shipped configs if the working directory
    does not have it (`find_file`).
    """
    if in_bucket(bucket := epath.Path(folder)):
        return bucket  # pathlib would make gs:/… of it
    return find_file(folder)


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Scripted episodes as arrays. `groups`: token ids of names that may be exchanged for one
    another, empty where names mean something.
    """

    tokens: np.ndarray  # [n, T] int32, shortest first
    action_mask: np.ndarray  # [n, T] bool
    length: np.ndarray  # [n] int32
    groups: tuple[np.ndarray, ...]

    def draw(self, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A minibatch of `rows` rows from one group of about equal length, cut to the group's
        longest.
        """
        group = np.array_split(np.arange(len(self.length)), LENGTH_GROUPS)[
            rng.integers(LENGTH_GROUPS)
        ]
        width = min(
            self.tokens.shape[1],
            -(-int(self.length[group[-1]]) // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF,
        )
        tokens, action_mask = self.take(rng.choice(group, rows), rng)
        return tokens[:, :width], action_mask[:, :width]

    def take(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and masks of `rows`, each row with its names exchanged at random within their
        groups.
        """
        tokens = self.tokens[rows]
        if self.groups:
            new = np.tile(
                np.arange(tokens.max() + 1 + max(int(group.max()) for group in self.groups)),
                (len(rows), 1),
            )
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

    single_hop: on their sub-questions, each asked alone. poor_fraction: share of decisions taken by
    `config.sft.decision_weights`, the others are good ones; so are those about relations that the
    script knows (`config.sft.known_fraction`).
    """
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
    chosen = [
        questions[row]
        for row in (
            rng.permutation(len(questions))[:count]
            if count <= len(questions)
            else rng.integers(len(questions), size=count)
        )
    ]
    prompts, lengths = encode_prompts(
        [render_prompt(config.prompt.template, q.question) for q in chosen],
        [q.uid for q in chosen],
        system.tokenizer,
        config.prompt.max_prompt_tokens,
    )
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


def fine_tune(system: System, params, specs, workdir: pathlib.Path):
    """Runs all phases -> parameters. Interrupted, it goes on from its newest checkpoint; the data
    of every step follows from the seed and its number.

    Raises ValueError, before any step, where single hops are asked of questions that have none.
    """
    config, sft_config, mesh = system.config, system.config.sft, system.mesh
    for name in (config.data.train_split, sft_config.held_out_split):
        if any(phase[2] for phase in sft_config.phases) and not any(
            question.sub_questions for question in system.splits[name].questions
        ):
            raise ValueError(
                f"sft.phases={sft_config.phases} ask sub-questions alone, but no question of "
                f"{name} (data.kind={config.data.kind}) has any: set the third entry of each phase "
                "to False"
            )
    total = sum(phase[0] for phase in sft_config.phases)
    optimizer = make_sft_optimizer(
        sft_config.optimizer, [(phase[0], phase[-1]) for phase in sft_config.phases]
    )
    run, held_out_loss = make_sft(system.learner_model, optimizer)
    state = init_model_state(optimizer, mesh, params, specs)
    checkpoints = checkpoint.Checkpoints(workdir / "sft", config.checkpoint.keep)
    done = checkpoints.latest() or 0
    if done:
        state = checkpoints.restore(done, state)
        logger.info("resumed from fine-tuning step %d", done)
    first = 0
    writer = MetricsWriter(workdir, done) if jax.process_index() == 0 else None
    bar = progress(total - done, "fine-tuning")
    for number, (steps, rows, single_hop, poor_fraction, _) in enumerate(sft_config.phases):
        if done >= first + steps:
            first += steps
            continue
        demonstrations = demonstrate(
            system,
            config.data.train_split,
            sft_config.demonstrations,
            single_hop=single_hop,
            poor_fraction=poor_fraction,
            seed=config.seed + number,
        )
        held_out = demonstrate(
            system,
            sft_config.held_out_split,
            sft_config.held_out,
            single_hop=single_hop,
            poor_fraction=poor_fraction,
            seed=config.seed + 1000 + number,
        )
        mine = process_rows(mesh, rows)
        exam = rows_to_mesh(mesh, _every_row(held_out, process_rows(mesh, len(held_out.tokens))))
        for step in range(max(first, done), first + steps):
            minibatch = demonstrations.draw(rows, np.random.default_rng([config.seed, step]))
            state, loss = run(state, *rows_to_mesh(mesh, tuple(array[mine] for array in minibatch)))
            bar.update(1)
            finished = step + 1
            if finished % sft_config.log_every == 0 or finished == first + steps:
                held_out_value, exact = held_out_loss(state.params, *exam, rows=rows)
                metrics = {
                    "loss": float(loss),
                    "held_out_loss": float(held_out_value),
                    "held_out_exact": float(exact.mean()),
                    "phase": number,
                }
                bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()})
                logger.info(
                    "fine-tuning step %d: %s",
                    finished,
                    ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()),
                )
                if writer:
                    writer.write("sft", finished - 1, metrics)
            if finished % config.checkpoint.sft_every == 0 or finished == total:
                checkpoints.save(finished, state)
        first += steps
    bar.close()
    checkpoints.close()
    if writer:
        writer.close()
    return state.params


def _every_row(demonstrations: Demonstrations, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return demonstrations.tokens[rows], demonstrations.action_mask[rows]
