"""Weights in and out: reading checkpoints safely, naming schemes, fitting weights to a model, the
model zoo.

Checkpoints of the official release, of this project and of timm are read, as .pth or .safetensors,
from files, folders and links, and from the Hugging Face Hub.
No file can run code: only tensors, plain containers and the configuration node that some official
files hold are accepted. Checksums are tested where a file has such; `FILE@sha256=...` asks for one.
"""

import difflib
import errno
import http.client
import json
import os
import pickle
import re
import shutil
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import isqrt
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from models.class_map import map_22k_to_1k

StateDict = dict[str, torch.Tensor]

ZOO_NAMES = ("22k_distill", "22kto1k_distill", "1k")
CLIP_VARIANT = "clip_vit_large14_224"
_ZOO_URL = "https://github.com/wkcn/TinyViT-model-zoo/releases/download"
_VARIANTS = ("5m", "11m", "21m", "21m_384", "21m_512")
_WEIGHT_KEYS = ("model_state_dict", "state_dict", "model")  # the first found is taken
_EMA_KEYS = ("ema", "state_dict_ema", "model_ema")
# what DistributedDataParallel and torch.compile put before every name
_WRAPPERS = ("module.", "_orig_mod.")
_OPTIONAL = "num_batches_tracked"  # a counter that no output depends on; files of old have none
_RECOMPUTED = "attention_bias_idxs"  # a buffer of official files that the window size tells
_TIMEOUT = 30  # seconds without a byte
PIN = "@sha256="  # between a file's name and the beginning of its digest
_DIGEST = "tensors_sha256"  # where the metadata of our safetensors have it
_NOTES = "notes"  # and what `read_notes` gives, as JSON
_NOTE_KINDS = {"config": str, "class_names": list, "progress": dict, "sources": dict}
HUB = "hf-hub:"  # before user/repository[@revision], as timm writes it
WEIGHTS_FILE = "model.safetensors"  # in a repository or a folder

