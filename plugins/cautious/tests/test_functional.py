"""The rule for one tensor: against the reference, by hand, and where a number is not finite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regrad_cautious import functional
from regrad_cautious.functional import keep_agreeing_
from torch.utils._python_dispatch import TorchDispatchMode


def pair(shape, seed=0, dtype=torch.float64):
    """Return a step and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return both[0].clone(), both[1].clone()


@pytest.mark.parametrize("keep", ["agreeing", "all"])
@pytest.mark.parametrize("divisor", ["share", "count"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2, 2)])
def test_a_step_is_masked_as_the_reference_does(reference, shape, divisor, keep):
    step, gradient = pair(shape)
    options = {"divisor": divisor, "keep": keep}
    wanted = reference.cautious(step.flatten().tolist(), gradient.flatten().tolist(), **options)
    keep_agreeing_(step, gradient, **options)
    torch.testing.assert_close(
        step.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-15, atol=0
    )


def test_half_of_a_step_goes_up_and_the_rest_is_doubled():
    step = torch.tensor([-1.0, 2.0, -3.0, 4.0], dtype=torch.float64)
    gradient = torch.tensor([0.5, 0.5, 0.5, -0.5], dtype=torch.float64)
    share = keep_agreeing_(step, gradient)
    # three of four agree: divided by 3/4
    assert step.tolist() == [-1.0 / 0.75, 0.0, -3.0 / 0.75, 4.0 / 0.75]
    assert share.item() == 0.75


def test_the_published_divisor_is_the_count_plus_one():
    step = torch.tensor([-1.0, 2.0, -3.0, 4.0], dtype=torch.float64)
    keep_agreeing_(step, torch.tensor([0.5, 0.5, 0.5, -0.5], dtype=torch.float64), divisor="count")
    # three of four agree: times 4/(3 + 1)
    assert step.tolist() == [-1.0, 0.0, -3.0, 4.0]


def test_the_control_lengthens_what_the_rule_leaves_out():
    step, gradient = pair((50,))
    masked = step.clone()
    lengthened = step.clone()
    share = keep_agreeing_(masked, gradient)
    keep_agreeing_(lengthened, gradient, keep="all")
    torch.testing.assert_close(lengthened, step / share)
    agrees = step * gradient < 0
    assert torch.equal(masked[agrees], lengthened[agrees])
    assert not masked[~agrees].any()


def test_where_the_optimizer_climbs_the_other_half_is_kept():
    step, gradient = pair((50,))
    other = step.clone()
    keep_agreeing_(step, gradient, maximize=True)
    keep_agreeing_(other, -gradient)
    assert torch.equal(step, other)


def test_a_step_that_goes_up_everywhere_is_left_out_as_a_whole():
    step = torch.ones(4)
    share = keep_agreeing_(step, torch.ones(4))
    assert step.tolist() == [0.0] * 4
    assert share.item() == 0.0


def test_one_agreeing_element_of_many_is_lengthened_a_thousand_times_at_most():
    step = torch.full((10_000,), -1.0)
    gradient = torch.zeros(10_000)
    gradient[7] = 1.0
    keep_agreeing_(step, gradient)
    assert step[7].item() == pytest.approx(-1000.0)
    assert step.count_nonzero() == 1


def test_products_that_half_precision_cannot_hold_have_their_sign():
    step = torch.full((2,), -1e-6, dtype=torch.float16)
    keep_agreeing_(step, torch.full((2,), 1e-6, dtype=torch.float16))
    assert step.tolist() == torch.full((2,), -1e-6, dtype=torch.float16).tolist()


def test_a_tensor_without_elements_stays_empty():
    assert keep_agreeing_(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0.0


def test_a_non_finite_gradient_leaves_its_own_element_out_and_a_non_finite_step_shows():
    step = torch.tensor([-1.0, -1.0, torch.nan, -1.0])
    keep_agreeing_(step, torch.tensor([1.0, torch.nan, 1.0, 1.0]))
    assert step[:2].tolist() == [-2.0, 0.0]
    assert step[2].isnan()


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"gradient must have the shape of displacement, \[3\]"):
        keep_agreeing_(torch.zeros(3), torch.zeros(4))


@given(seed=st.integers(0, 10_000), size=st.integers(1, 40))
def test_no_element_ever_goes_up_and_the_sum_of_equal_steps_is_kept(seed, size):
    step, gradient = pair((size,), seed)
    equal = step.sign()
    keep_agreeing_(equal, gradient)
    assert (equal * gradient <= 0).all()
    if equal.any():
        assert equal.abs().sum().item() == pytest.approx(size)


SHAPES = [(3,), (2, 5), (), (4, 1, 2), (0,), (2, 3, 4, 5)]


def pairs(dtype=torch.float32):
    """Return steps and gradients of several shapes, one of them with gaps in its memory."""
    both = [pair(shape, seed, dtype) for seed, shape in enumerate(SHAPES)]
    wide, slope = pair((6, 8), 9, dtype)
    both.append((wide[:, ::2], slope[:, ::2]))
    return [step for step, _ in both], [slope for _, slope in both]


@pytest.mark.parametrize("keep", ["agreeing", "all"])
@pytest.mark.parametrize("divisor", ["share", "count"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("way", ["pieces", "device"])
def test_pieces_and_launches_give_what_each_tensor_alone_does(
    monkeypatch, way, dtype, divisor, keep
):
    steps, slopes = pairs(dtype)
    climbs = [index % 2 == 0 for index in range(len(steps))]
    wanted, _ = pairs(dtype)
    options = {"divisor": divisor, "keep": keep}
    shares = [
        functional.keep_agreeing_(step, slope, maximize=up, **options)
        for step, slope, up in zip(wanted, slopes, climbs, strict=True)
    ]
    if way == "pieces":
        monkeypatch.setattr(functional, "PIECE", 7)
    else:
        monkeypatch.setattr(functional, "is_on_host", lambda tensor: False)
    found = functional.keep_agreeing_in_all_(steps, slopes, maximize=climbs, **options)
    rounding = 0 if way == "pieces" else 2 * torch.finfo(dtype).eps
    for got, want in zip([*steps, *found], [*wanted, *shares], strict=True):
        torch.testing.assert_close(got, want, rtol=rounding, atol=0)


class Operations(TorchDispatchMode):
    """Counts the operations that are launches on a device."""

    VIEWS = ("view", "detach", "split", "unbind", "permute", "slice", "as_strided")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.VIEWS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_the_launches_on_a_device_do_not_grow_with_the_number_of_tensors(monkeypatch):
    monkeypatch.setattr(functional, "is_on_host", lambda tensor: False)
    counts = []
    for number in (5, 50):
        steps = [torch.full((3,), -1.0) for _ in range(number)]
        slopes = [torch.ones(3) for _ in range(number)]
        rest = {"divisor": "share", "keep": "agreeing", "maximize": [False] * number}
        functional.keep_agreeing_in_all_(steps, slopes, **rest)  # lengths come to the device once
        with Operations() as seen:
            functional.keep_agreeing_in_all_(steps, slopes, **rest)
        assert not any("_local_scalar_dense" in name for name in seen.names)
        counts.append(len(seen.names))
    assert counts[0] == counts[1]
