"""Eight fake CPU devices for every test, set before anything imports jax; and where the real data lies."""

import os
import pathlib

COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # most of the tests' time would go into compiling well

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" {COMPILE_FAST} --xla_force_host_platform_device_count=8"
)
os.environ["NPROC"] = "64"  # as `runtime.start_jax` sets it, and says why
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]


LONGEST = (
    "test_shipped_warm_start.py"  # begins first: begun last, it would keep one worker busy alone
)


def pytest_addoption(parser):
    parser.addoption(
        "--slow",
        action="store_true",
        default=os.environ.get("SLOW") == "1",
        help="also run the tests marked slow",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow or SLOW=1")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder with real data sets, by their names in `data.kind` and more: $STEPSEARCH_DATA, or shared/data beside the repository. Tests that need it are
    skipped where it is missing."""
    path = pathlib.Path(os.environ.get("STEPSEARCH_DATA", REPO.parent / "shared/data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}: name its folder with STEPSEARCH_DATA")
    return path
