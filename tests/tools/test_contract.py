"""Contraction: candidates come from the factors alone, limits hold, and a search that was killed,
or whose trainings ran elsewhere, takes the same way.
"""

import csv
import io
import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from configs import load_config
from models.build import build_model, count_parameters
from models.tiny_vit import VARIANTS, TinyViT, count_multiply_adds
from tests.support.helpers import ROOT
from tests.tools.test_study import Forked, forking, tags
from tools import contract
from tools.contract import FACTORS, choices, contracted, keys_of, name_of, numbers_of, parameters_of

SHAPES = ["--cfg", ROOT / "configs/shapes/teacher.yaml"]
SMALL = """
--opts MODEL.TINY_VIT.NUM_HEADS [2,4,6,8] DATA.SHAPES.TRAIN_IMAGES 96 DATA.NUM_WORKERS 0
DATA.BATCH_SIZE 16 TEST.BATCH_SIZE 1 TRAIN.BASE_LR 0.03 SEED 1
""".split()
# Two rounds of two, whatever the machine's speed.
ROUNDS = "--limit 4.5e5 1e-9 --limit 3.5e5 1e-9 --candidates 2 --factors D4 M --epochs 1".split()
CALL = [*SHAPES, *ROUNDS, "--held-out", 0.5, *SMALL]


def called(*words: object) -> tuple[int, str, str]:
    """Exit status, output and errors of the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = contract.main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def search_of(output: Path, *words: object) -> contract.Search:
    """A search that has not begun."""
    args, cfg = contract.parse([str(word) for word in ("-o", output, *words)])
    output.mkdir(exist_ok=True)
    return contract.Search(args, cfg, SimpleNamespace(received=None))


# ---- candidates


def test_the_published_family_is_found_from_21m(tmp_path):
    """The largest within the paper's limits on parameters, from round to round."""
    limits = "--limit 11e6 1.57 --limit 5.4e6 1.95 --factors D --opts MODEL.NUM_CLASSES 1000"
    search = search_of(tmp_path, *limits.split())
    best = search.seed
    assert count_parameters(TinyViT.from_config("21m")) == parameters_of(best, search.cfg)
    for number, (variant, multiply_adds) in enumerate([("11m", 2.05e9), ("5m", 1.35e9)], 1):
        size, best = search.around(best, number)[0]
        model = TinyViT.from_config(variant)
        assert size == count_parameters(model) <= search.args.limit[number - 1][0]
        assert count_multiply_adds(model, 224) < multiply_adds
        found = keys_of(best)
        for key in ("embed_dims", "num_heads"):
            assert tuple(found[f"MODEL.TINY_VIT.{key.upper()}"]) == VARIANTS[variant][key]
        recipe = load_config(["--cfg", f"configs/1k/tiny_vit_{variant}.yaml"])
        assert {key: recipe.value(key) for key in found} == found
    text = Path(contract.__file__).read_text()
    assert not re.search(r"\b(64|128|160|256|320|448|11M|5M)\b", text, re.IGNORECASE)


def test_the_family_is_found_by_single_steps_too():
    """One factor a round, one step at a time: among the candidates is one nearer to 11M."""
    best, goal = (
        numbers_of(load_config(["--cfg", f"configs/1k/tiny_vit_{variant}.yaml"]))
        for variant in ("21m", "11m")
    )
    rounds = 0
    while best != goal:
        around = contracted(best, FACTORS, 1, True, random.Random(0))
        assert len(around - {best}) == len(FACTORS)
        best = min(around, key=lambda found: sum(abs(a - b) for a, b in zip(found, goal)))
        rounds += 1
    assert rounds == 1 + 2 + 4 + 4  # heads fewer in the four stages


