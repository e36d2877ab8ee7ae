import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from xrk.checkpoints import assemble, read_state, recognise
from xrk.errors import CheckpointError
from xrk.models import ARCHITECTURES, DnCNN, LXIENet, MambaIR, OriginalResNet18UNet, ResNet18UNet

channels = st.integers(1, 4)
widths = st.integers(1, 9)
configurations = st.one_of(
    st.tuples(
        st.just("resnet18-unet"),
        st.fixed_dictionaries(
            {
                "in_channels": channels,
                "out_channels": channels,
                "width": widths,
                "decoder_channels": st.lists(widths, min_size=5, max_size=5),
                "full_resolution_skip": st.integers(0, 5),
                "batch_norm": st.booleans(),
                "input_blocks": st.integers(0, 4),
            }
        ).map(lambda c: c | {"input_blocks": c["input_blocks"] if c["full_resolution_skip"] else 0}),
    ),
    st.tuples(
        st.just("resnet18-unet-original"),
        st.fixed_dictionaries(
            {
                "in_channels": channels,
                "out_channels": channels,
                "width": widths,
                "decoder_channels": st.lists(widths, min_size=4, max_size=4),
            }
        ),
    ),
    st.tuples(
        st.just("dncnn"),
        st.fixed_dictionaries(
            {
                "in_channels": channels,
                "out_channels": channels,
                "features": widths,
                "depth": st.integers(3, 8),
                "batch_norm": st.booleans(),
                "bias": st.booleans(),
            }
        ),
    ),
    st.tuples(
        st.just("lxie-net"),
        st.fixed_dictionaries(
            {
                "in_channels": st.sampled_from([1, 3]),
                "width": st.sampled_from([4, 6, 16]),
                "depths": st.lists(st.integers(1, 3), min_size=2, max_size=4),
                "refinement": st.integers(0, 2),
                "expand": st.sampled_from([1.0, 1.5, 2.0]),
                "d_state": st.integers(1, 5),
                "unshuffle": st.integers(1, 3),
            }
        ),
    ),
    st.tuples(
        st.just("mambair"),
        st.fixed_dictionaries(
            {
                "in_channels": st.sampled_from([1, 3]),
                "width": st.sampled_from([5, 6, 20]),
                "depths": st.lists(st.integers(1, 3), min_size=1, max_size=3),
                "d_state": st.integers(1, 5),
                "expand": st.sampled_from([1.0, 1.2, 2.0]),
            }
        ).flatmap(
            lambda sizes: st.sampled_from(
                [("denoise", 1), ("light-sr", 2), ("light-sr", 3), ("classic-sr", 3), ("classic-sr", 4)]
            ).map(lambda last: {**sizes, "head": last[0], "scale": last[1]})
        ),
    ),
    st.tuples(
        st.just("edvr-stf"),
        st.fixed_dictionaries(
            {
                "in_channels": st.sampled_from([1, 3]),
                "width": st.sampled_from([4, 6, 16]),
                "lr_frames": st.sampled_from([1, 3, 5]),
                "deformable_groups": st.sampled_from([1, 2]),
                "extraction_blocks": st.integers(1, 3),
                "reconstruction_blocks": st.integers(1, 3),
                "tail": st.sampled_from([2, 5]),
                "detail": st.booleans(),
            }
        ),
    ),
    st.tuples(
        st.just("swin-stf"),
        st.fixed_dictionaries(
            {
                "in_channels": st.sampled_from([1, 3]),
                "width": st.sampled_from([4, 8]),
                "window": st.sampled_from([[5, 8, 8], [5, 4, 4], [7, 3, 3]]),
                "heads": st.sampled_from([1, 2]),
                "depths": st.lists(st.integers(1, 3), min_size=2, max_size=3),
                "hidden": st.sampled_from([5, 8]),
                "tail": st.sampled_from([2, 5]),
                "features": st.sampled_from([None, 4, 6]),
                "align": st.booleans(),
            }
        ).map(lambda c: c | {"lr_frames": c["window"][0] - 2}),
    ),
)


