"""A model that is named, not described: its sizes come from its files."""

import json
import shutil

import ml_collections
import numpy as np
import pytest
import running
from pretrained_models import CASES, GOLDEN

from configs import base
from stepsearch_jax.models.weights import check_architecture
from stepsearch_jax.run.pretrained import open_weights
from stepsearch_jax.run.settings import describe_models


@pytest.mark.parametrize("case", CASES)
def test_sizes_of_zero_are_the_checkpoints(case):
    """Also after the config was written and read again, as a resumed run does."""
    config = base.get_config()
    config.model.checkpoint, config.model.num_layers = str(GOLDEN / case), 0
    weights = open_weights(config)
    assert config.model.num_layers == weights.fields["num_layers"] > 0
    for found in (config, ml_collections.ConfigDict(json.loads(config.to_json()))):
        model, _ = describe_models(found, weights.fields["vocab_size"])
        check_architecture(weights, model)
        assert model.rope_scaling == weights.fields["rope_scaling"]
    assert open_weights(config).fields == weights.fields  # and nothing is left to fill in


def test_given_sizes_stay():
    config = base.get_config()
    config.model.checkpoint = str(GOLDEN / "qwen2")
    before = config.to_json()
    open_weights(config)
    assert config.to_json() == before


def test_without_a_checkpoint_there_are_no_sizes():
    config = base.get_config()
    assert open_weights(config) is None
    config.model.num_layers = 0
    with pytest.raises(ValueError, match="model.num_layers=0 .* model.checkpoint"):
        open_weights(config)


@pytest.mark.slow
def test_a_model_by_its_name(tmp_path, tmp_path_factory, monkeypatch):
    """A run from the Hub's cache, without network; its config.json has the sizes; an export."""
    name, hub = "some-org/Small-0.1B", tmp_path / "hub"
    model = hub / "models--some-org--Small-0.1B"
    shutil.copytree(GOLDEN / "qwen3_yarn", model / "snapshots" / "abc")
    (model / "refs").mkdir()
    (model / "refs/main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    cache, workdir = running.shared_cache(tmp_path_factory), tmp_path / "run"
    flags = [f"--config.model.checkpoint={name}", "--config.model.num_layers=0"]
    flags += ["--config.iterations=0", "--config.sft.phases=()", "--config.evaluation.questions=4"]
    running.run_command("train", cache, workdir, *flags)
    written = json.loads((workdir / "config.json").read_text())["model"]
    fields = json.loads((GOLDEN / "qwen3_yarn/config.json").read_text())
    assert written["checkpoint"] == name and written["num_layers"] == fields["num_hidden_layers"]
    assert written["qk_norm"] and written["rope_scaling"]["kind"] == "yarn"
    # The run's own config.json spares the export these flags.
    command = [
        "-m",
        "stepsearch_jax.export",
        f"--workdir={workdir}",
        f"--folder={tmp_path / 'out'}",
    ]
    process = running.start(command, log=tmp_path / "export.log")
    assert process.wait(timeout=300) == 0, (tmp_path / "export.log").read_text()[-3000:]
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert exported["hidden_size"] == fields["hidden_size"]
    start = running.read_tree(workdir / "start")
    scale = next(leaf for key, leaf in start.items() if "final_norm" in key)
    from safetensors.numpy import load_file

    tensors = load_file(next((GOLDEN / "qwen3_yarn").glob("*.safetensors")))
    np.testing.assert_array_equal(scale, tensors["model.norm.weight"])
