r"""What the step rewards add: StePPO, beside PPO and GRPO on the answer's F1 alone, and beside
StePPO with all its rewards on the last token.

    python launch/sweep.py --sweep=configs/sweeps/baselines.py --config=configs/atlas_sweep.py \
        --workdir=runs/sweep --jobs=2

16 runs; with configs/sweeps/ablations.py 22, which took 64 minutes on two busy cores. All methods
share the warm start, and have the same number of episodes and optimiser steps per iteration: GRPO
has 8 questions with 8 episodes each, the others the 64 questions of configs/atlas_sweep.py once.
"""

# Chosen by configs/sweeps/tuning.py, on other questions and another seed; for policy and value
# model alike.
LEARNING_RATES = {
    "StePPO": 3e-4,
    "PPO, F1 only (Search-R1)": 3e-4,
    "GRPO, F1 only": 3e-4,
    "StePPO, rewards merged": 3e-4,
}
SEEDS = {
    "StePPO": range(5),
    "PPO, F1 only (Search-R1)": range(5),
    "GRPO, F1 only": range(3),
    "StePPO, rewards merged": range(3),
}

F1_ONLY = {"reward.gamma_key": 0.0, "reward.use_gain": False, "reward.use_redundancy": False}
METHODS = {
    "StePPO": {},
    "PPO, F1 only (Search-R1)": F1_ONLY,
    # An episode against others of its question; KL as a term of the loss (Shao et al. 2024, eq. 3
    # and 4). Averages run over tokens, as in the other methods.
    "GRPO, F1 only": F1_ONLY
    | {
        "rl.advantage": "grpo",
        "rl.kl_placement": "loss",
        "rl.kl_estimator": "k3",
        "rollout.prompts": 8,
        "rollout.group_size": 8,
    },
    # The same total at the end: separates what the rewards say from where they stand.
    "StePPO, rewards merged": {"reward.placement": "merged"},
}


def set_learning_rate(overrides: dict, rate: float) -> dict:
    return overrides | {"policy.learning_rate": rate, "value.learning_rate": rate}


def sweep(add):
    for method, overrides in METHODS.items():
        add(method, set_learning_rate(overrides, LEARNING_RATES[method]), SEEDS[method])
