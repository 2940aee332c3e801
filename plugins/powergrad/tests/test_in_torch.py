"""The functional inside torch: dtypes, autocast, autograd, compilation, memory, and its refusals."""

import re
from unittest import mock

import pytest
import torch
from regrad_powergrad import functional
from regrad_powergrad.functional import power_grad_cross_entropy
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def batch(generator):
    return torch.randn(6, 5, generator=generator) * 3, torch.randint(5, (6,), generator=generator)


def gradient_of(loss_of, logits):
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(loss_of(logits), logits)[0]


@pytest.mark.parametrize("tile", [7, 2**21])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_are_torchs_and_the_gradient_is_rounded_once(dtype, tile, batch, oracle):
    logits, target = batch[0].to(dtype), batch[1]
    weight = torch.tensor([0.5, 2.0, 1.0, 1.0, 3.0], dtype=dtype)
    with mock.patch.object(functional, "CPU_TILE", tile):
        value = power_grad_cross_entropy(logits, target, weight=weight, reduction="none")
        gradient = gradient_of(
            lambda z: power_grad_cross_entropy(z, target, weight=weight, alpha=0.3), logits
        )
    assert torch.equal(value, F.cross_entropy(logits, target, weight, reduction="none"))
    assert (value.dtype, gradient.dtype) == (dtype, dtype)
    exact = oracle(logits.double(), target, alpha=0.3, weight=weight.double())
    wide = torch.finfo(torch.promote_types(dtype, torch.float32))
    tolerance = {
        "rtol": torch.finfo(dtype).eps / 2 + 8 * wide.eps,
        "atol": 8 * wide.eps + torch.finfo(dtype).tiny,
    }
    assert torch.allclose(gradient.double(), exact, **tolerance)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_gives_torchs_dtype_and_value(dtype, soft, reduction, batch):
    logits, target = batch[0].to(dtype), torch.softmax(batch[0], 1).to(dtype) if soft else batch[1]
    options = {"reduction": reduction, "label_smoothing": 0.1}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = F.cross_entropy(logits, target, **options)
        value = power_grad_cross_entropy(logits, target, **options)
        gradient = gradient_of(
            lambda z: power_grad_cross_entropy(z, target, **options).sum(), logits
        )
    assert plain.dtype == value.dtype == torch.float32
    assert torch.equal(value, plain)
    assert gradient.dtype == dtype
    wide = gradient_of(
        lambda z: power_grad_cross_entropy(z, target.to(z) if soft else target, **options).sum(),
        logits.float(),
    )
    assert torch.equal(gradient, wide.to(dtype))


def test_a_scaled_half_gradient_does_not_pass_through_overflow(generator):
    # the factor 2^16 of a fresh GradScaler meets 1/N before anything is rounded to half
    logits = torch.randn(4096, 5, generator=generator, dtype=torch.float16)
    target = torch.randint(5, (4096,), generator=generator)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    gradient = gradient_of(
        lambda z: scaler.scale(power_grad_cross_entropy(z.float(), target)), logits
    )
    unscaled = gradient_of(lambda z: power_grad_cross_entropy(z, target), logits.float())
    assert torch.allclose(gradient.float() / 2.0**16, unscaled, rtol=1e-3, atol=0)


def test_upstream_gradients_of_a_larger_graph_pass_through(batch, oracle):
    logits, target = batch
    logits = logits.double()
    row_factors = torch.linspace(-1, 2, 6, dtype=torch.float64)

    def total(z):
        losses = power_grad_cross_entropy(z, target, reduction="none")
        return (
            (losses * row_factors).sum()
            + 3 * power_grad_cross_entropy(z, target)
            + z.square().sum()
        )

    expected = oracle(logits, target, alpha=0.25, upstream=row_factors, reduction="none")
    expected = expected + 3 * oracle(logits, target, alpha=0.25) + 2 * logits
    assert torch.allclose(gradient_of(total, logits), expected, rtol=1e-14, atol=1e-15)


def test_a_retained_graph_gives_the_same_gradient_again(batch):
    logits = batch[0].requires_grad_()
    loss = power_grad_cross_entropy(logits, batch[1])
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, logits)[0], first)


def test_differentiating_twice_is_refused(batch):
    logits = batch[0].requires_grad_()
    (gradient,) = torch.autograd.grad(
        power_grad_cross_entropy(logits, batch[1]), logits, create_graph=True
    )
    assert torch.equal(
        gradient, gradient_of(lambda z: power_grad_cross_entropy(z, batch[1]), logits)
    )
    with pytest.raises(
        RuntimeError,
        match="must be differentiated only once, but its gradient was differentiated again",
    ):
        gradient.square().sum().backward()


def test_logits_changed_before_the_backward_pass_are_noticed(batch):
    logits = batch[0].requires_grad_() * 1
    loss = power_grad_cross_entropy(logits, batch[1])
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_without_a_gradient_to_give_nothing_is_recorded(grad_enabled, batch):
    logits = batch[0] if grad_enabled else batch[0].requires_grad_()
    with torch.set_grad_enabled(grad_enabled):
        value = power_grad_cross_entropy(logits, batch[1])
    assert not value.requires_grad
    assert torch.equal(value, F.cross_entropy(*batch))


