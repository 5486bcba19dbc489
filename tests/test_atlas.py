"""Atlas: the worlds, their articles and questions are what the documentation says."""

import hashlib
import math
import pathlib
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from stepsearch_jax.data.atlas_facts import SPLITS, build_world
from stepsearch_jax.data.atlas_grammar import QUESTION_FORMS, RELATIONS, split_words, vocabulary
from stepsearch_jax.data.atlas_kinds import KINDS
from stepsearch_jax.data.atlas_questions import SHAPES, make_retrieval_check
from stepsearch_jax.data.atlas_world import make_worlds

REPO = pathlib.Path(__file__).resolve().parents[1]
ARGUMENTS = dict(
    seed=3,
    entities=240,
    extra_facts=1,
    k1=0.9,
    b=0.4,
    shapes=tuple(SHAPES),
    questions={"train": 240, "validation": 60, "test": 60},
)


@pytest.fixture(scope="module")
def made():
    return make_worlds(**ARGUMENTS)


@pytest.fixture(scope="module")
def worlds():
    return {
        split: build_world(seed=3, split=split, entities=240 if split == "train" else 60)
        for split in SPLITS
    }


def all_questions(made):
    return [question for rows in made[1].values() for question in rows]


def texts_of(made):
    for document in made[0]:
        yield from (document.title, document.text)
    for question in all_questions(made):
        yield from (question.question, *question.answers)
        for sub in question.sub_questions:
            yield from (sub.question, sub.answer, *sub.aliases, *sub.queries)


def test_grammar_is_as_large_as_promised():
    assert len(KINDS) >= 6 and len(RELATIONS) >= 12
    assert math.isclose(sum(kind.share for kind in KINDS.values()), 1)
    for relation in RELATIONS.values():
        assert len(set(relation.patterns)) >= 3 and len(set(relation.phrases)) >= 2, relation.word
        assert any(pattern.startswith("{S}") for pattern in relation.patterns), relation.word
        assert all(pattern.count("{o}") == 1 for pattern in relation.patterns), relation.word
        assert len(split_words(relation.word)) == 1
        assert relation.subject in KINDS and relation.object in KINDS
    assert len(QUESTION_FORMS) >= 3
    # No pool of names repeats a word, and no sentence holds a name word (BM25 ignores case).
    pools = {pool for kind in KINDS.values() for pool in (kind.first, kind.second)}
    names = {word.lower() for pool in pools for word in pool}
    for pool in pools:
        assert len(set(pool)) == len(pool)
    assert not names & {word for word in vocabulary() if word.islower()}
    assert len(set(KINDS["person"].first) & set(KINDS["person"].second)) == 0


