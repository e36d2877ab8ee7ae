import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from torch import nn

from xrk import io
from xrk.enhancement import enhance, enhance_file
from xrk.errors import ImageFileError, InputError, InputTypeError, ModelNotFoundError
from xrk.loading import Model
from xrk.models import Card
from xrk.noise import NoiseModel
from xrk.radiograph import correct


class Lift(nn.Module):
    """Adds 1/16 of the range."""

    def forward(self, x):
        return x + 0.0625


def _model(**card):
    return Model(Card(**{"name": "lift", "architecture": "dncnn", **card}), Lift().eval())


@pytest.fixture
def frame():
    return np.random.default_rng(0).integers(500, 3000, (40, 50)).astype(">u2")


@pytest.fixture
def source(tmp_path, frame):
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, frame, byteorder=">", resolution=(200, 200), description="shot 7", metadata=None)
    return path


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_keeps_its_layout_and_says_what_was_done(tmp_path, source, frame):
    target = tmp_path / "out.tif"
    report = enhance_file(source, target, _model(), levels=(0, 4096), memory="1GiB")
    np.testing.assert_array_equal(tifffile.imread(target), frame + 256)
    with tifffile.TiffFile(target) as tif:
        assert tif.byteorder == ">"
        assert tif.pages[0].tags["XResolution"].value == (200, 1)
        assert "shot 7" in tif.pages[0].description
    assert io.read_report(target) == json.loads(report.to_json(timing=False))
    assert report.file == {"input": "in.tif"}
    assert report.dtype == ">u2"
    assert report.seconds > 0
    assert _names(tmp_path) == ["in.tif", "out.tif"]


def test_the_same_call_gives_the_same_file(tmp_path, source):
    for name in ("a.tif", "b.tif"):
        enhance_file(source, tmp_path / name, _model(noise="estimate", domain="stabilised"))
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


def test_without_report(tmp_path, source):
    enhance_file(str(source), str(tmp_path / "out.tif"), _model(), report=False)
    assert io.read_report(tmp_path / "out.tif") is None


def test_in_place(source, frame):
    enhance_file(source, source, _model(), levels=(0, 4096))
    np.testing.assert_array_equal(tifffile.imread(source), frame + 256)
    assert _names(source.parent) == ["in.tif"]


def test_pages_are_a_stack(tmp_path):
    stack = np.random.default_rng(1).uniform(0, 0.5, (3, 20, 30)).astype(np.float32)
    stack[1, 2, 3] = np.nan
    tifffile.imwrite(tmp_path / "in.tif", stack, photometric="minisblack")
    calls = []
    report = enhance_file(tmp_path / "in.tif", tmp_path / "out.tif", _model(), progress=lambda *a: calls.append(a))
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), enhance(stack, _model()))
    assert len(report.frames) == 3
    assert report.invalid == 1
    assert calls == [(20, 60), (40, 60), (60, 60)]


def test_levels_that_the_file_states(tmp_path, frame):
    path = tmp_path / "in.ome.tif"
    tifffile.imwrite(path, frame, ome=True, metadata={"axes": "YX", "SignificantBits": 12})
    report = enhance_file(path, tmp_path / "out.ome.tif", _model())
    assert (report.levels, report.levels_source) == ((0.0, 4095.0), "file")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.ome.tif"), frame + 256)
    report = enhance_file(path, tmp_path / "out.ome.tif", _model(), levels=(0, 8192))
    assert (report.levels, report.levels_source) == ((0.0, 8192.0), "given")


def test_dark_and_flat(tmp_path, source, frame):
    rng = np.random.default_rng(2)
    darks = rng.integers(95, 106, (4, *frame.shape)).astype(np.uint16)
    flat = rng.integers(20000, 40000, frame.shape).astype(np.uint16)
    flat[3, 4], flat[5, 6] = 0, 90
    tifffile.imwrite(tmp_path / "darks.tif", darks, photometric="minisblack")
    target = tmp_path / "out.tif"
    report = enhance_file(source, target, _model(), levels=(0, 4096), dark=tmp_path / "darks.tif", flat=flat)
    corrected, invalid = correct(frame.astype(np.uint16), darks, flat)
    assert invalid.sum() == 2
    expected = np.where(invalid, frame, corrected + 256)
    np.testing.assert_array_equal(tifffile.imread(target), expected)
    assert report.file["correction"] == {"dark": "darks.tif", "flat": "array", "invalid": 2, "clipped": 0}
    assert report.invalid == 2


def test_the_dark_tells_the_offset_of_the_noise(tmp_path, source, frame, monkeypatch):
    offsets = []

    def estimate(frame, offset=None, *, mask=None):
        offsets.append(offset)
        return NoiseModel(1.0)

    monkeypatch.setattr("xrk.job.estimate_noise", estimate)
    model = _model(noise="estimate")
    dark = np.full(frame.shape, 103, np.uint16)
    enhance_file(source, tmp_path / "out.tif", model)
    enhance_file(source, tmp_path / "out.tif", model, levels=(64, 4095))
    enhance_file(source, tmp_path / "out.tif", model, levels=(64, 4095), dark=dark)
    enhance_file(source, tmp_path / "out.tif", model, levels=(64, 4095), flat=dark * 200)
    assert offsets == [None, 64.0, 103.0, 64.0]


@pytest.mark.parametrize("as_file", [True, False])
def test_mask(tmp_path, source, frame, as_file):
    mask = np.zeros(frame.shape, np.uint8)
    mask[10:12, 20:30] = 255
    if as_file:
        tifffile.imwrite(tmp_path / "mask.tif", mask)
    given = tmp_path / "mask.tif" if as_file else mask
    report = enhance_file(source, tmp_path / "out.tif", _model(), levels=(0, 4096), mask=given)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), np.where(mask > 0, frame, frame + 256))
    assert report.invalid == 20
    assert report.file.get("mask") == ("mask.tif" if as_file else None)


