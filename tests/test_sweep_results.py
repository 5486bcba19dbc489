"""What a sweep shows: intervals, the table's figures over time, and the figure."""

import math
import re

import numpy as np
import pytest
from sweeping import Bench, define

from stepsearch_jax.sweeps import figure, results


@pytest.fixture
def bench(tmp_path, capsys) -> Bench:
    return Bench(tmp_path, capsys)


# --- intervals


def test_intervals_by_hand():
    """Quantiles 0.975 of Student's t from printed tables.

    12.706 (1 degree of freedom), 3.182 (3), 2.776 (4).
    """
    assert results.mean_interval([]) is None
    assert results.mean_interval([0.4]) == {"mean": 0.4, "interval": None}
    # 0 and 1: s = 1 / sqrt 2, s / sqrt 2 = 0.5
    assert results.mean_interval([0.0, 1.0]) == {
        "mean": 0.5,
        "interval": pytest.approx(12.706 * 0.5, rel=1e-4),
    }
    # 1, 2, 3, 4: squared deviations 2.25 + 0.25 + 0.25 + 2.25 = 5, s = sqrt(5 / 3),
    # s / sqrt 4 = 0.6455
    assert results.mean_interval([4.0, 1.0, 3.0, 2.0]) == {
        "mean": 2.5,
        "interval": pytest.approx(3.182 * math.sqrt(5 / 3) / 2, rel=1e-3),
    }
    # 0, 0, 0, 0, 5: squared deviations 4 + 16 = 20, s = sqrt 5, s / sqrt 5 = 1
    assert results.mean_interval([0.0, 0.0, 5.0, 0.0, 0.0]) == {
        "mean": 1.0,
        "interval": pytest.approx(2.776, rel=1e-3),
    }
    assert results.mean_interval([0.3, 0.3, 0.3])["interval"] == pytest.approx(0.0, abs=1e-12)


def test_durations():
    assert [results.format_duration(s) for s in (0.4, 59.4, 61, 3599, 3725, 86400)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h 0 min",
        "1 h 2 min",
        "24 h 0 min",
    ]


# --- the figure


@pytest.mark.slow
def test_figure_has_every_method_once(bench):
    bench.run()
    svg = (bench.workdir / "figure.svg").read_text()
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", svg)
    for text in (
        "small",
        "F1 of training episodes, by iteration",
        "F1 after RL, greedy",
        "before RL",
        "Full",
        "merged",
        "0.367",
    ):
        assert text in texts, text
    assert "without key = step only" in texts and "step only" not in texts
    assert (bench.workdir / "figure.png").read_bytes().startswith(b"\x89PNG")
    files = {name: (bench.workdir / name).read_bytes() for name in figure.FIGURE_FILES}
    bench.run("--table-only")
    assert {name: (bench.workdir / name).read_bytes() for name in files} == files


@pytest.mark.slow
def test_many_methods_get_panels_of_their_own(bench):
    calls = [f'add("method {n}", {{"iterations": {n + 2}}}, [0])' for n in range(9)]
    bench.set_sweep(define(*calls))
    assert bench.run()[0] == 0
    drawn = figure.draw_figure(bench.read_table(), bench.workdir)
    panels = [
        axes
        for part in drawn.subfigs
        for half in part.subfigs
        for axes in half.axes
        if axes.get_visible()
    ]
    titles = [axes.get_title(loc="left") for axes in panels[:9]]
    assert len(panels) == 9 + 1 and titles == [f"method {n}" for n in range(9)]
    # The first method's curve, and its own.
    assert [len(axes.lines) for axes in panels[:9]] == [2] * 9


def test_no_figure_before_a_run_is_finished(bench):
    bench.workdir.mkdir()
    status, out, _ = bench.run("--table-only")
    assert status == 0 and "| Full | 0 of 3 | – | – | – | – | – |" in out and "before RL" not in out
    assert sorted(path.name for path in bench.workdir.iterdir()) == ["table.json", "table.md"]


@pytest.mark.slow
def test_curves_by_hand(bench):
    """Six iterations, F1 = f (i + 1) / 6.

    The mean of five neighbours leaves a line as it is; the ends have the mean of three and of four.
    """
    bench.run()
    # Reaches 0.6: 0.1, 0.2, ... 0.6; the lines of the fine-tuning are not read.
    curve = figure._read_curve(bench.workdir / "points/full-2")
    assert list(curve) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(curve.values()), [0.2, 0.25, 0.3, 0.4, 0.45, 0.5])
    x, mean, half = figure._average([{1: 0.0, 2: 0.3, 3: 1.0}, {1: 1.0, 2: 0.3}])
    assert x.tolist() == [1, 2]
    np.testing.assert_allclose(mean, [0.5, 0.3])
    np.testing.assert_allclose(half, [6.353, 0.0], rtol=1e-4, atol=1e-9)


def test_names_at_the_ends_of_curves_do_not_overlap():
    gap = figure._NAME_GAP
    assert figure._spread([0.2, 0.8]) == [0.2, 0.8]
    np.testing.assert_allclose(figure._spread([0.5, 0.5, 0.1]), [0.5, 0.5 + gap, 0.1])
    np.testing.assert_allclose(figure._spread([1.0, 0.99, 0.98]), [1.0, 1.0 - gap, 1.0 - 2 * gap])
    assert figure._spread([]) == []
