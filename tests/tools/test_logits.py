"""python -m tools.logits, as a user runs it."""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.store import LogitsStoreReader, LogitsStoreWriter, record_dtype
from data.store.format import counted, rounded, size_text
from tests.support.helpers import ROOT
from tests.support.store_samples import IMAGES, KEYS, K, manifest, records_of, write_store
from tools import logits as logits_tool
from tools.logits import entropy, main

EVERYONE = np.arange(IMAGES)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "a store's folder"


@pytest.fixture
def run(capsys):
    """Runs a command in this process; returns (exit code, what it printed)."""

    def call(*argv) -> tuple[int, str]:
        code = main([str(word) for word in argv])
        told = capsys.readouterr()
        return code, told.out + "".join(
            line for line in told.err.splitlines(True) if "error" in line
        )

    return call


def flip(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_as_a_command(root, tmp_path):
    def call(*argv):
        command = [sys.executable, "-m", "tools.logits", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    write_store(root)
    flip(root / "epoch_0000.npy")
    damaged = call("verify", root)
    assert damaged.returncode == 1 and "block 0 is damaged" in damaged.stdout
    nothing = call("info", tmp_path / "no")
    assert nothing.returncode == 2 and nothing.stdout == ""
    assert re.fullmatch("error: .*correct the path\n", nothing.stderr)


@pytest.mark.parametrize(
    "command", "info verify estimate convert merge card fetch histogram suspects".split()
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and len(text) > 200 and "usage: python -m tools.logits" in text


HOLD = """
import sys
from data.store.files import sole_user
with sole_user(sys.argv[1]):
    print("in", flush=True)
    sys.stdin.readline()
"""


def test_info(root, run):
    write_store(root, epochs=2)
    code, text = run("info", root)
    assert code == 0
    for part in (
        "top-5 of 1,000 classes, 301 images",
        "24 bytes a record, 7.22 kB an epoch, 14.45 kB in sealed",
        "AUG.REPROB: 0.25",
        "base_seed: 7",
        "name: teacher",
        "numpy: 2.0",
        "sealed epochs: 0-1",
        "epoch 1: teacher top1 51.0",
        "class 00/it's image 00000.jpg ... class 10/",
    ):
        assert part in text, part
    with LogitsStoreWriter(root, manifest(), KEYS) as writer:
        writer.begin_epoch(2)
        writer.append(EVERYONE[:30], records_of(2, EVERYONE[:30]))
    unfinished = "unfinished epoch 2: 10.0% of the images in 1 part"
    assert run("info", root)[1].rstrip().endswith(unfinished)
    command, pipe = [sys.executable, "-c", HOLD, str(root / "epoch_0002.lock")], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as holder:
        holder.stdout.readline()
        assert f"{unfinished}, process {holder.pid} on " in run("info", root)[1]


def test_numbers_are_for_people():
    text = "top1 91.83673469387755, 0.00015 (0.75, 1.3333333333333333), 2.14.1, 1e-08, 1234567"
    assert rounded(text) == "top1 91.837, 0.00015 (0.75, 1.3333), 2.14.1, 1e-08, 1234567"
    assert [counted(n, "image") for n in (0, 1, 1369)] == ["0 images", "1 image", "1,369 images"]
    assert [size_text(n) for n in (1, 688, 7224)] == ["1 byte", "688 bytes", "7.22 kB"]


def test_info_of_the_original_layout(goldens, run):
    code, text = run("info", goldens / "store")
    assert code == 0 and "the original's layout, top-10, 44 bytes a record" in text
    assert "epoch 0: 51 records of 3 ranks; every key of ranks 2 stands in lower ranks too" in text


def test_verify_names_every_damage(root, run):
    write_store(root, epochs=4)
    clean = f"{root}: 4 sealed epochs (0-3), unfinished: none: 0 faults\n"
    assert run("verify", root, "--epochs", 4) == (0, clean)
    flip(root / "epoch_0001.npy", -5)
    (root / "epoch_0002.npy").write_bytes((root / "epoch_0002.npy").read_bytes()[:-1])
    flip(root / "keys.txt", 3)
    (root / "epoch_0009.parts").mkdir()
    code, text = run("verify", root, "--epochs", 6)
    told = [
        "missing epochs: 4-5",
        "keys.txt: is not the file",
        r"epoch_0001.npy: block 0 is damaged \(records 0 to 300\): delete epoch_0001.npy and .json",
        "epoch_0002.npy: truncated",
        r"4 sealed epochs \(0-3\), unfinished: 9: 4 faults",
    ]
    assert code == 1
    for line, pattern in zip(text.splitlines(), told, strict=True):
        assert re.search(pattern, line)


def test_estimate(run):
    code, text = run("estimate", *"--images 1000 --topk 10 --classes 1000 --epochs 3".split())
    more = run(*"estimate --images 1000 --topk 10 --classes 1000 --epochs 3 --original".split())[1]
    assert code == 0 and "44 bytes a record" in text and more.startswith(text)
    numbers = [int(found.replace(",", "")) for found in re.findall(r"([\d,]+) bytes \(", more)]
    assert numbers == [44_000, 132_000, 132_000 + 52_000, 1000 * (44 + 16) * 3]
    one = run(*"estimate --images 1 --topk 1 --classes 9 --epochs 1".split())[1]
    assert "1 image, top-1 of 9" in one and "1 epoch: " in one and "8 bytes (8 bytes)" in one
    code, text = run(*"estimate --images 5 --topk 11 --classes 10 --epochs 1".split())
    assert code == 2 and "K at most C" in text


def test_merge(tmp_path, run):
    whole = write_store(tmp_path / "whole", epochs=4).root
    parts = [tmp_path / name for name in ("left", "right's")]
    for number, part in enumerate(parts):
        write_store(part, epochs=4)
        for epoch in range(4):
            if epoch % 2 == number and epoch != 3:
                (part / f"epoch_{epoch:04d}.json").unlink()
                (part / f"epoch_{epoch:04d}.npy").unlink()
    target = tmp_path / "merged"
    for copied in ("4 epochs copied (0-3)", "0 epochs copied (none)"):
        assert run("merge", target, *parts) == (0, f"{target}: {copied}, sealed now: 0-3\n")
    assert run("verify", target, "--epochs", 4)[0] == 0
    assert contents(target) == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("first", [0, 1])
def test_merge_joins_stores_of_an_earlier_version_and_of_today(tmp_path, run, first):
    """The first manifest stays as it is, and all seals name it."""
    recipe = {"AUG.SCALE": [0.08, 1.0]}
    readers = [
        write_store(tmp_path / "old", recipe={**recipe, "ops": ["Crop(224)"]}),
        write_store(tmp_path / "new", epochs=2, recipe={**recipe, "version": 2}),
    ]
    sources = [readers[first].root, readers[1 - first].root]
    assert run("merge", tmp_path / "merged", *sources)[0] == 0
    merged = contents(tmp_path / "merged")
    assert merged["manifest.json"] == (sources[0] / "manifest.json").read_bytes()
    LogitsStoreReader(tmp_path / "merged").check_epochs([0, 1])


def test_merge_refuses_another_store(tmp_path, run):
    write_store(tmp_path / "one")
    made = manifest()
    made["teacher"]["weights_sha256"] = "cd" * 32
    LogitsStoreWriter(tmp_path / "other teacher", made, KEYS)
    write_store(tmp_path / "other keys", keys=KEYS[::-1])
    for other, message in (
        ("other teacher", "teacher.weights_sha256 is abab"),
        ("other keys", "reordered"),
    ):
        code, text = run("merge", tmp_path / "merged", tmp_path / "one", tmp_path / other)
        assert code == 2 and message in text
    assert LogitsStoreReader(tmp_path / "merged").epochs() == []


def test_merge_refuses_two_versions_of_an_epoch(tmp_path, run):
    one = write_store(tmp_path / "one", epochs=2)
    with LogitsStoreWriter(tmp_path / "two", manifest(), KEYS) as writer:
        writer.begin_epoch(0)
        writer.append(EVERYONE, records_of(5, EVERYONE))
        writer.seal(0)
    code, text = run("merge", tmp_path / "merged", one.root, tmp_path / "two")
    assert code == 2 and "hold other records" in text
    assert "moving the other's epoch_0000.npy and" in text


@pytest.mark.parametrize(
    ("where", "told"), [("source", "block 0 is damaged"), ("copy", "the copy is damaged")]
)
def test_merge_reads_back_what_it_copied(tmp_path, run, monkeypatch, where, told):
    source = write_store(tmp_path / "source").root
    if where == "source":
        flip(source / "epoch_0000.npy")
    else:
        spoiled = np.ones(IMAGES, record_dtype(K, 1000))
        monkeypatch.setattr(logits_tool.np, "load", lambda *args, **named: spoiled)
    code, text = run("merge", tmp_path / "merged", source)
    assert code == 2 and told in text and "nothing of it was copied" in text
    assert set(contents(tmp_path / "merged")) == {"keys.txt", "manifest.json"}


def test_merge_makes_its_copies_durable(tmp_path, run, monkeypatch):
    source = write_store(tmp_path / "source").root
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle)) or sync(handle))
    assert run("merge", tmp_path / "merged", source)[0] == 0
    inodes = {status.st_ino for status in synced}
    assert {path.stat().st_ino for path in (tmp_path / "merged").iterdir()} <= inodes


