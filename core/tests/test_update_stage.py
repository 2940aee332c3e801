"""The stage after the optimizer's update: what corrections see of it, and what becomes of it."""

import copy
import weakref

import pytest
import regrad
import torch
from regrad import Correction, RegradError, RegradWarning
from regrad.correction import Needs
from regrad.hookspecs import LastStep

RATE, DECAY = 0.1, 0.3
OPTIMIZERS = {
    "sgd": lambda p, **how: torch.optim.SGD(p, lr=RATE, momentum=0.9, weight_decay=DECAY, **how),
    "adam": lambda p, **how: torch.optim.Adam(p, lr=RATE, weight_decay=DECAY, **how),
    "adamw": lambda p, **how: torch.optim.AdamW(p, lr=RATE, weight_decay=DECAY, **how),
    "tensor rate": lambda p, **how: torch.optim.AdamW(
        p, lr=torch.tensor(RATE, dtype=torch.float64), weight_decay=DECAY, **how
    ),
}


class Watch(Correction):
    """Keep what the stage shows, by name; multiply the steps by `factor`."""

    name = "watch"
    needs = Needs(stages=("update",), closures=True)

    def __init__(self, factor=1.0, only="", *, reads=True):
        super().__init__()
        self.factor = factor
        self.only = only
        self.reads = reads
        self.weights = {}
        self.steps = {}
        self.slopes = {}

    def selects(self, name, parameter):
        return name.startswith(self.only)

    def correct_update(self, step):
        self.weights = {name: p.detach().clone() for name, p in step.named_parameters()}
        self.steps = {name: d.clone() for name, d in step.named_displacements()}
        if self.reads:
            self.slopes = {name: g.clone() for name, g in step.named_gradients()}
        for _, displacement in step.named_displacements():
            displacement.mul_(self.factor)

    def idle_reason(self):
        return None


def trained(toys, make, corrections, steps=1, *, dtype=torch.float64, **how):
    """Return a model after some steps, with its optimizer and attachment; None attaches nothing."""
    model = toys.Net(dtype=dtype)
    optimizer = make(model.parameters(), **how)
    attachment = None
    if corrections is not None:
        attachment = regrad.attach(model, optimizer, corrections)
    for seed in range(steps):
        toys.train_step(model, optimizer, seed=seed)
    return model, optimizer, attachment


def require_close(got, want, tolerance=1e-14):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_displacement_is_the_step_without_decoupled_decay_which_is_put_back(toys, name):
    before = toys.weights_of(toys.Net())
    plain, _, _ = trained(toys, OPTIMIZERS[name], None)
    after = toys.weights_of(plain)
    watch = Watch(factor=0.5)
    model, _, _ = trained(toys, OPTIMIZERS[name], [watch])
    kept = 1 - RATE * DECAY if name in ("adamw", "tensor rate") else 1.0
    steps = {key: after[key] - kept * before[key] for key in after}
    require_close(watch.steps, steps)
    require_close(watch.weights, before, 0)
    wanted = {key: kept * before[key] + 0.5 * steps[key] for key in after}
    require_close(toys.weights_of(model), wanted)


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_form_of_an_optimizer_gives_the_same_training(toys, name, how):
    model, _, _ = trained(toys, OPTIMIZERS[name], [toys.Stretch()], 5, **how)
    wanted, _, _ = trained(toys, OPTIMIZERS[name], [toys.Stretch()], 5, foreach=False)
    require_close(toys.weights_of(model), toys.weights_of(wanted), 1e-12)


def test_what_no_correction_selects_is_not_touched_to_the_bit(toys, same_bits):
    watch = Watch(factor=0.5, only="body")
    model, _, attachment = trained(toys, OPTIMIZERS["adamw"], [watch])
    plain, _, _ = trained(toys, OPTIMIZERS["adamw"], None)
    assert watch.steps.keys() == {"body.weight", "body.bias"}
    for name, weight in toys.weights_of(plain).items():
        is_left_alone = not name.startswith("body")
        assert same_bits(toys.weights_of(model)[name], weight) is is_left_alone
    held = {kept.parameter for kept in attachment.engine.window._kept.values()}
    assert held == {model.body.weight, model.body.bias}
    assert attachment.receipt()["corrections"][0]["matched"] == ["body.weight", "body.bias"]


def test_a_step_that_nobody_changed_is_the_optimizers_up_to_rounding(toys):
    model, _, _ = trained(toys, OPTIMIZERS["adamw"], [Watch()], 5)
    plain, _, _ = trained(toys, OPTIMIZERS["adamw"], None, 5)
    require_close(toys.weights_of(model), toys.weights_of(plain), 1e-15)


