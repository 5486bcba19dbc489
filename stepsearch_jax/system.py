"""From a config to the parts that the commands put to work; everything that can be wrong with a config or its files is found here, before any compilation."""
from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from stepsearch_jax import sharding
from stepsearch_jax.data import atlas_grammar
from stepsearch_jax.data.loading import Source, load_source
from stepsearch_jax.models.transformer import ModelConfig, RopeScaling
from stepsearch_jax.prompting.tags import decode_query, make_tag_automaton
from stepsearch_jax.prompting.templates import encode_environment, render_document, render_prompt
from stepsearch_jax.prompting.tokenizers import Tokenizer, load_tokenizer
from stepsearch_jax.records import Episode, Question
from stepsearch_jax.rewards.scoring import StepScores, match_rendered, score_episodes
from stepsearch_jax.rewards.tfidf import fit_similarity
from stepsearch_jax.rl.advantages import CRITIC_ESTIMATORS, GROUP_ESTIMATORS
from stepsearch_jax.rollout.episode import Environment, Prompts, RolloutSettings
from stepsearch_jax.rollout.text import Answers, encode_answers, encode_prompts
from stepsearch_jax.run_folder import flatten
from stepsearch_jax.search.bm25 import build_index
from stepsearch_jax.search.callback import SearchCallback, SearchCounts, make_search_callback
from stepsearch_jax.search.corpus_tokens import tokenize_corpus
from stepsearch_jax.search.watchdog import Watchdog

WATCHED_QUERIES = 64  # searched at a time outside episodes, each time under the limit of config.search.timeout_s
VOCABULARY_MULTIPLE = 64  # the model's vocabulary is the tokenizer's, rounded up so that any sensible tensor axis divides it
CHOICES = {  # keys whose value is one of a few words, checked before anything else
    "rollout.search": ("callback", "host"), "rollout.dtype": ("float32", "bfloat16"), "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "layers"), "model.rope_scaling.kind": ("none", "linear", "llama3", "yarn"),
    "reward.answer_gate": ("strict", "ends_with_answer"), "reward.format_failure": ("zero_answer", "minus_one"), "reward.key_match": ("max", "overwrite"),
    "reward.redundancy_scope": ("earlier_turns", "rendered"), "reward.tfidf_fit": ("corpus", "pair"), "reward.placement": ("step", "merged"),
    "reward.step_reward": ("gain", "answer_logprob"),
    "rl.advantage": (*CRITIC_ESTIMATORS, *GROUP_ESTIMATORS), "rl.aggregation": ("token_mean", "sequence_mean"), "rl.kl_placement": ("reward", "loss"),
    "rl.kl_estimator": ("k1", "k2", "k3", "abs"), "policy.optimizer": ("adamw", "sgd"), "value.optimizer": ("adamw", "sgd"),
    "imitation.optimizer": ("adamw", "muon"),
}

MINIMA = {  # the least sensible value of keys that count something; NaN is below all of them
    0: ("iterations", "rollout.temperature", "rollout.top_k", "rollout.slots", "rl.micro_rows", "rl.kl_coef", "rl.kl_target", "rl.clip_low", "rl.clip_high",
        "rl.value_clip", "evaluation.every", "evaluation.questions", "data.train_questions", "policy.learning_rate", "value.learning_rate", "policy.warmup",
        "value.warmup"),
    1: ("rollout.questions", "rollout.group_size", "rollout.max_turns", "rollout.max_turn_tokens", "rollout.prefill_rows", "rollout.prefill_tokens",
        "rollout.attention_block", "search.k", "rl.minibatches", "rl.epochs", "rl.length_multiple", "rl.kl_horizon", "checkpoint.every",
        "checkpoint.imitation_every", "checkpoint.keep", "imitation.log_every", "imitation.held_out", "imitation.demonstrations", "model.num_layers",
        "model.embed_dim", "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.ffn_dim"),
}


