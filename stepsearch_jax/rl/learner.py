"""The learner: scoring a rollout, and the optimiser steps on it, as jitted functions on the mesh.

Rows are only ever split by stride (row r belongs to part r mod n), which is local to every shard and the same on every mesh; losses are divided by the count
of the whole minibatch, so neither the mesh nor the micro-batch size changes an update.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepsearch_jax import sharding
from stepsearch_jax.choices import check_choice
from stepsearch_jax.masking import masked_mean, masked_var
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.scoring import score_answers, score_tokens, score_values
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.rl.advantages import adapt_kl_coef, stepwise_advantages, uses_critic
from stepsearch_jax.rl.losses import (
    entropy_bonus,
    kl_loss,
    loss_normalizer,
    policy_loss,
    value_loss,
)
from stepsearch_jax.types import Batch, ModelState, TrainState, Trajectory


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
    """The static choices of an update; meanings in `configs/base.py` (rl, and of reward placement and outcome_overwrites)."""

    advantage: str
    gamma: float
    gae_lambda: float
    over_observations: bool
    whiten_advantages: bool
    clip_low: float
    clip_high: float
    old_logprobs: str
    max_ratio: float
    aggregation: str
    value_clip: float
    entropy_coef: float
    kl_placement: str
    kl_estimator: str
    kl_target: float
    kl_horizon: float
    minibatches: int
    ppo_epochs: int
    microbatch_size: int
    placement: str
    outcome_overwrites: bool


def make_optimizer(
    name: str,
    learning_rate: float,
    *,
    warmup: float,
    iterations: int,
    steps_per_iteration: int,
    b1: float,
    b2: float,
    weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    """AdamW or SGD behind global-norm clipping; the rate rises linearly over the first `warmup` share of the iterations, then stays.

    Schedules count iterations, as the released code's do: an optimiser step of iteration i uses rate * min(1, (i + 1) / (warmup * iterations)). A step that is
    skipped is not counted.
    Reference: the paper's rates are 7e-7 (policy) and 7e-6 (value) with warm-ups of 0.285 and 0.015; the released script's 5e-7 for both, with 0.285 and 0.05.
    """

    def schedule(step):
        return learning_rate * jnp.minimum(
            1.0, (step // steps_per_iteration + 1) / max(1.0, warmup * iterations)
        )

    check_choice("policy.optimizer", name)
    step = (
        optax.sgd(schedule)
        if name == "sgd"
        else optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay)
    )
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), step)


def split_rows(tree, parts: int):
    """[B, ...] -> [parts, B / parts, ...], row r in part r mod parts."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree
    )


def join_rows(tree):
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def _init(model, key: jax.Array):
    return model.init(
        key,
        jnp.zeros((1, 2), jnp.int32),
        method=Policy.init_all if isinstance(model, Policy) else None,
    )


def describe_params(model, mesh: Mesh, rules: dict):
    """-> (like, specs): a model's parameters as ShapeDtypeStructs with their places on the mesh, and their PartitionSpecs."""
    boxed = jax.eval_shape(partial(_init, model), jax.random.key(0))
    specs = sharding.partition_specs(boxed, rules)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(place, nn.unbox(boxed), sharding.shardings(mesh, specs)), specs


def init_params(model, mesh: Mesh, rules: dict, key: jax.Array):
    """-> (params, specs): fresh parameters, made in their place on the mesh, and their PartitionSpecs."""
    abstract_params, specs = describe_params(model, mesh, rules)
    return jax.jit(
        lambda key: nn.unbox(_init(model, key)),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract_params),
    )(key), specs


