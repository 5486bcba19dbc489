"""The quickstart: a policy of 0.6M parameters learns to search, on two CPU cores.

Its questions have two and three hops and are about made-up worlds.

    python -m stepsearch_jax.train --config=configs/atlas_quickstart.py --workdir=runs/quickstart

It starts from the warm start in configs/warm_starts/atlas, which imitates a searcher that reads
well and searches badly. Variants, after a colon:
    anew        makes that warm start again, by supervised fine-tuning from random parameters; then
                the same RL
    continued   control: more supervised fine-tuning instead of RL
    shuffled    control: RL with every episode's rewards given to another episode
    one_search  control: RL with a single search an episode
"""

import ml_collections

from configs import base

WARM_START = "configs/warm_starts/atlas"
VARIANTS = ("", "anew", "continued", "shuffled", "one_search")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/atlas_quickstart.py:{variant} is not known; variants are "
            f"{', '.join(VARIANTS[1:])}"
        )
    config = base.get_config()
    config.iterations = 50

    # Questions of two and three hops in worlds of 400 entities; short prompts and observations.
    config.data.kind = "atlas"
    atlas = config.data.atlas
    atlas.entities = 400
    atlas.shapes = ("2hop", "3hop_chain")
    atlas.train_questions, atlas.validation_questions, atlas.test_questions = 6000, 128, 256

    config.prompt.template = "short"
    config.prompt.max_prompt_tokens = 48

    config.search.k = 1
    config.search.bm25_k1 = 2.5
    config.search.max_observation_tokens = 80

    # A model of 0.6M parameters, and episodes of up to four searches.
    model = config.model
    model.num_layers, model.embed_dim, model.ffn_dim = 3, 128, 256
    model.num_heads, model.num_kv_heads, model.head_dim = 6, 2, 32
    model.rope_theta = 1000.0
    model.previous_token_peak = 12.0

    rollout = config.rollout
    rollout.prompts = 64
    rollout.max_turns = 4
    rollout.max_turn_tokens = 32
    rollout.context = 416
    rollout.attention_block = 64
    rollout.prefill_tokens = 80

    # Eight optimiser steps an iteration. The sampler's log-probabilities save a forward pass.
    config.rl.minibatches = 8
    config.rl.old_logprobs = "sampler"
    config.rl.microbatch_size = 4
    config.rl.width_buckets = 8
    config.policy.learning_rate, config.policy.warmup = 6e-4, 0.0
    config.value.learning_rate, config.value.warmup = 1e-3, 0.0

    # The warm start, shipped or made again, and the variants.
    sft = config.sft
    sft.rename = True
    sft.known_fraction = 0.5
    sft.demonstrations = 12000
    sft.checkpoint = WARM_START
    if variant == "anew":
        sft.checkpoint = ""
        sft.phases = (
            (300, 32, True, 0.0, 0.05),
            (500, 16, False, 0.5, 0.03),
            (500, 16, False, 1.0, 0.02),
            (400, 16, False, 1.0, 0.01),
        )
    elif variant == "continued":
        config.iterations = 0
        sft.phases = ((1000, 16, False, 1.0, 0.005),)
    elif variant == "shuffled":
        config.reward.shuffle = True
    elif variant == "one_search":
        rollout.max_turns = 1

    config.evaluation.split = "test"
    config.evaluation.controls = not variant
    return config
