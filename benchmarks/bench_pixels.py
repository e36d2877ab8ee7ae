"""The conversions of uint16 frames: counts to the network's values, and its answer back to counts."""

import numpy as np
import torch
from contest import Contest, normal

from xrk import _native

OP = "pixels"


def _case(size, dtype):
    return [{"H": size, "W": size, "back": back, "dtype": dtype} for back in (0, 1)]


CASES = {
    ("cpu", "tiny"): _case(8, "float32"),
    ("cpu", "quick"): _case(1024, "float32"),
    ("cpu", "full"): _case(4096, "float32"),
    ("cuda", "tiny"): _case(8, "float16"),
    ("cuda", "quick"): _case(4096, "float16"),
    ("cuda", "full"): [*_case(4096, "float16"), *_case(4096, "float32")],
}
BLACK, WHITE = 100.0, 60000.0


def contest(case, device):
    shape = (case["H"], case["W"])
    values = case["H"] * case["W"]
    generator = torch.Generator(device).manual_seed(0)
    frame = torch.randint(0, 65536, shape, generator=generator, device=device).to(torch.uint16)
    before, after = (normal(shape, case, device, seed) for seed in (1, 2))
    size = before.element_size()
    moved = values * (2 + 2 * size + 2) if case["back"] else values * (2 + size)
    run = (_on_cuda if device == "cuda" else _on_cpu)(case["back"], frame, before, after)
    if device == "cuda":
        peers = _torch_peers(case["back"], frame, before, after)
        path = "CUDA C++"
        if not _native.HAVE_CUDA:
            path = "reference (xrk._native was built without CUDA)"
    else:
        peers = {"numpy": _numpy(case["back"], frame.numpy(), before.numpy(), after.numpy())}
        path = f"native ({_native.simd()})"
    return Contest(ops=(), ours=run, peers=peers, bytes=moved, flops=(6 if case["back"] else 2) * values, path=path)


def _on_cpu(back, frame, before, after):
    x = frame.numpy()
    threads = torch.get_num_threads()

    def normalise() -> torch.Tensor:
        out = np.empty(x.shape, np.float32)
        _native.normalise(x, BLACK, 1 / (WHITE - BLACK), out, threads)
        return torch.from_numpy(out)

    def apply_residual() -> torch.Tensor:
        out = np.empty_like(x)
        _native.apply_residual(x, before.numpy(), after.numpy(), WHITE - BLACK, out, threads)
        return torch.from_numpy(out).int()

    return apply_residual if back else normalise


def _on_cuda(back, frame, before, after):
    name = str(before.dtype).removeprefix("torch.")

    def normalise() -> torch.Tensor:
        out = torch.empty_like(before)
        stream = torch.cuda.current_stream().cuda_stream
        addresses = (frame.data_ptr(), BLACK, 1 / (WHITE - BLACK), out.data_ptr())
        _native.cuda.normalise(*addresses, frame.numel(), name, stream)
        return out

    def apply_residual() -> torch.Tensor:
        out = torch.empty_like(frame)
        limited = torch.zeros(1, dtype=torch.int64, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        maps = (frame.data_ptr(), before.data_ptr(), after.data_ptr(), WHITE - BLACK, out.data_ptr())
        _native.cuda.apply_residual(*maps, frame.numel(), name, limited.data_ptr(), stream)
        return out

    return apply_residual if back else normalise


def _numpy(back, x, before, after):
    def normalise() -> torch.Tensor:
        return torch.from_numpy(((x.astype(np.float64) - BLACK) * (1 / (WHITE - BLACK))).astype(np.float32))

    def apply_residual() -> torch.Tensor:
        change = (after.astype(np.float64) - before) * (WHITE - BLACK)
        return torch.from_numpy(np.clip(np.rint(x + change), 0, 65535).astype(np.uint16)).int()

    return apply_residual if back else normalise


def _torch_peers(back, frame, before, after):
    def normalise() -> torch.Tensor:
        return ((frame.double() - BLACK) * (1 / (WHITE - BLACK))).to(before.dtype)

    def apply_residual() -> torch.Tensor:
        change = (after.double() - before.double()) * (WHITE - BLACK)
        return (frame.double() + change).round().clamp(0, 65535).to(torch.uint16)

    run = apply_residual if back else normalise
    return {"torch eager": run, "torch.compile": torch.compile(run, fullgraph=True)}


def test_pixels(compete):
    compete()
