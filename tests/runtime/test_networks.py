"""The oracle itself: random networks say what they are, and the check sees what it is there to see."""

import pytest
import torch
from hypothesis import given, settings
from network_steps import Step
from networks import Case, Exactness, Network, cases, check
from torch import nn

PLAIN = Case(
    steps=[Step("convolution", inputs=1, outputs=3, kernel=3, padding=1), Step("activation", name="relu")],
    channels=1,
    size=(9, 7),
    bands=(2, 9),
    offset=0.0,
    seed=1,
)


def whole(module, shape, band):
    return lambda x: module(x.clone())  # a module may work in place


@settings(max_examples=60, derandomize=True, database=None)
@given(cases(row_global=True))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_case_is_made_again_from_what_is_printed(case):
    again = eval(repr(case))
    assert repr(again) == repr(case)
    assert torch.equal(again.image(), case.image())
    assert torch.equal(again.network()(again.image()), case.network()(case.image()))
    check(case, whole)


def test_the_check_runs_every_band_twice():
    seen = []

    def plan(module, shape, band):
        assert shape == (1, 1, 9, 7)
        return lambda x: seen.append(band) or module(x)

    assert check(PLAIN, plan) == 2
    assert seen == [2, 2, 9, 9]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y * 1.0001, "from the float64 module at channel"),
        (lambda y: torch.cat([y[:, :, 1:], y[:, :, :1]], dim=2), "from the float64 module"),
        (lambda y: y[:, :, :-1], "not \\(1, 3, 9, 7\\)"),
        (lambda y: y + 1e-9 * torch.rand(1) * y.abs().max() + y * 2e-7 * torch.rand(()), "other bits"),
    ],
)
def test_the_check_sees_what_is_wrong(spoil, message):
    torch.manual_seed(1)
    with pytest.raises(AssertionError, match=message):
        check(PLAIN, lambda module, shape, band: lambda x: spoil(module(x)))


def test_the_check_sees_a_changed_input():
    with pytest.raises(AssertionError, match="the input was changed"):
        check(PLAIN, lambda module, shape, band: lambda x: module(x.mul_(2)))


def test_one_row_of_context_fewer_is_seen():
    """Two bands, each with all but one of the rows that a 3x3 convolution looks at beyond it."""

    def plan(module, shape, band):
        return lambda x: torch.cat([module(x[:, :, :4]), module(x[:, :, 4:])], dim=2)

    with pytest.raises(AssertionError, match=r"row [34] of 9"):
        check(PLAIN, plan)


def test_a_norm_over_a_constant_is_called_ill_conditioned():
    module = Network([Step("convolution", inputs=1, outputs=2, kernel=1), Step("instance norm", num_features=2)], 1)
    exact = Exactness(module, torch.full((1, 1, 6, 6), 4.0))
    assert exact.is_ill_conditioned()
    assert not Exactness(module, torch.randn(1, 1, 6, 6)).is_ill_conditioned()


def test_what_is_allowed_is_the_larger_of_the_two():
    module = nn.Conv2d(1, 1, 1)
    x = torch.rand(1, 1, 4, 4)
    exact = Exactness(module, x)
    assert exact.allowed == pytest.approx(1e-5 * exact.expected.abs().max().item())
    assert exact.distance(exact.whole) < exact.allowed
