"""Writes a run's policy as a Hugging Face folder: transformers loads it, and vLLM reads folders of this form (not tried).

    python -m stepsearch_jax.export --config=configs/X.py[:arg] --workdir=DIR --folder=MODEL [--dtype=bfloat16] [--shard_gib=4] [--config.key=value …]

MODEL receives config.json, generation_config.json, the weights of DIR's newest checkpoint as safetensors, and the tokenizer. The flags that the run was trained
with are given here again.
"""
from __future__ import annotations

import logging
import operator
import os
import pathlib
import re

from absl import flags

from stepsearch_jax.models.huggingface import INDEX, export_policy
from stepsearch_jax.prompting.tokenizers import TOKENIZER_FILES, list_tokenizer_files
from stepsearch_jax.run_folder import check_readable
from stepsearch_jax.startup import begin_run, run_command
from stepsearch_jax.system import build_system

logger = logging.getLogger("stepsearch_jax")
EXPORTED = re.compile("|".join([r"model(-\d{5}-of-\d{5})?\.safetensors", *map(re.escape, ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES))]))


def check_target(folder: pathlib.Path, config) -> None:
    """Raises ValueError for a folder that must not be replaced: anything that is there, but an empty folder, or an earlier export and nothing else."""
    if folder.resolve() == pathlib.Path.cwd():
        raise ValueError(f"--folder={folder} is the current folder, which would be replaced: name another place")
    for key in ("model.checkpoint", "prompt.tokenizer"):
        if folder.resolve() == pathlib.Path(operator.attrgetter(key)(config)).resolve():
            raise ValueError(f"--folder={folder} is config.{key}, which would be replaced: name another place")
    if not os.path.lexists(folder):
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"no folder"}
    whole = "config.json" in names and any(name.endswith(".safetensors") for name in names)  # a run begins with a config.json, too
    if names and not (whole and all((folder / name).is_file() and EXPORTED.fullmatch(name) for name in names)):
        raise ValueError(f"--folder={folder} is there and holds no earlier export, or more than that: choose another place, or remove it")


def export(config, workdir: pathlib.Path, folder: pathlib.Path, dtype: str, shard_gib: float) -> None:
    """Writes WORKDIR's newest policy to `folder`, in files of at most shard_gib GiB. Raises FileNotFoundError where WORKDIR holds no run."""
    if not (workdir / "start").is_dir():
        raise FileNotFoundError(f"{workdir} holds no run (no start/): train one with python -m stepsearch_jax.train --config=… --workdir={workdir}")
    check_readable(workdir, config)
    check_target(folder, config)
    system = build_system(config, [])
    state, _, _, _ = begin_run(system, workdir)
    tokenizer = system.tokenizer
    export_policy(folder, state.policy.params, system.learner_model, dtype=dtype, shard_bytes=int(shard_gib * 2**30), context=config.rollout.context,
                  end_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, tokenizer_files=list_tokenizer_files(config.prompt.tokenizer, tokenizer))
    logger.info("wrote the policy after %d iterations to %s", int(state.iteration), folder)


def main() -> None:
    """The command."""
    folder = flags.DEFINE_string("folder", None, "Folder to write; an earlier export is replaced", required=True)
    flags.register_validator("folder", lambda path: "://" not in (path or ""), "it is written to a disk here; gcloud storage rsync brings it to a bucket")
    dtype = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "float16"], "Type of the written weights")
    shard_gib = flags.DEFINE_float("shard_gib", 4.0, "A larger model is written in several files of at most so many GiB", lower_bound=0.001)
    run_command(lambda config, workdir: export(config, workdir, pathlib.Path(folder.value), dtype.value, shard_gib.value))


if __name__ == "__main__":
    main()
