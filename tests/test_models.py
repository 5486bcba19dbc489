"""The transformer: against a NumPy forward pass, cached against uncached, chunked against whole."""

import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from stepsearch_jax.models import attention, scoring, transformer
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.attention import make_cache
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.sharding import make_mesh

CONFIG = ModelConfig(
    vocab_size=22,
    num_layers=2,
    embed_dim=12,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    ffn_dim=20,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    tie_embeddings=False,
    dtype=jnp.float32,
    remat="none",
    attention_block=4,
)
TOKENS = np.random.default_rng(0).integers(0, 22, (3, 10)).astype(np.int32)


@functools.cache
def make_params(model):
    return jax.tree.map(jnp.asarray, tiny.draw_params(model, 1))


@functools.partial(jax.jit, static_argnums=0)
def full_logits(policy: Policy, params, tokens):
    return policy.apply(params, tokens, method=Policy.init_all)


# ---- A Qwen2 forward pass of one sequence in NumPy, written from the papers. ---------------------


def forward(config: ModelConfig, params, tokens: np.ndarray) -> np.ndarray:
    """tokens [T] -> hidden [T, D] after the final norm."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"]["trunk"])
    T, N, G, H = len(tokens), config.num_heads, config.num_kv_heads, config.head_dim

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turn(x):
        """x [T, heads, H]: coordinates i and i + H/2 are a point, turned by t / theta^(2i/H)."""
        y = np.empty_like(x)
        for t in range(T):
            for i in range(H // 2):
                angle = t / config.rope_theta ** (2 * i / H)
                point = (x[t, :, i] + 1j * x[t, :, i + H // 2]) * np.exp(1j * angle)
                y[t, :, i], y[t, :, i + H // 2] = point.real, point.imag
        return y

    x = p["embedding"][tokens]
    for layer in range(config.num_layers):
        w = jax.tree.map(lambda a, layer=layer: a[layer], p["layers"])
        h = norm(x, w["attention_norm"]["scale"])
        q, k, v = (
            np.einsum("td,dnh->tnh", h, w[name]["kernel"])
            + (w[name]["bias"] if config.qkv_bias else 0)
            for name in "qkv"
        )
        q, k = turn(q), turn(k)
        attended = np.zeros((T, N, H))
        for t in range(T):
            for n in range(N):
                g = n // (N // G)
                scores = k[: t + 1, g] @ q[t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                attended[t, n] = weights / weights.sum() @ v[: t + 1, g]
        x = x + np.einsum("tnh,nhd->td", attended, w["o"]["kernel"])
        h = norm(x, w["ffn_norm"]["scale"])
        gate, up = h @ w["gate"]["kernel"], h @ w["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down"]["kernel"]
    return norm(x, p["final_norm"]["scale"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qkv_bias": False, "rope_theta": 100.0, "norm_eps": 0.1},
        {"num_kv_heads": 6},
        {"num_kv_heads": 1, "num_layers": 1},
    ],
    ids=str,
)
def test_policy_equals_numpy(changes):
    config = dataclasses.replace(CONFIG, **changes)
    policy = Policy(config)
    params = make_params(policy)
    assert ("lm_head" in params["params"]) == (not config.tie_embeddings)
    assert ("bias" in params["params"]["trunk"]["layers"]["q"]) == config.qkv_bias
    kernel = np.asarray(
        params["params"]["trunk"]["embedding"].T
        if config.tie_embeddings
        else params["params"]["lm_head"]
    )
    logits = full_logits(policy, params, TOKENS)
    assert logits.dtype == jnp.float32
    for b in range(3):
        expected = forward(config, params, TOKENS[b]) @ kernel
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(logits[b], expected, atol=1e-4)


def test_value_equals_numpy():
    value = Value(CONFIG)
    params = make_params(value)
    got = jax.jit(value.apply)(params, TOKENS)
    for b in range(3):
        np.testing.assert_allclose(
            got[b],
            forward(CONFIG, params, TOKENS[b]) @ np.asarray(params["params"]["head"]),
            atol=1e-4,
        )


def test_later_tokens_and_padding_change_nothing_before_them():
    policy = Policy(CONFIG)
    changed = TOKENS.copy()
    changed[:, 6:] = 0
    before, after = (
        np.asarray(full_logits(policy, make_params(policy), x)) for x in (TOKENS, changed)
    )
    np.testing.assert_allclose(after[:, :6], before[:, :6], atol=1e-6)
    assert np.abs(after[:, 6:] - before[:, 6:]).max() > 0.1


# ---- Attention -----------------------------------------------------------------------------------


def attend_plainly(q, k, v):
    """Softmax attention with loops over rows, heads and queries."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, s, n in np.ndindex(q.shape[:3]):
        g = n // (q.shape[2] // k.shape[2])
        scores = k[b, : s + 1, g] @ q[b, s, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, s, n] = weights / weights.sum() @ v[b, : s + 1, g]
    return out


