"""What one benchmark measures: an operator of xrk and its peers on the same inputs, side by side in one run.

A benchmark's file (bench_<op>.py) holds

    CASES    {(device, size): [case, ...]}, a case being {"dtype": name, and sizes by their letters: int}
    contest  (case, device) -> Contest

Sizes are "tiny" (does it run?), "quick" (minutes on two cores) and "full" (detector's shapes).
"""

import functools
import gc
import importlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from xrk.kernels import dispatch

Run = Callable[[], torch.Tensor]

# Largest difference from ours, as a share of the largest value, up to which a peer does the same work.
SAME_WORK = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass
class Contest:
    """`ours` and its peers by name: a function that computes the same, or a sentence that says why there is none.

    bytes and flops: the fewest that the operator must move (each input read once, each output written once) and
    compute, an exponential counted as one; flops_dtype: in what the machine would do them fastest. once: peers so slow
    here, and with so little to warm up, that the run which is compared with ours is the one that is timed.
    """

    ops: tuple[str, ...]
    ours: Run
    peers: dict[str, Run | str]
    bytes: int
    flops: int
    flops_dtype: str = "float32"
    path: str = ""
    once: tuple[str, ...] = ()


@dataclass
class Timing:
    """Seconds of each run, in the order of the rounds."""

    seconds: list[float] = field(default_factory=list)
    absent: str | None = None


class CudaClock:
    """A clock for the device: called before and after a run in turn, it counts the seconds between the two calls.

    Before a run the device is given a large memset: it empties the cache, and while it runs (about 0.1 ms) the host
    queues what is timed behind it, so that a short operator's launch is not measured.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.started: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        if self.started is None:
            _cache_filler().zero_()
            event.record()
            self.started = event
        else:
            event.record()
            event.synchronize()
            self.total += self.started.elapsed_time(event) / 1e3
            self.started = None
        return self.total


@functools.cache
def _cache_filler() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def clock_for(device: str) -> Callable[[], float]:
    return CudaClock() if device == "cuda" else time.perf_counter


def normal(shape: Iterable[int], case: dict[str, Any], device: str, seed: int = 0) -> torch.Tensor:
    """Random values of the case's dtype; never zeros, which run faster than data."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(getattr(torch, case["dtype"]))


def item_size(case: dict[str, Any]) -> int:
    return getattr(torch, case["dtype"]).itemsize


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def imported(name: str) -> Any | str:
    """A peer's module, or why it is not there."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a compiled peer built for another torch fails in many ways
        return f"{name.split('.')[0]} cannot be imported: {str(error).splitlines()[0] if str(error) else error!r}"


def path_of(ops: tuple[str, ...], device: str) -> str:
    """The path or paths that these registered operators take, each named once."""
    return ", ".join(dict.fromkeys(dispatch.path_of(op, device).path for op in ops))


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value; NaN where either has one. In bands, to take little memory."""
    if actual.shape != expected.shape:
        return math.inf
    gap, scale = [], []
    bands = (t.reshape(-1, *t.shape[-2:]).unbind(0) for t in (actual, expected))
    for a, b in zip(*bands, strict=True):
        gap.append((a.float() - b.float()).abs().max())
        scale.append(b.float().abs().max())
    return float(torch.stack(gap).max() / torch.stack(scale).max())


def compare(contest: Contest, dtype: str, clock: Callable[[], float]) -> dict[str, Timing]:
    """Runs each peer once beside ours: it warms up, and a peer that computes something else is absent with a reason."""
    timings = {}
    expected = contest.ours()
    for name, run in contest.peers.items():
        timings[name] = timing = Timing()
        if isinstance(run, str):
            timing.absent = run
            continue
        try:
            start = clock()
            result = run()
            seconds = clock() - start
            found = difference(result, expected)
        except Exception as error:  # another's code, a compiler or a device without memory: in many ways
            timing.absent = f"it failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            if isinstance(clock, CudaClock):
                clock.started = None
                torch.cuda.empty_cache()
            continue
        if not found <= SAME_WORK[dtype]:
            timing.absent = f"its result differs from ours by {found:.1e} of the largest value"
        elif name in contest.once:
            timing.seconds.append(seconds)
    return timings


def race(contest: Contest, timings: dict[str, Timing], benchmark: Any, clock: Callable[[], float], budget: float):
    """Times ours and the peers, one run of each in every round; slow ones drop out when `budget` seconds are used.

    `benchmark` is pytest-benchmark's fixture: it times ours, and before each of its rounds the peers have theirs.
    """

    def once(run: Run) -> float:
        start = clock()
        run()
        return clock() - start

    waiting = (name for name, timing in timings.items() if timing.absent is None and not timing.seconds)
    running = {name: contest.peers[name] for name in waiting}
    first = {name: once(run) for name, run in running.items()}
    rounds = {name: min(30, int(budget / seconds)) for name, seconds in first.items()}
    for name, number in rounds.items():
        if number == 0:  # one run, warm as it is, is all that there is time for
            timings[name].seconds.append(first[name])
    ours = max(3, min(30, int(budget / once(contest.ours))))
    done = iter(range(ours))

    def peers() -> None:
        number = next(done)
        for name, run in running.items():
            if number < rounds[name]:
                timings[name].seconds.append(once(run))

    collecting = gc.isenabled()
    gc.disable()
    try:
        benchmark.pedantic(contest.ours, setup=peers, rounds=ours)
    finally:
        if collecting:
            gc.enable()


def quantile(seconds: list[float], share: float) -> float:
    """By linear interpolation between the sorted values."""
    ordered = sorted(seconds)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