def meta_state(architecture, config):
    with torch.device("meta"):
        return ARCHITECTURES[architecture](**config).state_dict()


@settings(max_examples=25, deadline=None)
@given(configurations, st.sampled_from(["", "model.", "net.unet."]))
def test_form_and_widths_follow_from_the_tensors(case, prefix):
    architecture, config = case
    state = {prefix + name: tensor for name, tensor in meta_state(architecture, config).items()}
    found, found_config = recognise(state)
    assert found == architecture
    # A part of a channel is lost in the tensors: several expansions have the same ones, and the ratio of two is found.
    assert {name: found_config[name] for name in config if name != "expand"} == {
        name: value for name, value in config.items() if name != "expand"
    }
    shapes, expected = (
        {name: tensor.shape for name, tensor in meta_state(architecture, c).items()} for c in (found_config, config)
    )
    assert shapes == expected


@settings(max_examples=25, deadline=None)
@given(configurations, st.data())
def test_one_wrong_tensor_is_named(case, data):
    state = dict(meta_state(*case))
    # The ends alone tell the channels of image and result, and how many layers there are.
    names = [name for name, tensor in state.items() if tensor.ndim == 4 and name != "input_skip.weight"]
    name = data.draw(st.sampled_from(names[1:-1]))
    if data.draw(st.booleans()):
        del state[name]
        expected = rf"{re.escape(name)} \(.*\) is missing"
    else:
        state[name] = torch.empty(11, 13, 3, 3, device="meta")
        expected = rf"{re.escape(name)} is \(11, 13, 3, 3\), expected \("
    if case[0] == "dncnn" and "missing" in expected:
        expected = "missing"  # one layer less is another depth
    with pytest.raises(CheckpointError, match=expected):
        recognise(state)


def test_a_block_without_its_weight_still_counts():
    state = ResNet18UNet(width=2, decoder_channels=(2,) * 5, full_resolution_skip=2, input_blocks=3).state_dict()
    del state["input_blocks.2.conv.weight"]
    with pytest.raises(CheckpointError, match=r"input_blocks\.2\.conv\.weight \(2, 2, 3, 3\) is missing"):
        recognise(state)


def test_problems_are_listed_with_shapes_ten_at_most():
    state = ResNet18UNet(width=2, decoder_channels=(2,) * 5).state_dict()
    state["encoder.fc.weight"] = torch.zeros(10, 4)
    state["segmentation_head.0.weight"] = torch.zeros(1, 2, 1, 1)
    del state["segmentation_head.0.bias"]
    with pytest.raises(CheckpointError) as caught:
        recognise(state)
    said = str(caught.value)
    assert "compared with resnet18-unet (segmentation_models_pytorch" in said
    assert "segmentation_head.0.weight is (1, 2, 1, 1), expected (1, 2, 3, 3)" in said
    assert "segmentation_head.0.bias (1,) is missing" in said
    assert "encoder.fc.weight (10, 4) is unexpected" in said
    for i in range(20):
        state[f"extra{i}"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="and 13 more") as caught:
        recognise(state)
    assert len(re.findall(" is (missing|unexpected|.*?, expected)", str(caught.value))) == 10


def test_strangers_are_listed_with_shapes():
    with pytest.raises(CheckpointError, match=r"None of the 30 tensors.*resnet18-unet.*x0 \(2, 3\), x1") as caught:
        recognise({f"x{i}": torch.zeros(2, 3) for i in range(30)})
    assert "x9" in str(caught.value) and "x10" not in str(caught.value)


