r"""A pretrained language model on real questions: SmolLM2-135M-Instruct with StePPO on MuSiQue.

    python -m stepsearch_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2 \
        --config.data.path=FOLDER \
        --config.model.checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf \
        --config.prompt.tokenizer=SmolLM2-135M-Instruct.Q4_1.gguf

docs/models.md says where the file comes from; the model's Hugging Face folder works as well.
data.path: a folder with the official MuSiQue files, as in configs/musique_tiny.py. The config is
written for one GPU or TPU chip with 16 GB or more. It also runs on two CPU cores, slowly: these
flags take 75 minutes:

    --config.model.dtype=float32 --config.rollout.dtype=float32 --config.iterations=2 \
    --config.rollout.prompts=4 --config.rl.minibatches=1 --config.rl.microbatch_size=4 \
    --config.evaluation.questions=8 --config.sft.demonstrations=64 --config.sft.held_out=4 \
    "--config.sft.phases=((6,4,False,0.0,1e-4),)"

The cold start imitates a searcher that asks the gold sub-questions one after another. It teaches
the form; RL teaches what to search for.
"""

import os

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.iterations = 100

    config.data.path = f"{os.environ.get('STEPSEARCH_DATA', '../shared/data')}/musique"
    config.prompt.tokenizer = config.model.checkpoint = "SmolLM2-135M-Instruct.Q4_1.gguf"
    config.prompt.template = "short"
    config.prompt.max_prompt_tokens = 128

    config.search.max_observation_tokens = 384

    model = config.model
    model.num_layers, model.embed_dim, model.ffn_dim = 30, 576, 1536
    model.num_heads, model.num_kv_heads, model.head_dim = 9, 3, 64
    model.rope_theta, model.norm_eps, model.qkv_bias = 1e5, 1e-5, False
    model.dtype = config.rollout.dtype = "bfloat16"

    rollout = config.rollout
    rollout.prompts = 64
    rollout.max_turns = 4
    rollout.max_turn_tokens = 96
    rollout.context = 2048

    config.rl.microbatch_size = 8
    config.policy.learning_rate, config.value.learning_rate = 3e-6, 1e-5

    sft = config.sft
    sft.optimizer = "adamw"
    sft.demonstrations, sft.held_out = 1000, 32
    sft.phases = ((250, 16, False, 0.0, 1e-4),)

    config.evaluation.split = "validation"
    config.evaluation.every = 20
    return config
