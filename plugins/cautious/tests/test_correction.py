"""The correction: C-AdamW, other libraries' cautious optimizers, and what it meets in loops."""

import pytest
import regrad
import torch
from regrad import RegradError
from regrad.correction import Control
from regrad_cautious import Cautious
from torch import nn

STEPS = 60


def make_model(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)


def batch(index, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + index)
    inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (16,), generator=generator)


def train(make, corrections=(), steps=STEPS, *, dtype=torch.float64, says_decay=False):
    """Return the weights after a training with a falling rate, and the attachment."""
    model = make_model(dtype)
    optimizer = make(model.parameters())
    if says_decay:
        for group in optimizer.param_groups:
            group["decoupled_weight_decay"] = True
    attachment = regrad.attach(model, optimizer, corrections)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    for index in range(steps):
        inputs, target = batch(index, dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        schedule.step()
    return [p.detach().clone() for p in model.parameters()], attachment


def farthest(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("divisor", ["share", "count"])
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_on_adamw_it_is_the_authors_c_adamw(reference, how, divisor):
    def make(parameters):
        return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1, **how)

    model = make_model()
    optimizer = make(model.parameters())
    regrad.attach(model, optimizer, [Cautious(divisor=divisor)])
    rules = [reference.CautiousAdamW(0.02, decay=0.1, divisor=divisor) for _ in model.parameters()]
    for index in range(15):
        inputs, target = batch(index)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), target).backward()
        wanted = [
            rule.step(p.detach().flatten().tolist(), p.grad.flatten().tolist())
            for rule, p in zip(rules, model.parameters(), strict=True)
        ]
        optimizer.step()
        for parameter, weights in zip(model.parameters(), wanted, strict=True):
            got = parameter.detach().flatten()
            torch.testing.assert_close(
                got, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-14
            )


def of_timm(name, *, caution):
    optim = pytest.importorskip("timm.optim", reason="timm is not installed")
    return lambda p: getattr(optim, name)(p, lr=0.01, weight_decay=0.1, caution=caution)


@pytest.mark.parametrize("name", ["AdamWLegacy", "Lion", "NAdamW", "LaProp"])
def test_it_makes_of_timms_optimizers_their_cautious_variants(name):
    wanted, _ = train(of_timm(name, caution=True))
    plain = of_timm(name, caution=False)
    got, _ = train(plain, [Cautious()], says_decay=True)
    assert farthest(got, wanted) < 1e-6
    uncorrected, _ = train(plain)
    assert farthest(uncorrected, wanted) > 1e-3


def test_torchs_adamw_becomes_timms_cautious_adamw():
    wanted, _ = train(of_timm("AdamWLegacy", caution=True))
    got, _ = train(
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, eps=1e-8), [Cautious()]
    )
    assert farthest(got, wanted) < 1e-6


def of_pytorch_optimizer(name, *, cautious):
    library = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    return lambda p: getattr(library, name)(p, lr=0.01, weight_decay=0.1, cautious=cautious)


@pytest.mark.parametrize("name", ["Lion", "LaProp"])
def test_it_makes_of_pytorch_optimizers_their_cautious_variants_with_the_published_divisor(name):
    wanted, _ = train(of_pytorch_optimizer(name, cautious=True))
    plain = of_pytorch_optimizer(name, cautious=False)
    got, _ = train(plain, [Cautious(divisor="count")])
    assert farthest(got, wanted) < 1e-6
    # The two libraries divide by different numbers: neither setting gives both.
    other, _ = train(plain, [Cautious()])
    assert farthest(other, wanted) > 1e-3


def test_maximize_is_the_training_on_the_negated_loss():
    def climb(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, maximize=True)

    ends = []
    for sign, make in ((1, lambda p: torch.optim.AdamW(p, lr=0.01)), (-1, climb)):
        model = make_model()
        optimizer = make(model.parameters())
        regrad.attach(model, optimizer, [Cautious()])
        for index in range(10):
            inputs, target = batch(index)
            optimizer.zero_grad()
            (sign * nn.functional.cross_entropy(model(inputs), target)).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert farthest(*ends) < 1e-14


def test_without_momentum_every_element_agrees_and_nothing_changes_but_the_last_bit():
    def make(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    plain, _ = train(make, steps=10)
    got, attachment = train(make, [Cautious()], steps=10)
    assert farthest(got, plain) < 1e-15
    assert attachment.metrics()["cautious/share_agreeing"] == 1.0
    assert "without momentum" in attachment.corrections[0].idle_reason()


def test_momentum_goes_against_some_gradients_and_the_metric_says_against_how_many():
    _, attachment = train(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), [Cautious()])
    assert 0.3 < attachment.metrics()["cautious/share_agreeing"] < 0.95
    # In the first step momentum is the gradient.
    assert 0.9 < attachment.metrics()["cautious/update/trigger_rate"] < 1.0


def test_its_control_lengthens_every_element_alike():
    optimizer = torch.optim.SGD(make_model().parameters())
    control = Cautious(divisor="count").control(optimizer)
    assert control == Control(name="larger-step", corrections=("cautious:divisor=count,keep=all",))
    made = regrad.create(control.corrections[0])
    assert made.options.keep == "all"
    assert made.control(optimizer) is None


def test_a_row_without_a_gradient_counts_as_disagreeing():
    """As in the published rule: one used row of ten is stepped ten times as far."""
    model = nn.Embedding(10, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrad.attach(model, optimizer, [Cautious()])
    before = model.weight.detach().clone()
    model(torch.tensor([3])).sum().backward()
    optimizer.step()
    moved = model.weight.detach() - before
    torch.testing.assert_close(moved[3], torch.full((2,), -0.1 * 10))
    assert moved.count_nonzero() == 2


def test_complex_parameters_are_refused():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(RegradError, match="no rule for complex parameters"):
        regrad.attach(model, optimizer, ["cautious"])


def test_unknown_values_of_options_are_refused():
    with pytest.raises(TypeError, match=r"divisor must be Literal\['share', 'count'\], got 'sum'"):
        Cautious(divisor="sum")
