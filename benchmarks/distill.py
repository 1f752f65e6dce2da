"""Training by labels, by stored logits and by an online teacher: seconds per epoch and peak memory,
in one run.

    python -m benchmarks.distill        # small, for two CPU cores: about 3 minutes
    python -m benchmarks.distill --student 5m --teacher timm:convnext_base --size 224 \\
        --images 20000 --batch-size 256 --workers 16

Each way is main.py's own `train_step` over its own loaders, in a process of its own; the processes
train an epoch in turn, so that the machine's mood hits all alike, and those that wait do nothing.
All three augment and mix the same images. Weights are random: what a teacher knows does not change
how long it takes. Memory is the process's peak, on CUDA the GPU's. The report goes to stdout as
JSON."""

import argparse
import contextlib
import multiprocessing
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import main
import save_logits
from benchmarks.timing import alternate, machine, report
from configs import argument_parser as base_parser
from configs import config_from_args, load_config
from data.replay import on_device
from logger import create_logger
from models.build import build_model, count_parameters
from models.checkpoints import save_atomic
from models.tiny_vit import count_multiply_adds
from utils import StopRequest, choose_kernels, init_distributed, peak_memory

MODES = ("labels", "stored", "online")
SHAPES = {  # name -> DEPTHS, NUM_HEADS, WINDOW_SIZES, EMBED_DIMS
    "tiny": ([1, 1, 1, 1], [1, 1, 1, 2], [2, 2, 4, 2], [16, 16, 32, 64]),
    "small": ([2, 2, 4, 2], [2, 4, 4, 8], [2, 2, 4, 2], [64, 64, 128, 256]),
}


def model_words(name: str) -> list[str]:
    """The options that make a model: tiny, small, 5m, 11m, 21m, or timm:NAME."""
    if name.startswith("timm:"):
        return ["MODEL.TYPE", "timm", "MODEL.NAME", name[5:]]
    if name in SHAPES:
        keys = ("DEPTHS", "NUM_HEADS", "WINDOW_SIZES", "EMBED_DIMS")
        return [
            "MODEL.NAME",
            name,
            *(
                str(word)
                for key, value in zip(keys, SHAPES[name])
                for word in (f"MODEL.TINY_VIT.{key}", value)
            ),
        ]
    cfg = load_config(
        ["--cfg", str(Path(main.__file__).parent / "configs" / "1k" / f"tiny_vit_{name}.yaml")]
    )
    return [
        "MODEL.NAME",
        name,
        *(
            str(word)
            for key, value in cfg.MODEL.TINY_VIT.items()
            for word in (f"MODEL.TINY_VIT.{key}", value)
        ),
    ]


def options(args: argparse.Namespace, folder: Path, name: str) -> list[str]:
    """What all runs share."""
    given = {
        "DATA.SHAPES.TRAIN_IMAGES": args.images,
        "DATA.SHAPES.VAL_IMAGES": 10,
        "DATA.SHAPES.SIZE": args.size * 8 // 7,
        "DATA.IMG_SIZE": args.size,
        "DATA.BATCH_SIZE": args.batch_size,
        "DATA.NUM_WORKERS": args.workers,
        "DATA.INDEX_DIR": folder / "index",
        "OUTPUT": folder,
        "TRAIN.EPOCHS": 1 + args.warmup + args.repeats,
        "DEVICE": args.device,
    }
    return [
        "--opts",
        *model_words(name),
        "DATA.DATASET",
        "shapes",
        "AUG.MIXUP_MODE",
        "pair2",
        "TRAIN.WARMUP_EPOCHS",
        "0",
        *(str(word) for pair in given.items() for word in pair),
    ]


def work(pipe: Connection, words: list[str]) -> None:
    """Train the epochs asked for, one at a time; answer each with the peak memory so far."""
    cfg = config_from_args(base_parser("").parse_args(words))
    world = init_distributed(cfg.DEVICE)
    choose_kernels(False, world.device)
    # whose logger has nothing to say
    run = main.build_training(cfg, world, create_logger(None, rank=1), StopRequest())
    pipe.send(None)
    while (epoch := pipe.recv()) is not None:
        main.set_training_mode(run.model, False, False)
        run.progress.epoch, run.progress.step = epoch, 0
        batches = on_device(run.loader.batches(epoch), world.device)
        for _ in range(run.loader.count(epoch)):
            run.meters.add(main.train_step(run, batches))
            run.progress.step += 1
            if run.progress.step % 10 == 0:  # as often as a training speaks
                run.meters.collect()
        run.meters.collect()
        pipe.send(peak_memory(world.device))


