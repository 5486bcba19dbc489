"""Whether a run fits its chips, all that stays resident included, and what would help if not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import ml_collections

from stepsearch_jax import sharding
from stepsearch_jax.preflight.programs import Compiled, describe_parts, make_mesh

LEARNER = ("policy", "policy_optimizer", "value", "value_optimizer", "reference")
SAMPLER = ("rollout_copy", "environment")
# What train.py holds on the device while a program runs; the program's own temporaries, results and
# code come on top. The rollout's copy is dropped as soon as its episodes are there; a trajectory
# and a batch stay until the next ones replace them.
KEPT = {
    "copy": (*LEARNER, "environment"),
    "rollout": (*LEARNER, *SAMPLER),
    "score": (*LEARNER, "environment"),
    "update": (*LEARNER, "environment"),
}
# The parts of it that a program reads.
ARGUMENTS = {
    "copy": ("policy",),
    "rollout": SAMPLER,
    "score": ("policy", "value", "reference"),
    "update": ("policy", "policy_optimizer", "value", "value_optimizer"),
}


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on one chip while one program runs.

    A program that the compiler refused has everything except its arguments as temporaries.
    """

    kept: float  # parameters, optimiser state and the like, whether the program reads them or not
    rows: float  # trajectory and batch
    temporaries: float
    fresh: float  # results that do not take the place of a donated argument
    code: float  # of all programs

    @property
    def total(self) -> float:
        return self.kept + self.rows + self.temporaries + self.fresh + self.code


@dataclasses.dataclass(frozen=True)
class Verdict:
    needs: dict[str, Need]
    worst: str  # the phase that needs most
    hbm: float  # bytes that a chip offers

    @property
    def fits(self) -> bool:
        return self.needs[self.worst].total <= self.hbm


@dataclasses.dataclass(frozen=True)
class Lever:
    name: str  # mesh, slots, micro-batch, remat, cache type
    change: str
    saved: float  # bytes on one chip, while the worst program runs


def judge(parts: Mapping[str, float], compiled: Mapping[str, Compiled], hbm: float) -> Verdict:
    """parts: name -> bytes on one chip (`Parts.bytes_per_chip`); compiled: phase -> its program."""
    known = {phase: program.memory for phase, program in compiled.items() if program.memory}
    rows = sum(known[phase].fresh for phase in ("rollout", "score") if phase in known)
    code = sum(memory.code for memory in known.values())
    needs = {}
    for phase, program in compiled.items():
        kept = sum(parts[name] for name in KEPT[phase])
        if program.memory:
            needs[phase] = Need(kept, rows, program.memory.temporaries, program.memory.fresh, code)
        else:  # the refusal counts its arguments, which are part of what is kept
            arguments = sum(parts[name] for name in ARGUMENTS[phase])
            needs[phase] = Need(kept, rows, max(0.0, program.refused - arguments), 0.0, code)
    return Verdict(needs, max(needs, key=lambda phase: needs[phase].total), hbm)


def find_levers(config: ml_collections.ConfigDict, parts, verdict: Verdict) -> list[Lever]:
    """What would lower the need of the worst program, the most helpful first.

    Estimates, without compiling: arrays of known size are counted under the changed config; the
    other temporaries of the learner's programs are assumed to grow with the rows of a micro-batch.
    """
    # What the worst program holds: arrays of known size, gradients, and the rest, activations.
    mesh, now, phase = parts.mesh, parts.bytes_per_chip(), verdict.worst
    rollout_config, rl_config, model_config = config.rollout, config.rl, config.model
    shards, chips = sharding.row_shards(mesh), mesh.devices.size
    rollout, learning = phase == "rollout", phase in ("score", "update")
    counted = (*KEPT[phase], *(("cache",) if rollout else ()))
    gradients = 0.0
    if phase == "update":  # micro-batches accumulate them in a second copy
        gradients = (now["policy"] + now["value"]) * (2 if rl_config.microbatch_size else 1)
    activations = max(0.0, verdict.needs[phase].temporaries - gradients)
    levers = []

    def add(name: str, change: str, saved: float) -> None:
        if saved > 0:
            levers.append(Lever(name, change, saved))

    def resized(changed) -> float:
        """Bytes that a config saves in what is counted and in gradients.

        Negative if it needs more, 0 if its mesh is refused.
        """
        try:
            changed_mesh = make_mesh(changed, mesh.devices.flatten().tolist())
            then = describe_parts(changed, changed_mesh).bytes_per_chip()
        except ValueError:
            return 0.0
        learned = (now["policy"] + now["value"]) / max(then["policy"] + then["value"], 1)
        return sum(now[name] - then[name] for name in counted) + gradients * (1 - 1 / learned)

    def changed(**values) -> ml_collections.ConfigDict:
        copy = config.copy_and_resolve_references()
        flat = {key.replace("__", "."): value for key, value in values.items()}
        copy.update_from_flattened_dict(flat)
        return copy

    # Other meshes of these chips, and twice the chips: more groups of chips have fewer slots each.
    for tensor in (1, 2, 4, 8):
        if chips % tensor or (1, tensor) == (mesh.shape["data"], mesh.shape["tensor"]):
            continue
        fsdp = chips // tensor
        saved = resized(changed(mesh__data=1, mesh__fsdp=fsdp, mesh__tensor=tensor))
        add("mesh", f"mesh.data=1 mesh.fsdp={fsdp} mesh.tensor={tensor}", saved)
    cut = sum(now[name] for name in LEARNER) + gradients + (now["cache"] if rollout else 0.0)
    add("mesh", f"{2 * chips} chips instead of {chips}, the new ones along mesh.fsdp", cut / 2)

    # A smaller rollout: half the slots, or a smaller type.
    episodes = rollout_config.prompts * rollout_config.group_size
    slots = rollout_config.slots or episodes
    if rollout and slots > shards:
        half = max(shards, slots // 2 // shards * shards)
        add("slots", f"rollout.slots={half}", now["cache"] * (1 - half / slots))
    if rollout_config.dtype == "float32" and phase in ("copy", "rollout"):
        add("cache type", "rollout.dtype=bfloat16", resized(changed(rollout__dtype="bfloat16")))

    # Fewer activations of the learner: the smallest micro-batch, or recomputed layers.
    minibatches = rl_config.minibatches if phase == "update" else 1
    rows = rl_config.microbatch_size or episodes // minibatches
    if learning and rows > shards:
        add("micro-batch", f"rl.microbatch_size={shards}", activations * (1 - shards / rows))
    if phase == "update" and model_config.remat != "layers":
        less = 8 if model_config.remat == "none" else 5  # times, a rough estimate
        add("remat", "model.remat=layers", activations * (1 - 1 / less))
    return sorted(levers, key=lambda lever: -lever.saved)
