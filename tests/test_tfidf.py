"""tf-idf similarities: by hand, against loops on random texts, and against scikit-learn."""

import functools
import gzip
import json
import math
import pathlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_tfidf import loop_similarity

from stepsearch_jax.data.documents import Mapped
from stepsearch_jax.rewards import tfidf
from stepsearch_jax.rewards.tfidf import fit_similarity
from stepsearch_jax.words import split_words

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tfidf_pair.json"


def test_corpus_fit_by_hand():
    """Three documents: "red fox", "red owl owl", "elm" ("a" is no token: one letter).

    N = 3. df: red 2, fox 1, owl 1, elm 1.
    idf(red) = ln(4/3) + 1 = r, idf of the others = ln(4/2) + 1 = s.
    Vectors: (red r, fox s), (red r, owl 2s), (elm s).
    cos(0, 1) = r^2 / (sqrt(r^2 + s^2) sqrt(r^2 + 4 s^2)); with document 2: 0.
    """
    r, s = math.log(4 / 3) + 1, math.log(2) + 1
    cosine = r**2 / math.sqrt((r**2 + s**2) * (r**2 + 4 * s**2))
    corpus = fit_similarity(["Red fox, a", "red OWL owl", "elm"], tfidf_fit="corpus")
    similarity = corpus.similarity([[0, 2]], [[1, 0]])
    np.testing.assert_allclose(similarity, [[cosine, 1.0], [0.0, 0.0]], rtol=1e-12)


def test_pair_fit_by_hand():
    """Gold "red fox"; document "red owl": N = 2, df(red) = 2, df(fox) = df(owl) = 1.

    idf(red) = ln(3/3) + 1 = 1, idf(fox) = idf(owl) = ln(3/2) + 1 = s. cos = 1 / (1 + s^2).
    A second gold document "elm" makes N = 3: idf(red) = ln(4/3) + 1 = r, the others
    ln(4/2) + 1 = t, cos = r^2 / (r^2 + t^2).
    """
    pair = fit_similarity(["red fox", "red owl", "elm"], tfidf_fit="pair")
    s, r, t = math.log(1.5) + 1, math.log(4 / 3) + 1, math.log(2) + 1
    np.testing.assert_allclose(pair.similarity([[0]], [[1]]), [[1 / (1 + s**2)]], rtol=1e-12)
    np.testing.assert_allclose(
        pair.similarity([[0, 2]], [[1]]), [[r**2 / (r**2 + t**2)], [0]], rtol=1e-12
    )


@pytest.mark.parametrize("fit", ["corpus", "pair"])
def test_empty_documents_and_empty_lists_are_defined(fit):
    similarity = fit_similarity(["", "a b", "red fox", "red"], tfidf_fit=fit)
    compare = similarity.similarity
    block = compare([[0, 2]], [[1, 2, 3]])
    assert np.isfinite(block).all() and (block[0] == 0).all()
    assert block[1, 0] == 0 and block[1, 1] == pytest.approx(1)
    assert (compare([[0, 1]], [[2, 3]]) == 0).all()
    assert compare([[]], [[1, 2]]).shape == (0, 2) and compare([[1]], [[]]).shape == (1, 0)
    assert compare([[]], [[]]).shape == compare([], []).shape == (0, 0)
    block = compare([[], [2, 3], [3]], [[1, 2], [], [3]])
    np.testing.assert_array_equal(block, [[0, 0, 1], [0, 0, 0]])
    # A corpus without a single word.
    wordless = fit_similarity(["", "a"], tfidf_fit=fit)
    block = wordless.similarity([[0], [1]], [[1], [0, 0]])
    np.testing.assert_array_equal(block, np.zeros((1, 3)))


@pytest.mark.parametrize("fit", ["corpus", "pair"])
def test_wrong_ids_are_refused(fit):
    similarity = fit_similarity(["red fox", "owl"], tfidf_fit=fit)
    for bad in (-1, 2):
        with pytest.raises(ValueError, match=f"document id {bad} "):
            similarity.similarity([[0]], [[bad]])
        with pytest.raises(ValueError, match=f"document id {bad} "):
            similarity.similarity([[1], [0, bad]], [[0], [1]])
    with pytest.raises(ValueError, match="tfidf_fit"):
        fit_similarity(["red"], tfidf_fit="both")
    with pytest.raises(ValueError, match="no documents"):
        fit_similarity([], tfidf_fit=fit)


