"""The roofline's formulas, by hand and against loops; the rates are only known to be positive."""

import dataclasses

import pytest

from stepsearch_jax.benchmark import cases, rollout, roofline, sample_model

# 2 layers of width 4: q 4 x 2 x 3, k and v 4 x 1 x 3 each, o 2 x 3 x 4, three of 4 x 5:
# 24 + 12 + 12 + 24 + 60 = 132 a layer. Output table 7 x 4 = 28.
TINY = dataclasses.replace(
    sample_model.MODEL,
    vocab_size=7,
    num_layers=2,
    embed_dim=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=3,
    ffn_dim=5,
)


def test_work_by_hand():
    assert roofline.count_layer_parameters(TINY) == 264
    # Three rows at context 10. FLOPs: 2 * 3 * (264 + 28) = 1752; attention, queries with keys and
    # weights with values, 4 * 3 * 2 layers * 6 * 10 = 1440. Bytes: 4 each of 292 parameters and of
    # keys and values of 2 layers * 3 rows * 10 positions * 3 = 180, twice.
    assert roofline.decode_step(TINY, 3, 10) == roofline.Work(1752 + 1440, 4 * (292 + 360))
    # Two rows read 3 tokens up to context 5: all of the first layer, k and v of the last, 132 + 24
    # parameters. FLOPs: 2 * 2 * 3 * 156 = 1872; attention of one layer over 3 + 4 + 5 positions:
    # 4 * 2 * 6 * 12 = 576.
    assert roofline.prefill(TINY, 2, 3, 5) == roofline.Work(1872 + 576, 4 * (156 + 2 * 2 * 5 * 3))
    # Two rows of 3 tokens: forward 2 * 6 * 292 = 3504 and attention over 1 + 2 + 3 positions,
    # 4 * 2 * 12 * 6 = 576; backward twice as much.
    assert roofline.update_flops(TINY, 2, 3, unembeds=True) == 3 * (3504 + 576)
    assert roofline.update_flops(TINY, 2, 3, unembeds=False) == 3 * (2 * 6 * 264 + 576)


def test_the_floor_adds_the_worse_of_arithmetic_and_memory():
    rates = roofline.Rates(copy_bytes_s=10.0, matmul_flops_s=100.0)
    assert rates.floor_s([roofline.Work(200, 10), roofline.Work(100, 50)]) == 2.0 + 5.0


def test_the_figures_of_pieces():
    rates = roofline.Rates(copy_bytes_s=2.0**30, matmul_flops_s=1e9)
    found = rates.describe([roofline.Work(2e9, 0), roofline.Work(1e9, 4 * 2**30)])
    assert found == {
        "pieces": 2,
        "flops": 1.5e9,
        "bytes": 2.0 * 2**30,
        "least_s": 2.0 + 4.0,
        "copy_bytes_s": 2.0**30,
        "matmul_flops_s": 1e9,
    }
    text = "2 x step: 1.5 GFLOP and 2,048 MiB each; at least 6.00 s at 1 GFLOP/s and 1.1 GB/s"
    assert roofline.render("step", found) == text


def test_the_traffic_of_an_optimiser_step_by_hand():
    """Passes over the parameters: forward and backward read them; gradients are written, and read
    twice (norm, AdamW); AdamW reads parameters and two moments, and writes them."""
    forward, backward, gradients, adamw = 1, 1, 1 + 2, 3 + 3
    assert roofline.update_bytes(7) == 7 * (forward + backward + gradients + adamw)


def test_a_case_works_through_every_token_once():
    """Against a loop over the positions of an episode: all are fed but the very last token, each
    sees those before it and itself. Before a sampled token there are also logits, the last layer's
    108 parameters beyond k and v, and its attention."""
    case = cases.Case(
        episodes=3, prompt=5, turns=3, turn_tokens=(4,), observation=6, slots=0, **cases.CONFIGURED
    )
    prefills, steps = rollout.list_work(TINY, case)
    assert len(prefills) == 3 and len(steps) == 12
    # Behind the prompt of 5, and behind 4 sampled and 6 observed tokens.
    sampled_positions = {start + i for start in (5, 15, 25) for i in range(4)}
    flops = 0
    for position in range(case.context - 1):
        sampled = position + 1 in sampled_positions
        flops += 3 * (2 * (156 + 108 * sampled) + 4 * 6 * (1 + sampled) * (position + 1))
    flops += 3 * 12 * 2 * 28
    assert sum(work.flops for work in prefills + steps) == flops


@pytest.mark.slow
def test_rates_are_measured_once():
    book = roofline.RateBook(TINY)
    rates = book.at(4096.0, 6, unembeds=True)
    assert rates.copy_bytes_s > 0 and rates.matmul_flops_s > 0
    assert book.at(4096.0, 6, unembeds=True) == rates


def test_the_measured_matmuls_are_the_models_own(monkeypatch):
    """A machine that needs one second for everything: the rate is then the number of FLOPs."""
    monkeypatch.setattr(roofline, "_best_seconds", lambda *_: 1.0)
    assert roofline.measure_matmuls(TINY, 6, unembeds=True) == 2 * 6 * 292
    assert roofline.measure_matmuls(TINY, 6, unembeds=False) == 2 * 6 * 264
    assert roofline.measure_copy(4000.0) == roofline.COPIES * 8000


def test_infinite_rates_leave_nothing():
    rates = roofline.Rates(float("inf"), float("inf"))
    assert rates.floor_s([roofline.Work(1, 1)]) == pytest.approx(0)
