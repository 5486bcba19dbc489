"""Everything the policy reads that is not a document: prompts, and the environment's fixed texts.

In the environment's texts every word follows a space, so that word-level vocabularies read whole
words; byte-pair encodings do not mind. Text and token ids never disagree: an observation is always
composed from ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from stepsearch_jax.prompting.tags import TAGS
from stepsearch_jax.records import Document
from stepsearch_jax.search.observations import EnvironmentTokens

ALL_TAGS = (
    *TAGS,
    "<think>",
    "</think>",
    "<information>",
    "</information>",
    "<warning>",
    "</warning>",
)

# ALL_TAGS have places in word-level vocabularies, whose ids must stay; a policy may know more.
KNOWN_TAGS = (*ALL_TAGS, "<plan>", "</plan>", "<observation>", "</observation>")

OBSERVATION_HEAD = "\n<information>"
OBSERVATION_TAIL = "\n</information>\n"
RANK = "\n Doc {rank} <## Title:"
DOCUMENT = " {title} ##> {text}"
NOTHING_FOUND = "\n Nothing was found."
SEARCH_FAILED = "\n The search failed."
INVALID_WARNING = (
    "\n<warning> The last turn had no valid action. Search with <search> query </search> or answer "
    "with <answer> answer </answer>. </warning>\n"
)
LAST_TURN_WARNING = (
    "\n<warning> No more searches are possible. Answer now with <answer> answer </answer>. "
    "</warning>\n"
)

MAX_RANK = 10  # ranks that the words of the short template cover

PAPER = """\
Answer the question at the end. You do not have to know the facts: you can search for them, one at \
a time.
Work in turns. Begin each turn by reasoning between <think> and </think>: what is known so far, \
what is missing, what to find next.
Then end the turn in one of two ways:
- <search> a short query </search> asks a search engine for one missing fact. What it finds comes \
back between <information> and </information>.
- <answer> the answer </answer> ends the work. Give only the answer, a few words without \
explanation.
Break a question with several parts into single facts, and do not repeat a search that has already \
been made. The number of turns is limited, and a turn without a search or an answer is wasted.

An example:
Question: In which year was the university founded at which the author of The Glass Orchard studied?
<think> First I need the author of The Glass Orchard. </think>
<search> author of The Glass Orchard </search>
<information>
 Doc 1 <## Title: The Glass Orchard ##> The Glass Orchard is a novel by Miriam Aldous, first \
published in 1961.
</information>
<think> The author is Miriam Aldous. Next I need the university at which she studied. </think>
<search> Miriam Aldous university studies </search>
<information>
 Doc 1 <## Title: Miriam Aldous ##> Miriam Aldous was a novelist. She read history at the \
University of Veldmark.
</information>
<think> She studied at the University of Veldmark. Now I need the year in which it was founded. \
</think>
<search> University of Veldmark founded year </search>
<information>
 Doc 1 <## Title: University of Veldmark ##> The University of Veldmark is a public university. It \
was founded in 1824.
</information>
<think> The University of Veldmark was founded in 1824. </think>
<answer> 1824 </answer>

Question: {question}
"""

REFERENCE = """\
Answer the question at the end with the help of a search engine.
First write a plan between <plan> and </plan>: the sub-questions to settle, in order.
Then, for each sub-question, write one query between <search> and </search>.
What the engine finds is shown to you between <information> and </information>.
Note between <observation> and </observation> what it tells you, and correct the plan if need be. \
You may search several times.
As soon as you know enough, write the answer, a few words without explanation, between <answer> \
and </answer>.
For example: <answer> Lisbon </answer>.

Question: {question}
"""

SHORT = " Question: {question}\n"

# Two examples with answers of two kinds: after a single one, a year, a small model answered every
# question with a year.
DIRECT = """\
Answer the question at the end from what you know. Write the answer, a few words without \
explanation, between <answer> and </answer>.

