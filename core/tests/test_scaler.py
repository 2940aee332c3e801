"""Gradient scaling: corrections see true gradients, and an overflow touches nothing."""

import pytest
import regrad
import torch

OPTIMIZERS = {
    "sgd": lambda p, fused: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=fused),
    "adamw": lambda p, fused: torch.optim.AdamW(p, lr=0.1, fused=fused),
}


class Loop:
    """A training loop with a scaler, as PyTorch's documentation writes it."""

    def __init__(self, toys, corrections, *, name="sgd", fused=True, scale=1024.0, unscale=False):
        self.toys, self.unscale = toys, unscale
        self.model = toys.Net(dtype=torch.float32)
        self.optimizer = OPTIMIZERS[name](self.model.parameters(), fused)
        self.attachment = regrad.attach(self.model, self.optimizer, corrections)
        self.scaler = torch.amp.GradScaler(
            device="cpu", init_scale=scale, enabled=scale is not None
        )

    def step(self, *, seed=0, overflow=False):
        self.optimizer.zero_grad()
        loss = self.toys.loss_of(self.model, seed=seed)
        self.scaler.scale(loss * float("inf") if overflow else loss).backward()
        if self.unscale:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def test_a_fused_optimizer_on_the_cpu_does_its_own_unscaling_which_the_other_tests_need(toys):
    for make in OPTIMIZERS.values():
        assert make(toys.Net().parameters(), True)._step_supports_amp_scaling
        assert not getattr(
            make(toys.Net().parameters(), False), "_step_supports_amp_scaling", False
        )


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_corrections_see_unscaled_gradients_and_the_result_is_that_without_a_scaler(
    toys, name, fused, unscale
):
    runs = []
    for scale in (None, 1024.0):
        spy = toys.Spy()
        corrections = [spy, toys.Push(amount=0.1), toys.Add(amount=0.01)]
        loop = Loop(
            toys,
            corrections,
            name=name,
            fused=fused,
            scale=scale,
            unscale=unscale and scale is not None,
        )
        for seed in range(4):
            loop.step(seed=seed)
        runs.append((spy.gradients, toys.weights_of(loop.model), spy.learned))
    for plain, scaled in zip(runs[0][0], runs[1][0], strict=True):
        for key in plain:
            # A power of two scales without rounding; fused and unscaled kernels order their sums alike.
            torch.testing.assert_close(scaled[key], plain[key], rtol=1e-6, atol=1e-8)
    for key, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][key], value, rtol=1e-5, atol=1e-6)
    assert runs[1][2] == 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_in_a_fused_optimizer_restores_and_calls_no_correction(toys, same_bits, name):
    shift, spy = toys.Shift(), toys.Spy()
    loop = Loop(toys, [shift, spy, toys.Boost()], name=name)
    loop.step()
    before = toys.weights_of(loop.model), loop.optimizer.state_dict()
    state = {
        n: t.clone()
        for i, s in before[1]["state"].items()
        for n, t in ((f"{i}{k}", v) for k, v in s.items())
    }
    loop.step(seed=1, overflow=True)
    after = loop.optimizer.state_dict()["state"]
    assert same_bits(toys.weights_of(loop.model), before[0])
    assert same_bits({f"{i}{k}": v for i, s in after.items() for k, v in s.items()}, state)
    assert (spy.indices, spy.learned) == ([0], 1)
    metrics = loop.attachment.metrics()
    assert (metrics["steps_applied"], metrics["steps_skipped"]) == (1, 1)
    assert loop.attachment.receipt()["steps_skipped"] == 1
    loop.step(seed=2)
    assert spy.indices == [0, 1]
    assert shift.calls == 3
    assert loop.attachment.metrics()["steps_applied"] == 2


def test_after_an_overflow_training_goes_on_as_if_the_batch_had_not_been(toys, same_bits):
    results = []
    for overflow in (False, True):
        loop = Loop(toys, [toys.Push(amount=0.1), toys.Add(amount=0.01), toys.Boost(amount=0.01)])
        for seed in range(4):
            if overflow and seed == 2:
                loop.step(seed=50, overflow=True)
                loop.scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0)
            loop.step(seed=seed)
        results.append(toys.weights_of(loop.model))
    assert same_bits(*results)


@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_outside_the_optimizer_leaves_the_window_open_and_harmless(
    toys, same_bits, unscale
):
    shift, spy = toys.Shift(), toys.Spy()
    loop = Loop(toys, [shift, spy, toys.Boost()], fused=False, unscale=unscale)
    loop.step()
    true = toys.weights_of(loop.model)
    loop.step(seed=1, overflow=True)
    assert not same_bits(toys.weights_of(loop.model), true)
    assert same_bits(dict(loop.model.state_dict()), true)
    assert (spy.indices, spy.learned, shift.calls) == ([0], 1, 2)
    loop.step(seed=2)
    assert shift.calls == 2
    assert spy.indices == [0, 1]
    assert same_bits(spy.weights[1], true)


def test_an_evaluation_closes_the_window_that_an_overflow_left_open(toys, same_bits):
    shift = toys.Shift()
    loop = Loop(toys, [shift], fused=False)
    true = toys.weights_of(loop.model)
    loop.step(overflow=True)
    loop.model.eval()
    toys.loss_of(loop.model)
    assert same_bits(toys.weights_of(loop.model), true)
    assert shift.calls == 1


def test_a_skipped_step_is_counted_without_any_correction_too(toys):
    loop = Loop(toys, [])
    loop.step()
    loop.step(overflow=True)
    metrics = loop.attachment.metrics()
    assert (metrics["steps_applied"], metrics["steps_skipped"]) == (1, 1)


def test_the_gradient_of_a_parameter_frozen_after_backward_is_unscaled_as_well(toys):
    results = []
    for scale in (None, 1024.0):
        loop = Loop(toys, [toys.Spy()], scale=scale)
        loop.scaler.scale(toys.loss_of(loop.model)).backward()
        loop.model.head.requires_grad_(False)
        loop.scaler.step(loop.optimizer)
        results.append(toys.weights_of(loop.model)["head.weight"])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_needs_no_scaler_and_corrections_see_float32_gradients(toys):
    model = toys.Net(dtype=torch.float32)
    optimizer = toys.sgd(model)
    spy = toys.Spy()
    regrad.attach(model, optimizer, [toys.Shift(), spy])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = toys.loss_of(model)
    loss.backward()
    optimizer.step()
    assert {gradient.dtype for gradient in spy.gradients[0].values()} == {torch.float32}


def test_gradients_in_bfloat16_are_corrected_and_measured_in_float32(toys):
    model = toys.Net(dtype=torch.bfloat16)
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [toys.Shift(), toys.Scale(factor=0.5)])
    toys.train_step(model, optimizer)
    # Halving is exact in any binary format.
    assert attachment.metrics()["scale/gradient/relative_change"] == pytest.approx(0.5, abs=1e-6)
    assert attachment.metrics()["scale/gradient/cosine"] == pytest.approx(1, abs=1e-6)
