"""Several micro-batches make one optimizer step: one prediction, one correction, the same numbers."""

import pytest
import regrad
import torch

STEPS = 6


def train(
    toys,
    corrections,
    micro_batches,
    *,
    dtype=torch.float64,
    criterion=None,
    optimizer_class=torch.optim.SGD,
):
    """Train on batches of 32, cut into `micro_batches`; return weights and the attachment."""
    model = toys.Net(dtype=dtype)
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = optimizer_class(model.parameters(), lr=0.05, **options)
    attachment = regrad.attach(
        model, optimizer, corrections, criterion or torch.nn.CrossEntropyLoss()
    )
    for seed in range(STEPS):
        inputs, labels = toys.batch(32, seed=seed, dtype=dtype)
        optimizer.zero_grad()
        for part, target in zip(
            inputs.chunk(micro_batches), labels.chunk(micro_batches), strict=True
        ):
            (attachment.criterion(model(part), target) / micro_batches).backward()
        optimizer.step()
    return toys.weights_of(model), attachment


def every_stage(toys):
    return [
        toys.Push(amount=0.02),
        toys.Louder(),
        toys.Scale(),
        toys.UnitRows(),
        toys.Boost(amount=0.01),
        toys.Stretch(),
    ]


def test_there_is_one_prediction_and_one_correction_per_optimizer_step(toys):
    shift, spy = toys.Shift(), toys.Spy()
    _, attachment = train(toys, [shift, spy], 4)
    assert shift.calls == STEPS
    assert spy.indices == list(range(STEPS))
    assert spy.learned == STEPS
    assert attachment.metrics()["steps_applied"] == STEPS


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_four_times_eight_is_once_thirty_two(toys, optimizer_class):
    runs = [
        train(toys, every_stage(toys), parts, optimizer_class=optimizer_class)[0]
        for parts in (1, 4)
    ]
    untouched = train(toys, [], 1, optimizer_class=optimizer_class)[0]
    for name, whole in runs[0].items():
        torch.testing.assert_close(runs[1][name], whole, rtol=0, atol=1e-12)
    assert not torch.allclose(untouched["head.weight"], runs[0]["head.weight"], atol=1e-3)


def test_four_times_eight_is_once_thirty_two_in_single_precision(toys):
    # Dividing by row norms is left out: in front of a normalisation some gradients are rounding errors only.
    runs = [
        train(
            toys,
            [toys.Push(amount=0.02), toys.Scale(), toys.Boost(amount=0.01)],
            parts,
            dtype=torch.float32,
        )[0]
        for parts in (1, 4)
    ]
    for name, whole in runs[0].items():
        torch.testing.assert_close(runs[1][name], whole, rtol=0, atol=1e-6)


def test_the_correction_sees_the_gradient_of_the_whole_batch(toys):
    spies = [toys.Spy(), toys.Spy()]
    for spy, parts in zip(spies, (1, 4), strict=True):
        train(toys, [spy], parts)
    for whole, parts in zip(spies[0].gradients, spies[1].gradients, strict=True):
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-12)


def test_an_evaluation_between_two_micro_batches_predicts_the_same_again(toys, same_bits):
    results = []
    for evaluate in (False, True):
        model = toys.Net()
        optimizer = toys.sgd(model)
        regrad.attach(model, optimizer, [toys.Push(amount=0.1)])
        for seed in range(3):
            optimizer.zero_grad()
            toys.loss_of(model, seed=seed).backward()
            if evaluate:
                model.eval()
                toys.loss_of(model)
                model.train()
            toys.loss_of(model, seed=seed + 10).backward()
            optimizer.step()
        results.append(toys.weights_of(model))
    assert same_bits(*results)
