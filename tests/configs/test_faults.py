"""Every error that a user can provoke: a line that names source, key, value and a way out."""

import os

import pytest

from configs import ConfigError, load_config


def fault(*words: str, world_size: int = 1) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config([str(word) for word in words], world_size)
    assert "\n" not in str(caught.value)
    return caught.value


# One error of each kind, with what it says.
KINDS = [
    ("TRAIN.EPOCS 3", "TRAIN.EPOCS = '3': unknown key; did you mean TRAIN.EPOCHS?"),
    ("EPOCHS 3", "did you mean TRAIN.EPOCHS?"),
    ("BETAS 3", "did you mean TRAIN.OPTIMIZER.BETAS?"),
    ("AUG.MIXUP.PROB 3", "did you mean AUG.MIXUP_PROB?"),
    ("TRAIN 3", "is a group of keys, not a value: name one of them, e.g. TRAIN.START_EPOCH"),
    ("WORLD_SIZE 3", "WORLD_SIZE = 3: is set by the program"),
    ("TRAIN.EPOCHS many", "TRAIN.EPOCHS = 'many': expected a whole number, got str"),
    ("TRAIN.EPOCHS 1.5", "TRAIN.EPOCHS = 1.5: expected a whole number, got float"),
    ("TRAIN.AUTO_RESUME 1", "expected True or False, got int"),
    ("AUG.SCALE 0.5", "expected a list of numbers, got float"),
    ("DEVICE cudas", "DEVICE = 'cudas': did you mean cuda? it is one of auto, cuda, mps, cpu"),
    ("TRAIN.EPOCHS 0", "TRAIN.EPOCHS = 0: expected a number from 1 to 100,000"),
    ("AUG.MIXUP_PROB 1.5", "AUG.MIXUP_PROB = 1.5: expected a number from 0 to 1"),
    ("AUG.FILL [1,2,300]", "AUG.FILL = [1, 2, 300]: expected 0 or 3 whole numbers from 0 to 255"),
    ("AUG.SCALE (0.5,0.1)", "from 1e-06 to 1, the smaller one first"),
    ("DISTILL.LOGITS_TOPK 0", "must be at least 1"),
    ("DATA.BATCH_SIZE 7 AUG.MIXUP_MODE pair2", "the batch must be even (e.g. 8)"),
    ("MODEL.TINY_VIT.NUM_HEADS [3,5,12,18]", "5 heads, which do not divide its 192 EMBED_DIMS"),
    ("TRAIN.START_EPOCH 300", "no epoch left before TRAIN.EPOCHS = 300"),
    ("MODEL.NAME resnet50x MODEL.TYPE timm", "did you mean resnet50"),
    ("TRAIN.SYNC_BN True DEVICE cpu", "leave --use-sync-bn out on the CPU"),
    ("DISTILL.ONLINE True", "name the teacher's recipe in DISTILL.TEACHER_CFG"),
    ("DISTILL.ONLINE True DISTILL.TEACHER_LOGITS_PATH s", "the run already reads the store s"),
    ("DISTILL.ENABLED False DISTILL.TEACHER_LOGITS_PATH s", "TEACHER_LOGITS_PATH = 's' gives"),
    ("DISTILL.ENABLED False DISTILL.ONLINE True", "but DISTILL.ONLINE = True gives a teacher"),
    ("AUG.MIXUP_MODE batch DISTILL.ENABLED True", "with DISTILL.ENABLED True a teacher's answers"),
    ("AUG.MIXUP_MODE batch DISTILL.SAVE_TEACHER_LOGITS True", "leave it out, or set pair2"),
    ("TEST.PER_CLASS_CSV c.csv", "add --eval, or leave --per-class-csv out"),
    ("MODEL.NAME ../../x", "names a folder inside OUTPUT"),
    ("TAG ..", "TAG = '..': a folder name, without slashes"),
    (f"OUTPUT {__file__}", "is a file, choose another folder"),
]
# What else is refused under its key.
REFUSED = """
DISTILL.LOGITS_TOPK -1
MODEL.TINY_VIT.DEPTHS [2,2]
MODEL.TINY_VIT.DEPTHS [2,0,2,2]
MODEL.TINY_VIT.LOCAL_CONV_SIZE 2
MODEL.TINY_VIT.MLP_RATIO 0
MODEL.TYPE swin
MODEL.TYPE module.py
MODEL.NAME /x
MODEL.NAME a/../../x
TAG a/b
TAG .
TRAIN.LR_SCHEDULER.NAME poly
TRAIN.OPTIMIZER.NAME adam
TRAIN.OPTIMIZER.BETAS (0.9,1.0)
TRAIN.EPOCHS -3
TRAIN.EPOCHS None
TRAIN.BASE_LR nan
TRAIN.BASE_LR .inf
TRAIN.BASE_LR True
AUG.REMODE noise
AUG.MIXUP_PROB nan
AUG.MIXUP_MODE pairs
AUG.AUTO_AUGMENT augmix-m3
AUG.AUTO_AUGMENT rand-m9-q5
AUG.AUTO_AUGMENT rand-m9.5
AUG.AUTO_AUGMENT v0-m9
AUG.CUTMIX_MINMAX [0.5,0.5]
AUG.CUTMIX_MINMAX 0.5
AUG.RATIO [0,1]
DATA.DATASET imagenett
DATA.INTERPOLATION bicubik
DATA.IMG_SIZE 31
DATA.FNAME_FORMAT x.jpeg
DATA.FNAME_FORMAT {:>9999999999}
DATA.FNAME_FORMAT {.__class__}
DATA.FNAME_FORMAT {name}
DATA.SUBSET 0
DATA.STD [1,1,0]
DATA.STD [1,1,True]
AUG.FILL [1,2,2.5]
DATA.MEAN [1,'x',0]
DISTILL.TEMPERATURE 0
"""


