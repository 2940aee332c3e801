"""Binary groups in the loops that people have."""

import copy
import io
import pickle

import pytest
import regrad
import torch
from regrad_bop import Bop, Bop2, binarise_

STEPS = 8
MAKERS = {
    "bop": (Bop, {"lr": 0.2, "threshold": 1e-3}),
    "bop2": (Bop2, {"lr": 0.2, "threshold": 0.1, "second_rate": 0.05}),
    "unbiased": (Bop2, {"lr": 0.2, "threshold": 0.3, "second_rate": 0.05, "unbiased": True}),
}


class Net(torch.nn.Module):
    """A binary layer between real ones."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 8)
        self.binary = torch.nn.Linear(8, 8, bias=False)
        self.last = torch.nn.Linear(8, 3)

    def forward(self, inputs):
        return self.last(torch.tanh(self.binary(torch.tanh(self.first(inputs)))))


def make_model(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    binarise_(model.binary)
    return model.to(dtype)


def groups_of(model):
    real = [*model.first.parameters(), *model.last.parameters()]
    return [{"params": [model.binary.weight], "binary": True}, {"params": real}]


def make(name, model, **options):
    kind, own = MAKERS[name]
    return kind(groups_of(model), **{**own, **options})


def batch(index, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + index)
    inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(3, (16,), generator=generator)


def backward(model, index, parts=1, scale=1.0):
    inputs, target = batch(index, model.last.weight.dtype)
    for x, y in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
        loss = torch.nn.functional.cross_entropy(model(x), y) / parts
        (scale * loss).backward()
    return loss


def train(model, optimizer, indices=range(STEPS), parts=1):
    for index in indices:
        optimizer.zero_grad()
        backward(model, index, parts)
        optimizer.step()
    return weights_of(model)


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def require_same(got, wanted, tolerance=0.0):
    assert torch.equal(got["binary.weight"], wanted["binary.weight"])
    for name, value in got.items():
        assert (value - wanted[name]).abs().max() <= tolerance, name


@pytest.fixture(params=MAKERS)
def name(request):
    return request.param


@pytest.fixture
def trained(name):
    model = make_model()
    return train(model, make(name, model))


def test_weights_stay_signs_and_some_flip(name, trained):
    start = make_model().binary.weight
    assert (trained["binary.weight"].abs() == 1).all()
    assert 0 < (trained["binary.weight"] != start).sum() < start.numel()


def test_binary_weights_are_the_references(name, trained, reference):
    model = make_model()
    optimizer = make(name, model)
    kind, own = MAKERS[name]
    options = {**own, "rate": own["lr"]}
    del options["lr"]
    plain = getattr(reference, kind.__name__)(**options)
    values = model.binary.weight.flatten().tolist()
    for index in range(STEPS):
        optimizer.zero_grad()
        backward(model, index)
        values = plain.step(values, model.binary.weight.grad.flatten().tolist())
        optimizer.step()
        assert model.binary.weight.flatten().tolist() == values


def test_four_parts_of_a_batch_are_the_batch(name, trained):
    model = make_model()
    require_same(train(model, make(name, model), parts=4), trained, 1e-12)


def test_maximize_is_descent_on_the_negative(name, trained):
    model = make_model()
    optimizer = make(name, model, maximize=True)
    for index in range(STEPS):
        optimizer.zero_grad()
        backward(model, index, scale=-1.0)
        optimizer.step()
    require_same(weights_of(model), trained, 1e-14)


def test_a_closure_is_the_plain_loop(name, trained):
    model = make_model()
    optimizer = make(name, model)
    for index in range(STEPS):
        losses = []

        def closure(index=index, losses=losses):
            optimizer.zero_grad()
            losses.append(backward(model, index))
            return losses[-1]

        assert optimizer.step(closure) is losses[0]
        assert len(losses) == 1
    require_same(weights_of(model), trained)


def test_a_scaler_changes_nothing_and_a_skipped_step_is_as_if_it_had_not_been(name, trained):
    model = make_model()
    optimizer = make(name, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))  # before its first use it has no scale
    for index in [*range(4), 99, *range(4, STEPS)]:
        optimizer.zero_grad()
        backward(model, index, scale=scaler.get_scale())
        if index == 99:
            model.binary.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    require_same(weights_of(model), trained, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(name, dtype):
    model = make_model(dtype)
    wanted = train(model, make(name, model))
    first = make_model(dtype)
    stopped = make(name, first)
    train(first, stopped, range(3))
    file = io.BytesIO()
    torch.save([first.state_dict(), stopped.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = make_model(dtype)
    second.load_state_dict(weights)
    resumed = make(name, second)
    resumed.load_state_dict(state)
    moment = resumed.state[second.binary.weight]["moment"]
    assert moment.dtype == torch.promote_types(dtype, torch.float32)
    require_same(train(second, resumed, range(3, STEPS)), wanted)


def test_copies_and_pickles_step_as_the_original(name, trained):
    model = make_model()
    optimizer = make(name, model)
    train(model, optimizer, range(3))
    for twin in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        require_same(train(*twin, range(3, STEPS)), trained)


def test_a_bf16_weight_keeps_its_moments_in_float32():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Bop([{"params": [weight], "binary": True}], lr=1e-4, threshold=5e-3)
    for _ in range(60):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Rounded to the 8 bits of bf16 after every step, the moment would end at another number.
    assert optimizer.state[weight]["moment"].item() == pytest.approx(1 - (1 - 1e-4) ** 60)
    assert weight.item() == -1.0


def test_a_gradient_that_is_not_finite_stays_in_its_own_element_and_flips_nothing(name):
    weight = torch.nn.Parameter(torch.ones(2))
    kind, own = MAKERS[name]
    optimizer = kind([{"params": [weight], "binary": True}], **own)
    for _ in range(3):
        weight.grad = torch.tensor([torch.nan, 1.0])
        optimizer.step()
    assert weight.tolist() == [1.0, -1.0]


def test_a_weight_without_a_gradient_is_left_alone(name):
    weight, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    kind, own = MAKERS[name]
    optimizer = kind([{"params": [weight, other], "binary": True}], **own)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert other.tolist() == [1.0, 1.0]
    assert not optimizer.state.get(other)


def test_attached_to_regrad_it_takes_the_same_steps(name, trained):
    model = make_model()
    with regrad.attach(model, make(name, model), []) as attachment:
        train(model, attachment.optimizer)
        assert attachment.metrics()["steps_applied"] == STEPS
    require_same(weights_of(model), trained)
