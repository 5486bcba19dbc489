r"""Your own questions and passages, and a pretrained model from the Hugging Face Hub.

    python -m stepsearch_jax.train --config=configs/own_data.py --workdir=runs/mine \
        --config.data.path=FOLDER

FOLDER holds train.jsonl, validation.jsonl and corpus.jsonl (docs/data.md, "Your own questions").
--config.model.checkpoint and --config.prompt.tokenizer name another model: on the Hub, or a folder.
The numbers are those of one GPU or TPU chip with 24 GB or more.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.iterations = 100

    config.data.kind = "jsonl"
    config.data.path = "my_data"

    # The sizes are the checkpoint's.
    config.model.checkpoint = config.prompt.tokenizer = "Qwen/Qwen2.5-0.5B-Instruct"
    config.model.num_layers = 0
    config.model.dtype = config.rollout.dtype = "bfloat16"

    config.prompt.max_prompt_tokens = 768
    config.search.max_observation_tokens = 512

    rollout = config.rollout
    rollout.prompts = 64
    rollout.max_turns = 4
    rollout.max_turn_tokens = 192
    rollout.context = 3584

    config.rl.microbatch_size = 4
    config.policy.learning_rate, config.value.learning_rate = 1e-6, 1e-5
    config.policy.warmup, config.value.warmup = 0.1, 0.0

    config.evaluation.split = "validation"
    config.evaluation.questions = 200
    config.evaluation.every = 20
    return config
