"""A tiny text world for tests of the rollout.

It has a vocabulary in which random tokens often form tags, a fake search, and a slow rollout
without a cache as oracle.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stepsearch_jax import sharding
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.scoring import score_tokens, score_values
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.prompting.tags import make_tag_automaton
from stepsearch_jax.records import TurnStatus
from stepsearch_jax.rollout.programs import make_rollout
from stepsearch_jax.rollout.state import Environment, Prompts, RolloutSettings
from stepsearch_jax.types import Batch

# Whole tags, tags in pieces, pieces merged with neighbours; token 0 ends a text and has no bytes.
PIECES = [
    "",
    "<search>",
    "</search>",
    "<answer>",
    "</answer>",
    "<",
    "</",
    "search",
    "answer",
    ">",
    ">\n\n",
    "?</",
    "search>",
    "</sea",
    "rch>",
    " <",
    "\n",
]
WORDS = [f" w{i}" for i in range(40 - len(PIECES))]
TOKEN_BYTES = [piece.encode() for piece in PIECES + WORDS]
EOS = 0

CONFIG = ModelConfig(
    vocab_size=40,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    tie_embeddings=False,
    dtype=jnp.float32,
    remat="none",
    attention_block=16,
)
SETTINGS = RolloutSettings(
    max_turns=3,
    max_turn_tokens=24,
    context=88,
    max_prompt_tokens=12,
    max_observation_tokens=14,
    documents=2,
    top_k=0,
    top_p=1.0,
    slots=0,
    flush_fraction=0.5,
    prefill_rows=3,
    prefill_tokens=8,
)
ROLLOUT_RULES = dict(
    vocab="tensor",
    embed=None,
    heads="tensor",
    kv_heads="tensor",
    head_dim=None,
    ffn="tensor",
    norm=None,
    layers=None,
)
INVALID_WARNING = np.array([21, 22, 23], np.int32)
LAST_WARNING = np.array([24, 25], np.int32)


def make_environment() -> Environment:
    automaton = make_tag_automaton(TOKEN_BYTES, [EOS])
    return Environment(
        *(
            jnp.asarray(x)
            for x in (
                automaton.next_state,
                automaton.event,
                np.int32(automaton.start),
                INVALID_WARNING,
                LAST_WARNING,
            )
        )
    )


@functools.cache
def make_boxes(model):
    """The shapes of a model's parameters with their logical axes."""
    method = Policy.init_all if isinstance(model, Policy) else None
    init = functools.partial(model.init, method=method)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


@functools.cache
def draw_params(model, seed: int):
    """Parameters as NumPy, drawn without the model's initialisers.

    None is 0 or 1, so that biases, norms and the value head count in every comparison.
    """
    rng = np.random.default_rng(seed)
    mean = lambda path: float(path[-1].key == "scale")
    draw = lambda path, x: rng.normal(mean(path), 0.3, x.shape).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw, nn.unbox(make_boxes(model)))


@functools.cache
def make_params(config: ModelConfig = CONFIG, seed: int = 0):
    """A policy that often writes tags."""
    params = jax.tree.map(jnp.asarray, draw_params(Policy(config), seed))
    holder, name, tags = params["params"], "lm_head", np.s_[:, 1:5]
    if config.tie_embeddings:
        holder, name, tags = params["params"]["trunk"], "embedding", np.s_[1:5]
    holder[name] = holder[name].at[tags].multiply(1.3)
    return params


@functools.cache
def make_batch(config: ModelConfig, rows: int, length: int) -> Batch:
    """Ragged rows of prompt, actions and observations, one of them without actions.

    Old log-probabilities are near the current ones, so that some are clipped.
    """
    rng, policy, value = np.random.default_rng(2), Policy(config), Value(config)
    tokens = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    token_mask = np.arange(length) < rng.integers(6, length + 1, rows)[:, None]
    action_mask = token_mask & (np.arange(length) > 1) & (rng.random((rows, length)) < 0.7)
    action_mask[3] = False
    noise = lambda scale: rng.normal(0, scale, (rows, length)).astype(np.float32)
    logprobs, values = jax.jit(
        lambda p, v: (score_tokens(policy, p, tokens)[0], score_values(value, v, tokens))
    )(draw_params(policy, 1), draw_params(value, 1))
    old_logprobs, old_values, advantages, returns = (
        np.asarray(logprobs) + noise(0.3),
        np.asarray(values) + noise(0.5),
        noise(1.0),
        noise(2.0),
    )
    return Batch(
        tokens,
        token_mask,
        action_mask,
        action_mask,
        old_logprobs,
        np.asarray(logprobs) + noise(0.2),
        old_values,
        advantages,
        returns,
    )


