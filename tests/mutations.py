"""Deliberate faults: each is put into a copy of the repository, and its tests must fail.

    python tests/mutations.py             all of them, about half a minute each
    python tests/mutations.py whiten clip those with one of these words in their name

Prints a line for each and exits 1 when one is missed. docs/losses.md lists them;
tests/test_mutations.py checks that list and that every fault still applies.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

REPO = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("stepsearch_jax", "configs", "tests", "docs", "pyproject.toml")
PLACEMENT, ADVANTAGES, LOSSES, LEARNER = (
    f"stepsearch_jax/{name}.py"
    for name in ("rewards/placement", "rl/advantages", "rl/losses", "rl/learner")
)
MICROBATCHES = "stepsearch_jax/rl/microbatches.py"
SCORING, MASKING = "stepsearch_jax/rewards/scoring.py", "stepsearch_jax/masking.py"


class Fault(NamedTuple):
    name: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    tests: str  # files in tests/ that concern it


FAULTS = (
    Fault(
        "a step reward one token too early",
        PLACEMENT,
        "search_end[:, :, None] == position",
        "search_end[:, :, None] - 1 == position",
        "test_placement.py",
    ),
    Fault(
        "the outcome always overwrites",
        PLACEMENT,
        "jnp.where(is_last, 0, step) if outcome_overwrites else step",
        "jnp.where(is_last, 0, step)",
        "test_placement.py",
    ),
    Fault(
        "merging loses the step rewards",
        PLACEMENT,
        "rewards.sum(axis=1, keepdims=True)",
        "outcome_rewards[:, None]",
        "test_placement.py",
    ),
    Fault(
        "a later, worse query overwrites a better one",
        SCORING,
        'if key_match == "max":',
        'if key_match != "max":',
        "test_scoring.py",
    ),
    Fault(
        "a query that fits nothing overwrites",
        SCORING,
        "if best > 0:",
        "if True:",
        "test_scoring.py",
    ),
    Fault(
        "half an answer ends a text",
        SCORING,
        '"<answer>" in text[text',
        'bool(text) or "<answer>" in text[text',
        "test_scoring.py",
    ),
    Fault(
        "redundancy is rewarded",
        SCORING,
        "gain * use_gain - redundancy * use_redundancy",
        "gain * use_gain + redundancy * use_redundancy",
        "test_scoring.py",
    ),
    Fault(
        "the KL has its sign flipped",
        ADVANTAGES,
        "placed - kl_coef * kl if",
        "placed + kl_coef * kl if",
        "test_advantages.py",
    ),
    Fault(
        "the KL is charged in the reward and in the loss",
        ADVANTAGES,
        'kl_coef * kl if kl_placement == "reward" else placed',
        "kl_coef * kl",
        "test_advantages.py",
    ),
    Fault(
        "GAE steps through observations",
        ADVANTAGES,
        "jnp.where(keep, value, next_value),\n"
        "            jnp.where(keep, advantage, next_advantage),",
        "value, advantage,",
        "test_advantages.py",
    ),
    Fault(
        "GAE forgets lambda",
        ADVANTAGES,
        "gamma * gae_lambda * next_advantage",
        "gamma * next_advantage",
        "test_advantages.py",
    ),
    Fault(
        "whitening over observations",
        ADVANTAGES,
        "whiten(advantages, covered)",
        "whiten(advantages, turn_ids >= 0)",
        "test_advantages.py",
    ),
    Fault(
        "wide GAE reaches into the prompt",
        ADVANTAGES,
        "token_mask & (turn_ids >= 0) if over",
        "token_mask if over",
        "test_advantages.py",
    ),
    Fault(
        "turn GAE trains every value",
        ADVANTAGES,
        "action_mask, starts), returns, starts",
        "action_mask, starts), returns, action_mask",
        "test_advantages.py",
    ),
    Fault(
        "a turn's reward is its first token's",
        ADVANTAGES,
        "total = following + value",
        "total = value",
        "test_advantages.py",
    ),
    Fault(
        "an absent episode counts in its group",
        ADVANTAGES,
        "action_mask.any(axis=1, keepdims=True)",
        "jnp.ones_like(action_mask.any(axis=1, keepdims=True))",
        "test_advantages.py",
    ),
    Fault(
        "the leave-one-out mean holds the episode itself",
        ADVANTAGES,
        " & ~jnp.eye(len(group_ids), dtype=bool)",
        "",
        "test_advantages.py",
    ),
    Fault(
        "an episode that has ended is left out of the comparison of turns",
        ADVANTAGES,
        "here = starts & (number == jnp.minimum(k, last))",
        "here = starts & (number == k)",
        "test_advantages.py",
    ),
    Fault(
        "groups are runs of neighbouring rows",
        MASKING,
        "same = group_ids[:, None] == group_ids",
        "runs = jnp.cumsum(jnp.diff(group_ids, prepend=0) != 0); same = runs[:, None] == runs",
        "test_masking.py",
    ),
    Fault(
        "an empty mask divides by zero",
        MASKING,
        "/ jnp.maximum(mask.sum(axis), 1)",
        "/ mask.sum(axis)",
        "test_masking.py",
    ),
    Fault(
        "the policy loss has its sign flipped",
        LOSSES,
        "loss = -mean(jnp.minimum",
        "loss = mean(jnp.minimum",
        "test_losses.py",
    ),
    Fault(
        "the clip bounds are swapped",
        LOSSES,
        "clip(ratio, 1 - clip_low, 1 + clip_high)",
        "clip(ratio, 1 - clip_high, 1 + clip_low)",
        "test_losses.py",
    ),
    Fault(
        "the larger of the clipped terms",
        LOSSES,
        "jnp.minimum(unclipped, clipped)",
        "jnp.maximum(unclipped, clipped)",
        "test_losses.py",
    ),
    Fault(
        "a cut ratio loses its gradient",
        LOSSES,
        "ratio = ratio * jax.lax.stop_gradient(jnp.minimum(1, max_ratio / ratio))",
        "ratio = jnp.minimum(ratio, max_ratio)",
        "test_losses.py",
    ),
    Fault(
        "the policy loss drops its mask",
        LOSSES,
        "aggregate, mask=action_mask",
        "aggregate, mask=jnp.ones_like(action_mask)",
        "test_losses.py",
    ),
    Fault(
        "the value loss takes the smaller error",
        LOSSES,
        "jnp.maximum(unclipped, clipped)",
        "jnp.minimum(unclipped, clipped)",
        "test_losses.py",
    ),
    Fault(
        "returns carry a gradient",
        LOSSES,
        "old_values, returns = jax.lax.stop_gradient((old_values, returns))\n",
        "\n",
        "test_losses.py",
    ),
    Fault(
        "entropy is punished",
        LOSSES,
        "policy - entropy_coef * bonus",
        "policy + entropy_coef * bonus",
        "test_losses.py",
    ),
    Fault(
        "the KL loss turns the divergence round",
        LOSSES,
        "kl_penalty(logprobs, ref_logprobs, estimator=estimator)",
        "kl_penalty(ref_logprobs, logprobs, estimator=estimator)",
        "test_losses.py",
    ),
    Fault(
        "sequence means are sums",
        LOSSES,
        "masked_mean(x, mask, axis=1).sum()",
        "masked_sum(x, mask)",
        "test_losses.py",
    ),
    Fault(
        "a micro-batch is divided by its own count",
        LEARNER,
        "part, normalizers[name], kl_coef",
        "part, loss_normalizer({'policy': part.action_mask, 'value': part.value_mask}[name], "
        "aggregation=aggregation), kl_coef",
        "test_learner.py -k same_update",
    ),
    Fault(
        "one finite gradient is enough for a step",
        LEARNER,
        ".values()))).all()",
        ".values()))).any()",
        "test_learner.py -k not_finite",
    ),
    Fault(
        "the learner cuts no ratio",
        LEARNER,
        "max_ratio=settings.max_ratio",
        "max_ratio=jnp.inf",
        "test_learner.py",
    ),
    Fault(
        "the sampler's log-probabilities are not used",
        LEARNER,
        "old[0] if by_learner else trajectory.sampler_logprobs",
        "old[0] if by_learner else ref_logprobs",
        "test_build_batch.py",
    ),
    Fault(
        "groups are not passed on",
        LEARNER,
        "trajectory.group_ids,",
        "jnp.arange(len(mask)),",
        "test_build_batch.py",
    ),
    Fault(
        "rows stay in the order of their lengths",
        MICROBATCHES,
        "back = jnp.argsort(order)",
        "back = jnp.arange(len(order))",
        "test_microbatches.py",
    ),
    Fault(
        "a micro-batch loses the end of its longest row",
        MICROBATCHES,
        "reshape(parts, -1)[:, -1]",
        "reshape(parts, -1)[:, 0]",
        "test_microbatches.py",
    ),
    Fault(
        "padding counts the shortest row's width",
        MICROBATCHES,
        "sum() * (len(lengths) // parts)",
        "min() * len(lengths)",
        "test_microbatches.py",
    ),
)


def apply(fault: Fault, root: pathlib.Path) -> None:
    """Raises ValueError unless the fault's text is in its file exactly once."""
    source = (root / fault.file).read_text()
    count = source.count(fault.old)
    if count != 1:
        raise ValueError(
            f"{fault.name!r}: {fault.old!r} is {count} times in {fault.file}, not once; correct"
            " the text in tests/mutations.py"
        )
    (root / fault.file).write_text(source.replace(fault.old, fault.new))


def run_tests(root: pathlib.Path, tests: str) -> int:
    """pytest's exit code: 0 all passed, 1 some failed, more: they did not run."""
    file, *options = tests.split()
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "--slow", "-p", "no:cacheprovider"]
    command = [*pytest, f"tests/{file}", *options]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.run(command, cwd=root, **silent).returncode


def check(tests: str, fault: Fault | None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder) / "copy"
        for name in COPIED:
            source = REPO / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            copy(source, root / name)
        if fault:
            apply(fault, root)
        return run_tests(root, tests)


def main(words: list[str]) -> int:
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    for tests in dict.fromkeys(fault.tests for fault in chosen):
        if check(tests, None):
            print(f"{tests} fails without any fault; make it pass first")
            return 1
    missed = 0
    for fault in chosen:
        caught = check(fault.tests, fault) == 1
        missed += not caught
        word = "caught" if caught else "MISSED"
        print(f"{word}  {fault.name}  ({fault.file}, {fault.tests})", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return int(missed > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
