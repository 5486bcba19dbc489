"""One PPO step of tunix: its PPO learner on an RLCluster, with three models of the same size.

The models are policy, reference and value model.

"step" is what its learner does for one batch: rollout, log-probabilities of policy and reference,
values, advantages, one optimiser step of both models, and the sampler's new weights. "updates" is
the two optimiser steps alone, on a batch that is ready.
"""

from __future__ import annotations

import numpy as np

from stepsearch_jax.benchmark.peers.process import serve
from stepsearch_jax.benchmark.peers.tunix_model import (
    Tokenizer,
    find_logits,
    find_versions,
    load_model,
)


def make(job: dict, arrays: dict[str, np.ndarray]):
    """As `process.serve` wants it. To compare: logits after the prompts [B, V]."""
    import jax
    import optax
    from tunix.rl import rl_cluster
    from tunix.rl import utils as rl_utils
    from tunix.rl.ppo import ppo_learner
    from tunix.rl.rollout import base_rollout

    # A cluster on one device, and its PPO learner.
    actor = load_model(job, arrays)
    logits = find_logits(actor, arrays["prompts"])
    prompts = [" ".join(map(str, row)) for row in arrays["prompts"].tolist()]
    prompt, tokens, rows = arrays["prompts"].shape[1], job["tokens"], len(prompts)
    optimizer = lambda rate: optax.chain(
        optax.clip_by_global_norm(job["max_grad_norm"]),
        optax.adamw(rate, b1=job["b1"], b2=job["b2"], weight_decay=job["weight_decay"]),
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = rl_cluster.RLCluster(
        actor=actor,
        critic=rl_utils.create_critic_model(actor),
        reference=load_model(job, arrays),
        tokenizer=Tokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in rl_cluster.Role},
            training_config=rl_cluster.RLTrainingConfig(
                eval_every_n_steps=1 << 30,
                max_steps=1 << 30,
                actor_optimizer=optimizer(job["policy_rate"]),
                critic_optimizer=optimizer(job["value_rate"]),
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=tokens,
                max_prompt_length=prompt,
                kv_cache_size=prompt + tokens,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
            ),
        ),
    )
    learner = ppo_learner.PPOLearner(
        cluster,
        ppo_learner.PPOConfig(
            gamma=job["gamma"],
            gae_lambda=job["gae_lambda"],
            beta=job["kl_coef"],
            epsilon=job["clip"],
            clip_range_value=job["value_clip"],
            kl_method="kl",
        ),
        reward_fns=lambda prompts, completions, **_: np.linspace(
            0.0, 1.0, len(completions)
        ).tolist(),
    )
    # As its train() sets them for one batch.
    learner._rollout_micro_batch_size = learner._compute_logps_micro_batch_size = rows

    # The batch for "updates", and both runs.
    collect = lambda: learner._generate_and_compute_advantage({"prompts": prompts})
    ready = collect()
    if ready.completion_ids.shape != (rows, tokens):
        shape = ready.completion_ids.shape
        raise ValueError(f"its completions have the shape {shape} instead of {(rows, tokens)}")

    def update(example):
        cluster.update_actor([example], None)
        cluster.update_critic([example], None)
        jax.block_until_ready(
            jax.tree.leaves((cluster.actor_trainer.optimizer, cluster.critic_trainer.optimizer))
        )

    def step():
        update(collect())
        cluster.sync_weights()

    return find_versions(), {"logits": logits}, {"step": step, "updates": lambda: update(ready)}


if __name__ == "__main__":
    serve(make)
