"""The task of the comparisons: the quickstart's worlds and warm start, questions of three and four
hops, runs of about five minutes on one CPU core.

The warm start answers few of them, and has never seen one of four hops: a reward for the answer
alone is seldom earned. With the quickstart's two and three hops it is earned so often that the
methods cannot be told apart (docs/results.md).

    python launch/sweep.py --sweep=configs/sweeps/baselines.py --config=configs/atlas_sweep.py --workdir=runs/sweep --jobs=2

One point alone: python -m stepsearch_jax.train --config=configs/atlas_sweep.py --workdir=runs/one.
"""

import ml_collections

from configs import atlas_quickstart


def get_config() -> ml_collections.ConfigDict:
    config = atlas_quickstart.get_config()
    config.iterations = 16
    config.data.atlas.shapes = ("3hop_chain", "4hop_chain")
    config.rollout.max_turns = 6
    config.rollout.context = 576
    # learning rates are chosen on these, methods compared on as many of test
    config.data.atlas.validation_questions = 256
    config.evaluation.controls = False
    config.checkpoint.keep = 1
    return config
