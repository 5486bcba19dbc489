"""tf-idf as plain loops over dictionaries: the oracle of similarities and information gain."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np


def loop_cosine(a: str, b: str, collection: Sequence[str]) -> float:
    """Cosine of two texts with scikit-learn's defaults, N and df counted over `collection`."""
    split = lambda text: re.findall(r"\b\w\w+\b", text.lower())
    documents = [set(split(text)) for text in collection]

    def idf(word: str) -> float:
        frequency = sum(word in document for document in documents)
        return math.log((1 + len(documents)) / (1 + frequency)) + 1

    def weigh(text: str) -> dict[str, float]:
        words = split(text)
        return {word: words.count(word) * idf(word) for word in words}

    x, y = weigh(a), weigh(b)
    norms = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
    return sum(weight * y.get(word, 0) for word, weight in x.items()) / norms if norms else 0.0


def loop_similarity(
    texts: Sequence[str], gold_ids: Sequence[int], doc_ids: Sequence[int], *, tfidf_fit: str
) -> np.ndarray:
    """[n, k] cosines of one question's gold documents with documents."""
    return _compare(texts, gold_ids, [texts[doc] for doc in doc_ids], tfidf_fit)


def _compare(texts, gold_ids, documents: Sequence[str], tfidf_fit: str) -> np.ndarray:
    table = np.zeros((len(gold_ids), len(documents)))
    for j, document in enumerate(documents):
        collection = texts if tfidf_fit == "corpus" else [document, *(texts[i] for i in gold_ids)]
        for i, gold in enumerate(gold_ids):
            table[i, j] = loop_cosine(texts[gold], document, collection)
    return table


def loop_gain(
    texts: Sequence[str],
    gold_ids: Sequence[int],
    searches: Sequence[Sequence[int]],
    *,
    tfidf_fit: str,
) -> list[float]:
    """G of every search, from the documents that each retrieved (none: the search failed)."""
    memory, gain = [0.0] * len(gold_ids), []
    for doc_ids in searches:
        documents = [texts[doc] for doc in doc_ids]
        if tfidf_fit == "pair":  # behind all but the last stands the next one's label
            documents[:-1] = [f"{text} Doc {j + 2}" for j, text in enumerate(documents[:-1])]
        cosines = _compare(texts, gold_ids, documents, tfidf_fit)
        risen = 0.0
        for i in range(len(gold_ids)):
            best = max(cosines[i], default=0.0)
            risen += max(best - memory[i], 0)
            memory[i] = max(memory[i], best)
        gain.append(risen / len(gold_ids) if gold_ids else 0.0)
    return gain
