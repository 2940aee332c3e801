"""Corrections are called one by one, in order; observers wrap exactly one of them."""

import pytest
import regrad
import torch
from regrad import RegradError, hookimpl
from regrad.correction import Needs


def one_step(toys, corrections, observers=()):
    """Attach, register observers, run two steps; return the weights."""
    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, corrections)
    for observer in observers:
        attachment.engine.registry.register(observer)
    for seed in range(2):
        toys.train_step(model, optimizer, seed=seed)
    return toys.weights_of(model)


class Tracer:
    """Wrap every hook that numbers go through and note which correction ran in it."""

    def __init__(self):
        self.seen = []

    def _around(self, hook, step):
        before = [None if g is None else g.clone() for g in step.gradients]
        result = yield
        after = step.gradients
        changed = any(
            b is not None and not torch.equal(b, a) for b, a in zip(before, after, strict=True)
        )
        self.seen.append((step.index, hook, step.correction.name, changed))
        return result

    @hookimpl(wrapper=True)
    def predict_weights(self, step):
        return (yield from self._around("predict_weights", step))

    @hookimpl(wrapper=True)
    def correct_gradients(self, step):
        return (yield from self._around("correct_gradients", step))

    @hookimpl(wrapper=True)
    def correct_moments(self, step):
        return (yield from self._around("correct_moments", step))

    @hookimpl(wrapper=True)
    def after_step(self, step):
        return (yield from self._around("after_step", step))


def test_an_observer_sees_exactly_one_correction_at_a_time_in_time_order(toys):
    tracer = Tracer()
    one_step(toys, [toys.Spy(), toys.Scale(), toys.Shift(), toys.Boost(), toys.Add()], [tracer])
    first = [
        (0, "predict_weights", "shift", False),
        (0, "correct_gradients", "spy", False),
        (0, "correct_gradients", "scale", True),
        (0, "correct_gradients", "add", True),
        (0, "correct_moments", "boost", False),
        (0, "after_step", "spy", False),
    ]
    assert tracer.seen == [*first, *((1, *rest) for _, *rest in first)]


def test_observers_change_no_number_in_whatever_order_they_are_registered(toys, same_bits):
    results = []
    for observers in ([], [Tracer()], [Tracer(), Tracer()]):
        results.append(one_step(toys, [toys.Shift(), toys.Scale(), toys.Add()], observers))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_the_users_order_decides_and_not_the_order_of_registration(toys, same_bits):
    by_hand = {}
    for scale_first in (True, False):
        model = toys.Net()
        toys.loss_of(model).backward()
        by_hand[scale_first] = {
            n: p.grad * 0.5 + 1 if scale_first else (p.grad + 1) * 0.5
            for n, p in model.named_parameters()
        }
    for scale_first in (True, False):
        pair = [toys.Scale(factor=0.5), toys.Add(amount=1.0)]
        spy = toys.Spy()
        one_step(toys, [*(pair if scale_first else pair[::-1]), spy])
        assert same_bits(spy.gradients[0], by_hand[scale_first])


def test_registering_a_correction_again_by_hand_cannot_make_it_act_twice(toys, same_bits):
    model = toys.Net()
    optimizer = toys.sgd(model)
    scale, add = toys.Scale(), toys.Add()
    attachment = regrad.attach(model, optimizer, [scale, add])
    attachment.engine.registry.unregister(scale)
    attachment.engine.registry.register(scale)
    spy_model = toys.Net()
    spy_optimizer = toys.sgd(spy_model)
    regrad.attach(spy_model, spy_optimizer, [toys.Scale(), toys.Add()])
    toys.train_step(model, optimizer)
    toys.train_step(spy_model, spy_optimizer)
    assert same_bits(toys.weights_of(model), toys.weights_of(spy_model))


def test_an_observer_that_is_no_wrapper_is_refused(toys):
    class Meddler:
        @hookimpl
        def correct_gradients(self, step):
            step.gradients[0].zero_()

    model = toys.Net()
    attachment = regrad.attach(model, toys.sgd(model), [toys.Scale()])
    with pytest.raises(RegradError, match=r"must mark 'correct_gradients' with .*wrapper=True"):
        attachment.engine.registry.register(Meddler())


def test_an_observers_unmarked_methods_are_not_hooks(toys, same_bits):
    class Innocent:
        def correct_gradients(self, step):
            raise AssertionError

    assert same_bits(one_step(toys, [toys.Scale()], [Innocent()]), one_step(toys, [toys.Scale()]))


def test_an_error_in_a_correction_reaches_the_user_as_it_is(toys):
    class Breaks(toys.Scale):
        def correct_gradients(self, step):
            raise ZeroDivisionError("as raised")

    with pytest.raises(ZeroDivisionError, match="as raised"):
        one_step(toys, [Breaks()], [Tracer()])


@pytest.mark.parametrize("option", ["wrapper", "hookwrapper", "tryfirst", "trylast"])
def test_a_correction_must_not_mark_its_hooks_with_an_order(toys, option):
    class Marked(toys.Scale):
        @hookimpl(**{option: True})
        def correct_gradients(self, step):
            yield

    model = toys.Net()
    with pytest.raises(RegradError, match=f"must not mark 'correct_gradients' with .*{option}"):
        regrad.attach(model, toys.sgd(model), [Marked()])


