import numpy as np
import pytest
import tifffile
import torch

from xrk import loading
from xrk.models import DnCNN


def test_layers_are_numbered_as_in_the_released_files():
    merged = DnCNN(features=3, depth=17).state_dict()
    assert list(merged) == [f"model.{2 * i}.{kind}" for i in range(17) for kind in ("weight", "bias")]
    apart = DnCNN(features=3, depth=4, batch_norm=True).state_dict()
    assert {k: tuple(t.shape) for k, t in apart.items() if k.endswith((".weight", "running_mean"))} == {
        "model.0.weight": (3, 1, 3, 3),
        "model.2.weight": (3, 3, 3, 3),
        "model.3.weight": (3,),
        "model.3.running_mean": (3,),
        "model.5.weight": (3, 3, 3, 3),
        "model.6.weight": (3,),
        "model.6.running_mean": (3,),
        "model.8.weight": (1, 3, 3, 3),
    }


@pytest.mark.parametrize("norm_eps", [1e-4, 1e-2])
def test_merged_and_apart_are_one_function(give_formula_weights, norm_eps):
    apart = give_formula_weights(DnCNN(features=5, depth=6, batch_norm=True, norm_eps=norm_eps))
    merged = DnCNN(features=5, depth=6).eval()
    state, target = apart.state_dict(), merged.state_dict()
    convolutions = [key for key, tensor in state.items() if tensor.ndim == 4]
    for layer, key in enumerate(convolutions):
        weight, bias = state[key], state[key.replace("weight", "bias")]
        if 0 < layer < 5:
            norm = f"model.{int(key.split('.')[1]) + 1}."
            scale = state[norm + "weight"] / torch.sqrt(state[norm + "running_var"] + norm_eps)
            weight = weight * scale.view(-1, 1, 1, 1)
            bias = (bias - state[norm + "running_mean"]) * scale + state[norm + "bias"]
        target[f"model.{2 * layer}.weight"].copy_(weight)
        target[f"model.{2 * layer}.bias"].copy_(bias)
    x = torch.linspace(0, 1, 13 * 17).reshape(1, 1, 13, 17)
    with torch.inference_mode():
        torch.testing.assert_close(merged(x), apart(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 7)])
def test_takes_any_size_and_subtracts_what_it_finds(give_formula_weights, size):
    module = give_formula_weights(DnCNN(features=3, depth=3))
    x = torch.linspace(0, 1, size[0] * size[1]).reshape(1, 1, *size)
    with torch.inference_mode():
        y = module(x)
        assert y.shape == x.shape
        assert torch.equal(y, x - module.model(x))
        assert not torch.equal(y, x)


def test_released_weights_denoise_a_radiograph(shared_data):
    counts = tifffile.imread(shared_data / "radiographs" / "simulated" / "demo_clean_u16.tif")[:512, :512]
    clean = np.sqrt(counts / 65535).astype(np.float32)
    noisy = clean + np.random.default_rng(0).normal(0, 25 / 255, clean.shape).astype(np.float32)
    model = loading.load(shared_data / "checkpoints" / "dncnn_gray_25.pth")
    with torch.inference_mode():
        denoised = model.module(torch.from_numpy(noisy)[None, None])[0, 0].numpy()

    def psnr(image):
        return -10 * np.log10(np.mean((image.astype(np.float64) - clean) ** 2))

    assert psnr(noisy) == pytest.approx(20.2, abs=0.05)
    assert psnr(denoised) >= 42.5
