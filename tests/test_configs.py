"""Configs load and add no key to base.py; every key of base.py is explained and read."""

import ast
import importlib.util
import pathlib
import re

import ml_collections
import pytest
from jax.sharding import AbstractMesh

from configs import base
from stepsearch_jax.run.checks import check_config, check_sampling
from stepsearch_jax.sharding import AXES
from stepsearch_jax.sweeps.points import list_points, load_sweeps

REPO = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    path for path in (REPO / "configs").rglob("*.py") if "def get_config" in path.read_text()
)
SWEEPS = sorted((REPO / "configs" / "sweeps").glob("[!_]*.py"))
SECTION_METHODS = set(dir(ml_collections.ConfigDict))


def load(path: pathlib.Path) -> list[ml_collections.ConfigDict]:
    """The config of a file, or all of its VARIANTS."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return (
        [module.get_config(variant) for variant in module.VARIANTS]
        if hasattr(module, "VARIANTS")
        else [module.get_config()]
    )


def list_keys(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value, of the leaves."""
    keys = {}
    for name, value in config.items():
        keys |= (
            list_keys(value, f"{prefix}{name}.")
            if isinstance(value, ml_collections.ConfigDict)
            else {prefix + name: value}
        )
    return keys


def test_base_and_the_quickstart_are_among_the_configs():
    assert {"base.py", "atlas_quickstart.py"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(REPO)))
def test_config_loads_and_changes_only_keys_of_base(path):
    known = list_keys(base.get_config())
    for config in load(path):
        own = list_keys(config)
        assert sorted(own.keys() ^ known.keys()) == []
        assert [key for key in own if type(own[key]) is not type(known[key])] == []


def check(config: ml_collections.ConfigDict) -> None:
    """What `train` checks before it reads files, on as many devices as the mesh names.

    A mesh that takes all devices (-1) gets one.
    """
    check_config(config, AbstractMesh(tuple(max(1, config.mesh[axis]) for axis in AXES), AXES))
    check_sampling(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(REPO)))
def test_config_is_one_that_trains(path):
    for config in load(path):
        if config.model.num_layers == 0:  # the sizes come from the checkpoint: any will do here
            config.model.num_layers = 24
        check(config)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_runs_of_a_sweep_are_ones_that_train(path):
    points = list_points(load_sweeps([str(path)], str(REPO / "configs" / "atlas_sweep.py"), ()))
    assert points
    for point in points:
        check(ml_collections.ConfigDict(point.config))


def test_unknown_key_is_refused_once_a_config_is_locked():
    config = base.get_config().lock()
    with pytest.raises(AttributeError, match="gama"):
        config.rl.gama = 1.0
    with pytest.raises(TypeError):
        config.rl.gamma = "1"


def find_uncommented(source: str) -> list[str]:
    """Assignments to keys without a comment on one of their lines or on the line above."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(
            node.targets[0], ast.Attribute | ast.Subscript
        ):
            continue
        makes_section = (
            isinstance(node.value, ast.Call) and not node.value.args
        )  # ConfigDict(): the heading of a section explains itself
        commented = any("#" in line for line in lines[node.lineno - 1 : node.end_lineno]) or lines[
            node.lineno - 2
        ].strip().startswith("#")
        if not makes_section and not commented:
            found.append(f"line {node.lineno}: {ast.unparse(node.targets[0])}")
    return found


def test_uncommented_keys_are_found():
    source = "def f():\n    c.a = 1  # what\n    # above\n    c.b = 2\n    c.d = 3\n"
    source += "    c.e = s = ConfigDict()\n"
    assert find_uncommented(source) == ["line 5: c.d"]


def test_every_key_of_base_is_explained():
    assert find_uncommented((REPO / "configs/base.py").read_text()) == []


# --- which keys the code reads. A section is called `config.SECTION` or `SECTION_config` there.

SOURCES = {
    path: path.read_text()
    for path in sorted((REPO / "stepsearch_jax").rglob("*.py"))
    if path.name not in ("checks.py", "choices.py")  # which name every key
}


def is_read(key: str, sources: dict[pathlib.Path, str]) -> bool:
    """Whether a file reads the section of a key, and either its name there or the whole section."""
    section, _, name = key.rpartition(".")
    if not section:
        return any(re.search(rf"\bconfig\.{name}\b", text) for text in sources.values())
    last = section.rpartition(".")[2]
    holder = rf"\b(config\.([\w.]+\.)?{last}|{last}_config)\b"
    whole = rf"(\*\*dict\(|dict\(|in ){holder}\b(?!\.)|{holder}\.items\(\)"
    return any(
        re.search(holder, text)
        and (re.search(rf"\.{name}\b|\"{name}\"", text) or re.search(whole, text))
        for text in sources.values()
    )


def find_unknown(config: ml_collections.ConfigDict, sources: dict[pathlib.Path, str]) -> list[str]:
    """Keys that the code reads of a section that has no such key."""
    sections = {name: config[name] for name in config if isinstance(config[name], type(config))}
    found = []
    for path, text in sources.items():
        for name in re.findall(rf"\b(?:\w+\.)?config\.({'|'.join(sections)})\.(\w+)", text):
            found.append((path.name, *name))
        for name in re.findall(rf"\b({'|'.join(sections)})_config\.(\w+)", text):
            found.append((path.name, *name))
    known = {name: {*section, *SECTION_METHODS} for name, section in sections.items()}
    return [f"{file}: {section}.{key}" for file, section, key in found if key not in known[section]]


def test_keys_that_are_dead_or_unknown_are_found():
    config = ml_collections.ConfigDict({"seed": 0, "a": {"x": 1, "y": 2, "sub": {"z": 3}}})
    sources = {
        pathlib.Path("one.py"): "use(config.seed, config.a.x, dict(config.a.sub), config.a.typo)",
        pathlib.Path("two.py"): "use(a_config.x, a_config.wrong, other.y)",
    }
    assert [key for key in list_keys(config) if not is_read(key, sources)] == []  # y: by another
    sources[pathlib.Path("two.py")] = "use(a_config.x, a_config.wrong)"
    assert [key for key in list_keys(config) if not is_read(key, sources)] == ["a.y"]
    assert find_unknown(config, sources) == ["one.py: a.typo", "two.py: a.wrong"]


@pytest.mark.parametrize("key", list_keys(base.get_config()))
def test_every_key_is_read(key):
    assert is_read(key, SOURCES)


def test_code_reads_only_keys_that_exist():
    assert find_unknown(base.get_config(), SOURCES) == []
