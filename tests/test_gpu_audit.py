"""What an update costs on a GPU, seen without one: kernels launched outside the model, waits of the
host, copies that block.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import repeat
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

import data.replay
import main
import save_logits
import utils
from configs import commands, dump, load_config
from data.augment.pairs import Mixer, PairMix
from data.replay import Batch, on_device
from logger import create_logger
from models.class_map import find_label_map
from models.distill import DistillLoss
from models.param_groups import build_optimizer
from models.teacher import Teacher
from models.update import EMA
from tests.support import saving, training
from tests.support.fake_cuda import Watch, fake_cuda, on_fake, pinned
from utils import Distributed, Meters, StopRequest

BATCHES = (8, 24)
# How an update is supervised, its options, and how many kernels it launches at most, by phase.
PHASES = "transport", "mixing and targets", "loss", "backward of the loss", "meters"
PHASES += "statistics", "clip and optimizer", "average", "rest"
CASES = {
    "labels": ("labels", "", (1, 16, 9, 5, 7, 5, 27, 6, 3)),
    "labels, pairs": ("labels", "AUG.MIXUP_MODE pair2", (1, 15, 9, 5, 5, 5, 27, 6, 3)),
    "stored": ("stored", "", (1, 6, 18, 7, 5, 5, 27, 6, 4)),
    "online": ("online", "", (1, 6, 18, 7, 5, 5, 27, 6, 4)),
    "fp16": ("labels", "AMP_DTYPE fp16 TRAIN.EMA_DECAY 0", (1, 16, 9, 5, 7, 5, 27, 0, 12)),
    "two passes": (
        "labels",
        "TRAIN.ACCUMULATION_STEPS 2 TRAIN.EMA_DECAY 0",
        (2, 32, 18, 5, 13, 5, 27, 0, 9),
    ),
    "two heads": (
        "stored",
        "TRAIN.EMA_DECAY 0 DISTILL.TWO_HEADS True DISTILL.ALPHA 0.5 MODEL.TYPE timm MODEL.NAME"
        ' deit_tiny_distilled_patch16_224 MODEL.ARGS {"depth":1}',  # without batch norm
        (1, 15, 30, 14, 5, 0, 15, 0, 6),
    ),
}
STUDENT = ["--cfg", "configs/1k/tiny_vit_5m.yaml", "--opts", *training.OPTS[10:]]
STUDENT += ["TRAIN.EMA_DECAY", "0.99"]
STUDENT += "MODEL.TINY_VIT.WINDOW_SIZES [2,2,4,2] MODEL.NUM_CLASSES 10 DATA.IMG_SIZE 64".split()


class BackwardIsDone(Exception):
    """Ends a step on the CPU, which is only asked for its backward pass."""


@pytest.fixture(scope="module")
def ways(tmp_path_factory) -> dict[str, list[str]]:
    """The options of each way to be supervised."""
    folder = tmp_path_factory.mktemp("teacher")
    sizes = (
        "DATA.IMG_SIZE 64 MODEL.NUM_CLASSES 10 DISTILL.LOGITS_TOPK 5 TRAIN.WARMUP_EPOCHS 0".split()
    )
    assert saving.run(folder / "store", *sizes) == 0
    teacher = load_config(saving.command(folder / "store", *sizes, flags=()))
    store = ["DISTILL.TEACHER_LOGITS_PATH", str(folder / "store")]
    (folder / "teacher.yaml").write_text(dump(teacher))
    return {
        "labels": [],
        "stored": [*store, "DISTILL.REUSE_EPOCHS", "True"],
        "online": [
            *"DISTILL.LOGITS_TOPK 5 DISTILL.ONLINE True".split(),
            "DISTILL.TEACHER_CFG",
            str(folder / "teacher.yaml"),
        ],
    }


def prepared(options: list[str], folder) -> tuple[main.Training, Teacher | None]:
    """A training on the CPU, and the teacher in its loop."""
    cfg = load_config([*STUDENT, "OUTPUT", str(folder), *options])
    world, log = Distributed(device=torch.device("cpu")), create_logger(None, rank=1)
    teacher = main.build_online_teacher(cfg, world, log)
    with patch.object(main, "multiply_adds_in_words", lambda *model: ""):  # slow
        run = main.build_training(cfg, world, log, StopRequest())
    run.loader.dataset.executor = "bytes"  # as on CUDA
    return run, teacher


def on_gpu(run: main.Training, teacher: Teacher | None, device: torch.device, has_model: bool):
    """The training as it is made on a fake device; the model may be left out, which takes long."""
    world, model = Distributed(device=device), on_fake(run.model, device)
    dtype = torch.float16 if run.cfg.AMP_DTYPE == "fp16" else torch.bfloat16

    def network(images: Tensor) -> Tensor:
        if has_model:
            return model(images).detach().requires_grad_()
        shape = len(images), run.cfg.MODEL.NUM_CLASSES
        heads = [
            torch.empty(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2)
        ]
        return tuple(heads) if run.cfg.DISTILL.TWO_HEADS else heads[0]

    network.no_sync = nullcontext  # as where gradients are averaged over processes

    return replace(
        run,
        world=world,
        model=model,
        network=network,
        ema=EMA(model, 0.99) if run.cfg.TRAIN.EMA_DECAY and device.type == "cuda" else None,
        labels=run.labels and run.labels.to(device),
        teacher=teacher and main.online_targets(on_fake(teacher, device), run.cfg),
        optimizer=build_optimizer(run.cfg, model),
        scaler=utils.grad_scaler(device, dtype),
        dtype=dtype,
        meters=Meters(world),
        # On the CPU pairs are mixed one by one, by numbers that fake tensors do not have.
        mix=run.mix if device.type == "cuda" else replace(run.mix, probability=0.0),
    )


@contextmanager
def phases(watch: Watch, run: main.Training) -> Iterator[None]:
    """Count the parts of a step each under its name."""
    parts = [
        (Mixer, "numbers", "mixing and targets"),
        (Mixer, "__call__", "mixing and targets"),
        (main, "label_cross_entropy", "loss"),
        (DistillLoss, "__call__", "loss"),
        (main, "share_right", "meters"),
        (data.replay, "apply_batch", "device executor"),
        (Meters, "add", "meters"),
        (nn.utils, "clip_grad_norm_", "clip and optimizer"),
        (main, "guarded_step", "clip and optimizer"),
        (main, "in_one", "statistics"),
        (main, "restore_unless", "statistics"),
        (EMA, "update", "average"),
    ]

    def backward(loss: Tensor, *args: object) -> None:
        if watch.device.type == "cpu":
            with watch.phase("backward of the loss"):
                original(loss, *args)
            raise BackwardIsDone
        for parameter in run.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    original = Tensor.backward
    with ExitStack() as stack:
        for owner, name, phase in parts:
            counted = watch.during(phase, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, counted))
        stack.enter_context(patch.object(Tensor, "backward", backward))
        yield


def audited(options: list[str], folder, batch_size: int, has_model: bool) -> Watch:
    """The second update of a training; the first makes the optimizer's state."""
    made, teacher = prepared([*options, "DATA.BATCH_SIZE", str(batch_size)], folder)
    batch, forward = next(made.loader.batches(0)), made.model.forward
    in_backward = 0
    for kind in ("cpu", "cuda"):
        with fake_cuda(kind) as device:
            batch = Batch(*(part.pin_memory() for part in batch))  # as the loader's thread does
            run = on_gpu(made, teacher, device, has_model and kind == "cuda")
            watch = Watch(device)
            run.model.forward = watch.during("model", forward)
            if run.teacher:
                run = replace(run, teacher=watch.during("teacher", run.teacher))
            sent = on_device(repeat(batch), device)
            sent = iter(watch.during("transport", sent.__next__), None)
            with phases(watch, run), watch, suppress(BackwardIsDone):
                run.meters.add(main.train_step(run, sent))
                watch.clear()
                run.meters.add(main.train_step(run, sent))
            in_backward = in_backward or watch.launches["backward of the loss"]
    watch.launches["backward of the loss"] = in_backward
    return watch


