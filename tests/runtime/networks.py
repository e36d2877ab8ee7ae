"""Random networks for the runtime's tests, and the check that a plan is exact on them.

`cases()` draws a `Case`: a network as a list of steps, an image's size, and band heights. Its repr makes it again.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import assume
from hypothesis import strategies as st
from network_steps import ACTIVATIONS, StackStep, Step
from torch import Tensor, nn

LARGEST_SIDE = 72
MOST_CHANNELS = 12
FLOAT32 = 2.0**-24


class Network(nn.Module):
    """Steps one after the other, with random weights and statistics from ``seed``; in eval mode."""

    def __init__(self, steps: list[Step], seed: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(step.module() for step in steps)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            _randomise(module, generator)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        saved: list[Tensor] = []
        for step in self.steps:
            x = step(x, saved) if isinstance(step, StackStep) else step(x)
        return x


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            if name == "running_var":
                tensor.copy_(0.3 + values.abs())
            elif name == "weight" and tensor.ndim > 1:
                fan_in = tensor[0].numel() if not isinstance(module, nn.ConvTranspose2d) else tensor.shape[0] * 4
                tensor.copy_(values * (1.5 / fan_in**0.5))
            elif name in ("weight", "scale"):
                tensor.copy_(1 + 0.3 * values)
            else:
                tensor.copy_(0.3 * values)


@dataclass(frozen=True)
class Case:
    """One network on one image.

    Attributes:
        steps: the network.
        channels: of the image.
        size: the image's (H, W).
        bands: heights of the output's bands to run with, in rows.
        offset: added to the image, which is normal noise of variance 1.
        seed: of the weights and of the image.
    """

    steps: list[Step]
    channels: int
    size: tuple[int, int]
    bands: tuple[int, ...]
    offset: float
    seed: int

    def network(self) -> Network:
        return Network(self.steps, self.seed)

    def image(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn((1, self.channels, *self.size), generator=generator) + self.offset


class _Drawing:
    """The steps so far, and the shapes that they lead to."""

    def __init__(self, draw, channels: int, size: tuple[int, int]) -> None:
        self.draw = draw
        self.steps: list[Step] = []
        self.map = torch.zeros(1, channels, *size)
        self.saved: list[Tensor] = []

    @property
    def channels(self) -> int:
        return self.map.shape[1]

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def add(self, kind: str, **options) -> None:
        """Appends a step, unless the map is too small for it or would become too large."""
        step = Step(kind, **options)
        saved = list(self.saved)
        try:
            module = step.module().eval().requires_grad_(False)
            y = module(self.map, saved) if isinstance(module, StackStep) else module(self.map)
        except (RuntimeError, ValueError):
            return
        if y.numel() == 0 or max(y.shape[-2:]) > LARGEST_SIDE or y.shape[1] > MOST_CHANNELS:
            return
        self.steps.append(step)
        self.map, self.saved = y.detach(), saved


def _convolution(d: _Drawing) -> None:
    groups = d.pick(1, 1, 1, 2, d.channels)
    if d.channels % groups:
        groups = 1
    outputs = groups * d.number(1, max(1, min(MOST_CHANNELS, 8) // groups))
    kernel = (d.number(1, 4), d.number(1, 4)) if d.number(0, 3) == 0 else (d.pick(1, 3, 3, 3, 5, 7),) * 2
    dilation = d.pick(1, 1, 1, 2, 3, (2, 1), (1, 2))
    stride = d.pick(1, 1, 1, 2, 2, 3, (2, 1), (1, 2), 4)
    mode = d.pick("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
    across = tuple(d.pick(k // 2, k // 2, k // 2, k - 1, 0) for k in kernel)
    padding = d.pick(across, across, across, "same") if stride == 1 else across
    if mode == "circular":
        padding = (0, kernel[1] // 2)  # around the cylinder only: circular rows need the whole image
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    d.add("convolution", inputs=d.channels, outputs=outputs, kernel=kernel, **options, bias=d.pick(False, True))


def _pad_and_convolve(d: _Drawing) -> None:
    pad = (d.number(0, 2), d.number(0, 2), d.number(0, 2), d.number(0, 2))
    options = {"pad": pad, "mode": d.pick("constant", "reflect", "replicate")}
    d.add("pad and convolve", inputs=d.channels, outputs=d.number(1, 8), kernel=d.pick(1, 2, 3), **options)


def _transposed(d: _Drawing) -> None:
    kernel, stride = d.pick((2, 2), (2, 2), (4, 2), (3, 2), (3, 1), (5, 3), (1, 2), ((3, 2), (2, 1)))
    groups = d.pick(1, 1, 2)
    if d.channels % groups:
        groups = 1
    largest = min(kernel) if isinstance(kernel, tuple) else kernel
    extra = d.number(0, 1) if stride in (2, 3) else 0
    options = {"stride": stride, "padding": d.number(0, largest - 1), "output_padding": extra, "groups": groups}
    options |= {"dilation": d.pick(1, 1, 1, 2), "bias": d.pick(False, True)}
    d.add("transposed convolution", inputs=d.channels, outputs=groups * d.number(1, 4), kernel=kernel, **options)


def _max_pool(d: _Drawing) -> None:
    kernel = d.pick(2, 2, 3, (2, 1), (1, 3), 5)
    smallest = min(kernel) if isinstance(kernel, tuple) else kernel
    options = {"stride": d.pick(1, 2, 2, 3), "padding": d.number(0, smallest // 2), "dilation": d.pick(1, 1, 1, 2)}
    d.add("max pool", kernel_size=kernel, **options, ceil_mode=d.pick(False, True))


def _average_pool(d: _Drawing) -> None:
    kernel = d.pick(2, 2, 3, (2, 1), (1, 3), 4)
    smallest = min(kernel) if isinstance(kernel, tuple) else kernel
    options = {"stride": d.pick(1, 2, 2, 3), "padding": d.number(0, smallest // 2), "ceil_mode": d.pick(False, True)}
    options["count_include_pad"] = d.pick(True, False)
    d.add("average pool", kernel_size=kernel, **options, divisor_override=d.pick(None, None, 5))


def _resize(d: _Drawing) -> None:
    mode = d.pick("nearest", "nearest", "nearest-exact", "bilinear", "bilinear", "bicubic")
    options = {} if mode.startswith("nearest") else {"align_corners": d.pick(False, True)}
    factor = d.pick(2.0, 2.0, 2.0, 3.0, 1.5, 0.5, 0.75, (2.0, 1.0), (1.0, 2.0), (0.4, 1.3))
    if d.number(0, 3) == 0:
        options["recompute_scale_factor"] = True
    d.add("resize", scale_factor=factor, mode=mode, **options)


def _pixel_shuffle(d: _Drawing) -> None:
    if d.channels % 4:
        d.add("convolution", inputs=d.channels, outputs=4 * d.number(1, 2), kernel=1)
    d.add("pixel shuffle", upscale_factor=2)


def _pixel_unshuffle(d: _Drawing) -> None:
    if d.channels > 3:
        d.add("convolution", inputs=d.channels, outputs=d.number(1, 3), kernel=1)
    height, width = d.map.shape[-2:]
    if height > 1 and width > 1 and (height % 2 or width % 2):
        d.add("crop", top=0, bottom=height % 2, left=0, right=width % 2)
    d.add("pixel unshuffle", downscale_factor=2)


def _batch_norm(d: _Drawing) -> None:
    d.add("batch norm", num_features=d.channels, affine=d.pick(True, True, False))


def _layer_norm(d: _Drawing) -> None:
    d.add("layer norm", channels=d.channels, form=d.pick("permuted", "by hand"))


def _activation(d: _Drawing) -> None:
    if d.number(0, 7) == 0:
        d.add("prelu", num_parameters=d.pick(1, d.channels))
    else:
        d.add("activation", name=d.pick(*ACTIVATIONS))


def _broadcast(d: _Drawing) -> None:
    operation = d.pick("add", "subtract from", "multiply", "divide", "maximum")
    d.add("broadcast", shape=d.pick((d.channels, 1, 1), (1,), (1, d.channels, 1, 1)), operation=operation)


def _pad(d: _Drawing) -> None:
    mode = d.pick("constant", "reflect", "replicate", "circular")
    left, right, top, bottom = (d.number(-1 if mode == "constant" else 0, 3) for _ in range(4))
    if mode == "circular":
        top = bottom = 0
    options = {"value": d.pick(0.0, -1.5)} if mode == "constant" else {}
    d.add("pad", pad=(left, right, top, bottom), mode=mode, **options)


def _crop(d: _Drawing) -> None:
    if d.number(0, 2) == 0:
        d.add("every other", rows=d.pick(1, 2, 3), columns=d.pick(1, 2))
    else:
        d.add("crop", top=d.number(0, 3), bottom=d.number(0, 3), left=d.number(0, 2), right=d.number(0, 2))


def _channels(d: _Drawing) -> None:
    if d.channels % 2 == 0 and d.pick(True, False):
        d.add("halves")
    elif d.channels > 1:
        first = d.number(0, d.channels - 1)
        d.add("channels", first=first, last=d.number(first + 1, d.channels))


def _move(d: _Drawing) -> None:
    which = d.pick("shift", "shift", "flip", "roll")
    if which == "shift":
        d.add("shift", rows=d.number(-4, 4), columns=d.number(-2, 2))
    elif which == "flip":
        d.add("flip along the width")
    else:
        d.add("roll along the width", columns=d.number(-3, 3))


def _spatial_gate(d: _Drawing) -> None:
    d.add("spatial gate", kernel=d.pick(3, 7))


def _save(d: _Drawing) -> None:
    if len(d.saved) < 4:
        d.add("save")


def _swap(d: _Drawing) -> None:
    if d.saved:
        d.add("swap")


def _join(d: _Drawing) -> None:
    if not d.saved:
        d.add("save")
        return
    operation = d.pick("cat", "cat", "add", "add", "gate", "maximum")
    channels = d.saved[-1].shape[1]
    if operation != "cat" and channels != d.channels and 1 not in (channels, d.channels):
        d.add("convolution", inputs=d.channels, outputs=channels, kernel=1)
    d.add("join", operation=operation, fit=d.pick("crop", "pad", "nearest", "bilinear"))


def _group_norm(d: _Drawing) -> None:
    groups = d.pick(1, 2, d.channels)
    groups = groups if d.channels % groups == 0 else 1
    d.add("group norm", num_groups=groups, num_channels=d.channels, eps=1e-3, affine=d.pick(True, True, False))


def _instance_norm(d: _Drawing) -> None:
    options = {"affine": d.pick(True, False), "track_running_stats": d.pick(False, False, True)}
    d.add("instance norm", num_features=d.channels, eps=1e-3, **options)


def _squeeze_excite(d: _Drawing) -> None:
    d.add("squeeze excite", channels=d.channels, form=d.pick("linear", "pool", "mean and maximum"))


def _pooled_context(d: _Drawing) -> None:
    d.add("pooled context", channels=d.channels, outputs=d.number(1, 3))


def _global_max(d: _Drawing) -> None:
    d.add("global max")


def _turn(d: _Drawing) -> None:
    which = d.pick("flip", "rotate", "transpose")
    if which == "flip":
        d.add("flip along the height")
    elif which == "rotate":
        d.add("rotate", quarters=d.number(1, 3))
    else:
        d.add("transpose")


_LOCAL = (
    *(_convolution,) * 6,
    *(_activation,) * 3,
    *(_save, _join) * 2,
    *(_resize, _max_pool, _average_pool, _transposed, _batch_norm) * 2,
    *(_pad_and_convolve, _pixel_shuffle, _pixel_unshuffle, _layer_norm, _broadcast, _pad, _crop, _channels, _move),
    *(_spatial_gate, _swap),
)
_GLOBAL = (_group_norm, _instance_norm, _squeeze_excite, _pooled_context, _global_max, _turn)

_side = st.one_of(st.integers(1, 6), st.integers(4, 26), st.integers(16, 40))


@st.composite
def cases(draw, row_global: bool = False, most_steps: int = 10, bands: int = 3) -> Case:
    """Networks of row-local steps, or with ``row_global`` a quarter of others; ``bands`` heights of bands for each."""
    channels = draw(st.sampled_from((1, 1, 2, 3, 4)))
    size = (draw(_side), draw(_side))
    d = _Drawing(draw, channels, size)
    for _ in range(draw(st.integers(1, most_steps))):
        kinds = _GLOBAL if row_global and d.number(0, 3) == 0 else _LOCAL
        draw(st.sampled_from(kinds))(d)
    while d.saved and draw(st.booleans()):
        _join(d)
    assume(d.steps)
    height = d.map.shape[2]
    heights = st.one_of(st.just(1), st.integers(1, 6), st.integers(1, height + 2))
    chosen = tuple(draw(heights) for _ in range(bands))
    return Case(d.steps, channels, size, chosen, draw(st.sampled_from((0.0, 0.0, 4.0))), draw(st.integers(0, 2**16)))


class Exactness:
    """What a plan's output may be: the float64 module's, but for rounding.

    Attributes:
        expected: the float64 module's output.
        allowed: the largest difference: 1e-5 of the largest output, or twice the float32 module's own difference.
    """

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        with torch.inference_mode():
            self._double = copy.deepcopy(module).double()
            self._x = x
            self.whole = module(x.clone())
            self.expected = self._double(x.double())
        self.scale = self.expected.abs().max().item()
        self.allowed = max(1e-5 * self.scale, 2 * self.distance(self.whole))

    def distance(self, y: Tensor) -> float:
        return (y.double() - self.expected).abs().max().item()

    def is_ill_conditioned(self, seed: int = 0) -> bool:
        """Whether rounding each step's map to float32 in another way may alone cost what is allowed.

        A norm over a map that is all but constant makes rounding errors as large as its output; nothing then can be
        said about a plan. Steps are those of a `Network`.
        """
        generator = torch.Generator().manual_seed(seed)

        def rounded(step: nn.Module, _inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            return y * (1 + 2 * FLOAT32 * torch.randn(y.shape, generator=generator, dtype=y.dtype))

        handles = [step.register_forward_hook(rounded) for step in self._double.steps]
        with torch.inference_mode():
            worst = max(self.distance(self._double(self._x.double())) for _ in range(2))
        for handle in handles:
            handle.remove()
        return not worst * 2 < self.allowed


def check(case: Case, plan: Callable[[nn.Module, tuple[int, int], int], Callable[[Tensor], Tensor]]) -> int:
    """Asserts that every plan of a case is exact and gives the same bits twice; returns how many plans were run.

    None is run where the output says nothing: not finite, or as large as the rounding errors that a norm enlarges.

    Args:
        plan: from a module, the shape (1, C, H, W) and a band height to what runs on the image.
    """
    module, x = case.network(), case.image()
    exact = Exactness(module, x)
    if not exact.scale < 1e6 or exact.is_ill_conditioned(case.seed):
        return 0
    for band in case.bands:
        run = plan(module, tuple(x.shape), band)
        given = x.clone()
        y = run(given)
        assert torch.equal(given, x), f"bands of {band} rows: the input was changed"
        assert y.shape == exact.whole.shape, f"bands of {band} rows: {tuple(y.shape)}, not {tuple(exact.whole.shape)}"
        assert y.dtype == exact.whole.dtype
        distance = exact.distance(y)
        assert distance <= exact.allowed, (
            f"bands of {band} rows: {distance:.3g} from the float64 module at {_worst(y, exact.expected)}, "
            f"{exact.allowed:.3g} allowed"
        )
        assert torch.equal(run(x.clone()), y), f"bands of {band} rows: the second run gives other bits"
    return len(case.bands)


def _worst(y: Tensor, expected: Tensor) -> str:
    index = int((y.double() - expected).abs().argmax())
    h, w = y.shape[-2:]
    return f"channel {index // (h * w)}, row {index // w % h} of {h}, column {index % w} of {w}"
