"""Tokenizers: exact round trips, the bytes of every token, and clear errors for unusable ones."""

import gzip
import json
import random
import shutil
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner

from stepsearch_jax.hub import GENERATION
from stepsearch_jax.prompting import templates
from stepsearch_jax.prompting.tags import TAGS, decode_query, make_tag_automaton
from stepsearch_jax.prompting.templates import encode_environment
from stepsearch_jax.prompting.tokenizers import (
    BYTE_OF,
    list_tokenizer_files,
    load_tokenizer,
    make_word_tokenizer,
)
from stepsearch_jax.records import TurnStatus

WORDS = ("Rome", "is", "the", "capital", "of", "Italy", "O'Hara", "1923", "##>", "naïve")
TOKENIZER = make_word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def qwen(shared_data):
    return load_tokenizer(str(shared_data / "tokenizer_qwen2_5"), ())


def pieces(tokenizer, text):
    return [tokenizer.token_bytes[i].decode() for i in tokenizer.encode(text)]


def test_words_after_a_space_are_single_tokens():
    expected = [" Rome", " is", " the", " capital", " of", " Italy", "."]
    assert pieces(TOKENIZER, "".join(expected)) == expected
    expected = [" O", "'", "Hara", " 1923", " ##>", " naïve"]
    assert pieces(TOKENIZER, "".join(expected)) == expected


def test_everything_else_is_bytes_and_tags():
    assert pieces(TOKENIZER, "<search> Rome</search>\n") == ["<search>", " Rome", "</search>", "\n"]
    assert pieces(TOKENIZER, "Rome") == ["R", "o", "m", "e"]
    assert pieces(TOKENIZER, " of x") == [" of", " ", "x"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(
                [*WORDS, " ", "\n", "<search>", "</answer>", "<|endoftext|>", "<|pad|>", "</sea"]
            ),
        )
    )
)
def test_word_tokenizer_round_trip_is_exact(parts):
    text = "".join(parts).encode(errors="replace").decode()
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_text_never_becomes_control_tokens(qwen):
    for tokenizer, texts in (
        (TOKENIZER, ["<|endoftext|>", "<|pad|>"]),
        (qwen, ["<|endoftext|>", "<|im_end|>"]),
    ):
        for text in texts:
            assert not set(tokenizer.encode(f" a {text} b")) & set(tokenizer.eos_ids)
        assert all(tokenizer.token_bytes[i] == b"" for i in (*tokenizer.eos_ids, tokenizer.pad_id))


def test_word_tokenizer_ids_are_stable_and_distinct():
    tokens = [raw for raw in TOKENIZER.token_bytes if raw]
    assert TOKENIZER.vocab_size == len(TOKENIZER.token_bytes)
    assert len(set(tokens)) == len(tokens) == TOKENIZER.vocab_size - 2
    assert make_word_tokenizer(WORDS).fingerprint == TOKENIZER.fingerprint
    assert make_word_tokenizer(WORDS[:-1]).fingerprint != TOKENIZER.fingerprint
    assert make_word_tokenizer([*WORDS, *WORDS]).vocab_size == TOKENIZER.vocab_size
    with pytest.raises(ValueError, match="words"):
        make_word_tokenizer([])


def test_atlas_adds_the_words_of_the_short_template():
    tokenizer = load_tokenizer("atlas", WORDS)
    expected = [" Question", ":", " Rome", "\n", " Doc", " 1"]
    expected += [" <##", " Title", ":", " Rome", " ##>"]
    assert pieces(tokenizer, " Question: Rome\n Doc 1 <## Title: Rome ##>") == expected


def test_byte_alphabet_has_every_byte():
    assert sorted(BYTE_OF.values()) == list(range(256))
    assert BYTE_OF["Ġ"] == ord(" ") and BYTE_OF["Ċ"] == ord("\n")


def test_batch_is_encode_of_each(qwen):
    texts = [" Rome is", "", "<search>who?</search>\n\n"]
    assert qwen.encode_batch(texts) == [qwen.encode(text) for text in texts]


