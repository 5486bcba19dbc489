"""The two pure functions of an episode: `decode_until_wait` samples until documents are needed, `absorb` reads them into the same cache.

Everything happens on the rows of one device's shard. A row (episode) is in one of three phases: DECODING, WAITING for an observation, DONE. Rows are
independent: each has its own length, turn and automaton state, and its noise depends only on its episode id and token index, so neither the order of
searches nor the neighbours change its tokens. No token is ever run through the model twice: the last token of a row is always still to be fed, by the next
decode step or at the head of the next observation.

Axis letters: B rows of the shard, T context, K turns (max_turns searches and a last one that may only answer), D documents, O observation tokens, V vocabulary.
"""
from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from stepsearch_jax.models.transformer import KVCache, Policy, make_cache
from stepsearch_jax.records import TurnStatus
from stepsearch_jax.rollout.sampling import sample

DECODING, WAITING, DONE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """The static sizes and rules of a rollout; see `configs/base.py` for their meaning."""

    max_turns: int
    max_turn_tokens: int
    context: int
    max_prompt_tokens: int
    max_observation_tokens: int
    documents: int
    top_k: int
    top_p: float
    flush_share: float
    prefill_rows: int

    @property
    def turns(self) -> int:
        """K: the searching turns and the last one, which may only answer."""
        return self.max_turns + 1


@flax.struct.dataclass
class Environment:
    """What the device needs to know of the text world, as arrays: the tag automaton over token ids, and the fixed warnings."""

    next_state: jax.Array  # [S, V]
    event: jax.Array  # [S] int: TurnStatus reached in this automaton state, NONE while the turn goes on
    start: jax.Array  # [] int: state at the beginning of a turn
    invalid_warning: jax.Array  # [W] int32, observation of an invalid turn
    last_turn_warning: jax.Array  # [W'] int32, appended to the observation before the last turn


@flax.struct.dataclass
class Prompts:
    """The episodes to run."""

    tokens: jax.Array  # [B, P] int32, right padded
    length: jax.Array  # [B] int32
    episode_ids: jax.Array  # [B] int32: seeds the row's noise
    active: jax.Array  # [B] bool: False for rows that only fill up the batch


@flax.struct.dataclass
class EpisodeState:
    """All rows of a shard in the middle of their episodes."""

    cache: KVCache
    tokens: jax.Array  # [B, T] int32
    action_mask: jax.Array  # [B, T] bool
    turn_ids: jax.Array  # [B, T] int32
    sampler_logprobs: jax.Array  # [B, T] float32
    length: jax.Array  # [B] int32; tokens[:, length - 1] is the one not yet in the cache
    phase: jax.Array  # [B] int32
    turn: jax.Array  # [B] int32
    turn_start: jax.Array  # [B] int32: index of the turn's first action token
    automaton: jax.Array  # [B] int32
    turn_status: jax.Array  # [B, K] int32
    search_end: jax.Array  # [B, K] int32
    doc_ids: jax.Array  # [B, K, D] int32
    search_ok: jax.Array  # [B, K] bool
    finished: jax.Array  # [B] bool
    truncated: jax.Array  # [B] bool
    counters: jax.Array  # [1, 3] int32 of this shard: decode steps, flushes, tokens prefilled


@flax.struct.dataclass
class Observations:
    """What the search callback returns: see the callback contract in `search/callback.py`."""

    tokens: jax.Array  # [B, O] int32
    length: jax.Array  # [B] int32
    doc_ids: jax.Array  # [B, D] int32
    ok: jax.Array  # [B] bool


def start_episodes(policy: Policy, settings: RolloutSettings, params, environment: Environment, prompts: Prompts) -> EpisodeState:
    """Prefills the prompts, all but their last token, and sets every active row DECODING."""
    B, P = prompts.tokens.shape
    T, K, D = settings.context, settings.turns, settings.documents
    in_prompt = jnp.arange(P) < prompts.length[:, None]
    state = EpisodeState(
        cache=make_cache(policy.config, B, T),
        tokens=jnp.zeros((B, T), jnp.int32).at[:, :P].set(jnp.where(in_prompt, prompts.tokens, 0)),
        action_mask=jnp.zeros((B, T), bool),
        turn_ids=jnp.full((B, T), -1, jnp.int32),
        sampler_logprobs=jnp.zeros((B, T), jnp.float32),
        length=prompts.length,
        phase=jnp.where(prompts.active, DECODING, DONE),
        turn=jnp.zeros((B,), jnp.int32),
        turn_start=prompts.length,
        automaton=jnp.full((B,), environment.start, jnp.int32),
        turn_status=jnp.full((B, K), int(TurnStatus.NONE), jnp.int32),
        search_end=jnp.full((B, K), -1, jnp.int32),
        doc_ids=jnp.full((B, K, D), -1, jnp.int32),
        search_ok=jnp.zeros((B, K), bool),
        finished=jnp.zeros((B,), bool),
        truncated=jnp.zeros((B,), bool),
        counters=jnp.zeros((1, 3), jnp.int32),
    )
    return prefill(policy, settings, params, state, prompts.active, jnp.zeros((B,), jnp.int32), prompts.length - 1, P)