def test_causal_attention_in_blocks(monkeypatch):
    """Of 3 and 5 queries, one of which does not divide the 10, and all at once: the same values and
    gradients.
    """
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 10, heads, 4)), jnp.float32) for heads in (6, 2, 2))
    expected, gradients = attend_plainly(q, k, v), []

    def objective(q, k, v):
        out = attention.attend_causal(q, k, v, None)
        return jnp.sin(out).sum(), out

    for block in (512, 3, 5):
        monkeypatch.setattr(attention, "ATTENTION_QUERY_BLOCK", block)
        gradient, out = jax.jit(
            lambda *a: jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(*a)
        )(q, k, v)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        gradients.append(gradient)
    for gradient in gradients[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, gradients[0]
        )


def decode_everything(
    config: ModelConfig, params, tokens: np.ndarray, lengths: list[int]
) -> np.ndarray:
    """Logits [B, T, V] of ragged rows by the cache: prompts by chunks of some rows in any order,
    then single tokens of all rows, idle ones among them.
    """
    policy = Policy(config)
    B, T = tokens.shape
    extend = jax.jit(
        lambda chunk, positions, cache, rows: policy.apply(
            params, chunk, positions, cache, rows, method=Policy.extend
        )
    )
    unembed = jax.jit(lambda hidden: policy.apply(params, hidden, method=Policy.unembed))
    cache = make_cache(config, B, T)
    beyond = cache.positions
    logits = np.full((B, T, config.vocab_size), np.nan)
    done = [0] * B

    def read(rows: list[int], counts: list[int]) -> None:
        """Feeds the next counts[i] tokens of rows[i] in one chunk of width 4; row B is no row."""
        nonlocal cache
        chunk, positions = (
            np.zeros((len(rows), 4), np.int32),
            np.tile(beyond + np.arange(4, dtype=np.int32), (len(rows), 1)),
        )
        for i, (row, count) in enumerate(zip(rows, counts)):
            if row < B:
                chunk[i, :count], positions[i, :count] = (
                    tokens[row, done[row] : done[row] + count],
                    np.arange(done[row], done[row] + count),
                )
        hidden, cache = extend(chunk, positions, cache, np.array(rows))
        scores = np.asarray(unembed(hidden))
        for i, (row, count) in enumerate(zip(rows, counts)):
            if row < B:
                logits[row, done[row] : done[row] + count] = scores[i, :count]
                done[row] += count

    read([2, 0], [4, 3])
    read([1, B], [2, 0])
    read([0, 1], [1, 4])
    while done != lengths:
        active = np.array([done[b] < lengths[b] for b in range(B)])
        here = np.where(active, done, beyond).astype(np.int32)
        current = tokens[np.arange(B), np.minimum(done, T - 1)]
        hidden, cache = extend(current[:, None], here[:, None], cache, None)
        scores = np.asarray(unembed(hidden[:, 0]))
        assert np.isfinite(scores).all()  # idle rows too
        for b in np.flatnonzero(active):
            logits[b, done[b]] = scores[b]
            done[b] += 1
    return logits


@pytest.mark.parametrize(
    "block,by_token",
    [
        (1, True),
        (4, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, False), (4, True), (16, False), (16, True)]
        ),
    ],
)
def test_cached_equals_whole(block, by_token):
    """Whatever the layout of the cache and the size of the blocks in which it is read: smaller than
    a chunk, unequal to the context, larger than it.
    """
    config = dataclasses.replace(CONFIG, attention_block=block, cache_by_token=by_token)
    policy, lengths = Policy(config), [10, 7, 5]
    params = make_params(policy)
    got = decode_everything(config, params, TOKENS, lengths)
    expected = np.asarray(full_logits(policy, params, TOKENS))
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(got[b, :length], expected[b, :length], atol=1e-4)


@pytest.mark.parametrize("qk_norm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_reading_fills_the_cache_as_extending_does(qk_norm):
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm)
    policy, rows, positions = (
        Policy(config),
        np.array([2, 0]),
        np.array([[0, 1, 2, 3], [0, 1, 2, 99]], np.int32),
    )
    params, caches = make_params(policy), {}
    for method in (Policy.extend, Policy.read):
        made = policy.apply(
            params, TOKENS[:2, :4], positions, make_cache(config, 3, 10), rows, method=method
        )
        caches[method] = made[1] if method is Policy.extend else made
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        caches[Policy.read],
        caches[Policy.extend],
    )
    assert (np.asarray(caches[Policy.read].k) != 0).any(axis=(1, 2, 3, 4, 5)).all()  # of each layer