def describe_model_state(
    optimizer: optax.GradientTransformation, mesh: Mesh, params, specs
) -> ModelState:
    """Parameters, or what they look like, and what the optimiser state beside them looks like, with its places on the mesh.

    Whatever mirrors a parameter is sharded as it is, the rest is replicated.
    """
    names = lambda path: tuple(
        entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)
    )
    is_spec = lambda x: isinstance(x, PartitionSpec)
    spec_of = {
        names(path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    }
    shape_of = {
        names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def find_spec(path, leaf):
        keys = names(path)  # an optimiser may put its own names before the parameter's
        mirrored = [keys[n:] for n in range(len(keys)) if shape_of.get(keys[n:]) == leaf.shape]
        return spec_of[mirrored[0]] if mirrored else PartitionSpec()

    place = lambda path, leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, find_spec(path, leaf))
    )
    return ModelState(
        params, jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
    )


def init_model_state(
    optimizer: optax.GradientTransformation, mesh: Mesh, params, specs
) -> ModelState:
    """Optimiser state beside parameters, made in its place (`describe_model_state`)."""
    abstract_params = describe_model_state(optimizer, mesh, params, specs).opt_state
    return ModelState(
        params,
        jax.jit(
            optimizer.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract_params)
        )(params),
    )


def init_value_params(model: Value, mesh: Mesh, rules: dict, key: jax.Array, policy_params):
    """-> (params, specs): the value model at its start, a copy of the policy's trunk under a fresh head. No other trunk is made on the way."""
    abstract_params, specs = describe_params(model, mesh, rules)
    head = jax.jit(
        lambda key: nn.unbox(_init(model, key))["params"]["head"],
        out_shardings=abstract_params["params"]["head"].sharding,
    )(key)
    return {
        "params": {"head": head, "trunk": jax.tree.map(jnp.copy, policy_params["params"]["trunk"])}
    }, specs


