"""Eight fake CPU devices for every test, set before jax is imported; the real data's folder."""

import gc
import importlib.metadata
import logging
import os
import pathlib

# Compiling takes most of the tests' time. Without optimisation, and with XLA's older emitters where
# there are any, it takes half as long. XLA ends the process at a flag that it does not know.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# At night programs are compiled with the emitters that users have: sums round otherwise there.
knows_the_flags = importlib.metadata.version("jaxlib").startswith("0.10.")
if knows_the_flags:
    COMPILE_FAST += " --xla_cpu_parallel_codegen_split_count=1"
if knows_the_flags and os.environ.get("NIGHTLY") != "1":
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" {COMPILE_FAST} --xla_force_host_platform_device_count=8"
)
os.environ["NPROC"] = "64"  # as in `runtime.start_jax`, for the reason given there
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
MARKERS = ("slow", "nightly")  # tests with one of them run on request only
# Files that take long run first: as the last, they would keep one worker busy alone.
LONGEST = (
    *("train", "shipped_warm_start", "processes", "preflight", "rollout", "failures", "learner"),
    *("serve", "answer_gain", "examples", "memory", "huggingface", "models", "losses", "sampling"),
)


def slow_but_for(quick, cases):
    """The values of `cases` as parameters of a test by their names; all but those in `quick` slow.

    cases: dict of values by name, or the names alone.
    """
    values = cases if isinstance(cases, dict) else dict(zip(cases, cases))
    return [
        pytest.param(value, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, value in values.items()
    ]


def pytest_addoption(parser):
    for marker in MARKERS:
        parser.addoption(
            f"--{marker}",
            action="store_true",
            default=os.environ.get(marker.upper()) == "1",
            help=f"also run the tests marked {marker}",
        )


def pytest_collection_finish():
    """Tracing makes many objects: let the collector look less often, at imported code never."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(config, items):
    for marker in MARKERS:
        if not config.getoption(f"--{marker}"):
            reason = f"{marker}: run with --{marker} or {marker.upper()}=1"
            for item in items:
                if marker in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=reason))
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def logging_as_before():
    """A command that a test calls in this process logs to a stream that the test's end closes."""
    logger = logging.getLogger("stepsearch_jax")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, level = before
    logger.setLevel(level)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder with real data sets, most of them by their names in `data.kind`.

    $STEPSEARCH_DATA, or shared/data beside the repository. Tests are skipped if it is missing.
    """
    path = pathlib.Path(os.environ.get("STEPSEARCH_DATA", REPO.parent / "shared/data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}: name its folder with STEPSEARCH_DATA")
    return path
