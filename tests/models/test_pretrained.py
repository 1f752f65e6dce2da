"""Reading, naming, fitting and fetching weights."""

import argparse
import contextlib
import hashlib
import http.server
import io
import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from yacs.config import CfgNode

from models import pretrained
from models.class_map import map_22k_to_1k
from models.pretrained import (
    cached_download,
    classifier_names,
    from_timm,
    head_classes,
    load_pretrained,
    load_weights,
    read_state_dict,
    resize_attention_biases,
    save_weights,
    to_timm,
    weights_digest,
    zoo_url,
)
from models.tiny_vit import TinyViT
from tests.models.test_tiny_vit import VARIANTS

TINY = {"embed_dims": (32, 32, 64, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}


def tiny(num_classes=5, seed=0, **overrides):
    torch.manual_seed(seed)
    return TinyViT(**{**TINY, "num_classes": num_classes, **overrides})


def quiet(_):
    pass


def states_equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def file_of(content):
    """The bytes of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def prefixed(prefix, weights):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def fill_b(shapes):
    """The weights that the checked cases were made with."""
    state = {}
    for position, key in enumerate(sorted(shapes)):
        shape, name = shapes[key], key.rsplit(".", 1)[-1]
        n = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(position))
        if name == "num_batches_tracked":
            state[key] = torch.zeros(shape, dtype=torch.long)
        elif name == "running_var":
            state[key] = 1 + n.abs()
        elif name == "attention_biases":
            state[key] = n
        elif len(shape) == 1 and name == "weight":
            state[key] = 1 + 0.1 * n
        elif len(shape) in (2, 4):
            state[key] = n / n[0].numel() ** 0.5
        else:
            state[key] = 0.1 * n
    return state


@pytest.fixture(scope="module")
def weights():
    return tiny().state_dict()


def configuration():
    node = CfgNode(
        {
            "MODEL": {"NAME": "tiny", "DEPTHS": [1, 1], "BETAS": (0.9, 0.999)},
            "SEED": None,
            "AMP": True,
        }
    )
    node.freeze()
    return node


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights},
        lambda weights: {
            "model": weights,
            "config": configuration(),
            "epoch": 3,
            "max_accuracy": 80.5,
            "optimizer": {"state": {}},
        },
        lambda weights: {"state_dict": weights, "args": argparse.Namespace(lr=0.1, layers=[1, 2])},
        lambda weights: {"model": prefixed("module.", weights)},
        lambda weights: {"state_dict": prefixed("module._orig_mod.", weights)},
        lambda weights: {"model_ema": weights, "epoch": 1},
        lambda weights: {"model": {"n_averaged": torch.tensor(4), **prefixed("module.", weights)}},
    ],
)
def test_checkpoints_are_unwrapped(tmp_path, weights, wrap, zipped):
    path = tmp_path / "a file.pth"
    torch.save(wrap(weights), path, _use_new_zipfile_serialization=zipped)
    assert states_equal(read_state_dict(path), weights)
    assert states_equal(read_state_dict(str(path)), weights)


def test_averaged_weights_are_read_when_asked_for(tmp_path, weights):
    path = tmp_path / "checkpoint.pth"
    average = {key: value + 1 for key, value in weights.items()}
    torch.save({"model": weights, "model_ema": average}, path)
    assert states_equal(read_state_dict(path), weights)
    assert states_equal(read_state_dict(path, ema=True), average)
    torch.save({"model": weights, "model_ema": None}, path)
    assert states_equal(read_state_dict(path), weights)
    with pytest.raises(
        ValueError, match=r"checkpoint.pth: it holds no averaged weights \(TRAIN.EMA_DECAY was 0\)"
    ):
        read_state_dict(path, ema=True)


def test_safetensors(tmp_path, weights):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    assert states_equal(read_state_dict(path), weights)


def pinned(path, digits=64):
    return f"{path}@sha256={hashlib.sha256(path.read_bytes()).hexdigest()[:digits]}"


def test_what_has_no_checksums_is_shown_by_its_digest_and_can_be_pinned(tmp_path, weights):
    old, foreign = tmp_path / "old.pth", tmp_path / "foreign.safetensors"
    torch.save(weights, old, _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in weights.items()}, foreign
    )
    for path in (old, foreign):
        lines = []
        load_weights(tiny(), path, log=lines.append)
        assert pinned(path).removeprefix(str(path)) in lines[0] and "without checksums" in lines[0]
        assert states_equal(read_state_dict(pinned(path)), weights)
        content = bytearray(path.read_bytes())
        content[-8] ^= 1  # a weight's: no reader could know
        before = pinned(path, 12)
        path.write_bytes(content)
        assert not states_equal(read_state_dict(path), weights)
        with pytest.raises(ValueError, match=f"{path.name}: its sha256 is .*, not '.*': give the"):
            read_state_dict(before)


def test_what_has_checksums_can_be_pinned_too(zoo, tmp_path, weights):
    path, ours = tmp_path / "new.pth", tmp_path / "ours.safetensors"
    torch.save(weights, path)
    save_weights(tiny(), ours)
    for file in (path, ours):
        lines = []
        load_weights(tiny(), pinned(file, 8), log=lines.append)
        assert len(lines) == 1  # the report alone
        for pin in ("", "1234567", "12345678", "text"):
            with pytest.raises(ValueError, match="its sha256 is .* at least 8 digits of this one"):
                read_state_dict(f"{file}@sha256={pin}")
    zoo.body = path.read_bytes()
    digest = pinned(path).removeprefix(str(path))
    assert states_equal(read_state_dict(f"{zoo.url}/a.pth{digest}"), weights)
    assert zoo.asked == ["/a.pth"]
    with pytest.raises(ValueError, match="a-.*.pth: its sha256 is "):
        read_state_dict(f"{zoo.url}/a.pth@sha256=12345678")


def test_our_own_files_tell_the_digest_of_their_tensors(tmp_path, weights):
    path = tmp_path / "ours.safetensors"
    save_weights(tiny(), path)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"tensors_sha256": weights_digest(weights)}
    content = path.read_bytes()
    for place in range(len(content) - 1, 0, -len(content) // 40):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="not a checkpoint, or a damaged one"):
            read_state_dict(path)


def test_no_flipped_bit_of_a_zip_becomes_a_weight(tmp_path, weights):
    path = tmp_path / "new.pth"
    torch.save(weights, path)
    content = path.read_bytes()
    for key in [key for key, value in weights.items() if value.ndim == 2]:
        changed = bytearray(content)
        changed[content.index(weights[key].numpy().tobytes())] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="a damaged one .wrong checksum of new/data/|Bad CRC"):
            read_state_dict(path)


def test_no_damage_to_a_zips_directory_becomes_a_weight(tmp_path):
    """Python's reader, which tests the checksums, and PyTorch's must see the same file."""
    path, state = tmp_path / "small.pth", {"a": torch.arange(20.0) + 1, "b": torch.arange(7) + 1}
    content = file_of({"model": state})
    torch.save({"model": {key: value * 0 + 5 for key, value in state.items()}}, tmp_path / "other")
    refused = 0
    for place in range(content.index(b"PK\x01\x02"), len(content)):
        for mask in (0x10, 0xFF):
            changed = bytearray(content)
            changed[place] ^= mask
            path.write_bytes(changed)
            torch.load(tmp_path / "other")  # so that memory which is not written is wrong
            try:
                assert states_equal(read_state_dict(path), state), (place, mask)
            except ValueError:
                refused += 1
    assert refused > 300


def test_a_zip_that_has_lost_bytes_is_damaged_rather_than_unreadable(tmp_path):
    path = tmp_path / "short.pth"
    content = file_of({"model": {"a": torch.zeros(5000)}})
    path.write_bytes(content[:700] + content[1700:])  # its directory now begins before the file
    with pytest.raises(ValueError, match="short.pth: not a checkpoint, or a damaged one"):
        read_state_dict(path)


def recursive():
    content = {}
    content["model"] = {"state_dict": content}
    return content


@pytest.mark.filterwarnings("ignore")  # of kinds of tensors that PyTorch calls unfinished
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"w": torch.ones(2, dtype=torch.complex64)}, r"w is not a dense .*complex64"),
        (lambda: {"w": torch.eye(2).to_sparse()}, r"w is not a dense .*sparse_coo"),
        (lambda: {"w": torch.eye(2).to_sparse_csr()}, r"w is not a dense .*sparse_csr"),
        (lambda: {"w": torch.empty(2, device="meta")}, r"w is not a dense .*meta"),
        (
            lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)},
            r"w is not a dense .*quint8",
        ),
        (lambda: {"w": torch.nested.nested_tensor([torch.ones(2)])}, "w is not a dense"),
        (lambda: {"w": torch.ones(1).expand(10**6, 10**6)}, "w is not a dense .*all in the file"),
        (lambda: {1: torch.ones(2)}, "no weights found, only keys 1"),
        (lambda: {"w": torch.ones(2), (1, 2): torch.ones(2)}, "no weights found, only keys w, "),
        (recursive, "no weights found, only keys "),
        (lambda: {"model": {"x" * 10**6: 1}}, "no weights found, only keys xxx"),
    ],
)
def test_unusable_tensors_are_one_line(tmp_path, make, message):
    torch.save(make(), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=f"odd.pth: {message}") as caught:
        read_state_dict(tmp_path / "odd.pth")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_shared_and_strided_tensors_are_read(tmp_path):
    whole = torch.arange(12.0)
    state = {"a": whole, "b": whole, "c": whole.view(3, 4).T, "d": whole[::5]}
    torch.save(state, tmp_path / "shared.pth")
    assert states_equal(read_state_dict(tmp_path / "shared.pth"), state)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "key",
    ["head.weight", "patch_embed.seq.0.c.weight", "layers.1.blocks.0.attn.attention_biases"],
)
def test_whole_numbers_are_not_taken_for_fractions(weights, key, exact):
    state = {**weights, key: (weights[key] * 100).long()}
    with pytest.raises(ValueError, match=f"{key} is torch.int64, the model's torch.float32"):
        load_weights(tiny(), state, exact=exact, log=quiet)
    halves = {name: value.half() for name, value in weights.items()}  # also of a counter
    assert load_weights(tiny(), halves, exact=exact, log=quiet).loaded == len(weights)


@pytest.mark.parametrize("biases", [torch.tensor(1.0), torch.ones(1), torch.ones(1, 50)])
def test_biases_of_no_window_do_not_fit(weights, biases):
    key = "layers.1.blocks.0.attn.attention_biases"
    with pytest.raises(ValueError, match=rf"{key} is \[.*\], the model's \[1, 49\]"):
        load_weights(tiny(), {**weights, key: biases}, log=quiet)


@pytest.mark.parametrize("head", [torch.tensor(1.0), torch.ones(0, 64), torch.ones(10**12, 0)])
def test_a_head_of_no_classes_tells_no_number(weights, head):
    assert head_classes(tiny(), {**weights, "head.weight": head}) == 0


class Evil:
    """Unpickled without care, it writes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return exec, (f"open({self.marker!r}, 'w').close()",)


@pytest.mark.parametrize(
    "save",
    [
        lambda content, path: torch.save(content, path),
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
        lambda content, path: path.write_bytes(pickle.dumps(content, protocol=5)),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_file_is_refused_and_not_run(tmp_path, save):
    marker, path = tmp_path / "was run", tmp_path / "evil.pth"
    save({"model": {"weight": torch.zeros(1)}, "config": Evil(marker)}, path)
    with pytest.raises(
        ValueError, match=r"evil.pth: refused: .*nothing else in a file is run"
    ) as caught:
        read_state_dict(path)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)  # no advice to switch the protection off
    with contextlib.suppress(RuntimeError, pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert marker.exists()  # the file was what it claims to be


def test_a_refusal_names_what_the_file_asks_for(tmp_path):
    torch.save({"model": {}, "config": Evil("x")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth: refused: it asks for exec;"):
        read_state_dict(tmp_path / "evil.pth")
    torch.save({"model": {}, "config": Path("x")}, tmp_path / "path.pth")
    with pytest.raises(ValueError, match="path.pth: refused: it asks for pathlib"):
        read_state_dict(tmp_path / "path.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"PK\x03\x04abc", b"\x80\x02}q", "cut"]
)
def test_damaged_files(tmp_path, weights, content, suffix):
    path = tmp_path / f"damaged{suffix}"
    if content == "cut":
        plain = {key: value.contiguous() for key, value in weights.items()}
        save = safetensors.torch.save if suffix == ".safetensors" else file_of
        content = save(plain)[:-40]
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=rf"damaged{suffix}: (not a|refused: it is no) checkpoint, or a damaged one",
    ):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"epoch": 3, "optimizer": {}},
            "no weights found, only keys epoch, optimizer: expected .* under model or",
        ),
        ({"model": {"a": 1}}, "no weights found, only keys a"),
        ({}, "no weights found"),
        ([1, 2], "no weights found, only a list"),
    ],
)
def test_files_without_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth: {message}"):
        read_state_dict(tmp_path / "other.pth")


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.pth: there is no such checkpoint file"):
        read_state_dict(tmp_path / "nowhere.pth")


