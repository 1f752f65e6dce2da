"""Stores published on a server of the loopback address, fetched as a user does."""

import shutil
from pathlib import Path

import pytest

from data.store import LogitsStoreReader
from tests.support.hub import hub_at
from tests.support.store_samples import write_store
from tools.logits import main

NAME = "hf-hub:someone/answers"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_at(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def published(hub):
    """The folder of a store of two epochs on the hub."""
    root = hub.root / "datasets" / "someone" / "answers"
    write_store(root, epochs=2)
    return root


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "fetched"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_store_comes_back_byte_for_byte(published, target, hub, capsys):
    assert main(["card", str(published)]) == 0
    assert main(["fetch", NAME, str(target)]) == 0
    assert "2 epochs fetched (0-1), sealed now: 0-1" in capsys.readouterr().out
    expected = contents(published)
    card = expected.pop("README.md").decode()
    assert contents(target) == expected and main(["verify", str(target)]) == 0
    for text in ("# What teacher said", "sealed epochs: 0-1", "keys: class 00/", "fetch hf-hub:"):
        assert text in card
    assert str(published) not in card
    asked = len(hub.asked)
    assert main(["fetch", f"{hub.url}/datasets/someone/answers/resolve/main/", str(target)]) == 0
    assert "0 epochs fetched (none)" in capsys.readouterr().out
    names = [path.rpartition("/")[2] for path, _ in hub.asked[asked:]]
    assert names == ["manifest.json", "epoch_0002.json"]


def test_epochs_come_on_request(published, target, capsys):
    assert main(["fetch", NAME, str(target), "--epochs", "1"]) == 0
    assert LogitsStoreReader(target).epochs() == [0]
    assert main(["fetch", NAME, str(target), "--epochs", "3"]) == 2
    assert "epoch_0002.json can't be fetched (HTTP Error 404" in capsys.readouterr().err
    assert LogitsStoreReader(target).epochs() == [0, 1]


def test_what_was_broken_off_goes_on_where_it_was(published, target, hub, capsys):
    size = (published / "epoch_0000.npy").stat().st_size
    target.mkdir()
    shutil.copy(published / "keys.txt", target)  # which is longer than an epoch here
    hub.most = size - 100
    assert main(["fetch", NAME, str(target)]) == 2
    assert "the connection has ended early: the same command goes on" in capsys.readouterr().err
    assert LogitsStoreReader(target).epochs() == []
    assert main(["fetch", NAME, str(target)]) == 2  # the rest of it, but not of the next one
    assert LogitsStoreReader(target).epochs() == [0]
    hub.most = 1 << 40
    assert main(["fetch", NAME, str(target)]) == 0
    asked = [wanted for path, wanted in hub.asked if path.endswith("epoch_0000.npy")]
    assert asked == ["", f"bytes={size - 100}-"]
    assert contents(target) == contents(published)


def test_keys_are_fetched_in_pieces_too(published, target, hub):
    hub.most = 3000
    while main(["fetch", NAME, str(target)]):
        assert len(hub.asked) < 100
    assert contents(target) == contents(published)
    assert any(path.endswith("keys.txt") and wanted for path, wanted in hub.asked)


@pytest.mark.parametrize("name", ["epoch_0001.npy", "epoch_0001.json", "keys.txt"])
def test_wrong_bytes_are_refused(name, published, target, capsys):
    right = (published / name).read_bytes()
    wrong = right.replace(b'"records": 301', b'"records": 302')
    (published / name).write_bytes(wrong)
    if wrong == right:
        flip(published / name)
    assert main(["fetch", NAME, str(target)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    if name == "keys.txt":
        assert "keys.txt: is not the file that the manifest names" in told
        assert not (target / "keys.txt").exists()
    else:
        assert "epoch 1 of " in told and "is not kept, fetch it again" in told
        assert LogitsStoreReader(target).epochs() == [0]
    (published / name).write_bytes(right)
    assert main(["fetch", NAME, str(target)]) == 0
    assert contents(target) == contents(published)


def test_a_server_that_knows_no_ranges_sends_all_again(published, target, hub):
    hub.most = 3000
    assert main(["fetch", NAME, str(target)]) == 2
    hub.most, hub.ranges = 1 << 40, False
    assert main(["fetch", NAME, str(target)]) == 0
    assert contents(target) == contents(published)


def test_another_store_is_not_mixed_in(published, target, capsys):
    assert main(["fetch", NAME, str(target)]) == 0
    before = contents(target)
    shutil.rmtree(published)
    write_store(published, epochs=3, temperature=2.0)
    assert main(["fetch", NAME, str(target)]) == 2
    assert "is another store than http" in capsys.readouterr().err and contents(target) == before


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("hf-hub:nobody/nothing", "datasets/nobody/nothing/resolve/main/manifest.json can't be"),
        ("nonsense", "nonsense/manifest.json can't be fetched (unknown url type"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9/manifest.json can't be fetched"),
    ],
)
def test_a_store_that_is_not_there_is_one_line(source, text, hub, target, capsys):
    assert main(["fetch", source, str(target)]) == 2
    told = capsys.readouterr().err
    assert text in told and told.startswith("error: ") and told.count("\n") == 1


def test_a_manifest_that_is_none_leaves_nothing(published, target, capsys):
    (published / "manifest.json").write_text("{}")
    assert main(["fetch", NAME, str(target)]) == 2
    assert "is no manifest of a logits store" in capsys.readouterr().err
    assert list(target.iterdir()) == []
