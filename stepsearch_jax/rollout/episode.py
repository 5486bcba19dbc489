"""The two halves of a rollout: `decode_until_wait` and `read_observations`, pure functions.

The first samples until documents are needed, the second reads them into the same cache. Both work
on one device's shard of the rows. A slot is a row of the KV cache. There may be fewer slots than
episodes: a slot takes the next prompt when its episode ends. It is in one of three phases:
DECODING, WAITING for an observation, or FREE.

Slots are independent: each has its own length, turn and automaton state, and a token's noise
depends only on its episode id and its index. The order of searches, the neighbours and the slot
therefore do not change an episode's tokens. No token is run through the model twice: the last token
of an episode is fed later, by the next decode step or at the head of the next observation.

Axis letters: B episodes of the shard, S slots, T context, K turns (max_turns searches and a last
one that may only answer), D documents, O observation tokens, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepsearch_jax.models.attention import make_cache
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.records import TurnStatus
from stepsearch_jax.rollout.sampling import sample
from stepsearch_jax.rollout.state import (
    DECODING,
    FREE,
    WAITING,
    Environment,
    EpisodeState,
    Observations,
    Prompts,
    Record,
    RolloutSettings,
)


def start_episodes(
    policy: Policy,
    settings: RolloutSettings,
    slots: int,
    params,
    environment: Environment,
    prompts: Prompts,
) -> EpisodeState:
    """The first episodes in their slots, with their prompts prefilled except for the last token.

    slots: S, of this shard.
    """
    B, T, K, D = prompts.tokens.shape[0], settings.context, settings.turns, settings.documents
    none = jnp.zeros((slots,), jnp.int32)
    # Empty records, and slots that are all free.
    state = EpisodeState(
        record=Record(
            tokens=jnp.zeros((B, T), jnp.int32),
            action_mask=jnp.zeros((B, T), bool),
            turn_ids=jnp.full((B, T), -1, jnp.int32),
            sampler_logprobs=jnp.zeros((B, T), jnp.float32),
            length=prompts.length,
            turn_status=jnp.full((B, K), int(TurnStatus.NONE), jnp.int32),
            search_end=jnp.full((B, K), -1, jnp.int32),
            doc_ids=jnp.full((B, K, D), -1, jnp.int32),
            search_ok=jnp.zeros((B, K), bool),
            finished=jnp.zeros((B,), bool),
            truncated=jnp.zeros((B,), bool),
        ),
        cache=make_cache(policy.config, slots, T),
        episode=none,
        phase=none + FREE,
        length=none + 1,
        last_token=none,
        turn=none,
        turn_start=none,
        status=none,
        automaton=none,
        begun=jnp.zeros((1,), jnp.int32),
        counters=jnp.zeros((1, 3), jnp.int32),
    )
    # The prompts: all into the record, the first ones into the slots and the cache.
    width = prompts.tokens.shape[1]
    in_prompt = jnp.arange(width) < prompts.length[:, None]  # [B, P]
    written = state.record.tokens.at[:, :width].set(jnp.where(in_prompt, prompts.tokens, 0))
    state = state.replace(record=state.record.replace(tokens=written))
    state, admitted = _admit(environment, prompts, state)
    return _prefill(policy, settings, params, state, admitted, none, state.length - 1)


def count_left(prompts: Prompts, state: EpisodeState) -> jax.Array:
    """[] int32: episodes of the shard that still wait for a slot."""
    return prompts.active.sum() - state.begun[0]


def is_unfinished(prompts: Prompts, state: EpisodeState) -> jax.Array:
    """[] bool: whether an episode of the shard runs or still waits for a slot."""
    return (state.phase != FREE).any() | (count_left(prompts, state) > 0)


def _admit(
    environment: Environment, prompts: Prompts, state: EpisodeState
) -> tuple[EpisodeState, jax.Array]:
    """Gives the next episodes to free slots -> (state, which slots got one [S])."""
    free = state.phase == FREE
    place = jnp.cumsum(free) - 1  # of a free slot among the free ones
    admitted = free & (place < count_left(prompts, state))
    queue = jnp.argsort(~prompts.active, stable=True)
    episode = queue.at[state.begun[0] + place].get(mode="clip")
    length = prompts.length[episode]
    choose = lambda new, old: jnp.where(admitted, new, old)
    return state.replace(
        episode=choose(episode, state.episode),
        phase=choose(DECODING, state.phase),
        length=choose(length, state.length),
        last_token=choose(prompts.tokens[episode, length - 1], state.last_token),
        turn=choose(0, state.turn),
        turn_start=choose(length, state.turn_start),
        automaton=choose(environment.start, state.automaton),
        begun=state.begun + admitted.sum(),
    ), admitted


def _prefill(
    policy: Policy,
    settings: RolloutSettings,
    params,
    state: EpisodeState,
    wanted: jax.Array,
    first: jax.Array,
    count: jax.Array,
) -> EpisodeState:
    """Runs recorded tokens of the wanted slots' episodes through the model, into the cache.

    wanted, first, count: [S]; a slot reads `count` tokens from index `first`. Wanted slots are
    compacted, the longest first. `prefill_rows` of them are read at a time, `prefill_tokens` each:
    the cost depends on what there is to read, not on the number of slots or on the longest possible
    observation.
    """
    # The order of the slots, the most tokens first.
    S, T = state.phase.shape[0], settings.context
    group, width = min(settings.prefill_rows, S), settings.prefill_tokens
    count = jnp.where(wanted, count, 0)
    order = jnp.concatenate([jnp.argsort(-count, stable=True), jnp.full((group,), S)])
    number = (count > 0).sum()
    beyond = state.cache.positions + jnp.arange(width)  # outside the cache: not written

    def step(carry):
        done, offset, cache = carry
        # The group of slots at work. S: no such slot, everything for it is dropped.
        slots = jax.lax.dynamic_slice(order, (done,), (group,))
        slots = jnp.where(done + jnp.arange(group) < number, slots, S)
        due = count.at[slots].get(mode="fill", fill_value=0)
        offsets = offset + jnp.arange(width)
        index = first.at[slots].get(mode="clip")[:, None] + offsets  # [group, width]
        # Their next chunk of tokens.
        episodes = state.episode.at[slots].get(mode="clip")[:, None]
        chunk = state.record.tokens.at[episodes, jnp.minimum(index, T - 1)].get(mode="clip")
        positions = jnp.where(offsets < due[:, None], index, beyond)
        cache = policy.apply(params, chunk, positions, cache, slots, method=Policy.read)
        # The first slot of the group is its longest: when it is done, the next group follows.
        more = offset + width < due[0]
        return jnp.where(more, done, done + group), jnp.where(more, offset + width, 0), cache

    start = (jnp.int32(0), jnp.int32(0), state.cache)
    _, _, cache = jax.lax.while_loop(lambda carry: carry[0] < number, step, start)
    return state.replace(cache=cache, counters=state.counters.at[0, 2].add(count.sum()))


def decode_until_wait(
    policy: Policy,
    settings: RolloutSettings,
    params,
    environment: Environment,
    prompts: Prompts,
    key: jax.Array,
    temperature: jax.Array,
    state: EpisodeState,
) -> EpisodeState:
    """Samples one token per decoding slot at a time, until a flush is due or no slot decodes.

    A flush is due when at least `flush_fraction` of the slots with work wait for an observation or
    for the next prompt.
    """
    B, last_turn = prompts.tokens.shape[0], settings.turns - 1

    def may_decode(state: EpisodeState) -> jax.Array:
        decoding = (state.phase == DECODING).sum()
        waiting = (state.phase == WAITING).sum()
        waiting = waiting + jnp.minimum((state.phase == FREE).sum(), count_left(prompts, state))
        return (decoding > 0) & (waiting < settings.flush_fraction * (decoding + waiting))

    def decode(state: EpisodeState) -> EpisodeState:
        # One token per slot; idle slots read and write beyond the cache.
        active = state.phase == DECODING
        position = jnp.where(active, state.length - 1, state.cache.positions)
        hidden, cache = policy.apply(
            params,
            state.last_token[:, None],
            position[:, None],
            state.cache,
            None,
            method=Policy.extend,
        )
        logits = policy.apply(params, hidden[:, 0], method=Policy.unembed)
        token, logprob = sample(
            logits,
            key,
            prompts.episode_ids[state.episode],
            state.length,
            temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            axis=policy.config.tensor_axis,
        )

        # How the token changes the turn: the automaton's event, or one of three limits.
        length = state.length + active
        next_state = environment.next_state[state.automaton, token].astype(jnp.int32)
        automaton = jnp.where(active, next_state, state.automaton)
        status = environment.event[automaton]
        goes_on = status == TurnStatus.NONE
        too_long = goes_on & (length - state.turn_start >= settings.max_turn_tokens)
        no_search_left = (status == TurnStatus.SEARCH) & (state.turn == last_turn)
        out_of_context = active & goes_on & (length >= settings.context)
        invalid = too_long | no_search_left | out_of_context
        status = jnp.where(invalid, int(TurnStatus.INVALID), status)
        status = jnp.where(active, status, int(TurnStatus.NONE))
        # What the slot does next: wait for documents or a warning, end, or go on.
        searched = status == TurnStatus.SEARCH
        warned = (status == TurnStatus.INVALID) & (state.turn < last_turn) & ~out_of_context
        waits = searched | warned
        ended = (status != TurnStatus.NONE) & ~waits

        # The record. Row B and turn K do not exist: what goes there is dropped.
        old, index = state.record, state.length
        row = jnp.where(active, state.episode, B)
        at_turn = jnp.where(status != TurnStatus.NONE, state.turn, settings.turns)
        at_search = jnp.where(searched, state.turn, settings.turns)
        record = old.replace(
            tokens=old.tokens.at[row, index].set(token, mode="drop"),
            action_mask=old.action_mask.at[row, index].set(True, mode="drop"),
            turn_ids=old.turn_ids.at[row, index].set(state.turn, mode="drop"),
            sampler_logprobs=old.sampler_logprobs.at[row, index].set(logprob, mode="drop"),
            length=old.length.at[row].set(length, mode="drop"),
            turn_status=old.turn_status.at[row, at_turn].set(status, mode="drop"),
            search_end=old.search_end.at[row, at_search].set(index, mode="drop"),
            finished=old.finished.at[row].max(status == TurnStatus.ANSWER, mode="drop"),
            truncated=old.truncated.at[row].max(out_of_context, mode="drop"),
        )
        return state.replace(
            record=record,
            cache=cache,
            length=length,
            last_token=jnp.where(active, token, state.last_token),
            automaton=automaton,
            status=jnp.where(active, status, state.status),
            phase=jnp.where(waits, WAITING, jnp.where(ended, FREE, state.phase)),
            counters=state.counters.at[0, 0].add(1),
        )

    return jax.lax.while_loop(may_decode, decode, state)


def read_queries(
    settings: RolloutSettings, state: EpisodeState
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arguments of the search callback, for the turns of all slots.

    -> (action tokens of the turn [S, max_turn_tokens], their number [S], whether it searches [S])
    """
    index = state.turn_start[:, None] + jnp.arange(settings.max_turn_tokens)
    tokens = state.record.tokens[state.episode[:, None], jnp.minimum(index, settings.context - 1)]
    length = state.length - state.turn_start
    wanted = (state.phase == WAITING) & (state.status == TurnStatus.SEARCH)
    in_turn = jnp.arange(settings.max_turn_tokens) < length[:, None]
    return jnp.where(in_turn, tokens, 0), length, wanted