def test_bytes_are_classes_too(batch):
    logits, target = batch
    assert torch.equal(
        power_grad_cross_entropy(logits, target.byte()), F.cross_entropy(logits, target)
    )


def test_a_single_class_may_come_as_a_vector_of_one(batch):
    logits, target = batch[0][0], batch[1][:1]
    gradients = [
        gradient_of(lambda z, t=t: power_grad_cross_entropy(z, t), logits)
        for t in (target, target[0])
    ]
    assert torch.equal(*gradients)


class LargeTensors(TorchDispatchMode):
    """Count the new storages that hold at least `numel` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel = numel
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and result.untyped_storage().nbytes() >= self.numel * result.element_size()
        ):
            self.storages[result.untyped_storage().data_ptr()] = (
                result  # kept alive: no address is used twice
            )
        return result


@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
def test_forward_makes_no_tensor_of_the_logits_size_and_backward_one(soft, generator):
    logits = torch.randn(64, 50, generator=generator, requires_grad=True)
    target = (
        torch.softmax(logits.detach(), 1) if soft else torch.randint(50, (64,), generator=generator)
    )
    weight = torch.rand(50, generator=generator)
    given = {logits.untyped_storage().data_ptr(), target.untyped_storage().data_ptr()}
    with mock.patch.object(functional, "CPU_TILE", 400), LargeTensors(64 * 50) as large:
        loss = power_grad_cross_entropy(logits, target, weight=weight, label_smoothing=0.1)
        assert set(large.storages) <= given
        torch.autograd.grad(loss, logits)
        assert len(set(large.storages) - given) == 1


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_compiled_loss_is_one_graph_with_the_same_numbers(dtype, reduction, batch):
    logits, target = batch[0].to(dtype), batch[1]
    weight = torch.tensor([0.5, 2.0, 1.0, 1.0, 3.0], dtype=dtype)

    def loss(z):
        return power_grad_cross_entropy(
            z, target, weight=weight, label_smoothing=0.1, reduction=reduction
        ).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(logits), loss(logits), rtol=2 * torch.finfo(dtype).eps)
    tolerance = torch.finfo(dtype).eps
    assert torch.allclose(
        gradient_of(compiled, logits), gradient_of(loss, logits), rtol=tolerance, atol=tolerance
    )


def test_two_runs_give_the_same_bits(batch):
    gradients = [
        gradient_of(lambda z: power_grad_cross_entropy(z, batch[1]), batch[0]) for _ in range(2)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("alpha", [0, -0.25, 1.5, float("nan"), float("inf")])
def test_alpha_out_of_range_is_refused(alpha, batch):
    with pytest.raises(
        ValueError, match=re.escape(f"alpha must be in (0, 1], got {alpha!r}; 1 is plain")
    ):
        power_grad_cross_entropy(*batch, alpha=alpha)


REFUSALS = {
    "reduction": (
        {"reduction": "avg"},
        ValueError,
        "reduction must be one of 'none', 'mean', 'sum', got 'avg'",
    ),
    "smoothing": ({"label_smoothing": 2}, ValueError, "label_smoothing must be in [0, 1], got 2"),
    "int32": (
        {"target": torch.zeros(6, dtype=torch.int32)},
        TypeError,
        "target must hold class indices as int64 or uint8, got torch.int32; pass target.long()",
    ),
    "float classes": (
        {"target": torch.zeros(6)},
        TypeError,
        "target must hold class indices as int64 or uint8, got torch.float32",
    ),
    "integer probabilities": (
        {"target": torch.zeros(6, 5, dtype=torch.int64)},
        TypeError,
        "target must be floating point if it has the shape of logits, got torch.int64; class "
        "indices have shape [6]",
    ),
    "short": (
        {"target": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "target must have shape [6] (class indices) or [6, 5] (class probabilities), got [3]",
    ),
    "target gradient": (
        {"target": torch.zeros(6, 5, requires_grad=True)},
        ValueError,
        "target must not require a gradient: PowerGrad has none for it; pass target.detach()",
    ),
    "weight gradient": (
        {"weight": torch.ones(5, requires_grad=True)},
        ValueError,
        "weight must not require a gradient: PowerGrad has none for it; pass weight.detach()",
    ),
    "scalar": (
        {"logits": torch.zeros(())},
        ValueError,
        "logits must have shape [C], [N, C] or [N, C, d1, ...]",
    ),
    "out of range": ({"target": torch.full((6,), 5)}, IndexError, "Target 5 is out of bounds"),
    "weight shape": (
        {"weight": torch.ones(4)},
        RuntimeError,
        "weight tensor should be defined either for all 5",
    ),
    "ignored probabilities": (
        {"target": torch.ones(6, 5), "ignore_index": 1},
        RuntimeError,
        "ignore_index is not supported for floating point target",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_unfit_arguments_are_refused_in_words(case, batch):
    options, error, message = REFUSALS[case]
    arguments = {"logits": batch[0], "target": batch[1], **options}
    with pytest.raises(error, match=re.escape(message)):
        power_grad_cross_entropy(**arguments)
