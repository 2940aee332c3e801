"""`explain`: one batch through the user's model, and nothing changed afterwards."""

import copy
import dataclasses
import json
import random

import pytest
import regrad
import torch
from torch import nn


class Everything:
    """A model with everything that a forward pass can change, in the middle of training."""

    def __init__(self, toys, corrections, *, optimizer=torch.optim.AdamW, steps=3, criterion=True):
        torch.manual_seed(0)
        self.toys, self.corrections = toys, corrections
        self.model = toys.Messy()
        self.optimizer = optimizer(self.model.parameters(), lr=0.01)
        loss = nn.CrossEntropyLoss() if criterion else None
        self.attachment = regrad.attach(self.model, self.optimizer, corrections, loss)
        self.train(range(steps))

    def train(self, seeds):
        options = {"criterion": self.attachment.criterion} if self.attachment._original else {}
        for seed in seeds:
            self.toys.train_step(self.model, self.optimizer, seed=seed, **options)

    def snapshot(self):
        return copy.deepcopy(
            {
                "weights": self.toys.weights_of(self.model),
                "gradients": {n: p.grad for n, p in self.model.named_parameters()},
                "buffers": dict(self.model.named_buffers()),
                "optimizer": self.optimizer.state_dict(),
                "state keys": len(self.optimizer.state),
                "random": [torch.get_rng_state(), list(random.getstate()[1])],
                "modes": {n: m.training for n, m in self.model.named_modules()},
                "attachment": self.attachment.state_dict(),
                "metrics": self.attachment.metrics(),
            }
        )


def arrays(toys):
    return toys.batch(dtype=torch.float32)


def mapping(toys):
    inputs, labels = toys.batch(dtype=torch.float32)
    return {"x": inputs, "labels": labels}


def many(toys):
    return [
        toys.Push(amount=0.1),
        toys.Louder(),
        toys.Scale(),
        toys.Tally(),
        toys.Boost(amount=0.1),
        toys.Listen(),
    ]


@pytest.mark.parametrize("batch", [arrays, mapping])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("training", [True, False])
def test_explaining_changes_no_bit(toys, same_bits, batch, steps, training):
    everything = Everything(toys, many(toys), steps=steps)
    everything.model.train(training)
    everything.model.norm.eval()
    before = everything.snapshot()
    everything.attachment.explain(batch(toys))
    after = everything.snapshot()
    assert {key: same_bits(after[key], before[key]) for key in before} == dict.fromkeys(
        before, True
    )


def test_training_goes_on_as_if_nothing_had_been_explained(toys, same_bits):
    results = []
    for explaining in (False, True):
        everything = Everything(toys, many(toys)[:-1])
        for seed in range(3, 8):
            if explaining:
                everything.attachment.explain(arrays(toys))
            toys.train_step(everything.model, everything.optimizer, seed=seed)
        results.append(everything.snapshot())
    assert same_bits(*results)


def test_explaining_in_the_middle_of_an_accumulation_keeps_the_gradients(toys, same_bits):
    everything = Everything(toys, [toys.Shift(), toys.Scale()])
    true = dict(everything.model.state_dict())
    toys.loss_of(everything.model).backward()
    gradients = {n: p.grad.clone() for n, p in everything.model.named_parameters()}
    everything.attachment.explain(arrays(toys))
    assert same_bits({n: p.grad for n, p in everything.model.named_parameters()}, gradients)
    weights = {n: t for n, t in everything.model.state_dict().items() if n in gradients}
    assert same_bits(weights, {n: t for n, t in true.items() if n in gradients})


