"""The values that a config key with a choice of words accepts, listed only here."""

from __future__ import annotations

from collections.abc import Sequence

# Values of rl.advantage: those that read values, and those that compare the episodes of a group.
CRITIC_ESTIMATORS = ("gae", "turn_gae")
GROUP_ESTIMATORS = ("grpo", "rloo", "turn_return")
DTYPES = ("float32", "bfloat16")

CHOICES = {  # config key -> its values; configs/base.py explains them
    "data.on_bad_row": ("refuse", "skip"),
    "metrics.loggers": ("tensorboard", "wandb"),  # any of them
    "search.kind": ("bm25", "dense", "remote"),
    "search.embedding_dtype": DTYPES,
    "model.rope_scaling.kind": ("none", "linear", "llama3", "yarn"),
    "model.dtype": DTYPES,
    "model.remat": ("none", "dots", "layers"),
    "rollout.search": ("callback", "host"),
    "rollout.dtype": DTYPES,
    "reward.format_gate": ("strict", "ends_with_answer"),
    "reward.format_failure": ("zero_answer", "minus_one"),
    "reward.key_match": ("max", "overwrite"),
    "reward.step_reward": ("gain", "answer_logprob"),
    "reward.redundancy_scope": ("earlier_turns", "rendered"),
    "reward.tfidf_fit": ("corpus", "pair"),
    "reward.placement": ("step", "merged"),
    "rl.advantage": (*CRITIC_ESTIMATORS, *GROUP_ESTIMATORS),
    "rl.old_logprobs": ("learner", "sampler"),
    "rl.aggregation": ("token_mean", "sequence_mean"),
    "rl.kl_placement": ("reward", "loss"),
    "rl.kl_estimator": ("k1", "k2", "k3"),
    "policy.optimizer": ("adamw", "sgd"),
    "value.optimizer": ("adamw", "sgd"),
    "sft.optimizer": ("adamw", "muon"),
}


# Keys that also take a function of the user's, "package.module:function" (`plugins`).
PLUGINS = ("search.kind", "reward.step_reward")


def is_plugin(value: str) -> bool:
    """Whether the value of a key names a function of the user's."""
    return ":" in value


def check_choice(key: str, value: str | Sequence[str]) -> None:
    """Raises ValueError with the key and its values if `value` is not one of them.

    Of a tuple or list each item is checked.
    """
    for word in (value,) if isinstance(value, str) else value:
        if word in CHOICES[key] or key in PLUGINS and is_plugin(word):
            continue
        function = ', or "package.module:function"' if key in PLUGINS else ""
        raise ValueError(
            f"config.{key} is {word!r}; it must be one of {', '.join(CHOICES[key])}{function}"
        )
