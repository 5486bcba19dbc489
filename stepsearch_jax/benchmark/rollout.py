"""Multi-turn rollouts against loops around other samplers, and against lock step.

Such loops read the whole context again each turn. Both sides have the same weights (4 layers of
width 256, random; or the sizes and types of --config, such as configs/musique_qwen2_5.py:0.5b),
prompts, observations and token budgets, and sample at temperature 1 without top-k or top-p.
A random policy writes no tags, so the searches are scripted over really sampled tokens: a turn ends
after a given number of them, and every search finds the same made-up observation. The run ends with
an error unless both sides' logits after the prompts, computed in float32, agree to 1e-3 and every
episode has the turns of its case.

Cases (--episodes changes how many episodes they have):
  short   16 episodes, prompt 128, 4 turns of 64 sampled tokens, 3 observations of 192
  long    8 episodes, prompt 512, 6 turns of 128, 5 observations of 600
  turns   the short one with 1, 2, 4 and 8 turns
  decode  64 episodes, prompt 128, 512 sampled tokens
  slots   64 episodes of 64, 128, 256 or 512 tokens in 16 slots, which take the next prompt as soon
          as they are free, against groups of 16 that wait for their longest

Peers: transformers calls torch's `generate` once a turn; tunix calls its sampler once a turn,
compiled for each turn's length. Even with the peer "none", which is the default, the case slots is
compared with lock step. "floor" is the least time that this machine needs for the arithmetic and
the memory traffic, from rates measured here (benchmark/roofline.py has the formula).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from stepsearch_jax.benchmark import roofline, sample_model
from stepsearch_jax.benchmark.cases import CASES, LOCK_STEP, Case
from stepsearch_jax.benchmark.peers.process import Peer
from stepsearch_jax.benchmark.scripted import Inputs, check_episodes, find_logits, make_run, start
from stepsearch_jax.benchmark.timing import alternate, time_call
from stepsearch_jax.models.architecture import ModelConfig


def measure(
    *,
    repeats: int,
    seed: int,
    case: Sequence[str],
    peer: str,
    peer_python: str,
    config: ml_collections.ConfigDict | None = None,
    episodes: int | None = None,
    cases: dict[str, tuple[Case, ...]] = CASES,
    model: ModelConfig | None = None,
) -> dict:
    """-> figures of the cases: "ours_s", "peer_s" (medians), "ratio" = peer / ours, "floor_s".

    At the top level are those of the first case with that peer ("case").

    peer: "none", "transformers" or "tunix"; peer_python: the interpreter that has it; config: whose
    model to run, None = `sample_model.MODEL`; episodes: instead of each case's own.
    Raises ImportError if the peer is not installed, ValueError if it computes something else.
    """
    if peer != "none" and set(case) == {"slots"}:
        raise ValueError(
            f"--peer={peer}: the case slots is compared with {LOCK_STEP} of our own; leave --peer "
            "out, or add a case"
        )
    cases = {name: tuple(part.resize(episodes) for part in cases[name]) for name in case}
    start()
    model = model or sample_model.choose_models(config, peer)[1]
    rates = roofline.RateBook(model)
    found = {}
    for name in case:
        if name == "slots":
            found[name] = measure_slots(model, cases[name][0], repeats, seed)
        else:
            arguments = (repeats, seed, peer, peer_python, rates)
            parts = [measure_case(model, part, *arguments) for part in cases[name]]
            found[name] = parts[0] if len(parts) == 1 else join_turns(parts)
    first = next((name for name in case if name != "slots"), "slots")
    return {name: found[first][name] for name in ("ours_s", "peer_s", "ratio")} | {
        "case": first,
        "peer": LOCK_STEP if first == "slots" else peer,
        "cases": found,
        "model": sample_model.describe(model),
        "repeats": repeats,
        "seed": seed,
        "jax": jax.__version__,
        "device": str(jax.devices()[0]),
    }


def measure_case(
    model: ModelConfig,
    case: Case,
    repeats: int,
    seed: int,
    peer: str,
    peer_python: str,
    rates: roofline.RateBook,
) -> dict:
    """Times our rollout and the peer's loop in turn."""
    inputs = Inputs.draw(model, case, seed)
    with contextlib.ExitStack() as stack:
        # The peer's process, with our weights and inputs. It must compute our logits.
        sides = {}
        if peer != "none":
            job = dict(
                seed=seed,
                model=sample_model.describe(model),
                turns=case.turns,
                turn_tokens=case.turn_tokens[0],
                length=case.context,
            )
            arrays = sample_model.name_arrays(inputs.params)
            arrays |= {"prompts": inputs.prompts, "observation": inputs.observation}
            other = stack.enter_context(Peer(f"{peer}_rollout", peer_python, job, arrays))
            logits = find_logits(model, inputs)
            difference = sample_model.check_logits(peer, logits, other.checks["logits"])
            sides["peer"] = lambda: other.run("rollout")

        # Both sides in turn, and one more run of ours for its times between searches.
        rollout, clock = make_run(model, case, inputs, case.episodes)
        trajectory, counters = rollout(slice(None))
        check_episodes(case, trajectory, counters)
        times = alternate({"ours": lambda: time_call(rollout, slice(None))[0]} | sides, repeats)
        spent, _ = time_call(rollout, slice(None))

    # The figures, with the least time that this machine needs.
    least = find_floor(model, case, rates)
    ours, floor = times["ours"]["median_s"], sum(part["least_s"] for part in least.values())
    figures = {
        "ours_s": ours,
        "peer_s": None,
        "ratio": None,
        "floor_s": floor,
        "ours_to_floor": ours / floor,
        "ours": times["ours"],
    }
    if sides:
        theirs = times["peer"]["median_s"]
        figures |= {
            "peer_s": theirs,
            "ratio": theirs / ours,
            "peer": times["peer"] | other.versions,
            "largest_logit_difference": difference,
        }
    steps, flushes, _ = np.asarray(counters).max(0).tolist()  # of the busiest device
    prefilled = int(np.asarray(counters)[:, 2].sum())  # of all devices
    sampled = int(np.asarray(trajectory.action_mask).sum())
    return figures | {
        "sampled_tokens": sampled,
        "sampled_tokens_s": sampled / ours,
        "roofline": least,
        "prefilled_tokens": prefilled,
        "decode_steps": steps,
        "flushes": flushes,
        "one_run": clock.describe(spent),
        "devices": len(counters),
        "size": dataclasses.asdict(case),
    }


