import copy
import hashlib
import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import xrk
from xrk.errors import InputError
from xrk.models import LXIENet, MambaIR

MAMBAIR_UNET = {
    "in_channels": 3,
    "width": 48,
    "depths": (4, 6, 6, 8),
    "refinement": 4,
    "expand": 1.5,
    "d_state": 16,
    "unshuffle": 1,
}
LIGHT = {"in_channels": 3, "width": 60, "depths": (6,) * 4, "d_state": 10, "head": "light-sr", "scale": 4}
SMALL = {"width": 6, "depths": (1, 1), "d_state": 2, "expand": 1.5}


def on_meta(module_class, **config):
    with torch.device("meta"):
        return module_class(**config)


def listing(module_class, **config):
    """Lines as in the published listings: name, shape, dtype."""
    state = on_meta(module_class, **config).state_dict()
    return [f"{key} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for key, t in state.items()]


@pytest.mark.parametrize(
    ("module_class", "config", "parameters", "digest"),
    [
        (MambaIR, {}, 15_771_025, "ed459718bda18d6c2d1b18062fa827554b05a7482d024251141b37ddcb85057e"),
        (MambaIR, {"in_channels": 3}, 15_777_507, None),
        (MambaIR, {"in_channels": 3, "expand": 2.0, "head": "classic-sr", "scale": 4}, 20_569_575, None),
        (MambaIR, LIGHT, 924_492, None),
        (LXIENet, MAMBAIR_UNET, 26_779_480, "35384933468412e9ddd856675dfaa7ea96dd448bbf0f515e8ee5dd6339304c22"),
    ],
)
def test_tensors_are_the_published_ones(module_class, config, parameters, digest):
    assert sum(p.numel() for p in on_meta(module_class, **config).parameters()) == parameters
    if digest is not None:
        assert hashlib.sha256("\n".join(listing(module_class, **config)).encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("module_class", "config", "title"),
    [(MambaIR, {}, "MambaIR gray CAR"), (LXIENet, MAMBAIR_UNET, "MambaIRUNet realDN")],
)
def test_names_and_shapes_equal_the_listing(shared_data, module_class, config, title):
    file = shared_data.parent / "design" / "state_dicts" / "mamba_families.txt"
    if not file.is_file():
        pytest.skip("the listings of state dicts are not beside this checkout")
    section = re.search(rf"^### {title}:.*\n((?:  .*\n?)*)", file.read_text(), re.MULTILINE)
    assert listing(module_class, **config) == [line.strip() for line in section[1].splitlines()]


def test_agrees_with_the_original_module(shared_data, give_formula_weights, tmp_path):
    """As a module, and from a file as BasicSR writes it."""
    pair = np.load(shared_data / "fixtures" / "mambair_gray_d22.npz")
    module = give_formula_weights(MambaIR(depths=(2, 2)))
    torch.save({"params": module.state_dict()}, tmp_path / "net.pth")
    model = xrk.load(tmp_path / "net.pth")
    assert model.card.config["depths"] == [2, 2]
    assert (model.card.domain, model.card.noise, model.card.size_multiple) == ("unit", "none", 1)
    for network in (module, model.module):
        with torch.inference_mode():
            y = network(torch.from_numpy(pair["x"])).numpy()
        assert y.shape == pair["y"].shape
        assert np.abs(y - pair["y"]).max() <= 1e-5 * np.abs(pair["y"]).max()


# --- the same networks, written out once more from the published description ----------------------------------------


class Written:
    """The networks in float64 from the names of their tensors alone; SS2D as a loop, for very small images."""

    def __init__(self, module):
        self.w = {name: tensor.detach().double() for name, tensor in module.state_dict().items()}

    def conv(self, name, x, padding=1, dilation=1, groups=1):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"), 1, padding, dilation, groups)

    def norm(self, name, x):
        """Of the channels of (B, C, H, W)."""
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(1, keepdim=True) + 1e-5)
        return x * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def ss2d(self, name, x):
        w = {key.removeprefix(f"{name}."): t for key, t in self.w.items() if key.startswith(f"{name}.")}
        inner = w["out_norm.weight"].numel()
        _, _, height, width = x.shape
        projected = torch.einsum("dc,bchw->bdhw", w["in_proj.weight"], x)
        u = F.silu(self.conv(f"{name}.conv2d", projected[:, :inner], groups=inner))
        total = torch.zeros_like(u)
        rank, states = w["dt_projs_weight"].shape[2], w["A_logs"].shape[1]
        rows = [(r, c) for r in range(height) for c in range(width)]
        columns = [(r, c) for c in range(width) for r in range(height)]
        for k, visits in enumerate([rows, columns, rows[::-1], columns[::-1]]):
            A = -torch.exp(w["A_logs"][k * inner : (k + 1) * inner])
            h = torch.zeros(x.shape[0], inner, states, dtype=torch.float64)
            for r, c in visits:
                pixel = u[:, :, r, c]
                v = pixel @ w["x_proj_weight"][k].T
                dt = F.softplus(v[:, :rank] @ w["dt_projs_weight"][k].T + w["dt_projs_bias"][k])[..., None]
                h = torch.exp(dt * A) * h + dt * v[:, None, rank : rank + states] * pixel[..., None]
                y = (h * v[:, None, rank + states :]).sum(-1)
                total[:, :, r, c] += y + w["Ds"][k * inner : (k + 1) * inner] * pixel
        gated = self.norm(f"{name}.out_norm", total) * F.silu(projected[:, inner:])
        return torch.einsum("cd,bdhw->bchw", w["out_proj.weight"], gated)

    def cab(self, name, x):
        last = 3
        if f"{name}.cab.4.weight" in self.w:
            last, half = 5, self.w[f"{name}.cab.0.weight"].shape[0]
            y = self.conv(f"{name}.cab.1", self.conv(f"{name}.cab.0", x, 0), groups=half)
            y = self.conv(f"{name}.cab.3", 0.5 * y * (1 + torch.erf(y / math.sqrt(2))), 0)
            y = self.conv(f"{name}.cab.4", y, 2, 2, x.shape[1])
        else:
            y = self.conv(f"{name}.cab.0", x)
            y = self.conv(f"{name}.cab.2", 0.5 * y * (1 + torch.erf(y / math.sqrt(2))))
        attention = f"{name}.cab.{last}.attention"
        a = torch.relu(self.conv(f"{attention}.1", y.mean((2, 3), keepdim=True), 0))
        return y * torch.sigmoid(self.conv(f"{attention}.3", a, 0))

    def blocks(self, prefix, x):
        j = 0
        while f"{prefix}.{j}.skip_scale" in self.w:
            name = f"{prefix}.{j}"
            x = x * self.w[f"{name}.skip_scale"][:, None, None] + self.ss2d(
                f"{name}.self_attention", self.norm(f"{name}.ln_1", x)
            )
            y = self.cab(f"{name}.conv_blk", self.norm(f"{name}.ln_2", x))
            x = x * self.w[f"{name}.skip_scale2"][:, None, None] + y
            j += 1
        return x

    def mambair(self, x, head, scale, groups):
        mean = torch.tensor([0.4488, 0.4371, 0.4040] if x.shape[1] == 3 else [0.0], dtype=torch.float64)[:, None, None]
        x = x.double() - mean
        shallow = self.conv("conv_first", x)
        y = self.norm("patch_embed.norm", shallow)
        for i in range(groups):
            y = y + self.conv(f"layers.{i}.conv", self.blocks(f"layers.{i}.residual_group.blocks", y))
        y = self.conv("conv_after_body", self.norm("norm", y)) + shallow
        if head == "light-sr":
            y = F.pixel_shuffle(self.conv("upsample.0", y), scale)
        elif head == "classic-sr":
            y = F.leaky_relu(self.conv("conv_before_upsample.0", y), 0.01)
            for name, factor in [("upsample.0", 3)] if scale == 3 else [("upsample.0", 2), ("upsample.2", 2)]:
                y = F.pixel_shuffle(self.conv(name, y), factor)
            y = self.conv("conv_last", y)
        else:
            y = x + self.conv("conv_last", y)
        return y + mean

    def unet(self, x, unshuffle):
        """Four levels, as published."""
        x = x.double()
        seen = F.pixel_unshuffle(x, unshuffle)
        if unshuffle > 1:
            y = self.conv("patch_embed.proj", F.pad(seen, (1, 1, 1, 1), mode="replicate"), 0)
        else:
            y = self.conv("patch_embed.proj", seen)
        e1 = self.blocks("encoder_level1", y)
        e2 = self.blocks("encoder_level2", F.pixel_unshuffle(self.conv("down1_2.body.0", e1), 2))
        e3 = self.blocks("encoder_level3", F.pixel_unshuffle(self.conv("down2_3.body.0", e2), 2))
        y = self.blocks("latent", F.pixel_unshuffle(self.conv("down3_4.body.0", e3), 2))
        y = torch.cat([F.pixel_shuffle(self.conv("up4_3.body.0", y), 2), e3], 1)
        y = self.blocks("decoder_level3", self.conv("reduce_chan_level3", y, 0))
        y = torch.cat([F.pixel_shuffle(self.conv("up3_2.body.0", y), 2), e2], 1)
        y = self.blocks("decoder_level2", self.conv("reduce_chan_level2", y, 0))
        y = torch.cat([F.pixel_shuffle(self.conv("up2_1.body.0", y), 2), e1], 1)
        y = self.blocks("refinement", self.blocks("decoder_level1", y))
        return x + F.pixel_shuffle(self.conv("output", y), unshuffle)


