"""The world of the comparisons: the quickstart's, and its warm start, with runs of about four minutes on one CPU core.

    python launch/sweep.py --sweep=configs/sweeps/baselines.py --config=configs/atlas_sweep.py --workdir=runs/sweep --jobs=2

One point alone: python -m stepsearch_jax.train --config=configs/atlas_sweep.py --workdir=runs/one.
"""
import ml_collections

from configs import atlas_quickstart


def get_config() -> ml_collections.ConfigDict:
    c = atlas_quickstart.get_config()
    c.iterations = 16
    c.data.atlas.validation_questions = 256  # learning rates are chosen on these, methods compared on as many of test
    c.evaluation.controls = False
    c.checkpoint.keep = 1
    return c