def test_reading_leaves_out_the_last_layers_results(monkeypatch):
    attend, ran = transformer.attend_cached, []

    def attend_and_tell(q, cache, layer, rows, positions):
        jax.debug.callback(lambda layer: ran.append(int(layer)), layer)
        return attend(q, cache, layer, rows, positions)

    monkeypatch.setattr(transformer, "attend_cached", attend_and_tell)
    policy, positions = Policy(CONFIG), np.tile(np.arange(4, dtype=np.int32), (2, 1))
    for method, expected in ((Policy.extend, [0, 1]), (Policy.read, [0])):
        ran.clear()
        run = jax.jit(
            lambda params, cache, method=method: policy.apply(
                params, TOKENS[:2, :4], positions, cache, None, method=method
            )
        )
        run(make_params(policy), make_cache(CONFIG, 2, 4))
        jax.effects_barrier()
        assert sorted(ran) == expected


@pytest.mark.parametrize(
    "by_token,shape,token_axes",
    [(False, (2, 3, 3, 2, 4, 4), {"k": 5, "v": 4}), (True, (2, 3, 3, 4, 128), {"k": 3, "v": 3})],
)
def test_padding_leaves_the_cache_alone(by_token, shape, token_axes):
    config = dataclasses.replace(CONFIG, cache_by_token=by_token)
    policy = Policy(config)
    cache = make_cache(config, 3, 10)
    assert cache.v.shape == shape and cache.positions == 12  # 10 positions are 3 blocks of 4
    positions = np.array([[0, 1, 13, 14], [12, 13, 14, 15]], np.int32)
    _, cache = policy.apply(
        make_params(policy),
        TOKENS[:2, :4],
        positions,
        cache,
        np.array([1, 0]),
        method=Policy.extend,
    )
    for name, t in token_axes.items():
        array = np.moveaxis(np.asarray(getattr(cache, name)) != 0, t, 3)  # [L, J, B, t, ...]
        written = array.any(axis=(0, *range(4, array.ndim))).swapaxes(0, 1).reshape(3, 12)
        assert np.argwhere(written).tolist() == [[1, 0], [1, 1]]


@pytest.mark.slow
def test_bfloat16_is_close():
    reference = np.asarray(full_logits(Policy(CONFIG), make_params(Policy(CONFIG)), TOKENS))
    config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
    params = make_params(Policy(config))
    got = full_logits(Policy(config), params, TOKENS)
    assert got.dtype == jnp.float32 and Policy(config).apply(params, TOKENS).dtype == jnp.bfloat16
    assert jax.tree.leaves(params)[0].dtype == jnp.float32  # master weights stay
    error = np.abs(np.asarray(got) - reference).max() / np.abs(reference).max()
    assert 1e-5 < error < 0.05
    cached = decode_everything(config, params, TOKENS, [10, 7, 5])
    assert np.nanmax(np.abs(cached - reference)) / np.abs(reference).max() < 0.05
    assert make_cache(config, 1, 4).k.dtype == jnp.bfloat16


# ---- Scoring -------------------------------------------------------------------------------------


def test_shift():
    np.testing.assert_array_equal(
        scoring.shift_to_tokens(jnp.array([[1, 2, 3], [4, 5, 6]])), [[0, 1, 2], [0, 4, 5]]
    )


@pytest.mark.parametrize("tie", [False, True])
def test_score_tokens(tie):
    policy = Policy(dataclasses.replace(CONFIG, tie_embeddings=tie))
    params = make_params(policy)
    logprobs, entropy = jax.jit(functools.partial(scoring.score_tokens, policy))(params, TOKENS)
    full = np.asarray(jax.nn.log_softmax(full_logits(policy, params, TOKENS)))
    for b in range(3):
        assert logprobs[b, 0] == entropy[b, 0] == 0
        for t in range(1, 10):  # given tokens[:t], that is after reading token t - 1
            np.testing.assert_allclose(logprobs[b, t], full[b, t - 1, TOKENS[b, t]], atol=1e-5)
            np.testing.assert_allclose(
                entropy[b, t], -(np.exp(full[b, t - 1]) * full[b, t - 1]).sum(), atol=1e-5
            )


