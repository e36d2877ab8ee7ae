"""What the benchmarks store, and the table that is made of it."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """benchmarks/records.py and report.py, which import each other by these names."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("records", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import records
    import report

    yield records, report
    for name in ("records", "report"):
        sys.modules.pop(name)


@pytest.fixture
def record(modules):
    records, _ = modules

    def make(peer, seconds, peak, **changes):
        made = dict.fromkeys(records.FIELDS)
        made |= {"op": "layer_norm", "shape": {"H": 4, "C": 96}, "dtype": "float32", "peer": peer, "size": "quick"}
        made |= {"p20": seconds, "p50": seconds, "p80": seconds, "rounds": 3, "peak_bytes": peak, "bytes": 8}
        made |= {"path": None if peer else "native (avx2)", "fraction": 0.25, "bound": "bytes", "device": "A B (c)"}
        made |= {"threads": 2, "versions": {"torch": "2.13"}, "commit": "0123456789ab", "date": "2026-01-02T03:04:05"}
        return made | changes

    return make


def test_a_later_run_of_a_case_takes_the_earlier_ones_place(modules, record, tmp_path):
    records, _ = modules
    file = records.store([record(None, 1.0, 10), record("torch eager", 2.0, 30)], tmp_path)
    assert file.name == "ops_a-b-c.json"
    records.store([record(None, 5.0, 10, shape={"H": 8, "C": 96})], tmp_path)
    records.store([record(None, 7.0, 10, threads=1)], tmp_path)
    records.store([record(None, 0.5, 10)], tmp_path)
    assert sorted(r["p50"] for r in records.load(file)) == [0.5, 5.0, 7.0]
    assert all(tuple(r) == records.FIELDS for r in records.load(file))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_record_of_another_schema_is_refused(modules, record, tmp_path):
    records, _ = modules
    with pytest.raises(ValueError, match=r"a record has the fields .* expected"):
        records.store([{**record(None, 1.0, 10), "more": 1}], tmp_path)


def test_the_table_holds_ratios(modules, record):
    _, report = modules
    absent = dict.fromkeys(("p20", "p50", "p80", "rounds", "peak_bytes", "fraction", "bound"))
    lines = report.table(
        [
            record(None, 1e-3, 2**20),
            record("torch eager", 2.5e-3, 3 * 2**20),
            record("mambapy", None, None, **absent, absent="mambapy cannot be imported"),
        ]
    )
    assert lines[0] == "## A B (c), 2 threads"
    assert any("torch eager | 2.5 ms | 1 ms | 2.50 | 3.0 MiB | 1.0 MiB | 3.00 | 25 % (bytes)" in line for line in lines)
    assert any("mambapy | absent: mambapy cannot be imported" in line for line in lines)
    assert lines[-2] == "2026-01-02, commit 0123456789ab, torch 2.13"


def test_the_threads_efficiency_is_told_where_one_thread_was_measured_too(modules, record):
    _, report = modules
    other = {"shape": {"H": 8, "C": 96}}
    rows = [
        record(None, 1e-3, 1),
        record("torch", 2e-3, 1),
        record(None, 1.8e-3, 1, threads=1),
        record(None, 1.0, 1, **other),
    ]
    lines = report.efficiencies(rows)
    assert lines[4:] == ["| layer_norm | H=4 C=96 float32 | 2 | 1.8 ms | 1 ms | 90 % |", ""]
    assert report.efficiencies(rows[:2]) == []


def test_without_results_the_report_says_how_to_get_them(modules, monkeypatch, tmp_path, capsys):
    records, report = modules
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py"])
    assert report.main() == 1
    assert "run `pytest benchmarks/` first" in capsys.readouterr().err


@pytest.mark.slow
def test_every_benchmark_runs(modules, tmp_path):
    records, _ = modules
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "--tiny", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout[-2000:]
    (file,) = tmp_path.iterdir()
    rows = records.load(file)
    assert {row["op"] for row in rows} == {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    for row in rows:
        if row["absent"] is None:
            assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["peak_bytes"] >= 0
        else:
            assert "cannot be imported" in row["absent"]
