import hashlib
import re

import numpy as np
import pytest
import torch

from xrk.models import OriginalResNet18UNet, ResNet18UNet


def listing(module_class, **config):
    """Lines as in the published listings: name, shape, dtype."""
    with torch.device("meta"):
        state = module_class(**config).state_dict()
    return [f"{key} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for key, t in state.items()]


@pytest.mark.parametrize(
    ("module_class", "title", "digest"),
    [
        (
            OriginalResNet18UNet,
            "kunwardhruv ResNet18_UNet",
            "fd7a7a4d7b2bff2f5cd691d11b8c7069f7a9336fa7af070cb41396193abeed98",
        ),
        (
            ResNet18UNet,
            "smp Unet resnet18",
            "a55461e427fa731c9ca98361c67f7aadf58bf4b440cf377963cc03b348deb364",
        ),
    ],
)
def test_names_and_shapes_are_the_public_ones(module_class, title, digest):
    lines = listing(module_class)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest, lines


@pytest.mark.parametrize(
    ("module_class", "title"),
    [(OriginalResNet18UNet, "kunwardhruv ResNet18_UNet"), (ResNet18UNet, "smp Unet resnet18")],
)
def test_names_and_shapes_equal_the_listing(shared_data, module_class, title):
    file = shared_data.parent / "design" / "state_dicts" / "resnet18_unets.txt"
    if not file.is_file():
        pytest.skip("the listings of state dicts are not beside this checkout")
    section = re.search(rf"^### {title}:.*\n((?:  .*\n?)*)", file.read_text(), re.MULTILINE)
    assert listing(module_class) == [line.strip() for line in section[1].splitlines()]


@pytest.mark.parametrize(
    ("module_class", "fixture"),
    [(OriginalResNet18UNet, "resnet18_unet.npz"), (ResNet18UNet, "smp_unet_resnet18.npz")],
)
def test_agrees_with_the_original_modules(shared_data, give_formula_weights, module_class, fixture):
    pair = np.load(shared_data / "fixtures" / fixture)
    with torch.inference_mode():
        y = give_formula_weights(module_class())(torch.from_numpy(pair["x"])).numpy()
    assert y.shape == pair["y"].shape
    assert np.abs(y - pair["y"]).max() <= 1e-5 * np.abs(pair["y"]).max()


def test_the_original_ends_at_half_resolution_within_one(give_formula_weights):
    module = give_formula_weights(OriginalResNet18UNet(width=4, decoder_channels=(8, 6, 5, 3)))
    y = module(torch.linspace(-1, 1, 64 * 96).reshape(1, 1, 64, 96))
    assert y.shape == (1, 1, 32, 48)
    assert 0 < y.abs().max() < 1


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_variant_has_one_more_tensor_and_a_wider_last_block(batch_norm):
    small = {"width": 4, "decoder_channels": (8, 6, 5, 4, 3), "batch_norm": batch_norm}
    plain, variant = (set(listing(ResNet18UNet, full_resolution_skip=n, **small)) for n in (0, 7))
    assert plain - variant == {"decoder.blocks.4.conv1.0.weight (3, 4, 3, 3) float32"}
    assert variant - plain == {
        "decoder.blocks.4.conv1.0.weight (3, 11, 3, 3) float32",
        "input_skip.weight (7, 1, 3, 3) float32",
    }


def test_without_batch_norm_every_convolution_has_a_bias_but_the_skip():
    state = ResNet18UNet(width=2, decoder_channels=(2,) * 5, full_resolution_skip=2, batch_norm=False).state_dict()
    convolutions = {key.removesuffix(".weight") for key, tensor in state.items() if tensor.ndim == 4}
    assert {key.removesuffix(".bias") for key in state if key.endswith(".bias")} == convolutions - {"input_skip"}
    assert len(state) == 2 * len(convolutions) - 1


def test_the_variant_adds_to_its_input(give_formula_weights):
    module = give_formula_weights(ResNet18UNet(width=4, decoder_channels=(8, 6, 5, 4, 3), full_resolution_skip=2))
    x = torch.linspace(-3, 3, 32 * 64).reshape(1, 1, 32, 64)
    assert not torch.equal(module(x), x)
    for parameter in module.segmentation_head.parameters():
        parameter.data.zero_()
    assert torch.equal(module(x), x)