def make_build_batch(model: ModelConfig, settings: LearnerSettings):
    """-> build_batch(state, reference_params, trajectory, step_rewards [B, K], outcome_rewards [B]) -> (Batch, metrics).

    One forward pass of policy, reference and value model, if there is one; then rewards to tokens, advantages and returns. The whole rollout is one batch
    here, so that groups are whole, however it is split afterwards. With old_logprobs "sampler" the policy has no pass: the log-probabilities with which the
    tokens were sampled stand in, entropy is found in the updates, and how far the two are apart shows there, in `approx_kl` and `truncated_fraction`.
    Reference: the paper is silent on this; its released code has the pass.
    """
    policy, value, critic, by_learner = (
        Policy(model),
        Value(model),
        uses_critic(settings.advantage),
        settings.old_logprobs == "learner",
    )

    @jax.jit
    def build_batch(
        state: TrainState, reference_params, trajectory: Trajectory, step_rewards, outcome_rewards
    ):
        def score(tokens):
            old = score_tokens(policy, state.policy.params, tokens) if by_learner else ()
            ref_logprobs = score_tokens(policy, reference_params, tokens)[0]
            return (
                *old,
                ref_logprobs,
                score_values(value, state.value.params, tokens)
                if critic
                else jnp.zeros_like(ref_logprobs),
            )

        rows = trajectory.tokens.shape[0]
        parts = 1 if not settings.microbatch_size else max(1, rows // settings.microbatch_size)
        *old, ref_logprobs, old_values = join_rows(
            jax.lax.map(score, split_rows(trajectory.tokens, parts))
        )
        old_logprobs, mask = (
            old[0] if by_learner else trajectory.sampler_logprobs,
            trajectory.action_mask,
        )
        advantages, returns, value_mask, metrics = stepwise_advantages(
            old_logprobs,
            ref_logprobs,
            old_values,
            trajectory.token_mask,
            mask,
            trajectory.turn_ids,
            trajectory.group_ids,
            trajectory.search_end,
            step_rewards,
            outcome_rewards,
            advantage=settings.advantage,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            kl_coef=state.kl_coef,
            kl_placement=settings.kl_placement,
            kl_estimator=settings.kl_estimator,
            placement=settings.placement,
            outcome_overwrites=settings.outcome_overwrites,
            over_observations=settings.over_observations,
            whiten_advantages=settings.whiten_advantages,
        )
        metrics["action_tokens"] = mask.sum()
        if by_learner:
            metrics["entropy"] = masked_mean(old[1], mask)
            metrics["sampler_mismatch"] = jnp.where(
                mask, jnp.abs(old_logprobs - trajectory.sampler_logprobs), 0
            ).max()
        if critic:
            metrics["value_explained"] = explained_variance(old_values, returns, value_mask)
        return Batch(
            trajectory.tokens,
            trajectory.token_mask,
            mask,
            value_mask,
            old_logprobs,
            ref_logprobs,
            old_values,
            advantages,
            returns,
        ), metrics

    return build_batch


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """values, returns, mask [B, T] -> []: 1 - mean squared error / variance of the returns, 1 at best; NaN where all returns are equal."""
    variance = masked_var(returns, mask)
    return jnp.where(
        variance > 1e-8, 1 - masked_mean(jnp.square(values - returns), mask) / variance, jnp.nan
    )


def make_answer_gain(model: ModelConfig, opening: int, microbatch_size: int):
    """-> answer_gain(policy_params, trajectory, answers [B, A], answer_length [B]) -> [B, K]: what each search did for the answer's log-probability.

    answers: right-padded tokens of which `opening` are given (`models.scoring.score_answers`). With L_0 the mean log-probability per scored token behind the
    prompt, and L_k behind everything up to the end of turn k's observation, turn k gains L_k - L_{k-1}. 0 on turns without a successful search, whose
    share goes to no one. microbatch_size: rows of one forward pass; 0 = all.
    Source: IGPO, arXiv 2510.14967, section 3, which takes the difference of probabilities; of log-probabilities the sum over turns telescopes as well, and
      early searches, when the answer is still unlikely, are not lost beside later ones.
    """
    policy = Policy(model)

    @jax.jit
    def answer_gain(
        policy_params, trajectory: Trajectory, answers: jax.Array, answer_length: jax.Array
    ) -> jax.Array:
        B, K = trajectory.search_end.shape
        until = trajectory.token_mask[:, None] & (
            trajectory.turn_ids[:, None] < jnp.arange(K + 1)[:, None]
        )  # [B, K + 1, T]
        score = lambda part: score_answers(
            policy, policy_params, *part[:3], jnp.int32(opening), part[3]
        )
        parts = max(1, B // microbatch_size) if microbatch_size else 1
        found = join_rows(
            jax.lax.map(
                score, split_rows((trajectory.tokens, until.sum(-1), answers, answer_length), parts)
            )
        )  # [B, K + 1]
        return jnp.where(
            (trajectory.search_end >= 0) & trajectory.search_ok, jnp.diff(found, axis=1), 0
        )

    return answer_gain


def make_gradients(model: ModelConfig, settings: LearnerSettings):
    """-> gradients(params, minibatch, kl_coef) -> (gradients, metrics), accumulated over micro-batches.

    params, gradients: of "policy" and, with an estimator that reads values, of "value". kl_coef []: read with kl_placement "loss" only.
    """
    policy, value, aggregation = Policy(model), Value(model), settings.aggregation

    def policy_objective(params, part: Batch, normalizer, kl_coef):
        logprobs, entropy = score_tokens(policy, params, part.tokens)
        over_actions = dict(aggregation=aggregation, normalizer=normalizer)
        loss, metrics = policy_loss(
            logprobs,
            part.old_logprobs,
            part.advantages,
            part.action_mask,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            max_ratio=settings.max_ratio,
            **over_actions,
        )
        bonus, entropy_metrics = entropy_bonus(entropy, part.action_mask, **over_actions)
        objective, metrics = loss - settings.entropy_coef * bonus, metrics | {"policy_loss": loss}
        if settings.old_logprobs == "sampler":  # otherwise `make_build_batch` finds it
            metrics |= entropy_metrics
        if settings.kl_placement == "loss":
            kl, kl_metrics = kl_loss(
                logprobs,
                part.ref_logprobs,
                part.action_mask,
                estimator=settings.kl_estimator,
                **over_actions,
            )
            objective, metrics = objective + kl_coef * kl, metrics | kl_metrics
        return objective, metrics

    def value_objective(params, part: Batch, normalizer, _):
        values = score_values(value, params, part.tokens)
        loss, metrics = value_loss(
            values,
            part.old_values,
            part.returns,
            part.value_mask,
            value_clip=settings.value_clip,
            aggregation=aggregation,
            normalizer=normalizer,
        )
        return loss, metrics | {"value_loss": loss}

    def gradients(params: dict, minibatch: Batch, kl_coef):
        rows = minibatch.tokens.shape[0]
        parts = 1 if not settings.microbatch_size else max(1, rows // settings.microbatch_size)
        terms = {
            "policy": (policy_objective, minibatch.action_mask),
            "value": (value_objective, minibatch.value_mask),
        }
        normalizers = {
            name: loss_normalizer(terms[name][1], aggregation=aggregation) for name in params
        }

        def of_part(part):
            found, metrics = {}, {}
            for name in params:
                found[name], own = jax.grad(terms[name][0], has_aux=True)(
                    params[name], part, normalizers[name], kl_coef
                )
                metrics |= own
            return found, metrics

        if parts == 1:
            return of_part(minibatch)
        add = lambda total, part: (jax.tree.map(jnp.add, total, of_part(part)), None)
        micro = split_rows(minibatch, parts)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], micro)),
        )
        return jax.lax.scan(add, zeros, micro)[0]

    return gradients


