"""A run's policy exported for other libraries: newest checkpoint, and a tokenizer that agrees."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import running
import tiny_config
from pretrained_models import GOLDEN, load
from transformers import AutoTokenizer, GenerationConfig

from stepsearch_jax import export
from stepsearch_jax.models.huggingface import export_policy, open_checkpoint
from stepsearch_jax.models.weights import load_policy
from stepsearch_jax.prompting.templates import render_prompt
from stepsearch_jax.run import start
from stepsearch_jax.run.system import build_system


def test_a_bucket_is_no_folder():
    """With pathlib, gs:// would become a local folder gs:"""
    command = [
        sys.executable,
        "-m",
        "stepsearch_jax.export",
        "--config=configs/atlas_quickstart.py",
        "--workdir=runs/none",
        "--folder=gs://bucket/model",
    ]
    done = subprocess.run(command, cwd=running.REPO, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("stepsearch_jax: argument --folder: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "files",
    [
        ["notes.txt"],
        ["config.json", "start/_METADATA"],
        ["config.json", "model.safetensors", "notes.txt"],
        ["config.json", "tokenizer.json/file"],
        ["config.json", "model.safetensors", "tokenizer/notes.txt"],
        ["model.safetensors"],
        ["config.json"],
        None,
    ],
)
def test_what_is_no_export_is_not_replaced(tmp_path, files, monkeypatch):
    folder, config = tmp_path / "there", tiny_config.get_config("")
    for name in files or ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if files is None:
        folder.write_text("a file")
    with pytest.raises(ValueError, match=f"{folder} .*no earlier export"):
        export.check_target(folder, config)
    with pytest.raises(ValueError, match=f"{tmp_path} .*no earlier export"):
        export.check_target(tmp_path, config)
    config.prompt.tokenizer = str(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="config.prompt.tokenizer"):
        export.check_target(tmp_path / "tokenizer", config)
    (tmp_path / "empty").mkdir()
    export.check_target(tmp_path / "empty", config)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(ValueError, match="link is a link"):
        export.check_target(tmp_path / "link", config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no folder"):
        export.check_target(tmp_path / "file/deep/model", config)
    export.check_target(tmp_path / "new/deep/model", config)


def test_a_model_of_another_program_is_not_replaced(tmp_path):
    """It has the same files as an export, but for the prompt."""
    config = tiny_config.get_config("cache")
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="no earlier export"):
        export.check_target(tmp_path, config)
    (tmp_path / "prompt.txt").write_text("")
    export.check_target(tmp_path, config)


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    config = tiny_config.get_config("cache")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for current in ("", ".", str(tmp_path / "empty")):
        with pytest.raises(ValueError, match="current folder"):
            export.check_target(pathlib.Path(current), config)


def test_all_end_tokens_are_exported(tmp_path):
    """And read again by transformers: a model of several ends stops at each of them."""
    config, params = load(GOLDEN / "qwen2")
    ends = dict(end_ids=[3, 1, 2], pad_id=0, other_files={})
    sizes = dict(shard_bytes=1 << 30, context=64)
    export_policy(tmp_path / "model", params, config, dtype="float32", **sizes, **ends)
    exported = GenerationConfig.from_pretrained(tmp_path / "model")
    assert exported.eos_token_id == [3, 1, 2] and exported.pad_token_id == 0


@pytest.mark.slow
def test_a_run_is_exported(tmp_path, tmp_path_factory):
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    with pytest.raises(FileNotFoundError, match="holds no run"):
        export.export(config, tmp_path / "run", tmp_path / "model", "float32", 0.001)
    system = build_system(config, [])
    state, _, checkpoints, _ = start.begin_run(system, tmp_path / "run")
    running.write_run(tmp_path / "run", config)
    params = jax.tree.map(lambda leaf: leaf + 0.5, state.policy.params)
    newer = state.replace(policy=state.policy.replace(params=params))
    checkpoints.save(1, newer)
    checkpoints.close()

    with pytest.raises(ValueError, match="run .*no earlier export"):
        export.export(config, tmp_path / "run", tmp_path / "run", "float32", 0.001)
    for _ in range(2):  # an earlier export is replaced
        export.export(config, tmp_path / "run", tmp_path / "model", "float32", 0.001)
    exported = open_checkpoint(tmp_path / "model")
    again = load_policy(exported, system.learner_model, newer.policy.params)
    jax.tree.map(np.testing.assert_array_equal, again, newer.policy.params)
    assert not (tmp_path / "model/tokenizer.json").exists()  # which would be read as Qwen2's
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model/tokenizer")
    prompt = (tmp_path / "model/prompt.txt").read_text()
    question = "Who is the founder of the employer of Galine Farnby?"
    assert prompt.replace("{question}", question) == render_prompt("short", question)
    text = (
        " Question: Who is the founder of the employer of Galine Farnby?\n"
        "<search> Galine Farnby employer</search>"
    )
    tokens = theirs(text).input_ids
    assert tokens == system.tokenizer.encode(text) and theirs.decode(tokens) == text
    assert theirs.eos_token_id == system.tokenizer.eos_ids[0]