def test_histogram(root, tmp_path, run):
    write_store(root, epochs=2)
    picture = tmp_path / "it's a picture.png"
    code, text = run("histogram", root, "--epoch", 1, "--output", picture)
    assert (code, text) == (0, f"{picture}: written\n")
    data = picture.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 1200 and height > 400
    assert run("histogram", root, "--epoch", 7)[0] == 2
    LogitsStoreWriter(tmp_path / "empty", manifest(), KEYS)
    code, text = run("histogram", tmp_path / "empty")
    assert code == 2 and "has no sealed epoch" in text


@pytest.mark.parametrize("k", [1, 4, 6])
def test_entropy(k):
    rng = np.random.Generator(np.random.PCG64(k))
    for probs in (
        np.sort(rng.dirichlet(np.ones(6))[:k])[::-1],
        np.eye(k)[0],
        np.full(k, 1 / k) * 1.001,
    ):
        rest = max(0.0, 1 - probs.sum())
        full = [*probs, *[rest / (6 - k)] * (6 - k)] if k < 6 else list(probs)
        expected = -sum(p * np.log2(p) for p in full if p > 0)
        assert entropy(probs[None], 6)[0] == pytest.approx(expected, abs=1e-12)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "teacher's.yaml"
    path.write_text(
        f"DATA:\n  IMG_SIZE: 64\n  INDEX_DIR: {tmp_path / 'index'}\nMODEL:\n  NUM_CLASSES: 1000\n"
    )
    return path