# --- the real tokenizer


def test_qwen_facts(qwen):
    assert qwen.vocab_size == 151_665
    # <|im_end|> and <|endoftext|>
    assert qwen.eos_ids == (151_645, 151_643) and qwen.pad_id == 151_643
    assert qwen.encode("</search>") == [522, 1836, 29]


def test_qwen_bytes_agree_with_the_library(qwen, shared_data):
    """Oracle: the tokenizers library's decoder, on random token strings (no added tokens)."""
    raw = (shared_data / "tokenizer_qwen2_5" / "tokenizer.json.gz").read_bytes()
    inner = Inner.from_str(gzip.decompress(raw).decode())
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(151_643) for _ in range(rng.randrange(1, 20))]
        assert qwen.decode(ids) == inner.decode(ids)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_qwen_round_trip_is_exact_up_to_its_normal_form(qwen, text):
    text = unicodedata.normalize("NFC", text.encode(errors="replace").decode())
    assert qwen.decode(qwen.encode(text)) == text


# --- bad input


def write_tokenizer(folder, change=lambda content: None):
    content = json.loads(TOKENIZER._inner.to_str())
    change(content)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_plain_folder_loads_and_gives_the_same_ids(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t"), ())
    assert tokenizer.encode(" Rome <search> x") == TOKENIZER.encode(" Rome <search> x")
    assert tokenizer.eos_ids == TOKENIZER.eos_ids and tokenizer.token_bytes == TOKENIZER.token_bytes


def test_padding_and_truncation_of_a_file_are_ignored(tmp_path):
    """Hugging Face saves those of the last batch; they would pad and cut prompts and documents."""
    inner = Inner.from_str(TOKENIZER.to_json())
    inner.enable_padding(length=12, pad_id=1, pad_token="<|pad|>")
    inner.enable_truncation(3)
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    tokenizer = load_tokenizer(str(tmp_path), ())
    texts = [" Rome", " Rome is the capital of Italy."]
    assert inner.encode_batch(texts)[1].ids != TOKENIZER.encode(texts[1])
    expected = TOKENIZER.encode_batch(texts)
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    assert tokenizer.fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize("packed", [False, True])
def test_tags_that_are_special_tokens_are_text(tmp_path, packed):
    """As fine-tuning programs add them. Prompts and observations have them as single tokens, which
    decode to the tag and end turns; an export gives other programs the same ids."""

    def mark_special(content):
        for entry in content["added_tokens"]:
            entry["special"] = True

    folder = write_tokenizer(tmp_path / "t", mark_special)
    inner = Inner.from_file(f"{folder}/tokenizer.json")
    inner.add_special_tokens([AddedToken(tag, normalized=False) for tag in templates.KNOWN_TAGS])
    inner.save(f"{folder}/tokenizer.json")
    assert all(token.special for token in inner.get_added_tokens_decoder().values())
    tokenizer = load_tokenizer(folder, ())
    ids = inner.get_vocab(with_added_tokens=True)
    assert {*TAGS, "<think>", "<plan>", "<observation>", "<information>"} < set(
        templates.KNOWN_TAGS
    )
    for tag in templates.KNOWN_TAGS:
        assert tokenizer.token_bytes[ids[tag]] == tag.encode()
        assert tokenizer.encode(f" Rome{tag} is") == [ids["ĠRome"], ids[tag], ids["Ġis"]]
        assert tokenizer.decode([ids["ĠRome"], ids[tag]]) == f" Rome{tag}"
    assert tokenizer.eos_ids == TOKENIZER.eos_ids
    assert all(tokenizer.token_bytes[i] == b"" for i in (*tokenizer.eos_ids, tokenizer.pad_id))

    automaton = make_tag_automaton(tokenizer.token_bytes, tokenizer.eos_ids)
    turn = tokenizer.encode("<think> so</think><search> Rome</search>")
    state = automaton.start
    for i in turn:
        assert automaton.event[state] == 0
        state = automaton.next_state[state, i]
    assert automaton.event[state] == TurnStatus.SEARCH
    assert decode_query(np.array(turn), tokenizer.token_bytes) == "Rome"
    observation = encode_environment(tokenizer.encode, 1)
    assert observation.head[-1] == ids["<information>"]
    assert (
        ids["</information>"] in observation.tail
        and ids["<warning>"] in observation.invalid_warning
    )
    assert len(observation.head) == 2

    source = "atlas" if packed else folder  # "atlas": written from the tokenizer itself
    files = list_tokenizer_files(source, tokenizer)
    exported = Inner.from_str(files["tokenizer.json"].decode())
    for text in (templates.PAPER, templates.REFERENCE, "<search> Rome</search>"):
        assert exported.encode(text).ids == tokenizer.encode(text)


def test_config_names_end_and_padding(tmp_path):
    folder = write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "Ġof"}, "pad_token": "<|pad|>"})
    )
    tokenizer = load_tokenizer(folder, ())
    assert [tokenizer.token_bytes[i] for i in tokenizer.eos_ids] == [b" of", b""]
    assert tokenizer.pad_id == 1


