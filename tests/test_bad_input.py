"""Errors in config, files and flags are reported in one clear line, before anything is compiled."""

import importlib
import json
import pathlib
import re

import jax
import pytest
import running
import tiny_config

from stepsearch_jax.prompting.tokenizers import NEEDED_BYTES
from stepsearch_jax.run.checks import CHOICES
from stepsearch_jax.run.system import build_system

COMPILED = "/jax/core/compile/backend_compile_duration"
PARAGRAPH = {"idx": 0, "title": "Ann", "paragraph_text": "Ann is from Rome."}
LISTS = ("metrics.loggers",)  # keys that hold several words
ROW = {
    "id": "2hop__1_2",
    "question": "Where is Ann from?",
    "answer": "Rome",
    "answer_aliases": [],
    "answerable": True,
    "paragraphs": [PARAGRAPH],
    "question_decomposition": [
        {"id": 1, "question": "Where is Ann from?", "answer": "Rome", "paragraph_support_idx": 0}
    ],
}


@pytest.fixture
def compilations():
    """Fills with one entry for each program that is compiled."""
    importlib.import_module("bm25s")  # compiles something of its own when it is imported
    found = []

    def listen(event, duration, **_):
        if event == COMPILED:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_compilations_are_noticed(compilations):
    jax.jit(lambda x: x * 3 + 1)(2.0)
    assert compilations


def write_lines(path: pathlib.Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )


def write_musique(
    folder: pathlib.Path, train: list, corpus: list | None = None
) -> dict[str, object]:
    """Files of MuSiQue -> the keys that name them."""
    write_lines(folder / "train.jsonl", train)
    write_lines(folder / "validation.jsonl", [ROW])
    if corpus is not None:
        write_lines(folder / "corpus.jsonl", corpus)
    return {"data.kind": "musique", "data.path": str(folder)}


def write_tokenizer(folder: pathlib.Path, without: int | None) -> dict[str, object]:
    """A byte-level tokenizer of single bytes, one of them missing -> the key that names it."""
    alphabet = {
        byte: chr(byte) if 0x21 <= byte < 0x7F else chr(256 + n)
        for n, byte in enumerate([*range(0x21), *range(0x21, 0x7F)])
    }
    vocabulary = {alphabet[byte]: n for n, byte in enumerate(NEEDED_BYTES) if byte != without} | {
        "<|endoftext|>": 200
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    end = {
        "id": 200,
        "content": "<|endoftext|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [end],
                "normalizer": None,
                "pre_tokenizer": byte_level,
                "post_processor": None,
                "decoder": byte_level,
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": None,
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "vocab": vocabulary,
                    "merges": [],
                },
            }
        )
    )
    return {"prompt.tokenizer": str(folder)}


# What is wrong: name -> (the keys to set, from a folder for files; what the message must say).
CASES = {
    "malformed row": (
        lambda f: write_musique(f, [ROW, {**ROW, "answer": 7}]),
        r"train\.jsonl, line 2: .*'answer'",
    ),
    "not JSON": (
        lambda f: write_musique(f, [ROW, ROW, '{"id": ']),
        r"train\.jsonl, line 3: ",
    ),
    "empty corpus": (lambda f: write_musique(f, [ROW], []), r"corpus\.jsonl.* empty"),
    "missing path": (
        lambda f: {"data.kind": "musique", "data.path": str(f / "nothing")},
        "nothing.*data.path",
    ),
    "no path": (
        lambda f: {"data.kind": "musique", "data.path": ""},
        "data.path is empty",
    ),
    "empty cache": (lambda f: {"data.cache_dir": ""}, "config.data.cache_dir is empty"),
    "a file for a cache": (
        lambda f: write_lines(f / "file", []) or {"data.cache_dir": str(f / "file")},
        "cache_dir=.*file",
    ),
    "missing byte": (
        lambda f: write_tokenizer(f / "bytes", without=ord("<")),
        r"tokenizer\.json: .* 0x3c ",
    ),
    "missing tokenizer": (
        lambda f: {"prompt.tokenizer": str(f / "nothing")},
        "tokenizer .*nothing",
    ),
    "long prompt": (
        lambda f: {"prompt.max_prompt_tokens": 12},
        r"question train-\d+ .*config.prompt.max_prompt_tokens=12",
    ),
    "mesh and devices": (
        lambda f: {"mesh.data": 3},
        "mesh .*3 x 1 x 2 .*8 devices",
    ),
    "kv heads": (
        lambda f: {"mesh.data": 2, "mesh.tensor": 4},
        "2 x 1 x 4 .*num_kv_heads=2.*config.mesh",
    ),
    "slices": (
        lambda f: {"mesh.slices": 2},
        "config.mesh.slices is 2",
    ),
    "no such mesh axis": (
        lambda f: {"mesh.train_rules.ffn": "model"},
        "config.mesh.train_rules.ffn is 'model'.* data or fsdp or tensor or None",
    ),
    "uneven cut": (
        lambda f: {"mesh.data": 1, "mesh.fsdp": 4, "model.embed_dim": 30},
        "mesh.fsdp=4 .*embed axis of 30",
    ),
    "mesh and batch": (
        lambda f: {"rollout.prompts": 10},
        r"10 episodes .*rollout.prompts.* 4 mesh shards",
    ),
    "micro-batch": (lambda f: {"rl.microbatch_size": 3}, "rl.microbatch_size=3 "),
    "slots and mesh": (
        lambda f: {"rollout.slots": 6},
        r"rollout.slots=6 .* 4 mesh shards",
    ),
    "too many slots": (
        lambda f: {"rollout.slots": 400},
        "rollout.slots=400 .*[0-9]+ episodes",
    ),
    "fine-tuning rows": (
        lambda f: {"sft.phases": ((10, 6, False, 0.0, 0.02),)},
        "6 rows .*sft.phases.* 4 mesh shards",
    ),
    "short context": (lambda f: {"rollout.context": 100}, "rollout.context=100 "),
    "small observation": (
        lambda f: {"search.max_observation_tokens": 5},
        "max_observation_tokens=5",
    ),
    "endless saturation": (
        lambda f: {"search.bm25_k1": float("inf")},
        "k1 is inf",
    ),
    "unknown split": (
        lambda f: {"evaluation.split": "exam"},
        "'exam'.* train, validation, test",
    ),
    "unknown training split": (
        lambda f: {"data.train_split": "exam"},
        "data.train_split is 'exam'",
    ),
    "unknown template": (
        lambda f: {"prompt.template": "long"},
        "template 'long'",
    ),
    "too few entities": (
        lambda f: {"data.atlas.entities": 10},
        "60 entities, not 10",
    ),
    **{
        key: (
            lambda f, key=key: {key: ("no such word",) if key in LISTS else "no such word"},
            f"config.{re.escape(key)} is 'no such word'",
        )
        for key in CHOICES
    },
}


