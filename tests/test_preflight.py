"""The preflight command: its parts on fake devices, and the whole for a slice that is not there."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
import tiny_config
from jax.sharding import AbstractMesh

from configs import base, musique_qwen2_5
from stepsearch_jax.preflight import __main__ as preflight
from stepsearch_jax.preflight import chips, programs, report, verdict
from stepsearch_jax.preflight.chips import GIB, Chip, describe_network, describe_slice
from stepsearch_jax.preflight.costs import Rates
from stepsearch_jax.preflight.lengths import EpisodeLengths
from stepsearch_jax.preflight.programs import Compiled, Memory
from stepsearch_jax.run.checks import check_config
from stepsearch_jax.run.settings import describe_models
from stepsearch_jax.sharding import AXES

REPO = pathlib.Path(__file__).resolve().parents[1]
CHIP = Chip(GIB, Rates(1e9, 1e9, 1e9), accelerator="none", cores=1, axes=2, ring=16)


def make_config(**changes):
    config = tiny_config.get_config("unused")
    config.model.vocab_size = 512
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 2, 2
    config.rollout.slots, config.rl.microbatch_size = 4, 2
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def compiled():
    """The programs of a tiny run, compiled for four of the fake devices."""
    config = make_config()
    mesh = programs.make_mesh(config, jax.devices()[:4])
    return programs.compile_programs(config, programs.describe_parts(config, mesh), print)


@pytest.fixture(scope="module")
def measure_again(compiled):
    """-> preflight.measure for that run, without compiling it again."""

    def run(given=()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(programs, "compile_programs", lambda *_: compiled)
            return preflight.measure(make_config(), "four fakes", CHIP, jax.devices()[:4], given)

    return run


@pytest.fixture(scope="module")
def figures(measure_again):
    """The whole of that run."""
    return measure_again()


# ---- The verdict


def judge(hbm: float, refused: float = 0.0):
    parts = dict(
        policy=10.0,
        policy_optimizer=20.0,
        value=9.0,
        value_optimizer=18.0,
        reference=10.0,
        rollout_copy=5.0,
        environment=1.0,
        cache=30.0,
    )
    memory = dict(
        copy=Memory(0.5, 5.0, 0.1),
        rollout=Memory(40.0, 2.0, 0.2),
        score=Memory(12.0, 3.0, 0.3),
        update=Memory(25.0, 0.25, 0.4),
    )
    compiled = {phase: Compiled(sizes, {}, {}, 0.0, 1.0) for phase, sizes in memory.items()}
    if refused:
        compiled["update"] = Compiled(None, {}, {}, refused, 1.0)
    return verdict.judge(parts, compiled, hbm)


def test_what_counts_is_the_program_and_all_that_stays():
    """The learner's 67 and the environment stay throughout, the rollout's copy only in the rollout,
    its rows (2 + 3) and all code (1) everywhere."""
    found = judge(hbm=121.0)
    assert {phase: need.total for phase, need in found.needs.items()} == pytest.approx(
        {
            "copy": 68 + 5 + 1 + 5.5,
            "rollout": 73 + 5 + 1 + 42,
            "score": 68 + 5 + 1 + 15,
            "update": 68 + 5 + 1 + 25.25,
        }
    )
    assert found.worst == "rollout" and found.fits
    assert not judge(hbm=120.9).fits


def test_a_refused_program_counts_its_arguments_once():
    """The compiler wants 200, 57 of them state; the other 11 of what stays and the rest come on
    top."""
    found = judge(hbm=150.0, refused=200.0)
    assert found.worst == "update" and not found.fits
    # Neither its results nor its code are known.
    assert found.needs["update"].total == pytest.approx(68 + (200 - 57) + 5 + 0.6)


def test_the_refusal_of_the_compiler_is_read():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 63.80G of 30.75G hbm. Exceeded hbm capacity by …"
    )
    assert programs.read_refusal(text) == 63.80 * 2**30
    assert programs.read_refusal("Used 512.5M of 400.0M hbm") == 512.5 * 2**20
    text = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (286.31G) exceeds "
        "available HBM (15.75G)."
    )
    assert programs.read_refusal(text) == 286.31 * 2**30
    assert programs.read_refusal("INVALID_ARGUMENT: something else") is None


def test_levers_are_sorted_by_what_they_save():
    """A rollout of 8 slots that is too large: half the slots save half the cache, bfloat16 half of
    cache and copy, twice the chips half of the learner."""
    config = make_config(**{"rollout.slots": 8})
    parts = programs.describe_parts(config, programs.make_mesh(config, jax.devices()[:4]))
    sizes = parts.bytes_per_chip()

    def judge_large(large: str):
        needs = {phase: 100.0 * GIB if phase == large else 0.0 for phase in programs.PHASES}
        compiled = {
            phase: Compiled(Memory(need, 0.0, 0.0), {}, {}, 0.0, 1.0)
            for phase, need in needs.items()
        }
        return verdict.judge(sizes, compiled, GIB)

    levers = verdict.find_levers(config, parts, judge_large("rollout"))
    saved = {lever.change: lever.saved for lever in levers}
    assert saved["rollout.slots=4"] == sizes["cache"] / 2
    twice = saved["8 chips instead of 4, the new ones along mesh.fsdp"]
    assert twice == (sum(sizes[name] for name in verdict.LEARNER) + sizes["cache"]) / 2
    assert saved["rollout.dtype=bfloat16"] == (sizes["cache"] + sizes["rollout_copy"]) / 2
    assert [lever.saved for lever in levers] == sorted(saved.values(), reverse=True)
    # These two change the learner only.
    assert {"micro-batch", "remat"}.isdisjoint(lever.name for lever in levers)

    microbatches = make_config(**{"rl.microbatch_size": 4})
    levers = verdict.find_levers(microbatches, parts, judge_large("update"))
    names = {lever.name for lever in levers}
    assert levers[0].name == "remat" and {"micro-batch", "mesh"} <= names and "slots" not in names


# ---- A tiny run as a whole


@pytest.mark.slow
def test_parts_are_what_a_chip_holds(figures):
    """By hand, over fsdp 2 and tensor 2: [vocabulary, width] tables and matrices in quarters, but
    biases of queries, keys and values in halves (tensor alone) and norms whole; the optimiser twice
    the parameters and its two counts."""
    layer = (4 * 8 * 32 * 2 + 2 * 8 * 32 * 2 + 3 * 64 * 32) // 4 + (4 * 8 + 2 * 2 * 8) // 2 + 2 * 32
    trunk = 512 * 32 // 4 + 2 * layer + 32
    policy = 4 * (trunk + 512 * 32 // 4)
    assert figures["parts"]["policy"] == figures["parts"]["reference"] == policy
    assert figures["parts"]["policy_optimizer"] == 2 * policy + 2 * 4
    assert figures["parts"]["value"] == 4 * (trunk + 32)
    # k and v, float32, layers, slots, kv heads, positions, width
    assert figures["parts"]["cache"] == 2 * 4 * 2 * 2 * 1 * 256 * 8
    assert figures["parts"]["rollout_copy"] > policy  # over tensor alone


@pytest.mark.slow
def test_every_phase_has_its_costs(figures):
    """The products of the update are those of the rule and attention's; nothing is computed twice
    over tensor or fsdp."""
    assert list(figures["phases"]) == list(programs.PHASES) and figures["fits"]
    assert figures["phases"]["copy"]["flops"] == 0 < figures["phases"]["copy"]["bytes"]
    # Attention over 256 tokens is as much as these small layers.
    assert 1 < figures["phases"]["update"]["model_ratio"] < 3
    assert 1 < figures["phases"]["score"]["model_ratio"] < 3
    assert figures["phases"]["update"]["collectives"]["all-gather"]["count"] > 0
    for phase in figures["phases"].values():
        sizes = [size for name, size in phase["need"].items() if name != "total"]
        assert phase["need"]["total"] == pytest.approx(sum(sizes))
        assert phase["seconds"] == pytest.approx(max(phase["seconds_by"].values()), rel=0.999)
    seconds = [phase["seconds"] for phase in figures["phases"].values()]
    assert figures["iteration_seconds"] == pytest.approx(sum(seconds))


@pytest.mark.slow
def test_a_rollout_reads_weights_and_live_keys_in_every_step(figures):
    """Positions that the slots attend to: k and v of one kv head of 8, in two layers, float32."""
    lengths, parts = figures["lengths"], figures["parts"]
    live = lengths["live"] * 2 * 2 * 8 * 4
    floor = lengths["steps"] * (parts["rollout_copy"] + live)
    step = figures["phases"]["rollout"]["step"]
    assert floor < lengths["steps"] * step["bytes"] < figures["phases"]["rollout"]["bytes"]
    assert 0 < step["seconds"] and 0 < step["launches"] and step["modelled_seconds"] is None


@pytest.mark.slow
def test_an_update_is_the_products_of_the_model_and_attention(figures):
    """6·N·D and attention over 8 rows of 256 tokens; the table of the logits counts 8 times, since
    they are computed again in the backward pass."""
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    attention = 3 * 2 * 4 * 256 * 32  # forward and twice as much backward; scores and sums
    per_token = 2 * (6 * layers + attention) + 8 * 32 * 512
    flops = figures["phases"]["update"]["flops"]
    assert flops * 4 == pytest.approx(8 * 256 * per_token, rel=0.1)


@pytest.mark.slow
def test_searches_on_the_host_split_the_rollout(figures):
    """Four programs that do the same work; the state with the cache lies between them."""
    config = make_config(**{"rollout.search": "host"})
    host = preflight.measure(config, "four fakes", CHIP, jax.devices()[:4])
    there, here = (found["phases"]["rollout"] for found in (figures, host))
    assert here["flops"] == pytest.approx(there["flops"], rel=0.02)
    assert here["step"]["launches"] == pytest.approx(there["step"]["launches"], rel=0.2)
    assert here["need"]["temporaries"] > host["parts"]["cache"]
    assert here["need"]["total"] == pytest.approx(there["need"]["total"], rel=0.5)


@pytest.mark.slow
def test_the_rollout_follows_its_lengths(figures, measure_again):
    """Turns of 32 tokens, not 24, a third more decode steps: of the rollout's products, those of
    prompts and observations stay."""
    config = make_config(**{"rollout.max_turn_tokens": 32})
    longer = preflight.measure(config, "four fakes", CHIP, jax.devices()[:4])
    assert (figures["lengths"]["sampled"], longer["lengths"]["sampled"]) == (3 * 24, 3 * 32)
    now, then = (f["phases"]["rollout"]["flops"] for f in (figures, longer))
    assert 1.02 * now < then < 1.4 * now
    # Given lengths take the place of the longest.
    short = [EpisodeLengths(20, ((10, 30), (10, 0)))]
    given = measure_again(short)
    assert given["lengths"]["steps"] < figures["lengths"]["steps"] / 3
    assert given["phases"]["rollout"]["flops"] < now / 2
    assert given["phases"]["update"]["flops"] == figures["phases"]["update"]["flops"]


@pytest.mark.slow
def test_the_learner_follows_the_widths_of_its_rows(figures):
    """Rows of 70 tokens run at half of the two widths; the wide branches count no more."""
    config, short = make_config(**{"rl.width_buckets": 2}), EpisodeLengths(20, ((10, 30), (10, 0)))
    given = preflight.measure(config, "four fakes", CHIP, jax.devices()[:4], [short])
    assert given["tokens"] == {"score": 8 * 128, "update": 8 * 128}
    for phase in ("score", "update"):
        now, then = (f["phases"][phase]["flops"] for f in (figures, given))
        assert now / 4 < then < now / 2  # attention falls to a quarter, the rest to a half


@pytest.mark.slow
def test_the_report_shows_everything(figures):
    text = report.render(figures)
    for title in (*report.TITLES.values(), *report.PHASE_TITLES.values(), "fits: "):
        assert title in text
    assert figures["assumption"] in text
    levers = [dict(name="slots", change="rollout.slots=2", saved=0.5 * GIB)]
    text = report.render(figures | dict(fits=False, levers=levers))
    assert "does not fit" in text and "  0.50  slots: rollout.slots=2" in text


@pytest.mark.slow
def test_the_table_of_several_slices(figures):
    needs = [figures["phases"][name]["need"]["total"] / GIB for name in programs.PHASES]
    refused = {name: {"need": phase["need"]} for name, phase in figures["phases"].items()}
    levers = [dict(name="slots", change="rollout.slots=2", saved=1.0)]
    large = figures | dict(
        fits=False, worst="rollout", iteration_seconds=None, phases=refused, levers=levers
    )
    head, _, small, big = report.render_table({"tiny": [figures], "large": [large]}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, small, big)]
    assert [len(row) for row in cells] == [10, 10, 10]
    worst = figures["phases"][figures["worst"]]["need"]["total"] / GIB
    assert cells[1][:4] == ["tiny", "four fakes", "1 x 2 x 2", "yes"]
    assert f"**{worst:.2f}**" in cells[1][4] and cells[1][4].count(",") == 3
    assert cells[1][6].count("(") == 3
    assert cells[1][7:9] == ["-, -, -", f"{figures['phases']['rollout']['step']['launches']:,.0f}"]
    assert cells[1][9] == f"{figures['iteration_seconds'] / 60:.2f}, -"
    assert cells[2][3] == "no: rollout.slots=2"
    assert cells[2][4].split(", ")[1] == f"**{needs[1]:.2f}**"
    assert cells[2][6:] == ["refused by the compiler", "-", "-", "-"]


# ---- The command


@pytest.mark.slow
def test_the_table_asks_for_what_is_missing(tmp_path):
    (tmp_path / "7b-v5e-8x8.json").write_text("{}")
    run = lambda *more: subprocess.run(
        [sys.executable, "launch/preflight_table.py", f"--folder={tmp_path}", *more],
        cwd=REPO,
        capture_output=True,
        text=True,
        env=os.environ | {"DRY_RUN": "1"},
    )
    lines = run("--sizes=3b,7b", "--slices=v5e:4x4,v5e:8x8").stdout.splitlines()
    assert [line.split()[3:5] for line in lines] == [
        [f"--config=configs/musique_qwen2_5.py:{pair}", f"--topology={pair.split(',')[1]}"]
        for pair in ("3b,v5e:4x4", "3b,v5e:8x8", "7b,v5e:4x4")
    ]
    wrong = run("--sizes=4b")
    assert wrong.returncode == 2 and "--sizes: 4b" in wrong.stderr
    assert "0.5b, 1.5b, 3b, 7b" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fits", [True, False])
def test_exit_status_and_json(monkeypatch, tmp_path, capsys, figures, fits):
    monkeypatch.setattr(preflight, "describe_slice", lambda name: (CHIP, jax.devices()[:4]))
    monkeypatch.setattr(preflight, "measure", lambda *arguments: figures | {"fits": fits})
    status = preflight.preflight(make_config(), "v5e:2x2", tmp_path / "figures.json")
    assert status == (0 if fits else 1)
    assert json.loads((tmp_path / "figures.json").read_text())["fits"] is fits
    assert ("does not fit" in capsys.readouterr().out) is not fits
    with pytest.raises(FileNotFoundError, match="--json="):
        preflight.preflight(make_config(), "v5e:2x2", tmp_path / "nowhere" / "figures.json")


@pytest.mark.parametrize(
    "name",
    [
        *("v4:2x2x1", "v5e", "v5e:4", "v5e:axb", "", "v5e:4x4x4", "v6e:2x2x1", "v5p:4x4"),
        *("h100", "h100:0", "h100:9", "h100:2x2", "v100:1"),
    ],
)
def test_unknown_slices_are_refused_with_those_that_work(name):
    with pytest.raises(ValueError, match=r"--topology=.*v5e, v5p, v6e.* v5e:4x4.*h100, a100"):
        describe_slice(name)


@pytest.mark.parametrize(
    "name,requirements",
    [("v5e:4x4", "requirements-tpu.txt"), ("h100:1", "requirements-cuda-preflight.txt")],
)
def test_a_missing_compiler_is_named_with_its_requirements(monkeypatch, name, requirements):
    def refuse(**_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(chips.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(chips.os, "environ", dict(os.environ))
    with pytest.raises(ValueError, match=f"no compiler .*-r {requirements}"):
        describe_slice(name)
    assert (REPO / requirements).is_file()


@pytest.mark.parametrize(
    "kind,shape,links",
    [
        ("v5e", (4, 4), 2),
        ("v5e", (16, 16), 4),  # a whole pod closes along both axes
        ("v5e", (8, 16), 3),
        ("v5p", (2, 2, 4), 3),
        ("v5p", (4, 4, 4), 6),
        ("v6e", (8, 8), 2),
    ],
)
def test_the_links_of_a_slice(kind, shape, links):
    """Of a group of all its chips: one for each axis, two where the axis closes to a ring."""
    places = itertools.product(*map(range, shape))
    devices = [types.SimpleNamespace(coords=place) for place in places]
    network = describe_network(chips.CHIPS[kind], devices)
    assert network.links(np.arange(len(devices))[None]) == links


def test_gpus_have_one_link_to_a_switch(monkeypatch):
    gpus = [types.SimpleNamespace() for _ in range(8)]
    network = describe_network(chips.GPUS["h100"], gpus)
    assert network.links(np.arange(8).reshape(2, 4)) == 1
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert chips.GPUS["h100"].hbm == 0.9 * 85e9


@pytest.mark.parametrize(
    "change,complaint",
    [
        ({"model.vocab_size": 0}, "model.vocab_size is 0.*embedding"),
        ({"mesh.fsdp": 3}, "mesh data x fsdp x tensor = 1 x 3 x 2 .* devices"),
        ({"mesh.fsdp": 1, "mesh.tensor": 4}, "kv head"),
        ({"rollout.slots": 3}, "rollout.slots=3"),
        ({"rl.microbatch_size": 3}, "rl.microbatch_size=3"),
    ],
)
def test_configs_that_cannot_be_are_refused_in_one_line(monkeypatch, change, complaint):
    monkeypatch.setattr(preflight, "describe_slice", lambda name: (CHIP, jax.devices()[:4]))
    with pytest.raises(ValueError, match=complaint) as ended:
        preflight.preflight(make_config(**change), "v5e:2x2", None)
    assert "\n" not in str(ended.value)


@pytest.fixture
def run_for_a_slice(tmp_path):
    """The command for four chips of a v5e, compiled without them."""
    pytest.importorskip(
        "libtpu", reason="compiling for TPUs needs libtpu: pip install -r requirements-tpu.txt"
    )
    flags = (
        "--config.model.vocab_size=1024",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        "--config.rollout.dtype=bfloat16",
    )

    def run(*more: str, stop: signal.Signals | None = None):
        command = [
            sys.executable,
            "-m",
            "stepsearch_jax.preflight",
            f"--config=tests/tiny_config.py:{tmp_path}",
            "--topology=v5e:2x2",
        ]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen([*command, *flags, *more], cwd=REPO, **pipes) as process:
            begun = ""
            while stop is not None and "the rollout" not in begun:
                begun += process.stderr.readline()
            if stop is not None:
                time.sleep(0.5)  # the compiler is at work
                process.send_signal(stop)
            out, rest = process.communicate(timeout=600)
        return subprocess.CompletedProcess(command, process.returncode, out, rest)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_compilation_with_one_line(run_for_a_slice, stop):
    ended = run_for_a_slice(stop=stop)
    assert ended.returncode == 128 + stop
    assert ended.stdout == "" and len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert "nothing was written" in ended.stderr


@pytest.mark.slow
def test_a_run_that_fits_a_slice(run_for_a_slice, tmp_path):
    run = run_for_a_slice
    done = run(f"--json={tmp_path / 'figures.json'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "minutes at peak, " in done.stdout.splitlines()[-1]
    assert "compiling the update for v5e:2x2" in done.stderr and "fits: " in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["hbm"] == 15.75 * GIB and figures["mesh"] == [1, 2, 2]
    assert 1 < figures["phases"]["update"]["model_ratio"] < 4
    # In every layer of every step.
    assert figures["phases"]["rollout"]["collectives"]["all-reduce"]["count"] > 100
    wrong = run("--config.mesh.tensor=4", "--config.mesh.fsdp=1")
    assert wrong.returncode == 1 and "kv head" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("search", ["callback", "host"])
def test_a_run_that_fits_a_gpu(monkeypatch, tmp_path, search):
    """Compiled without one, callback left out; memory is what jax takes by default."""
    pytest.importorskip(
        "jax_cuda12_plugin",
        reason="compiling for GPUs needs pip install -r requirements-cuda-preflight.txt",
    )
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    config = make_config(**{"mesh.fsdp": 1, "mesh.tensor": 1, "rollout.search": search})
    found = preflight.measure(config, "h100:1", *describe_slice("h100:1"))
    assert found["fits"] and found["hbm"] == 0.75 * 85e9
    assert found["iteration_seconds"] > 0 and found["iteration_modelled_seconds"] is None
    assert 1 < found["phases"]["update"]["model_ratio"] < 3
    assert found["phases"]["rollout"]["step"]["bytes"] > found["parts"]["rollout_copy"]


# ---- The real models


@pytest.mark.parametrize(
    "size,billions", [("0.5b", 0.494), ("1.5b", 1.544), ("3b", 3.086), ("7b", 7.616)]
)
def test_the_sizes_are_those_of_qwen2_5(size, billions):
    """Numbers of parameters as published."""
    for place, count in musique_qwen2_5.PLACES.items():
        config = musique_qwen2_5.get_config(f"{size},{place}")
        for preset in base.VARIANTS:
            chosen = musique_qwen2_5.get_config(f"{size},{place},{preset}")
            check_config(chosen, AbstractMesh(tuple(chosen.mesh[axis] for axis in AXES), AXES))
        mesh = config.mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == count
        assert config.model.num_kv_heads % mesh.tensor == 0
    model, _ = describe_models(config, config.model.vocab_size)
    policy = programs.Policy(model)
    shapes = jax.eval_shape(
        lambda: policy.init(jax.random.key(0), jax.numpy.zeros((1, 2), int), method=policy.init_all)
    )
    assert programs.count_parameters(shapes) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_the_argument_of_the_real_config():
    paper = musique_qwen2_5.get_config("3b")
    reference = musique_qwen2_5.get_config("3b,reference,v5e:8x8")
    failures = paper.reward.format_failure, reference.reward.format_failure
    assert failures == ("zero_answer", "minus_one")
    assert (paper.mesh.fsdp, reference.mesh.fsdp) == (8, 32)
    for argument, complaint in (
        ("4b", "sizes are 0.5b"),
        ("3b,v5e:2x2", "v5e:2x2 is no slice"),
        ("3b,papper", "no preset"),
    ):
        with pytest.raises(ValueError, match=complaint):
            musique_qwen2_5.get_config(argument)


def test_chips_hold_less_than_their_nominal_memory():
    assert [chip.hbm / GIB for chip in chips.CHIPS.values()] == [15.75, 95.0, 31.25]
    assert tuple(chips.CHIPS["v5e"].rates) == (197e12, 819e9, 200e9 / 4, 1.5e9)


@pytest.mark.nightly
def test_a_run_that_does_not_fit_a_slice(run_for_a_slice, tmp_path):
    """The compiler refuses the learner's programs, or the rollout's; the remedy is named."""
    run = run_for_a_slice
    full = run("--config.rollout.context=2097152", "--config.rollout.prompts=64")
    assert full.returncode == 1, full.stderr[-2000:]
    assert "refused by the compiler" in full.stdout
    assert "does not fit: the update" in full.stdout
    assert "micro-batch: rl.microbatch_size=" in full.stdout
    # The rollout alone: on a chip 256 slots of 65536 positions, in each of two layers 128 numbers
    # of 2 bytes in k and in v, are 16 GiB of cache.
    wide = run(
        "--config.model.head_dim=128",
        "--config.rollout.context=65536",
        "--config.rollout.prompts=512",
        "--config.rl.microbatch_size=2",
        f"--json={tmp_path / 'wide.json'}",
    )
    assert wide.returncode == 1, wide.stderr[-2000:]
    assert "does not fit: the rollout" in wide.stdout
    assert "slots: rollout.slots=256" in wide.stdout
    figures = json.loads((tmp_path / "wide.json").read_text())
    assert figures["parts"]["cache"] == 16 * GIB and figures["iteration_seconds"] is None
    others = [figures["phases"][name]["need"]["total"] for name in ("copy", "score", "update")]
    assert max(others) < 15.75 * GIB
