"""The layers of the package: who may import whom, and which libraries stay out of which layers."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "stepsearch_jax"
# From the bottom up: a file imports from its own layer and from layers before it. The commands,
# last, import everything.
LAYERS = (
    "choices",
    "records",
    "words",
    "types",
    "masking",
    "sharding",
    "addresses",
    "files",
    "signals",
    "hub",
    "loggers",
    "metrics",
    "data",
    "search",
    "plugins",
    "prompting",
    "models",
    "dense",
    "rewards",
    "rollout",
    "rl",
    "checksums",
    "checkpoint",
    "runtime",
    "report",
    "run",
    "evaluation",
    "sweeps",
    "cli",
    "commands",
)
COMMANDS = {"train", "evaluate", "ask", "export", "serve", "prepare", "preflight", "benchmark"}
HOST = {
    "records",
    "words",
    "addresses",
    "loggers",
    "metrics",
    "data",
    "search",
    "plugins",
    "prompting",
    "rewards.scoring",
    "rewards.text_metrics",
    "rewards.tfidf",
    "evaluation.measures",
    "report",
    "sweeps",
    "run.config_file",
    "run.folder",
}
# load without jax, so that --help and wrong flags are answered at once
LIGHT = {"cli", "files", "signals", "serve", "prepare", "benchmark.cases", "benchmark.__main__"}
DEVICE = {"types", "masking", "sharding", "models", "rewards.placement", "rl"} | {
    "checksums",
    "checkpoint",
}
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax"}
# the only users of bm25s, which starts jax when it is imported
LAZY = {"search/bm25.py", "data/atlas_questions.py"}


def module_of(path: pathlib.Path, package: pathlib.Path = PACKAGE) -> str:
    """search/bm25.py -> "search.bm25"; rl/__init__.py -> "rl"."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    first = module.split(".")[0]
    return "commands" if first in COMMANDS or module.endswith("__main__") else first


def find_imports(tree: ast.AST) -> list[tuple[ast.stmt, str]]:
    """Every import statement with the full name of what it brings in; imports from a package name
    the module where there is one.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; name the layer"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node, name if is_module(name) else node.module) for name in names]
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.parent / pathlib.Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def side_of(module: str) -> str | None:
    """ "host", "device", or None: the bridge and the commands, which touch both."""
    for side, layers in (("host", HOST), ("device", DEVICE)):
        if module in layers or module.split(".")[0] in layers:
            return side
    return None


def check_file(module: str, source: str) -> list[str]:
    """What a file's imports break, as sentences."""
    tree, faults = ast.parse(source), []
    top_level = {id(node) for node in tree.body}
    for node, name in find_imports(tree):
        library, _, target = name.partition(".")
        where = f"{module} line {node.lineno} imports {name}"
        if library == "bm25s":
            file = module.replace(".", "/") + ".py"
            if file not in LAZY:
                faults.append(f"{where}: only {sorted(LAZY)} may")
            elif id(node) in top_level:
                faults.append(f"{where} when it is loaded: only inside a function")
        if library in DEVICE_LIBRARIES and side_of(module) == "host":
            faults.append(f"{where}: a host layer")
        if library != "stepsearch_jax" or not target:
            continue
        if not module:  # the package itself, which loads before all layers
            continue
        if LAYERS.index(layer_of(target)) > LAYERS.index(layer_of(module)):
            faults.append(f"{where}: that layer comes later")
        if {side_of(module), side_of(target)} == {"host", "device"}:
            faults.append(f"{where}: only rollout and the commands touch both sides")
    return faults


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_file_has_a_layer():
    unknown = {
        module: path for module, path in FILES.items() if module and layer_of(module) not in LAYERS
    }
    assert not unknown, "give them a place in LAYERS"
    assert len(FILES) > 30


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_layers(module):
    assert not check_file(module, FILES[module].read_text())


@pytest.mark.parametrize(
    "module,source,complaint",
    [
        ("search.bm25", "import jax.numpy", "a host layer"),
        ("rewards.tfidf", "def f():\n    from flax import linen", "a host layer"),
        ("search.bm25", "import bm25s", "inside a function"),
        ("search.callback", "def f():\n    import bm25s", "may"),
        ("models.transformer", "from stepsearch_jax.rl import learner", "later"),
        ("models.transformer", "from stepsearch_jax import rollout", "later"),
        ("models.transformer", "from stepsearch_jax.prompting.tags import TAGS", "both sides"),
        ("checkpoint", "from stepsearch_jax.records import Episode", "both sides"),
        ("metrics", "from stepsearch_jax import masking", "both sides"),
        ("data.loading", "from stepsearch_jax.search import bm25", "later"),
        ("rl.learner", "import stepsearch_jax.run.system", "later"),
    ],
)
def test_the_check_finds_faults(module, source, complaint):
    assert any(complaint in fault for fault in check_file(module, source))


def test_the_check_lets_good_imports_pass():
    assert not check_file(
        "rollout.text",
        "import jax\nfrom stepsearch_jax.prompting.tags import TAGS\nfrom stepsearch_jax.types "
        "import Batch",
    )
    assert not check_file(
        "train",
        "import jax\nfrom stepsearch_jax import checkpoint\nfrom stepsearch_jax.report.page "
        "import write_report",
    )
    assert not check_file("search.bm25", "def f():\n    import bm25s")


def test_host_layers_load_without_jax():
    """Not through others either: a fresh interpreter loads every host file."""
    light = lambda module: (
        side_of(module) == "host" or not LIGHT.isdisjoint((module, module.split(".")[0]))
    )
    modules = [
        f"stepsearch_jax.{module}"
        for module in FILES
        if light(module) and module != "prepare.__main__"
    ]
    assert len(modules) > 15
    program = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
        f"sys.exit(' '.join({DEVICE_LIBRARIES | {'bm25s'}} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