def agree(module, x, expected):
    with torch.inference_mode():
        y = module.eval()(x)
    assert y.shape == expected.shape
    assert float((y - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("in_channels", "head", "scale", "size"),
    [
        (1, "denoise", 1, (5, 7)),
        (3, "denoise", 1, (3, 4)),
        (1, "light-sr", 2, (5, 4)),
        (3, "light-sr", 3, (2, 3)),
        (1, "classic-sr", 4, (3, 5)),
        (1, "classic-sr", 3, (1, 6)),
    ],
)
def test_mambair_equals_its_description(give_formula_weights, in_channels, head, scale, size):
    module = give_formula_weights(MambaIR(in_channels, **SMALL, head=head, scale=scale))
    x = torch.rand(2, in_channels, *size, generator=torch.Generator().manual_seed(0))
    agree(module, x, Written(module).mambair(x, head, scale, 2))


@pytest.mark.parametrize(("unshuffle", "size"), [(1, (8, 16)), (2, (16, 16))])
def test_the_u_shape_equals_its_description(give_formula_weights, unshuffle, size):
    module = LXIENet(width=6, depths=(1, 1, 2, 1), refinement=1, expand=1.5, d_state=2, unshuffle=unshuffle)
    x = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))
    agree(give_formula_weights(module), x, Written(module).unet(x, unshuffle))


