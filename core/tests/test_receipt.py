"""The receipt, and the state that goes into a checkpoint with it."""

import importlib.metadata
import io
import json
import platform
from dataclasses import dataclass

import pytest
import regrad
import torch
from regrad import RegradError, correction


def attached(toys, corrections, *, steps=0, model=None):
    model = model or toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, corrections, torch.nn.CrossEntropyLoss())
    for seed in range(steps):
        toys.train_step(model, optimizer, seed=seed, criterion=attachment.criterion)
    return attachment


def test_a_receipt_is_complete_and_json_can_hold_it(toys):
    torch.manual_seed(77)
    attachment = attached(toys, [toys.Shift(amount=0.25), toys.Scale(), toys.Louder()], steps=3)
    receipt = json.loads(json.dumps(attachment.receipt()))
    assert receipt == attachment.receipt()
    names = [name for name, _ in attachment.model.named_parameters()]
    assert receipt["corrections"] == [
        {
            "name": name,
            "distribution": "local",
            "version": "",
            "options": options,
            "stages": [stage],
            "matched": [] if stage == "criterion" else names,
        }
        for name, options, stage in [
            ("shift", {"amount": 0.25}, "weights"),
            ("scale", {"factor": 0.5}, "gradient"),
            ("louder", {"factor": 3.0}, "criterion"),
        ]
    ]
    assert receipt["order"] == ["shift", "scale", "louder"]
    assert (receipt["steps_applied"], receipt["steps_skipped"]) == (3, 0)
    assert receipt["seed"] == 77
    assert set(receipt["effects"]) == {"shift", "scale", "louder"}
    environment = receipt["environment"]
    assert environment["python"] == platform.python_version()
    assert environment["torch"] == str(torch.__version__)
    assert environment["device"] == "cpu"
    assert environment["regrad"] == importlib.metadata.version("regrad")


def test_the_receipt_lists_the_parameters_that_a_correction_selects(toys):
    class Heads(toys.Scale):
        def selects(self, name, parameter):
            return name.startswith("head") and parameter.dim() == 2

    assert attached(toys, [Heads()]).receipt()["corrections"][0]["matched"] == ["head.weight"]


def test_options_of_every_kind_become_plain_values(toys):
    class Odd(toys.Spy):
        @dataclass(frozen=True, kw_only=True)
        class Options(correction.Options):
            names: tuple[str, ...] = ("a", "b")
            limit: float | None = None
            dtype: torch.dtype = torch.float32

    options = attached(toys, [Odd()]).receipt()["corrections"][0]["options"]
    assert options == {"names": ["a", "b"], "limit": None, "dtype": "torch.float32"}


def test_state_goes_through_torch_save_with_weights_only(toys, same_bits):
    attachment = attached(toys, [toys.Tally(), toys.Scale()], steps=3)
    file = io.BytesIO()
    torch.save(attachment.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert same_bits(state, attachment.state_dict())
    again = toys.Tally()
    resumed = attached(toys, [again, toys.Scale()])
    resumed.load_state_dict(state)
    assert same_bits(resumed.state_dict()["corrections"], attachment.state_dict()["corrections"])
    assert resumed.metrics()["steps_applied"] == 3


def test_a_resumed_run_has_the_numbers_the_counts_and_the_effects_of_one_that_never_stopped(
    toys, same_bits
):
    def run(model, optimizer, attachment, seeds):
        for seed in seeds:
            toys.train_step(model, optimizer, seed=seed)
        return toys.weights_of(model), attachment.metrics()

    def fresh():
        model = toys.Net()
        optimizer = toys.sgd(model)
        corrections = [toys.Push(amount=0.1), toys.Scale(), toys.Boost(amount=0.01), toys.Tally()]
        return model, optimizer, regrad.attach(model, optimizer, corrections)

    whole = run(*fresh(), range(24))
    first = fresh()
    run(*first, range(15))
    states = [part.state_dict() for part in first]
    second = fresh()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    resumed = run(*second, range(15, 24))
    assert same_bits(resumed[0], whole[0])
    assert resumed[1] == pytest.approx(whole[1], rel=1e-6)


def test_state_is_loaded_by_name_in_whatever_order(toys):
    class Other(toys.Tally):
        name = "other"

    first, second = toys.Tally(), Other()
    state = attached(toys, [first, second], steps=2).state_dict()
    state["corrections"]["other"]["body.weight"].fill_(50)
    first, second = toys.Tally(), Other()
    resumed = attached(toys, [second, first])
    resumed.load_state_dict(state)
    assert int(first.seen["body.weight"]) == 2
    assert int(second.seen["body.weight"]) == 50


@pytest.mark.parametrize(
    ("here", "difference"),
    [
        (lambda toys: [toys.Scale()], "'add' is missing here"),
        (lambda toys: [toys.Scale(), toys.Add(), toys.Shift()], "'shift' is new here"),
        (lambda toys: [toys.Scale(factor=0.25), toys.Add()], "scale.factor was 0.5, is 0.25"),
    ],
)
def test_state_of_other_corrections_or_options_is_refused_with_the_difference(
    toys, here, difference
):
    state = attached(toys, [toys.Scale(), toys.Add()], steps=2).state_dict()
    other = attached(toys, here(toys))
    with pytest.raises(RegradError, match=difference) as caught:
        other.load_state_dict(state)
    assert "strict=False" in str(caught.value)
    assert other.metrics()["steps_applied"] == 0
    other.load_state_dict(state, strict=False)
    assert other.metrics()["steps_applied"] == 2


def test_all_differences_are_told_at_once(toys):
    state = attached(toys, [toys.Scale(), toys.Tally()]).state_dict()
    with pytest.raises(RegradError, match=r"scale.factor was 0.5, is 2.0") as caught:
        attached(toys, [toys.Scale(factor=2.0), toys.Add()]).load_state_dict(state)
    assert "'tally' is missing here" in str(caught.value)
    assert "'add' is new here" in str(caught.value)


def test_strict_false_loads_what_goes_by_the_same_name(toys):
    state = attached(toys, [toys.Tally(), toys.Scale()], steps=2).state_dict()
    tally = toys.Tally()
    attached(toys, [tally, toys.Add()]).load_state_dict(state, strict=False)
    assert int(tally.seen["head.bias"]) == 2


def test_a_state_read_back_from_json_receipts_compares_equal(toys):
    attachment = attached(toys, [toys.Scale()], steps=1)
    state = attachment.state_dict()
    state["receipt"] = json.loads(json.dumps(state["receipt"]))
    attached(toys, [toys.Scale()]).load_state_dict(state)


def test_loading_inside_the_window_restores_the_weights(toys, same_bits):
    attachment = attached(toys, [toys.Shift()])
    true = toys.weights_of(attachment.model)
    toys.loss_of(attachment.model)
    attachment.load_state_dict(attachment.state_dict())
    assert same_bits(toys.weights_of(attachment.model), true)


def test_state_for_a_correction_that_keeps_none_is_refused(toys):
    with pytest.raises(RegradError, match="correction 'scale' has no state, got something"):
        toys.Scale().load_state_dict({"something": 1})


def test_what_is_in_a_state_dict_does_not_change_with_later_steps(toys, same_bits):
    attachment = attached(toys, [toys.Tally()], steps=2)
    state = attachment.state_dict()
    kept = torch.load(saved(state), weights_only=True)
    toys.train_step(attachment.model, attachment.optimizer)
    assert same_bits(state, kept)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file
