"""Policies and baselines on several data sets: prompts, each question once, tables as in dumps."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import running
import tiny_config
from pretrained_models import GOLDEN

from stepsearch_jax.evaluation import tables
from stepsearch_jax.evaluation.baselines import DIRECT, GOLD, SINGLE_SEARCH, make_baselines
from stepsearch_jax.models.huggingface import open_checkpoint
from stepsearch_jax.prompting import templates
from stepsearch_jax.run.system import build_system


def configure(tmp_path_factory, datasets="atlas::test,atlas:"):
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    config.evaluation.datasets = datasets
    config.evaluation.questions, config.evaluation.resamples = 9, 50
    return config


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return build_system(configure(tmp_path_factory), ["validation"])


def test_names_of_data_sets():
    found = tables.parse_datasets("musique:a/b, bamboogle:c:test", "validation")
    assert found == {
        "musique-validation": ("musique", "a/b", "validation"),
        "bamboogle-test": ("bamboogle", "c", "test"),
    }
    for text, message in (
        ("musique", "KIND:FOLDER"),
        ("a:b,", "holds ''"),
        ("a:b:c:d", "KIND:FOLDER"),
        (":b", "KIND"),
        ("a:b,a:c", "a-dev twice"),
        ("musique:", "holds 'musique:'"),
        ("b:c,a::d", "holds 'a::d'"),
    ):
        with pytest.raises(ValueError, match=message):
            tables.parse_datasets(text, "dev")


def read_prompts(made, name: str) -> list[str]:
    split = made.system.splits[name]
    return [
        made.system.tokenizer.decode(tokens[:length])
        for tokens, length in zip(split.prompts, split.prompt_length)
    ]


def test_prompts_of_baselines(system):
    """The policy's own prompt, then what a search shows; one program serves all three."""
    # the documents that each baseline is given
    made = make_baselines(system, "validation", 9)
    questions, documents = system.splits["validation"].questions[:9], system.source.documents

    def show(ids) -> str:
        ranked = "".join(
            templates.RANK.format(rank=rank) + templates.render_document(documents[i])
            for rank, i in enumerate(ids, 1)
        )
        return templates.OBSERVATION_HEAD + ranked + templates.OBSERVATION_TAIL

    asked = [templates.render_prompt("short", question.question) for question in questions]
    found = system.search_documents([question.question for question in questions]).tolist()
    assert made.given == {
        DIRECT: None,
        SINGLE_SEARCH: [tuple(ids) for ids in found],
        GOLD: [question.gold_ids for question in questions],
    }
    # their prompts, shortened if there is no room
    assert read_prompts(made, DIRECT) == asked
    for name, given in ((SINGLE_SEARCH, found), (GOLD, made.given[GOLD])):
        for prompt, question, ids in zip(read_prompts(made, name), asked, given):
            whole = question + show(ids)
            assert prompt == whole or (
                len(prompt) < len(whole)
                and prompt.endswith(templates.OBSERVATION_TAIL)
                and prompt.startswith(question)
            )
    whole = [question + show(ids) for question, ids in zip(asked, found)]
    prompts = read_prompts(made, SINGLE_SEARCH)
    assert sum(prompt == text for prompt, text in zip(prompts, whole)) > 4
    # one shape for all
    settings = made.system.settings
    assert settings.turns == 1 and settings.context == settings.max_prompt_tokens + 25 <= 256
    widths = {split.prompts.shape[1] for split in made.system.splits.values()}
    assert widths == {settings.max_prompt_tokens}


def test_of_many_gold_documents_as_many_are_given_as_searches_would_bring(system, monkeypatch):
    """Two searches of one document each; one if the context has no room for the second."""
    split = system.splits["validation"]
    question = split.questions[0]
    many = dataclasses.replace(question, loose_gold_ids=tuple(range(100)))
    split = dataclasses.replace(split, questions=[many, question])
    monkeypatch.setitem(system.splits, "validation", split)
    made = make_baselines(system, "validation", 2)
    assert many.gold_ids[:2] == question.gold_ids and made.given[GOLD] == [question.gold_ids] * 2
    assert read_prompts(made, GOLD)[0] == read_prompts(made, GOLD)[1]
    narrow = dataclasses.replace(system.settings, context=int(split.prompt_length[0]) + 25 + 60)
    made = make_baselines(dataclasses.replace(system, settings=narrow), "validation", 2)
    assert made.given[GOLD] == [question.gold_ids[:1]] * 2
    assert [prompt.count("Title:") for prompt in read_prompts(made, GOLD)] == [1, 1]
    assert [len(ids) for ids in made.given[SINGLE_SEARCH]] == [1, 1]


def test_without_gold_documents_there_is_no_such_baseline(system, monkeypatch):
    split = system.splits["validation"]
    bare = [dataclasses.replace(question, sub_questions=()) for question in split.questions[:3]]
    split = dataclasses.replace(split, questions=bare)
    monkeypatch.setitem(system.splits, "validation", split)
    assert set(make_baselines(system, "validation", 3).given) == {DIRECT, SINGLE_SEARCH}


