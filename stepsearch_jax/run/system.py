"""From a config to the parts that the commands put to work; everything that can be wrong with a
config or its files is found here, before any compilation.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from stepsearch_jax import sharding
from stepsearch_jax.choices import is_plugin
from stepsearch_jax.data import atlas_grammar
from stepsearch_jax.data.documents import Mapped
from stepsearch_jax.data.loading import Source, load_source
from stepsearch_jax.data.schema import encode_question
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.weights import Weights, check_architecture
from stepsearch_jax.plugins import describe_function, load_step_reward, score_steps
from stepsearch_jax.prompting.tags import decode_query, make_tag_automaton
from stepsearch_jax.prompting.templates import encode_environment, render_document, render_prompt
from stepsearch_jax.prompting.tokenizers import Tokenizer, load_tokenizer
from stepsearch_jax.records import Episode, Question
from stepsearch_jax.rewards.scoring import StepScores, score_episodes
from stepsearch_jax.rewards.tfidf import fit_similarity
from stepsearch_jax.rollout.state import Environment, Prompts, RolloutSettings
from stepsearch_jax.rollout.text import Answers, encode_answers, encode_prompts
from stepsearch_jax.run.checks import check_config, check_cuts
from stepsearch_jax.run.corpus import build_search_index, normalize_texts, read_texts
from stepsearch_jax.run.pretrained import open_weights
from stepsearch_jax.run.settings import describe_models, rollout_settings, round_vocabulary
from stepsearch_jax.search.cache import hash_texts, locate_corpus, lock_cache
from stepsearch_jax.search.callback import (
    MAX_QUERY_CHARACTERS,
    SearchCallback,
    SearchCounts,
    SomeFailedError,
    make_search_callback,
)
from stepsearch_jax.search.corpus_tokens import tokenize_corpus
from stepsearch_jax.search.watchdog import Watchdog

logger = logging.getLogger("stepsearch_jax")

# Queries searched at a time outside episodes, each time within config.search.timeout_s.
WATCHED_QUERIES = 64


@dataclasses.dataclass(frozen=True)
class Split:
    """Questions with their prompts as token ids."""

    questions: Sequence[Question]
    prompts: np.ndarray  # [n, P] int32
    prompt_length: np.ndarray  # [n] int32
    answers: Answers | None = None  # if the step reward needs them

    def take(self, rows: np.ndarray, episode_ids: np.ndarray) -> tuple[Prompts, list[Question]]:
        """Prompts and questions of `rows`; a row of -1 is padding (with the first question)."""
        safe = np.maximum(rows, 0)
        prompts = Prompts(
            self.prompts[safe], self.prompt_length[safe], episode_ids.astype(np.int32), rows >= 0
        )
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
    retrieval: dict  # the manifest that results carry: corpus, documents, retriever, k, settings
    learner_model: ModelConfig
    rollout_model: ModelConfig
    splits: dict[str, Split]
    weights: Weights | None  # the pretrained weights that config.model.checkpoint names

    def measure_retrieval(self, split_name: str) -> float:
        """Fraction of sub-questions for which a search for them finds a gold document; NaN without
        gold documents.
        """
        subs = [
            sub
            for question in self.splits[split_name].questions
            for sub in question.sub_questions
            if sub.gold_ids
        ]
        if not subs:
            return float("nan")
        found = self.search_documents([sub.question for sub in subs])
        hits = [bool(set(sub.gold_ids).intersection(ids.tolist())) for sub, ids in zip(subs, found)]
        return float(np.mean(hits))

    def describe_data(self) -> dict[str, str]:
        """The data of a run, by content: "corpus" and, for every split, "questions of NAME" -> a
        hash of all that they hold.
        """
        splits = {
            f"questions of {name}": hash_texts(
                text for question in split.questions for text in encode_question(question).values()
            )
            for name, split in self.splits.items()
        }
        return {"corpus": self.retrieval["corpus"], **splits}

    def score(self, episodes: Sequence[Episode], gain: np.ndarray | None = None) -> StepScores:
        """Rewards of episodes, by the config's reward section.

        gain [B, K]: replaces the information gain of the retrieved documents, as a step reward of
        the user's does.
        """
        reward_config = self.config.reward
        if self._step_reward is not None:
            gain = score_steps(
                self._step_reward,
                reward_config.step_reward,
                episodes,
                self.source.documents,
                self.settings.turns,
            )
        return score_episodes(
            episodes,
            self._similarity,
            gain=gain,
            num_turns=self.settings.turns,
            format_gate=reward_config.format_gate,
            format_failure=reward_config.format_failure,
            gamma_key=reward_config.gamma_key,
            key_match=reward_config.key_match,
            use_gain=reward_config.use_gain,
            use_redundancy=reward_config.use_redundancy,
            redundancy_scope=reward_config.redundancy_scope,
            step_scale=reward_config.step_scale,
            search_cost=reward_config.search_cost,
            retrieved_answer_credit=reward_config.retrieved_answer_credit,
            rendered=self._rendered,
            texts=self._texts,
        )

    def describe_step_reward(self) -> dict[str, str]:
        """What results say about config.reward.step_reward: its name and, if it is a function of
        the user's, a hash of its file."""
        name = self.config.reward.step_reward
        if self._step_reward is None:
            return {"function": name}
        return describe_function(self._step_reward, name)

    _similarity: object = None
    _rendered: Sequence[str] | None = None
    _texts: Sequence[str] | None = None
    _step_reward: Callable | None = None  # the user's, if reward.step_reward names one


