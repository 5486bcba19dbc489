"""Real questions, the whole way, on two CPU cores: a small random policy with the Qwen2.5 tokenizer on MuSiQue.

    python -m stepsearch_jax.train --config=configs/musique_tiny.py --workdir=runs/musique --config.iterations=5 \
        --config.data.path=FOLDER --config.prompt.tokenizer=FOLDER

data.path: a folder with the official files, train and validation as .jsonl or .jsonl.gz, and optionally corpus.jsonl(.gz); prompt.tokenizer: a folder with
Qwen2.5's tokenizer.json(.gz), which `hf download Qwen/Qwen2.5-0.5B tokenizer.json --local-dir data/tokenizer_qwen2_5` fetches. Without the two flags they are
`musique` and `tokenizer_qwen2_5` in the folder that STEPSEARCH_DATA names. A short imitation teaches the form of a search, no more: the policy will not answer
well.
"""

import os

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    c = base.get_config()
    c.iterations = 5

    c.data.kind = "musique"
    folder = os.environ.get("STEPSEARCH_DATA", "../shared/data")
    c.data.path = f"{folder}/musique"
    c.prompt.tokenizer = f"{folder}/tokenizer_qwen2_5"
    c.prompt.template = "short"
    c.prompt.max_prompt_tokens = 96

    c.search.max_observation_tokens = 192

    m = c.model
    m.num_layers, m.embed_dim, m.num_heads, m.num_kv_heads, m.head_dim, m.ffn_dim = (
        2,
        64,
        4,
        2,
        16,
        128,
    )
    m.rope_theta = 10000.0
    m.previous_token_peak = 12.0

    r = c.rollout
    r.questions = 8
    r.max_turns = 2
    r.max_turn_tokens = 64
    r.context = 768

    c.policy.learning_rate = c.value.learning_rate = 1e-3
    c.policy.warmup = c.value.warmup = 0.0

    i = c.imitation
    i.demonstrations, i.held_out, i.log_every = 64, 8, 10
    i.phases = ((60, 4, True, 0.0, 0.03),)

    c.evaluation.split = "validation"
    return c
