"""Makes huggingface/: tiny random models of every family, as transformers writes them, each with
what transformers' own code computes for some tokens.

python tests/golden/make_huggingface.py
    needs torch; weights and tokens follow from the seed
python tests/golden/make_huggingface.py FILE.gguf
    makes huggingface/smollm2.json instead: what SmolLM2-135M-Instruct answers (needs gguf and
    accelerate)
"""

import copy
import json
import pathlib
import shutil
import sys

import numpy as np
import safetensors.numpy
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PROMPTS = [
    "The capital of France is",
    "Question: Who wrote the novel Frankenstein?\nAnswer:",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "<|im_start|>user\nName three rivers in Africa.<|im_end|>\n<|im_start|>assistant\n",
]
FOLDER = pathlib.Path(__file__).with_name("huggingface")
SIZES = dict(
    vocab_size=46,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    use_cache=True,
    max_position_embeddings=64,
    rope_theta=100.0,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)
# Scalings whose bounds lie among the frequencies of these small heads, and well within these short
# texts.
YARN = dict(
    rope_type="yarn",
    rope_theta=10.0,
    factor=4.0,
    original_max_position_embeddings=8,
    beta_fast=2.0,
    beta_slow=0.05,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10.0,
    factor=8.0,
    original_max_position_embeddings=8,
    low_freq_factor=0.3,
    high_freq_factor=1.0,
)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=2.0)
CASES = {  # name: (config, model, type of the stored weights, size of a file)
    "qwen2": (
        Qwen2Config(**SIZES, tie_word_embeddings=True),
        Qwen2ForCausalLM,
        torch.float32,
        "1GB",
    ),
    "qwen2_yarn": (
        Qwen2Config(**SIZES | dict(rope_parameters=YARN), tie_word_embeddings=False),
        Qwen2ForCausalLM,
        torch.float16,
        "10KB",
    ),
    "qwen3": (
        Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
        Qwen3ForCausalLM,
        torch.bfloat16,
        "1GB",
    ),
    "qwen3_yarn": (
        Qwen3Config(**SIZES | dict(rope_parameters=YARN), head_dim=16, tie_word_embeddings=False),
        Qwen3ForCausalLM,
        torch.bfloat16,
        "1GB",
    ),
    "llama": (
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        LlamaForCausalLM,
        torch.bfloat16,
        "1GB",
    ),
    "llama_llama3": (
        LlamaConfig(**SIZES | dict(rope_parameters=LLAMA3), tie_word_embeddings=False),
        LlamaForCausalLM,
        torch.bfloat16,
        "6KB",
    ),
    "llama_linear": (
        LlamaConfig(
            **SIZES | dict(rope_parameters=LINEAR, num_key_value_heads=4), tie_word_embeddings=True
        ),
        LlamaForCausalLM,
        torch.bfloat16,
        "1GB",
    ),
}


def make_model(name: str, seed: int):
    """A model whose every parameter counts: none is 0 or 1, and attention is far from uniform.
    Weights are rounded to the type in which they are stored.
    """
    config, build, dtype, _ = CASES[name]
    model, generator = build(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.copy_(
                (
                    torch.randn(parameter.shape, generator=generator) * scale
                    + (1.0 if "norm" in key else 0.0)
                ).to(dtype)
            )
    return model.eval()


def compute_logits(model, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, T, V] of right-padded rows in one batch, and of each row alone; 0 behind a row's
    end.
    """
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        padded = (
            model(
                torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))
            ).logits.numpy()
            * mask[..., None]
        )
        alone = np.zeros_like(padded)
        for row, length in enumerate(lengths):
            alone[row, :length] = (
                model(torch.tensor(tokens[row : row + 1, :length])).logits[0].numpy()
            )
    return padded, alone


def draw_tokens(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(seed).integers(1, SIZES["vocab_size"], (3, 12)), np.array(
        [12, 9, 5]
    )


def save_model(model, name: str, folder: pathlib.Path) -> None:
    """As a user of transformers would, in the type of the case."""
    _, _, dtype, file_size = CASES[name]
    # A copy: the rotary frequencies would be rounded as well.
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=file_size)


def record_answers(file: pathlib.Path) -> None:
    """Token ids of the prompts and of the 64 tokens that follow, the likeliest at each place."""
    model = LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    records = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        # A text goes on after its end token: the comparison is one of the model, not of when it
        # stops.
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=64,
            max_new_tokens=64,
            eos_token_id=[],
            pad_token_id=0,
        )
        records.append({"prompt": ids[0].tolist(), "answer": out[0, ids.shape[1] :].tolist()})
    (FOLDER / "smollm2.json").write_text(json.dumps(records) + "\n")


def main() -> None:
    if len(sys.argv) > 1:
        return record_answers(pathlib.Path(sys.argv[1]))
    for name in CASES:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    tokens, lengths = draw_tokens(0)
    for name in CASES:
        model = make_model(name, seed=0)
        save_model(model, name, FOLDER / name)
        padded, alone = compute_logits(model, tokens, lengths)
        assert np.abs(padded - alone).max() < 1e-4
        safetensors.numpy.save_file(
            dict(tokens=tokens, lengths=lengths, logits=alone),
            FOLDER / f"{name}_logits.safetensors",
        )


if __name__ == "__main__":
    main()