def test_a_runs_folder_is_answered_with_its_checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="is a folder without checkpoints"):
        read_state_dict(folder.parent)
    for name in ("epoch_0002", "last", "best"):  # each is a better answer than those before
        (folder / f"{name}.pth").touch()
        for place in (folder, folder.parent):
            with pytest.raises(ValueError, match="name a checkpoint in it, such as") as fault:
                read_state_dict(place)
            assert str(fault.value).endswith(f" {folder / name}.pth")


@pytest.mark.parametrize("name", VARIANTS.values())
def test_names_convert_to_timms_and_back(goldens, name):
    case = json.loads((goldens / "model.json").read_text())[name]
    with torch.device("meta"):
        ours = {key: torch.empty(case["keys"][key]) for key in case["order"]}
        theirs = timm.create_model(name, num_classes=1000).state_dict()
    converted = to_timm(ours)
    assert list(converted) == list(theirs)
    assert all(converted[key].shape == theirs[key].shape for key in theirs)
    assert list(from_timm(converted)) == case["order"]


def test_recomputed_buffers_are_dropped():
    offsets, bias = torch.zeros(2, 2), torch.zeros(3)
    assert list(
        to_timm({"layers.1.blocks.0.attn.attention_bias_idxs": offsets, "head.bias": bias})
    ) == ["head.fc.bias"]
    assert list(
        from_timm({"stages.1.blocks.0.attn.attention_bias_idxs": offsets, "head.fc.bias": bias})
    ) == ["head.bias"]