def read_observations(
    policy: Policy,
    settings: RolloutSettings,
    params,
    environment: Environment,
    prompts: Prompts,
    observations: Observations,
    state: EpisodeState,
) -> EpisodeState:
    """Gives every waiting slot its observation and every free slot the next prompt.

    An observation is the documents found, or the warning for an invalid turn. An episode whose
    observation does not fit into the context ends as truncated, without it.
    """
    B, S, T = prompts.tokens.shape[0], state.phase.shape[0], settings.context
    waiting = state.phase == WAITING
    searched = waiting & (state.status == TurnStatus.SEARCH)

    # The observation: documents or warning; before the last turn, the last-turn warning behind it.
    warning, last_warning = environment.invalid_warning, environment.last_turn_warning
    width = max(settings.max_observation_tokens, warning.shape[0])
    total = width + last_warning.shape[0]
    found = jnp.pad(observations.tokens, ((0, 0), (0, total - observations.tokens.shape[1])))
    tokens = jnp.where(searched[:, None], found, jnp.pad(warning, (0, total - warning.shape[0])))
    length = jnp.where(searched, observations.length, warning.shape[0])
    before_last = waiting & (state.turn + 1 == settings.turns - 1)
    tail_at = jnp.where(before_last, length, total)[:, None] + jnp.arange(last_warning.shape[0])
    tokens = tokens.at[jnp.arange(S)[:, None], tail_at].set(last_warning, mode="drop")
    length = length + jnp.where(before_last, last_warning.shape[0], 0)

    # The record. At least one token must still be sampled; row B does not exist and is dropped.
    fits = waiting & (state.length + length < T)
    offsets = jnp.arange(total)
    written = fits[:, None] & (offsets < length[:, None])  # [S, total]
    index = jnp.where(written, state.length[:, None] + offsets, T)
    new_length = state.length + jnp.where(fits, length, 0)
    old, row = state.record, jnp.where(waiting, state.episode, B)
    at_turn = jnp.where(searched, state.turn, settings.turns)
    state = state.replace(
        record=old.replace(
            tokens=old.tokens.at[row[:, None], index].set(tokens, mode="drop"),
            turn_ids=old.turn_ids.at[row[:, None], index].set(state.turn[:, None], mode="drop"),
            length=old.length.at[row].set(new_length, mode="drop"),
            doc_ids=old.doc_ids.at[row, at_turn].set(observations.doc_ids, mode="drop"),
            search_ok=old.search_ok.at[row, at_turn].set(observations.ok, mode="drop"),
            truncated=old.truncated.at[row].max(waiting & ~fits, mode="drop"),
        ),
        counters=state.counters.at[0, 1].add(1),
    )
    # The slots. To be read: the last action token and the observation except for its last token,
    # `length` tokens in all; or a prompt except for its last token.
    first = state.length - 1
    last_token = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    state = state.replace(
        length=new_length,
        last_token=jnp.where(fits & (length > 0), last_token, state.last_token),
        phase=jnp.where(waiting, jnp.where(fits, DECODING, FREE), state.phase),
        turn=state.turn + fits,
        turn_start=jnp.where(fits, new_length, state.turn_start),
        automaton=jnp.where(fits, environment.start, state.automaton),
    )
    state, admitted = _admit(environment, prompts, state)
    return _prefill(
        policy,
        settings,
        params,
        state,
        fits | admitted,
        jnp.where(admitted, 0, first),
        jnp.where(admitted, state.length - 1, length),
    )
