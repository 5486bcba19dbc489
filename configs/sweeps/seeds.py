r"""How far StePPO's result depends on the seed: on the order of questions and on sampling.

    python launch/sweep.py --sweep=configs/sweeps/seeds.py --config=configs/atlas_sweep.py \
        --workdir=runs/sweep --jobs=2

10 runs, about 30 minutes on two busy cores; 5 runs after configs/sweeps/baselines.py, which has the
other 5.
"""

from configs.sweeps.baselines import LEARNING_RATES, METHODS, set_learning_rate


def sweep(add):
    add("StePPO", set_learning_rate(METHODS["StePPO"], LEARNING_RATES["StePPO"]), range(10))
