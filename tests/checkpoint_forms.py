"""Checkpoints in the many forms in which they are found: tiny random models of every family, each
written with some peculiarities of its config, names, types and files.

`draw_form(seed)` picks the peculiarities, `write_form` writes the folder.
"""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy

LAYERS, WIDTH, HEADS, KV_HEADS, FFN, VOCAB = 2, 32, 4, 2, 48, 40
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENS = np.random.default_rng(0).integers(1, VOCAB, (2, 24)).astype(np.int32)
DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
}
FAMILIES = ("qwen2", "qwen3", "llama")
# Which tables are stored, and what config.json says of them.
TYINGS = ("one", "one, as the head", "two equal", "two different", "untied", "untied, one")
FILES = ("single", "shards", "stale index", "stale shard")
PREFIXES = ("full", "none", "twice", "none in one layer")
YARN = dict(factor=4.0, original_max_position_embeddings=8, beta_fast=2.0, beta_slow=0.05)
LLAMA3 = dict(
    factor=8.0, original_max_position_embeddings=8, low_freq_factor=0.3, high_freq_factor=1.0
)

# What a config may say beside the sizes: name -> (families, keys). All are read.
CONFIGS = {
    "plain": (FAMILIES, {}),
    "kv heads null": (FAMILIES, {"num_key_value_heads": None}),
    "head_dim": (FAMILIES, {"head_dim": 16}),
    "no head_dim": (("qwen2", "llama"), {"head_dim": ...}),
    "no epsilon": (FAMILIES, {"rms_norm_eps": ...}),
    "no theta": (FAMILIES, {"rope_theta": ...}),
    "new theta": (FAMILIES, {"rope_theta": ..., "rope_parameters": {"rope_theta": 30.0}}),
    "theta inside": (FAMILIES, {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}}),
    "linear": (FAMILIES, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama3": (FAMILIES, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "yarn": (FAMILIES, {"rope_scaling": {"rope_type": "yarn", **YARN}}),
    "yarn of old": (
        FAMILIES,
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 8},
    ),
    "two kinds named": (
        FAMILIES,
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 30.0, **LLAMA3},
        },
    ),
    "two types": (
        FAMILIES,
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", **YARN}},
    ),
    "context outside": (
        FAMILIES,
        {
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
            "original_max_position_embeddings": 16,
        },
    ),
    "yarn mscale": (
        FAMILIES,
        {"rope_scaling": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    ),
    "yarn one mscale": (FAMILIES, {"rope_scaling": {"rope_type": "yarn", **YARN, "mscale": 0.7}}),
    "yarn attention_factor": (
        FAMILIES,
        {"rope_scaling": {"rope_type": "yarn", **YARN, "attention_factor": 1.3, "mscale": 0.7}},
    ),
    "yarn betas 0": (
        FAMILIES,
        {
            "rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 0, "beta_slow": 0},
            "rope_theta": 1.05,
        },
    ),
    "yarn betas swapped": (
        FAMILIES,
        {"rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 0.05, "beta_slow": 2.0}},
    ),
    "qwen2 attention_bias": (("qwen2",), {"attention_bias": True, "mlp_bias": True}),
    "windows off": (("qwen2", "qwen3"), {"use_sliding_window": False, "sliding_window": 4}),
    "windows of later layers": (
        ("qwen2", "qwen3"),
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": LAYERS},
    ),
    "all layers full": (
        ("qwen2", "qwen3"),
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 0,
            "layer_types": ["full_attention"] * LAYERS,
        },
    ),
    "unused keys": (FAMILIES, {"is_causal": True, "quantization_config": None, "auto_map": {}}),
}
# And what is refused: the same, with a word of the message.
REFUSED_CONFIGS = {
    "attention_bias": (("qwen3", "llama"), {"attention_bias": True}, "attention_bias"),
    "mlp_bias": (("llama",), {"mlp_bias": True}, "mlp_bias"),
    "gelu": (FAMILIES, {"hidden_act": "gelu"}, "hidden_act"),
    "not causal": (FAMILIES, {"is_causal": False}, "is_causal"),
    "windows": (
        ("qwen2", "qwen3"),
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "set use_sliding_window to false",
    ),
    "windowed layers": (
        ("qwen2", "qwen3"),
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "remove layer_types",
    ),
    "too many layer types": (
        ("qwen2", "qwen3"),
        {"layer_types": ["full_attention"] * (LAYERS + 1)},
        "layer_types has 3",
    ),
    "a window in llama": (("llama",), {"sliding_window": 4}, "sliding_window"),
    "chunks in llama": (("llama",), {"attention_chunk_size": 4}, "attention_chunk_size"),
    "layers differ": (
        FAMILIES,
        {"per_layer_config": {"1": {"num_key_value_heads": 4}}},
        "per_layer_config",
    ),
    "quantized": (
        FAMILIES,
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config",
    ),
    "other weights": (FAMILIES, {"transformers_weights": "other.safetensors"}, "other.safetensors"),
    "dynamic": (
        FAMILIES,
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
        "dynamic",
    ),
    "longrope": (
        FAMILIES,
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "factor": 2.0,
            }
        },
        "longrope",
    ),
    "partial": (FAMILIES, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "whole indices": (
        FAMILIES,
        {"rope_scaling": {"rope_type": "yarn", **YARN, "truncate": False}},
        "truncate",
    ),
    "unknown scaling key": (
        FAMILIES,
        {"rope_scaling": {"rope_type": "yarn", **YARN, "finetuned": True}},
        "finetuned",
    ),
    "llama3 upside down": (
        FAMILIES,
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0}},
        "high_freq_factor",
    ),
    "vocabulary": (FAMILIES, {"vocab_size": VOCAB + 8}, "embed_tokens"),
    "a layer too few": (FAMILIES, {"num_hidden_layers": LAYERS - 1}, "num_hidden_layers"),
    "a layer too many": (FAMILIES, {"num_hidden_layers": LAYERS + 1}, "layers.2"),
    "kv heads": (FAMILIES, {"num_key_value_heads": 3}, "3 key and value heads"),
    "tying as a word": (FAMILIES, {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    "size as text": (FAMILIES, {"hidden_size": str(WIDTH)}, "config.json"),
}


def _add(name: str, shape: tuple[int, ...]):
    return lambda tensors: tensors.update({name: np.full(shape, 0.3, np.float32)})


# Tensors beside the model's: how they get there. Those of other tasks are ignored.
EXTRAS = {
    "none": lambda tensors: None,
    "score": _add("score.weight", (3, WIDTH)),
    "value head": _add("v_head.summary.weight", (1, WIDTH)),
    "classifier": _add("classifier.bias", (3,)),
    "frequencies": _add("model.layers.0.self_attn.rotary_emb.inv_freq", (4,)),
}
REFUSED_EXTRAS = {
    "lm_head.bias": (_add("lm_head.bias", (VOCAB,)), "lm_head.bias"),
    "bias of outputs": (
        _add("model.layers.1.self_attn.o_proj.bias", (WIDTH,)),
        "o_proj.bias",
    ),
    "scales": (_add("model.layers.1.self_attn.q_proj.weight_scale", (1,)), "quantized"),
    "norm twice": (_add("norm.weight", (WIDTH,)), "norm.weight"),
    "adapter's matrix": (
        _add("model.layers.0.self_attn.q_proj.lora_A.default.weight", (4, WIDTH)),
        "lora_A",
    ),
    "one missing": (
        lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
        "up_proj",
    ),
    "one transposed": (
        lambda tensors: tensors.update(
            {
                "model.layers.1.mlp.up_proj.weight": np.ascontiguousarray(
                    tensors["model.layers.1.mlp.up_proj.weight"].T
                )
            }
        ),
        "up_proj",
    ),
    "whole numbers": (
        lambda tensors: tensors.update({"model.norm.weight": np.ones(WIDTH, np.int8)}),
        "I8",
    ),
}
REFUSED_FILES = {"bin": "save_pretrained", "adapter": "merge", "one shard gone": "00002"}


@dataclasses.dataclass(frozen=True)
class Form:
    """The peculiarities of one checkpoint, each a key of its table above."""

    seed: int
    family: str = "qwen2"
    tying: str = "one"
    files: str = "single"
    dtype: str = "float32"
    prefix: str = "full"
    config: str = "plain"
    extra: str = "none"

    @property
    def complaint(self) -> str | None:
        """A word of the message with which this form is refused; None: it is read."""
        if self.config in REFUSED_CONFIGS:
            return REFUSED_CONFIGS[self.config][2]
        if self.files in REFUSED_FILES:
            return REFUSED_FILES[self.files]
        if self.extra in REFUSED_EXTRAS:
            return REFUSED_EXTRAS[self.extra][1]
        return "tie_word_embeddings to true" if self.tying == "untied, one" else None


def draw_form(seed: int) -> Form:
    """A random form, about a quarter of which are refused."""
    rng = np.random.default_rng(seed)
    pick = lambda table: str(rng.choice(list(table)))
    family = pick(FAMILIES)
    of_family = lambda table: [name for name, entry in table.items() if family in entry[0]]
    form = Form(
        seed,
        family,
        pick(TYINGS[:-1]),
        pick(FILES),
        pick([*DTYPES, "mixed"]),
        pick(PREFIXES),
        pick(of_family(CONFIGS)),
        pick(EXTRAS),
    )
    fault = rng.integers(20)
    if fault == 0:
        return dataclasses.replace(form, tying=TYINGS[-1])
    if fault == 1:
        return dataclasses.replace(form, files=pick(REFUSED_FILES))
    if fault == 2:
        return dataclasses.replace(form, extra=pick(REFUSED_EXTRAS), prefix="full")
    if fault in (3, 4):
        return dataclasses.replace(form, config=pick(of_family(REFUSED_CONFIGS)))
    return form


def make_config(form: Form) -> dict:
    """config.json's content."""
    entry = (CONFIGS | REFUSED_CONFIGS)[form.config]
    config = {
        "architectures": [f"{form.family.capitalize()}ForCausalLM"],
        "model_type": form.family,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "tie_word_embeddings": not form.tying.startswith("untied"),
    } | entry[1]
    return {key: value for key, value in config.items() if value is not ...}


def make_tensors(form: Form, config: dict) -> dict[str, np.ndarray]:
    """The model's tensors under their full names, float32."""
    rng = np.random.default_rng(form.seed)
    head_dim = config.get("head_dim", WIDTH // HEADS)
    queries = HEADS * head_dim
    kv_heads = HEADS if config["num_key_value_heads"] is None else KV_HEADS
    keys = kv_heads * head_dim
    matrix = lambda rows, columns: rng.normal(0, 1.5 * columns**-0.5, (rows, columns))
    vector = lambda size, mean: mean + 0.3 * rng.normal(size=size)
    tensors = {TABLE: matrix(VOCAB, WIDTH), "model.norm.weight": vector(WIDTH, 1)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors |= {
            f"{at}input_layernorm.weight": vector(WIDTH, 1),
            f"{at}post_attention_layernorm.weight": vector(WIDTH, 1),
            f"{at}mlp.gate_proj.weight": matrix(FFN, WIDTH),
            f"{at}mlp.up_proj.weight": matrix(FFN, WIDTH),
            f"{at}mlp.down_proj.weight": matrix(WIDTH, FFN),
            f"{at}self_attn.o_proj.weight": matrix(WIDTH, queries),
        }
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, WIDTH)
            if form.family == "qwen2":
                tensors[f"{at}self_attn.{name}_proj.bias"] = vector(rows, 0)
        if form.family == "qwen3":
            tensors |= {f"{at}self_attn.{name}_norm.weight": vector(head_dim, 1) for name in "qk"}
    if form.tying == "one, as the head":
        tensors[HEAD] = tensors.pop(TABLE)
    elif form.tying == "two equal":
        tensors[HEAD] = tensors[TABLE].copy()
    elif form.tying in ("two different", "untied"):
        # As different as two roundings of one table may be.
        tensors[HEAD] = tensors[TABLE] * (1 + 0.03 * rng.normal(size=(VOCAB, WIDTH)))
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def _round(form: Form, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors in the form's type, or each in one of all types."""
    rng = np.random.default_rng(form.seed)
    kinds = list(DTYPES) if form.dtype == "mixed" else [form.dtype]
    return {
        name: array if array.dtype != np.float32 else array.astype(DTYPES[str(rng.choice(kinds))])
        for name, array in tensors.items()
    }


def _rename(form: Form, name: str) -> str:
    if form.prefix == "twice":
        return f"model.{name}" if name.startswith(("model.", "lm_head.")) else name
    if form.prefix == "none" or form.prefix != "full" and name.startswith("model.layers.1."):
        return name.removeprefix("model.")
    return name


def write_form(form: Form, folder: pathlib.Path) -> None:
    """Writes the checkpoint."""
    folder.mkdir(parents=True)
    config = make_config(form)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = make_tensors(form, config)
    if form.extra in REFUSED_EXTRAS:
        REFUSED_EXTRAS[form.extra][0](tensors)
    else:
        EXTRAS[form.extra](tensors)
    tensors = {_rename(form, name): array for name, array in _round(form, tensors).items()}
    save = lambda arrays, file: safetensors.numpy.save_file(arrays, folder / file)
    other_tensors = {name: array * 2 for name, array in tensors.items()}
    if form.files in ("single", "stale index", "adapter"):
        save(tensors, SINGLE)
    if form.files == "stale index":  # left from a model before this one
        save(other_tensors, "model-00001-of-00001.safetensors")
        index = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if form.files in ("shards", "stale shard", "one shard gone"):
        names = list(tensors)
        parts = [names[::2], names[1::2]]
        files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for part, file in zip(parts, files):
            save({name: tensors[name] for name in part}, file)
        index = {name: file for part, file in zip(parts, files) for name in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if form.files == "stale shard":  # of another number of shards; the index does not name it
        save(other_tensors, "model-00001-of-00003.safetensors")
    if form.files == "one shard gone":
        (folder / files[1]).unlink()
    if form.files == "adapter":
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if form.files == "bin":
        import torch

        state = {name: torch.tensor(array.astype(np.float32)) for name, array in tensors.items()}
        torch.save(state, folder / "pytorch_model.bin")
