"""Multi-turn sampling with tunix's sampler, called once a turn on the whole context again.

Its best use: a sampler for each turn, with a cache of exactly that turn's length and programs that
are compiled once; prompts as arrays rather than texts; no padding, no end token, top_p = 1, which
needs no sorting.
"""

from __future__ import annotations

import numpy as np

from stepsearch_jax.benchmark.peers.process import serve
from stepsearch_jax.benchmark.peers.tunix_model import (
    Tokenizer,
    find_logits,
    find_versions,
    load_model,
)


def make(job: dict, arrays: dict[str, np.ndarray]):
    """As `process.serve` wants it. To compare: logits after the prompts [B, V]."""
    from tunix.generate import sampler

    class ArraySampler(sampler.Sampler):
        """Takes token ids as they are."""

        def tokenize(self, input_string):
            return input_string

    model, model_config = load_model(job, arrays), job["model"]
    prompts, observation, tokens = arrays["prompts"], arrays["observation"], job["turn_tokens"]
    observations = np.broadcast_to(observation, (len(prompts), len(observation)))
    lengths = [
        prompts.shape[1] + turn * (tokens + len(observation)) for turn in range(job["turns"])
    ]
    sizes = [model_config[name] for name in ("num_layers", "num_kv_heads", "head_dim")]
    caches = [sampler.CacheConfig(length + tokens, *sizes) for length in lengths]
    samplers = [ArraySampler(model, Tokenizer(), cache) for cache in caches]

    def run():
        context = prompts
        for turn, sample in enumerate(samplers):
            if turn:
                context = np.concatenate([context, observations], axis=1)
            found = sample(
                list(context),
                max_generation_steps=tokens,
                max_prompt_length=lengths[turn],
                temperature=1.0,
                top_p=1.0,
                seed=job["seed"],
                eos_tokens=[Tokenizer().eos_id()],
            )
            context = np.concatenate([context, np.stack(found.tokens)], axis=1)
        if context.shape[1] != job["length"]:
            raise ValueError(
                f"its episodes have {context.shape[1]} tokens instead of {job['length']}"
            )
        return context

    return find_versions(), {"logits": find_logits(model, prompts)}, {"rollout": run}


if __name__ == "__main__":
    serve(make)
