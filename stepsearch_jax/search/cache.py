"""Folders that are computed from a corpus once and reused.

They are written whole or not at all, and made again when what they were made from has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

from stepsearch_jax.files import name_beside, naming_failures, remove_leftovers, write_json
from stepsearch_jax.records import Document

MANIFEST = "manifest.json"


def hash_texts(texts: Iterable[str]) -> str:
    """A hash of texts and their order; where one text ends and the next begins counts."""
    digest = hashlib.sha256()
    for text in texts:
        add_text(digest, text)
    return digest.hexdigest()


def add_text(digest, text: str) -> None:
    """Adds one text to a digest of hashlib; after all texts it is that of `hash_texts`."""
    raw = text.encode("utf-8", errors="surrogatepass")
    digest.update(len(raw).to_bytes(8, "little"))
    digest.update(raw)


def hash_documents(documents: Iterable[Document]) -> str:
    """The hash that identifies a corpus, wherever it lies: of titles and texts, in their order."""
    return hash_texts(f"{document.title}\n{document.text}" for document in documents)


def describe_search(corpus: str, documents: int, retriever: str, k: int, settings: dict) -> dict:
    """The manifest that every result of a search carries: what was searched (hash and number of its
    documents), by which retriever, for how many documents k, and with which settings."""
    return {
        "corpus": corpus,
        "documents": documents,
        "retriever": retriever,
        "k": k,
        "settings": settings,
    }


def read_manifest(folder: pathlib.Path) -> dict | None:
    """What the folder was made from, or None if it is not there or not complete."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def write_manifest(folder: pathlib.Path, manifest: dict, name: str = MANIFEST) -> None:
    """Writes what the folder was made from, whole or not at all."""
    write_json(folder / name, manifest)


def link_file(file: pathlib.Path, place: pathlib.Path) -> None:
    """Puts a file into a second place; the first keeps it. Copies it if it cannot be linked."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def prepare_folder(
    folder: pathlib.Path,
    manifest: dict,
    write: Callable[[pathlib.Path], None],
    aside: pathlib.Path | None = None,
) -> bool:
    """Makes `folder` with `write`, unless it is there and its manifest says the same. Returns
    whether it was made.

    `write` gets an empty folder, which is renamed to the final one when it is complete. It lies
    beside the final one, and several processes may prepare the same folder at once: the last one to
    finish wins, and all have written the same. Or it lies in `aside`, a folder on the same disk in
    which one process at a time works; what a kill leaves there goes when `aside` is removed.
    """
    if read_manifest(folder) == manifest:
        return False
    made, old = (aside / kind if aside else name_beside(folder, kind) for kind in ("made", "old"))
    remove_leftovers(folder)
    for leftover in (made, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with naming_failures(folder):
            made.mkdir(parents=True)
            write(made)
            write_manifest(made, manifest)
        while True:
            try:
                os.rename(made, folder)
                return True
            except OSError:  # a non-empty folder stands there: stale, or another process was faster
                if read_manifest(folder) == manifest:
                    return True
                if not folder.is_dir():
                    raise
                with contextlib.suppress(FileNotFoundError):  # another process has just moved it
                    os.rename(folder, old)
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def one_at_a_time(folder: pathlib.Path) -> Iterator[None]:
    """Of the processes that share `folder`, one at a time runs the body: the first makes what is
    missing, the others find it.

    Hosts with disks of their own do not wait for each other, and a process that ends gives way. On
    a file system without locks nobody waits: the work may be done several times, with the same
    result.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / ".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_cache(cache_dir: str) -> contextlib.AbstractContextManager:
    """Of the processes that share config.data.cache_dir, one at a time runs the body. Raises
    ValueError if it is no folder and cannot become one."""
    if not cache_dir:
        raise ValueError("config.data.cache_dir is empty: name a folder for prepared data")
    folder = pathlib.Path(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"config.data.cache_dir={folder} cannot be made a folder ({error.strerror}): "
            "name another one"
        ) from error
    return one_at_a_time(folder)


def locate_corpus(cache_dir: str, corpus: str) -> pathlib.Path:
    """The folder in config.data.cache_dir for what is made of a corpus, known by its hash."""
    return pathlib.Path(cache_dir) / f"corpus-{corpus}"
