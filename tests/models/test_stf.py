"""EDVR-STF against the original's output, Swin-STF against a formulation without windows, and both from files."""

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import xrk
from xrk.checkpoints import recognise
from xrk.errors import InputError
from xrk.loading import inspect_checkpoint
from xrk.models import EDVRSTF, SwinSTF

SMALL_EDVR = {"width": 8, "deformable_groups": 2, "extraction_blocks": 1, "reconstruction_blocks": 2, "tail": 4}
SMALL_SWIN = {"width": 12, "window": (5, 4, 4), "heads": 3, "depths": (2, 1), "hidden": 20, "tail": 4}
ALIGNED = {"align": True, "deformable_groups": 3, "extraction_blocks": 1}


def on_meta(module_class, **config):
    with torch.device("meta"):
        return module_class(**config)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("module_class", "config", "expected"),
    [
        (EDVRSTF, {}, 20_926_817),
        (SwinSTF, {}, 10_009_033),
        (SwinSTF, {"width": 384, "window": (5, 4, 4), "heads": 6, "hidden": 768}, 38_294_545),
        (SwinSTF, {"align": True}, 24_116_137),
    ],
)
def test_sizes_are_the_published_ones_and_follow_from_the_shapes(module_class, config, expected):
    module = on_meta(module_class, **config)
    assert parameters(module) == expected
    architecture, found = recognise(module.state_dict())
    assert parameters(on_meta(module_class, **found)) == expected
    assert architecture == ("edvr-stf" if module_class is EDVRSTF else "swin-stf")
    assert {name: found[name] for name in config} == {k: list(v) if k == "window" else v for k, v in config.items()}