@pytest.mark.parametrize("case", CASES)
def test_an_update_keeps_to_its_launches_and_neither_waits_nor_blocks(case, ways, tmp_path):
    way, words, budget = CASES[case]
    options, is_plain = [*ways[way], *words.split()], way in case
    sizes = BATCHES if is_plain else BATCHES[:1]
    with_model = BATCHES[0] if case == "labels" else 0
    seen = [audited(options, tmp_path, size, size == with_model) for size in sizes]
    assert seen[0].launches["model"] > 500 or not with_model
    for watch in seen:
        assert watch.waits == [] and watch.blocking == []
        # On a stream of its own; whether a box is erased is up to the batch.
        assert watch.launches["device executor"] < 40
        assert set(watch.launches) <= {*PHASES, "model", "teacher", "device executor"}
    found, *others = [[watch.launches[phase] for phase in PHASES] for watch in seen]
    print(f"\n{case}: {sum(found)} launches,", dict(zip(PHASES, found)))
    assert all(other == found for other in others)  # whatever the batch
    over = [phase for phase, count, most in zip(PHASES, found, budget) if count > most]
    assert not over, (found, budget)
    assert sum(budget) < 80 or not is_plain


def test_what_would_wait_is_seen():
    with fake_cuda() as device, Watch(device) as watch:
        numbers = torch.ones(4, device=device)
        with watch.phase("good"):
            torch.where(numbers > 0, numbers, 0).to("cpu", non_blocking=True)
            torch.ones(4).pin_memory().to(device, non_blocking=True)
        assert watch.waits == [] and watch.blocking == [] and watch.launches["good"] == 5
        numbers.cpu()
        torch.tensor([1.0, 2.0], device=device)
        torch.ones(4).to(device, non_blocking=True)  # which CUDA first copies to memory of its own
        assert [text.split()[1] for text in watch.blocking] == ["_to_copy"] * 3
        for wait in (lambda: bool(numbers[0]), lambda: numbers[numbers > 0], numbers.tolist):
            watch.clear()
            with suppress(DataDependentOutputException, DynamicOutputShapeException):
                wait()
            assert len(watch.waits) == 1