Two examples:
Question: In which year was the university founded at which the author of The Glass Orchard studied?
<answer> 1824 </answer>

Question: Who wrote the novel on which the film A Winter of Salt is based?
<answer> Edda Marrow </answer>

Question: {question}
"""

READ = """\
Answer the question at the end with the help of the documents between <information> and \
</information>. Write the answer, a few words without explanation, between <answer> and </answer>.

Two examples:
Question: In which year was the university founded at which the author of The Glass Orchard studied?
<information>
 Doc 1 <## Title: The Glass Orchard ##> The Glass Orchard is a novel by Miriam Aldous, who read \
history at the University of Veldmark.
 Doc 2 <## Title: University of Veldmark ##> The University of Veldmark is a public university. It \
was founded in 1824.
</information>
<answer> 1824 </answer>

Question: Who wrote the novel on which the film A Winter of Salt is based?
<information>
 Doc 1 <## Title: A Winter of Salt ##> A Winter of Salt is a drama film of 1987. It follows the \
novel The Salt Road.
 Doc 2 <## Title: The Salt Road ##> The Salt Road is a novel by Edda Marrow about three sisters on \
a journey.
</information>
<answer> Edda Marrow </answer>

Question: {question}
"""

TEMPLATES = {"paper": PAPER, "reference": REFERENCE, "short": SHORT}
# Prompts without search: (without documents, with documents).
BASELINES = {"paper": (DIRECT, READ), "reference": (DIRECT, READ), "short": (SHORT, SHORT)}


def render_prompt(template: str, question: str) -> str:
    """The prompt for a question; `template` is one of "paper", "reference", "short".

    Raises ValueError for another name or an empty question.
    """
    if template not in TEMPLATES:
        raise ValueError(
            f"prompt template {template!r} does not exist; there are {', '.join(TEMPLATES)}"
        )
    if not question.strip():
        raise ValueError("the question is empty")
    return TEMPLATES[template].replace("{question}", question.strip())


def render_baseline(template: str, question: str, with_documents: bool) -> str:
    """The prompt of a policy that cannot search and answers at once, in the style of `template`.

    Documents follow the prompt, as an observation.
    """
    return BASELINES[template][with_documents].replace("{question}", question.strip())


def render_document(document: Document) -> str:
    """Title and text of a document, as they follow the rank's prefix in an observation."""
    return DOCUMENT.format(title=document.title, text=document.text)


def encode_environment(tokenize: Callable[[str], list[int]], k: int) -> EnvironmentTokens:
    """The environment's texts as token ids, with prefixes for k ranks.

    tokenize: text -> token ids. Raises ValueError if k < 1.
    """
    if k < 1:
        raise ValueError(f"k = {k}: a search returns at least one document")

    def encode(text: str) -> np.ndarray:
        return np.array(tokenize(text), np.int32)

    return EnvironmentTokens(
        head=encode(OBSERVATION_HEAD),
        ranks=tuple(encode(RANK.format(rank=rank)) for rank in range(1, k + 1)),
        tail=encode(OBSERVATION_TAIL),
        nothing_found=encode(NOTHING_FOUND),
        search_failed=encode(SEARCH_FAILED),
        invalid_warning=encode(INVALID_WARNING),
        last_turn_warning=encode(LAST_TURN_WARNING),
    )


def list_short_words() -> list[str]:
    """The words of the short template and of the environment's texts, without tags.

    A word-level vocabulary needs them in addition to the data's own words.
    """
    ranks = "".join(RANK.format(rank=rank) for rank in range(1, MAX_RANK + 1))
    blanks = (SHORT.format(question=""), DOCUMENT.format(title="", text=""))
    warnings = (NOTHING_FOUND, SEARCH_FAILED, INVALID_WARNING, LAST_TURN_WARNING)
    text = " ".join([*blanks, ranks, *warnings])
    return list(dict.fromkeys(re.sub("|".join(ALL_TAGS), " ", text).split()))
