"""The scripted searcher, its demonstrations, the exchange of names in them, and where a run's first
policy comes from.
"""

import dataclasses

import jax
import numpy as np
import pytest
import running
import tiny_config

from stepsearch_jax import checkpoint
from stepsearch_jax.data.atlas_kinds import KINDS, name_groups
from stepsearch_jax.evaluation import greedy
from stepsearch_jax.models.huggingface import export_policy
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.records import TurnStatus
from stepsearch_jax.rl.model_state import describe_params, init_params
from stepsearch_jax.rollout.scripted import PERFECT, run_script
from stepsearch_jax.rollout.text import to_episodes
from stepsearch_jax.run import start
from stepsearch_jax.run.demonstrations import PAD_TO_MULTIPLE_OF, Demonstrations, demonstrate
from stepsearch_jax.run.settings import LENGTH_GROUPS
from stepsearch_jax.run.system import System, build_system
from stepsearch_jax.run.warm_start import fine_tune, warm_start


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    config.rollout.max_turns, config.rollout.context = 3, 384
    return config


@pytest.fixture(scope="module")
def system(config) -> System:
    """A search that always finds the gold document of an accepted query, and for others the
    document of the entity that the query begins with, if any.
    """
    plain = build_system(config, ["train", "validation"])
    subs = [
        sub
        for split in plain.splits.values()
        for question in split.questions
        for sub in question.sub_questions
    ]
    gold = {query: sub.gold_ids[0] for sub in subs for query in sub.queries}
    titles = {document.title: document.id for document in plain.source.documents}

    def search(queries):
        return np.array(
            [[gold.get(query, titles.get(" ".join(query.split()[:2]), -1))] for query in queries],
            np.int32,
        )

    return build_system(config, ["train", "validation"], search)


def script(system: System, shares, seed=0, settings=None, known_fraction=0.0):
    split = system.splits["validation"]
    trajectory = run_script(
        split.questions,
        split.prompts,
        split.prompt_length,
        system.source.documents,
        system.search,
        system.tokenizer,
        settings or system.settings,
        system.environment.last_turn_warning,
        shares,
        known_fraction,
        seed,
    )
    return trajectory, to_episodes(trajectory, split.questions, system.tokenizer)


# --- the script


def test_a_perfect_searcher_is_right_when_the_retrieval_works(system):
    means = greedy.evaluate_script(system, "validation", PERFECT)
    assert means == {
        "em": 1.0,
        "f1": 1.0,
        "gold_recall": 1.0,
        "searches": 2.0,
        "invalid": 0.0,
        "truncated": 0.0,
    }
    for episode in script(system, PERFECT)[1]:
        hops = episode.question.sub_questions
        assert (
            list(episode.queries) == [hop.queries[0] for hop in hops]
            and episode.answer == hops[-1].answer
        )
        # what was read is said before it is used
        assert all(hop.answer in turn.action for hop, turn in zip(hops, episode.turns[1:]))


def strip_hops(system: System, gold: bool) -> System:
    """With questions that have no sub-questions, but the gold documents of these."""
    split = system.splits["validation"]
    questions = [
        dataclasses.replace(
            question,
            sub_questions=(),
            loose_gold_ids=question.gold_ids if gold else (),
        )
        for question in split.questions
    ]
    split = dataclasses.replace(split, questions=questions)
    return dataclasses.replace(system, splits=system.splits | {"validation": split})


def test_without_sub_questions_a_perfect_searcher_searches_its_gold_documents(system):
    """As on HotpotQA, whose rows name no sub-questions: it must not answer unseen."""
    bare = strip_hops(system, gold=True)
    means = greedy.evaluate_controls(bare, "validation")["perfect searcher"]
    assert means["f1"] == 1.0 and means["searches"] == 2.0 and means["gold_recall"] == 1.0
    for episode in script(bare, PERFECT)[1]:
        titles = [system.source.documents[i].title for i in episode.question.gold_ids]
        assert list(episode.queries) == titles
    with pytest.raises(ValueError, match="20 of the 20 questions of validation"):
        greedy.evaluate_controls(strip_hops(system, gold=False), "validation")


