"""Checkpoints in every form give the logits of transformers, or are refused with what to do.

`checkpoint_forms.py` writes them. Plain tests compare with the plain form of the same model; where
torch is installed, drawn forms are compared with transformers itself.
"""

import collections
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_forms import (
    CONFIGS,
    EXTRAS,
    FAMILIES,
    FILES,
    LAYERS,
    PREFIXES,
    REFUSED_CONFIGS,
    REFUSED_EXTRAS,
    REFUSED_FILES,
    SINGLE,
    TOKENS,
    TYINGS,
    VOCAB,
    Form,
    draw_form,
    write_form,
)
from pretrained_models import make_like

from stepsearch_jax.models.huggingface import open_checkpoint
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.models.weights import load_policy

make_like = functools.cache(make_like)


def load(folder: pathlib.Path):
    """-> (config, params) of a folder, as a run reads it with model.num_layers=0."""
    weights = open_checkpoint(folder)
    config = weights.model_config(VOCAB, dtype=jnp.float32, remat="none", attention_block=4)
    return config, load_policy(weights, config, make_like(config))


@functools.partial(jax.jit, static_argnums=0)
def compute_logits(config, params, tokens):
    return Policy(config).apply(params, tokens, method=Policy.init_all)


def assert_same_model(one, other) -> None:
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


# ---- Read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("files", FILES)
def test_names_and_files_in_every_form_are_read(prefix, files, tmp_path):
    """Base weights without "model.", shards; model.safetensors counts, not an index left behind."""
    form = Form(0, "qwen2", "untied")
    write_form(form, tmp_path / "plain")
    write_form(dataclasses.replace(form, prefix=prefix, files=files), tmp_path / "form")
    assert_same_model(load(tmp_path / "form"), load(tmp_path / "plain"))


@pytest.mark.parametrize("extra", EXTRAS)
def test_heads_of_other_tasks_are_ignored(extra, tmp_path, caplog):
    write_form(Form(0, "llama"), tmp_path / "plain")
    write_form(Form(0, "llama", extra=extra), tmp_path / "form")
    plain = load(tmp_path / "plain")
    caplog.clear()
    assert_same_model(load(tmp_path / "form"), plain)
    # One line names them; the frequencies are nobody's.
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (extra not in ("none", "frequencies")), told


@pytest.mark.parametrize("tying", TYINGS[:-1])
def test_one_table_or_two_is_what_the_files_hold(tying, tmp_path):
    """Whatever config.json says; tables that differ as little as two roundings are two."""
    write_form(Form(0, "qwen3", tying), tmp_path / "form")
    config, params = load(tmp_path / "form")
    table, head = params["params"]["trunk"]["embedding"], params["params"].get("lm_head")
    if tying in ("two different", "untied"):
        assert not config.tie_embeddings and 0 < np.abs(table - head.T).max() < 1
    else:
        write_form(Form(0, "qwen3"), tmp_path / "plain")
        assert config.tie_embeddings and head is None
        assert_same_model((config, params), load(tmp_path / "plain"))


def test_types_of_stored_numbers(tmp_path):
    """float64 is rounded to float32 as the other types are widened."""
    write_form(Form(0), tmp_path / "plain")
    plain = load(tmp_path / "plain")
    for dtype, unit in (("float64", 0), ("float16", 2**-11), ("bfloat16", 2**-8), ("mixed", 2**-8)):
        write_form(Form(0, dtype=dtype), tmp_path / dtype)
        close = functools.partial(np.testing.assert_allclose, rtol=unit, atol=1e-7)
        jax.tree.map(close, load(tmp_path / dtype)[1], plain[1])


def read_fields(config: str, folder: pathlib.Path) -> dict:
    write_form(Form(0, CONFIGS[config][0][0], config=config), folder / config)
    return open_checkpoint(folder / config).fields


def test_which_of_two_keys_counts(tmp_path):
    """The outcomes in transformers 5.24, read off its logits (`test_drawn_forms`)."""
    read = lambda name: read_fields(name, tmp_path)
    scaling = lambda name: read(name)["rope_scaling"]
    assert scaling("two kinds named").kind == "linear" and read("theta inside")["rope_theta"] == 30
    assert scaling("two types").kind == "yarn"
    assert scaling("context outside").original_context == 16
    assert scaling("yarn of old").original_context == 8
    assert scaling("yarn attention_factor").attention_factor == 1.3
    assert scaling("yarn mscale").attention_factor == pytest.approx(0.9405, abs=1e-4)
    assert scaling("yarn one mscale").attention_factor == pytest.approx(1.1386, abs=1e-4)
    assert read("no epsilon")["norm_eps"] == 1e-6 and read("no theta")["rope_theta"] == 1e4


# ---- Refused -------------------------------------------------------------------------------------


def list_refused() -> list[Form]:
    """Every form that is refused, each alone."""
    forms = [Form(0, table[0][0], config=name) for name, table in REFUSED_CONFIGS.items()]
    forms += [Form(0, extra=name) for name in REFUSED_EXTRAS]
    forms += [Form(0, files=name) for name in REFUSED_FILES if name != "bin"]
    return [*forms, Form(0, tying=TYINGS[-1])]


def name_form(form: Form) -> str:
    plain = dataclasses.asdict(Form(0))
    odd = [value for key, value in dataclasses.asdict(form).items() if value != plain[key]]
    return "; ".join(map(str, odd))


@pytest.mark.parametrize("form", list_refused(), ids=name_form)
def test_what_cannot_be_read_is_refused_by_name(form, tmp_path):
    """Some configs concern part of the layers alone, or part of the files."""
    write_form(form, tmp_path / "form")
    with pytest.raises((ValueError, FileNotFoundError), match="form") as caught:
        load(tmp_path / "form")
    assert form.complaint in str(caught.value)