# timm numbers the two convolutions of the stem, and counts a merging layer to the stage after it
_OURS_TO_TIMM = {
    r"^patch_embed\.seq\.(\d)": lambda found: f"patch_embed.conv{int(found[1]) // 2 + 1}",
    r"^layers\.(\d+)\.downsample": lambda found: f"stages.{int(found[1]) + 1}.downsample",
    r"^layers\.": "stages.",
    r"^head\.": "head.fc.",
    r"^norm_head\.": "head.norm.",
    r"\.c\.(weight|bias)$": r".conv.\1",
}
_TIMM_TO_OURS = {
    r"^patch_embed\.conv(\d)": lambda found: f"patch_embed.seq.{int(found[1]) * 2 - 2}",
    r"^stages\.(\d+)\.downsample": lambda found: f"layers.{int(found[1]) - 1}.downsample",
    r"^stages\.": "layers.",
    r"^head\.norm\.": "norm_head.",
    r"^head\.fc\.": "head.",
    r"\.conv\.(weight|bias)$": r".c.\1",
}


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's weights in a model."""

    source: str
    loaded: int  # tensors taken as they are
    adapted: tuple[str, ...] = ()  # tensors taken in another shape, each with what was done
    zeroed: tuple[str, ...] = ()  # tensors of the head that the file lacks, each with the reason
    missing: tuple[str, ...] = ()  # counters that the file lacks; they keep their values
    unexpected: tuple[str, ...] = ()  # tensors of the file that have no place in the model

    def __str__(self) -> str:
        kinds = {
            "adapted": self.adapted,
            "head set to zero": self.zeroed,
            "not in the file": self.missing,
            "not in the model": self.unexpected,
        }
        lines = [f"weights of {self.source}: {self.loaded} tensors loaded"]
        lines += [f"  {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
        return "\n".join(lines)

    def brief(self) -> str:
        """The report on one line, without the names of tensors."""
        loaded, *others = str(self).splitlines()
        return ",".join([loaded, *(line.partition(":")[0][1:] for line in others)])


def read_state_dict(
    source: str | Path, *, ema: bool = False, log: Callable[[str], None] | None = None
) -> StateDict:
    """The weights in a checkpoint file or behind a URL, without wrappers; `ema` asks for the
    averaged ones.

    Without `ema` averaged weights are taken only where there are no others. `log` is told the
    digest of a file that has no checksums of its own.
    """
    content, path, digest = read_file(source)
    if digest and log:
        log(f"{path}: without checksums; {PIN}{digest} behind its name asks for this very file")
    return unwrap(content, path, ema)


def read_notes(source: str | Path) -> dict[str, object]:
    """What a checkpoint of a training of ours, or an export of one, tells beside its weights:
    `config`, its YAML, `class_names`, `progress` and `sources`; others tell nothing.
    """
    content, path, _ = read_file(source)
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(_NOTES, "{}"))
    notes = content if isinstance(content, Mapping) else {}
    return {
        key: notes[key] for key, kind in _NOTE_KINDS.items() if isinstance(notes.get(key), kind)
    }


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, torch.Tensor],
    *,
    exact: bool = False,
    label: str = "",
    log: Callable[[str], None] = print,
) -> LoadReport:
    """Load weights from a file, a URL or a state dict into a model, and say what was done.

    The naming (ours or timm's) is converted as needed. Unless `exact`, attention biases are
    interpolated to the model's windows, a 22k head becomes a 1k head through the class map, and a
    head of any other size is set to zero. A tensor that the model needs and cannot get is an error;
    with `exact` so is one that it has no place for. `label` names the weights in messages.
    """
    if isinstance(source, Mapping):
        state = _without_wrappers(source)
        label = label or "the given state dict"
    else:
        state = read_state_dict(source, log=log)
        label = label or str(source)
    targets = model.state_dict()
    state = _in_naming_of(
        targets, {key: value for key, value in state.items() if not key.endswith(_RECOMPUTED)}
    )
    head = () if exact else tuple(f"{name}." for name in classifier_names(model))

    fitting: StateDict = {}
    adapted, zeroed, missing, misfits = [], [], [], []
    for key, target in targets.items():
        value = state.get(key)
        if value is not None and not (_are_of_a_kind(value, target) or key.endswith(_OPTIONAL)):
            misfits.append(f"{key} is {value.dtype}, the model's {target.dtype}")
        elif value is not None and value.shape == target.shape:
            fitting[key] = value
        elif key.startswith(head):
            given = "not in the file" if value is None else f"{list(value.shape)} in the file"
            what = f"{key} ({given}, {list(target.shape)} here)"
            if _is_22k_head_for_1k(value, target):
                fitting[key] = _head_rows(value)
                adapted.append(what)
            else:
                fitting[key] = torch.zeros_like(target)
                zeroed.append(what)
        elif value is None and key.endswith(_OPTIONAL):
            missing.append(key)
        elif value is None:
            misfits.append(f"{key} is missing")
        elif not exact and key.endswith("attention_biases") and _are_windows(value, len(target)):
            fitting[key] = resize_attention_biases(value, target.shape[1])
            adapted.append(f"{key} (window {isqrt(value.shape[1])} to {isqrt(target.shape[1])})")
        else:
            misfits.append(f"{key} is {list(value.shape)}, the model's {list(target.shape)}")
    unexpected = [key for key in state if key not in targets]
    if exact:
        misfits += [f"{key} has no place" for key in unexpected]
    if misfits:
        shown = "; ".join(misfits[:6])
        if len(misfits) > 6:
            shown += f"; and {len(misfits) - 6} more"
        reason = _another_kind(targets, state, label) or (
            f"{shown}. Check that the model's configuration, MODEL.NUM_CLASSES as well, is the"
            " weights' own (a training's is --cfg config.yaml in its folder)"
        )
        raise ValueError(f"{label} does not fit {type(model).__name__}: {reason}")

    model.load_state_dict(fitting, strict=False)
    loaded = len(fitting) - len(adapted) - len(zeroed)
    report = LoadReport(
        label, loaded, tuple(adapted), tuple(zeroed), tuple(missing), tuple(unexpected)
    )
    log(str(report))
    return report


