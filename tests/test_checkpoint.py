"""Checkpoints: when they are saved, that a kill at any moment leaves the one before, and that all
processes end together after a SIGTERM to one of them.
"""

import os
import pathlib
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but_for

from stepsearch_jax import checkpoint

REPO = pathlib.Path(__file__).resolve().parents[1]


def abstract_state(state):
    return jax.tree.map(jnp.zeros_like, state)


def make_state(number: int):
    return {"a": jnp.arange(6.0).reshape(2, 3) + number, "b": jnp.int32(number)}


def run_pace(folder, numbers, **pace) -> list[int]:
    """The numbers that are saved."""
    checkpoints = checkpoint.Checkpoints(folder, keep=100)
    for number in numbers:
        assert not checkpoints.keep_pace(
            number, make_state(number), last=number == numbers[-1], **pace
        )
    checkpoints.close()
    return sorted(int(path.name) for path in folder.iterdir())


def test_another_model_is_reported_by_name_and_shapes(tmp_path):
    checkpoint.save_params(tmp_path / "start", make_state(1))
    with pytest.raises(
        ValueError,
        match=r"start holds another model \(a is \(2, 3\) there, \(3, 2\) here\): mend it$",
    ):
        checkpoint.load_params(
            tmp_path / "start", {"a": jnp.zeros((3, 2)), "b": jnp.int32(0)}, "mend it"
        )
    with pytest.raises(
        ValueError, match=r"start holds another model \(c is missing there, \(1,\) here\): mend it$"
    ):
        checkpoint.load_params(tmp_path / "start", make_state(1) | {"c": jnp.zeros(1)}, "mend it")
    with pytest.raises(
        ValueError, match=r"start holds another model \(b is \(\) there, missing here\)"
    ):
        checkpoint.load_params(tmp_path / "start", {"a": jnp.zeros((2, 3))}, "mend it")


