"""Whether a run fits its chips: the largest of its programs beside everything that stays resident, and what would help where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import ml_collections

from stepsearch_jax import sharding
from stepsearch_jax.preflight.programs import Compiled, describe_parts, make_mesh

LEARNER = ("policy", "policy_optimizer", "value", "value_optimizer", "reference")
SAMPLER = ("rollout_copy", "environment")
# What train.py holds on the device while a program runs, and the program's own temporaries, results and code come on top. The rollout's copy is dropped as soon
# as its episodes are there; a trajectory and a batch stay until the next ones replace them.
KEPT = {
    "copy": (*LEARNER, "environment"),
    "rollout": (*LEARNER, *SAMPLER),
    "score": (*LEARNER, "environment"),
    "update": (*LEARNER, "environment"),
}
# What of it a program reads.
ARGUMENTS = {
    "copy": ("policy",),
    "rollout": SAMPLER,
    "score": ("policy", "value", "reference"),
    "update": ("policy", "policy_optimizer", "value", "value_optimizer"),
}


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on one chip while one program runs. A program that the compiler refused has all that it needs, arguments included, as temporaries."""

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
    """What would lower the need of the worst program, the most helpful first. Estimates, nothing is compiled for them: arrays of known size are counted under
    the changed config, of a program's other temporaries those of the learner are taken to grow with the rows of a micro-batch."""
    mesh, now, phase = parts.mesh, parts.bytes_per_chip(), verdict.worst
    rollout_config, rl_config, model_config = config.rollout, config.rl, config.model
    shards, chips = sharding.row_shards(mesh), mesh.devices.size
    rollout, learning = phase == "rollout", phase in ("score", "update")
    counted = (*KEPT[phase], *(("cache",) if rollout else ()))
    gradients = (
        (now["policy"] + now["value"]) * (2 if rl_config.microbatch_size else 1)
        if phase == "update"
        else 0.0
    )
    activations = max(0.0, verdict.needs[phase].temporaries - gradients)
    levers = []

    def add(name: str, change: str, saved: float) -> None:
        if saved > 0:
            levers.append(Lever(name, change, saved))

    def resized(changed) -> float:
        """Bytes saved in what is counted, and in gradients, by a config; negative where it has more, 0 where its mesh is refused."""
        try:
            then = describe_parts(
                changed, make_mesh(changed, mesh.devices.flatten().tolist())
            ).bytes_per_chip()
        except ValueError:
            return 0.0
        learned = (now["policy"] + now["value"]) / max(then["policy"] + then["value"], 1)
        return sum(now[name] - then[name] for name in counted) + gradients * (1 - 1 / learned)

    def changed(**values) -> ml_collections.ConfigDict:
        copy = config.copy_and_resolve_references()
        copy.update_from_flattened_dict(
            {key.replace("__", "."): value for key, value in values.items()}
        )
        return copy

    for tensor in (
        size
        for size in (1, 2, 4, 8)
        if chips % size == 0 and (1, size) != (mesh.shape["data"], mesh.shape["tensor"])
    ):
        add(
            "mesh",
            f"mesh.data=1 mesh.fsdp={chips // tensor} mesh.tensor={tensor}",
            resized(changed(mesh__data=1, mesh__fsdp=chips // tensor, mesh__tensor=tensor)),
        )
    cut = (
        sum(now[name] for name in LEARNER) + gradients + (now["cache"] if rollout else 0.0)
    )  # more groups of chips have fewer slots each
    add("mesh", f"{2 * chips} chips instead of {chips}, the new ones along mesh.fsdp", cut / 2)
    slots = rollout_config.slots or rollout_config.prompts * rollout_config.group_size
    if rollout and slots > shards:
        add(
            "slots",
            f"rollout.slots={max(shards, slots // 2 // shards * shards)}",
            now["cache"] * (1 - max(shards, slots // 2 // shards * shards) / slots),
        )
    if rollout_config.dtype == "float32" and phase in ("copy", "rollout"):
        add("cache type", "rollout.dtype=bfloat16", resized(changed(rollout__dtype="bfloat16")))
    rows = rl_config.microbatch_size or rollout_config.prompts * rollout_config.group_size // (
        rl_config.minibatches if phase == "update" else 1
    )
    if learning and rows > shards:
        add("micro-batch", f"rl.microbatch_size={shards}", activations * (1 - shards / rows))
    if phase == "update" and model_config.remat != "layers":
        add(
            "remat",
            "model.remat=layers",
            activations * (1 - 1 / (8 if model_config.remat == "none" else 5)),
        )
    return sorted(levers, key=lambda lever: -lever.saved)