def join_turns(parts: Sequence[dict]) -> dict:
    """Cases that differ in their number of turns -> their figures.

    "doubling": how many times as long twice the turns took.
    """
    last = {name: parts[-1][name] for name in ("ours_s", "peer_s", "ratio")}
    pairs = list(itertools.pairwise(parts))
    return last | {
        "parts": list(parts),
        "doubling": [more["ours_s"] / less["ours_s"] for less, more in pairs],
        "peer_doubling": [
            more["peer_s"] / less["peer_s"] for less, more in pairs if less["peer_s"]
        ],
    }


def measure_slots(model: ModelConfig, case: Case, repeats: int, seed: int) -> dict:
    """Times slots that are filled again against groups of as many episodes, which end together.

    Raises ValueError if their tokens differ.
    """
    # Two programs over the same inputs: all episodes in slots, and one group at a time.
    inputs = Inputs.draw(model, case, seed)
    in_slots, _ = make_run(model, case, inputs, case.episodes)
    group_case = dataclasses.replace(case, slots=0, prefill_rows=case.slots)
    one_group, _ = make_run(model, group_case, inputs, case.slots)
    groups = [slice(first, first + case.slots) for first in range(0, case.episodes, case.slots)]
    in_lock_step = lambda: [one_group(group) for group in groups]

    # Both sample the same tokens.
    trajectory, counters = in_slots(slice(None))
    check_episodes(case, trajectory, counters)
    other, other_counters = zip(*in_lock_step())
    other_tokens = np.concatenate([np.asarray(found.tokens) for found in other])
    if not np.array_equal(np.asarray(trajectory.tokens), other_tokens):
        raise ValueError("episodes in slots and in groups have different tokens: one side is wrong")

    # Their times, and decode steps of the busiest device.
    sides = {
        "ours": lambda: time_call(in_slots, slice(None))[0],
        "peer": lambda: time_call(in_lock_step)[0],
    }
    times = alternate(sides, repeats)
    ours, theirs = times["ours"]["median_s"], times["peer"]["median_s"]
    count_steps = lambda counted: int(np.asarray(counted)[:, 0].max())
    return {
        "ours_s": ours,
        "peer_s": theirs,
        "ratio": theirs / ours,
        "ours": times["ours"],
        "peer": times["peer"] | {"name": LOCK_STEP},
        "sampled_tokens": int(np.asarray(trajectory.action_mask).sum()),
        "decode_steps": count_steps(counters),
        "peer_decode_steps": sum(map(count_steps, other_counters)),
        "devices": len(counters),
        "size": dataclasses.asdict(case),
    }


