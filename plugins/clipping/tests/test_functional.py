import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regrad_clipping import functional
from regrad_clipping.functional import (
    Unit,
    clip_adaptive_,
    clip_norm_,
    clip_units_,
    clip_update_,
    clip_value_,
    gradient_norm,
    scale_units_,
    unit_factors,
)
from regrad_testing import no_waiting
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [(5,), (), (3, 4), (4, 3, 5), (4, 1, 3, 3), (2, 3, 2, 2, 2)]


def pair(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    ]


@pytest.mark.parametrize("max_ratio", [0.01, 0.8, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_adaptive_clipping_is_that_of_the_reference_for_every_shape(shape, max_ratio, reference):
    grad, weight = pair(shape)
    every = reference.units(nn.Linear(1, 1), "weight", shape)
    expected = reference.clip_adaptive(grad, weight, every, max_ratio, 1e-3).reshape(shape)
    result = clip_adaptive_(grad, weight, max_ratio=max_ratio)
    assert result is grad
    torch.testing.assert_close(grad, expected, rtol=1e-14, atol=0)


def test_clipping_many_tensors_is_scaling_each_by_its_factors():
    kinds = [
        Unit(0),
        Unit(1),
        Unit(None),
        Unit(1, groups=2),
        Unit(None, groups=2),
        Unit(0),
        Unit(None),
        Unit(0),
    ]
    shapes = [(4, 3), (4, 3, 2), (5,), (4, 3, 2), (6,), (3, 2), (), (0, 3)]
    dtypes = [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float64,
        torch.float32,
        torch.float16,
    ] * 2
    pairs = [
        pair(shape, i, dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    ]
    pairs[2][0][0], pairs[5][0][0, 0] = 1e-8, float("nan")
    pairs += [[torch.zeros(3, 2), torch.ones(3, 2)], [torch.zeros(3), torch.ones(3)]]
    kinds += [Unit(0), Unit(None)]
    weights = [weight for _, weight in pairs]
    ours, theirs = ([grad.clone() for grad, _ in pairs] for _ in range(2))
    bounds = {"max_ratio": 0.5, "weight_floor": 1e-3}
    expected = unit_factors(theirs, weights, kinds, **bounds)
    scale_units_(theirs, expected)
    factors = clip_units_(ours, weights, kinds, **bounds)
    for grad, factor, wanted, kept in zip(ours, factors, theirs, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(factor.flatten(), kept.flatten(), rtol=0, atol=0, equal_nan=True)
    assert any(bool((factor < 1).any()) for factor in factors)


def test_adaptive_clipping_by_hand():
    grad = torch.tensor([[3.0, 4.0], [0.3, 0.4], [6.0, 8.0]])
    weight = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    clip_adaptive_(grad, weight, max_ratio=0.5, weight_floor=0.1)
    # norms 5, .5, 10 against .5·2, .5·1, .5·.1: to 1/5, kept, to 1/200
    torch.testing.assert_close(grad, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.03, 0.04]]))


def test_a_transposed_convolution_has_its_outputs_in_dimension_1():
    grad, weight = pair((3, 4, 2, 2))
    turned = clip_adaptive_(grad.transpose(0, 1).clone(), weight.transpose(0, 1))
    assert torch.allclose(
        clip_adaptive_(grad, weight, axis=1), turned.transpose(0, 1), rtol=1e-14, atol=0
    )


def test_a_gain_may_be_one_unit():
    grad, weight = pair((4, 1, 1))
    expected = clip_adaptive_(grad.flatten().clone(), weight.flatten())
    assert torch.allclose(
        clip_adaptive_(grad, weight, axis=None).flatten(), expected, rtol=1e-14, atol=0
    )


def test_channels_last_and_contiguous_gradients_give_the_same():
    grad, weight = pair((4, 3, 2, 2))
    other = grad.clone(memory_format=torch.channels_last)
    torch.testing.assert_close(
        clip_adaptive_(other, weight), clip_adaptive_(grad, weight), rtol=1e-14, atol=0
    )


def test_a_ratio_that_no_unit_reaches_changes_no_bit():
    grad, weight = pair((6, 5))
    assert torch.equal(clip_adaptive_(grad.clone(), weight, max_ratio=1e6), grad)


def test_a_zero_gradient_is_left_alone():
    grad = torch.zeros(3, 2)
    assert torch.equal(clip_adaptive_(grad, torch.zeros(3, 2)), torch.zeros(3, 2))


def test_a_weight_of_zero_can_move():
    grad = clip_adaptive_(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    assert grad.norm().item() == pytest.approx(0.01 * 1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_stays_within_its_unit(bad):
    grad, weight = pair((3, 2))
    expected = clip_adaptive_(grad.clone(), weight)
    grad[1, 0] = bad
    clip_adaptive_(grad, weight)
    assert torch.equal(grad[[0, 2]], expected[[0, 2]])
    assert not grad[1, 0].isfinite()


def test_half_gradients_are_measured_in_float32():
    grad, weight = (
        torch.full((1, 4), 6e4, dtype=torch.float16),
        torch.full((1, 4), 1.0, dtype=torch.float16),
    )
    clip_adaptive_(grad, weight, max_ratio=0.5)  # the norm, 1.2e5, is no half number
    assert torch.equal(grad, torch.full((1, 4), 0.5, dtype=torch.float16))
    grad, weight = pair((8, 9), dtype=torch.bfloat16)
    wide = clip_adaptive_(grad.float(), weight.float())
    assert torch.equal(clip_adaptive_(grad, weight), wide.bfloat16())


def test_grouped_units_are_those_of_the_parts():
    grad, weight = pair((6, 4, 3))
    expected = torch.cat(
        [
            clip_adaptive_(g.clone(), w, axis=1)
            for g, w in zip(grad.chunk(2), weight.chunk(2), strict=True)
        ]
    )
    factors = unit_factors([grad], [weight], [Unit(1, 2)], max_ratio=0.01, weight_floor=1e-3)
    scale_units_([grad], factors)
    torch.testing.assert_close(grad, expected, rtol=1e-14, atol=0)


def test_many_tensors_of_several_dtypes_are_clipped_as_each_alone():
    pairs = [
        pair(s, i, t)
        for i, s in enumerate(SHAPES)
        for t in (torch.float32, torch.float64, torch.bfloat16)
    ]
    grads, weights = zip(*pairs, strict=True)
    alone = [clip_adaptive_(g.clone(), w) for g, w in pairs]
    units = [Unit(0 if g.dim() > 1 else None) for g in grads]
    scale_units_(grads, unit_factors(grads, weights, units, max_ratio=0.01, weight_floor=1e-3))
    assert all(torch.equal(a, b) for a, b in zip(grads, alone, strict=True))


class NewStorages(TorchDispatchMode):
    """Collect the size of what operations return, in elements, unless they return an argument's storage."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves(args)
            if hasattr(t, "numel")
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if hasattr(tensor, "numel") and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_nothing_of_a_gradients_size_is_allocated():
    grad, weight = pair((10, 30, 3, 3), dtype=torch.float32)
    bias, start = pair((500,), dtype=torch.float32)
    with NewStorages() as new:
        factors = unit_factors(
            [grad, bias], [weight, start], [Unit(0), Unit(None)], max_ratio=0.01, weight_floor=1e-3
        )
        scale_units_([grad, bias], factors)
    assert new.largest <= 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_ratio": -0.1}, "max_ratio must be positive, got -0.1"),
        ({"max_ratio": float("inf")}, "max_ratio must be positive, got inf"),
        ({"weight_floor": 0.0}, "weight_floor must be positive, got 0.0"),
        ({"weight_floor": float("nan")}, "weight_floor must be positive, got nan"),
        ({"weight": torch.ones(2)}, "weight must have the shape of grad, [2, 2], got [2]"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    arguments = {"grad": torch.ones(2, 2), "weight": torch.ones(2, 2), **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        clip_adaptive_(**arguments)


@given(
    shape=st.lists(st.integers(1, 4), max_size=4),
    seed=st.integers(0, 1000),
    max_ratio=st.floats(1e-3, 10),
    weight_floor=st.floats(1e-4, 10),
    power=st.integers(-20, 20),
)
def test_a_units_norm_ends_within_its_bound_and_its_direction_stays(
    shape, seed, max_ratio, weight_floor, power, reference
):
    grad, weight = pair(shape, seed)
    grad *= 2.0**power
    before = grad.clone()
    every = reference.units(nn.Linear(1, 1), "weight", tuple(shape))
    expected = reference.clip_adaptive(grad, weight, every, max_ratio, weight_floor).reshape(shape)
    clip_adaptive_(grad, weight, max_ratio=max_ratio, weight_floor=weight_floor)
    torch.testing.assert_close(grad, expected, rtol=1e-13, atol=0)
    for unit in every:
        bound = max_ratio * max(weight.flatten()[unit].norm().item(), weight_floor)
        assert grad.flatten()[unit].norm().item() <= bound * (1 + 1e-12)
    assert torch.equal(grad.sign(), before.sign())


def parameters_with(grads):
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return parameters


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm_clipping_is_torchs_to_the_bit(dtype, max_norm, reference):
    grads = [pair(s, i, dtype)[0] for i, s in enumerate(SHAPES)]
    theirs = parameters_with(grads)
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    expected = reference.clip_norm(grads, max_norm)
    assert torch.equal(gradient_norm(grads), norm)
    clip_norm_(grads, gradient_norm(grads), max_norm=max_norm)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, theirs, strict=True))
    if dtype is torch.float64:
        assert all(
            torch.allclose(a, b, rtol=1e-14, atol=0) for a, b in zip(grads, expected, strict=True)
        )


@pytest.mark.parametrize("max_value", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_clipping_is_torchs_to_the_bit(dtype, max_value, reference):
    grads = [pair(s, i, dtype)[0] for i, s in enumerate(SHAPES)]
    theirs = parameters_with(grads)
    torch.nn.utils.clip_grad_value_(theirs, max_value)
    expected = [reference.clip_value(g, max_value) for g in grads]
    clip_value_(grads, max_value=max_value)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, theirs, strict=True))
    if dtype is torch.float64:
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_norm_and_value_by_hand():
    grads = [torch.tensor([6.0, 0.0]), torch.tensor([[8.0]])]
    clip_norm_(grads, gradient_norm(grads), max_norm=5.0)  # norm 10, halved
    torch.testing.assert_close(grads[0], torch.tensor([3.0, 0.0]), rtol=1e-6, atol=0)
    clip_value_(grads, max_value=2.0)
    torch.testing.assert_close(
        grads, [torch.tensor([2.0, 0.0]), torch.tensor([[2.0]])], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_and_value_treat_non_finite_elements_as_torch_does(bad):
    for ours, theirs in (
        (
            lambda g: clip_norm_(g, gradient_norm(g), max_norm=1.0),
            lambda p: torch.nn.utils.clip_grad_norm_(p, 1.0),
        ),
        (
            lambda g: clip_value_(g, max_value=1.0),
            lambda p: torch.nn.utils.clip_grad_value_(p, 1.0),
        ),
    ):
        grads = [torch.tensor([1.0, bad]), torch.tensor([0.5])]
        parameters = parameters_with(grads)
        ours(grads)
        theirs(parameters)
        assert all(
            torch.allclose(g, p.grad, rtol=0, atol=0, equal_nan=True)
            for g, p in zip(grads, parameters, strict=True)
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu_without_waiting():
    pairs = [pair(shape, i) for i, shape in enumerate(SHAPES)]
    units = [Unit(0 if g.dim() > 1 else None) for g, _ in pairs]
    there = [[t.cuda() for t in tensors] for tensors in pairs]
    for tensors in (pairs, there):
        grads, weights = zip(*tensors, strict=True)
        with no_waiting():
            scale_units_(
                grads, unit_factors(grads, weights, units, max_ratio=0.01, weight_floor=1e-3)
            )
            clip_norm_(grads, gradient_norm(grads), max_norm=0.01)
            clip_value_(grads, max_value=1e-3)
    for (a, _), (b, _) in zip(pairs, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("max_rms", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_is_clipped_as_the_reference_does(reference, shape, max_rms):
    step, _ = pair(shape)
    wanted = reference.clip_update(step, 0.5, max_rms)
    clip_update_(step, 0.5, max_rms=max_rms)
    torch.testing.assert_close(step, wanted, rtol=1e-14, atol=0)


def test_an_update_of_twice_the_bound_is_halved():
    # rms of (3, −4, 5) is √(50/3) = 4.0825; with a rate of .5 that is 8.165
    step = torch.tensor([3.0, -4.0, 5.0], dtype=torch.float64)
    factor = clip_update_(step, torch.tensor([0.5], dtype=torch.float64), max_rms=(50 / 3) ** 0.5)
    torch.testing.assert_close(step.tolist(), [1.5, -2.0, 2.5], rtol=1e-14, atol=0)
    assert factor.item() == pytest.approx(0.5)


def test_an_update_below_the_bound_stays_to_the_bit_and_zero_stays_zero():
    step, _ = pair((3, 4))
    same = step.clone()
    clip_update_(step, 1.0, max_rms=1e9)
    assert torch.equal(step, same)
    for rate in (0.0, 0.1):
        nothing = torch.zeros(3)
        clip_update_(nothing, rate)
        assert nothing.tolist() == [0.0] * 3


def test_a_non_finite_update_spreads_over_its_tensor():
    step = torch.tensor([1.0, torch.nan])
    clip_update_(step, 0.1)
    assert step.isnan().all()


def test_a_bound_of_an_update_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="max_rms must be positive, got 0"):
        clip_update_(torch.ones(2), 0.1, max_rms=0)


def test_updates_are_clipped_alike_on_a_device_and_none_is_read_there(monkeypatch):
    steps = [pair(shape)[0] for shape in SHAPES]
    wanted = [step.clone() for step in steps]
    rates = [0.5] * len(steps)
    factors = [clip_update_(step, 0.5, max_rms=0.7).reshape(()) for step in wanted]
    monkeypatch.setattr(functional, "is_on_host", lambda tensor: False)
    found = functional.clip_updates_(steps, rates, max_rms=0.7)
    for got, want in zip([*steps, *found], [*wanted, *factors], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-15, atol=0)