@pytest.mark.slow
def test_score_tokens_in_chunks(monkeypatch):
    """Chunks of 4 positions, which do not divide the 10: the same values and gradients, from
    smaller arrays.
    """
    policy = Policy(CONFIG)
    params = make_params(policy)
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 10)), jnp.float32)

    def objective(params):
        logprobs, entropy = scoring.score_tokens(policy, params, TOKENS)
        return (weights[0] * logprobs + weights[1] * entropy).sum(), (logprobs, entropy)

    def run():
        """-> gradient and values, and the elements of the largest array over the vocabulary."""
        program = jax.jit(lambda params: jax.grad(objective, has_aux=True)(params))
        over_vocabulary = re.findall(r"f32\[((?:\d+,)+22)\]", str(jax.make_jaxpr(program)(params)))
        return program(params), max(
            math.prod(int(n) for n in shape.split(",")) for shape in over_vocabulary
        )

    whole, whole_size = run()
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 4 * 3 * 22 + 1)
    chunked, chunked_size = run()
    assert (whole_size, chunked_size) == (10 * 3 * 22, 4 * 3 * 22)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), chunked, whole)


@pytest.mark.parametrize("block", [pytest.param(512, marks=pytest.mark.slow), 4])
def test_score_answers_equals_one_forward_an_answer(monkeypatch, block):
    """Against a forward pass of its own for every beginning with the answer behind it; blocks of 4
    queries do not divide the 10 + 3 x 5 tokens.
    """
    monkeypatch.setattr(attention, "ATTENTION_QUERY_BLOCK", block)
    policy, rng = Policy(CONFIG), np.random.default_rng(5)
    params = make_params(policy)
    seen = np.array([[2, 5, 10], [1, 1, 9], [3, 7, 8]], np.int32)
    answers, length, opening = (
        rng.integers(0, 22, (3, 5)).astype(np.int32),
        np.array([5, 3, 2], np.int32),
        2,
    )
    got = jax.jit(functools.partial(scoring.score_answers, policy))(
        params, TOKENS, seen, answers, opening, length
    )
    assert got[2].tolist() == [0, 0, 0]  # an opening tag and nothing behind it
    for b in range(2):
        for p in range(3):
            alone = np.concatenate([TOKENS[b, : seen[b, p]], answers[b, : length[b]]])
            full = np.asarray(jax.nn.log_softmax(full_logits(policy, params, alone[None])))[0]
            scored = range(seen[b, p] + opening, len(alone))
            np.testing.assert_allclose(
                got[b, p], np.mean([full[t - 1, alone[t]] for t in scored]), atol=1e-5
            )


def test_score_values():
    value = Value(CONFIG)
    params = make_params(value)
    got, raw = scoring.score_values(value, params, TOKENS), value.apply(params, TOKENS)
    np.testing.assert_array_equal(got[:, 0], 0)
    np.testing.assert_allclose(got[:, 1:], raw[:, :-1], atol=1e-6)
    assert np.abs(got[:, 1:]).min() > 0


@pytest.mark.slow
def test_remat_changes_nothing():
    def gradient(remat):
        policy = Policy(dataclasses.replace(CONFIG, remat=remat))
        return jax.jit(
            jax.grad(lambda params: jnp.sin(scoring.score_tokens(policy, params, TOKENS)[0]).sum())
        )(make_params(Policy(CONFIG)))

    plain = gradient("none")
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(plain))
    for remat in ("dots", "layers"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())),
            gradient(remat),
            plain,
        )


@pytest.mark.slow
def test_remat_keeps_less():
    """The forward pass keeps less for the backward pass from "none" to "dots" to "layers"."""

    def kept(remat):
        config = dataclasses.replace(CONFIG, remat=remat, num_layers=8)
        loss = lambda params: jnp.sin(Policy(config).apply(params, jnp.tile(TOKENS, (8, 4)))).sum()
        return (
            jax.jit(jax.grad(loss))
            .lower(make_params(Policy(config)))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    none, dots, layers = map(kept, ("none", "dots", "layers"))
    assert layers < 0.8 * dots < 0.8 * 0.8 * none


def test_slice_of_a_model():
    config = CONFIG.place_on(make_mesh(1, 1, 2, devices=jax.devices()[:2]))
    assert (
        config.num_heads,
        config.num_kv_heads,
        config.ffn_dim,
        config.vocab_size,
        config.tensor_axis,
    ) == (3, 1, 10, 11, "tensor")
    assert (config.embed_dim, config.head_dim, config.num_layers, config.cache_by_token) == (
        12,
        4,
        2,
        False,
    )
    assert CONFIG.place_on(make_mesh(2, 1, 1, devices=jax.devices()[:2])) == CONFIG


def test_tpus_keep_the_cache_by_token():
    mesh = SimpleNamespace(
        shape={"tensor": 1}, devices=np.array([[[SimpleNamespace(platform="tpu")]]])
    )
    assert CONFIG.place_on(mesh) == dataclasses.replace(CONFIG, cache_by_token=True)
