"""What attach refuses, by fakes of the libraries in question; more are in `cases_ddp.py`."""

import types

import pytest
import regrad
import torch
from regrad import RegradError, devices, layouts
from regrad.correction import Needs


def fake_class(module, name, *bases):
    """Return a class that looks as if it came from another library."""
    return type(name, bases, {"__module__": module})


def test_deepspeed_is_refused_with_the_reason(toys):
    engine_class = fake_class("deepspeed.runtime.engine", "DeepSpeedEngine", torch.nn.Module)
    engine, model = engine_class(), toys.Net()
    engine.module = model
    with pytest.raises(RegradError, match="DeepSpeed"):
        regrad.attach(engine, toys.sgd(model), [toys.Scale()])


def test_a_model_of_a_module_that_is_named_after_deepspeed_is_nobodys_engine(toys):
    model_class = fake_class("train_with_deepspeed", "Net", toys.Net)
    model = model_class()
    regrad.attach(model, toys.sgd(model), [toys.Scale()])


def test_an_optimizer_of_deepspeed_is_refused_with_the_reason(toys):
    optimizer_class = fake_class("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")
    model = toys.Net()
    optimizer = optimizer_class()
    optimizer.optimizer = toys.sgd(model)
    with pytest.raises(RegradError, match="DeepSpeed"):
        regrad.attach(model, optimizer, [toys.Scale()])


def test_parameters_that_deepspeed_has_cut_are_refused_with_the_reason(toys):
    model = toys.Net()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    with pytest.raises(RegradError, match="DeepSpeed's ZeRO stage 3"):
        regrad.attach(model, toys.sgd(model), [toys.Scale()])


def test_an_optimizer_whose_parameters_are_replaced_after_attach_is_refused_at_the_first_step(
    toys, same_bits
):
    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [toys.Scale()])
    toys.loss_of(model).backward()
    # As DeepSpeed's ZeRO does: one flat parameter that is no longer the model's.
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    before = flat.detach().clone()
    for _ in range(2):
        with pytest.raises(RegradError, match=r"replaced after attach\(\), as deepspeed"):
            optimizer.step()
    assert same_bits(flat.detach(), before)
    assert attachment.metrics()["steps_applied"] == 0


def test_a_model_whose_head_alone_was_replaced_goes_on(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [toys.Scale()])
    model.head = torch.nn.Linear(4, 2, dtype=torch.float64)
    optimizer.add_param_group({"params": model.head.parameters()})
    toys.train_step(model, optimizer)
    assert attachment.metrics()["steps_applied"] == 1


def test_a_model_that_is_frozen_at_its_first_step_is_not_taken_for_a_replaced_one(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Spy()])
    toys.loss_of(model).backward()
    model.requires_grad_(False)
    optimizer.step()


@pytest.mark.parametrize("part", ["all", "head"])
def test_parameters_on_the_meta_device_are_refused_with_what_to_do(toys, part):
    model = toys.Net()
    if part == "all":
        model = model.to("meta")
    else:
        model.head = model.head.to("meta")
    with pytest.raises(RegradError, match=r"on the meta device; .*to_empty.* then initialise"):
        regrad.attach(model, toys.sgd(model), [toys.Scale()])


def test_what_a_correction_may_declare_to_read_is_checked(toys):
    class Misspelt(toys.Scale):
        needs = Needs(stages=("gradient",), reads=("modell",))

    model = toys.Net()
    with pytest.raises(RegradError, match=r"declare reads of 'elements', .*, got 'modell'"):
        regrad.attach(model, toys.sgd(model), [Misspelt()])


def test_an_empty_first_group_is_no_obstacle(toys):
    model = toys.Net()
    optimizer = torch.optim.SGD([{"params": []}, {"params": model.parameters()}], lr=0.1)
    attachment = regrad.attach(model, optimizer, [toys.Scale()])
    toys.train_step(model, optimizer)
    assert attachment.metrics()["steps_applied"] == 1


