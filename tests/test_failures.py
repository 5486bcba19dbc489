"""A search that raises, hangs or kills its process ends the run soon, with a message that names it,
on one process and on several."""

import json
import time

import pytest
import running

LIMIT = 60.0  # seconds from the fault to the end of the last process

# A run whose search goes wrong on one process:
# driver.py CACHE START WORKDIR MODE FAULTY_PROCESS HEALTHY_CALLS PROCESS PROCESSES PORT
# Two calls of the search, one a split, measure the retrieval before the run begins.
DRIVER = """
import os, pathlib, signal, sys, time
import numpy as np
import tiny_config
from stepsearch_jax.cli import run_guarded
from stepsearch_jax.train import train

cache, start, workdir, mode = sys.argv[1:5]
faulty, healthy_calls, process, processes, port = map(int, sys.argv[5:])
config = tiny_config.get_config(cache)
config.sft.checkpoint = start
config.search.timeout_s, config.distributed.heartbeat_s = 3.0, 10
config.search.max_failure_fraction = float(mode == "tolerated")
if processes > 1:
    distributed = config.distributed
    distributed.coordinator = f"localhost:{port}"
    distributed.processes, distributed.process_id = processes, process
calls = 0

def search(queries):
    global calls
    calls += 1
    if process == faulty and calls > healthy_calls:
        if mode == "tolerated":
            raise RuntimeError("the retriever is down")
        (pathlib.Path(workdir).parent / "fault").touch()
        if mode == "raises":
            raise RuntimeError("the retriever is down")
        if mode == "hangs":
            time.sleep(600)
        if mode == "exits":
            os._exit(9)
        if mode == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return np.zeros((len(queries), config.search.k), np.int32)

run_guarded(lambda config, workdir: train(config, workdir, search), config, pathlib.Path(workdir))
"""


def run_with_fault(
    tmp_path,
    tmp_path_factory,
    mode: str,
    faulty: int,
    processes: int,
    healthy_calls: int = 2,
    devices: int = 1,
):
    """-> (exit codes, outputs of the processes, seconds from the fault to the last one's end)."""
    (tmp_path / "driver.py").write_text(DRIVER)
    folders = [
        running.shared_cache(tmp_path_factory),
        running.searching_start(tmp_path_factory),
        tmp_path / "run",
    ]
    port, logs = running.free_port(), [tmp_path / f"{process}.log" for process in range(processes)]
    command = [tmp_path / "driver.py", *folders, mode, faulty, healthy_calls]
    started = [
        running.start([*command, process, processes, port], devices=devices, log=log)
        for process, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    fault = tmp_path / "fault"
    seconds = time.time() - fault.stat().st_mtime if fault.exists() else None
    return codes, [log.read_text() for log in logs], seconds


NAMED = {  # what the faulty process says, and its exit code
    "raises": ("the search failed for ", 1),
    "hangs": ("the search has not returned for ", 70),
    "exits": ("came to a sudden end while the search was running", 9),
    "is killed": ("came to a sudden end while the search was running", -9),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [pytest.param(mode, marks=pytest.mark.nightly if mode == "exits" else ()) for mode in NAMED],
)
def test_one_process(mode, tmp_path, tmp_path_factory):
    codes, (output,), seconds = run_with_fault(
        tmp_path, tmp_path_factory, mode, faulty=0, processes=1
    )
    message, code = NAMED[mode]
    assert codes == [code] and message in output, output[-3000:]
    assert "Traceback" not in output and seconds < LIMIT
    if mode == "raises":
        assert "RuntimeError: the retriever is down" in output
        assert "config.search.max_failure_fraction=0.0" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode,faulty,processes",
    [
        ("hangs", 0, 2),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in [
                ("raises", 1, 2),
                ("is killed", 2, 4),
                ("hangs", 1, 2),
                ("exits", 1, 2),
                ("is killed", 0, 2),
                ("raises", 0, 4),
                ("hangs", 3, 4),
            ]
        ),
    ],
)
def test_several_processes(mode, faulty, processes, tmp_path, tmp_path_factory):
    """The other processes end as well. What they say depends on who notices first: this program or
    jax, which then ends the process itself."""
    codes, outputs, seconds = run_with_fault(tmp_path, tmp_path_factory, mode, faulty, processes)
    message, code = NAMED[mode]
    assert codes[faulty] == code and message in outputs[faulty], outputs[faulty][-3000:]
    assert seconds < LIMIT
    for process in set(range(processes)) - {faulty}:
        expected = (
            [f"(process {faulty}, whose log says why)"]
            if mode == "raises"
            else [f"process {process} of {processes} ends", "another task died"]
        )
        output = outputs[process]
        assert codes[process] != 0 and any(text in output for text in expected), output[-3000:]


def test_a_search_that_fails_before_the_run_begins(tmp_path, tmp_path_factory):
    """The measure of the retrieval is the first to search."""
    codes, (output,), _ = run_with_fault(
        tmp_path, tmp_path_factory, "raises", faulty=0, processes=1, healthy_calls=0
    )
    assert codes == [1]
    assert output.splitlines()[-1].endswith("RuntimeError: the retriever is down")


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_tolerated_failures_are_counted_and_earn_nothing(tmp_path, tmp_path_factory):
    codes, (output,), _ = run_with_fault(
        tmp_path, tmp_path_factory, "tolerated", faulty=0, processes=1
    )
    assert codes == [0], output[-3000:]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2 and sum(line["failed_searches"] for line in lines) > 0
    for line in lines:
        assert line["failed_searches"] <= 8 * line["searches"]
        assert line["gain"] == line["redundancy"] == line["step_reward"] == line["gold_recall"] == 0
    turns = [
        turn
        for episode in read_lines(tmp_path / "run" / "transcripts.jsonl")
        for turn in episode["turns"]
        if turn["status"] == "search"
    ]
    # An empty query finds nothing, and that is no failure.
    asked = [turn for turn in turns if turn["query"]]
    assert asked and all(
        not turn["search_ok"] and "The search failed." in turn["observation"] for turn in asked
    )
    assert not any(turn["documents"] for turn in turns)