def test_a_parameter_that_was_not_stepped_has_no_displacement(toys, same_bits):
    watch = Watch(factor=3.0)
    model, optimizer, _ = trained(toys, OPTIMIZERS["adamw"], [watch])
    before = model.head.bias.detach().clone()
    toys.loss_of(model, seed=1).backward()
    model.head.bias.grad = None
    optimizer.step()
    assert watch.steps.keys() == toys.weights_of(model).keys() - {"head.bias"}
    assert watch.slopes.keys() == watch.steps.keys()
    assert same_bits(model.head.bias.detach(), before)


class Clears(torch.optim.SGD):
    """An optimizer that leaves no gradient behind."""

    def step(self, closure=None):
        result = super().step(closure)
        self.zero_grad(set_to_none=True)
        return result


def test_gradients_that_the_optimizer_clears_are_seen_as_it_used_them_and_then_let_go(toys):
    watch = Watch()
    model = toys.Net()
    optimizer = Clears(model.parameters(), lr=RATE)
    regrad.attach(model, optimizer, [watch, toys.Scale(factor=0.5)])
    loss = toys.loss_of(model)
    wanted = dict(
        zip(toys.weights_of(model), torch.autograd.grad(loss, [*model.parameters()]), strict=True)
    )
    toys.loss_of(model).backward()
    held = weakref.ref(model.head.weight.grad)
    optimizer.step()
    require_close(watch.slopes, {name: 0.5 * slope for name, slope in wanted.items()})
    assert held() is None


def nesterov(parameters):
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9, nesterov=True, foreach=True)


def test_an_optimizer_that_overwrites_gradients_is_refused_at_the_first_step_that_reads_them(toys):
    refusal = (
        "SGD overwrites the gradients in its step, so that 'watch' cannot compare its step with "
        "them; make it with foreach=False, or leave 'watch' out"
    )
    with pytest.raises(RegradError, match=refusal):
        trained(toys, nesterov, [Watch()])
    _, _, attachment = trained(toys, nesterov, [Watch(reads=False)], 3)
    assert attachment.receipt()["steps_applied"] == 3


