r"""The task of the comparisons: questions of three and four hops, about five minutes per run.

It has the quickstart's worlds and warm start, and its runs take one CPU core. The warm start
answers few of these questions and has never seen one of four hops, so it seldom earns a reward for
the answer alone. On the quickstart's two and three hops it earns it so often that the methods do
not differ (docs/results.md).

    python launch/sweep.py --sweep=configs/sweeps/baselines.py --config=configs/atlas_sweep.py \
        --workdir=runs/sweep --jobs=2

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
    config.rl.minibatches = 4
    config.rl.old_logprobs = "learner"
    config.policy.learning_rate = 5e-4
    # learning rates are chosen on these, methods compared on as many of test
    config.data.atlas.validation_questions = 256
    config.evaluation.controls = False
    config.checkpoint.keep = 1
    return config