def test_a_schedule_free_optimizer_is_refused_with_a_window_and_allowed_without(toys):
    optimizer_class = fake_class(
        "schedulefree.sgd_schedulefree", "SGDScheduleFree", torch.optim.SGD
    )
    model = toys.Net()
    with pytest.raises(RegradError, match="'shift' and a Schedule-Free optimizer"):
        regrad.attach(model, optimizer_class(model.parameters(), lr=0.1), [toys.Shift()])
    regrad.attach(model, optimizer_class(model.parameters(), lr=0.1), [toys.Scale()])


def test_an_optimizer_of_discrete_weights_is_refused_with_a_window_and_allowed_without(toys):
    class Flips(torch.optim.SGD):
        discrete_weights = True

    model = toys.Net()
    with pytest.raises(RegradError, match=r"'shift' moves .*; weights of Flips hold single"):
        regrad.attach(model, Flips(model.parameters(), lr=0.1), [toys.Shift()])
    regrad.attach(model, Flips(model.parameters(), lr=0.1), [toys.Scale()])


def test_fsdp1_flat_parameters_are_refused(toys):
    name = "FullyShardedDataParallel"
    wrapper_class = fake_class(
        "torch.distributed.fsdp.fully_sharded_data_parallel", name, torch.nn.Module
    )
    wrapper = wrapper_class()
    wrapper.inner = toys.Net()
    with pytest.raises(
        RegradError, match="'scale' is not exact on layout 'flat'; it is on plain, ddp, fsdp2"
    ):
        regrad.attach(wrapper, toys.sgd(wrapper), [toys.Scale()])


def test_an_optimizer_stepped_inside_backward_is_refused_at_the_step(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Scale()])
    model.head.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(RegradError, match="inside backward"):
        toys.loss_of(model).backward()


def test_an_optimizer_per_parameter_stepped_inside_backward_is_refused(toys):
    model = toys.Net()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    regrad.attach(model, optimizers[model.head.weight], [toys.Scale()])
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    with pytest.raises(RegradError, match="inside backward"):
        toys.loss_of(model).backward()


def test_torchs_own_optimizers_in_backward_are_refused_at_attach(toys):
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = toys.Net()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(RegradError, match="inside backward"):
        regrad.attach(model, toys.sgd(model), [toys.Scale()])


def test_capturing_a_whole_step_in_a_cuda_graph_is_refused(toys, monkeypatch):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [toys.Scale()])
    toys.loss_of(model).backward()
    # What torch says inside `torch.cuda.graph`, for machines without a device.
    module = types.SimpleNamespace(
        is_initialized=lambda: True, is_current_stream_capturing=lambda: True
    )
    monkeypatch.setattr(devices, "_module_with_graphs", lambda: module)
    with pytest.raises(RegradError, match="captur"):
        optimizer.step()


def test_a_correction_says_on_which_layouts_it_is_exact(toys):
    class Elsewhere(toys.Scale):
        needs = Needs(stages=("gradient",), layouts=("ddp",))

    model = toys.Net()
    with pytest.raises(RegradError, match="'scale' is not exact on layout 'plain'; it is on ddp"):
        regrad.attach(model, toys.sgd(model), [Elsewhere()])


def test_a_layout_that_does_not_offer_what_is_read_is_refused_with_the_difference(
    toys, monkeypatch
):
    class Elements(toys.Scale):
        needs = Needs(stages=("gradient",), reads=("elements",))

    class Units(toys.Scale):
        needs = Needs(
            stages=("gradient",), reads=("elements", "units"), conflicts={"own": "buy another"}
        )

    class Listed(toys.Scale):
        needs = Needs(stages=("gradient",), layouts=("plain",), reads=("elements",))

    class Silent(toys.Scale):
        needs = Needs(stages=("gradient",))

    class Own(layouts.PlainLayout):
        name = "mine"
        offers = frozenset({"elements"})

    model = toys.Net()
    monkeypatch.setattr(layouts, "choose", lambda *_: Own())
    regrad.attach(model, toys.sgd(model), [Elements()])
    rule = r"'scale' is not exact on layout 'mine': it reads units \(one output's weights\), which"
    with pytest.raises(RegradError, match=f"{rule} .* not offer; layout 'mine' does not offer"):
        regrad.attach(model, toys.sgd(model), [Units()])
    for unproved in (Listed(), Silent()):
        with pytest.raises(RegradError, match="not exact on layout 'mine'; it is on plain"):
            regrad.attach(model, toys.sgd(model), [unproved])
    monkeypatch.setattr(Own, "name", "own")
    with pytest.raises(RegradError, match="not offer; buy another"):
        regrad.attach(model, toys.sgd(model), [Units()])


