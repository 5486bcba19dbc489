r"""A real language model on real questions: SmolLM2-135M-Instruct, cold-started and then trained by StePPO on MuSiQue.

    python -m stepsearch_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2 --config.data.path=FOLDER \
        --config.model.checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf --config.prompt.tokenizer=SmolLM2-135M-Instruct.Q4_1.gguf

The file comes as README's "Pretrained models" says; the Hugging Face folder does as well. data.path: a folder with the official MuSiQue files, as in
configs/musique_tiny.py. Written for one GPU or TPU chip with 16 GB or more. On two CPU cores it runs as well, slowly: an hour for

    --config.model.dtype=float32 --config.rollout.dtype=float32 --config.iterations=2 --config.rollout.questions=4 --config.rl.minibatches=1 \
    --config.rl.micro_rows=4 --config.evaluation.questions=8 --config.imitation.demonstrations=64 --config.imitation.held_out=4 \
    "--config.imitation.phases=((6,4,False,0.0,1e-4),)"

The cold start imitates a searcher that asks the gold sub-questions one after another, which teaches the form; what the policy searches for is left to RL.
"""

import os

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    c = base.get_config()
    c.iterations = 100

    c.data.path = f"{os.environ.get('STEPSEARCH_DATA', '../shared/data')}/musique"
    c.prompt.tokenizer = c.model.checkpoint = "SmolLM2-135M-Instruct.Q4_1.gguf"
    c.prompt.template = "short"
    c.prompt.max_prompt_tokens = 128

    c.search.max_observation_tokens = 384

    m = c.model
    m.num_layers, m.embed_dim, m.num_heads, m.num_kv_heads, m.head_dim, m.ffn_dim = (
        30,
        576,
        9,
        3,
        64,
        1536,
    )
    m.rope_theta, m.norm_eps, m.qkv_bias = 1e5, 1e-5, False
    m.dtype = c.rollout.dtype = "bfloat16"

    r = c.rollout
    r.questions = 64
    r.max_turns = 4
    r.max_turn_tokens = 96
    r.context = 2048

    c.rl.micro_rows = 8
    c.policy.learning_rate, c.value.learning_rate = 3e-6, 1e-5

    i = c.imitation
    i.optimizer = "adamw"
    i.demonstrations, i.held_out = 1000, 32
    i.phases = ((250, 16, False, 0.0, 1e-4),)

    c.evaluation.split = "validation"
    c.evaluation.every = 20
    return c
