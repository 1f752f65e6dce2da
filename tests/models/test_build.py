"""Models and teachers by configuration."""

import json
import sys
import types

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from configs import dump, load_config
from configs.continuation import check_continuation
from models import build
from models.build import (
    build_model,
    build_teacher,
    count_parameters,
    load_function,
    load_named_weights,
    multiply_adds_in_words,
    num_outputs,
)
from models.teacher import Teacher
from models.tiny_vit import TinyViT

SMALL = """
    MODEL.TINY_VIT.EMBED_DIMS [32,32,64,64]
    MODEL.TINY_VIT.DEPTHS [1,1,2,1]
    MODEL.TINY_VIT.NUM_HEADS [1,1,2,2]
"""


def config(opts="", cfg=None):
    recipe = ["--cfg", str(cfg)] if cfg else []
    return load_config([*recipe, "--opts", *opts.split()])


def quiet(_):
    pass


@pytest.fixture
def user_module(monkeypatch):
    """A module as a user would write it."""

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.body = nn.Linear(width, 4)
            self.fc = nn.Linear(4, 6)

    module = types.ModuleType("their_models")
    module.__file__ = "/theirs/their_models.py"
    module.network = lambda cfg: Net(cfg.DATA.IMG_SIZE)
    module.nothing = lambda cfg: "a string"
    module.constant = 3
    monkeypatch.setitem(sys.modules, "their_models", module)
    return module


@pytest.mark.parametrize(
    ("recipe", "golden"),
    [
        ("1k/tiny_vit_5m", "tiny_vit_5m_224"),
        ("22kto1k/tiny_vit_11m_22kto1k", "tiny_vit_11m_224"),
        ("1k/tiny_vit_21m", "tiny_vit_21m_224"),
        ("higher_resolution/tiny_vit_21m_224to384", "tiny_vit_21m_384"),
        ("higher_resolution/tiny_vit_21m_384to512", "tiny_vit_21m_512"),
    ],
)
def test_recipes_build_the_family(goldens, root, recipe, golden):
    case = json.loads((goldens / "model.json").read_text())[golden]
    with torch.device("meta"):
        model = build_model(
            config("MODEL.NUM_CLASSES 1000", cfg=root / "configs" / f"{recipe}.yaml")
        )
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == case["keys"]
    assert count_parameters(model) == case["params"]


def test_a_configuration_reaches_tiny_vit():
    model = build_model(
        config(
            f"""{SMALL}
            MODEL.TINY_VIT.IN_CHANS 1
            MODEL.TINY_VIT.WINDOW_SIZES [4,3,5,4]
            MODEL.TINY_VIT.MLP_RATIO 2.0
            MODEL.TINY_VIT.MBCONV_EXPAND_RATIO 3.0
            MODEL.TINY_VIT.LOCAL_CONV_SIZE 5
            MODEL.NUM_CLASSES 9
            DATA.IMG_SIZE 64
            TRAIN.USE_CHECKPOINT True
            """
        )
    )
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes["patch_embed.seq.0.c.weight"][1] == 1
    assert shapes["layers.0.blocks.0.conv1.c.weight"][0] == 96
    assert shapes["layers.2.blocks.1.attn.attention_biases"] == [2, 25]
    assert shapes["layers.2.blocks.0.local_conv.c.weight"] == [64, 1, 5, 5]
    assert shapes["layers.3.blocks.0.mlp.fc1.weight"] == [128, 64]
    assert shapes["head.weight"] == [9, 64]
    assert model.img_size == 64 and all(layer.use_checkpoint for layer in model.layers)
    assert build_model(config(SMALL)).num_classes == 1000


@pytest.mark.parametrize(("drop", "drop_path"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)])
def test_drop_rates_reach_the_model(drop, drop_path):
    model = build_model(
        config(f"{SMALL} MODEL.DROP_RATE {drop} MODEL.DROP_PATH_RATE {drop_path}")
    ).train()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        outputs.append(model(images).detach())
    assert torch.equal(*outputs) == (drop == drop_path == 0)


