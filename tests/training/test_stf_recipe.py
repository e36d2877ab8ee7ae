"""The recipe of ``stf``: windows that fit each other, a network that starts where it should, a run that goes on."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import xrk
from xrk import loading
from xrk.cameras import Cameras
from xrk.models import EDVRSTF
from xrk.processes import random_process
from xrk.training import export, stf
from xrk.training.stf import CONFIG, Windows, initialise


def test_windows_fit_each_other():
    windows = Windows(64, seed=3)
    lq, hq, truth, beam = windows.batch(16)
    assert lq.shape == (16, 3, 1, 16, 16) and hq.shape == (16, 2, 1, 64, 64) and truth.shape == (16, 1, 64, 64)
    assert all(x.dtype == torch.float32 for x in (lq, hq, truth, beam))
    # The middle LR frame is the truth seen from farther off: most of the difference is noise and motion.
    low = F.avg_pool2d(truth, 4)
    error = ((lq[:, 1] - low) ** 2).mean((1, 2, 3)).sqrt() / beam
    assert error.median() < 0.08
    turned = ((lq[:, 1].flip(-1) - low) ** 2).mean((1, 2, 3)).sqrt() / beam
    assert (error < turned).float().mean() > 0.9


def test_windows_go_on_where_they_were():
    first = Windows(32, seed=5)
    first.batch(1)
    second = Windows(32, seed=99)
    second.restore(first.state())
    assert all(torch.equal(a, b) for a, b in zip(first.batch(2), second.batch(2), strict=True))


def test_the_network_starts_as_low_resolution_plus_the_key_frames_detail():
    torch.manual_seed(0)
    network = EDVRSTF(**CONFIG).eval()
    initialise(network)
    truth = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(1))
    truth = 0.3 + 0.1 * F.avg_pool2d(F.pad(truth, (1, 1, 1, 1), mode="replicate"), 3, 1)
    low = F.avg_pool2d(truth, 4)
    enlarged = F.interpolate(low, scale_factor=4, mode="bilinear")
    with torch.inference_mode():
        y = network(low[:, None].expand(1, 3, 1, 32, 32), truth[:, None].expand(1, 2, 1, 128, 128))
    # A scene that stands still: what comes out is nearly all of it, where the LR frame alone is far from it.
    assert (y - truth).square().mean() < 0.01 * (enlarged - truth).square().mean()


def test_the_detail_filters_take_a_frame_apart_exactly():
    detail, mean = stf._detail_filters()
    image = torch.rand(1, 1, 48, 64)
    found = F.pixel_shuffle(F.conv2d(image, detail[:, None], stride=4), 4)
    low = F.avg_pool2d(image, 4)
    expected = (image - F.interpolate(low, scale_factor=4, mode="bilinear"))[:, :, 4:-4, 4:-4]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(F.conv2d(image, mean[None, None], stride=4), low[:, :, 1:-1, 1:-1])


def test_quick_gradients_change_no_value_and_are_the_kernels_own():
    torch.manual_seed(0)
    network = EDVRSTF(**CONFIG | {"reconstruction_blocks": 1})
    initialise(network)
    for pack in (*network.pcd_align.dcn_pack.values(), network.pcd_align.cas_dcnpack):
        torch.nn.init.normal_(pack.conv_offset.weight, std=0.1)
    lq, hq, truth, beam = Windows(32, seed=1).batch(1)
    found = []
    for quick in (False, True):
        if quick:
            stf.quick_gradients(network)
        network.zero_grad()
        y = network(lq, hq)
        stf.psnr_loss(y, truth, beam).backward()
        found.append([y.detach(), *(p.grad.clone() for p in network.parameters())])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-3 * float(plain.abs().max()) + 1e-9)


def arguments(**changes):
    values = {"steps": 4, "cooldown": 2, "batch": 1, "size": 32, "lr": 0.005, "seed": 0, "log": 2, "save": 2}
    return Namespace(**values | {"device": "cpu"} | changes)


@pytest.fixture
def small(monkeypatch):
    narrow = {"width": 24, "deformable_groups": 2, "reconstruction_blocks": 1, "tail": 4}
    monkeypatch.setattr(stf, "CONFIG", CONFIG | narrow)
    monkeypatch.setattr(stf, "VALIDATION", (1, 2, 32))


def test_a_killed_run_ends_like_one_that_was_not(tmp_path, monkeypatch, small):
    stf.train(tmp_path / "whole", arguments())
    rate = stf.learning_rate

    class Killed(Exception):
        pass

    def kill(step, *rest, **more):
        if step == 3:
            raise Killed
        return rate(step, *rest, **more)

    monkeypatch.setattr(stf, "learning_rate", kill)
    with pytest.raises(Killed):
        stf.train(tmp_path / "killed", arguments())
    monkeypatch.setattr(stf, "learning_rate", rate)
    stf.train(tmp_path / "killed", arguments())
    whole, resumed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert resumed["step"] == 4 and resumed["config"]["width"] == 24
    for name, value in whole["average"].items():
        torch.testing.assert_close(resumed["average"][name], value, rtol=1e-4, atol=1e-6)
    log = np.loadtxt(tmp_path / "whole" / "log.csv", delimiter=",")
    assert log[:, 0].tolist() == [2, 4] and np.isfinite(log).all()


def test_an_exported_run_is_the_average_and_found_by_its_name(tmp_path, small, monkeypatch):
    stf.train(tmp_path / "run", arguments(steps=2))
    export.main(["--run", str(tmp_path / "run"), "--to", str(tmp_path), "--machine", "a machine"])
    card = xrk.models.Card.from_dict(json.loads((tmp_path / "stf.json").read_text()))
    assert (card.name, card.architecture, card.domain, card.noise) == ("stf", "edvr-stf", "unit", "none")
    assert (card.output_scale, card.size_multiple) == (4.0, 4) and card.training["steps"] == 2
    loaded = xrk.load(tmp_path / "stf.safetensors")
    assert card.config.items() <= loaded.card.config.items() and loaded.card.sha256 == card.sha256
    network = EDVRSTF(**stf.CONFIG).eval()
    network.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["average"])
    lq, hq, _, _ = Windows(64, seed=8).batch(1)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.module(lq, hq), network(lq, hq), rtol=0, atol=1e-3)
    monkeypatch.setattr(loading, "_WEIGHTS", tmp_path)
    assert [listed.name for listed in xrk.list_models()] == ["stf"]
    lr, hr, _ = Cameras(ratio=2).record(random_process(1, (64, 64)), 3, seed=1)
    named, given = (list(xrk.fuse_video(lr, hr, ratio=2, **model)) for model in ({}, {"model": loaded}))
    assert len(named) == 3 and all(np.array_equal(a, b) for a, b in zip(named, given, strict=True))
