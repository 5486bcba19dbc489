"""Metrics: the log of a resumed run, TensorBoard events, and progress bars."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto import event_pb2

from configs import base
from stepsearch_jax.files import read_json_lines
from stepsearch_jax.metrics import METRICS_FILE, MetricsWriter, progress, read_metrics

CONFIG = base.get_config().to_dict()


def write_run(workdir, start, stop, stage="rl"):
    """A run whose value at an iteration depends on the iteration only, as a deterministic run's
    does.
    """
    with MetricsWriter(workdir, start, CONFIG) as writer:
        for iteration in range(start, stop):
            writer.write(stage, iteration, {"f1": iteration / 7, "loss/policy": -iteration})


def read_events(folder):
    """(step, tag, value) of every scalar in the event files of a folder, and the steps of their
    session starts (what TensorBoard purges from).
    """
    scalars, starts = [], []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a TFRecord: length u64, its crc u32, payload, its crc u32
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            scalars += [
                (event.step, value.tag, value.simple_value) for value in event.summary.value
            ]
            if event.session_log.status:
                starts.append(event.step)
    return scalars, starts


def test_lines_are_plain_json_in_order(tmp_path):
    with MetricsWriter(tmp_path / "new" / "folder", 0, CONFIG) as writer:
        writer.write("sft", 0, {"loss/policy": np.float32(0.5)})
        text = (tmp_path / "new" / "folder" / METRICS_FILE).read_text()
        assert text == '{"stage": "sft", "iteration": 0, "loss/policy": 0.5}\n'  # flushed at once
        writer.write("rl", np.int64(0), {"f1": 1, "kl": np.array(0.25)})
    assert read_metrics(tmp_path / "new" / "folder") == [
        {"stage": "sft", "iteration": 0, "loss/policy": 0.5},
        {"stage": "rl", "iteration": 0, "f1": 1.0, "kl": 0.25},
    ]


def test_nan_and_infinity_become_null(tmp_path):
    with MetricsWriter(tmp_path, 0, CONFIG) as writer:
        writer.write(
            "rl", 0, {"f1": math.nan, "kl": math.inf, "entropy": -math.inf, "searches": 2.0}
        )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert row == {
        "stage": "rl",
        "iteration": 0,
        "f1": None,
        "kl": None,
        "entropy": None,
        "searches": 2.0,
    }
    assert read_events(tmp_path / "tensorboard" / "rl")[0] == [(0, "searches", 2.0)]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"f1": "good"}, '"f1"'),
        ({"f1": None}, '"f1"'),
        ({"f1": np.zeros(2)}, '"f1"'),
        ({"stage": 1.0}, '"stage"'),
        ({"iteration": 1.0}, '"iteration"'),
    ],
)
def test_what_is_no_metric_is_refused_and_nothing_written(tmp_path, values, message):
    with MetricsWriter(tmp_path, 0, CONFIG) as writer, pytest.raises(ValueError, match=message):
        writer.write("rl", 0, values)
    assert not (tmp_path / METRICS_FILE).exists()


# The law of resuming: run to `killed` and part of one more line, resume from a checkpoint at
# `resumed` <= `killed`: the log is the uninterrupted one.
@settings(max_examples=20, deadline=None)
@given(killed=st.integers(1, 6), lost=st.integers(0, 6), cut=st.integers(0, 60))
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path_factory, killed, lost, cut):
    resumed = max(killed - lost, 0)
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    for workdir in (whole, broken):
        write_run(workdir, 0, 3, stage="sft")
    write_run(whole, 0, 8)
    write_run(broken, 0, killed)
    next_line = (whole / METRICS_FILE).read_bytes().splitlines()[3 + killed]
    with open(broken / METRICS_FILE, "ab") as file:
        file.write(next_line[: min(cut, len(next_line) - 1)])
    write_run(broken, resumed, 8)
    assert (broken / METRICS_FILE).read_bytes() == (whole / METRICS_FILE).read_bytes()
    assert not [path for path in broken.iterdir() if path.name.endswith(".tmp")]


def test_only_the_stage_being_written_is_cut(tmp_path):
    write_run(tmp_path, 0, 5, stage="sft")
    write_run(tmp_path, 0, 5, stage="rl")
    write_run(tmp_path, 2, 4, stage="rl")
    expected = [("sft", i) for i in range(5)] + [("rl", i) for i in range(4)]
    assert [(row["stage"], row["iteration"]) for row in read_metrics(tmp_path)] == expected


def test_a_later_stage_of_a_resumed_process_starts_afresh(tmp_path):
    # left by a process whose supervised fine-tuning is now done again from iteration 8
    write_run(tmp_path, 0, 3, stage="rl")
    with MetricsWriter(tmp_path, 8, CONFIG) as writer:
        writer.write("sft", 8, {"loss/policy": 1.0})
        writer.write("rl", 0, {"f1": 0.5})
    assert [(row["stage"], row["iteration"]) for row in read_metrics(tmp_path)] == [
        ("sft", 8),
        ("rl", 0),
    ]


def test_several_lines_of_one_iteration_are_kept(tmp_path):
    with MetricsWriter(tmp_path, 0, CONFIG) as writer:
        writer.write("rl", 0, {"f1": 0.1})
        writer.write("rl", 0, {"seconds/rollout": 2.0})
    assert len(read_metrics(tmp_path)) == 2


def test_tensorboard_has_the_values_and_forgets_what_is_done_again(tmp_path):
    write_run(tmp_path, 0, 4)
    write_run(tmp_path, 2, 3)
    scalars, starts = read_events(tmp_path / "tensorboard" / "rl")
    assert sorted(starts) == [0, 2]
    assert sorted(scalars) == sorted(
        (i, tag, value)
        for i in (0, 1, 2, 3, 2)
        for tag, value in (("f1", np.float32(i / 7)), ("loss/policy", -i))
    )


def test_a_line_broken_in_the_middle_is_an_error_with_its_number(tmp_path):
    write_run(tmp_path, 0, 2)
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text().replace('"f1": 0.0', '"f1": 0.', 1))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not valid JSON"):
        read_metrics(tmp_path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object, found list"):
        read_json_lines(path)
    path.write_text('{"iteration": 0}\n')
    with pytest.raises(ValueError, match='entry 1: "stage"'):
        read_metrics(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        read_metrics(tmp_path)


def test_progress_without_a_terminal_writes_a_few_plain_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress(range(200), "rl")
    seen = []
    for i in bar:
        bar.set_postfix(f1=i / 200)
        seen.append(i)
    assert seen == list(range(200))
    lines = stream.getvalue().splitlines()
    # the first and the last; both ends of an interval far below 30 s
    assert len(lines) == 2 and "\r" not in stream.getvalue()
    assert (
        lines[0].startswith("rl:   0%")
        and lines[1].startswith("rl: 100%")
        and "200/200" in lines[1]
        and "f1=0.995" in lines[1]
    )


def test_progress_counts_units_by_hand(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(10, "before RL:") as bar:
        bar.update(4)
        bar.update(6)
    assert "10/10" in stream.getvalue() and "before RL: 100%" in stream.getvalue()


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress(range(3), "rl"):
        pass
    assert "\r" in stream.getvalue() and "3/3 [" in stream.getvalue()


def test_jax_is_not_imported():
    code = (
        "import sys, stepsearch_jax.metrics, stepsearch_jax.report; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
