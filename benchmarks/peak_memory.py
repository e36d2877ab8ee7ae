"""The most memory that one run needs above what was in use before it, its result counted.

On a CUDA device torch's allocator knows. On a CPU a fresh process is asked, since what a process has used before stays
in its allocator and would hide what a run needs. `python benchmarks/peak_memory.py` imports torch once, then forks for
each line of JSON that it reads, before any thread has been started; the child

    prepares the inputs, runs once to load and compile what a first run does,
    resets the process's high-water mark and runs again.

The figure is that mark minus the resident memory just before. Large blocks go back to the system when they are freed
(M_MMAP_THRESHOLD is fixed below), so the memory before holds no reserve that a run could take from.
"""

import atexit
import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from contest import Run


def on_cuda(run: Run) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def on_cpu(file: Path, case: dict[str, Any], contestant: str, threads: int, runs: int) -> int | None:
    """Of the contestant of this name ("ours" or a peer's); None where the system does not tell (it is not Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    server = _server()
    asked = {"file": str(file), "case": case, "contestant": contestant, "threads": threads, "runs": runs}
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    peak = json.loads(server.stdout.readline())
    if peak is None:
        raise RuntimeError(f"the process that measures the memory of {contestant} failed")
    return peak


def load(file: str | Path) -> Any:
    """A benchmark's file as a module."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _server() -> subprocess.Popen:
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    # Workers of the compiler would be counted with nobody, and need not be started in a process that ends soon.
    variables["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, __file__], env=variables, stdin=pipe, stdout=pipe, text=True)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen) -> None:
    server.stdin.close()  # it has read everything then
    server.stdout.close()
    server.wait()


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _measured(asked: dict[str, Any]) -> int:
    torch.set_num_threads(asked["threads"])
    with torch.no_grad():
        contest = load(asked["file"]).contest(asked["case"], "cpu")
        run = contest.ours if asked["contestant"] == "ours" else contest.peers[asked["contestant"]]
        for _ in range(asked["runs"]):
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
            run()
            peak = _resident("VmHWM") - before
    return peak


def _serve() -> None:
    import torch._inductor.compile_fx  # noqa: F401 (what torch.compile would import in every child)
    import xrk.kernels  # noqa: F401

    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            # Whatever happens, this process must not go on as a second server, nor write where answers are read.
            try:
                os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
                os.write(writing, json.dumps(_measured(json.loads(line))).encode())
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            peak = answer.read()
        os.waitpid(child, 0)
        print(peak or "null", flush=True)


if __name__ == "__main__":
    _serve()
