"""The pod scripts with a fake gcloud: their calls, and their work on hosts that are folders."""

import os
import re
import shutil
import signal
import subprocess

import pytest
from pods import FAKE_TRAIN, NAMES, REPO, TPU, Cloud, is_alive, preempt, wait_until

SCRIPTS = sorted((REPO / "launch/pod").glob("*.sh"))
PLACE = ["--project=my-project", "--zone=us-west4-a", "--quiet"]
TRAIN = ("launch/pod/train_pod.sh", "--config=configs/x.py:small", "--workdir=/disk/run")


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


@pytest.fixture
def pod(cloud) -> Cloud:
    """A cloud with a TPU that is ready and set up."""
    cloud.set_state("READY")
    status, _, error = cloud.run("launch/pod/setup.sh", **NAMES)
    assert status == 0, error
    cloud.take_calls()
    return cloud


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax_and_help(script, cloud):
    subprocess.run(["bash", "-n", script], check=True)
    if script.name != "pod.sh":
        assert os.access(script, os.X_OK)
        status, out, _ = cloud.run(f"launch/pod/{script.name}", "--help")
        assert status == 0 and f"launch/pod/{script.name}" in out
        assert "pipefail" not in out and "#" not in out


@pytest.mark.parametrize("script", ["create", "setup", "train_pod", "stop", "delete"])
def test_missing_names_are_named(script, cloud):
    needed = TPU if script in ("create", "train_pod") else NAMES
    arguments = TRAIN[1:] if script == "train_pod" else ()
    for name in needed:
        others = {key: value for key, value in needed.items() if key != name}
        status, _, error = cloud.run(f"launch/pod/{script}.sh", *arguments, **others)
        assert status == 2 and error.startswith(f"{name} is missing: ") and f"{name}=" in error
    assert cloud.take_calls() == []


def test_the_tpus_other_name_is_refused(cloud):
    status, _, error = cloud.run("launch/pod/create.sh", **TPU | {"ACCELERATOR": "v5e-16"})
    assert status == 2 and "v5litepod-16" in error and cloud.changes() == []


@pytest.mark.parametrize(
    "arguments",
    [(), ("train",), ("train", "attempt-1"), ("copy", "gs://b/x"), ("stop",), ("instal",)],
)
def test_host_shows_its_help_where_arguments_lack(arguments, tmp_path):
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", REPO / "launch/pod/host.sh", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("What the pod scripts run on every host")


# --- create and delete


@pytest.mark.parametrize("capacity,flags", [("on-demand", []), ("spot", ["--spot"])])
def test_create(cloud, capacity, flags):
    more = {"CAPACITY": capacity, "CREATE_FLAGS": "--network=my-net --reserved"}
    status, out, _ = cloud.run("launch/pod/create.sh", **more, **TPU)
    assert status == 0 and out.splitlines()[-1] == "search-1 is ready"
    kind = ["--version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-16"]
    network = ["--network=my-net", "--reserved"]
    create = ["tpu-vm", "create", "search-1", *kind, *network, *flags, *PLACE]
    assert cloud.changes() == [create]
    assert cloud.run("launch/pod/create.sh", **TPU)[0] == 0 and cloud.changes() == []  # it is there


@pytest.mark.parametrize(
    "capacity,flags",
    [pytest.param("queued", [], marks=pytest.mark.slow), ("queued-spot", ["--spot"])],
)
def test_create_queued(cloud, capacity, flags):
    """The request waits, then the TPU is made; a script started in between only waits."""
    create = [
        "queued-resources",
        "create",
        "search-1",
        "--node-id=search-1",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--async",
        "--accelerator-type=v5litepod-16",
        *flags,
        *PLACE,
    ]
    assert cloud.run("launch/pod/create.sh", CAPACITY=capacity, **TPU)[0] == 0
    assert cloud.changes() == [create]
    assert (cloud.folder / "search-1.tpu-vm").read_text() == "READY"
    (cloud.folder / "search-1.tpu-vm").unlink()
    cloud.set_state("WAITING_FOR_RESOURCES", "queued-resources")
    assert cloud.run("launch/pod/create.sh", CAPACITY=capacity, **TPU)[0] == 0
    assert cloud.changes() == []
    # The TPU was preempted, its request suspended: both go, and a new request is made.
    cloud.set_state("PREEMPTED")
    cloud.set_state("SUSPENDED", "queued-resources")
    assert cloud.run("launch/pod/create.sh", CAPACITY=capacity, **TPU)[0] == 0
    delete = ["queued-resources", "delete", "search-1", "--force", *PLACE]
    assert cloud.changes() == [delete, create]


