"""fuse_video: every frame against the plain module on its window, what is shared, kept and refused."""

import contextlib
import inspect
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from videos import by_the_module, seeded, sequences

import xrk
from xrk import video_windows
from xrk.errors import InputError, InputTypeError, MemoryBudgetError, ModelNotFoundError
from xrk.models import EDVRSTF, SwinSTF

EDVR, SWIN = seeded(), seeded(SwinSTF)


def rounded(values):
    return np.clip(np.rint(values), 0, 65535).astype(int)


WINDOWS = [
    (EDVR, 9, 3, 4, 1, (8, 12)),
    (EDVR, 7, 2, 4, 2, (10, 13)),  # the last key frame stands for both; sizes that are padded
    (SWIN, 5, 2, 4, 1, (7, 9)),
    (SWIN, 3, 1, 4, 1, (3, 5)),  # lower than a window
    (EDVR, 5, 1, 20, 3, (4, 8)),  # a single key frame, and neighbours further away than the ends
    (seeded(lr_frames=5, seed=3), 6, 4, 2, 1, (8, 8)),  # a key frame after the last LR frame
    (seeded(SwinSTF, align=True, features=9, deformable_groups=3, extraction_blocks=1), 4, 2, 3, 1, (8, 6)),
]


@pytest.mark.parametrize(
    ("module", "count", "keys", "ratio", "separation", "shape", "runtime"),
    [(*window, "whole") for window in WINDOWS] + [(*window, "bands") for window in WINDOWS[:3]],
)
def test_every_frame_is_the_module_on_its_window(module, count, keys, ratio, separation, shape, runtime):
    lr, hr = sequences(count, keys, shape)
    frames = xrk.fuse_video(lr, hr, ratio=ratio, separation=separation, model=module, runtime=runtime)
    assert inspect.isgenerator(frames)
    given = list(frames)
    assert len(given) == count
    for i, frame in enumerate(given):
        assert frame.dtype == np.uint16 and frame.shape == hr.shape[1:]
        expected = rounded(by_the_module(module, lr, hr, i, ratio, separation))
        assert np.abs(frame.astype(int) - expected).max() <= 1, i
    assert len({frame.tobytes() for frame in given}) == count