@pytest.mark.slow
def test_same_arguments_give_the_same_worlds_in_another_process():
    arguments = {**ARGUMENTS, "entities": 80, "questions": {"train": 24, "test": 24}}
    code = (
        "import hashlib; from stepsearch_jax.data.atlas_world import make_worlds; "
        f"print(hashlib.sha256(repr(make_worlds(**{arguments!r})).encode()).hexdigest())"
    )
    environment = {"PYTHONHASHSEED": "77", "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    expected = hashlib.sha256(repr(make_worlds(**arguments)).encode()).hexdigest()
    assert out.stdout.strip() == expected, out.stderr


def test_another_seed_gives_other_worlds(made):
    documents, questions = make_worlds(**{**ARGUMENTS, "seed": 4})
    assert {d.title for d in documents} != {d.title for d in made[0]}
    assert not {q.question for q in questions["test"]} & {q.question for q in made[1]["test"]}


def test_splits_share_no_entity_for_any_seed_but_all_words(worlds):
    names = {
        split: {
            entity.name
            for seed in (3, 8)
            for entity in build_world(seed=seed, split=split, entities=240).entities
        }
        for split in SPLITS
    }
    for one in SPLITS:
        assert len({entity.name for entity in worlds[one].entities}) == len(worlds[one].entities)
        assert all(len(name.split()) == 2 for name in names[one])
        for two in SPLITS:
            assert one == two or not names[one] & names[two]
    large = build_world(seed=0, split="train", entities=400)
    words = {word for entity in large.entities for word in entity.name.split()}
    assert words == {word for kind in KINDS.values() for word in kind.first + kind.second}


def test_names_are_near_duplicates(worlds):
    """Most entities share both words of their name with others of their world."""
    entities = worlds["train"].entities
    counts = Counter(word for entity in entities for word in entity.name.split())
    shared = [all(counts[word] > 1 for word in entity.name.split()) for entity in entities]
    assert np.mean(shared) > 0.7


def test_facts_make_sense(worlds):
    for world in worlds.values():
        kinds = [entity.kind for entity in world.entities]
        for (row, word), target in world.facts.items():
            relation = RELATIONS[word]
            assert (kinds[row], kinds[target]) == (relation.subject, relation.object)
            assert row != target
            if word == "mother":
                assert world.entities[target].pronouns == ("she", "her")
            if word == "capital":
                assert world.facts[target, "country"] == row
        for word in ("mother", "outlet"):
            for row in range(len(kinds)):
                seen = set()
                while row is not None:
                    assert row not in seen, f"{word} facts form a circle"
                    seen.add(row)
                    row = world.facts.get((row, word))
        possible = {
            (row, word)
            for word, relation in RELATIONS.items()
            for row, kind in enumerate(kinds)
            if kind == relation.subject
        }
        missing = possible - set(world.facts)  # the roots of the forests
        assert {word for _, word in missing} <= {"mother", "outlet"} and len(missing) <= 2


def test_articles_state_their_own_facts_and_nothing_about_others(made, worlds):
    documents, row = made[0], 0
    lengths = []
    for world in worlds.values():
        known = re.compile("|".join(rf"\b{entity.name}\b" for entity in world.entities))
        for subject, entity in enumerate(world.entities):
            document = documents[row]
            own = [
                world.entities[world.facts[subject, word]].name
                for word in RELATIONS
                if (subject, word) in world.facts
            ]
            assert document.id == row and document.title == entity.name
            assert Counter(known.findall(document.text)) == Counter(own) + Counter([entity.name])
            assert document.text.count(".") == len(own) + ARGUMENTS["extra_facts"]
            assert "  " not in document.text and re.fullmatch(
                r"[A-Z][A-Za-z0-9 .]*\.", document.text
            )
            lengths.append(len(document.text.split()))
            row += 1
    assert row == len(documents)
    assert 25 < np.mean(lengths) < 45


def test_extra_facts_change_only_the_fillers():
    none = make_worlds(**{**ARGUMENTS, "extra_facts": 0, "questions": {"test": 6}})[0]
    two = make_worlds(**{**ARGUMENTS, "extra_facts": 2, "questions": {"test": 6}})[0]
    assert [d.title for d in none] == [d.title for d in two]
    assert all(b.text.count(".") == a.text.count(".") + 2 for a, b in zip(none, two))


def test_every_shape_is_what_it_says(made, worlds):
    """Follow the facts of the world from the entity in the question to the answer, and count."""
    documents, questions = made
    first_row = 0
    for split in SPLITS:
        world = worlds[split]
        row_of = {entity.name: row for row, entity in enumerate(world.entities)}
        shapes = Counter(question.shape for question in questions[split])
        assert set(shapes) == set(SHAPES) and max(shapes.values()) - min(shapes.values()) <= 1
        for question in questions[split]:
            subs = question.sub_questions
            starts = []
            assert len(subs) == len(SHAPES[question.shape]) == int(question.shape[0])
            for sub, needs in zip(subs, SHAPES[question.shape]):
                answer, (gold,) = row_of[sub.answer], sub.gold_ids
                # A hop starts from an earlier answer, or from an entity that the question names.
                if len(needs) < 2:
                    subject = documents[gold].title
                    if needs:
                        assert subject == subs[needs[0]].answer
                    else:
                        assert subject in question.question
                        starts.append(subject)
                    word = sub.queries[0].removeprefix(subject + " ")
                    assert sub.queries[0] == f"{subject} {word}"
                    assert world.facts[row_of[subject], word] == answer
                    assert any(
                        phrase.format(x=subject).removeprefix("the ") in sub.queries
                        for phrase in RELATIONS[word].phrases
                    )
                # A join: exactly one entity has both earlier answers as objects, and neither
                # condition alone is enough.
                else:
                    one, two = (subs[i].answer for i in needs)
                    assert documents[gold].title == sub.answer
                    assert sub.queries[0] == f"{one} {two} {world.entities[answer].kind}"
                    words = [
                        word
                        for word, relation in RELATIONS.items()
                        if relation.clause.format(x=one) in sub.question
                        or relation.clause.format(x=two) in sub.question
                    ]
                    assert len(words) == 2
                    holding = [
                        {
                            subject
                            for (subject, word), target in world.facts.items()
                            if word in words and target == row_of[name]
                        }
                        for name in (one, two)
                    ]
                    assert holding[0] & holding[1] == {answer} and min(map(len, holding)) > 1
                    assert one in sub.question and two in sub.question
                assert first_row <= gold < first_row + len(world.entities)
            assert question.answer == subs[-1].answer and question.aliases == subs[-1].aliases
            # No loops: all entities of the path differ; and none of the answers is given away.
            path = [*starts, *(sub.answer for sub in subs)]
            assert len(set(path)) == len(path)
            assert not any(sub.answer in question.question for sub in subs)
            assert not any(sub.answer in sub.question for sub in subs)
        assert len({question.question for question in questions[split]}) == len(questions[split])
        assert len({question.uid for question in questions[split]}) == len(questions[split])
        first_row += len(world.entities)


def test_questions_have_paraphrases(made):
    """One and the same hop is asked in several ways."""
    asked = {}
    for question in all_questions(made):
        for sub in question.sub_questions:
            asked.setdefault(sub.queries[0], set()).add(sub.question)
    assert max(map(len, asked.values())) >= 4
    first_words = {question.question.split()[0] for question in all_questions(made)}
    assert first_words == {"Who", "What", "Name", "Find", "Which"}


def test_every_accepted_query_finds_its_gold_document(made):
    """An oracle in plain NumPy: Lucene's BM25 over title and text, words in lower case."""
    texts = [re.findall(r"\w+", f"{d.title}\n{d.text}".lower()) for d in made[0]]
    mean = np.mean([len(text) for text in texts])
    k1, b = ARGUMENTS["k1"], ARGUMENTS["b"]
    norm = [k1 * (1 - b + b * len(text) / mean) for text in texts]
    weights = {}
    for word in {word for text in texts for word in text}:
        counts = np.array([text.count(word) for text in texts])
        held = (counts > 0).sum()
        idf = math.log(1 + (len(texts) - held + 0.5) / (held + 0.5))
        weights[word] = idf * counts / (counts + norm)
    checked = set()
    for question in all_questions(made):
        for sub in question.sub_questions:
            assert len(sub.queries) >= 3 and len(set(sub.queries)) == len(sub.queries)
            for query in sub.queries:
                scores = sum(weights[word] for word in query.lower().split() if word in weights)
                assert (scores > scores[sub.gold_ids[0]] + 1e-5).sum() < 3, query
                checked.add(query)
    assert len(checked) > 500


def test_vocabulary_is_closed_and_small(made):
    words = vocabulary()
    assert words == sorted(set(words)) and len(words) <= 700
    others = make_worlds(**{**ARGUMENTS, "seed": 11, "extra_facts": 4})
    for texts in (texts_of(made), texts_of(others)):
        for text in texts:
            assert set(split_words(text)) <= set(words), text
            assert re.sub(r"[\s]", "", text) == "".join(split_words(text)), text


def test_aliases_are_no_other_entity(made):
    def normal(text):
        return " ".join(re.findall(r"\w+", text.lower()))

    names = {normal(document.title) for document in made[0]}
    aliases = [alias for question in all_questions(made) for alias in question.aliases]
    assert aliases and not {normal(alias) for alias in aliases} & names


def test_a_subset_of_shapes():
    changes = {"shapes": ("3hop_chain", "2hop"), "questions": {"train": 21}}
    _, questions = make_worlds(**{**ARGUMENTS, **changes})
    assert set(questions) == {"train"}
    counts = Counter(question.shape for question in questions["train"])
    assert counts == {"3hop_chain": 11, "2hop": 10}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"questions": {"validation": 9999}, "shapes": ("3hop_join",)},
            r"9999 .* 3hop_join .* \d+ .* validation",
        ),
        ({"shapes": ("2hop", "5hop")}, "shapes .*5hop"),
        ({"shapes": ()}, "shapes"),
        ({"shapes": ("2hop", "2hop")}, "shapes"),
        ({"entities": 20}, "60 entities, not 20"),
        ({"entities": 9000}, "names .* train .* data.atlas.entities"),
        ({"extra_facts": 9}, "extra_facts .* 0 and 4, not 9"),
        ({"questions": {"dev": 3}}, "'dev'"),
        ({"questions": {"test": 0}}, "'test'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_worlds(**{**ARGUMENTS, **change})


def test_query_without_gold_is_dropped():
    """Queries that cannot tell four equal documents apart, or find the gold one, are dropped."""
    from stepsearch_jax.records import Document

    documents = [
        Document(0, "Bela Asker", "Her mother is Selia Grimby."),
        *(Document(i, "Bela Holtby", "She likes chess.") for i in range(1, 5)),
    ]
    check = make_retrieval_check(documents, 0.9, 0.4)
    good = ("Bela Asker mother", "mother", "Asker")
    assert check([*good], 0) == good
    assert check([*good, "Bela Holtby"], 0) == good
    # The canonical query failed.
    assert check(["Bela Holtby", "mother", "Asker", "Bela Asker"], 0) == ()
    # Fewer than three are left.
    assert check(["Bela Asker mother", "mother", "chess"], 0) == ()
    # Four equal documents: the third place is not certain.
    assert check(["Bela Holtby", "Holtby", "chess"], 1) == ()
