"""What must hold on a GPU, as checks that `python -m benchmarks.gpu` runs first: each is a
generator of {name: {"passed": bool, "line": str}}.

They take the arguments of benchmarks.distill and an empty folder, and run on any device.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import Process
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import main
from benchmarks.augment import open_photo, photo
from benchmarks.distill import prepare, ways
from benchmarks.executor import begin
from configs import load_config
from data.augment import AugmentDecoder
from data.augment.pairs import BatchMix, PairMix
from data.augment.rng import sample_seed
from models.tiny_vit import Attention, window_offsets
from utils import Exit, choose_device

Verdict = dict[str, dict[str, object]]
ROOT = Path(main.__file__).parent
RECIPES = {  # whose pictures must be Pillow's
    "default": "",
    "AutoAugment": "AUG.AUTO_AUGMENT original AUG.REMODE rand AUG.RECOUNT 3",
    "384 px": "DATA.IMG_SIZE 384 DATA.INTERPOLATION random",
    "colours": "AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0.4 AUG.VFLIP 0.5 AUG.REMODE const",
}
BY_HEART = (
    "AUG.MIXUP 0.0 AUG.CUTMIX 0.0 AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0.0 AUG.REPROB 0.0"
    " AUG.SCALE (1.0,1.0) AUG.RATIO (1.0,1.0) AUG.HFLIP 0.0 MODEL.LABEL_SMOOTHING 0.0"
    " MODEL.DROP_PATH_RATE 0.0 PRINT_FREQ 1 TEST.EVERY 1000"
)
EXACT = "TRAIN.DETERMINISTIC True TRAIN.EMA_DECAY 0.9 MODEL.DROP_PATH_RATE 0.1 PRINT_FREQ 1"
KEPT = ("model", "model_ema", "optimizer", "scaler", "progress", "measured")  # of a checkpoint
WINDOWS = (7, 14, 24)


def verdict(name: str, passed: bool, line: str) -> Verdict:
    """What a check has found."""
    return {name: {"passed": bool(passed), "line": line}}


def waiting(args: argparse.Namespace, folder: Path) -> Iterator[Verdict]:
    """Between lines of the log no step waits for the device."""
    device = choose_device(args.device)
    prepare(args, folder)
    for mode, words in ways(args, folder).items():
        run, batches = begin(words, device)

        def steps(number: int, run=run, batches=batches) -> None:
            for _ in range(number):
                run.meters.add(main.train_step(run, batches))
                run.progress.step += 1
                run.scheduler.step_update(run.progress.step)

        steps(3)  # kernels are chosen, memory is given out
        fault = fault_without_waiting(lambda steps=steps: steps(3), device)
        yield verdict(f"nothing waits, {mode}", not fault, fault or "3 steps in debug mode error")


def fault_without_waiting(function: Callable[[], None], device: torch.device) -> str:
    """Run a function; where in our code it made the host wait for the GPU, if it did."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
        return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}: {str(error).splitlines()[0]}"
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ""


def bits(args: argparse.Namespace, folder: Path) -> Iterator[Verdict]:
    """Pictures and mixes are to the last bit those of Pillow and the CPU."""
    device = choose_device(args.device)
    images = [open_photo(photo(index)) for index in range(args.batch_size)]
    images = [image.crop((0, 0, 500 - 8 * i, 375)) for i, image in enumerate(images)]
    seeds = [sample_seed(0, 0, index) for index in range(len(images))]
    for name, words in RECIPES.items():
        decoder = AugmentDecoder.from_config(load_config(["--opts", *words.split()]))
        expected = torch.stack([*map(decoder.decode, images, seeds)])
        found = decoder.decode_batch(images, seeds, device).cpu()
        yield same(f"bits of {name}", found, expected)
    cfg = load_config(["--opts", "MODEL.NUM_CLASSES", "1000", "AUG.MIXUP_PROB", "0.8"])
    batch, labels = expected, torch.arange(len(images))
    for mixer, seed in ((PairMix, seeds), (BatchMix, 3)):
        mix = mixer.from_config(cfg)
        for expected, found in zip(
            mix(batch, labels, seed), mix(batch.to(device), labels.to(device), seed)
        ):
            kind = "images" if found.ndim == 4 else "targets"
            yield same(f"bits of {mixer.__name__}'s {kind}", found.cpu(), expected)


