"""The two pure functions of an episode: `decode_until_wait` samples until documents are needed,
`read_observations` reads them into the same cache.

Everything happens on one device's shard of the rows. Its episodes are many, its slots may be fewer:
a slot is a row of the KV cache, and when its episode ends it takes the next prompt. A slot is in
one of three phases: DECODING, WAITING for an observation, FREE. Slots are independent: each has its
own length, turn and automaton state, and a token's noise depends only on its episode id and its
index, so neither the order of searches nor the neighbours nor the slot change an episode's tokens.
No token is ever run through the model twice: the last token of an episode is always still to be
fed, by the next decode step or at the head of the next observation.

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
    """The first episodes in their slots, their prompts prefilled but for the last token. slots: S,
    of this shard.
    """
    B, T, K, D = prompts.tokens.shape[0], settings.context, settings.turns, settings.documents
    none = jnp.zeros((slots,), jnp.int32)
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
    in_prompt = jnp.arange(prompts.tokens.shape[1]) < prompts.length[:, None]
    written = state.record.tokens.at[:, : prompts.tokens.shape[1]].set(
        jnp.where(in_prompt, prompts.tokens, 0)
    )
    state, admitted = _admit(
        environment, prompts, state.replace(record=state.record.replace(tokens=written))
    )
    return _prefill(policy, settings, params, state, admitted, none, state.length - 1)


def count_left(prompts: Prompts, state: EpisodeState) -> jax.Array:
    """[] int32: episodes of the shard that have had no slot yet."""
    return prompts.active.sum() - state.begun[0]


def is_unfinished(prompts: Prompts, state: EpisodeState) -> jax.Array:
    """[] bool: whether anything of the shard is left to do."""
    return (state.phase != FREE).any() | (count_left(prompts, state) > 0)


def _admit(
    environment: Environment, prompts: Prompts, state: EpisodeState
) -> tuple[EpisodeState, jax.Array]:
    """Gives free slots to the next episodes -> (state, which slots got one [S])."""
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
    """Runs `count` recorded tokens from index `first` of the wanted slots' episodes (all [S])
    through the model, into the slots' cache rows.

    Wanted slots are compacted, the longest first, `prefill_rows` of them at a time, and of each
    `prefill_tokens` at a time: the cost follows what there is to read, not the number of slots or
    the longest observation there could be.
    """
    S, T = state.phase.shape[0], settings.context
    group, width = min(settings.prefill_rows, S), settings.prefill_tokens
    count = jnp.where(wanted, count, 0)
    order = jnp.concatenate([jnp.argsort(-count, stable=True), jnp.full((group,), S)])
    number = (count > 0).sum()
    beyond = state.cache.positions + jnp.arange(width)  # outside the cache: not written

    def step(carry):
        done, offset, cache = carry
        slots = jax.lax.dynamic_slice(order, (done,), (group,))
        slots = jnp.where(
            done + jnp.arange(group) < number, slots, S
        )  # S: no such slot, everything of it is dropped
        due = count.at[slots].get(mode="fill", fill_value=0)
        offsets = offset + jnp.arange(width)
        index = first.at[slots].get(mode="clip")[:, None] + offsets  # [group, width]
        chunk = state.record.tokens.at[
            state.episode.at[slots].get(mode="clip")[:, None], jnp.minimum(index, T - 1)
        ].get(mode="clip")
        positions = jnp.where(offsets < due[:, None], index, beyond)
        cache = policy.apply(params, chunk, positions, cache, slots, method=Policy.read)
        more = offset + width < due[0]  # the first of the group is its longest
        return jnp.where(more, done, done + group), jnp.where(more, offset + width, 0), cache

    _, _, cache = jax.lax.while_loop(
        lambda carry: carry[0] < number, step, (jnp.int32(0), jnp.int32(0), state.cache)
    )
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
    """Samples one token per decoding slot at a time, until a flush is due or nobody decodes any
    more.

    A flush is due when at least `flush_fraction` of the slots that have work wait: for an
    observation, or for the next prompt.
    """
    B, last_turn = prompts.tokens.shape[0], settings.turns - 1

    def may_decode(s: EpisodeState) -> jax.Array:
        decoding = (s.phase == DECODING).sum()
        waiting = (s.phase == WAITING).sum() + jnp.minimum(
            (s.phase == FREE).sum(), count_left(prompts, s)
        )
        return (decoding > 0) & (waiting < settings.flush_fraction * (decoding + waiting))

    def decode(s: EpisodeState) -> EpisodeState:
        active = s.phase == DECODING
        position = jnp.where(active, s.length - 1, s.cache.positions)
        hidden, cache = policy.apply(
            params, s.last_token[:, None], position[:, None], s.cache, None, method=Policy.extend
        )
        logits = policy.apply(params, hidden[:, 0], method=Policy.unembed)
        token, logprob = sample(
            logits,
            key,
            prompts.episode_ids[s.episode],
            s.length,
            temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            axis=policy.config.tensor_axis,
        )

        length = s.length + active
        automaton = jnp.where(
            active, environment.next_state[s.automaton, token].astype(jnp.int32), s.automaton
        )
        status = environment.event[automaton]
        too_long = (status == TurnStatus.NONE) & (length - s.turn_start >= settings.max_turn_tokens)
        no_search_left = (status == TurnStatus.SEARCH) & (s.turn == last_turn)
        out_of_context = active & (status == TurnStatus.NONE) & (length >= settings.context)
        status = jnp.where(
            too_long | no_search_left | out_of_context, int(TurnStatus.INVALID), status
        )
        status = jnp.where(active, status, int(TurnStatus.NONE))
        searched = status == TurnStatus.SEARCH
        waits = searched | ((status == TurnStatus.INVALID) & (s.turn < last_turn) & ~out_of_context)
        ended = (status != TurnStatus.NONE) & ~waits

        r, row = s.record, jnp.where(active, s.episode, B)  # B: dropped
        at_turn = jnp.where(status != TurnStatus.NONE, s.turn, settings.turns)
        record = r.replace(
            tokens=r.tokens.at[row, s.length].set(token, mode="drop"),
            action_mask=r.action_mask.at[row, s.length].set(True, mode="drop"),
            turn_ids=r.turn_ids.at[row, s.length].set(s.turn, mode="drop"),
            sampler_logprobs=r.sampler_logprobs.at[row, s.length].set(logprob, mode="drop"),
            length=r.length.at[row].set(length, mode="drop"),
            turn_status=r.turn_status.at[row, at_turn].set(status, mode="drop"),
            search_end=r.search_end.at[row, jnp.where(searched, s.turn, settings.turns)].set(
                s.length, mode="drop"
            ),
            finished=r.finished.at[row].max(status == TurnStatus.ANSWER, mode="drop"),
            truncated=r.truncated.at[row].max(out_of_context, mode="drop"),
        )
        return s.replace(
            record=record,
            cache=cache,
            length=length,
            last_token=jnp.where(active, token, s.last_token),
            automaton=automaton,
            status=jnp.where(active, status, s.status),
            phase=jnp.where(waits, WAITING, jnp.where(ended, FREE, s.phase)),
            counters=s.counters.at[0, 0].add(1),
        )

    return jax.lax.while_loop(may_decode, decode, state)


def read_queries(
    settings: RolloutSettings, state: EpisodeState
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> (action tokens of the current turn [S, Q], their number [S], wanted [S]): the arguments of
    the search callback, Q = max_turn_tokens.
    """
    index = state.turn_start[:, None] + jnp.arange(settings.max_turn_tokens)
    tokens = state.record.tokens[state.episode[:, None], jnp.minimum(index, settings.context - 1)]
    length = state.length - state.turn_start
    wanted = (state.phase == WAITING) & (state.status == TurnStatus.SEARCH)
    return (
        jnp.where(jnp.arange(settings.max_turn_tokens) < length[:, None], tokens, 0),
        length,
        wanted,
    )


