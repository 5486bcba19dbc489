"""Parts of a user's own, named in a config as "package.module:function".

    reward.step_reward   function(episode, documents) -> one number for each turn of the episode
    search.kind          function(documents, search_config) -> search(queries, k) -> ids

docs/plugins.md describes both with an example.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import operator
import pathlib
import reprlib
import sys
from collections.abc import Callable, Sequence

import numpy as np

from stepsearch_jax.choices import is_plugin
from stepsearch_jax.records import Document, Episode, TurnStatus
from stepsearch_jax.search.cache import describe_search


def load_function(key: str, name: str, *arguments: str) -> Callable:
    """The function that config key `key` names as "package.module:function".

    Modules of the current folder are found. arguments: what it will be called with, in order.
    Raises ValueError, with key and name, if the module cannot be imported, has no such function, or
    the function does not take so many arguments.
    """
    module_name, _, function_name = name.partition(":")
    given = f"config.{key} is {name!r}"
    here = str(pathlib.Path.cwd())
    if here not in sys.path:  # `stepsearch` and pytest start elsewhere than `python -m`
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"{given}, but {module_name} cannot be imported ({type(error).__name__}: {error}); "
            "run from the folder that holds it, or put that folder on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        where = getattr(module, "__file__", None) or module_name
        raise ValueError(f"{given}, but {where} has no function {function_name}")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"{given}; it must take ({', '.join(arguments)}), but takes "
            f"{inspect.signature(function)}"
        ) from error
    return function


def describe_function(function: Callable, name: str) -> dict[str, str]:
    """What results say about a function of the user's: its name and a hash of its file."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # a callable object; the module that the config names holds it
        path = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    code = pathlib.Path(path).read_bytes() if path else b""
    return {"function": name, "code": hashlib.sha256(code).hexdigest()[:16]}


def name_step_reward(step_reward: str) -> str:
    """What the report calls the gain of a search under this reward.step_reward."""
    return step_reward.partition(":")[2] if is_plugin(step_reward) else "gain"


def name_metric(step_reward: str) -> str:
    """What metrics call the gain: a user's name has a prefix, so that it hides no other metric."""
    name = name_step_reward(step_reward)
    return f"reward/{name}" if is_plugin(step_reward) else name


def load_step_reward(name: str) -> Callable:
    """The function that reward.step_reward names (`load_function`)."""
    return load_function("reward.step_reward", name, "episode", "documents")


def score_steps(
    function: Callable,
    name: str,
    episodes: Sequence[Episode],
    documents: Sequence[Document],
    num_turns: int,
) -> np.ndarray:
    """function(episode, documents of the corpus) for all episodes -> [B, K] float32.

    name: reward.step_reward, for messages. Numbers count only on turns whose search succeeded;
    others are set to 0. Raises ValueError if the function fails, or does not return one finite
    number for each turn.
    """
    scores = np.zeros((len(episodes), num_turns), np.float32)
    for b, episode in enumerate(episodes):
        try:
            returned = function(episode, documents)
        except Exception as error:
            raise ValueError(
                f"reward.step_reward ({name}) failed at question {episode.question.uid} "
                f"({type(error).__name__}: {error})"
            ) from error
        try:
            numbers = np.asarray(returned, float)
            fits = numbers.shape == (len(episode.turns),) and np.isfinite(numbers).all()
        except (TypeError, ValueError):  # no list of numbers
            numbers, fits = np.zeros(0), False
        if not fits:
            raise ValueError(
                f"reward.step_reward ({name}) returned {reprlib.repr(returned)} for an episode of "
                f"{len(episode.turns)} turns (question {episode.question.uid}): return a list with "
                "one finite number for each turn"
            )
        for k, turn in enumerate(episode.turns[:num_turns]):
            if turn.status == TurnStatus.SEARCH and turn.search_ok:
                scores[b, k] = numbers[k]
    return scores


class PluginIndex:
    """N documents behind a search function of the user's, in the form of the other indexes.

    name: the config's search.kind; corpus: the hash of the documents. Raises ValueError if the
    function cannot be loaded or does not return something callable.
    """

    def __init__(self, name: str, documents: Sequence[Document], corpus: str, search_config):
        make_search = load_function("search.kind", name, "documents", "search_config")
        self._size, self._corpus = len(documents), corpus
        self._search = make_search(documents, search_config)
        self._about = describe_function(make_search, name)
        if not callable(self._search):
            raise ValueError(
                f"config.search.kind is {name!r}; it must return a function search(queries, k), "
                f"but returned {type(self._search).__name__}"
            )

    def __len__(self) -> int:
        return self._size

    def describe(self, k: int) -> dict:
        """The manifest of results for k documents (`cache.describe_search`)."""
        about = dict(self._about)
        return describe_search(self._corpus, len(self), about.pop("function"), k, about)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [q, k] int32, best first, -1 where there are no more; scores [q, k] float32).

        Scores are those of the rank, 1 / (rank + 1), as the function returns ids alone. Raises
        ValueError for an answer that is not up to k different documents of the corpus a query.
        """
        found = self._search(list(queries), k)
        ids, scores = np.full((len(queries), k), -1, np.int32), np.zeros((len(queries), k))
        called = f"search.kind ({self._about['function']})"
        if len(found) != len(queries):
            raise ValueError(f"{called} answered {len(found)} of {len(queries)} queries")
        for row, (query, best) in enumerate(zip(queries, found)):
            try:
                numbers = [operator.index(i) for i in best]
            except TypeError:
                numbers = [self._size]  # no ids at all
            numbers = [i for i in numbers if i != -1]  # padding
            allowed = all(0 <= i < self._size for i in numbers)
            if len(numbers) > k or len(set(numbers)) < len(numbers) or not allowed:
                raise ValueError(
                    f"{called} found documents {reprlib.repr(best)} for {query!r}: return at most "
                    f"{k} different ids, whole numbers from 0 to {self._size - 1}"
                )
            ids[row, : len(numbers)] = numbers
            scores[row, : len(numbers)] = 1 / (1 + np.arange(len(numbers)))
        return ids, scores.astype(np.float32)
