"""The words of a text: equal for canonically equal texts, and found where no spaces part them."""

import gzip
import json
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepsearch_jax import words
from stepsearch_jax.data import hotpotqa, two_wiki
from stepsearch_jax.data.passages import Seen, locate_gold
from stepsearch_jax.data.row import Row
from stepsearch_jax.prepare.index import index_files
from stepsearch_jax.prepare.rules import write_queries
from stepsearch_jax.records import Document, Question
from stepsearch_jax.rewards.text_metrics import compare_answer, f1, holds_answer, normalize
from stepsearch_jax.rewards.tfidf import fit_similarity
from stepsearch_jax.search.bm25 import build_index, load_index
from stepsearch_jax.words import split_words

FORMS = ("NFC", "NFD")
# For each language: a passage, a question that it answers, the answer, and another answer that
# shares its first characters. The passages of all languages are one corpus.
LOCALES = {
    "Chinese": ("奥斯河发源于凯尔山，流经兰特比。", "奥斯河发源于哪里", "凯尔山", "凯尔湖"),
    "Japanese": ("オス川はケル山に源を発する。", "オス川の源はどこですか", "ケル山", "ケル湖"),
    "Thai": ("แม่น้ำออสมีต้นกำเนิดที่ภูเขาเคล", "ต้นกำเนิดของแม่น้ำออส", "ภูเขาเคล", "ภูเขาโอ"),
    "Lao": ("ແມ່ນ້ຳອອສໄຫຼມາຈາກພູເຄລ", "ແມ່ນ້ຳອອສມາຈາກໃສ", "ພູເຄລ", "ພູໂອ"),
    "Khmer": ("ទន្លេអូសហូរចេញពីភ្នំកែល។", "ទន្លេអូសចេញពីណា", "ភ្នំកែល", "ភ្នំអូ"),
    "Burmese": ("အော့စ်မြစ်သည်ကယ်လ်တောင်မှစီးဆင်းသည်။", "အော့စ်မြစ်ဘယ်ကစီးဆင်းသလဲ", "ကယ်လ်တောင်", "ကယ်လ်ကန်"),
}  # fmt: skip


def in_form(form, *texts):
    return [unicodedata.normalize(form, text) for text in texts]


def test_words_by_hand():
    """A change of these words needs another name of the rule: indexes of the old one are stale."""
    assert words.RECIPE == "nfc-lower-pairs"
    for text, expected in {
        "The Oss_2, co-op's 1st!": "the oss_2 co op s 1st",
        # Marks belong to their letter: composed where there is a composed letter, or as they are.
        "Z\u030ciz\u030cek a\u0301": "\u017ei\u017eek \u00e1",
        "हिन्दी بَيْبَرْس Ме́рв": "हिन्दी بَيْبَرْس ме́рв",
        "ශ්\u200dරී ලංකා": "ශ්\u200dරී ලංකා",
        "می\u200cروم": "می روم",  # a joiner between letters parts words
        # No marks of letters: an enclosing mark, a choice of a glyph.
        "1\ufe0f\u20e3 葛\U000e0100城": "1 葛 城",
        # Characters, then neighbours in pairs; words of other scripts between.
        "奥斯河。凯": "奥 斯 河 奥斯 斯河 凯",
        "iPhone手机2008年版": "iphone 手 机 手机 2008 年 版 年版",
        "東京・カフェ": "東 京 東京 カ フ ェ カフ フェ",
        "ที่อยู่": "ที่ อ ยู่ ที่อ อยู่",
        "한국어 문장": "한국어 문장",  # Korean has spaces
        "・ ?!": "",
    }.items():
        for form in FORMS:
            (given_form,) = in_form(form, text)
            assert " ".join(split_words(given_form)) == expected


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_text_has_its_runs_of_letters(text):
    assert split_words(text) == re.findall(r"\w+", text.lower())


