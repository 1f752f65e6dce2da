"""Ours against timm's tiny_vit with the same weights: evaluation and training steps in float32 and
bfloat16, turn by turn in one run.

    python -m benchmarks.model --variant 21m --device cuda --batch 128

`as constructed` is what a user gets without asking. `best` is the quickest mode of each side: for
evaluation batch norm folded into convolutions, channels-last memory, with --compile torch.compile
on top of these. Ratios above 1 mean that ours is faster.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from benchmarks.timing import alternate, machine, report
from models.pretrained import to_timm
from models.tiny_vit import VARIANTS, TinyViT

TIMM_NAMES = {
    variant: f"tiny_vit_{variant}" if "_" in variant else f"tiny_vit_{variant}_224"
    for variant in VARIANTS
}


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each task and type."""
    device = torch.device(options.device)
    ours = TinyViT.from_config(options.variant, drop_path_rate=0.0).to(device)
    theirs = timm.create_model(
        TIMM_NAMES[options.variant], num_classes=1000, drop_path_rate=0.0
    ).to(device)
    theirs.load_state_dict(to_timm(ours.state_dict()))
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=device)
    with torch.inference_mode():
        difference = (ours.eval()(images[:2]) - theirs.eval()(images[:2])).abs().max().item()
    for task in ("evaluation", "training step"):
        build_sides = evaluation_sides if task == "evaluation" else training_sides
        sides = build_sides(ours, theirs, options.compile)
        for dtype in options.dtypes:
            steps = {name: step(model, images, task, dtype) for name, model in sides.items()}
            row = {"task": task, "dtype": dtype, **compare(timed(steps, options))}
            print(line(row, options.batch), file=sys.stderr, flush=True)
            yield {**row, "memory_gb": memories(steps, device), "largest_difference": difference}


def evaluation_sides(ours: nn.Module, theirs: nn.Module, compiled: bool) -> dict[str, nn.Module]:
    """Both sides as constructed, and with every means that leaves the outputs equal."""
    fused = deepcopy(ours).eval().fuse()
    tuned = reparameterize_model(theirs.eval()).to(memory_format=torch.channels_last)
    sides = {
        "ours": ours.eval(),
        "timm": theirs.eval(),
        "ours fused": fused,
        "timm fused channels-last": tuned,
    }
    return sides | compilations(fused, tuned) if compiled else sides


def training_sides(ours: nn.Module, theirs: nn.Module, compiled: bool) -> dict[str, nn.Module]:
    """Both sides as constructed, timm's also channels-last; ours is so already."""
    tuned = deepcopy(theirs.train()).to(memory_format=torch.channels_last)
    sides = {"ours": ours.train(), "timm": theirs, "timm channels-last": tuned}
    return sides | compilations(deepcopy(ours).train(), tuned) if compiled else sides


def compilations(ours: nn.Module, theirs: nn.Module) -> dict[str, nn.Module]:
    """The same models, compiled."""
    return {"ours compiled": torch.compile(ours), "timm compiled": torch.compile(deepcopy(theirs))}


def step(model: nn.Module, images: Tensor, task: str, dtype: str) -> Callable[[], None]:
    """One forward pass, or a forward and a backward pass; bfloat16 means autocast, as in this
    project's own runs.
    """

    training = task == "training step"
    narrow = dtype == "bfloat16"

    def run() -> None:
        autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=narrow)
        with torch.inference_mode(not training), autocast:
            logits = model(images)
        if training:
            model.zero_grad(set_to_none=True)
            logits.float().logsumexp(1).mean().backward()

    return run


def timed(
    steps: dict[str, Callable[[], None]], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Seconds of each side; as many rounds as fit into the time for a row, from 3 to --repeats."""
    # what CUDA and compilers do once is not to be counted
    warmup = alternate(steps, repeats=1, warmup=options.compile or options.device != "cpu")
    round_seconds = sum(times["median"] for times in warmup.values())
    return alternate(
        steps, repeats=max(3, min(options.repeats, int(options.seconds / round_seconds))), warmup=0
    )


def memories(steps: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """The most that a step of each side adds to what lies on the GPU, in GB."""
    if device.type != "cuda":
        return {}
    found = {}
    for name, run in steps.items():
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        found[name] = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    return found


def compare(times: dict[str, dict[str, float]]) -> dict[str, object]:
    """Times of all modes, and how many times as long timm takes, as constructed and in each side's
    best mode.
    """
    medians = {name: values["median"] for name, values in times.items()}
    ours = min((name for name in times if name.startswith("ours")), key=medians.get)
    theirs = min((name for name in times if name.startswith("timm")), key=medians.get)
    return {
        "seconds": times,
        "ratio_as_constructed": medians["timm"] / medians["ours"],
        "best": [ours, theirs],
        "ratio_best": medians[theirs] / medians[ours],
    }


def line(row: dict, batch: int) -> str:
    """A row for people: images per second of both sides and their ratio."""

    def rate(name: str) -> str:
        times = row["seconds"][name]
        return f"{batch / times['median']:.1f} ±{100 * times['spread'] / times['median']:.0f}%"

    ours, theirs = row["best"]
    return (
        f"{row['task']:<13} {row['dtype']:<8}  as constructed: {rate('ours')} against timm's"
        f" {rate('timm')} images/s, x{row['ratio_as_constructed']:.2f}  best: {ours} {rate(ours)},"
        f" {theirs} {rate(theirs)}, x{row['ratio_best']:.2f}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, default="5m")
    parser.add_argument(
        "--image-size", type=int, default=0, help="pixels a side; 0 = the variant's own"
    )
    parser.add_argument(
        "--batch", type=int, default=0, help="images of a step; 0 = 128 on CUDA, else 4"
    )
    parser.add_argument(
        "--repeats", type=int, default=20, help="largest number of rounds for a row"
    )
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="time for a row, as far as 3 rounds allow"
    )
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=on_cuda,
        help="time compiled models too; takes minutes",
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args(argv)
    options.image_size = options.image_size or VARIANTS[options.variant].get("img_size", 224)
    options.batch = options.batch or (128 if options.device.startswith("cuda") else 4)
    return options


def main() -> None:
    options = parse()
    rows = list(measure(options))
    report({"benchmark": "model", "machine": machine(), "settings": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