def test_a_failed_request_is_told(cloud):
    cloud.plan(hosts=1)
    cloud.set_state("CREATING")
    cloud.set_state("FAILED", "queued-resources")
    status, _, error = cloud.run("launch/pod/create.sh", CAPACITY="queued", **TPU)
    assert status == 1 and "the request for search-1 is FAILED" in error


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", "STOPPED"])
def test_what_was_preempted_is_made_anew(cloud, state):
    cloud.set_state(state)
    assert cloud.run("launch/pod/create.sh", CAPACITY="spot", **TPU)[0] == 0
    assert [words[:3] for words in cloud.changes()] == [
        ["tpu-vm", "delete", "search-1"],
        ["tpu-vm", "create", "search-1"],
    ]


def test_errors_of_gcloud_end_the_scripts(cloud):
    cloud.plan(hosts=1, **{"fail tpu-vm create": ["There is no more capacity in the zone"]})
    status, _, error = cloud.run("launch/pod/create.sh", **TPU)
    assert status == 1 and "no more capacity" in error
    cloud.plan(hosts=1, **{"fail tpu-vm describe": ["PERMISSION_DENIED: no"] * 10})
    status, _, error = cloud.run("launch/pod/create.sh", **TPU)
    assert status == 1 and "the state of search-1 cannot be read" in error
    assert "PERMISSION_DENIED" in error
    cloud.take_calls()
    cloud.plan(hosts=1, **{"fail tpu-vm describe": ["connection lost"] * 2})
    assert cloud.run("launch/pod/create.sh", **TPU)[0] == 0
    assert cloud.run("launch/pod/create.sh", CAPACITY="cheap", **TPU)[:1] == (2,)


def test_delete_asks_nothing_and_deletes_what_there_is(cloud):
    cloud.set_state("READY", name="another")
    assert cloud.run("launch/pod/delete.sh", **NAMES)[0] == 0 and cloud.changes() == []
    cloud.set_state("READY")
    assert cloud.run("launch/pod/delete.sh", **NAMES)[0] == 0
    assert cloud.changes() == [["tpu-vm", "delete", "search-1", *PLACE]]
    cloud.set_state("READY")
    cloud.set_state("ACTIVE", "queued-resources")
    assert cloud.run("launch/pod/delete.sh", **NAMES)[0] == 0
    assert cloud.changes() == [["queued-resources", "delete", "search-1", "--force", *PLACE]]
    assert [path.name for path in cloud.folder.glob("*.tpu-vm")] == ["another.tpu-vm"]
    assert not list(cloud.folder.glob("*.queued-resources"))


@pytest.mark.parametrize("script", ["create", "delete", "stop"])
def test_a_name_as_an_argument_touches_no_other_tpu(cloud, script):
    cloud.set_state("READY")
    cloud.take_calls()
    status, _, error = cloud.run(f"launch/pod/{script}.sh", "search-2", **TPU)
    assert status == 2 and f"{script}.sh takes no arguments (search-2)" in error
    assert cloud.take_calls() == []
    if script == "stop":
        status, _, error = cloud.run("launch/pod/stop.sh", WAIT_S="10m", **NAMES)
        assert status == 2 and "WAIT_S=10m" in error and cloud.take_calls() == []


# --- set up


def test_setup_brings_the_working_tree_and_data_to_every_host(cloud, tmp_path):
    # a changed working tree, data in a folder and in a bucket
    cloud.set_state("READY")
    (cloud.root / "not committed").write_text("new\n")
    (cloud.root / "a file").write_text("changed\n")
    (cloud.root / "launch/test.sh").unlink()
    (cloud.root / "runs").mkdir()
    (cloud.root / "runs/big").write_text("ignored by git\n")
    data, bucket = tmp_path / "my data", cloud.folder / "buckets/my-bucket/musique $1"
    for folder in (data, bucket):
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text(folder.name)
    copies = [f"{data}=data/of mine", "gs://my-bucket/musique $1=data/musique 'x'"]
    status, out, error = cloud.run("launch/pod/setup.sh", *copies, **NAMES)
    assert status == 0, error
    # every host has the tree, the data and an environment
    for host in (0, 1):
        there = cloud.home(host) / "stepsearch"
        assert (there / "not committed").read_text() == "new\n"
        assert (there / "a file").read_text() == "changed\n"
        assert not any((there / name).exists() for name in ("launch/test.sh", "runs", ".git"))
        assert (there / "data/of mine/train.jsonl").read_text() == "my data"
        assert (there / "data/musique 'x'/train.jsonl").read_text() == "musique $1"
        lines = cloud.log.read_text().splitlines()
        installed = [line.split(": ")[1] for line in lines if line.startswith(f"{there}: ")]
        pip = "-m pip install --quiet --no-compile --disable-pip-version-check -r "
        assert installed == [
            "-m venv --clear .venv",
            pip + "requirements.txt",
            pip + "requirements-tpu.txt",
        ]
    assert all("--worker=all" in words for words in cloud.take_calls() if words[0] == "tpu-vm")


