"""A run's folder refuses configs under which its results would be something else."""

import dataclasses
import fcntl
import json

import pytest
import running
import tiny_config
from etils import epath

from configs import base
from stepsearch_jax import evaluate, train
from stepsearch_jax.run import folder
from stepsearch_jax.run.folder import (
    FORMAT,
    check_readable,
    check_resumable,
    describe_difference,
    flatten,
    lock,
    write_beginning,
    write_config,
)
from stepsearch_jax.run.system import build_system

DATA = {"corpus": "c", "questions of train": "t", "questions of validation": "v"}


@pytest.fixture
def run(tmp_path):
    """-> (folder of a run that has begun, a config like its own)."""
    config = tiny_config.get_config("cache")
    beginning = check_resumable(tmp_path, config, DATA)
    write_config(tmp_path, config)
    write_beginning(tmp_path, beginning)
    (tmp_path / "start").mkdir()
    return tmp_path, tiny_config.get_config("cache")


def test_the_same_config_goes_on(run):
    assert check_resumable(*run, DATA) == {"format": FORMAT, "iterations": 2, "data": DATA}
    check_readable(*run)


@pytest.mark.parametrize(
    "key,value",
    [
        ("iterations", 9),
        ("evaluation.split", "test"),
        ("mesh.fsdp", 2),
        ("data.cache_dir", "elsewhere"),
        ("checkpoint.keep", 7),
    ],
)
def test_what_may_change(run, key, value):
    folder, config = run
    config.update_from_flattened_dict({key: value})
    check_resumable(folder, config, DATA)


@pytest.mark.parametrize(
    "key,value",
    [
        ("seed", 1),
        ("reward.placement", "merged"),
        ("rl.advantage", "grpo"),
        ("model.num_layers", 3),
        ("sft.phases", ((1, 8, True, 0, 0.1),)),
    ],
)
def test_what_may_not(run, key, value):
    folder, config = run
    config.update_from_flattened_dict({key: value})
    with pytest.raises(
        ValueError,
        match=f"{folder} .*another config .{key}: .*--workdir, or remove",
    ):
        check_resumable(folder, config, DATA)
    (folder / "start").rmdir()  # nothing has begun: nothing is lost
    check_resumable(folder, config, DATA)


@pytest.mark.parametrize(
    "key,value,refused",
    [
        ("rl.advantage", "grpo", True),
        ("model.num_layers", 3, True),
        ("policy.optimizer", "sgd", True),
        ("model.qk_norm", True, True),
        ("model.rope_theta", 1e4, True),
        ("model.norm_eps", 1e-5, True),
        ("model.rope_scaling.kind", "yarn", True),
        ("model.rope_scaling.factor", 4.0, True),
        ("rollout.max_turns", 1, False),
        ("seed", 1, False),
        ("model.dtype", "bfloat16", False),
    ],
)
def test_what_evaluation_needs(run, key, value, refused):
    folder, config = run
    config.update_from_flattened_dict({key: value})
    if not refused:
        return check_readable(folder, config)
    with pytest.raises(
        ValueError, match=f"another config .{key}: .*give the flags that the run was trained with"
    ):
        check_readable(folder, config)


@pytest.mark.parametrize(
    "changed",
    [
        {"corpus": "other"},
        {"questions of train": "fewer"},
        {"corpus": "other", "questions of validation": "others"},
    ],
)
def test_other_data_is_refused_by_name(run, changed):
    with pytest.raises(
        ValueError,
        match=rf"{run[0]} .*other data \({', '.join(changed)}\): .*--workdir, or remove",
    ):
        check_resumable(*run, DATA | changed)
    (run[0] / "start").rmdir()
    assert check_resumable(*run, DATA | changed)["data"] == DATA | changed


def test_a_split_that_is_new_is_remembered(run):
    more = {"corpus": "c", "questions of train": "t", "questions of test": "x"}
    assert check_resumable(*run, more)["data"] == DATA | more


def test_warm_ups_are_shares_of_the_first_iterations(run):
    """Of the first that left a checkpoint: others have come to nothing."""
    folder, config = run
    config.iterations = 9
    assert check_resumable(folder, config, DATA)["iterations"] == 9
    (folder / "checkpoints/1").mkdir(parents=True)
    assert check_resumable(folder, config, DATA)["iterations"] == 2
    # half written: nothing to resume from
    (folder / "checkpoints/1").rename(folder / "checkpoints/1.orbax-checkpoint-tmp")
    assert check_resumable(folder, config, DATA)["iterations"] == 9