def test_an_explanation_has_a_row_per_correction_stage_and_tensor_with_hand_worked_numbers(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    corrections = [toys.Shift(amount=0.5), toys.Louder(factor=3.0), toys.Scale(factor=0.25)]
    attachment = regrad.attach(model, optimizer, corrections, nn.CrossEntropyLoss())
    explanation = attachment.explain(toys.batch())
    rows = {(row["correction"], row["stage"], row["tensor"]): row for row in explanation.rows}
    names = [name for name, _ in model.named_parameters()]
    assert set(rows) == {
        *(("shift", "weights", name) for name in names),
        ("louder", "criterion", "logits"),
        *(("scale", "gradient", name) for name in names),
    }
    assert len(explanation.rows) == len(rows)
    assert rows["scale", "gradient", "head.weight"]["relative_change"] == pytest.approx(
        0.75, rel=1e-6
    )
    assert rows["scale", "gradient", "head.weight"]["cosine"] == pytest.approx(1, rel=1e-6)
    assert rows["louder", "criterion", "logits"]["relative_change"] == pytest.approx(2, rel=1e-5)
    bias = model.head.bias.detach()
    change = (2 * 0.5**2 / bias.square().sum()).sqrt().item()
    assert rows["shift", "weights", "head.bias"]["relative_change"] == pytest.approx(
        change, rel=1e-6
    )


@pytest.fixture
def witness(toys):
    """A correction that writes down, for all of its copies, which step it saw with which gradients."""
    seen = []

    class Witness(toys.Scale):
        name = "witness"

        def correct_gradients(self, step):
            seen.append(
                (
                    step.index,
                    {n: g.clone() for n, g in zip(step.names, step.gradients, strict=True)},
                )
            )

    Witness.seen = seen
    return Witness


def test_the_gradients_explained_are_those_at_the_predicted_weights_with_the_corrected_criterion(
    toys, witness
):
    for explaining in (False, True):
        model = toys.Net()
        optimizer = toys.sgd(model)
        corrections = [toys.Shift(), toys.Louder(), witness()]
        attachment = regrad.attach(model, optimizer, corrections, nn.CrossEntropyLoss())
        inputs, labels = toys.batch()
        if explaining:
            attachment.explain((inputs, labels))
        else:
            attachment.criterion(model(inputs), labels).backward()
            optimizer.step()
    (_, live), (_, explained) = witness.seen
    for name, gradient in live.items():
        torch.testing.assert_close(explained[name], gradient, rtol=0, atol=1e-15)


def test_the_step_explained_is_the_coming_one(toys, witness):
    everything = Everything(toys, [witness(), toys.Push(amount=0.1)], steps=3)
    explanation = everything.attachment.explain(arrays(toys))
    assert [index for index, _ in witness.seen] == [0, 1, 2, 3]
    assert all(
        row["relative_change"] > 0 for row in explanation.rows if row["correction"] == "push"
    )


def test_an_explanation_is_a_table_for_people_and_plain_values_for_programs(toys):
    explanation = Everything(toys, many(toys)).attachment.explain(arrays(toys))
    lines = str(explanation).splitlines()
    assert lines[0].split()[:3] == ["correction", "stage", "tensor"]
    assert len(lines) >= 1 + len(explanation.rows)
    plain = dataclasses.asdict(explanation)
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain) == {"rows", "seconds", "notes"}


def test_the_cost_of_every_correction_that_ran_is_told(toys):
    explanation = Everything(toys, [toys.Push(), toys.Scale()]).attachment.explain(arrays(toys))
    assert set(explanation.seconds) == {"push", "scale"}
    assert all(seconds > 0 for seconds in explanation.seconds.values())


def test_a_correction_with_nothing_to_do_yet_is_noted(toys):
    explanation = Everything(toys, [toys.Push(), toys.Scale()], steps=0).attachment.explain(
        arrays(toys)
    )
    assert any("'push' has nothing to do at this step" in note for note in explanation.notes)
    assert not any("'scale'" in note for note in explanation.notes)


def test_an_order_that_was_changed_is_told(toys):
    class First(toys.Add):
        needs = regrad.correction.Needs(stages=("gradient",), before=("scale",))

    everything = Everything(toys, [toys.Scale(), First()])
    notes = everything.attachment.explain(arrays(toys)).notes
    assert any("'scale' acts after 'add'" in note for note in notes)


@pytest.mark.parametrize("batch", [3, (1, 2, 3), torch.ones(2, 3), [torch.ones(2, 3)]])
def test_a_batch_of_another_kind_is_refused_and_changes_nothing(toys, same_bits, batch):
    everything = Everything(toys, many(toys))
    before = everything.snapshot()
    with pytest.raises(TypeError, match=r"batch must be \(inputs, target\).*or a mapping"):
        everything.attachment.explain(batch)
    assert same_bits(everything.snapshot(), before)


class Returning(nn.Module):
    """A small model that returns what a function makes of its scores and their loss."""

    def __init__(self, returned):
        super().__init__()
        self.layer, self.returned = nn.Linear(3, 2), returned

    def forward(self, inputs, targets=None):
        scores = self.layer(inputs)
        loss = None if targets is None else nn.functional.cross_entropy(scores, targets)
        return self.returned(scores, loss)


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None


BATCH = {"inputs": torch.eye(3), "targets": torch.tensor([0, 1, 1])}


