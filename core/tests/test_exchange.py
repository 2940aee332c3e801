"""Moving along the last step, swapping and adopting: on a CPU, and in the launches of a device."""

import pytest
import torch
from regrad import RegradWarning, exchange
from regrad.exchange import adopt_, extrapolate_, join_, part_, scale_, swap_
from regrad.hookspecs import LastStep
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [(3,), (2, 5), (), (4, 1, 2), (0,), (2, 3, 4, 5)]


@pytest.fixture(params=["host", "device", "pieces"])
def place(request, monkeypatch):
    """Walk the way of a CPU, of a device (on the CPU), and of tensors larger than a piece."""
    if request.param == "device":
        monkeypatch.setattr(exchange, "is_on_host", lambda tensor: False)
        monkeypatch.setattr(exchange, "GROUP", 20)
    if request.param == "pieces":
        monkeypatch.setattr(exchange, "PIECE", 7)
        monkeypatch.setattr(exchange, "ALONE_FROM", 1)


def tensors(seed, dtype=torch.float64):
    """Return tensors of every layout: dense, channels last, and with gaps in their memory."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    made.append(made[-1].to(memory_format=torch.channels_last))
    made.append(torch.randn(6, 8, generator=generator, dtype=dtype)[:, ::2])
    return made


def clones(given):
    return [torch.empty_like(tensor).copy_(tensor) for tensor in given]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_weights_go_on_by_the_formula_and_are_kept_as_they_were(decay):
    weights, before = tensors(0), clones(tensors(1))
    factors = [0.5, 1.0, 2.0, 0.0, 0.7, 0.5, 0.5, 1.0]
    wanted = [
        now + factor * (now - (1 - decay) * then)
        for now, then, factor in zip(weights, before, factors, strict=True)
    ]
    kept = clones(weights)
    extrapolate_(weights, before, [LastStep(factor=f, decay=decay) for f in factors])
    for got, want in zip(weights, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


def test_weights_go_on_as_worked_out_by_hand():
    weights, before = [torch.tensor([2.0])], [torch.tensor([4.0])]
    # the decay of .25 took 4 to 3, the step 3 to 2: half a step further is 1.5
    extrapolate_(weights, before, [LastStep(factor=0.5, decay=0.25)])
    assert weights[0].item() == pytest.approx(1.5, rel=1e-6)
    assert before[0].item() == 2.0


@pytest.mark.usefixtures("place")
def test_what_did_not_move_stays_to_the_bit():
    weights = tensors(0, torch.float32)
    before = clones(weights)
    same = clones(weights)
    extrapolate_(weights, before, [LastStep(factor=0.9)] * len(weights))
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


@pytest.mark.usefixtures("place")
def test_numbers_in_tensors_give_the_weights_of_numbers():
    one, other = tensors(0), tensors(0)
    extrapolate_(one, clones(tensors(1)), [LastStep(factor=0.5, decay=0.02)] * len(one))
    factor, decay = torch.tensor([0.5, 0.02], dtype=torch.float64)
    extrapolate_(other, clones(tensors(1)), [LastStep(factor=factor, decay=decay)] * len(one))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=1e-15)


@pytest.mark.usefixtures("place")
def test_swapping_twice_changes_no_bit():
    weights, kept = tensors(0, torch.float32), clones(tensors(1, torch.float32))
    swap_(weights, kept)
    assert all(torch.equal(a, b) for a, b in zip(weights, tensors(1, torch.float32), strict=True))
    swap_(weights, kept)
    assert all(torch.equal(a, b) for a, b in zip(weights, tensors(0, torch.float32), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(1, torch.float32), strict=True))


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_a_step_is_parted_from_its_weights_without_the_decay_in_it_and_joined_again(decay):
    weights, before = tensors(0), clones(tensors(1))
    wanted = [now - (1 - decay) * then for now, then in zip(weights, before, strict=True)]
    start, end = clones(before), clones(weights)
    decays = [decay, torch.tensor(decay, dtype=torch.float64)] * (len(weights) // 2)
    part_(weights, before, decays)
    assert all(torch.equal(a, b) for a, b in zip(weights, start, strict=True))
    for got, want in zip(before, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    join_(weights, before, decays)
    assert all(torch.equal(a, b) for a, b in zip(before, start, strict=True))
    for got, want in zip(weights, end, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-15)


def test_a_step_is_parted_and_joined_as_worked_out_by_hand():
    weights, before = [torch.tensor([2.0])], [torch.tensor([4.0])]
    # the decay of .25 took 4 to 3, the step 3 to 2
    part_(weights, before, [0.25])
    assert weights[0].item() == 4.0
    assert before[0].item() == -1.0
    before[0].mul_(2)
    join_(weights, before, [0.25])
    assert weights[0].item() == 1.0
    assert before[0].item() == 4.0


@pytest.mark.usefixtures("place")
def test_what_was_flagged_is_adopted_and_the_rest_is_left_alone():
    weights, kept = tensors(0), clones(tensors(1))
    weights[0][0] = torch.nan
    untouched = clones(kept)
    flags = [torch.tensor(index % 2 == 0) for index in range(len(kept))]
    adopt_(kept, weights, flags)
    for index, (got, live, old) in enumerate(zip(kept, weights, untouched, strict=True)):
        torch.testing.assert_close(
            got, live if index % 2 == 0 else old, rtol=0, atol=0, equal_nan=True
        )


def test_without_a_compiler_the_weights_go_on_all_the_same(monkeypatch):
    def fails(*_, **__):
        def compiled(*_):
            raise RuntimeError("no working C++ compiler found\nwhere it was looked for")

        return compiled

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(exchange, "ALONE_FROM", 4)
    exchange._compiled.cache_clear()
    weights, before = [torch.full((5,), 3.0)], [torch.full((5,), 2.0)]
    with pytest.warns(RegradWarning, match="torch.compile failed: no working C.. compiler found$"):
        extrapolate_(weights, before, [LastStep(factor=0.5, is_compiled=True)])
    exchange._compiled.cache_clear()
    assert torch.equal(weights[0], torch.full((5,), 3.5))
    assert torch.equal(before[0], torch.full((5,), 3.0))


@pytest.mark.slow
def test_the_compiled_pass_gives_the_numbers_of_the_others():
    generator = torch.Generator().manual_seed(0)
    start, before = torch.randn(2, 40_001, generator=generator)
    ends = []
    for is_compiled in (False, True):
        weights, kept = [start.clone()], [before.clone()]
        extrapolate_(weights, kept, [LastStep(factor=0.7, decay=0.01, is_compiled=is_compiled)])
        assert torch.equal(kept[0], start)
        ends.append(weights[0])
    if exchange._compiled() is None:
        pytest.skip("torch.compile finds no compiler here")
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


class Operations(TorchDispatchMode):
    """Counts operations; each is a launch or, with views, none."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def launches(self):
        views = ("view", "detach", "split", "unbind", "permute", "slice", "as_strided")
        return [name for name in self.names if not any(view in name for view in views)]