def make_prompts(count: int, seed: int = 0) -> Prompts:
    rng = np.random.default_rng(seed)
    length = rng.integers(2, SETTINGS.max_prompt_tokens + 1, count).astype(np.int32)
    tokens = rng.integers(17, 40, (count, SETTINGS.max_prompt_tokens)).astype(np.int32)
    return Prompts(
        tokens, length, np.arange(100, 100 + count, dtype=np.int32), np.ones(count, bool)
    )


def search_one(action: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """The fake engine: observation, documents and success follow from the action's tokens alone."""
    rng = np.random.default_rng([int(t) for t in action])
    size = rng.integers(1, SETTINGS.max_observation_tokens + 1)
    observation = rng.integers(17, 40, size).astype(np.int32)
    return observation, rng.integers(0, 50, 2).astype(np.int32), bool(rng.random() < 0.9)


def fake_search(query_tokens, query_length, wanted):
    """The callback contract around `search_one`."""
    b, width = len(wanted), SETTINGS.max_observation_tokens
    tokens, length = np.zeros((b, width), np.int32), np.zeros(b, np.int32)
    doc_ids, ok = np.full((b, 2), -1, np.int32), np.zeros(b, bool)
    for i in np.flatnonzero(wanted):
        observation, doc_ids[i], ok[i] = search_one(query_tokens[i, : query_length[i]])
        length[i] = len(observation)
        tokens[i, : length[i]] = observation
    return tokens, length, doc_ids, ok


@functools.cache
def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    """A mesh of data, fsdp, tensor on as many devices as it needs."""
    return sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])


@functools.cache
def make_program(
    mode: str,
    shape: tuple[int, int, int],
    search=fake_search,
    settings: RolloutSettings = SETTINGS,
    config: ModelConfig = CONFIG,
):
    """-> (mesh, shardings of the parameters, rollout), on as many devices as the mesh shape needs.

    Made once, so that it is compiled once.
    """
    mesh = mesh_of(shape)
    specs = sharding.partition_specs(make_boxes(Policy(config)), ROLLOUT_RULES)
    return (
        mesh,
        sharding.shardings(mesh, specs),
        make_rollout(config, settings, mesh, specs, search, mode),
    )


def rollout_arguments(prompts: Prompts, key, temperature: float, mesh, param_shardings, params):
    """The arguments of a rollout, in their places on the mesh."""
    ids = np.arange(len(prompts.length), dtype=np.int32)
    environment, key = jax.device_put((make_environment(), key), sharding.replicated(mesh))
    return (
        jax.device_put(params, param_shardings),
        environment,
        *sharding.rows_to_mesh(mesh, (prompts, ids, ids)),
        key,
        jnp.float32(temperature),
    )


def compile_rollout(mode: str, shape: tuple[int, int, int], prompts: Prompts, **program):
    """The compiled callback program."""
    mesh, param_shardings, rollout = make_program(mode, shape, **program)
    params = make_params(program.get("config", CONFIG))
    return rollout.lower(
        *rollout_arguments(prompts, jax.random.key(0), 1.0, mesh, param_shardings, params)
    ).compile()


def run_rollout(
    mode: str, shape: tuple[int, int, int], prompts: Prompts, key, temperature: float, **program
):
    """-> (Trajectory, counters) as NumPy."""
    mesh, param_shardings, rollout = make_program(mode, shape, **program)
    params = make_params(program.get("config", CONFIG))
    trajectory, counters = rollout(
        *rollout_arguments(prompts, key, temperature, mesh, param_shardings, params)
    )
    return sharding.rows_from_mesh(trajectory), np.asarray(counters)


@dataclasses.dataclass
class OracleEpisode:
    tokens: list[int]
    actions: list[bool]
    logprobs: list[float]
    turn_ids: list[int]
    statuses: list[TurnStatus]
    search_ends: list[int]
    doc_ids: list[list[int]]
    search_oks: list[bool]
    finished: bool = False
    truncated: bool = False
    # Indices of tokens whose two best scores are closer than 1e-4.
    ties: list[int] = dataclasses.field(default_factory=list)


def first_event(action: list[int]) -> TurnStatus:
    """String search for the end of an action, on its bytes."""
    if action[-1] == EOS:
        return TurnStatus.INVALID
    text = b"".join(TOKEN_BYTES[t] for t in action)
    closings = [(text.find(tag), tag) for tag in (b"</search>", b"</answer>") if tag in text]
    if not closings:
        return TurnStatus.NONE
    position, tag = min(closings)
    before = text[:position]
    opened = max((before.rfind(name), name) for name in (b"<search>", b"<answer>"))
    if opened[0] < 0 or opened[1] != tag.replace(b"/", b""):
        return TurnStatus.INVALID
    return TurnStatus.SEARCH if b"search" in tag else TurnStatus.ANSWER