def test_every_character_equals_its_decomposition():
    """After nothing, a capital, and a letter whose lower case depends on its neighbours."""
    checked = 0
    for point in range(0x110000):
        if unicodedata.decomposition(chr(point)) or 0xAC00 <= point <= 0xD7A3:
            for before in ("", "A", "Σ"):
                text = f"{before}{chr(point)}a"
                decomposed = unicodedata.normalize("NFD", text)
                checked += text != decomposed
                assert split_words(text) == split_words(decomposed), hex(point)
                assert normalize(text) == normalize(decomposed), hex(point)
    assert checked > 36_000


MARKED = "A a e\u0301 É Z\u030c \u0307 \u0323 q\u0308 = \u0338 ; \u037e the , _".split()
PIECES = st.sampled_from([*MARKED, *"が か \u3099 한 ー 山 ที่".split(), " "])
TEXTS = st.lists(PIECES, max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_canonically_equal_texts_have_equal_words_and_scores(first, second):
    for form in FORMS:
        (changed,) = in_form(form, first)
        assert split_words(changed) == split_words(first)
        assert f1(changed, second) == f1(first, second)
        assert compare_answer(changed, [second]) == compare_answer(first, [second])
        assert compare_answer(changed, [first])[:2] == (1, 1)


def is_letter(character):
    return character.isalnum() or character == "_"


def find_runs(text):
    """Runs of letters, digits, underscores and marks of letters, character by character."""
    run = ""
    for character in text + " ":
        joins = unicodedata.category(character) in ("Mn", "Mc") and run
        if is_letter(character) or joins:
            run += character
        elif run:
            yield run
            run = ""


@pytest.mark.slow
def test_real_words_with_marks_stay_whole(shared_data):
    """Words of a sample of Wikipedia, most of them Kannada, that letters alone cut apart."""
    found = set()
    with gzip.open(shared_data / "wiki18_sample" / "corpus.jsonl.gz", "rt") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if text.isascii():
                continue
            composed, runs = in_form("NFC", text.lower())[0], set(split_words(text))
            cut = {run for run in find_runs(composed) if not all(map(is_letter, run))}
            cut = {run for run in cut if not re.search("[\u0e00-\u17ff]", run)}  # Thai to Khmer
            assert cut <= runs
            assert split_words(in_form("NFD", text)[0]) == split_words(text)
            found |= cut
    assert len(found) > 90


# --- languages without spaces


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Two passages in each language, the second one about something else."""
    folder = tmp_path_factory.mktemp("locales")
    rows = [
        {"title": f"{name} {n}", "text": text}
        for name, (passage, _, _, other) in LOCALES.items()
        for n, text in enumerate((passage, other))
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "corpus.jsonl").write_text(lines, encoding="utf-8")
    return index_files([folder / "corpus.jsonl"], folder / "index", 0.9, 0.4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOCALES)
def test_a_question_finds_its_passage(index, name, form):
    row = 2 * list(LOCALES).index(name)
    _, question, answer, _ = in_form(form, *LOCALES[name])
    assert index.search([question, answer], 1)[0].tolist() == [[row], [row]]


@pytest.mark.parametrize("name", LOCALES)
def test_answers_are_scored_by_characters(name):
    passage, _, answer, other = LOCALES[name]
    for form in FORMS:
        given_form = in_form(form, answer)[0]
        assert compare_answer(given_form, [answer]) == (1, 1, 1)
        assert compare_answer(f"“{given_form}”。", [answer]) == (1, 1, 1)
        assert holds_answer(in_form(form, passage)[0], [answer])
        partly = compare_answer(given_form, [other])
        assert partly.em == partly.cover_em == 0 and 0 < partly.f1 < 1
        assert not holds_answer(in_form(form, passage)[0], [other])
    assert f1(answer, "Oss") == f1(answer, "") == compare_answer("。", [answer]).f1 == 0


@pytest.mark.parametrize("name", LOCALES)
def test_passages_are_similar_by_characters(name):
    passage, _, answer, _ = LOCALES[name]
    texts = [passage, *in_form("NFD", passage), answer, "A town on the Oss"]
    similarity = fit_similarity(texts, tfidf_fit="corpus")
    same, part, unrelated = similarity.similarity([[0]], [[1, 2, 3]])[0]
    assert same == pytest.approx(1) and 0.05 < part < 1 and unrelated == 0


def test_f1_by_hand_without_spaces():
    # 凯 尔 山 against 凯 尔 山 脉: 2 * 3 / (3 + 4). Blanks and punctuation part no characters.
    assert f1("凯尔山", "凯尔山脉") == pytest.approx(6 / 7)
    assert f1("凯尔 山（Kell）", "凯尔山, the kell") == 1
    assert compare_answer("凯尔山", ["山凯尔"]) == (0, 1, 0)
    # Only a part of a character's cluster is no part of the answer.
    assert f1("ที่", "ท") == 0
    # An answer of punctuation alone is itself only.
    assert compare_answer("・", ["・"]).em == 1 and compare_answer("", ["・"]) == (0, 0, 0)


# --- what is made of words


def make_documents(*texts):
    return [Document(i, "", text) for i, text in enumerate(texts)]


def test_an_index_of_other_words_is_refused_or_made_again(tmp_path):
    folder, documents = tmp_path / "index", make_documents("Žižek", "rome")
    settings = build_index(documents, folder, 0.9, 0.4).describe(3)["settings"]
    assert settings == {"k1": 0.9, "b": 0.4, "words": words.RECIPE}
    manifest = json.loads((folder / "manifest.json").read_text())
    for stale in (
        manifest | {"words": "others"},
        {k: manifest[k] for k in manifest if k != "words"},
    ):
        (folder / "manifest.json").write_text(json.dumps(stale))
        with pytest.raises(ValueError, match="words .*prepare index"):
            load_index(folder)
        (folder / "stale").touch()
        assert build_index(documents, folder, 0.9, 0.4).describe(3)["settings"] == settings
        assert not (folder / "stale").exists()


def test_unfinished_work_of_other_words_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr("stepsearch_jax.search.postings.SHARD_WORDS", 1)
    monkeypatch.setattr("stepsearch_jax.search.bm25.RECIPE", "others")
    old = lambda text: ["old"] if text != "\nrome" else 1 / 0
    monkeypatch.setattr("stepsearch_jax.search.postings.split_words", old)
    documents = make_documents("Žižek", "rome")
    with pytest.raises(ZeroDivisionError):
        build_index(documents, tmp_path / "index", 0.9, 0.4)
    monkeypatch.undo()
    index = build_index(documents, tmp_path / "index", 0.9, 0.4)
    assert index.vocabulary_size == 2
    assert index.search(in_form("NFD", "žižek"), 1)[0].tolist() == [[0]]


def test_gold_passages_and_repeated_ones_are_found_in_either_form():
    passage = ("Žižek", "Žižek lebt in Köln.")
    decomposed = tuple(in_form("NFD", *passage))
    question = Question("q", "?", "a", loose_missing_gold=(decomposed, ("", decomposed[0])))
    (found,) = locate_gold({"s": [question]}, [Document(0, *passage)])["s"]
    assert found.loose_gold_ids == (0,) and not found.loose_missing_gold
    seen = Seen()
    assert seen.add(passage) and decomposed in seen


def test_facts_and_articles_are_matched_in_either_form():
    name, decomposed = "Žižek", in_form("NFD", "Žižek")[0]
    facts = {"supporting_facts": [[decomposed, 0]], "context": [[name, ["In Köln."]]]}
    assert hotpotqa.read_gold(Row(facts, "line 1", 1)) == {decomposed: "In Köln."}
    titles = [f"{name} (film)", "Oss"]
    assert two_wiki.match_titles([decomposed, "Lea"], titles)[decomposed] == titles[0]


def test_rules_write_the_same_queries_for_either_form():
    given_question, answer = "Where was Slavoj Žižek's brother Ми́ша born?", "Slavoj Žižek"
    written = [
        write_queries(*in_form(form, given_question), in_form(form, answer), 5) for form in FORMS
    ]
    assert written[0] == written[1] and all("Žižek" in query for query in written[0])
    assert "Ми́ша" in written[0][1].split()
