"""Frames in groups of rows: what is filled, estimated and enhanced does not depend on how the rows come."""

import threading

import hypothesis.strategies as st
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from torch import nn

from xrk import io, radiograph
from xrk.bands import Frames, InOrder, Pixels
from xrk.enhancement import enhance, enhance_file
from xrk.errors import ImageFileError, InputError
from xrk.loading import Model
from xrk.models import Card
from xrk.noise import estimate_noise
from xrk.noise_line import OnDemand
from xrk.runtime import frames


@given(
    st.integers(1, 90), st.integers(1, 20), st.floats(0, 0.98), st.integers(0, 40), st.data(), st.sampled_from("fu")
)  # fmt: skip
@settings(max_examples=100)
def test_filled_rows_are_those_of_the_filled_frame(height, width, share, hole, data, kind):
    rng = np.random.default_rng(height * 1000 + width)
    frame = rng.integers(0, 60000, (height, width)).astype(np.uint16 if kind == "u" else np.float64)
    invalid = rng.random(frame.shape) < share
    top = data.draw(st.integers(0, height - 1))
    invalid[top : top + hole] = True
    invalid[data.draw(st.integers(0, height - 1)), 0] = False
    first = data.draw(st.integers(0, height - 1))
    end = data.draw(st.integers(first + 1, height))
    asked = []

    def counts(a, b):
        asked.append((a, b))
        return frame[a:b]

    got = radiograph.fill_rows(counts, lambda a, b: invalid[a:b] if invalid[a:b].any() else None, (height, first, end))
    expected = radiograph.fill(frame, invalid)[first:end]
    np.testing.assert_array_equal(got, expected)
    assert len(asked) == 1


def test_single_dead_pixels_need_few_rows():
    frame, invalid = np.arange(90000.0).reshape(300, 300), np.zeros((300, 300), bool)
    invalid[100:200:7, 50] = True
    asked = []
    radiograph.fill_rows(
        lambda a, b: asked.append((a, b)) or frame[a:b], lambda a, b: invalid[a:b], (300, 120, 152)
    )  # fmt: skip
    assert asked[0][1] - asked[0][0] <= 32 + 2 * 12


