"""From a config to the parts that the commands put to work; everything that can be wrong with a
config or its files is found here, before any compilation.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Sequence
from functools import partial

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from stepsearch_jax import sharding
from stepsearch_jax.data import atlas_grammar
from stepsearch_jax.data.documents import Mapped
from stepsearch_jax.data.loading import Source, load_source, open_source
from stepsearch_jax.data.schema import encode_question
from stepsearch_jax.dense.index import DenseIndex, build_dense_index, load_text_encoder
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.huggingface import open_checkpoint
from stepsearch_jax.models.weights import Weights, check_architecture
from stepsearch_jax.prompting.tags import decode_query, make_tag_automaton
from stepsearch_jax.prompting.templates import encode_environment, render_document, render_prompt
from stepsearch_jax.prompting.tokenizers import Tokenizer, load_tokenizer
from stepsearch_jax.records import Document, Episode, Question
from stepsearch_jax.rewards.scoring import StepScores, score_episodes
from stepsearch_jax.rewards.text_metrics import normalize
from stepsearch_jax.rewards.tfidf import fit_similarity
from stepsearch_jax.rollout.episode import Environment, Prompts, RolloutSettings
from stepsearch_jax.rollout.text import Answers, encode_answers, encode_prompts
from stepsearch_jax.run.checks import check_config, check_cuts
from stepsearch_jax.run.settings import describe_models, rollout_settings, round_vocabulary
from stepsearch_jax.search.bm25 import Bm25Index, build_index, check_settings
from stepsearch_jax.search.cache import hash_documents, hash_texts, locate_corpus, lock_cache
from stepsearch_jax.search.callback import (
    MAX_QUERY_CHARACTERS,
    SearchCallback,
    SearchCounts,
    SomeFailedError,
    make_search_callback,
)
from stepsearch_jax.search.corpus_tokens import tokenize_corpus
from stepsearch_jax.search.remote import RemoteIndex, open_remote
from stepsearch_jax.search.watchdog import Watchdog

logger = logging.getLogger("stepsearch_jax")

# searched at a time outside episodes, each time under the limit of config.search.timeout_s
WATCHED_QUERIES = 64


@dataclasses.dataclass(frozen=True)
class Split:
    """Questions with their prompts as token ids."""

    questions: Sequence[Question]
    prompts: np.ndarray  # [n, P] int32
    prompt_length: np.ndarray  # [n] int32
    answers: Answers | None = None  # where the step reward asks for them

    def take(self, rows: np.ndarray, episode_ids: np.ndarray) -> tuple[Prompts, list[Question]]:
        """Prompts and questions of `rows`; a row of -1 fills up the batch and runs nothing (its
        question is the first).
        """
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
        """Share of sub-questions whose gold documents are among the k that a search for the
        sub-question itself returns; NaN without gold documents.
        """
        subs = [
            sub
            for question in self.splits[split_name].questions
            for sub in question.sub_questions
            if sub.gold_ids
        ]
        found = self.search_documents([sub.question for sub in subs]) if subs else []
        return (
            float(
                np.mean(
                    [
                        bool(set(sub.gold_ids).intersection(ids.tolist()))
                        for sub, ids in zip(subs, found)
                    ]
                )
            )
            if subs
            else float("nan")
        )

    def describe_data(self) -> dict[str, str]:
        """What a run is trained and measured on, wherever its files lie: "corpus" and, for every
        split, "questions of NAME" -> a hash of all that they hold.
        """
        splits = {
            f"questions of {name}": hash_texts(
                text for question in split.questions for text in encode_question(question).values()
            )
            for name, split in self.splits.items()
        }
        return {"corpus": self.retrieval["corpus"], **splits}

    def score(self, episodes: Sequence[Episode], gain: np.ndarray | None = None) -> StepScores:
        """Rewards of episodes, by the config's reward section. gain [B, K]: stands in for the
        information gain of the retrieved documents.
        """
        reward_config = self.config.reward
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

    _similarity: object = None
    _rendered: Sequence[tuple[str, str]] | None = None
    _texts: Sequence[str] | None = None


def build_system(config: ml_collections.ConfigDict, splits: Sequence[str], search=None) -> System:
    """Data, index, tokenizer, prompts, callback and shapes for `splits`. `search`: replaces the
    index as the function queries -> ids [q, k] (tests).

    Raises ValueError or FileNotFoundError, with what to change, for anything that does not fit
    together.
    """
    mesh_config, search_config, prompt_config = config.mesh, config.search, config.prompt
    mesh = sharding.make_mesh(
        mesh_config.data,
        mesh_config.fsdp,
        mesh_config.tensor,
        mesh_config.slices,
        config.model.num_kv_heads,
    )
    check_config(config, mesh)
    watchdog = Watchdog(search_config.timeout_s, "config.search.timeout_s")
    weights = (
        open_checkpoint(pathlib.Path(config.model.checkpoint)) if config.model.checkpoint else None
    )

    # Texts: data set, corpus, index, tokenizer. All are kept under cache_dir and only made when
    # they are not there yet: once a host.
    words = atlas_grammar.vocabulary() if prompt_config.tokenizer == "atlas" else []
    tokenizer = load_tokenizer(prompt_config.tokenizer, words)
    with lock_cache(config.data.cache_dir):
        source = load_source(config.data, search_config.bm25_k1, search_config.bm25_b)
        folder = locate_corpus(config.data.cache_dir, source.manifest["hash"])
        index = build_search_index(
            config, source.documents, folder, mesh.local_devices, watchdog.renew
        )
        retrieval, shown, texts = (
            index.describe(search_config.k),
            Mapped(render_document, source.documents),
            read_texts(source.documents),
        )
        document_tokens = tokenize_corpus(
            shown,
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

    # The environment as arrays, and the search behind the fixed-shape callback.
    fixed = encode_environment(tokenizer.encode, search_config.k)
    automaton = make_tag_automaton(tokenizer.token_bytes, tokenizer.eos_ids)
    vocabulary = round_vocabulary(
        max(
            tokenizer.vocab_size,
            config.model.vocab_size,
            weights.fields["vocab_size"] if weights else 0,
        )
    )
    own = np.arange(len(automaton.next_state), dtype=automaton.next_state.dtype)
    # ids without bytes leave the automaton where it is
    unused = np.broadcast_to(own[:, None], (len(own), vocabulary - tokenizer.vocab_size))
    environment = Environment(
        np.concatenate([automaton.next_state, unused], axis=1),
        automaton.event,
        np.int32(automaton.start),
        fixed.invalid_warning,
        fixed.last_turn_warning,
    )
    search = search or (lambda queries: index.search(queries, search_config.k)[0])
    # a policy may sample the unused ids, too
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

    def search_documents(queries: list[str]) -> np.ndarray:
        found = []
        for start in range(0, len(queries), WATCHED_QUERIES):
            with watchdog.watching("the search"):
                try:
                    found.append(
                        search(
                            [
                                query[:MAX_QUERY_CHARACTERS]
                                for query in queries[start : start + WATCHED_QUERIES]
                            ]
                        )
                    )
                except SomeFailedError as error:
                    logger.warning(
                        "the search failed for %d of %d queries: %s",
                        len(error.failures),
                        len(error.found),
                        error,
                    )
                    found.append(error.found)
                except Exception as error:
                    raise ValueError(
                        f"the search failed: {type(error).__name__}: {error}"
                    ) from error
        return np.concatenate(found)

    learner_model, rollout_model = describe_models(config, vocabulary)
    check_cuts(config, learner_model, mesh)
    if weights:
        check_architecture(weights, learner_model)

    prompted = {}
    for name in splits:
        if name not in source.splits:
            raise ValueError(
                f"the data set has no split {name!r}, only {', '.join(source.splits)}: change "
                "config.data, config.evaluation.split or config.evaluation.datasets"
            )
        questions = list(source.splits[name])
        rendered = [
            render_prompt(prompt_config.template, question.question) for question in questions
        ]
        answers = (
            encode_answers(questions, tokenizer)
            if config.reward.step_reward == "answer_logprob"
            else None
        )
        prompted[name] = Split(
            questions,
            *encode_prompts(
                rendered,
                [question.uid for question in questions],
                tokenizer,
                prompt_config.max_prompt_tokens,
            ),
            answers,
        )
    return System(
        config,
        mesh,
        source,
        tokenizer,
        rollout_settings(config),
        environment,
        callback,
        search_documents,
        retrieval,
        learner_model,
        rollout_model,
        prompted,
        weights,
        _similarity=similarity,
        _rendered=Mapped(lambda document: (document.title, document.text), source.documents),
        _texts=texts,
    )


def build_search_index(
    config: ml_collections.ConfigDict,
    documents: Sequence[Document],
    folder: pathlib.Path,
    devices: Sequence[jax.Device],
    ended: Callable[[], None] = lambda: None,
) -> Bm25Index | DenseIndex | RemoteIndex:
    """The index that config.search asks for, kept in `folder`; a dense one lies on `devices`, of
    this process, a remote one at its server.

    ended: is called whenever a request to the server is answered or given up.
    """
    search_config = config.search
    if search_config.kind == "remote":
        return open_remote(
            search_config.url,
            documents,
            hash_documents(documents),
            search_config.attempt_s,
            search_config.attempts,
            search_config.backoff_s,
            search_config.batch,
            ended,
        )
    if search_config.kind == "bm25":
        return build_index(
            documents,
            folder / f"bm25-{search_config.bm25_k1}-{search_config.bm25_b}",
            search_config.bm25_k1,
            search_config.bm25_b,
        )
    encoder = load_text_encoder(search_config.encoder, search_config.encode_batch, devices)
    return build_dense_index(
        documents,
        folder,
        encoder,
        query_prefix=search_config.query_prefix,
        passage_prefix=search_config.passage_prefix,
        dtype=search_config.embedding_dtype,
        devices=devices,
    )


def open_corpus(
    config: ml_collections.ConfigDict,
) -> tuple[Source, Bm25Index | DenseIndex | RemoteIndex]:
    """The data set and the index of a config, without a model or its mesh: a dense index takes all
    devices here, the others none.
    """
    search_config = config.search
    check_settings(search_config.bm25_k1, search_config.bm25_b)
    with lock_cache(config.data.cache_dir):
        source = open_source(config.data, search_config.bm25_k1, search_config.bm25_b)
        devices = jax.local_devices() if search_config.kind == "dense" else ()
        return source, build_search_index(
            config,
            source.documents,
            locate_corpus(config.data.cache_dir, source.manifest["hash"]),
            devices,
        )


def read_texts(documents: Sequence[Document]) -> Sequence[str]:
    """Title and text of each document, as the rewards and measures read them."""
    return Mapped(lambda document: f"{document.title} {document.text}", documents)


def normalize_texts(documents: Sequence[Document]) -> Sequence[str]:
    """What tf-idf compares with tfidf_fit "pair".

    Reference: the released code leaves titles out, and normalises texts as it does answers: lower
    case, without punctuation and articles.
    """
    return Mapped(lambda document: normalize(document.text), documents)


def check_searches(system: System) -> SearchCounts:
    """-> what was searched since the last check, on all processes together; `first_error` is this
    process's.

    Raises SystemExit, on every process, when their share exceeds
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
        where = (
            f"process {jax.process_index()}: {counts.first_error}" if counts.first_error else others
        )
        raise SystemExit(
            f"stepsearch_jax: the search failed for {failed} of {searches} queries ({where}); "
            f"config.search.max_failure_fraction={limit} allows no more"
        )
    return SearchCounts(calls, searches, failed, seconds, counts.first_error)


def process_rows(mesh: Mesh, total: int) -> np.ndarray:
    """Which of `total` global rows this process holds, in the order in which it passes them to the
    mesh.
    """
    sharding_ = jax.sharding.NamedSharding(mesh, sharding.ROWS)
    slices = {
        index[0].indices(total)[:2]
        for index in sharding_.addressable_devices_indices_map((total,)).values()
    }
    return np.concatenate([np.arange(*bounds) for bounds in sorted(slices)])
