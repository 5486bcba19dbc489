"""Writes a run's policy as a Hugging Face folder, which transformers and vLLM load.

    python -m stepsearch_jax.export --config=configs/X.py[:arg] --workdir=DIR --folder=MODEL [--dtype=bfloat16] [--shard_gib=4] [--config.key=value …]

MODEL receives config.json, generation_config.json, the weights of DIR's newest checkpoint as safetensors, and the tokenizer. The flags that the run was trained
with are given here again.
"""
from __future__ import annotations

import logging
import pathlib

from absl import flags

from stepsearch_jax.models.huggingface import export_policy
from stepsearch_jax.prompting.tokenizers import list_tokenizer_files
from stepsearch_jax.run_folder import check_readable
from stepsearch_jax.startup import begin_run, run_command
from stepsearch_jax.system import build_system

logger = logging.getLogger("stepsearch_jax")

FOLDER = flags.DEFINE_string("folder", None, "Folder to write; an earlier one is replaced", required=True)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "float16"], "Type of the written weights")
SHARD_GIB = flags.DEFINE_float("shard_gib", 4.0, "A larger model is written in several files of at most this size", lower_bound=0.001)


def export(config, workdir: pathlib.Path) -> None:
    """The command. Raises FileNotFoundError where DIR holds no run."""
    if not (workdir / "start").is_dir():
        raise FileNotFoundError(f"{workdir} holds no run (no start/): train one with python -m stepsearch_jax.train --config=… --workdir={workdir}")
    check_readable(workdir, config)
    system = build_system(config, [])
    state, _, _, _ = begin_run(system, workdir)
    tokenizer = system.tokenizer
    export_policy(pathlib.Path(FOLDER.value), state.policy.params, system.learner_model, dtype=DTYPE.value, shard_bytes=int(SHARD_GIB.value * 2**30),
                  context=config.rollout.context, end_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id,
                  tokenizer_files=list_tokenizer_files(config.prompt.tokenizer, tokenizer))
    logger.info("wrote the policy after %d iterations to %s", int(state.iteration), FOLDER.value)


if __name__ == "__main__":
    run_command(export)
