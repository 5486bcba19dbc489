"""Every config loads, adds no key that base.py lacks, and every key of base.py is explained and read; the code reads no other keys."""

import ast
import importlib.util
import pathlib

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
    """What `train` asks of a config before it reads files, on as many devices as the mesh names; on one where it takes all that there are."""
    check_config(config, AbstractMesh(tuple(max(1, config.mesh[axis]) for axis in AXES), AXES))
    check_sampling(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(REPO)))
def test_config_is_one_that_trains(path):
    for config in load(path):
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
    """Assignments to keys (attributes, subscripts of one-letter names) without a comment on one of their lines or on the line above."""
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
    source = "def f():\n    c.a = 1  # what\n    # above\n    c.b = 2\n    c.d = 3\n    c.e = s = ConfigDict()\n"
    assert find_uncommented(source) == ["line 5: c.d"]


def test_every_key_of_base_is_explained():
    assert find_uncommented((REPO / "configs/base.py").read_text()) == []


# --- which keys the code reads


class Reads:
    """Follows config sections through a set of modules: assignments, loops over tuples, and arguments of calls between their functions.

    In the modules `commands`, a parameter `config` (without a type of its own) is the whole config; everywhere, `system.config` is.
    A path is a tuple of key names, () being the whole config. `read`: paths of leaves that are read, and of sections that are read whole by `dict(section)`.
    `unknown`: attributes of a section that it does not have.
    """

    def __init__(
        self, sources: dict[str, str], commands: set[str], config: ml_collections.ConfigDict
    ):
        self.config, self.read, self.unknown = config, set(), set()
        trees = {name: ast.parse(source) for name, source in sources.items()}
        self.arguments: dict[
            tuple[str, str], dict[str, set]
        ] = {}  # (module, function) -> parameter -> paths
        self.functions: dict[str, list[tuple[str, ast.FunctionDef]]] = {}
        for module, tree in trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    self.functions.setdefault(node.name, []).append((module, node))
                    for parameter in node.args.args if module in commands else []:
                        if parameter.arg == "config" and (
                            parameter.annotation is None
                            or ast.unparse(parameter.annotation).endswith("ConfigDict")
                        ):
                            self.arguments[module, node.name] = {"config": {()}}
        before = None
        while before != (
            before := repr(
                sorted(
                    (key, sorted(value.items(), key=str)) for key, value in self.arguments.items()
                )
            )
        ):  # to a fixed point
            for module, tree in trees.items():
                for node in tree.body:
                    for function in node.body if isinstance(node, ast.ClassDef) else [node]:
                        self._follow(
                            module, function, in_system=getattr(node, "name", "") == "System"
                        )

    def _follow(self, module: str, function: ast.AST, in_system: bool) -> None:
        names: dict[
            str, set[tuple]
        ] = {}  # name -> paths; nested functions share their outer function's names
        words: dict[str, set[str]] = {}  # name -> the strings that it runs through
        for node in ast.walk(function):
            if isinstance(node, ast.FunctionDef):
                for parameter, paths in self.arguments.get((module, node.name), {}).items():
                    names.setdefault(parameter, set()).update(paths)

        def paths_of(node) -> set[tuple]:
            """Sections and leaves that an expression stands for."""
            if isinstance(node, ast.Name):
                return names.get(node.id, set())
            if isinstance(node, ast.Attribute):
                if (
                    node.attr == "config"
                    and isinstance(node.value, ast.Name)
                    and (node.value.id == "system" or in_system and node.value.id == "self")
                ):
                    return {()}
                return {
                    (*path, node.attr) for path in paths_of(node.value) if self._is_section(path)
                }
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name | ast.Constant):
                keys = (
                    {node.slice.value}
                    if isinstance(node.slice, ast.Constant)
                    else words.get(node.slice.id, set())
                )
                return {
                    (*path, key)
                    for path in paths_of(node.value)
                    if self._is_section(path)
                    for key in keys
                    if isinstance(key, str)
                }
            return set()

        def bind(target, value) -> None:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                for one, other in zip(target.elts, value.elts):
                    bind(one, other)
            elif isinstance(target, ast.Name):
                names.setdefault(target.id, set()).update(paths_of(value))

        def bind_loop(target, values) -> None:
            if isinstance(target, ast.Name) and isinstance(values, ast.Tuple | ast.List):
                for value in values.elts:
                    if isinstance(value, ast.Constant):
                        words.setdefault(target.id, set()).add(value.value)
                    bind(target, value)

        for _ in range(
            3
        ):  # ast.walk is breadth first: a name may be used before the walk has met its binding
            for node in ast.walk(function):
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        bind(target, node.value)
                elif isinstance(node, ast.For | ast.comprehension):
                    bind_loop(node.target, node.iter)
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                self._pass_arguments(module, node, paths_of)
                if isinstance(node.func, ast.Name) and node.func.id == "dict":
                    self.read |= {path for argument in node.args for path in paths_of(argument)}
            elif isinstance(node, ast.Attribute | ast.Subscript):
                for path in paths_of(node):
                    if not self._exists(path):
                        self.unknown |= {path} if path[-1] not in SECTION_METHODS else set()
                    elif not self._is_section(path):
                        self.read.add(path)

    def _pass_arguments(self, module: str, call: ast.Call, paths_of) -> None:
        name = (
            call.func.attr
            if isinstance(call.func, ast.Attribute)
            else getattr(call.func, "id", None)
        )
        here = [found for found in self.functions.get(name, []) if found[0] == module]
        for target_module, function in here or self.functions.get(name, []):
            parameters = [parameter.arg for parameter in function.args.args]
            given = [
                *zip(parameters, call.args),
                *((keyword.arg, keyword.value) for keyword in call.keywords),
            ]
            for parameter, value in given:
                if paths := {path for path in paths_of(value) if self._is_section(path)}:
                    self.arguments.setdefault((target_module, name), {}).setdefault(
                        parameter, set()
                    ).update(paths)

    def _exists(self, path: tuple) -> bool:
        section = self.config
        for name in path:
            if not isinstance(section, ml_collections.ConfigDict) or name not in section:
                return False
            section = section[name]
        return True

    def _is_section(self, path: tuple) -> bool:
        return self._exists(path) and (
            not path or isinstance(self._value(path), ml_collections.ConfigDict)
        )

    def _value(self, path: tuple):
        section = self.config
        for name in path:
            section = section[name]
        return section

    def is_read(self, key: str) -> bool:
        """Whether a dotted key, or a section that holds it, is read."""
        path = tuple(key.split("."))
        return any(path[:n] in self.read for n in range(1, len(path) + 1))


