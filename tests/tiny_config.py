"""A whole run in miniature, for tests of the commands: made-up worlds of 60 entities, two layers, eight episodes an iteration.

--config=tests/tiny_config.py:FOLDER    keeps its prepared data in FOLDER
"""

import ml_collections

from configs import base


def get_config(cache_dir: str) -> ml_collections.ConfigDict:
    c = base.get_config()
    c.iterations = 2

    c.data.kind = "atlas"
    c.data.cache_dir = cache_dir
    a = c.data.atlas
    a.entities, a.shapes = 60, ("2hop",)
    a.train_questions, a.validation_questions, a.test_questions = (
        24,
        20,
        20,
    )  # 20: the last batch of eight is not full

    c.prompt.template = "short"
    c.prompt.max_prompt_tokens = 40
    c.search.k = 1
    c.search.max_observation_tokens = 60
    c.search.timeout_s = 20.0

    m = c.model
    m.num_layers, m.embed_dim, m.num_heads, m.num_kv_heads, m.head_dim, m.ffn_dim = (
        2,
        32,
        4,
        2,
        8,
        64,
    )
    m.tie_embeddings, m.remat = False, "none"

    r = c.rollout
    r.questions, r.max_turns, r.max_turn_tokens, r.context, r.attention_block = 8, 2, 24, 256, 64

    c.rl.minibatches = 2
    c.rl.length_multiple = 256
    c.policy.learning_rate = c.value.learning_rate = 1e-4

    i = c.imitation
    i.rename = True
    i.demonstrations, i.held_out, i.log_every = 24, 16, 10
    c.checkpoint.every = 1
    return c
