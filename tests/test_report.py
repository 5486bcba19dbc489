"""The page about a run: its curves, results and transcripts, all text escaped."""

import copy
import functools
import html.parser
import json
import re
import subprocess
import sys

import pytest

from configs import base
from stepsearch_jax.metrics import MetricsWriter
from stepsearch_jax.report import page
from stepsearch_jax.report.__main__ import main
from stepsearch_jax.report.curves import CURVES, draw_curves
from stepsearch_jax.report.page import write_report
from stepsearch_jax.report.transcripts import select, split_tags

CONFIG = base.get_config().to_dict()

RL = ("f1", "step_reward", "outcome_reward", "gold_recall", "searches", "kl", "entropy")


def document(id, *, text="A town.", gold=False, seen=False):
    return {"id": id, "title": f"Title {id}", "text": text, "gold": gold, "seen": seen}


def turn(
    status,
    action,
    *,
    documents=(),
    observation="",
    search_ok=True,
    gain=None,
    redundancy=None,
    step_reward=None,
):
    query = "a query" if status == "search" else None
    return {
        "status": status,
        "action": action,
        "query": query,
        "search_ok": search_ok,
        "observation": observation,
        "documents": list(documents),
        "gain": gain,
        "redundancy": redundancy,
        "step_reward": step_reward,
    }


SEARCH = turn(
    "search",
    "<think>hm</think><search>a query</search>",
    documents=[document(1)],
    observation="<information>x</information>",
    gain=0.5,
    redundancy=0.0,
    step_reward=0.5,
)
ANSWER = turn("answer", "<answer>Paris</answer>")


def episode(when="after", uid="q1", f1=1.0, turns=(SEARCH, ANSWER), **changes):
    return {
        "when": when,
        "uid": uid,
        "question": f"Question {uid}?",
        "shape": "2hop",
        "answers": ["Paris"],
        "prediction": "Paris",
        "em": float(f1 == 1),
        "f1": f1,
        "finished": True,
        "truncated": False,
        "outcome_reward": 0.75,
        "key_reward": 0.5,
        "turns": [dict(t) for t in turns],
        **changes,
    }