@pytest.mark.parametrize(("text", "message"), KINDS, ids=[text for text, _ in KINDS])
def test_a_fault_on_the_command_line_says_what_is_wrong(text, message):
    error = fault("--opts", *text.split())
    assert message in str(error) and str(error).startswith(f"--opts: {text.split()[0]} = ")


@pytest.mark.parametrize("text", REFUSED.strip().splitlines())
def test_a_wrong_value_is_refused_under_its_key(text):
    key, value = text.split()
    error = fault("--opts", key, value)
    assert error.key == key and str(error).startswith(f"--opts: {key} = ")


FILES = [
    ("TRAIN: {EPOCS: 3}", "TRAIN.EPOCS = 3: unknown key; did you mean TRAIN.EPOCHS?"),
    ("TRAIN: 3", "TRAIN = 3: is a group of keys, not a value"),
    ("TAG: {a: 1}", "TAG.a = 1: unknown key"),
    ("TRAIN: {EPOCHS: 3.5}", "TRAIN.EPOCHS = 3.5: expected a whole number, got float"),
    ("TRAIN: {EPOCHS: }", "TRAIN.EPOCHS = None: expected a whole number, got NoneType"),
    ("TAG: 12", "TAG = 12: expected text (quote it), got int"),
    ("AUG: {MIXUP_PROB: 2}", "AUG.MIXUP_PROB = 2.0: expected a number from 0 to 1"),
    ("TRAIN: [", "broken YAML"),
    ("TAG: !!python/object/apply:os.mkdir ['made']", "python/object/apply:os.mkdir"),
    ("SEED: 1\nSEED: 2", "key SEED stands there twice, keep one"),
    ("TRAIN:\n  EPOCHS: 1\n  EPOCHS: 1", "in the text, line 3, column 3"),
    ("- 1", "expected KEY: value lines, found a list"),
    ("BASE: [absent.yaml]", "absent.yaml: no such file (BASE of"),
    ("BASE: 5", "BASE: expected a list of YAML files, found a int"),
    ("BASE: [bad.yaml]", "BASE goes round in a circle: bad.yaml -> bad.yaml"),
    ("BASE: [other.yaml]", "bad.yaml -> other.yaml -> bad.yaml"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[text for text, _ in FILES])
def test_a_fault_in_a_file_names_the_file(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("BASE: [bad.yaml]")
    (tmp_path / "bad.yaml").write_text(text)
    error = str(fault("--cfg", tmp_path / "bad.yaml"))
    assert message in error and error.startswith(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"bad.yaml", "other.yaml"}


def test_files_that_name_the_next_one_twice_end_soon(tmp_path):
    for number in range(40):  # 2 to the 40th readings
        (tmp_path / f"{number}.yaml").write_text(f"BASE: [{number + 1}.yaml, {number + 1}.yaml]")
    (tmp_path / "40.yaml").write_text("SEED: 1")
    assert "BASE leads to more than 100 files" in str(fault("--cfg", tmp_path / "0.yaml"))


@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        ("--cfg nowhere.yaml", 1, "nowhere.yaml: no such file"),
        (
            "--cfg configs/1k_distil/tiny_vit_5m_1k.yaml",
            1,
            "no such file; did you mean configs/1k_distill/tiny_vit_5m_1k_distill.yaml?",
        ),
        (
            "--cfg tools/studies/sciense.yaml",
            1,
            "no such file; did you mean tools/studies/science.yaml?",
        ),
        ("--cfg .", 1, ".: can't be read"),
        ("--opts TRAIN.EPOCHS", 1, "--opts: expected KEY VALUE pairs, got 1 words: TRAIN.EPOCHS"),
        ("--opts TRAIN.EPOCHS=3", 1, "write KEY and VALUE apart: TRAIN.EPOCHS 3"),
        (
            "--opts DATA.HELD_OUT=0.2 TRAIN.EPOCHS=1",
            1,
            "got 2 words: DATA.HELD_OUT=0.2 TRAIN.EPOCHS=1; write KEY and VALUE apart:"
            " DATA.HELD_OUT 0.2",
        ),
        ("--opts TRAIN.EPOCHS 10", 1, "TRAIN.WARMUP_EPOCHS = 20: warm-up is longer than training"),
        ("--device gpu", 1, "command line: DEVICE = 'gpu': it is one of auto"),
        (
            "--opts AUG.MIXUP_MODE pair2 TRAIN.GLOBAL_BATCH 12",
            4,
            "cannot be split over 4 processes in whole pairs: use one of 1, 2, 3, 6 processes",
        ),
    ],
)
def test_other_faults(words, world, message):
    assert message in str(fault(*words.split(), world_size=world))


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        ("TRAIN.EPOCS 3 DEVICE 5 AUG.SCALE 0.5", ["TRAIN.EPOCS", "AUG.SCALE"]),
        ("TRAIN.EPOCHS 0 DEVICE gpu AUG.REPROB 2", ["DEVICE", "TRAIN.EPOCHS", "AUG.REPROB"]),
        ("TRAIN.EPOCHS 3 TAG a/b", ["TRAIN.WARMUP_EPOCHS", "TAG"]),
    ],
)
def test_all_faults_of_a_kind_are_told_at_once(opts, expected):
    """Values before what follows from them."""
    error = fault("--opts", *opts.split())
    told = str(error).split("; ALSO: ")
    assert [text.removeprefix("--opts: ").partition(" = ")[0] for text in told] == expected
    assert error.key == expected[0]


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere"
)
def test_output_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    assert "no permission to write" in str(fault("--opts", "OUTPUT", tmp_path / "o"))