def test_the_record_of_a_script_is_that_of_a_rollout(system):
    trajectory, episodes = script(
        system, {"good": 0.4, "vague": 0.3, "repeat": 0.1, "wrong": 0.1, "early": 0.1}
    )
    split = system.splits["validation"]
    for row, episode in enumerate(episodes):
        n, first = trajectory.length[row], split.prompt_length[row]
        assert (
            trajectory.tokens[row, :first].tolist() == split.prompts[row, :first].tolist()
            and not trajectory.tokens[row, n:].any()
        )
        assert (
            not trajectory.action_mask[row, :first].any() and trajectory.token_mask[row].sum() == n
        )
        assert (np.diff(trajectory.turn_ids[row, first:n]) >= 0).all() and (
            trajectory.turn_ids[row, n:] == -1
        ).all()
        for turn, record in enumerate(episode.turns):
            ends = np.flatnonzero((trajectory.turn_ids[row] == turn) & trajectory.action_mask[row])
            if record.status == TurnStatus.SEARCH:
                assert trajectory.search_end[row, turn] == ends[-1] and record.action.endswith(
                    f"<search> {record.query}</search>"
                )
            else:
                assert (
                    record.status == TurnStatus.ANSWER
                    and turn == len(episode.turns) - 1
                    and trajectory.search_end[row, turn] == -1
                )
        # The warning that no more searches are possible stands before the last turn only.
        assert [("No more searches" in record.observation) for record in episode.turns] == [
            turn == 2 for turn in range(len(episode.turns))
        ]
        assert episode.finished and len(episode.turns) <= 4


def test_kinds_of_poor_searching(system):
    """Validation questions have two hops, and three searches are allowed."""
    for episode in script(system, {"vague": 1.0})[1]:
        relation = episode.question.sub_questions[0].queries[0].split()[-1]
        # the words that name the entity are missing, so nothing is found
        assert list(episode.queries) == [relation] * 3
        assert episode.doc_ids == () and episode.answer == episode.queries[-1]
    for episode in script(system, {"repeat": 1.0})[1]:  # with nothing to repeat, the first is vague
        assert len(set(episode.queries)) == 1 and len(episode.queries) == 3
    early = wrong = 0
    for episode in script(system, {"good": 0.5, "early": 0.5})[1]:
        hops = episode.question.sub_questions
        if len(episode.search_turns) < 3 and episode.answer != hops[-1].answer:
            early += 1
            assert episode.answer == hops[0].answer  # the answer to the hop that it had resolved
    for episode in script(system, {"good": 0.5, "wrong": 0.5})[1]:
        accepted = {query for hop in episode.question.sub_questions for query in hop.queries}
        for before, turn in zip(episode.search_turns, episode.search_turns[1:]):
            if turn.query not in accepted and before.doc_ids:
                wrong += 1
                # an entity that was seen, with this relation
                assert any(
                    turn.query.startswith(system.source.documents[i].title) for i in episode.doc_ids
                )
                assert turn.query.split()[-1] in {query.split()[-1] for query in accepted}
    assert early > 2 and wrong > 2


def test_a_script_searches_well_for_the_relations_that_it_knows(system):
    def ask(known_fraction):
        found = {}
        for episode in script(system, {"vague": 1.0}, known_fraction=known_fraction)[1]:
            relation = episode.question.sub_questions[0].queries[0].split()[-1]
            found.setdefault(relation, set()).add(
                episode.queries[0] == episode.question.sub_questions[0].queries[0]
            )
        # a relation is known or it is not
        assert all(len(answers) == 1 for answers in found.values())
        return {relation for relation, answers in found.items() if answers == {True}}, set(found)

    (none, every), (some, _), (more, _), (everything, _) = ask(0.0), ask(0.3), ask(0.6), ask(1.0)
    assert not none and none < some < more < everything == every