@pytest.mark.parametrize(
    "returned",
    [
        lambda scores, loss: (scores, loss),  # nanoGPT's
        lambda scores, loss: (loss, scores),
        lambda scores, loss: [scores, loss, {"more": 1}, None],
        lambda scores, loss: (scores, loss, loss.detach()),
        lambda scores, loss: loss,
        lambda scores, loss: {"loss": loss, "logits": scores},
        lambda scores, loss: Output(loss),
    ],
)
def test_a_mapping_goes_to_a_model_that_returns_its_loss_in_any_of_the_usual_ways(toys, returned):
    torch.manual_seed(0)
    model = Returning(returned)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = regrad.attach(model, optimizer, [toys.Scale()]).explain(BATCH)
    assert {row["tensor"] for row in told.rows} == {"layer.weight", "layer.bias"}
    assert all(
        row["relative_change"] == pytest.approx(told.rows[0]["relative_change"])
        for row in told.rows
    )


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda scores, loss: scores, r"got a tensor \[3, 2\]"),
        (lambda scores, loss: (scores,), r"got tuple of a tensor \[3, 2\]"),
        (lambda scores, loss: (scores.sum(), loss), r"got tuple of a tensor \[\], a tensor \[\]"),
        (lambda scores, loss: (scores, loss.detach()), r"got tuple of a tensor \[3, 2\], a tensor"),
        (lambda scores, loss: (scores, None), r"got tuple of a tensor \[3, 2\], NoneType"),
        (lambda scores, loss: {"logits": scores}, "got dict with logits"),
        (lambda scores, loss: {"loss": None}, "got dict with loss"),
        (lambda scores, loss: (), "got tuple of nothing"),
        (lambda scores, loss: Output(None), "got Output"),
        (lambda scores, loss: None, "got NoneType"),
    ],
)
def test_a_model_whose_loss_cannot_be_told_is_refused_with_what_it_returned(toys, returned, said):
    model = Returning(returned)
    attachment = regrad.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [toys.Scale()])
    with pytest.raises(
        TypeError, match=f"model must return its loss when the batch is a mapping.*{said}"
    ):
        attachment.explain(BATCH)


def test_a_pair_without_a_criterion_is_refused_with_what_to_pass(toys):
    everything = Everything(toys, [toys.Scale()], criterion=False)
    with pytest.raises(TypeError, match=r"attach\(…, criterion=…\)"):
        everything.attachment.explain(arrays(toys))


def test_a_model_that_fails_on_the_batch_is_put_back(toys, same_bits):
    everything = Everything(toys, many(toys))
    before = everything.snapshot()
    with pytest.raises(RuntimeError):
        everything.attachment.explain((torch.ones(2, 99), torch.zeros(2, dtype=torch.long)))
    assert same_bits(everything.snapshot(), before)


def test_a_correction_that_fails_is_put_back(toys, same_bits):
    class Breaks(toys.Add):
        fails = False

        def correct_gradients(self, step):
            super().correct_gradients(step)
            if self.fails:
                raise ZeroDivisionError

    everything = Everything(toys, [toys.Tally(), toys.Push(), Breaks()])
    before = everything.snapshot()
    Breaks.fails = True
    with pytest.raises(ZeroDivisionError):
        everything.attachment.explain(arrays(toys))
    assert same_bits(everything.snapshot(), before)


def test_a_detached_attachment_may_still_explain(toys, same_bits):
    everything = Everything(toys, [toys.Shift(), toys.Scale()])
    everything.attachment.detach()
    before = everything.snapshot()
    assert {row["correction"] for row in everything.attachment.explain(arrays(toys)).rows} == {
        "shift",
        "scale",
    }
    assert same_bits(everything.snapshot(), before)


def test_state_that_a_correction_puts_into_the_optimizer_is_taken_out_again(toys, same_bits):
    class Reads(toys.Boost):
        def correct_moments(self, step):
            for parameter in step.parameters:
                step.optimizer.state[parameter].setdefault("mine", torch.zeros(1)).add_(1)

    everything = Everything(toys, [Reads()], steps=0)
    before = everything.snapshot()
    everything.attachment.explain(arrays(toys))
    assert same_bits(everything.snapshot(), before)


def test_a_buffer_that_every_forward_replaces_is_put_back(toys):
    class Counting(toys.Messy):
        def __init__(self):
            super().__init__()
            self.register_buffer("forwards", torch.zeros(()))

        def forward(self, x):
            self.forwards = self.forwards + 1
            return super().forward(x)

    model = Counting()
    attachment = regrad.attach(model, toys.sgd(model), [toys.Scale()], nn.CrossEntropyLoss())
    before = model.forwards
    attachment.explain(arrays(toys))
    assert model.forwards is before
    assert model.forwards.item() == 0


def test_an_empty_list_explains_nothing(toys):
    explanation = Everything(toys, []).attachment.explain(arrays(toys))
    assert explanation.rows == []
