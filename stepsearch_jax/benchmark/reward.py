"""Rewards of a batch of episodes, against refitting scikit-learn for every retrieved document.

Ours is everything that `rewards.scoring.score_episodes` does, step rewards, answers, queries and
formats, of 64 episodes with 4 searches for 3 documents of 100 words each and 3 gold documents. The
peer is the information gain alone as the released code finds it: a TfidfVectorizer is fitted on
{document} ∪ gold documents for each of the 768 retrieved documents. With tfidf_fit="pair" both
compute the same numbers; the run ends with an error unless they agree to 1e-6.

As in training, the similarity is fitted once for the corpus, the questions recur, and every batch
holds new episodes of them: queries and answers not seen before, documents dealt again.
The first batch, whose questions are new as well, is reported apart.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import statistics

import numpy as np

from stepsearch_jax.benchmark.timing import time_call
from stepsearch_jax.records import Episode, Question, SubQuestion, Turn, TurnStatus
from stepsearch_jax.rewards.scoring import StepScores, score_episodes
from stepsearch_jax.rewards.tfidf import Similarity, fit_similarity

TOLERANCE = 1e-6  # largest difference between our gains and the peer's
VOCABULARY = 20_000  # made-up words; the r-th is drawn with probability proportional to 1 / r
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


@dataclasses.dataclass(frozen=True)
class Size:
    """How much one run scores. No document stands twice in a batch."""

    episodes: int
    turns: int  # searches of an episode
    documents: int  # of a search
    gold: int  # gold documents of a question, one for each sub-question
    words: int  # of a document


SIZE = Size(episodes=64, turns=4, documents=3, gold=3, words=100)


class Texts:
    """Made-up words with the frequencies of a language (Zipf's law), from a seed."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        syllables = self._rng.integers(len(SYLLABLES), size=(VOCABULARY, 4))
        lengths = self._rng.integers(1, 5, size=VOCABULARY)
        self._words = np.array(
            ["".join(SYLLABLES[i] for i in row[:length]) for row, length in zip(syllables, lengths)]
        )
        weights = 1 / np.arange(1, VOCABULARY + 1)
        self._cumulative = np.cumsum(weights / weights.sum())

    def write(self, words: int) -> str:
        """A text of so many words."""
        places = self._rng.random(words) * self._cumulative[-1]
        return " ".join(self._words[np.searchsorted(self._cumulative, places)])

    def make_corpus(self, size: Size) -> list[str]:
        """The gold documents of every question, then as many others as one batch retrieves."""
        count = size.episodes * (size.gold + size.turns * size.documents)
        return [self.write(size.words) for _ in range(count)]

    def make_questions(self, size: Size) -> list[Question]:
        """A question for each episode, with a sub-question for each gold document.

        Every sub-question has three accepted queries.
        """
        gold = np.arange(size.episodes * size.gold).reshape(size.episodes, size.gold).tolist()
        subs = [tuple(self._make_sub_question(i) for i in ids) for ids in gold]
        return [
            Question(f"q{b}", self.write(15), self.write(2), (self.write(3),), own)
            for b, own in enumerate(subs)
        ]

    def _make_sub_question(self, gold: int) -> SubQuestion:
        question, answer = self.write(8), self.write(2)
        queries = tuple(self.write(6) for _ in range(3))
        return SubQuestion(question, answer, (), (gold,), queries)

    def make_episodes(self, questions: list[Question], size: Size) -> list[Episode]:
        """An episode of each question: new queries, a new answer, other documents.

        The documents that are nobody's gold are dealt again, each to one search.
        """
        shape = (len(questions), size.turns, size.documents)
        dealt = len(questions) * size.gold + self._rng.permutation(math.prod(shape))
        pairs = zip(questions, dealt.reshape(shape).tolist())
        return [self._make_episode(question, retrieved) for question, retrieved in pairs]

    def _make_episode(self, question: Question, retrieved: list[list[int]]) -> Episode:
        queries, answer = [self.write(6) for _ in retrieved], self.write(3)
        turns = []
        for query, ids in zip(queries, retrieved):
            text = f"<think>{self.write(30)}</think>\n<search>{query}</search>"
            turns.append(Turn(TurnStatus.SEARCH, text, query, None, tuple(ids)))
        text = f"<think>{self.write(30)}</think>\n<answer>{answer}</answer>"
        turns.append(Turn(TurnStatus.ANSWER, text, None, answer))
        return Episode(question, "", tuple(turns), finished=True, truncated=False)


def measure(*, repeats: int, seed: int, size: Size = SIZE) -> dict:
    """Times both sides, alternating -> figures: seconds ("_s") and ratios.

    Seconds are medians over `repeats` batches, except "fit_s" and "first_s". "ours_s", "peer_s" and
    "ratio" compare like with like: tfidf_fit="pair" and the peer on the same episodes.
    tfidf_fit="corpus" gets questions of its own, so that its first batch is a first one, too.
    Raises ImportError without scikit-learn, ValueError if the gains differ.
    """
    # Made-up texts, and the similarity fitted once.
    vectorizer = _import_vectorizer()
    texts = Texts(seed)
    corpus = texts.make_corpus(size)
    questions = {tfidf_fit: texts.make_questions(size) for tfidf_fit in ("pair", "corpus")}
    fit_seconds, fits = {}, {}
    for tfidf_fit in questions:
        fit_seconds[tfidf_fit], fits[tfidf_fit] = time_call(
            fit_similarity, corpus, tfidf_fit=tfidf_fit
        )

    # Batches of new episodes. What scikit-learn does at its first use does not count.
    fit_and_gain(texts.make_episodes(questions["pair"], size)[:1], corpus, vectorizer)
    seconds, differences = {"pair": [], "corpus": [], "peer": []}, []
    for _ in range(repeats + 1):
        episodes = {
            tfidf_fit: texts.make_episodes(questions[tfidf_fit], size) for tfidf_fit in questions
        }
        scores = {}
        for tfidf_fit, batch in episodes.items():
            spent, scores[tfidf_fit] = time_call(score, batch, fits[tfidf_fit], size.turns)
            seconds[tfidf_fit].append(spent)
        spent, gain = time_call(fit_and_gain, episodes["pair"], corpus, vectorizer)
        seconds["peer"].append(spent)
        differences.append(float(np.abs(scores["pair"].gain - gain).max()))
    if not max(differences) <= TOLERANCE:
        raise ValueError(
            f"the information gains differ from scikit-learn's by {max(differences):.1e}, more "
            f"than {TOLERANCE:.0e}: one side is wrong"
        )

    # The first batch apart, medians of the others.
    first = {side: runs.pop(0) for side, runs in seconds.items()}
    median = {side: statistics.median(runs) for side, runs in seconds.items()}
    ours = {
        tfidf_fit: {
            "fit_s": fit_seconds[tfidf_fit],
            "first_s": first[tfidf_fit],
            "batch_s": median[tfidf_fit],
            "first_ratio": median["peer"] / first[tfidf_fit],
            "ratio": median["peer"] / median[tfidf_fit],
        }
        for tfidf_fit in fits
    }
    return {
        "ours_s": median["pair"],
        "peer_s": median["peer"],
        "ratio": ours["pair"]["ratio"],
        **ours,
        "runs_s": seconds,
        "largest_difference": max(differences),
        "repeats": repeats,
        "seed": seed,
        "size": dataclasses.asdict(size),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def render(figures: dict) -> str:
    """The figures as a table."""
    rows = [("", "fit, once", "first batch", "a batch", "peer / first", "peer / a batch")]
    for tfidf_fit in ("pair", "corpus"):
        ours = figures[tfidf_fit]
        times = [f"{1e3 * ours[name]:.1f} ms" for name in ("fit_s", "first_s", "batch_s")]
        ratios = [f"{ours[name]:.0f}x" for name in ("first_ratio", "ratio")]
        rows.append((f'ours, tfidf_fit="{tfidf_fit}"', *times, *ratios))
    rows.append(("peer, scikit-learn refitted", "", "", f"{1e3 * figures['peer_s']:.1f} ms"))
    size = (
        "{episodes} episodes x {turns} turns x {documents} documents of {words} words, {gold} gold "
        "documents"
    ).format(**figures["size"])
    lines = [f"{name:28}" + "".join(f"{cell:>16}" for cell in cells) for name, *cells in rows]
    difference = figures["largest_difference"]
    last = f"largest difference between our gains and the peer's: {difference:.1e}"
    return "\n".join([f"{size}; medians of {figures['repeats']} batches", *lines, last])


def score(episodes: list[Episode], similarity: Similarity, turns: int) -> StepScores:
    """All rewards, with the settings of the paper."""
    return score_episodes(
        episodes,
        similarity,
        gain=None,
        num_turns=turns,
        format_gate="strict",
        format_failure="zero_answer",
        gamma_key=0.618,
        key_match="max",
        use_gain=True,
        use_redundancy=True,
        redundancy_scope="earlier_turns",
        step_scale=1.0,
        search_cost=0.0,
        retrieved_answer_credit=0.0,
        rendered=None,
        texts=None,
    )


def fit_and_gain(episodes: list[Episode], corpus: list[str], vectorizer) -> np.ndarray:
    """The peer: information gain [B, K], a vectoriser fitted for each retrieved document.

    Reference: the released code. Faster than scikit-learn's own cosine function: rows have unit
    length, so one product of dense rows gives the cosines.
    """
    cosines = []
    for episode in episodes:
        gold = [corpus[i] for i in episode.question.gold_ids]
        for turn in episode.search_turns:
            for rank, i in enumerate(turn.doc_ids, start=1):
                # It cuts the next document's label off with the text before it.
                label = f" Doc {rank + 1}" if rank < len(turn.doc_ids) else ""
                rows = vectorizer().fit_transform([corpus[i] + label, *gold]).toarray()
                cosines.append(rows[1:] @ rows[0])
    turns = episodes[0].search_turns
    shape = (len(episodes), len(turns), len(turns[0].doc_ids), -1)
    best = np.reshape(cosines, shape).max(2)  # [B, K, n]
    return np.diff(np.maximum.accumulate(best, 1).mean(2), prepend=0)


def _import_vectorizer():
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError(
            "the peer of this benchmark is scikit-learn: pip install -r requirements-bench.txt"
        ) from error
    return TfidfVectorizer