def test_single_bytes_make_a_tokenizer(tmp_path):
    """What the missing byte is missing from is a tokenizer otherwise."""
    from stepsearch_jax.prompting.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(
        write_tokenizer(tmp_path / "bytes", without=None)["prompt.tokenizer"], []
    )
    assert (
        tokenizer.decode(tokenizer.encode("<search> a b </search>\n")) == "<search> a b </search>\n"
    )


@pytest.mark.parametrize("name", CASES)
def test_refused_before_any_compilation(name, tmp_path, tmp_path_factory, compilations):
    make, message = CASES[name]
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    config.update_from_flattened_dict(make(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build_system(
            config, list(dict.fromkeys([config.data.train_split, config.evaluation.split]))
        )
    assert "\n" not in str(caught.value) and not compilations


# Flags: arguments after the config and workdir, what the last line must say. {}: a folder for
# files.
COMMANDS = {
    "unknown key": (
        ["--config.rollout.qestions=8"],
        r"^stepsearch_jax: --config\.rollout\.qestions=8: the config has no such key",
    ),
    "key below a number": (
        ["--config.iterations.first=8"],
        r"^stepsearch_jax: --config\.iterations\.first=8: the config has no such key",
    ),
    "not a number": (["--config.iterations=many"], "--config.iterations=many"),
    "malformed row": (
        ["--config.data.kind=musique", "--config.data.path={}"],
        r"^stepsearch_jax: .*train\.jsonl, line 2: field 'answer'",
    ),
    "missing byte": (
        ["--config.prompt.tokenizer={}/bytes"],
        "^stepsearch_jax: .*tokenizer.* 0x3c",
    ),
    "mesh": (
        ["--config.mesh.data=3"],
        "^stepsearch_jax: mesh .*3 x 1 x 1 .*1 devices",
    ),
    "unknown variant": (
        ["--config=configs/atlas_quickstart.py:foo"],
        "^stepsearch_jax: flag --config=.*: configs/atlas_quickstart.py:foo is not known",
    ),
    "no config": (["--config="], "^stepsearch_jax: flag --config=: there is no file"),
    "stray word": (
        ["config.seed=1"],
        "^stepsearch_jax: unexpected argument config.seed=1; write --config.key=value",
    ),
    "empty workdir": (["--workdir="], "^stepsearch_jax: argument --workdir: it names no folder"),
    "a file for a workdir": (
        ["--workdir={}/train.jsonl"],
        r"^stepsearch_jax: --workdir=.*: nothing can be written to .*train\.jsonl \(Not a "
        r"directory\)",
    ),
    "no coordinator": (
        ["--config.distributed.processes=2"],
        "^stepsearch_jax: config.distributed.processes=2 ",
    ),
    "missing config": (["--config=configs/nothing.py"], r"^stepsearch_jax: .*configs/nothing\.py"),
}

# Each starts a process, which takes seconds: one always runs, one of each kind in CI, all at night.
RUNS = {"unknown key": ()} | dict.fromkeys(
    ("malformed row", "missing byte", "a file for a workdir", "no coordinator"), pytest.mark.slow
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=RUNS.get(name, pytest.mark.nightly)) for name in COMMANDS],
)
def test_command_refuses_with_one_line(name, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    write_musique(tmp_path, [ROW, {**ROW, "answer": 7}])
    write_tokenizer(tmp_path / "bytes", without=ord("<"))
    options, message = COMMANDS[name]
    workdir = tmp_path / "run"
    process = running.start_command(
        "train",
        running.shared_cache(tmp_path_factory),
        workdir,
        *(option.format(tmp_path) for option in options),
    )
    check_refusal(process, workdir.with_suffix(".log"), message)
    assert not (workdir / "start").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["config", "workdir"])
def test_missing_flag(flag, tmp_path):
    given = {"config": f"tests/tiny_config.py:{tmp_path}", "workdir": tmp_path / "run"}
    process = running.start(
        [
            "-m",
            "stepsearch_jax.train",
            *(f"--{name}={value}" for name, value in given.items() if name != flag),
        ],
        log=tmp_path / "log",
    )
    check_refusal(
        process,
        tmp_path / "log",
        f"^stepsearch_jax: the following arguments are required: --{flag}",
    )


def check_refusal(process, log: pathlib.Path, message: str) -> None:
    code, output = process.wait(timeout=300), log.read_text()
    assert (
        code not in (0, None) and "Traceback" not in output and "XLA compilation" not in output
    ), output
    assert any(re.search(message, line) for line in output.splitlines()), output
    assert sum(line.startswith("stepsearch_jax: ") for line in output.splitlines()) <= 1
