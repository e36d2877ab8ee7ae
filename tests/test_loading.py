import dataclasses
import hashlib
import json
import os
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import xrk
from xrk import enhancement, loading
from xrk.errors import CheckpointError, CheckpointFileError, InputError, InputTypeError, ModelNotFoundError
from xrk.models import Card, DnCNN, ResNet18UNet

CONFIG = {"width": 2, "decoder_channels": [5, 4, 3, 3, 2], "full_resolution_skip": 3, "batch_norm": False}


class Shrink(nn.Module):
    """Half of what it is given."""

    def forward(self, x):
        return x * 0.5


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(loading, "_loaded", type(loading._loaded)())


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder of shipped models of our own: "second" and "first"."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(loading, "_WEIGHTS", folder)
    for seed, name in enumerate(("second", "first")):
        torch.manual_seed(seed)
        state = ResNet18UNet(**CONFIG).state_dict()
        halved = {key: t if key.startswith("segmentation_head") else t.half() for key, t in state.items()}
        save_file(halved, folder / f"{name}.safetensors")
        card = Card(
            name=name,
            architecture="resnet18-unet",
            config=CONFIG,
            domain="stabilised",
            noise="estimate",
            size_multiple=32,
            parameters=sum(t.numel() for t in state.values()),
            sha256=hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest(),
            licence="MIT",
        )
        (folder / f"{name}.json").write_text(json.dumps(card.to_dict()))
    (folder / "without weights.json").write_text("{}")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(3)
    torch.save(DnCNN(features=2, depth=3).state_dict(), tmp_path / "net.pth")
    return tmp_path / "net.pth"


# --- shipped models -------------------------------------------------------------------------------------------------


def test_every_shipped_model_loads_and_is_what_its_card_says():
    for card in loading.list_models():
        model = loading.load(card.name)
        assert model.card == card
        assert card.parameters == sum(p.numel() for p in model.module.parameters())
        for text in (card.description, card.licence, card.limits, card.training, card.figures):
            assert text, card.name


def test_shipped_models_are_listed_by_name(weights):
    assert [card.name for card in loading.list_models()] == ["first", "second"]


def test_a_shipped_model_is_float32_in_eval_mode_with_its_card(weights):
    model = loading.load("second")
    torch.manual_seed(0)
    expected = ResNet18UNet(**CONFIG).state_dict()
    for name, tensor in model.module.state_dict().items():
        stored = torch.float32 if name.startswith("segmentation_head") else torch.float16
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].to(stored).float())
    assert not model.module.training and not any(p.requires_grad for p in model.module.parameters())
    assert model.card == next(card for card in loading.list_models() if card.name == "second")
    assert repr(model) == (
        f"<xrk.Model 'second': resnet18-unet, {model.card.parameters} parameters, stabilised domain>"
    )


def test_changed_weights_are_refused(weights):
    state = ResNet18UNet(**CONFIG).state_dict()
    save_file(state, weights / "first.safetensors")
    with pytest.raises(CheckpointFileError, match=r"weights of first have the sha256 .* card says .* again"):
        loading.load("first")


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "first"}'])
def test_a_damaged_card_is_named(weights, content):
    (weights / "first.json").write_text(content)
    with pytest.raises(CheckpointFileError, match=r"first\.json cannot be read"):
        loading.load("first")
    with pytest.raises(CheckpointFileError, match=r"first\.json cannot be read"):
        loading.list_models()


def test_a_card_that_contradicts_its_weights_is_refused(weights):
    card = json.loads((weights / "first.json").read_text())
    card["config"]["width"] = 3
    (weights / "first.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="width = 3, but the tensors say 2"):
        loading.load("first")


def test_no_folder_of_weights_is_no_models(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "_WEIGHTS", tmp_path / "absent")
    assert loading.list_models() == []
    with pytest.raises(ModelNotFoundError, match="Shipped models: none"):
        loading.load("resnet18-unet")


# --- names and paths ------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known_and_the_closest(weights):
    with pytest.raises(ModelNotFoundError, match=r"no model 'frist'.*did you mean 'first'\?.*first, second"):
        loading.load("frist")
    with pytest.raises(ValueError, match=r"no model 'zzz'.*name\. Shipped models: first, second"):
        loading.load("zzz")
    with pytest.raises(ModelNotFoundError):
        loading.load("")


@pytest.mark.parametrize("wrong", [None, 3, b"first", DnCNN, ["first"]])
def test_neither_text_nor_path_nor_module(wrong):
    with pytest.raises(InputTypeError, match="A model is a name, a path or a torch module, got"):
        loading.load(wrong)


# --- modules --------------------------------------------------------------------------------------------------------


def test_a_module_is_taken_as_it_is():
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 1, 1))
    model = loading.load(module)
    assert model.module is module and module.training
    card = model.card
    assert (card.name, card.architecture, card.domain, card.noise) == ("Sequential", "Sequential", "unit", "none")
    assert (card.size_multiple, card.output_scale, card.parameters) == (1, 1.0, 59)
    assert card.config == {"in_channels": 3}
    assert loading.load(DnCNN()).card.architecture == "dncnn"
    with pytest.raises(InputError, match="for a file"):
        loading.load(module, rotations=(0,))


