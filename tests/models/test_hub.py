"""TinyViTs in timm's form and on the Hugging Face Hub, which is one on the loopback address."""

import json

import huggingface_hub
import pytest
import timm
import torch

from configs import load_config
from models.build import build_model
from models.hub import timm_arguments, timm_name
from models.pretrained import hub_file, load_weights, read_notes, save_weights, to_timm
from models.tiny_vit import VARIANTS, TinyViT
from tests.support.hub import COMMIT, hub_at

SMALL = {
    "img_size": 48,
    "num_classes": 7,
    "embed_dims": (16, 32, 48, 64),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 3, 4),
    "window_sizes": (3, 3, 3, 3),
}
NAMES = [f"bird {i}" for i in range(7)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = TinyViT(**SMALL)
    for name, value in made.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            value.data = 1 + 0.1 * torch.rand(value.shape)
    return made.eval()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_at(tmp_path / "hub") as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def images():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def close(one, other):
    torch.testing.assert_close(one(images()), other(images()), rtol=0, atol=2e-6)


def asked_for(hub, name):
    return [path for path, _ in hub.asked if path.endswith(name)]


def test_a_folder_is_read_by_us_and_by_timm(model, tmp_path):
    given = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
    model.save_pretrained(tmp_path / "made", label_names=NAMES, **given)
    ours = TinyViT.from_pretrained(tmp_path / "made")
    assert torch.equal(ours(images()), model(images())) and not ours.training
    theirs = timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True).eval()
    close(theirs, model)
    data = timm.data.resolve_model_data_config(theirs)
    assert [*data["mean"], *data["std"]] == [0.5] * 6
    assert (data["input_size"], data["crop_pct"]) == ((3, 48, 48), 1.0)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["label_names"] == NAMES and config["num_classes"] == 7
    other = TinyViT.from_pretrained(tmp_path / "made", num_classes=3)
    assert other(images()).abs().max() == 0 and len(other.state_dict()) == len(ours.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_timms_names(variant):
    with torch.device("meta"):
        arguments = timm_arguments(TinyViT.from_config(variant))
    assert arguments["model_name"] == timm_name(variant) and timm.is_model(timm_name(variant))


def test_a_repository_is_read_by_its_name(model, hub):
    model.save_pretrained(hub.root / "someone" / "birds")
    assert torch.equal(TinyViT.from_pretrained("someone/birds")(images()), model(images()))
    assert TinyViT.from_pretrained(f"someone/birds@{COMMIT}").num_classes == 7  # from the cache
    assert asked_for(hub, "model.safetensors") == ["/someone/birds/resolve/main/model.safetensors"]
    close(timm.create_model("hf-hub:someone/birds", pretrained=True).eval(), model)


def test_what_timm_has_published_is_called_hub(model, hub):
    published = TinyViT.from_config("5m", num_classes=10)
    folder = hub.root / "timm" / "tiny_vit_5m_224.dist_in22k_ft_in1k"
    folder.mkdir(parents=True)
    save_weights(published, folder / "model.safetensors", naming=to_timm)
    shape = VARIANTS["5m"]
    words = "--opts MODEL.NUM_CLASSES 10 MODEL.PRETRAINED hub".split()
    for key in ("EMBED_DIMS", "NUM_HEADS"):
        words += [f"MODEL.TINY_VIT.{key}", str(list(shape[key.lower()]))]
    built = build_model(load_config(words), log=lambda text: None)
    for name, value in published.state_dict().items():
        assert torch.equal(built.state_dict()[name], value), name
    place = "/timm/tiny_vit_5m_224.dist_in22k_ft_in1k/resolve/main/model.safetensors"
    assert asked_for(hub, "model.safetensors") == [place]


@pytest.mark.parametrize("name", ["nobody/nothing", "someone/empty", "some one/birds"])
def test_a_repository_that_is_not_there_is_one_line(name, hub):
    (hub.root / "someone" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="could not be fetched") as fault:
        hub_file(f"hf-hub:{name}")
    assert str(fault.value).startswith(f"hf-hub:{name}: ") and "\n" not in str(fault.value)


def test_notes_travel_with_the_weights(model, tmp_path):
    notes = {"config": "MODEL: {NAME: x}\n", "class_names": NAMES, "progress": {"best": 1.5}}
    save_weights(model, tmp_path / "x.safetensors", notes={**notes, "other": 1})
    assert read_notes(tmp_path / "x.safetensors") == notes
    load_weights(TinyViT(**SMALL), tmp_path / "x.safetensors", exact=True)
    save_weights(model, tmp_path / "y.safetensors")
    assert read_notes(tmp_path / "y.safetensors") == {}
