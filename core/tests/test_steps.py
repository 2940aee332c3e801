"""Which calls of `step` are a step: of subclasses and wrappers, and those that raised and are tried again."""

import contextlib
import copy

import pytest
import regrad
import torch
from regrad import RegradError

STEPS = 4


class Once(torch.optim.RAdam):
    """The usual subclass: it calls `super().step()`."""

    def step(self, closure=None):
        return super().step(closure)


class Deeper(Once):
    """Two levels deep, and with gradients of its own."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.steps = getattr(self, "steps", 0) + 1
        return loss


class TriesAgain(torch.optim.RAdam):
    """Catches what its base class raises, and calls it again."""

    fails = True

    def step(self, closure=None):
        with contextlib.suppress(OSError):
            return super().step(closure)
        return super().step(closure)


class Fails(torch.optim.RAdam):
    """Raises before it moves anything while `fails` is set."""

    fails = False

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.fails:
            raise OSError("out of memory")
        super().step()
        return loss


class Inner(TriesAgain, Fails):
    """A base class that raises at first, under one that tries again."""


class Outer:
    """Wraps an optimizer, and is none: the commonest wrapper."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


class OuterOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer and is one, with hooks of its own."""

    def __init__(self, optimizer):
        super().__init__([p for g in optimizer.param_groups for p in g["params"]], {})
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.seen = []
        self.register_step_pre_hook(lambda *_: self.seen.append("before"))
        self.register_step_post_hook(lambda *_: self.seen.append("after"))

    def step(self, closure=None):
        return self.optimizer.step(closure)


def chain(toys):
    """Return corrections of every moment, whose numbers change with every call too much."""
    return [toys.Push(amount=0.02), toys.Scale(), toys.Boost(amount=0.01), toys.Spy(), toys.Tally()]


def by_hand(toys):
    """Return the weights of a training with an optimizer whose class is torch's own."""
    model = toys.Net()
    optimizer = torch.optim.RAdam(model.parameters(), lr=0.05)
    regrad.attach(model, optimizer, chain(toys))
    for seed in range(STEPS):
        toys.train_step(model, optimizer, seed=seed)
    return toys.weights_of(model)


def closure_of(toys, model, optimizer, seed):
    def closure():
        optimizer.zero_grad()
        loss = toys.loss_of(model, seed=seed)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("wrap", [lambda o: o, Outer, OuterOptimizer], ids=["", "Outer", "Both"])
@pytest.mark.parametrize("kind", [Once, Deeper])
@pytest.mark.parametrize("base_is_hooked", [True, False])
@pytest.mark.parametrize("with_closure", [True, False])
def test_a_step_that_calls_the_step_of_its_base_class_is_one_step(
    toys, same_bits, kind, base_is_hooked, wrap, with_closure
):
    # Torch hooks the step of a class when one is made: of the base class only if it was made too.
    fresh = type(
        kind.__name__, (kind,), {"step": lambda self, closure=None: kind.step(self, closure)}
    )
    if base_is_hooked:
        kind([torch.nn.Parameter(torch.zeros(1))])
        torch.optim.RAdam([torch.nn.Parameter(torch.zeros(1))])
    model = toys.Net()
    inner = fresh(model.parameters(), lr=0.05)
    optimizer = wrap(inner)
    corrections = chain(toys)
    attachment = regrad.attach(model, optimizer, corrections)
    for seed in range(STEPS):
        closure = closure_of(toys, model, inner, seed)
        if with_closure:
            assert optimizer.step(closure).requires_grad
        else:
            closure()
            optimizer.step()
    assert attachment.metrics()["steps_applied"] == STEPS
    assert corrections[3].indices == list(range(STEPS))
    assert corrections[3].learned == STEPS
    assert corrections[0].calls == STEPS
    assert same_bits(toys.weights_of(model), by_hand(toys))
    if wrap is OuterOptimizer:
        assert optimizer.seen == ["before", "after"] * STEPS


def test_a_subclass_that_catches_its_base_class_and_calls_it_again_is_one_step(toys, same_bits):
    torch.optim.RAdam([torch.nn.Parameter(torch.zeros(1))])
    model = toys.Net()
    optimizer = Inner(model.parameters(), lr=0.05)
    attachment = regrad.attach(model, optimizer, chain(toys))
    for seed in range(STEPS):
        optimizer.fails = seed == 1
        closure_of(toys, model, optimizer, seed)()
        if seed == 1:
            with pytest.raises(OSError, match="memory"):
                optimizer.step()
            optimizer.fails = False
        optimizer.step()
    assert attachment.metrics()["steps_applied"] == STEPS
    assert same_bits(toys.weights_of(model), by_hand(toys))


# ---- a step that raised