@dataclasses.dataclass(frozen=True)
class Split:
    """Questions with their prompts as token ids."""

    questions: Sequence[Question]
    prompts: np.ndarray  # [n, P] int32
    prompt_length: np.ndarray  # [n] int32
    answers: Answers | None = None  # where the step reward asks for them

    def take(self, rows: np.ndarray, episode_ids: np.ndarray) -> tuple[Prompts, list[Question]]:
        """Prompts and questions of `rows`; a row of -1 fills up the batch and runs nothing (its question is the first)."""
        safe = np.maximum(rows, 0)
        prompts = Prompts(self.prompts[safe], self.prompt_length[safe], episode_ids.astype(np.int32), rows >= 0)
        return prompts, [self.questions[int(row)] for row in safe]


@dataclasses.dataclass(frozen=True)
class System:
    """The parts of a run that hold no parameters."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    source: Source
    tokenizer: Tokenizer
    settings: RolloutSettings
    environment: Environment  # arrays on this host
    search: SearchCallback
    search_documents: Callable[[list[str]], np.ndarray]  # queries -> corpus ids [q, k]
    learner_model: ModelConfig
    rollout_model: ModelConfig
    splits: dict[str, Split]

    def measure_retrieval(self, split_name: str) -> float:
        """Share of sub-questions whose gold documents are among the k that a search for the sub-question itself returns; NaN without gold documents."""
        subs = [sub for question in self.splits[split_name].questions for sub in question.sub_questions if sub.gold_ids]
        found = self.search_documents([sub.question for sub in subs]) if subs else []
        return float(np.mean([bool(set(sub.gold_ids).intersection(ids.tolist())) for sub, ids in zip(subs, found)])) if subs else float("nan")

    def score(self, episodes: Sequence[Episode], gain: np.ndarray | None = None) -> StepScores:
        """Rewards of episodes, by the config's reward section. gain [B, K]: stands in for the information gain of the retrieved documents."""
        w = self.config.reward
        return score_episodes(
            episodes, self._similarity, gain=gain, num_turns=self.settings.turns, answer_gate=w.answer_gate, format_failure=w.format_failure,
            gamma_key=w.gamma_key, key_match=w.key_match, use_gain=w.use_gain, use_redundancy=w.use_redundancy, redundancy_scope=w.redundancy_scope,
            step_scale=w.step_scale, search_cost=w.search_cost, retrieved_answer_credit=w.retrieved_answer_credit, rendered_ids=self._rendered_ids,
            texts=self._texts)

    _similarity: object = None
    _rendered_ids: np.ndarray | None = None
    _texts: Sequence[str] | None = None