def test_a_bare_adapter_is_refused_with_its_remedy(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="merge_and_unload"):
        open_checkpoint(tmp_path)


def test_shards_of_two_models_without_an_index_are_refused(tmp_path):
    write_form(Form(0, files="shards"), tmp_path / "form")
    (tmp_path / "form/model.safetensors.index.json").unlink()
    assert load(tmp_path / "form")
    first = tmp_path / "form/model-00001-of-00002.safetensors"
    (tmp_path / "form/model-00001-of-00003.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="00001-of-00003.safetensors both hold"):
        load(tmp_path / "form")


def test_a_config_that_ties_two_tables_is_refused(tmp_path):
    """The run's config may say one table, as its default does, where the files hold two."""
    write_form(Form(0, tying="untied"), tmp_path / "form")
    weights = open_checkpoint(tmp_path / "form")
    config = weights.model_config(VOCAB, dtype=jnp.float32, remat="none", attention_block=4)
    config = dataclasses.replace(config, tie_embeddings=True)
    with pytest.raises(ValueError, match="tie_embeddings is True: set it to False"):
        load_policy(weights, config, make_like(config))


# ---- Against transformers itself -----------------------------------------------------------------


def compute_theirs(folder: pathlib.Path) -> np.ndarray | None:
    """The logits of transformers in float32; None where it fails, or makes up weights."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        if report["missing_keys"]:
            return None
        with torch.no_grad():
            return model.eval()(torch.tensor(TOKENS)).logits.numpy()
    except Exception:  # whatever its libraries raise
        return None


def compare(folder: pathlib.Path) -> tuple[str, str]:
    """-> ("equal", "refused", "alone": read here only, or "different"; the message, if any)."""
    try:
        ours = np.asarray(compute_logits(*load(folder), TOKENS))
    except (ValueError, FileNotFoundError) as error:
        return "refused", str(error)
    theirs = compute_theirs(folder)
    if theirs is None:
        return "alone", ""
    assert np.abs(theirs).max() > 1
    distance = np.abs(ours - theirs).max() / max(1, np.abs(theirs).max() / 30)
    return ("equal" if distance <= 1e-4 else "different"), f"{distance}"


def check_form(form: Form, folder: pathlib.Path) -> str:
    """How a form compares. Raises AssertionError unless it is as its tables say."""
    write_form(form, folder)
    outcome, message = compare(folder)
    expected = "equal" if form.complaint is None else "refused"
    assert outcome == expected, f"{form}: {outcome} {message}"
    assert form.complaint is None or form.complaint in message, f"{form}: {message}"
    return outcome


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the live comparison needs torch")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
def test_drawn_forms(seed, torch, tmp_path):
    check_form(draw_form(seed), tmp_path / "form")


@pytest.mark.nightly
def test_many_drawn_forms(torch, tmp_path):
    """300 of them, none silently different."""
    outcomes = collections.Counter()
    for seed in range(300):
        outcomes[check_form(draw_form(seed), tmp_path / str(seed))] += 1
    print(dict(outcomes))
    assert outcomes["equal"] >= 200 and outcomes["refused"] >= 50


@pytest.mark.nightly
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config(name, torch, tmp_path):
    for family in CONFIGS[name][0]:
        check_form(Form(1, family, config=name), tmp_path / family)


def change_config(folder: pathlib.Path, **changes) -> None:
    """Sets keys of config.json; removes those that are None."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: value for k, value in config.items() if value is not None}))


def remove_tensor(folder: pathlib.Path, name: str) -> None:
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    del tensors[name]
    safetensors.numpy.save_file(tensors, folder / SINGLE)


def convert(folder: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    model.save_pretrained(folder)


# What the messages advise, done to the folder.
REMEDIES = {
    "windows": lambda folder: change_config(folder, use_sliding_window=False),
    "windowed layers": lambda folder: change_config(
        folder, layer_types=None, use_sliding_window=False
    ),
    "a window in llama": lambda folder: change_config(folder, sliding_window=None),
    "dynamic": lambda folder: change_config(folder, rope_scaling=None),
    "unknown scaling key": lambda folder: change_config(
        folder, rope_scaling={"rope_type": "linear", "factor": 2.0}
    ),
    "a layer too few": lambda folder: change_config(folder, num_hidden_layers=LAYERS),
    "tying as a word": lambda folder: change_config(folder, tie_word_embeddings=True),
    TYINGS[-1]: lambda folder: change_config(folder, tie_word_embeddings=True),
    "norm twice": lambda folder: remove_tensor(folder, "norm.weight"),
    "bin": convert,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REMEDIES)
def test_advice_works(name, torch, tmp_path):
    """Done as it says, the checkpoint gives the logits of transformers."""
    forms = {name_form(form).split("; ")[-1]: form for form in list_refused()}
    write_form(forms.get(name, Form(0, files=name)), tmp_path / "form")
    assert compare(tmp_path / "form")[0] == "refused"
    REMEDIES[name](tmp_path / "form")
    assert compare(tmp_path / "form")[0] == "equal"


def test_every_family_is_drawn():
    forms = [draw_form(seed) for seed in range(300)]
    count = lambda key: {getattr(form, key) for form in forms}
    assert count("family") == set(FAMILIES) and count("tying") == set(TYINGS)
    assert count("files") == set(FILES) | set(REFUSED_FILES) and count("prefix") == set(PREFIXES)
    assert count("config") > set(CONFIGS) and count("extra") > set(EXTRAS)
