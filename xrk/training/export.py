"""A finished run becomes a shipped model: ``NAME.safetensors`` and its card.

    python -m xrk.training.export --run runs/resnet18-unet --figures table.json [--to xrk/weights]

The averaged weights are stored in fp16, except the convolutions that see the image: their filters sum to zero, which
rounding to fp16 would spoil. A video network's card has the name of its recipe, ``stf``, not of its architecture.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xrk.models import Card
from xrk.training import stf
from xrk.training.denoise import NETWORKS

REAL_LICENCE = "trained on xrk's own simulations and on frames under the MIT licence (see training.real_frames)"
LIMITS = (
    "Trained on simulated radiographs only. Structure as weak and as small as the noise itself can be smoothed away or,"
    " rarely, invented: look at the standardised residual in the report. It does not sharpen, and it takes regular"
    " patterns of the detector for object. White spots are removed where they stand far above the noise. A frame whose"
    " noise is not Poisson-Gaussian (logarithmic or square-root encoded, strongly filtered or lossily compressed) is"
    " outside what it knows. Research use; not a medical device."
)


def export(
    run: Path, name: str, target: Path, figures: dict[str, Any], machine: str, caution: str = "", note: str = ""
) -> Card:
    """Write the model ``name`` of a run to the folder ``target``; its card, whose limits begin with ``caution``.

    ``note``: what else there is to say of the training, such as a recipe that changed on the way.
    """
    saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    architecture = saved["model"]
    video = architecture == stf.ARCHITECTURE
    recipe = stf if video else NETWORKS[architecture]
    seeing = saved["config"].get("spot") == 0
    description, limits = recipe.DESCRIPTION, getattr(recipe, "LIMITS", LIMITS)
    if seeing:
        description, limits = recipe.SEEING_DESCRIPTION, recipe.SEEING_LIMITS
    state = {
        key: value.contiguous() if key in recipe.EXACT else value.contiguous().half()
        for key, value in saved["average"].items()
    }
    real = saved.get("frames")
    weights = target / f"{name}.safetensors"
    with (run / "log.csv").open() as log:
        validation = [row for row in csv.reader(log)][-1]
    conventions: dict[str, Any] = {"domain": "stabilised", "noise": "estimate"}
    training = {
        "recipe": f"python -m xrk.training.denoise --model {architecture}{' --spot 0' if seeing else ''}",
        "data": "random scenes of xrk.scenes behind the simulated beam and detector of xrk.training.data",
    }
    if video:
        conventions = {"domain": "unit", "noise": "none", "output_scale": float(stf.SCALE)}
        training = {
            "recipe": "python -m xrk.training.stf",
            "data": "random processes of xrk.processes behind the random cameras of xrk.training.stf",
        }
    card = Card(
        name=name,
        architecture=architecture,
        config={"in_channels": 1, **saved["config"]},
        **conventions,
        size_multiple=recipe.size_multiple(saved["config"]),
        description=description,
        parameters=sum(value.numel() for value in state.values()),
        licence="MIT; "
        + ("trained on xrk's own simulations only, so no other licence touches it" if real is None else REAL_LICENCE),
        training=training
        | ({} if real is None else {"real_frames": real})
        | {
            "steps": saved["step"],
            "hours": round(saved["seconds"] / 3600, 2),
            "machine": machine,
            "validation_psnr_db" if video else "validation_gain_db": float(validation[3]),
        }
        | ({"note": note} if note else {}),
        figures=figures,
        limits=f"{caution} {limits}".strip(),
    )
    # The weights alone must tell what they are, too: a copy elsewhere is loaded by its path.
    told = {key: value for key, value in card.to_dict().items() if key not in ("sha256", "source")}
    save_file(state, weights, {"xrk_card": json.dumps(told)})
    weights.chmod(0o644)
    card = replace(card, sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    (target / f"{name}.json").write_text(json.dumps(card.to_dict(), indent=1) + "\n")
    return card


def summary(table: dict[str, Any]) -> dict[str, Any]:
    """What of an evaluation goes into the card: PSNR in dB by noise and dose, or by the two cameras' rates and dose."""
    if "simulated" in table:
        return {"command": table["command"]} | {
            name: [{k: round(v, 3) if k in ("psnr", "ssim", "aad") else v for k, v in row.items()} for row in rows]
            for name, rows in table.items()
            if name in ("simulated", "melt_pool")
        }
    return {
        "command": table.get("command", "python -m xrk.training.evaluate"),
        "psnr_db": [
            {key: round(row[key], 2) if key == "psnr" else row[key] for key in ("noise", "quanta", "method", "psnr")}
            for row in table.get("scenes", [])
        ],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", help="of the model; by default its architecture's, stf for a video network")
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[1] / "weights")
    parser.add_argument("--figures", type=Path, help="what xrk.training.evaluate, or evaluate_video, wrote")
    parser.add_argument("--machine", default="2 CPU cores")
    parser.add_argument("--caution", default="", help="a sentence that the card's limits begin with")
    parser.add_argument("--note", default="", help="what else there is to say of the training")
    arguments = parser.parse_args(argv)
    arguments.to.mkdir(parents=True, exist_ok=True)
    figures = summary(json.loads(arguments.figures.read_text())) if arguments.figures else {}
    saved = torch.load(arguments.run / "checkpoint.pt", map_location="cpu", weights_only=True)
    name = arguments.name or {stf.ARCHITECTURE: "stf"}.get(saved["model"], saved["model"])
    card = export(arguments.run, name, arguments.to, figures, arguments.machine, arguments.caution, arguments.note)
    print(f"{card.name}: {card.parameters} parameters, sha256 {card.sha256}")


if __name__ == "__main__":
    main()