def test_train_and_evaluate_look_at_what_the_run_began_with(
    tmp_path, tmp_path_factory, monkeypatch
):
    class Stop(Exception):
        pass

    def stop(config, iterations):
        raise Stop(iterations)

    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    monkeypatch.setattr(train, "make_optimizers", stop)
    for iterations, expected in ((500, 500), (1120, 500)):
        config.iterations = iterations
        with pytest.raises(Stop, match=f"^{expected}$"):
            train.train(config, tmp_path)
        (tmp_path / "start").mkdir(exist_ok=True)
        (tmp_path / "checkpoints/150").mkdir(exist_ok=True, parents=True)
    system = build_system(config, ["train", "validation"])
    exchanged = dataclasses.replace(
        system, splits={"train": system.splits["validation"], "validation": system.splits["train"]}
    )
    monkeypatch.setattr(train, "build_system", lambda *_: exchanged)
    with pytest.raises(
        ValueError, match=r"other data \(questions of train, questions of validation\)"
    ):
        train.train(config, tmp_path)
    monkeypatch.setattr(evaluate, "build_system", lambda *_: exchanged)
    with pytest.raises(
        ValueError,
        match=r"other data \(.*questions of validation\).* config.evaluation.datasets",
    ):
        evaluate.evaluate_command(config, tmp_path)


def test_results_under_another_config_go(run):
    """They would make a run that is resumed for more iterations look finished."""
    folder, config = run
    (folder / "evaluation.json").write_text("{}")
    write_config(folder, config)
    assert (folder / "evaluation.json").exists()
    config.iterations = 9
    write_config(folder, config)
    assert not (folder / "evaluation.json").exists()


def test_a_run_without_its_config_is_refused(run):
    folder, config = run
    (folder / "config.json").unlink()
    for check, *data in ((check_resumable, DATA), (check_readable,)):
        with pytest.raises(
            ValueError,
            match=f"{folder} .*config.json, .*: put that file back",
        ):
            check(folder, config, *data)
    (folder / "start").rmdir()
    check_resumable(folder, config, DATA)


def test_one_run_at_a_time(tmp_path, tmp_path_factory):
    """A second start of the same command, beside the first, touches nothing."""
    config, folder = (
        running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory)))),
        tmp_path / "run",
    )
    with (
        lock(folder),
        pytest.raises(
            ValueError,
            match=f"at work in {folder}: wait for it, end it, or choose another --workdir",
        ),
    ):
        train.train(config, folder)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    with lock(folder):  # the first has ended
        pass


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not supported")

    with lock(epath.Path("gs://bucket/run")) as held:
        assert held is None
    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path), lock(tmp_path):
        pass


def test_keys_of_another_version_are_refused(run):
    folder, config = run
    old = json.loads((folder / "config.json").read_text())
    old["rl"]["gone"] = old["rl"].pop("gamma")
    (folder / "config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="rl.gamma.*rl.gone"):
        check_resumable(folder, config, DATA)


@pytest.mark.parametrize("written", [None, {"iterations": 2, "data": DATA}, {"format": FORMAT + 1}])
def test_run_of_another_format_is_refused_in_one_line(run, written):
    folder, config = run
    (folder / "run.json").unlink()
    if written:
        (folder / "run.json").write_text(json.dumps(written))
    found = (written or {}).get("format", 1)
    for check in (
        lambda: check_resumable(folder, config, DATA),
        lambda: check_readable(folder, config),
    ):
        with pytest.raises(
            ValueError, match=rf"^{folder}.*format {found}\b.*format {FORMAT}\b"
        ) as error:
            check()
        assert "\n" not in str(error.value)


def test_run_of_format_1_is_refused_in_the_midst_of_its_warm_start(run):
    """Then it holds imitation/ alone, which is called sft/ now."""
    folder, config = run
    (folder / "run.json").unlink()
    (folder / "start").rmdir()
    (folder / "imitation").mkdir()
    with pytest.raises(ValueError, match="format 1"):
        check_resumable(folder, config, DATA)


@pytest.mark.parametrize("prefix", [*folder._RESUMABLE, *folder._STATE])
def test_every_prefix_that_resuming_compares_is_of_a_key(prefix):
    assert any(key.startswith(prefix) for key in flatten(base.get_config().to_dict()))


def test_difference_in_words():
    old = {"seed": 0, "rl": {"gamma": 1.0, "gae_lambda": 1.0}, "a": 1, "b": 1}
    assert describe_difference(old, old) == ""
    assert (
        describe_difference(old, old | {"rl": {"gamma": 0.9, "gae_lambda": 1.0}})
        == "rl.gamma: 1.0, now 0.9"
    )
    assert (
        describe_difference(old, {"c": 1})
        == "a: 1, now nothing; b: 1, now nothing; c: nothing, now 1; and 3 more"
    )
