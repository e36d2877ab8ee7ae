"""The steps that random networks are made of: plain modules, made from a name and its options.

Every step has its channels among its options, takes any height and width that its arithmetic allows, and asks for
no size in advance. A step gets the present map and the stack of saved maps.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Step:
    """A step's name and options; its repr makes it again."""

    def __init__(self, kind: str, **options) -> None:
        self.kind = kind
        self.options = options

    def __repr__(self) -> str:
        return f"Step({', '.join([repr(self.kind), *(f'{name}={value!r}' for name, value in self.options.items())])})"

    def module(self) -> nn.Module:
        return _KINDS[self.kind](**self.options)


class Apply(nn.Module):
    """A function of the map."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _apply(function):
    return lambda **options: Apply(lambda x: function(x, **options))


class PadThenConvolve(nn.Module):
    """A convolution behind `F.pad`, as many restoration networks write it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, pad: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel)
        self.pad, self.mode = pad, mode

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad, self.mode))


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of each pixel, in the two ways that networks write it."""

    def __init__(self, channels: int, form: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "permuted":
            y = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.weight, self.bias, 1e-3)
            return y.permute(0, 3, 1, 2)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        y = (x - mean) / torch.sqrt(variance + 1e-3)
        return self.weight[:, None, None] * y + self.bias[:, None, None]


class Broadcast(nn.Module):
    """The map and a parameter of shape (C, 1, 1) or (1), in an elementwise operation."""

    def __init__(self, shape: tuple[int, ...], operation: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        if self.operation == "add":
            return x + self.scale
        if self.operation == "subtract from":
            return self.scale - x
        if self.operation == "multiply":
            return x * self.scale
        if self.operation == "divide":
            return x / (1 + self.scale.abs())
        return torch.maximum(x, self.scale)


class SpatialGate(nn.Module):
    """A gate from each pixel's mean and maximum over its channels (Woo et al. 2018, section 3.2)."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(seen))


class SqueezeExcite(nn.Module):
    """A gate for each channel from the mean (and the maximum) of the whole map (Hu et al. 2018)."""

    def __init__(self, channels: int, form: str) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.form = form
        linear = form == "linear"
        self.down = nn.Linear(channels, hidden) if linear else nn.Conv2d(channels, hidden, 1)
        self.up = nn.Linear(hidden, channels) if linear else nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "linear":
            gate = self.up(F.relu(self.down(x.mean((2, 3)))))[:, :, None, None]
        elif self.form == "pool":
            gate = self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1))))
        else:
            gate = sum(self.up(F.relu(self.down(p(x, 1)))) for p in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d))
        return x * torch.sigmoid(gate)


class PooledContext(nn.Module):
    """The mean of the whole map, convolved, spread over the map again and appended (Chen et al. 2017, ASPP)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        context = F.relu(self.conv(F.adaptive_avg_pool2d(x, 1)))
        context = F.interpolate(context, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([x, context], dim=1)


class GlobalMax(nn.Module):
    """The map less the largest value of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.amax((2, 3), keepdim=True)


class StackStep(nn.Module):
    """A step that also sees the saved maps."""


class Save(StackStep):
    def forward(self, x: Tensor, saved: list[Tensor]) -> Tensor:
        saved.append(x)
        return x


class Swap(StackStep):
    """Goes on with the map saved last and saves the present one: what follows is another branch."""

    def forward(self, x: Tensor, saved: list[Tensor]) -> Tensor:
        other = saved.pop()
        saved.append(x)
        return other


class Join(StackStep):
    """Joins the map saved last to the present one, which is brought to its size first where the two differ."""

    def __init__(self, operation: str, fit: str) -> None:
        super().__init__()
        self.operation, self.fit = operation, fit

    def forward(self, x: Tensor, saved: list[Tensor]) -> Tensor:
        other = saved.pop()
        if x.shape[-2:] != other.shape[-2:]:
            x, other = self._fitted(x, other)
        if self.operation == "cat":
            return torch.cat([x, other], dim=1)
        if self.operation == "add":
            return x + other
        if self.operation == "gate":
            return x * torch.sigmoid(other)
        return torch.maximum(x, other)

    def _fitted(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        height, width = other.shape[-2:]
        if self.fit == "crop":
            height, width = min(height, x.shape[2]), min(width, x.shape[3])
            return x[:, :, :height, :width], other[:, :, :height, :width]
        if self.fit == "pad":
            down, right = height - x.shape[2], width - x.shape[3]
            return F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2]), other
        options = {} if self.fit.startswith("nearest") else {"align_corners": False}
        return F.interpolate(x, size=(height, width), mode=self.fit, **options), other


ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "hard swish": nn.Hardswish,
    "relu6": nn.ReLU6,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "abs": lambda: Apply(torch.abs),
    "clamp": lambda: Apply(lambda x: x.clamp(-1.5, 1.0)),
    "softmax": lambda: nn.Softmax(dim=1),
}


def _shift(x: Tensor, rows: int, columns: int) -> Tensor:
    """The map moved by whole pixels; zeros come in. A negative padding crops."""
    return F.pad(x, (columns, -columns, rows, -rows))


_KINDS = {
    "convolution": lambda inputs, outputs, kernel, **options: nn.Conv2d(inputs, outputs, kernel, **options),
    "pad and convolve": PadThenConvolve,
    "transposed convolution": lambda inputs, outputs, kernel, **o: nn.ConvTranspose2d(inputs, outputs, kernel, **o),
    "max pool": nn.MaxPool2d,
    "average pool": nn.AvgPool2d,
    "resize": _apply(F.interpolate),
    "pixel shuffle": nn.PixelShuffle,
    "pixel unshuffle": nn.PixelUnshuffle,
    "batch norm": nn.BatchNorm2d,
    "layer norm": ChannelLayerNorm,
    "activation": lambda name: ACTIVATIONS[name](),
    "prelu": nn.PReLU,
    "broadcast": Broadcast,
    "pad": _apply(F.pad),
    "crop": _apply(lambda x, top, bottom, left, right: x[:, :, top : -bottom or None, left : -right or None]),
    "every other": _apply(lambda x, rows, columns: x[:, :, ::rows, ::columns]),
    "channels": _apply(lambda x, first, last: x[:, first:last]),
    "halves": _apply(lambda x: torch.mul(*x.chunk(2, dim=1))),
    "shift": _apply(_shift),
    "flip along the width": _apply(lambda x: x.flip(3)),
    "roll along the width": _apply(lambda x, columns: torch.roll(x, columns, 3)),
    "spatial gate": SpatialGate,
    "save": Save,
    "swap": Swap,
    "join": Join,
    "group norm": nn.GroupNorm,
    "instance norm": nn.InstanceNorm2d,
    "squeeze excite": SqueezeExcite,
    "pooled context": PooledContext,
    "global max": GlobalMax,
    "flip along the height": _apply(lambda x: x.flip(2)),
    "rotate": _apply(lambda x, quarters: torch.rot90(x, quarters, (2, 3))),
    "transpose": _apply(lambda x: x.transpose(2, 3)),
}
