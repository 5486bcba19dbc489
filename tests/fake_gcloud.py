"""Stands in for gcloud on PATH: logs calls, keeps the states of fake TPUs, runs commands locally.

A folder (FAKE_GCLOUD) is the cloud: `calls.jsonl` has the words of every call; `NAME.tpu-vm` and
`NAME.queued-resources` hold states; `hosts/NAME-0`, `…-1` are the home folders of the hosts;
`buckets/B/…` is gs://B/…; `plan.json` says how many hosts a TPU has and which calls fail. Refuses a
flag that the real command lacks (Google's reference of the gcloud CLI, general availability).
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["FAKE_GCLOUD"])
WIDE = {"project", "quiet", "format"}  # flags of every command
CREATE = {
    "zone",
    "accelerator-type",
    "spot",
    "async",
    "network",
    "service-account",
    "reserved",
    "internal-ips",
    "metadata",
}
FLAGS = {
    ("tpu-vm", "create"): CREATE | {"version"},
    ("tpu-vm", "describe"): {"zone"},
    ("tpu-vm", "delete"): {"zone", "async"},
    ("tpu-vm", "ssh"): {"zone", "worker", "command", "output-directory", "ssh-flag", "internal-ip"},
    ("tpu-vm", "scp"): {"zone", "worker", "recurse", "compress", "internal-ip"},
    ("queued-resources", "create"): CREATE | {"node-id", "runtime-version", "valid-until-duration"},
    ("queued-resources", "describe"): {"zone"},
    ("queued-resources", "delete"): {"zone", "force", "async"},
}
# a request moves on with every `describe`
NEXT = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}


def main(words: list[str]) -> int:
    with (CLOUD / "calls.jsonl").open("a") as file:
        file.write(json.dumps(words) + "\n")
    plan = json.loads((CLOUD / "plan.json").read_text())
    if words[0] == "storage":
        return copy_storage(words[1:])
    assert words[:2] == ["compute", "tpus"], words
    kind, verb = words[2:4]
    options = [word.removeprefix("--") for word in words[4:] if word.startswith("--")]
    flags = dict(option.partition("=")[::2] for option in options)
    names = [word for word in words[4:] if not word.startswith("--")]
    if unknown := set(flags) - FLAGS[kind, verb] - WIDE:
        return fail(f"unrecognized arguments: {unknown}", 2)
    if failures := plan.get(f"fail {kind} {verb}"):  # a message for each next call; None: it works
        message = failures.pop(0)
        (CLOUD / "plan.json").write_text(json.dumps(plan))
        if message:
            return fail(message)
    if verb in ("ssh", "scp"):
        return {"ssh": run_on_hosts, "scp": copy_to_hosts}[verb](names, flags, plan["hosts"])
    return change(kind, verb, names[0], flags)


def fail(message: str, status: int = 1) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return status


def change(kind: str, verb: str, name: str, flags: dict[str, str]) -> int:
    state, node = CLOUD / f"{name}.{kind}", CLOUD / f"{name}.tpu-vm"
    request = CLOUD / f"{name}.queued-resources"
    if verb == "create":
        if state.exists():
            return fail(f"ALREADY_EXISTS: {name}")
        state.write_text("READY" if kind == "tpu-vm" else "WAITING_FOR_RESOURCES")
        return 0
    if not state.exists():
        return fail(f"NOT_FOUND: Resource '{name}' was not found")
    if verb == "describe":
        print(state.read_text())
        if kind == "queued-resources" and state.read_text() in NEXT:
            state.write_text(NEXT[state.read_text()])
            if state.read_text() == "ACTIVE":
                node.write_text("READY")
    if verb == "delete":
        if kind == "queued-resources" and node.exists() and "force" not in flags:
            return fail("FAILED_PRECONDITION: it has nodes")
        for file in (node, request) if kind == "queued-resources" else (node,):
            file.unlink(missing_ok=True)
        for home in CLOUD.glob(f"hosts/{name}-*"):
            shutil.rmtree(home)
    return 0


def list_homes(name: str, worker: str, hosts: int) -> list[pathlib.Path]:
    numbers = range(hosts) if worker == "all" else [int(worker)]
    homes = [CLOUD / "hosts" / f"{name}-{number}" for number in numbers]
    for home in homes:
        home.mkdir(parents=True, exist_ok=True)
    return homes


def run_on_hosts(names: list[str], flags: dict[str, str], hosts: int) -> int:
    """As gcloud does: all hosts at once, one log each -> the first bad exit status."""
    name = names[0]
    state = CLOUD / f"{name}.tpu-vm"
    if not state.exists() or state.read_text() != "READY":
        return fail(f"the TPU {name} is not ready")
    started = []
    for number, home in enumerate(list_homes(name, flags.get("worker", "0"), hosts)):
        output = None
        if "output-directory" in flags:
            output = open(pathlib.Path(flags["output-directory"]) / f"{number}.log", "w")
        # As under Slurm, the environment tells each process about the others.
        announced = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(hosts),
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number),
            "SLURM_STEP_NUM_NODES": "1",
        }
        started.append(
            subprocess.Popen(
                ["bash", "-c", flags["command"]],
                cwd=home,
                env=os.environ | announced | {"HOME": str(home)},
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                stdin=subprocess.DEVNULL,
            )
        )
    statuses = [process.wait() for process in started]
    return next((status for status in statuses if status), 0)


def copy_to_hosts(names: list[str], flags: dict[str, str], hosts: int) -> int:
    source, (name, _, target) = names[0], names[1].partition(":")
    for home in list_homes(name, flags.get("worker", "0"), hosts):
        shutil.copy(source, home / target)
    return 0


def copy_storage(words: list[str]) -> int:
    """cp FILE FILE, and rsync --recursive FOLDER FOLDER."""
    source, target = (
        CLOUD / "buckets" / word.removeprefix("gs://")
        if word.startswith("gs://")
        else pathlib.Path(word)
        for word in words[-2:]
    )
    if not source.exists():
        return fail(f"The following URLs matched no objects or files: {words[-2]}")
    if words[0] == "cp":
        shutil.copy(source, target)
    else:
        assert words[:2] == ["rsync", "--recursive"], words
        shutil.copytree(source, target, dirs_exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
