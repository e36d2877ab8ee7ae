"""Weights of the blind-spot network in Keras's files."""

import numpy as np
import pytest
import torch

import xrk
from xrk.errors import CheckpointError, CheckpointFileError, InputTypeError
from xrk.models import BlindSpot

h5py = pytest.importorskip("h5py")

LAYERS = [f"enc_conv{n}" for n in range(7)] + [
    f"dec_conv{n}{b}" for n in (5, 4, 3, 2) for b in ("", "b")
] + ["dec_conv1a", "dec_conv1b"]  # fmt: skip


def write(path, network, *, version="2.9.0", root="model_weights", branch="model_2", rename=str, **extra):
    """The file that Keras would have written of `network`, whose branches are all of one kind or all four."""
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    orders = {}
    with h5py.File(path, "w") as file:
        if version:
            file.attrs["keras_version"] = version
        group = file.create_group(root) if root else file
        tops = ["conv1x1_1", "conv1x1_2", "loc", "std"]
        group.attrs["layer_names"] = [branch.encode(), *(t.encode() for t in tops)]
        for layer in [*LAYERS, *tops]:
            if f"{layer}.bias" not in state:
                continue
            kernel, bias = state[f"{layer}.weight"].transpose(2, 3, 1, 0), state[f"{layer}.bias"]
            holder = group.require_group(branch if layer in LAYERS else layer)
            name = rename(layer) if layer in LAYERS else layer
            holder[f"{name}/kernel:0"], holder[f"{name}/bias:0"] = kernel, bias
            order = orders.setdefault(holder.name, [])
            order += [f"{name}/kernel:0".encode(), f"{name}/bias:0".encode()]
            holder.attrs["weight_names"] = order
        for name, value in extra.items():
            group[f"poisson_gaussian_layer/poisson_gaussian_layer/{name}:0"] = np.float32(value)
    return path


@pytest.fixture
def network():
    torch.manual_seed(0)
    return BlindSpot(features=2).eval().requires_grad_(False)


def test_the_file_of_keras_2_9_gives_the_published_weights(shared_data):
    from tests.models.test_blindspot import published

    file = shared_data / "fixtures" / "sspg_keras2.9_weights.hdf5"
    expected = published()
    model = xrk.load(file, rotations=(0, 1, 2, 3))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.module.state_dict()[name], tensor, rtol=0, atol=1e-7)
    folded = xrk.load(file)
    assert folded.card.config["rotations"] == [3]
    assert (folded.card.domain, folded.card.noise) == ("unit", "fit")
    kernel = expected.conv1x1_1.weight
    torch.testing.assert_close(folded.module.conv1x1_1.weight, kernel.view(384, 4, 96, 1, 1).sum(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("root", ["model_weights", ""])
@pytest.mark.parametrize("branch", ["model", "functional_7"])
def test_layers_are_found_by_structure(tmp_path, network, root, branch):
    path = write(tmp_path / "w.hdf5", network, version="2.2.4", root=root, branch=branch)
    model = xrk.load(path)
    assert model.card.config["rotations"] == [0, 1, 2, 3]
    for name, tensor in network.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], tensor)


def test_foreign_names_go_by_order(tmp_path, network):
    numbers = {layer: f"conv2d_{n + 5}" for n, layer in enumerate(LAYERS)}
    path = write(tmp_path / "w.h5", network, rename=numbers.get)
    model = xrk.load(path, rotations=[0, 1, 2, 3])
    for name, tensor in network.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], tensor)


def test_the_version_decides(tmp_path, network):
    for version, rotations in (("2.3.0-tf", [3]), ("2.15.0", [3]), ("3.1.0", [3]), ("2.2.4", [0, 1, 2, 3])):
        path = write(tmp_path / "w.hdf5", network, version=version)
        assert xrk.load(path).card.config["rotations"] == rotations
    for version in ("2.2.4-tf", ""):
        path = write(tmp_path / "w.hdf5", network, version=version)
        with pytest.raises(CheckpointError, match=r"w\.hdf5: the file was written by Keras .*pass rotations="):
            xrk.load(path)
        assert xrk.load(path, rotations=(3, 3, 3, 3)).card.config["rotations"] == [3]


def test_calibrated_files(tmp_path, network):
    path = write(tmp_path / "w.hdf5", network, a=0.5, b=0.25)
    model = xrk.load(path)
    assert model.card.config["noise"] == "poisson-gaussian"
    assert float(model.module.noise.a) == 0.5


def test_what_is_none(tmp_path, network):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["frames"] = np.zeros((3, 4, 4), np.uint16)
    with pytest.raises(CheckpointFileError, match="not one of Keras's"):
        xrk.load(tmp_path / "data.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        file["dense/dense/kernel:0"] = np.zeros((3, 4), np.float32)
    with pytest.raises(CheckpointError, match=r"dense\.weight"):
        xrk.load(tmp_path / "other.h5")
    whole = write(tmp_path / "w.hdf5", network).read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.hdf5").write_bytes(whole[:length])
        with pytest.raises(CheckpointFileError, match=r"damaged"):
            xrk.load(tmp_path / "cut.hdf5")


@pytest.mark.parametrize("rotations", [(), (0, 5), (0, 1)])
def test_wrong_rotations(tmp_path, network, rotations):
    path = write(tmp_path / "w.hdf5", network)
    with pytest.raises(CheckpointError, match=r"rotations="):
        xrk.load(path, rotations=rotations)


@pytest.mark.parametrize("rotations", [3, (0, 1, 2, 3.0), "0123", [[0], [1], [2], [3]], True])
def test_rotations_that_are_no_numbers(tmp_path, network, rotations):
    path = write(tmp_path / "w.hdf5", network)
    with pytest.raises(InputTypeError, match=r"expected quarter turns"):
        xrk.load(path, rotations=rotations)


def test_rotations_of_another_network():
    with pytest.raises(CheckpointError, match="blind-spot"):
        xrk.load("resnet18-unet", rotations=(0, 1, 2, 3))
