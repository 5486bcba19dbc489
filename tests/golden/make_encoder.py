"""Makes encoder/: tiny random BERT models with a tokenizer, as sentence-transformers keeps them,
each with what transformers computes for some texts.

python tests/golden/make_encoder.py     (needs torch; weights follow from the seed)
"""

import json
import pathlib
import shutil

import numpy as np
import safetensors.numpy
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

FOLDER = pathlib.Path(__file__).with_name("encoder")
TEXTS = [
    "Rome",
    "the capital of france is paris",
    "",
    "who founded rome, and when ?",
    "a river in a city near a river " * 6,
    "Zürich — unknown words",
]
WORDS = (
    "rome paris france city river capital founded who when the of is in a near and , ? . : query "
    "passage un ##known word ##s"
).split()
CASES = {  # name: (pooling, whether vectors have length 1, longest text)
    "mean": ("mean", True, 16),
    "cls": ("cls", False, 32),
}


def make_model() -> BertModel:
    """A model whose every parameter counts: none is 0 or 1, and attention is far from uniform."""
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        type_vocab_size=2,
        max_position_embeddings=32,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
    )
    model, generator = BertModel(config, add_pooling_layer=True), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * scale
                + (1.0 if "LayerNorm.weight" in key else 0.0)
            )
    return model.eval()


def make_tokenizer() -> tokenizers.Tokenizer:
    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    }
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(4)  # files come with settings of their own, which must not count
    tokenizer.enable_padding(length=8)
    return tokenizer


def write_case(name: str) -> None:
    pooling, normalize, longest = CASES[name]
    folder = FOLDER / name
    make_model().save_pretrained(folder)
    marks = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), **marks).save_pretrained(folder)
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *[("2_Normalize", "Normalize")] * normalize,
    ]
    modules = [
        dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{kind}")
        for i, (path, kind) in enumerate(kinds)
    ]
    modes = {
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
    }
    (folder / "1_Pooling").mkdir()
    for file, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", {"word_embedding_dimension": 24} | modes),
        ("sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False}),
    ):
        (folder / file).write_text(json.dumps(content, indent=1) + "\n")


def embed(
    folder: pathlib.Path, texts: list[str], longest: int, pooling: str, normalize: bool
) -> np.ndarray:
    """What sentence-transformers computes, in its own steps: transformer, pooling over the mask,
    normalisation.
    """
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    batch = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        hidden = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    vectors = (
        hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    )
    return (torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors).numpy()


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, (pooling, normalize, longest) in CASES.items():
        write_case(name)
        vectors = np.ascontiguousarray(embed(FOLDER / name, TEXTS, longest, pooling, normalize))
        safetensors.numpy.save_file({"vectors": vectors}, FOLDER / f"{name}_vectors.safetensors")


if __name__ == "__main__":
    main()