def save_weights(
    model: nn.Module,
    path: str | Path,
    *,
    naming: Callable[[StateDict], StateDict] = dict,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Write a model's weights as safetensors, with notes for `read_notes` if there are some; the
    file is whole or not there. `naming` is to_timm for timm's names.
    """
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in naming(model.state_dict()).items()
    }
    told = {_DIGEST: weights_digest(state)}
    if notes:
        told[_NOTES] = json.dumps(notes)
    temporary = Path(f"{path}.tmp")
    try:
        safetensors.torch.save_file(state, temporary, told)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:  # how it tells of a full disk
        raise OSError(f"{path}: the weights can't be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of a model's state, in hex: names, types, shapes and bytes, by name."""
    digest = sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_pretrained(
    model: nn.Module, variant: str, which: str, log: Callable[[str], None] = print
) -> LoadReport:
    """Download official weights once and load them: variant as in TinyViT.from_config, `which` one
    of ZOO_NAMES.
    """
    return load_weights(model, zoo_url(variant, which), log=log)


def zoo_url(variant: str, which: str) -> str:
    """Where the model zoo keeps a variant's weights; the environment variable TINYVIT_ZOO_URL names
    a mirror.

    21m_384 and 21m_512 have weights of their own for 22kto1k_distill, else they start from 21m's.
    The teacher is ("clip_vit_large14_224", "22k").
    """
    base = os.environ.get("TINYVIT_ZOO_URL", _ZOO_URL).rstrip("/")
    if (variant, which) == (CLIP_VARIANT, "22k"):
        return f"{base}/pretrained_teacher/clip_vit_large_patch14_22k.pth"
    if variant not in _VARIANTS or which not in ZOO_NAMES:
        raise ValueError(
            f"the model zoo has no {which!r} weights for {variant!r}: it has {', '.join(ZOO_NAMES)}"
            f" for {', '.join(_VARIANTS)}, and 22k for {CLIP_VARIANT}"
        )
    size, _, resolution = variant.partition("_")
    if resolution and which == "22kto1k_distill":
        return f"{base}/checkpoints/tiny_vit_21m_22kto1k_{resolution}_distill.pth"
    return f"{base}/checkpoints/tiny_vit_{size}_{which}.pth"


def cached_download(url: str | Path) -> Path:
    """The local copy of a URL's file, fetched on first use into TINYVIT_CACHE or torch.hub's
    folder; it is whole or not there.
    """
    url = str(url)
    folder = os.environ.get("TINYVIT_CACHE") or f"{torch.hub.get_dir()}/checkpoints"
    folder = Path(folder).expanduser()
    name = Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name or "weights"
    # other sites' names may coincide
    if not name.startswith(("tiny_vit_", "clip_vit_large_patch14_22k")):
        name = f"{Path(name).stem}-{sha256(url.encode()).hexdigest()[:8]}{Path(name).suffix}"
    target = folder / name
    if target.is_file():
        return target
    partial = folder / f"{name}.{uuid.uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, partial.open("xb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(
                response, "read", total=size or None, desc=name, disable=None
            ) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
            if size and file.tell() != size:
                raise OSError(f"the connection ended after {file.tell()} of {size} bytes")
        os.replace(partial, target)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(
            f"{url} could not be fetched ({error}). Fetch it by other means and save it as"
            f" {target}, or give its path, or set TINYVIT_ZOO_URL to a mirror of the model zoo"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def hub_file(place: str, name: str = WEIGHTS_FILE) -> Path:
    """The local copy of a file of the Hub's hf-hub:user/repository[@revision], in the cache that
    timm and others share.
    """
    repository, _, revision = place.removeprefix(HUB).partition("@")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, name, revision=revision or None))
    except Exception as error:  # the client has many of its own, and may not be installed
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise ValueError(
            f"{place}: {name} could not be fetched ({reason}). Correct the name, or without a"
            " connection fetch the file elsewhere and give its path"
        ) from None


def to_timm(state: Mapping[str, torch.Tensor]) -> StateDict:
    """Official names to those of timm.models.tiny_vit."""
    return _renamed(state, _OURS_TO_TIMM)


def from_timm(state: Mapping[str, torch.Tensor]) -> StateDict:
    """The names of timm.models.tiny_vit to the official ones."""
    return _renamed(state, _TIMM_TO_OURS)