@pytest.mark.parametrize("exact", [True, False])
def test_loading_converts_the_naming_either_way(exact):
    images = torch.randn(
        2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    theirs = timm.create_model("tiny_vit_5m_224", num_classes=7).eval()
    ours = TinyViT.from_config("5m", num_classes=7).eval()
    generator = torch.Generator().manual_seed(1)
    for value in theirs.state_dict().values():
        if value.is_floating_point():
            value.uniform_(-0.1, 0.2, generator=generator)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.add_(1)
    load_weights(ours, theirs.state_dict(), exact=exact, log=quiet)
    torch.testing.assert_close(
        ours.double()(images), theirs.double()(images), rtol=1e-10, atol=1e-10
    )
    other = timm.create_model("tiny_vit_5m_224", num_classes=7)
    load_weights(other, ours.float().state_dict(), exact=exact, log=quiet)
    assert states_equal(other.state_dict(), theirs.float().state_dict())


@pytest.mark.parametrize(
    "case_name", ["pretrained_224to384", "pretrained_22kto1k", "pretrained_head_mismatch_1000to10"]
)
def test_loads_equal_the_originals(goldens, case_name):
    cases = json.loads((goldens / "model.json").read_text())
    case = cases[case_name]
    shapes = dict(cases[case["src"]]["keys"])
    shapes["head.weight"] = [case["nsrc"], shapes["head.weight"][1]]
    shapes["head.bias"] = [case["nsrc"]]
    variant = {name: variant for variant, name in VARIANTS.items()}[case["dst"]]
    model = TinyViT.from_config(variant, num_classes=case["ndst"], drop_path_rate=0.0).eval()
    report = load_weights(
        model,
        {**fill_b(shapes), "layers.1.blocks.0.attn.attention_bias_idxs": torch.zeros(49, 49)},
        log=quiet,
    )
    assert report.unexpected == report.missing == ()

    state = model.state_dict()
    all_biases = [value for key, value in state.items() if key.endswith("attention_biases")]
    biases = next(value for value in all_biases if list(value.shape) == case["bias_shape"])
    assert biases.double().sum().item() == pytest.approx(case["bias_sum"], rel=1e-5)
    for found, expected, tolerance in (
        (biases.flatten()[:16], case["bias_first"], 1e-6),
        (state["head.weight"].flatten()[:16], case["head_w_first"], 1e-7),
        (state["head.bias"], case["head_b"] or case["head_b_first"], 1e-7),
    ):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=tolerance)
    size = model.img_size
    with torch.no_grad():
        logits = model(
            torch.empty(2, 3, size, size).normal_(generator=torch.Generator().manual_seed(2024))
        )
    expected = torch.tensor(case["logits"])  # the first of each image
    scale = logits.abs().max()
    assert (logits[:, : expected.shape[1]] - expected).abs().max() <= 1e-4 * scale
    assert abs(logits.double().sum() - case["logits_sum"]) <= 1e-4 * scale * logits.numel() ** 0.5