def prefill(policy: Policy, settings: RolloutSettings, params, state: EpisodeState, wanted: jax.Array, first: jax.Array, count: jax.Array,
            width: int) -> EpisodeState:
    """Runs `count[b]` (at most `width`) recorded tokens from index `first[b]` of the wanted rows through the model into their cache rows.

    Wanted rows are compacted: `prefill_rows` of them at a time, so that the cost follows the rows that wait, not the batch.
    """
    B, T = state.tokens.shape
    rows_at_once = min(settings.prefill_rows, B)
    order = jnp.argsort(~wanted, stable=True)
    number = wanted.sum()
    padded_order = jnp.concatenate([order, jnp.full((rows_at_once,), B)])
    offsets = jnp.arange(width)

    def step(carry):
        done, cache = carry
        rows = jax.lax.dynamic_slice(padded_order, (done,), (rows_at_once,))
        rows = jnp.where(done + jnp.arange(rows_at_once) < number, rows, B)  # B: no such row, everything of it is dropped
        index = first.at[rows].get(mode="clip")[:, None] + offsets  # [b, width]
        valid = (offsets < count.at[rows].get(mode="clip")[:, None]) & (rows < B)[:, None]
        chunk = state.tokens.at[rows[:, None], jnp.minimum(index, T - 1)].get(mode="clip")
        beyond = cache.k.shape[3] + offsets  # distinct positions outside the cache: dropped
        _, cache = policy.apply(params, chunk, jnp.where(valid, index, beyond), cache, rows, method=Policy.extend)
        return done + rows_at_once, cache

    _, cache = jax.lax.while_loop(lambda carry: carry[0] < number, step, (jnp.int32(0), state.cache))
    fed = jnp.where(wanted, count, 0).sum()
    return state.replace(cache=cache, counters=state.counters.at[0, 2].add(fed))


def decode_until_wait(policy: Policy, settings: RolloutSettings, params, environment: Environment, prompts: Prompts, key: jax.Array,
                      temperature: jax.Array, state: EpisodeState) -> EpisodeState:
    """Samples one token per decoding row at a time, until a flush is due or nobody decodes any more.

    A flush is due when at least `flush_share` of the unfinished rows waits.
    """
    rows = jnp.arange(state.tokens.shape[0])
    last_turn = settings.turns - 1

    def may_decode(s: EpisodeState) -> jax.Array:
        decoding, waiting = (s.phase == DECODING).sum(), (s.phase == WAITING).sum()
        return (decoding > 0) & (waiting < settings.flush_share * (decoding + waiting))

    def decode(s: EpisodeState) -> EpisodeState:
        active = s.phase == DECODING
        position = jnp.where(active, s.length - 1, s.cache.k.shape[3])
        current = s.tokens[rows, jnp.minimum(s.length - 1, settings.context - 1)]
        hidden, cache = policy.apply(params, current[:, None], position[:, None], s.cache, None, method=Policy.extend)
        logits = policy.apply(params, hidden[:, 0], method=Policy.unembed)
        token, logprob = sample(logits, key, prompts.episode_ids, s.length, temperature, top_k=settings.top_k, top_p=settings.top_p,
                                axis=policy.config.tensor_axis)

        index = jnp.where(active, s.length, settings.context)  # where the new token goes; beyond the end: dropped
        length = s.length + active
        automaton = jnp.where(active, environment.next_state[s.automaton, token].astype(jnp.int32), s.automaton)
        status = environment.event[automaton]
        too_long = (status == TurnStatus.NONE) & (length - s.turn_start >= settings.max_turn_tokens)
        no_search_left = (status == TurnStatus.SEARCH) & (s.turn == last_turn)
        out_of_context = active & (status == TurnStatus.NONE) & (length >= settings.context)
        status = jnp.where(too_long | no_search_left | out_of_context, int(TurnStatus.INVALID), status)
        status = jnp.where(active, status, int(TurnStatus.NONE))
        searched = status == TurnStatus.SEARCH
        waits = searched | ((status == TurnStatus.INVALID) & (s.turn < last_turn) & ~out_of_context)
        ended = (status != TurnStatus.NONE) & ~waits
        at_turn = jnp.where(status != TurnStatus.NONE, s.turn, settings.turns)
        return s.replace(
            cache=cache,
            tokens=s.tokens.at[rows, index].set(token, mode="drop"),
            action_mask=s.action_mask.at[rows, index].set(True, mode="drop"),
            turn_ids=s.turn_ids.at[rows, index].set(s.turn, mode="drop"),
            sampler_logprobs=s.sampler_logprobs.at[rows, index].set(logprob, mode="drop"),
            length=length,
            automaton=automaton,
            phase=jnp.where(waits, WAITING, jnp.where(ended, DONE, s.phase)),
            turn_status=s.turn_status.at[rows, at_turn].set(status, mode="drop"),
            search_end=s.search_end.at[rows, jnp.where(searched, s.turn, settings.turns)].set(index, mode="drop"),
            finished=s.finished | (status == TurnStatus.ANSWER),
            truncated=s.truncated | out_of_context,
            counters=s.counters.at[0, 0].add(1),
        )

    return jax.lax.while_loop(may_decode, decode, state)


