"""python -m tools.logits, as a user runs it."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.store import LogitsStoreReader, LogitsStoreWriter
from tests.support.helpers import ROOT
from tests.support.store_samples import IMAGES, KEYS, K, manifest, records_of, write_store
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
        return subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )

    write_store(root)
    flip(root / "epoch_0000.npy")
    damaged, nothing, helped, unknown = (
        call("verify", root),
        call("info", tmp_path / "no"),
        call("--help"),
        call("repair", root),
    )
    assert (damaged.returncode, nothing.returncode, helped.returncode, unknown.returncode) == (
        1,
        2,
        0,
        2,
    )
    assert "block 0 is damaged" in damaged.stdout and "Traceback" not in damaged.stderr
    assert (
        nothing.stdout == ""
        and nothing.stderr.startswith("error: ")
        and "correct the path" in nothing.stderr
    )
    assert all(
        name in helped.stdout
        for name in ("info", "verify", "estimate", "convert", "merge", "histogram")
    )


@pytest.mark.parametrize("command", ["info", "verify", "estimate", "convert", "merge", "histogram"])
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
    writer = LogitsStoreWriter(root, manifest(), KEYS)
    writer.begin_epoch(2)
    writer.append(EVERYONE[:30], records_of(2, EVERYONE[:30]))
    writer.close()
    unfinished = "unfinished epoch 2: 10.0% of the images in 1 parts"
    assert run("info", root)[1].rstrip().endswith(unfinished)
    command, pipe = [sys.executable, "-c", HOLD, str(root / "epoch_0002.lock")], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as holder:
        holder.stdout.readline()
        assert f"{unfinished}, process {holder.pid} on " in run("info", root)[1]


def test_info_of_the_original_layout(goldens, run):
    code, text = run("info", goldens / "store")
    assert code == 0 and "the original's layout, top-10, 44 bytes a record" in text
    assert "epoch 0: 51 records of 3 ranks; every key of ranks 2 stands in lower ranks too" in text


def test_verify(root, run):
    write_store(root, epochs=3)
    assert run("verify", root, "--epochs", 3) == (
        0,
        f"{root}: 3 sealed epochs (0-2), unfinished: none: 0 faults\n",
    )
    code, text = run("verify", root, "--epochs", 5)
    assert code == 1 and "epochs 3-4 are missing" in text and "1 faults" in text


def test_verify_names_every_damage(root, run):
    write_store(root, epochs=4)
    flip(root / "epoch_0001.npy", -5)
    (root / "epoch_0002.npy").write_bytes((root / "epoch_0002.npy").read_bytes()[:-1])
    flip(root / "keys.txt", 3)
    (root / "epoch_0009.parts").mkdir()
    code, text = run("verify", root)
    keys, block, short, last = text.splitlines()
    assert (
        code == 1 and "keys.txt: is not the file" in keys and "epoch_0002.npy: truncated" in short
    )
    assert block.startswith(
        f"{root / 'epoch_0001.npy'}: block 0 is damaged (records 0 to 300): delete epoch_0001.npy"
        " and .json"
    )
    assert last.endswith("4 sealed epochs (0-3), unfinished: 9: 3 faults")


def test_estimate(run):
    code, text = run(
        "estimate", "--images", 1000, "--topk", 10, "--classes", 1000, "--epochs", 3, "--original"
    )
    numbers = [
        line.split(":")[1].split("bytes")[0].strip().replace(",", "")
        for line in text.splitlines()[1:]
    ]
    assert code == 0 and "44 bytes a record" in text
    assert numbers == ["44000", "132000", str(132_000 + 52_000), str(1000 * (44 + 16) * 3)]
    assert (
        run("estimate", "--images", 1, "--topk", 1, "--classes", 70_000, "--epochs", 1)[1].count(
            "10 bytes"
        )
        == 3
    )
    code, text = run("estimate", "--images", 5, "--topk", 11, "--classes", 10, "--epochs", 1)
    assert code == 2 and "give numbers from 1 up, K at most C" in text


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
    assert run("merge", target, *parts) == (
        0,
        f"{target}: 4 epochs copied (0-3), sealed now: 0-3\n",
    )
    assert run("verify", target, "--epochs", 4)[0] == 0
    for path in whole.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in target.iterdir()} == {path.name for path in whole.iterdir()}
    assert run("merge", target, *parts) == (
        0,
        f"{target}: 0 epochs copied (none), sealed now: 0-3\n",
    )


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


def test_merge_refuses_two_versions_of_an_epoch_and_damage(tmp_path, run):
    one, two = write_store(tmp_path / "one", epochs=2), write_store(tmp_path / "two")
    with LogitsStoreWriter(tmp_path / "three", manifest(), KEYS) as writer:
        writer.begin_epoch(0)
        writer.append(EVERYONE, records_of(5, EVERYONE))
        writer.seal(0)
    code, text = run("merge", tmp_path / "merged", one.root, tmp_path / "three")
    assert (
        code == 2
        and "epoch 0 of" in text
        and "hold other records" in text
        and "moving the other's epoch_0000.npy and" in text
    )
    flip(two.root / "epoch_0000.npy")
    code, text = run("merge", tmp_path / "merged", two.root)
    assert code == 2 and "block 0 is damaged" in text and "nothing of it was copied" in text
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "keys.txt",
        "manifest.json",
    ]
    assert run("merge", tmp_path / "merged", one.root)[0] == 0


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
    assert run(*command) == (0, f"{root}: 2 epochs of 200 images (epochs 0-1)\n")
    reader = LogitsStoreReader(root)
    reader.check_epochs(range(2))
    assert list(reader.keys) == sorted(
        path.relative_to(data / "train").as_posix() for path in (data / "train").rglob("*.jpg")
    )
    for epoch in range(2):
        found = originals(source / f"logits_top10_epoch{epoch}", 10)
        for position, record in enumerate(reader.open_epoch(epoch)):
            assert (record["seed"], *record["index"], *record["prob"]) == found[str(position)]
    identity = reader.manifest["identity"]
    assert (
        identity["base_seed"],
        identity["shuffle_seed"],
        identity["paired"],
        identity["image_size"],
    ) == (0, 0, True, 64)
    assert (
        identity["recipe"]["AUG.FILL"] == [124, 116, 104]
        and identity["k"] == 10
        and identity["num_classes"] == 1000
    )
    assert identity["excess"] == "subtract" and reader.manifest["teacher"]["name"] == "golden"
    assert (
        reader.manifest["proof"]["canary"]
        and len(reader.manifest["proof"]["images"]["sha256"]) == 64
    )
    assert run(*command)[0] == 0  # nothing is left to do
    assert run("verify", root, "--epochs", 2)[0] == 0


def test_converting_with_a_list_of_keys(goldens, root, recipe, run, tmp_path):
    source = goldens / "store"
    found = originals(source / "logits_top10_epoch0", 10)
    listed = tmp_path / "keys.txt"
    listed.write_text("".join(f"{key}\n" for key in sorted(found)))
    command = [
        "convert",
        source,
        root,
        "--cfg",
        recipe,
        "--keys",
        listed,
        "--opts",
        "DATA.MEAN_AND_STD_TYPE",
        "clip",
        "MODEL.NUM_CLASSES",
    ]
    code, text = run(*command, 21841)
    assert (
        code == 0
        and "epoch 0: nothing is taken from ranks 2, all their keys stand in lower ranks' files"
        in text
    )
    reader = LogitsStoreReader(root)
    for key, record in zip(sorted(found), reader.open_epoch(0)):
        assert (record["seed"], *record["index"], *record["prob"]) == found[key]
    assert (
        reader.manifest["identity"]["recipe"]["AUG.FILL"] == [123, 117, 104]
        and reader.num_classes == 21841
    )
    shutil.rmtree(root)
    code, text = run(*command, 0)
    assert (
        code == 2 and "nothing tells the number of classes: give --opts MODEL.NUM_CLASSES C" in text
    )
    code, text = run(*command, 1000)
    assert (
        code == 2
        and "names class" in text
        and "of 1,000: correct MODEL.NUM_CLASSES" in text
        and not root.exists()
    )


def test_converting_a_tars_order(root, recipe, run, tmp_path):
    source = tmp_path / "original" / f"logits_top{K}_epoch0"
    source.mkdir(parents=True)
    keys = ["a/i10.jpg", "a/i9.jpg", "b/1.jpg"]
    (source / "rank0-keys.txt").write_text("0\n1\n2\n")
    records_of(0, np.array([9, 10, 1])).tofile(source / "rank0-values.bin")
    (tmp_path / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
    options = ("--keys", tmp_path / "keys.txt", "--opts", "DISTILL.UPSTREAM_ORDER", "tar")
    code, text = run("convert", source.parent, root, "--cfg", recipe, *options)
    assert code == 0, text
    np.testing.assert_array_equal(
        LogitsStoreReader(root).open_epoch(0), records_of(0, np.array([10, 9, 1]))
    )
    assert json.loads((root / "manifest.json").read_bytes())["proof"]["images"] == {
        "positions": [],
        "sha256": [],
    }


def test_converting_refuses_other_data(goldens, root, recipe, run, tmp_path):
    (tmp_path / "keys.txt").write_text("".join(f"a/{i}\n" for i in range(100)))
    code, text = run(
        "convert",
        goldens / "train" / "store",
        root,
        "--cfg",
        recipe,
        "--keys",
        tmp_path / "keys.txt",
    )
    assert (
        code == 2
        and "counts positions up to 199, the data set has 100 images" in text
        and not root.exists()
    )