def test_the_operations_on_a_device_do_not_grow_with_the_number_of_tensors(monkeypatch):
    monkeypatch.setattr(exchange, "is_on_host", lambda tensor: False)
    counts = []
    for number in (10, 100):
        weights = [torch.ones(5) for _ in range(number)]
        kept = [torch.zeros(5) for _ in range(number)]
        flags = [torch.tensor(False)] * number
        adopt_(kept, weights, flags)  # the lengths come to the device once
        with Operations() as seen:
            adopt_(kept, weights, flags)
            extrapolate_(weights, kept, [LastStep(factor=0.5, decay=0.1)] * number)
            spares = seen.names.count("aten.empty_like.default")
            swap_(weights, kept)
            part_(weights, kept, [0.1] * number)
            join_(weights, kept, [0.1] * number)
            join_(weights, kept, [0.1] * number, goes_back=False)
            scale_(weights, [torch.tensor(0.5)] * number)
            spares = seen.names.count("aten.empty_like.default") - spares
        assert not any("_local_scalar_dense" in name for name in seen.names)
        counts.append(len(seen.launches) - spares)
    assert counts[0] == counts[1]
    assert counts[0] <= 35


@pytest.mark.usefixtures("place")
def test_a_step_is_joined_to_the_same_bits_where_the_way_back_is_not_needed():
    decays = [0.0, 0.25, 0.0, 0.25, 0.25, 0.0][: len(tensors(0))]
    decays += [0.5] * (len(tensors(0)) - len(decays))
    weights, steps = tensors(1), tensors(2)
    wanted = [weight.clone() for weight in weights]
    join_(wanted, [step.clone() for step in steps], decays)
    before = [step.clone() for step in steps]
    join_(weights, steps, decays, goes_back=False)
    for got, want, step, same in zip(weights, wanted, steps, before, strict=True):
        assert torch.equal(got, want)
        assert torch.equal(step, same)


@pytest.mark.usefixtures("place")
def test_each_tensor_is_scaled_by_its_own_number():
    scaled = tensors(1)
    factors = [torch.tensor(0.5 + index, dtype=torch.float64) for index in range(len(scaled))]
    wanted = [tensor * factor for tensor, factor in zip(scaled, factors, strict=True)]
    scale_(scaled, factors)
    for got, want in zip(scaled, wanted, strict=True):
        assert torch.equal(got, want)