def ways(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The words of main.py for a student of each of the three ways."""
    own = {
        "labels": [],
        "stored": [
            "DISTILL.TEACHER_LOGITS_PATH",
            str(folder / "store"),
            "DISTILL.REUSE_EPOCHS",
            "True",
        ],
        "online": [
            "DISTILL.ONLINE",
            "True",
            "DISTILL.TEACHER_CFG",
            str(folder / "teacher.yaml"),
            "DISTILL.TEACHER_WEIGHTS",
            str(folder / "teacher.pth"),
        ],
    }
    student = options(args, folder, args.student)
    return {mode: [*student, *own[mode], "TAG", mode] for mode in MODES}


def prepare(args: argparse.Namespace, folder: Path, epochs: int = 1, *opts: str) -> dict[str, dict]:
    """Write the teacher and its store; what student and teacher cost."""
    sizes = {}
    for role, name in (("student", args.student), ("teacher", args.teacher)):
        model = build_model(
            load_config([*options(args, folder, name), "MODEL.NUM_CLASSES", "10"]),
            log=lambda text: None,
        )
        sizes[role] = {
            "model": name,
            "parameters": count_parameters(model),
            "multiply_adds": count_multiply_adds(model, args.size),
        }
        if role == "teacher":
            save_atomic({"model": model.state_dict()}, folder / "teacher.pth")
    teacher = [*options(args, folder, args.teacher), *opts]
    (folder / "teacher.yaml").write_text(main.dump(load_config(teacher)))
    store = ["DISTILL.TEACHER_LOGITS_PATH", str(folder / "store"), "TRAIN.EPOCHS", str(epochs)]
    if save_logits.main(["--resume", str(folder / "teacher.pth"), "--skip-eval", *teacher, *store]):
        raise SystemExit("the store could not be written")
    return sizes


def benchmark(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Prepare the teacher and its store, then time the three ways in turn."""
    sizes = prepare(args, folder)
    ratio = sizes["teacher"]["multiply_adds"] / sizes["student"]["multiply_adds"]
    if ratio < 10:
        raise SystemExit(
            f"the teacher has only {ratio:.1f} times the student's multiply-adds: take a larger one"
            " (10 times at least)"
        )
    context, pipes, memory = multiprocessing.get_context(args.start), {}, {}
    for mode, words in ways(args, folder).items():
        pipes[mode], other = context.Pipe()
        context.Process(target=work, args=(other, words)).start()
    for pipe in pipes.values():
        pipe.recv()
    epochs = dict.fromkeys(MODES, 0)

    def train_epoch(mode: str) -> None:
        pipes[mode].send(epochs[mode])
        memory[mode] = pipes[mode].recv()
        epochs[mode] += 1

    try:
        seconds = alternate(
            {mode: lambda mode=mode: train_epoch(mode) for mode in MODES}, args.repeats, args.warmup
        )
    finally:
        for pipe in pipes.values():
            pipe.send(None)
    labels = seconds["labels"]["median"]
    return {
        "machine": machine(),
        **sizes,
        "teacher_over_student": ratio,
        "settings": vars(args),
        "seconds_per_epoch": seconds,
        "peak_memory_gb": memory,
        "over_labels": {mode: seconds[mode]["median"] / labels for mode in MODES},
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--student", default="tiny", help="tiny, small, 5m, 11m, 21m, or timm:NAME")
    parser.add_argument(
        "--teacher", default="small", help="as --student, with at least 10 times its multiply-adds"
    )
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each way")
    parser.add_argument("--repeats", type=int, default=5, help="epochs that are timed")
    parser.add_argument("--warmup", type=int, default=1, help="epochs before, that are not")
    parser.add_argument("--start", default="spawn", help="how processes start; fork: CPU alone")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        result = benchmark(parse(), Path(place))
    report(result)