def test_each_factor_changes_its_own_part_of_the_model(tmp_path):
    """And parameters, which are added up from parts, are the model's."""
    search = search_of(tmp_path, *SHAPES, "--limit", 1, 1, *SMALL)
    seed, names = search.seed, set()
    keys = dict(
        zip("DNWRM", "EMBED_DIMS DEPTHS WINDOW_SIZES MBCONV_EXPAND_RATIO MLP_RATIO".split())
    )
    deeper = (*seed[:4], 2, 2, 3, 2, *seed[8:])
    for factor in FACTORS:
        (numbers,) = contracted(deeper, [factor], 1, False, random.Random(0)) - {deeper}
        names.add(name_of(numbers))
        before, after = keys_of(deeper), keys_of(numbers)
        changed = {key.split(".")[-1] for key in before if before[key] != after[key]}
        heads = {"NUM_HEADS"} if factor in ("D1", "D2", "D3", "D4", "E") else set()
        assert changed == ({keys[factor[0]]} if factor != "E" else set()) | heads
        cfg = search.cfg.replace(after)
        with torch.device("meta"):
            model = build_model(cfg, load=False)
        assert count_parameters(model) == parameters_of(numbers, search.cfg)
        assert numbers_of(cfg) == numbers
    assert len(names) == len(FACTORS)


def test_values_end_at_the_least(tmp_path):
    seed = (48, 32, 64, 96, 2, 1, 3, 1, 7, 3, 2, 4.0, 1.5, 32)
    values = {factor: choices(seed, factor, 3) for factor in FACTORS}
    assert values == {
        "D1": [48, 16],
        "D2": [32],
        "D3": [64, 32],
        "D4": [96, 64, 32],
        "N1": [2, 1],
        "N2": [1],
        "N3": [3, 2, 1],
        "N4": [1],
        "W2": [7, 6, 5, 4],
        "W3": [3, 2],
        "W4": [2],
        "R": [4.0, 3.5, 3.0, 2.5],
        "M": [1.5, 1.0],
        "E": [32, 16, 8],
    }


def test_too_many_candidates_are_drawn_the_same_each_time():
    """With few contracted factors as well as many, and the smallest among them."""
    seed = (96, 192, 384, 576, 2, 2, 6, 2, 7, 14, 7, 4.0, 4.0, 32)
    found = contracted(seed, FACTORS, 4, False, random.Random("0 1"))
    assert found == contracted(seed, FACTORS, 4, False, random.Random("0 1"))
    assert found != contracted(seed, FACTORS, 4, False, random.Random("0 2"))
    assert len(found) > contract.TRIED / 2
    assert (32, 64, 256, 448, 1, 1, 2, 1, 3, 10, 3, 2.0, 2.0, 32) in found
    counts = [sum(a != b for a, b in zip(seed, numbers)) for numbers in found]
    assert all(counts.count(n) > 40 for n in range(1, 12))


def test_a_round_keeps_the_largest_within_both_limits(tmp_path):
    """By speeds that were kept, in order, as far as candidates are wanted."""
    words = ["--limit", 4.5e5, 2, "--candidates", 3, "--factors", "D", "M"]
    search = search_of(tmp_path, *SHAPES, *words, *SMALL)
    around = search.around(search.seed, 1)
    sizes = [size for size, _ in around]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= 4.5e5
    kept = {name_of(numbers): 10 + 7 * i % 11 for i, (_, numbers) in enumerate(around)}
    kept |= {"measured on": search.place, name_of(search.seed): 7.0}
    (tmp_path / "speeds.json").write_text(json.dumps(kept))
    fitting = [(size, n) for size, n in around if kept[name_of(n)] >= 14]
    assert [(c.parameters, c.numbers) for c in search.round(1, search.seed)] == fitting[:3]
    # Those that are still fewer, as nothing more is near enough, are measured to the last.
    search.args.limit[0][1] = 20 / 7
    assert [c.numbers for c in search.round(1, search.seed)] == [
        n for _, n in around[: 3 * contract.GROUPS] if kept[name_of(n)] >= 20
    ][:3]


# ---- the whole search


