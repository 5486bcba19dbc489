"""The short form of tests/faults.py, which puts faults into real training processes."""

import faults
import pytest


@pytest.mark.slow
def test_faults_of_running_are_survived(capsys):
    """A full disk at a checkpoint, and a Ctrl-C while libraries load."""
    assert faults.main(["--short", "interrupts", "disks"]) == 0, capsys.readouterr().out


def test_unknown_kinds_are_refused():
    with pytest.raises(SystemExit):
        faults.main(["floods"])
