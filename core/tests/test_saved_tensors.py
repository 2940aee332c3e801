"""What autograd saves in one module's forward goes through the functions of a correction."""

import copy
import gc
import weakref

import pytest
import regrad
import torch
from regrad import Correction, RegradError
from regrad.correction import Needs
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class Packs(Correction):
    """Note what is packed in the modules `targets`, and give it back multiplied by a factor."""

    name = "packs"
    needs = Needs(stages=("hidden",), reads=("elements",))

    def __init__(self, targets=("body",), factor=1.0):
        super().__init__()
        self.targets = targets
        self.factor = factor
        self.packed = []
        self.unpacked = 0
        self.inputs = []

    def setup(self, attachment):
        for target in self.targets:
            module = attachment.model.get_submodule(target)
            attachment.hook_saved(module, self.pack, self.unpack, with_inputs=True)

    def pack(self, module, inputs, tensor):
        self.packed.append((module, tuple(tensor.shape)))
        self.inputs.append([weakref.ref(one) for one in inputs])
        return tensor

    def unpack(self, packed):
        self.unpacked += 1
        return packed * self.factor


class PacksTensors(Correction):
    """Double what backward reads, by torch's own signature of a pack function."""

    name = "packs-tensors"
    needs = Needs(stages=("hidden",), reads=("elements",))

    def setup(self, attachment):
        attachment.hook_saved(attachment.model.body, torch.Tensor.clone, lambda saved: 2 * saved)


def attached(toys, *, targets=("body",), factor=1.0, model=None):
    model = toys.Net() if model is None else model
    packs = Packs(targets, factor)
    return model, packs, regrad.attach(model, toys.sgd(model), [packs])


def nothing_is_hooked():
    """Say whether torch saves tensors plainly now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def plain_gradients(toys):
    model = toys.Net()
    toys.loss_of(model).backward()
    return gradients(model)


def test_only_the_modules_own_tensors_are_packed_and_unpacked(toys, same_bits):
    model, packs, _ = attached(toys)
    toys.loss_of(model).backward()
    assert packs.packed == [(model.body, (8, 3))]
    assert packs.unpacked == 1
    assert same_bits(gradients(model), plain_gradients(toys))
    assert nothing_is_hooked()


def test_what_unpack_returns_is_what_backward_reads(toys):
    model, _, _ = attached(toys, factor=3.0)
    toys.loss_of(model).backward()
    plain = plain_gradients(toys)
    torch.testing.assert_close(model.body.weight.grad, 3 * plain["body.weight"])
    torch.testing.assert_close(model.body.bias.grad, plain["body.bias"])


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference", "detached"])
def test_nothing_is_packed_outside_of_training(toys, how):
    model, packs, attachment = attached(toys)
    if how == "eval":
        toys.loss_of(model.eval())
    elif how == "no_grad":
        with torch.no_grad():
            toys.loss_of(model)
    elif how == "inference":
        with torch.inference_mode():
            toys.loss_of(model)
    else:
        attachment.detach()
        toys.loss_of(model)
    assert packs.packed == []
    assert nothing_is_hooked()


def test_a_graph_made_before_detach_is_unpacked_after_it(toys):
    model, packs, attachment = attached(toys, factor=3.0)
    loss = toys.loss_of(model)
    attachment.detach()
    loss.backward()
    assert packs.unpacked == 1


class Fails(nn.Module):
    """Raise `error` in the middle of a forward, while it is set."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3, dtype=torch.float64)
        self.error = None

    def forward(self, inputs):
        hidden = self.inner(inputs).tanh()
        if self.error is not None:
            raise self.error
        return hidden


class Deep(nn.Module):
    """A module that can fail inside another."""

    def __init__(self):
        super().__init__()
        self.outer = nn.Sequential(Fails(), nn.Tanh())

    def forward(self, inputs):
        return self.outer(inputs)


