"""Compiled modules: one frame, no break, no recompilation, the numbers of the eager loop."""

import pytest
import regrad
import torch
from regrad import RegradError, RegradWarning
from torch._dynamo.utils import counters

# Where a graph breaks, dynamo itself looks at `.grad` of what crosses the break, and hides the warning by a log filter.
GRAPH_MAY_BREAK = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


class CountingBackend:
    """Runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend():
    torch._dynamo.reset()
    counters.clear()
    yield CountingBackend()
    torch._dynamo.reset()


def eager_result(toys, corrections, steps=4):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, corrections)
    for seed in range(steps):
        toys.train_step(model, optimizer, seed=seed)
    return toys.weights_of(model)


def compiled_before(model, optimizer, corrections, backend):
    compiled = torch.compile(model, backend=backend)
    regrad.attach(compiled, optimizer, corrections)
    return compiled


def compiled_after(model, optimizer, corrections, backend):
    regrad.attach(model, optimizer, corrections)
    return torch.compile(model, backend=backend)


def inner_of_compiled(model, optimizer, corrections, backend):
    compiled = torch.compile(model, backend=backend)
    regrad.attach(model, optimizer, corrections)
    return compiled


def compiled_in_place_before(model, optimizer, corrections, backend):
    model.compile(backend=backend)
    regrad.attach(model, optimizer, corrections)
    return model


def compiled_in_place_after(model, optimizer, corrections, backend):
    regrad.attach(model, optimizer, corrections)
    model.compile(backend=backend)
    return model


WAYS = [
    compiled_before,
    compiled_after,
    inner_of_compiled,
    compiled_in_place_before,
    compiled_in_place_after,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_module_is_one_frame_without_break_or_recompilation(
    toys, same_bits, backend, way
):
    model = toys.Net()
    optimizer = toys.sgd(model)
    shift, spy = toys.Push(amount=0.1), toys.Spy()
    compiled = way(model, optimizer, [shift, toys.Scale(), toys.Boost(amount=0.01), spy], backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            toys.train_step(compiled, optimizer, seed=seed)
    assert backend.graphs == 1
    assert dict(counters["graph_break"]) == {}
    assert counters["frames"]["total"] == 1
    assert (shift.calls, spy.indices) == (4, [0, 1, 2, 3])
    corrections = [toys.Push(amount=0.1), toys.Scale(), toys.Boost(amount=0.01)]
    assert same_bits(toys.weights_of(model), eager_result(toys, corrections))


def test_a_model_already_compiled_and_called_can_still_get_corrections_without_submodule_hooks(
    toys, same_bits, backend
):
    model = toys.Net()
    compiled = torch.compile(model, backend=backend)
    toys.loss_of(compiled).backward()
    optimizer = toys.sgd(model)
    shift = toys.Push(amount=0.1)
    regrad.attach(compiled, optimizer, [shift, toys.Scale()])
    for seed in range(4):
        toys.train_step(compiled, optimizer, seed=seed)
    assert backend.graphs == 1
    assert shift.calls == 4
    assert same_bits(
        toys.weights_of(model), eager_result(toys, [toys.Push(amount=0.1), toys.Scale()])
    )


@pytest.mark.parametrize("attach_to_compiled", [False, True])
def test_the_compiled_and_the_inner_module_are_one_whichever_is_called(
    toys, same_bits, backend, attach_to_compiled
):
    model = toys.Net()
    optimizer = toys.sgd(model)
    compiled = torch.compile(model, backend=backend)
    shift = toys.Push(amount=0.1)
    regrad.attach(compiled if attach_to_compiled else model, optimizer, [shift, toys.Scale()])
    for seed in range(4):
        toys.train_step(compiled if seed % 2 else model, optimizer, seed=seed)
    assert shift.calls == 4
    assert same_bits(
        toys.weights_of(model), eager_result(toys, [toys.Push(amount=0.1), toys.Scale()])
    )


def test_evaluation_of_a_compiled_module_closes_the_window(toys, same_bits, backend):
    model = toys.Net()
    optimizer = toys.sgd(model)
    compiled = torch.compile(model, backend=backend)
    shift = toys.Shift()
    regrad.attach(compiled, optimizer, [shift])
    true = toys.weights_of(model)
    toys.loss_of(compiled).backward()
    assert same_bits(dict(model.state_dict()), true)
    assert same_bits(
        dict(compiled.state_dict()), {f"_orig_mod.{name}": value for name, value in true.items()}
    )
    compiled.eval()
    toys.loss_of(compiled)
    assert same_bits(toys.weights_of(model), true)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_submodule_hook_after_the_first_compiled_call_is_refused(
    toys, backend, hooks_on, in_place
):
    model = toys.Net()
    optimizer = toys.sgd(model)
    if in_place:
        model.compile(backend=backend)
    compiled = model if in_place else torch.compile(model, backend=backend)
    toys.loss_of(compiled)
    hooks = hooks_on(model, optimizer)
    with pytest.raises(
        RegradError, match="submodule hooks must be set before the first compiled call"
    ):
        regrad.attach(compiled, optimizer, [toys.Listen()])
    assert hooks_on(model, optimizer) == hooks


@GRAPH_MAY_BREAK
def test_a_submodule_hook_before_the_first_compiled_call_fires_at_every_forward(toys, backend):
    model = toys.Net()
    optimizer = toys.sgd(model)
    compiled = torch.compile(model, backend=backend)
    listen = toys.Listen()
    regrad.attach(compiled, optimizer, [listen])
    for seed in range(3):
        toys.train_step(compiled, optimizer, seed=seed)
    assert listen.heard == [(8, 2)] * 3


def test_a_submodule_hook_is_refused_too_where_the_graph_of_another_model_of_that_class_would_be_reused(
    toys, backend
):
    toys.loss_of(torch.compile(toys.Net(), backend=backend))
    model = toys.Net(seed=1)
    compiled = torch.compile(model, backend=backend)
    with pytest.raises(
        RegradError, match="submodule hooks must be set before the first compiled call"
    ):
        regrad.attach(compiled, toys.sgd(model), [toys.Listen()])
    torch.compiler.reset()
    regrad.attach(compiled, toys.sgd(model), [toys.Listen()])


def test_a_train_function_compiled_and_called_before_attach_is_warned_about(toys, backend):
    model = toys.Net()
    optimizer = toys.sgd(model)

    @torch.compile(backend=backend)
    def loss_of(inputs, labels):
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    loss_of(*toys.batch()).backward()
    shift = toys.Shift()
    regrad.attach(model, optimizer, [shift])
    with pytest.warns(
        RegradWarning, match="without a training forward of the attached model"
    ) as caught:
        for seed in range(3):
            loss_of(*toys.batch(seed=seed)).backward()
            optimizer.step()
    # Either the hooks were seen after all, or one warning says that they were not.
    assert len(caught) == 1


@GRAPH_MAY_BREAK
def test_a_train_function_compiled_before_attach_but_called_after_is_right(
    toys, same_bits, backend
):
    model = toys.Net()
    optimizer = toys.sgd(model)

    @torch.compile(backend=backend)
    def loss_of(inputs, labels):
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    regrad.attach(model, optimizer, [toys.Push(amount=0.1), toys.Scale()])
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(*toys.batch(seed=seed)).backward()
        optimizer.step()
    assert same_bits(
        toys.weights_of(model), eager_result(toys, [toys.Push(amount=0.1), toys.Scale()])
    )


@GRAPH_MAY_BREAK
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("attach_first", [False, True])
def test_a_compiled_optimizer_step_is_right_or_refused_and_never_silent(
    toys, same_bits, backend, attach_first, direct
):
    model = toys.Net()
    optimizer = toys.sgd(model)
    corrections = [toys.Push(amount=0.01), toys.Scale()]
    if attach_first:
        regrad.attach(model, optimizer, corrections)

    def loop_step():
        optimizer.step()

    step = torch.compile(optimizer.step if direct else loop_step, backend=backend)
    if not attach_first:
        toys.loss_of(model).backward()
        step()
        model.load_state_dict(toys.Net().state_dict())
        optimizer.state.clear()
        regrad.attach(model, optimizer, corrections)
    try:
        for seed in range(6):
            optimizer.zero_grad()
            toys.loss_of(model, seed=seed).backward()
            step()
    except (RegradError, RegradWarning):
        return
    assert same_bits(
        toys.weights_of(model), eager_result(toys, [toys.Push(amount=0.01), toys.Scale()], steps=6)
    )


@GRAPH_MAY_BREAK
def test_a_corrected_criterion_inside_a_compiled_train_function_is_right(toys, backend):
    gradients = []
    for compiling in (False, True):
        model = toys.Net()
        attachment = regrad.attach(
            model, toys.sgd(model), [toys.Louder()], torch.nn.CrossEntropyLoss()
        )

        def loss_of(inputs, labels, model=model, attachment=attachment):
            return attachment.criterion(model(inputs), labels)

        function = torch.compile(loss_of, backend=backend) if compiling else loss_of
        function(*toys.batch()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-15)