def test_baseline_templates_have_examples_of_the_answer():
    for template in ("paper", "reference"):
        for with_documents in (False, True):
            prompt = templates.render_baseline(template, " Who? ", with_documents)
            assert prompt.endswith("\nQuestion: Who?\n") and "<search>" not in prompt
            # answers of two kinds
            assert "<answer> 1824 </answer>" in prompt
            assert "<answer> Edda Marrow </answer>" in prompt
            assert ("<information>" in prompt) == with_documents


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_on_two_data_sets(tmp_path_factory, tmp_path, capsys):
    # every question once for each method, in the dumps and in the table
    shutil.copytree(running.searching_start(tmp_path_factory), tmp_path / "start")
    running.write_run(tmp_path, configure(tmp_path_factory))
    table = tables.evaluate_datasets(configure(tmp_path_factory), tmp_path)
    folder = tmp_path / "evaluation"
    assert json.loads((folder / "table.json").read_text()) == table
    assert list(table["data_sets"]) == ["atlas-test", "atlas-validation"]
    for name, part in table["data_sets"].items():
        assert part["questions"] == 9
        assert list(part["methods"]) == [DIRECT, SINGLE_SEARCH, GOLD, tables.BEFORE, tables.AFTER]
        lines = read_lines(folder / name / "questions.jsonl")
        for method, measures in part["methods"].items():
            rows = [line for line in lines if line["method"] == method]
            assert [row["uid"] for row in rows] == [f"{name.split('-')[1]}-{n}" for n in range(9)]
            for key in (
                "em",
                "f1",
                "cover_em",
                "answer_in_evidence",
                "gold_recall",
                "gold_recall_hop_2",
                "searches",
                "truncated",
            ):
                values = [row["measures"][key] for row in rows if row["measures"][key] is not None]
                measure = measures[key]
                expected = pytest.approx(np.mean(values)) if values else None
                assert measure["mean"] == expected, (method, key)
                assert not values or measure["low"] <= measure["mean"] <= measure["high"]
            f1 = [row["measures"]["f1"] for row in rows]
            assert [row["f1"] for row in rows] == pytest.approx(f1)
            assert all(("given" in row) == (method != DIRECT) for row in rows)
        # each baseline has room for a whole turn, and nothing is trained between before and after
        means = {
            method: {key: measure["mean"] for key, measure in measures.items()}
            for method, measures in part["methods"].items()
        }
        assert all(means[name]["truncated"] == 0 for name in (DIRECT, SINGLE_SEARCH, GOLD))
        assert means[GOLD]["gold_recall"] == 1 and means[DIRECT]["gold_recall"] is None
        assert means[SINGLE_SEARCH]["searches"] == 0 < means[tables.BEFORE]["searches"]
        assert part["methods"][tables.BEFORE] == part["methods"][tables.AFTER]
        episodes = read_lines(folder / name / "transcripts.jsonl")
        assert [episode["when"] for episode in episodes] == ["before"] * 9 + ["after"] * 9
        page = (folder / name / "report.html").read_text()
        shown = ("After RL", "single-shot RAG", episodes[0]["question"])
        assert all(text in page for text in shown) and "Recorded so far" not in page
    # the table as printed
    text = (folder / "table.md").read_text()
    assert text in capsys.readouterr().out
    first = table["data_sets"]["atlas-test"]["methods"][GOLD]
    second = table["data_sets"]["atlas-validation"]["methods"][GOLD]
    row = " | ".join(f"{part[key]['mean']:.3f}" for part in (first, second) for key in ("em", "f1"))
    head = "| method | atlas-test EM | F1 | atlas-validation EM | F1 |\n|---|---|---|---|---|\n"
    assert text.startswith(head) and f"| {GOLD} | {row} |" in text
    searches = table["data_sets"]["atlas-test"]["methods"][tables.AFTER]["searches"]
    assert f"{searches['mean']:.3f} [{searches['low']:.3f}, {searches['high']:.3f}]" in text


def test_a_question_that_is_answered_twice_is_an_error(system, monkeypatch):
    class Rollout:
        episodes, scores = {0: None, 1: None}, None

    batches = [(np.array([0, 1]), Rollout), (np.array([1, -1]), Rollout)]
    measures = np.ones((len(tables.list_measures(2)), 2))
    monkeypatch.setattr(tables, "collect_greedily", lambda *_: batches)
    monkeypatch.setattr(tables, "measure_episode", lambda *_: measures)
    monkeypatch.setattr(tables, "dump_episode", lambda *_: {})
    with pytest.raises(RuntimeError, match="question 1 was answered 2 times"):
        tables.measure_method(system, None, None, "validation", "x", None, 2, 2)


@pytest.mark.slow
def test_a_pretrained_policy_as_it_is(tmp_path_factory, tmp_path):
    config = configure(tmp_path_factory, "atlas:")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*model.checkpoint"):
        tables.evaluate_datasets(config, tmp_path)
    config.model.checkpoint, config.evaluation.questions = str(GOLDEN / "qwen2"), 3
    for key, value in open_checkpoint(GOLDEN / "qwen2").fields.items():
        if key not in ("vocab_size", "rope_scaling"):
            config.model[key] = value
    table = tables.evaluate_datasets(config, tmp_path)
    assert list(table["data_sets"]["atlas-validation"]["methods"])[-1] == tables.ZERO_SHOT
    page = (tmp_path / "evaluation" / "atlas-validation" / "report.html").read_text()
    assert "The run is not finished" not in page and "Curves" not in page
    assert not (tmp_path / "start").exists()


def test_a_data_set_that_cannot_be_opened_is_named(tmp_path_factory, tmp_path):
    message = "atlas-bogus of config.evaluation.datasets.*'bogus'.*train, validation"
    with pytest.raises(ValueError, match=message):
        tables.evaluate_datasets(configure(tmp_path_factory, "atlas::test,atlas::bogus"), tmp_path)
    message = "musique-test of config.evaluation.datasets.*nothere"
    with pytest.raises(FileNotFoundError, match=message):
        tables.evaluate_datasets(configure(tmp_path_factory, "musique:nothere:test"), tmp_path)
