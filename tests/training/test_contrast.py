"""Planted details: what denoisers of known effect leave of them."""

import numpy as np
import pytest

pytest.importorskip("skimage")

from xrk.simulate import blur
from xrk.training import contrast


def test_a_detail_covers_its_area():
    rng = np.random.default_rng(0)
    for size in (2.0, 8.0):
        assert contrast.coverage("disc", size, rng).sum() == pytest.approx(np.pi * size**2 / 4, rel=0.03)
    assert contrast.coverage("wire", 2.0, rng).sum() == pytest.approx(2 * contrast.WIRE_LENGTH, rel=0.03)


def test_it_is_as_dark_as_it_says():
    signal = np.full((256, 256), 0.5, np.float32)
    planted, given = contrast.plant(signal, 400.0, seed=0)
    assert len(given) == 64
    for (_, size, sigmas), cell in zip(given, contrast._cells(signal.shape), strict=True):
        deepest = (signal - planted)[cell].max() / np.sqrt(0.5 / 400)
        assert deepest <= sigmas * 1.0001
        if size >= 4:
            assert deepest == pytest.approx(sigmas, rel=1e-4)


def test_what_is_recovered():
    """All of it where nothing is done, half of it where it is halved, and of a blur what its kernel says."""

    def blurred(counts):
        return blur(counts.astype(np.float32), 1.5)

    methods = {"none": lambda z: z.astype(float), "half": lambda z: z / 2, "blur": blurred}
    found = {(r.method, r.detail, r.size, r.contrast): r for r in contrast.recoveries(methods, "flat", 3000.0, 3, 256)}
    assert len(found) == 3 * len(contrast.DETAILS) * len(contrast.CONTRASTS)
    for (method, _, _, _), r in found.items():
        if method != "blur":
            assert abs(r.share - (1.0 if method == "none" else 0.5)) < 4 * r.error + 1e-3
    rng = np.random.default_rng(1)
    for size in (2.0, 8.0):
        t = contrast.coverage("disc", size, rng)
        expected = (blur(t, 1.5) * t).sum() / (t * t).sum()
        r = found["blur", "disc", size, 5.0]
        assert abs(r.share - expected) < 4 * r.error + 0.03


def test_the_table_has_a_line_for_each_detail():
    found = contrast.recoveries({"none": lambda z: z}, "flat", 400.0, 2, 256)
    lines = contrast.markdown(found).splitlines()
    assert len([line for line in lines if line.startswith(("| disc", "| wire"))]) == len(contrast.DETAILS)
