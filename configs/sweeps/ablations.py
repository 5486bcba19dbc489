r"""The paper's eight ablations beside StePPO and PPO on F1 alone: which reward does what. The
answer's F1 always stays.

    python launch/sweep.py --sweep=configs/sweeps/ablations.py --config=configs/atlas_sweep.py \
        --workdir=runs/sweep --jobs=2

10 rows, 8 different runs per seed: about 24 minutes on two busy cores; 6 runs after
configs/sweeps/baselines.py, whose StePPO and PPO are the same runs. "without key reward" is the
same as "step only", and "without step rewards" the same as "key only": each pair is one run in two
rows. All rows but PPO's have StePPO's learning rate.
"""

from configs.sweeps.baselines import LEARNING_RATES, METHODS, set_learning_rate

SEEDS = range(1)
NO_KEY = {"reward.gamma_key": 0.0}
NO_PENALTY = {"reward.use_redundancy": False}
NO_GAIN = {"reward.use_gain": False}
ABLATIONS = {
    "without key reward": NO_KEY,
    "without penalty": NO_PENALTY,
    "without information gain": NO_GAIN,
    "without step rewards": NO_PENALTY | NO_GAIN,
    "key only": NO_PENALTY | NO_GAIN,
    "penalty only": NO_KEY | NO_GAIN,
    "gain only": NO_KEY | NO_PENALTY,
    "step only": NO_KEY,
}


def sweep(add):
    add("StePPO", set_learning_rate(METHODS["StePPO"], LEARNING_RATES["StePPO"]), SEEDS)
    for method, overrides in ABLATIONS.items():
        add(method, set_learning_rate(overrides, LEARNING_RATES["StePPO"]), SEEDS)
    baseline = "PPO, F1 only (Search-R1)"
    add(baseline, set_learning_rate(METHODS[baseline], LEARNING_RATES[baseline]), SEEDS)
