"""The quickstart: a policy of 0.6M parameters learns to search 2- and 3-hop questions of made-up worlds, on two CPU cores.

    python -m stepsearch_jax.train --config=configs/atlas_quickstart.py --workdir=runs/quickstart

It starts from the warm start in configs/warm_starts/atlas, a clone of a searcher that reads well and searches badly. Variants, after a colon:
    anew        makes that warm start again, by imitation from random parameters; the same RL follows
    continued   control: imitation goes on instead of RL
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
            f"configs/atlas_quickstart.py:{variant} is not known; variants are {', '.join(VARIANTS[1:])}"
        )
    c = base.get_config()
    c.iterations = 80

    c.data.kind = "atlas"
    a = c.data.atlas
    a.entities = 400
    a.shapes = ("2hop", "3hop_chain")
    a.train_questions, a.validation_questions, a.test_questions = 6000, 128, 256

    c.prompt.template = "short"
    c.prompt.max_prompt_tokens = 48

    c.search.k = 1
    c.search.bm25_k1 = 2.5
    c.search.max_observation_tokens = 80

    m = c.model
    m.num_layers, m.embed_dim, m.num_heads, m.num_kv_heads, m.head_dim, m.ffn_dim = (
        3,
        128,
        6,
        2,
        32,
        256,
    )
    m.rope_theta = 1000.0
    m.previous_token_peak = 12.0

    r = c.rollout
    r.questions = 64
    r.max_turns = 4
    r.max_turn_tokens = 32
    r.context = 416
    r.attention_block = 64
    r.prefill_tokens = 80

    c.rl.length_multiple = 64
    c.policy.learning_rate, c.policy.warmup = 5e-4, 0.0
    c.value.learning_rate, c.value.warmup = 1e-3, 0.0

    i = c.imitation
    i.rename = True
    i.skill = 0.5
    i.demonstrations = 12000
    i.checkpoint = WARM_START
    if variant == "anew":
        i.checkpoint = ""
        i.phases = (
            (300, 32, True, 0.0, 0.05),
            (500, 16, False, 0.5, 0.03),
            (500, 16, False, 1.0, 0.02),
            (400, 16, False, 1.0, 0.01),
        )
    elif variant == "continued":
        c.iterations = 0
        i.phases = ((1000, 16, False, 1.0, 0.005),)
    elif variant == "shuffled":
        c.reward.shuffle = True
    elif variant == "one_search":
        r.max_turns = 1

    c.evaluation.split = "test"
    c.evaluation.controls = not variant
    return c