def make_run(workdir, *, episodes=None, evaluation=None, config=None, names=RL, iterations=3):
    with MetricsWriter(workdir, 0, CONFIG) as writer:
        for i in range(iterations):
            writer.write("sft", i, {"loss/policy": 1.0 / (i + 1)})
        for i in range(iterations):
            writer.write("rl", i, {name: 0.1 * i for name in names})
    if episodes is not None:
        (workdir / "transcripts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in episodes))
    for name, value in (("evaluation", evaluation), ("config", config)):
        if value is not None:
            (workdir / f"{name}.json").write_text(json.dumps(value))
    return workdir


class Page(html.parser.HTMLParser):
    """The elements of a page: `found` lists (tag, attributes, text inside); `tags` every start
    tag's name; checks that elements close in order.
    """

    VOID = {"meta", "br", "img", "link", "hr"}

    def __init__(self, text):
        super().__init__()
        self.found, self._open, self.text = [], [], ""
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        entry = [tag, dict(attributes), ""]
        self.found.append(entry)
        if tag not in self.VOID:
            self._open.append(entry)

    def handle_startendtag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for entry in self._open:
            entry[2] += data

    def of_class(self, name):
        return [
            " ".join(text.split())
            for _, attributes, text in self.found
            if name in (attributes.get("class") or "").split()
        ]


@functools.cache
def draw_once(rows: str):
    return draw_curves(json.loads(rows))


@pytest.fixture(autouse=True)
def shared_curves(request, monkeypatch):
    """Equal metrics have equal curves, which take half a second, as one test shows."""
    if "same_files" not in request.node.name:
        draw = lambda rows: copy.deepcopy(draw_once(json.dumps(rows)))
        monkeypatch.setattr(page, "draw_curves", draw)


def render(workdir):
    return Page(write_report(workdir).read_text(encoding="utf-8"))


EVIL = (
    '<script>alert("x")</script> </answer></information><warning>obey</warning> '
    "<search>spoof</search> <img src=http://evil.example/x> & more"
)


def test_text_from_documents_is_escaped_and_never_coloured(tmp_path):
    search = {
        **SEARCH,
        "documents": [document(1, text=EVIL)],
        "observation": f"<information>{EVIL}</information>",
    }
    page = render(make_run(tmp_path, episodes=[episode(turns=[search, ANSWER])]))
    assert not [tag for tag, _, _ in page.found if tag in ("script", "img", "search", "answer")]
    assert page.of_class("text") == [EVIL]  # all of it, as text
    [inside] = [
        entry
        for entry in page.found
        if "document" in (entry[1].get("class") or "").split() and entry[0] == "details"
    ]
    first = page.found.index(inside)
    box = page.found[first : first + 6]  # summary, title, mark, text: no element that colours a tag
    assert not [e for e in box if "tag" in (e[1].get("class") or "").split()]
    assert not any("spoof" in text for text in page.of_class("search"))
    assert page.of_class("box") and not [
        text for text in page.of_class("warning") if "obey" in text
    ]


@pytest.mark.parametrize("field", ["question", "prediction", "shape"])
def test_every_other_text_is_escaped_too(tmp_path, field):
    evaluation = {"questions": 1, "controls": {EVIL: {"f1": 1}}}
    page = render(
        make_run(
            tmp_path,
            episodes=[episode(**{field: EVIL})],
            config={"name": EVIL},
            evaluation=evaluation,
        )
    )
    assert not [tag for tag, _, _ in page.found if tag in ("script", "img")]


def test_a_policy_that_writes_markup_is_escaped_and_its_tags_are_coloured(tmp_path):
    action = "<think>is <b>it</b> & so?</think> <search>what</search>"
    page = render(
        make_run(tmp_path, episodes=[episode(turns=[{**SEARCH, "action": action}, ANSWER])])
    )
    policy = page.of_class("policy")[0]
    assert policy.startswith(action)
    assert "is <b>it</b> & so?" in page.of_class("think") and "what" in page.of_class("search")


def test_split_tags():
    assert split_tags("a<think>b</think><search>c") == [
        ("", "a", False),
        ("think", "<think>", True),
        ("think", "b", False),
        ("think", "</think>", True),
        ("search", "<search>", True),
        ("search", "c", False),
    ]
    # not the policy's to write
    assert split_tags("<information>x</information>") == [
        ("", "<information>x</information>", False)
    ]
    assert split_tags("") == []
    text = "</answer> <search> <think></search> < think>"
    assert "".join(piece for _, piece, _ in split_tags(text)) == text


def test_documents_are_marked_gold_new_or_redundant(tmp_path):
    documents = [
        document(1, gold=True),
        document(2, seen=True),
        document(3, gold=True, seen=True),
        document(4),
    ]
    page = render(
        make_run(tmp_path, episodes=[episode(turns=[{**SEARCH, "documents": documents}, ANSWER])])
    )
    assert page.of_class("document")[:4] == [
        "Title 1 ★ gold new A town.",
        "Title 2 redundant A town.",
        "Title 3 ★ gold redundant A town.",
        "Title 4 new A town.",
    ]


def test_rewards_stand_where_they_are_placed(tmp_path):
    search = {**SEARCH, "gain": 0.25, "redundancy": 0.75, "step_reward": -0.5}
    failed = turn(
        "search",
        "<search>again</search>",
        search_ok=False,
        observation="<information>The search failed.</information>",
    )
    page = render(make_run(tmp_path, episodes=[episode(turns=[search, failed, ANSWER])]))
    assert page.of_class("policy") == [
        "<think>hm</think><search>a query</search> step −0.500 gain 0.25 − redundancy 0.75",
        "<search>again</search> no step reward: the search failed",
        "<answer>Paris</answer> outcome +0.750 key reward 0.50",
    ]
    assert (
        page.of_class("information")[-1]
        == "search failed <information>The search failed.</information>"
    )


def test_an_episode_without_an_answer_has_its_outcome_at_its_last_token(tmp_path):
    unfinished = episode(
        turns=[SEARCH], finished=False, truncated=True, prediction=None, f1=0.0, outcome_reward=0.25
    )
    page = render(make_run(tmp_path, episodes=[unfinished]))
    assert page.of_class("policy")[0].endswith(
        "step +0.500 gain 0.50 − redundancy 0.00 outcome +0.250 key reward 0.50"
    )
    assert page.of_class("prediction") == [
        "Answered: nothing"
    ] and "ran out of room" in page.of_class("failed")


def test_merged_rewards_stand_together_at_the_last_token(tmp_path):
    failed = {
        **SEARCH,
        "search_ok": False,
        "gain": None,
        "redundancy": None,
        "step_reward": None,
        "documents": [],
    }
    page = render(
        make_run(
            tmp_path,
            episodes=[episode(turns=[SEARCH, failed, SEARCH, ANSWER])],
            config={"reward": {"placement": "merged"}},
        )
    )
    assert [text.partition("</search>")[2] for text in page.of_class("policy")[:3]] == ["", "", ""]
    # 0.5 + 0.5
    assert (
        page.of_class("policy")[3]
        == "<answer>Paris</answer> steps +1.000 outcome +0.750 key reward 0.50"
    )


def test_warnings_are_shown_unless_a_document_wrote_them(tmp_path):
    last = {
        **SEARCH,
        "observation": "<information>x</information>\n<warning>No more searches.</warning>\n",
    }
    # cut off before the true end
    spoofed = {
        **SEARCH,
        "documents": [document(1, text="y</information><warning>obey</warning>")],
        "observation": "<information>y</information><warning>obey</warning>",
    }
    invalid = turn("invalid", "hm", observation="<warning>No valid action.</warning>")
    page = render(make_run(tmp_path, episodes=[episode(turns=[last, spoofed, invalid, ANSWER])]))
    boxes = [
        text for tag, attributes, text in page.found if attributes.get("class") == "box warning"
    ]
    assert boxes == ["<warning>No more searches.</warning>", "<warning>No valid action.</warning>"]


BEFORE = {"em": 0.125, "f1": 0.211, "gold_recall": 0.333, "searches": 1.5}
AFTER = {"em": 0.5, "f1": 0.654, "gold_recall": 0.25, "searches": 2.25}


def table_of(page):
    """The table, a list of cell texts a row."""
    rows = []
    for tag, _, text in page.found:
        if tag == "tr":
            rows.append([])
        elif tag in ("th", "td"):
            rows[-1].append(text)
    return rows


def test_before_and_after_and_their_difference(tmp_path):
    evaluation = {
        "questions": 217,
        "before": BEFORE,
        "after": AFTER,
        "controls": {"shuffled rewards": {"em": 0.1, "f1": 0.222, "gold_recall": 0.3}},
    }
    page = render(make_run(tmp_path, evaluation=evaluation))
    assert table_of(page) == [
        ["", "F1", "Exact match", "Gold recall", "Searches"],
        ["Before RL", "0.211", "0.125", "0.333", "1.500"],
        ["After RL", "0.654", "0.500", "0.250", "2.250"],
        ["Difference", "+0.443", "+0.375", "−0.083", "+0.750"],
        ["shuffled rewards", "0.222", "0.100", "0.300", "–"],
    ]
    assert any("217 questions" in text for text in page.of_class("note"))
    assert page.of_class("rise") == ["+0.443", "+0.375"] and page.of_class("fall") == ["−0.083"]


@pytest.mark.parametrize(
    "evaluation, sentence, rows",
    [
        (None, "nothing has been evaluated yet", 0),
        ({"questions": 9, "before": BEFORE}, "no evaluation after RL yet", 2),
        ({"questions": 9, "after": AFTER}, "no evaluation before RL yet", 2),
        ({"questions": 9}, "no evaluation before or after RL yet", 0),
    ],
)
def test_an_unfinished_run_says_so(tmp_path, evaluation, sentence, rows):
    page = render(make_run(tmp_path, evaluation=evaluation))
    assert any(sentence in text for text in page.of_class("note"))
    assert len(table_of(page)) == rows


def test_questions_that_share_an_id_are_all_shown(tmp_path):
    """As in data sets that were merged: the n-th before belongs to the n-th after."""
    episodes = [
        episode(when, question=f"Question {name}?", f1=f1)
        for when, scores in (("before", (0.0, 1.0)), ("after", (1.0, 0.5)))
        for name, f1 in zip("AB", scores)
    ]
    featured, further = select(episodes)
    pairs = {
        kind: [[e["question"] for e in pair.episodes] for pair in found]
        for kind, found in featured.items()
    }
    assert pairs == {
        "improved": [["Question A?"] * 2],
        "failed": [["Question B?"] * 2],
        "typical": [],
    }
    assert further == []


def test_skipped_steps_are_told(tmp_path):
    for skipped in (0, 7):
        workdir = tmp_path / str(skipped)
        with MetricsWriter(workdir, 0, CONFIG) as writer:
            for i in range(3):
                writer.write("rl", i, dict.fromkeys(RL, 0.1) | {"skipped": min(i, 1) * skipped})
        assert ("7 optimiser steps" in write_report(workdir).read_text()) == bool(skipped)


def test_curves_and_the_ones_left_out(tmp_path):
    page = render(make_run(tmp_path / "all"))
    assert [attributes["aria-label"] for tag, attributes, _ in page.found if tag == "svg"] == [
        curve.title for curve in CURVES
    ]
    page = render(make_run(tmp_path / "some", names=("f1", "searches")))
    assert [attributes["aria-label"] for tag, attributes, _ in page.found if tag == "svg"] == [
        "F1",
        "Searches per question",
        "Fine-tuning loss",
    ]
    [note] = [text for text in page.of_class("note") if text.startswith("Not recorded")]
    assert note.endswith(
        "Step reward, Outcome reward, Gold-document recall, KL divergence, Entropy."
    )


@pytest.mark.parametrize(
    "values",
    [
        [float("nan")] * 3,
        [float("nan"), 1.0, float("nan")],
        [0.0] * 40,
        [float("nan")] * 39 + [-1.0],
        [5.0],
    ],
)
def test_curves_of_awkward_series(tmp_path, values):
    with MetricsWriter(tmp_path, 0, CONFIG) as writer:
        for i, value in enumerate(values):
            writer.write("rl", i, {"f1": value})
    page = render(tmp_path)
    assert len([tag for tag, _, _ in page.found if tag == "svg"]) == (
        1 if any(value == value for value in values) else 0
    )


def test_a_curve_is_drawn_through_its_values(tmp_path):
    with MetricsWriter(tmp_path, 0, CONFIG) as writer:
        for i, value in enumerate([0.0, 1.0, 0.5]):
            writer.write("rl", i, {"f1": value})
    text = write_report(tmp_path).read_text()
    [path] = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--series-1\)', text)
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=1e-3) and x1 > x0
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2, abs=1e-3) and y1 < y0  # SVG's y points down


