r"""The learning rate of each baseline, chosen alike for all: the best F1 of three rates, in shorter
runs, on the validation world.

    python launch/sweep.py --sweep=configs/sweeps/tuning.py --config=configs/atlas_sweep.py \
        --workdir=runs/tuning --jobs=2

12 runs, 36 minutes on two cores that had other work. The rates chosen go into LEARNING_RATES of
configs/sweeps/baselines.py. Neither the questions that choose nor the seed are those that the
comparison reports.
"""

from configs.sweeps.baselines import METHODS, set_learning_rate

RATES = (1e-4, 3e-4, 1e-3)
SEEDS = (100,)
SHORTER = {"iterations": 10, "evaluation.split": "validation"}


def sweep(add):
    for method, overrides in METHODS.items():
        for rate in RATES:
            add(f"{method}, {rate:g}", set_learning_rate(overrides, rate) | SHORTER, SEEDS)