@settings(max_examples=6)
@given(st.integers(3, 7), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_any_counts_and_windows(count, ratio, separation, extra, seed):
    lr, hr = sequences(count, (count - 1) // ratio + 1 + extra, (4, 4), seed=seed)
    given = list(xrk.fuse_video(lr, hr, ratio=ratio, separation=separation, model=EDVR, runtime="whole"))
    expected = [rounded(by_the_module(EDVR, lr, hr, i, ratio, separation)) for i in range(count)]
    assert np.abs(np.array(given).astype(int) - np.array(expected)).max() <= 1


def operations(make, *shape):
    with FlopCounterMode(display=False) as counter:
        make(torch.empty((1, 1, *shape), device="meta"))
    return counter.get_total_flops()


def test_features_are_made_once_and_change_nothing(monkeypatch):
    lr, hr = sequences(8, 2)
    frames, shared = xrk.fuse_video(lr, hr, model=EDVR, runtime="whole", report=True)
    together = np.array(list(frames))
    assert shared.features == {"lr": 8, "hr": 2} and shared.used == 8 * 5
    assert shared.frames == 8 and shared.shape == (8, 32, 48)
    monkeypatch.setattr(video_windows, "SHARED", False)
    frames, alone = xrk.fuse_video(lr, hr, model=EDVR, runtime="whole", report=True)
    assert np.array_equal(np.array(list(frames)), together)
    assert alone.features == {"lr": 3 * 8 - 2, "hr": 2 * 8}  # at both ends one frame stands for two
    with torch.device("meta"):
        published = EDVRSTF(reconstruction_blocks=0)
    cost = {"lr": operations(published.lr_pyramid, 8, 12), "hr": operations(published.hr_pyramid, 32, 48)}
    work = [sum(cost[camera] * n for camera, n in report.features.items()) for report in (alone, shared)]
    assert work[0] >= 2.5 * work[1]


def test_bands_and_sharing_give_the_same_bits(monkeypatch):
    lr, hr = sequences(4, 2, (12, 8))
    together = list(xrk.fuse_video(lr, hr, ratio=2, model=EDVR))
    monkeypatch.setattr(video_windows, "SHARED", False)
    assert np.array_equal(list(xrk.fuse_video(lr, hr, ratio=2, model=EDVR)), together)


def watched(stack, alive):
    """An iterator whose frames are counted while they are there."""
    for frame in stack:
        own = frame.copy()
        alive.add(id(own))
        weakref.finalize(own, alive.discard, id(own))
        yield own
        del own


@pytest.mark.parametrize("separation", [1, 2])
def test_what_is_kept_does_not_grow(monkeypatch, separation):
    lr, hr = sequences(24, 7, (4, 4))
    kept = []
    drop = video_windows.Video.next

    def note(self):
        result = drop(self)
        kept.append((len(self._lr), len(self._hr)))
        return result

    monkeypatch.setattr(video_windows.Video, "next", note)
    alive = (set(), set())
    most = [0, 0]
    sources = [watched(s, a) for s, a in zip((lr, hr), alive, strict=True)]
    for _ in xrk.fuse_video(*sources, ratio=4, separation=separation, model=EDVR, runtime="whole"):
        most = [max(m, len(a)) for m, a in zip(most, alive, strict=True)]
    assert max(k[0] for k in kept) <= 2 * separation + 1 and max(k[1] for k in kept) <= 2
    assert len(kept) == 25 and max(most) <= 3  # the frames themselves are let go of at once


def test_no_more_frames_are_taken_than_a_window_needs():
    lr, hr = sequences(9, 3)
    taken = {"lr": 0, "hr": 0}

    def counted(frames, name):
        for frame in frames:
            taken[name] += 1
            yield frame

    frames = xrk.fuse_video(counted(lr, "lr"), counted(hr, "hr"), ratio=4, model=EDVR, runtime="whole")
    assert taken == {"lr": 1, "hr": 1}  # what tells the sizes
    seen = []
    for _ in frames:
        seen.append(dict(taken))
    assert [s["lr"] for s in seen] == [2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert [s["hr"] for s in seen] == [2, 2, 2, 2, 3, 3, 3, 3, 3]


def test_it_starts_where_it_is_told():
    lr, hr = sequences(9, 3)
    for options in ({"model": EDVR, "separation": 2, "runtime": "whole"}, {"model": "bicubic"}, {"model": "linear"}):
        everything = list(xrk.fuse_video(lr, hr, ratio=4, **options))
        for source in (lr, iter(lr)):
            later, report = xrk.fuse_video(source, iter(hr), ratio=4, start=5, report=True, **options)
            assert np.array_equal(list(later), everything[5:])
            assert report.start == 5 and report.frames == 4


def test_baselines_are_their_definitions():
    lr, hr = sequences(9, 3)
    given = list(xrk.fuse_video(lr, hr, ratio=4, model="linear"))
    for i, frame in enumerate(given):
        a, b = (hr[min(i // 4 + k, 2)].astype(float) for k in (0, 1))
        t = i / 4 - i // 4
        assert np.array_equal(frame, np.rint((1 - t) * a + t * b))
    given, report = xrk.fuse_video(lr, hr, ratio=4, model="bicubic", report=True)
    for i, frame in enumerate(given):
        expected = cubic(cubic(lr[i].astype(float), 4).T, 4).T
        inside = np.abs(expected - np.floor(expected) - 0.5) > 1e-6
        assert np.array_equal(frame[inside], rounded(expected)[inside])
    assert (report.model, report.features["lr"]) == ("bicubic", 0)


def cubic(x, scale):
    """Each row's neighbours above and below, weighted by the cubic kernel with a = -0.75; the border is repeated."""
    centre = (np.arange(scale * len(x)) + 0.5) / scale - 0.5
    first = np.floor(centre).astype(int)
    out = np.zeros((len(centre), x.shape[1]))
    for tap in range(-1, 3):
        d = np.abs(centre - (first + tap))
        near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        out += np.where(d <= 1, near, far)[:, None] * x[np.clip(first + tap, 0, len(x) - 1)]
    return out


def test_levels_and_kinds_of_arrays():
    lr, hr = sequences(5, 2, dtype=np.int32)
    lr, hr = lr // (1 << 16), hr // (1 << 15) + 100
    levels, hr_levels, plain = (0, 1 << 15), (100, (1 << 16) + 100), {"model": EDVR, "runtime": "whole"}
    given = list(xrk.fuse_video(lr, hr, ratio=4, levels=levels, hr_levels=hr_levels, **plain))
    assert given[0].dtype == np.int32
    same = np.where(hr > 0, (hr - 100) / 2, 0)  # the HR frames as the LR camera would have counted them
    for i, frame in enumerate(given):
        expected = by_the_module(EDVR, lr.astype(float), same, i, 4, levels=levels)
        assert np.abs(frame - (2 * expected + 100)).max() <= 1
    tensors = [torch.from_numpy(x) for x in (lr, hr)]
    frame = next(xrk.fuse_video(*tensors, ratio=4, levels=levels, hr_levels=hr_levels, **plain))
    assert isinstance(frame, torch.Tensor) and np.array_equal(frame.numpy(), given[0])
    unit = [(x / 65535).astype(np.float32) for x in sequences(3, 1)]
    unit[0][1, 2, 3] = np.nan
    frames = list(xrk.fuse_video(*unit, **plain))
    assert frames[1].dtype == np.float32 and np.isfinite(frames[1]).all()


def test_noise_models_are_what_the_network_sees_through():
    lr, hr = sequences(3, 1)
    noise = xrk.NoiseModel(20.0, 500.0, 30.0)
    given = list(xrk.fuse_video(lr, hr, model=EDVR, noise=noise, levels=(500, 65535), runtime="whole"))
    low, high = noise.stabilise(np.array([500.0, 65535.0]))
    seen = [noise.stabilise(x.astype(float)) for x in (lr, hr)]
    for i, frame in enumerate(given):
        expected = noise.unstabilise(by_the_module(EDVR, *seen, i, 20, levels=(low, high)))
        assert np.abs(frame - expected).max() <= 1
    plain = list(xrk.fuse_video(lr, hr, model=EDVR, noise="off", runtime="whole"))
    assert np.abs(plain[1] - rounded(by_the_module(EDVR, lr, hr, 1, 20))).max() <= 1


@pytest.mark.parametrize("actual", [False, True])
@pytest.mark.parametrize("model", [EDVR, "bicubic", "linear"])
def test_the_original_in_eight_bits(actual, model):
    shape = (36, 44) if actual else (8, 12)
    lr, hr = sequences(4, 2, shape, np.uint16 if actual else np.uint8)
    given, report = xrk.fuse_video(lr, hr, ratio=3, model=model, compat="xfusion", runtime="whole", report=True)
    given = list(given)
    small, large = (x // 257 if actual else x for x in (lr, hr))
    if actual:
        small, large = small[:, :32, :32], large[:, :, ::-1][:, :128, :128]
    assert small.max() <= 255 and report.dtype == "uint8"
    for i, frame in enumerate(given):
        k, t = i // 3, i % 3 / 3
        if model == "linear":
            values = (1 - t) * large[k] + t * large[min(k + 1, 1)]
        elif model == "bicubic":
            values = cubic(cubic(small[i].astype(float), 4).T, 4).T
        else:
            values = by_the_module(model, small, large, i, 3, levels=(0, 255))
        assert frame.dtype == np.uint8 and frame.shape == large.shape[1:]
        inside = np.abs(values - np.floor(values) - 0.5) > 1e-3
        assert np.array_equal(frame[inside], np.rint(np.clip(values, 0, 255))[inside]) and inside.mean() > 0.9


def test_registered_frames_of_the_original_are_shrunk():
    lr, hr = sequences(3, 1, (32, 32))
    registered = np.repeat(np.repeat(lr, 4, 1), 4, 2).copy()
    registered[:, ::4] = 65535  # beside the middle of every four pixels, and not seen
    options = {"model": EDVR, "compat": "xfusion", "runtime": "whole"}
    expected = list(xrk.fuse_video(lr, hr, **options))
    assert np.array_equal(list(xrk.fuse_video(registered, hr, **options)), expected)


def test_a_budget_is_kept_to_and_the_smallest_is_named():
    lr, hr = sequences(3, 1, (16, 16))
    with pytest.raises(MemoryBudgetError) as caught:
        xrk.fuse_video(lr, hr, model=EDVR, memory="2MiB")
    smallest = caught.value.smallest
    frames, report = xrk.fuse_video(lr, hr, model=EDVR, memory=smallest, report=True)
    plain = list(xrk.fuse_video(lr, hr, model=EDVR))
    assert np.abs(np.array(list(frames)).astype(int) - np.array(plain)).max() <= 1
    assert report.memory == smallest


def test_progress_and_closing():
    lr, hr = sequences(4, 1)
    told = []
    assert len(list(xrk.fuse_video(lr, hr, model="linear", progress=lambda *now: told.append(now)))) == 4
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    list(xrk.fuse_video(iter(lr), hr, model="linear", progress=lambda *now: told.append(now)))
    assert told[-1] == (4, None)

    def stop(done, count):
        raise KeyboardInterrupt

    frames = xrk.fuse_video(lr, hr, model="linear", progress=stop)
    with pytest.raises(KeyboardInterrupt):
        next(frames)
    assert list(frames) == []


LR, HR = sequences(9, 3)


@pytest.mark.parametrize(
    ("lr", "hr", "options", "error", "words"),
    [
        (LR, HR[:, :, :-4], {}, InputError, "scale=4"),
        (LR[:, :-1], HR, {}, InputError, "32 x 48"),
        (LR, HR, {"scale": 2}, InputError, "scale=2"),
        (LR, HR, {"scale": 2, "model": "bicubic"}, InputError, "16 x 24"),
        (LR[:2], HR[:1], {}, InputError, "3 of a window"),
        (LR[:0], HR, {}, InputError, "empty"),
        (LR, HR[:0], {}, InputError, "empty"),
        (iter([]), HR, {}, InputError, "empty"),
        ([], HR, {}, InputError, "empty"),
        (LR, HR, {"ratio": 3}, None, ""),
        (LR, HR, {"ratio": 2}, InputError, "5 or 6 high-resolution key frames, not 3"),
        (LR, HR, {"ratio": 20}, InputError, "1 or 2 high-resolution key frames, not 3"),
        (LR, HR, {"ratio": 0}, InputError, "ratio=0"),
        (LR, HR, {"ratio": 2.5}, InputTypeError, "ratio=2.5"),
        (LR, HR, {"separation": 0}, InputError, "separation=0"),
        (LR, HR, {"start": 9}, InputError, "start=9"),
        (LR, HR.astype(np.float32), {}, InputTypeError, "float32"),
        (LR.astype(np.uint8), HR, {}, InputTypeError, "uint8"),
        (LR.astype(np.int64), HR.astype(np.int64), {}, InputTypeError, "int64"),
        ([*list(LR[:-1]), LR[0, :-1]], HR, {}, InputError, "frame 8"),
        (LR, [*list(HR[:-1]), HR[0].astype(np.uint8)], {}, InputTypeError, "frame 2"),
        (LR[None], HR, {}, InputError, "(1, 9, 8, 12)"),
        (LR.astype(np.float32), HR.astype(np.float32), {}, InputError, "levels"),
        (np.ma.masked_array(LR), HR, {}, InputTypeError, "MaskedArray"),
        (3.5, HR, {}, InputTypeError, "float"),
        (LR, HR, {"model": "resnet18-unet"}, InputError, "single images"),
        (LR, HR, {"model": "no-such-model"}, ModelNotFoundError, "no-such-model"),
        (LR, HR, {"model": 7}, InputTypeError, "int"),
        (LR, HR, {"model": seeded().train()}, InputError, "training"),
        (LR, HR, {"model": seeded(in_channels=2)}, InputError, "2 channels"),
        (LR, HR, {"model": seeded().half()}, InputTypeError, "float16"),
        (LR, HR, {"levels": (5, 5)}, InputError, "levels"),
        (LR, HR, {"hr_levels": (9, 1)}, InputError, "hr_levels=(9, 1) are reversed"),
        (LR, HR, {"noise": "some"}, InputError, "noise='some'"),
        (LR, HR, {"noise": xrk.NoiseModel(1.0), "model": "linear"}, InputError, "noise"),
        (LR, HR, {"compat": "other"}, InputError, "compat='other'"),
        (LR, HR, {"compat": "xfusion", "levels": (0, 1)}, InputError, "compat"),
        (LR.astype(np.int32), HR.astype(np.int32), {"compat": "xfusion"}, InputTypeError, "int32"),
        (LR, HR, {"runtime": "tiles"}, InputError, "runtime='tiles'"),
        (LR, HR, {"progress": 3}, InputTypeError, "progress=3"),
        (LR, HR, {"memory": "lots"}, InputError, "lots"),
        (LR, HR, {"device": "tpu"}, xrk.errors.DeviceError, "tpu"),
        (LR, HR, {"device": "tpu", "model": "linear"}, xrk.errors.DeviceError, "tpu"),
        (iter([None]), HR, {}, InputTypeError, "NoneType"),
    ],
)  # fmt: skip
def test_bad_input_is_told_at_the_call(lr, hr, options, error, words):
    options = {"ratio": 4, "model": EDVR, "runtime": "bands" if "memory" in options else "whole"} | options
    if error is None:
        assert len(list(xrk.fuse_video(lr, hr, **options))) == 9
        return
    with pytest.raises(error) as caught:
        xrk.fuse_video(lr, hr, **options)
    text = str(caught.value)
    assert words in text and "\n" not in text


def surprised(frames, at, other):
    for i, frame in enumerate(frames):
        yield other(frame) if i == at else frame


@pytest.mark.parametrize(
    ("lr", "hr", "like", "given", "error", "words"),
    [
        (lambda: surprised(LR, 5, lambda f: f[:-1]), lambda: HR, (9, 3), 4, InputError, "low-resolution frame 5"),
        (lambda: surprised(LR, 5, lambda f: f.astype(np.int32)), lambda: HR, (9, 3), 4, InputTypeError, "int32"),
        (lambda: surprised(LR, 5, lambda f: None), lambda: HR, (9, 3), 4, InputTypeError, "low-resolution frame 5"),
        (lambda: LR, lambda: surprised(HR, 2, lambda f: f[:, 1:]), (9, 3), 4, InputError, "high-resolution frame 2"),
        (lambda: LR, lambda: iter(HR[:1]), (9, 1), 4, InputError, "ended after 1 key frames"),
        (lambda: iter(LR), lambda: iter(HR[:2]), (9, 2), 8, InputError, "frame 8 needs key frame 2"),
        (lambda: iter(LR[:4]), lambda: HR, (4, 2), 4, InputError, "ended after 4 frames"),
        (lambda: iter(LR[:4]), lambda: iter(HR), (4, 2), 4, InputError, "ended after 4 frames"),
        (lambda: LR[:4], lambda: iter(HR), (4, 2), 4, InputError, "at most 2 high-resolution key frames"),
        (lambda: iter(LR[:2]), lambda: HR[:1], (4, 1), 1, InputError, "ended after 2 frames"),
        (lambda: iter(LR[:5]), lambda: HR, (5, 3), 5, None, ""),
        (lambda: surprised(LR, 3, lambda f: 1 / 0), lambda: HR, (9, 3), 2, ZeroDivisionError, "zero"),  # its own error
    ],
)
def test_what_an_iterator_shows_on_the_way_is_told_there(lr, hr, like, given, error, words):
    """All frames before are those of sequences of ``like`` so many frames."""
    options = {"ratio": 4, "model": EDVR, "runtime": "whole"}
    frames, done = xrk.fuse_video(lr(), hr(), **options), []
    with pytest.raises(error, match=words) if error else contextlib.nullcontext():
        for frame in frames:
            done.append(frame)
    assert len(done) == given
    for i, frame in enumerate(done):
        expected = rounded(by_the_module(EDVR, LR[: like[0]], HR[: like[1]], i, 4))
        assert np.abs(frame - expected).max() <= 1


def test_a_frame_without_a_finite_value_is_named():
    lr, hr = (stack.astype(np.float32) / 65535 for stack in (LR, HR))
    lr[3] = np.nan
    frames = xrk.fuse_video(lr, hr, ratio=4, model="bicubic")
    for _ in range(3):
        next(frames)
    with pytest.raises(InputError, match=r"^The low-resolution frame 3 has no finite value\.$"):
        next(frames)


def test_a_checkpoint_and_a_loaded_model(tmp_path):
    module = seeded(EDVRSTF)
    torch.save({"params": module.state_dict()}, tmp_path / "net_g_5.pth")
    options = {"ratio": 4, "runtime": "whole"}
    expected = list(xrk.fuse_video(LR, HR, model=module, **options))
    for model in (tmp_path / "net_g_5.pth", str(tmp_path / "net_g_5.pth"), xrk.load(tmp_path / "net_g_5.pth")):
        frames, report = xrk.fuse_video(LR, HR, model=model, report=True, **options)
        assert np.abs(np.array(list(frames)).astype(int) - np.array(expected)).max() <= 1
        assert report.model == "net_g_5" and len(report.weights_sha256) == 64
