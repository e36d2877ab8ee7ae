"""The malformed files of malformed.py, in a process of their own: no signal, no hang, little memory, one exception."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from malformed import PIXELS, SHORT, File, files

from xrk import io

ROOT = Path(__file__).parents[2]
MEMORY = 300 << 20  # bytes that all files together may add to the process
CHILD = """
import json, resource, sys, time
from pathlib import Path
import xrk.io
folder, memory = Path(sys.argv[1]), int(sys.argv[2])
xrk.io.read(folder / "sound")
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 4 * memory
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (300, 300))

def attempt(work):
    try:
        work()
        return "taken"
    except xrk.io.ImageFileError as error:
        return str(error)

def window(path):
    with xrk.io.open(path) as source:
        rows, cols = (slice(max(0, n - 40), n) for n in source.shape[-2:])
        source.read(rows, cols, halo=3, dtype="float32")

for path in sorted(folder.iterdir()):
    start, processor = time.monotonic(), time.process_time()
    words = []
    try:
        words = [attempt(lambda: window(path)), attempt(lambda: xrk.io.read(path)),
                 attempt(lambda: xrk.io.read_report(path))]
    except BaseException as error:
        words.append(f"{type(error).__name__}: {error}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) * 1024
    print(json.dumps([path.name, words, time.process_time() - processor, grown]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """name -> (words of each attempt, seconds of the processor, bytes that the process has grown by so far)."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("limits on a process's memory are set as Linux has them")
    folder = tmp_path_factory.mktemp("malformed")
    for name, content in files():
        (folder / name).write_bytes(content)
    f = File()
    (folder / "sound").write_bytes(f.build(f.page()))
    command = [sys.executable, "-c", CHILD, str(folder), str(MEMORY)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    last = lines[-1][0] if lines else "none"
    assert answer.returncode == 0, f"the process ended with {answer.returncode} behind {last}: {answer.stderr[-2000:]}"
    return {name: rest for name, *rest in lines}


def test_every_file_was_tried(outcomes):
    assert len(outcomes) > 2500
    assert outcomes["sound"][0] == ["taken"] * 3


def test_only_one_exception(outcomes):
    wrong = {name: words for name, (words, *_) in outcomes.items() if len(words) != 3}
    assert not wrong


def test_messages_name_the_file(outcomes):
    for name, (words, *_) in outcomes.items():
        for word in words:
            assert word == "taken" or (name in word and "\n" not in word), word


def test_nothing_hangs(outcomes):
    slow = {name: seconds for name, (_, seconds, _) in outcomes.items() if seconds > 5}
    assert not slow


def test_memory_stays_small(outcomes):
    grown = [grown for *_, grown in outcomes.values()]
    assert max(grown) < MEMORY, next(name for name, (*_, g) in outcomes.items() if g == max(grown))


def test_what_is_wrong_is_refused(outcomes):
    """Each kind of damage that no pixel can come out of."""
    kinds = {
        "size-ffffffffx": 1, "bomb-": 1, "overfull-": 1, "link-": 0, "loop-of-two": 1, "loop-on-the-second": 1,
        "offset-": 1, "strips-without-end": 1, "entries-without-end": 1, "overlapping": 1, "no-entries": 1,
        "without-256": 1, "without-257": 1, "-cut-": 1, "pixels-not-written": 1, "no-directory-yet": 1,
        "many-pages-and-a-loop": 1,
    }  # fmt: skip
    for kind, always in kinds.items():
        found = {name: words for name, (words, *_) in outcomes.items() if kind in name}
        assert found, kind
        for name, words in found.items():
            assert not always or "taken" not in words[:2], name
    for codec in (5, 8, 32946, 32773, 50000):
        for stream in ("half", "one-byte", "empty", "short"):
            for name, (words, *_) in outcomes.items():
                if f"codec-{codec}-{stream}-1" in name:
                    assert "taken" not in words[:2], name


@pytest.mark.parametrize("tag", [270, 65000])
@pytest.mark.parametrize("reversed_bits", [False, True])  # which tifffile reads
def test_pages_that_share_a_large_tag(tmp_path, tag, reversed_bits):
    """Each page would bring a copy of it: pages of a small file could fill the memory."""
    f = File()
    shared = {tag: (tag, 2, 1 << 20, struct.pack("<I", 16 + len(PIXELS)))}
    page = f.page() | shared | ({266: f.tag(266, SHORT, 2)} if reversed_bits else {})
    (tmp_path / "few.tif").write_bytes(f.build(*[page] * 8, data=PIXELS + b"A" * (1 << 20)))
    assert io.read(tmp_path / "few.tif").shape == (8, 32, 32)
    (tmp_path / "many.tif").write_bytes(f.build(*[page] * 80, data=PIXELS + b"A" * (1 << 20)))
    with pytest.raises(io.ImageFileError, match=r"many\.tif is damaged.*more bytes than xrk takes"):
        io.read(tmp_path / "many.tif")


def test_more_pages_than_there_can_be(tmp_path):
    for more in (0, 1):
        fields = [("tags", "<u2"), ("tag", "<u2"), ("type", "<u2"), ("count", "<u4"), ("value", "<u4"), ("next", "<u4")]
        pages = np.zeros((1 << 18) + more, fields)
        pages["tags"], pages["tag"], pages["type"], pages["count"], pages["value"] = 1, 254, 4, 1, 1
        pages["next"][:-1] = 16 + pages.itemsize * np.arange(1, len(pages))
        (tmp_path / "p.tif").write_bytes(File().header(16) + pages.tobytes())
        with pytest.raises(io.ImageFileError, match="page 262145 there" if more else "no page at full resolution"):
            io.open(tmp_path / "p.tif")
