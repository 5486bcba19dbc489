"""Text to token ids and back: byte-level BPE from a folder, or a word-level vocabulary."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from stepsearch_jax.hub import GENERATION, TOKENIZER_FILES, find_model
from stepsearch_jax.prompting import templates
from stepsearch_jax.prompting.gguf_tokenizer import read_gguf_tokenizer

END, PAD = "<|endoftext|>", "<|pad|>"
# Tokens with which checkpoints of the supported families end a text. A base model uses the first,
# whatever its tokenizer_config names.
END_TOKENS = (END, "<|im_end|>")
# Printable ASCII and newline: the bytes of tags, prompts and observations.
NEEDED_BYTES = (*range(0x20, 0x7F), 0x0A)


def _make_byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet of byte-level vocabularies: character -> byte.

    Printable bytes are written as themselves (Latin-1), the others as code points from 256 upwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


BYTE_OF = _make_byte_alphabet()


class Tokenizer:
    """A byte-level tokenizer: tokens are strings of bytes, and a text is the bytes of its tokens.

    vocab_size: largest id + 1 (a checkpoint's embedding may have more rows).
    token_bytes: the bytes of each id; control tokens have none. Tags are text, also those that the
        vocabulary marks as special.
    eos_ids: tokens that end a text.
    pad_id: fills places that no mask keeps.
    fingerprint: a hash that changes whenever ids change.

    Raises ValueError if a token is not written in the byte-level alphabet, if there is no end
    token, or if a needed byte has no token.
    """

    def __init__(self, inner: tokenizers.Tokenizer, end_tokens: Sequence[str], pad_token: str):
        inner = _read_tags_as_text(inner)
        # Text never becomes control tokens: a document cannot end a text, and every text is encoded
        # to its own bytes.
        inner.encode_special_tokens = True
        # The file may hold padding and truncation of the last batch before it was saved.
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        ids = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.token_bytes = _list_token_bytes(inner, ids, self.vocab_size)
        self.eos_ids = tuple(ids[token] for token in dict.fromkeys(end_tokens) if token in ids)
        if not self.eos_ids:
            raise ValueError(
                f"tokenizer has none of the end tokens {', '.join(dict.fromkeys(end_tokens))}"
            )
        self.pad_id = ids.get(pad_token, self.eos_ids[0])
        produced = set(self.token_bytes)
        for byte in NEEDED_BYTES:
            if bytes([byte]) not in produced:
                raise ValueError(
                    f"tokenizer lacks byte {byte:#04x} ({chr(byte)!r}): no token stands for it "
                    "alone; use a byte-level tokenizer"
                )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Control tokens give no text, nor do ids beyond the vocabulary (a model may have more).
        """
        raw = b"".join(self.token_bytes[i] for i in ids if i < self.vocab_size)
        return raw.decode("utf-8", errors="replace")

    def name_token(self, i: int) -> str | None:
        """Token i as its vocabulary writes it, None beyond the vocabulary."""
        return self._inner.id_to_token(i)

    def to_json(self) -> str:
        """The whole tokenizer as the content of a tokenizer.json."""
        return self._inner.to_str()

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _read_tags_as_text(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, in which no tag of the prompts is special.

    Programs that teach a model tags often add them as special tokens.
    """
    added = inner.get_added_tokens_decoder().values()
    if not any(token.special and token.content in templates.KNOWN_TAGS for token in added):
        return inner
    content = json.loads(inner.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in templates.KNOWN_TAGS
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _list_token_bytes(inner: tokenizers.Tokenizer, ids: dict[str, int], size: int) -> list[bytes]:
    added = inner.get_added_tokens_decoder()
    token_bytes = [b""] * size
    for token, i in ids.items():
        if i in added:
            token_bytes[i] = b"" if added[i].special else token.encode()
            continue
        try:
            token_bytes[i] = bytes(BYTE_OF[char] for char in token)
        except KeyError as error:
            raise ValueError(
                f"token {i} {token!r} is not in the byte-level alphabet; "
                "use a byte-level BPE tokenizer"
            ) from error
    return token_bytes


def load_tokenizer(name_or_folder: str, words: Sequence[str]) -> Tokenizer:
    """The tokenizer of a run.

    name_or_folder: "atlas" makes a word-level tokenizer of `words` (the embedded data's vocabulary)
    and the words of the short template. Anything else is a .gguf file, or a folder or a model on
    the Hub (`hub.find_model`) with `tokenizer.json` or `tokenizer.json.gz`, and optionally
    `tokenizer_config.json`, whose end and padding tokens are used; `words` is then unused. Raises
    FileNotFoundError for a missing folder or file, ValueError for one that cannot be read or used.
    """
    if name_or_folder == "atlas":
        return make_word_tokenizer([*words, *templates.list_short_words()])
    folder = find_model(name_or_folder, "tokenizer", "prompt.tokenizer")
    if folder.suffix == ".gguf":
        return _make_tokenizer(folder, *read_gguf_tokenizer(folder))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"tokenizer folder {folder} does not exist; "
            'name a folder with tokenizer.json, a .gguf file, "atlas", or a model on the Hugging '
            'Face Hub ("Qwen/Qwen2.5-0.5B")'
        )
    plain, zipped = folder / "tokenizer.json", folder / "tokenizer.json.gz"
    settings = folder / "tokenizer_config.json"
    if not plain.is_file() and not zipped.is_file():
        raise FileNotFoundError(f"{folder} holds neither tokenizer.json nor tokenizer.json.gz")
    path = plain if plain.is_file() else zipped
    try:
        raw = path.read_bytes()
        content = raw if path is plain else gzip.decompress(raw)
        inner = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
    try:
        config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{settings} is not valid JSON: {error}") from error
    end, pad = (_name_token(config.get(key)) for key in ("eos_token", "pad_token"))
    ends = [*([end] if end else []), *_list_generation_ends(folder / GENERATION, inner)]
    return _make_tokenizer(path, inner, ends, pad)


def _list_generation_ends(file: pathlib.Path, inner: tokenizers.Tokenizer) -> list[str]:
    """The end tokens that generation_config.json names, if there is such a file.

    A model may have several: Llama 3's instruction-tuned ones have three, of which
    tokenizer_config.json names one. Raises ValueError for a file that cannot be read, and for a
    number that is no token.
    """
    if not file.is_file():
        return []
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        named = {i: inner.id_to_token(i) for i in ids}
    # A number may be none, negative or too large.
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file} names no end tokens that can be read: {error}") from error
    if unknown := [i for i, token in named.items() if token is None]:
        raise ValueError(
            f"{file}: eos_token_id {unknown[0]} is no token of the tokenizer: correct it, or "
            "remove it"
        )
    return [token for token in named.values() if token is not None]


def _make_tokenizer(
    path: pathlib.Path, inner: tokenizers.Tokenizer, ends: Sequence[str], pad: str | None
) -> Tokenizer:
    try:
        return Tokenizer(inner, [*ends, *END_TOKENS], pad or END)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def list_tokenizer_files(name_or_folder: str, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Name -> content of the files with which other programs load this tokenizer.

    If `name_or_folder`, as given to `load_tokenizer`, is a folder, its own files, unpacked;
    otherwise new ones.
    """
    folder = find_model(name_or_folder, "tokenizer", "prompt.tokenizer")
    if not folder.is_dir():
        ends = [tokenizer.name_token(i) for i in (tokenizer.eos_ids[0], tokenizer.pad_id)]
        settings = dict(
            tokenizer_class="PreTrainedTokenizerFast",
            eos_token=ends[0],
            pad_token=ends[1],
            clean_up_tokenization_spaces=False,
        )
        return {
            "tokenizer.json": tokenizer.to_json().encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        }
    # In this order a plain file replaces its packed copy.
    paths = sorted(folder.iterdir(), reverse=True)
    found = {path.name.removesuffix(".gz"): path for path in paths}
    return {
        name: gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for name, path in found.items()
        if name in TOKENIZER_FILES
    }


def _name_token(entry: str | dict | None) -> str | None:
    """A token as tokenizer_config.json writes it: its text, or an object that holds it."""
    return entry["content"] if isinstance(entry, dict) else entry


def make_word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """One id for each word after a space, single bytes for everything else.

    Every text comes back exactly. Write texts for it so that words follow a space: " Rome" is one
    token if "Rome" is in `words`, "Rome" at the start of a text is four. Ids, in order: the two
    control tokens, 256 bytes, the tags, the words. A word that GPT-2's splitting cuts ("O'Hara")
    has one id for each piece. Raises ValueError if `words` is empty.
    """
    if not words:
        raise ValueError("a word-level tokenizer needs words")
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pieces = []
    for word in words:
        pieces += [piece for piece, _ in splitter.pre_tokenize_str(" " + word)]
        if not any(char.isalnum() for char in word):
            pieces.append(splitter.pre_tokenize_str(word)[0][0])
    alphabet = sorted(BYTE_OF, key=BYTE_OF.__getitem__)
    tokens = dict.fromkeys([END, PAD, *alphabet, *templates.ALL_TAGS, *pieces])
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    inner.pre_tokenizer = splitter
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (END, PAD)]
    )
    inner.add_tokens(
        [AddedToken(tag, special=False, normalized=False) for tag in templates.ALL_TAGS]
    )
    return Tokenizer(inner, [END], PAD)