def test_pair_fit_equals_recorded_scikit_learn():
    """The file is made by tests/golden/make_tfidf_pair.py; the proof needs no scikit-learn."""
    golden = json.loads(GOLDEN.read_text())
    pair = fit_similarity(golden["texts"], tfidf_fit="pair")
    assert len(golden["cases"]) >= 20
    for case in golden["cases"]:
        found = pair.similarity([case["gold"]], [case["docs"]])
        np.testing.assert_allclose(found, case["cosines"], atol=1e-6)


@pytest.fixture(scope="module")
def musique(shared_data):
    """(texts, [(gold ids, other ids)]) of real questions.

    The other documents are random ones and one gold one.
    """
    with gzip.open(shared_data / "musique" / "corpus.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [f"{row['title']}\n{row['text']}" for row in rows]
    place = {(row["title"], row["text"]): i for i, row in enumerate(rows)}
    with gzip.open(shared_data / "musique" / "validation.jsonl.gz", "rt") as lines:
        questions = [json.loads(line) for line in lines]
    rng = random.Random(0)
    cases = []
    for question in rng.sample(questions, 80):
        supporting = [x for x in question["paragraphs"] if x["is_supporting"]]
        gold = [place[x["title"], x["paragraph_text"]] for x in supporting]
        cases.append((gold, [*rng.sample(range(len(texts)), 3), rng.choice(gold)]))
    return texts, cases


@pytest.mark.slow
def test_pair_fit_equals_refitted_scikit_learn_on_real_passages(musique):
    """All questions in one call: a document is compared with its own question's gold ones."""
    text_module = pytest.importorskip("sklearn.feature_extraction.text")
    texts, cases = musique
    got, pairs = fit_similarity(texts, tfidf_fit="pair").similarity(*zip(*cases)), 0
    assert {len(gold) for gold, _ in cases} >= {2, 3, 4}
    for b, (gold, docs) in enumerate(cases):
        for j, doc in enumerate(docs):
            matrix = text_module.TfidfVectorizer().fit_transform(
                [texts[doc], *(texts[i] for i in gold)]
            )
            expected = (matrix[1:] @ matrix[0].T).toarray()[:, 0]
            np.testing.assert_allclose(got[: len(gold), 4 * b + j], expected, rtol=0, atol=1e-6)
            assert (got[len(gold) :, 4 * b + j] == 0).all()
            pairs += len(gold)
    assert pairs >= 500


def test_corpus_fit_equals_scikit_learn_on_real_passages(musique):
    text_module = pytest.importorskip("sklearn.feature_extraction.text")
    texts, cases = musique
    texts = texts[:1500]
    tokens = lambda text: [word for word in split_words(text) if len(word) > 1]
    matrix = text_module.TfidfVectorizer(analyzer=tokens).fit_transform(texts)
    corpus = fit_similarity(texts, tfidf_fit="corpus")
    rng = random.Random(1)
    for _ in range(60):
        gold, docs = rng.sample(range(len(texts)), 3), rng.sample(range(len(texts)), 12)
        expected = (matrix[gold] @ matrix[docs].T).toarray()
        np.testing.assert_allclose(corpus.similarity([gold], [docs]), expected, atol=1e-9)


@pytest.mark.parametrize("fit", ["corpus", "pair"])
def test_counts_in_files_are_those_in_memory(musique, fit, tmp_path, monkeypatch):
    """To the last bit, in writes of any size; counted once per corpus and memory-mapped."""
    texts, cases = musique
    texts = [*texts[:300], ""]
    ids = [([i + 4, i + 1], [i + 2, i, 300, i + 4]) for i in range(0, 290, 5)]
    expected = fit_similarity(texts, tfidf_fit=fit).similarity(*zip(*ids))
    monkeypatch.setattr(tfidf, "_COUNTED_AT_ONCE", 1000)
    read = []
    counted = Mapped(lambda text: read.append(text) or text, texts)
    keep = functools.partial(fit_similarity, tfidf_fit=fit, folder=tmp_path / "terms")
    for few in (False, True):  # the second time only some are read
        read.clear()
        similarity = keep(counted, corpus="a")
        assert (len(read) < 110) == few
        np.testing.assert_array_equal(similarity.similarity(*zip(*ids)), expected)
        arrays = vars(similarity._counts).values()
        assert all(isinstance(values.base, np.memmap) for values in arrays)
    # Another corpus, another reading of it, and one without words are counted again.
    assert (keep(["red"] * 301, corpus="b").similarity([[0]], [[1]]) == 1).all()
    read_otherwise = keep(["red"] * 300 + ["owl"], corpus="b")
    assert (read_otherwise.similarity([[0]], [[300]]) == 0).all()
    keep(["", "a"], corpus="no words").similarity([[0]], [[1]])


def test_damaged_counts_are_named(tmp_path):
    fit = lambda: fit_similarity(
        ["red fox", "owl"], tfidf_fit="corpus", folder=tmp_path / "terms", corpus="a"
    )
    fit()
    (tmp_path / "terms/counts.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="/terms are damaged"):
        fit()


# Laws

WORDS = ["red", "Red", "fox", "owl", "elm", "a", "x1", "naïve", "Ōta"]
WORDS += ["</search>", "<answer>owl</answer>"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
CORPUS = st.lists(TEXTS, min_size=6, max_size=6)
IDS = st.lists(st.integers(0, 5), max_size=4)
UNIQUE_IDS = IDS.map(lambda ids: list(dict.fromkeys(ids)))
BATCH = st.lists(st.tuples(UNIQUE_IDS, IDS), min_size=1, max_size=4)


@pytest.mark.parametrize("fit", ["corpus", "pair"])
@settings(max_examples=150, deadline=None)
@given(texts=CORPUS, batch=BATCH)
def test_similarities_equal_loops(fit, texts, batch):
    got = fit_similarity(texts, tfidf_fit=fit).similarity(*zip(*batch))
    assert got.shape == (max(len(gold) for gold, _ in batch), sum(len(docs) for _, docs in batch))
    assert (got >= 0).all() and (got <= 1).all()
    start = 0
    for gold, docs in batch:
        block = got[:, start : start + len(docs)]
        expected = loop_similarity(texts, gold, docs, tfidf_fit=fit)
        np.testing.assert_allclose(block[: len(gold)], expected, rtol=0, atol=1e-12)
        assert (block[len(gold) :] == 0).all()
        start += len(docs)


@pytest.mark.parametrize("fit", ["corpus", "pair"])
@settings(max_examples=100, deadline=None)
@given(texts=CORPUS, batch=BATCH, random=st.randoms(use_true_random=False))
def test_similarities_do_not_depend_on_what_else_is_asked_for(fit, texts, batch, random):
    """To the last bit: an episode's reward must not change with the batch that it is scored in."""
    similarity = fit_similarity(texts, tfidf_fit=fit)
    whole = similarity.similarity(*zip(*batch))
    blocks = np.split(whole, np.cumsum([len(docs) for _, docs in batch])[:-1], axis=1)
    shuffled = random.sample(range(len(batch)), len(batch))
    found = similarity.similarity(*zip(*[batch[b] for b in shuffled]))
    expected = np.concatenate([blocks[b] for b in shuffled], axis=1)
    np.testing.assert_array_equal(found, expected)
    for (gold, docs), block in zip(batch, blocks):
        np.testing.assert_array_equal(similarity.similarity([gold], [docs]), block[: len(gold)])


def test_real_similarities_do_not_depend_on_what_else_is_asked_for(musique):
    texts, cases = musique
    for fit in ("corpus", "pair"):
        similarity = fit_similarity(texts[:200], tfidf_fit=fit)
        ids = [([i + 4, i + 1], [i + 2, i, i + 4]) for i in range(0, 190, 5)]
        whole = similarity.similarity(*zip(*ids))
        for b in (0, 17, len(ids) - 1):
            alone = similarity.similarity([ids[b][0]], [ids[b][1]])
            np.testing.assert_array_equal(alone, whole[:, 3 * b : 3 * b + 3])
        np.testing.assert_allclose(np.diagonal(whole[:1, 2::3]), 1, rtol=1e-12)
