"""Costs of recorded TPU programs (golden/make_hlo.py), and laws that hold for each of them."""

import functools
import gzip
import pathlib

import pytest

from configs import musique_qwen2_5
from stepsearch_jax.preflight.chips import CHIPS
from stepsearch_jax.preflight.costs import Costs, count_costs
from stepsearch_jax.preflight.hlo import Module
from stepsearch_jax.preflight.lengths import Rollout, plan_rollout
from stepsearch_jax.run.settings import rollout_settings

FOLDER = pathlib.Path(__file__).parent / "golden" / "hlo"
CONFIG = musique_qwen2_5.get_config("3b,v5e:4x4")
ROWS = 256 // 8  # of a shard, all in slots at a time
RATES = CHIPS["v5e"].rates
VERSIONS = ("0.10", "0.12")


def read(name: str) -> Module:
    return Module(gzip.decompress((FOLDER / f"{name}.hlo.gz").read_bytes()).decode())


@functools.cache
def plan() -> Rollout:
    return plan_rollout(rollout_settings(CONFIG), CONFIG.rollout.attention_block, ROWS, ROWS)


@functools.cache
def count_rollout(version: str, within: str = "") -> Costs:
    module = read(f"rollout-3b-jax{version}")
    return count_costs(module, plan().trips, RATES, within=within)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_step_reads_all_weights_and_all_live_keys(version):
    """On a chip: half of Qwen2.5-3B's 3.086e9 parameters, 2 bytes each, the table of words among
    them for the logits; and of every cached position keys and values of one of two heads, 128
    numbers in each of 36 layers. Less than a seventh comes on top."""
    weights = 3.086e9 / 2 * 2
    live = plan().live * 2 * 36 * 128 * 2
    floor = plan().steps * (weights + live)
    step = count_rollout(version, within="decode_until_wait")
    assert floor < step.bytes < 1.15 * floor
    assert step.bytes < count_rollout(version).bytes


@pytest.mark.parametrize("version", VERSIONS)
def test_two_chips_share_each_sum(version):
    """In pairs of chips an all-reduce sends each array once: of 36 layers two, [rows, 2048] in
    bfloat16 each, in each of the 1,248 steps, and [16, 128, 2048] in each chunk of prompts (2 x 16
    chunks) and observations (2 x 7); the first table sums up what it looked up."""
    steps, chunks = 1248, 2 * 16 + 2 * 7
    sums = steps * ROWS * 2048 * 2 * (2 * 36 + 1) + chunks * 16 * 128 * 2048 * 2 * (2 * 36 + 1)
    costs = count_rollout(version).collectives
    assert costs["all-reduce"].bytes == pytest.approx(sums, rel=0.01)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_compilers_cost_model_is_slower_than_peak(version):
    costs = count_rollout(version)
    assert sum(costs.seconds.values()) < costs.modelled_seconds < 4 * sum(costs.seconds.values())
    step = count_rollout(version, within="decode_until_wait")
    assert 36 * 20 < step.launches / plan().steps < 36 * 400


@pytest.mark.parametrize("version", VERSIONS)
def test_an_update_computes_the_products_of_the_model_and_attention(version):
    """6·N·D and attention, over four chips. By hand: 2 layers of width 64, queries of 4 x 8, keys
    and values of 2 x 8, ffn 128, a table of 1024; policy and value model; 8 rows of 256 tokens.
    Logits are computed again in the backward pass, so the table counts 8 times."""
    layers = 2 * (2 * 64 * 32 + 2 * 64 * 16 + 3 * 64 * 128)
    attention = 3 * 2 * 4 * 256 * 32  # forward and twice as much backward; scores and sums
    per_token = 2 * (6 * layers + attention) + 8 * 64 * 1024
    module = read(f"update-tiny-jax{version}")
    costs = count_costs(module, refuse, RATES)
    assert costs.flops == pytest.approx(8 * 256 * per_token / 4, rel=0.1)
    # Micro-batches of one row for each of two shards gather both models' parameters each.
    assert costs.collectives["all-gather"].count > 100


def refuse(functions):
    raise AssertionError(f"asked for the loop of {functions}")


def test_both_versions_of_jax_compile_to_the_same_costs():
    old, new = (count_rollout(version) for version in VERSIONS)
    assert new.flops == pytest.approx(old.flops, rel=0.02)
    assert new.bytes == pytest.approx(old.bytes, rel=0.05)
    sent = lambda costs: {kind: c.bytes for kind, c in costs.collectives.items()}
    assert sent(new)["all-reduce"] == pytest.approx(sent(old)["all-reduce"], rel=0.02)


def test_seconds_follow_the_rates():
    """Links of half the speed take longer, by no more than twice."""
    module = read("update-tiny-jax0.12")
    seconds = lambda rates: sum(count_costs(module, refuse, rates).seconds.values())
    slower = RATES._replace(link_bytes=RATES.link_bytes / 2)
    assert seconds(RATES) < seconds(slower) <= 2 * seconds(RATES)
