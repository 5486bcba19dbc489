"""The tokenizer that a GGUF file holds beside its weights."""

from __future__ import annotations

import pathlib

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

# Token types of the format: never made from text, and found in text as a whole.
CONTROL, USER_DEFINED = 3, 4
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _by_pattern(digits: int) -> list:
    """Words, at most `digits` digits, punctuation, space: how Qwen2 and Llama 3 split a text."""
    number = r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}"
    pattern = Regex(f"{CONTRACTIONS}|{WORDS}|{number}|{REST}")
    return [
        pre_tokenizers.Split(pattern, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


SPLITTERS = {  # by tokenizer.ggml.pre
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
    "qwen2": lambda: _by_pattern(1),
    "llama-bpe": lambda: _by_pattern(3),
}
SPLITTERS |= dict.fromkeys(("llama3", "llama-v3"), SPLITTERS["llama-bpe"])  # older names


def read_gguf_tokenizer(path: pathlib.Path) -> tuple[tokenizers.Tokenizer, list[str], str | None]:
    """-> (byte-level BPE, its end tokens, its padding token), from the metadata of a GGUF file.

    Nothing is guessed. Raises FileNotFoundError for a missing file, ImportError without the package
    gguf, ValueError for a tokenizer of another kind and for one whose metadata is incomplete.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package gguf: pip install gguf") from error
    try:
        fields = gguf.GGUFReader(path).fields
        read = lambda name, *default: _read_field(fields, name, *default)
        kind, splitter = read("model"), read("pre")
        if kind != "gpt2" or splitter not in SPLITTERS:
            raise ValueError(
                f"its kind is {kind}, {splitter}; supported are gpt2 (byte-level BPE) with "
                f"{', '.join(SPLITTERS)}"
            )
        if read("add_space_prefix", False):
            raise ValueError("tokenizer.ggml.add_space_prefix is true; only false is supported")
        tokens, types = read("tokens"), read("token_type")
        if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            raise ValueError(
                f"it has {len(tokens)} tokens, {len(set(tokens))} of them different, and "
                f"{len(types)} types"
            )
        inner = _make_tokenizer(tokens, types, read("merges"), splitter)

        def name_token(number: int) -> str:
            if not 0 <= number < len(tokens):
                raise ValueError(f"token {number} is none of its {len(tokens)} tokens")
            return tokens[number]

        ends = [read("eos_token_id")]
        ends += [read(name, None) for name in ("eot_token_id", "eom_token_id")]
        named = [name_token(number) for number in ends if number is not None]
        pad = read("padding_token_id", None)
        return inner, named, None if pad is None else name_token(pad)
    except Exception as error:  # the libraries raise plain Exception, too
        raise ValueError(
            f"{path} holds no tokenizer that can be read: {error}; name a folder with "
            "tokenizer.json instead"
        ) from error


def _read_field(fields: dict, name: str, *default):
    """The value of tokenizer.ggml.NAME. Raises ValueError if it is missing without a default."""
    key = f"tokenizer.ggml.{name}"
    if key in fields:
        return fields[key].contents()
    if default:
        return default[0]
    raise ValueError(f"it lacks {key}")


def _make_tokenizer(
    tokens: list[str], types: list[int], merges: list[str], splitter: str
) -> tokenizers.Tokenizer:
    """Byte-level BPE that cuts a text into words first, as its family does."""
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[(first, second) for first, second in (merge.split(" ") for merge in merges)],
            ignore_merges=SPLITTERS[splitter] is SPLITTERS["llama-bpe"],
        )
    )
    if splitter == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(SPLITTERS[splitter]())
    inner.decoder = decoders.ByteLevel()
    # Tokens outside the BPE: special ones, and those that a user has added.
    named = lambda kind: [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, its_kind in zip(tokens, types)
        if its_kind == kind
    ]
    inner.add_special_tokens(named(CONTROL))
    inner.add_tokens(named(USER_DEFINED))
    return inner