@pytest.mark.parametrize(
    ("opts", "url"),
    [
        (
            "MODEL.PRETRAINED 22k_distill"
            " MODEL.TINY_VIT.EMBED_DIMS [64,128,160,320] MODEL.TINY_VIT.NUM_HEADS [2,4,5,10]",
            "checkpoints/tiny_vit_5m_22k_distill.pth",
        ),
        ("MODEL.PRETRAINED 1k", "checkpoints/tiny_vit_21m_1k.pth"),
        (
            "MODEL.PRETRAINED 22kto1k_distill MODEL.TINY_VIT.WINDOW_SIZES [12,12,24,12]",
            "checkpoints/tiny_vit_21m_22kto1k_384_distill.pth",
        ),
        (
            "MODEL.PRETRAINED 22kto1k_distill MODEL.TINY_VIT.WINDOW_SIZES [5,5,5,5]",
            "checkpoints/tiny_vit_21m_22kto1k_distill.pth",
        ),
        (
            "MODEL.PRETRAINED 22k MODEL.TYPE clip_vit_large14_224",
            "pretrained_teacher/clip_vit_large_patch14_22k.pth",
        ),
        ("MODEL.PRETRAINED http://somewhere/1k", "http://somewhere/1k"),
        (
            "MODEL.PRETRAINED 1k@sha256=01234567",
            "checkpoints/tiny_vit_21m_1k.pth@sha256=01234567",
        ),
    ],
)
def test_names_of_the_zoo(monkeypatch, opts, url):
    class Asked(Exception):
        pass

    def ask(source, log):
        raise Asked(source)

    monkeypatch.setenv("TINYVIT_ZOO_URL", "mirror")
    monkeypatch.setattr(build, "read_state_dict", ask)
    with torch.device("meta"), pytest.raises(Asked) as caught:
        build_model(config(opts))
    assert str(caught.value) == (url if "://" in url else f"mirror/{url}")
    with torch.device("meta"):
        build_model(config(opts), load=False)


def test_shapes_that_the_zoo_lacks():
    with pytest.raises(
        ValueError,
        match=r"MODEL.PRETRAINED = '1k': .* no TinyViT of EMBED_DIMS \[32, 32, 64, 64\]",
    ):
        build_model(config(f"{SMALL} MODEL.PRETRAINED 1k"))


def test_a_student_starts_from_a_file_and_gets_a_new_head(tmp_path):
    source = build_model(config(f"{SMALL} MODEL.NUM_CLASSES 7"))
    torch.save({"model": source.state_dict()}, tmp_path / "seven.pth")
    lines = []
    model = build_model(
        config(f"{SMALL} MODEL.NUM_CLASSES 3 MODEL.PRETRAINED {tmp_path / 'seven.pth'}"),
        log=lines.append,
    )
    assert (
        torch.equal(model.norm_head.weight, source.norm_head.weight) and not model.head.weight.any()
    )
    assert "seven.pth" in lines[0] and "head set to zero" in lines[0]
    with pytest.raises(
        ValueError, match=r"seven.pth does not fit TinyViT: head.weight is \[7, 64\]"
    ):
        load_named_weights(model, config(SMALL), str(tmp_path / "seven.pth"), exact=True, log=quiet)


def test_timm_models_are_built_by_name():
    cfg = config(
        "MODEL.TYPE timm MODEL.NAME efficientnet_b0 MODEL.NUM_CLASSES 11 MODEL.DROP_PATH_RATE 0.3"
    )
    model = build_model(cfg)
    assert num_outputs(model) == 11
    assert model.blocks[-1][-1].drop_path.drop_prob > 0.25
    assert num_outputs(build_model(config("MODEL.TYPE timm MODEL.NAME regnetx_004"))) == 1000


def test_timm_models_without_drop_path():
    lines = []
    with torch.device("meta"):
        build_model(
            config("MODEL.TYPE timm MODEL.NAME vgg11 MODEL.DROP_PATH_RATE 0.3"),
            log=lines.append,
        )
    assert lines == ["vgg11 takes no drop_path_rate: MODEL.DROP_PATH_RATE 0.3 has no effect"]


def test_timm_models_of_fixed_size_are_built_for_the_configured_one():
    model = build_model(config("MODEL.TYPE timm MODEL.NAME deit_tiny_patch16_224 DATA.IMG_SIZE 96"))
    assert model.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)


DEIT = "MODEL.TYPE timm MODEL.NAME deit_tiny_patch16_224"


@pytest.mark.parametrize("size", ["DATA.IMG_SIZE 48", ""])
def test_arguments_reach_a_timm_model_and_outlive_a_dump(size, tmp_path):
    given = "{img_size: 48, patch_size: 8, depth: 1, embed_dim: 24, act_layer: relu}"
    cfg = load_config(["--opts", *f"{DEIT} {size}".split(), "MODEL.ARGS", given])
    model = build_model(cfg)
    assert cfg.DATA.IMG_SIZE == 48 and model.patch_embed.proj.kernel_size == (8, 8)
    assert model.pos_embed.shape == (1, 37, 24) and isinstance(model.blocks[0].mlp.act, nn.ReLU)
    (tmp_path / "dump.yaml").write_text(dump(cfg))
    (tmp_path / "own.yaml").write_text(f"MODEL: {{ARGS: {given}}}")
    assert load_config(["--cfg", str(tmp_path / "dump.yaml")]) == cfg
    words = ["--cfg", str(tmp_path / "own.yaml"), "--opts", *f"{DEIT} {size}".split()]
    assert load_config(words).MODEL.ARGS == cfg.MODEL.ARGS
    with pytest.raises(ValueError, match=r"MODEL.ARGS '\{.*48.* -> ''"):
        check_continuation(dump(cfg), config(f"{DEIT} DATA.IMG_SIZE 48"), "last.pth")