def harm(folder: pathlib.Path, damage: str) -> None:
    """Damages the files of a saved tree."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    data = [path for path in files if path.parent.name == "d"]
    largest = max(data, key=lambda path: path.stat().st_size)  # holds the numbers
    if damage == "flipped":  # one bit
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 4
        largest.write_bytes(content)
    elif damage == "halved":  # this file alone: the others say what it should hold
        os.truncate(largest, largest.stat().st_size // 2)
    elif damage == "cut":
        for path in data:
            path.write_bytes(path.read_bytes()[:10])
    elif damage == "empty":
        for path in data:
            path.write_bytes(b"")
    elif damage == "undescribed":
        (folder / "_METADATA").unlink()
    else:
        for path in files if damage == "foreign" else data:
            path.unlink()


DAMAGES = ["flipped", "halved", "cut", "empty", "missing", "undescribed", "foreign"]


def make_large_state(number: int):
    """With numbers that do not compress, so that most bytes on the disk are theirs."""
    numbers = np.random.default_rng(number).normal(size=(100, 100)).astype(np.float32)
    return {"a": jnp.asarray(numbers), "b": jnp.int32(number)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in orbax
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(tmp_path, damage, caplog):
    folder = tmp_path / "run"
    checkpoints = checkpoint.Checkpoints(folder, keep=3)
    for number in (1, 2):
        checkpoints.save(number, make_large_state(number))
    checkpoints.close()
    harm(folder / "2/default", damage)
    abstract = abstract_state(make_large_state(0))

    # Readers leave it where it is; the run itself moves it out of the way.
    for set_aside, names in ((False, ["1", "2"]), (True, ["1", "damaged-2"])):
        caplog.clear()
        again = checkpoint.Checkpoints(folder, keep=3)
        number, state = again.restore_newest(abstract, set_aside=set_aside)
        assert number == 1
        jax.tree.map(np.testing.assert_array_equal, state, make_large_state(1))
        messages = [record.getMessage() for record in caplog.records]
        assert "run/2/default is damaged" in messages[0]
        assert len(messages) == 1 + set_aside and max(map(len, messages)) < 800
        assert sorted(path.name for path in folder.iterdir()) == names
        again.close()

    # The run continues, and its numbers may come again.
    again = checkpoint.Checkpoints(folder, keep=3)
    assert again.restore_newest(abstract, set_aside=True)[0] == 1
    again.save(2, make_large_state(5))
    again.close()
    harm(folder / "2/default", damage)
    again = checkpoint.Checkpoints(folder, keep=3)
    assert again.restore_newest(abstract, set_aside=True)[0] == 1
    again.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "damaged-2"]


def test_a_part_is_restored_alone(tmp_path):
    """Without what the rest would need in memory, and its damage does not matter."""
    state = {"policy": {"params": make_large_state(1), "other": jnp.ones(3)}, "value": jnp.ones(4)}
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", keep=2)
    checkpoints.save(1, state)
    checkpoints.close()
    wanted = {"policy": {"params": abstract_state(make_large_state(0))}}
    reader = checkpoint.Checkpoints(tmp_path / "run", keep=1, read_only=True)
    number, found = reader.restore_newest(wanted, partial=True)
    assert number == 1 and set(found) == {"policy"} and set(found["policy"]) == {"params"}
    jax.tree.map(np.testing.assert_array_equal, found["policy"]["params"], make_large_state(1))
    wanted["policy"]["params"]["a"] = jnp.zeros(7)
    with pytest.raises(ValueError, match=r"policy/params/a is \(100, 100\) there, \(7,\) here"):
        reader.restore_newest(wanted, partial=True)
    with pytest.raises(ValueError, match="value is .* there, missing here"):
        reader.restore_newest({"policy": state["policy"]})
    reader.close()


def test_no_whole_checkpoint_is_an_error_that_changes_nothing(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", keep=2)
    assert checkpoints.restore_newest(make_state(0), set_aside=True) is None
    for number in (1, 2):
        checkpoints.save(number, make_state(number))
    checkpoints.close()
    for number in (1, 2):
        harm(tmp_path / f"run/{number}/default", "cut")
    again = checkpoint.Checkpoints(tmp_path / "run", keep=2)
    with pytest.raises(checkpoint.Damaged, match="run is whole .*run/2/default.*remove .*run"):
        again.restore_newest(abstract_state(make_state(0)), set_aside=True)
    again.close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("damage", DAMAGES[:2])
def test_damaged_parameters_are_refused_in_one_line(tmp_path, damage):
    checkpoint.save_params(tmp_path / "start", make_large_state(1))
    harm(tmp_path / "start", damage)
    with pytest.raises(checkpoint.Damaged, match="start is damaged .*: mend it$") as caught:
        checkpoint.load_params(tmp_path / "start", abstract_state(make_large_state(0)), "mend it")
    assert len(str(caught.value)) < 800 and "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_never_written(tmp_path):
    bad = {"a": {"b": jnp.float32([1.0, np.nan])}, "c": jnp.int32(1)}
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", keep=2)
    checkpoints.save(1, make_state(1))
    with pytest.raises(ValueError, match="a/b holds numbers that are not finite"):
        checkpoints.save(2, bad)
    checkpoints.close()
    with pytest.raises(ValueError, match="a/b holds numbers that are not finite"):
        checkpoint.save_params(tmp_path / "start", bad)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["1"]
    assert not checkpoint.has_params(tmp_path / "start")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: no memory")])
def test_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch, error):
    """A whole checkpoint must keep its place."""

    def refuse(*_, **__):
        raise Exception("while reading") from error

    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    for number in (1, 2):
        checkpoints.save(number, make_state(number))
    checkpoints.close()
    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", refuse)
    again = checkpoint.Checkpoints(tmp_path, keep=3)
    with pytest.raises(Exception, match="while reading"):
        again.restore_newest(abstract_state(make_state(0)), set_aside=True)
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_disk_that_fails_for_a_moment_is_no_damage(tmp_path, monkeypatch):
    checkpoint.save_params(tmp_path / "start", make_state(1))

    def fail(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "metadata", fail)
    with pytest.raises(
        OSError, match=r"start could not be read \(.*Too many open files\): try again"
    ):
        checkpoint.load_params(tmp_path / "start", make_state(0), "remove it")


def test_every_so_many_and_the_last(tmp_path):
    assert run_pace(tmp_path / "a", range(1, 8), every=3, minutes=0.0) == [3, 6, 7]


def test_every_so_many_minutes(tmp_path, monkeypatch):
    """Every look at the clock takes 20 s: one at the beginning, one an iteration, one more after
    each save. A checkpoint is due after a minute: 60 s after the beginning ends iteration 3, saved
    at 80; 100, 120, 140: iteration 6, saved at 160; iteration 7 is the last.
    """
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(checkpoint, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    saved = run_pace(tmp_path / "a", range(1, 8), every=100, minutes=1.0)
    assert saved == [3, 6, 7]


def test_latest_and_restore(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "a", keep=2)
    assert checkpoints.latest() is None
    for number in (1, 2, 3):
        checkpoints.save(number, make_state(number))
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path / "a", keep=2)
    assert again.latest() == 3
    np.testing.assert_array_equal(
        again.restore(3, abstract_state(make_state(0)))["a"], make_state(3)["a"]
    )
    again.close()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["2", "3"]


# Saves 1, waits; then is killed while 2 is being written: python KILLED FOLDER MOMENT
KILLED = """
import os, signal, sys
import jax.numpy as jnp
from orbax.checkpoint._src.path import atomicity
from stepsearch_jax import checkpoint

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

folder, moment = sys.argv[1:]
checkpoints = checkpoint.Checkpoints(folder, keep=2)
checkpoints.save(1, {"a": jnp.ones(1000)})
checkpoints._manager.wait_until_finished()
if moment == "before it is named":
    atomicity.AtomicRenameTemporaryPath.finalize = die
checkpoints.save(2, {"a": jnp.full((3_000_000,), 2.0)})
if moment == "at once":
    die()