def build_system(config: ml_collections.ConfigDict, splits: Sequence[str], search=None) -> System:
    """Data, index, tokenizer, prompts, callback and shapes for `splits`.

    search: a function queries -> ids [q, k] that replaces the index (tests). Raises ValueError or
    FileNotFoundError, naming what to change, if anything does not fit together.
    """
    # Mesh and config; pretrained weights are opened, not read.
    weights = open_weights(config)
    mesh_config, search_config, prompt_config = config.mesh, config.search, config.prompt
    mesh = sharding.make_mesh(
        mesh_config.data,
        mesh_config.fsdp,
        mesh_config.tensor,
        mesh_config.slices,
        config.model.num_kv_heads,
    )
    check_config(config, mesh)
    step_reward = config.reward.step_reward
    step_reward = load_step_reward(step_reward) if is_plugin(step_reward) else None
    watchdog = Watchdog(search_config.timeout_s, "config.search.timeout_s")

    # Tokenizer, data set, index and tf-idf: kept under cache_dir, made once per host if missing.
    words = atlas_grammar.vocabulary() if prompt_config.tokenizer == "atlas" else []
    tokenizer = load_tokenizer(prompt_config.tokenizer, words)
    with lock_cache(config.data.cache_dir):
        source = load_source(config.data, search_config.bm25_k1, search_config.bm25_b)
        folder = locate_corpus(config.data.cache_dir, source.manifest["hash"])
        index = build_search_index(
            config, source.documents, folder, mesh.local_devices, watchdog.renew
        )
        retrieval, texts = index.describe(search_config.k), read_texts(source.documents)
        document_tokens = tokenize_corpus(
            Mapped(render_document, source.documents),
            folder / f"tokens-{tokenizer.fingerprint[:16]}",
            tokenizer.encode_batch,
            tokenizer.fingerprint,
        )
        tfidf_fit = config.reward.tfidf_fit
        similarity = fit_similarity(
            texts if tfidf_fit == "corpus" else normalize_texts(source.documents),
            tfidf_fit=tfidf_fit,
            folder=folder / f"terms-{tfidf_fit}",
            corpus=retrieval["corpus"],
        )

    # The environment as arrays. The model's vocabulary may be larger than the tokenizer's; its
    # unused ids leave the automaton in its state.
    fixed = encode_environment(tokenizer.encode, search_config.k)
    automaton = make_tag_automaton(tokenizer.token_bytes, tokenizer.eos_ids)
    weights_size = weights.fields["vocab_size"] if weights else 0
    vocabulary = round_vocabulary(max(tokenizer.vocab_size, config.model.vocab_size, weights_size))
    states = np.arange(len(automaton.next_state), dtype=automaton.next_state.dtype)
    unused = np.broadcast_to(states[:, None], (len(states), vocabulary - tokenizer.vocab_size))
    environment = Environment(
        np.concatenate([automaton.next_state, unused], axis=1),
        automaton.event,
        np.int32(automaton.start),
        fixed.invalid_warning,
        fixed.last_turn_warning,
    )

    # The search behind a fixed-shape callback. A policy may sample unused ids: they decode to "".
    search = search or (lambda queries: index.search(queries, search_config.k)[0])
    token_bytes = [*tokenizer.token_bytes, *[b""] * (vocabulary - tokenizer.vocab_size)]
    callback = make_search_callback(
        search,
        partial(decode_query, token_bytes=token_bytes),
        document_tokens,
        fixed,
        search_config.max_observation_tokens,
        search_config.k,
        watchdog,
    )

    # Models and questions.
    learner_model, rollout_model = describe_models(config, vocabulary)
    check_cuts(config, learner_model, mesh)
    if weights:
        check_architecture(weights, learner_model)

    return System(
        config=config,
        mesh=mesh,
        source=source,
        tokenizer=tokenizer,
        settings=rollout_settings(config),
        environment=environment,
        search=callback,
        search_documents=partial(_search_documents, search=search, watchdog=watchdog),
        retrieval=retrieval,
        learner_model=learner_model,
        rollout_model=rollout_model,
        splits={name: _encode_split(config, source, tokenizer, name) for name in splits},
        weights=weights,
        _similarity=similarity,
        _rendered=Mapped(lambda document: document.text, source.documents),
        _texts=texts,
        _step_reward=step_reward,
    )


