"""Stores that are published on the Hugging Face Hub or in a folder of any web server, fetched."""

import os
import shutil
from copy import copy
from http.client import HTTPException, HTTPResponse
from itertools import count
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from data.store.files import StoreError, sole_user, sync_folder, write_atomic
from data.store.format import data_path, decoded, identity_digest, seal_path
from data.store.reader import LogitsStoreReader
from data.store.verify import Shown

HUB = "hf-hub:"  # before user/repository[@revision], a data set there
COPIED_BYTES = 1 << 20  # at once
TIMEOUT = 30  # seconds without a byte


def fetch_store(source: str, target: Path, epochs: int, shown: Shown) -> list[int]:
    """Fetch the first epochs (0: all up to one that is missing) that the target lacks; which these
    were. One that was broken off goes on where it was, and each is checked before it is an epoch.
    """
    base, fetched = _link(source), []
    arriving = target / "arriving"
    with sole_user(target / "fetch.lock", "wait for it or stop it"):
        with _opened(f"{base}/manifest.json") as response:
            manifest = response.read()
        decoded(manifest, f"{base}/manifest.json")  # which says what is wrong with it
        here = target / "manifest.json"
        if here.exists() and LogitsStoreReader(target).identity_sha256 != identity_digest(manifest):
            raise StoreError(f"{target} is another store than {base}: name another folder")
        arriving.mkdir(exist_ok=True)
        keys = target / "keys.txt"
        if not keys.exists():
            _fetch(f"{base}/keys.txt", arriving / "keys.txt", shown)
            os.replace(arriving / "keys.txt", keys)
        if not here.exists():
            write_atomic(here, manifest)
        store = LogitsStoreReader(target)
        try:
            len(store.keys)  # checks them
        except StoreError:
            keys.unlink()
            raise
        checked = copy(store)
        checked.root = arriving
        for epoch in range(epochs) if epochs else count():
            if epoch in store.epochs():
                continue
            try:
                for place in (seal_path, data_path):
                    name = place(Path(), epoch)
                    _fetch(f"{base}/{name}", arriving / name, shown)
            except FileNotFoundError:
                if epochs or not epoch:
                    raise
                break
            try:
                fault = next(filter(None, checked.faults(epoch)), "")
            except StoreError as error:
                fault = str(error)
            if fault:
                for place in (seal_path, data_path):
                    place(arriving, epoch).unlink()
                raise StoreError(f"epoch {epoch} of {base} is not kept, fetch it again: {fault}")
            for place in (data_path, seal_path):  # the seal makes it an epoch
                os.replace(place(arriving, epoch), place(target, epoch))
            sync_folder(target)
            fetched.append(epoch)
        shutil.rmtree(arriving)
    return fetched


def _link(source: str) -> str:
    """What the names of a store's files are appended to."""
    if not source.startswith(HUB):
        return source.rstrip("/")
    repository, _, revision = source.removeprefix(HUB).partition("@")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/datasets/{repository}/resolve/{revision or 'main'}"


def _fetch(url: str, path: Path, shown: Shown) -> None:
    """Fetch a file, or what of it is not there yet."""
    with path.open("ab") as file:
        offset = file.tell()
        try:
            with _opened(url, offset) as response:
                if response.status != 206:  # all of it, also where the rest was asked for
                    file.truncate(offset := 0)
                size = int(response.headers["Content-Length"])
                blocks = iter(lambda: response.read(COPIED_BYTES), b"")
                for block in shown(blocks, -(-size // COPIED_BYTES), path.name):
                    file.write(block)
        except HTTPError as error:
            if error.code != 416:  # nothing is missing
                raise
            return
        file.flush()
        os.fsync(file.fileno())
        if file.tell() != offset + size:
            raise StoreError(f"{url}: the connection has ended early: the same command goes on")


def _opened(url: str, offset: int = 0) -> HTTPResponse:
    """The answer to a request for a file from an offset on."""
    wanted = {"Range": f"bytes={offset}-"} if offset else {}
    try:
        return urlopen(Request(url, headers=wanted), timeout=TIMEOUT)
    except (OSError, ValueError, HTTPException) as error:
        code, reason = getattr(error, "code", 0), getattr(error, "reason", None)
        if code == 416:
            raise
        is_missing = code == 404 or isinstance(reason, FileNotFoundError)  # the latter of file:
        kind = FileNotFoundError if is_missing else OSError
        raise kind(f"{url} can't be fetched ({error})") from None