def list_work(model: ModelConfig, case: Case) -> tuple[list[roofline.Work], list[roofline.Work]]:
    """-> (prefills, decode steps) of a case with turns of one length and rows that run together."""
    prefills, steps, context = [], [], 0
    for turn in range(case.turns):
        # The prefill of an observation reads the last sampled token too; its own last token is left
        # to a decode step, like the prompt's.
        read = case.observation if turn else case.prompt - 1
        prefills.append(roofline.prefill(model, case.episodes, read, context + read))
        context += read
        steps += [
            roofline.decode_step(model, case.episodes, context + 1 + i)
            for i in range(case.turn_tokens[0])
        ]
        context += case.turn_tokens[0]
    return prefills, steps


def find_floor(model: ModelConfig, case: Case, rates: roofline.RateBook) -> dict[str, dict]:
    """The least times of the prefills and of the decode steps of a case (`Rates.describe`)."""
    prefills, steps = list_work(model, case)
    widest = case.episodes * max(case.prompt, case.observation)
    return {
        "prefill": rates.at(steps[-1].bytes, widest, unembeds=False).describe(prefills),
        "decode step": rates.at(steps[-1].bytes, case.episodes, unembeds=True).describe(steps),
    }


def render(figures: dict) -> str:
    """The figures as a table."""
    peer = f"peer ({figures['peer']})"
    rows = [("case", "ours", peer, "peer / ours", "floor", "ours / floor", "prefilled")]
    lines = []
    number = lambda value, unit: "" if value is None else f"{value:.2f}{unit}"
    for name, found in figures["cases"].items():
        for part in found.get("parts", [found]):
            label = f"{name}, {part['size']['turns']} turns" if "parts" in found else name
            rows.append(
                (
                    label,
                    number(part["ours_s"], " s"),
                    number(part["peer_s"], " s"),
                    number(part["ratio"], "x"),
                    number(part.get("floor_s"), " s"),
                    number(part.get("ours_to_floor"), "x"),
                    str(part.get("prefilled_tokens", "")),
                )
            )
            if "roofline" in part:
                lines.append(f"{label}: {part['sampled_tokens_s']:,.0f} sampled tokens a second")
                for kind, least in part["roofline"].items():
                    lines.append(f"    {roofline.render(kind, least)}")
    lines = ["".join(f"{cell:>20}" for cell in row) for row in rows] + lines
    if "turns" in figures["cases"]:
        doubling = ", ".join(f"{x:.2f}" for x in figures["cases"]["turns"]["doubling"])
        lines.append(f"twice the turns take {doubling} times as long")
    if "slots" in figures["cases"]:
        lines.append("slots: the peer is lock step, groups of as many episodes as there are slots")
    return "\n".join([f"medians of {figures['repeats']} alternating runs", *lines])
