"""The demo: what it writes, and that it helps."""

import numpy as np
import pytest
import tifffile

from xrk import demonstration, io
from xrk.errors import ImageFileError, InputError


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return demonstration.run(size=192, out=tmp_path_factory.mktemp("demo") / "new" / "folder")


def test_it_helps(outcome):
    assert outcome.psnr[1] > outcome.psnr[0] + 5
    assert outcome.ssim[1] > outcome.ssim[0]
    text = str(outcome)
    assert f"{outcome.psnr[1]:.2f} dB after" in text
    assert "s per megapixel" in text


def test_its_files(outcome):
    frames = {name: tifffile.imread(outcome.folder / f"{name}.tif") for name in ("noisy", "enhanced", "reference")}
    for frame in frames.values():
        assert frame.dtype == np.uint16
        assert frame.shape == (192, 192)
    # The reference is the high dose in counts of the low one.
    assert frames["reference"].mean() == pytest.approx(frames["noisy"].mean(), rel=0.01)
    assert io.read_report(outcome.folder / "enhanced.tif")["model"] == "resnet18-unet"
    assert (outcome.folder / "panel.png").read_bytes().startswith(b"\x89PNG")


def test_the_simulation_is_the_same_every_time():
    for first, second in zip(demonstration.simulate(64), demonstration.simulate(64), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("size", [0, 63, 8193])
def test_sizes_out_of_range(size, tmp_path):
    with pytest.raises(InputError, match=f"size is {size}; expected 64 to 8192"):
        demonstration.run(size=size, out=tmp_path)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ImageFileError, match="taken"):
        demonstration.run(size=64, out=tmp_path / "taken")


def test_two_energies(tmp_path):
    made = demonstration.run_dual_energy(size=160, out=tmp_path)
    low, high, fused = (tifffile.imread(tmp_path / f"{name}.tif") for name in ("low", "high", "fused"))
    assert low.shape == high.shape == fused.shape == made.shape == (116, 160)
    # Metal lets more of the hard beam through, and so does all else.
    assert np.median(high[40:80, 60:120]) > np.median(low[40:80, 60:120])
    assert io.read_report(tmp_path / "fused.tif")["fusion"]["shift"] == [0.0, 0.0]
    assert (tmp_path / "fused.png").read_bytes().startswith(b"\x89PNG")
    assert "80 and 150 kV" in str(made) and "shift +0 rows, +0 columns" in str(made)