def make_update(
    model: ModelConfig,
    settings: LearnerSettings,
    policy_optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation | None,
):
    """-> update(state, batch, mean_kl) -> (state, metrics): all optimiser steps of an iteration. The state is donated.

    A step whose gradient is not finite changes nothing and is counted in `state.skipped`; with the numbers that a config may hold (`settings.RANGES`) a finite
    one makes a finite step. mean_kl []: drives the adaptive coefficient.
    Without a value model state.value and value_optimizer are None.
    """
    gradients = make_gradients(model, settings)
    optimizers = {"policy": policy_optimizer} | (
        {"value": value_optimizer} if uses_critic(settings.advantage) else {}
    )

    def apply(optimizer, model_state: ModelState, gradient, finite):
        updates, opt_state = optimizer.update(gradient, model_state.opt_state, model_state.params)
        new = ModelState(optax.apply_updates(model_state.params, updates), opt_state)
        return jax.tree.map(partial(jnp.where, finite), new, model_state)

    def step(state: TrainState, minibatch: Batch):
        models = {name: getattr(state, name) for name in optimizers}
        found, metrics = gradients(
            {name: models[name].params for name in models}, minibatch, state.kl_coef
        )
        norms = {name: optax.global_norm(found[name]) for name in models}
        finite = jnp.isfinite(jnp.stack(list(norms.values()))).all()
        new = {name: apply(optimizers[name], models[name], found[name], finite) for name in models}
        return state.replace(**new, skipped=state.skipped + ~finite), metrics | {
            f"{name}_grad_norm": norm for name, norm in norms.items()
        }

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Batch, mean_kl: jax.Array):
        minibatches = split_rows(batch, settings.minibatches)
        if settings.ppo_epochs > 1:
            minibatches = jax.tree.map(
                lambda x: jnp.tile(x, (settings.ppo_epochs,) + (1,) * (x.ndim - 1)), minibatches
            )
        state, metrics = jax.lax.scan(step, state, minibatches)
        if settings.kl_target > 0:
            state = state.replace(
                kl_coef=adapt_kl_coef(
                    state.kl_coef,
                    mean_kl,
                    target=settings.kl_target,
                    horizon=settings.kl_horizon,
                    num_episodes=len(batch.tokens),
                )
            )
        return state.replace(iteration=state.iteration + 1), jax.tree.map(
            lambda x: x.mean(0), metrics
        )

    return update
