"""The corrected cross entropy inside a model that computes its own loss."""

import threading

import pytest
import regrad
import torch
from regrad.inside import CrossEntropyInside
from torch import nn
from torch.nn import functional as F

PLAIN = (F.cross_entropy, F.nll_loss)


def with_module(logits, labels):
    return nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2)(logits, labels)


def with_function(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / 4


def with_positions(logits, labels):
    return F.cross_entropy(logits, labels, None, None, 2, None, "mean", 0.1)


def with_old_arguments(logits, labels):
    return F.cross_entropy(logits, labels, size_average=False)


def with_log_probabilities(logits, labels):
    return F.nll_loss(F.log_softmax(logits, dim=1), labels, reduction="sum")


def of_scores(scores, labels):
    return F.nll_loss(scores, labels)


LOSSES = [with_module, with_function, with_positions, with_old_arguments, with_log_probabilities]


class Reader(nn.Module):
    """A model that computes its own loss."""

    def __init__(self, loss=with_module):
        super().__init__()
        self.head = nn.Linear(4, 3, dtype=torch.float64)
        self.loss = loss

    def forward(self, inputs, labels):
        return self.loss(self.head(inputs), labels)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def attach(toys):
    """Return a function that attaches a correction which multiplies the loss by three."""
    kept = []

    def attached(model, outer=None, factor=3.0):
        given = [toys.Louder(factor=factor)]
        attachment = regrad.attach(
            model if outer is None else outer, toys.sgd(model), given, F.cross_entropy
        )
        kept.append(attachment)
        return attachment, CrossEntropyInside(attachment)

    yield attached
    for attachment in kept:
        attachment.detach()
    assert (F.cross_entropy, F.nll_loss) == PLAIN


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("loss", LOSSES)
def test_the_models_own_loss_is_corrected_with_its_own_arguments(attach, batch, loss):
    model = Reader(loss)
    plain = model(*batch)
    attachment, inside = attach(model)
    corrected = model(*batch)
    torch.testing.assert_close(corrected, 3 * plain, rtol=1e-13, atol=0)
    assert inside.calls == 1
    (gradient,) = torch.autograd.grad(corrected, [model.head.weight])
    (expected,) = torch.autograd.grad(3 * plain, [model.head.weight])
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert attachment.metrics()["louder/criterion/share_touched"] == 1


def test_evaluation_what_runs_outside_and_what_comes_after_detach_are_plain(attach, batch):
    model = Reader()
    plain = model(*batch)
    attachment, inside = attach(model)
    model.eval()
    assert torch.equal(model(*batch), plain)
    model.train()
    assert torch.equal(with_module(model.head(batch[0]), batch[1]), plain)
    assert inside.calls == 0
    attachment.detach()
    assert torch.equal(model(*batch), plain)
    assert inside.calls == 0


def test_what_nll_loss_is_given_beside_log_probabilities_is_left_alone(attach, batch):
    model = Reader(of_scores)
    plain = model(*batch)
    _, inside = attach(model)
    assert torch.equal(model(*batch), plain)
    assert inside.calls == 0


def test_another_loss_is_left_alone(attach, batch):
    model = Reader(lambda logits, _: logits.square().mean())
    plain = model(*batch)
    _, inside = attach(model)
    assert torch.equal(model(*batch), plain)
    assert inside.calls == 0


def fails(*_):
    raise KeyboardInterrupt


def test_after_an_interrupt_in_the_forward_other_calls_are_plain(attach, batch):
    model = Reader(fails)
    logits, plain = model.head(batch[0]), with_module(model.head(batch[0]), batch[1])
    attach(model)
    with pytest.raises(KeyboardInterrupt):
        model(*batch)
    assert torch.equal(with_module(logits, batch[1]), plain)
    model.loss = with_module
    torch.testing.assert_close(model(*batch), 3 * plain, rtol=1e-13, atol=0)


def test_detaching_in_the_forward_ends_it(attach, batch):
    model = Reader()
    plain = model(*batch)
    attachment, _ = attach(model)
    model.loss = lambda logits, labels: attachment.detach() or with_module(logits, labels)
    assert torch.equal(model(*batch), plain)
    assert (F.cross_entropy, F.nll_loss) == PLAIN


class Pair(nn.Module):
    """A model with another inside, which has an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.head, self.other = nn.Linear(4, 3, dtype=torch.float64), Reader()

    def forward(self, inputs, labels):
        first = F.cross_entropy(self.head(inputs), labels)
        return first, self.other(inputs, labels), F.cross_entropy(self.head(inputs), labels)


def test_a_model_inside_another_has_its_own_correction(attach, batch, toys):
    model = Pair()
    first, other, again = model(*batch)
    outer = regrad.attach(model, toys.sgd(model.head), [toys.Louder(factor=5.0)], F.cross_entropy)
    CrossEntropyInside(outer)
    attach(model.other)
    expected = (5 * first, 3 * other, 5 * again)
    for value, wanted in zip(model(*batch), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-13, atol=0)
    outer.detach()


def in_a_thread(function):
    """Return what a function returned in another thread."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(function()))
    thread.start()
    thread.join()
    return seen[0]


def test_another_thread_has_the_plain_function_and_other_models_their_own(attach, batch):
    model, second = Reader(), Reader()
    plain, second_plain = model(*batch), second(*batch)
    attach(second, factor=5.0)
    _, inside = attach(model)
    seen = []

    def loss(logits, labels):
        seen.append(in_a_thread(lambda: with_module(logits.detach(), labels)))
        seen.append(in_a_thread(lambda: second(*batch)))
        return with_module(logits, labels)

    model.loss = loss
    torch.testing.assert_close(model(*batch), 3 * plain, rtol=1e-13, atol=0)
    assert torch.equal(seen[0], plain)
    torch.testing.assert_close(seen[1], 5 * second_plain, rtol=1e-13, atol=0)
    assert inside.calls == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_plain_and_says_so(attach, batch, backend):
    model = Reader(with_function)
    plain = model(*batch)
    for train in (True, False):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        attachment, inside = attach(model, compiled)
        model.train(train)
        for _ in range(2):
            torch.testing.assert_close(compiled(*batch), plain, rtol=1e-13, atol=0)
        assert inside.calls == 0
        attachment.detach()
        torch.testing.assert_close(compiled(*batch), plain, rtol=1e-13, atol=0)
    torch._dynamo.reset()
