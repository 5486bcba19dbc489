"""The episode program against a cache-free oracle, in both compositions and on several meshes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

KEY = jax.random.key(7)


def prompts_of(count: int):
    return jax.tree.map(lambda x: x[:count], tiny.make_prompts(64))


@functools.cache
def expect(row: int, temperature: float, settings=tiny.SETTINGS) -> tiny.OracleEpisode:
    prompts = tiny.make_prompts(64)
    prompt = prompts.tokens[row, : prompts.length[row]]
    return tiny.oracle_rollout(
        tiny.CONFIG,
        tiny.make_params(),
        prompt,
        int(prompts.episode_ids[row]),
        KEY,
        temperature,
        settings,
    )


def compare(got, episodes: list[tiny.OracleEpisode], context: int) -> None:
    """Every recorded array, token for token. From the first difference on, an episode may differ
    only if it began at a tie; ties must be rare.
    """
    sampled = sum(sum(e.actions) for e in episodes)
    assert sum(len(e.ties) for e in episodes) < 1e-3 * sampled
    for b, e in enumerate(episodes):
        n = len(e.tokens)
        common = min(n, int(got.length[b]))
        different = np.flatnonzero(got.tokens[b, :common] != e.tokens[:common])
        if len(different) and different[0] in e.ties:
            continue
        assert got.length[b] == n
        assert got.tokens[b, :n].tolist() == e.tokens
        assert not got.tokens[b, n:].any()
        assert got.token_mask[b].tolist() == [t < n for t in range(context)]
        assert got.action_mask[b, :n].tolist() == e.actions and not got.action_mask[b, n:].any()
        assert got.turn_ids[b, :n].tolist() == e.turn_ids and (got.turn_ids[b, n:] == -1).all()
        np.testing.assert_allclose(got.sampler_logprobs[b, :n], e.logprobs, atol=1e-4)
        assert not got.sampler_logprobs[b, n:].any()
        turns = len(e.statuses)
        assert (
            got.turn_status[b, :turns].tolist() == e.statuses
            and not got.turn_status[b, turns:].any()
        )
        assert (
            got.search_end[b, :turns].tolist() == e.search_ends
            and (got.search_end[b, turns:] == -1).all()
        )
        assert got.doc_ids[b, :turns].tolist() == e.doc_ids and (got.doc_ids[b, turns:] == -1).all()
        assert (
            got.search_ok[b, :turns].tolist() == e.search_oks and not got.search_ok[b, turns:].any()
        )
        assert (got.finished[b], got.truncated[b]) == (e.finished, e.truncated)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "mode,shape",
    [
        ("callback", (1, 1, 1)),
        ("host", (2, 2, 2)),
        pytest.param("callback", (4, 1, 2), marks=pytest.mark.slow),
        pytest.param("host", (1, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_matches_oracle(mode, shape, temperature):
    got, _ = tiny.run_rollout(mode, shape, prompts_of(16), KEY, temperature)
    episodes = [expect(row, temperature) for row in range(16)]
    compare(got, episodes, tiny.SETTINGS.context)
    if temperature:  # the world is rich enough to test something
        assert {status.name for e in episodes for status in e.statuses} >= {
            "SEARCH",
            "INVALID",
            "ANSWER",
        }
        assert any(e.truncated for e in episodes) and any(not all(e.search_oks) for e in episodes)


@pytest.mark.nightly
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "mode,shape",
    [
        ("callback", (4, 1, 2)),
        ("callback", (1, 1, 1)),
        ("host", (1, 1, 1)),
        ("host", (4, 1, 2)),
    ],
)
def test_matches_oracle_on_64_episodes(mode, shape, temperature):
    got, _ = tiny.run_rollout(mode, shape, prompts_of(64), KEY, temperature)
    compare(got, [expect(row, temperature) for row in range(64)], tiny.SETTINGS.context)


@pytest.mark.slow
def test_restricted_sampling_matches_oracle():
    settings = dataclasses.replace(tiny.SETTINGS, top_k=12, top_p=0.8)
    got, _ = tiny.run_rollout("callback", (1, 1, 1), prompts_of(16), KEY, 0.7, settings=settings)
    compare(got, [expect(row, 0.7, settings) for row in range(16)], settings.context)


LAYOUTS = {  # settings and meshes that must change no token
    "fewer slots": ("callback", (1, 1, 1), dict(slots=4)),
    "one slot": ("callback", (1, 1, 1), dict(slots=1)),
    "fewer slots, host": ("host", (1, 1, 1), dict(slots=4)),
    "fewer slots on a mesh": ("callback", (2, 1, 2), dict(slots=4)),
    "flush at once": ("callback", (1, 1, 1), dict(flush_fraction=0.01)),
    "flush when all wait": ("callback", (1, 1, 1), dict(flush_fraction=1.0, slots=8)),
    "one row, one token at a time": ("callback", (1, 1, 1), dict(prefill_rows=1, prefill_tokens=1)),
    "everything at once": ("callback", (1, 1, 1), dict(prefill_rows=64, prefill_tokens=64)),
}
QUICK = ("fewer slots",)  # always run


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, layout in LAYOUTS.items()
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_layout_changes_no_token(layout, temperature):
    mode, shape, changes = layout
    settings = dataclasses.replace(tiny.SETTINGS, **changes)
    got, counters = tiny.run_rollout(
        mode, shape, prompts_of(16), KEY, temperature, settings=settings
    )
    compare(got, [expect(row, temperature) for row in range(16)], settings.context)
    observed = (got.token_mask & ~got.action_mask).sum()
    assert counters[:, 2].sum() == observed - 16  # see test_prefill_counts_every_token_once


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode,slots",
    [
        ("callback", 2),
        ("host", 0),
        pytest.param("callback", 0, marks=pytest.mark.nightly),
        pytest.param("host", 2, marks=pytest.mark.nightly),
    ],
)
def test_rows_that_fill_up_the_batch_get_no_slot(mode, slots):
    """They stay as they are, and the others have the tokens that they have without them."""
    prompts = prompts_of(8)
    idle = np.array([0, 3, 4, 7])
    active = np.isin(np.arange(8), idle, invert=True)
    got, _ = tiny.run_rollout(
        mode,
        (1, 1, 1),
        prompts.replace(active=active),
        KEY,
        1.0,
        settings=dataclasses.replace(tiny.SETTINGS, slots=slots),
    )
    expected, _ = tiny.run_rollout("callback", (1, 1, 1), prompts, KEY, 1.0)
    np.testing.assert_array_equal(got.tokens[active], expected.tokens[active])
    np.testing.assert_array_equal(got.length[idle], prompts.length[idle])
    assert (
        not got.action_mask[idle].any()
        and not got.finished[idle].any()
        and expected.action_mask[idle].any()
    )
    nobody, _ = tiny.run_rollout(
        mode, (1, 1, 1), prompts.replace(active=np.zeros(8, bool)), KEY, 1.0
    )
    assert not nobody.action_mask.any()


@pytest.mark.slow
def test_memory_follows_the_slots():
    """The cache is the largest array of the program: a quarter of the slots, a quarter of it."""
    settings = dataclasses.replace(tiny.SETTINGS, context=2048)
    sizes = []
    for slots in (0, 8):
        memory = tiny.compile_rollout(
            "callback",
            (1, 1, 1),
            prompts_of(32),
            settings=dataclasses.replace(settings, slots=slots),
        ).memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
    cache = (
        2 * tiny.CONFIG.num_layers * 32 * tiny.CONFIG.num_kv_heads * 2048 * tiny.CONFIG.head_dim * 4
    )
    assert sizes[0] - sizes[1] >= 0.75 * cache > 0.5 * sizes[0]


def test_slots_that_cannot_be_shared_out():
    with pytest.raises(ValueError, match="config.rollout.slots=6 .* 4 mesh shards"):
        tiny.run_rollout(
            "callback",
            (4, 1, 2),
            prompts_of(16),
            KEY,
            1.0,
            settings=dataclasses.replace(tiny.SETTINGS, slots=6),
        )


def test_prefill_counts_every_token_once():
    got, counters = tiny.run_rollout("callback", (1, 1, 1), prompts_of(16), jax.random.key(1), 1.0)
    observed = (got.token_mask & ~got.action_mask).sum()
    # The prompt's last token is fed by the first decode step; each observation's last token too,
    # but its chunk starts with the last action token.
    assert counters[0, 2] == observed - 16
