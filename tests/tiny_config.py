"""A whole run in miniature, for tests of the commands: made-up worlds of 60 entities, two layers,
eight episodes an iteration.

--config=tests/tiny_config.py:FOLDER    keeps its prepared data in FOLDER
"""

import ml_collections

from configs import base


def get_config(cache_dir: str) -> ml_collections.ConfigDict:
    config = base.get_config()
    config.iterations = 2

    config.data.kind = "atlas"
    config.data.cache_dir = cache_dir
    atlas = config.data.atlas
    atlas.entities, atlas.shapes = 60, ("2hop",)
    atlas.train_questions = 24
    atlas.validation_questions = atlas.test_questions = 20  # the last batch of eight is not full

    config.prompt.template = "short"
    config.prompt.max_prompt_tokens = 40
    config.search.k = 1
    config.search.max_observation_tokens = 60
    config.search.timeout_s = 20.0

    model = config.model
    model.num_layers, model.embed_dim, model.ffn_dim = 2, 32, 64
    model.num_heads, model.num_kv_heads, model.head_dim = 4, 2, 8
    model.tie_embeddings, model.remat = False, "none"

    rollout = config.rollout
    rollout.prompts, rollout.max_turns, rollout.max_turn_tokens = 8, 2, 24
    rollout.context, rollout.attention_block = 256, 64

    config.rl.minibatches = 2
    config.rl.width_buckets = 1
    config.policy.learning_rate = config.value.learning_rate = 1e-4

    sft = config.sft
    sft.rename = True
    sft.demonstrations, sft.held_out, sft.log_every = 24, 16, 10
    config.checkpoint.every = 1
    return config
