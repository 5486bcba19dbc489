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
SPLITTERS["default"] = SPLITTERS["gpt-2"]


def read_gguf_tokenizer(path: pathlib.Path) -> tuple[tokenizers.Tokenizer, str | None, str | None]:
    """-> (byte-level BPE, its end token, its padding token), from the metadata of a GGUF file.

    Raises FileNotFoundError for a missing file, ImportError without the package gguf, ValueError
    for a tokenizer of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package gguf: pip install gguf") from error
    # The metadata that describe the tokenizer.
    try:
        fields = gguf.GGUFReader(path).fields

        def read(name: str, *default):
            key = f"tokenizer.ggml.{name}"
            return fields[key].contents() if key in fields or not default else default[0]

        kind, splitter = read("model"), read("pre", "default")
        tokens, types = read("tokens"), read("token_type")
        merges = [tuple(merge.split(" ")) for merge in read("merges", [])]
        end, pad = read("eos_token_id", None), read("padding_token_id", None)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} holds no tokenizer that can be read: {type(error).__name__}: {error}"
        ) from error
    if kind != "gpt2" or splitter not in SPLITTERS:
        raise ValueError(
            f"{path} holds a tokenizer of kind {kind}, {splitter}; supported are gpt2 (byte-level "
            f"BPE) with {', '.join(SPLITTERS)}: name a folder with tokenizer.json instead"
        )
    # Byte-level BPE, cut into words first as its family does.
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=splitter == "llama-bpe",
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
    find_token = lambda number: None if number is None else tokens[number]
    return inner, find_token(end), find_token(pad)
