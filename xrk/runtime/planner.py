"""From a module, a shape and a budget to a plan: rows at a time, what is kept whole, and the bytes of it all."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xrk.errors import InputError, InputTypeError, MemoryBudgetError
from xrk.runtime.budget import parse_memory
from xrk.runtime.capture import capture
from xrk.runtime.device import describe_device, give_back, module_on, resolve_device
from xrk.runtime.executor import execute
from xrk.runtime.fusion import fuse, make_twice
from xrk.runtime.graph import Apply, Graph, Node, Plain, RowLocal, Value
from xrk.runtime.keeping import made_again
from xrk.runtime.nodes_convolution import Convolution, UpsampledConvolution
from xrk.runtime.overlays import overlay
from xrk.runtime.precision import widen_ends
from xrk.runtime.schedule import Pass, schedule
from xrk.runtime.segments import Segment, cut
from xrk.runtime.steady import window_bytes
from xrk.runtime.streaming import Stream, can_stream, lag, window
from xrk.runtime.whole import _exact

__all__ = ["BANDS", "Plan", "make_plan"]

# The ladder, fastest first: bands that stay in cache and are high enough for a convolution to be quick.
# With the rows at a time goes the fewest rows of a small map that are made at once (see `schedule`).
BANDS = ((32, 4), (24, 4), (16, 4), (16, 2), (12, 2), (8, 2), (8, 1), (6, 1), (4, 1), (2, 1), (1, 1))
# Before bands get so low, skips that are quickly made from the image are made twice, from high bands on again.
TWICE_FROM = (8, 2)
# Where maps are kept between segments: bytes against products. So many products a byte are spent rather than hold it.
PRODUCTS = (8, 32, 128, 1 << 20)
# Higher ones go before them where the image is narrow: as many pixels in a band, in fewer and larger products.
TALL = (256, 128, 64)
TALL_PIXELS = 1 << 16

MIB = 1 << 20

# What a process takes for its first plan beside the tensors: 15 to 20 MiB of torch's and oneDNN's code, and the code
# that oneDNN writes. And a quarter of the prepared weights more, lost between them while they are made.
BACKEND, LOST = 29 * MIB, 1 / 4
# Where xrk's own kernels do all that oneDNN could: no such code, and three times the largest weight (folded, reordered,
# in its place) while weights are made.
OWN_BACKEND, OWN_LOST = 12 * MIB, 3
# More than this has not been seen lost between bands that come and go: large blocks are the system's at once.
BETWEEN_BANDS = 24 * MIB
FOREIGN = ("linear", "matmul", "mm", "attention", "einsum", "conv_transpose2d", "conv1d", "conv3d")
STEP = 400  # bytes of one step of the order, with its tuples
QUICK = MIB  # an order of so many bytes is laid out in well under a second

# Parts of a plan's bytes that depend on the height of its bands.
STEPS, BUFFERS = "order of steps", ("line buffers", "bands and scratch", "allocator")


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
        search = _Search(graph, band, again, streamed)
        best = search.first_within(limit)
        search.forget()
        if best.peak > limit and budget is not None:
            raise MemoryBudgetError(
                f"memory={memory!r} is {_mib(budget)}, but the smallest plan for {tuple(shape)} takes "
                f"{_mib(best.peak)}; expected at least memory={best.peak}.",
                best.peak,
            )
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


@dataclass
class _Policy:
    """One way to cut the network, and the bands that are tried with it."""

    graph: Graph
    segments: list[Segment]
    bands: Sequence[tuple[int, int]]


class _Search:
    """The first plan that takes no more than a limit, and where there is none the smallest."""

    def __init__(self, graph: Graph, band: int | None, again: Callable[[], Graph], streamed: bool) -> None:
        """``again``: captures the graph once more."""
        self.graph, self.again, self.streamed = graph, again, streamed
        width = graph.input.shape[3]
        tall = tuple((b, 8) for b in TALL if b * width <= TALL_PIXELS)
        self.bands = (*tall, *BANDS) if band is None else ((band, 1),)
        self.once = sum(n.work * n.output.rows for n in graph.nodes if isinstance(n, RowLocal))
        self.policies: list[_Policy] = []
        self.rest = self._make_policies()
        self.sized: dict[tuple[int, int, int], _Sized] = {}

    def _make_policies(self) -> Iterator[_Policy]:
        """By what is held between the segments, the most and the quickest first."""
        graph, bands, outputs = self.graph, self.bands, set(self.graph.outputs)
        # A scan of the whole image on a CPU: no first sweep, and long calls, which keep the threads busy.
        halves = [n for n in graph.nodes if isinstance(n, Apply) and n.operator.at_once is not None]
        if halves and len(bands) > 1 and all(n.home.type == "cpu" for n in graph.nodes):
            at_once = self.again()
            at_once.run_at_once()
            yield _Policy(at_once, cut(at_once), bands[: bands.index(TWICE_FROM)])
        first = cut(graph)
        if TWICE_FROM not in bands:
            yield _Policy(graph, first, bands)
        else:
            at = bands.index(TWICE_FROM)
            yield _Policy(graph, first, bands[:at])
            light = self._light()
            if light is not None:
                graph, first = light, cut(light)
                yield _Policy(graph, first, bands[:at])
            twice = self._light() or self.again()
            changed = make_twice(twice)
            yield _Policy(twice, cut(twice), BANDS) if changed else _Policy(graph, first, bands[at:])
        if not any(v not in outputs for s in first for v in s.whole):
            return
        seen = [frozenset()]
        few = (*bands[:-1:3], bands[-1])
        choices = [functools.partial(made_again, graph, products) for products in PRODUCTS]
        if not any(isinstance(n, Apply) and n.operator.apply_work for n in graph.nodes):
            choices.append(lambda: frozenset(n.output for n in graph.nodes))
        for choice in choices:
            again = choice()
            if again not in seen:
                seen.append(again)
                yield _Policy(graph, cut(graph, again), few)

    def _light(self) -> Graph | None:
        """The graph with weights of fewer bytes, where there are such."""
        graph = self.again()
        lighter = [n.lighten() for n in graph.nodes if isinstance(n, Convolution)]
        return graph if any(lighter) else None

    def forget(self) -> None:
        """Lets go of all that was tried: its own generator would hold it until the next collection of cycles."""
        self.rest.close()
        self.policies.clear()
        self.sized.clear()

    def _policies(self) -> Iterator[int]:
        yield from range(len(self.policies))
        for policy in self.rest:
            self.policies.append(policy)
            yield len(self.policies) - 1

    def first_within(self, limit: int) -> "_Sized":
        """The first that takes ``limit`` bytes or less, or the smallest of all."""
        for sized in self._below([limit + 1], self._policies()):
            if sized.peak <= limit:
                return sized
        least, highest = [math.inf], []
        for i, policy in enumerate(self.policies):
            highest.append(self._size(i, *policy.bands[0], least[0]))
            least[0] = min(least[0], highest[-1].peak)
        smallest = min(highest, key=lambda sized: sized.peak)
        for sized in self._below(least, sorted(range(len(highest)), key=lambda i: highest[i].peak)):
            if sized.peak < least[0]:
                smallest, least[0] = sized, sized.peak
        return smallest

    def _below(self, limit: list[float], policies: Iterable[int]) -> Iterator["_Sized"]:
        """The candidates that may take less than ``limit[0]`` bytes; to lay one out takes long."""
        for i in policies:
            policy, higher = self.policies[i], []
            floor = self._held(policy)
            for band, least in policy.bands:
                if floor < limit[0] and _floor(higher, band, least) < limit[0]:
                    sized = self._size(i, band, least, limit[0])
                    if sized.parts:
                        higher.append(sized)
                    yield sized

    def _size(self, i: int, band: int, least: int, useful: float) -> "_Sized":
        known, policy = self.sized.get((i, band, least)), self.policies[i]
        if known is None or (not known.parts and known.peak <= useful):
            handed_on = self.streamed and can_stream(policy.graph)
            known = _Sized(policy.graph, policy.segments, band, least, self.once, useful, handed_on)
            self.sized[i, band, least] = known
        return known

    def _held(self, policy: _Policy) -> int:
        """Bytes of what is held between segments, if every map that can be is laid over another."""
        most, held, outputs = 0, {}, set(policy.graph.outputs)
        for segment in policy.segments:
            held.update((n.output, n.output.bytes) for n in segment.before)
            held.update((v, v.bytes) for v in segment.whole if not (self.streamed and v in outputs))
            held.update((n.output, n.operator.state_bytes) for n in segment.summaries)
            ended = sum(v.bytes for v in segment.last_use if v in segment.sources)
            made = sum(v.bytes for v in segment.whole if v not in outputs)
            most = max(most, sum(held.values()) - min(made, ended))
            for v in segment.last_use:
                held.pop(v, None)
        return most


def _floor(higher: list["_Sized"], band: int, least: int) -> float:
    """About the least that segments take in lower bands than those that were laid out; 0 where that is soon found out.

    Steps become more, and buffers shrink no faster than the bands; nor much faster than they did from band to band, for
    many of their rows do not depend on the bands.
    """
    if not higher or higher[-1].order < QUICK:
        return 0.0
    last = higher[-1]
    buffers = last.buffers * band / last.band * min(1.0, least / last.least)
    if len(higher) > 1 and higher[-2].band > last.band:
        slope = (higher[-2].buffers - last.buffers) / (higher[-2].band - last.band)
        buffers = max(buffers, 0.95 * (last.buffers - slope * (last.band - band)))
    return last.peak - last.order - last.buffers + last.order * last.band / band + buffers


class _Sized:
    """A candidate with its passes and bytes."""

    def __init__(
        self,
        graph: Graph,
        segments: list[Segment],
        band: int,
        least: int,
        once: int,
        useful: float,
        streamed: bool = False,
    ) -> None:
        """``once``: products of the network where nothing is made twice.

        ``useful``: a larger peak is not looked at in full: `peak` then is some number above it, and `parts` is empty.
        """
        self.graph, self.band, self.least, self.streamed = graph, band, least, streamed
        self.handed_on = set(graph.outputs) if streamed else set()
        self.parts: dict[str, int] = {}
        weights = sum(n.weight_bytes for n in graph.nodes)
        self._backend = BACKEND + int(LOST * weights)
        if _all_own(graph):
            self._backend = OWN_BACKEND + OWN_LOST * max((_plain_bytes(n) for n in graph.nodes), default=0)
        self.passes: list[Pass] = []
        for segment in segments:
            self.passes.append(schedule(segment, self.band, least))
            # Maps that are made again, and from low bands, come to orders longer than all that they save.
            self.peak = self._backend + weights + STEP * sum(len(p.steps) for p in self.passes)
            if self.peak > useful:
                return
        outputs = set(graph.outputs)
        held: dict[Value, int] = {}
        self.peak = 0
        for p in self.passes:
            overlay(p)
            for node in p.segment.before:
                held[node.output] = node.output.bytes
                self._see(weights, held, outputs, {BUFFERS[1]: node.scratch if isinstance(node, Plain) else 0})
            for store in p.stores:
                held.pop(store.over, None)
            for v in p.segment.whole:
                if v not in self.handed_on:
                    held[v] = v.bytes
            for node in p.segment.summaries:
                held[node.output] = max(node.output.bytes, node.operator.state_bytes)
            here = dict(zip(BUFFERS, (p.line_bytes, p.peak), strict=False))
            if self.streamed:
                # The rows that are kept, a copy where they move, one band as it is read and one as it is handed on.
                rows = 2 * window(p, graph.input).capacity + 2 * self.band
                here["input's rows"] = graph.input.bytes_of(min(rows, 2 * graph.input.rows))
            if any(n.home.type == "cuda" for n in p.segment.nodes):
                here["windows of recorded bands"] = window_bytes(p)
            self._see(weights, held, outputs, here)
            for v in p.segment.last_use:
                held.pop(v, None)
        once_run = sum(node.work for p in self.passes for node in p.segment.before if isinstance(node, Plain))
        self.arithmetic = (sum(p.work for p in self.passes) + once_run) / once if once else 1.0

    @property
    def order(self) -> int:
        return self.parts.get(STEPS, 0)

    @property
    def buffers(self) -> int:
        return sum(self.parts.get(name, 0) for name in BUFFERS)

    def _see(self, weights: int, held: dict[Value, int], outputs: set[Value], here: dict[str, int]) -> None:
        parts = {
            "backend's first calls": self._backend,
            STEPS: STEP * sum(len(p.steps) for p in self.passes),
            "prepared weights": weights,
            "output": sum(size for v, size in held.items() if v in outputs),
            "maps kept whole": sum(s for v, s in held.items() if v not in outputs and v.row_axis is not None),
            "states and vectors": sum(s for v, s in held.items() if v not in outputs and v.row_axis is None),
            **here,
        }
        # Bands come and go in all sizes: as much again has been seen lost between them.
        parts[BUFFERS[2]] = min(here.get(BUFFERS[1], 0), BETWEEN_BANDS)
        total = sum(parts.values())
        if total > self.peak:
            self.peak, self.parts = total, {name: size for name, size in parts.items() if size}


def _all_own(graph: Graph) -> bool:
    """Whether no node needs oneDNN."""
    return all(
        n.packs if isinstance(n, Convolution | UpsampledConvolution) else not any(f in n.label for f in FOREIGN)
        for n in graph.nodes
    )


def _plain_bytes(node: Node) -> int:
    """Of a node's prepared weights, before Winograd's transform makes 16 of 9."""
    return node.weight_bytes * 9 // 16 if getattr(node, "transformed", False) else node.weight_bytes


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
    rows = [v.rows for n in graph.nodes for v in (n.output,) if v.row_axis is not None and v.rows > 1]
    stride = max((round(shape[2] / r) for r in rows), default=1) or 1
    sizes = []
    for least in (2, 4, 8):
        size = [min(s, -(-max(least * stride, 16) // stride) * stride + s % max(stride, 2)) for s in shape[2:]]
        if size not in sizes:
            sizes.append(size)
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        small = (*shape[:2], *size)
        x = torch.rand(small, generator=generator, dtype=torch.float32).to(device, graph.input.dtype)
        try:
            expected = module(x.to(_own_dtype(module, dtype), copy=True))
        except Exception:
            continue  # too small for the network; the sizes grow
        again = _graph(module, small, dtype, device, unknown)
        if [n.label for n in again.nodes] != [n.label for n in graph.nodes]:
            continue  # it does other things on a smaller image
        for node in again.nodes:
            node.prepare()
        passes = [schedule(s, max(1, size[0] // 3)) for s in cut(again)]
        found = again.structure(execute(again, passes, x))
        wanted, got = (torch.utils._pytree.tree_leaves(t) for t in (expected, found))
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
        sizes = tuple(int(s) for s in shape)
    except (TypeError, ValueError):
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
