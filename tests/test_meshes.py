"""Every mesh computes what one device does, for each family of models: losses, gradients and
sampled tokens.

`pytest --slow -s tests/test_meshes.py` prints a line for each: mesh, family, largest difference of
a gradient in shares of its leaf's maximum, tokens compared.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import base
from stepsearch_jax import sharding
from stepsearch_jax.models.architecture import RopeScaling
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.rl import learner
from stepsearch_jax.run.settings import learner_settings

ONE = (1, 1, 1)
MESHES = [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)]  # data, fsdp, tensor
# In CI: data alone, parameters and tensors cut, and all three ways at once.
EVERY_DAY = [("qwen2", (8, 1, 1)), ("qwen2", (1, 2, 4)), ("qwen3", (2, 2, 2))]
FAMILIES = {
    "qwen2": dict(qkv_bias=True, tie_embeddings=True),
    "qwen3": dict(qkv_bias=False, tie_embeddings=True, qk_norm=True),
    "llama": dict(
        qkv_bias=False,
        tie_embeddings=False,
        rope_scaling=RopeScaling("llama3", 8.0, 32, slow=1.0, fast=4.0, attention_factor=1.0),
    ),
}
MODEL = dataclasses.replace(tiny.CONFIG, num_heads=8, num_kv_heads=4, head_dim=4)
# So that every term of the losses has a gradient.
KL_IN_LOSS = dict(entropy_coef=0.01, kl_placement="loss", kl_estimator="k3")
ROWS = 16


def model_of(family: str):
    return dataclasses.replace(MODEL, **FAMILIES[family])


def place_params(model, shape):
    specs = sharding.partition_specs(
        tiny.make_boxes(model), dict(base.get_config().mesh.train_rules)
    )
    return jax.device_put(
        tiny.draw_params(model, 1), sharding.shardings(tiny.mesh_of(shape), specs)
    )


@functools.cache
def differentiate(family: str, shape):
    """-> (gradients, metrics) as NumPy; of the value model as well for one family, which suffices:
    its trunk is the policy's.
    """
    config, settings = (
        model_of(family),
        dataclasses.replace(learner_settings(base.get_config()), **KL_IN_LOSS),
    )
    models = {"policy": Policy(config)} | ({"value": Value(config)} if family == "qwen2" else {})
    params = {name: place_params(model, shape) for name, model in models.items()}
    batch = sharding.rows_to_mesh(tiny.mesh_of(shape), tiny.make_batch(config, ROWS, 12))
    return jax.tree.map(
        np.asarray,
        jax.jit(learner.make_gradients(config, settings))(params, batch, jnp.float32(0.1)),
    )


@functools.cache
def sample(family: str, shape):
    """-> the trajectories of a rollout, as NumPy."""
    config, prompts = model_of(family), jax.tree.map(lambda x: x[:ROWS], tiny.make_prompts(64))
    mesh, param_shardings, rollout = tiny.make_program("callback", shape, config=config)
    arguments = tiny.rollout_arguments(
        prompts, jax.random.key(7), 1.0, mesh, param_shardings, tiny.make_params(config)
    )
    return sharding.rows_from_mesh(rollout(*arguments)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_what_it_is_called(family):
    names = {
        path[-1].key
        for path, _ in jax.tree_util.tree_leaves_with_path(
            tiny.draw_params(Policy(model_of(family)), 1)
        )
    }
    parts = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(
            tiny.draw_params(Policy(model_of(family)), 1)
        )
    }
    assert ("bias" in names) == (family == "qwen2") and ("lm_head" in names) == (family == "llama")
    assert any("q_norm" in part for part in parts) == (family == "qwen3") and (
        model_of(family).rope_scaling is not None
    ) == (family == "llama")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family,shape",
    [
        pytest.param(
            family,
            shape,
            marks=() if (family, shape) in EVERY_DAY else pytest.mark.nightly,
            id=f"{family}-{shape}",
        )
        for family in FAMILIES
        for shape in MESHES
    ],
)
def test_every_mesh_computes_as_one_device(shape, family):
    """Losses to 1e-5, each leaf's gradients to 1e-5 of its maximum, every sampled token."""
    (expected, expected_metrics), (got, metrics) = (
        differentiate(family, ONE),
        differentiate(family, shape),
    )
    assert set(metrics) >= {"policy_loss", "kl_loss"} and ("value_loss" in metrics) == (
        family == "qwen2"
    )
    for name in {"policy_loss", "value_loss", "kl_loss"} & set(metrics):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, err_msg=name)
    largest = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), got, expected)
    alone, sampled = sample(family, ONE), sample(family, shape)
    tokens = int(alone.action_mask.sum())
    different = int(
        ((sampled.tokens != alone.tokens) & (sampled.token_mask | alone.token_mask)).sum()
    )
    print(
        f"\n{' x '.join(map(str, shape))}  {family}  gradients "
        f"{max(jax.tree.leaves(largest)):.1e}  tokens {tokens}, different {different}"
    )
    assert all(difference < 1e-5 for difference in jax.tree.leaves(largest)), largest
    assert tokens > 200 and different == 0
    np.testing.assert_allclose(sampled.sampler_logprobs, alone.sampler_logprobs, atol=1e-4)
    for name in (
        "length",
        "action_mask",
        "turn_ids",
        "turn_status",
        "search_end",
        "doc_ids",
        "search_ok",
        "finished",
        "truncated",
    ):
        np.testing.assert_array_equal(getattr(sampled, name), getattr(alone, name), err_msg=name)