def test_setup_clones_a_commit(cloud):
    cloud.set_state("READY")
    head = ["git", "-C", cloud.root, "rev-parse", "HEAD"]
    commit = subprocess.check_output(head, text=True).strip()
    (cloud.root / "not committed").touch()
    source = {"REPOSITORY": str(cloud.root), "COMMIT": commit}
    for _ in range(2):  # the second time over the first clone
        status, _, error = cloud.run("launch/pod/setup.sh", **source, **NAMES)
        assert status == 0, error
        assert (cloud.home(1) / "stepsearch/a file").exists()
        assert not (cloud.home(1) / "stepsearch/not committed").exists()
    status, _, error = cloud.run("launch/pod/setup.sh", REPOSITORY=str(cloud.root), **NAMES)
    assert status == 2 and error.startswith("COMMIT is missing")


def test_setup_refuses_what_is_not_there(cloud):
    for argument in (
        "no pair",
        "/no/such/folder=data",
        "=data",
        "data=",
        "gs://=data",
        "gs:///musique=data",
        "gs:bucket=data",
    ):
        status, _, error = cloud.run("launch/pod/setup.sh", argument, **NAMES)
        assert status == 2 and argument.split("=")[0] in error
    assert cloud.take_calls() == []
    cloud.set_state("READY")
    status, _, error = cloud.run("launch/pod/setup.sh", "gs://no/such=data", **NAMES)
    assert status != 0 and "gs://no/such" in error


