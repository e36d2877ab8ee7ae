"""Checkpoints of the Mamba restoration networks: sizes from shapes, both layouts of SS2D, relatives refused by name."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import xrk
from xrk.checkpoints import assemble, describe_checkpoint, read_state, recognise
from xrk.checkpoints.state_space import expansion, ss2d
from xrk.errors import CheckpointError, InputError, ModelNotFoundError
from xrk.models import LXIENet, MambaIR
from xrk.models.ss2d import SS2D

SMALL = {"width": 4, "depths": (2, 1), "refinement": 1, "d_state": 2}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return LXIENet(**SMALL).eval().requires_grad_(False)


def saved(path, state, wrapper=None):
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, path)
    return path


def vmamba(state, flat=True):
    """A state dict as VMamba's code names it: modules `op`, and the four directions' matrices below each other."""
    named = {}
    for name, tensor in state.items():
        name = name.replace("self_attention.", "op.")
        if flat and name.endswith(("x_proj_weight", "dt_projs_weight")):
            name, tensor = name.removesuffix("_weight") + ".weight", tensor.flatten(0, 1)
        if name.endswith(("in_proj.weight", "out_proj.weight")) and flat:
            tensor = tensor[..., None, None]
        named[name] = tensor
    return named


# --- which network, and of which sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module_class", "config"),
    [
        (MambaIR, {"depths": [6, 2], "expand": 1.2}),
        (MambaIR, {"in_channels": 3, "depths": [1], "expand": 2.0, "head": "classic-sr", "scale": 4}),
        (MambaIR, {"width": 60, "depths": [6], "d_state": 10, "expand": 1.2, "head": "light-sr", "scale": 2}),
        (LXIENet, {"in_channels": 3, "width": 48, "depths": [4, 1, 1, 8], "refinement": 4, "expand": 1.5, "d_state": 16,
                   "unshuffle": 1}),
        (LXIENet, {"width": 24, "depths": [1, 2, 4], "refinement": 0, "expand": 2.0, "d_state": 8, "unshuffle": 2}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("written", [dict, vmamba])
def test_published_sizes_follow_from_the_shapes(module_class, config, written):
    with torch.device("meta"):
        state = module_class(**config).state_dict()
    architecture, found = recognise(written(state))
    assert architecture == {MambaIR: "mambair", LXIENet: "lxie-net"}[module_class]
    assert {name: found[name] for name in config} == config


def test_an_expansion_gives_every_level_its_channels():
    for expand in (1.2, 1.25, 1.3, 4 / 3, 1.7, 2.0, 2.9):
        for width in (6, 10, 14, 22, 48):
            levels = {f"level{i}.": width << i for i in range(4)}
            shapes = {f"{prefix}out_norm.weight": (int(expand * c),) for prefix, c in levels.items()}
            found = expansion(shapes, levels, 0.0)
            assert [int(found * c) for c in levels.values()] == [int(expand * c) for c in levels.values()]
            assert found <= expand


def test_a_missing_block_is_listed(network):
    state = dict(network.state_dict())
    for name in list(state):
        if name.startswith("encoder_level1.0."):
            del state[name]
    with pytest.raises(CheckpointError, match=r"compared with lxie-net .*encoder_level1\.0\.skip_scale \(4,\) is miss"):
        recognise(state)
    state = dict(network.state_dict())
    del state["decoder_level1.1.ln_1.bias"]
    with pytest.raises(CheckpointError, match=r"decoder_level1\.1\.ln_1\.bias \(8,\) is missing"):
        recognise(state)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["layers.0.residual_group.layers.0.assm.selectiveScan.A_logs", "conv_first.weight"], "MambaIRv2"),
        (["restoration_network.down_group1.l_blk.0.self_attention.A_logs"], "Wave-Mamba"),
        (["layers.0.blocks.0.self_attention.Ds", "layers_up.0.blocks.0.ln_1.weight"], "VM-UNet"),
        (["layers.0.blocks.0.op.A_logs", "patch_embed.0.weight"], "VMamba"),
        (["backbone.layers.0.mixer.A_log", "norm.weight"], "one-dimensional Mamba mixers, as DenoMamba"),
    ],
)
def test_relatives_are_refused_by_their_name(names, said):
    with pytest.raises(CheckpointError, match=rf"^This is a checkpoint of (a network of )?{said}.* which xrk does not"):
        recognise({name: torch.zeros(2, 2) for name in names})


@pytest.mark.parametrize(
    ("file", "title", "said"),
    [
        ("mamba_families.txt", "MambaIRv2 gray CAR", "MambaIRv2"),
        ("mamba_families.txt", "WaveMamba", "Wave-Mamba"),
        ("mamba_families.txt", r"VSSM \(VM-UNet\)", "VM-UNet"),
        ("vmamba_t.txt", "VMamba-T s1l8", "VMamba"),
    ],
)
def test_the_listed_relatives_are_refused_by_their_name(shared_data, file, title, said):
    listing = shared_data.parent / "design" / "state_dicts" / file
    if not listing.is_file():
        pytest.skip("the listings of state dicts are not beside this checkout")
    section = re.search(rf"^### {title}:.*\n((?:  .*\n?)*)", listing.read_text(), re.MULTILINE)[1]
    shapes = re.findall(r"^  (\S+) \(([\d, ]*)\)", section, re.MULTILINE)
    state = {n: torch.empty([int(i) for i in s.split(",") if i.strip()], device="meta") for n, s in shapes}
    with pytest.raises(CheckpointError, match=f"This is a checkpoint of {said}, which xrk does not run"):
        recognise(state)


# --- from a file to a network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "params", "params_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_basicsr_writes_is_loaded(tmp_path, network, wrapper, prefix):
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    model = xrk.load(saved(tmp_path / "net.pth", state, wrapper))
    x = torch.rand(1, 1, 8, 12)
    assert torch.allclose(model.module(x), network(x), rtol=1e-5, atol=1e-6)
    assert model.card.architecture == "lxie-net"
    assert model.card.parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("flat", [True, False])
def test_vmambas_layout_gives_the_same_network(tmp_path, network, flat):
    _, module = assemble(*read_state(saved(tmp_path / "net.pth", vmamba(network.state_dict(), flat))))
    x = torch.rand(1, 1, 8, 8)
    assert torch.equal(module(x), network(x))


@pytest.mark.parametrize(
    ("unshuffle", "domain", "noise", "said"), [(1, "unit", "none", "clipped"), (2, "stabilised", "estimate", "public")]
)
def test_the_card_says_how_to_run_it(tmp_path, unshuffle, domain, noise, said):
    state = LXIENet(**SMALL, unshuffle=unshuffle).state_dict()
    card, _ = assemble(*read_state(saved(tmp_path / "net.pth", state)))
    assert (card.domain, card.noise, card.size_multiple) == (domain, noise, 2 * unshuffle)
    assert card.output_scale == 1.0 and said in card.limits


def test_inspect_tells_the_network_and_its_sizes(tmp_path, network):
    text = str(describe_checkpoint(saved(tmp_path / "net.pth", network.state_dict(), "params")))
    assert "found under params" in text
    assert "fits        lxie-net (in_channels 1, width 4, depths [2, 1], refinement 1, expand 2.0, d_state 2" in text


def test_a_card_may_name_another_expansion_of_the_same_sizes_only(tmp_path, network):
    def with_card(expand):
        card = f'{{"config": {{"expand": {expand}}}}}'
        save_file(dict(network.state_dict()), tmp_path / "net.st", {"xrk_card": card})
        return assemble(*read_state(tmp_path / "net.st"))[0]

    assert with_card(2.05).config["expand"] == 2.05  # int(2.05 * 4) = 8 channels, as with 2.0
    with pytest.raises(CheckpointError, match=r"says expand = 3\.0, but the tensors say 2\.0"):
        with_card(3.0)


@pytest.mark.parametrize("network", [MambaIR(3, width=4, depths=(1,)), LXIENet(3, width=4, depths=(1, 1))])
def test_colour_networks_load_but_take_no_radiograph(network, tmp_path):
    path = saved(tmp_path / "net.pth", {"params": network.state_dict()})
    model, x = xrk.load(path), torch.rand(1, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(model.module(x), network.eval()(x))
    with pytest.raises(InputError, match="net takes images of 3 channels, and a radiograph has one"):
        model.enhance(np.zeros((8, 8), np.uint16))


def test_a_level_without_a_block_is_missed_by_name(tmp_path):
    state = LXIENet(width=4, depths=(1, 1), refinement=1).state_dict()
    for missing in ("latent.", "encoder_level1.", "decoder_level1."):
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(missing)}
        with pytest.raises(CheckpointError, match=missing):
            assemble(*read_state(saved(tmp_path / "net.pth", kept)))


def test_recognising_loads_no_compiler(tmp_path, network):
    """It would take 150 MiB, out of a budget that the caller set for the image."""
    path = saved(tmp_path / "net.pth", network.state_dict())
    code = (
        f"import sys, xrk; xrk.load({str(path)!r})\n"
        "print([m for m in ('sympy', 'torch._dynamo', 'torch._inductor') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- a block of VMamba ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"channels": 8, "d_state": 3, "expand": 1.5},
        {"channels": 20, "d_state": 1, "expand": 1.0, "gate": False, "conv_bias": False},
        {"channels": 8, "d_state": 2, "expand": 2.0, "rank": 5},
    ],
)
@pytest.mark.parametrize("flat", [True, False])
def test_a_block_of_vmamba_becomes_an_ss2d(config, flat):
    torch.manual_seed(0)
    module = SS2D(**config)
    state = vmamba({f"layers.0.blocks.1.self_attention.{n}": t for n, t in module.state_dict().items()}, flat)
    found = ss2d({**state, "classifier.head.bias": torch.zeros(3)}, "layers.0.blocks.1.op.")
    x = torch.randn(1, 3, 5, config["channels"])
    assert torch.equal(found(x), module(x))


def test_what_is_no_ss2d_is_refused():
    state = dict(SS2D(8, 2).state_dict())
    state["A_logs"] = state["A_logs"][:5]
    del state["Ds"]
    with pytest.raises(CheckpointError, match=r"under '' are no SS2D: A_logs is \(5, 2\).*Ds \(64,\) is missing\.$"):
        ss2d(state)
    with pytest.raises(CheckpointError, match="are no SS2D"):
        ss2d(state, "elsewhere.")


# --- through the front door -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(13, 18), (1, 17), (17, 1), (1, 1)])
def test_enhance_pads_to_the_networks_multiple_and_crops(tmp_path, shape):
    torch.manual_seed(0)
    path = saved(tmp_path / "net.pth", LXIENet(**SMALL, unshuffle=1).state_dict(), "params")
    module = xrk.load(path).module
    frame = np.random.default_rng(0).integers(1000, 60000, shape, dtype=np.uint16)
    result = xrk.enhance(frame, model=path, runtime="whole")
    padded = frame
    for axis, side in enumerate(shape):
        added = [(0, side % 2 if along == axis else 0) for along in (0, 1)]
        padded = np.pad(padded, added, mode="reflect" if side > 1 else "edge")
    x = torch.from_numpy(padded.astype(np.float32) / 65535)[None, None]
    y = module(x)[0, 0, : shape[0], : shape[1]].double().numpy()
    assert result.shape == frame.shape and result.dtype == np.uint16
    assert np.abs(result - np.rint(np.clip(65535.0 * y, 0, 65535))).max() <= 1
    assert (result != frame).any()


def test_a_network_that_magnifies_is_loaded_and_not_run_on_frames(tmp_path):
    network = MambaIR(width=6, depths=(1,), head="light-sr", scale=2)
    model = xrk.load(saved(tmp_path / "net.pth", network.state_dict(), "params"))
    assert model.card.output_scale == 2.0
    assert model.module(torch.zeros(1, 1, 3, 4)).shape == (1, 1, 6, 8)
    with pytest.raises(InputError, match=r"net magnifies 2 times, and an enhanced frame keeps its size"):
        xrk.enhance(np.zeros((4, 4), np.uint16), model=model)


def test_a_network_without_shipped_weights_is_not_offered():
    assert "mambair" not in {card.name for card in xrk.list_models()}
    with pytest.raises(ModelNotFoundError, match=r"has the network 'mambair' but ships no weights"):
        xrk.load("mambair")