def test_a_call_for_many_tensors_launches_a_few_kernels():
    with fake_cuda() as device, Watch(device) as watch:
        many = [torch.ones(8, device=device) for _ in range(200)]
        watch.clear()
        torch._foreach_add_(many, many)  # 64 pairs at a time
        assert watch.launches["rest"] == 4
        torch._foreach_mul_(many, 2.0)  # 110 tensors at a time
        assert watch.launches["rest"] == 6


# ---- evaluation and saving


class Answers(nn.Module):
    """A model of two operations, which remembers the sizes of its batches."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.zeros(num_classes, 3))
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return nn.functional.linear(images.amax((2, 3)), self.weight)


def answers(cfg) -> nn.Module:
    return Answers(10)


class Moment:
    """An event of CUDA's that nobody may wait for here."""

    def __init__(self, blocking: bool) -> None:
        """As CUDA's."""

    def record(self) -> None:
        """Nothing is remembered."""


@contextmanager
def audit(model: nn.Module) -> Iterator[tuple[Watch, torch.device]]:
    """Count what happens around a model that is on a fake device."""
    with fake_cuda() as device, patch.object(torch.cuda, "Event", Moment):
        on_fake(model, device)
        watch = Watch(device)
        model.forward = watch.during("model", model.forward)
        mixing = watch.during("mixing", PairMix.__call__)
        with patch.object(PairMix, "__call__", mixing):
            yield watch, device


def watched(watch: Watch, items: Iterable, costs: list[int]) -> Iterator:
    """The items; what each costs, outside the model and the mixing, until the next is asked for."""
    for item in items:
        watch.clear()
        yield item
        assert watch.waits == [] and watch.blocking == []
        costs.append(watch.launches["rest"])


@pytest.mark.parametrize(
    ("outputs", "classes", "budget"), [(10, 10, 20), (1000, 21841, 30), (10, 0, 16)]
)
def test_an_evaluation_waits_for_its_end_alone(outputs, classes, budget):
    """The data's classes are the model's, are numbered otherwise, or are not known."""
    label_map, _ = find_label_map(outputs, classes)
    costs: list[int] = []
    for size in BATCHES:
        images = torch.zeros(2 * size + 2, 3, 8, 8).split(size)
        labels = torch.zeros(2 * size + 2).long().split(size)
        model = Answers(outputs)
        with audit(model) as (watch, device):
            moved = label_map and label_map.to(device)
            loaded = zip(map(pinned, images), map(pinned, labels))
            batches = watched(watch, loaded, costs)
            with watch, pytest.raises(DataDependentOutputException):
                utils.evaluate(
                    model, batches, device, torch.bfloat16, label_map=moved, num_classes=classes
                )
        assert watch.waits == ["rest: _local_scalar_dense"]  # the sums of all batches
        assert model.sizes == [size] * 3
    assert costs[:3] == costs[3:] and max(costs) <= budget, costs


@pytest.mark.parametrize(
    ("has_labels", "subset", "budget"),
    [(True, "", 24), (True, "4 2 9 7 1 0 3 5 6 8", 24), (False, "", 16)],
)
def test_saving_waits_for_no_batch_before_it_has_asked_the_next(
    has_labels, subset, budget, tmp_path
):
    (tmp_path / "classes").write_text(subset.replace(" ", "\n"))
    options = ["DISTILL.CLASS_SUBSET", tmp_path / "classes"] if subset else []
    options += ["MODEL.TYPE", f"{__name__}:answers", "DATA.SHAPES.TRAIN_IMAGES"]
    costs: list[int] = []
    for size in BATCHES:
        words = [*options, 2 * size + 2, "DATA.BATCH_SIZE", size]
        _, cfg = commands.saving(saving.command(tmp_path / "store", *words))
        run = save_logits.prepare(cfg, Distributed(), StopRequest())
        loaded = list(run.open_loader().batches(0))
        model = run.teacher.model
        with audit(run.teacher) as (watch, device):
            labels = run.labels.to(device) if has_labels else None
            run = replace(run, world=Distributed(device=device), labels=labels)
            with watch:
                batches = watched(watch, on_device(loaded, device), costs)
                for _, records in save_logits.answers(run, batches, save_logits.Tally()):
                    assert callable(records)  # to be called when the next batch is under way
        assert model.sizes == [size] * 3
    assert costs[:3] == costs[3:] and max(costs) <= budget, costs
