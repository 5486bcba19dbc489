"""A small sweep for tests: a config, a sweep file, and a training command that trains nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
import sys

from stepsearch_jax.run.folder import FORMAT
from stepsearch_jax.sweeps.points import list_points, load_sweeps

REPO = pathlib.Path(__file__).resolve().parents[1]
CONFIG = """
import ml_collections
def get_config():
    return ml_collections.ConfigDict(dict(
        seed=0, iterations=6, rollout=dict(prompts=8, group_size=1),
        rl=dict(minibatches=2, ppo_epochs=1), policy=dict(learning_rate=0.001),
        reward=dict(gamma_key=0.618, use_gain=True, placement="step"),
        evaluation=dict(split="test"), data=dict(shapes=("2hop",))))
"""
SWEEP = """
def sweep(add):
    add("Full", {}, range(3))
    add("without key", {"reward.gamma_key": 0.0}, [0, 1])
    add("merged", {"reward.placement": "merged"}, [0])
    add("step only", {"reward.gamma_key": 0.0}, [0, 1])
"""
# A training command: notes its start, and does with the folder of its point what the plan says.
TRAIN = """#!{python}
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
arguments = [argument for argument in sys.argv[1:] if argument.startswith("--")]
flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
folder = pathlib.Path(flags["workdir"])
plan = json.loads((here / "plan.json").read_text())[folder.name]
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
with (here / "started").open("a") as file:
    file.write(json.dumps([folder.name, cores, sys.argv[1:]]) + "\\n")
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps(plan["config"]))
(folder / "run.json").write_text(json.dumps(dict(format=FORMAT_NUMBER)))
time.sleep(plan.get("seconds", 0.0))
if plan.get("hang"):
    def save(*_):  # as training does: the first signal is noted, a second one ends the process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(plan["saving"])
        (folder / "saved").touch()
        sys.exit(143)
    if "saving" in plan:
        signal.signal(signal.SIGTERM, save)
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
if plan.get("fail"):
    print("Traceback, of many lines\\n\\nValueError: " + plan["fail"] + "\\n")
    sys.exit(plan.get("status", 3))
f1, n = plan["f1"], plan["config"]["iterations"]
with (folder / "metrics.jsonl").open("w") as file:
    file.write(json.dumps(dict(stage="sft", iteration=0, f1=9.0)) + "\\n")
    for iteration in range(n):
        row = dict(stage="rl", iteration=iteration, f1=f1 * (iteration + 1) / n)
        file.write(json.dumps(row) + "\\n")
means = lambda f1: dict(f1=f1, em=f1 / 2, gold_recall=0.9, searches=2.5, invalid=0.0)
evaluation = dict(questions=20, before=means(0.1), after=means(f1))
(folder / "evaluation.json").write_text(json.dumps(evaluation))
""".replace("FORMAT_NUMBER", str(FORMAT))


def load_command():
    spec = importlib.util.spec_from_file_location("launch_sweep", REPO / "launch/sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMAND = load_command()


class Bench:
    """A folder with a config, a sweep file and a training command, and the sweep over them."""

    def __init__(self, folder: pathlib.Path, capsys):
        self.folder, self.workdir, self.capsys = folder, folder / "sweep", capsys
        self.config = str(self.write("config.py", CONFIG))
        self.train = self.write("train", TRAIN.replace("{python}", sys.executable))
        self.train.chmod(0o755)
        self.set_sweep(SWEEP)

    def write(self, name: str, text: str) -> pathlib.Path:
        (self.folder / name).write_text(text)
        return self.folder / name

    def set_sweep(self, text: str, name: str = "small.py", **changes) -> None:
        """The sweep file, and a plan: point n (from 1, in the order of running) reaches 0.1 n.

        changes: of points, by name with _ for -.
        """
        self.sweep = str(self.write(name, text))
        self.plan = {}
        with contextlib.suppress(ValueError):
            points = list_points(load_sweeps([self.sweep], self.config, ()))
            self.plan = {
                point.name: dict(config=point.config, f1=0.1 * n)
                for n, point in enumerate(points, start=1)
            }
        self.change_plan(**changes)

    def change_plan(self, **changes) -> None:
        for name, change in changes.items():
            self.plan[name.replace("_", "-")] |= change
        self.write("plan.json", json.dumps(self.plan))

    def arguments(self, *more: str) -> list[str]:
        return [
            f"--sweep={self.sweep}",
            f"--config={self.config}",
            f"--workdir={self.workdir}",
            *more,
        ]

    def run(self, *more: str) -> tuple[int, str, str]:
        """-> (exit status, stdout, stderr) of the sweep."""
        self.capsys.readouterr()
        try:
            status = COMMAND.main(self.arguments(*more), [str(self.train)])
        except SystemExit as end:  # argparse
            status = end.code
        return status, *self.capsys.readouterr()

    def take_starts(self) -> list[str]:
        """Names of the points that were started since the last time, in order."""
        return [name for name, _, _ in self.take_notes()]

    def take_notes(self) -> list[list]:
        path = self.folder / "started"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def read_table(self) -> dict:
        return json.loads((self.workdir / "table.json").read_text())


def define(*calls: str) -> str:
    return "def sweep(add):\n" + "".join(f"    {call}\n" for call in calls)
