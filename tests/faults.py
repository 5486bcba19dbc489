"""Injects faults of running into real training processes, and counts what does not survive.

    python tests/faults.py            all kinds, some twenty minutes on two cores
    python tests/faults.py kills …    those kinds; --short: few faults of each, in a minute or two

Each kind is one run that meets one fault after another and is started again with the same command.
A fault counts as a hang if the process does not end, as silent if it ends without a line that says
why, and as lost if the finished run differs, in any number, from one that met no fault. Prints a
line for each kind and exits 1 unless all three are 0. Full disks need the right to mount tmpfs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.server
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1])]

import numpy as np
import running
import tiny_config

from stepsearch_jax.run.corpus import open_corpus
from stepsearch_jax.search.remote import render_contents

LIMIT_S = 120.0  # a process that has not ended so long after its fault hangs
ITERATIONS, EVERY = 24, 2
SHORT = 12  # iterations of the short form
ENDS_IN = 300.0  # seconds, for a run without a fault
OF_PROCESS = ("seconds/", "speed/", "compiled_programs")  # metrics that a restart changes


@dataclasses.dataclass
class Counts:
    """faults injected, and those that did not survive."""

    faults: int = 0
    hangs: int = 0
    silent: int = 0
    lost: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)


class Bench:
    """A folder with prepared data, a policy to start from, and the run without faults."""

    def __init__(self, folder: pathlib.Path, iterations: int):
        self.folder, self.iterations, self.random = folder, iterations, random.Random(0)
        self.getbasetemp = lambda: folder  # as pytest's tmp_path_factory
        self.cache = running.shared_cache(self)
        self.policy = running.searching_start(self)
        self.whole = folder / "whole"
        begin = time.monotonic()
        process = self.start(self.whole)
        while not (self.whole / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.1)
        self.loading = time.monotonic() - begin  # until the first iteration ends
        assert process.wait(ENDS_IN) == 0, self.read_log(self.whole)

    def start(self, workdir: pathlib.Path, *options: str, cache=None) -> subprocess.Popen:
        """Starts or resumes the run in `workdir`; its output is in the file beside it."""
        workdir.parent.mkdir(exist_ok=True)
        return running.start(
            [
                *("-m", "stepsearch_jax.train", f"--workdir={workdir}"),
                f"--config=tests/tiny_config.py:{cache or self.cache}",
                f"--config.sft.checkpoint={self.policy}",
                f"--config.iterations={self.iterations}",
                f"--config.checkpoint.every={EVERY}",
                *options,
            ],
            log=self.log_of(workdir),
        )

    def log_of(self, workdir: pathlib.Path) -> pathlib.Path:
        """Outside of the folder, whose disk may be full."""
        place = self.folder / "logs"
        place.mkdir(exist_ok=True)
        return place / f"{workdir.parent.name}-{workdir.name}.log"

    def read_log(self, workdir: pathlib.Path) -> str:
        return self.log_of(workdir).read_text(errors="replace")

    def end(self, process: subprocess.Popen, counts: Counts, workdir, statuses, says="") -> None:
        """Waits for the end of a process that met a fault, and judges it.

        statuses: of an orderly end. says: what its last line must have.
        """
        counts.faults += 1
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            counts.hangs += 1
            counts.notes.append(f"hung: {self.read_log(workdir)[-500:]}")
            process.kill()
            process.wait()
            return
        text = self.read_log(workdir)
        lines = [line for line in text.splitlines() if line.startswith("stepsearch_jax: ")]
        if status not in statuses or "Traceback" in text or not lines or says not in lines[-1]:
            counts.silent += 1
            counts.notes.append(f"status {status}: {text[-800:]}")

    def finish(self, counts: Counts, workdir: pathlib.Path, *options: str, **more) -> None:
        """Lets the run end, and compares it with the one without faults."""
        process = self.start(workdir, *options, **more)
        if process.wait(ENDS_IN) != 0:
            counts.lost += 1
            counts.notes.append(f"does not resume: {self.read_log(workdir)[-800:]}")
        elif difference := self.compare(workdir):
            counts.lost += 1
            counts.notes.append(difference)

    def compare(self, workdir: pathlib.Path) -> str:
        """What of a finished run differs from the one without faults; "" if nothing."""
        expected, got = (running.final_state(run, self.iterations) for run in (self.whole, workdir))
        if other := [name for name in expected if not np.array_equal(expected[name], got[name])]:
            return f"the state differs in {other[:3]}"
        rows, other = read_rows(self.whole), read_rows(workdir)
        if len(rows) != len(other):
            return f"metrics.jsonl has {len(other)} rows instead of {len(rows)}"
        for row, got in zip(rows, other):
            if names := [name for name in row | got if row.get(name) != got.get(name)]:
                return f"metrics of iteration {row['iteration']} differ: {names[:4]}"
        evaluations = [
            json.loads((run / "evaluation.json").read_text()) for run in (self.whole, workdir)
        ]
        for evaluation in evaluations:
            evaluation.pop("retrieval")  # names the engine, which may be a server
        if evaluations[0] != evaluations[1]:
            return "evaluation.json differs"
        transcripts = [(run / "transcripts.jsonl").read_text() for run in (self.whole, workdir)]
        return "" if transcripts[0] == transcripts[1] else "transcripts.jsonl differs"


def read_rows(workdir: pathlib.Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith(OF_PROCESS)}
        for row in rows
    ]


def count_rows(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(reached: Callable[[], bool], process: subprocess.Popen) -> bool:
    """-> whether it was reached before the process ended."""
    end = time.monotonic() + ENDS_IN
    while not reached():
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def more_rows(workdir: pathlib.Path, rows: int) -> Callable[[], bool]:
    before = count_rows(workdir)
    return lambda: count_rows(workdir) >= before + rows


# ---- The kinds of faults. Each: bench, number of faults -> Counts. ------------------------------


def kills(bench: Bench, number: int) -> Counts:
    """SIGKILL at random moments, from the first import to the last report."""
    counts, workdir = Counts(), bench.folder / "kills" / "run"
    for _ in range(number):
        process = bench.start(workdir)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(bench.random.uniform(0.0, bench.loading * 1.6))
        process.kill()
        process.wait()
        counts.faults += 1
    bench.finish(counts, workdir)
    return counts


def interrupts(bench: Bench, number: int) -> Counts:
    """Ctrl-C in the first seconds."""
    counts, workdir = Counts(), bench.folder / "interrupts" / "run"
    for n in range(number):
        process = bench.start(workdir)
        time.sleep(0.3 + bench.loading * n / number)
        process.send_signal(signal.SIGINT)
        bench.end(process, counts, workdir, [130], "interrupted")
    bench.finish(counts, workdir)
    return counts


def endings(bench: Bench, number: int) -> Counts:
    """SIGTERM and SIGHUP within an iteration: it is saved first."""
    counts, workdir = Counts(), bench.folder / "endings" / "run"
    for n in range(number):
        process, reached = bench.start(workdir), more_rows(workdir, 3)
        if wait_for(reached, process):
            which = (signal.SIGTERM, signal.SIGHUP)[n % 2]
            process.send_signal(which)
            bench.end(process, counts, workdir, [128 + which], "is saved")
            if not (workdir / "checkpoints" / str(count_rows(workdir))).is_dir():
                counts.lost += 1
                counts.notes.append("the last iteration was not saved")
        process.wait()
    bench.finish(counts, workdir)
    return counts


def damage(bench: Bench, number: int) -> Counts:
    """The newest checkpoint is cut, emptied, loses a file, or has a bit flipped."""
    counts, workdir = Counts(), bench.folder / "damage" / "run"
    kinds = {
        "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
        "emptied": lambda file: os.truncate(file, 0),
        "removed": lambda file: file.unlink(),
        "flipped": flip_bit,
    }
    for kind, spoil in list(kinds.items())[:number]:
        process, reached = bench.start(workdir), more_rows(workdir, 5)
        if wait_for(reached, process):
            process.send_signal(signal.SIGTERM)
        process.wait()
        numbers = [
            int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
        ]
        newest = workdir / "checkpoints" / str(max(numbers))
        files = [path for path in newest.rglob("d/*") if path.is_file()]
        spoil(max(files, key=lambda path: path.stat().st_size))
        process = bench.start(workdir)
        counts.faults += 1
        wait_for(lambda: "iteration" in bench.read_log(workdir), process)
        if "continuing from checkpoint" not in bench.read_log(workdir):
            counts.silent += 1
            counts.notes.append(f"{kind}: {bench.read_log(workdir)[-500:]}")
        process.kill()
        process.wait()
    bench.finish(counts, workdir)
    return counts


def flip_bit(file: pathlib.Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def divergence(bench: Bench, number: int) -> Counts:
    """A learning rate at which every gradient is soon not finite."""
    counts = Counts()
    for n in range(number):
        workdir = bench.folder / "divergence" / f"run{n}"
        options = "--config.policy.learning_rate=1e30", "--config.rl.max_skipped_in_a_row=4"
        process = bench.start(workdir, *options)
        bench.end(process, counts, workdir, [1], "finite")
    return counts


def disks(bench: Bench, number: int) -> Counts:
    """The disk is full: when data are prepared, after an iteration, at a checkpoint, at the end;
    and one with TensorBoard's files alone."""
    counts = Counts()
    with small_disk(bench.folder / "disk", "64m") as disk:
        if disk is None:
            counts.notes.append("not done: tmpfs cannot be mounted here")
            return counts
        workdir = disk / "run"
        moments = {
            "checkpoint": lambda: (workdir / "checkpoints" / "2").is_dir(),
            "data": lambda: True,
            "iteration": more_rows(workdir, 6),
            "end": lambda: count_rows(workdir) == bench.iterations,
        }
        for name, reached in list(moments.items())[:number]:
            cache = disk / f"cache-{name}" if name == "data" else None
            if name == "data":
                fill(disk)
            process = bench.start(workdir, cache=cache)
            if name == "data" or wait_for(reached, process):
                fill(disk)
                bench.end(process, counts, workdir, [1], "No space left on device")
                if str(disk) not in bench.read_log(workdir).splitlines()[-1]:
                    counts.silent += 1
                    counts.notes.append(f"{name}: no file is named")
            process.wait()
            (disk / "ballast").unlink(missing_ok=True)
        bench.finish(counts, workdir)
    if number > 4:
        workdir = bench.folder / "disks" / "run"
        with small_disk(workdir / "tensorboard", "16k"):
            counts.faults += 1
            bench.finish(counts, workdir)
            if bench.read_log(workdir).count("tensorboard failed") != 1:
                counts.silent += 1
                counts.notes.append(bench.read_log(workdir)[-500:])
    return counts


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str) -> Iterator[pathlib.Path | None]:
    """A disk of so many bytes at `folder`; None if that is not allowed here."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True)
    try:
        yield folder if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: pathlib.Path) -> None:
    with contextlib.suppress(OSError), open(disk / "ballast", "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def servers(bench: Bench, number: int) -> Counts:
    """A search server that goes wrong in one of twelve ways, and comes back."""
    counts, workdir = Counts(), bench.folder / "servers" / "run"
    with flaky_server(bench) as server:
        options = (
            "--config.search.kind=remote",
            f"--config.search.url=http://localhost:{server.server_port}",
            "--config.search.attempt_s=0.5",
            "--config.search.attempts=2",
            "--config.search.backoff_s=0.1",
        )
        for way in list(WAYS)[:number]:
            server.way = None
            process, reached = bench.start(workdir, *options), more_rows(workdir, 1)
            if wait_for(reached, process):
                server.way = way
                bench.end(process, counts, workdir, [1], "search")
            process.kill()
            process.wait()
        server.way = None
        bench.finish(counts, workdir, *options)
    return counts


def _say(handler, status: int, body: bytes, length: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def _drip(handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(600):
        handler.wfile.write(b" ")
        time.sleep(0.1)


WAYS: dict[str, Callable] = {
    "hangs up": lambda handler, good: handler.connection.shutdown(socket.SHUT_RDWR),
    "never answers": lambda handler, good: time.sleep(60),
    "drips": lambda handler, good: _drip(handler),
    "500": lambda handler, good: _say(handler, 500, b"oh"),
    "503": lambda handler, good: _say(handler, 503, b"busy"),
    "404": lambda handler, good: _say(handler, 404, b""),
    "redirects": lambda handler, good: _say(handler, 301, b""),
    "not JSON": lambda handler, good: _say(handler, 200, b"<html>"),
    "another shape": lambda handler, good: _say(handler, 200, b'{"result": [[7]]}'),
    "too few lists": lambda handler, good: _say(handler, 200, b'{"result": []}'),
    "other documents": lambda handler, good: _say(
        handler, 200, good.replace(b'"contents": "', b'"contents": "other ')
    ),
    "cuts short": lambda handler, good: _say(handler, 200, good[:-9], len(good)),
}


@contextlib.contextmanager
def flaky_server(bench: Bench) -> Iterator[http.server.ThreadingHTTPServer]:
    """A search server of the bench's corpus; its attribute `way` says how it goes wrong."""
    config = tiny_config.get_config(str(bench.cache))
    source, index = open_corpus(config)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            _say(self, 200, json.dumps(index.describe(config.search.k)).encode())

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            result = []
            for ids, scores in zip(*index.search(asked["queries"], asked["topk"]), strict=True):
                found = [(int(i), float(score)) for i, score in zip(ids, scores) if i >= 0]
                result.append(
                    [
                        {
                            "document": {
                                "id": str(i),
                                "contents": render_contents(source.documents[i]),
                            },
                            "score": score,
                        }
                        for i, score in found
                    ]
                )
            good = json.dumps({"result": result, "manifest": index.describe(asked["topk"])})
            with contextlib.suppress(OSError):
                go = (
                    WAYS[server.way]
                    if server.way
                    else lambda handler, good: _say(handler, 200, good)
                )
                go(self, good.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    server.daemon_threads, server.way = True, None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()


# Kind -> the number of faults, and that of the short form.
KINDS = {
    kills: (30, 2),
    interrupts: (22, 2),
    endings: (4, 2),
    damage: (4, 1),
    divergence: (1, 1),
    disks: (5, 1),
    servers: (12, 2),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [kind.__name__ for kind in KINDS]
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(names))
    parser.add_argument("--short", action="store_true", help="few faults of each kind")
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: kinds are {', '.join(names)}")
    failed = False
    with tempfile.TemporaryDirectory(prefix="stepsearch-faults-") as folder:
        bench = Bench(pathlib.Path(folder), SHORT if options.short else ITERATIONS)
        print(f"{'kind':12}{'faults':>8}{'hangs':>8}{'silent':>8}{'lost':>8}{'seconds':>9}")
        for kind, numbers in KINDS.items():
            if options.kinds and kind.__name__ not in options.kinds:
                continue
            begin = time.monotonic()
            counts = kind(bench, numbers[options.short])
            seconds = time.monotonic() - begin
            print(
                f"{kind.__name__:12}{counts.faults:8}{counts.hangs:8}{counts.silent:8}"
                f"{counts.lost:8}{seconds:9.0f}",
                flush=True,
            )
            for note in counts.notes:
                print(f"    {note}", flush=True)
            failed |= bool(counts.hangs or counts.silent or counts.lost)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
