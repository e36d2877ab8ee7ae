"""Options of the benchmarks, and the fixture that runs a contest and stores what it measured.

    pytest benchmarks/ [-k op] [--device cpu|cuda] [--full | --tiny] [--threads N] [--alone] [--results FOLDER]
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the files here import each other

import ceilings
import contest as contests
import peak_memory
import records

# Seconds for each contestant of a case.
BUDGET = {"tiny": 0.1, "quick": 3.0, "full": 10.0}


def pytest_addoption(parser):
    group = parser.getgroup("xrk", "xrk's benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the operators run (default: cpu)")
    group.addoption("--full", dest="size", action="store_const", const="full", default="quick", help="large shapes")
    group.addoption("--tiny", dest="size", action="store_const", const="tiny", help="only whether everything runs")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="torch's threads (default: all)")
    group.addoption("--alone", action="store_true", help="without peers: how ours takes another number of threads")
    group.addoption("--results", type=Path, default=records.RESULTS, help="folder of the JSON files")


def pytest_configure(config):
    # A peer's warnings are its own affair.
    config.addinivalue_line("filterwarnings", "default")


def pytest_generate_tests(metafunc):
    device, size = metafunc.config.getoption("--device"), metafunc.config.getoption("size")
    cases = metafunc.module.CASES.get((device, size), [])
    ids = ["-".join([*(f"{k}{v}" for k, v in case.items() if k != "dtype"), case["dtype"]]) for case in cases]
    metafunc.parametrize("case", cases, ids=ids)


def pytest_collection_modifyitems(config, items):
    for item in items:
        # Each has its own: a run that raises between its two calls would leave a shared one in disorder.
        clock = contests.clock_for(config.getoption("--device"))
        item.add_marker(pytest.mark.benchmark(timer=clock, group=item.name))


@pytest.fixture
def compete(request, benchmark, case):
    """Runs the file's contest of this case, with its peers, and stores one record for each."""
    option = request.config.getoption
    device, size, threads = option("--device"), option("size"), option("--threads")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def run() -> None:
        with torch.no_grad():
            contest = request.module.contest(case, device)
            if option("--alone"):
                contest.peers = {}
            path = contest.path or contests.path_of(contest.ops, device)
            if "reference" in path:
                pytest.skip(f"{request.module.OP} has no kernel on {device} here: its path is {path}")
            clock = request.node.get_closest_marker("benchmark").kwargs["timer"]
            timings = contests.compare(contest, case["dtype"], clock)
            contests.race(contest, timings, benchmark, clock, BUDGET[size])
            if benchmark.disabled:  # --benchmark-disable: everything ran, nothing was timed
                return
            timings["ours"] = contests.Timing(list(benchmark.stats.stats.data))
            common = {
                "bytes": contest.bytes,
                "flops": contest.flops,
                "copy_bandwidth": ceilings.copy_bandwidth(device),
                "arithmetic_peak": ceilings.arithmetic_peak(device, contest.flops_dtype),
            }
            rows = []
            for name, timing in timings.items():
                runs = {"ours": contest.ours, **contest.peers}
                peak = None
                if timing.absent is None and device == "cuda":
                    peak = peak_memory.on_cuda(runs[name])
                elif timing.absent is None:
                    once = contests.quantile(timing.seconds, 0.5) > 5
                    peak = peak_memory.on_cpu(request.path, case, name, threads, 1 if once else 2)
                rows.append(record(name, timing, peak, path, common))
        file = records.store(rows, option("--results"))
        benchmark.extra_info["records"] = str(file)

    def record(name: str, timing: contests.Timing, peak: int | None, path: str, common: dict) -> dict:
        measured = dict.fromkeys(("p20", "p50", "p80", "rounds"))
        bound = fraction = None
        if timing.absent is None:
            measured = {f"p{p}": contests.quantile(timing.seconds, p / 100) for p in (20, 50, 80)}
            measured["rounds"] = len(timing.seconds)
            floors = {
                "bytes": common["bytes"] / common["copy_bandwidth"],
                "flops": common["flops"] / common["arithmetic_peak"],
            }
            bound = max(floors, key=floors.get)
            fraction = floors[bound] / measured["p50"]
        ours = name == "ours"
        return {
            "op": request.module.OP,
            "shape": {letter: value for letter, value in case.items() if letter != "dtype"},
            "dtype": case["dtype"],
            "path": path if ours else None,
            "peer": None if ours else name,
            "absent": timing.absent,
            **measured,
            "peak_bytes": peak,
            **common,
            "fraction": fraction,
            "bound": bound,
            "device": records.circumstances(device)["device"],
            "threads": threads,
            "size": size,
            "versions": records.circumstances(device)["versions"],
            "commit": records.circumstances(device)["commit"],
            "date": records.now(),
        }

    yield run
    torch.set_num_threads(before)