# --- what xrk's own variant promises --------------------------------------------------------------------------------


def test_the_unshuffled_variant_sees_contrast_only():
    torch.manual_seed(0)
    module = LXIENet(width=4, depths=(1, 1), unshuffle=2).eval().requires_grad_(False)
    weight = module.patch_embed.proj.weight
    weight -= weight.mean((1, 2, 3), keepdim=True)
    x = torch.rand(1, 1, 12, 8)
    assert torch.allclose(module(x + 50.0) - 50.0, module(x), atol=1e-4)
    assert not torch.allclose(module(x), x, atol=1e-3)


def test_every_pixel_depends_on_all_others():
    torch.manual_seed(0)
    module = LXIENet(width=4, depths=(1, 1), unshuffle=2).double().eval().requires_grad_(False)
    x = torch.rand(1, 1, 48, 48, dtype=torch.float64)
    other = x.clone()
    other[..., -1, -1] += 1.0
    assert (module(other) - module(x))[..., 0, 0] != 0


@pytest.mark.parametrize(
    "module",
    [
        LXIENet(width=4, depths=(1, 1), refinement=1, d_state=2),
        MambaIR(**SMALL),
        MambaIR(**SMALL, head="light-sr", scale=2),
    ],
    ids=["lxie-net", "mambair", "light"],
)
def test_gradients_reach_every_weight(module):
    """Along a random direction of all weights at once, against differences in float64.

    The step is small, since a ReLU that bends within it would show; float64 leaves room for it.
    """
    torch.manual_seed(0)
    module = copy.deepcopy(module).double()
    x = torch.rand(1, 1, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        target = torch.rand_like(module(x))
    weights = list(module.parameters())
    along = [torch.randn_like(weight) for weight in weights]

    def loss():
        return ((module(x) - target) ** 2).mean()

    found = torch.autograd.grad(loss(), weights)
    names = [name for name, _ in module.named_parameters()]
    # The one channel that squeezed attention has may lie below its ReLU.
    assert not [n for n, g in zip(names, found, strict=True) if ".attention." not in n and not g.abs().max() > 0]
    step, values = 1e-7, []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, direction in zip(weights, along, strict=True):
                weight += sign * step * direction
            values.append(float(loss()))
    expected = (values[0] - values[1]) / (2 * step)
    assert float(sum((g * d).sum() for g, d in zip(found, along, strict=True))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_any_number_of_levels_and_any_size_of_their_multiple(levels):
    torch.manual_seed(0)
    module = LXIENet(width=4, depths=(1,) * levels, d_state=2, unshuffle=3).eval()
    multiple = 3 * 2 ** (levels - 1)
    assert module.size_multiple == multiple
    for size in ((multiple, multiple), (2 * multiple, 3 * multiple)):
        assert module(torch.zeros(1, 1, *size)).shape == (1, 1, *size)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"depths": (1,)}, "two levels or more"),
        ({"width": 5}, "an even width"),
        ({"unshuffle": 0}, "unshuffle from 1 up"),
    ],
)
def test_shapes_that_no_u_has_are_refused(config, said):
    with pytest.raises(InputError, match=said):
        LXIENet(**config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"head": "sr"}, "one of denoise, classic-sr, light-sr, got 'sr'"),
        ({"scale": 2}, "keeps the size of its input, got scale=2"),
        ({"head": "classic-sr", "scale": 6}, "3 or a power of two, got 6"),
        ({"head": "classic-sr", "scale": 1}, "3 or a power of two, got 1"),
    ],
)
def test_heads_that_do_not_exist_are_refused(config, said):
    with pytest.raises(InputError, match=said):
        MambaIR(**SMALL, **config)


