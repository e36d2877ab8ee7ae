"""Runs the passes of a plan: memory is taken at the start of a pass, and no row is made twice.

Where memory runs out in the middle of a pass, the rows that are still needed move to the host, everything else is
freed, and the rest of the pass is laid out in bands of half the height: nothing is made again.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xrk.errors import MemoryBudgetError
from xrk.runtime.device import give_back
from xrk.runtime.graph import Graph, Node, RowLocal, Value
from xrk.runtime.overlays import overlay, overlay_rest
from xrk.runtime.rows import as_channels_last, layout
from xrk.runtime.schedule import Pass, Step, schedule
from xrk.runtime.steady import CudaRecorder, Record, Steady, bands
from xrk.runtime.stores import Rows, rows_of, split
from xrk.runtime.streaming import Pulled, Pushed, Stream, window

__all__ = ["execute"]

_log = logging.getLogger("xrk")


def execute(
    graph: Graph,
    passes: Sequence[Pass],
    x: torch.Tensor | Stream,
    progress: Callable[[int, int], Any] | None = None,
    shrunk: list[str] | None = None,
    record: Record | None = None,
) -> list[torch.Tensor]:
    """The outputs of the graph for ``x``, in the order of `Graph.outputs`; none where ``x`` is a `Stream`.

    ``progress`` is called with (steps done, steps) about a hundred times; what it raises ends the run. Everything is
    allocated here and freed on the way out, whichever way that is.

    ``torch.OutOfMemoryError``, and no other error, makes the rest of the run one in lower bands; each time ``shrunk``
    gets a line. Rows made before and after it are those of two plans: the result is as exact as any plan's, but equal
    bit for bit only to a run that ran out of memory at the same step.

    Bands that are alike are recorded by ``record`` and played again (see `steady`); by default so on CUDA.

    Raises:
        MemoryBudgetError: memory ran out at bands of one row, or where no band has a part in it.
    """
    if isinstance(x, Stream):
        record = None  # what is read and handed on between bands is no part of a recording
    elif record is None and x.device.type == "cuda":
        record = CudaRecorder()
    run = _Run(graph, passes, x, progress, record)
    try:
        return run.outputs()
    finally:
        if shrunk is not None:
            shrunk += run.shrunk
        run.held.clear()


class _Run:
    def __init__(
        self,
        graph: Graph,
        passes: Sequence[Pass],
        x: torch.Tensor | Stream,
        progress: Callable[[int, int], Any] | None,
        record: Record | None,
    ) -> None:
        self.record = record
        self.graph, self.passes, self.x, self.progress = graph, passes, x, progress
        self.device = x.device
        self.stream = x if isinstance(x, Stream) else None
        self.shrunk: list[str] = []
        self.held: dict[Value, Any] = {} if self.stream else {graph.input: _settled(x)}
        for node in graph.nodes:
            self.held.update((v, v.constant) for v in node.inputs if v.constant is not None)
        self.held.update((v, v.constant) for v in graph.outputs if v.constant is not None)
        self.done, self.total = 0, sum(len(p.steps) for p in passes)
        self.every = max(1, self.total // 100)
        self.lowered: tuple[int, int] | None = None  # band and least rows after memory ran out

    def outputs(self) -> list[torch.Tensor]:
        for number, p in enumerate(self.passes, start=1):
            for node in p.segment.before:
                self._plain(node)
            self._pass(p, number)
            for v in p.segment.last_use:
                self.held.pop(v, None)
            if number < len(self.passes) and self.device.type == "cpu":
                give_back()
        if self.stream:
            return []
        # A network that hands its input on gives a tensor of its own, as a caller expects of a run.
        return [self.x.clone() if v is self.graph.input else self.held[v] for v in self.graph.outputs]

    def _plain(self, node: Node) -> None:
        failure = None
        try:
            given = [self.held[v] for v in node.inputs]
            self.held[node.output] = pytree.tree_map(lambda t: _of_its_own(t, given), node.run(given))
        except torch.OutOfMemoryError as error:
            failure = str(error)
        if failure is not None:
            raise MemoryBudgetError(f"Memory ran out in {node.label}, which sees whole maps, not bands: {failure}")

    def _pass(self, p: Pass, number: int) -> None:
        if self.lowered is not None and p.band > self.lowered[0]:
            p = self._instead(schedule(p.segment, *self.lowered), number)
            overlay(p)
        states = {node: node.operator.begin() for node in p.segment.summaries}
        done: dict[Node, int] = {}
        saved: dict[Value, torch.Tensor] = {}
        while True:
            attempt, failure = _Attempt(p, self, states, saved), None
            try:
                attempt.run(done)
                break
            except torch.OutOfMemoryError as error:
                failure = str(error)  # the error itself holds every frame, and with them the memory that is short
            finally:
                if failure is None:
                    attempt.free()
            if (p.band, p.least) == (1, 1):
                attempt.free()
                states.clear()
                raise MemoryBudgetError(
                    f"Memory ran out in bands of one row, the lowest there are (segment {number}): {failure}"
                )
            self.lowered = (max(1, p.band // 2), max(1, p.least // 2))
            rest = schedule(p.segment, *self.lowered, done)
            overlay_rest(rest, p)
            saved = attempt.save(rest)
            attempt.free()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._say(number, p, rest, failure)
            p = self._instead(rest, number)
        for node, state in states.items():
            self.held[node.output] = node.operator.finish(state)

    def _instead(self, p: Pass, number: int) -> Pass:
        self.total = self.done + len(p.steps) + sum(len(later.steps) for later in self.passes[number:])
        return p

    def _say(self, number: int, p: Pass, rest: Pass, failure: str) -> None:
        text = f"memory ran out in segment {number}: bands of {rest.band} rows instead of {p.band} from there on"
        if not self.shrunk:
            _log.warning("%s (%s)", text, failure)
        self.shrunk.append(text)

    def step_done(self) -> None:
        self.done += 1
        if self.progress is not None and (self.done % self.every == 0 or self.done == self.total):
            self.progress(self.done, self.total)


class _Attempt:
    """A pass, or the rest of one, until it ends or memory runs out."""

    def __init__(self, p: Pass, main: _Run, states: dict[Node, Any], saved: dict[Value, torch.Tensor]) -> None:
        """``saved``: the rows `Pass.kept`, where the pass is the rest of one."""
        self.p, self.main, self.states, self.saved = p, main, states, saved
        self.stores: list[Rows] = []
        self.steady: Steady | None = None

    def run(self, done: dict[Node, int]) -> None:
        """All steps; ``done``: what is already made of each node, kept up to date."""
        self._allocate()
        held, states, stores = self.main.held, self.states, self.stores
        fixed: dict[Node, list[Any]] = {}
        for node in (*self.p.segment.nodes, *self.p.segment.summaries):
            whole = node.whole_inputs if isinstance(node, RowLocal) else ()
            fixed[node] = [held.get(v) if v.row_axis is None or i in whole else None for i, v in enumerate(node.inputs)]

        def run(step: Step) -> None:
            node = step.node
            rows, stable = fixed[node].copy(), True
            for i, k, a, b in step.reads:
                rows[i] = stores[k].read(a, b) if b > a else None
                stable = stable and stores[k].stable
            if step.store < 0:
                states[node] = node.operator.summarise(rows, step.r0, step.r1, states[node])
            else:
                stores[step.store].take(node, step.r0, step.r1, rows, step.keep, stable)
            for k in step.drops:
                stores[k].drop()

        if self.main.record is None:
            for step in self.p.steps:
                run(step)
                done[step.node] = step.r1
                self.main.step_done()
            return
        self.steady = Steady(self.p, stores, run, self.main.record, self.main.device)
        for steps in bands(self.p):
            for step in self.steady.run(steps):
                done[step.node] = step.r1
                self.main.step_done()

    def _allocate(self) -> None:
        p, held, device, outputs = self.p, self.main.held, self.main.device, self.main.graph.outputs
        stream = self.main.stream
        over = {store.value: store.over for store in p.stores}
        for v in p.segment.whole:
            if v in held or (stream and v in outputs):
                continue
            # An output goes to the caller, who expects a contiguous tensor.
            plain, old = v in outputs, over.get(v)
            memory = None if old is None else _bytes(held[old])
            held[v] = torch.empty(v.shape, dtype=v.dtype, device=device) if plain else layout(v, v.rows, device, memory)
        # One block for all line buffers: freed bands between many small ones would leave holes in the heap.
        block, at = torch.empty(p.line_bytes, dtype=torch.uint8, device=device), 0
        for store in p.stores:
            if stream and store.value is self.main.graph.input:
                self.stores.append(Pulled(store, window(p, store.value), stream))
                continue
            if stream and store.value in outputs:
                self.stores.append(Pushed(store, stream))
                continue
            memory = held.get(store.value)
            if store.kind in ("line", "ring"):
                memory = layout(store.value, store.capacity, device, block[at : at + store.bytes])
                at += store.reserved
            self.stores.append(rows_of(store, memory, device))
            if store.value in self.saved:
                self.stores[-1].put(*p.kept[store.value], self.saved[store.value])
        self.saved.clear()

    def save(self, rest: Pass) -> dict[Value, torch.Tensor]:
        """The rows that ``rest`` needs, on the host."""
        if len(self.stores) < len(self.p.stores):
            return dict(self.saved)  # memory ran out before they were taken over
        places = {store.value: rows for store, rows in zip(self.p.stores, self.stores, strict=True)}
        for value in places.keys() - rest.kept.keys():
            places[value].drop()
        saved = {}
        for value, (a, b) in rest.kept.items():
            saved[value] = layout(value, b - a, torch.device("cpu"))
            split(saved[value], value.row_axis, places[value].parts(a, b), into=False)
        return saved

    def free(self) -> None:
        self.stores.clear()
        self.steady = None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _of_its_own(made: Any, given: list[Any]) -> Any:
    """What an operator made, copied where it is a view: the memory of what it was given may be written over."""
    if not isinstance(made, torch.Tensor):
        return made
    memory = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
    return made.clone() if made.untyped_storage().data_ptr() in memory else made


def _settled(x: torch.Tensor) -> torch.Tensor:
    """A map of one channel has its channels last as well as first, and is taken so."""
    same = as_channels_last(x)
    return x if same is None else same
