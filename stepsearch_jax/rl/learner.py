"""The learner: scoring a rollout, and the optimiser steps on it, as jitted functions on the mesh.

Minibatches are split by stride (row r belongs to minibatch r mod n), which is local to every shard
and the same on every mesh. Losses are divided by the count of the whole minibatch. So neither the
mesh nor the micro-batches (`microbatches`) change an update.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax

from stepsearch_jax.choices import check_choice
from stepsearch_jax.masking import masked_mean, masked_var
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.scoring import score_answers, score_tokens, score_values
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.rl.advantages import stepwise_advantages, uses_critic
from stepsearch_jax.rl.kl import adapt_kl_coef
from stepsearch_jax.rl.losses import (
    entropy_bonus,
    kl_loss,
    loss_normalizer,
    policy_loss,
    value_loss,
)
from stepsearch_jax.rl.microbatches import (
    choose_widths,
    map_rows,
    padding_fraction,
    split_rows,
    sum_rows,
)
from stepsearch_jax.types import Batch, ModelState, TrainState, Trajectory


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
    """The static choices of an update, as configs/base.py explains them.

    They are keys of config.rl, and placement and outcome_overwrites of config.reward.
    """

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
    width_buckets: int
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
    """AdamW or SGD behind global-norm clipping, with a linear warm-up and then a constant rate.

        rate_i = learning_rate * min(1, (i + 1) / (warmup * iterations))    in iteration i

    warmup: share of the iterations. Schedules count iterations, as the released code's do; a
    skipped step is not counted.
    Reference: the paper's rates are 7e-7 (policy) and 7e-6 (value) with warm-ups of 0.285 and
      0.015; the released script's are 5e-7 for both, with 0.285 and 0.05.
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


def make_build_batch(model: ModelConfig, settings: LearnerSettings):
    """-> build_batch(state, reference_params, trajectory, step_rewards, outcome_rewards).

    build_batch: step_rewards [B, K], outcome_rewards [B] -> (Batch, metrics). One forward pass of
    policy, reference and value model (if there is one), then `stepwise_advantages`. It takes the
    whole rollout, so groups are complete however the batch is split afterwards.

    With old_logprobs "sampler" the policy has no pass: the log-probabilities recorded while
    sampling take its place. The updates then compute the entropy and show the difference between
    learner and sampler in `approx_kl` and `truncated_fraction`.
    Reference: the paper does not mention this; its released code has the pass.
    """
    policy, value = Policy(model), Value(model)
    critic, by_learner = uses_critic(settings.advantage), settings.old_logprobs == "learner"

    @jax.jit
    def build_batch(
        state: TrainState, reference_params, trajectory: Trajectory, step_rewards, outcome_rewards
    ):
        whole = trajectory.tokens.shape[1]

        def score(tokens, width):
            tokens = tokens[:, :width]
            old = score_tokens(policy, state.policy.params, tokens) if by_learner else ()
            ref_logprobs = score_tokens(policy, reference_params, tokens)[0]
            values = jnp.zeros_like(ref_logprobs)
            if critic:
                assert state.value is not None  # the critic
                values = score_values(value, state.value.params, tokens)
            pad = lambda x: jnp.pad(x, ((0, 0), (0, whole - width)))
            return tuple(map(pad, (*old, ref_logprobs, values)))

        # Forward passes over so many rows at a time.
        *old, ref_logprobs, old_values = map_rows(
            score,
            trajectory.tokens,
            trajectory.length,
            settings.microbatch_size,
            choose_widths(whole, settings.width_buckets),
        )
        old_logprobs = old[0] if by_learner else trajectory.sampler_logprobs
        mask = trajectory.action_mask
        # Rewards at their tokens, advantages and returns.
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
        # What only the forward passes can tell.
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
    """1 - mean squared error / variance of the returns: values, returns, mask [B, T] -> [].

    1 at best; NaN if all returns are equal.
    """
    variance = masked_var(returns, mask)
    return jnp.where(
        variance > 1e-8, 1 - masked_mean(jnp.square(values - returns), mask) / variance, jnp.nan
    )


def make_answer_gain(model: ModelConfig, opening: int, microbatch_size: int, width_buckets: int):
    """-> answer_gain(policy_params, trajectory, answers [B, A], answer_length [B]) -> gain [B, K].

        gain_k = L_k - L_{k-1}

    L_0 is the answer's mean log-probability per scored token after the prompt, L_k the same after
    everything up to the end of turn k's observation. 0 on turns without a successful search; no
    other turn gets their share.
    answers: right-padded tokens, the first `opening` of which are given, not scored
    (`models.scoring.score_answers`). microbatch_size: rows of one forward pass; 0 = all.
    width_buckets: widths that they may have.
    Source: IGPO, arXiv 2510.14967, section 3, which takes differences of probabilities. Differences
      of log-probabilities telescope too, and early searches, when the answer is still unlikely,
      weigh as much as later ones.
    """
    policy = Policy(model)

    @jax.jit
    def answer_gain(
        policy_params, trajectory: Trajectory, answers: jax.Array, answer_length: jax.Array
    ) -> jax.Array:
        K = trajectory.search_end.shape[1]
        # [B, K + 1, T]: the tokens before turn k.
        token_mask, turn_ids = trajectory.token_mask[:, None], trajectory.turn_ids[:, None]
        until = token_mask & (turn_ids < jnp.arange(K + 1)[:, None])

        def score(part, width):
            tokens, seen, answers, length = part
            return score_answers(
                policy, policy_params, tokens[:, :width], seen, answers, jnp.int32(opening), length
            )

        rows = trajectory.tokens, until.sum(-1), answers, answer_length
        widths = choose_widths(trajectory.tokens.shape[1], width_buckets)
        # [B, K + 1]
        levels = map_rows(score, rows, trajectory.length, microbatch_size, widths)
        searched = (trajectory.search_end >= 0) & trajectory.search_ok
        return jnp.where(searched, jnp.diff(levels, axis=1), 0)

    return answer_gain


