"""The sizes of a model, and how a device holds it."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping

import jax.numpy as jnp
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies f become f / factor, for texts longer than in the first training.

    kind: "linear" lowers all of them (Chen et al. 2023). "llama3" (Llama 3.1) and "yarn" (Peng et
    al. 2023) lower those that turn fewer than `slow` times in `original_context` tokens, keep those
    that turn more than `fast` times, and mix in between: llama3 linearly in the number of turns,
    yarn linearly in the index of the frequency, from the last whole index before that range to the
    first one behind it. Queries and keys are multiplied by `attention_factor`.
    """

    kind: str
    factor: float
    original_context: int
    slow: float
    fast: float
    attention_factor: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model, and how a device holds it (the last two fields, set by `place_on`)."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool  # RMSNorm over each head of queries and keys, before the rotation
    tie_embeddings: bool
    dtype: jnp.dtype
    remat: str  # what the backward pass recomputes: "none", or a key of transformer.REMAT
    attention_block: int  # cache positions read at a time when sampling
    tensor_axis: str | None = None  # mesh axis over which a device holds a slice; None: all of it
    cache_by_token: bool = False  # layout of the `KVCache`

    def place_on(self, mesh: Mesh) -> ModelConfig:
        """The config with which one device of the mesh samples.

        It is an equal slice over mesh axis `tensor`, and its modules sum over that axis.
        """
        shards, by_token = mesh.shape["tensor"], mesh.devices.flat[0].platform == "tpu"
        return dataclasses.replace(
            self,
            vocab_size=self.vocab_size // shards,
            num_heads=self.num_heads // shards,
            num_kv_heads=self.num_kv_heads // shards,
            ffn_dim=self.ffn_dim // shards,
            tensor_axis="tensor" if shards > 1 else None,
            cache_by_token=by_token,
        )


def check_sizes(fields: Mapping[str, object]) -> None:
    """Raises ValueError unless the sizes in `fields` of a checkpoint can be those of a model."""
    names = ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim")
    for name in (*names, "ffn_dim"):
        size = fields[name]
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{name} is {size!r}: it has to be a whole number above 0")
    heads, kv_heads, width = (fields[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
    if heads % kv_heads or width % 2:
        raise ValueError(
            f"{heads} query heads, {kv_heads} key and value heads and a head width of {width} do "
            "not fit together: the first has to be a multiple of the second, the third even"
        )