def read_observations(
    policy: Policy,
    settings: RolloutSettings,
    params,
    environment: Environment,
    prompts: Prompts,
    observations: Observations,
    state: EpisodeState,
) -> EpisodeState:
    """Gives every waiting slot its observation, the documents found or the warning for an invalid
    turn, and every free one the next prompt.

    An episode whose observation does not fit into the context ends as truncated, without it.
    """
    B, S, T = prompts.tokens.shape[0], state.phase.shape[0], settings.context
    waiting = state.phase == WAITING
    searched = waiting & (state.status == TurnStatus.SEARCH)

    # The observation: documents or warning, then the last-turn warning where the next turn is the
    # last.
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

    fits = waiting & (state.length + length < T)  # at least one token must still be sampled
    offsets = jnp.arange(total)
    index = jnp.where(
        fits[:, None] & (offsets < length[:, None]), state.length[:, None] + offsets, T
    )
    new_length = state.length + jnp.where(fits, length, 0)
    r, row = state.record, jnp.where(waiting, state.episode, B)  # B: dropped
    at_turn = jnp.where(searched, state.turn, settings.turns)
    state = state.replace(
        record=r.replace(
            tokens=r.tokens.at[row[:, None], index].set(tokens, mode="drop"),
            turn_ids=r.turn_ids.at[row[:, None], index].set(state.turn[:, None], mode="drop"),
            length=r.length.at[row].set(new_length, mode="drop"),
            doc_ids=r.doc_ids.at[row, at_turn].set(observations.doc_ids, mode="drop"),
            search_ok=r.search_ok.at[row, at_turn].set(observations.ok, mode="drop"),
            truncated=r.truncated.at[row].max(waiting & ~fits, mode="drop"),
        ),
        counters=state.counters.at[0, 1].add(1),
    )
    # To be read: the last action token and all of the observation but its last token, `length`
    # tokens from there; or a prompt but for its last token.
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
