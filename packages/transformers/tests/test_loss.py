from functools import partial

import pytest
import torch
from regrad import RegradError
from regrad_transformers import RegradCallback
from torch.nn import functional as F

NEUTRAL = ["powergrad:alpha=1.0"]


def trained(make_trainer, weights, corrections, wired=True, **settings):
    callback = RegradCallback(corrections)
    trainer = make_trainer(
        [callback], more={"compute_loss_func": callback.compute_loss if wired else None}, **settings
    )
    trainer.train()
    return (
        weights(trainer.model),
        [log["loss"] for log in trainer.state.log_history if "loss" in log],
        callback,
    )


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
def test_at_the_neutral_setting_a_language_model_trains_to_the_bits_of_its_own_loss(
    make_trainer, weights, distance, settings
):
    own, told, _ = trained(make_trainer, weights, [], wired=False, **settings)
    ours, ours_told, _ = trained(make_trainer, weights, NEUTRAL, **settings)
    assert (distance(ours, own), ours_told) == (0, told)
    corrected, _, callback = trained(make_trainer, weights, ["powergrad"], **settings)
    assert distance(corrected, own) > 1e-3
    assert callback.attachment.metrics()["powergrad/criterion/share_touched"] == 1


def test_at_the_neutral_setting_a_classifier_trains_to_the_bits_of_its_own_loss(
    make_trainer, weights, distance, cases
):
    make, rows = cases.classifier, cases.topics
    settings = {"data": rows(), "gradient_accumulation_steps": 1}
    own, told, _ = trained(make_trainer, weights, [], wired=False, model=make(), **settings)
    ours, ours_told, _ = trained(make_trainer, weights, NEUTRAL, model=make(), **settings)
    assert (distance(ours, own), ours_told) == (0, told)


def test_accumulation_of_a_classifier_is_the_whole_batch_though_its_own_loss_is_not(
    make_trainer, weights, distance, cases
):
    make, rows = cases.classifier, cases.topics
    parts, batch = (
        {"data": rows()},
        {"data": rows(), "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8},
    )
    whole, told, _ = trained(make_trainer, weights, NEUTRAL, model=make(), **batch)
    ours, ours_told, _ = trained(make_trainer, weights, NEUTRAL, model=make(), **parts)
    assert distance(ours, whole) < 1e-5
    assert ours_told == pytest.approx(told, rel=1e-5)
    # The model takes the mean of each micro-batch, and the Trainer does not divide by their number.
    _, own_told, _ = trained(make_trainer, weights, [], wired=False, model=make(), **parts)
    assert own_told[0] == pytest.approx(2 * told[0], rel=1e-2)


def test_label_smoothing_is_the_trainers(make_trainer, weights, distance):
    own, told, _ = trained(make_trainer, weights, [], wired=False, label_smoothing_factor=0.2)
    ours, ours_told, _ = trained(make_trainer, weights, NEUTRAL, label_smoothing_factor=0.2)
    assert distance(ours, own) < 1e-5  # the Trainer's has another order of sums
    assert ours_told == pytest.approx(told, rel=1e-6)
    plain, _, _ = trained(make_trainer, weights, NEUTRAL)
    assert distance(ours, plain) > 1e-3


def test_evaluation_is_plain_cross_entropy_before_and_after_training(make_trainer):
    callback = RegradCallback(["powergrad"])
    trainer, plain = (
        make_trainer([callback], more={"compute_loss_func": callback.compute_loss}),
        make_trainer(),
    )
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    trainer.train()
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_a_criterion_that_the_trainer_never_calls_is_refused_before_the_first_step_with_what_to_type(
    make_trainer, weights, distance
):
    callback = RegradCallback(["xgrad", "powergrad"])
    trainer = make_trainer([callback])
    before = weights(trainer.model)
    with pytest.raises(
        RegradError,
        match=r"'powergrad' corrects the criterion, .*compute_loss_func=callback.compute_loss",
    ):
        trainer.train()
    assert distance(weights(trainer.model), before) == 0
    assert callback.attachment.is_detached


def test_add_to_wires_the_criterion_and_leaves_a_loss_of_the_users_own(
    make_trainer, weights, distance
):
    ours, _, _ = trained(make_trainer, weights, ["powergrad"])
    callback, trainer = RegradCallback(["powergrad"]), make_trainer()
    callback.add_to(trainer)
    trainer.train()
    assert distance(weights(trainer.model), ours) == 0

    def own(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return (
            callback.criterion(logits, labels[:, 1:].flatten(), reduction="sum")
            / num_items_in_batch
        )

    trainer = make_trainer(more={"compute_loss_func": own})
    callback.add_to(trainer)
    trainer.train()
    assert trainer.compute_loss_func is own
    assert distance(weights(trainer.model), ours) < 1e-5


def test_a_criterion_with_class_weights_is_the_one_that_is_corrected():
    logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
    weight = torch.tensor([1.0, 2.0, 3.0])
    callback = RegradCallback([], criterion=partial(F.cross_entropy, weight=weight))
    loss = callback.compute_loss({"logits": logits}, labels, 4)
    first, second = (-F.log_softmax(logits, dim=-1)[row, label] for row, label in enumerate(labels))
    assert loss.item() == pytest.approx((1 * first.item() + 3 * second.item()) / 4)
    assert callback.compute_loss((logits,), labels).item() == pytest.approx(
        (first.item() + 3 * second.item()) / 4
    )


def test_what_is_no_cross_entropy_of_every_position_is_refused():
    compute_loss, logits = RegradCallback(["powergrad"]).compute_loss, torch.zeros(4, 5)
    with pytest.raises(
        RegradError,
        match=r"labels must be class indices of shape \[4\], got none; write a compute_loss_",
    ):
        compute_loss({"logits": logits}, None)
    with pytest.raises(RegradError, match=r"of shape \[4\], got \[4, 5\] of torch.float32"):
        compute_loss({"logits": logits}, torch.zeros(4, 5))
    with pytest.raises(RegradError, match="got a model that adds its aux_loss"):
        compute_loss(
            {"logits": logits, "aux_loss": torch.ones(())}, torch.zeros(4, dtype=torch.long)
        )
    with pytest.raises(
        RegradError, match="of one GPU per process, got several; start with torchrun"
    ):
        compute_loss({"logits": logits}, torch.zeros(4, dtype=torch.long), torch.ones(2, 1))