def same(name: str, found: Tensor, expected: Tensor) -> Verdict:
    """Whether two batches are equal to the last bit."""
    bad = [i for i, (a, b) in enumerate(zip(found, expected)) if not torch.equal(a, b)]
    line = f"{len(bad)} of {len(expected)} differ" if bad else f"{len(expected)} are equal"
    return verdict(name, not bad, line)


def bias_gradient(args: argparse.Namespace, folder: Path) -> Iterator[Verdict]:
    """The gradient of the attention bias is summed in float32, and near that of float64."""
    device = choose_device(args.device)
    for window in WINDOWS:
        torch.manual_seed(0)
        layer = Attention(64, 2, window)
        with torch.no_grad():
            layer.attention_biases.normal_()
        offsets = window_offsets(window, torch.device("cpu"))
        x = torch.randn(args.batch_size, window**2, 64)
        exact = gradient(layer.double(), x.double(), offsets, None)[0]
        layer, offsets = layer.float().to(device), offsets.to(device)
        found, of_mask = gradient(layer, x.to(device), offsets, torch.bfloat16)
        summed = torch.zeros_like(exact).index_add_(
            1, offsets.cpu(), of_mask.sum(0).flatten(1).double().cpu()
        )
        found = found.double().cpu()
        of_sum, of_all = (float((found - g).norm() / g.norm()) for g in (summed, exact))
        line = f"{of_sum:.1e} from its terms' sum, {of_all:.1e} from float64 throughout"
        yield verdict(f"bias gradient, window {window}", of_sum < 1e-5 and of_all < 0.05, line)


