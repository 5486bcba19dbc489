"""The import benchmark on a small stored model. It sees memory that was held, and wrong logits."""

import time

import jax
import numpy as np
import pytest
from pretrained_models import GOLDEN

from stepsearch_jax.benchmark import importing
from stepsearch_jax.benchmark.importing import (
    HostMemory,
    make_texts,
    measure,
    read_own_memory,
    render,
)

MIB = 2**20


def test_half_of_the_texts_are_padded():
    tokens, length = make_texts(0, 50)
    assert tokens.shape == (importing.ROWS, importing.TOKENS) and tokens.max() < 50
    assert sorted(set(length)) == [importing.TOKENS // 2, importing.TOKENS]
    for row, count in zip(tokens, length):
        assert not row[count:].any() and row[:count].any()


@pytest.mark.skipif(
    not read_own_memory(), reason="this system does not tell a process's own memory"
)
def test_memory_that_was_given_back_is_seen():
    with HostMemory() as memory:
        held = np.ones(64 * MIB, np.uint8)
        time.sleep(5 * importing.LOOK_S)
        del held
    assert 60 * MIB < memory.risen < 160 * MIB


@pytest.mark.slow
def test_a_model_is_read_written_and_read_by_transformers():
    pytest.importorskip("torch", reason="the logits are compared with torch's")
    figures = measure(repeats=2, seed=0, model=GOLDEN / "qwen2")
    assert figures["largest_difference"] < 1e-4 < figures["logit_spread"]
    assert len(figures["runs_s"]) == 2
    assert figures["parameters"] * 4 == pytest.approx(figures["parameters_mib"] * MIB)
    assert "qwen2: 0.0M parameters" in render(figures)


@pytest.mark.slow
def test_a_model_that_comes_out_wrong_ends_it(monkeypatch):
    pytest.importorskip("torch", reason="the logits are compared with torch's")
    write = importing.export_policy

    def write_scaled(folder, params, *rest, **named):
        write(folder, jax.tree.map(lambda leaf: leaf * 1.01, params), *rest, **named)

    monkeypatch.setattr(importing, "export_policy", write_scaled)
    with pytest.raises(ValueError, match="differ from ours"):
        measure(repeats=1, seed=0, model=GOLDEN / "qwen2")
