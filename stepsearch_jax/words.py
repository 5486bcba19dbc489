"""The words of a text: one rule for the search index, tf-idf, search keys, F1 and exact match.

Case does not count, and Unicode text that is canonically equal is equal (normal form C). A word is
a run of letters, digits and underscores with their marks (accents, vowel signs). Scripts that are
written without spaces between words are read by characters, a letter with its marks each.
"""

from __future__ import annotations

import re
import unicodedata

# Names what `split_words` does, in the manifest of everything that is made of its words. Change it
# together with the words of any text.
RECIPE = "nfc-lower-pairs"


def _find_marks() -> str:
    """The marks that belong to a letter, as the content of a character class.

    Variation selectors and enclosing marks only change how a character looks.
    """
    marks = [
        point
        for point in range(0x300, 0x20000)  # all but some variation selectors
        if unicodedata.category(chr(point)) in ("Mn", "Mc")
        and not unicodedata.name(chr(point)).startswith("VARIATION SELECTOR")
    ]
    starts = [point for point, before in zip(marks, [0, *marks]) if point != before + 1]
    ends = [point for point, after in zip(marks, [*marks[1:], 0]) if point != after - 1]
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends))


_MARKS = _find_marks()
_JOINERS = "\u200c\u200d"  # invisible; between the letters of a cluster, behind a mark
# Letters of scripts without spaces between words. Digits are not among them.
_UNSPACED = (
    "\u0e01-\u0e4f"  # Thai
    "\u0e81-\u0ecf\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d\uaa60-\uaa7f\ua9e0-\ua9ef"  # Burmese, Shan, Mon
    "\u1780-\u17df"  # Khmer
    "\u1950-\u19cf\u1a00-\u1a7f\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b"  # radicals, iteration marks
    "\u3041-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f"  # kana, Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese characters
    "\U0001aff0-\U0001b16f\U00020000-\U0003ffff"  # more kana, more Chinese characters
)
WORD = rf"\w(?:\w|[{_MARKS}][{_JOINERS}]?)*"  # a pattern

_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_WORD = re.compile(WORD)
_HOLDS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_CHARACTER = rf"[{_UNSPACED}](?:[{_MARKS}][{_JOINERS}]?)*"
# A run of characters, or a run of anything else.
_RUN = re.compile(rf"((?:{_CHARACTER})+)|[^{_UNSPACED}]+")
_CHARACTERS = re.compile(_CHARACTER)


def compose(text: str) -> str:
    """The text in normal form C, which is equal for texts that are canonically equal."""
    return unicodedata.normalize("NFC", text)


def fold(text: str) -> str:
    """Lower case, in normal form C."""
    return compose(text.lower())


def split_words(text: str) -> list[str]:
    """The words of a document or query, in lower case; nothing stemmed, nothing left out.

    In a script without spaces: every character, and every two neighbours as a pair.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    text = fold(text)
    words = _WORD.findall(text)
    if not _HOLDS_UNSPACED.search(text):
        return words
    return [term for word in words for term in _split_runs(word)]


def _split_runs(word: str) -> list[str]:
    terms = []
    for run in _RUN.finditer(word):
        characters = _CHARACTERS.findall(run[0]) if run[1] else [run[0]]
        terms += characters + [a + b for a, b in zip(characters, characters[1:])]
    return terms


def separate_characters(word: str) -> list[str]:
    """The characters of a word of a script without spaces, and the words between them.

    A word of other scripts as it is. Punctuation between characters is left out. The word is
    folded.
    """
    if word.isascii() or not _HOLDS_UNSPACED.search(word):
        return [word]
    pieces = []
    for part in _WORD.findall(word):
        for run in _RUN.finditer(part):
            pieces += _CHARACTERS.findall(run[0]) if run[1] else [run[0]]
    return pieces or [word]