def gradient(layer, x: Tensor, offsets: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The gradients of a layer's biases and of the mask that is made of them."""
    masks, attend = [], F.scaled_dot_product_attention

    def noted(*tensors: Tensor, attn_mask: Tensor) -> Tensor:
        attn_mask.retain_grad()
        masks.append(attn_mask)
        return attend(*tensors, attn_mask=attn_mask)

    with (
        patch.object(F, "scaled_dot_product_attention", noted),
        torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        layer.zero_grad()
        layer(x, offsets).float().square().mean().backward()
    return layer.attention_biases.grad.clone(), masks[0].grad


def trains(args: argparse.Namespace, folder: Path) -> Iterator[Verdict]:
    """A few images are learnt by heart, in each precision and compiled."""
    args = argparse.Namespace(**{**vars(args), "images": args.batch_size})
    rate = 1e-3 * 512 / args.batch_size  # which the program divides by as much
    words = f"TRAIN.EPOCHS {updates(args) * 12} TRAIN.BASE_LR {rate}"
    for name, own in {
        "bf16": "AMP_DTYPE bf16",
        "fp16": "AMP_DTYPE fp16",
        "compiled": "TRAIN.COMPILE True",
    }.items():
        code = train(args, folder, "labels", name, BY_HEART, words, own)
        losses = [line["loss"] for line in metrics(folder, args, name) if "lr" in line]
        passed = code == 0 and all(map(math.isfinite, losses)) and losses[-1] < 0.7 * losses[0]
        line = f"exit code {code}, {len(losses)} updates, loss {losses[0]:.3f} -> {losses[-1]:.3f}"
        log = (place(folder, args, name) / "log_rank0.txt").read_text()
        if found := re.search(r"torch\.compile unavailable.*", log):
            passed, line = False, found[0]
        yield verdict(f"trains, {name}", passed, line)


def exact(args: argparse.Namespace, folder: Path) -> Iterator[Verdict]:
    """Stored is online and resumed is uninterrupted, to the last bit of what a checkpoint holds."""
    started(prepare, args, folder, 2, "TRAIN.DETERMINISTIC", "True").join()
    codes = {mode: train(args, folder, mode, mode, EXACT) for mode in ("stored", "online")}
    stop = (signal.SIGTERM, updates(args) * 2 // 3)
    codes["stopped"] = train(args, folder, "stored", "resumed", EXACT, stop=stop)
    codes["resumed"] = train(args, folder, "stored", "resumed", EXACT)
    expected = {"stored": 0, "online": 0, "stopped": 75, "resumed": 0}
    yield verdict("programs end as they should", codes == expected, f"exit codes {codes}")
    for name, other in (("stored = online", "online"), ("resumed = uninterrupted", "resumed")):
        one, two = (state(folder, args, tag) for tag in ("stored", other))
        bad = [key for key in KEPT for key in differences(one[key], two[key], key)]
        line = f"{len(bad)} differences, first {bad[0]}" if bad else "every bit is equal"
        done = one["step"] == updates(args)
        yield verdict(name, done and not bad, f"{one['step']} updates: {line}")


def ranks(args: argparse.Namespace, folder: Path) -> Iterator[Verdict]:
    """Two processes train; where one was killed the same command goes on."""
    if args.device == "cuda" and args.gpus < 2:
        yield {"two processes": {"passed": None, "line": "not tried: one GPU"}}
        return
    port = str(20000 + os.getpid() % 10000)
    for name, stop in (("one is killed", (signal.SIGKILL, updates(args) // 4)), ("to the end", ())):
        group = []
        for rank in (0, 1):
            words = [*ways(args, folder)["labels"], *BY_HEART.split()]
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            places = dict(zip(names, (str(rank), str(rank), "2", "127.0.0.1", port)))
            group.append(started(program, words, *(stop if rank else ()), **places))
        group[1].join()
        begun = time.monotonic()
        group[0].join(30)  # as long as torchrun waits for the others
        seconds = time.monotonic() - begun
        waits = group[0].is_alive()
        for process in group:
            process.kill()
            process.join()
        codes = [process.exitcode for process in group]
        passed = codes == ([Exit.FAULT, -signal.SIGKILL] if stop else [0, 0])
        line = f"exit codes {codes}, rank 0 {seconds:.1f} s after rank 1"
        if waits:
            line = f"rank 0 still waited after {seconds:.0f} s and was killed"
            if stop and args.device == "cuda":  # which NCCL does for 30 minutes
                passed = None
        yield {f"two processes, {name}": {"passed": passed, "line": line}}


def updates(args: argparse.Namespace) -> int:
    """Of the two epochs of a training."""
    return 2 * (args.images // args.batch_size)


def train(
    args: argparse.Namespace, folder: Path, mode: str, tag: str, *words: str, stop: tuple = ()
) -> int | None:
    """The exit code of main.py, in a process of its own."""
    words = [*ways(args, folder)[mode], "TAG", tag, *" ".join(words).split()]
    process = started(program, words, *stop)
    process.join()
    return process.exitcode


def program(words: list[str], number: int = 0, update: int = 0) -> int:
    """main.py, sent a signal before an update if one is named."""
    step = main.train_step

    def meeting(run: main.Training, batches: Iterator) -> dict[str, Tensor]:
        if run.progress.update == update:
            os.kill(os.getpid(), number)
        return step(run, batches)

    with patch.object(main, "train_step", meeting if number else step):
        return main.main(words)


def started(function: Callable[..., Any], *args: Any, **environment: str) -> Process:
    """A function in a fresh process, which ends with its result as the exit code."""
    process = multiprocessing.get_context("fork").Process(
        target=_call, args=(function, args, environment)
    )
    process.start()
    return process


def _call(function: Callable[..., Any], args: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    result = function(*args)
    sys.exit(result if isinstance(result, int) else 0)


def place(folder: Path, args: argparse.Namespace, tag: str) -> Path:
    """The folder of a run."""
    return folder / args.student / tag


def metrics(folder: Path, args: argparse.Namespace, tag: str) -> list[dict]:
    """The lines of a run's metrics."""
    return [*map(json.loads, (place(folder, args, tag) / "metrics.jsonl").read_text().splitlines())]


def state(folder: Path, args: argparse.Namespace, tag: str) -> dict[str, Any]:
    """A run's last checkpoint."""
    path = place(folder, args, tag) / "checkpoints" / "last.pth"
    return torch.load(path, "cpu", weights_only=True)


def differences(one: Any, other: Any, name: str) -> list[str]:
    """The names of what differs in nested containers, to the last bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [bad for k in one for bad in differences(one[k], other[k], f"{name}.{k}")]
    if isinstance(one, list) and isinstance(other, list):
        return differences(dict(enumerate(one)), dict(enumerate(other)), name)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if torch.equal(one, other) else [name]
    return [] if one == other else [name]