def keep_likeliest(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Top-k, then nucleus, one token at a time in order of probability."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    mass = np.exp(logits[order] - logits[order[0]])
    mass /= mass.sum()
    kept, total = [], 0.0
    for token, share in zip(order, mass):
        if total >= top_p:
            break
        kept.append(token)
        total += share
    return np.where(np.isin(np.arange(len(logits)), kept), logits, -np.inf)


@functools.partial(jax.jit, static_argnums=0)
def next_logits(config, params, tokens, length, key, episode_id, temperature):
    """Logits after `length` tokens of a padded buffer by a full forward pass, and the next noise.

    The noise is that of the next token: of its block, then within it.
    """
    policy = Policy(config)
    logits = policy.apply(
        params, policy.apply(params, tokens[None])[0, length - 1], method=Policy.unembed
    )
    noise_key = jax.random.fold_in(jax.random.fold_in(key, episode_id), length)
    blocks = math.gcd(config.vocab_size, 384)
    return (
        logits,
        jax.random.gumbel(noise_key, (blocks + config.vocab_size // blocks,)),
        jax.nn.log_softmax(logits),
    )


def choose(scores: np.ndarray, noise: np.ndarray) -> tuple[int, bool]:
    """A block by its mass, then a token of it, each with the largest sum of score and noise.

    -> (token, whether another was within 1e-4).
    """
    blocks = math.gcd(len(scores), 384)
    table = scores.reshape(blocks, -1).astype(np.float64)
    with np.errstate(divide="ignore"):
        masses = np.log(np.exp(table - scores.max()).sum(1)) + noise[:blocks]
    block = int(masses.argmax())
    inner = table[block] + noise[blocks:]
    gap = min((np.diff(np.sort(x)[-2:])[0] for x in (masses, inner) if len(x) > 1), default=np.inf)
    return block * table.shape[1] + int(inner.argmax()), gap < 1e-4


def oracle_rollout(
    config, params, prompt: np.ndarray, episode_id: int, key, temperature: float, settings=SETTINGS
) -> OracleEpisode:
    """One episode without cache, batch or automaton: a full, padded forward pass for each token."""
    tokens = [int(t) for t in prompt]
    episode = OracleEpisode(
        tokens, [False] * len(tokens), [0.0] * len(tokens), [-1] * len(tokens), [], [], [], []
    )
    for turn in range(settings.turns):
        action: list[int] = []
        status = TurnStatus.NONE
        while status == TurnStatus.NONE:
            buffer = np.zeros(settings.context, np.int32)
            buffer[: len(tokens)] = tokens
            scores, noise, logprobs = (
                np.asarray(x)
                for x in next_logits(
                    config, params, buffer, len(tokens), key, episode_id, temperature
                )
            )
            if temperature > 0:
                token, tie = choose(
                    keep_likeliest(scores / temperature, settings.top_k, settings.top_p), noise
                )
            else:
                token, tie = int(np.argmax(scores)), np.diff(np.sort(scores)[-2:])[0] < 1e-4
            if tie:
                episode.ties.append(len(tokens))
            tokens.append(token)
            action.append(token)
            episode.actions.append(True)
            episode.turn_ids.append(turn)
            episode.logprobs.append(float(logprobs[token]))
            status = first_event(action)
            if status == TurnStatus.NONE and len(tokens) == settings.context:
                episode.statuses.append(TurnStatus.INVALID)
                episode.search_ends.append(-1)
                episode.doc_ids.append([-1, -1])
                episode.search_oks.append(False)
                episode.truncated = True
                return episode
            if status == TurnStatus.NONE and len(action) == settings.max_turn_tokens:
                status = TurnStatus.INVALID
        if status == TurnStatus.SEARCH and turn == settings.turns - 1:
            status = TurnStatus.INVALID
        episode.statuses.append(status)
        episode.search_ends.append(len(tokens) - 1 if status == TurnStatus.SEARCH else -1)
        episode.doc_ids.append([-1, -1])
        episode.search_oks.append(False)
        if status == TurnStatus.ANSWER:
            episode.finished = True
            return episode
        if turn == settings.turns - 1:
            return episode
        observation = INVALID_WARNING
        if status == TurnStatus.SEARCH:
            observation, found, episode.search_oks[-1] = search_one(np.array(action, np.int32))
            episode.doc_ids[-1] = found.tolist()
        observation = observation.tolist()
        if turn + 1 == settings.turns - 1:
            observation += LAST_WARNING.tolist()
        if len(tokens) + len(observation) >= settings.context:
            episode.truncated = True
            return episode
        tokens += observation
        episode.actions += [False] * len(observation)
        episode.logprobs += [0.0] * len(observation)
        episode.turn_ids += [turn] * len(observation)
    return episode
