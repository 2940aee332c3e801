"""A correction that goes on along the last step: what the window keeps for it, and when it is known."""

import copy
import io

import pytest
import regrad
import torch
from regrad import Correction, exchange, samples
from regrad.correction import Needs
from regrad.hookspecs import LastStep
from torch.utils._python_dispatch import TorchDispatchMode

FACTOR = 0.5


class Follow(Correction):
    """Go on by half of the last step."""

    name = "follow"
    needs = Needs(stages=("weights",), layouts=("plain", "ddp", "fsdp2"))

    def predict_weights(self, step):
        return [LastStep(factor=FACTOR)] * len(step.parameters)


@pytest.fixture
def followed(toys):
    """Return a model, its optimizer and its attachment after two steps."""
    model = toys.Net()
    optimizer = toys.sgd(model)
    criterion = torch.nn.functional.cross_entropy
    attachment = regrad.attach(model, optimizer, [Follow()], criterion)
    for seed in range(2):
        toys.train_step(model, optimizer, seed=seed)
    return model, optimizer, attachment


def gone_on(before, now):
    return {name: now[name] + FACTOR * (now[name] - before[name]) for name in now}


def points_of(toys, model, seed=7):
    """Return the weights that the next training forward sees."""
    toys.loss_of(model, seed=seed)
    return toys.weights_of(model)


def require_close(got, want):
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-15, msg=name)


def test_every_forward_is_half_a_last_step_further_and_the_first_where_it_is(toys, same_bits):
    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [Follow()])
    before = toys.weights_of(model)
    for seed in range(4):
        now = toys.weights_of(model)
        loss = toys.loss_of(model, seed=seed)
        require_close(toys.weights_of(model), gone_on(before, now))
        loss.backward()
        seen = []
        handle = optimizer.register_step_pre_hook(lambda *_: seen.append(toys.weights_of(model)))  # noqa: B023
        optimizer.step()
        handle.remove()
        optimizer.zero_grad()
        assert same_bits(seen[0], now)
        before = now


def test_one_copy_of_the_weights_is_kept(toys, followed):
    model, _, attachment = followed
    toys.loss_of(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = attachment.engine.window._kept.values()
    assert sum(one.tensor.numel() * one.tensor.element_size() for one in kept) == weights


def by_add(parameter):
    with torch.no_grad():
        parameter.add_(1.0)


def by_data(parameter):
    parameter.data.add_(1.0)


def by_new_data(parameter):
    parameter.data = parameter.data + 1.0


@pytest.mark.parametrize("write", [by_add, by_data, by_new_data])
def test_what_somebody_else_wrote_between_two_steps_is_not_gone_on(toys, followed, write):
    model, optimizer, _ = followed
    before = toys.weights_of(model)
    toys.train_step(model, optimizer, seed=2)
    write(model.body.weight)
    now = toys.weights_of(model)
    wanted = gone_on(before, now) | {"body.weight": now["body.weight"]}
    require_close(points_of(toys, model), wanted)


def test_loading_the_model_alone_forgets_its_last_step(toys, same_bits, followed):
    model, *_ = followed
    other = toys.Net(seed=5)
    model.load_state_dict(other.state_dict())
    assert same_bits(points_of(toys, model), toys.weights_of(other))


def test_a_step_from_weights_written_inside_the_window_is_gone_on_alone(toys, followed):
    model, optimizer, _ = followed
    toys.loss_of(model, seed=2).backward()
    by_add(model.body.weight)
    written = model.body.weight.detach().clone()
    with pytest.warns(regrad.RegradWarning, match="were changed before the step"):
        optimizer.step()
    now = toys.weights_of(model)
    points = points_of(toys, model)
    expected = now["body.weight"] + FACTOR * (now["body.weight"] - written)
    torch.testing.assert_close(points["body.weight"], expected, rtol=0, atol=1e-15)


def test_a_parameter_without_a_gradient_stays(toys, followed):
    model, optimizer, _ = followed
    before = toys.weights_of(model)
    toys.loss_of(model, seed=2).backward()
    model.head.bias.grad = None
    optimizer.step()
    optimizer.zero_grad()
    now = toys.weights_of(model)
    points = points_of(toys, model)
    assert torch.equal(points["head.bias"], now["head.bias"])
    require_close(points, gone_on(before, now))


def test_a_step_without_a_training_forward_is_gone_on_too(toys, followed):
    model, optimizer, _ = followed
    before = toys.weights_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.warns(regrad.RegradWarning, match="without a training forward"):
        optimizer.step()
    now = toys.weights_of(model)
    require_close(points_of(toys, model), gone_on(before, now))


def test_an_evaluation_within_the_step_leads_back_to_the_same_bits(toys, same_bits, followed):
    model, *_ = followed
    true = toys.weights_of(model)
    points = points_of(toys, model)
    for _ in range(2):
        model.eval()
        toys.loss_of(model)
        assert same_bits(toys.weights_of(model), true)
        model.train()
        assert same_bits(points_of(toys, model), points)


def test_a_step_after_such_an_evaluation_starts_from_the_true_weights(toys, followed):
    model, optimizer, _ = followed
    before = toys.weights_of(model)
    toys.loss_of(model, seed=2).backward()
    model.eval()
    toys.loss_of(model)
    model.train()
    optimizer.step()
    now = toys.weights_of(model)
    require_close(points_of(toys, model), gone_on(before, now))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("moment", ["between", "within", "evaluated"])
@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")])
def test_a_checkpoint_at_any_moment_leads_to_the_same_bits(
    toys, same_bits, followed, moment, order
):
    model, optimizer, _ = followed
    if moment != "between":
        toys.loss_of(model, seed=7)
    if moment == "evaluated":
        model.eval()
        toys.loss_of(model)
        model.train()
    saved = {
        "model": through_a_file(model.state_dict()),
        "optimizer": through_a_file(optimizer.state_dict()),
    }
    points = points_of(toys, model)
    resumed = {"model": toys.Net(seed=3)}
    resumed["optimizer"] = toys.sgd(resumed["model"])
    regrad.attach(resumed["model"], resumed["optimizer"], [Follow()])
    for part in order:
        resumed[part].load_state_dict(copy.deepcopy(saved[part]))
    assert same_bits(points_of(toys, resumed["model"]), points)


def test_what_is_loaded_may_be_saved_again_before_it_is_used(toys, same_bits, followed):
    model, optimizer, _ = followed
    saved = through_a_file(optimizer.state_dict())
    twin = copy.deepcopy(model)
    its_optimizer = toys.sgd(twin)
    attachment = regrad.attach(twin, its_optimizer, [Follow()])
    its_optimizer.load_state_dict(saved)
    again = attachment.state_dict()["window"]
    assert again["before"]
    assert same_bits(again["before"], saved["regrad"]["window"]["before"])


def test_the_optimizers_state_beside_other_weights_moves_nothing(toys, same_bits, followed):
    _, optimizer, _ = followed
    other = toys.Net(seed=5)
    its_optimizer = toys.sgd(other)
    regrad.attach(other, its_optimizer, [Follow()])
    its_optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same_bits(points_of(toys, other), toys.weights_of(toys.Net(seed=5)))


def test_a_state_without_the_windows_part_starts_without_a_last_step(toys, same_bits, followed):
    model, _, attachment = followed
    state = attachment.state_dict()
    del state["window"]
    true = toys.weights_of(model)
    attachment.load_state_dict(state)
    assert same_bits(points_of(toys, model), true)


def test_a_displacement_and_a_last_step_may_stand_in_one_list(toys, same_bits):
    class Both(Follow):
        name = "both"

        def predict_weights(self, step):
            moves = super().predict_weights(step)
            moves[0] = torch.ones_like(step.parameters[0])
            moves[1] = None
            return moves

    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [Both()])
    toys.train_step(model, optimizer)
    before = toys.weights_of(model)
    toys.train_step(model, optimizer, seed=1)
    now = toys.weights_of(model)
    first, second, *_ = now
    wanted = gone_on(before, now) | {first: now[first] + 1, second: now[second]}
    require_close(points_of(toys, model), wanted)


