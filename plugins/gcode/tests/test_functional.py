import pytest
import torch
from regrad_gcode.branch import Branch
from regrad_gcode.functional import add_flow, pull_back, scale_flow


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("before", "after", "stride", "groups"),
    [((2, 4, 4), (4, 2, 2), 2, 1), ((4, 3, 3),) * 2 + (1, 1)],
)
def test_a_gradient_pulled_back_is_the_references(before, after, stride, groups, reference):
    branch = Branch(before, after, solver="midpoint", adjoint=False).double()
    hidden, gradient = draw(2, *before), draw(2, *after, seed=1)
    got = pull_back(branch, hidden, gradient, dtype=torch.float64)
    expected = reference.pull_back(
        hidden, gradient, branch.state_dict(), stride=stride, groups=groups
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert all(parameter.grad is None for parameter in branch.parameters())


def test_pulling_back_under_autocast_changes_no_bit():
    branch = Branch((2, 4, 4), (4, 2, 2), solver="midpoint", adjoint=False)
    hidden, gradient = draw(2, 2, 4, 4).float(), draw(2, 4, 2, 2, seed=1).float()
    plain = pull_back(branch, hidden, gradient, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(pull_back(branch, hidden, gradient, dtype=torch.float32), plain)


def test_pulling_back_is_linear_in_the_gradient():
    branch, hidden = (
        Branch((2, 4, 4), (4, 2, 2), solver="rk4", adjoint=False).double(),
        draw(2, 2, 4, 4),
    )
    one, other = draw(2, 4, 2, 2, seed=1), draw(2, 4, 2, 2, seed=2)
    whole = pull_back(branch, hidden, 1024 * one - other, dtype=torch.float64)
    parts = [pull_back(branch, hidden, part, dtype=torch.float64) for part in (one, other)]
    torch.testing.assert_close(whole, 1024 * parts[0] - parts[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"norm": "keep"}, {"flow": "scale"}], ids=str)
def test_the_sum_is_the_references(options, reference):
    gradient, extra = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    scaled = options.get("flow") == "scale"
    got = (
        scale_flow(gradient, extra)
        if scaled
        else add_flow(gradient, extra, keep_norm="norm" in options)
    )
    torch.testing.assert_close(
        got, reference.correct(gradient, extra, **options), rtol=0, atol=1e-13
    )


def test_sums_by_hand():
    r = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    e = torch.tensor([[3.0, 4.0], [0.0, -3.0]])
    assert add_flow(r, e).tolist() == [[6, 8], [0, -2]]
    assert add_flow(r, e, keep_norm=True).tolist() == [[3, 4], [0, -1]]
    assert scale_flow(r, e).tolist() == [[6, 8], [0, 2]]


@pytest.mark.parametrize(
    "function", [add_flow, scale_flow, lambda r, e: add_flow(r, e, keep_norm=True)]
)
def test_nothing_added_and_gradients_of_zero_give_what_was_there(function):
    r, nothing = draw(3, 5), torch.zeros(3, 5, dtype=torch.float64)
    r[1] = 0
    assert torch.equal(function(r, nothing), r)
    assert torch.equal(function(nothing, nothing), nothing)


def test_a_sample_without_an_own_gradient_cannot_be_scaled_and_one_that_cancels_stays_finite():
    r, nothing = draw(2, 5), torch.zeros(2, 5, dtype=torch.float64)
    assert torch.equal(scale_flow(nothing, r), nothing)
    assert torch.equal(add_flow(r, -r, keep_norm=True), nothing)


def test_a_gradient_in_bf16_is_added_to_in_float32():
    r, e = torch.full((1, 2), 256.0, dtype=torch.bfloat16), torch.full((1, 2), 1.5)
    assert add_flow(r, e).dtype == torch.bfloat16
    # 257.5 rounds up to 258; 1.5 rounded first to the step of 2 would do so, too, and 256 + .9 must not
    assert add_flow(r, e).tolist() == [[258, 258]]
    assert add_flow(r, 0.6 * e).tolist() == [[256, 256]]
