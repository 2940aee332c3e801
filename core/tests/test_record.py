"""The record of the first training forward."""

import gc
import warnings
import weakref

import pytest
import regrad
import torch
from regrad.correction import Needs


@pytest.fixture
def reading(toys):
    """A correction that needs the record."""

    class Reads(toys.Spy):
        needs = Needs(stages=("gradient",), record=True)

    return Reads


def test_the_record_has_names_order_shapes_and_the_head(toys, reading):
    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [reading()])
    assert attachment.record.calls == ()
    toys.train_step(model, optimizer)
    calls = attachment.record.calls
    assert [call.name for call in calls] == ["body", "norm", "head"]
    assert [(call.inputs, call.outputs) for call in calls] == [
        (((8, 3),), ((8, 4),)),
        (((8, 4),), ((8, 4),)),
        (((8, 4),), ((8, 2),)),
    ]
    assert [call.makes_output for call in calls] == [False, False, True]


def test_there_is_no_record_where_nobody_needs_it(toys):
    model = toys.Net()
    assert regrad.attach(model, toys.sgd(model), [toys.Scale()]).record is None


def test_only_the_first_training_forward_is_recorded_and_then_the_hooks_are_gone(
    toys, reading, hooks_on
):
    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [reading()])
    with_hooks = hooks_on(model.body, optimizer)
    model.eval()
    model(torch.ones(5, 3, dtype=torch.float64))
    assert attachment.record.calls == ()
    model.train()
    toys.train_step(model, optimizer)
    first = attachment.record.calls
    assert first[0].inputs == ((8, 3),)
    assert (
        sum(map(len, hooks_on(model.body, optimizer).values()))
        == sum(map(len, with_hooks.values())) - 1
    )
    model(torch.ones(7, 3, dtype=torch.float64))
    assert attachment.record.calls is first


def test_the_logits_of_a_mapping_are_the_output(toys, reading):
    model = toys.Messy()
    attachment = regrad.attach(model, toys.sgd(model), [reading()])
    inputs, labels = toys.batch(dtype=torch.float32)
    model(inputs, labels)["loss"].backward()
    assert [call.name for call in attachment.record.calls if call.makes_output] == ["head"]


def test_a_forward_that_raises_leaves_nothing_in_the_record(toys, reading):
    class Fails(toys.Net):
        fails = True

        def forward(self, x):
            hidden = self.body(x)
            if self.fails:
                raise ZeroDivisionError
            return self.head(self.norm(torch.tanh(hidden)))

    model = Fails()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [reading()])
    with pytest.raises(ZeroDivisionError):
        toys.loss_of(model)
    model.fails = False
    toys.train_step(model, optimizer)
    assert [call.name for call in attachment.record.calls] == ["body", "norm", "head"]


def test_a_module_called_twice_is_recorded_twice(toys, reading):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Twice()
    record = regrad.attach(model, toys.sgd(model), [reading()]).record
    model(torch.ones(2, 3))
    assert [(call.name, call.makes_output) for call in record.calls] == [
        ("layer", False),
        ("layer", True),
    ]


def test_detach_before_the_first_forward_takes_the_hooks_away(toys, reading, hooks_on):
    model = toys.Net()
    optimizer = toys.sgd(model)
    before = hooks_on(model, optimizer)
    regrad.attach(model, optimizer, [reading()]).detach()
    assert hooks_on(model, optimizer) == before


def test_a_model_compiled_before_attach_has_no_record(toys, reading):
    model = toys.Net()
    compiled = torch.compile(model, backend="eager")
    assert regrad.attach(compiled, toys.sgd(model), [reading()]).record is None


def test_a_model_compiled_in_place_before_attach_has_no_record_either(toys, reading):
    model = toys.Net()
    model.compile(backend="eager")
    assert regrad.attach(model, toys.sgd(model), [reading()]).record is None


def test_the_record_keeps_no_tensor_alive(toys, reading):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [reading()])
    alive = []
    model.body.register_forward_hook(
        lambda module, inputs, output: alive.append(weakref.ref(output))
    )
    toys.train_step(model, optimizer)
    gc.collect()
    assert [reference() for reference in alive] == [None]


def test_an_output_that_nothing_else_holds_is_gone_before_the_recorded_forward_ends(reading):
    alive = []

    class Drops(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(3, 4)
            self.last = torch.nn.Linear(4, 2)

        def forward(self, inputs):
            output = self.first(inputs)
            gone = weakref.ref(output)
            doubled = output * 2  # keeps no operand for its backward pass
            del output
            alive.append(gone() is not None)
            return self.last(doubled)

    model = Drops()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = regrad.attach(model, optimizer, [reading()])
    model(torch.ones(5, 3)).sum().backward()
    assert alive == [False]
    assert [call.makes_output for call in attachment.record.calls] == [False, True]


def test_nothing_beside_the_logits_makes_two_modules_the_head(toys, reading):
    class WithNone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Pair(3)
            self.head = Pair(3)

        def forward(self, inputs):
            hidden, _ = self.body(inputs)
            return self.head(hidden)

    class Pair(torch.nn.Linear):
        def __init__(self, width):
            super().__init__(width, width)

        def forward(self, inputs):
            return super().forward(inputs), None

    model = WithNone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = regrad.attach(model, optimizer, [reading()])
    model(torch.ones(5, 3))[0].sum().backward()
    assert [call.makes_output for call in attachment.record.calls] == [False, True]


def test_nested_tensors_have_no_shape_in_the_record(toys, reading):
    class Ragged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x)

    model = Ragged()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = regrad.attach(model, optimizer, [reading()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
        ragged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
        model(ragged)
    (call,) = attachment.record.calls
    assert (call.name, call.inputs, call.makes_output) == ("layer", (), True)


def test_of_several_modules_each_first_forward_is_recorded_in_the_order_of_the_calls(
    toys, reading, hooks_on
):
    first, second, unused = (toys.Net() for _ in range(3))
    parts = [second, unused, first]
    optimizer = torch.optim.SGD(torch.nn.ModuleList(parts).parameters(), lr=0.1)
    before = [hooks_on(part.body, optimizer) for part in parts]
    attachment = regrad.attach(parts, optimizer, [reading()])
    inputs = torch.ones(5, 3, dtype=torch.float64)
    for _ in range(2):
        first(inputs)
        second(inputs)
    calls = attachment.record.calls
    assert [call.name for call in calls] == [
        *("2.body", "2.norm", "2.head", "2"),
        *("0.body", "0.norm", "0.head", "0"),
    ]
    assert [call.name for call in calls if call.makes_output] == ["0.head", "0"]
    assert [len(part.body._forward_hooks) for part in parts] == [0, 1, 0]
    attachment.detach()
    for part, hooks in zip(parts, before, strict=True):
        assert hooks_on(part.body, optimizer) == hooks