def resize_attention_biases(biases: torch.Tensor, positions: int) -> torch.Tensor:
    """Attention biases [heads, side^2] for another window of `positions` offsets: bicubic, head by
    head.
    """
    old = isqrt(biases.shape[1])
    new = isqrt(positions)
    grid = biases.float().view(1, -1, old, old)
    resized = functional.interpolate(grid, size=(new, new), mode="bicubic")
    return resized.view(-1, positions).to(biases.dtype)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that turn features into classes, as far as they have parameters."""
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
        heads = found if isinstance(found, (tuple, list)) else [found]
    else:
        usual = [getattr(model, name, None) for name in ("head", "fc", "classifier")]
        heads = [part for part in usual if isinstance(part, nn.Module)][:1]
    return tuple(
        name
        for name, module in model.named_modules()
        if any(module is head for head in heads) and next(module.parameters(), None) is not None
    )


def head_classes(model: nn.Module, state: Mapping[str, torch.Tensor]) -> int:
    """The number of classes that a state dict's head has, for a model of its kind; 0 if it has
    none.
    """
    state = _in_naming_of(model.state_dict(), dict(state))
    for name in classifier_names(model):
        if f"{name}.weight" in state:
            weight = state[f"{name}.weight"]
            return len(weight) if weight.ndim and weight.numel() else 0
    return 0


def _renamed(
    state: Mapping[str, torch.Tensor], rules: Mapping[str, str | Callable[[re.Match], str]]
) -> StateDict:
    names = {}
    for key, value in state.items():
        if key.endswith(_RECOMPUTED):
            continue
        name = key
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        names[name] = value
    return names


def _in_naming_of(targets: Mapping[str, torch.Tensor], state: StateDict) -> StateDict:
    ours, timms = "patch_embed.seq.0.c.weight", "patch_embed.conv1.conv.weight"
    if ours in targets and timms in state:
        return from_timm(state)
    if timms in targets and ours in state:
        return to_timm(state)
    return state


def _another_kind(targets: Mapping[str, torch.Tensor], state: StateDict, label: str) -> str:
    """Why weights are of a TinyViT where the model is none, or the other way; "" if neither."""
    from timm import is_model  # slow to import

    stem = "patch_embed.seq.0.c.weight"
    if stem in state and stem not in targets:
        return "it holds a TinyViT: take a recipe of MODEL.TYPE tiny_vit"
    if stem in targets and stem not in state:
        name = next(
            filter(is_model, re.findall(r"\w+", label.rpartition("/")[2])), "to what timm calls it"
        )
        return (
            f"it holds no TinyViT (the first tensor is {next(iter(state), None)}): for the weights"
            f" of a timm model set MODEL.TYPE timm MODEL.NAME {name}"
        )
    return ""


def _is_22k_head_for_1k(value: torch.Tensor | None, target: torch.Tensor) -> bool:
    given = None if value is None else value.shape
    return given == (21841, *target.shape[1:]) and len(target) == 1000


def _are_of_a_kind(value: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether both are fractions or neither, so that taking the one for the other cuts nothing."""
    return value.is_floating_point() == target.is_floating_point()


def _are_windows(value: torch.Tensor, heads: int) -> bool:
    """Whether these are attention biases [heads, side^2]."""
    return value.ndim == 2 and len(value) == heads and isqrt(value.shape[1]) ** 2 == value.shape[1]


def _head_rows(value: torch.Tensor) -> torch.Tensor:
    """A head of 21,841 classes cut to 1,000 by the class map; an absent class gets the mean of the
    others.
    """
    mapping = torch.from_numpy(map_22k_to_1k())
    rows = value[mapping.clamp(min=0)]
    rows[mapping < 0] = rows[mapping >= 0].mean(0)
    return rows