def test_generation_config_names_further_ends(tmp_path):
    """As Llama 3's instruction-tuned models, which end a text in three ways and name one of them
    in tokenizer_config.json.
    """
    folder = write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "Ġof"}))
    file = tmp_path / "t" / "generation_config.json"
    first = load_tokenizer(folder, ()).eos_ids
    for ids, more in ((7, (7,)), ([8, 7, 8], (8, 7)), (None, ()), ([], ())):
        file.write_text(json.dumps({"eos_token_id": ids, "temperature": 0.6}))
        assert load_tokenizer(folder, ()).eos_ids == (first[0], *more, *first[1:])
    assert GENERATION not in list_tokenizer_files(folder, load_tokenizer(folder, ()))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"eos_token_id": "x"}']
    + [f'{{"eos_token_id": [7, {i}]}}' for i in (-1, 10**6, 10**12, "null")],
)
def test_ends_that_are_no_tokens_are_refused(tmp_path, text):
    folder = write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json"):
        load_tokenizer(folder, ())


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"), ())
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json .*tokenizer\.json\.gz"):
        load_tokenizer(str(tmp_path), ())


def test_unreadable_files(tmp_path):
    folder = write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json .*JSON"):
        load_tokenizer(folder, ())
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(folder, ())


def test_missing_byte_is_named(tmp_path):
    folder = write_tokenizer(tmp_path / "t", lambda content: content["model"]["vocab"].pop("q"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*0x71 \('q'\)"):
        load_tokenizer(folder, ())


def test_vocabulary_that_is_not_byte_level(tmp_path):
    folder = write_tokenizer(
        tmp_path / "t", lambda content: content["model"]["vocab"].update({"▁the": 5000})
    )
    with pytest.raises(ValueError, match="5000 '▁the'"):
        load_tokenizer(folder, ())


def test_no_end_token(tmp_path):
    def remove_end(content):
        content["model"]["vocab"].pop("<|endoftext|>")
        added = content["added_tokens"]
        content["added_tokens"] = [token for token in added if token["content"] != "<|endoftext|>"]

    with pytest.raises(ValueError, match=r"end tokens <\|endoftext\|>"):
        load_tokenizer(write_tokenizer(tmp_path / "t", remove_end), ())


def test_gzipped_and_plain_are_the_same(tmp_path):
    plain = write_tokenizer(tmp_path / "plain")
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    with (
        open(f"{plain}/tokenizer.json", "rb") as source,
        gzip.open(zipped / "tokenizer.json.gz", "wb") as target,
    ):
        shutil.copyfileobj(source, target)
    assert load_tokenizer(str(zipped), ()).fingerprint == load_tokenizer(plain, ()).fingerprint
