"""Hugging Face folders of the Qwen2, Qwen3 and Llama families: reading and export.

A folder holds `config.json` and `*.safetensors`.
"""

from __future__ import annotations

import json
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
from stepsearch_jax.hub import INDEX
from stepsearch_jax.models.architecture import ModelConfig, RopeScaling
from stepsearch_jax.models.weights import (
    Place,
    Weights,
    WeightTensor,
    list_file_tensors,
    list_places,
)

ARCHITECTURES = {  # by model_type
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
SUPPORTED = "supported are qwen2 (Qwen2, Qwen2.5), qwen3 (Qwen3, dense) and llama (Llama, SmolLM2)"
STORED_TYPES = {"F32", "F16", "BF16"}
# Endings of tensors that old files hold and no model needs.
CONSTANTS = ("rotary_emb.inv_freq", "embeddings.position_ids")


def open_checkpoint(path: pathlib.Path) -> Weights:
    """The weights of a checkpoint, a Hugging Face folder or a .gguf file. No tensor is read yet.

    Raises FileNotFoundError for a missing folder or file, and ValueError for an architecture,
    rotary scaling or number type that is not supported.
    """
    if path.suffix == ".gguf":
        from stepsearch_jax.models.gguf import open_gguf  # the package behind it is optional

        return open_gguf(path)
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {file}: a checkpoint is a folder with config.json and *.safetensors, or "
            "a .gguf file"
        )
    try:
        fields = _read_fields(json.loads(file.read_text(encoding="utf-8")))
    # The latter two: the file is no table, or holds a word instead of a number.
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{file} lacks the key {error}") from error
    return Weights(path, fields, list_tensors(path))


def _read_fields(raw: dict) -> dict[str, object]:
    """config.json -> fields of ModelConfig.

    Raises ValueError for what the modules here do not compute, KeyError for a missing size.
    """
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"model_type {family!r} is not supported; {SUPPORTED}")
    for key, only in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("use_sliding_window", False),
        ("quantization_config", None),
    ):
        if raw.get(key, only) != only:
            raise ValueError(f"{key} is {raw[key]!r}; only {only!r} is supported")
    if set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(
            f"layer_types holds {', '.join(sorted(set(raw['layer_types'])))}; "
            "only full_attention is supported"
        )
    theta, scaling = _read_rope(raw)
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    return dict(
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or (128 if family == "qwen3" else width // heads),
        ffn_dim=raw["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(raw["rms_norm_eps"]),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def _read_rope(raw: dict) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from older files (rope_theta, rope_scaling) or newer (rope_parameters)."""
    # The keys of both kinds of file in one table; what is left in the end is not supported.
    rope = {
        "rope_theta": raw.get("rope_theta"),
        **(raw.get("rope_scaling") or {}),
        **(raw.get("rope_parameters") or {}),
    }
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = float(rope.pop("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if not rope.pop("truncate", True) or rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            "rotary scaling with truncate=false or a partial_rotary_factor is not supported"
        )
    if kind == "default":
        return theta, None
    # The four kinds of scaling, each with its own keys.
    context = rope.pop("original_max_position_embeddings", raw.get("max_position_embeddings", 0))
    if kind == "linear":
        scaling = RopeScaling(kind, float(rope.pop("factor")), 0, 0.0, 0.0, 1.0)
    elif kind == "llama3":
        factor = float(rope.pop("factor"))
        slow, fast = float(rope.pop("low_freq_factor")), float(rope.pop("high_freq_factor"))
        scaling = RopeScaling(kind, factor, context, slow, fast, 1.0)
    elif kind == "yarn":
        factor = float(rope.pop("factor", raw["max_position_embeddings"] / context))
        scale = rope.pop("attention_factor", 0.1 * math.log(max(factor, 1.0)) + 1.0)
        slow, fast = float(rope.pop("beta_slow", 1.0)), float(rope.pop("beta_fast", 32.0))
        scaling = RopeScaling(kind, factor, context, slow, fast, float(scale))
    else:
        raise ValueError(
            f"rotary scaling {kind!r} is not supported; "
            "supported are default, linear, llama3 and yarn"
        )
    if rope:
        raise ValueError(f"rotary scaling {kind!r} with {', '.join(sorted(rope))} is not supported")
    return theta, scaling


def list_tensors(folder: pathlib.Path) -> dict[str, WeightTensor]:
    """The tensors of a folder's safetensors files. None is read yet.

    The files are those of the index, or model.safetensors, or all there are. Raises
    FileNotFoundError for missing files, ValueError for a file that cannot be read and for a number
    type that is not supported.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    # The list of files.
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({folder / file for file in named})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is no index of tensors, with the files that hold them under the key "
                "weight_map: fetch it again"
            ) from error
    else:
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no *.safetensors; other formats (*.bin) have to be converted first"
        )
    # The tensors in each file: names, types and shapes.
    tensors = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}, which {index.name} names")
        try:
            with safetensors.safe_open(file, framework="np") as weights:
                for name in weights.keys():
                    if name.endswith(CONSTANTS):
                        continue
                    part = weights.get_slice(name)
                    if part.get_dtype() not in STORED_TYPES:
                        raise ValueError(
                            f"{file}: {name} is stored as {part.get_dtype()}; supported are "
                            f"{', '.join(sorted(STORED_TYPES))}"
                        )
                    read = partial(_read_tensor, file, name)
                    tensors[name] = WeightTensor(file, tuple(part.get_shape()), read)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    return tensors


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