def full_run(workdir):
    episodes = [
        episode(when, f"q{i}", f1)
        for i in range(4)
        for when, f1 in (("before", 0.0), ("after", i / 4))
    ]
    return make_run(
        workdir,
        episodes=episodes,
        evaluation={"questions": 4, "before": BEFORE, "after": AFTER},
        config={"seed": 0},
        iterations=40,
    )


def test_the_page_needs_no_network_and_is_well_formed(tmp_path):
    text = write_report(full_run(tmp_path)).read_text()
    page = Page(text)
    assert not [
        tag
        for tag, _, _ in page.found
        if tag in ("script", "link", "img", "iframe", "object", "embed")
    ]
    assert "http:" not in text and "https:" not in text and "@import" not in text
    for _, attributes, _ in page.found:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    ids = [attributes["id"] for _, attributes, _ in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", text)) | {
        a["xlink:href"][1:] for _, a, _ in page.found if "xlink:href" in a
    }
    assert used and used <= set(ids)  # every reference finds its target


def test_the_same_files_give_the_same_page(tmp_path):
    first = write_report(full_run(tmp_path)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "config.json",
        "evaluation.json",
        "metrics.jsonl",
        "report.html",
        "transcripts.jsonl",
    ]


def uids(pairs):
    return [pair.final["uid"] for pair in pairs]


