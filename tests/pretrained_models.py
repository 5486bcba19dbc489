"""Golden checkpoints and how tests read them. `tests/golden/make_huggingface.py` records them."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from configs import base
from stepsearch_jax import sharding
from stepsearch_jax.models.huggingface import open_checkpoint
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.models.weights import load_policy

GOLDEN = pathlib.Path(__file__).parent / "golden" / "huggingface"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
# Type of the golden weights; bfloat16 otherwise.
STORED = {
    "qwen2": "float32",
    "qwen2_yarn": "float16",
}
ONE = (1, 1, 1)  # data, fsdp, tensor
EXPORT = dict(shard_bytes=1 << 30, context=64, end_ids=[0], pad_id=0, other_files={})


def configure(weights, vocab_size: int = 46):
    return weights.model_config(
        vocab_size=vocab_size, dtype=jnp.float32, remat="none", attention_block=4
    )


def make_like(config, mesh_shape=ONE):
    """Shapes and shardings of a policy's parameters, under the rules of the learner."""
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
    boxes = tiny.make_boxes(Policy(config))
    places = sharding.shardings(
        mesh, sharding.partition_specs(boxes, dict(base.get_config().mesh.train_rules))
    )
    return jax.tree.map(
        lambda box, place: jax.ShapeDtypeStruct(box.shape, box.dtype, sharding=place),
        nn.unbox(boxes),
        places,
    )


def load(path: pathlib.Path, mesh_shape=ONE):
    weights = open_checkpoint(path)
    config = configure(weights)
    return config, load_policy(weights, config, make_like(config, mesh_shape))