# --- extremes -------------------------------------------------------------------------------------------------------


FRAMES = {
    "dark": lambda s: torch.zeros(s),
    "white": lambda s: torch.full(s, 65535.0),
    "stripes": lambda s: 65535.0 * (torch.arange(s[-1]).expand(s) % 2),
    "constant": lambda s: torch.full(s, 1000.0),
}
PRECISIONS = [(torch.float32, 1e-5), (torch.float16, 4e-3)]


def stays_near_float64(module, x, dtype, allowed):
    """The error relative to the input's largest value."""
    module = module.eval().requires_grad_(False)
    expected = module.double()(x.double())
    y = module.float().to(dtype)(x.to(dtype))
    assert float((y.double() - expected).abs().max()) <= allowed * max(float(x.max()), 1.0)


@pytest.mark.parametrize("size", [(32, 32), (64, 4), (4, 4)])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
def test_extreme_frames_stay_near_float64(size, frame, dtype, allowed):
    """As the front door gives them to the variant: roots of counts, up to 256."""
    torch.manual_seed(0)
    x = FRAMES[frame]((1, 1, *size)).sqrt()
    stays_near_float64(LXIENet(width=8, depths=(1, 1), d_state=4, unshuffle=2), x, dtype, allowed)


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1), (24, 24)])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
def test_frames_one_pixel_wide_stay_near_float64(size, frame, dtype, allowed):
    """From 0 to 1, as the front door gives them to a network that is told nothing else."""
    torch.manual_seed(0)
    x = FRAMES[frame]((1, 1, *size)) / 65535.0
    stays_near_float64(MambaIR(width=8, depths=(1, 1), d_state=4), x, dtype, allowed)