class Breaks:
    """A correction of gradients that raises at its first call, before or after it acted."""

    def __new__(cls, toys, name, *, acts_first):
        class Broken(toys.Scale):
            def correct_gradients(self, step):
                if acts_first:
                    super().correct_gradients(step)
                if not getattr(self, "broke", False):
                    self.broke = True
                    raise OSError("out of memory")
                if not acts_first:
                    super().correct_gradients(step)

        Broken.name = name
        return Broken(factor=0.5)


def failing(toys):
    """Return a model and an optimizer that raises where it is told to, attached, and the corrections."""
    model = toys.Net()
    optimizer = Fails(model.parameters(), lr=0.05)
    corrections = chain(toys)
    return model, optimizer, corrections, regrad.attach(model, optimizer, corrections)


@pytest.mark.parametrize("again", ["the same gradients", "a new backward", "accumulated in place"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_step_that_raised_and_is_tried_again_is_corrected_once(toys, same_bits, again, times):
    model, optimizer, corrections, attachment = failing(toys)
    for seed in range(STEPS):
        closure_of(toys, model, optimizer, seed)()
        for _ in range(times if seed == 2 else 0):
            optimizer.fails = True
            with pytest.raises(OSError, match="memory"):
                optimizer.step()
            optimizer.fails = False
            if again == "a new backward":
                closure_of(toys, model, optimizer, seed)()
            elif again == "accumulated in place":
                optimizer.zero_grad(set_to_none=False)
                toys.loss_of(model, seed=seed).backward()
        optimizer.step()
    assert attachment.metrics()["steps_applied"] == STEPS
    assert corrections[3].learned == STEPS
    gradients = corrections[3].gradients
    if again == "the same gradients":
        assert len(gradients) == STEPS
        assert same_bits(toys.weights_of(model), by_hand(toys))
    else:
        assert len(gradients) == STEPS + times
        for name, gradient in gradients[2].items():
            torch.testing.assert_close(gradients[-2][name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_a_correction_that_raised_is_tried_again_and_those_before_it_are_not(
    toys, same_bits, place, again
):
    weights = []
    for breaks in (False, True):
        model = toys.Net()
        optimizer = toys.sgd(model)
        corrections = [toys.Add(amount=0.1), toys.Boost(amount=0.01)]
        broken = Breaks(toys, "broken", acts_first=False)
        broken.broke = not breaks
        corrections.insert(place, broken)
        attachment = regrad.attach(model, optimizer, corrections)
        for seed in range(STEPS):
            closure = closure_of(toys, model, optimizer, seed)
            closure()
            if breaks and seed == 0:
                with pytest.raises(OSError, match="memory"):
                    optimizer.step()
                if again:
                    closure()
            optimizer.step()
        assert attachment.metrics()["steps_applied"] == STEPS
        weights.append(toys.weights_of(model))
    assert same_bits(*weights)


def test_a_closure_that_raised_is_tried_again(toys, same_bits):
    model, optimizer, corrections, attachment = failing(toys)

    def breaks():
        optimizer.zero_grad()
        toys.loss_of(model, seed=1).backward()
        raise OSError("no data")

    for seed in range(STEPS):
        if seed == 1:
            with pytest.raises(OSError, match="data"):
                optimizer.step(breaks)
        optimizer.step(closure_of(toys, model, optimizer, seed))
    assert attachment.metrics()["steps_applied"] == STEPS
    assert len(corrections[3].gradients) == STEPS
    assert same_bits(toys.weights_of(model), by_hand(toys))


def test_an_optimizer_that_raised_after_its_closure_corrects_the_gradients_of_the_next_one(toys):
    model, optimizer, corrections, attachment = failing(toys)
    optimizer.fails = True
    with pytest.raises(OSError, match="memory"):
        optimizer.step(closure_of(toys, model, optimizer, 0))
    optimizer.fails = False
    optimizer.step(closure_of(toys, model, optimizer, 0))
    first, second = corrections[3].gradients
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=0, atol=1e-12)
    assert attachment.metrics()["steps_applied"] == 1


def test_an_abandoned_step_is_no_step_and_the_next_batch_is_corrected(toys):
    model, optimizer, corrections, attachment = failing(toys)
    for seed in range(3):
        closure_of(toys, model, optimizer, seed)()
        optimizer.fails = seed == 1
        with contextlib.suppress(OSError):
            optimizer.step()
    assert attachment.metrics()["steps_applied"] == 2
    assert len(corrections[3].gradients) == 3
    assert corrections[3].indices == [0, 1, 1]
    assert corrections[3].learned == 2


class Fused(torch.optim.SGD):
    """Divides by the scale itself, as fused optimizers do, and raises while `fails` is set."""

    _step_supports_amp_scaling = True
    fails = False
    grad_scale = None
    found_inf = None

    @torch.no_grad()
    def step(self, closure=None):
        if self.fails:
            raise OSError("out of memory")
        if self.grad_scale is not None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.div_(self.grad_scale)
        if self.found_inf:
            return None
        return super().step(closure)


@pytest.mark.parametrize("raises", ["never", "in the optimizer", "in a correction"])
def test_gradients_are_unscaled_once_also_where_the_step_is_tried_again(toys, same_bits, raises):
    weights = []
    for scale in (1.0, 1024.0):
        model = toys.Net()
        optimizer = Fused(model.parameters(), lr=0.1, momentum=0.9)
        broken = Breaks(toys, "broken", acts_first=False)
        broken.broke = scale == 1.0 or raises != "in a correction"
        attachment = regrad.attach(model, optimizer, [toys.Add(amount=0.1), broken])
        for seed in range(STEPS):
            optimizer.zero_grad()
            (toys.loss_of(model, seed=seed) * scale).backward()
            optimizer.grad_scale = torch.tensor(scale, dtype=torch.float64)
            optimizer.fails = raises == "in the optimizer" and scale != 1.0 and seed == 1
            with contextlib.suppress(OSError):
                optimizer.step()
            if attachment.engine.applied == seed:
                optimizer.fails = False
                optimizer.grad_scale = torch.tensor(scale, dtype=torch.float64)
                optimizer.step()
        assert attachment.metrics()["steps_applied"] == STEPS
        weights.append(toys.weights_of(model))
    assert same_bits(*weights)


# ---- those who patch the step


def test_schedulers_that_patch_the_step_leave_it_one_step(toys, same_bits):
    weights = []
    for attach_first in (True, False, None):
        model = toys.Net()
        optimizer = Deeper(model.parameters(), lr=0.05)
        attachment = regrad.attach(model, optimizer, chain(toys)) if attach_first else None
        schedules = [
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            torch.optim.lr_scheduler.StepLR(optimizer, 2),
        ]
        if attachment is None:
            attachment = regrad.attach(model, optimizer, chain(toys))
        for seed in range(STEPS):
            toys.train_step(model, optimizer, seed=seed)
            for schedule in schedules:
                schedule.step()
        assert attachment.metrics()["steps_applied"] == STEPS
        weights.append(toys.weights_of(model))
    assert same_bits(weights[0], weights[1])


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ between machines
@pytest.mark.parametrize("kind", [torch.optim.RAdam, Once])
def test_a_compiled_step_is_corrected_once(toys, kind):
    torch._dynamo.reset()
    model = toys.Net()
    optimizer = kind(model.parameters(), lr=0.05)
    corrections = chain(toys)
    attachment = regrad.attach(model, optimizer, corrections)
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(STEPS):
        closure_of(toys, model, optimizer, seed)()
        step()
    torch._dynamo.reset()
    assert attachment.metrics()["steps_applied"] == STEPS
    assert corrections[3].indices == list(range(STEPS))
    for name, weight in by_hand(toys).items():
        # Compiled, torch computes the step's numbers in another precision; a correction that
        # acted twice would be a million times farther off.
        torch.testing.assert_close(toys.weights_of(model)[name], weight, rtol=0, atol=1e-7)


def test_a_step_of_a_copy_of_the_optimizer_is_none_of_ours(toys):
    model, optimizer, _, attachment = failing(toys)
    toys.train_step(model, optimizer)
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    twin.step()
    assert attachment.metrics()["steps_applied"] == 1


def test_a_step_inside_a_hook_of_another_optimizer_is_a_step(toys):
    """Two optimizers where one steps the other in its post hook."""
    model, other = toys.Net(), toys.Net(seed=1)
    optimizer, outer = toys.sgd(model), toys.sgd(other)
    attachment = regrad.attach(model, optimizer, [toys.Scale()])
    outer.register_step_post_hook(lambda *_: optimizer.step())
    for seed in range(STEPS):
        optimizer.zero_grad()
        outer.zero_grad()
        (toys.loss_of(model, seed=seed) + toys.loss_of(other, seed=seed)).backward()
        outer.step()
    assert attachment.metrics()["steps_applied"] == STEPS


def test_a_second_closure_call_after_a_retry_is_still_refused_where_one_is_declared(toys):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
                closure()
            return super().step()

    model = toys.Net()
    optimizer = Twice(model.parameters(), lr=0.1)
    regrad.attach(model, optimizer, [toys.Boost()])
    for _ in range(2):
        with pytest.raises(RegradError, match="must see one closure call per step, got 2"):
            optimizer.step(closure_of(toys, model, optimizer, 0))