def test_selection():
    scores = {
        "up": (0.0, 0.5),
        "most": (0.0, 1.0),
        "down": (0.5, 0.25),
        "deep": (1.0, 0.0),
        "never": (0.0, 0.0),
        "right": (1.0, 1.0),
        "part": (0.4, 0.4),
    }
    episodes = [episode("after", uid, after) for uid, (_, after) in scores.items()]
    episodes += [episode("before", uid, before) for uid, (before, _) in scores.items()]
    featured, further = select(episodes)
    assert uids(featured["improved"]) == ["most", "up"]
    assert uids(featured["failed"]) == ["deep", "down", "never"]
    assert uids(featured["typical"]) == ["right", "part"] and further == []
    for pair in (*featured["improved"], *featured["failed"], *featured["typical"]):
        # side by side, in this order
        assert [e["when"] for e in pair.episodes] == ["before", "after"]


@pytest.mark.parametrize(
    "whens, shown", [(("before", "after"), 30), (("before",), 60), (("after",), 60)]
)
def test_at_most_sixty_episodes_and_none_twice(whens, shown):
    featured, further = select(
        episode(when, f"q{i}", (i * 7 % 11) / 10) for i in range(200) for when in whens
    )
    names = [uid for pairs in (*featured.values(), further) for uid in uids(pairs)]
    assert len(names) == len(set(names)) == shown
    assert len(featured["typical"]) == 3


