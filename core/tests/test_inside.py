"""The corrected cross entropy inside a model that computes its own loss."""

import threading

import pytest
import regrad
import torch
from regrad import RegradError, RegradWarning
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


def step(model, optimizer, batch):
    """Train one step with the model's own loss."""
    optimizer.zero_grad()
    loss = model(*batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("loss", LOSSES)
def test_attached_inside_by_one_word_it_trains_bit_for_bit_as_by_hand(attach, batch, toys, loss):
    torch.manual_seed(0)
    model = Reader(loss)
    twin = Reader(loss)
    twin.load_state_dict(model.state_dict())
    attachment, _ = attach(model)
    losses = [step(model, attachment.optimizer, batch) for _ in range(3)]
    attachment.detach()
    with regrad.attach(twin, toys.sgd(twin), [toys.Louder()], "inside") as other:
        assert [step(twin, other.optimizer, batch) for _ in range(3)] == losses
        assert torch.equal(twin.head.weight, model.head.weight)
        assert other.metrics() == attachment.metrics()
    plain = model(*batch)
    assert torch.equal(twin(*batch), plain)
    assert (F.cross_entropy, F.nll_loss) == PLAIN


def test_inside_leaves_evaluation_and_the_loss_of_the_loop_alone(batch, toys):
    model = Reader()
    plain = model(*batch)
    with regrad.attach(model, toys.sgd(model), [toys.Louder()], "inside"):
        assert torch.equal(with_module(model.head(batch[0]), batch[1]), plain)
        model.eval()
        assert torch.equal(model(*batch), plain)


def test_inside_touches_no_function_where_no_correction_is_of_the_criterion(batch, toys):
    model = Reader()
    plain = model(*batch)
    with regrad.attach(model, toys.sgd(model), [toys.Scale()], criterion="inside") as attachment:
        assert (F.cross_entropy, F.nll_loss) == PLAIN
        assert torch.equal(model(*batch), plain)
        assert attachment.criterion is F.cross_entropy


def test_a_refused_attachment_inside_leaves_the_functions_alone(toys):
    class Unable(toys.Louder):
        name = "unable"

        def wrap_criterion(self, criterion):
            raise RegradError("no")

    model = Reader()
    with pytest.raises(RegradError, match="no"):
        regrad.attach(model, toys.sgd(model), [Unable()], criterion="inside")
    assert (F.cross_entropy, F.nll_loss) == PLAIN


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("insid", "criterion must be a loss function or 'inside', got 'insid'; did you mean"),
        ("", "criterion must be a loss function or 'inside', got ''"),
        ("cross_entropy", "criterion must be a loss function or 'inside', got 'cross_entropy'"),
    ],
)
def test_another_word_for_the_criterion_is_refused(toys, word, message):
    model = Reader()
    with pytest.raises(ValueError, match=message):
        regrad.attach(model, toys.sgd(model), [toys.Louder()], criterion=word)
    assert (F.cross_entropy, F.nll_loss) == PLAIN


def test_one_batch_of_a_model_attached_inside_is_explained(batch, toys):
    model = Reader()
    inputs, labels = batch
    with regrad.attach(model, toys.sgd(model), [toys.Louder()], "inside") as attachment:
        (row,) = attachment.explain({"inputs": inputs, "labels": labels}).rows
        assert (row["correction"], row["stage"]) == ("louder", "criterion")
        assert row["relative_change"] == pytest.approx(2.0)
        assert attachment.engine.applied == 0
    assert (F.cross_entropy, F.nll_loss) == PLAIN


def test_a_part_that_the_loop_calls_by_itself_counts_as_the_model(batch, toys):
    reader, other = Reader(), Reader()
    plain = reader(*batch)
    whole = nn.ModuleDict({"reader": reader, "unused": nn.Linear(2, 2, dtype=torch.float64)})
    for given in (whole, [nn.Linear(2, 2, dtype=torch.float64), reader]):
        with regrad.attach(given, toys.sgd(reader), [toys.Louder()], criterion="inside"):
            torch.testing.assert_close(reader(*batch), 3 * plain, rtol=1e-13, atol=0)
            other.load_state_dict(reader.state_dict())
            assert torch.equal(other(*batch), plain)
            reader.eval()
            assert torch.equal(reader(*batch), plain)
            reader.train()


@pytest.mark.parametrize(
    ("in_the_loop", "message"),
    [
        (False, r"'louder' .* no training forward of the attached Reader called .*attachment\."),
        (True, r"'louder' .* a step of SGD ran without one while the attached Reader trains"),
    ],
)
def test_a_first_step_without_a_cross_entropy_is_warned_about_once(
    attach, batch, in_the_loop, message
):
    model = Reader(lambda logits, _: logits.square().mean())
    attachment, inside = attach(model)
    if in_the_loop:
        inside.remove()
        CrossEntropyInside(attachment, in_the_loop=True)
    with pytest.warns(RegradWarning, match=message) as said:
        for _ in range(3):
            step(model, attachment.optimizer, batch)
    assert len(said) == 1
    assert ("attachment.criterion" in str(said[0].message)) is not in_the_loop


def test_one_of_two_attachments_to_a_model_corrects_for_both_and_no_one_is_warned(batch, toys):
    model = Reader()
    plain = model(*batch)
    optimizers = [
        torch.optim.SGD([parameter], lr=0.0) for parameter in (model.head.weight, model.head.bias)
    ]
    kept = [
        regrad.attach(model, optimizer, [toys.Louder()], criterion="inside")
        for optimizer in optimizers
    ]
    loss = model(*batch)
    torch.testing.assert_close(loss, 3 * plain, rtol=1e-13, atol=0)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    for attachment in reversed(kept):
        attachment.detach()
    assert (F.cross_entropy, F.nll_loss) == PLAIN


@pytest.mark.skipif("powergrad" not in regrad.available(), reason="needs the plugin")
def test_inside_works_beside_another_attachment_inside(batch, toys):
    model, second = Reader(), Reader()
    second.load_state_dict(model.state_dict())
    with regrad.attach(model, toys.sgd(model), ["powergrad"], criterion="inside"):
        alone = torch.autograd.grad(model(*batch), [model.head.weight])[0]
        with regrad.attach(second, toys.sgd(second), ["powergrad"], criterion="inside"):
            both = torch.autograd.grad(second(*batch), [second.head.weight])[0]
    assert torch.equal(alone, both)
    assert (F.cross_entropy, F.nll_loss) == PLAIN
