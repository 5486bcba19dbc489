"""Eight fake CPU devices for every test, set before jax is imported; the real data's folder."""

import os
import pathlib

# optimised compiling would take most of the tests' time
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" {COMPILE_FAST} --xla_force_host_platform_device_count=8"
)
os.environ["NPROC"] = "64"  # as in `runtime.start_jax`, for the reason given there
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
LONGEST = (
    "test_shipped_warm_start.py"  # runs first: as the last, it would keep one worker busy alone
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
    """The folder with real data sets, most of them by their names in `data.kind`.

    $STEPSEARCH_DATA, or shared/data beside the repository. Tests are skipped if it is missing.
    """
    path = pathlib.Path(os.environ.get("STEPSEARCH_DATA", REPO.parent / "shared/data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}: name its folder with STEPSEARCH_DATA")
    return path