def test_names_from_a_file_cannot_flood_or_rewrite_a_terminal():
    for state in (
        {"\x1b[2J\n": torch.zeros(1), "y" * 10**6: torch.zeros(2)},
        {"model.0.weight": torch.zeros(1), "\x1b[2J\n": torch.zeros(1), "y" * 10**6: torch.zeros(2)},
    ):
        with pytest.raises(CheckpointError) as caught:
            recognise(state)
        said = str(caught.value)
        assert said.isprintable() and r"\x1b[2J\n" in said and "yyy" in said and len(said) < 2000


def test_two_names_for_one_tensor_are_refused():
    state = DnCNN(features=2, depth=3).state_dict()
    with pytest.raises(CheckpointError, match=r"dncnn\.0\.bias \(2,\) is unexpected"):
        recognise({**state, "dncnn.0.bias": torch.zeros(2)})


def test_counters_may_be_absent():
    full = OriginalResNet18UNet(width=2, decoder_channels=(2,) * 4).state_dict()
    assert recognise({k: t for k, t in full.items() if "num_batches" not in k}) == recognise(full)


@pytest.mark.parametrize("architecture", ["resnet18-unet", "dncnn", "lxie-net", "mambair", "edvr-stf", "swin-stf"])
def test_absurd_sizes_are_no_network(architecture):
    state = meta_state(architecture, {})
    first = next(iter(state))
    wide = torch.empty(1, device="meta").expand(2**40, 2**20)
    with pytest.raises(CheckpointError):
        recognise({**state, first: wide})


# --- from a file to a network ---------------------------------------------------------------------------------------


def assembled(path, state, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return assemble(*read_state(path))


SMALL = {"width": 2, "decoder_channels": (5, 4, 3, 3, 2)}
NETWORKS = [
    ResNet18UNet(**SMALL),
    ResNet18UNet(**SMALL, full_resolution_skip=3),
    ResNet18UNet(**SMALL, full_resolution_skip=3, batch_norm=False, input_blocks=2),
    OriginalResNet18UNet(width=2, decoder_channels=(5, 4, 3, 3)),
    DnCNN(features=3, depth=5),
    DnCNN(features=3, depth=5, batch_norm=True),
    LXIENet(width=4, depths=(1, 1), d_state=2),
    MambaIR(width=6, depths=(1, 2), d_state=2),
]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_network_comes_back_in_float32(tmp_path, network, dtype):
    before = torch.get_rng_state()
    card, module = assembled(tmp_path / "net.st", {name: t.to(dtype) for name, t in network.state_dict().items()})
    assert torch.equal(torch.get_rng_state(), before)
    assert type(module) is type(network)
    assert (card.name, card.source) == ("net", str(tmp_path / "net.st"))
    assert card.parameters == sum(p.numel() for p in network.parameters())
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    for name, tensor in network.state_dict().items():
        found = module.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor.to(dtype).to(tensor.dtype))


@pytest.mark.parametrize(
    ("network", "domain", "noise", "size_multiple", "output_scale"),
    [
        (NETWORKS[0], "unit", "none", 32, 1.0),
        (NETWORKS[1], "stabilised", "estimate", 32, 1.0),
        (NETWORKS[3], "symmetric", "none", 32, 0.5),
        (NETWORKS[4], "unit", "none", 1, 1.0),
    ],
)
def test_the_card_says_how_to_run_it(tmp_path, network, domain, noise, size_multiple, output_scale):
    card, module = assembled(tmp_path / "net.st", network.state_dict())
    assert (card.domain, card.noise) == (domain, noise)
    assert (card.size_multiple, card.output_scale) == (size_multiple, output_scale)
    x = torch.zeros(1, 1, size_multiple, 2 * size_multiple)
    assert module(x).shape[2:] == (output_scale * size_multiple, 2 * output_scale * size_multiple)