def read_queries(settings: RolloutSettings, state: EpisodeState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> (action tokens of the current turn [B, Q], their number [B], wanted [B]): the arguments of the search callback, Q = max_turn_tokens."""
    index = state.turn_start[:, None] + jnp.arange(settings.max_turn_tokens)
    tokens = jnp.take_along_axis(state.tokens, jnp.minimum(index, settings.context - 1), axis=1)
    length = state.length - state.turn_start
    status = jnp.take_along_axis(state.turn_status, state.turn[:, None], axis=1)[:, 0]
    wanted = (state.phase == WAITING) & (status == TurnStatus.SEARCH)
    return jnp.where(jnp.arange(settings.max_turn_tokens) < length[:, None], tokens, 0), length, wanted


def absorb(policy: Policy, settings: RolloutSettings, params, environment: Environment, observations: Observations, state: EpisodeState) -> EpisodeState:
    """Gives every waiting row its observation, the documents found or the warning for an invalid turn, and lets it decode its next turn.

    A row whose observation does not fit into the context ends as truncated, without it.
    """
    B, T = state.tokens.shape
    waiting = state.phase == WAITING
    status = jnp.take_along_axis(state.turn_status, state.turn[:, None], axis=1)[:, 0]
    searched = waiting & (status == TurnStatus.SEARCH)

    # The observation: documents or warning, then the last-turn warning where the next turn is the last.
    warning, last_warning = environment.invalid_warning, environment.last_turn_warning
    width = max(settings.max_observation_tokens, warning.shape[0])
    total = width + last_warning.shape[0]
    found = jnp.pad(observations.tokens, ((0, 0), (0, total - observations.tokens.shape[1])))
    tokens = jnp.where(searched[:, None], found, jnp.pad(warning, (0, total - warning.shape[0])))
    length = jnp.where(searched, observations.length, warning.shape[0])
    before_last = waiting & (state.turn + 1 == settings.turns - 1)
    tail_at = jnp.where(before_last, length, total)[:, None] + jnp.arange(last_warning.shape[0])
    tokens = tokens.at[jnp.arange(B)[:, None], tail_at].set(last_warning, mode="drop")
    length = length + jnp.where(before_last, last_warning.shape[0], 0)

    fits = waiting & (state.length + length < T)  # at least one token must still be sampled
    rows = jnp.arange(B)
    offsets = jnp.arange(total)
    index = jnp.where(fits[:, None] & (offsets < length[:, None]), state.length[:, None] + offsets, T)
    at_turn = jnp.where(searched, state.turn, settings.turns)
    state = state.replace(
        tokens=state.tokens.at[rows[:, None], index].set(tokens, mode="drop"),
        turn_ids=state.turn_ids.at[rows[:, None], index].set(state.turn[:, None], mode="drop"),
        doc_ids=state.doc_ids.at[rows, at_turn].set(observations.doc_ids, mode="drop"),
        search_ok=state.search_ok.at[rows, at_turn].set(observations.ok, mode="drop"),
        counters=state.counters.at[0, 1].add(1),
    )
    # The last action token and all of the observation but its last token: `length` tokens.
    state = prefill(policy, settings, params, state, fits, state.length - 1, length, total)
    new_length = state.length + jnp.where(fits, length, 0)
    return state.replace(
        length=new_length,
        phase=jnp.where(waiting, jnp.where(fits, DECODING, DONE), state.phase),
        truncated=state.truncated | (waiting & ~fits),
        turn=state.turn + fits,
        turn_start=jnp.where(fits, new_length, state.turn_start),
        automaton=jnp.where(fits, environment.start, state.automaton),
    )
