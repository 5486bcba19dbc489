r"""A whole run on real questions, on two CPU cores: a small random policy on MuSiQue.

    python -m stepsearch_jax.train --config=configs/musique_tiny.py --workdir=runs/musique \
        --config.iterations=5 --config.data.path=FOLDER --config.prompt.tokenizer=FOLDER

data.path: a folder with the official files, train and validation as .jsonl or .jsonl.gz, and
optionally corpus.jsonl(.gz); prompt.tokenizer: a folder with Qwen2.5's tokenizer.json(.gz), which
`hf download Qwen/Qwen2.5-0.5B tokenizer.json --local-dir data/tokenizer_qwen2_5` fetches. The
defaults are `musique` and `tokenizer_qwen2_5` in the folder that STEPSEARCH_DATA names. A short
fine-tuning teaches only the form of a search: the policy will not answer well.
"""

import os

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.iterations = 5

    config.data.kind = "musique"
    folder = os.environ.get("STEPSEARCH_DATA", "../shared/data")
    config.data.path = f"{folder}/musique"
    config.prompt.tokenizer = f"{folder}/tokenizer_qwen2_5"
    config.prompt.template = "short"
    config.prompt.max_prompt_tokens = 96

    config.search.max_observation_tokens = 192

    model = config.model
    model.num_layers, model.embed_dim, model.ffn_dim = 2, 64, 128
    model.num_heads, model.num_kv_heads, model.head_dim = 4, 2, 16
    model.rope_theta = 10000.0
    model.previous_token_peak = 12.0

    rollout = config.rollout
    rollout.prompts = 8
    rollout.max_turns = 2
    rollout.max_turn_tokens = 64
    rollout.context = 768

    config.policy.learning_rate = config.value.learning_rate = 1e-3
    config.policy.warmup = config.value.warmup = 0.0

    sft = config.sft
    sft.demonstrations, sft.held_out, sft.log_every = 64, 8, 10
    sft.phases = ((60, 4, True, 0.0, 0.03),)

    config.evaluation.split = "validation"
    return config
