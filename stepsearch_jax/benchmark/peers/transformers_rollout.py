"""Multi-turn sampling as loops around transformers do it.

`generate` once a turn, on the whole context again; then the observation is appended. torch on all
cores, inference mode, scaled-dot-product attention; rows have equal lengths, so nothing is padded;
there is no end token to look for.
"""

from __future__ import annotations

import os

import numpy as np

from stepsearch_jax.benchmark.peers.process import serve


def name_weights(weights: dict[str, np.ndarray], layers: int, tied: bool) -> dict[str, np.ndarray]:
    """Our parameters by the names and shapes of a Hugging Face Qwen2 checkpoint.

    Our names are joined by "/", our layers stacked; its kernels are [out, in].
    """
    trunk = "params/trunk/"
    found = {
        "model.embed_tokens.weight": weights[trunk + "embedding"],
        "model.norm.weight": weights[trunk + "final_norm/scale"],
    }
    found["lm_head.weight"] = weights[trunk + "embedding"] if tied else weights["params/lm_head"].T
    for layer in range(layers):
        own = {name: weights[f"{trunk}layers/{name}"][layer] for name in _LAYER}
        prefix = f"model.layers.{layer}."
        embed = own["q/kernel"].shape[0]
        for name in "qkv":
            kernel = own[f"{name}/kernel"].reshape(embed, -1).T
            found[f"{prefix}self_attn.{name}_proj.weight"] = kernel
            found[f"{prefix}self_attn.{name}_proj.bias"] = own[f"{name}/bias"].reshape(-1)
        found[f"{prefix}self_attn.o_proj.weight"] = own["o/kernel"].reshape(-1, embed).T
        for name in ("gate", "up", "down"):
            found[f"{prefix}mlp.{name}_proj.weight"] = own[f"{name}/kernel"].T
        found[f"{prefix}input_layernorm.weight"] = own["attention_norm/scale"]
        found[f"{prefix}post_attention_layernorm.weight"] = own["ffn_norm/scale"]
    return found


_LAYER = (
    *("q/kernel", "q/bias", "k/kernel", "k/bias", "v/kernel", "v/bias", "o/kernel"),
    *("gate/kernel", "up/kernel", "down/kernel", "attention_norm/scale", "ffn_norm/scale"),
)


def make(job: dict, arrays: dict[str, np.ndarray]):
    """As `process.serve` wants it. To compare: logits after the prompts [B, V], in float32."""
    import torch
    import transformers

    # The model with our weights.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(job["seed"])
    model_config = job["model"]
    config = transformers.Qwen2Config(
        vocab_size=model_config["vocab_size"],
        hidden_size=model_config["embed_dim"],
        intermediate_size=model_config["ffn_dim"],
        num_hidden_layers=model_config["num_layers"],
        num_attention_heads=model_config["num_heads"],
        num_key_value_heads=model_config["num_kv_heads"],
        head_dim=model_config["head_dim"],
        rms_norm_eps=model_config["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": model_config["rope_theta"]},
        tie_word_embeddings=model_config["tie_embeddings"],
        max_position_embeddings=1 << 15,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        dtype="float32",
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    weights = name_weights(arrays, model_config["num_layers"], model_config["tie_embeddings"])
    model.load_state_dict(
        {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in weights.items()}
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)

    # Prompts, observations, and sampling without an end.
    load = lambda name: torch.from_numpy(arrays[name]).long().to(device)
    prompts, observation = load("prompts"), load("observation")
    observations = observation.expand(len(prompts), -1)
    tokens = job["turn_tokens"]
    rules = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
    )

    @torch.inference_mode()
    def run():
        context = prompts
        for turn in range(job["turns"]):
            if turn:
                context = torch.cat([context, observations], dim=1)
            context = model.generate(
                context, attention_mask=torch.ones_like(context), generation_config=rules
            )
        context = context.cpu().numpy()
        if context.shape[1] != job["length"]:
            raise ValueError(
                f"its episodes have {context.shape[1]} tokens instead of {job['length']}"
            )
        return context

    # The logits in float32, then the type that is timed.
    with torch.inference_mode():
        logits = model(prompts, logits_to_keep=1).logits[:, -1].cpu().numpy()
    model.to(getattr(torch, model_config["dtype"]))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return versions | {"device": str(device)}, {"logits": logits}, {"rollout": run}


if __name__ == "__main__":
    serve(make)
