"""The padding benchmark at tiny sizes: both sides train alike, and padding is what it says."""

import dataclasses

import numpy as np
import pytest
import tiny

from stepsearch_jax.benchmark import padding

MODEL = dataclasses.replace(tiny.CONFIG, vocab_size=24)


@pytest.mark.slow
def test_the_figures(monkeypatch):
    monkeypatch.setattr(padding, "start", lambda: None)
    monkeypatch.setattr(padding, "SIDES", {"whole": 1, "sorted": 4})  # fewer widths to compile
    figures = padding.measure(repeats=1, seed=0, episodes=8, length=64, model=MODEL)
    lengths = np.linspace(8, 64, 8).astype(int)
    widths = 16 * -(-np.sort(lengths).reshape(4, 2).max(1) // 16)
    assert figures["padding"]["whole"] == pytest.approx(1 - lengths.sum() / (8 * 64))
    assert figures["padding"]["sorted"] == pytest.approx(1 - lengths.sum() / (2 * widths.sum()))
    norms = figures["gradient_norms"]
    assert norms["whole"] == pytest.approx(norms["sorted"], rel=1e-4)
    assert figures["ratio"] == figures["seconds"]["whole"] / figures["seconds"]["sorted"]
    assert padding.render(figures).splitlines()[-1].endswith(f"{figures['ratio']:.2f}x")


@pytest.mark.slow
def test_sides_that_disagree_end_the_run(monkeypatch):
    make = padding.make_update

    def make_wrong(model, batch, buckets, seed):
        return make(model, batch, buckets, seed + (buckets > 1))

    monkeypatch.setattr(padding, "start", lambda: None)
    monkeypatch.setattr(padding, "make_update", make_wrong)
    with pytest.raises(ValueError, match="gradients differ"):
        padding.measure(repeats=1, seed=0, episodes=4, length=32, model=MODEL)
