"""The deliberate faults: docs/losses.md lists them, each applies, and missed ones are reported."""

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
    with pytest.raises(ValueError, match="0 times"):
        mutations.apply(fault._replace(old="text that no file holds"), tmp_path)


@pytest.mark.slow
def test_missed_and_caught_faults_are_reported(monkeypatch, capsys):
    sentence = "Sum of `x` where `mask`."
    harmless = Fault("harmless", MASKING, sentence, f"The {sentence}", "test_masking.py")
    caught = next(fault for fault in FAULTS if fault.file == MASKING)
    monkeypatch.setattr(mutations, "FAULTS", (harmless, caught))
    assert mutations.main([]) == 1
    assert re.findall(r"^(caught|MISSED)  (.+?)  ", capsys.readouterr().out, re.MULTILINE) == [
        ("MISSED", "harmless"),
        ("caught", caught.name),
    ]
    assert mutations.main([caught.name]) == 0