def test_arguments_are_part_of_what_a_teacher_is(tmp_path):
    names = []
    for act in ("relu", "gelu"):
        given = f"{{patch_size: 16, depth: 1, embed_dim: 24, act_layer: {act}}}"
        words = [*f"{DEIT} DATA.IMG_SIZE 32".split(), "MODEL.ARGS", given]
        torch.save(build_model(load_config(["--opts", *words])).state_dict(), tmp_path / "x.pth")
        cfg = load_config(["--opts", *words, "MODEL.RESUME", str(tmp_path / "x.pth")])
        names.append(Teacher.from_config(cfg, torch.device("cpu"), quiet).identity()["name"])
    assert names[0] != names[1] and names[0].startswith("deit_tiny_patch16_224 {")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{patch_sise: 4}", "deit_tiny_patch16_224: .* keyword argument 'patch_sise'"),
        ("{patch_size: big}", "MODEL.ARGS = .*: deit_tiny_patch16_224: "),
        ("{num_classes: 4}", "multiple values for keyword argument 'num_classes'"),
        ("{img_size: 64}", "MODEL.ARGS = .*, but DATA.IMG_SIZE = 32: set one"),
        ("{checkpoint_path: x.pth, pretrained: True}", "leave out checkpoint_path, pretrained"),
    ],
)
def test_arguments_that_do_not_fit_are_told(given, message):
    words = f"{DEIT} DATA.IMG_SIZE 32 MODEL.NUM_CLASSES 5".split()
    with pytest.raises(ValueError, match=message) as caught:
        build_model(load_config(["--opts", *words, "MODEL.ARGS", given]))
    assert "\n" not in str(caught.value)


def test_hub_weights_are_fitted_like_any_others(monkeypatch):
    create = timm.create_model
    source = create("regnetx_002")
    asked = []

    def hub(name, pretrained=False, **options):
        asked.append((pretrained, options.get("num_classes")))
        model = create(name, **options)
        if pretrained:
            model.load_state_dict(source.state_dict())
        return model

    monkeypatch.setattr(build.timm, "create_model", hub)
    cfg = config("MODEL.TYPE timm MODEL.NAME regnetx_002 MODEL.PRETRAINED hub MODEL.NUM_CLASSES 4")
    model = build_model(cfg, log=quiet)
    assert (
        torch.equal(model.stem.conv.weight, source.stem.conv.weight)
        and not model.head.fc.weight.any()
    )
    assert asked == [(False, 4), (True, None)]
    teacher = build_teacher(
        config("MODEL.TYPE timm MODEL.NAME regnetx_002 MODEL.PRETRAINED hub"),
        log=quiet,
    )
    assert torch.equal(teacher.head.fc.weight, source.head.fc.weight)


def test_the_hub_out_of_reach(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError,
        match=r"MODEL.PRETRAINED hub: no weights for regnetx_002 \(.*give its path as",
    ):
        build_model(
            config("MODEL.TYPE timm MODEL.NAME regnetx_002 MODEL.PRETRAINED hub"),
            log=quiet,
        )


@pytest.mark.parametrize("key", ["MODEL.RESUME", "MODEL.PRETRAINED"])
def test_a_teacher_has_exactly_its_weights(tmp_path, key):
    source = build_model(config(f"{SMALL} MODEL.NUM_CLASSES 21")).eval()
    path = tmp_path / "teacher.safetensors"
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in source.state_dict().items()}, path
    )
    teacher = build_teacher(config(f"{SMALL} {key} {path}"), log=quiet)
    assert num_outputs(teacher) == 21  # from the file
    assert not teacher.training and not any(
        parameter.requires_grad for parameter in teacher.parameters()
    )
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(teacher(images), source(images))
    with pytest.raises(
        ValueError,
        match=r"teacher.safetensors does not fit TinyViT: head.weight is \[21, 64\]",
    ):
        build_teacher(config(f"{SMALL} {key} {path} MODEL.NUM_CLASSES 20"), log=quiet)


def test_resume_comes_before_pretrained(tmp_path):
    for classes in (2, 3):
        torch.save(
            build_model(config(f"{SMALL} MODEL.NUM_CLASSES {classes}")).state_dict(),
            tmp_path / f"{classes}.pth",
        )
    cfg = config(f"{SMALL} MODEL.RESUME {tmp_path / '2.pth'} MODEL.PRETRAINED {tmp_path / '3.pth'}")
    assert num_outputs(build_teacher(cfg, log=quiet)) == 2