def test_a_host_without_a_new_python_gets_one(cloud, tmp_path):
    """The images have Python 3.10: uv, which pip installs there, brings another."""
    # a PATH with these tools and an old python alone
    cloud.set_state("READY")
    tools = tmp_path / "tools"
    tools.mkdir()
    names = "bash cat dirname head mkdir rm cp tar gzip env tail touch setsid sh"
    for name in names.split():
        (tools / name).symlink_to(shutil.which(name))
    old = tools / "python3"
    old.write_text(f"""#!{shutil.which("bash")}
case "$*" in
  -c*) exit 1 ;;
  *"uv python find 3.12") echo "{cloud.environment["PYTHON"]}" ;;
  *) echo "old: $*" >>"{cloud.log}" ;;
esac
""")
    old.chmod(0o755)
    # install on it
    environment = cloud.environment | {"PATH": str(tools), "HOME": str(tmp_path)}
    del environment["PYTHON"]
    done = subprocess.run(
        [tools / "bash", cloud.root / "launch/pod/host.sh", "install"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = cloud.log.read_text().splitlines()
    install = ["old: -m pip install --quiet --user uv", "old: -m uv python install --quiet 3.12"]
    assert lines[:2] == install and "venv --clear .venv" in lines[2]


# --- train


@pytest.mark.slow
def test_train_runs_on_all_hosts_with_a_log_each(pod):
    pod.set_attempts(dict(say="hello"))
    odd = "--config.data.path=a b $HOME 'c'  \"d\"*"
    status, out, error = pod.run(*TRAIN, odd, **TPU)
    assert status == 0 and out.splitlines()[-1] == "the training is complete", error
    expected = [
        "--config=configs/x.py:small",
        "--workdir=/disk/run",
        "--config.distributed.processes=0",
        odd,
    ]
    assert pod.started(0) == pod.started(1) == [expected]
    (attempt,) = (pod.root / "runs/pods/search-1").iterdir()
    assert sorted(path.name for path in attempt.iterdir()) == ["0.log", "1.log"]
    assert [(attempt / f"{host}.log").read_text() for host in (0, 1)] == ["hello\n"] * 2
    (call,) = pod.changes()
    assert call[:4] == ["tpu-vm", "ssh", "search-1", "--worker=all"]
    assert f"--output-directory=runs/pods/search-1/{attempt.name}" in call


@pytest.mark.slow
def test_a_preempted_tpu_is_replaced_and_the_training_resumed(pod, tmp_path):
    """The machines of the first attempt vanish with their disks; the second has the data again."""
    bucket = pod.folder / "buckets/b/my data"
    bucket.mkdir(parents=True)
    (bucket / "x").touch()
    pod.set_attempts(dict(say="going", seconds=60), dict(say="12:00:00 resumed from iteration 10"))
    process = pod.start(*TRAIN, "--copy=gs://b/my data=data/x y", CAPACITY="spot", **TPU)
    wait_until(lambda: pod.started(0) and pod.started(1))
    preempt(pod)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "search-1 is PREEMPTED" in error and out.splitlines()[-1] == "the training is complete"
    first, second = pod.started(0)
    assert pod.started(0) == pod.started(1) and first == second
    changes = [words[:2] for words in pod.changes()]
    verbs = ("ssh", "delete", "create", "scp")
    assert changes[:4] == [["tpu-vm", verb] for verb in verbs] and changes[-1] == ["tpu-vm", "ssh"]
    assert (pod.home(1) / "stepsearch/data/x y/x").exists()
    assert len(list((pod.root / "runs/pods/search-1").iterdir())) == 2


@pytest.mark.slow
def test_no_capacity_is_waited_for(pod):
    pod.set_state("PREEMPTED")
    pod.plan(hosts=2, **{"fail tpu-vm create": ["no more capacity"] * 2})
    pod.set_attempts({})
    status, _, error = pod.run(*TRAIN, **TPU)
    assert status == 0 and error.count("no more capacity") == error.count("no TPU yet") == 2
    pod.set_state("PREEMPTED")
    pod.plan(hosts=2, **{"fail tpu-vm create": ["no more capacity"] * 3})
    status, _, error = pod.run(*TRAIN, CREATE_TRIES="2", **TPU)
    assert status == 1 and "there was no TPU in 2 tries" in error


@pytest.mark.slow
def test_a_failure_of_the_program_stops_with_its_message(pod):
    pod.set_attempts(dict(say="stepsearch_jax: data.path is empty", status=1))
    status, _, error = pod.run(*TRAIN, RESTARTS="2", **TPU)
    assert status == 1 and len(pod.started(0)) == 2
    assert error.count("--- the end of") == 2
    assert error.count("stepsearch_jax: data.path is empty") == 2
    assert (pod.folder / "search-1.tpu-vm").read_text() == "READY"


@pytest.mark.slow
def test_only_attempts_without_progress_count(pod):
    """Crashes after a new checkpoint do not count; three in a row without one end the script."""
    resumed = [
        dict(say=f"12:00:00 resumed from iteration {iteration}", status=70)
        for iteration in (10, 20, 30, 30, 30)
    ]
    pod.set_attempts(dict(status=70), *resumed, {})
    status, _, error = pod.run(*TRAIN, **TPU)
    assert status == 70 and len(pod.started(0)) == 6
    assert re.findall(r"checkpoint: (\d) of 3", error) == ["1", "1", "1", "1", "2", "3"]


@pytest.mark.slow
def test_one_host_that_fails_fails_the_attempt(pod):
    """The other host's training is ended before the next attempt."""
    pod.set_attempts(dict(seconds=0.0))
    fail_once = "sys.exit(9 if sys.argv[1] == '1' and number == 0 else "
    train = FAKE_TRAIN.format(attempts=str(pod.attempts)).replace("sys.exit(", fail_once)
    (pod.attempts.parent / "train.py").write_text(train)
    status, out, error = pod.run(*TRAIN, **TPU)
    assert status == 0 and "ended with status 9; search-1 is READY" in error
    assert sum("host.sh stop 10" in word for words in pod.changes() for word in words) == 1


@pytest.mark.slow
def test_a_script_that_ends_leaves_the_training_and_the_next_follows_it(pod):
    pod.set_attempts(dict(say="going", seconds=3))
    process = pod.start(*TRAIN, **TPU)
    wait_until(lambda: pod.started(0) and pod.started(1))
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "search-1" in error
    assert is_alive(int((pod.home(0) / ".stepsearch-training/pid").read_text()))
    status, _, error = pod.run(*TRAIN, "--config.seed=1", **TPU)
    assert status == 3 and "another training runs on this TPU" in error and "stop.sh" in error
    status, _, error = pod.run(*TRAIN, **TPU)
    assert status == 0 and len(pod.started(0)) == len(pod.started(1)) == 1, error
    logs = sorted((pod.root / "runs/pods/search-1").glob("*/1.log"))
    assert logs[-1].read_text() == "following the training that runs here\ngoing\n"


@pytest.mark.slow
def test_a_broken_connection_starts_nothing_twice(pod):
    """gcloud repeats a command after a broken connection: the host then follows the training.

    If the training has ended, it returns the training's exit status.
    """
    pod.set_attempts(dict(say="going", status=5))
    host = ["bash", "launch/pod/host.sh", "train", "attempt-1", "--config=x", "--workdir=y"]
    environment = pod.environment | {"HOME": str(pod.home(0)), "SLURM_PROCID": "0"}
    for _ in range(2):
        done = subprocess.run(
            host,
            cwd=pod.home(0) / "stepsearch",
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (5, "going\n")
    assert len(pod.started(0)) == 1


@pytest.mark.slow
def test_stop_ends_the_training(pod):
    pod.set_attempts(dict(seconds=100))
    process = pod.start(*TRAIN, RESTARTS="1", **TPU)
    wait_until(lambda: pod.started(0) and pod.started(1))
    pids = [int((pod.home(host) / ".stepsearch-training/pid").read_text()) for host in (0, 1)]
    assert pod.run("launch/pod/stop.sh", **NAMES)[0] == 0
    process.communicate(timeout=60)
    assert process.returncode == 143 and not any(map(is_alive, pids))


@pytest.mark.slow
def test_train_refuses_what_it_does_not_know(pod):
    for arguments in (
        ("--config=x", "--workdir=runs/x"),
        ("--config=x", "--workdir=/x", "--sede=1"),
        ("--config=x",),
        ("--workdir=/x",),
    ):
        status, _, error = pod.run("launch/pod/train_pod.sh", *arguments, **TPU)
        assert status == 2 and "--help" in error
    for argument in ("--workdir=gs:///x", "--workdir=gs://"):
        assert pod.run("launch/pod/train_pod.sh", "--config=x", argument, **TPU)[0] == 2
    assert pod.take_calls() == []


@pytest.mark.parametrize(
    "arguments,variables,complaint",
    [
        (["--copy=/no/such/folder=data"], {}, "there is no folder /no/such/folder"),
        (["--copy=gs:///x=data"], {}, "names no bucket"),
        ([], {"CAPACITY": "sopt"}, "CAPACITY=sopt is not known"),
        ([], {"REPOSITORY": "https://x"}, "COMMIT is missing"),
    ],
)
def test_train_refuses_what_a_new_tpu_could_not_be_made_with(
    cloud, arguments, variables, complaint
):
    """At once, not hours later, when the first TPU is gone."""
    cloud.set_state("READY")
    status, _, error = cloud.run(*TRAIN, *arguments, **variables, **TPU)
    assert status == 2 and complaint in error and cloud.take_calls() == []


@pytest.mark.parametrize(
    "script,arguments,expected",
    [
        ("create", [], ["tpu-vm create search-1"]),
        ("setup", ["gs://b/x y=data/x y"], ["tpu-vm scp", "host.sh", r"gs://b/x\\\ y"]),
        (
            "train_pod",
            [*TRAIN[1:], "--config.data.path=a b"],
            ["tpu-vm ssh", r"train", "tpu-vm create", "tpu-vm scp", "host.sh\\ stop"],
        ),
        ("stop", [], ["host.sh\\ stop"]),
        ("delete", [], ["queued-resources delete search-1", "tpu-vm delete search-1"]),
    ],
)
def test_dry_run_prints_the_commands_and_does_nothing(cloud, script, arguments, expected):
    before = sorted(cloud.root.rglob("*"))
    status, out, error = cloud.run(f"launch/pod/{script}.sh", *arguments, DRY_RUN="1", **TPU)
    assert status == 0, error
    assert all(text in out for text in expected), out
    assert cloud.take_calls() == [] and sorted(cloud.root.rglob("*")) == before
    # Commands and comments alone: nothing is said to have happened.
    for line in out.splitlines():
        if not line.startswith("#"):
            assert line.startswith(("gcloud compute tpus ", "tar ")), line
