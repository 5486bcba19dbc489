"""A policy's parameters from the tensors of a checkpoint, whatever its format: read one at a time
and put straight into sharded arrays.

Tensors go by their Hugging Face names. A linear map is stored as one matrix [outputs, inputs] a
layer; here heads and head dim are axes of their own, inputs come first, and layers are stacked. The
table of `list_places` is the only one of names and shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.attention import rotary_frequencies

# tables of one model that were rounded differently are closer than this share of their norm
TIED_DISTANCE = 0.1
FAULTS_TOLD = 8  # of a checkpoint that does not fit; the rest are counted


@dataclasses.dataclass(frozen=True)
class WeightTensor:
    """A tensor in a file, read when it is asked for."""

    file: pathlib.Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint: what it says about its architecture (fields of ModelConfig), and its tensors by
    their Hugging Face names.
    """

    path: pathlib.Path
    fields: dict[str, object]
    tensors: dict[str, WeightTensor]

    def model_config(self, vocab_size: int, **choices) -> ModelConfig:
        """The architecture, with at least `vocab_size` rows in the embedding (the tokenizer's,
        rounded up). choices: the other fields, which are the run's.
        """
        return ModelConfig(
            **self.fields | choices | {"vocab_size": max(vocab_size, self.fields["vocab_size"])}
        )


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one leaf of the policy stands in files. `inputs`: how many of a layer's axes a linear
    map reads; 0: a vector; None: a table, kept as it is.

    `vocabulary`: a row in the files is a token's, and there may be fewer of them than here.
    """

    path: tuple[str, ...]
    name: str  # {} stands for the layer's number
    inputs: int | None
    vocabulary: bool = False

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the files of a leaf (of one layer) with `shape` here."""
        if self.inputs is None:
            return shape
        sizes = (math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs]))
        return sizes if self.inputs else sizes[:1]

    def from_file(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A view of a stored array with our axes."""
        return array if self.inputs is None else array.T.reshape(shape)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_file`."""
        weights = self.file_shape(array.shape)
        return (
            array if self.inputs is None else np.ascontiguousarray(array.reshape(weights[::-1]).T)
        )


def list_places(config: ModelConfig) -> list[Place]:
    """Every leaf of a policy's parameters, in the order in which files name them; those under
    trunk/layers have a tensor for each layer.
    """
    maps = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    if config.qk_norm:
        norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    layers = [((ours, "scale"), f"{theirs}.weight", 0) for ours, theirs in norms.items()]
    layers += [
        ((ours, "kernel"), f"{theirs}.weight", 2 if ours == "o" else 1)
        for ours, theirs in maps.items()
    ]
    layers += [
        ((ours, "bias"), f"{maps[ours]}.bias", 0) for ours in ("qkv" if config.qkv_bias else "")
    ]
    places = [Place(("trunk", "embedding"), "model.embed_tokens.weight", None, vocabulary=True)]
    places += [
        Place(("trunk", "layers", *path), f"model.layers.{{}}.{name}", inputs)
        for path, name, inputs in layers
    ]
    places += [Place(("trunk", "final_norm", "scale"), "model.norm.weight", 0)]
    return (
        places
        if config.tie_embeddings
        else [*places, Place(("lm_head",), "lm_head.weight", 1, vocabulary=True)]
    )


def list_file_tensors(
    place: Place, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the files of a leaf with `shape`."""
    if "layers" not in place.path:
        yield place.name, place.file_shape(shape)
        return
    for number in range(shape[0]):
        yield place.name.format(number), place.file_shape(shape[1:])


def load_policy(weights: Weights, config: ModelConfig, abstract_params):
    """A policy's parameters from a checkpoint, each leaf with shape, type and sharding of
    `abstract_params` (arrays or ShapeDtypeStructs).

    Tensors are read one at a time and put where they belong, so the host holds one of them (of each
    process, all of it). Rows of the vocabulary that the checkpoint lacks are the mean of its rows:
    their logit is the mean logit, never the greatest. Raises ValueError, before anything is read,
    where the architecture differs from `config`, and naming each tensor that is missing, unexpected
    or misshapen.
    """
    check_architecture(weights, config)
    leaves, places = flax.traverse_util.flatten_dict(abstract_params["params"]), list_places(config)
    _check_tensors(weights, config, places, leaves)
    return {
        "params": flax.traverse_util.unflatten_dict(
            {place.path: _load_leaf(weights, config, place, leaves[place.path]) for place in places}
        )
    }


def check_architecture(weights: Weights, config: ModelConfig) -> None:
    """Raises ValueError, naming every key of config.model that differs, where a checkpoint has
    another architecture than `config`.
    """
    found = dataclasses.replace(config, **weights.fields)
    faults = []
    for key in (
        "num_layers",
        "embed_dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "ffn_dim",
        "norm_eps",
        "qkv_bias",
        "qk_norm",
    ):
        if not np.isclose(getattr(found, key), getattr(config, key), rtol=1e-5, atol=0):
            faults.append(
                f"config.model.{key} is {getattr(config, key)}, there it is {getattr(found, key)}"
            )
    if found.vocab_size > config.vocab_size:
        faults.append(
            f"the vocabulary has {config.vocab_size} tokens, there it has {found.vocab_size}"
        )
    if found.tie_embeddings and not config.tie_embeddings:
        faults.append("config.model.tie_embeddings is False, there it is True")
    factors = [
        1.0 if c.rope_scaling is None else c.rope_scaling.attention_factor for c in (found, config)
    ]
    same_size = found.head_dim == config.head_dim
    if same_size and not (
        np.allclose(rotary_frequencies(found), rotary_frequencies(config), rtol=1e-5, atol=0)
        and np.isclose(*factors)
    ):
        faults.append(
            f"config.model.rope_theta and rope_scaling are {config.rope_theta} and "
            f"{config.rope_scaling}, there they are {found.rope_theta} and "
            f"{found.rope_scaling}"
        )
    if faults:
        raise ValueError(
            f"the checkpoint {weights.path} has another architecture: {'; '.join(faults)}"
        )


def _check_tensors(
    weights: Weights, config: ModelConfig, places: Sequence[Place], leaves: dict
) -> None:
    faults, known = [], {"lm_head.weight"}
    for place in places:
        for name, shape in list_file_tensors(place, leaves[place.path].shape):
            known.add(name)
            found = weights.tensors.get(name)
            if found is None:
                faults.append(f"{name} {list(shape)} is missing")
            elif found.shape != shape and not (
                place.vocabulary and found.shape == (weights.fields["vocab_size"], *shape[1:])
            ):
                rows = "at most " if place.vocabulary else ""
                faults.append(
                    f"{name} in {found.file.name} should be {rows}{list(shape)} and is "
                    f"{list(found.shape)}"
                )
    for name in sorted(weights.tensors.keys() - known):
        faults.append(
            f"{name} {list(weights.tensors[name].shape)} in {weights.tensors[name].file.name} is "
            "unexpected"
        )
    if faults:
        more = f"; and {len(faults) - FAULTS_TOLD} more" if len(faults) > FAULTS_TOLD else ""
        raise ValueError(
            f"the checkpoint {weights.path} does not fit: {'; '.join(faults[:FAULTS_TOLD])}{more}"
        )


def _load_leaf(weights: Weights, config: ModelConfig, place: Place, leaf) -> jax.Array:
    if place.vocabulary:
        table = _read_table(weights, config, place, place.file_shape(leaf.shape)[0])
        return _put(place.from_file(table, leaf.shape), leaf.sharding, leaf.dtype)
    if "layers" not in place.path:
        return _put(
            place.from_file(weights.tensors[place.name].read(), leaf.shape),
            leaf.sharding,
            leaf.dtype,
        )
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack, write = (
        jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
        _make_write(leaf.sharding),
    )
    for number in range(leaf.shape[0]):
        layer = place.from_file(weights.tensors[place.name.format(number)].read(), leaf.shape[1:])
        stack = write(stack, _put(layer, sharding, leaf.dtype), number)
    return stack


@functools.cache
def _make_write(sharding):
    """-> write(stack [L, ...], layer [...], number) -> stack, in place."""
    return jax.jit(
        lambda stack, layer, number: jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )


def _read_table(weights: Weights, config: ModelConfig, place: Place, rows: int) -> np.ndarray:
    """A table over the vocabulary, filled up to `rows`."""
    table = weights.tensors[place.name].read()
    if (
        config.tie_embeddings and "lm_head.weight" in weights.tensors
    ):  # stored twice, perhaps rounded differently
        output = weights.tensors["lm_head.weight"].read()
        distance = np.linalg.norm((output - table).astype(np.float32)) / np.linalg.norm(
            output.astype(np.float32)
        )
        if not distance <= TIED_DISTANCE:
            raise ValueError(
                f"{weights.path} holds an lm_head.weight that is not its embedding (relative "
                f"distance {distance:.2g}), but config.model."
                "tie_embeddings is True: set it to False"
            )
        table = output
    if len(table) == rows:
        return table
    mean = table.mean(axis=0, dtype=np.float32).astype(table.dtype)
    return np.concatenate([table, np.broadcast_to(mean, (rows - len(table), table.shape[1]))])


def _put(array: np.ndarray, sharding, dtype) -> jax.Array:
    """A host array on its devices; every device gets its slice, and slices that several devices
    hold are cut once.
    """
    slices = {}

    def cut(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size) for part, size in zip(index, array.shape))
        if bounds not in slices:
            slices[bounds] = np.ascontiguousarray(array[index], dtype)
        return slices[bounds]

    return jax.make_array_from_callback(array.shape, sharding, cut)
