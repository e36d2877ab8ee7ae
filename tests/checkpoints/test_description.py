import json

import pytest
import torch

from xrk.checkpoints import describe_checkpoint
from xrk.errors import CheckpointError, CheckpointFileError
from xrk.models import ResNet18UNet

SMALL = {"width": 2, "decoder_channels": (5, 4, 3, 3, 2)}


def test_describes_what_fits(tmp_path):
    network = ResNet18UNet(**SMALL, full_resolution_skip=3)
    content = {"params": network.state_dict(), **{f"entry {i}": i for i in range(10)}}
    torch.save(content, tmp_path / "net.pth")
    description = describe_checkpoint(tmp_path / "net.pth")
    assert description.problem is None
    assert description.tensors == len(network.state_dict())
    assert description.numbers == sum(tensor.numel() for tensor in network.state_dict().values())
    said = str(description)
    for part in ("torch zip", "params", "entry 7 and 2 more", "resnet18-unet (in_channels 1", "stabilised values"):
        assert part in said
    assert "float32, int64" in said and "does not fit" not in said
    assert json.loads(json.dumps(description.to_dict()))["card"]["config"]["full_resolution_skip"] == 3


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"x": torch.zeros(2, 5)}, r"x (2, 5)"),
        (ResNet18UNet(in_channels=3, out_channels=3, **SMALL).state_dict(), "turns 3 channels into 3"),
    ],
)
def test_describes_what_does_not_fit(tmp_path, state, said):
    torch.save(state, tmp_path / "net.pth")
    description = describe_checkpoint(tmp_path / "net.pth")
    assert description.card is None and said in description.problem
    assert f"does not fit: {description.problem}" in str(description)
    assert json.loads(json.dumps(description.to_dict()))["card"] is None


def test_describes_a_released_file_of_another_network(shared_data):
    description = describe_checkpoint(shared_data / "checkpoints" / "noise2noise_unet_rgb.pt")
    assert description.card is None
    assert "_block1.0.weight (48, 3, 3, 3)" in description.problem


def test_what_is_no_checkpoint_raises(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointFileError):
        describe_checkpoint(tmp_path / "x.pth")
    torch.save({"epoch": 3}, tmp_path / "y.pth")
    with pytest.raises(CheckpointError):
        describe_checkpoint(tmp_path / "y.pth")
