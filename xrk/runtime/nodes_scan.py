"""SS2D in bands of rows: four selective scans of the whole image, exact, from two sweeps over its rows.

A stretch of pixels takes the state h that enters it to exp(A s) h + e: s is the sum of its steps dt, e the state that
it leaves behind of a start from zero. Stretches join without loss, so the first sweep needs the pixels of a band once
and keeps of each *block* of rows what it does to the states that pass through:

    direction                  the first sweep keeps                      the second is given
    0  rows, downwards         nothing                                    h, handed from block to block
    1  columns, downwards      s, e of every column, W D (N + 1) values   h of every column, handed from block to block
    2  rows, from the end      s, e of every block, D (N + 1) values      h at the lower edge of every block
    3  columns, upwards        both of every block, W D (N + 1) values    h of every column at every block's lower edge

Between the sweeps the states are carried over blocks, and from the end of each column into the start of the next, as
the flattened scans have it. A recurrence is never run backwards from its result.

Scans along an order of their own (`xrk.models.ss2d`) may go on at any pixel, so they run on whole maps or not at all.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from xrk.kernels import carry_lines, scan_lines, selective_scan_2d, summarise_lines
from xrk.kernels.arguments import compute_dtype
from xrk.runtime.capture import Call, explain, register
from xrk.runtime.graph import Apply, RowGlobal, RowLocal, Summarise, Value
from xrk.runtime.rows import Rowwise, Window, channels_last, is_map

__all__ = ["DepthwiseConvolution", "SelectiveScan2d"]

# On a CPU rows are scanned as one line; so many pixels' projections are held at a time.
PIXELS = 1 << 14
# Maps with as many values as the scan's that a segment keeps for all rows of a block: input, result, what is gated.
MAPS = 2.5
# What is counted as products for one state of one pixel: an exponential as eight, and the products around it.
UPDATE, SUMMARY_UPDATE = 12, 11


@dataclass
class _Stretches:
    """What stretches of pixels do to states: h -> exp(A sums) h + ends; sums (L, D), ends (L, D, N), A (D, N)."""

    A: torch.Tensor
    sums: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def empty(cls, A: torch.Tensor, lines: int) -> "_Stretches":
        return cls(A, A.new_zeros(lines, A.shape[0]), A.new_zeros(lines, *A.shape))

    def decays(self, sums: torch.Tensor) -> torch.Tensor:
        return (sums[..., None] * self.A).exp_()

    def go_on(self, sums: torch.Tensor, ends: torch.Tensor) -> None:
        """Longer by stretches that a state meets afterwards."""
        self.ends.mul_(self.decays(sums)).add_(ends)
        self.sums += sums

    def begin_before(self, sums: torch.Tensor, ends: torch.Tensor) -> None:
        """Longer by stretches that a state meets before."""
        self.ends.addcmul_(self.decays(self.sums), ends)
        self.sums += sums

    def pass_through(self, states: torch.Tensor) -> torch.Tensor:
        """The states behind the stretches, from those before."""
        return self.decays(self.sums).mul_(states).add_(self.ends)


@dataclass
class _State:
    """Both sweeps' state; a list has an entry for each block.

    Attributes:
        down: every column, from the top to the rows seen so far.
        rows_up, columns_up: what each block does to what comes from below; with `finish` their ends become the states
            at the block's lower edge.
        forgotten: (direction, block) whose entering states no longer matter at its upper edge.
        seen: rows that each direction has summarised; they differ where memory ran out in between.
        top: the states at the top of the columns.
        row, columns: the states that the second sweep hands down.
    """

    down: _Stretches
    rows_up: list[_Stretches]
    columns_up: list[_Stretches]
    forgotten: set[tuple[int, int]] = field(default_factory=set)
    seen: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    top: torch.Tensor | None = None
    row: torch.Tensor | None = None
    columns: torch.Tensor | None = None


class SelectiveScan2d(RowGlobal):
    """`xrk.kernels.selective_scan_2d` in bands of rows; see the module for what is kept between the two sweeps.

    The first sweep repeats the projections and the recurrences of three of the four directions, without their outputs.
    `apply` takes whole blocks, for a block's states from below are known at its lower edge alone.

    Args:
        x: (1, H, W, D), rows along axis 1.
        weights: as `selective_scan_2d` takes them after x.
        block: rows of a block; by default as many as take the least memory, states and maps together, and no fewer
            than make half of `PIXELS`.
    """

    label = "xrk::selective_scan_2d"

    def __init__(self, x: Value, weights: tuple[torch.Tensor, ...], block: int | None = None) -> None:
        self.weights = weights
        self.logs, self.skips = weights[3], weights[4]
        _, self.height, self.width, self.channels = x.shape
        self.states = self.logs.shape[1]
        self.itemsize = x.dtype.itemsize
        self.dtype = compute_dtype(x.dtype)
        self.A = [-torch.exp(a.to(self.dtype)) for a in self.logs.reshape(4, self.channels, self.states)]
        # What has decayed below this is less than the rounding of what is left: the kernels leave it out as well.
        self._negligible = 45.0 if self.dtype == torch.float64 else 25.0
        self.at_once_scratch = self._projections()
        # A call of fewer pixels costs more than they do.
        least = max(round((self.height * (self.states + 1) / MAPS) ** 0.5), PIXELS // (2 * self.width))
        rows = least if block is None else block
        self.apply_rows = max(1, min(rows, self.height))
        self.blocks = -(-self.height // self.apply_rows)

    def at_once(self, given: list[torch.Tensor]) -> torch.Tensor:
        return selective_scan_2d(given[0], *self.weights)

    # --- the first sweep ---

    def begin(self) -> _State:
        width, blocks = self.width, range(self.blocks)
        return _State(
            _Stretches.empty(self.A[1], width),
            [_Stretches.empty(self.A[2], 1) for _ in blocks],
            [_Stretches.empty(self.A[3], width) for _ in blocks],
        )

    def summarise(self, rows: list[torch.Tensor], r0: int, r1: int, state: _State) -> _State:
        x, height = rows[0], self.apply_rows
        for block in range(r0 // height, -(-r1 // height)):
            last = min(r1, (block + 1) * height)
            for direction, add in ((1, self._add_columns), (3, self._add_columns), (2, self._add_rows)):
                first = max(r0, state.seen[direction])
                if first < last and (direction, block) not in state.forgotten:
                    add(x[:, first - r0 : last - r0], direction, block, state)
                state.seen[direction] = max(last, state.seen[direction])
        return state

    def _add_columns(self, x: torch.Tensor, direction: int, block: int, state: _State) -> None:
        sums, ends = summarise_lines(x, *self.weights[:4], direction)
        if direction == 1:
            state.down.go_on(sums[0], ends[0])
        else:
            state.columns_up[block].begin_before(sums[0], ends[0])
            self._forget(direction, block, state.columns_up[block], state)

    def _add_rows(self, x: torch.Tensor, direction: int, block: int, state: _State) -> None:
        # From the top: the scan comes from below, and what it brings is forgotten the sooner the higher it has climbed.
        for piece, rows in self._pieces(x):
            sums, ends = summarise_lines(piece, *self.weights[:4], direction)
            if piece.shape[1] > 1:
                _, ends = carry_lines(sums, ends, self.logs, direction)
                sums, ends = sums.sum(1, keepdim=True), ends[:, None]
            state.rows_up[block].begin_before(sums[0], ends[0])
            state.seen[direction] += rows
            self._forget(direction, block, state.rows_up[block], state)
            if (direction, block) in state.forgotten:
                return

    def _forget(self, direction: int, block: int, stretches: _Stretches, state: _State) -> None:
        if stretches.sums.device.type != "cpu":
            return  # to ask would wait for the device
        slowest = stretches.A.amax(1)
        # A sum that is no number compares false, so nothing is left out.
        if (stretches.sums * slowest).amax() < -self._negligible:
            state.forgotten.add((direction, block))

    def _pieces(self, x: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        """Bands (1, lines, pixels, D) whose rows are scanned together, and how many rows of the image each has.

        A CPU takes rows as one line: nothing has to be found out twice. A GPU needs many lines at once.
        """
        _, height, width, channels = x.shape
        if x.device.type != "cpu":
            return [(x, height)]
        step = max(1, PIXELS // width)
        parts = [x[:, r : r + step] for r in range(0, height, step)]
        return [(part.reshape(1, 1, -1, channels), part.shape[1]) for part in parts]

    # --- between the sweeps ---

    def finish(self, state: _State) -> _State:
        state.top = self._along_columns(state.down, 1)
        for direction, blocks in ((2, state.rows_up), (3, state.columns_up)):
            states = blocks[0].ends.new_zeros(())
            if direction == 3:
                whole = _Stretches.empty(self.A[3], self.width)
                for block in reversed(blocks):
                    whole.go_on(block.sums, block.ends)
                states = self._along_columns(whole, 3)
            for block in reversed(blocks):
                above = block.pass_through(states)
                block.ends.copy_(states)
                states = above
        return state

    def _along_columns(self, columns: _Stretches, direction: int) -> torch.Tensor:
        """The state at the start of every column, in the direction's order."""
        starts, _ = carry_lines(columns.sums[None], columns.ends[None], self.logs, direction)
        return starts[0]

    # --- the second sweep ---

    def apply(self, rows: list[torch.Tensor], r0: int, r1: int, state: _State) -> torch.Tensor:
        x, height = rows[0], self.apply_rows
        row, columns = state.row, state.columns
        if r0 == 0:
            row, columns = self.A[0].new_zeros(1, *self.A[0].shape), state.top
        out = torch.zeros(x.shape, dtype=self.dtype, device=x.device)
        for block in range(r0 // height, -(-r1 // height)):
            first, last = block * height - r0, min(r1, (block + 1) * height) - r0
            part, y = x[:, first:last], out[:, first:last]
            # Added up in the order of the public implementation: rows in both senses, then columns.
            row = self._scan_rows(part, 0, row, y)
            self._scan_rows(part, 2, state.rows_up[block].ends, y)
            columns = self._scan(part, 1, columns[None], y)[0]
            self._scan(part, 3, state.columns_up[block].ends[None], y)
        out = out.to(x.dtype)
        state.row, state.columns = row, columns  # at last: where memory runs out before, this is called again
        return out

    def _scan(self, x: torch.Tensor, direction: int, starts: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return scan_lines(x, *self.weights, direction, starts, y)

    def _scan_rows(self, x: torch.Tensor, direction: int, state: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Adds a direction of rows to y; the state (1, D, N) that enters becomes the one that leaves."""
        pieces = list(zip(self._pieces(x), self._pieces(y), strict=True))
        for (piece, _), (out, _) in pieces if direction == 0 else reversed(pieces):
            if piece.shape[1] == 1:
                state = self._scan(piece, direction, state[:, None], out)[:, 0]
                continue
            summaries = summarise_lines(piece, *self.weights[:4], direction)
            starts, state = carry_lines(*summaries, self.logs, direction, state)
            self._scan(piece, direction, starts, out)
        return state

    # --- what it costs ---

    @property
    def state_bytes(self) -> int:
        columns, n = self.width * self.channels * self.dtype.itemsize, self.states
        kept = (self.blocks + 1) * columns * (n + 1)
        # `finish` has a second summary of all columns, and three sets of states at once.
        return kept + columns * (n + 1) + 3 * columns * n + self.blocks * self.channels * (n + 1) * 8

    def _projections(self) -> int:
        values = self.weights[1].shape[2] + 2 * self.states
        return max(PIXELS, self.width, self.apply_rows) * -(-values // 8) * 8 * self.dtype.itemsize

    def summarise_scratch(self, rows: int) -> int:
        # A band's summaries, and the decays that they are joined with.
        return self._projections() + self.width * self.channels * (2 * self.states + 1) * self.dtype.itemsize

    def apply_scratch(self, rows: int) -> int:
        sums = rows * self.width * self.channels * self.dtype.itemsize if self.itemsize < self.dtype.itemsize else 0
        return self._projections() + sums + 2 * self.width * self.channels * self.states * self.dtype.itemsize

    @property
    def _projection_work(self) -> int:
        """Products of one direction's projections for a row."""
        rank = self.weights[1].shape[2]
        return self.width * self.channels * (2 * rank + 2 * self.states)

    @property
    def apply_work(self) -> int:
        return 4 * (self._projection_work + self.width * self.channels * (self.states * UPDATE + 1))

    @property
    def summarise_work(self) -> int:
        return 3 * (self._projection_work + self.width * self.channels * self.states * SUMMARY_UPDATE)


@register("xrk::selective_scan_2d")
def _selective_scan_2d(call: Call) -> Any:
    x = call["x"]
    weights = tuple(a for name, a in call.arguments.items() if name != "x")
    if len(x.shape) != 4 or x.shape[0] != 1 or x.row_axis != 1 or any(isinstance(w, Value) for w in weights):
        return None
    summary = Summarise(SelectiveScan2d(x, weights), [x])
    call.add(summary)
    return call.add(Apply(summary, x.alike()))


explain("xrk::selective_scan", "an SS2D with an order of its own may go on at any pixel of the image")


class DepthwiseConvolution(RowLocal):
    """`xrk.kernels.depthwise_conv2d`, its activation inside."""

    label = "xrk::depthwise_conv2d"

    def __init__(self, call: Call) -> None:
        x, self._run = call["x"], call.runner()
        self.kernel = call["weight"].shape[-1]
        self.border = (self.kernel - 1) // 2 * call["dilation"]
        self.window = Window(1, self.border, 2 * self.border + 1)
        self._make([x], x.alike())

    def need(self, i: int, r0: int, r1: int) -> tuple[int, int]:
        return self.window.of(r0, r1)

    def compute(self, r0: int, r1: int, rows: list[Any], out: torch.Tensor | None) -> torch.Tensor:
        # The kernel's own zeros lie beyond rows that are not wanted.
        y = self._run([channels_last(rows[0])])
        return y[:, :, self.border : self.border + r1 - r0]

    @property
    def work(self) -> int:
        _, channels, _, width = self.output.shape
        return channels * width * self.kernel**2

    def scratch(self, r0: int, r1: int) -> int:
        return self.output.bytes_of(2 * self.border)


@register("xrk::depthwise_conv2d")
def _depthwise_conv2d(call: Call) -> Any:
    if not is_map(call["x"]) or isinstance(call["weight"], Value) or isinstance(call["bias"], Value):
        return None
    return call.add(DepthwiseConvolution(call))


@register("xrk::layer_norm")
def _layer_norm(call: Call) -> Any:
    """Over the channels of each pixel; where it is gated, both maps have the same rows."""
    x, gate = call["x"], call["gate"]
    if isinstance(call["weight"], Value) or isinstance(call["bias"], Value):
        return None
    for v in call.values:
        if v.row_axis != x.row_axis or v.row_axis == len(v.shape) - 1:
            return None
    if gate is not None and not isinstance(gate, Value):
        return None
    return call.add(Rowwise(call.name, call.runner(), call.values, x.alike()))
