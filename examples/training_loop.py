"""A training loop of your own on this library's functions: Atlas, a small policy, two CPU cores.

    python -m examples.training_loop [ITERATIONS]

This is `stepsearch_jax/train.py` without metrics files, evaluation, dumps and resuming. It takes
about a minute.
"""

import pathlib
import sys
import tempfile

import jax

from stepsearch_jax.data.loading import question_rows
from stepsearch_jax.rl import learner
from stepsearch_jax.run.collect import collect
from stepsearch_jax.run.config_file import load_config
from stepsearch_jax.run.settings import learner_settings, make_optimizers
from stepsearch_jax.run.start import begin_run, make_sampler
from stepsearch_jax.run.system import build_system
from stepsearch_jax.runtime import start_jax
from stepsearch_jax.sharding import rows_to_mesh

config = load_config("atlas_quickstart")
config.iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 3
config.data.atlas.train_questions = 500  # fewer than the quickstart's: made in seconds
config.rollout.prompts = 32
config.rl.width_buckets = 2  # widths of a micro-batch: fewer to compile
start_jax(config)

# Questions, corpus, BM25 index, tokenizer and device mesh; then the programs, each jitted once.
system = build_system(config, [config.data.train_split])
split = system.splits[config.data.train_split]
sample_episodes, to_rollout_layout = make_sampler(system)
settings = learner_settings(config)
build_batch = learner.make_build_batch(system.learner_model, settings)
update = learner.make_update(
    system.learner_model, settings, *make_optimizers(config, config.iterations)
)

# The state: policy and value model with their optimisers. The reference is the policy before RL.
workdir = pathlib.Path(tempfile.mkdtemp())
state, reference_params, _, key = begin_run(system, workdir)

for iteration in range(config.iterations):
    rows = question_rows(
        int(state.position), config.rollout.prompts, len(split.questions), config.seed
    )
    rollout = collect(  # episodes on the device, searches on the host; then text and scores
        system,
        sample_episodes,
        to_rollout_layout(state.policy.params),
        split,
        rows,
        jax.random.fold_in(key, iteration),
        config.rollout.temperature,
    )
    scores = rollout.scores
    rewards = rows_to_mesh(system.mesh, (scores.step_rewards, scores.outcome_rewards))
    batch, metrics = build_batch(state, reference_params, rollout.trajectory, *rewards)
    state, _ = update(state, batch, metrics["kl"])
    state = state.replace(position=state.position + config.rollout.prompts)
    f1, gain = scores.measures.f1.mean(), scores.gain.sum(1).mean()
    print(f"iteration {iteration}: f1 {f1:.3f}, information gain {gain:.3f}", flush=True)
