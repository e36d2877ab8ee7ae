"""The search for a plan: ways to cut a network, bands for each, and the bytes that each of them takes."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from xrk.runtime.fusion import make_twice
from xrk.runtime.graph import Apply, Graph, Node, Plain, RowLocal, Value
from xrk.runtime.keeping import made_again
from xrk.runtime.nodes_convolution import Convolution, UpsampledConvolution
from xrk.runtime.overlays import overlay
from xrk.runtime.schedule import Pass, schedule
from xrk.runtime.segments import Segment, cut
from xrk.runtime.steady import window_bytes
from xrk.runtime.streaming import can_stream, window

__all__ = ["BACKEND", "BANDS", "MIB", "Search", "Sized"]

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
# Lost between bands that come and go: as much again, but more than the first has not been seen, for large blocks are
# the system's at once; nor, beside `OWN_BACKEND`, less than the other. The check's first calls of the module's own
# operators load torch's code and leave holes (20 MiB in all were seen of 15 kinds), which high bands then fill.
BETWEEN_BANDS, FROM_CHECK = 24 * MIB, 11 * MIB
FOREIGN = ("linear", "matmul", "mm", "attention", "einsum", "conv_transpose2d", "conv1d", "conv3d")
STEP = 400  # bytes of one step of the order, with its tuples
QUICK = MIB  # an order of so many bytes is laid out in well under a second

# Parts of a plan's bytes that depend on the height of its bands.
STEPS, BUFFERS = "order of steps", ("line buffers", "bands and scratch", "allocator")


@dataclass
class _Policy:
    """One way to cut the network, and the bands that are tried with it."""

    graph: Graph
    segments: list[Segment]
    bands: Sequence[tuple[int, int]]


class Search:
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
        self.sized: dict[tuple[int, int, int], Sized] = {}
        self.limit: float = math.inf

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

    def first_within(self, limit: int) -> "Sized":
        """The first that takes ``limit`` bytes or less, or the smallest of all."""
        self.limit = limit
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

    def _below(self, limit: list[float], policies: Iterable[int]) -> Iterator["Sized"]:
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

    def _size(self, i: int, band: int, least: int, useful: float) -> "Sized":
        known, policy = self.sized.get((i, band, least)), self.policies[i]
        if known is None or (not known.parts and known.peak <= useful):
            handed_on = self.streamed and can_stream(policy.graph)
            known = Sized(policy.graph, policy.segments, band, least, self.once, useful, handed_on)
            if known.peak > self.limit:
                known.passes = []  # orders of many candidates are more than the budget
            self.sized[i, band, least] = known
        return known

    def laid_out(self, sized: "Sized") -> "Sized":
        """The same candidate with its passes, which were let go of where it takes more than the limit."""
        if sized.passes:
            return sized
        i, band, least = next(key for key, known in self.sized.items() if known is sized)
        policy = self.policies[i]
        return Sized(policy.graph, policy.segments, band, least, self.once, math.inf, sized.streamed)

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


def _floor(higher: list["Sized"], band: int, least: int) -> float:
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


class Sized:
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
        self._backend, self._least_lost = BACKEND + int(LOST * weights), 0
        if _all_own(graph):
            self._least_lost = FROM_CHECK
            self._backend = OWN_BACKEND + OWN_LOST * max((_plain_bytes(n) for n in graph.nodes), default=0)
        self.passes: list[Pass] = []
        for segment in segments:
            self.passes.append(schedule(segment, self.band, least))
            # Maps that are made again, and from low bands, come to orders longer than all that they save.
            self.peak = self._backend + self._least_lost + weights + STEP * sum(len(p.steps) for p in self.passes)
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
        parts[BUFFERS[2]] = max(self._least_lost, min(here.get(BUFFERS[1], 0), BETWEEN_BANDS))
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