def test_a_frame_is_enhanced_by_a_module_of_ones_own():
    module = Shrink().eval()
    frame = np.random.default_rng(1).integers(0, 1 << 16, (37, 50), dtype=np.uint16)
    n = frame / 65535
    expected = np.round(frame + (n.astype(np.float32) * np.float32(0.5) - n) * 65535)
    for found in (xrk.enhance(frame, module), loading.load(module).enhance(frame, memory="64MiB")):
        assert np.abs(found - expected).max() <= 1
    card = dataclasses.replace(loading.load(module).card, domain="symmetric", size_multiple=4)
    found = xrk.enhance(frame, loading.Model(card, module))
    assert np.abs(found - (frame / 2.0 + 65535 / 4)).max() <= 1


def test_a_module_that_cannot_be_used_is_refused():
    frame = np.zeros((8, 8), np.uint16)
    with pytest.raises(InputError, match="Shrink is in training mode"):
        xrk.enhance(frame, Shrink())
    with pytest.raises(InputError, match="Conv2d takes images of 3 channels"):
        xrk.enhance(frame, nn.Conv2d(3, 1, 3, padding=1).eval())
    with pytest.raises(InputError, match=r"\(1, 1, 6, 6\)"):
        xrk.enhance(frame, nn.Conv2d(1, 1, 3).eval())
    halves = nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)).eval()
    for memory in (None, "64MiB"):
        with pytest.raises(InputError, match=r"cannot take an input of shape \(1, 1, 8, 7\)"):
            xrk.enhance(frame[:, :7], halves, memory=memory)
    with pytest.raises(InputTypeError, match="or a torch module"):
        xrk.enhance(frame, 3)


def test_paths_are_taken_as_text_and_as_path(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    checkpoint.with_suffix("").write_bytes(checkpoint.read_bytes())
    for path in (checkpoint, str(checkpoint), "net.pth", "./net.pth", "net"):
        model = loading.load(path)
        assert (model.card.name, model.card.architecture, model.card.domain) == ("net", "dncnn", "unit")
        assert model.card.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_a_name_goes_before_a_file_and_a_path_before_a_name(weights, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    checkpoint.rename(checkpoint.parent / "first")
    assert loading.load("first").card.domain == "stabilised"
    assert loading.load("./first").card.domain == "unit"
    assert loading.load(checkpoint.parent / "first").card.domain == "unit"


@pytest.mark.parametrize("path", ["absent.pth", "absent/first", "absent.safetensors"])
def test_an_absent_file_is_called_so(weights, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointFileError, match="There is no checkpoint file"):
        loading.load(path)


def test_what_does_not_fit_is_said_with_the_path(tmp_path):
    torch.save({"x": torch.zeros(2)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"net\.pth: None of the 1 tensors"):
        loading.load(tmp_path / "net.pth")
    assert loading.inspect_checkpoint(tmp_path / "net.pth").problem.startswith("None of the 1 tensors")


# --- what stays loaded ----------------------------------------------------------------------------------------------


def test_an_unchanged_file_is_read_once(weights, checkpoint, monkeypatch):
    read = []
    monkeypatch.setattr(loading, "_read", lambda *args, original=loading._read: read.append(args) or original(*args))
    for _ in range(3):
        assert loading.load(checkpoint) is loading.load(str(checkpoint))
        assert loading.load("first") is loading.load("first")
    assert len(read) == 2


def test_a_changed_file_is_read_again(checkpoint):
    before = loading.load(checkpoint)
    status = checkpoint.stat()
    torch.save(DnCNN(features=3, depth=3).state_dict(), checkpoint)
    os.utime(checkpoint, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert loading.load(checkpoint).card.config["features"] == 3
    os.utime(checkpoint, ns=(0, status.st_mtime_ns + 1))
    after = loading.load(checkpoint)
    assert after is not before and after.card.sha256 != before.card.sha256
    assert len(loading._loaded) == 1
    checkpoint.unlink()
    with pytest.raises(CheckpointFileError):
        loading.load(checkpoint)


def test_only_the_last_few_stay(checkpoint):
    copies = [checkpoint.with_name(f"{i}.pth") for i in range(6)]
    for copy in copies:
        copy.write_bytes(checkpoint.read_bytes())
    models = [loading.load(copy) for copy in copies]
    assert len(loading._loaded) == 4
    assert [loading.load(c) is m for c, m in zip(copies[2:], models[2:], strict=True)] == [True] * 4
    assert loading.load(copies[0]) is not models[0]


def test_threads_share_one_model(checkpoint):
    models = []
    threads = [threading.Thread(target=lambda: models.append(loading.load(checkpoint))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 8 and len(set(map(id, models))) == 1


def test_a_model_loaded_in_inference_mode_can_be_trained_later(checkpoint):
    with torch.inference_mode():
        model = loading.load(checkpoint)
    assert not any(tensor.is_inference() for tensor in model.module.state_dict().values())


# --- the model ------------------------------------------------------------------------------------------------------


def test_enhance_is_the_front_door_with_this_model(checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(enhancement, "enhance", lambda *args, **options: calls.append((args, options)) or "enhanced")
    model = loading.load(checkpoint)
    assert model.enhance("image", levels=(0, 5), noise="off") == "enhanced"
    assert calls == [(("image",), {"model": model, "levels": (0, 5), "noise": "off"})]
