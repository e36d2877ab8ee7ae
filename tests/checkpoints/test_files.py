import argparse
import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xrk.checkpoints import read_state
from xrk.errors import CheckpointError, CheckpointFileError, XrkError

STATE = OrderedDict({"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.5, -2.0])})


def save(path, content, container="zip"):
    if container == "safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    return path


def assert_is_state(found, state=STATE):
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor)
        assert found[name].device.type == "cpu" and not found[name].requires_grad


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
def test_the_content_decides_not_the_name(tmp_path, container, name):
    path = save(tmp_path / name, dict(sorted(STATE.items())), container)
    state, file = read_state(path)
    assert_is_state(dict(sorted(state.items())), dict(sorted(STATE.items())))
    assert file.container.endswith(container)
    assert file.size == path.stat().st_size
    assert (file.wrapper, file.ignored, file.metadata) == ((), (), {})


def test_reads_the_header_of_safetensors(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "w", {"xrk_card": "{}"})
    assert read_state(str(tmp_path / "w"))[1].metadata == {"xrk_card": "{}"}


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_tensors_saved_on_a_gpu_come_to_the_cpu(tmp_path, monkeypatch, container):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    path = save(tmp_path / "w.pth", STATE, container)
    assert b"cuda:3" in path.read_bytes()
    assert_is_state(read_state(path)[0])


def test_reads_released_files(shared_data):
    state, file = read_state(shared_data / "checkpoints" / "noise2noise_unet_rgb.pt")
    assert file.container == "torch legacy"
    assert state["_block6.4.weight"].shape == (3, 32, 3, 3)


OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("content", "wrapper", "ignored"),
    [
        ({"params": STATE}, ("params",), ()),
        ({"params": OTHER, "params_ema": STATE}, ("params_ema",), ("params",)),
        ({"state_dict": STATE, "epoch": 3, "optimizer": {"lr": 1e-4}}, ("state_dict",), ("epoch", "optimizer")),
        ({"model_state_dict": STATE, "loss": 0.1}, ("model_state_dict",), ("loss",)),
        ({"model": STATE, "it": 7, "ema": None}, ("model",), ("it", "ema")),
        ({"model": {"params_ema": STATE, "step": 3}, 5: "five"}, ("model", "params_ema"), ("5", "step")),
        ({"model": {"depth": 3}, "state_dict": STATE}, ("state_dict",), ("model",)),
        ({**STATE, "mask_values": [0, 1], "epoch": 9}, (), ("mask_values", "epoch")),
    ],
)
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_opens_wrappers(tmp_path, content, wrapper, ignored, container):
    state, file = read_state(save(tmp_path / "w.pth", content, container))
    assert_is_state(state)
    assert (file.wrapper, file.ignored) == (wrapper, ignored)


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_orig_mod.", "module._orig_mod."])
def test_takes_off_the_names_of_wrapping_modules(tmp_path, prefix):
    state, _ = read_state(save(tmp_path / "w.pth", {"params": {prefix + name: t for name, t in STATE.items()}}))
    assert_is_state(state)


def test_leaves_a_prefix_that_not_all_names_have(tmp_path):
    content = {"module.a": torch.ones(1), "b": torch.ones(2)}
    assert_is_state(read_state(save(tmp_path / "w.pth", content))[0], content)


