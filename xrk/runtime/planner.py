"""From a module, a shape and a budget to a plan that runs: captured, searched for, checked against the module."""

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xrk.errors import InputError, InputTypeError, MemoryBudgetError
from xrk.runtime.budget import parse_memory
from xrk.runtime.capture import capture
from xrk.runtime.device import describe_device, give_back, module_on, resolve_device
from xrk.runtime.executor import execute
from xrk.runtime.fusion import fuse
from xrk.runtime.graph import Graph, Node, RowLocal
from xrk.runtime.nodes_shape import Padding, RowConcatenation, Slice
from xrk.runtime.precision import widen_ends
from xrk.runtime.rows import Turned
from xrk.runtime.schedule import Pass, schedule
from xrk.runtime.search import MIB, Search
from xrk.runtime.segments import cut
from xrk.runtime.streaming import Stream, lag
from xrk.runtime.whole import _exact

__all__ = ["Plan", "make_plan"]

CHECKED = 1 << 16  # pixels of an image that a network with crops is checked on, where smaller ones leave nothing of it


@dataclass
class Plan:
    """How a network is run on images of one shape; made by `xrk.plan`.

    Attributes:
        shape: (1, C, H, W) of the input.
        dtype, device: of the input and the outputs.
        compute_dtype: of the maps in between.
        band: rows at a time, counted where the network has the most rows.
        peak_bytes: the most memory that making and running the plan takes, the caller's input not counted.
        parts: bytes by part at the moment of the peak.
        arithmetic: products relative to the whole image, 1.0 unless the budget forces maps to be made again.
        checked: whether the captured graph was compared with the module, and on which size.
        shrunk: a line for every time that memory ran out in the last run, which then went on in lower bands; that run
            is as exact as any other, but not the same bits.
        streamed: whether `stream` takes the place of `run`; peak_bytes then counts neither input nor output.
        lag: of a streamed plan the most rows that the input is read ahead of what is yet to be handed on.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    band: int
    peak_bytes: int
    parts: dict[str, int]
    arithmetic: float
    checked: str
    budget: int | None
    _graph: Graph = field(repr=False)
    _passes: list[Pass] = field(repr=False)
    streamed: bool = False
    lag: int = 0
    shrunk: list[str] = field(default_factory=list)

    @property
    def compute_dtype(self) -> torch.dtype:
        maps = [n.output.dtype for n in self._graph.nodes if n.output.row_axis is not None]
        return min((d for d in maps if d.is_floating_point), key=lambda d: d.itemsize, default=self.dtype)

    def stream(self, stream: Stream, progress: Callable[[int, int], Any] | None = None) -> None:
        """Runs a streamed plan: from the same rows the same bytes as `run` of one with the same bands."""
        self._execute(stream, progress)

    def run(self, x: torch.Tensor, progress: Callable[[int, int], Any] | None = None) -> Any:
        """What the module gives for ``x``, from the same bytes the same bytes.

        Args:
            x: of the plan's shape, dtype and device; it is not written to.
            progress: called with (steps done, steps) about a hundred times; what it raises ends the run, and nothing
                of it stays.

        Raises:
            InputError: another shape, dtype or device. InputTypeError: no tensor. MemoryBudgetError: memory ran out
            in bands of one row as well.
        """
        if not isinstance(x, torch.Tensor):
            raise InputTypeError(f"The plan was given a {type(x).__name__}; expected a torch tensor of {self.shape}.")
        if tuple(x.shape) != self.shape:
            raise InputError(f"The plan is for the shape {self.shape}, got {tuple(x.shape)}; make another plan.")
        if x.dtype != self.dtype or x.device != self.device:
            raise InputError(
                f"The plan is for {_name(self.dtype)} on {self.device}, got {_name(x.dtype)} on {x.device}."
            )
        return self._graph.structure(self._execute(x, progress))

    def _execute(self, x: torch.Tensor | Stream, progress: Callable[[int, int], Any] | None) -> list[torch.Tensor]:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), _exact():
            shrunk: list[str] = []
            try:
                return execute(self._graph, self._passes, x, progress, shrunk)
            finally:
                self.shrunk = shrunk

    def __str__(self) -> str:
        lines = [
            f"plan for {' x '.join(map(str, self.shape))}, {_name(self.dtype)}"
            f"{'' if self.compute_dtype == self.dtype else f' ({_name(self.compute_dtype)} within)'}, "
            f"on {describe_device(self.device)}",
            f"  bands of {self.band} rows, {len(self._passes)} segment{'s' * (len(self._passes) != 1)}, "
            f"arithmetic {self.arithmetic:.2f}x of the whole image",
        ]
        for i, p in enumerate(self._passes, start=1):
            kept = [s for s in p.stores if s.kind in ("line", "ring")]
            lines.append(
                f"  segment {i}: {len(p.segment.nodes)} operators, {sum(s.capacity for s in kept)} rows kept in "
                f"{len(kept)} line buffers, {_mib(p.line_bytes)}"
            )
            if p.segment.summaries:
                lines.append(f"    summarises {', '.join(sorted({n.label for n in p.segment.summaries}))}")
            for v in p.segment.whole:
                what = "output" if v in self._graph.outputs else "kept whole"
                what += " in the place of another" * any(s.value is v and s.over is not None for s in p.stores)
                lines.append(f"    {what}: {' x '.join(map(str, v.shape))} on {self.device}, {_mib(v.bytes)}")
        lines += [f"  {name}: {_mib(size)}" for name, size in self.parts.items()]
        limit = "" if self.budget is None else f" of {_mib(self.budget)} allowed"
        lines.append(f"  predicted peak: {_mib(self.peak_bytes)}{limit}")
        lines.append(f"  {self.checked}")
        return "\n".join(lines)


def make_plan(
    module: nn.Module,
    shape: tuple[int, int, int, int],
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    unknown: str = "refuse",
    band: int | None = None,
    streamed: bool = False,
) -> Plan:
    """The plan for a module on images of ``shape`` (1, C, H, W); see `xrk.plan`. ``band`` forces the rows at a time.

    ``streamed`` asks for a plan whose input is read, and whose output handed on, row by row, where the network allows.
    """
    shape = _checked_shape(shape)
    _check_module(module)
    if unknown not in ("refuse", "whole"):
        raise InputError(f'unknown={unknown!r}; expected "refuse" or "whole".')
    if band is not None and (not isinstance(band, int) or isinstance(band, bool) or band < 1):
        raise InputError(f"band={band!r}; expected a whole number of rows from 1 up.")
    budget = parse_memory(memory)
    own = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    where = resolve_device(device, None if own is None else own.device)
    dtype = dtype or _own_dtype(module, torch.float32)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputTypeError(f"dtype={dtype!r}; expected a floating-point torch dtype.")
    module = module_on(module, where)
    with torch.inference_mode(), torch.autocast(where.type, enabled=False), _exact():
        graph = _graph(module, shape, dtype, where, unknown)
        limit = _free(where) if budget is None else budget
        again = functools.partial(_graph, module, shape, dtype, where, unknown)
        search = Search(graph, band, again, streamed)
        best = search.first_within(limit)
        if best.peak > limit and budget is not None:
            search.forget()
            raise MemoryBudgetError(
                f"memory={memory!r} is {_mib(budget)}, but the smallest plan for {tuple(shape)} takes "
                f"{_mib(best.peak)}; expected at least memory={best.peak}.",
                best.peak,
            )
        best = search.laid_out(best)
        search.forget()
        checked = _check(module, graph, shape, dtype, where, unknown)
        give_back()
        graph = best.graph
        _prepare(graph, best.passes)
    return Plan(
        shape,
        graph.input.dtype,
        where,
        best.band,
        best.peak,
        best.parts,
        best.arithmetic,
        checked,
        budget,
        graph,
        best.passes,
        best.streamed,
        lag(best.passes, graph) if best.streamed else 0,
    )


def _graph(module: nn.Module, shape: Any, dtype: torch.dtype, device: torch.device, unknown: str) -> Graph:
    graph = capture(module, shape, dtype, device, unknown)
    own = _own_dtype(module, dtype)
    if own.itemsize > dtype.itemsize:
        widen_ends(graph, own)
    fuse(graph)
    for node in graph.nodes:
        node.home = device
    return graph


def _prepare(graph: Graph, passes: Sequence[Pass]) -> None:
    heights: dict[Node, Counter[int]] = {}
    for p in passes:
        for step in p.steps:
            heights.setdefault(step.node, Counter())[step.r1 - step.r0] += 1
    for node in graph.nodes:
        if isinstance(node, RowLocal):
            node.heights = heights.get(node, {})
        node.prepare()
        if node.weight_bytes > MIB:
            give_back()


def _check(module: nn.Module, graph: Graph, shape: Any, dtype: torch.dtype, device: torch.device, unknown: str) -> str:
    """Compares a graph of the same network on a small image with the module itself; says which size."""
    sizes: list[list[int]] = []
    stride = _stride(graph)
    for cropped in (False, True):
        for least in (2, 4, 8):
            size = []
            for side, margin in zip(shape[2:], graph.margins, strict=True):
                least_side = max(least * stride, 16) + cropped * margin
                size.append(min(side, -(-least_side // stride) * stride + side % max(stride, 2)))
            if size not in sizes and (not cropped or math.prod(size) <= CHECKED):
                sizes.append(size)
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        small = (*shape[:2], *size)
        x = torch.rand(small, generator=generator, dtype=torch.float32).to(device, graph.input.dtype)
        try:
            expected = module(x.to(_own_dtype(module, dtype), copy=True))
        except Exception:
            continue  # too small for the network; the sizes grow
        wanted = torch.utils._pytree.tree_leaves(expected)
        if any(w.numel() == 0 for w in wanted):
            continue  # nothing is left of it
        try:
            again = _graph(module, small, dtype, device, unknown)
        except InputError:
            continue  # a slice that is not empty on the image
        if [n.label for n in again.nodes] != [n.label for n in graph.nodes]:
            continue  # it does other things on a smaller image
        for node in again.nodes:
            node.prepare()
        passes = [schedule(s, max(1, size[0] // 3)) for s in cut(again)]
        got = execute(again, passes, x)
        for w, g in zip(wanted, got, strict=True):
            scale = w.abs().max().item()
            error = (w - g).abs().max().item() if w.shape == g.shape else math.inf
            if not error <= max(1e-2, 64 * torch.finfo(dtype).eps) * scale + 1e-6 and math.isfinite(scale):
                raise InputError(
                    f"The plan of {type(module).__name__} does not give what the module gives: on an image of "
                    f"{size[0]} x {size[1]} they differ by {error:g} where the largest value is {scale:g}. "
                    "Does its forward pass keep a state or draw random numbers?"
                )
        return f"checked against the module on {size[0]} x {size[1]}"
    return "not checked against the module: it takes no smaller image"


def _stride(graph: Graph) -> int:
    """Rows of the image to a row of the coarsest map."""
    scales = {graph.input: 1.0}
    for node in graph.nodes:
        rowed = [v for v in node.inputs if v in scales]
        if not rowed or node.output.row_axis is None or node.output.rows == 1:
            continue
        coarsest = max(rowed, key=scales.__getitem__)
        factor = coarsest.rows / node.output.rows
        factor = round(factor) if factor >= 1 else 1 / round(1 / factor)
        if isinstance(node, Slice | RowConcatenation | Padding | Turned):
            factor = getattr(node, "step", 1)  # other rows, of the same height
        scales[node.output] = scales[coarsest] * factor
    return max(1, round(max(scales.values())))


def _free(device: torch.device) -> int:
    """Bytes that are free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 1 << 62


def _checked_shape(shape: Any) -> tuple[int, int, int, int]:
    try:
        sizes = tuple(operator.index(s) for s in shape)
    except TypeError:
        sizes = ()
    if len(sizes) != 4 or sizes[0] != 1 or min(sizes) < 1:
        raise InputError(f"The shape is {shape!r}; expected (1, C, H, W), all from 1 up.")
    return sizes


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise InputTypeError(f"The network is a {type(module).__name__}; expected a torch.nn.Module.")
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        raise InputError(f"The network is in training mode ({training[0]}); call .eval() on it first.")


def _own_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    tensors = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), default)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