def _search_documents(queries: list[str], *, search, watchdog: Watchdog) -> np.ndarray:
    """Queries -> corpus ids [q, k], outside of episodes; raises ValueError if the search fails."""
    found = []
    for start in range(0, len(queries), WATCHED_QUERIES):
        part = [query[:MAX_QUERY_CHARACTERS] for query in queries[start : start + WATCHED_QUERIES]]
        with watchdog.watching("the search"):
            try:
                found.append(search(part))
            except SomeFailedError as error:
                logger.warning(
                    "the search failed for %d of %d queries: %s",
                    len(error.failures),
                    len(error.found),
                    error,
                )
                found.append(error.found)
            except Exception as error:
                raise ValueError(f"the search failed: {type(error).__name__}: {error}") from error
    return np.concatenate(found)


def _encode_split(
    config: ml_collections.ConfigDict, source: Source, tokenizer: Tokenizer, name: str
) -> Split:
    """The questions of a split with their prompts, and answers if the step reward needs them."""
    if name not in source.splits:
        raise ValueError(
            f"the data set has no split {name!r}, only {', '.join(source.splits)}: change "
            "config.data, config.evaluation.split or config.evaluation.datasets"
        )
    questions = list(source.splits[name])
    answers = None
    if config.reward.step_reward == "answer_logprob":
        answers = encode_answers(questions, tokenizer)
    prompts, lengths = encode_prompts(
        [render_prompt(config.prompt.template, question.question) for question in questions],
        [question.uid for question in questions],
        tokenizer,
        config.prompt.max_prompt_tokens,
    )
    return Split(questions, prompts, lengths, answers)


def check_searches(system: System) -> SearchCounts:
    """-> counts of searches since the last check, summed over processes; `first_error` is local.

    Raises SystemExit, on every process, if a larger fraction failed than
    config.search.max_failure_fraction; it names the first failure.
    """
    counts = system.search.take_counts()
    numbers = np.array([counts.calls, counts.searches, counts.failed, counts.seconds])
    of_each = multihost_utils.process_allgather(numbers).reshape(-1, len(numbers))
    *whole, seconds = of_each.sum(0).tolist()
    calls, searches, failed = (round(number) for number in whole)
    limit = system.config.search.max_failure_fraction
    if failed > limit * searches:
        others = f"process {', '.join(map(str, np.flatnonzero(of_each[:, 2])))}, whose log says why"
        own = f"process {jax.process_index()}: {counts.first_error}"
        where = own if counts.first_error else others
        raise SystemExit(
            f"stepsearch_jax: the search failed for {failed} of {searches} queries ({where}); "
            f"config.search.max_failure_fraction={limit} allows no more"
        )
    return SearchCounts(calls, searches, failed, seconds, counts.first_error)


def process_rows(mesh: Mesh, total: int) -> np.ndarray:
    """Which of `total` global rows this process holds, in the order that the mesh expects."""
    sharding_ = jax.sharding.NamedSharding(mesh, sharding.ROWS)
    slices = {
        index[0].indices(total)[:2]
        for index in sharding_.addressable_devices_indices_map((total,)).values()
    }
    return np.concatenate([np.arange(*bounds) for bounds in sorted(slices)])