checkpoints.close()
"""


@pytest.mark.parametrize(
    "moment", slow_but_for(["before it is named"], ["at once", "before it is named"])
)
def test_a_kill_during_a_save_leaves_the_one_before(tmp_path, moment):
    folder = tmp_path / "run/checkpoints"
    environment = os.environ | {"PYTHONPATH": str(REPO), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), moment], env=environment, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    names = {path.name for path in folder.iterdir()}
    # the other one is what the kill left
    assert "1" in names and "2" not in names and len(names) == 2
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    assert checkpoints.latest() == 1
    np.testing.assert_array_equal(
        checkpoints.restore(1, {"a": jnp.zeros(1000)})["a"], np.ones(1000)
    )
    assert {path.name for path in folder.iterdir()} == names  # reading removes nothing
    checkpoints.save(3, {"a": jnp.full(1000, 3.0)})
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"1", "3"}


def test_params(tmp_path, monkeypatch):
    params = {"a": jnp.arange(4.0)}
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at .*start"):
        checkpoint.load_params(tmp_path / "start", params, "none")
    assert not checkpoint.has_params(tmp_path / "start")
    checkpoint.save_params(tmp_path / "start", params)
    assert checkpoint.has_params(tmp_path / "start")
    np.testing.assert_array_equal(
        checkpoint.load_params(tmp_path / "start", abstract_state(params), "none")["a"], params["a"]
    )
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(
        checkpoint.load_params(pathlib.Path("start"), abstract_state(params), "none")["a"],
        params["a"],
    )


def start_two(code: str, folder: pathlib.Path) -> list[subprocess.Popen]:
    """Two processes that run `code` with the arguments FOLDER PROCESS PORT."""
    import running

    environment = os.environ | {"PYTHONPATH": str(REPO), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    port = running.free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(number), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


# Two processes that count numbers until one gets a SIGTERM; the clock of the second one stands
# still: python COUNTING FOLDER PROCESS PORT
COUNTING = """
import sys, time, types
from stepsearch_jax import signals
signals.listen()
import jax, jax.numpy as jnp
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_preemption_service", False)
folder, process, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, process)
from jax.experimental import multihost_utils
from stepsearch_jax import checkpoint

if process == 1:
    checkpoint.time = types.SimpleNamespace(monotonic=lambda: 0.0)
checkpoints = checkpoint.Checkpoints(folder, keep=2)
mesh = jax.make_mesh((2,), ("data",))
state = multihost_utils.host_local_array_to_global_array({"a": jnp.ones(3)}, mesh, jax.P())
with signals.deferred():
    for number in range(1, 300):
        print(number, flush=True)
        time.sleep(0.2)
        ending = checkpoints.keep_pace(number, state, every=1000, minutes=0.5 / 60, last=False)
        if ending:
            checkpoints.close()
            print("ended after", number, flush=True)
            signals.end(ending, "saved")
"""


@pytest.mark.slow
def test_after_a_sigterm_all_processes_save_the_same_number(tmp_path):
    processes = start_two(COUNTING, tmp_path / "c")
    try:
        for line in processes[1].stdout:
            if line.strip() == "5":
                break
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143]
    assert outputs[0][-1] == outputs[1][-1] and outputs[0][-1].startswith("ended after ")
    number = int(outputs[0][-1].split()[-1])
    earlier, newest = sorted(int(path.name) for path in (tmp_path / "c").iterdir())
    assert 1 <= earlier < newest == number < 50


# Two processes that restore a state cut in two; the second finds its part of the newest damaged, as
# if only its disk had failed: python RESTORING FOLDER PROCESS PORT
RESTORING = """
import pathlib, sys
import jax, jax.numpy as jnp
jax.config.update("jax_cpu_collectives_implementation", "gloo")
folder, process, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, process)
from jax.experimental import multihost_utils
from stepsearch_jax import checkpoint

mesh = jax.make_mesh((2,), ("data",))
make = lambda x: multihost_utils.host_local_array_to_global_array(
    {"a": jnp.full(3, x + process)}, mesh, jax.P("data")
)
checkpoints = checkpoint.Checkpoints(folder, keep=2)
for number in (1, 2):
    checkpoints.save(number, make(10.0 * number))
checkpoints.close()
handler = checkpoint.ocp.PyTreeCheckpointHandler
restore = handler.restore
def fail(self, directory, *arguments, **keywords):
    if directory.parent.name == "2":
        raise ValueError("a shard is cut")
    return restore(self, directory, *arguments, **keywords)
if process == 1:
    handler.restore = fail
checkpoints = checkpoint.Checkpoints(folder, keep=2)
number, state = checkpoints.restore_newest(make(0.0), set_aside=True)
checkpoints.close()
print("restored", number, state["a"].addressable_shards[0].data.tolist(), flush=True)
"""


@pytest.mark.slow
def test_all_processes_go_back_to_the_same_checkpoint(tmp_path):
    processes = start_two(RESTORING, tmp_path / "c")
    try:
        outputs = [process.communicate(timeout=100)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [output[-1] for output in outputs] == [f"restored 1 {[10.0 + n] * 3}" for n in range(2)]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["1", "damaged-2"]