@pytest.mark.parametrize("shape", [(1, 1), (9, 300), (50, 41), (700, 300), (1500, 9), (400, 2500)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_noise_from_rows_on_demand(shape, masked):
    rng = np.random.default_rng(7)
    image = (rng.poisson(np.linspace(100, 3000, shape[1]), shape) * 2).astype(np.uint16)
    mask = rng.random(shape) < 0.01 if masked else None
    demanded = [
        None if a is None else OnDemand(shape, a.dtype, lambda first, end, a=a: a[first:end]) for a in (image, mask)
    ]
    assert estimate_noise(demanded[0], 10.0, mask=demanded[1]) == estimate_noise(image, 10.0, mask=mask)


def test_the_noise_of_a_large_frame_reads_a_sample():
    rows = []
    shape = (12000, 1200)

    def read(a, b):
        rows.append(b - a)
        return np.random.default_rng(a).poisson(1000, (b - a, shape[1])).astype(np.uint16)

    assert estimate_noise(OnDemand(shape, np.dtype("u2"), read)).variance(1000.0) == pytest.approx(1000, rel=0.05)
    assert sum(rows) < shape[0] / 2


# --- groups


def numbered(height=100, width=8, ahead=True, **options):
    reads = []

    def read(frame, a, b):
        reads.append((frame, a, b))
        return np.repeat(np.arange(a, b, dtype=np.float64)[:, None] + 1000 * frame, width, axis=1)

    return Pixels((2, height, width), np.dtype("f8"), read, ahead, **options), reads


@pytest.mark.parametrize("ahead", [False, True])
def test_bands_cross_groups(ahead):
    pixels, reads = numbered(ahead=ahead)
    store = Frames(pixels, 16, kept=4)
    for frame, a, b in [(0, 0, 5), (0, 5, 40), (0, 30, 33), (1, 90, 100), (0, 99, 100), (1, 0, 100)]:
        band = store.band(frame, a, b)
        np.testing.assert_array_equal(band.counts[:, 0], np.arange(a, b) + 1000 * frame)
        assert band.invalid is None and np.shares_memory(band.filled, band.counts)
    store.close()
    assert all(a % 16 == 0 for _, a, _ in reads)


def test_groups_that_a_slow_network_lags_behind_are_read_once():
    pixels, reads = numbered()
    store = Frames(pixels, 16, kept=7)
    for a in range(0, 100, 10):
        store.band(0, a, min(a + 10, 100))
        if a >= 50:
            store.band(0, a - 50, a - 40)
    store.close()
    assert len(reads) == len(set(reads))


def test_an_error_of_the_reading_thread_is_the_caller_s():
    def read(frame, a, b):
        if a >= 32:
            raise ImageFileError("cut off")
        return np.zeros((b - a, 4))

    store = Frames(Pixels((100, 4), np.dtype("f8"), read, True), 16)
    store.band(0, 0, 32)
    with pytest.raises(ImageFileError, match="cut off"):
        store.band(0, 32, 33)
    store.close()


def test_work_in_order():
    done, here = [], threading.get_ident()
    with InOrder(True) as order:
        for i in range(20):
            order.do(lambda i: done.append((i, threading.get_ident())), i)
        order.finish()
    assert [i for i, _ in done] == list(range(20)) and {thread for _, thread in done} != {here}
    with pytest.raises(InputError), InOrder(True) as order:
        for i in range(5):
            order.do(lambda i: (_ for _ in ()).throw(InputError("no")) if i == 0 else done.append(i), i)
        order.finish()
    assert len(done) < 25


# --- files


class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 9, padding=4, bias=False)
        nn.init.constant_(self.conv.weight, 1 / 81)

    def forward(self, x):
        return self.conv(x)


def blur(**card):
    return Model(Card(**{"name": "blur", "architecture": "dncnn", **card}), Blur().eval())


@pytest.mark.parametrize("dtype", ["u1", ">u2", "i2", "i4", "f4", ">f8"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "predictor": 2}, {"tile": (32, 16)}], ids=str)
@pytest.mark.parametrize("card", [{}, {"noise": "estimate", "domain": "stabilised"}], ids=["plain", "stabilised"])
def test_a_file_gives_what_its_array_gives(tmp_path, monkeypatch, dtype, options, card):
    monkeypatch.setattr(frames, "ROWS", 16)
    rng = np.random.default_rng(5)
    stack = (rng.poisson(60, (2, 75, 40)) * (1 if dtype == "u1" else 20)).astype(dtype)
    if stack.dtype.kind == "f":
        stack /= 6000
        stack[0, 10:14, 3:20] = np.nan
        stack[1, 40, :] = np.inf
        options = {**options, "predictor": None}
    mask = np.zeros((75, 40), np.uint8)
    mask[30:38, 5:9] = 1
    tifffile.imwrite(
        tmp_path / "in.tif", stack, byteorder=">" if ">" in dtype else "<", photometric="minisblack", **options
    )
    model = blur(size_multiple=8, **card)
    report = enhance_file(tmp_path / "in.tif", tmp_path / "out.tif", model, mask=mask)
    expected, described = enhance(stack, model, mask=mask, report=True)
    np.testing.assert_array_equal(io.read(tmp_path / "out.tif").array, expected)
    assert report.frames == described.frames
    assert (np.asarray(expected) != stack).any()


def test_a_stack_of_one_budget(tmp_path, monkeypatch):
    """The budget reaches the plan, and the plan's rows the file."""
    monkeypatch.setattr(frames, "ROWS", 32)
    image = np.random.default_rng(5).integers(0, 60000, (600, 64)).astype(np.uint16)
    io.write(tmp_path / "in.tif", image, compression="deflate")
    reports = [
        enhance_file(tmp_path / "in.tif", tmp_path / f"{memory}.tif", blur(), memory=memory)
        for memory in ("4GiB", "128MiB")
    ]
    assert [r.memory for r in reports] == [4 << 30, 128 << 20]
    first, second = (io.read(tmp_path / f"{memory}.tif").array for memory in ("4GiB", "128MiB"))
    assert np.abs(first.astype(int) - second).max() <= 1
    assert torch.is_inference_mode_enabled() is False