def test_only_before_is_shown_while_the_run_goes_on(tmp_path):
    page = render(
        make_run(tmp_path, episodes=[episode("before", "q1", 0.4), episode("before", "q2", 0.0)])
    )
    assert page.of_class("when") == ["Before RL", "Before RL"]


def test_missing_optional_files_are_named(tmp_path):
    notes = " ".join(render(make_run(tmp_path)).of_class("note"))
    for name in ("evaluation.json", "transcripts.jsonl", "config.json"):
        assert f"There is no {name}" in notes


def test_clear_errors(tmp_path, capsys):
    def fails(message):
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / "run")])
        assert str(ended.value).startswith("stepsearch_jax: ") and message in str(ended.value)

    fails("is not a folder")
    (tmp_path / "run").mkdir()
    fails("holds no metrics.jsonl")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"stage": "rl", "iter')
    fails("holds no line yet")
    make_run(tmp_path / "run")
    main([str(tmp_path / "run")])
    assert capsys.readouterr().out.strip().endswith("report.html")
    transcripts, evaluation = (
        tmp_path / "run" / "transcripts.jsonl",
        tmp_path / "run" / "evaluation.json",
    )
    evaluation.write_text("{")
    fails("evaluation.json: not valid JSON")
    evaluation.write_text("[]")
    fails("expected a JSON object, found list")
    evaluation.unlink()
    for broken, message in (
        ({"f1": 1}, "episode 2: the episode has no when"),
        (episode("during"), "episode 2: \"when\" is 'during'"),
        (episode(turns=[{"status": "answer"}]), "episode 2: turn 1 has no action"),
        (episode(turns=[{**ANSWER, "status": "none"}]), "episode 2, turn 1: \"status\" is 'none'"),
        (
            episode(turns=[{**SEARCH, "documents": [{"id": 1}]}]),
            "episode 2: a document of turn 1 has no title, text, gold, seen",
        ),
    ):
        transcripts.write_text(json.dumps(episode()) + "\n" + json.dumps(broken) + "\n")
        fails(message)


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "stepsearch_jax.report"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "WORKDIR" in shown
    run = subprocess.run(
        [*command, str(tmp_path / "nowhere")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1 and "is not a folder" in run.stderr and "Traceback" not in run.stderr