@pytest.fixture(scope="module")
def searches(tmp_path_factory) -> SimpleNamespace:
    """A search that was killed and called again, and one whose trainings ran elsewhere."""
    output = tmp_path_factory.mktemp("killed")
    words = [sys.executable, "-m", "tools.contract", *map(str, CALL), "--output", str(output)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 240
        while not any("exit status 0" in log.read_text() for log in output.glob("logs/*")):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    before = json.loads((output / "speeds.json").read_text())
    with forking() as started:
        status, out, err = called(*CALL, "-o", output)
    killed = SimpleNamespace(before=before, started=tags(started), status=status, out=out, err=err)
    elsewhere, printed = tmp_path_factory.mktemp("elsewhere"), []
    while commands := called(*CALL, "-o", elsewhere, "--print")[1].splitlines():
        printed.append(commands)
        for command in commands:
            with open(elsewhere / "log", "w") as log:
                Forked(shlex.split(command), ROOT, {}, log, log).process.join()
    return SimpleNamespace(output=output, killed=killed, elsewhere=elsewhere, printed=printed)


def rows(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "contraction.csv").open(newline="")))


def test_a_killed_search_takes_the_same_way(searches):
    """As one that was not; what was trained and measured before counts."""
    killed = searches.killed
    assert killed.status == 0, killed.err
    found, others = rows(searches.output), rows(searches.elsewhere)
    assert [row["round"] for row in found] == ["1", "1", "2", "2"]
    for column in ("round", "name", "parameters", "val_top1", "is_winner"):
        assert [row[column] for row in found] == [row[column] for row in others], column
    # The first was done, and the second may have been under way.
    assert "(done before)" in killed.out and len(killed.started) in (2, 3)
    after = json.loads((searches.output / "speeds.json").read_text())
    assert killed.before.items() <= after.items()
    assert all(float(row["images_per_second"]) == after[row["name"]] for row in found)
    assert not list(searches.output.rglob("*lock"))


def test_printed_commands_come_round_by_round(searches):
    """And need nothing but a shell; the last call found all done."""
    assert [len(commands) for commands in searches.printed] == [2, 2]
    names = [row["name"] for row in rows(searches.elsewhere)]
    assert tags([shlex.split(line) for lines in searches.printed for line in lines]) == names
    assert not (searches.elsewhere / "logs").exists()


def test_a_round_begins_at_the_best_of_the_one_before(searches):
    found = rows(searches.output)
    metrics = {path.parent.name: path for path in searches.output.glob("*/*/metrics.jsonl")}
    for row in found:
        last = json.loads(metrics[row["name"]].read_text().splitlines()[-1])
        assert float(row["val_top1"]) == last["val_top1"]
        # Half of the images of each class, of which some have an odd number.
        log = (searches.output / "logs" / f"{row['name']}.log").read_text()
        assert int(re.search(r"data: (\d+) images", log)[1]) in range(40, 49)
        assert int(re.search(r": (\d+) validation images", log)[1]) in range(48, 57)
    for pair in (found[:2], found[2:]):
        winner = max(pair, key=lambda row: (float(row["val_top1"]), -int(row["parameters"])))
        assert [row["is_winner"] for row in pair] == [str(row is winner) for row in pair]
    first = numbers_of(load_config(["--cfg", str(searches.output / "round1.yaml")]))
    around = contracted(first, ["D4", "M"], 4, False, random.Random(0))
    assert {row["name"] for row in found[2:]} < set(map(name_of, around))


def test_recipes_of_winners_train(searches, tmp_path):
    """In full: what was short in the search is the seed's again."""
    winners = [row for row in rows(searches.output) if row["is_winner"] == "True"]
    seed = load_config(["--cfg", str(SHAPES[1])])
    for number, row in enumerate(winners, 1):
        path = searches.output / f"round{number}.yaml"
        cfg = load_config(["--cfg", str(path)])
        assert name_of(numbers_of(cfg)) == row["name"] == cfg.MODEL.NAME
        assert (cfg.TRAIN, cfg.DATA) == (seed.TRAIN, seed.DATA)
        assert f"# python main.py --cfg {path}\n" in path.read_text()
        assert f"{int(row['parameters']):,} parameters" in path.read_text()
    words = f"x main.py --cfg {path} --output {tmp_path} --opts TRAIN.EPOCHS 1 DATA.NUM_WORKERS 0"
    words += " DATA.SHAPES.TRAIN_IMAGES 96 DATA.SHAPES.VAL_IMAGES 10 TRAIN.WARMUP_EPOCHS 0"
    with open(tmp_path / "log", "w") as log:
        Forked(words.split(), ROOT, {}, log, log).process.join()
    assert "finished: 1 epoch," in (tmp_path / "log").read_text()