def test_a_report_lists_what_was_done():
    lines = []
    small, large = tiny(5), tiny(3, window_sizes=(7, 8, 14, 7))
    state = {**small.state_dict(), "extra.weight": torch.zeros(1)}
    del state["patch_embed.seq.0.bn.num_batches_tracked"]
    report = load_weights(large, state, log=lines.append)
    assert report.adapted == ("layers.1.blocks.0.attn.attention_biases (window 7 to 8)",)
    assert report.zeroed == (
        "head.weight ([5, 64] in the file, [3, 64] here)",
        "head.bias ([5] in the file, [3] here)",
    )
    assert report.missing == ("patch_embed.seq.0.bn.num_batches_tracked",)
    assert report.unexpected == ("extra.weight",)
    assert report.loaded == len(large.state_dict()) - 4
    assert lines == [str(report)]
    assert "head set to zero: head.weight" in lines[0]
    assert "not in the model: extra.weight" in lines[0]
    assert not large.head.weight.any() and not large.head.bias.any()
    untouched = [
        key
        for key in large.state_dict()
        if not key.startswith("head") and "num_batches" not in key and "layers.1" not in key
    ]
    assert all(torch.equal(large.state_dict()[key], state[key]) for key in untouched)


def test_biases_are_resized_head_by_head():
    biases = torch.randn(3, 49, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(resize_attention_biases(biases.float(), 49), biases.float())
    alone = torch.cat([resize_attention_biases(biases[i : i + 1], 144) for i in range(3)])
    assert torch.equal(resize_attention_biases(biases, 144), alone)
    assert alone.dtype == torch.float64
    constant = resize_attention_biases(torch.full((2, 49), 0.5), 576)
    torch.testing.assert_close(constant, torch.full((2, 576), 0.5))


def test_a_22k_head_becomes_a_1k_head_by_the_class_map():
    source = {"head.weight": torch.randn(21841, 4), "head.bias": torch.zeros(21841)}
    model = nn.Sequential()
    model.head = nn.Linear(4, 1000)
    report = load_weights(model, source, log=quiet)
    mapping = map_22k_to_1k()
    expected = torch.stack([source["head.weight"][i] for i in mapping if i >= 0]).mean(0)
    for row, position in zip(model.head.weight.detach(), mapping):
        torch.testing.assert_close(
            row, source["head.weight"][position] if position >= 0 else expected
        )
    assert len(report.adapted) == 2 and not report.zeroed  # also the bias, which happens to be zero


def test_a_file_without_a_head_leaves_a_zero_head(weights):
    model = tiny(4)
    headless = {key: value for key, value in weights.items() if not key.startswith("head")}
    report = load_weights(model, headless, log=quiet)
    assert report.zeroed == (
        "head.weight (not in the file, [4, 64] here)",
        "head.bias (not in the file, [4] here)",
    )
    assert not model.head.weight.any()
    features = tiny(0)
    assert load_weights(features, weights, log=quiet).unexpected == ("head.weight", "head.bias")


@pytest.mark.parametrize("exact", [True, False])
def test_what_the_model_needs_must_be_there(weights, exact):
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {**weights, "norm_head.weight": torch.zeros(7)}
    del state["layers.0.blocks.0.conv1.c.weight"]
    with pytest.raises(
        ValueError,
        match=r"given state dict does not fit TinyViT: .* is missing; norm_head.weight is \[7\]",
    ):
        load_weights(model, state, exact=exact, log=quiet)
    assert states_equal(model.state_dict(), before)


def test_a_long_list_of_misfits_is_cut(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "small.pth")
    deeper = tiny(depths=[1, 3, 1, 1])
    with pytest.raises(
        ValueError, match=r"small.pth does not fit TinyViT: .*; and \d+ more. Check"
    ):
        load_weights(deeper, tmp_path / "small.pth", log=quiet)


@pytest.mark.parametrize(
    ("name", "told"),
    [("resnet10t-f3d1a2.pth", "NAME resnet10t$"), ("linear.pth", "NAME to what timm calls it$")],
)
def test_weights_of_another_kind_of_model_are_told(weights, tmp_path, name, told):
    linear = nn.Linear(2, 2)
    torch.save(linear.state_dict(), tmp_path / name)
    message = (
        rf"it holds no TinyViT \(the first tensor is weight\): .* MODEL.TYPE timm MODEL.{told}"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(tiny(), tmp_path / name, exact=True, log=quiet)
    with pytest.raises(ValueError, match="does not fit Linear: it holds a TinyViT: take a recipe"):
        load_weights(linear, weights, log=quiet)


def test_other_numbers_of_heads_do_not_fit(weights):
    with pytest.raises(ValueError, match=r"attention_biases is \[1, 49\], the model's \[2, 49\]"):
        load_weights(tiny(num_heads=(1, 2, 2, 2)), weights, log=quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_sizes": (7, 8, 14, 7)}, r"attention_biases is \[1, 49\], the model's \[1, 64\]"),
        ({"num_classes": 6}, r"head.weight is \[5, 64\], the model's \[6, 64\]"),
        ({"num_classes": 0}, "head.weight has no place; head.bias has no place"),
    ],
)
def test_exact_loads_adapt_nothing(weights, change, message):
    with pytest.raises(ValueError, match=message):
        load_weights(tiny(**change), weights, exact=True, log=quiet)
    report = load_weights(tiny(seed=1), weights, exact=True, log=quiet)
    assert report.loaded == len(weights) and not (
        report.adapted or report.zeroed or report.missing or report.unexpected
    )


def test_heads_are_found():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

    assert classifier_names(tiny()) == ("head",)
    assert classifier_names(tiny(0)) == ()
    assert classifier_names(Two()) == ("fc",)
    assert classifier_names(nn.Sequential(nn.Linear(2, 2))) == ()
    assert classifier_names(timm.create_model("efficientnet_b0")) == ("classifier",)
    assert classifier_names(timm.create_model("deit_tiny_distilled_patch16_224")) == (
        "head",
        "head_dist",
    )
    assert classifier_names(timm.create_model("tiny_vit_5m_224")) == ("head.fc",)


class Server(http.server.ThreadingHTTPServer):
    """A file server on loopback that remembers what was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.body, self.promised = [], b"", None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        found = "missing" not in self.path
        self.send_response(200 if found else 404)
        if self.server.promised is not False:
            self.send_header("Content-Length", str(self.server.promised or len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("TINYVIT_ZOO_URL", f"{server.url}/zoo/")
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path / "cache"))
    server.body = file_of({"model": {"nothing": torch.zeros(1)}})
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_zoo_urls(monkeypatch):
    monkeypatch.delenv("TINYVIT_ZOO_URL", raising=False)
    base = "https://github.com/wkcn/TinyViT-model-zoo/releases/download"
    for size in ("5m", "11m", "21m"):
        for which in ("22k_distill", "22kto1k_distill", "1k"):
            assert zoo_url(size, which) == f"{base}/checkpoints/tiny_vit_{size}_{which}.pth"
    for variant, which, file in (
        ("21m_384", "22kto1k_distill", "checkpoints/tiny_vit_21m_22kto1k_384_distill.pth"),
        ("21m_512", "22kto1k_distill", "checkpoints/tiny_vit_21m_22kto1k_512_distill.pth"),
        ("21m_512", "22k_distill", "checkpoints/tiny_vit_21m_22k_distill.pth"),
        ("clip_vit_large14_224", "22k", "pretrained_teacher/clip_vit_large_patch14_22k.pth"),
    ):
        assert zoo_url(variant, which) == f"{base}/{file}"


@pytest.mark.parametrize(
    ("variant", "which"),
    [("5m_384", "1k"), ("7m", "1k"), ("21m", "22k"), ("clip_vit_large14_224", "1k")],
)
def test_what_the_zoo_lacks(variant, which):
    with pytest.raises(
        ValueError,
        match=f"the model zoo has no '{which}' weights for '{variant}': it has 22k_distill, ",
    ):
        zoo_url(variant, which)


@pytest.mark.parametrize(
    ("variant", "option", "file"),
    [
        ("5m", True, "tiny_vit_5m_22kto1k_distill"),
        ("5m", "22k_distill", "tiny_vit_5m_22k_distill"),
        ("11m", "1k", "tiny_vit_11m_1k"),
        ("21m", "22kto1k_distill", "tiny_vit_21m_22kto1k_distill"),
        ("21m_384", True, "tiny_vit_21m_22kto1k_384_distill"),
        ("21m_512", "22kto1k_distill", "tiny_vit_21m_22kto1k_512_distill"),
    ],
)
def test_which_url_for_which_call(zoo, variant, option, file):
    with pytest.raises(ValueError, match=f"{file}.pth does not fit TinyViT"):
        TinyViT.from_config(variant, pretrained=option)
    assert zoo.asked == [f"/zoo/checkpoints/{file}.pth"]


def test_pretrained_weights_arrive(zoo, tmp_path):
    source = TinyViT.from_config("5m", num_classes=3)
    zoo.body = file_of({"model": source.state_dict()})
    for _ in range(2):
        model = TinyViT.from_config("5m", pretrained="1k", num_classes=3)
        assert states_equal(model.state_dict(), source.state_dict())
    assert zoo.asked == ["/zoo/checkpoints/tiny_vit_5m_1k.pth"]  # the second time from the cache
    assert os.listdir(tmp_path / "cache") == ["tiny_vit_5m_1k.pth"]
    report = load_pretrained(model, "5m", "1k", log=quiet)
    assert report.source == f"{zoo.url}/zoo/checkpoints/tiny_vit_5m_1k.pth"


def test_any_url_will_do_and_equal_names_are_kept_apart(zoo, tmp_path):
    for folder in ("a", "b"):
        zoo.body = file_of({"weight": torch.full((2,), float(ord(folder)))})
        state = read_state_dict(f"{zoo.url}/{folder}/model%20one.pth?download=1")
        assert state["weight"].tolist() == [ord(folder)] * 2
    assert len(list((tmp_path / "cache").glob("model one-*.pth"))) == 2


def test_a_file_of_unknown_length(zoo):
    zoo.promised = False
    assert cached_download(f"{zoo.url}/x.pth").read_bytes() == zoo.body


def test_a_truncated_download_leaves_nothing(zoo, tmp_path):
    zoo.promised = len(zoo.body) + 10
    lengths = f"{len(zoo.body)} of {zoo.promised}"
    with pytest.raises(ValueError, match=rf"/x.pth could not be fetched \(.*{lengths}.*_ZOO_URL"):
        cached_download(f"{zoo.url}/x.pth")
    assert os.listdir(tmp_path / "cache") == []
    zoo.promised = None
    assert cached_download(f"{zoo.url}/x.pth").read_bytes() == zoo.body


def test_an_interrupted_download_leaves_nothing(zoo, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained.shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached_download(f"{zoo.url}/x.pth")
    assert os.listdir(tmp_path / "cache") == []


def test_a_file_that_is_not_there(zoo, tmp_path):
    with pytest.raises(
        ValueError, match=r"/missing.pth could not be fetched \(HTTP Error 404: Not Found\)"
    ):
        cached_download(f"{zoo.url}/missing.pth")
    assert os.listdir(tmp_path / "cache") == []


def test_offline(zoo, tmp_path):
    zoo.server_close()  # nobody listens on that port now
    with pytest.raises(ValueError) as caught:
        TinyViT.from_config("5m", pretrained=True)
    saved = tmp_path / "cache" / "tiny_vit_5m_22kto1k_distill.pth"
    url = f"{zoo.url}/zoo/checkpoints/{saved.name}"
    assert str(caught.value).startswith(f"{url} could not be fetched (")
    assert f"save it as {saved}, or give its path, or set TINYVIT_ZOO_URL" in str(caught.value)
    torch.save({"model": TinyViT.from_config("5m").state_dict()}, saved)
    TinyViT.from_config("5m", pretrained=True)  # the way out that the message names


def test_two_downloads_at_once(zoo, tmp_path):
    threads = [
        threading.Thread(target=cached_download, args=(f"{zoo.url}/x.pth",)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir(tmp_path / "cache")) == 1
