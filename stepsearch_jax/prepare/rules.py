"""Search queries written by rules: no model, no API key, always the same ones.

The rules read the sub-question and the answers before it, never its own answer. Styles, in this
order: the sub-question itself; its keywords, without question words; the entity and the keywords,
so that the entity counts twice; the same with the earlier answer that the sub-question builds on;
the keywords and a hint, the words that an article would use; entity and hint; entity and relation,
or the entity alone. A sub-question is either plain text or, in MuSiQue, "entity >> relation".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from stepsearch_jax.rewards.text_metrics import normalize
from stepsearch_jax.words import WORD, compose

_HYPHENATED = re.compile(rf"{WORD}(?:[-.'’&/]{WORD})*")
# question words and function words
_DROPPED = frozenset(
    "a an the of in on at to for by from with into as and or that this these those it its is are "
    "was were be been being do does did has have had can could will would who whom whose what "
    "which when where why how much many there s name called known".split()
)
_SMALL = frozenset("of the and in de la von van on at for a to".split())  # as in Bank of America
# capitalised at the start of a question, these still begin no entity
_ASKING = frozenset(
    "who whom whose what which when where why how in on at by from for to during along besides is "
    "are was were do does did the a an name".split()
)
_HINTS = {  # a word of a relation -> words that an article with that relation uses
    "director": "film directed by",
    "directed": "film director",
    "performer": "song album by",
    "sang": "song singer",
    "sings": "song singer",
    "author": "book novel written by",
    "wrote": "written by author",
    "composer": "music composed by",
    "composed": "composer",
    "screenwriter": "film written by",
    "producer": "produced by",
    "creator": "created by",
    "platform": "video game released for",
    "manufacturer": "made by",
    "operator": "operated by",
    "spouse": "married wife husband",
    "married": "spouse wife husband",
    "father": "son daughter of",
    "mother": "son daughter of",
    "child": "son daughter",
    "sibling": "brother sister",
    "born": "birth",
    "birth": "born",
    "death": "died",
    "died": "death",
    "die": "died death",
    "burial": "buried",
    "citizenship": "nationality born",
    "country": "located in",
    "nationality": "citizenship born",
    "administrative": "county district state province",
    "located": "location",
    "headquarters": "company based in",
    "licensed": "radio station licensed",
    "border": "borders county",
    "capital": "capital city",
    "mouth": "river flows into",
    "tributary": "river flows into",
    "team": "football player plays for",
    "label": "records signed",
    "founded": "founder established",
    "formation": "band formed in",
    "publication": "published released",
    "inception": "founded established",
    "educated": "studied university school",
    "employer": "worked at",
    "award": "won prize",
    "cast": "film starring",
    "played": "actor cast",
    "plays": "actor cast",
    "hosted": "host television",
    "network": "television broadcast",
    "league": "sports club plays in",
    "party": "politician member",
    "religion": "church faith",
    "population": "census",
}


def write_queries(question: str, earlier: Sequence[str], count: int) -> list[str]:
    """1 to `count` queries for a sub-question, none empty, no two with the same normalised words.

    question: with earlier answers filled in. earlier: the answers of the sub-questions before it.
    The queries are in normal form C.
    """
    question, earlier = compose(question), [compose(answer) for answer in earlier]
    written: dict[tuple[str, ...], str] = {}
    for query in _write_styles(question, earlier):
        text = " ".join(query.split())
        if words := tuple(sorted(normalize(text).split())):
            written.setdefault(words, text)
    return list(written.values())[:count] or [question]


def _write_styles(question: str, earlier: Sequence[str]) -> Iterator[str]:
    entity, arrow, relation = (part.strip() for part in question.partition(">>"))
    if not arrow:
        entity = _find_entity(question, earlier)
    keywords = " ".join(word for word in _read_words(question) if word.lower() not in _DROPPED)
    of_entity = {word.lower() for word in _read_words(entity)}
    rest = relation or " ".join(word for word in keywords.split() if word.lower() not in of_entity)
    hint = next((_HINTS[word] for word in _read_words(rest.lower()) if word in _HINTS), "")
    answer = next(
        (answer for answer in reversed(earlier) if answer.strip() and answer.strip() in question),
        "",
    )
    yield f"{relation} of {entity}" if relation else question
    yield f"{entity} {rest}" if relation else keywords
    if entity:
        yield f"{entity} {keywords}"
    if answer:
        yield f"{answer} {keywords}"
    if hint:
        yield f"{keywords} {hint}"
        yield f"{entity} {hint}" if entity else ""
    yield entity if arrow else f"{entity} {rest}"


def _read_words(text: str) -> list[str]:
    """Words with their inner hyphens, dots and apostrophes; a possessive 's is cut off."""
    return [word.removesuffix("'s").removesuffix("’s") for word in _HYPHENATED.findall(text)]


def _find_entity(question: str, earlier: Sequence[str]) -> str:
    """What a plain question is about, or "".

    A text in quotes; else the longest among runs of capitalised words and the earlier answers that
    the question holds.
    """
    quoted = re.search(r'"([^"]+)"|“([^”]+)”', question)
    if quoted:
        return quoted[1] or quoted[2]
    runs: list[list[str]] = [[]]
    for place, token in enumerate(question.split()):
        word = token.strip("?,.;:!()[]")
        first = place == 0 and word.lower() in _ASKING
        continues = runs[-1] and word and (word[0].isdigit() or word.lower() in _SMALL)
        if word and not first and (word[0].isupper() or continues):
            runs[-1].append(word)
        elif runs[-1]:
            runs.append([])
        if runs[-1] and token[-1] in ",;:":
            runs.append([])
    named = []
    for run in runs:
        while run and run[-1].lower() in _SMALL:
            run.pop()
        if run:
            named.append(" ".join(run).removesuffix("'s").removesuffix("’s"))
    answers = [
        answer.strip() for answer in earlier if answer.strip() and answer.strip() in question
    ]
    return max((*named, *answers), key=len, default="")
