"""The update benchmark at tiny sizes: both runs train; its figures, and memory against shapes."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from stepsearch_jax.benchmark import cases, roofline, sample_model, scripted, update

MODEL = dataclasses.replace(
    sample_model.MODEL,
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    attention_block=16,
)
CASE = cases.Case(
    episodes=4, prompt=6, turns=1, turn_tokens=(5,), observation=1, slots=0, **cases.CONFIGURED
)
MEMORY = update.MemoryCase(rows=2, length=32, model=dataclasses.replace(MODEL, remat="layers"))


@pytest.mark.slow
def test_both_runs_train_both_models_and_compile_nothing():
    inputs = scripted.Inputs.draw(MODEL, CASE, seed=0)
    step, updates = update.make_steps(MODEL, MODEL, CASE, inputs, seed=0)
    compiled = []
    listen = lambda event, *_, **__: (
        compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
    )
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        found = [run() for run in (step, updates, updates, step)]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    for metrics in found:
        values = {name: float(value) for name, value in metrics.items()}
        assert np.isfinite(list(values.values())).all()
        assert values["policy_grad_norm"] > 0 and values["value_grad_norm"] > 0


@pytest.mark.nightly
def test_a_step_samples_in_a_type_of_its_own(monkeypatch):
    """The rollout reads bfloat16, its own parameters as well as the learner's, which are float32
    and stay so."""
    make, types = scripted.make_rollout, []

    def spy(*arguments):
        run = make(*arguments)

        def run_and_note(params, *rest):
            types.append({leaf.dtype.name for leaf in jax.tree.leaves(params)})
            return run(params, *rest)

        return run_and_note

    monkeypatch.setattr(scripted, "make_rollout", spy)
    sampler = dataclasses.replace(MODEL, dtype=np.dtype("bfloat16"))
    inputs = scripted.Inputs.draw(MODEL, CASE, seed=0)
    scripted.make_run(sampler, CASE, inputs, CASE.episodes)[0](slice(None))
    step, _ = update.make_steps(MODEL, sampler, CASE, inputs, seed=0)
    assert np.isfinite([float(value) for value in step().values()]).all()
    assert len(types) >= 3 and all(found == {"bfloat16"} for found in types)


@pytest.mark.nightly
def test_the_figures(monkeypatch):
    monkeypatch.setattr(roofline, "measure_matmuls", lambda *_, **__: 1e9)
    found = update.measure(
        repeats=1,
        seed=0,
        peer="none",
        peer_python=sys.executable,
        case=CASE,
        model=MODEL,
        memory=MEMORY,
    )
    assert found["ours_s"] == found["step"]["ours_s"] > 0
    assert found["peer_s"] is None and found["ratio"] is None
    flops = [roofline.update_flops(MODEL, 4, 11, unembeds=unembeds) for unembeds in (True, False)]
    assert found["model_flops"] == sum(flops)
    reached = found["model_flops"] / found["updates"]["ours_s"]
    assert found["reached_flops_s"] == pytest.approx(reached)
    assert found["matmul_fraction"] == pytest.approx(found["reached_flops_s"] / 1e9)
    memory, least = found["memory"], found["roofline"]
    assert least["flops"] == found["model_flops"]
    assert least["bytes"] == 11 * memory["gradient_bytes"]
    # A layer: 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + biases 32 + 16 + 16 + norms 64 = 7808; two
    # of them, final norm 32, embedding 64 * 32: both models; output table 64 * 32, value head 32.
    assert memory["gradient_bytes"] == 4 * (2 * (2 * 7808 + 32 + 2048) + 2048 + 32)
    assert memory["logits_bytes"] == 4 * 2 * 32 * 64
    assert memory["beyond_bytes"] == memory["temporary_bytes"] - memory["gradient_bytes"]
    beyond = memory["beyond_bytes"] / memory["logits_bytes"]
    assert memory["share_of_logits"] == pytest.approx(beyond)
    assert "GFLOP/s" in update.render(found)


def test_tunix_computes_the_same():
    pytest.importorskip("tunix")
    found = update.measure(
        repeats=1,
        seed=0,
        peer="tunix",
        peer_python=sys.executable,
        case=CASE,
        model=MODEL,
        memory=MEMORY,
    )
    assert found["step"]["peer_s"] > 0 and found["updates"]["peer_s"] > 0
    assert found["largest_logit_difference"] < 1e-4