def test_preview(tmp_path, source):
    enhance_file(source, tmp_path / "out.tif", _model(), preview=tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_output_does_not_carry_over_is_said(tmp_path, frame):
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        writer.write(frame, metadata=None)
        writer.write(frame[::2, ::2], subfiletype=1, metadata=None)
    report = enhance_file(tmp_path / "in.tif", tmp_path / "out.tif", _model())
    assert report.warnings == ["in.tif: reduced copies of the image are not carried over."]


# --- nothing is written where something is wrong


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"src": "absent.tif"}, ImageFileError, r"absent\.tif"),
        ({"src": "folder"}, ImageFileError, "folder"),
        ({"src": "text.tif"}, ImageFileError, r"text\.tif"),
        ({"src": "cut.tif"}, ImageFileError, r"cut\.tif"),
        ({"dst": "folder"}, ImageFileError, "folder"),
        ({"dst": "absent/out.tif"}, ImageFileError, "absent"),
        ({"dst": "out.png"}, ImageFileError, r"out\.png"),
        ({"preview": "absent/out.png"}, ImageFileError, "absent"),
        ({"preview": "out.tif"}, InputError, r"output and the preview would both be written to .*out\.tif"),
        ({"preview": "in.tif"}, InputError, r"preview .*in\.tif would overwrite the input"),
        ({"preview": "out.jpg"}, ImageFileError, r"out\.jpg cannot be written: pictures are PNG"),
        ({"dark": "dark.tif", "dst": "dark.tif"}, InputError, "output .* would overwrite the dark frame"),
        ({"dark": "dark.tif", "uncertainty": "dark.tif"}, InputError, "uncertainty .* would overwrite the dark frame"),
        ({"flat": "dark.tif", "preview": "dark.tif"}, InputError, "preview .* would overwrite the flat field"),
        ({"mask": "dark.tif", "dst": "dark.tif"}, InputError, "output .* would overwrite the mask"),
        ({"badpixels": "dark.tif", "dst": "dark.tif"}, InputError, "output .* would overwrite the map of bad pixels"),
        ({"model": "nothing-like-it"}, ModelNotFoundError, "nothing-like-it"),
        ({"levels": (9, 1)}, InputError, "reversed"),
        ({"mask": "absent.tif"}, ImageFileError, r"absent\.tif"),
        ({"mask": "small.tif"}, InputError, r"mask has shape \(3, 4\)"),
        ({"dark": "small.tif"}, InputError, r"dark frame has shape \(3, 4\); expected \(40, 50\)"),
        ({"flat": "absent.tif"}, ImageFileError, r"absent\.tif"),
        ({"flat": [[1]]}, InputTypeError, "flat field is a list"),
        ({"dark": "in.tif", "flat": "in.tif"}, InputError, "above the dark frame nowhere"),
        ({"memory": "much"}, InputError, "memory='much'"),
        ({"progress": 3}, InputTypeError, "progress=3"),
    ],
)
def test_errors_come_before_anything_is_written(tmp_path, source, changes, error, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.tif").write_text("no image at all")
    (tmp_path / "cut.tif").write_bytes(source.read_bytes()[:1000])
    tifffile.imwrite(tmp_path / "small.tif", np.ones((3, 4), np.uint8))
    tifffile.imwrite(tmp_path / "dark.tif", np.ones((40, 50), np.uint16))
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    call = {"src": "in.tif", "dst": "out.tif", "model": _model()}
    for name, value in changes.items():
        call[name] = value
    for name in ("src", "dst", "preview", "mask", "dark", "flat", "badpixels", "uncertainty"):
        if isinstance(call.get(name), str):
            call[name] = tmp_path / call[name]
    with pytest.raises(error, match=message) as caught:
        enhance_file(**call)
    assert type(caught.value) is error
    assert isinstance(caught.value, OSError if error is ImageFileError else (ValueError, TypeError))
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["src", "dst", "preview"])
def test_paths_are_paths(tmp_path, source, frame, name):
    call = {"src": source, "dst": tmp_path / "out.tif", "preview": None, name: frame}
    with pytest.raises(InputTypeError, match=f"{name} is a ndarray; expected a path"):
        enhance_file(**call)


def test_a_dtype_that_is_read_but_not_enhanced(tmp_path):
    tifffile.imwrite(tmp_path / "in.tif", np.ones((4, 5), np.uint32))
    with pytest.raises(InputTypeError, match="uint32; expected one of"):
        enhance_file(tmp_path / "in.tif", tmp_path / "out.tif", _model())


def test_a_cancelled_call_leaves_the_old_file(tmp_path, source):
    target = tmp_path / "out.tif"
    target.write_bytes(b"old")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        enhance_file(source, target, _model(), progress=stop)
    assert target.read_bytes() == b"old"
    assert _names(tmp_path) == ["in.tif", "out.tif"]


def test_a_real_frame(tmp_path, shared_data):
    source = shared_data / "radiographs" / "synchrotron" / "radiography_2BM_0020.tif"
    report = enhance_file(source, tmp_path / "out.tif", _model(noise="estimate", domain="unit"), noise="off")
    before, after = io.read(source), io.read(tmp_path / "out.tif")
    assert (after.array.dtype, after.array.shape) == (before.array.dtype, before.array.shape)
    lifted = before.array.astype(np.int64) + 4096
    np.testing.assert_array_equal(after.array, lifted.clip(0, 65535))
    assert report.clipped == (lifted > 65535).sum()
