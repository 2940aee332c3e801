import math

import pytest
import regrad
import torch
from regrad.optimizers import decoupled_decay
from regrad_testing import no_waiting
from regrad_xgrad import AdaM3
from regrad_xgrad.functional import adam3_


def make_model(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)
        ).to(dtype)


def batches(count=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 6, generator=generator, dtype=dtype),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model, inputs, target):
    return torch.nn.functional.cross_entropy(model(inputs), target)


def train(model, optimizer, data=None, parts=1):
    for inputs, target in data or batches(dtype=model[0].weight.dtype):
        optimizer.zero_grad()
        for x, y in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
            (loss_of(model, x, y) / parts).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def same(first, second, tolerance=0.0):
    return all((a - b).abs().max() <= tolerance for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("gradient", [3.0, -0.01])
def test_the_first_steps_are_10_then_6_6_then_5_0_times_the_rate(foreach, gradient):
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer, seen = AdaM3([weight], lr=0.1, foreach=foreach), []
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        seen.append(((before - weight.detach())[0] / 0.1).item() * math.copysign(1, gradient))
    # m = .1, .19, .271; v/.001 = .01, .04609, .11948…; m̂ = 1
    assert seen == pytest.approx([10.0, 6.586, 5.007], abs=2e-3)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"betas": (0.5, 0.9)}], ids=str
)
@pytest.mark.parametrize("foreach", [True, False])
def test_steps_are_those_of_the_reference(options, foreach, reference):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (2, 5), (), (4, 0)]
    weights = [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes
    ]
    own = {"decay" if key == "weight_decay" else key: value for key, value in options.items()}
    plain, values = [reference.AdaM3(**own) for _ in shapes], [w.detach().clone() for w in weights]
    optimizer = AdaM3(weights, lr=0.01, foreach=foreach, **options)
    for _ in range(15):
        for index, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            values[index] = plain[index].step(values[index], weight.grad, 0.01)
        optimizer.step()
        for weight, want in zip(weights, values, strict=True):
            torch.testing.assert_close(weight.detach(), want, rtol=1e-12, atol=1e-13)


def test_without_memory_and_eps_the_step_is_the_sign_of_the_gradient():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = AdaM3([weight], lr=0.1, betas=(0.0, 0.0), eps=1e-300)
    weight.grad = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(
        weight.detach(), torch.tensor([-0.1, 0.1, -0.1], dtype=torch.float64)
    )


def test_decay_is_decoupled_and_a_zero_gradient_gives_no_nan():
    weight = torch.nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))
    optimizer = AdaM3([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 * (1 - 0.05), abs=1e-15)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_bf16_model_keeps_state_in_bf16_and_follows_the_reference(foreach, reference):
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = AdaM3([weight], lr=0.01, betas=(0.5, 0.5), foreach=foreach)
    plain, values = reference.AdaM3(betas=(0.5, 0.5)), torch.ones(3, dtype=torch.float64)
    for index in range(6):
        weight.grad = torch.tensor([1.0, -2.0, 0.5 * index], dtype=torch.bfloat16)
        optimizer.step()
        values = plain.step(values, weight.grad.double(), 0.01)
    assert {key: value.dtype for key, value in optimizer.state[weight].items()} == {
        "step": torch.float32,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    }
    # bf16 keeps 8 bits; six steps of a hundredth
    torch.testing.assert_close(weight.detach().double(), values, rtol=0, atol=0.02)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_rate_of_zero_moves_nothing(foreach, rate):
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    assert same(train(model, AdaM3(model.parameters(), lr=rate, foreach=foreach)), before)


class OnDevice(torch.Tensor):
    """Says that it is not on a CPU, so that it must not be read."""

    is_cpu = False

    def item(self):
        raise AssertionError("read from the device")

    __float__ = __bool__ = item


def test_a_rate_on_a_device_is_never_read():
    results = []
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64).as_subclass(OnDevice)):
        weights, first, second = (
            [torch.full((3,), x, dtype=torch.float64)] for x in (1.0, 0.0, 0.0)
        )
        for step in (1.0, 2.0):
            adam3_(
                weights,
                [torch.full((3,), step).double()],
                first,
                second,
                lr=rate,
                steps=[step],
                weight_decay=0.1,
            )
        results.append(weights[0].as_subclass(torch.Tensor))
    torch.testing.assert_close(*results, rtol=1e-14, atol=0)