def test_reads_are_followed():
    """a.x by alias, a.y by attribute, b.x and c.x by a loop, d.* whole, e.x by a string, f.x across two calls; b.y is dead, a.typo unknown."""
    section = {"x": 1, "y": 2}
    config = ml_collections.ConfigDict({name: dict(section) for name in "abcdef"})
    sources = {
        "one": (
            "def run(config):\n    n, a = 1, config.a\n    use(a.x, config.a.y, a.typo, config.to_dict())\n    use([o.x for o in (config.b, config.c)])\n"
            "    use(dict(config.d), {key: e[key] for key in ('x',)})\n    e = config.e\n    load(config.f)\n"
        ),
        "two": "def load(data):\n    open_it(1, part=data)\ndef open_it(n, part):\n    return part.x, other.y\n",
    }
    reads = Reads(sources, {"one"}, config)
    assert {key for key in list_keys(config) if reads.is_read(key)} == {
        "a.x",
        "a.y",
        "b.x",
        "c.x",
        "d.x",
        "d.y",
        "e.x",
        "f.x",
    }
    assert reads.unknown == {("a", "typo")}


@pytest.fixture(scope="module")
def reads() -> Reads:
    package = REPO / "stepsearch_jax"
    commands = {str(path) for path in package.glob("*.py")}
    return Reads(
        {str(path): path.read_text() for path in sorted(package.rglob("*.py"))},
        commands,
        base.get_config(),
    )


def test_no_key_is_dead(reads):
    assert [key for key in list_keys(base.get_config()) if not reads.is_read(key)] == []


def test_code_reads_only_keys_that_exist(reads):
    assert sorted(".".join(path) for path in reads.unknown) == []
