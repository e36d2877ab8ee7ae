import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrk.errors import InputError
from xrk.models import Card

FULL = Card(
    name="resnet18-unet",
    architecture="resnet18-unet",
    config={"width": 24, "decoder_channels": (96, 64), "batch_norm": False},
    domain="stabilised",
    noise="estimate",
    size_multiple=32,
    output_scale=1.0,
    description="A network.",
    parameters=1_400_000,
    sha256="0" * 63 + "a",
    licence="MIT",
    training={"hours": 3.5, "data": ["simulated"]},
    figures={"psnr": {"50": 40.9}},
    limits="None known.",
)


@pytest.mark.parametrize("card", [FULL, Card("n", "dncnn"), Card("n", "a", output_scale=0.5, source="/x/y.pth")])
def test_survives_json(card):
    assert Card.from_dict(json.loads(json.dumps(card.to_dict()))) == card


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=3))
def test_any_plain_json_survives(entries):
    card = Card("n", "a", config=entries, training=entries, figures=entries)
    assert Card.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_holds_a_copy_of_what_it_was_given():
    config = {"decoder_channels": [1, 2]}
    card = Card("n", "a", config=config)
    config["decoder_channels"].append(3)
    card.to_dict()["config"]["decoder_channels"].append(4)
    assert card.config == {"decoder_channels": [1, 2]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", ""),
        ("name", 3),
        ("architecture", ""),
        ("config", [1]),
        ("config", {"width": float("nan")}),
        ("config", {"width": object()}),
        ("domain", "log"),
        ("domain", ["unit"]),
        ("noise", None),
        ("size_multiple", 0),
        ("size_multiple", 32.0),
        ("size_multiple", True),
        ("output_scale", 0.25),
        ("output_scale", "1"),
        ("parameters", -1),
        ("sha256", "A" * 64),
        ("sha256", "0" * 63),
        ("sha256", 5),
        ("training", "long"),
        ("figures", {"psnr": float("inf")}),
        ("limits", None),
        ("source", 1),
    ],
)
def test_refuses_a_wrong_field_by_name(name, value):
    entries = {f.name: getattr(FULL, f.name) for f in dataclasses.fields(FULL)}
    with pytest.raises(InputError, match=name):
        Card.from_dict(entries | {name: value})


def test_refuses_what_is_no_card():
    with pytest.raises(InputError, match="no field 'widht'"):
        Card.from_dict(FULL.to_dict() | {"widht": 3})
    with pytest.raises(InputError, match="needs the field 'architecture'"):
        Card.from_dict({"name": "n"})
    with pytest.raises(InputError, match="must be a JSON object, got list"):
        Card.from_dict([])
