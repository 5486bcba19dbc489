"""Models by their name on the Hugging Face Hub: from its cache, or downloaded into it."""

from __future__ import annotations

import json
import logging
import pathlib
import re
from typing import Any

logger = logging.getLogger("stepsearch_jax")
_ADDRESS = "https://huggingface.co/"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of LoRA and its like
GENERATION = "generation_config.json"  # names the tokens that end a text
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# The files of each part of a model.
PARTS = {
    "weights": ("config.json", "*.safetensors", INDEX, ADAPTER),
    "tokenizer": (*TOKENIZER_FILES, GENERATION),
}
# Those of a text encoder, as sentence-transformers saves one.
PARTS["encoder"] = (
    *PARTS["weights"],
    *PARTS["tokenizer"],
    "modules.json",
    "*sentence*config.json",
    "1_Pooling/config.json",
)


def find_model(name: str, part: str, key: str) -> pathlib.Path:
    """The folder or file that `name` means: a path that exists, or a model on the Hub.

    A model on the Hub ("Qwen/Qwen2.5-0.5B") is taken from the Hub's cache if that holds it, without
    a question to the network, and downloaded otherwise. part: a key of PARTS; only its files are
    fetched. key: the config key that holds `name`, for messages. Any other name is
    returned as it is, for the reader to say what is missing. Raises FileNotFoundError with the
    remedy if the model is not in the cache and cannot be had.
    """
    path = pathlib.Path(name)
    if name.startswith(_ADDRESS):
        name = name.removeprefix(_ADDRESS).rstrip("/")
    if path.exists() or not _NAME.fullmatch(name) or path.suffix == ".gguf":
        return path
    import huggingface_hub  # takes a third of a second
    from huggingface_hub import constants, errors

    # From the cache.
    files: dict[str, Any] = dict(allow_patterns=[*PARTS[part]], ignore_patterns=["*/*.safetensors"])
    try:
        folder = pathlib.Path(
            huggingface_hub.snapshot_download(name, local_files_only=True, **files)
        )
        if _is_whole(folder, part):
            return folder
    except errors.LocalEntryNotFoundError:
        pass
    except errors.HFValidationError as error:
        raise FileNotFoundError(
            f"config.{key}={name}: there is no such folder, and the Hub can have no model of that "
            f"name ({error})"
        ) from error
    there = f"config.{key}={name}: there is no such folder, and the Hugging Face cache "
    there += f"{constants.HF_HUB_CACHE} does not hold the {part} of such a model"
    by_hand = f"`hf download {name}` where there is network, and copy the cache or set {key}"
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"{there}; HF_HUB_OFFLINE=1 forbids downloading it: unset it, or run {by_hand}"
        )
    # From the Hub.
    logger.info("downloading the %s of %s from the Hugging Face Hub", part, name)
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, **files))
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{there}; the Hub gives it to those who accepted its licence: accept it at "
            f"https://huggingface.co/{name}, and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{there}; the Hub has no such model, or shows it only to those who log in: check the "
            "name, or run `hf auth login`"
        ) from error
    except Exception as error:  # the library's own, its HTTP client's, the system's
        raise FileNotFoundError(
            f"{there}; downloading it failed ({type(error).__name__}: {error}): try again, or run "
            f"{by_hand}"
        ) from error
    if not _is_whole(folder, part):
        raise FileNotFoundError(
            f"config.{key}={name}: on the Hub it has no {' or '.join(PARTS[part][:2])}; choose a "
            "model that has"
        )
    return folder


def _is_whole(folder: pathlib.Path, part: str) -> bool:
    """Whether a snapshot holds all files of a part: the cache may have been filled in parts."""
    if part != "weights" and not (folder / "tokenizer.json").is_file():
        return False
    # Of an adapter, the reader says how it becomes a model.
    if part == "tokenizer" or (folder / ADAPTER).is_file():
        return True
    if not (folder / "config.json").is_file():
        return False
    if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / name).is_file() for name in names)
    return any(folder.glob("*.safetensors"))
