"""The script of deliberate faults: its list is that of docs/losses.md, each fault still applies, and it tells a caught fault from a missed one."""

import re

import mutations
import pytest
from mutations import FAULTS, MASKING, REPO, Fault


def test_the_page_lists_every_fault():
    listed = (REPO / "docs/losses.md").read_text().split("## Deliberate faults")[1]
    assert re.findall(r"^- (.+?): `(.+?)`, by `(.+?)`$", listed, re.MULTILINE) == [
        (fault.name, fault.file.removeprefix("stepsearch_jax/"), fault.tests.split()[0])
        for fault in FAULTS
    ]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_applies(fault, tmp_path):
    copy = tmp_path / fault.file
    copy.parent.mkdir(parents=True)
    copy.write_text((REPO / fault.file).read_text())
    mutations.apply(fault, tmp_path)
    compile(copy.read_text(), fault.file, "exec")
    with pytest.raises(ValueError, match="stands 0 times"):
        mutations.apply(fault._replace(old="text that no file holds"), tmp_path)


@pytest.mark.slow
def test_a_missed_fault_is_told_from_a_caught_one(monkeypatch, capsys):
    harmless = Fault(
        "harmless",
        MASKING,
        "Sum of `x` where `mask`.",
        "The sum of `x` where `mask`.",
        "test_masking.py",
    )
    caught = next(fault for fault in FAULTS if fault.file == MASKING)
    monkeypatch.setattr(mutations, "FAULTS", (harmless, caught))
    assert mutations.main([]) == 1
    assert re.findall(r"^(caught|MISSED)  (.+?)  ", capsys.readouterr().out, re.MULTILINE) == [
        ("MISSED", "harmless"),
        ("caught", caught.name),
    ]
    assert mutations.main([caught.name]) == 0
