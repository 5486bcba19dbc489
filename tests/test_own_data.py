"""One's own questions: README's files and command, as they stand there; questions without gold."""

import dataclasses
import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest
import tiny
import tokenizers
from pretrained_models import EXPORT
from running import REPO

from configs import own_data
from stepsearch_jax.models.huggingface import export_policy
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.train import warn_of_no_gold

MODEL = dataclasses.replace(tiny.CONFIG, vocab_size=320, qkv_bias=True, tie_embeddings=True)


def write_hub_model(hub: pathlib.Path, name: str) -> None:
    """A tiny random Qwen2 model that reads bytes, as the Hub's cache would hold it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: number for number, byte in enumerate(alphabet)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<|im_end|>"])
    end = inner.token_to_id("<|im_end|>")
    files = {
        "tokenizer.json": inner.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>"}).encode(),
    }
    model = hub / f"models--{name.replace('/', '--')}"
    params = tiny.draw_params(Policy(MODEL), 0)
    given = EXPORT | dict(end_ids=[end], pad_id=end, other_files=files)
    export_policy(model / "snapshots" / "abc", params, MODEL, dtype="float32", **given)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("abc")


def readme_block() -> str:
    section = (REPO / "README.md").read_text().split("## Train on your own questions")[1]
    return section.split("```bash\n")[1].split("```")[0]


@pytest.mark.slow
def test_the_readme_trains_on_its_own_questions(tmp_path):
    """Its files and its command, in an empty folder, with fewer and shorter episodes."""
    write_hub_model(tmp_path / "hub", own_data.get_config().model.checkpoint)
    shorter = {
        "iterations": 1,
        "data.cache_dir": "cache",
        "prompt.max_prompt_tokens": 2400,
        "search.max_observation_tokens": 128,
        "rollout.prompts": 4,
        "rollout.max_turns": 1,
        "rollout.max_turn_tokens": 16,
        "rollout.context": 2560,
        "rl.minibatches": 1,
        "rl.width_buckets": 1,
    }
    flags = " ".join(f"--config.{key}={value}" for key, value in shorter.items())
    script = readme_block().replace("python -m", f"{sys.executable} -m").rstrip() + f" {flags}"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": str(REPO)}
    environment.pop("NPROC", None)
    environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    run = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "recall@3 of the gold passages for the gold sub-questions: 1.000" in run.stderr
    results = json.loads((tmp_path / "runs/mine/evaluation.json").read_text())
    assert results["questions"] == 1 and results["retrieval"]["documents"] == 3
    assert results["after"]["gold_recall"] is not None
    written = json.loads((tmp_path / "runs/mine/config.json").read_text())
    assert written["model"]["num_layers"] == MODEL.num_layers


def test_questions_without_gold_are_warned_of(caplog):
    class Split:
        def __init__(self, gold_ids):
            self.questions = [type("Question", (), {"gold_ids": gold_ids})]

    def warned(gold_ids, **reward) -> bool:
        config = own_data.get_config()
        config.reward.update(reward)
        system = type("System", (), {"config": config, "splits": {"train": Split(gold_ids)}})
        caplog.clear()
        with caplog.at_level(logging.WARNING, "stepsearch_jax"):
            warn_of_no_gold(system)
        return "gold" in caplog.text

    assert warned(())
    assert not warned((3,))
    assert not warned((), step_reward="answer_logprob")
    assert not warned((), use_gain=False)
