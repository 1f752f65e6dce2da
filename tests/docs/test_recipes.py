"""What docs/RECIPES.md shows beside commands: loops of others fed by a store, a job for Slurm.

Lightning is not among the requirements: a module of its name stands in, which calls the hooks.
"""

import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import save_logits
from configs import load_config
from models.build import build_model
from tests.docs.documents import marked
from tests.support.helpers import ROOT

PAGE = ROOT / "docs" / "RECIPES.md"
BLOCKS = dict(marked(PAGE, "run"))
EPOCHS = 2
SMALL = "DATA.SHAPES.TRAIN_IMAGES 560 TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0 DATA.NUM_WORKERS 0"
BATCHES = 2  # of 64 images, in a quarter of them


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The names that the page's loader leaves, on a store as the demo's."""
    root = tmp_path_factory.mktemp("demo")
    recipe = str(ROOT / "configs/shapes/save_logits.yaml")
    cfg = load_config(["--cfg", recipe, "--opts", "MODEL.NUM_CLASSES", "10"])
    torch.save(build_model(cfg).state_dict(), root / "teacher.pth")
    store = f"{SMALL} DISTILL.TEACHER_LOGITS_PATH {root}/output/demo/logits"
    words = f"--cfg {recipe} --skip-eval --only-cpu --resume {root}/teacher.pth --output {root}"
    assert save_logits.main([*words.split(), "--opts", *store.split()]) == 0
    source = BLOCKS["loader"].replace("configs/shapes", str(ROOT / "configs/shapes"))
    for shown, small in (
        ("DISTILL.TEACHER_LOGITS_PATH output/demo/logits", store),
        ("num_workers=1", "num_workers=0"),
    ):
        assert source.count(shown) == 1
        source = source.replace(shown, small)
    names = {}
    exec(source, names)
    return names


@pytest.fixture
def names(opened, monkeypatch):
    """Those names, where each batch that is mixed is noted, as main.py's loader would give it."""
    run, seen = opened["run"], []

    def mix(images, labels, seeds):
        seen.append((images.clone(), seeds.clone()))
        return run.mix(images, labels, seeds)

    noted = SimpleNamespace(store=run.store, cfg=run.cfg, mix=mix)
    return {**opened, "run": noted, "seen": seen}


def assert_seen_as_by_main(seen: list, run) -> None:
    """The batches of both epochs, in the order of main.py's own loader, bit for bit."""
    loader = run.train_loader(batch_size=64, step_images=64)
    expected = [batch for epoch in range(EPOCHS) for batch in loader.batches(epoch)]
    assert len(seen) == len(expected) == EPOCHS * BATCHES
    for (images, seeds), batch in zip(seen, expected):
        assert torch.equal(images, batch.image) and torch.equal(seeds, batch.seed)


def test_timms_loop_is_fed_as_main_is(names, opened, capsys):
    exec(BLOCKS["timm"], names)
    assert_seen_as_by_main(names["seen"], opened["run"])
    assert re.findall(r"epoch (\d): loss \d", capsys.readouterr().out) == ["0", "1"]
    assert names["updates"] == EPOCHS * BATCHES
    assert names["optimizer"].param_groups[0]["lr"] < 1e-3  # scheduled


class Module(torch.nn.Module):
    """Lightning's, as far as the page needs it."""


class Trainer:
    """The hooks in Lightning's order; the sampler below the batches is told the epoch."""

    world_size, global_rank = 1, 0

    def __init__(self, max_epochs: int, use_distributed_sampler: bool):
        assert not use_distributed_sampler
        self.max_epochs = max_epochs

    def fit(self, module: Module) -> None:
        module.trainer = self
        optimizer = module.configure_optimizers()
        loader = module.train_dataloader()
        for epoch in range(self.max_epochs):
            loader.batch_sampler.sampler.set_epoch(epoch)
            for number, batch in enumerate(loader):
                loss = module.training_step(batch, number)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def test_lightnings_loop_is_fed_as_main_is(names, opened, monkeypatch):
    stand_in = SimpleNamespace(LightningModule=Module, Trainer=Trainer)
    monkeypatch.setitem(sys.modules, "lightning", stand_in)
    exec(BLOCKS["lightning"], names)
    assert_seen_as_by_main(names["seen"], opened["run"])


SRUN = """#!/bin/bash
echo "$@" > asked
trap 'exit 75' TERM
[ -e work ] && { touch begun; while true; do sleep 0.02; done; }
exit $(cat ends_with)
"""


def slurm_job(page: str) -> str:
    """The text of a page's job."""
    (job,) = re.findall(r"(?ms)^```\n(#!/bin/bash\n#SBATCH.*?)^```$", (ROOT / page).read_text())
    return job


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("page", ["docs/RECIPES.md", "docs/TRAINING.md"])
@pytest.mark.parametrize("end", ["done", "failed", "out of time"])
def test_slurm_requeues_what_it_stopped_alone(page, end, tmp_path):
    """The job's exit code is its program's, and only what a signal has stopped is requeued."""
    (tmp_path / "job").write_text(slurm_job(page))
    for name, text in (
        ("srun", SRUN),
        ("scontrol", '#!/bin/bash\n[ "$1" = show ] && echo node0 || echo "$@" > requeued\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "ends_with").write_text("2" if end == "failed" else "0")
    if end == "out of time":
        (tmp_path / "work").touch()
    job = subprocess.Popen(
        ["bash", "job"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"},
    )
    if end == "out of time":
        while not (tmp_path / "begun").exists():
            assert job.poll() is None
        job.terminate()
    code = job.wait(timeout=60)
    assert (code == 0) == (end == "done") and (code == 2) == (end == "failed")
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == (
        "requeue 17\n" if end == "out of time" else ""
    )
    asked = (tmp_path / "asked").read_text()
    if page == "docs/RECIPES.md":
        assert "TRAIN.START_EPOCH 60 TRAIN.EPOCHS 90" in asked
