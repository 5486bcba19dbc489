"""The folder of a run: its config (config.json), its format, first length and data (run.json), and
a lock. Decides which configs and data may resume the run.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from stepsearch_jax.addresses import hide_logins
from stepsearch_jax.files import CONFIG_FILE, in_bucket, read_json, write_json

RUN_FILE = "run.json"
# Format of run folders: raised whenever a config key, a file or a metric changes name or meaning.
FORMAT = 3
# A run has begun as soon as WORKDIR holds one of these folders; format 1 had imitation/ for sft/.
_BEGUN = ("sft", "start", "checkpoints", "imitation")

# Keys that may change when a run is resumed: how long it runs, what is evaluated and kept, and on
# which machines it computes the same.
_RESUMABLE = (
    "iterations",
    "evaluation.",
    "checkpoint.",
    "distributed.",
    "metrics.",
    "mesh.",
    "data.cache_dir",
    "search.timeout_s",
    "search.max_failure_fraction",
    "search.encode_batch",
    "search.url",
    "search.attempt",
    "search.backoff_s",
    "search.batch",
    "rollout.search",
    "rollout.flush_fraction",
    "rollout.slots",
    "rollout.prefill_rows",
    "rollout.prefill_tokens",
    "rollout.attention_block",
    "rl.max_skipped_in_a_row",
    "rl.microbatch_size",
    "rl.width_buckets",
    "model.remat",
    "sft.log_every",
)
# Keys without which a checkpoint cannot be read, or would be another policy.
_STATE = (
    "model.num",
    "model.embed_dim",
    "model.head_dim",
    "model.ffn_dim",
    "model.rope",
    "model.norm_eps",
    "model.qkv_bias",
    "model.qk_norm",
    "model.tie_embeddings",
    "prompt.tokenizer",
    "rl.advantage",
    "policy.optimizer",
    "value.optimizer",
)


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[int | None]:
    """Locks `workdir` against other runs and sweeps -> the lock's file descriptor.

    Processes that inherit the descriptor hold the lock, too, even if this one is killed. Raises
    ValueError if another process holds the lock. Buckets (None) and some file systems have no
    locks: there other runs are not kept out.
    """
    if in_bucket(workdir):
        yield None
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process, or a run that it started, is at work in {workdir}: wait for it, "
                "end it, or choose another --workdir"
            ) from None
        except OSError:  # no locks here
            pass
        yield file.fileno()


def write_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes WORKDIR/config.json.

    If the config changed, evaluation.json, by which a sweep knows finished runs, is removed: its
    results belong to the old config.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if read_json(workdir / CONFIG_FILE) != to_json(config):
        (workdir / "evaluation.json").unlink(missing_ok=True)
    write_json(workdir / CONFIG_FILE, to_json(config))


def write_beginning(workdir: pathlib.Path, beginning: Mapping[str, Any]) -> None:
    """Writes WORKDIR/run.json: what `check_resumable` returns."""
    write_json(workdir / RUN_FILE, beginning)


def check_resumable(
    workdir: pathlib.Path, config: ConfigDict, data: Mapping[str, str]
) -> dict[str, Any]:
    """Checks that a run can start or resume in WORKDIR -> what it was started with, for run.json.

    -> {"format", "iterations": of the first start, "data": `data` of all splits so far}.
    data: `System.describe_data`. Raises ValueError if WORKDIR holds a run with other or unknown
    settings, or with other data: its results would carry the wrong names.
    """
    began = {"format": FORMAT, "iterations": config.iterations, "data": {}}
    if any((workdir / name).is_dir() for name in _BEGUN):
        remedy = "choose another --workdir, or remove this one to start over"
        _check(workdir, config, lambda key: not key.startswith(_RESUMABLE), remedy)
        check_data(workdir, data, remedy)
        began = read_json(workdir / RUN_FILE) or began
    # Without a complete checkpoint no iteration is left, and the warm-ups follow the new number.
    if not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        began["iterations"] = config.iterations
    return began | {"data": began.get("data", {}) | dict(data)}


def check_data(workdir: pathlib.Path, data: Mapping[str, str], remedy: str) -> None:
    """Raises ValueError if the run in WORKDIR started with another corpus, or with other questions
    in a split of the same name (`System.describe_data`).
    """
    began = (read_json(workdir / RUN_FILE) or {}).get("data", {})
    if other := [name for name in data if began.get(name, data[name]) != data[name]]:
        raise ValueError(
            f"{workdir} holds a run with other data ({', '.join(other)}): give it the files that "
            f"it started with, {remedy}"
        )


def check_format(workdir: pathlib.Path) -> None:
    """Raises ValueError if the run in WORKDIR is of another format, or does not say of which."""
    found = (read_json(workdir / RUN_FILE) or {}).get("format")
    if found != FORMAT:
        what = f"of format {found}" if found else f"of format 1, or whose {RUN_FILE} is lost"
        raise ValueError(
            f"{workdir} holds a run {what}, and this version reads format {FORMAT}: resume it with "
            "the version that started it, or choose another --workdir"
        )


def check_has_run(workdir: pathlib.Path) -> None:
    """Raises FileNotFoundError if WORKDIR holds no run."""
    if not (workdir / "start").is_dir():
        raise FileNotFoundError(
            f"{workdir} holds no run (no start/): train one with python -m stepsearch_jax.train "
            f"--config=… --workdir={workdir}"
        )


def check_readable(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Raises ValueError if the run in WORKDIR has another model, tokenizer or optimiser, or an
    unknown one.
    """
    remedy = "give the flags that the run was trained with"
    _check(workdir, config, lambda key: key.startswith(_STATE), remedy)


def _check(
    workdir: pathlib.Path, config: ConfigDict, matters: Callable[[str], bool], remedy: str
) -> None:
    trained = read_json(workdir / CONFIG_FILE)
    if trained is None:
        raise ValueError(
            f"{workdir} holds a run without its {CONFIG_FILE}, the settings of the run: put that "
            "file back, or choose another --workdir"
        )
    check_format(workdir)
    old, new = flatten(trained), flatten(to_json(config))
    if difference := describe_difference(
        {key: value for key, value in old.items() if matters(key)},
        {key: value for key, value in new.items() if matters(key)},
    ):
        raise ValueError(f"{workdir} holds a run with another config ({difference}): {remedy}")


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config in the form of config.json, without the user and the password of addresses."""
    return hide_logins(json.loads(config.to_json_best_effort()))


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first keys in which two configs differ, as "rl.gamma: 1.0, now 0.9"; "" if equal."""
    before, after = flatten(old), flatten(new)
    differing = [
        key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)
    ]
    difference = [
        f"{key}: {before.get(key, 'nothing')}, now {after.get(key, 'nothing')}"
        for key in differing[:3]
    ]
    return "; ".join(difference + [f"and {len(differing) - 3} more"] * (len(differing) > 3))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, for all leaves of a nested mapping."""
    pairs = (
        flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        for key, value in config.items()
    )
    return functools.reduce(dict.__or__, pairs, {})
