"""Episodes of text made from turns, and similarities from a table, for the tests of scoring."""

from __future__ import annotations

import numpy as np

from stepsearch_jax.records import Episode, Question, SubQuestion, Turn, TurnStatus

PAPER = dict(
    gain=None,
    num_turns=4,
    format_gate="strict",
    format_failure="zero_answer",
    gamma_key=0.618,
    key_match="max",
    use_gain=True,
    use_redundancy=True,
    redundancy_scope="earlier_turns",
    step_scale=1.0,
    search_cost=0.0,
    retrieved_answer_credit=0.0,
    rendered=None,
    texts=None,
)


class TableSimilarity:
    """Cosines from a table [gold id, doc id], so that a case can be worked by hand."""

    def __init__(self, table):
        self.table = np.array(table, float)

    def similarity(self, gold_ids, doc_ids, next_ranks=None):
        most = max(map(len, gold_ids))
        blocks = [
            np.pad(self.table[np.ix_(gold, docs)], ((0, most - len(gold)), (0, 0)))
            for gold, docs in zip(gold_ids, doc_ids)
            if gold
        ]
        return np.concatenate(blocks, axis=1)


NOTHING_SIMILAR = TableSimilarity(np.zeros((20, 20)))


def search(query, *doc_ids, ok=True, think="", observation=""):
    return Turn(
        TurnStatus.SEARCH,
        f"{think}<search>{query}</search>",
        query,
        None,
        tuple(doc_ids),
        ok,
        observation,
    )


def answer(text, before="", after=""):
    return Turn(TurnStatus.ANSWER, f"{before}<answer>{text}</answer>{after}", answer=text)


def invalid(action, observation="<warning>…</warning>"):
    return Turn(TurnStatus.INVALID, action, observation=observation)


def make_question(gold=(), keys=((),), answers=("Paris",)):
    """One sub-question per entry of `keys`; all gold documents belong to the first."""
    subs = tuple(
        SubQuestion("?", "!", (), tuple(gold) if i == 0 else (), tuple(queries))
        for i, queries in enumerate(keys)
    )
    return Question("q0", "Where?", answers[0], tuple(answers[1:]), subs)


def make_episode(*turns, question=None, truncated=False):
    finished = bool(turns) and turns[-1].status == TurnStatus.ANSWER
    return Episode(
        question or make_question(),
        "prompt <search> <answer> </answer>",
        tuple(turns),
        finished,
        truncated,
    )