def read_file(source: str | Path) -> tuple[object, Path, str]:
    """What a checkpoint file, or one behind a URL, holds; where it lies; and its sha256, but ""
    where it has checksums of its own, which are tested.

    A ValueError says why it can't be used, an OSError why not now.
    """
    place, is_pinned, pin = str(source).partition(PIN)
    if place.startswith(HUB):
        path = hub_file(place)
    else:
        path = cached_download(place) if _is_url(place) else Path(os.path.expanduser(place))
    if (path / WEIGHTS_FILE).is_file():
        path = path / WEIGHTS_FILE
    if path.is_dir():
        found = [*path.glob("*.pth"), *path.glob("checkpoints/*.pth")]
        if not found:
            raise ValueError(f"{path}: is a folder without checkpoints (*.pth): name a file")
        named = max(found, key=lambda file: (file.stem == "best", file.stem))
        raise ValueError(f"{path}: is a folder, name a checkpoint in it, such as {named}")
    if not path.is_file():
        known = [*ZOO_NAMES, *map(str, path.parent.glob("*"))]
        near = difflib.get_close_matches(str(path), known, n=1)
        hint = ""
        if near:
            kind = " (of MODEL.TYPE tiny_vit)" * (near[0] in ZOO_NAMES)
            hint = f"; did you mean {near[0]}{kind}?"
        raise ValueError(f"{path}: there is no such checkpoint file (looked in {Path.cwd()}){hint}")
    load = _load_safetensors if path.suffix == ".safetensors" else _load_plain
    try:
        content, is_tested = load(path)
        digest = "" if is_tested and not is_pinned else _file_digest(path)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {found[1]}" if found else "it is no checkpoint, or a damaged one"
        raise ValueError(
            f"{path}: refused: {what}; weights are plain tensors, and nothing else in a file is"
            " run. If you trust it, load it elsewhere and save model.state_dict() alone"
        ) from None
    except Exception as error:  # whatever the bytes of a damaged file lead the readers to
        number = getattr(error, "errno", None) or errno.EIO
        # Only of a damaged zip is a place before the file's beginning looked for, which is EINVAL.
        if isinstance(error, (OSError, MemoryError)) and number != errno.EINVAL:
            fault = f"this checkpoint can't be read now ({error})"
            raise OSError(number, fault, str(path)) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a checkpoint, or a damaged one ({reason})") from None
    if is_pinned and not (len(pin) >= 8 and digest.startswith(pin.lower())):
        raise ValueError(
            f"{path}: its sha256 is {digest}, not {pin!r}: give the file that was meant, or"
            f" {PIN} and at least 8 digits of this one"
        )
    return content, path, "" if is_tested else digest


def _load_safetensors(path: Path) -> tuple[StateDict, bool]:
    """The tensors of a file, and whether it has told their digest, as `save_weights` does."""
    with safetensors.safe_open(path, framework="pt") as file:
        names = file.keys()
        state = {name: file.get_tensor(name) for name in names}
        told = (file.metadata() or {}).get(_DIGEST)
    if told and told != weights_digest(state):
        raise ValueError("its tensors are not those that were written")
    return state, told is not None


def _load_plain(path: Path) -> tuple[object, bool]:
    """Unpickle tensors and plain containers, and say whether there were checksums to test; the
    configuration nodes of official checkpoints are read as dictionaries.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # as torch tells them from older files
    if is_zip:
        # torch does not compare checksums: without this a flipped bit would become a weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # of what is marked as a folder torch reads nothing, and leaves the memory as it was
            folders = [info for info in archive.infolist() if info.external_attr & 0x10]
        if damaged or folders:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}" if damaged else "folders in it")
    stand_ins = [
        type(name, (), {"__module__": module, "__new__": lambda cls: OrderedDict()})
        for module, name in (("yacs.config", "CfgNode"), ("argparse", "Namespace"))
    ]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True), is_zip


def _file_digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unwrap(content: object, path: Path, ema: bool, depth: int = 4) -> StateDict:
    """The state dict inside a checkpoint's content, at most so deep."""
    if isinstance(content, Mapping):
        for key in _EMA_KEYS if ema else _WEIGHT_KEYS + _EMA_KEYS:
            if depth and isinstance(content.get(key), Mapping):
                return unwrap(content[key], path, False, depth - 1)
        if ema:
            raise ValueError(f"{path}: it holds no averaged weights (TRAIN.EMA_DECAY was 0)")
        if content and all(
            isinstance(key, str) and isinstance(value, torch.Tensor)
            for key, value in content.items()
        ):
            _check_tensors(content, path)
            return _without_wrappers(content)
    held = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        held = f"keys {', '.join(map(str, list(content)[:8]))}"[:200]
    raise ValueError(
        f"{path}: no weights found, only {held}: expected a state dict, alone or under"
        f" {' or '.join(reversed(_WEIGHT_KEYS))}"
    )


def _check_tensors(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise a ValueError unless all are dense numbers of which the file holds every one."""
    for key, value in state.items():
        is_dense = value.layout == torch.strided and not (value.is_nested or value.is_quantized)
        is_plain = is_dense and not (value.is_meta or value.is_complex())
        if not is_plain or value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {key} is not a dense tensor of real numbers that are all in the file"
                f" ({value.dtype}, {value.layout}, {value.device})"
            )


def _without_wrappers(state: Mapping[str, torch.Tensor]) -> StateDict:
    # torch.optim.swa_utils.AveragedModel's counter
    state = {key: value for key, value in state.items() if key != "n_averaged"}
    for prefix in _WRAPPERS * 2:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_url(source: str | Path) -> bool:
    return isinstance(source, str) and re.match(r"[a-z]+://", source) is not None
