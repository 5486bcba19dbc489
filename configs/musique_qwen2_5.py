r"""StePPO as the paper trains it: Qwen2.5 on MuSiQue, on a slice of TPUs.

    python -m stepsearch_jax.train --config=configs/musique_qwen2_5.py:3b,v5e:4x4 \
        --workdir=runs/musique-3b --config.data.path=FOLDER \
        --config.model.checkpoint=FOLDER --config.prompt.tokenizer=FOLDER

Run it on every host of the slice. data.path: a folder with the official files; model.checkpoint:
the model as published (config.json, *.safetensors); prompt.tokenizer: a folder with its
tokenizer.json, usually the same.

The argument after the colon is a size (0.5b, 1.5b, 3b or 7b), then, in any order, the slice or GPUs
to run on (PLACES below; default: the smallest v5e slice that holds the model) and `reference`, to
compute what the released code computes.

The algorithm's numbers are the paper's appendix B, the defaults of base.py. This command computes,
without a TPU, whether a run fits, and the least time of an iteration:

    python -m stepsearch_jax.preflight --config=configs/musique_qwen2_5.py:3b,v5e:4x4 \
        --topology=v5e:4x4
"""

import ml_collections

from configs import base

# Layers, width, query heads, kv heads, width of a head, hidden width, whether one table serves
# input and output, rows of the table.
SIZES = {
    "0.5b": (24, 896, 14, 2, 64, 4864, True, 151936),
    "1.5b": (28, 1536, 12, 2, 128, 8960, True, 151936),
    "3b": (36, 2048, 16, 2, 128, 11008, True, 151936),
    "7b": (28, 3584, 28, 4, 128, 18944, False, 152064),
}
SLICES = {"v5e:4x4": 16, "v5e:8x8": 64, "v5p:2x2x4": 16, "v6e:4x4": 16}  # chips
GPUS = {"h100:1": 1, "h100:8": 8, "a100:1": 1, "a100:8": 8}  # of one host
PLACES = SLICES | GPUS
# Tensor shards (of heads, ffn and vocabulary), at most as many as kv heads. Parameters, optimiser
# state and rows are sharded over all other chips (fsdp). get_config takes more tensor shards if a
# minibatch has fewer rows than there are such chips.
TENSOR = {"0.5b": 1, "1.5b": 2, "3b": 2, "7b": 4}
# Examples of arguments.
VARIANTS = ("0.5b", "1.5b", "3b", "7b", "3b,v5e:8x8", "3b,reference", "7b,reference,v6e:4x4")
SMALLEST = {"0.5b": "v5e:4x4", "1.5b": "v5e:4x4", "3b": "v5e:4x4", "7b": "v5e:8x8"}


def get_config(argument: str = "3b") -> ml_collections.ConfigDict:
    size, *words = argument.split(",")
    if size not in SIZES:
        raise ValueError(
            f"configs/musique_qwen2_5.py:{argument} is not known; sizes are {', '.join(SIZES)}"
        )
    preset, place = "paper", SMALLEST[size]
    for word in words:
        if word in PLACES:
            place = word
        elif word in base.VARIANTS:
            preset = word
        else:
            raise ValueError(
                f"configs/musique_qwen2_5.py:{argument}: {word} is no slice ({', '.join(PLACES)}) "
                f"and no preset ({', '.join(base.VARIANTS)})"
            )

    config = base.get_config(preset)
    config.data.kind = "musique"
    config.data.path = "data/musique"

    model = config.model
    (
        model.num_layers,
        model.embed_dim,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        model.ffn_dim,
        model.tie_embeddings,
        model.vocab_size,
    ) = SIZES[size]
    model.rope_theta, model.norm_eps = 1e6, 1e-6
    model.dtype = "bfloat16"
    model.remat = "layers"
    model.checkpoint = f"checkpoints/Qwen2.5-{size.upper()}"
    config.prompt.tokenizer = model.checkpoint

    mesh = config.mesh
    chips = PLACES[place]
    mesh.tensor = max(TENSOR[size], chips * config.rl.minibatches // config.rollout.prompts)
    mesh.tensor = min(mesh.tensor, chips)
    mesh.data, mesh.fsdp = 1, chips // mesh.tensor

    config.rollout.dtype = "bfloat16"
    # All 256 episodes at a time: a decode step reads all parameters, for one episode or for many.
    config.rollout.slots = 0
    config.rl.microbatch_size = mesh.fsdp  # one row per fsdp shard
    return config
