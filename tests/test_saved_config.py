"""The config that a run wrote, read again by the commands that look at the run."""

import json

import pytest

from stepsearch_jax import cli
from stepsearch_jax.addresses import hide_login, hide_logins
from stepsearch_jax.run.config_file import find_configs, load_config
from stepsearch_jax.run.folder import (
    check_resumable,
    to_json,
    write_beginning,
    write_config,
)

CONFIGS = sorted(path.stem for path in find_configs().glob("[!_]*.py"))


def write(folder, config, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_json(config) | changes))
    return folder / "config.json"


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_config_that_was_written(name, tmp_path):
    config = load_config(name)
    again = load_config(str(write(tmp_path / "run", config)))
    assert again.to_dict() == config.to_dict()  # tuples are tuples again


def parse(*arguments):
    return cli.parse_flags(cli.make_parser("evaluate", "text", "run"), arguments)


def test_a_command_takes_the_config_of_its_run(tmp_path):
    config = load_config("atlas_quickstart")
    config.rl.gamma = 0.25
    write(tmp_path / "run", config)
    flags = (f"--workdir={tmp_path / 'run'}", "--config.seed=7")
    found = parse(*flags).config
    assert (found.rl.gamma, found.seed) == (0.25, 7)
    assert parse(*flags, "--config=atlas_quickstart").config.rl.gamma != 0.25
    with pytest.raises(SystemExit, match="config.sede=7"):
        parse(flags[0], "--config.sede=7")


def test_without_a_run_the_flag_is_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(f"--workdir={tmp_path}")
    assert f"no {tmp_path}/config.json: give --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"sede": 1}', '{"rl": 3}', '{"seed": "one"}', '{"rl": {"gama": 1.0}}']
)
def test_another_file_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit, match=r"config\.json is no config of this version"):
        parse(f"--workdir={tmp_path}")


def test_a_bucket_that_cannot_be_read_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse("--workdir=gs://b/run")
    assert "pip install gcsfs" in capsys.readouterr().err


SECRET = "http://anna:z%40bra@search:8000/v1"


def test_a_password_is_not_saved(tmp_path):
    """Nor the user: the address stays. The run resumes with the whole address, or a new one."""
    config = load_config("atlas_quickstart")
    config.search.url = SECRET
    write_config(tmp_path, config)
    write_beginning(tmp_path, check_resumable(tmp_path, config, {"train": "x"}))
    (tmp_path / "start").mkdir()
    check_resumable(tmp_path, config, {"train": "x"})
    saved = "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert '"http://search:8000/v1"' in saved and "anna" not in saved and "bra" not in saved
    assert load_config(str(tmp_path / "config.json")).search.url == "http://search:8000/v1"
    assert config.search.url == SECRET  # the run itself uses it


@pytest.mark.parametrize(
    "flag",
    [
        f"--config.search.ulr={SECRET}",
        f"--config.search={SECRET}",
        f"--config.seed={SECRET}",
        SECRET,
    ],
)
def test_a_password_is_not_in_errors_about_flags(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        parse("--config=atlas_quickstart", f"--workdir={tmp_path}", flag)
    text = f"{raised.value} {capsys.readouterr().err}"
    assert "bra" not in text and "anna" not in text and "search:8000" in text


def test_addresses_without_a_login_stay():
    for text in ("http://host/a@b", "gs://bucket/run@2", "no address: a@b", "http://[::1]:80"):
        assert hide_login(text) == text
    nested = {"a": ["x http://u:p@h/, https://u@k", 1], "b": (None, True)}
    assert hide_logins(nested) == {"a": ["x http://h/, https://k", 1], "b": [None, True]}
