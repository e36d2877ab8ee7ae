"""Figures of two images against numpy and scikit-image, and the picture of them."""

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

import xrk
from xrk import metrics
from xrk.errors import InputError


def images(shape=(60, 80)):
    rng = np.random.default_rng(0)
    truth = rng.integers(10000, 50000, shape).astype(np.uint16)
    return (truth + rng.integers(-200, 200, shape)).astype(np.uint16), truth


def test_the_figures():
    x, y = images()
    found = xrk.compare(x, torch.from_numpy(y.astype(np.int32)), data_range=65535)
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(y, x, data_range=65535))
    assert found.ssim == pytest.approx(structural_similarity(y.astype(float), x.astype(float), data_range=65535))
    assert found.mse == pytest.approx(mean_squared_error(y, x))
    difference = np.abs(x.astype(int) - y)
    assert found.aad == pytest.approx(difference.mean())
    assert (found.largest, found.differing) == (difference.max(), np.count_nonzero(difference))
    assert metrics.mse(x, y) == found.mse
    assert metrics.aad(x, y) == found.aad


def test_the_range_is_the_dtypes_and_never_the_images():
    x, y = images((2, 30, 40))
    assert xrk.compare(x, y).data_range == 65535
    assert xrk.compare((x >> 8).astype(np.uint8), (y >> 8).astype(np.uint8)).data_range == 255
    assert xrk.compare(y, y).to_dict()["psnr"] is None
    with pytest.raises(InputError, match="data_range="):
        xrk.compare(x / 65535, y / 65535)
    with pytest.raises(InputError, match="shapes"):
        xrk.compare(x, y[0])


def test_regions():
    rng = np.random.default_rng(1)
    image = 1000 + 20 * rng.standard_normal((100, 100))
    image[40:60, 40:60] += 100
    even, disc = np.s_[:30, :30], np.s_[40:60, 40:60]
    assert metrics.snr(image, even) == pytest.approx(image[even].mean() / image[even].std(ddof=1))
    assert metrics.snr(image, even, 44.3) == pytest.approx(2 * metrics.snr(image, even))
    assert metrics.cnr(image, disc, even) == pytest.approx(5, rel=0.1)
    assert metrics.cnr(image, disc, even, 177.2) == pytest.approx(metrics.cnr(image, disc, even) / 2)
    flat = np.ones((9, 9))
    assert metrics.snr(flat, np.s_[:3, :3]) == np.inf
    assert metrics.cnr(flat, np.s_[:3, :3], np.s_[3:6, :3]) == 0
    with pytest.raises(InputError, match="has 0 pixels"):
        metrics.snr(image, np.s_[200:210, :5])
    with pytest.raises(InputError, match="resolution is 0"):
        metrics.snr(image, even, 0)


def test_missing_values_are_named():
    x, y = (image / 65535 for image in images())
    x[3, 4], y[5, 6] = np.nan, np.inf
    with pytest.raises(InputError, match="first image has 1 values that are not finite"):
        xrk.compare(x, y, data_range=1)
    with pytest.raises(InputError, match="second image has 1 values"):
        xrk.compare(np.nan_to_num(x), y, data_range=1)


def test_the_command_tells_of_regions(tmp_path, capsys):
    from xrk.cli import main

    x, y = images((3, 128, 100))
    y[:, 40:60, 30:40] += 3000
    for name, array in (("a", x), ("b", y)):
        xrk.io.write(tmp_path / f"{name}.tif", array)
    command = ["compare", *(str(tmp_path / f"{name}.tif") for name in "ab")]
    inside, beside = np.s_[40:60, 30:40], np.s_[70:120, 0:99]
    regions = ["--region", "40:60,30:40", "--background", "70:120,0:99"]
    assert main([*command, *regions]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a.tif against b.tif: PSNR")
    for line, name, frame in zip(lines[1:], "ab", (x[1], y[1]), strict=True):
        figures = f"SNR {metrics.snr(frame, inside):.2f}, CNR {metrics.cnr(frame, inside, beside):.2f}"
        assert line == f"{name}.tif: {figures}"
    more = ["--offset", "1000", "--resolution", "44.3", "--reference", command[2]]
    assert main([*command, "--region", "40:60,30:40", *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"a.tif: SNR_n {2 * metrics.snr(x[1] - 1000.0, inside):.2f}" and len(lines) == 4
    for options, problem in (
        (["--region", "40,30"], "expected rows and columns R0:R1,C0:C1"),
        (["--region", "0:10,90:101"], "The region 0:10,90:101 leaves an image of 128 rows and 100 columns"),
        (["--region", "0:9,0:9", "--background", "5:5,0:9"], "has 0 pixels"),
        (["--region", "0:9,0:9", "--resolution", "0"], "resolution is 0"),
        (["--background", "0:9,0:9"], "name it with --region"),
    ):
        assert main([*command, *options]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and problem in err


def test_the_picture(tmp_path):
    x, y = images()
    xrk.compare(x, y, png=tmp_path / "compared.png", row=5)
    assert (tmp_path / "compared.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="row is 60"):
        xrk.compare(x, y, png=tmp_path / "none.png", row=60)
    assert not (tmp_path / "none.png").exists()


def test_the_commands(tmp_path, capsys):
    from xrk.cli import main

    x, y = images((128, 128))
    for name, array in (("a", x), ("b", y)):
        xrk.io.write(tmp_path / f"{name}.tif", array)
    a, b = (str(tmp_path / f"{name}.tif") for name in "ab")
    assert main(["compare", a, b, "--picture", str(tmp_path / "p.png")]) == 0
    assert f"{xrk.compare(x, y)}" in capsys.readouterr().out
    assert main(["compare", a, b, "--reference", b]) == 0
    assert "b.tif against b.tif: PSNR inf dB" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    xrk.io.write(namesake := tmp_path / "other" / "a.tif", y)
    assert main(["compare", a, str(namesake), "--reference", b, "--region", "0:32,0:32"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == ["a.tif against b.tif"] * 2 + ["a.tif"] * 2 + ["b.tif"]
    assert "PSNR inf dB" in told[1] and "PSNR inf dB" not in told[0]
    assert main(["fuse", a, b, "-o", str(tmp_path / "f.tif"), "--pseudocolor", str(tmp_path / "f.png")]) == 0
    assert "wavelet fusion; shift +0 rows, +0 columns" in capsys.readouterr().out
    assert np.array_equal(xrk.io.read(tmp_path / "f.tif").array, xrk.fuse(x, y))
    assert main(["fuse", a, str(tmp_path / "none.tif"), "-o", str(tmp_path / "g.tif")]) == 2
    assert main(["compare", a, a, "--range", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    linked = tmp_path / "linked.png"
    linked.symlink_to(b)
    before = (tmp_path / "b.tif").read_bytes()
    for options in (["--picture", str(linked)], ["--reference", a, "--picture", a]):
        assert main(["compare", a, b, *options]) == 2
    assert (tmp_path / "b.tif").read_bytes() == before and xrk.io.read(a).array.shape == x.shape
    err = capsys.readouterr().err
    assert "linked.png would overwrite the image" in err and "ends in .png" in err
