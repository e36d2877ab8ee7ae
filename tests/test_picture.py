"""Pictures: valid PNG files, one grey scale for all frames, sizes that fit a screen, whatever the frame's shape."""

import io

import numpy as np
import pytest

from xrk import picture
from xrk.errors import ImageFileError, InputError

PIL = pytest.importorskip("PIL.Image", reason="Pillow, which comes with scikit-image, decodes the pictures")


def decoded(source):
    with PIL.open(source) as image:
        return np.asarray(image)


@pytest.fixture
def scene():
    """A ramp with a grid of fine lines in one corner, noisy and clean."""
    rng = np.random.default_rng(4)
    clean = np.tile(np.linspace(300, 3000, 900), (700, 1))
    clean[500:650:6, 700:850] *= 0.9
    return rng.poisson(clean).astype("u2"), clean


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 9), (33, 65), (1, 1, 3), (20, 30, 3)])
def test_png(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(decoded(io.BytesIO(picture.encode_png(pixels))), pixels)
    np.testing.assert_array_equal(decoded(io.BytesIO(picture.encode_png(pixels[::-1, ::-1]))), pixels[::-1, ::-1])


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4), "u2"), np.zeros(4, "u1"), np.zeros((4, 4, 2), "u1"), np.zeros((0, 4), "u1")]
)
def test_png_refuses(pixels):
    with pytest.raises(InputError, match="a PNG takes uint8"):
        picture.encode_png(pixels)


def grey_parts(pixels):
    """Where a picture shows radiographs: pixels of exactly equal red, green and blue that are no text."""
    return (pixels[..., 0] == pixels[..., 1]) & (pixels[..., 1] == pixels[..., 2])


def test_preview(tmp_path, scene):
    noisy, clean = scene
    picture.preview_png(tmp_path / "p.png", noisy, clean.astype(">f4"), levels=(0, 65535))
    pixels = decoded(tmp_path / "p.png")
    assert pixels.shape[2] == 3 and 800 < pixels.shape[1] <= picture.WIDTH and pixels.shape[0] < 2000
    assert grey_parts(pixels).mean() > 0.7
    # The box around the enlarged part lies on the corner with the lines.
    rows, columns = np.nonzero((pixels == picture.ACCENT).all(-1))
    top, left, width = 24 + 24, 24, 450  # margin and label, margin, the frame at half its size
    box = columns < left + width
    assert 250 <= (rows[box].min() + rows[box].max()) / 2 - top <= 325 + 40
    assert 330 - 60 <= (columns[box].min() + columns[box].max()) / 2 - left <= 430


def test_all_frames_share_the_scale_of_the_last(scene):
    noisy, clean = scene
    bright = clean * 4
    panels = [bright, noisy, clean]
    window = picture._window(clean, None)
    assert window[0] < 310 and 2950 < window[1] < 3100
    grey = [picture._Panel("", frame, window, picture._exponent(window)).grey(frame) for frame in panels]
    assert abs(grey[1].mean() - grey[2].mean()) < 2 < grey[0].mean() - grey[2].mean()
    assert grey[2][0, 0] < 30 and grey[2][0, -1] > 243
    assert (np.diff(grey[2][0].astype(int)) >= 0).all()


def test_window():
    frame = np.linspace(1000, 1100, 10_000).reshape(100, 100)
    low, high = picture._window(frame, None)
    assert low == pytest.approx(998, abs=1) and high == pytest.approx(1102, abs=1)
    assert picture._exponent((low, high)) == 1.0  # far from no light: linear
    assert picture._exponent((10.0, 1000.0)) < 1.0
    assert picture._window(frame, (1010, 1050)) == (1010, 1050)
    assert picture._window(frame, (0, 65535)) == (low, high)
    spoilt = frame.copy()
    spoilt[0, :9] = [np.nan, np.inf, -np.inf, 1e9, 1e9, 1e9, -1e9, -1e9, -1e9]
    assert np.allclose(picture._window(spoilt, None), (low, high), atol=1)


def test_grey_of_what_is_not_a_number():
    panel = picture._Panel("", np.zeros((1, 5)), (10.0, 20.0))
    values = np.array([[np.nan, -np.inf, np.inf, 15.0, 1e300]])
    np.testing.assert_array_equal(panel.grey(values), [[0, 0, 255, 128, 255]])