def make_gradients(model: ModelConfig, settings: LearnerSettings):
    """-> gradients(params, minibatch, kl_coef) -> (gradients, metrics), summed over micro-batches.

    params, gradients: dicts of "policy" and, with an estimator that reads values, "value".
    kl_coef []: read only with kl_placement "loss".
    """
    policy, value, aggregation = Policy(model), Value(model), settings.aggregation

    # What each model minimises on a part of a minibatch.
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
        if settings.old_logprobs == "sampler":  # otherwise `make_build_batch` reports it
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
        terms = {
            "policy": (policy_objective, minibatch.action_mask),
            "value": (value_objective, minibatch.value_mask),
        }
        # Counts of the whole minibatch, so that the gradients of its parts add up to its own.
        normalizers = {
            name: loss_normalizer(terms[name][1], aggregation=aggregation) for name in params
        }

        def of_part(part, width):
            part = jax.tree.map(lambda x: x[:, :width], part)
            part_gradients, metrics = {}, {}
            for name in params:
                differentiate = jax.grad(terms[name][0], has_aux=True)
                part_gradients[name], own = differentiate(
                    params[name], part, normalizers[name], kl_coef
                )
                metrics |= own
            return part_gradients, metrics

        lengths = minibatch.token_mask.sum(1)
        widths = choose_widths(minibatch.tokens.shape[1], settings.width_buckets)
        cut = lengths, settings.microbatch_size, widths
        total, metrics = sum_rows(of_part, minibatch, *cut)
        return total, metrics | {"padding_fraction": padding_fraction(*cut)}

    return gradients


def make_update(
    model: ModelConfig,
    settings: LearnerSettings,
    policy_optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation | None,
):
    """-> update(state, batch, mean_kl) -> (state, metrics): all optimiser steps of an iteration.

    The state is donated. A step whose gradient is not finite changes nothing and is counted in
    `state.skipped`; with numbers in the ranges of a config (`checks.RANGES`) a finite gradient
    makes a finite step. mean_kl []: drives the adaptive coefficient. metrics: means over the steps.
    Without a value model state.value and value_optimizer are None.
    """
    gradients = make_gradients(model, settings)
    optimizers = {"policy": policy_optimizer} | (
        {"value": value_optimizer} if uses_critic(settings.advantage) else {}
    )

    # One model's step, or its old state if any gradient is not finite.
    def apply(optimizer, model_state: ModelState, gradient, finite):
        updates, opt_state = optimizer.update(gradient, model_state.opt_state, model_state.params)
        new = ModelState(optax.apply_updates(model_state.params, updates), opt_state)
        return jax.tree.map(partial(jnp.where, finite), new, model_state)

    # One minibatch; both models move or neither does.
    def step(state: TrainState, minibatch: Batch):
        models = {name: getattr(state, name) for name in optimizers}
        params = {name: models[name].params for name in models}
        grads, metrics = gradients(params, minibatch, state.kl_coef)
        norms = {name: optax.global_norm(grads[name]) for name in models}
        finite = jnp.isfinite(jnp.stack(list(norms.values()))).all()
        new = {name: apply(optimizers[name], models[name], grads[name], finite) for name in models}
        metrics |= {f"{name}_grad_norm": norm for name, norm in norms.items()}
        skips = dict(
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        return dataclasses.replace(state, **new, **skips), metrics

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Batch, mean_kl: jax.Array):
        # Every pass takes the minibatches in the same order.
        minibatches = split_rows(batch, settings.minibatches)
        if settings.ppo_epochs > 1:
            minibatches = jax.tree.map(
                lambda x: jnp.tile(x, (settings.ppo_epochs,) + (1,) * (x.ndim - 1)), minibatches
            )
        state, metrics = jax.lax.scan(step, state, minibatches)
        if settings.kl_target > 0:
            state = dataclasses.replace(
                state,
                kl_coef=adapt_kl_coef(
                    state.kl_coef,
                    mean_kl,
                    target=settings.kl_target,
                    horizon=settings.kl_horizon,
                    num_episodes=len(batch.tokens),
                ),
            )
        state = dataclasses.replace(state, iteration=state.iteration + 1)
        return state, jax.tree.map(lambda x: x.mean(0), metrics)

    return update
