"""Models by their name on the Hub: the cache is laid out here, and nothing is downloaded."""

import json
import pathlib
import shutil

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from stepsearch_jax.hub import INDEX, find_model

GOLDEN = pathlib.Path(__file__).parent / "golden/huggingface"
NAME, KEY = "some-org/Small-0.1B", "model.checkpoint"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """-> (files by name) -> the snapshot of a model with them, as the Hub's cache keeps it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def fill(**files):
        model = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
        snapshot = model / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text("a" * 40)
        for name, content in files.items():
            (snapshot / name).write_text(content)
        return snapshot

    return fill


@pytest.fixture
def download(monkeypatch):
    """The Hub answers with this error, or fills the cache."""

    def answer(what):
        real = huggingface_hub.snapshot_download

        def snapshot_download(name, **options):
            if not options.get("local_files_only"):
                if isinstance(what, Exception):
                    raise what
                what()
            return real(name, **options | {"local_files_only": True})

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    return answer


def test_a_folder_comes_first(cache, tmp_path):
    cache(**{"config.json": "{}", "model.safetensors": ""})
    (tmp_path / NAME).mkdir(parents=True)
    assert find_model(NAME, "weights", KEY) == pathlib.Path(NAME)


@pytest.mark.parametrize(
    "name", ["nothing", "./some/thing", "./model", "../model", "a/b/c", "some/model.gguf"]
)
def test_other_names_are_left_to_their_readers(cache, name):
    assert find_model(name, "weights", KEY) == pathlib.Path(name)


@pytest.mark.parametrize("name", ["some-org/model.git", "some-org/two--dashes", "a/b..c"])
def test_a_name_that_the_hub_cannot_have_is_told(cache, name):
    with pytest.raises(FileNotFoundError, match=f"{KEY}={name}.*no such folder"):
        find_model(name, "weights", KEY)


def test_an_address_on_the_hub_is_a_name(cache):
    snapshot = cache(**{"config.json": "{}", "model.safetensors": ""})
    assert find_model(f"https://huggingface.co/{NAME}/", "weights", KEY) == snapshot


def test_the_cache_needs_no_network(cache, monkeypatch):
    snapshot = cache(**{"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"})
    for part in ("weights", "tokenizer"):
        for offline in (True, False):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
            assert find_model(NAME, part, KEY) == snapshot


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": "{}"},
        {"config.json": "{}"},
        {
            "config.json": "{}",
            "one.safetensors": "",
            INDEX: json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}),
        },
    ],
    ids=["nothing", "a tokenizer alone", "no weights", "a shard of two"],
)
def test_what_the_cache_lacks_is_downloaded(cache, download, files):
    if files:
        cache(**files)
    with pytest.raises(FileNotFoundError, match=f"{KEY}={NAME}.*HF_HUB_OFFLINE=1"):
        find_model(NAME, "weights", KEY)
    whole = {"config.json": "{}", "one.safetensors": "", "two.safetensors": ""}
    download(lambda: cache(**whole))
    assert (find_model(NAME, "weights", KEY) / "two.safetensors").is_file()


def test_one_file_makes_an_index_of_others_stale(cache):
    """transformers reads it, too, and not the shards, which need not be there."""
    index = json.dumps({"weight_map": {"a": "one.safetensors"}})
    snapshot = cache(**{"config.json": "{}", "model.safetensors": "", INDEX: index})
    assert find_model(NAME, "weights", KEY) == snapshot


def test_an_adapter_is_left_to_its_reader(cache, download):
    """Which says how it becomes a model; such a repository has no config.json."""
    from stepsearch_jax.models.huggingface import open_checkpoint

    files = {"adapter_config.json": "{}", "adapter_model.safetensors": ""}
    download(lambda: cache(**files))
    with pytest.raises(ValueError, match="merge_and_unload"):
        open_checkpoint(find_model(NAME, "weights", KEY))


def make_error(kind):
    """An error of the Hub's, which would want the response of its HTTP client."""
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    return error


@pytest.mark.parametrize(
    "error,remedy",
    [
        (lambda: make_error(errors.GatedRepoError), "accept it at .*Small-0.1B.*hf auth login"),
        (lambda: make_error(errors.RepositoryNotFoundError), "check the name"),
        (lambda: ConnectionError("no route"), f"no route.*hf download {NAME}"),
    ],
    ids=["gated", "unknown", "no network"],
)
def test_every_refusal_names_its_remedy(cache, download, error, remedy):
    download(error())
    with pytest.raises(FileNotFoundError, match=f"{KEY}={NAME}.*{remedy}"):
        find_model(NAME, "weights", KEY)


def test_a_model_without_such_files_is_told(cache, download):
    download(lambda: cache(**{"config.json": "{}", "pytorch_model.bin": ""}))
    with pytest.raises(FileNotFoundError, match=f"{KEY}={NAME}.*safetensors"):
        find_model(NAME, "weights", KEY)


def test_weights_and_tokenizer_are_read_by_name(cache):
    """As the commands read them: the golden model in the cache."""
    from stepsearch_jax.models.huggingface import open_checkpoint

    snapshot = cache()
    shutil.copytree(GOLDEN / "qwen2", snapshot, dirs_exist_ok=True)
    found = open_checkpoint(find_model(NAME, "weights", KEY))
    assert found.path == snapshot and found.fields["num_layers"] == 2
