r"""Writes a run's policy as a Hugging Face folder.

    python -m stepsearch_jax.export --workdir=DIR --folder=MODEL \
        [--dtype=bfloat16] [--shard_gib=4] [--config.key=value …]
    python -m stepsearch_jax.export --config=atlas_quickstart --folder=MODEL

MODEL receives config.json, generation_config.json, the weights of DIR's newest checkpoint as
safetensors, the tokenizer, and prompt.txt: the prompt that the policy expects, with {question} in
the question's place. The config is that of the run, DIR/config.json; flags change it. Without
--workdir, the policy is the one that the config names: sft.checkpoint, such as the shipped warm
start, or model.checkpoint. transformers loads the folder; vLLM reads folders of this form (not
tried).

The tokenizer of Atlas lies in MODEL/tokenizer: in MODEL itself, transformers' AutoTokenizer would
take it for Qwen2's, as config.json says Qwen2, and read every text wrongly.
"""

from __future__ import annotations

import argparse
import pathlib

from stepsearch_jax import cli


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = cli.make_parser("export", __doc__, "policy")
    parser.add_argument(
        "--folder",
        required=True,
        type=_name_folder,
        metavar="MODEL",
        help="folder to write; an earlier export is replaced",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="type of the written weights (default: %(default)s)",
    )
    parser.add_argument(
        "--shard_gib",
        "--shard-gib",
        type=float,
        default=4.0,
        metavar="GIB",
        help="largest size of a weight file; a larger model is written as several files "
        "(default: %(default)s)",
    )
    return parser


def _name_folder(text: str) -> pathlib.Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            "name a local folder; gcloud storage rsync copies it to a bucket"
        )
    return pathlib.Path(text)


if __name__ == "__main__":  # before the imports that take seconds
    options = cli.parse_flags(make_parser())
    if not 1e-3 < options.shard_gib < float("inf"):
        raise SystemExit(
            f"stepsearch_jax: --shard_gib={options.shard_gib} must be a number above 0.001"
        )

import logging
import operator
import os
import re

from stepsearch_jax.files import naming_failures
from stepsearch_jax.hub import GENERATION, INDEX, TOKENIZER_FILES
from stepsearch_jax.models.huggingface import export_policy
from stepsearch_jax.prompting.templates import TEMPLATES
from stepsearch_jax.prompting.tokenizers import Tokenizer, list_tokenizer_files
from stepsearch_jax.run.folder import check_has_run, check_readable
from stepsearch_jax.run.pretrained import open_weights
from stepsearch_jax.run.start import load_newest_policy
from stepsearch_jax.run.system import build_system

logger = logging.getLogger("stepsearch_jax")
PROMPT = "prompt.txt"
APART = "tokenizer"  # the folder of a tokenizer that AutoTokenizer would misread
EXPORTED = re.compile(
    "|".join(
        [
            r"model(-\d{5}-of-\d{5})?\.safetensors",
            *map(re.escape, ("config.json", GENERATION, INDEX, PROMPT)),
            rf"({APART}/)?({'|'.join(map(re.escape, TOKENIZER_FILES))})",
        ]
    )
)


def check_target(folder: pathlib.Path, config) -> None:
    """Raises ValueError unless `folder` is missing, empty or just an earlier export."""
    if folder.resolve() == pathlib.Path.cwd():
        raise ValueError(
            f"--folder={folder} is the current folder, which would be replaced: name another place"
        )
    for key in ("model.checkpoint", "prompt.tokenizer"):
        if folder.resolve() == pathlib.Path(operator.attrgetter(key)(config)).resolve():
            raise ValueError(
                f"--folder={folder} is config.{key}, which would be replaced: name another place"
            )
    place = folder.absolute().parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--folder={folder}: {place} is no folder that can be written")
    if folder.is_symlink():
        raise ValueError(f"--folder={folder} is a link: name {folder.resolve()} itself")
    if not folder.exists():
        return
    names = {"no folder"}
    if folder.is_dir():
        paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
        names = {path.relative_to(folder).as_posix() for path in paths}
    # Only exports have a prompt.txt; other models and runs have some of the other files, too.
    whole = {"config.json", PROMPT} <= names
    own = all((folder / name).is_file() and EXPORTED.fullmatch(name) for name in names)
    if names and not (whole and own):
        raise ValueError(
            f"--folder={folder} is there and holds no earlier export, or more than that: choose "
            "another folder, or remove it"
        )


def export(
    config, workdir: pathlib.Path | None, folder: pathlib.Path, dtype: str, shard_gib: float
) -> None:
    """Writes WORKDIR's newest policy, or the one that the config names, to `folder`.

    In files of at most shard_gib GiB. Raises FileNotFoundError if WORKDIR holds no run.
    """
    open_weights(config)  # gives the config the sizes that it leaves to the checkpoint
    if workdir is not None:
        check_has_run(workdir)
        check_readable(workdir, config)
    check_target(folder, config)
    system = build_system(config, [])
    params = load_newest_policy(system, workdir)
    tokenizer = system.tokenizer
    with naming_failures(folder):
        export_policy(
            folder,
            params,
            system.learner_model,
            dtype=dtype,
            shard_bytes=int(shard_gib * 2**30),
            context=config.rollout.context,
            end_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            other_files=list_other_files(config.prompt, tokenizer),
        )
    logger.info("wrote the policy to %s", folder)


def list_other_files(prompt_config, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Name -> content of the tokenizer's files and of prompt.txt."""
    files = list_tokenizer_files(prompt_config.tokenizer, tokenizer)
    if prompt_config.tokenizer == "atlas":
        files = {f"{APART}/{name}": raw for name, raw in files.items()}
    return files | {PROMPT: TEMPLATES[prompt_config.template].encode()}


if __name__ == "__main__":
    cli.run_guarded(
        lambda config, workdir: export(
            config, workdir, options.folder, options.dtype, options.shard_gib
        ),
        options.config,
        options.workdir,
    )
