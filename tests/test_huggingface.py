"""Checkpoints in Hugging Face form: the logits that transformers computes, whole and cached; the
same tensors again when written; refusals that name the fault.

Golden models and logits were recorded by `tests/golden/make_huggingface.py`. Where torch is
installed, fresh models are compared live, there and back.
"""

import dataclasses
import functools
import gc
import json
import pathlib
import shutil
import weakref

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import slow_but_for
from pretrained_models import CASES, EXPORT, GOLDEN, ONE, STORED, configure, load, make_like

from configs import base
from stepsearch_jax.models import huggingface
from stepsearch_jax.models.attention import make_cache
from stepsearch_jax.models.huggingface import export_policy, open_checkpoint
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.models.weights import load_policy
from stepsearch_jax.prompting.tokenizers import list_tokenizer_files, load_tokenizer

EIGHT = (2, 2, 2)  # data, fsdp, tensor


@functools.partial(jax.jit, static_argnums=0)
def whole_logits(config, params, tokens):
    return Policy(config).apply(params, tokens, method=Policy.init_all)


def cached_logits(config, params, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] by the cache: chunks of 1 to 3 tokens a row, then single tokens; 0 behind a
    row's end.
    """
    policy, (B, T) = Policy(config), tokens.shape
    extend = jax.jit(
        lambda chunk, positions, cache: policy.apply(
            params, chunk, positions, cache, None, method=Policy.extend
        )
    )
    unembed = jax.jit(lambda hidden: policy.apply(params, hidden, method=Policy.unembed))
    cache, done, logits = (
        make_cache(config, B, T),
        np.zeros(B, int),
        np.zeros((B, T, config.vocab_size), np.float32),
    )
    beyond = cache.positions
    for width in (3, *[1] * (T - 1)):
        # row b takes up to b + 1 tokens of the chunk
        offered = np.arange(width) < np.arange(1, B + 1)[:, None]
        index = done[:, None] + np.arange(width)
        real = offered & (index < lengths[:, None])
        positions = np.where(real, index, beyond + np.arange(width)).astype(np.int32)
        hidden, cache = extend(
            np.take_along_axis(tokens, np.minimum(index, T - 1), axis=1), positions, cache
        )
        scores = np.asarray(unembed(hidden))
        for row, column in np.argwhere(real):
            logits[row, index[row, column]] = scores[row, column]
        done += real.sum(1)
    assert (done == lengths).all()
    return logits


def assert_logits(config, params, tokens, lengths, expected) -> None:
    """Within 1e-4 of `expected` [B, T, V]: rows in a padded batch, the first row alone, and by the
    cache.
    """
    tokens, mask = (
        tokens.astype(np.int32),
        (np.arange(tokens.shape[1]) < lengths[:, None])[..., None],
    )
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(
        whole_logits(config, params, np.where(mask[..., 0], tokens, 0)) * mask, expected, atol=1e-4
    )
    short = lengths[1]
    np.testing.assert_allclose(
        whole_logits(config, params, tokens[1:2, :short])[0], expected[1, :short], atol=1e-4
    )
    np.testing.assert_allclose(cached_logits(config, params, tokens, lengths), expected, atol=1e-4)


# Always run: grouped heads with a bias, and norms of queries and keys with stretched positions.
some_cases = pytest.mark.parametrize("case", slow_but_for(("qwen2", "qwen3_yarn"), CASES))

# ---- Against recorded logits ---------------------------------------------------------------------


def test_every_family_is_recorded():
    assert {
        "qwen2",
        "qwen2_yarn",
        "qwen3",
        "qwen3_yarn",
        "llama",
        "llama_llama3",
        "llama_linear",
    } == set(CASES)
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 300_000


@some_cases
def test_logits_equal_transformers(case):
    config, params = load(GOLDEN / case)
    golden = safetensors.numpy.load_file(GOLDEN / f"{case}_logits.safetensors")
    assert_logits(config, params, golden["tokens"], golden["lengths"], golden["logits"])


@pytest.mark.parametrize("case", ["qwen2", "qwen3_yarn"])
def test_leaves_arrive_in_their_slices(case):
    """On eight devices: the shardings that were asked for, and the values of one device, bit for
    bit.
    """
    config, alone = load(GOLDEN / case)
    _, params = load(GOLDEN / case, EIGHT)
    abstract_params = make_like(config, EIGHT)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), params, alone)
    assert jax.tree.leaves(
        jax.tree.map(
            lambda x, y: x.sharding == y.sharding and x.dtype == y.dtype, params, abstract_params
        )
    ) == [True] * len(jax.tree.leaves(abstract_params))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_rope_scalings_bite():
    """Without its scaling, or with another kind, a model misses the recorded logits."""
    for case in ("qwen2_yarn", "llama_llama3", "llama_linear"):
        config, params = load(GOLDEN / case)
        golden = safetensors.numpy.load_file(GOLDEN / f"{case}_logits.safetensors")
        other = "yarn" if config.rope_scaling.kind == "llama3" else "llama3"
        for scaling in (
            None,
            dataclasses.replace(
                config.rope_scaling, kind=other, original_context=8, slow=0.1, fast=1.0
            ),
        ):
            got = whole_logits(
                dataclasses.replace(config, rope_scaling=scaling),
                params,
                golden["tokens"].astype(np.int32),
            )
            assert np.abs(got[0] - golden["logits"][0]).max() > 0.01


# ---- What is read and written --------------------------------------------------------------------


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {
        name: array
        for file in folder.glob("model*.safetensors")
        for name, array in safetensors.numpy.load_file(file).items()
    }


@pytest.mark.parametrize(
    "case,mesh_shape",
    [
        ("qwen2", ONE),
        pytest.param("qwen2_yarn", ONE, marks=pytest.mark.slow),
        pytest.param("llama_llama3", ONE, marks=pytest.mark.slow),
        pytest.param("llama_linear", ONE, marks=pytest.mark.slow),
        ("qwen3_yarn", EIGHT),
    ],
    ids=str,
)
def test_export_writes_what_was_read(case, mesh_shape, tmp_path):
    """The same tensors bit for bit, the same architecture, files no larger than asked for; an older
    folder is replaced.
    """
    config, params = load(GOLDEN / case, mesh_shape)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()
    export_policy(
        folder,
        params,
        config,
        dtype=STORED.get(case, "bfloat16"),
        **EXPORT | dict(shard_bytes=10_000),
    )
    got, expected = read_tensors(folder), read_tensors(GOLDEN / case)
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(got[name], expected[name])
    assert open_checkpoint(folder).fields == open_checkpoint(GOLDEN / case).fields
    files = sorted(folder.glob("model-*.safetensors"))
    assert (
        len(files) > 1
        and [path.name for path in tmp_path.iterdir()] == ["model"]
        and not (folder / "old").exists()
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in got.values())
    for file in files:
        arrays = safetensors.numpy.load_file(file)
        assert sum(array.nbytes for array in arrays.values()) <= 10_000
        assert {index["weight_map"][name] for name in arrays} == {file.name}
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0]


def test_export_with_its_tokenizer(tmp_path, shared_data):
    folder = str(shared_data / "tokenizer_qwen2_5")
    files = list_tokenizer_files(folder, load_tokenizer(folder, ()))
    config, params = load(GOLDEN / "qwen2")
    export_policy(
        tmp_path / "model", params, config, dtype="float32", **EXPORT | dict(other_files=files)
    )
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    (tmp_path / "mine").touch()
    modes = {path.stat().st_mode for path in [*(tmp_path / "model").iterdir(), tmp_path / "mine"]}
    assert len(modes) == 1  # as all files of this user: others may read them
    assert not (tmp_path / "model" / "model.safetensors.index.json").exists()
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_an_export_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    config, params = load(GOLDEN / "qwen2")
    export_policy(tmp_path / "model", params, config, dtype="float32", **EXPORT)
    monkeypatch.setattr(huggingface, "list_file_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_policy(tmp_path / "model", params, config, dtype="bfloat16", **EXPORT)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (
        open_checkpoint(tmp_path / "model").tensors["model.norm.weight"].read().dtype == np.float32
    )


@pytest.mark.parametrize("case", slow_but_for(["qwen2"], ["qwen2", "qwen2_yarn"]))  # one table, two
def test_a_larger_vocabulary_is_filled_with_the_mean(case):
    weights = open_checkpoint(GOLDEN / case)
    config = configure(weights, vocab_size=64)
    params = load_policy(weights, config, make_like(config, EIGHT))
    tokens = np.arange(1, 13, dtype=np.int32)[None]
    wide, narrow = whole_logits(config, params, tokens), whole_logits(*load(GOLDEN / case), tokens)
    # Two programs, summed in orders of their own.
    np.testing.assert_allclose(wide[..., :46], narrow, atol=2e-5)
    # Rounded to the file's type.
    np.testing.assert_allclose(
        wide[..., 46:],
        np.broadcast_to(narrow.mean(-1, keepdims=True), wide[..., 46:].shape),
        atol=5e-3,
    )
    assert (wide.argmax(-1) < 46).all()


@pytest.mark.slow
def test_tensors_are_read_one_at_a_time():
    """While a model is read, no tensor is alive together with more than one other, and each is read
    once.
    """
    weights, alive, most, read = open_checkpoint(GOLDEN / "qwen2_yarn"), [], [], []
    gc.collect()
    gc.freeze()  # what other tests have left takes seconds to go through, at each tensor

    def watch(name, tensor):
        def read_watched():
            gc.collect()
            array = tensor.read()
            alive.append(weakref.ref(array))
            most.append(sum(ref() is not None for ref in alive))
            read.append(name)
            return array

        return dataclasses.replace(tensor, read=read_watched)

    watched = dataclasses.replace(
        weights, tensors={name: watch(name, tensor) for name, tensor in weights.tensors.items()}
    )
    config = configure(weights)
    load_policy(watched, config, make_like(config))
    gc.unfreeze()
    assert sorted(read) == sorted(weights.tensors) and max(most) <= 2


# ---- Configs of published models -----------------------------------------------------------------

QWEN_3B = dict(
    model_type="qwen2",
    attention_dropout=0.0,
    bos_token_id=151643,
    eos_token_id=151645,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=11008,
    max_position_embeddings=32768,
    max_window_layers=70,
    num_attention_heads=16,
    num_hidden_layers=36,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=32768,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    use_sliding_window=False,
    vocab_size=151936,
)


def with_config(tmp_path: pathlib.Path, raw: dict) -> pathlib.Path:
    folder = shutil.copytree(GOLDEN / "qwen2", tmp_path / "changed", dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_base_config_is_qwen_3b(tmp_path):
    """As its config.json stood when it was published, in the form of transformers 4."""
    fields, model = open_checkpoint(with_config(tmp_path, QWEN_3B)).fields, base.get_config().model
    assert fields["vocab_size"] == 151936 and fields["rope_scaling"] is None
    assert all(fields[key] == model[key] for key in fields.keys() - {"vocab_size", "rope_scaling"})


def test_older_form_of_rope_scaling(tmp_path):
    old = open_checkpoint(
        with_config(
            tmp_path,
            QWEN_3B
            | {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                }
            },
        )
    ).fields
    scaling = old["rope_scaling"]
    assert (scaling.kind, scaling.factor, scaling.original_context, scaling.slow, scaling.fast) == (
        "yarn",
        4.0,
        32768,
        1.0,
        32.0,
    )
    assert scaling.attention_factor == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    assert old["rope_theta"] == 1e6


@pytest.mark.parametrize(
    "change,complaint",
    [
        (
            {"model_type": "mistral"},
            "config.json: model_type 'mistral' is not supported; supported are qwen2",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "rotary scaling 'longrope' is not supported; supported are default, linear, llama3 "
            "and yarn",
        ),
        ({"rope_scaling": {"type": "linear"}}, "lacks the key 'factor'"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}}, "zero"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_hidden_layers": 36.5}, "num_layers is 36.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        open_checkpoint(with_config(tmp_path, QWEN_3B | change))


def test_a_missing_key_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="lacks the key 'hidden_size'"):
        open_checkpoint(
            with_config(
                tmp_path, {key: value for key, value in QWEN_3B.items() if key != "hidden_size"}
            )
        )
    with pytest.raises(
        FileNotFoundError, match="there is no .*nowhere/config.json: a checkpoint is a folder"
    ):
        open_checkpoint(tmp_path / "nowhere")
    for text in ("{", "[]"):
        (tmp_path / "changed" / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            open_checkpoint(tmp_path / "changed")
    folder = with_config(tmp_path, QWEN_3B)
    (folder / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no \\*.safetensors"):
        open_checkpoint(folder)
    shards = shutil.copytree(GOLDEN / "llama_llama3", tmp_path / "shards")
    (shards / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="model-00002-of-00004.safetensors, which model.safetensors.index.json names",
    ):
        open_checkpoint(shards)
    for text in ("{", "{}", "[]", '{"weight_map": []}'):
        (shards / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="model.safetensors.index.json is no index of tensors"):
            open_checkpoint(shards)


@pytest.mark.parametrize(
    "change,complaint",
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"model.layers.1.mlp.up_proj.weight \[32, 24\] is missing",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.self_attn.k_proj.weight": np.zeros((24, 12), np.float32)}
            ),
            r"layers.0.self_attn.k_proj.weight in model.safetensors .*\[12, 24\] .*\[24, 12\]",
        ),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": np.zeros(24, np.float32)}),
            r"model.layers.2.input_layernorm.weight \[24\] in model.safetensors is unexpected",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": np.zeros((45, 24), np.float32)}),
            r"embed_tokens.weight in model.safetensors should be .*is \[45, 24\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)}),
            r"model.norm.weight is stored as I8; supported are BF16, F16, F32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, complaint):
    folder = shutil.copytree(GOLDEN / "qwen2", tmp_path / "changed")
    tensors = read_tensors(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=complaint):
        load(folder)


def test_many_faults_are_counted(tmp_path):
    folder = shutil.copytree(GOLDEN / "qwen2", tmp_path / "changed")
    safetensors.numpy.save_file(
        {"model.norm.weight": np.zeros(24, np.float32)}, folder / "model.safetensors"
    )
    with pytest.raises(
        ValueError, match="embed_tokens.weight .* is missing; .*; and 17 more"
    ):  # 1 + 2 layers x 12 are missing, 8 are told
        load(folder)


@pytest.mark.parametrize(
    "change,complaint",
    [
        (dict(num_layers=3), "config.model.num_layers is 3, .* 2"),
        (dict(vocab_size=40), "vocabulary has 40 tokens, .* 46"),
        (
            dict(rope_theta=1e4),
            "rope_theta and rope_scaling are 10000.0 and None, .* 100.0 and None",
        ),
        (
            dict(qk_norm=True, qkv_bias=False),
            "qkv_bias is False, .* True; config.model.qk_norm is True, .* False",
        ),
        (dict(tie_embeddings=False), "tie_embeddings is False, .* True"),
    ],
)
def test_another_architecture_is_refused(change, complaint):
    weights = open_checkpoint(GOLDEN / "qwen2")
    config = dataclasses.replace(configure(weights), **change)
    with pytest.raises(ValueError, match=f"qwen2 has another architecture: .*{complaint}"):
        load_policy(weights, config, make_like(config))


def test_export_needs_a_family(tmp_path):
    config, params = load(GOLDEN / "qwen2")
    with pytest.raises(ValueError, match="belongs to no family"):
        export_policy(
            tmp_path / "model",
            params,
            dataclasses.replace(config, qk_norm=True),
            dtype="float32",
            **EXPORT,
        )


# ---- Against transformers itself -----------------------------------------------------------------


@some_cases
def test_there_and_back_live(case, tmp_path):
    """A fresh model of transformers, read here; the model written here, read by transformers."""
    pytest.importorskip("torch", reason="the live comparison needs torch")
    from golden import make_huggingface
    from transformers import AutoModelForCausalLM

    model = make_huggingface.make_model(case, seed=1)
    make_huggingface.save_model(model, case, tmp_path / "theirs")
    tokens, lengths = make_huggingface.draw_tokens(1)
    padded, alone = make_huggingface.compute_logits(model, tokens, lengths)
    np.testing.assert_allclose(padded, alone, atol=1e-4)
    config, params = load(tmp_path / "theirs")
    assert_logits(config, params, tokens, lengths, padded)
    export_policy(tmp_path / "ours", params, config, dtype="float32", **EXPORT)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", local_files_only=True).eval()
    assert type(again) is type(model)
    for back, expected in zip(
        make_huggingface.compute_logits(again, tokens, lengths), (padded, alone)
    ):
        np.testing.assert_allclose(back, expected, atol=1e-5)
