"""Hugging Face folders of the Qwen2, Qwen3 and Llama families: reading and export.

A folder holds `config.json` and `*.safetensors`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from functools import partial

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives NumPy the type bfloat16, which safetensors asks it for)
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from stepsearch_jax.files import name_beside, remove_leftovers
from stepsearch_jax.hub import ADAPTER, INDEX, SINGLE
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.huggingface_config import ARCHITECTURES, read_fields
from stepsearch_jax.models.weights import (
    EMBEDDING,
    LM_HEAD,
    Place,
    Weights,
    WeightTensor,
    list_file_tensors,
    list_places,
    same_values,
)

logger = logging.getLogger("stepsearch_jax")
STORED_TYPES = {"F64", "F32", "F16", "BF16"}
# Endings of tensors that old files hold and no model needs.
CONSTANTS = ("rotary_emb.inv_freq", "embeddings.position_ids")
MERGE = (
    "merge it into its model first: "
    "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW)"
)
CONVERT = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) of transformers"


def open_checkpoint(path: pathlib.Path) -> Weights:
    """The weights of a checkpoint, a Hugging Face folder or a .gguf file.

    No tensor is read yet, unless config.json says that embedding and output share a table and the
    files hold two: these are compared. Raises FileNotFoundError for a missing folder or file, and
    ValueError for an architecture, rotary scaling or number type that is not supported, for an
    adapter (LoRA), and for files that contradict each other.
    """
    if path.suffix == ".gguf":
        from stepsearch_jax.models.gguf import open_gguf  # the package behind it is optional

        return open_gguf(path)
    if (path / ADAPTER).is_file():
        raise ValueError(
            f"{path} holds an adapter ({ADAPTER}), such as LoRA's, besides or instead "
            f"of a model: {MERGE}"
        )
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {file}: a checkpoint is a folder with config.json and *.safetensors, or "
            "a .gguf file"
        )
    try:
        fields = read_fields(json.loads(file.read_text(encoding="utf-8")))
    # The last three: the file is no table, or holds a word or 0 where a number is needed.
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{file} lacks the key {error}") from error
    tensors = _name_policy_tensors(list_tensors(path), path)
    _settle_tying(fields, tensors)
    return Weights(path, fields, tensors)


def _name_policy_tensors(
    tensors: dict[str, WeightTensor], folder: pathlib.Path
) -> dict[str, WeightTensor]:
    """The tensors of a causal language model under their full names.

    As in transformers, the prefix "model." may be missing or stand twice, and the heads of other
    tasks are ignored. Raises ValueError if two tensors have the same full name.
    """
    named, written, others = {}, {}, []
    for name, tensor in tensors.items():
        full = name
        if name.startswith(("embed_tokens.", "layers.", "norm.")):
            full = f"model.{name}"
        elif name.startswith(("model.model.", "model.lm_head.")):
            full = name.removeprefix("model.")
        if not full.startswith(("model.", "lm_head.")):
            others.append(name)
        elif full in named:
            raise ValueError(
                f"{folder} holds {full} twice, as {written[full]} in {named[full].file.name} and "
                f"as {name} in {tensor.file.name}: remove the one that is out of date"
            )
        else:
            named[full], written[full] = tensor, name
    if others:
        logger.warning(
            "%s: ignoring %s, which no causal language model has", folder, ", ".join(sorted(others))
        )
    return named


def _settle_tying(fields: dict[str, object], tensors: dict[str, WeightTensor]) -> None:
    """One table or two, if config.json says one: as transformers, by what the files hold.

    One table under either name is both; two different ones are not tied.
    """
    if not fields["tie_embeddings"] or LM_HEAD not in tensors:
        return
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = tensors.pop(LM_HEAD)
    elif same_values(tensors[EMBEDDING], tensors[LM_HEAD]):
        del tensors[LM_HEAD]
    else:
        fields["tie_embeddings"] = False


def list_tensors(folder: pathlib.Path) -> dict[str, WeightTensor]:
    """The tensors of a folder's safetensors files. None is read yet.

    Raises FileNotFoundError for missing files, ValueError for a file that cannot be read, for a
    number type that is not supported, and for tensors that stand in several files without an index.
    """
    files = _list_files(folder)
    has_index = len(files) > 1 and (folder / INDEX).is_file()
    tensors = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}, which {INDEX} names")
        try:
            with safetensors.safe_open(file, framework="np") as weights:
                for name in weights.keys():
                    if name.endswith(CONSTANTS):
                        continue
                    if name in tensors and not has_index:
                        raise ValueError(
                            f"{tensors[name].file} and {file.name} both hold {name}, and no "
                            f"{INDEX} says which counts: remove the files that are out of date"
                        )
                    part = weights.get_slice(name)
                    if part.get_dtype() not in STORED_TYPES:
                        raise ValueError(
                            f"{file}: {name} is stored as {part.get_dtype()}; supported are "
                            f"{', '.join(sorted(STORED_TYPES))}: name a model that is not quantized"
                        )
                    read = partial(_read_tensor, file, name)
                    tensors[name] = WeightTensor(file, tuple(part.get_shape()), read)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    return tensors


def _list_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """model.safetensors, as in transformers; or those of the index, or else all there are."""
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        if index.is_file():
            logger.warning("%s: reading %s, not the files of %s", folder, SINGLE, INDEX)
        return [single]
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return sorted({folder / file for file in named})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is no index of tensors, with the files that hold them under the key "
                "weight_map: fetch it again"
            ) from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no *.safetensors; convert other formats (*.bin) first: {CONVERT} "
            "writes such a folder"
        )
    return files


def _read_tensor(file: pathlib.Path, name: str) -> np.ndarray:
    # Opened for each tensor, so that pages of the others do not stay mapped.
    with safetensors.safe_open(file, framework="np") as weights:
        return weights.get_tensor(name)


# ---- Export -------------------------------------------------------------------------------------


def export_policy(
    folder: pathlib.Path,
    params,
    config: ModelConfig,
    *,
    dtype: str,
    shard_bytes: int,
    context: int,
    end_ids: Sequence[int],
    pad_id: int,
    other_files: Mapping[str, bytes],
) -> None:
    """Writes a folder that transformers loads. All processes call it; the first one writes.

    A folder of this name is replaced once the new one is complete.
    dtype: of the written weights, "float32", "bfloat16" or "float16". shard_bytes: a larger model
    is written to several files with an index; the host holds one file at a time. context: the
    longest text that the model can read, for config.json. end_ids: tokens that end a text.
    other_files: name -> content, such as those of `prompting.tokenizers.list_tokenizer_files`; a
    name may have folders. Raises ValueError for an architecture that
    belongs to none of the families.
    """
    first = jax.process_index() == 0
    made, old = name_beside(folder, "made"), name_beside(folder, "old")
    contents = _describe(config, dtype, context, end_ids, pad_id)
    files = _cut_into_files(params, config, dtype, shard_bytes)
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    if first:
        remove_leftovers(folder)
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
    try:
        # Weights, file by file. Every process takes part in fetching them.
        for file, tensors in files:
            arrays = {
                name: _fetch(place, leaf, number, dtype) for name, place, leaf, number in tensors
            }
            if first:
                safetensors.numpy.save_file(arrays, made / file, metadata={"format": "pt"})
            index["weight_map"] |= dict.fromkeys(arrays, file)
            index["metadata"]["total_size"] += sum(array.nbytes for array in arrays.values())
        # The other files; then the complete folder takes its name.
        if first:
            if len(files) > 1:
                contents[INDEX] = index
            for file, content in contents.items():
                (made / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for file, raw in other_files.items():
                (made / file).parent.mkdir(parents=True, exist_ok=True)
                (made / file).write_bytes(raw)
            mode = (made / "config.json").stat().st_mode
            for file, _ in files:  # safetensors writes files that only their owner may read
                (made / file).chmod(mode)
            if folder.exists():
                os.rename(folder, old)
            os.rename(made, folder)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if first:
            shutil.rmtree(made, ignore_errors=True)
    multihost_utils.sync_global_devices(f"export {folder.name}")


def _describe(
    config: ModelConfig, dtype: str, context: int, end_ids: Sequence[int], pad_id: int
) -> dict[str, dict]:
    """File name -> content of config.json and generation_config.json."""
    # The family follows from the architecture.
    if config.qkv_bias and config.qk_norm:
        raise ValueError(
            "a model with both model.qkv_bias and model.qk_norm belongs to no family that other "
            "programs load: switch one of them off"
        )
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    ids = {"bos_token_id": None, "eos_token_id": list(end_ids), "pad_token_id": pad_id}
    content = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "use_sliding_window": False,
        "torch_dtype": dtype,
        **ids,
    }
    # Rotary scaling, under the names of its kind.
    scaling = config.rope_scaling
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            slow, fast = "beta_slow", "beta_fast"
            if scaling.kind == "llama3":
                slow, fast = "low_freq_factor", "high_freq_factor"
            rope |= {"original_max_position_embeddings": scaling.original_context}
            rope |= {slow: scaling.slow, fast: scaling.fast}
        if scaling.kind == "yarn":
            rope |= {"attention_factor": scaling.attention_factor}
        content["rope_scaling"] = rope
    return {"config.json": content, "generation_config.json": ids}


def _cut_into_files(
    params, config: ModelConfig, dtype: str, shard_bytes: int
) -> list[tuple[str, list]]:
    """Tensors (name, place, leaf, layer or None) by file, each as full as `shard_bytes` allows."""
    leaves = flax.traverse_util.flatten_dict(params["params"])
    files, room = [[]], shard_bytes
    for place in list_places(config):
        leaf = leaves[place.path]
        for number, (name, shape) in enumerate(list_file_tensors(place, leaf.shape)):
            size = math.prod(shape) * jnp.dtype(dtype).itemsize
            if files[-1] and size > room:
                files.append([])
                room = shard_bytes
            files[-1].append((name, place, leaf, number if "layers" in place.path else None))
            room -= size
    if len(files) == 1:
        return [("model.safetensors", files[0])]
    return [
        (f"model-{i:05}-of-{len(files):05}.safetensors", tensors)
        for i, tensors in enumerate(files, 1)
    ]


def _fetch(place: Place, leaf, number: int | None, dtype: str) -> np.ndarray:
    array = jnp.asarray(leaf if number is None else leaf[number], dtype)
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return place.to_file(np.asarray(array))