def test_a_marked_and_an_unmarked_hook_of_the_right_name_both_work(toys, same_bits):
    class Marked(toys.Scale):
        @hookimpl
        def correct_gradients(self, step):
            super().correct_gradients(step)

    assert same_bits(one_step(toys, [Marked()]), one_step(toys, [toys.Scale()]))
    assert not same_bits(one_step(toys, [Marked()]), one_step(toys, []))


def test_a_hook_may_take_fewer_arguments_than_the_specification_names(toys):
    class Quiet(toys.Spy):
        def after_step(self):
            self.learned += 1

        def setup(self):
            self.learned = 10

    quiet = Quiet()
    one_step(toys, [quiet])
    assert quiet.learned == 12


def test_a_misspelt_marked_hook_is_refused(toys):
    class Misspelt(toys.Scale):
        @hookimpl
        def correct_gradient(self, step):
            pass

    model = toys.Net()
    with pytest.raises(Exception, match="correct_gradient"):
        regrad.attach(model, toys.sgd(model), [Misspelt()])
    regrad.attach(model, toys.sgd(model), [toys.Scale()])


def test_a_misspelt_unmarked_hook_is_refused_with_the_near_name(toys):
    class Misspelt(regrad.Correction):
        name = "misspelt"
        needs = Needs(stages=("gradient",))

        def correct_gradient(self, step):
            pass

    model = toys.Net()
    message = (
        "'misspelt' declares stage 'gradient' but has no method 'correct_gradients'; did you mean"
    )
    with pytest.raises(RegradError, match=f"{message} 'correct_gradient'"):
        regrad.attach(model, toys.sgd(model), [Misspelt()])


def test_a_correction_that_implements_no_stage_is_refused(toys):
    class Nothing(regrad.Correction):
        name = "nothing"
        needs = Needs(stages=())

    model = toys.Net()
    with pytest.raises(RegradError, match=r"'nothing' implements no stage; stages: .*gradient"):
        regrad.attach(model, toys.sgd(model), [Nothing()])


def test_a_hook_without_its_stage_declared_is_refused(toys):
    class Undeclared(toys.Scale):
        def predict_weights(self, step):
            return None

    model = toys.Net()
    with pytest.raises(
        RegradError,
        match="'scale' implements 'predict_weights' but does not declare stage 'weights'",
    ):
        regrad.attach(model, toys.sgd(model), [Undeclared()])


def test_a_correction_without_name_or_needs_is_refused(toys):
    class Nameless(regrad.Correction):
        needs = Needs(stages=("gradient",))

    model = toys.Net()
    with pytest.raises(RegradError, match="Nameless must declare name"):
        regrad.attach(model, toys.sgd(model), [Nameless()])


def test_setup_runs_in_order_before_any_hook_is_on_the_model(toys, hooks_on):
    seen = []
    model = toys.Net()
    optimizer = toys.sgd(model)
    before = hooks_on(model, optimizer)

    class First(toys.Scale):
        def setup(self, attachment):
            seen.append(
                (self.name, attachment.model is model, hooks_on(model, optimizer) == before)
            )

    class Second(toys.Add):
        def setup(self, attachment):
            seen.append(
                (self.name, self.attachment is attachment, hooks_on(model, optimizer) == before)
            )

    regrad.attach(model, optimizer, [First(), Second()])
    assert seen == [("scale", True, True), ("add", True, True)]


def test_hooks_run_without_recording_a_graph(toys):
    class Checks(toys.Scale):
        def correct_gradients(self, step):
            assert not torch.is_grad_enabled()
            step.parameters[0].mul_(1)

        def after_step(self, step):
            assert not torch.is_grad_enabled()

    one_step(toys, [Checks()])


@pytest.mark.parametrize(
    "hook", ["setup", "wrap_criterion", "predict_weights", "correct_gradients", "after_step"]
)
def test_an_exception_says_in_which_correction_and_hook_it_came_up(toys, hook, hooks_on):
    class Fails(regrad.Correction):
        name = "fails"
        needs = Needs(stages=("criterion", "weights", "gradient"))

        def setup(self, attachment):
            self.do("setup")

        def wrap_criterion(self, criterion):
            self.do("wrap_criterion")
            return criterion

        def predict_weights(self, step):
            self.do("predict_weights")

        def correct_gradients(self, step):
            self.do("correct_gradients")

        def after_step(self, step):
            self.do("after_step")

        def do(self, here):
            if here == hook:
                raise ZeroDivisionError

    model = toys.Net()
    optimizer = toys.sgd(model)
    before = hooks_on(model, optimizer)
    with pytest.raises(ZeroDivisionError) as caught:
        attachment = regrad.attach(model, optimizer, [Fails()], torch.nn.CrossEntropyLoss())
        toys.train_step(model, optimizer, criterion=attachment.criterion)
    assert caught.value.__notes__ == [f"in correction 'fails', hook {hook!r}"]
    if hook in ("setup", "wrap_criterion"):
        assert hooks_on(model, optimizer) == before
