"""A policy's parameters from a checkpoint's weights, which are read one tensor at a time.

Tensors have their Hugging Face names, in every file format. A file holds a linear map as one matrix
[outputs, inputs] per layer; here heads and head dim are axes of their own, inputs come first, and
layers are stacked. `list_places` is the only table of names and shapes.
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

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAULTS_NAMED = 8  # in an error message; the rest are counted
ROWS_COMPARED = 4096  # of two tables at a time
# Parts of the names that quantized tensors have besides the matrix itself, or in its place.
QUANTIZED = ("qweight", "qzeros", "scale", "absmax", "quant_map", "quant_state", "packed", "SCB")

COMPARED_FIELDS = (
    "num_layers",
    "embed_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_dim",
    "norm_eps",
    "qkv_bias",
    "qk_norm",
)


@dataclasses.dataclass(frozen=True)
class WeightTensor:
    """One tensor of a checkpoint file; `read` loads its values."""

    file: pathlib.Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def same_values(one: WeightTensor, other: WeightTensor) -> bool:
    """Whether two tables hold the same numbers, whatever type they are stored in."""
    if one.shape != other.shape:
        return False
    a, b = one.read(), other.read()
    parts = (slice(start, start + ROWS_COMPARED) for start in range(0, len(a), ROWS_COMPARED))
    return all(
        np.array_equal(a[part].astype(np.float32), b[part].astype(np.float32)) for part in parts
    )


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint, of which nothing is read yet, and their architecture."""

    path: pathlib.Path
    fields: dict[str, object]  # of ModelConfig: those that the checkpoint determines
    tensors: dict[str, WeightTensor]  # by their Hugging Face names

    def model_config(self, vocab_size: int, **choices) -> ModelConfig:
        """The config of these weights, with at least `vocab_size` rows in the embedding.

        vocab_size: the tokenizer's, rounded up. choices: the fields that the run chooses.
        """
        rows = max(vocab_size, self.fields["vocab_size"])
        return ModelConfig(**self.fields | choices | {"vocab_size": rows})


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the files hold one leaf of the policy's parameters."""

    path: tuple[str, ...]  # of the leaf
    name: str  # in the files; {} stands for the layer's number
    inputs: int | None  # axes that a linear map reads; 0: a vector; None: a table, kept as it is
    vocabulary: bool = False  # the files' rows are tokens, and there may be fewer than here

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the files of a leaf (of one layer) with `shape` here."""
        if self.inputs is None:
            return shape
        sizes = (math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs]))
        return sizes if self.inputs else sizes[:1]

    def from_file(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A view of a file's array with the axes here."""
        return array if self.inputs is None else array.T.reshape(shape)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_file`."""
        if self.inputs is None:
            return array
        return np.ascontiguousarray(array.reshape(self.file_shape(array.shape)[::-1]).T)


def list_places(config: ModelConfig) -> list[Place]:
    """Every leaf of a policy's parameters, in the order of the files.

    Files have one tensor per layer for each leaf under trunk/layers.
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
    biased = "qkv" if config.qkv_bias else ""
    layers += [((ours, "bias"), f"{maps[ours]}.bias", 0) for ours in biased]
    places = [Place(("trunk", "embedding"), EMBEDDING, None, vocabulary=True)]
    places += [
        Place(("trunk", "layers", *path), f"model.layers.{{}}.{name}", inputs)
        for path, name, inputs in layers
    ]
    places += [Place(("trunk", "final_norm", "scale"), "model.norm.weight", 0)]
    if not config.tie_embeddings:
        places += [Place(("lm_head",), LM_HEAD, 1, vocabulary=True)]
    return places


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
    """A policy's parameters from a checkpoint's weights.

    abstract_params: arrays or ShapeDtypeStructs; each leaf gets their shape, type and sharding.
    Each process reads one whole tensor at a time and puts it onto its devices, so the host holds
    only one. Rows of the vocabulary that the checkpoint lacks are the mean of its rows: their logit
    is the mean logit, never the greatest. Raises ValueError, before anything is read, if the
    architecture differs from `config`, and for tensors that are missing, unexpected or misshapen.
    """
    check_architecture(weights, config)
    leaves, places = flax.traverse_util.flatten_dict(abstract_params["params"]), list_places(config)
    _check_tensors(weights, places, leaves)
    loaded = {
        place.path: _load_leaf(weights, config, place, leaves[place.path]) for place in places
    }
    return {"params": flax.traverse_util.unflatten_dict(loaded)}


def check_architecture(weights: Weights, config: ModelConfig) -> None:
    """Raises ValueError, naming every key that differs, if the weights do not fit config.model."""
    found = dataclasses.replace(config, **weights.fields)
    faults = []
    # Sizes and switches that have to be equal.
    for key in COMPARED_FIELDS:
        ours, theirs = getattr(config, key), getattr(found, key)
        if not np.isclose(theirs, ours, rtol=1e-5, atol=0):
            faults.append(f"config.model.{key} is {ours}, the checkpoint has {theirs}")
    # A smaller vocabulary is filled up. An lm_head is fine if it is the embedding (`_read_table`).
    if found.vocab_size > config.vocab_size:
        faults.append(
            f"the vocabulary has {config.vocab_size} tokens, the checkpoint has {found.vocab_size}"
        )
    if found.tie_embeddings and not config.tie_embeddings:
        faults.append("config.model.tie_embeddings is False, the checkpoint has True")
    # Rotary positions are compared by what they compute, however the config writes them.
    factor_of = lambda scaling: 1.0 if scaling is None else scaling.attention_factor
    factors = factor_of(found.rope_scaling), factor_of(config.rope_scaling)
    same_size = found.head_dim == config.head_dim
    if same_size and not (
        np.allclose(rotary_frequencies(found), rotary_frequencies(config), rtol=1e-5, atol=0)
        and np.isclose(*factors)
    ):
        faults.append(
            f"config.model.rope_theta and rope_scaling are {config.rope_theta} and "
            f"{config.rope_scaling}, the checkpoint has {found.rope_theta} and {found.rope_scaling}"
        )
    if faults:
        raise ValueError(
            f"the checkpoint {weights.path} has another architecture: {'; '.join(faults)}"
        )


def _check_tensors(weights: Weights, places: Sequence[Place], leaves: dict) -> None:
    """Raises ValueError, naming the first faults, for missing, misshapen or unexpected tensors."""
    faults, missing, known = [], set(), {LM_HEAD}
    for place in places:
        for name, shape in list_file_tensors(place, leaves[place.path].shape):
            known.add(name)
            found = weights.tensors.get(name)
            if found is None:
                missing.add(name)
                faults.append(f"{name} {list(shape)} is missing")
                continue
            smaller_table = (weights.fields["vocab_size"], *shape[1:])
            if found.shape != shape and not (place.vocabulary and found.shape == smaller_table):
                wanted = f"{'at most ' if place.vocabulary else ''}{list(shape)}"
                faults.append(
                    f"{name} in {found.file.name} should be {wanted} and is {list(found.shape)}"
                )
    extra = sorted(weights.tensors.keys() - known)
    unexpected = [
        f"{name} {list(weights.tensors[name].shape)} in {weights.tensors[name].file.name} is "
        "unexpected"
        for name in extra
    ]
    # Some of both kinds are named: often one explains the other.
    unfit = max(FAULTS_NAMED // 2, FAULTS_NAMED - len(unexpected))
    named = [*faults[:unfit], *unexpected][:FAULTS_NAMED]
    if named:
        rest = len(faults) + len(unexpected) - len(named)
        more = f"; and {rest} more" if rest else ""
        raise ValueError(
            f"the checkpoint {weights.path} does not fit: {'; '.join(named)}{more}"
            f"{_advise(weights, missing, extra)}"
        )


def _advise(weights: Weights, missing: set[str], extra: Sequence[str]) -> str:
    """What to do about a folder's tensors that do not fit, where the reason shows."""
    if weights.path.suffix == ".gguf":
        return ""
    if any(part in name for name in extra for part in QUANTIZED):
        return ". They are quantized: name the model in its original form, or a .gguf file of it"
    if missing == {LM_HEAD}:
        return (
            ". If the embedding is the output table, too, set tie_word_embeddings to true in "
            "config.json; otherwise the files are those of another kind of model, without the head"
        )
    layers = [name.split(".")[2] for name in weights.tensors if name.startswith("model.layers.")]
    stored = 1 + max((int(layer) for layer in layers if layer.isdecimal()), default=-1)
    if stored > weights.fields["num_layers"]:
        return (
            f". The files hold {stored} layers: correct num_hidden_layers in config.json, or "
            "remove the files that are out of date"
        )
    return ""


def _load_leaf(weights: Weights, config: ModelConfig, place: Place, leaf) -> jax.Array:
    if place.vocabulary:
        table = _read_table(weights, config, place, place.file_shape(leaf.shape)[0])
        return _put(place.from_file(table, leaf.shape), leaf.sharding, leaf.dtype)
    if "layers" not in place.path:
        array = place.from_file(weights.tensors[place.name].read(), leaf.shape)
        return _put(array, leaf.sharding, leaf.dtype)
    sharding = leaf.sharding  # of one layer
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    write = _make_write(leaf.sharding)
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
    output = weights.tensors.get(LM_HEAD)
    if config.tie_embeddings and output and not same_values(weights.tensors[EMBEDDING], output):
        raise ValueError(
            f"{weights.path} holds an {LM_HEAD} that is not its embedding, but "
            "config.model.tie_embeddings is True: set it to False"
        )
    table = weights.tensors[place.name].read()
    if len(table) == rows:
        return table
    mean = table.mean(axis=0, dtype=np.float32).astype(table.dtype)
    return np.concatenate([table, np.broadcast_to(mean, (rows - len(table), table.shape[1]))])


def _put(array: np.ndarray, sharding, dtype) -> jax.Array:
    """A host array on its devices, each with its slice. Equal slices are cut only once."""
    slices = {}

    def cut(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size) for part, size in zip(index, array.shape))
        if bounds not in slices:
            slices[bounds] = np.ascontiguousarray(array[index], dtype)
        return slices[bounds]

    return jax.make_array_from_callback(array.shape, sharding, cut)