def test_a_correction_that_reads_gradients_later_is_refused_then(toys):
    watch = Watch(reads=False)
    model, optimizer, _ = trained(toys, nesterov, [watch], 2)
    watch.reads = True
    toys.train_step(model, optimizer)  # nobody had read them: they are watched from here on
    with pytest.raises(RegradError, match="overwrites the gradients"):
        toys.train_step(model, optimizer)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_that_a_fused_optimizer_skips_after_an_overflow_changes_nothing(
    toys, same_bits, name
):
    watch = Watch(factor=2.0)
    model, optimizer, attachment = trained(
        toys, OPTIMIZERS[name], [watch], dtype=torch.float32, fused=True
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = toys.weights_of(model)
    watch.steps = {}
    optimizer.zero_grad()
    scaler.scale(toys.loss_of(model) * float("inf")).backward()
    scaler.step(optimizer)
    assert same_bits(toys.weights_of(model), before)
    assert watch.steps == {}
    assert attachment.receipt()["steps_skipped"] == 1


class Follow(Correction):
    """Go on by half of the last step."""

    name = "follow"
    needs = Needs(stages=("weights",))

    def predict_weights(self, step):
        return [LastStep(factor=0.5)] * len(step.parameters)


def test_the_window_goes_on_along_the_corrected_step_from_the_one_buffer_of_both(toys):
    model, optimizer, attachment = trained(
        toys, OPTIMIZERS["sgd"], [Follow(), Watch(factor=0.5)], 2
    )
    before = toys.weights_of(model)
    toys.train_step(model, optimizer, seed=2)
    now = toys.weights_of(model)
    toys.loss_of(model)
    wanted = {name: now[name] + 0.5 * (now[name] - before[name]) for name in now}
    require_close(toys.weights_of(model), wanted)
    buffers = [kept.tensor for kept in attachment.engine.window._kept.values()]
    assert sum(b.numel() for b in buffers) == sum(p.numel() for p in model.parameters())


def test_a_displaced_window_and_the_stage_share_the_buffer_too(toys):
    watch = Watch(factor=0.5)
    model = toys.Net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    regrad.attach(model, optimizer, [toys.Shift(amount=0.1), watch])
    before = toys.weights_of(model)
    toys.train_step(model, optimizer)
    require_close(watch.weights, before, 0)
    wanted = {name: before[name] + 0.5 * watch.steps[name] for name in before}
    require_close(toys.weights_of(model), wanted)


class Moves(torch.optim.SGD):
    """Descends after each of two calls of its closure."""

    @torch.no_grad()
    def step(self, closure):
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(RATE * parameter.grad)
        return loss


def test_with_several_closure_calls_a_displacement_is_that_of_the_whole_step(toys):
    ends = []
    for factor in (None, 0.5):
        model = toys.Net()
        optimizer = Moves(model.parameters(), lr=RATE)
        before = toys.weights_of(model)
        watch = Watch(factor)
        if factor:
            regrad.attach(model, optimizer, [watch])

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = toys.loss_of(model)
            loss.backward()
            return loss

        optimizer.step(closure)
        ends.append(toys.weights_of(model))
    require_close(watch.steps, {name: ends[0][name] - before[name] for name in before})
    halfway = {name: (ends[0][name] + before[name]) / 2 for name in before}
    require_close(ends[1], halfway)


def test_a_correction_that_raises_leaves_the_step_as_far_as_it_was_corrected(toys):
    class Raises(Watch):
        def correct_update(self, step):
            next(iter(step.named_displacements()))[1].zero_()
            raise ValueError("no more")

    model = toys.Net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    before = toys.weights_of(model)
    regrad.attach(model, optimizer, [Raises()])
    with pytest.raises(ValueError, match="no more") as caught:
        toys.train_step(model, optimizer)
    assert caught.value.__notes__ == ["in correction 'watch', hook 'correct_update'"]
    plain, _, _ = trained(toys, OPTIMIZERS["sgd"], None)
    wanted = toys.weights_of(plain) | {"body.weight": before["body.weight"]}
    require_close(toys.weights_of(model), wanted)


class Foreign(torch.optim.AdamW):
    """Somebody's own optimizer, of another library."""

    __module__ = "somebody.elses"


def test_decay_of_which_nothing_is_known_is_warned_about_and_may_be_said_in_the_groups(toys):
    model = toys.Net()
    optimizer = Foreign(model.parameters(), lr=RATE, weight_decay=DECAY)
    for group in optimizer.param_groups:
        del group["decoupled_weight_decay"]
    with pytest.warns(RegradWarning, match=r"Foreign has a weight_decay .*'watch' take it for a p"):
        regrad.attach(model, optimizer, [Watch()]).detach()
    for group in optimizer.param_groups:
        group["decoupled_weight_decay"] = True
    watch = Watch()
    regrad.attach(model, optimizer, [watch])
    other = Watch()
    trained(toys, OPTIMIZERS["adamw"], [other])
    toys.train_step(model, optimizer)
    require_close(watch.steps, other.steps)


def test_a_schedule_free_optimizer_is_refused(toys, monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "__module__", "schedulefree.sgd_schedulefree")
    kind = type("SGDScheduleFree", (torch.optim.SGD,), {})
    model = toys.Net()
    with pytest.raises(RegradError, match=r"'watch' changes what .* Schedule-Free"):
        regrad.attach(model, kind(model.parameters(), lr=0.1), [Watch()])


def test_the_meter_measures_a_step_before_and_after(toys):
    _, _, attachment = trained(toys, OPTIMIZERS["adamw"], [Watch(factor=0.5)], 3)
    effects = attachment.receipt()["effects"]["watch"]["update"]
    assert effects["share_touched"] == 1
    assert effects["relative_change"] == pytest.approx(0.5)
    assert effects["cosine"] == pytest.approx(1)


def test_explain_takes_a_step_on_the_copy(toys, same_bits):
    model, optimizer, _ = trained(toys, OPTIMIZERS["adamw"], None)
    criterion = torch.nn.functional.cross_entropy
    attachment = regrad.attach(model, optimizer, [toys.Scale(), toys.Stretch()], criterion)
    before = toys.weights_of(model)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    rows = attachment.explain(toys.batch()).rows
    of_update = {row["tensor"]: row for row in rows if row["stage"] == "update"}
    assert of_update.keys() == before.keys()
    assert {row["correction"] for row in rows} == {"scale", "stretch"}
    assert all(row["relative_change"] > 0.1 for row in of_update.values())
    assert same_bits(toys.weights_of(model), before)
    assert same_bits(optimizer.state_dict()["state"], state)
    assert attachment.receipt()["steps_applied"] == 0


def test_an_engine_that_steps_tensors_of_its_own_is_refused(toys):
    from regrad.layouts import PlainLayout
    from regrad.refusals import check_layout

    layout = PlainLayout()
    layout.name = "engine"
    layout.own_step = object()
    with pytest.raises(RegradError, match="'watch' is not exact on layout 'engine': it changes"):
        check_layout([Watch()], layout)