@pytest.mark.parametrize("targets", [("outer",), ("outer.0",), ("outer", "outer.0")])
@pytest.mark.parametrize("error", [ValueError("x"), RegradError("x")])
def test_an_exception_in_the_forward_leaves_nothing_hooked(toys, targets, error):
    model, packs, _ = attached(toys, targets=targets, model=Deep())
    inputs = torch.ones(2, 3, dtype=torch.float64)
    model.outer[0].error = error
    with pytest.raises(type(error)):
        model(inputs)
    assert nothing_is_hooked()
    model.outer[0].error = None
    packs.packed.clear()
    model(inputs).sum().backward()
    assert packs.packed
    assert nothing_is_hooked()


@pytest.mark.parametrize("targets", [("outer",), ("outer.0",), ("outer", "outer.0")])
def test_ctrl_c_in_the_forward_leaves_hooks_that_do_nothing_until_the_next_forward(toys, targets):
    model, packs, attachment = attached(toys, targets=targets, model=Deep())
    inputs = torch.ones(2, 3, dtype=torch.float64)
    model.outer[0].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(inputs)
    packs.packed.clear()
    other = torch.ones(3, requires_grad=True)
    other.exp().sum().backward()
    assert packs.packed == []
    assert packs.unpacked == 0
    torch.testing.assert_close(other.grad, torch.ones(3).exp())
    model.outer[0].error = None
    model(inputs).sum().backward()
    assert packs.packed
    assert nothing_is_hooked()
    model.outer[0].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(inputs)
    attachment.detach()
    assert nothing_is_hooked()


def test_a_failing_pre_hook_of_the_user_leaves_nothing_hooked(toys):
    model, _, _ = attached(toys)

    def fails(*_):
        raise ValueError("user")

    handle = model.body.register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match="user"):
        toys.loss_of(model)
    assert nothing_is_hooked()
    handle.remove()
    toys.loss_of(model).backward()


class Twice(nn.Module):
    """A layer that is called twice, and calls itself once more, without gradients."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, inputs):
        return self.body(self.body(inputs))


class CallsItself(nn.Module):
    """A module whose forward calls itself without gradients."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, inputs, depth=1):
        if depth:
            with torch.no_grad():
                inputs = self(inputs, depth=0)
        return inputs * self.weight


def test_a_module_called_twice_is_packed_twice_each_with_its_own_inputs(toys):
    model, packs, _ = attached(toys, model=Twice())
    inputs = torch.ones(2, 3, dtype=torch.float64)
    output = model(inputs)
    assert [shape for _, shape in packs.packed] == [(2, 3), (2, 3), (3, 3)]
    seen = [references[0]() is inputs for references in packs.inputs]
    assert True in seen
    assert False in seen
    output.sum().backward()
    assert packs.unpacked == len(packs.packed)


def test_a_module_that_calls_itself_leaves_in_order(toys):
    model = nn.Sequential(CallsItself())
    model, packs, _ = attached(toys, targets=("0",), model=model)
    model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    assert len(packs.packed) == 1
    assert nothing_is_hooked()


def test_the_hooks_of_an_inner_module_come_first_and_the_outers_go_on_after_it(toys):
    model, packs, _ = attached(toys, targets=("outer", "outer.0.inner"), model=Deep())
    model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    inner = model.outer[0].inner
    assert [module is inner for module, _ in packs.packed] == [True, False, False]


def test_inputs_by_keyword_are_seen_too(toys):
    model, packs, _ = attached(toys)
    inputs = torch.ones(2, 3, dtype=torch.float64)
    model.body(input=inputs)
    assert packs.inputs[0][0]() is inputs


def test_inputs_are_kept_neither_by_the_graph_nor_until_the_garbage_collector_comes(toys):
    class Forgets(Packs):
        def pack(self, module, inputs, tensor):
            return tensor.shape, tensor.dtype

        def unpack(self, packed):
            shape, dtype = packed
            return torch.zeros(shape, dtype=dtype)

    model = toys.Net()
    regrad.attach(model, toys.sgd(model), [Forgets()])
    inputs = torch.ones(8, 3, dtype=torch.float64)
    gc.collect()
    gc.disable()
    try:
        output = model.body(inputs)
        reference = weakref.ref(inputs)
        del inputs
        assert reference() is None
    finally:
        gc.enable()
    output.sum().backward()
    assert not model.body.weight.grad.any()