def test_a_layout_that_the_first_use_shows_is_refused_there(toys, monkeypatch):
    class Later(layouts.PlainLayout):
        name = "later"

    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [toys.Scale()])
    plain = attachment.engine.layout
    monkeypatch.setattr(layouts, "choose", lambda *_: Later())
    with pytest.raises(RegradError, match="'scale' is not exact on layout 'later'"):
        toys.loss_of(model)
    assert attachment.engine.layout is plain
    monkeypatch.setattr(Later, "name", "ddp")
    toys.train_step(model, optimizer)
    assert attachment.engine.layout.name == "ddp"
    monkeypatch.setattr(layouts, "choose", lambda *_: pytest.fail("chosen at every step"))
    toys.train_step(model, optimizer)


def test_a_refusal_changes_nothing(toys, same_bits, hooks_on):
    model = toys.Net()
    optimizer = torch.optim.LBFGS(model.parameters())
    corrections = [toys.Listen(), toys.Scale(), toys.Shift()]
    before = toys.weights_of(model), hooks_on(model, optimizer)
    with pytest.raises(RegradError):
        regrad.attach(model, optimizer, corrections)
    assert same_bits((toys.weights_of(model), hooks_on(model, optimizer)), before)
    assert {correction.attachment for correction in corrections} == {None}
    regrad.attach(model, toys.sgd(model), corrections)


def test_a_failed_attach_changes_nothing_whatever_raised(toys, hooks_on, monkeypatch):
    model = toys.Net()
    optimizer = toys.sgd(model)
    before = hooks_on(model, optimizer)
    shift, scale = toys.Shift(), toys.Scale()
    registering = (
        *("register_step_pre_hook", "register_step_post_hook"),
        *("register_load_state_dict_pre_hook", "register_state_dict_post_hook"),
    )
    for method in registering:
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, method, None)
            with pytest.raises(TypeError):
                regrad.attach(model, optimizer, [shift, scale])
        assert hooks_on(model, optimizer) == before
        assert shift.attachment is None
    regrad.attach(model, optimizer, [shift, scale])


def test_an_optimizer_that_never_called_its_base_class_is_refused_or_unwrapped(toys, hooks_on):
    class Skips(torch.optim.SGD):
        """Has no hooks to register on."""

        def __init__(self, optimizer):
            self.param_groups = optimizer.param_groups

    model = toys.Net()
    before = hooks_on(model, toys.sgd(model))
    with pytest.raises(RegradError, match=r"Skips .*super\(\).__init__"):
        regrad.attach(model, Skips(toys.sgd(model)), [toys.Scale()])
    assert hooks_on(model, toys.sgd(model)) == before


def test_a_lazy_module_is_refused_with_what_to_do(toys):
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RegradError, match=r"'0.weight' has no shape yet .* run one batch"):
        regrad.attach(model, optimizer, [toys.Scale()])
    model(torch.ones(2, 3))
    regrad.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [toys.Scale()])


@pytest.mark.parametrize("name", ["SAM", "ASAM", "GSAM", "WSAM", "LookSAM"])
def test_an_optimizer_that_evaluates_at_weights_of_its_own_is_refused_with_a_window(toys, name):
    sam = fake_class("some.optimizers", name, torch.optim.SGD)
    model = toys.Net()
    with pytest.raises(RegradError, match=f"'shift' must see one .* {name} evaluates the model"):
        regrad.attach(model, sam(model.parameters(), lr=0.1), [toys.Shift()])
    regrad.attach(model, sam(model.parameters(), lr=0.1), [toys.Scale()])


def test_an_optimizer_of_which_only_the_name_looks_like_it_is_not_refused(toys):
    sampling = fake_class("some.samplers", "SampledSGD", torch.optim.SGD)
    model = toys.Net()
    regrad.attach(model, sampling(model.parameters(), lr=0.1), [toys.Shift()])