def test_panel(tmp_path, scene):
    noisy, clean = scene
    frames = [("noisy", noisy), ("enhanced", clean), ("reference", clean)]
    residual = ("noisy - enhanced", noisy - clean)
    picture.panel_png(tmp_path / "p.png", frames, residual, zoom=(500, 700, 60, 60))
    pixels = decoded(tmp_path / "p.png")
    assert 1000 < pixels.shape[1] <= picture.WIDTH
    # Mid-grey is zero: the residual's whole-frame panel, the last one, averages to it.
    inner = (pixels.shape[1] - 2 * picture.MARGIN - 3 * picture.GAP) // 4
    right = pixels.shape[1] - picture.MARGIN
    part = pixels[60 : 60 + inner // 2, right - inner + 5 : right - 5]
    assert abs(part.mean() - 127.5) < 3
    picture.panel_png(tmp_path / "q.png", frames[:2])
    assert decoded(tmp_path / "q.png").shape[1] <= picture.WIDTH


def test_strip(tmp_path, scene):
    noisy, clean = scene
    rows = [("noisy", [noisy, noisy]), ("clean", [clean, 0.5 * clean])]
    picture.strip_png(tmp_path / "strip.png", rows, ["frame 1", "frame 2"])
    pixels = decoded(tmp_path / "strip.png")
    assert pixels.ndim == 3 and pixels.shape[1] <= picture.WIDTH
    cell = (picture.WIDTH - 2 * picture.MARGIN - picture.GAP) // 2
    width, height = 900 // -(-900 // cell), 700 // -(-900 // cell)
    # All frames have one scale: half the values are darker.
    left = picture.MARGIN + width // 2
    bottom = pixels.shape[0] - picture.MARGIN - 48 - height // 2
    first, second = (pixels[bottom, left + k * (width + picture.GAP), 0] for k in (0, 1))
    assert 0 < second < 0.8 * first
    with pytest.raises(InputError, match="rows of 3 frames"):
        picture.strip_png(tmp_path / "no.png", rows, ["1", "2", "3"])


def test_the_residuals_scale_is_symmetric_and_stated():
    values = np.random.default_rng(0).normal(40, 1, (50, 50))
    half = picture._half_range(values)
    assert 40 < half < 45 and float(f"{half:.1e}") == half
    assert picture._half_range(np.zeros((5, 5))) == 1.0
    assert picture._number(half) == f"{half:.3g}" and picture._number(12345.6) == "12346"


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 3), (37, 21), (1, 3000), (3000, 1), (60, 2500), (5, 64, 80), (1, 40, 40)], ids=str
)
def test_any_shape(tmp_path, shape):
    frame = np.random.default_rng(1).poisson(50, shape).astype(">u2")
    picture.preview_png(tmp_path / "p.png", frame, frame)
    pixels = decoded(tmp_path / "p.png")
    assert pixels.shape[1] <= picture.WIDTH and pixels.shape[0] <= 4000
    if frame.ndim == 2:
        picture.panel_png(
            tmp_path / "p.png", [("a label much too long for its panel" * 3, frame)] * 3, ("r", frame - 50.0)
        )
        assert decoded(tmp_path / "p.png").shape[1] <= picture.WIDTH


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e300, -1.7e308])
def test_frames_of_one_value(tmp_path, value):
    frame = np.full((40, 50), value)
    picture.preview_png(tmp_path / "p.png", frame, frame, levels=(0.0, 1.0))
    assert decoded(tmp_path / "p.png").size


@pytest.mark.parametrize("factor", [1, 2, 3, 7])
def test_area_mean(factor):
    array = np.random.default_rng(2).integers(0, 65536, (20, 33)).astype(">u2")
    found = picture._area_mean(array, factor)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            block = array[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
            assert found[row, column] == pytest.approx(block.mean(), rel=1e-12)


def test_text():
    canvas = np.zeros((30, 80, 3), np.uint8)
    picture._draw_text(canvas, "A\N{PLUS-MINUS SIGN}1?", 2, 3, 2, (255, 255, 255))
    assert canvas[2:18, 3:13].any() and canvas[2:18, 15:25].any() and not canvas[:, 60:].any()
    picture._draw_text(canvas, "cut at every edge", 25, 70, 2, (255, 255, 255))
    assert len(picture.GLYPHS) == 96 and not picture.GLYPHS[" "].any()
    drawn = [glyph.tobytes() for glyph in picture.GLYPHS.values()]
    assert len(set(drawn)) == len(drawn)  # no two characters look the same


def test_refusals(tmp_path, scene):
    noisy, clean = scene
    path = tmp_path / "p.png"
    with pytest.raises(InputError, match="one shape"):
        picture.preview_png(path, noisy, clean[1:])
    with pytest.raises(InputError, match="one shape"):
        picture.preview_png(path, noisy[:0], noisy[:0])
    with pytest.raises(InputError, match="one shape"):
        picture.panel_png(path, [("a", noisy)], ("r", clean[1:]))
    with pytest.raises(InputError, match="one shape"):
        picture.panel_png(path, [])
    for zoom in [(690, 0, 20, 20), (-1, 0, 20, 20), (0, 0, 0, 20)]:
        with pytest.raises(InputError, match="outside the frame"):
            picture.panel_png(path, [("a", noisy)], zoom=zoom)
    assert not path.exists()
    with pytest.raises(ImageFileError, match="does not exist"):
        picture.preview_png(tmp_path / "no" / "p.png", noisy, clean)