def test_dncnn_pytorch_files_are_run_with_their_own_epsilon(tmp_path):
    network = DnCNN(features=2, depth=4, batch_norm=True, bias=False, norm_eps=1e-5).eval()
    state = {name.replace("model.", "module.dncnn."): t for name, t in network.state_dict().items()}
    _, module = assembled(tmp_path / "net.st", state)
    x = torch.linspace(0, 1, 30).reshape(1, 1, 5, 6)
    assert torch.equal(module(x), network(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    state = DnCNN(features=2, depth=3).state_dict()
    state["model.2.weight"] = state["model.2.weight"].clone()
    state["model.2.weight"][0, 0, 1, 1] = value
    with pytest.raises(CheckpointError, match=r"model\.2\.weight holds NaN or infinite"):
        assembled(tmp_path / "net.st", state)


def test_weights_beyond_float32_are_refused(tmp_path):
    state = {name: tensor.double() for name, tensor in DnCNN(features=2, depth=3).state_dict().items()}
    state["model.0.bias"] = torch.full((2,), 1e300, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"model\.0\.bias holds NaN or infinite"):
        assembled(tmp_path / "net.st", state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_weights_that_are_no_floats_are_refused(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in DnCNN(features=2, depth=3).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"model\.0\.weight has dtype .*int|bool.*expected a floating"):
        assembled(tmp_path / "net.st", state)


@pytest.mark.parametrize(
    "network", [ResNet18UNet(in_channels=3, **SMALL), DnCNN(3, 3, 2, 3), DnCNN(2, 1, 2, 3), DnCNN(1, 3, 2, 3)]
)
def test_networks_for_colour_are_refused_in_words(tmp_path, network):
    with pytest.raises(CheckpointError, match=r"channels into .* one channel in and one out"):
        assembled(tmp_path / "net.st", network.state_dict())


# --- a card in the file's header ------------------------------------------------------------------------------------


def with_card(path, state, entries):
    return assembled(path, state, {"xrk_card": entries if isinstance(entries, str) else json.dumps(entries)})


def test_a_card_in_the_header_takes_precedence(tmp_path):
    entries = {"name": "mine", "domain": "symmetric", "licence": "MIT", "figures": {"psnr": 40.0}, "size_multiple": 64}
    card, module = with_card(tmp_path / "net.st", NETWORKS[0].state_dict(), {**entries, "sha256": None, "source": "?"})
    assert {name: getattr(card, name) for name in entries} == entries
    assert (card.architecture, card.config["width"], card.noise) == ("resnet18-unet", 2, "none")
    assert card.source == str(tmp_path / "net.st") and len(card.sha256) == 64
    assert isinstance(module, ResNet18UNet)


def test_a_card_may_say_what_no_tensor_tells(tmp_path):
    network = DnCNN(features=2, depth=4, batch_norm=True, norm_eps=0.25).eval()
    card, module = with_card(tmp_path / "net.st", network.state_dict(), {"config": {"norm_eps": 0.25}})
    assert card.config == {
        "in_channels": 1,
        "out_channels": 1,
        "features": 2,
        "depth": 4,
        "batch_norm": True,
        "bias": True,
        "norm_eps": 0.25,
    }
    x = torch.linspace(0, 1, 30).reshape(1, 1, 5, 6)
    assert torch.equal(module(x), network(x))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"config": {"width": 10**9}}, "width = 1000000000, but the tensors say 2"),
        ({"config": {"bogus": 1}}, "bogus = 1, but the tensors say 'nothing of it'"),
        ({"architecture": "dncnn"}, "architecture = 'dncnn', but the tensors say 'resnet18-unet'"),
        ({"output_scale": 0.5}, "output_scale = 0.5, but the tensors say 1.0"),
        ({"size_multiple": 16}, "needs a multiple of 32"),
        ({"domain": "log"}, "The field 'domain'"),
        ({"colour": "blue"}, "no field 'colour'"),
        ("not json", "not JSON"),
        ("[1]", "not a JSON object"),
    ],
)
def test_a_card_that_contradicts_the_tensors_is_refused(tmp_path, entries, said):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        with_card(tmp_path / "net.st", NETWORKS[0].state_dict(), entries)