class Checkpointed(nn.Module):
    """A layer inside an activation checkpoint."""

    def __init__(self, *, use_reentrant):
        super().__init__()
        self.body = nn.Linear(3, 3, dtype=torch.float64)
        self.use_reentrant = use_reentrant

    def forward(self, inputs):
        return checkpoint(self.body, inputs, use_reentrant=self.use_reentrant)


def test_a_module_in_a_checkpoint_that_is_not_reentrant_is_refused_in_its_forward(toys):
    model, _, _ = attached(toys, model=Checkpointed(use_reentrant=False))
    with pytest.raises(RegradError, match="'body' runs inside other hooks on saved tensors"):
        model(torch.ones(2, 3, dtype=torch.float64))
    assert nothing_is_hooked()


def test_a_module_in_a_reentrant_checkpoint_is_refused_in_backward(toys):
    model, packs, _ = attached(toys, model=Checkpointed(use_reentrant=True))
    inputs = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    output = model(inputs)
    assert packs.packed == []
    with pytest.raises(RegradError, match="'body' runs again in backward"):
        output.sum().backward()
    assert model.body.weight.grad is None
    assert nothing_is_hooked()


def test_a_checkpoint_that_holds_no_hooked_module_is_nobodys_business(toys, same_bits):
    model, packs, _ = attached(toys, targets=("head",))
    inner = model.body.forward
    model.body.forward = lambda inputs: checkpoint(inner, inputs, use_reentrant=False)
    toys.loss_of(model).backward()
    assert packs.packed
    assert same_bits(gradients(model), plain_gradients(toys))


@pytest.mark.parametrize(
    "context", [save_on_cpu, lambda: saved_tensors_hooks(lambda t: t, lambda t: t)]
)
def test_other_hooks_around_the_module_are_refused(toys, context):
    model, _, _ = attached(toys)
    with context(), pytest.raises(RegradError, match="leave it out of them"):
        toys.loss_of(model)
    assert nothing_is_hooked()


@pytest.mark.parametrize("way", ["wrapped", "in place", "a part in place"])
def test_a_compiled_model_is_refused_and_nothing_changes(toys, way):
    model = toys.Net()
    given = model
    if way == "wrapped":
        given = torch.compile(model, backend="aot_eager")
    elif way == "in place":
        model.compile(backend="aot_eager")
    else:
        model.body.compile(backend="aot_eager")
    before = (dict(model.body._forward_hooks), dict(model.body._forward_pre_hooks))
    with pytest.raises(RegradError, match="cannot be hooked in a compiled model"):
        regrad.attach(given, toys.sgd(model), [Packs()])
    assert (dict(model.body._forward_hooks), dict(model.body._forward_pre_hooks)) == before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_compiled_after_attach_is_refused_in_its_forward(toys, in_place):
    torch.compiler.reset()
    model, _, _ = attached(toys)
    called = model
    if in_place:
        model.compile(backend="aot_eager")
    else:
        called = torch.compile(model, backend="aot_eager")
    with pytest.raises(RegradError, match="'body' runs in compiled code"):
        toys.loss_of(called)
    assert nothing_is_hooked()
    torch.compiler.reset()


def test_copies_and_pickles_hold_no_hook_on_saved_tensors(toys):
    model, packs, _ = attached(toys)
    other = copy.deepcopy(model)
    assert not other.body._forward_hooks
    assert not other.body._forward_pre_hooks
    toys.loss_of(other).backward()
    assert packs.packed == []


def test_a_second_backward_through_a_kept_graph_unpacks_again(toys):
    model, packs, _ = attached(toys)
    loss = toys.loss_of(model)
    loss.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    loss.backward()
    assert packs.unpacked == 2
    assert torch.equal(model.body.weight.grad, first["body.weight"])


def test_pack_is_called_with_the_tensor_alone_as_torchs_is(toys):
    plain, packed = toys.Net(), toys.Net()
    packed.load_state_dict(plain.state_dict())
    inputs = torch.ones_like(plain.body.weight)
    with regrad.attach(packed, toys.sgd(packed), [PacksTensors()]):
        for model in (plain, packed):
            model.body(inputs).sum().backward()
    assert torch.equal(packed.body.weight.grad, 2 * plain.body.weight.grad)