def test_parameters_become_tensors(tmp_path):
    content = {name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()}
    assert_is_state(read_state(save(tmp_path / "w.pth", content))[0])


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        ({"model": torch.nn.ReLU(), "epoch": 3}, r"torch\.nn\.modules\.activation\.ReLU"),
        ({"state_dict": STATE, "args": argparse.Namespace(lr=1)}, r"argparse\.Namespace"),
    ],
)
def test_refuses_pickled_objects_and_says_what_to_do(tmp_path, content, named, container):
    path = save(tmp_path / "w.pth", content, container)
    with pytest.raises(CheckpointFileError, match=rf"{named}.*run code.*torch\.save\(module\.state_dict\(\), path\)"):
        read_state(path)


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_runs_no_code_from_the_file(tmp_path, write):
    write({"state_dict": STATE, "trap": _Trap(tmp_path / "sprung")}, tmp_path / "w.pth")
    with pytest.raises(CheckpointFileError, match="run code"):
        read_state(tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()


def test_refuses_torchscript(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for name in ("net/data.pkl", "net/constants.pkl", "net/code/__torch__.py"):
            archive.writestr(name, b"")
    with pytest.raises(CheckpointFileError, match="TorchScript archive, which holds code"):
        read_state(tmp_path / "w.pt")


def _npz():
    file = io.BytesIO()
    np.savez(file, x=np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"II*\0" + bytes(100), "TIFF image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG picture"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"sys_info" + bytes(600), "before 2017"),
        (b"\x80\x04\x95" + bytes(100), "Python pickle"),
        (_npz(), "torch.save did not write"),
        (b"PK\x03\x04" + bytes(100), "damaged zip"),
        (bytes(range(1, 200)), "neither, or is damaged"),
        (b"x", "neither, or is damaged"),
    ],
)
def test_refuses_other_files_in_one_sentence(tmp_path, content, said):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(CheckpointFileError, match=said) as caught:
        read_state(tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(caught.value) and "\n" not in str(caught.value)


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(CheckpointFileError, match="is a directory"):
        read_state(tmp_path)
    with pytest.raises(CheckpointFileError, match="There is no checkpoint file"):
        read_state(tmp_path / "absent.pth")
    with pytest.raises(OSError, match="There is no checkpoint file"):
        read_state(tmp_path / "absent" / "absent.pth")
    with pytest.raises(CheckpointFileError, match="cannot be read"):
        read_state("null\0byte.pth")


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_every_truncation_is_refused(tmp_path, container):
    whole = save(tmp_path / "w", STATE, container).read_bytes()
    assert len(whole) > 100
    for length in [*range(0, 40), *range(40, len(whole), 37), len(whole) - 1]:
        (tmp_path / "w").write_bytes(whole[:length])
        with pytest.raises(CheckpointFileError):
            read_state(tmp_path / "w")


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_damage_gives_an_error_of_xrk_or_tensors(tmp_path_factory, container):
    folder = tmp_path_factory.mktemp("damage")
    whole = save(folder / "whole", {**STATE}, container).read_bytes()
    damage = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=4)

    @settings(max_examples=150, deadline=None)
    @given(damage)
    def check(changes):
        damaged = bytearray(whole)
        for position, value in changes:
            damaged[position] = value
        (folder / "w").write_bytes(damaged)
        try:
            state, _ = read_state(folder / "w")
        except XrkError as error:
            assert str(folder / "w") in str(error)
        else:
            assert sum(t.numel() * t.element_size() for t in state.values()) <= 8 * len(whole)

    check()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointFileError):
        read_state(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(3), "holds a Tensor"),
        ([torch.zeros(3)], "holds a list"),
        ({}, "holds no state dict"),
        ({"epoch": 3, "lr": 0.1}, r"\(epoch, lr\)"),
        ({"0": {"w": torch.zeros(3)}}, "holds no state dict"),
        ({"w": torch.zeros(3, device="meta")}, "not a plain dense"),
        ({"w": torch.eye(3).to_sparse()}, "not a plain dense"),
    ],
)
def test_refuses_what_holds_no_plain_state_dict(tmp_path, content, said):
    with pytest.raises(CheckpointError, match=said):
        read_state(save(tmp_path / "w.pth", content))


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_few_bytes_cannot_claim_terabytes(tmp_path, container):
    path = save(tmp_path / "w.pth", {"w": torch.zeros(1).expand(2**20, 2**20)}, container)
    assert path.stat().st_size < 2000
    with pytest.raises(CheckpointError, match="repeats numbers"):
        read_state(path)


def test_a_zip_archive_must_not_unpack_to_many_times_its_size(tmp_path):
    save(tmp_path / "plain.pth", {"w": torch.zeros(1 << 20)})
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
    with pytest.raises(CheckpointFileError, match="many times its size"):
        read_state(tmp_path / "packed.pth")


def test_a_legacy_file_must_not_claim_a_storage_larger_than_itself(tmp_path):
    # 2^31 - 4 numbers instead of 6: the pickle names the size, the data are not there.
    whole = save(tmp_path / "w.pth", {"w": torch.arange(60000.0)}, "legacy").read_bytes()
    claim, lie = struct.pack("<cI", b"J", 60000), struct.pack("<cI", b"J", 2**31 - 4)
    if claim not in whole:
        claim, lie = struct.pack("<cH", b"M", 60000), struct.pack("<cI", b"J", 2**31 - 4)
    assert claim in whole
    (tmp_path / "w.pth").write_bytes(whole.replace(claim, lie))
    with pytest.raises(CheckpointFileError):
        read_state(tmp_path / "w.pth")