def test_a_timm_teacher_from_a_tiny_vit_file_in_official_names(tmp_path):
    source = TinyViT.from_config("5m", num_classes=6).eval()
    torch.save({"model": source.state_dict()}, tmp_path / "official.pth")
    cfg = config(
        f"MODEL.TYPE timm MODEL.NAME tiny_vit_5m_224 MODEL.PRETRAINED {tmp_path / 'official.pth'}"
    )
    teacher = build_teacher(cfg, log=quiet)
    assert num_outputs(teacher) == 6 and torch.equal(teacher.head.fc.weight, source.head.weight)


def test_a_teacher_without_weights_says_so():
    lines = []
    build_teacher(config(SMALL), log=lines.append)
    assert lines == [
        "tiny_vit has no weights but random ones: give --resume, --pretrained or MODEL.PRETRAINED"
    ]


def test_the_clip_teacher():
    with torch.device("meta"):
        teacher = build_teacher(config("MODEL.TYPE clip_vit_large14_224"), log=quiet)
        assert num_outputs(teacher) == 21841
        assert (
            num_outputs(build_model(config("MODEL.TYPE clip_vit_large14_224 MODEL.NUM_CLASSES 5")))
            == 5
        )


def test_a_users_function_builds_the_model(user_module, tmp_path):
    opts = "MODEL.TYPE their_models:network DATA.IMG_SIZE 40"
    model = build_model(config(opts))
    assert model.body.in_features == 40 and num_outputs(model) == 6
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    lines = []
    teacher = build_teacher(
        config(f"{opts} MODEL.RESUME {tmp_path / 'theirs.pth'}"), log=lines.append
    )
    assert torch.equal(teacher.fc.weight, model.fc.weight) and len(lines) == 1
    build_teacher(config(opts), log=lines.append)
    assert len(lines) == 1  # it may have loaded its weights itself


def test_functions_are_found_by_name(user_module):
    assert load_function("their_models:network") is user_module.network
    assert load_function("models.build:load_function") is load_function


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("their_models", "'their_models': expected package.module:function"),
        (":network", "':network': expected package.module:function"),
        (
            "no_such_module:network",
            "there is no module no_such_module .its folder must be on PYTHONPATH",
        ),
        ("models.no_such:network", "there is no module models.no_such"),
        (
            "their_models:netwerk",
            "/theirs/their_models.py has no function netwerk; did you mean network",
        ),
        ("their_models:constant", "/theirs/their_models.py has no function constant$"),
    ],
)
def test_functions_that_are_not_there(user_module, spec, message):
    with pytest.raises(ValueError, match=message):
        load_function(spec)


def test_a_users_broken_import_is_shown_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "broken_models.py").write_text("import a_package_they_forgot\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_they_forgot"):
        load_function("broken_models:network")


def test_a_function_must_give_a_module(user_module):
    with pytest.raises(
        ValueError,
        match="MODEL.TYPE = 'their_models:nothing': expected .* torch.nn.Module, got str",
    ):
        build_model(config("MODEL.TYPE their_models:nothing"))


def test_outputs_are_counted():
    assert num_outputs(build_model(config(f"{SMALL} MODEL.NUM_CLASSES 12"))) == 12
    net = nn.Module()
    net.classifier = nn.Conv2d(8, 5, 1)
    assert num_outputs(net) == 5
    with pytest.raises(
        ValueError,
        match="Sequential does not say how many classes it has: give it an attribute num_classes",
    ):
        num_outputs(nn.Sequential(nn.Linear(2, 3)))
    headless = timm.create_model("resnet18", num_classes=0)
    with pytest.raises(ValueError, match="ResNet does not say how many classes it has"):
        num_outputs(headless)


def test_parameters_and_products_are_counted():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].weight.requires_grad_(False)
    assert (count_parameters(model), count_parameters(model, trainable=True)) == (24, 12)
    convolution = nn.Conv2d(3, 1000, 1)
    assert multiply_adds_in_words(convolution, 1000) == "3.000 G multiply-adds at 1000 px"
    assert multiply_adds_in_words(model, 8) == "unknown multiply-adds at 8 px"


def test_activations_are_recomputed_where_that_is_known(user_module):
    model = build_model(
        config("MODEL.TYPE timm MODEL.NAME deit_tiny_patch16_224 TRAIN.USE_CHECKPOINT True")
    )
    assert model.grad_checkpointing
    for opts in ("MODEL.TYPE their_models:network", "MODEL.TYPE timm MODEL.NAME vgg11"):
        with (
            torch.device("meta"),
            pytest.raises(
                ValueError, match=r"TRAIN.USE_CHECKPOINT: \w+ cannot recompute its activations"
            ),
        ):
            build_model(config(f"{opts} TRAIN.USE_CHECKPOINT True"), log=quiet)
