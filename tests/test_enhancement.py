import json
import platform
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import xrk
from xrk import radiograph
from xrk.enhancement import enhance
from xrk.errors import (
    CheckpointFileError,
    DeviceError,
    InputError,
    InputTypeError,
    MemoryBudgetError,
    ModelNotFoundError,
)
from xrk.loading import Model
from xrk.models import Card
from xrk.noise import NoiseModel
from xrk.report import Report

NAMES = ["uint8", "uint16", "int16", "int32", "float32", "float64"]
LAYOUTS = ["plain", "fortran", "every second", "reversed", "transposed", "read-only", "misaligned"]


class Call(nn.Module):
    """A network that is a plain function of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _model(function=lambda x: x, **card):
    module = function if isinstance(function, nn.Module) else Call(function)
    return Model(Card(**{"name": "stand-in", "architecture": "dncnn", **card}), module.eval())


def _smooth(x):
    return nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _random(shape, dtype, rng, low=0.0, high=1.0):
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return rng.uniform(low, high, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype.newbyteorder("="), endpoint=True).astype(dtype)


# --- an identity network gives the image back


@st.composite
def _images(draw):
    """Frames and stacks of every dtype, byte order and layout, with extreme values."""
    dtype = np.dtype(draw(st.sampled_from(NAMES))).newbyteorder(draw(st.sampled_from("<>")))
    shape = tuple(draw(st.lists(st.integers(1, 8), min_size=2, max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    image = _random(tuple(2 * side for side in shape), dtype, rng)
    if dtype.kind == "f":
        special = [0.0, -0.0, 1.0, np.nan, np.inf, -np.inf, 5e-324]
        places = rng.random(image.shape) < 0.3
        image[places] = rng.choice(special, places.sum())
    layout = draw(st.sampled_from(LAYOUTS))
    image = image[tuple(slice(0, side) for side in shape)].copy()
    if layout == "fortran":
        image = np.asfortranarray(image)
    elif layout == "every second":
        wide = np.repeat(image, 2, axis=-1)
        image = wide[..., ::2]
    elif layout == "reversed":
        image = image[..., ::-1, ::-1]
    elif layout == "transposed":
        image = image.T
    elif layout == "misaligned":
        image = np.frombuffer(b"x" + image.tobytes(), np.uint8)[1:].view(dtype).reshape(image.shape)
    image.flags.writeable = layout != "read-only" and image.flags.writeable
    return image


@given(
    _images(),
    st.sampled_from(["unit", "symmetric", "stabilised"]),
    st.sampled_from([1, 4, 32]),
    st.sampled_from([None, (0, 1), (-3.7, 812.3), (0, 4095)]),
)
@settings(max_examples=250, deadline=None)
def test_identity_bit_for_bit(image, domain, multiple, levels):
    kept = image.tobytes()
    y = enhance(image, _model(domain=domain, size_multiple=multiple, noise="estimate"), levels=levels, noise="off")
    assert type(y) is np.ndarray
    assert (y.dtype, y.shape) == (image.dtype, image.shape)
    assert y.flags.c_contiguous
    assert y.tobytes() == kept
    assert image.tobytes() == kept


@pytest.mark.parametrize("name", NAMES)
def test_identity_with_either_arithmetic(name, monkeypatch):
    image = _random((150, 170), name, np.random.default_rng(0))
    for native in {radiograph._native, None}:
        monkeypatch.setattr(radiograph, "_native", native)
        assert enhance(image, _model(), noise="off").tobytes() == image.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_native_and_numpy_give_the_same_bytes(name, monkeypatch):
    if radiograph._native is None:
        pytest.skip("xrk._native is not built here")
    image = _random((70, 90), name, np.random.default_rng(1))
    model = _model(_smooth, size_multiple=8)
    native = enhance(image, model)
    monkeypatch.setattr(radiograph, "_native", None)
    assert enhance(image, model).tobytes() == native.tobytes()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 1, 1), (33, 47)])
def test_identity_with_a_noise_model_moves_little(shape):
    # The exact unbiased inverse adds up to a quarter of the gain; float32 and rounding less than one count.
    image = np.random.default_rng(2).integers(500, 60000, shape).astype(np.uint16)
    noise = NoiseModel(4.0, 100.0, 3.0)
    for domain in ("unit", "symmetric", "stabilised"):
        y = enhance(image, _model(domain=domain), noise=noise)
        change = y.astype(int) - image
        assert change.min() >= 0
        assert change.max() <= 2


# --- the formula


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("domain", ["unit", "symmetric"])
def test_the_result_is_the_formula(name, domain):
    rng = np.random.default_rng(3)
    image = _random((40, 50), name, rng, -50, 3000)
    black, white = 10.0, 2500.0
    model = _model(lambda x: 0.75 * x + 0.125, domain=domain)
    y = enhance(image, model, levels=(black, white))
    n = (image.astype(np.float64) - black) / (white - black)
    # In the symmetric range the network sees 2 n - 1, and its answer is read as (y + 1) / 2.
    net = 0.75 * n + 0.125 if domain == "unit" else (0.75 * (2 * n - 1) + 0.125 + 1) / 2
    exact = image + (net - n) * (white - black)
    scale = np.abs(image.astype(np.float64)).max() + 3000
    if np.dtype(name).kind == "f":
        np.testing.assert_allclose(y, exact, atol=1e-6 * scale)
    else:
        limits = np.iinfo(name)
        assert np.abs(y - np.clip(exact, limits.min, limits.max)).max() <= 0.5 + 1e-6 * scale


def test_the_network_sees_the_whole_image_in_its_range():
    seen = []

    def keep(x):
        seen.append(x.clone())
        return x

    image = np.array([[0, 1000], [3000, 65535]], np.uint16)
    enhance(image, _model(keep), levels=(1000, 3000), noise="off", runtime="whole")
    enhance(image, _model(keep, domain="symmetric"), levels=(1000, 3000), noise="off", runtime="whole")
    np.testing.assert_array_equal(seen[0][0, 0], np.float32([[-0.5, 0], [1, 32.2675]]))
    np.testing.assert_array_equal(seen[1][0, 0], np.float32([[-2, -1], [1, 63.535]]))
    assert seen[0].dtype == torch.float32


def test_values_outside_the_levels_are_enhanced_too():
    image = np.array([[50, 5000]], np.uint16)
    y, report = enhance(image, _model(lambda x: x + 0.1), levels=(100, 1100), report=True)
    np.testing.assert_array_equal(y, [[150, 5100]])
    assert report.clipped == 0


def test_integers_are_clipped_to_the_dtype_and_counted_floats_are_not():
    up = _model(lambda x: x + 0.5)
    image = np.array([[0, 100, 200, 255]], np.uint8)
    y, report = enhance(image, up, levels=(0, 256), report=True)
    np.testing.assert_array_equal(y, [[128, 228, 255, 255]])
    assert report.clipped == 2
    y, report = enhance(image.astype(np.float32), up, levels=(0, 256), report=True)
    np.testing.assert_array_equal(y, [[128, 228, 328, 383]])
    assert report.clipped == 0


def test_a_float64_network_runs_in_float64():
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.tensor(1e-12, dtype=torch.float64))

        def forward(self, x):
            return x + self.offset

    y = enhance(np.full((3, 3), 0.5), _model(Offset()))
    np.testing.assert_allclose(y - 0.5, 1e-12, rtol=1e-3)


def test_a_network_may_answer_in_another_precision():
    y = enhance(np.full((3, 3), 100, np.uint8), _model(lambda x: x.to(torch.bfloat16)), levels=(0, 128))
    np.testing.assert_array_equal(y, 100)  # 100 / 128 has few enough bits


def test_the_same_call_gives_the_same_bytes():
    image = np.random.default_rng(4).integers(0, 60000, (65, 83)).astype(np.uint16)
    conv = nn.Conv2d(1, 1, 5, padding=2, dtype=torch.float32)
    model = _model(conv, domain="stabilised", noise="estimate", size_multiple=16)
    assert enhance(image, model).tobytes() == enhance(image, model).tobytes()


def test_half_resolution_networks_come_back_at_full_size():
    # A plane survives halving and cubic enlargement away from the border.
    image = np.add.outer(100.0 * np.arange(70), 50.0 * np.arange(90)).astype(np.float32)
    half = _model(lambda x: nn.functional.avg_pool2d(x, 2), output_scale=0.5, size_multiple=32)
    y = enhance(image, half, levels=(0, 12000))
    np.testing.assert_allclose(y[4:60, 4:80], image[4:60, 4:80], atol=0.02)


# --- the noise model


def test_the_stabilised_domain():
    rng = np.random.default_rng(5)
    noise = NoiseModel(3.0, 100.0, 5.0)
    clean = np.add.outer(np.linspace(200, 9000, 96), np.zeros(96))
    image = (3.0 * rng.poisson((clean - 100) / 3) + rng.normal(100, 5, clean.shape)).clip(0).round().astype(np.uint16)
    seen = []

    def flatten(x):
        seen.append(x.clone())
        return x.mean(dim=-1, keepdim=True).expand_as(x)

    y, report = enhance(image, _model(flatten, domain="stabilised"), noise=noise, runtime="whole", report=True)
    np.testing.assert_array_equal(seen[0][0, 0], noise.stabilise(image).astype(np.float32))
    assert (seen[0][0, 0] - seen[0][0, 0].mean(dim=-1, keepdim=True)).std() == pytest.approx(1, abs=0.03)
    # The mean of the stabilised values, brought back by the exact unbiased inverse, is the mean.
    assert abs((y - clean).mean()) < 1.5
    assert np.abs(y - clean).max() < 60
    residual = report.frames[0].residual
    assert residual["standardised_sd"] == pytest.approx(1, abs=0.03)
    assert residual["standardised_mean"] == pytest.approx(0, abs=0.05)
    assert report.frames[0].noise == noise.to_dict()


@pytest.mark.parametrize("domain", ["unit", "symmetric"])
def test_a_given_noise_model_maps_the_stabilised_levels_to_the_networks_range(domain):
    noise = NoiseModel(2.0, 100.0, 4.0)
    image = np.array([[100, 3000, 4100, 8000]], np.uint16)
    seen = []

    def keep(x):
        seen.append(x.clone())
        return x

    enhance(image, _model(keep, domain=domain), levels=(100, 4100), noise=noise, runtime="whole")
    v = noise.stabilise(image.astype(float))
    n = (v - v[0, 0]) / (v[0, 2] - v[0, 0])
    np.testing.assert_allclose(seen[0][0, 0], n if domain == "unit" else 2 * n - 1, atol=1e-6)
    with pytest.raises(InputError, match=r"white level 90 is not above the noise model's offset 100; expected"):
        enhance(image, _model(domain=domain), levels=(0, 90), noise=NoiseModel(2.0, 100.0))


def test_none_does_what_the_card_asks(monkeypatch):
    asked = []

    def estimate(frame, offset=None, *, mask=None):
        asked.append((frame.copy(), offset, mask))
        return NoiseModel(2.0, 10.0 * len(asked), 1.0, f"estimate {len(asked)}")

    monkeypatch.setattr("xrk.job.estimate_noise", estimate)
    stack = np.random.default_rng(6).integers(100, 3000, (3, 8, 9)).astype(np.float64)
    stack[1, 2, 3] = np.nan
    _, report = enhance(stack, _model(noise="estimate", domain="stabilised"), levels=(64, 4095), report=True)
    assert [frame.noise["source"] for frame in report.frames] == ["estimate 1", "estimate 2", "estimate 3"]
    assert [offset for _, offset, _ in asked] == [64.0] * 3
    assert asked[0][2] is None
    np.testing.assert_array_equal(asked[1][2], np.isnan(stack[1]))
    np.testing.assert_array_equal(asked[1][0], stack[1])

    asked.clear()
    enhance(stack[0].astype(np.uint16), _model(noise="estimate", domain="stabilised"))
    assert asked[0][1] is None  # the dtype's black level says nothing about an offset
    asked.clear()
    for noise, card in ((None, "none"), ("off", "estimate"), (NoiseModel(1.0), "estimate")):
        enhance(stack[0], _model(noise=card), levels=(0, 4095), noise=noise)
    assert not asked


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (30, 40)])
def test_estimation_never_fails_on_frames_without_information(name, value, shape):
    image = np.full(shape, value, name)
    y, report = enhance(image, _model(noise="estimate", domain="stabilised"), report=True)
    assert np.abs(y - image.astype(float)).max() <= 1
    assert report.frames[0].noise["source"].startswith("estimated")
    assert any("no quantum noise" in w for w in report.warnings) == (report.frames[0].noise["gain"] == 0)


def test_off_with_a_stabilised_network_is_said():
    model = _model(domain="stabilised", noise="estimate")
    _, report = enhance(np.ones((4, 4), np.uint8), model, noise="off", report=True)
    assert "without a noise model" in report.warnings[0]
    assert report.frames[0].noise is None


# --- invalid pixels


@pytest.mark.parametrize("name", NAMES)
def test_invalid_pixels_are_filled_for_the_network_and_come_back(name):
    rng = np.random.default_rng(7)
    image = _random((2, 30, 40), name, rng)
    mask = rng.random(image.shape) < 0.1
    bad = mask.copy()
    if image.dtype.kind == "f":
        image[0, 3, 4], image[1, 5, 6], image[1, 7, 8] = np.nan, np.inf, -np.inf
        bad |= ~np.isfinite(image)
        image[mask] = np.nan
        image[0][mask[0]] = 1e30
    else:
        image[mask] = np.iinfo(name).max
    seen = []

    def lift(x):
        seen.append(x.clone())
        return x + 0.01

    y, report = enhance(image, _model(lift), mask=mask, runtime="whole", report=True)
    np.testing.assert_array_equal(y[bad], image[bad])
    assert (y[~bad] != image[~bad]).mean() > 0.9
    assert report.invalid == bad.sum()
    assert [frame.invalid for frame in report.frames] == [bad[0].sum(), bad[1].sum()]
    limit = 1.0 + 1e-6
    assert all(x.isfinite().all() and x.min() >= 0 and x.max() <= limit for x in seen)


def test_a_mask_may_be_one_for_all_frames_or_uint8_or_a_tensor():
    stack = np.full((3, 5, 6), 100, np.uint16)
    mask = np.zeros((5, 6), np.uint8)
    mask[2, 2] = 255
    add = _model(lambda x: x + 0.01)
    for kind in (mask, mask.astype(bool), torch.as_tensor(mask), np.broadcast_to(mask, stack.shape)):
        y = enhance(stack, add, mask=kind)
        np.testing.assert_array_equal(y == 100, np.broadcast_to(mask > 0, stack.shape))


def test_masked_pixels_do_not_touch_their_neighbours():
    image = np.full((20, 20), 1000, np.uint16)
    image[10, 10] = 65535
    mask = image > 60000
    np.testing.assert_array_equal(enhance(image, _model(_smooth), mask=mask), image)
    masked = enhance(np.ma.MaskedArray(image, mask), _model(_smooth))
    assert type(masked) is np.ma.MaskedArray
    np.testing.assert_array_equal(masked.mask, mask)
    np.testing.assert_array_equal(masked.data, image)
    assert enhance(image, _model(_smooth))[10, 11] > 1000


def test_frames_without_a_valid_pixel_come_back_and_are_named():
    stack = np.full((3, 4, 5), 0.5, np.float32)
    stack[1] = np.nan
    y, report = enhance(stack, _model(lambda x: x + 0.25, noise="estimate"), noise="off", report=True)
    np.testing.assert_array_equal(y[1], stack[1])
    np.testing.assert_array_equal(y[[0, 2]], 0.75)
    assert report.warnings == ["Frame 1: every pixel is invalid; returned as it was."]
    assert report.frames[1].residual is None
    assert report.invalid == 20


# --- kinds of arrays


def test_torch_in_torch_out():
    image = torch.arange(3 * 8 * 9, dtype=torch.int32).reshape(3, 8, 9).to(torch.uint16)
    y = enhance(image.transpose(1, 2), _model(lambda x: x + 0.125), levels=(0, 800))
    assert (y.dtype, y.shape, y.device) == (torch.uint16, (3, 9, 8), image.device)
    assert y.is_contiguous()
    assert not y.is_inference()
    np.testing.assert_array_equal(y, image.transpose(1, 2).numpy() + 100)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    image = torch.randint(0, 60000, (2, 65, 83), dtype=torch.int32).to(torch.uint16)
    torch.manual_seed(0)
    model = _model(nn.Conv2d(1, 1, 5, padding=2), size_multiple=16)
    on_cpu = enhance(image, model)
    on_gpu, report = enhance(image.cuda(), model, report=True)
    assert on_gpu.device.type == "cuda"
    assert report.device.startswith("cuda:0 (")
    assert (on_gpu.cpu().int() - on_cpu.int()).abs().max() <= 1
    assert torch.equal(enhance(image.numpy(), model, device="cuda", report=True)[0], on_gpu.cpu().numpy())
    assert model.module.weight.device.type == "cpu"


# --- the report


def test_report():
    image = np.random.default_rng(8).integers(0, 4000, (2, 20, 30)).astype(">u2")
    model = _model(_smooth, description="three by three", sha256="0" * 64)
    y, report = enhance(image, model, levels=(0, 4095), memory="1 GiB", report=True)
    assert isinstance(report, Report)
    entries = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert entries["model"] == "stand-in"
    assert entries["architecture"] == "dncnn"
    assert entries["weights_sha256"] == "0" * 64
    assert entries["shape"] == [2, 20, 30]
    assert entries["dtype"] == ">u2"
    assert entries["levels"] == [0, 4095]
    assert entries["levels_source"] == "given"
    assert entries["device"] == "cpu"
    assert re.fullmatch(r"bands of \d+ rows, at most [\d.]+ MiB", entries["plan"])
    assert entries["memory"] == 2**30
    assert entries["warnings"] == []
    assert entries["kernels"] == radiograph.kernel_path()
    assert entries["versions"] == {
        "xrk": xrk.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    assert entries["seconds"] > 0
    for i in range(2):
        r = image[i].astype(float) - y[i]
        assert entries["frames"][i]["residual"]["mean"] == pytest.approx(r.mean())
        assert entries["frames"][i]["residual"]["sd"] == pytest.approx(r.std())
    assert enhance(image, model, levels=(0, 4095)).tobytes() == y.tobytes()


@pytest.mark.parametrize(
    ("image", "levels", "source"),
    [
        (np.ones((2, 2), np.uint8), None, "range of the dtype"),
        (np.ones((2, 2)), None, "unit range"),
        (np.ones((2, 2)), (0, 9), "given"),
    ],
)
def test_the_report_says_where_the_levels_come_from(image, levels, source):
    assert enhance(image, _model(), levels=levels, report=True)[1].levels_source == source


# --- progress


def test_progress_is_called_per_frame():
    calls = []
    enhance(np.ones((3, 4, 4), np.uint8), _model(), progress=lambda *args: calls.append(args))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_progress_bar(capsys):
    enhance(np.ones((3, 4, 4), np.uint8), _model(), progress=True)
    assert "3/3" in capsys.readouterr().err
    enhance(np.ones((3, 4, 4), np.uint8), _model(), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_progress_may_cancel(error):
    image = np.ones((5, 4, 4), np.uint8)
    calls = []

    def stop(done, total):
        calls.append(done)
        if done == 2:
            raise error

    with pytest.raises(error):
        enhance(image, _model(lambda x: x + 1), progress=stop)
    assert calls == [1, 2]
    assert (image == 1).all()


# --- bad input: one sentence that names what was given and what was expected

GOOD = np.ones((4, 5), np.uint16)


@pytest.mark.parametrize(
    ("image", "options", "error", "base", "message"),
    [
        (np.ones(5, np.uint16), {}, InputError, ValueError, r"shape \(5,\); expected \(H, W\) or a stack"),
        (np.ones((2, 3, 4, 5), np.uint16), {}, InputError, ValueError, r"shape \(2, 3, 4, 5\); expected"),
        (np.uint16(7), {}, InputError, ValueError, r"shape \(\); expected"),
        (np.ones((48, 64, 3), np.uint8), {}, InputError, ValueError, r"\(48, 64, 3\).*RGB.*expected"),
        (np.ones((0, 5), np.uint16), {}, InputError, ValueError, r"empty, its shape \(0, 5\); expected"),
        (GOOD.astype(complex), {}, InputTypeError, TypeError, "complex128; expected one of uint8, uint16"),
        (GOOD.astype(bool), {}, InputTypeError, TypeError, "bool; expected one of"),
        (GOOD.astype(object), {}, InputTypeError, TypeError, "object; expected one of"),
        (GOOD.astype(np.float16), {}, InputTypeError, TypeError, "float16; expected one of"),
        (GOOD.astype(np.uint32), {}, InputTypeError, TypeError, "uint32; expected one of"),
        (GOOD.astype(np.int64), {}, InputTypeError, TypeError, "int64; expected one of"),
        (GOOD.astype("U3"), {}, InputTypeError, TypeError, "U3; expected one of"),
        ([[1, 2]], {}, InputTypeError, TypeError, "list; expected a numpy array"),
        ("image.tif", {}, InputTypeError, TypeError, "str; expected .*xrk.enhance_file"),
        (300 * np.ones((4, 5)), {}, InputError, ValueError, r"between 300 and 300 needs levels.*\[0, 1\]"),
        (GOOD, {"levels": (9, 1)}, InputError, ValueError, r"levels=\(9, 1\) are reversed; expected"),
        (GOOD, {"levels": (5, 5)}, InputError, ValueError, "equal; expected"),
        (GOOD, {"levels": (0, np.nan)}, InputError, ValueError, "not finite; expected"),
        (GOOD, {"levels": 4095}, InputTypeError, TypeError, r"levels=4095; expected levels=\(black, white\)"),
        (GOOD, {"mask": np.zeros((5, 4), bool)}, InputError, ValueError, r"mask has shape \(5, 4\).*expected \(4, 5\)"),
        (GOOD, {"mask": np.zeros((4, 5))}, InputTypeError, TypeError, "mask is of dtype float64; expected bool"),
        (GOOD, {"mask": "mask.tif"}, InputTypeError, TypeError, "mask is a str; expected"),
        (GOOD, {"noise": "on"}, InputError, ValueError, "noise='on'; expected None .*\"off\""),
        (GOOD, {"noise": 2.5}, InputTypeError, TypeError, "noise=2.5; expected"),
        (GOOD, {"memory": "a lot"}, InputError, ValueError, "memory='a lot' is not a size; expected"),
        (GOOD, {"memory": -1}, InputError, ValueError, "memory=-1 is -1 bytes; expected at least 1 MiB"),
        (GOOD, {"memory": 1.5}, InputTypeError, TypeError, "memory=1.5 is a float; expected"),
        (GOOD, {"device": "cuda:77"}, DeviceError, ValueError, "'cuda:77' is not here; usable here: cpu"),
        (GOOD, {"device": "tpu"}, DeviceError, ValueError, "'tpu' is no device that xrk can use; usable here: cpu"),
        (GOOD, {"device": 0}, InputTypeError, TypeError, "device=0 is a int; expected"),
        (GOOD, {"progress": 5}, InputTypeError, TypeError, "progress=5; expected None, True"),
    ],
)
def test_bad_input(image, options, error, base, message):
    with pytest.raises(error, match=message) as caught:
        enhance(image, _model(), **options)
    assert type(caught.value) is error
    assert isinstance(caught.value, base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("no-such-network", ModelNotFoundError, "'no-such-network'"),
        ("missing/net.pth", CheckpointFileError, "missing/net.pth"),
        (7, InputTypeError, "The model is a int; expected a name"),
        (nn.Identity(), InputError, "Identity is in training mode"),
        (None, InputTypeError, "The model is a NoneType; expected"),
    ],
)
def test_bad_models(model, error, message):
    with pytest.raises(error, match=message):
        enhance(GOOD, model)


def test_modules_that_cannot_run_as_they_are():
    training = Model(Card(name="t", architecture="dncnn"), nn.Sequential(nn.BatchNorm2d(1)))
    with pytest.raises(InputError, match=r"training mode; call \.eval"):
        enhance(GOOD, training)
    half = _model(nn.Conv2d(1, 1, 1).half())
    with pytest.raises(InputTypeError, match="weights of stand-in are float16; expected float32"):
        enhance(GOOD, half)
    with pytest.raises(InputError, match=r"network gave \(1, 1, 4, 4\) .*expected \(1, 1, 4, 5\)"):
        enhance(GOOD, _model(lambda x: x[..., :4]))


@pytest.mark.parametrize("domain", ["unit", "stabilised"])
def test_an_output_that_is_not_finite_is_an_error_and_not_an_image(domain):
    with pytest.raises(InputError, match=r"not finite at 20 of 20 pixels.*expected levels near"):
        enhance(GOOD, _model(lambda x: x / 0, domain=domain), noise=NoiseModel(1.0) if domain == "stabilised" else None)
    fill_value = np.full((4, 5), 0.5)
    fill_value[1, 1] = 1e300
    with pytest.raises(InputError, match=r"not finite at 1 of 20 pixels.*a mask should name"):
        enhance(fill_value, _model(), levels=(0, 1))


def test_out_of_memory_on_the_device():
    def burst(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryBudgetError, match=r"The frame \(4, 5\) does not fit on cpu"):
        enhance(GOOD, _model(burst))
