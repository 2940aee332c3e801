import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regrad_testing import no_waiting
from regrad_tom.functional import Trends, tom_

SHAPES = [(3,), (2, 5), (), (4, 0, 2)]


def tensors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES
    ]


def zeros(like):
    return Trends(
        **{
            key: [torch.zeros_like(t) for t in like]
            for key in ("forecast", "trend", "square", "last")
        }
    )


def run(steps=12, **options):
    weights = tensors(0)
    state = zeros(weights)
    for index in range(1, steps + 1):
        tom_(weights, tensors(index), state, steps=[float(index)] * len(weights), **options)
    return weights


OPTIONS = [
    {},
    {"correct_bias": True},
    {"maximize": True},
    {"weight_decay": 0.1},
    {
        "betas": (0.5, 0.0, 0.9),
        "eps": 0.1,
        "correct_bias": True,
        "weight_decay": 0.2,
        "maximize": True,
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("foreach", [True, False])
def test_steps_are_those_of_the_reference(options, foreach, reference):
    weights = run(lr=0.1, foreach=foreach, **options)
    own = {"decay" if key == "weight_decay" else key: value for key, value in options.items()}
    for place, (got, begin) in enumerate(zip(weights, tensors(0), strict=True)):
        plain, values = reference.Tom(rate=0.1, **own), begin.flatten().tolist()
        for index in range(1, 13):
            values = plain.step(values, tensors(index)[place].flatten().tolist())
        want = torch.tensor(values, dtype=torch.float64).view_as(got)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("foreach", [True, False])
def test_a_tensor_rate_gives_the_numbers_of_a_number(options, foreach):
    for rate in (torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)):
        got = run(lr=rate, foreach=foreach, **options)
        for a, b in zip(got, run(lr=0.1, foreach=foreach, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-15, atol=1e-15)


class OnDevice(torch.Tensor):
    """Says that it is not on a CPU, so that it must not be read."""

    is_cpu = False

    def item(self):
        raise AssertionError("read from the device")

    __float__ = __bool__ = item


@pytest.mark.parametrize("foreach", [True, False])
def test_a_rate_on_a_device_is_never_read(foreach):
    rate = torch.tensor(0.1, dtype=torch.float64).as_subclass(OnDevice)
    got = run(lr=rate, foreach=foreach, weight_decay=0.1)
    for a, b in zip(got, run(lr=0.1, weight_decay=0.1), strict=True):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_rate_of_zero_moves_nothing_and_a_zero_gradient_gives_no_nan(foreach):
    weights, zero = tensors(0), [torch.zeros_like(t) for t in tensors(0)]
    state = zeros(weights)
    tom_(weights, zero, state, lr=0.1, steps=[1.0] * 4, foreach=foreach)
    for rate in (0.0, torch.tensor(0.0)):
        tom_(weights, tensors(1), state, lr=rate, steps=[2.0] * 4, foreach=foreach)
    assert all(torch.equal(a, b) for a, b in zip(weights, tensors(0), strict=True))


def test_the_first_two_steps_by_hand():
    weights, state = (
        [torch.zeros(1, dtype=torch.float64)],
        zeros([torch.zeros(1, dtype=torch.float64)]),
    )
    options = {"lr": 1.0, "betas": (0.5, 0.5, 0.0), "eps": 0.0 + 1e-300}
    # g = 2: m = 1, r = 1, root 2: −1
    tom_(weights, [torch.full((1,), 2.0, dtype=torch.float64)], state, steps=[1.0], **options)
    assert weights[0].item() == pytest.approx(-1.0, abs=1e-15)
    # g = 4: m = .5·2 + 2 = 3, r = .5 + .5·2 = 1.5, root 4: −4.5/4
    tom_(weights, [torch.full((1,), 4.0, dtype=torch.float64)], state, steps=[2.0], **options)
    assert weights[0].item() == pytest.approx(-1.0 - 1.125, abs=1e-15)


@given(
    gradients=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20),
    one=st.floats(0, 0.99),
    two=st.floats(0, 0.99),
    three=st.floats(0, 0.999),
    corrected=st.booleans(),
)
def test_any_gradients_follow_the_reference(gradients, one, two, three, corrected, reference):
    plain = reference.Tom(rate=0.1, betas=(one, two, three), eps=1e-3, correct_bias=corrected)
    weights, values = [torch.ones(1, dtype=torch.float64)], [1.0]
    state = zeros(weights)
    for index, gradient in enumerate(gradients, start=1):
        values = plain.step(values, [gradient])
        given = [torch.tensor([gradient], dtype=torch.float64)]
        options = {"betas": (one, two, three), "eps": 1e-3, "correct_bias": corrected}
        tom_(weights, given, state, lr=0.1, steps=[float(index)], **options)
    # differences of gradients round at the size of the largest, over a root that may be as small as eps
    assert weights[0].item() == pytest.approx(
        values[0], rel=1e-9, abs=1e-9 * max(1, *map(abs, gradients))
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu_without_a_synchronisation():
    results = []
    for device in ("cpu", "cuda"):
        weights = [t.to(device) for t in tensors(0)]
        state = zeros(weights)
        rate = torch.tensor(0.1, dtype=torch.float64, device=device)
        for index in range(1, 6):
            gradients = [t.to(device) for t in tensors(index)]
            with no_waiting():
                tom_(
                    weights,
                    gradients,
                    state,
                    lr=rate,
                    steps=[float(index)] * 4,
                    foreach=device == "cuda",
                )
        results.append([t.cpu() for t in weights])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