@pytest.mark.parametrize(("module_class", "title"), [(EDVRSTF, "EDVRSTFTempRank"), (SwinSTF, "PatchTransformerSTF")])
def test_names_and_shapes_equal_the_listing(shared_data, module_class, title):
    file = shared_data.parent / "design" / "state_dicts" / "xfusion.txt"
    if not file.is_file():
        pytest.skip("the listings of state dicts are not beside this checkout")
    section = re.search(rf"^### {title}.*\n((?:  .*\n?)*)", file.read_text(), re.MULTILINE)
    state = on_meta(module_class).state_dict()
    found = [f"{key} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for key, t in state.items()]
    assert found == [line.strip() for line in section[1].splitlines()]


def test_edvr_stf_agrees_with_the_original_module(shared_data, give_formula_weights, tmp_path):
    """From a file as BasicSR writes it."""
    pair = np.load(shared_data / "fixtures" / "xfusion_edvr_stf.npz")
    module = give_formula_weights(EDVRSTF())
    state = module.state_dict()
    for name, tensor in state.items():
        if name.startswith(("feature_extraction.", "reconstruction.")):
            tensor *= 0.1
    torch.save({"params": state}, tmp_path / "net_g_1.pth")
    model = xrk.load(tmp_path / "net_g_1.pth")
    assert model.card.architecture == "edvr-stf" and model.card.parameters == 20_926_817
    lq, hq = (torch.from_numpy(pair[name]) for name in ("lq", "hq"))
    with torch.inference_mode():
        y = model.module(lq, hq).numpy()
        aligned = torch.stack(model.module.frames(lq, hq), 1)[:, :, :4].numpy()
    assert y.shape == pair["y"].shape
    assert np.abs(aligned - pair["aligned"]).max() <= 1e-5 * np.abs(pair["aligned"]).max()
    assert np.abs(y - pair["y"]).max() <= 1e-5 * np.abs(pair["y"]).max()


# --- Swin-STF without windows -----------------------------------------------------------------------------------------


def naive_block(state, prefix, x, window, heads, shifted):
    """x (D, H, W, C): every pixel with every other, and whether they see each other from where they lie."""

    def of(name):
        return state[prefix + name]

    size, channels = x.shape[:3], x.shape[3]
    y = F.layer_norm(x, (channels,), of("norm1.weight"), of("norm1.bias"))
    effective = [min(n, w) for n, w in zip(size, window, strict=True)]
    shift = [w // 2 if shifted and n > w else 0 for n, w in zip(size, window, strict=True)]
    padded = [-(-n // w) * w for n, w in zip(size, effective, strict=True)]
    whole = torch.zeros(*padded, channels, dtype=x.dtype)
    whole[: size[0], : size[1], : size[2]] = y
    tokens = whole.reshape(-1, channels)
    places = np.indices(padded).reshape(3, -1)
    rolled = np.stack([(c - s) % n for c, s, n in zip(places, shift, padded, strict=True)])
    wide = np.array(effective)[:, None]
    windows, local = rolled // wide, rolled % wide
    ends = np.array(padded)[:, None]
    regions = (rolled >= ends - wide).astype(int) + (rolled >= ends - np.array(shift)[:, None])
    regions[np.array(shift) == 0] = 0
    # Numbered inside the window that there is, read as if it were the full one: the original's quirk.
    number = np.ravel_multi_index(tuple(local), effective)
    pixel = np.stack(np.unravel_index(number, window))
    apart = pixel[:, :, None] - pixel[:, None, :] + np.array(window)[:, None, None] - 1
    row = np.ravel_multi_index(tuple(apart), [2 * w - 1 for w in window])
    logits = of("attn.relative_position_bias_table")[torch.from_numpy(row)].permute(2, 0, 1)
    strangers = torch.from_numpy((regions[:, :, None] != regions[:, None, :]).any(0))
    elsewhere = torch.from_numpy((windows[:, :, None] != windows[:, None, :]).any(0))
    qkv = F.linear(tokens, of("attn.qkv.weight"), of("attn.qkv.bias"))
    q, k, v = qkv.reshape(-1, 3, heads, channels // heads).permute(1, 2, 0, 3)
    logits = logits + q @ k.transpose(1, 2) * (channels // heads) ** -0.5 - 100.0 * strangers
    weights = logits.masked_fill(elsewhere, -torch.inf).softmax(-1)
    y = F.linear((weights @ v).transpose(0, 1).flatten(1), of("attn.proj.weight"), of("attn.proj.bias"))
    x = x + y.reshape(*padded, channels)[: size[0], : size[1], : size[2]]
    y = F.layer_norm(x, (channels,), of("norm2.weight"), of("norm2.bias"))
    y = F.gelu(F.linear(y, of("mlp.fc1.weight"), of("mlp.fc1.bias")))
    return x + F.linear(y, of("mlp.fc2.weight"), of("mlp.fc2.bias"))


def naive_swin(state, frames, window, heads, depths):
    """frames (5, C, h, w): what the front end gave; the original's way, all frames to the end."""

    def conv(name, x):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[2] // 2)

    if "channel_projection.weight" in state:
        frames = conv("channel_projection", frames)
    x = frames.permute(0, 2, 3, 1)
    for i, depth in enumerate(depths):
        y = x
        for j in range(depth):
            y = naive_block(state, f"layers.{i}.residual_group.blocks.{j}.", y, window, heads, j % 2 == 1)
        x = x + conv(f"layers.{i}.conv", y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    x = F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"]).permute(0, 3, 1, 2)
    y = (conv("conv_after_body", x) + frames)[1:2]
    y = F.leaky_relu(conv("conv_before_upsample.0", y), 0.01)
    for i in (0, 2):
        y = F.pixel_shuffle(conv(f"upsample.{i}", y), 2)
    return conv("conv_last", y)


def naive_front(state, lq, hq):
    def conv(name, x):
        return F.leaky_relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1), 0.1)

    hr = F.max_pool2d(conv("conv1_hi", conv("conv_first_hi", hq[0])), 3, 2, 1)
    return torch.cat([conv("conv_first", lq[0]), F.max_pool2d(conv("conv2_hi", hr), 3, 2, 1)])


def window_of_frames(height, width, dtype=torch.float64):
    g = torch.Generator().manual_seed(height * width)
    lq = torch.rand(1, 3, 1, height, width, generator=g, dtype=dtype)
    return lq, torch.rand(1, 2, 1, 4 * height, 4 * width, generator=g, dtype=dtype)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ((8, 12), {}),  # whole windows
        ((9, 14), {}),  # zeros below and to the right
        ((3, 9), {}),  # fewer rows than the window has
        ((4, 2), {}),  # one window alone
        ((6, 7), {"features": 8}),
        ((7, 5), {"features": 12}),
        ((9, 6), {"window": (3, 4, 4)}),  # shifted along the frames too
        ((9, 11), {"window": (5, 8, 8), "heads": 2, "depths": (1, 2)}),
    ],
)
def test_swin_stf_equals_its_formulation_without_windows(give_formula_weights, size, changes):
    config = SMALL_SWIN | changes
    module = give_formula_weights(SwinSTF(**config)).double()
    lq, hq = window_of_frames(*size)
    state = module.state_dict()
    expected = naive_swin(state, naive_front(state, lq, hq), config["window"], config["heads"], config["depths"])
    with torch.inference_mode():
        y = module(lq, hq)
    assert y.shape == expected.shape == (1, 1, 4 * size[0], 4 * size[1])
    assert (y - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_the_aligned_swin_stf_is_alignment_then_transformer(give_formula_weights):
    config = SMALL_SWIN | ALIGNED | {"features": 9}
    module = give_formula_weights(SwinSTF(**config)).double()
    lq, hq = window_of_frames(8, 12)
    with torch.inference_mode():
        frames = torch.cat(module.frames(lq, hq))
        expected = naive_swin(module.state_dict(), frames, config["window"], 3, config["depths"])
        # The alignment itself is EDVR-STF's, which the original's output holds for.
        edvr = EDVRSTF(width=9, deformable_groups=3, extraction_blocks=1, reconstruction_blocks=0).double()
        later = ("conv_last.", "conv_hr.", "fusion.", "upconv")
        front = {name for name in edvr.state_dict() if not name.startswith(later)}
        edvr.load_state_dict({name: module.state_dict()[name] for name in front}, strict=False)
        assert torch.equal(torch.cat(edvr.frames(lq, hq)), frames)
        assert (module(lq, hq) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(("module_class", "config"), [(EDVRSTF, SMALL_EDVR), (SwinSTF, SMALL_SWIN)])
def test_windows_of_a_batch_do_not_see_each_other(give_formula_weights, module_class, config):
    module = give_formula_weights(module_class(**config)).double()
    a, b = window_of_frames(8, 4), [t.flip(-1) for t in window_of_frames(8, 4)]
    with torch.inference_mode():
        both = module(*(torch.cat(pair) for pair in zip(a, b, strict=True)))
        for y, alone in zip(both, (a, b), strict=True):
            torch.testing.assert_close(y, module(*alone)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("module_class", "config"),
    [(EDVRSTF, SMALL_EDVR), (EDVRSTF, SMALL_EDVR | {"detail": True}), (SwinSTF, SMALL_SWIN | ALIGNED)],
)
def test_every_weight_learns(give_formula_weights, module_class, config):
    module = give_formula_weights(module_class(**config)).train()
    module(*window_of_frames(8, 8, torch.float32)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    assert sum(bool(p.grad.abs().sum() == 0) for p in module.parameters()) == 0


@pytest.mark.parametrize(
    ("lq", "hq", "problem"),
    [
        ((1, 2, 1, 8, 8), (1, 2, 1, 32, 32), r"low-resolution frames .*expected \(B, 3, 1, h, w\), h and w"),
        ((1, 3, 1, 6, 8), (1, 2, 1, 24, 32), "multiples of 4"),
        ((1, 3, 1, 8, 8), (1, 2, 1, 16, 16), r"high-resolution frames .*expected \(1, 2, 1, 32, 32\)"),
        ((3, 1, 8, 8), (1, 2, 1, 32, 32), "low-resolution frames"),
    ],
)
def test_frames_of_other_sizes(lq, hq, problem):
    with pytest.raises(InputError, match=problem):
        EDVRSTF(**SMALL_EDVR)(torch.zeros(lq), torch.zeros(hq))


def test_networks_that_cannot_be():
    with pytest.raises(InputError, match="odd number of low-resolution frames, got lr_frames=4"):
        EDVRSTF(**SMALL_EDVR, lr_frames=4)
    with pytest.raises(InputError, match="multiple of its heads"):
        SwinSTF(**SMALL_SWIN | {"heads": 5})


# --- from files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "wrapper"),
    [
        (EDVRSTF(**SMALL_EDVR), "params"),
        (EDVRSTF(**SMALL_EDVR, detail=True), "params"),
        (SwinSTF(**SMALL_SWIN), "params_ema"),
        (SwinSTF(**SMALL_SWIN | ALIGNED, features=6), "params_ema"),
        (SwinSTF(**SMALL_SWIN | {"window": (7, 3, 3), "lr_frames": 5}), "params"),
    ],
)
def test_a_file_gives_the_same_network_and_no_single_image(tmp_path, give_formula_weights, module, wrapper):
    give_formula_weights(module)
    torch.save({wrapper: module.state_dict()}, tmp_path / "net_g_5.pth")
    model = xrk.load(tmp_path / "net_g_5.pth")
    assert (model.card.output_scale, model.card.domain, model.card.noise) == (4.0, "unit", "none")
    assert model.card.size_multiple == module.size_multiple and "video" in model.card.limits
    lq, hq = window_of_frames(8, 8, torch.float32)
    lq = lq[:, [0, 0, 1, 2, 2]] if module.lr_frames == 5 else lq
    with torch.inference_mode():
        torch.testing.assert_close(model.module(lq, hq), module(lq, hq))
    with pytest.raises(InputError, match=r"^net_g_5 \(.*-stf\) is a network for video.*\.$"):
        model.enhance(np.zeros((8, 8), np.uint16), levels=(0, 100))
    said = str(inspect_checkpoint(tmp_path / "net_g_5.pth"))
    width = (SMALL_EDVR if isinstance(module, EDVRSTF) else SMALL_SWIN)["width"]
    assert f"fits        {model.card.architecture} (in_channels 1, width {width}," in said