def test_the_picture_shows_the_chain(searches):
    found = [
        contract.Candidate(
            int(row["round"]),
            row["name"],
            int(row["parameters"]),
            float(row["images_per_second"]),
            float(row["val_top1"]),
            0.0,
            row["is_winner"] == "True",
            (),
        )
        for row in rows(searches.output)
    ]
    winners = [candidate for candidate in found if candidate.is_winner]
    for axis, column in zip(contract.drawn(found).axes, ("parameters", "images_per_second")):
        lines = {line.get_label(): line for line in axis.lines}
        assert list(lines) == ["winners", "round 1", "round 2"]
        chain = [(getattr(winner, column), winner.val_top1) for winner in winners]
        assert list(zip(*lines["winners"].get_data())) == chain
        assert all(len(lines[f"round {n}"].get_xdata()) == 2 for n in (1, 2))
    assert Image.open(searches.output / "contraction.png").width > 800


def test_what_fails_is_named_and_can_be_left_out(tmp_path):
    """A search needs all of a round: it ends there, and the way out is in the message."""
    call = [*SHAPES, *ROUNDS[3:], "-o", tmp_path, *SMALL]
    name = name_of(search_of(tmp_path, *call).around(numbers_of(cfg_of()), 1)[0][1])
    block = tmp_path / "shapes-teacher" / name / "checkpoints"
    block.parent.mkdir(parents=True)
    block.write_text("in the way")
    with forking():
        status, _, err = called(*call)
    assert status == 1 and f"FAILED {name}: error: " in err and f"--leave-out {name}" in err
    with forking() as started:
        assert called(*call, "--leave-out", name)[0] == 0
    assert len(started) == 1 and name not in {row["name"] for row in rows(tmp_path)}


def cfg_of():
    """The seed of the small searches."""
    return load_config([*map(str, SHAPES), *SMALL])


# ---- faults


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--limit 1e5 1 --factors D4", "--limit 100,000: round 1 has no candidate, --factors and"),
        ("--limit 4e5 1e-9 --limit 1e4 1", "--limit 10,000: round 2 has no candidate"),
        ("--limit 4.5e5 1e9 --factors D4", "round 1 has no candidate of"),
        ("--limit 1e6 1e-9 --factors D4", "from which round 1 starts, has 5"),
        (
            "--limit 4e5 1 --factors D N2",
            "--factors N2: D32-64-96-128_N1-1-2-1_W3-3-3_R4_M4_E16 has",
        ),
        ("--limit 4e5 1 --factors D5", "--factors D5: D32-64-96-128"),
        ("--limit 4e5 1 --reach 0", "--factors and --reach leave 5"),
        (
            "--limit 4e5 1 --opts SEED 1",
            "stages 1 to 3, not 32, 24, 32: set [1, 2, 3, 4] or [1, 4, 6, 8] or [1, 8, 12, 16]",
        ),
        (
            "--limit 4e5 1 --opts MODEL.TYPE timm MODEL.NAME resnet18",
            "= timm: contraction starts from a tiny_vit",
        ),
        (
            "--limit 4e5 1 --cfg configs/shapes/student.yaml --factors E",
            "--factors E: D16-32-48-64",
        ),
        ("--limit 4.5e5 1e-9 --factors D4 --epochs 0", "TRAIN.EPOCHS = 0"),
        ("--limit 4.5e5 1e-9 --factors D4 --held-out 1.5", "DATA.HELD_OUT = 1.5"),
    ],
)
def test_faults_are_told_in_one_line_before_anything_is_trained(words, message, tmp_path):
    status, out, err = called(*SHAPES, "-o", tmp_path, *SMALL, *words.split())
    *notes, line = err.splitlines()
    assert (status, out) == (2, "") and line.startswith("error: ") and message in line, err
    assert all(note.startswith("measuring ") for note in notes)
    assert not list(tmp_path.glob("logs"))


def test_speeds_of_another_machine_are_not_continued(tmp_path):
    (tmp_path / "speeds.json").write_text('{"measured on": "a GPU"}')
    status, _, err = called(*CALL, "-o", tmp_path)
    assert status == 2 and "speeds.json: measured on a GPU, this is " in err