def test_it_goes_by_its_name():
    assert regrad.load("adam3", "regrad.optimizers") is AdaM3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu_without_a_synchronisation():
    results = []
    for device in ("cpu", "cuda"):
        weights, first, second = (
            [torch.full((3,), x, dtype=torch.float64, device=device)] for x in (1.0, 0.0, 0.0)
        )
        rate = torch.tensor(0.1, dtype=torch.float64, device=device)
        with no_waiting():
            for step in (1.0, 2.0):
                adam3_(weights, [torch.ones_like(weights[0])], first, second, lr=rate, steps=[step])
        results.append(weights[0].cpu())
    torch.testing.assert_close(*results, rtol=1e-13, atol=0)


def test_schedulers_groups_and_named_parameters_work():
    model = make_model()
    groups = [
        {"params": model[0].named_parameters()},
        {"params": model[2].named_parameters(), "lr": 0.0},
    ]
    optimizer = AdaM3(groups, lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [0.1, 1e-30], total_steps=8, cycle_momentum=False
    )
    before = model[2].weight.detach().clone()
    for data in batches(7):
        train(model, optimizer, [data])
        scheduler.step()
    assert torch.allclose(model[2].weight, before, rtol=0, atol=1e-20)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_a_non_finite_gradient_stays_in_its_own_elements():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AdaM3([weight], lr=0.1)
    weight.grad = torch.tensor([torch.nan, 1.0])
    optimizer.step()
    assert weight[0].isnan()
    assert weight[1].isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be at least 0 and finite, got -1\.0"),
        ({"lr": math.nan}, "lr must be at least 0 and finite, got nan"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a tensor of one element, got shape \[2\]"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got \(0\.9,\)"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"eps": 0.0}, r"eps must be positive and finite, got 0\.0"),
        ({"weight_decay": -0.1}, r"weight_decay must be at least 0 and finite, got -0\.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=message):
        AdaM3([weight], **options)
    optimizer = AdaM3([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.complex64, r"parameters must be real and floating point, got torch\.complex64"),
        (
            torch.float16,
            r"eps must not vanish in torch\.float16, got 1e-16; keep the weights in float32",
        ),
    ],
)
def test_parameters_without_a_rule_are_refused(dtype, message):
    weight = torch.nn.Parameter(torch.ones(1, dtype=dtype))
    with pytest.raises(ValueError, match=message):
        AdaM3([weight])
    optimizer = AdaM3([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight]})
    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused_before_anything_moves():
    table, dense = torch.nn.Embedding(4, 2, sparse=True), torch.nn.Linear(2, 1)
    optimizer = AdaM3([*dense.parameters(), *table.parameters()])
    before = dense.weight.detach().clone()
    dense(table(torch.tensor([1]))).sum().backward()
    with pytest.raises(
        RuntimeError, match="gradients must be dense, got a sparse one; use sparse=False"
    ):
        optimizer.step()
    assert torch.equal(dense.weight, before)


def test_a_group_says_that_its_decay_is_decoupled_also_after_an_older_checkpoint():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AdaM3([weight], lr=0.1, weight_decay=0.1)
    assert decoupled_decay(optimizer, optimizer.param_groups[0]) == 0.1
    older = optimizer.state_dict()
    del older["param_groups"][0]["decoupled_weight_decay"]
    optimizer.load_state_dict(older)
    assert decoupled_decay(optimizer, optimizer.param_groups[0]) == 0.1
    weight.grad = torch.ones(2)
    optimizer.step()
