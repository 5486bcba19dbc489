"""A policy on several data sets, beside baselines that cannot search: a table with intervals.

    WORKDIR/evaluation/
        table.md, table.json      all data sets, in the layout of the paper's Table 1; then every
                                  measure of each, with bootstrap intervals
        NAME/questions.jsonl      every question under every method: prediction and measures
        NAME/report.html          transcripts of the episodes that search, from evaluation.json and
                                  transcripts.jsonl in the same folder

Methods: direct answer; single-shot RAG, one search for the question itself; the gold documents
given; and the policy's own episodes, before RL and after, or zero-shot if WORKDIR holds no run. The
policy before RL answers the baselines.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from stepsearch_jax.evaluation.baselines import make_baselines
from stepsearch_jax.evaluation.greedy import (
    MEANS,
    collect_greedily,
    count_questions,
    dump_episode,
    gather_dumps,
    write_transcripts,
)
from stepsearch_jax.evaluation.measures import Estimate, estimate, list_measures, measure_episode
from stepsearch_jax.files import write_json, write_text
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.models.weights import load_policy
from stepsearch_jax.report.numbers import format_number
from stepsearch_jax.report.page import write_report
from stepsearch_jax.rl.model_state import describe_params
from stepsearch_jax.run.corpus import read_texts
from stepsearch_jax.run.folder import check_readable
from stepsearch_jax.run.start import begin_run, make_sampler
from stepsearch_jax.run.system import System, build_system

logger = logging.getLogger("stepsearch_jax")

BEFORE, AFTER, ZERO_SHOT = "searching, before RL", "searching, after RL", "searching, zero-shot"
WHEN = {BEFORE: "before", ZERO_SHOT: "before", AFTER: "after"}  # "when" in transcripts.jsonl


def parse_datasets(text: str, default_split: str) -> dict[str, tuple[str, str, str]]:
    """config.evaluation.datasets -> name in the table -> (kind, folder, split).

    Raises ValueError for an entry that is not KIND:FOLDER[:SPLIT], or that occurs twice.
    """
    found = {}
    for entry in text.split(","):
        kind, *rest = entry.strip().split(":")
        # atlas has no files: its FOLDER may be empty
        if not kind or not 1 <= len(rest) <= 2 or not rest[0] and kind != "atlas":
            raise ValueError(
                f"config.evaluation.datasets holds {entry!r}; an entry is KIND:FOLDER or "
                "KIND:FOLDER:SPLIT, with commas between entries"
            )
        folder, split = (*rest, default_split)[:2]
        name = f"{kind}-{split}"
        if name in found:
            raise ValueError(f"config.evaluation.datasets holds {name} twice")
        found[name] = (kind, folder, split)
    return found


def configure(
    config: ml_collections.ConfigDict, kind: str, folder: str, split: str
) -> ml_collections.ConfigDict:
    """The config with another data set in it."""
    config = ml_collections.ConfigDict(config.to_dict())  # not locked
    config.data.kind, config.data.path = kind, folder
    config.data.train_split, config.data.train_questions = "", 0
    config.evaluation.split = split
    return config.lock()


def evaluate_datasets(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """The command -> the contents of table.json.

    Raises ValueError or FileNotFoundError for a faulty data set, before anything is computed.
    """
    wanted = parse_datasets(config.evaluation.datasets, config.evaluation.split)
    systems = {name: _open_dataset(config, name, *dataset) for name, dataset in wanted.items()}
    policies = load_policies(next(iter(systems.values())), workdir)
    table = {
        "k": config.search.k,
        "search": config.search.kind,
        "template": config.prompt.template,
        "resamples": config.evaluation.resamples,
        "data_sets": {},
    }
    for name, system in systems.items():
        folder = workdir / "evaluation" / name
        table["data_sets"][name] = measure_dataset(system, policies, name, folder)
        if jax.process_index() == 0:  # after each data set, so that an interruption keeps it
            write_json(workdir / "evaluation" / "table.json", table)
            write_text(workdir / "evaluation" / "table.md", render_table(table))
    if jax.process_index() == 0:
        print(f"{render_table(table)}\nwritten: {workdir / 'evaluation'}", flush=True)
    return table


def _open_dataset(
    config: ml_collections.ConfigDict, name: str, kind: str, folder: str, split: str
) -> System:
    try:
        return build_system(configure(config, kind, folder, split), [split])
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{name} of config.evaluation.datasets: {error}") from error


def load_policies(system: System, workdir: pathlib.Path) -> dict[str, object]:
    """Method -> the learner's parameters: those of the run in WORKDIR, or the pretrained ones.

    The first policy also answers the baselines.
    """
    if (workdir / "start").is_dir():
        check_readable(workdir, system.config)
        state, reference_params, _, _ = begin_run(system, workdir)
        return {BEFORE: reference_params, AFTER: state.policy.params}
    if system.weights is None:
        raise FileNotFoundError(
            f"{workdir} holds no run (no start/), and config.model.checkpoint names no pretrained "
            "policy: give one of them"
        )
    logger.info("reading %s", system.weights.path)
    abstract_params, _ = describe_params(
        Policy(system.learner_model), system.mesh, dict(system.config.mesh.train_rules)
    )
    return {ZERO_SHOT: load_policy(system.weights, system.learner_model, abstract_params)}


def measure_dataset(
    system: System, policies: dict[str, object], name: str, folder: pathlib.Path
) -> dict:
    """Every method on one data set -> its part of table.json; writes the files in `folder`."""
    # Baselines: one prompt, one answer.
    split_name = system.config.evaluation.split
    count = count_questions(system, split_name)
    hops = max(
        [len(question.sub_questions) for question in system.splits[split_name].questions[:count]]
    )
    baselines = make_baselines(system, split_name, count)
    sample, to_rollout_layout = make_sampler(baselines.system)
    params = to_rollout_layout(next(iter(policies.values())))
    methods, lines = {}, []
    for method, given in baselines.given.items():
        methods[method], dumps = measure_method(
            baselines.system, sample, params, method, f"{name}, {method}", given, count, hops
        )
        lines += [{"method": method} | dump for dump in dumps]

    # The policies' own episodes, without documents in their prompts.
    sample, to_rollout_layout = make_sampler(system)
    transcripts, nothing = {}, [()] * count
    for method, policy in policies.items():
        params, description = to_rollout_layout(policy), f"{name}, {method}"
        methods[method], dumps = measure_method(
            system, sample, params, split_name, description, nothing, count, hops
        )
        lines += [{"method": method} | dump for dump in dumps]
        transcripts[WHEN[method]] = dumps

    # The data set's part of the table, and the files behind it.
    means = {
        method: {key: estimates["invalid_turns" if key == "invalid" else key].mean for key in MEANS}
        for method, estimates in methods.items()
    }
    result = {
        "questions": count,
        "documents": len(system.source.documents),
        "hash": system.source.manifest["hash"],
        "retrieval": system.retrieval,
        "methods": {
            method: {key: value._asdict() for key, value in estimates.items()}
            for method, estimates in methods.items()
        },
    }
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        measures = {WHEN[method]: means[method] for method in policies}
        controls = {method: means[method] for method in baselines.given}
        write_json(
            folder / "evaluation.json",
            {
                "questions": count,
                **measures,
                "controls": controls,
                "retrieval": system.retrieval,
                "step_reward": system.describe_step_reward(),
            },
        )
        write_transcripts(folder, transcripts)
        rows = [{key: value for key, value in line.items() if key != "turns"} for line in lines]
        write_text(folder / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_report(folder)
    return result


def measure_method(
    system: System,
    sample,
    params,
    split_name: str,
    description: str,
    given: Sequence[tuple[int, ...]] | None,
    count: int,
    hops: int,
) -> tuple[dict[str, Estimate], list[dict]]:
    """Evaluates greedily, each of the `count` questions once -> (estimates, dumps).

    Estimates: of every measure. Dumps: one per question, in their order, with its measures.
    given: corpus ids of the documents in each question's prompt; None for direct answers.
    """
    # Each question's measures as (amount, weight) pairs, in the rows of this process.
    names, texts = list_measures(hops), read_texts(system.source.documents)
    pairs, seen, dumps = np.zeros((count, len(names), 2)), np.zeros(count, int), {}
    for rows, rollout in collect_greedily(system, sample, params, split_name, description):
        for b in np.flatnonzero(rows >= 0):
            row = int(rows[b])
            seen[row] += 1
            pairs[row] = measure_episode(
                rollout.episodes[b], None if given is None else given[row], texts, hops
            )
            measures = {
                name: amount / weight if weight else None
                for name, (amount, weight) in zip(names, pairs[row].tolist())
            }
            shown = {} if given is None else {"given": list(given[row])}
            dumps[row] = (
                dump_episode(system, rollout.episodes[b], rollout.scores, b)
                | shown
                | {"measures": measures}
            )

    # All processes together must have answered each question once.
    seen, pairs = (
        multihost_utils.process_allgather(x).reshape(-1, *x.shape).sum(0) for x in (seen, pairs)
    )
    if (seen != 1).any():
        raise RuntimeError(
            f"{description}: question {int(np.flatnonzero(seen != 1)[0])} was answered "
            f"{int(seen[seen != 1][0])} times instead of once"
        )
    estimates = dict(
        zip(names, estimate(pairs, system.config.evaluation.resamples, system.config.seed))
    )
    logger.info(
        "%s: %d questions, EM %.3f, F1 %.3f",
        description,
        count,
        estimates["em"].mean,
        estimates["f1"].mean,
    )
    return estimates, gather_dumps(dumps)


def render_table(table: dict) -> str:
    """table.json -> Markdown: methods x (data sets x EM / F1), then all measures with intervals."""
    # A measure is missing where a method is; its mean is None where no question has it.
    sets = table["data_sets"]
    methods = list(
        dict.fromkeys(method for of_set in sets.values() for method in of_set["methods"])
    )
    show = lambda value: format_number(value["mean"]) if value else "–"
    spread = lambda value: (
        show(value)
        if value["mean"] is None
        else f"{show(value)} [{format_number(value['low'])}, {format_number(value['high'])}]"
    )

    # EM and F1 of every method on every data set.
    lines = [
        "| method | " + " | ".join(f"{name} EM | F1" for name in sets) + " |",
        "|---|" + "---|---|" * len(sets),
    ]
    for method in methods:
        cells = [
            show(of_set["methods"].get(method, {}).get(key))
            for of_set in sets.values()
            for key in ("em", "f1")
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines.append(
        f"\nGreedy, every question once; {table['search']}, k = {table['k']}; template "
        f"{table['template']}. In brackets: 95 % bootstrap intervals over questions, "
        f"{table['resamples']} resamples."
    )

    # Every measure of each data set.
    for name, of_set in sets.items():
        measures = list(next(iter(of_set["methods"].values())))
        lines += [
            f"\n{name}: {of_set['questions']} questions, {of_set['documents']} documents",
            "",
            "| measure | " + " | ".join(of_set["methods"]) + " |",
            "|---|" + "---|" * len(of_set["methods"]),
        ]
        lines += [
            f"| {measure.replace('_', ' ')} | "
            + " | ".join(spread(estimates[measure]) for estimates in of_set["methods"].values())
            + " |"
            for measure in measures
        ]
    return "\n".join(lines) + "\n"
