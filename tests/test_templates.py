"""Prompts and the environment's texts, as text and as tokens."""

import dataclasses
import re

import numpy as np
import pytest

from stepsearch_jax.prompting import templates
from stepsearch_jax.prompting.tags import parse_action
from stepsearch_jax.prompting.tokenizers import load_tokenizer
from stepsearch_jax.records import Document, TurnStatus
from stepsearch_jax.search.observations import build_observation

QUESTION = "Who wrote {this} \\1 <search>?"


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_prompt_ends_with_the_question_unchanged(template):
    prompt = templates.render_prompt(template, f" {QUESTION} ")
    assert prompt.endswith(f"Question: {QUESTION}\n") and "{question}" not in prompt


def test_short_prompt_is_exact():
    assert templates.render_prompt("short", "Who is it?") == " Question: Who is it?\n"


def test_bad_prompts_are_refused():
    with pytest.raises(ValueError, match="'long' .*paper, reference, short"):
        templates.render_prompt("long", "x")
    with pytest.raises(ValueError, match="question"):
        templates.render_prompt("paper", "  ")


def test_the_paper_prompts_example_plays_by_the_rules():
    """Each turn of the example is a well-formed action; observations are the environment's."""
    paper = templates.PAPER
    example = paper[paper.index("An example:") : paper.rindex("Question:")]
    turns = re.split(r"<information>.*?</information>", example, flags=re.DOTALL)
    statuses = [parse_action(turn)[0] for turn in turns]
    assert statuses == [TurnStatus.SEARCH] * 3 + [TurnStatus.ANSWER]
    assert parse_action(turns[-1])[1] == "1824"
    shown = re.findall(r"Title: (.*?) ##> (.*)\n", example)
    assert len(shown) == 3
    for title, text in shown:
        rendered = templates.render_document(Document(0, title, text))
        document = templates.RANK.format(rank=1) + rendered
        assert templates.OBSERVATION_HEAD + document + templates.OBSERVATION_TAIL in example


@pytest.mark.parametrize("name", ["atlas", "qwen"])
def test_environment_as_tokens_is_the_text(name, request):
    folder = name
    if name == "qwen":
        folder = str(request.getfixturevalue("shared_data") / "tokenizer_qwen2_5")
    tokenizer = load_tokenizer(folder, ["Rome"])
    environment = templates.encode_environment(tokenizer.encode, 2)
    others = {field.name for field in dataclasses.fields(environment)} - {"ranks"}
    arrays = [*environment.ranks, *(getattr(environment, field) for field in others)]
    assert all(array.dtype == np.int32 and array.ndim == 1 for array in arrays)
    assert tokenizer.decode(environment.invalid_warning) == templates.INVALID_WARNING
    assert tokenizer.decode(environment.last_turn_warning) == templates.LAST_TURN_WARNING
    documents = [Document(0, "Rome", "Rome is old."), Document(1, "Po", "A river {x}.")]
    rendered = [templates.render_document(document) for document in documents]
    encoded = [np.array(tokenizer.encode(text), np.int32) for text in rendered]
    assert tokenizer.decode(build_observation(environment, encoded, 400)) == (
        "\n<information>\n Doc 1 <## Title: Rome ##> Rome is old.\n"
        " Doc 2 <## Title: Po ##> A river {x}.\n</information>\n"
    )
    nothing = tokenizer.decode(build_observation(environment, [], 400))
    assert nothing == "\n<information>\n Nothing was found.\n</information>\n"


def test_warnings_are_one_warning_element():
    for text in (templates.INVALID_WARNING, templates.LAST_TURN_WARNING):
        assert re.fullmatch(r"\n<warning> .* </warning>\n", text)


def test_word_vocabulary_reads_the_environment_in_whole_words():
    """No letter of the environment's texts or the short prompt is spelt out in bytes."""
    tokenizer = load_tokenizer("atlas", ["Rome"])
    environment = templates.encode_environment(tokenizer.encode, templates.MAX_RANK)
    ids = [
        *tokenizer.encode(templates.render_prompt("short", " Rome")),
        *tokenizer.encode(templates.render_document(Document(0, "Rome", "Rome"))),
    ]
    for field in dataclasses.fields(environment):
        value = getattr(environment, field.name)
        ids += np.concatenate(value).tolist() if isinstance(value, tuple) else value.tolist()
    tokens = {tokenizer.token_bytes[i] for i in ids}
    assert not {token for token in tokens if len(token) == 1 and token.isalnum()}


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="k = 0"):
        templates.encode_environment(load_tokenizer("atlas", ["Rome"]).encode, 0)