def originals(folder: Path, k: int) -> dict[str, tuple]:
    """What an original's epoch holds: the first record of each key, in rank order."""
    found: dict[str, tuple] = {}
    for rank in range(len(list(folder.glob("rank*-values.bin")))):
        values = (folder / f"rank{rank}-values.bin").read_bytes()
        for row, key in enumerate((folder / f"rank{rank}-keys.txt").read_text().split()):
            found.setdefault(key, struct.unpack_from(f"<i{k}h{k}e", values, row * (4 + 4 * k)))
    return found


def test_converting_with_the_data_set(goldens, root, recipe, run):
    source, data = goldens / "train" / "store", goldens / "train" / "data"
    command = ("convert", source, root, "--cfg", recipe, "--data-path", data, "--teacher", "golden")
    assert run(*command) == (0, f"{root}: 2 epochs (0-1) of 200 images\n")
    reader = LogitsStoreReader(root)
    images = (data / "train").rglob("*.jpg")
    assert list(reader.keys) == sorted(
        path.relative_to(data / "train").as_posix() for path in images
    )
    for epoch in range(2):
        found = originals(source / f"logits_top10_epoch{epoch}", 10)
        for position, record in enumerate(reader.open_epoch(epoch)):
            assert (record["seed"], *record["index"], *record["prob"]) == found[str(position)]
    identity = reader.manifest["identity"]
    expected = {
        "base_seed": 0,
        "shuffle_seed": 0,
        "paired": True,
        "image_size": 64,
        "k": 10,
        "num_classes": 1000,
        "excess": "subtract",
    }
    assert {key: identity[key] for key in expected} == expected
    assert identity["recipe"]["AUG.FILL"] == [124, 116, 104]
    assert reader.manifest["teacher"]["name"] == "golden"
    proof = reader.manifest["proof"]
    assert proof["canary"] and len(proof["images"]["sha256"]) == 64
    assert run(*command)[0] == 0  # nothing is left to do
    assert run("verify", root, "--epochs", 2)[0] == 0


