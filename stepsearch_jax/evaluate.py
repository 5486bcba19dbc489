r"""Greedy evaluation of every question of a split, once.

    python -m stepsearch_jax.evaluate --workdir=DIR [--config.evaluation.split=test …]

evaluates the run in DIR, with its config (DIR/config.json; flags change it), before RL (its warm
start) and after (its newest checkpoint), and writes config.json, evaluation.json, transcripts.jsonl
and report.html into DIR/evaluation/SPLIT. The files of the training run stay as they are.
--config.evaluation.controls=True adds the scripted searcher that the warm start imitated, and a
perfect one.

    python -m stepsearch_jax.evaluate --workdir=DIR \
        --config.evaluation.datasets=musique:FOLDER,bamboogle:FOLDER:test …

evaluates both policies on these data sets, beside baselines that cannot search, and writes one
table (`tables.py`). If DIR holds no run, give --config=configs/X.py: it evaluates the pretrained
policy that config.model.checkpoint names.
"""

from __future__ import annotations

from stepsearch_jax import cli

if __name__ == "__main__":  # before the imports that take seconds
    options = cli.parse_flags(cli.make_parser("evaluate", __doc__, "run"))

import pathlib
from functools import partial

import jax

from stepsearch_jax.evaluation.greedy import evaluate_policy, write_results
from stepsearch_jax.evaluation.tables import evaluate_datasets
from stepsearch_jax.files import check_workdir
from stepsearch_jax.run.folder import check_data, check_has_run, check_readable, write_config
from stepsearch_jax.run.pretrained import open_weights
from stepsearch_jax.run.start import begin_run, bind_answer_gain, make_sampler
from stepsearch_jax.run.system import build_system


def evaluate_command(config, workdir: pathlib.Path) -> None:
    """The command: evaluates a run's first and newest policy."""
    check_workdir(workdir)
    if config.evaluation.datasets:
        return evaluate_datasets(config, workdir)
    check_has_run(workdir)
    open_weights(config)  # gives the config the sizes that it leaves to the checkpoint
    check_readable(workdir, config)
    split = config.evaluation.split
    system = build_system(config, [split])
    check_data(
        workdir,
        system.describe_data(),
        "or name other data sets in config.evaluation.datasets",
    )
    state, reference_params, _, _ = begin_run(system, workdir)
    sample_episodes, to_rollout_layout = make_sampler(system)
    measure = partial(
        evaluate_policy,
        system,
        sample_episodes,
        split_name=split,
        answer_gain=bind_answer_gain(system),
    )
    before, dumps = measure(to_rollout_layout(reference_params), description="before RL:")
    after, after_dumps = measure(to_rollout_layout(state.policy.params), description="after RL:")
    folder = workdir / "evaluation" / split
    if jax.process_index() == 0:
        write_config(folder, config)
    write_results(system, folder, before, after, {"before": dumps, "after": after_dumps})


if __name__ == "__main__":
    cli.run_guarded(evaluate_command, options.config, options.workdir)