@pytest.fixture
def on_a_device(monkeypatch):
    """Walk the way of a device, on the CPU: what only it knows is never read."""
    make = samples._Group.__init__

    def made(group, tensors):
        make(group, tensors)
        group.is_on_host = False

    monkeypatch.setattr(samples._Group, "__init__", made)
    monkeypatch.setattr(exchange, "is_on_host", lambda tensor: False)


@pytest.mark.usefixtures("on_a_device")
def test_on_a_device_a_write_that_only_it_knows_is_not_gone_on(toys, same_bits):
    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [Follow()])
    toys.train_step(model, optimizer)
    before = toys.weights_of(model)
    toys.train_step(model, optimizer, seed=1)
    model.body.weight.data.add_(1.0)
    now = toys.weights_of(model)
    require_close(
        points_of(toys, model), gone_on(before, now) | {"body.weight": now["body.weight"]}
    )
    model.head.weight.data.add_(1.0)
    written = model.head.weight.detach().clone()
    model.eval()
    toys.loss_of(model)
    assert same_bits(toys.weights_of(model), now | {"head.weight": written})
    assert attachment.engine.window.overwritten_on_device.item() == 1


class Operations(TorchDispatchMode):
    """Counts the operations that are launches on a device."""

    VIEWS = ("view", "detach", "split", "unbind", "permute", "slice", "alias", "as_strided", "t.")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.VIEWS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("on_a_device")
def test_the_launches_of_a_step_do_not_grow_with_the_number_of_parameters(toys):
    counts = []
    for number in (5, 50):
        layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(number)]
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = regrad.attach(model, optimizer, [Follow()]).engine
        engine.applied = 101  # past the steps in which the meter looks
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with Operations() as seen:
                engine.before_forward(model)
                engine.before_step(optimizer, (optimizer,), {})
            names = list(seen.names)
            assert len(engine.window._kept) == number
            with Operations() as seen:
                engine.after_step()
        assert not any("_local_scalar_dense" in name for name in names + seen.names)
        counts.append(len(names + seen.names))
    assert counts[0] == counts[1]
    assert counts[0] <= 50


def test_a_last_step_after_displacements_starts_anew(toys, same_bits):
    class Turns(Follow):
        name = "turns"

        def predict_weights(self, step):
            if step.index < 2:
                return [torch.ones_like(parameter) for parameter in step.parameters]
            return super().predict_weights(step)

    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [Turns()])
    for seed in range(2):
        toys.train_step(model, optimizer, seed=seed)
    before = toys.weights_of(model)
    assert same_bits(points_of(toys, model, seed=2), before)
    toys.train_step(model, optimizer, seed=2)
    now = toys.weights_of(model)
    require_close(points_of(toys, model), gone_on(before, now))


def test_explain_goes_on_from_the_same_last_step(toys, followed):
    model, _, attachment = followed
    before = {n: t.clone() for n, t in attachment.state_dict()["window"]["before"].items()}
    rows = {row["tensor"]: row for row in attachment.explain(toys.batch()).rows}
    for name, now in toys.weights_of(model).items():
        size = (FACTOR * (now - before[name])).norm() / now.norm()
        assert rows[name]["relative_change"] == pytest.approx(size.item(), rel=1e-6)
