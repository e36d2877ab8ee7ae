"""Prints what the benchmarks stored: time and memory of each operator of xrk beside its peers, as ratios.

    python benchmarks/report.py [FILE ...]

FILE: JSON as `pytest benchmarks/` writes it; without any, all of benchmarks/results/ops_*.json. A ratio above 1 says
that xrk's operator is that many times as fast, or needs that many times less memory, as the peer beside it in the same
run. "of ceiling" is the share of the time that the machine's own copying or arithmetic would take (see records.py).
Where a case ran with one thread and with N, the last table has its efficiency: the one's time / N / the other's.
"""

import argparse
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import records

HEAD = ("shape", "peer", "time", "ours", "ratio", "memory", "ours", "ratio", "of ceiling")


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: for each device a heading, for each operator a table, for each case ours and its peers."""
    lines = []
    ordered = sorted(rows, key=lambda row: (row["device"], row["threads"], row["op"], str(records.key(row))))
    for (device, threads), of_device in groupby(ordered, key=lambda row: (row["device"], row["threads"])):
        lines += [f"## {device}, {threads} {'thread' if threads == 1 else 'threads'}", ""]
        for op, of_op in groupby(of_device, key=lambda row: row["op"]):
            of_op = list(of_op)
            lines += [f"### {op}", "", _line(HEAD), _line(["---"] * len(HEAD))]
            for _, case in groupby(of_op, key=records.key):
                lines += [_line(cells) for cells in _case(list(case))]
            commits = ", ".join(sorted({str(row["commit"]) for row in of_op}))
            dates = sorted(row["date"][:10] for row in of_op)
            when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
            versions = ", ".join(f"{name} {version}" for name, version in of_op[0]["versions"].items())
            lines += ["", f"{when}, commit {commits}, {versions}", ""]
    return lines


def efficiencies(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: ours with several threads beside ours with one, on the same device."""
    ours = {(*records.key(row)[:-1], row["threads"]): row for row in rows if row["peer"] is None}
    lines = []
    for *case, threads in sorted(ours, key=str):
        one = ours.get((*case, 1))
        if threads > 1 and one is not None:
            row = ours[*case, threads]
            share = f"{100 * one['p50'] / threads / row['p50']:.0f} %"
            lines.append(_line([row["op"], _shape(row), str(threads), _time(one["p50"]), _time(row["p50"]), share]))
    if not lines:
        return []
    head = ("op", "shape", "threads", "time with one", "with all", "efficiency")
    return ["## Threads", "", _line(head), _line(["---"] * len(head)), *lines, ""]


def _case(rows: list[dict[str, Any]]) -> Iterable[list[str]]:
    ours = next(row for row in rows if row["peer"] is None)
    shape = _shape(ours)
    own = [_time(ours["p50"]), _memory(ours["peak_bytes"])]
    yield [shape, f"(ours: {ours['path']})", "", own[0], "", "", own[1], "", _share(ours)]
    for row in rows:
        if row["peer"] is None:
            continue
        if row["absent"] is not None:
            yield [shape, row["peer"], f"absent: {row['absent']}", *[""] * 6]
            continue
        ratios = [f"{row['p50'] / ours['p50']:.2f}", ""]
        if row["peak_bytes"] and ours["peak_bytes"]:
            ratios[1] = f"{row['peak_bytes'] / ours['peak_bytes']:.2f}"
        memory = _memory(row["peak_bytes"])
        yield [shape, row["peer"], _time(row["p50"]), own[0], ratios[0], memory, own[1], ratios[1], _share(row)]


def _shape(row: dict[str, Any]) -> str:
    return " ".join([*(f"{letter}={value}" for letter, value in row["shape"].items()), row["dtype"]])


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _memory(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f} MiB"


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['fraction']:.0f} % ({row['bound']})"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Prints the stored benchmarks as tables of ratios.")
    parser.add_argument("files", nargs="*", type=Path, help="default: benchmarks/results/ops_*.json")
    files = parser.parse_args().files or sorted(records.RESULTS.glob("ops_*.json"))
    if not files:
        print(f"there is no ops_*.json in {records.RESULTS}; run `pytest benchmarks/` first", file=sys.stderr)
        return 1
    rows = [row for file in files for row in records.load(file)]
    print("\n".join([*table(rows), *efficiencies(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
