"""The threads that decode and encode: kept from one call to the next, and a forked child begins its own."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from xrk import io

pytest.importorskip("xrk._native")

# Reads windows and writes bands with two threads; prints how many threads the process has after each round.
ROUNDS = """
    import os, sys
    import numpy as np
    from xrk import io

    def tasks():
        return len(os.listdir("/proc/self/task"))

    def work(source, folder, name):
        whole = source.read()
        with io.create(f"{folder}/{name}.tif", like=source, threads=2) as sink:
            for top in range(0, 256, 64):
                sink.write(slice(top, top + 64), source.read(slice(top, top + 64)))
        with io.open(f"{folder}/{name}.tif", threads=2) as copy:
            assert np.array_equal(copy.read(), whole)
        return whole

    folder = sys.argv[1]
    source = io.open(f"{folder}/in.tif", threads=2, cache=1 << 14)
    begun = tasks()
    pixels = work(source, folder, "first")
    counts = [tasks() - begun]
"""


@pytest.fixture
def folder(tmp_path):
    array = np.random.default_rng(1).integers(0, 4000, (256, 192)).astype("u2")
    with io.create(tmp_path / "in.tif", shape=array.shape, dtype="u2", compression="lzw", tile=(32, 32)) as sink:
        sink.write(slice(None), array)
    return tmp_path


def run(script, folder):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(ROUNDS) + textwrap.dedent(script), str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.split()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list a process's threads")
def test_threads_are_begun_once(folder):
    script = """
        for i in range(3):
            work(source, folder, "again")
            counts.append(tasks() - begun)
        print(*counts)
    """
    assert run(script, folder) == ["1"] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_forked_child_reads_and_writes(folder):
    """Its threads are not there any more; a child that waited for them would never end."""
    script = """
        children = []
        for i in range(3):
            child = os.fork()
            if child == 0:
                os._exit(0 if np.array_equal(work(source, folder, f"child{i}"), pixels) else 7)
            children.append(child)
        assert np.array_equal(work(source, folder, "parent"), pixels)
        print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    """
    assert run(script, folder) == ["0"] * 3