def test_the_seed_makes_the_script(system):
    shares = {"good": 0.5, "vague": 0.5}
    first, again, other = (script(system, shares, seed)[0].tokens for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(
    "shares,change,message",
    [
        (
            {"good": 0.5, "lazy": 0.5},
            {},
            r"config.sft.decision_weights .*'lazy'",
        ),
        (
            PERFECT,
            {"max_turn_tokens": 3},
            r"question validation-\d+ .*config.rollout.max_turn_tokens",
        ),
        (
            PERFECT,
            {"context": 60},
            r"question validation-\d+ .*config.rollout.context=60",
        ),
    ],
)
def test_what_the_script_refuses(system, shares, change, message):
    with pytest.raises(ValueError, match=message):
        script(system, shares, settings=dataclasses.replace(system.settings, **change))


# --- demonstrations


def test_demonstrations_of_single_hops_and_of_whole_questions(system):
    whole = demonstrate(system, "train", 24, single_hop=False, poor_fraction=0.0, seed=0)
    single = demonstrate(system, "train", 48, single_hop=True, poor_fraction=0.0, seed=0)
    texts = [[system.tokenizer.decode(row) for row in made.tokens] for made in (whole, single)]
    assert {text.count("<search>") for text in texts[0]} == {2} and {
        text.count("<search>") for text in texts[1]
    } == {1}
    subs = [sub for question in system.splits["train"].questions for sub in question.sub_questions]
    # each of the 48 once
    assert sorted(text.split("\n")[0] for text in texts[1]) == sorted(
        f" Question: {sub.question}" for sub in subs
    )
    for made in (whole, single):
        assert (np.diff(made.length) >= 0).all()
        for row, length in enumerate(made.length):
            assert (
                made.action_mask[row].any()
                and not made.action_mask[row, length:].any()
                and not made.tokens[row, length:].any()
            )
            assert system.tokenizer.decode(made.tokens[row][made.action_mask[row]]).endswith(
                "</answer>"
            )


def test_a_fraction_of_decisions_is_poor(system):
    """At 1 config.sft.decision_weights take every decision (a quarter of them good), at 0 none."""
    good = {
        query
        for question in system.splits["train"].questions
        for sub in question.sub_questions
        for query in sub.queries[:1]
    }

    def share_of_good(poor_fraction):
        made = demonstrate(
            system, "train", 24, single_hop=False, poor_fraction=poor_fraction, seed=3
        )
        queries = [
            part.split("</search>")[0].strip()
            for row in made.tokens
            for part in system.tokenizer.decode(row).split("<search>")[1:]
        ]
        return np.mean([query in good for query in queries])

    assert share_of_good(0.0) == 1.0 > share_of_good(0.5) > share_of_good(1.0) > 0


def test_a_minibatch_comes_from_one_group_of_lengths():
    length = np.array([10, 20, 30, 100, 110, 120, 200, 210, 300])
    tokens = np.where(np.arange(320) < length[:, None], length[:, None], 0).astype(np.int32)
    made, groups = (
        Demonstrations(tokens, tokens > 0, length, ()),
        np.array_split(length, LENGTH_GROUPS),
    )
    widths = set()
    for seed in range(20):
        drawn, mask = made.draw(5, np.random.default_rng(seed))
        (group,) = [group for group in groups if drawn[0, 0] in group]
        assert set(drawn[:, 0]) <= set(group) and drawn.shape == mask.shape == (
            5,
            min(320, -(-group[-1] // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF),
        )
        widths.add(drawn.shape[1])
    assert widths == {64, 128, 256, 320}


def test_single_hops_of_questions_without_any(system, tmp_path):
    """Known before any step, though a later phase is the first that asks them, and though it is
    only the held-out questions that have none.
    """
    config = system.config.copy_and_resolve_references()
    config.sft.phases = ((10, 8, False, 0.0, 0.02), (10, 8, True, 0.0, 0.02))
    for name in ("train", "validation"):
        bare = [
            dataclasses.replace(question, sub_questions=())
            for question in system.splits[name].questions
        ]
        lacking = dataclasses.replace(
            system,
            config=config,
            splits=system.splits | {name: dataclasses.replace(system.splits[name], questions=bare)},
        )
        with pytest.raises(
            ValueError,
            match=f"sft.phases=.* question of {name} .data.kind=atlas.",
        ):
            fine_tune(lacking, None, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the exchange of names


def test_names_are_exchanged_consistently_and_nothing_else(system):
    made = demonstrate(system, "train", 24, single_hop=False, poor_fraction=0.3, seed=0)
    group_of = {int(token): n for n, group in enumerate(made.groups) for token in group}
    rows = np.array([5, 5, 9, 13])
    new, mask = made.take(rows, np.random.default_rng(0))
    assert (mask == made.action_mask[rows]).all() and new.dtype == np.int32
    changed = []
    for old_row, new_row in zip(made.tokens[rows], new):
        exchange = dict(zip(old_row.tolist(), new_row.tolist()))
        # the same word always becomes the same word
        assert [exchange[token] for token in old_row.tolist()] == new_row.tolist()
        assert len(set(exchange.values())) == len(exchange)  # and two words never the same
        for old, became in exchange.items():
            assert group_of.get(old) == group_of.get(became) and (old in group_of or old == became)
        changed.append(sum(old != became for old, became in exchange.items()))
    assert min(changed) > 3 and (new[0] != new[1]).any()  # each row has an exchange of its own
    plain = Demonstrations(made.tokens, made.action_mask, made.length, ())
    assert (plain.take(rows, np.random.default_rng(0))[0] == made.tokens[rows]).all()


def test_an_exchanged_name_stays_in_its_split(system):
    """Name (i, j) of a kind belongs to the split that owns (i + j) mod 4; all pairs of words of all
    kinds, exchanged 5 times.
    """
    groups = tuple(
        np.array([system.tokenizer.encode(f" {word}")[0] for word in words])
        for words in name_groups()
    )
    for kind in KINDS.values():
        pairs = [(i, j) for i in range(len(kind.first)) for j in range(len(kind.second))]
        tokens = np.array(
            [system.tokenizer.encode(f" {kind.first[i]} {kind.second[j]}") for i, j in pairs],
            np.int32,
        )
        made = Demonstrations(tokens, tokens > 0, np.full(len(tokens), 2), groups)
        for seed in range(5):
            new, _ = made.take(np.arange(len(tokens)), np.random.default_rng(seed))
            for (i, j), row in zip(pairs, new):
                first, second = system.tokenizer.decode(row).split()
                assert (kind.first.index(first) + kind.second.index(second)) % 4 == (i + j) % 4


# --- where the first policy comes from


@pytest.mark.slow
def test_the_start_is_given_kept_and_read_again(system, tmp_path):
    given = running.make_searching_params(system, seed=1)
    policy, key, rules = (
        Policy(system.learner_model),
        jax.random.key(2),
        dict(system.config.mesh.train_rules),
    )
    abstract_params, specs = describe_params(policy, system.mesh, rules)

    def start(checkpoint_folder):
        with system.config.unlocked():
            system.config.sft.checkpoint = str(checkpoint_folder)
        try:
            return warm_start(system, abstract_params, specs, key, tmp_path / "run")
        finally:
            system.config.sft.checkpoint = ""

    with pytest.raises(FileNotFoundError, match="nothing"):
        start(tmp_path / "nothing")
    checkpoint.save_params(tmp_path / "given", given)
    # once a run has a start, nothing else is looked at
    for folder in (tmp_path / "given", "", tmp_path / "nothing"):
        np.testing.assert_array_equal(
            start(folder)["params"]["lm_head"], given["params"]["lm_head"]
        )
    fresh, _ = init_params(policy, system.mesh, rules, key)
    jax.tree.map(
        np.testing.assert_array_equal,
        warm_start(system, abstract_params, specs, key, tmp_path / "other"),
        fresh,
    )


def test_a_run_begins_with_pretrained_weights(config, system, tmp_path):
    """Written with fewer rows than the tokenizer has tokens: the missing ones are the mean of the
    others, and the value model has the same trunk.
    """
    given, rows = jax.tree.map(np.asarray, running.make_searching_params(system, seed=1)), 320
    kept = {
        "params": given["params"]
        | {
            "lm_head": given["params"]["lm_head"][:, :rows],
            "trunk": given["params"]["trunk"]
            | {"embedding": given["params"]["trunk"]["embedding"][:rows]},
        }
    }
    export_policy(
        tmp_path / "model",
        kept,
        dataclasses.replace(system.learner_model, vocab_size=rows),
        dtype="float32",
        shard_bytes=1 << 20,
        context=384,
        end_ids=(0,),
        pad_id=0,
        other_files={},
    )
    config = config.copy_and_resolve_references()
    config.model.checkpoint = str(tmp_path / "model")
    pretrained = build_system(
        config, ["train", "validation"], lambda queries: np.full((len(queries), 1), -1, np.int32)
    )
    assert pretrained.learner_model == system.learner_model
    state, reference, _, _ = start.begin_run(pretrained, tmp_path / "run")
    table = given["params"]["trunk"]["embedding"].copy()
    table[rows:] = table[:rows].mean(0)
    np.testing.assert_allclose(reference["params"]["trunk"]["embedding"], table, rtol=0, atol=1e-7)
    output = given["params"]["lm_head"].copy()
    output[:, rows:] = output[:, :rows].mean(1, keepdims=True)
    np.testing.assert_allclose(reference["params"]["lm_head"], output, rtol=0, atol=1e-6)
    for params in (reference, state.policy.params, state.value.params):
        jax.tree.map(
            np.testing.assert_array_equal,
            params["params"]["trunk"]["layers"],
            given["params"]["trunk"]["layers"],
        )

    for change, error, message in [
        (dict(num_layers=7), ValueError, "config.model.num_layers is 7"),
        (dict(checkpoint="no/such"), FileNotFoundError, "config.model.checkpoint=no/such: "),
        (dict(previous_token_peak=1.0), ValueError, "model.previous_token_peak 0"),
    ]:
        bad = config.copy_and_resolve_references()
        bad.model.update(change)
        with pytest.raises(error, match=message):
            build_system(bad, ["train"])
