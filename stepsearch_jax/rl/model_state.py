"""Parameters and optimiser states, made in their places on the mesh."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepsearch_jax import sharding
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.types import ModelState


def _init(model, key: jax.Array):
    return model.init(
        key,
        jnp.zeros((1, 2), jnp.int32),
        method=Policy.init_all if isinstance(model, Policy) else None,
    )


def describe_params(model, mesh: Mesh, rules: dict):
    """-> (abstract params, specs): ShapeDtypeStructs with their shardings, and PartitionSpecs."""
    boxed = jax.eval_shape(partial(_init, model), jax.random.key(0))
    specs = sharding.partition_specs(boxed, rules)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(place, nn.unbox(boxed), sharding.shardings(mesh, specs)), specs


def init_params(model, mesh: Mesh, rules: dict, key: jax.Array):
    """-> (params, specs): fresh parameters, made in their places, and their PartitionSpecs."""
    abstract_params, specs = describe_params(model, mesh, rules)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_params)
    return jax.jit(lambda key: nn.unbox(_init(model, key)), out_shardings=places)(key), specs


def describe_model_state(
    optimizer: optax.GradientTransformation, mesh: Mesh, params, specs
) -> ModelState:
    """The given parameters (arrays or abstract) and the abstract optimiser state beside them.

    A leaf of the optimiser state that mirrors a parameter is sharded like it; the others are
    replicated.
    """
    dict_key = jax.tree_util.DictKey
    names = lambda path: tuple(entry.key for entry in path if isinstance(entry, dict_key))
    is_spec = lambda x: isinstance(x, PartitionSpec)
    # Specs and shapes of the parameters by path.
    spec_of = {
        names(path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    }
    shape_of = {
        names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    # The longest end of a leaf's path that names a parameter of its shape gives the spec.
    def find_spec(path, leaf):
        keys = names(path)  # an optimiser may put its own names before the parameter's
        mirrored = [keys[n:] for n in range(len(keys)) if shape_of.get(keys[n:]) == leaf.shape]
        return spec_of[mirrored[0]] if mirrored else PartitionSpec()

    place = lambda path, leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, find_spec(path, leaf))
    )
    abstract_state = jax.eval_shape(optimizer.init, params)
    return ModelState(params, jax.tree_util.tree_map_with_path(place, abstract_state))


def init_model_state(
    optimizer: optax.GradientTransformation, mesh: Mesh, params, specs
) -> ModelState:
    """Optimiser state beside parameters, made in its places (`describe_model_state`)."""
    abstract_state = describe_model_state(optimizer, mesh, params, specs).opt_state
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return ModelState(params, jax.jit(optimizer.init, out_shardings=places)(params))


def init_value_params(model: Value, mesh: Mesh, rules: dict, key: jax.Array, policy_params):
    """-> (params, specs): the initial value model, a copy of the policy's trunk and a fresh head.

    No other trunk is made on the way.
    """
    abstract_params, specs = describe_params(model, mesh, rules)
    head = jax.jit(
        lambda key: nn.unbox(_init(model, key))["params"]["head"],
        out_shardings=abstract_params["params"]["head"].sharding,
    )(key)
    trunk = jax.tree.map(jnp.copy, policy_params["params"]["trunk"])
    return {"params": {"head": head, "trunk": trunk}}, specs