def build_system(config: ml_collections.ConfigDict, splits: Sequence[str], search=None) -> System:
    """Data, index, tokenizer, prompts, callback and shapes for `splits`. `search`: replaces BM25 as the function queries -> ids [q, k] (tests).

    Raises ValueError or FileNotFoundError, with what to change, for anything that does not fit together.
    """
    g, s, r, p = config.mesh, config.search, config.rollout, config.prompt
    mesh = sharding.make_mesh(g.data, g.fsdp, g.tensor)
    check_config(config, mesh)

    # Texts: data set, corpus, index, tokenizer. All are kept under cache_dir and only made when they are not there yet.
    words = atlas_grammar.vocabulary() if p.tokenizer == "atlas" else []
    tokenizer = load_tokenizer(p.tokenizer, words)
    with sharding.first_process_first("data"):
        source = load_source(config.data, s.bm25_k1, s.bm25_b)
        folder = pathlib.Path(config.data.cache_dir) / f"corpus-{source.manifest['hash']}"
        index = build_index(source.documents, folder / f"bm25-{s.bm25_k1}-{s.bm25_b}", s.bm25_k1, s.bm25_b)
        texts = [render_document(document) for document in source.documents]
        document_tokens = tokenize_corpus(texts, folder / f"tokens-{tokenizer.fingerprint[:16]}", tokenizer.encode_batch, tokenizer.fingerprint)

    # The environment as arrays, and the search behind the fixed-shape callback.
    fixed = encode_environment(tokenizer.encode, s.k)
    automaton = make_tag_automaton(tokenizer.token_bytes, tokenizer.eos_ids)
    vocabulary = -(-tokenizer.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    own = np.arange(len(automaton.next_state), dtype=automaton.next_state.dtype)
    unused = np.broadcast_to(own[:, None], (len(own), vocabulary - tokenizer.vocab_size))  # ids without bytes leave the automaton where it is
    environment = Environment(np.concatenate([automaton.next_state, unused], axis=1), automaton.event, np.int32(automaton.start),
                              fixed.invalid_warning, fixed.last_turn_warning)
    watchdog = Watchdog(s.timeout_s, "config.search.timeout_s")
    search = search or (lambda queries: index.search(queries, s.k)[0])
    token_bytes = [*tokenizer.token_bytes, *[b""] * (vocabulary - tokenizer.vocab_size)]  # a policy may sample the unused ids, too
    callback = make_search_callback(search, partial(decode_query, token_bytes=token_bytes), document_tokens, fixed, s.max_observation_tokens, s.k, watchdog)

    def search_documents(queries: list[str]) -> np.ndarray:
        found = []
        for start in range(0, len(queries), WATCHED_QUERIES):
            with watchdog.watching("the search"):
                try:
                    found.append(search(queries[start:start + WATCHED_QUERIES]))
                except Exception as error:
                    raise ValueError(f"the search failed: {type(error).__name__}: {error}") from error
        return np.concatenate(found)

    settings = RolloutSettings(
        max_turns=r.max_turns, max_turn_tokens=r.max_turn_tokens, context=r.context, max_prompt_tokens=p.max_prompt_tokens,
        max_observation_tokens=s.max_observation_tokens, documents=s.k, top_k=r.top_k, top_p=r.top_p, slots=r.slots,
        flush_share=r.flush_share, prefill_rows=r.prefill_rows, prefill_tokens=r.prefill_tokens)
    m = config.model
    learner_model = ModelConfig(
        vocab_size=vocabulary, num_layers=m.num_layers, embed_dim=m.embed_dim, num_heads=m.num_heads, num_kv_heads=m.num_kv_heads, head_dim=m.head_dim,
        ffn_dim=m.ffn_dim, rope_theta=m.rope_theta, rope_scaling=None if m.rope_scaling.kind == "none" else RopeScaling(**dict(m.rope_scaling)),
        norm_eps=m.norm_eps, qkv_bias=m.qkv_bias, qk_norm=m.qk_norm, tie_embeddings=m.tie_embeddings, dtype=jnp.dtype(m.dtype), remat=m.remat,
        attention_block=r.attention_block)
    rollout_model = dataclasses.replace(learner_model, dtype=jnp.dtype(r.dtype), remat="none")

    prepared = {}
    for name in splits:
        if name not in source.splits:
            raise ValueError(f"the data set has no split {name!r}, only {', '.join(source.splits)}: change config.data or config.evaluation.split")
        questions = list(source.splits[name])
        rendered = [render_prompt(p.template, question.question) for question in questions]
        answers = encode_answers(questions, tokenizer) if config.reward.step_reward == "answer_logprob" else None
        prepared[name] = Split(questions, *encode_prompts(rendered, [question.uid for question in questions], tokenizer, p.max_prompt_tokens), answers)
    plain = [f"{document.title} {document.text}" for document in source.documents]
    return System(
        config, mesh, source, tokenizer, settings, environment, callback, search_documents, learner_model, rollout_model, prepared,
        _similarity=fit_similarity(plain, tfidf_fit=config.reward.tfidf_fit),
        _rendered_ids=match_rendered(source.documents) if config.reward.redundancy_scope == "rendered" else None,
        _texts=plain if config.reward.retrieved_answer_credit else None)


def check_config(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises ValueError for words that mean nothing, and for numbers that do not fit together: mesh and batch, lengths, minibatches."""
    r, l, p, s, i, m = config.rollout, config.rl, config.prompt, config.search, config.imitation, config.model
    values = flatten(config.to_dict())
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise ValueError(f"config.{key} is {values[key]!r}; it must be one of {', '.join(choices)}")
    for least, keys in MINIMA.items():
        for key in keys:
            if not values[key] >= least:
                raise ValueError(f"config.{key} is {values[key]}; it must be at least {least}")
    if m.num_heads % m.num_kv_heads or m.head_dim % 2:
        raise ValueError(f"model.num_heads={m.num_heads} must be a multiple of model.num_kv_heads={m.num_kv_heads}, and model.head_dim={m.head_dim} even")
    for phase in i.phases:
        if len(phase) != 5 or phase[0] < 1 or phase[1] < 1 or not 0 <= phase[3] <= 1 or not phase[4] >= 0:
            raise ValueError(f"imitation.phases holds {tuple(phase)}; a phase is (steps, rows, single hops, share spoilt, learning rate)")
    episodes, shards = r.questions * r.group_size, sharding.row_shards(mesh)
    if episodes % (shards * l.minibatches):
        raise ValueError(f"{episodes} episodes an iteration (rollout.questions x rollout.group_size) cannot be cut into {shards} mesh shards "
                         f"(mesh.data x mesh.fsdp) times {l.minibatches} minibatches: make the product a divisor of the episodes")
    if r.slots > episodes or r.slots % shards:
        raise ValueError(f"rollout.slots={r.slots} must be 0 (all), or a multiple of the {shards} mesh shards (mesh.data x mesh.fsdp) up to the {episodes} "
                         "episodes of an iteration")
    if l.micro_rows and (episodes // l.minibatches) % l.micro_rows or l.micro_rows % shards:
        raise ValueError(f"rl.micro_rows={l.micro_rows} must be a multiple of the {shards} mesh shards and divide the {episodes // l.minibatches} rows "
                         "of a minibatch")
    if l.advantage in GROUP_ESTIMATORS and r.group_size < 2:
        raise ValueError(f"rl.advantage={l.advantage} compares the episodes of one question, but rollout.group_size is {r.group_size}: set it to 2 or more "
                         f"(and lower rollout.questions by as much), or rl.advantage to {' or '.join(CRITIC_ESTIMATORS)}")
    if l.over_observations and l.advantage != "gae":
        raise ValueError(f"rl.over_observations=True widens token GAE, but rl.advantage is {l.advantage}: set it to gae, or rl.over_observations to False")
    for rows in ((*(phase[1] for phase in i.phases), i.held_out) if i.phases else ()):
        if rows % shards:
            raise ValueError(f"{rows} rows of imitation (imitation.phases, imitation.held_out) cannot be cut into {shards} mesh shards (mesh.data x mesh.fsdp)")
    needed = p.max_prompt_tokens + r.max_turn_tokens + s.max_observation_tokens
    if r.context < needed:
        raise ValueError(f"rollout.context={r.context} has no room for one prompt, one turn and one observation ({needed} tokens): raise it, or lower "
                         "prompt.max_prompt_tokens, rollout.max_turn_tokens or search.max_observation_tokens")
    for name, value in (("rollout.flush_share", r.flush_share), ("rollout.top_p", r.top_p)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value} must lie in (0, 1]")


def check_searches(system: System) -> SearchCounts:
    """-> what was searched since the last check, on all processes together; `first_error` is this process's.

    Raises SystemExit, on every process, when their share exceeds config.search.max_failure_share; it names the first failure.
    """
    counts = system.search.take_counts()
    numbers = np.array([counts.calls, counts.searches, counts.failed, counts.seconds])
    *whole, seconds = multihost_utils.process_allgather(numbers).reshape(-1, len(numbers)).sum(0).tolist()
    calls, searches, failed = (round(number) for number in whole)
    limit = system.config.search.max_failure_share
    if failed > limit * searches:
        where = f" (process {jax.process_index()}: {counts.first_error})" if counts.first_error else ", on another process"
        raise SystemExit(f"stepsearch_jax: the search failed for {failed} of {searches} queries{where}; "
                         f"config.search.max_failure_share={limit} allows no more")
    return SearchCounts(calls, searches, failed, seconds, counts.first_error)


def process_rows(mesh: Mesh, total: int) -> np.ndarray:
    """Which of `total` global rows this process holds, in the order in which it passes them to the mesh."""
    sharding_ = jax.sharding.NamedSharding(mesh, sharding.ROWS)
    slices = {index[0].indices(total)[:2] for index in sharding_.addressable_devices_indices_map((total,)).values()}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(slices)])
