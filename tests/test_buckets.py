"""Folders in buckets: early refusals, and names that stay whole. No bucket is contacted."""

import importlib.util
import pathlib

import pytest

from stepsearch_jax import files
from stepsearch_jax.run import warm_start


@pytest.mark.parametrize("there", [(), ("gcsfs",), ("tensorflow",)])
def test_a_bucket_needs_a_package(there, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    files.check_buckets("runs/a", "")
    if there:
        files.check_buckets("gs://bucket/run", "")
        return
    for folders in (("gs://bucket/run", ""), ("runs/a", "gs://bucket/run")):
        with pytest.raises(ValueError, match="^gs://bucket/run.*gcsfs"):
            files.check_buckets(*folders)


def test_a_checkpoint_in_a_bucket_keeps_its_name(tmp_path):
    assert str(warm_start.find_checkpoint("gs://bucket/run/start")) == "gs://bucket/run/start"
    assert str(warm_start.find_checkpoint(str(tmp_path))) == str(tmp_path)
    assert warm_start.find_checkpoint("configs/none") == pathlib.Path("configs/none")