def test_converting_with_a_list_of_keys(goldens, root, recipe, run, tmp_path):
    source = goldens / "store"
    found = originals(source / "logits_top10_epoch0", 10)
    listed = tmp_path / "keys.txt"
    listed.write_text("".join(f"{key}\n" for key in sorted(found)))
    opts = "--opts DATA.MEAN_AND_STD_TYPE clip MODEL.NUM_CLASSES".split()
    command = ["convert", source, root, "--cfg", recipe, "--keys", listed, *opts]
    code, text = run(*command, 21841)
    assert code == 0 and "epoch 0: nothing is taken from ranks 2, all their keys stand in" in text
    reader = LogitsStoreReader(root)
    for key, record in zip(sorted(found), reader.open_epoch(0), strict=True):
        assert (record["seed"], *record["index"], *record["prob"]) == found[key]
    assert reader.manifest["identity"]["recipe"]["AUG.FILL"] == [123, 117, 104]
    assert reader.num_classes == 21841
    shutil.rmtree(root)
    for classes, message in ((0, "nothing tells the number of classes"), (1000, "of 1,000")):
        code, text = run(*command, classes)
        assert code == 2 and message in text and not root.exists()


def test_converting_a_tars_order(root, recipe, run, tmp_path):
    source = tmp_path / "original" / f"logits_top{K}_epoch0"
    source.mkdir(parents=True)
    (source / "rank0-keys.txt").write_text("0\n1\n2\n")
    records_of(0, np.array([9, 10, 1])).tofile(source / "rank0-values.bin")
    (tmp_path / "keys.txt").write_text("a/i10.jpg\na/i9.jpg\nb/1.jpg\n")
    options = ("--keys", tmp_path / "keys.txt", "--opts", "DISTILL.UPSTREAM_ORDER", "tar")
    code, text = run("convert", source.parent, root, "--cfg", recipe, *options)
    assert code == 0, text
    reader = LogitsStoreReader(root)
    np.testing.assert_array_equal(reader.open_epoch(0), records_of(0, np.array([10, 9, 1])))
    assert reader.manifest["proof"]["images"] == {"positions": [], "sha256": []}


def test_converting_refuses_other_data(goldens, root, recipe, run, tmp_path):
    listed = tmp_path / "keys.txt"
    listed.write_text("".join(f"a/{i}\n" for i in range(100)))
    source = goldens / "train" / "store"
    code, text = run("convert", source, root, "--cfg", recipe, "--keys", listed)
    assert code == 2 and "counts positions up to 199, the data set has 100 images" in text
    assert not root.exists()
