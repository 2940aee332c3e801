from functools import partial

import pytest
import torch
from regrad import RegradError
from regrad_transformers import RegradCallback
from regrad_transformers.loss import shifts_labels
from torch.nn import functional as F
from transformers import BertForSequenceClassification, LlamaForCausalLM

NEUTRAL = ["powergrad:alpha=1.0"]


INSIDE, BESIDE = "inside", "beside"
# SGD, since Adam would enlarge what another order of sums changes in small gradients.
SMOOTHING = {"label_smoothing_factor": 0.2, "optim": "sgd", "learning_rate": 0.5}


def trained(make_trainer, weights, corrections, where=INSIDE, **settings):
    """Train with the loss corrected inside the model, or beside it by `compute_loss`; return what came out."""
    callback = RegradCallback(corrections)
    wire = {"compute_loss_func": callback.compute_loss} if where == BESIDE else {}
    trainer = make_trainer([callback], more=wire, **settings)
    trainer.train()
    told = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return weights(trainer.model), told, callback


@pytest.mark.parametrize("where", [INSIDE, BESIDE])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("make", ["language_model", "unnamed_language_model", "classifier"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_at_the_neutral_setting_a_model_trains_to_the_bits_of_its_own_loss(
    make_trainer, weights, distance, cases, make, parts, where, bf16
):
    settings = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 2}
    settings |= {"data": cases.topics() if make == "classifier" else None, "bf16": bf16}
    make = getattr(cases, make)
    own, told, _ = trained(make_trainer, weights, [], model=make(), **settings)
    ours, ours_told, _ = trained(make_trainer, weights, NEUTRAL, where, model=make(), **settings)
    assert (distance(ours, own), ours_told) == (0, told)
    corrected, _, callback = trained(
        make_trainer, weights, ["powergrad"], where, model=make(), **settings
    )
    assert distance(corrected, own) > 1e-3
    assert callback.attachment.metrics()["powergrad/criterion/share_touched"] == 1


def test_inside_and_beside_the_model_the_correction_is_the_same(make_trainer, weights, distance):
    ends = [trained(make_trainer, weights, ["powergrad"], where)[0] for where in (INSIDE, BESIDE)]
    assert distance(*ends) == 0


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("make", ["language_model", "unnamed_language_model"])
def test_label_smoothing_is_the_trainers(make_trainer, weights, distance, cases, make, parts):
    settings = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 2}
    make = getattr(cases, make)
    own, told, _ = trained(make_trainer, weights, [], model=make(), **SMOOTHING, **settings)
    ours, ours_told, _ = trained(
        make_trainer, weights, NEUTRAL, BESIDE, model=make(), **SMOOTHING, **settings
    )
    assert distance(ours, own) < 1e-6
    assert ours_told == pytest.approx(told, rel=1e-6)
    plain, _, _ = trained(
        make_trainer,
        weights,
        [],
        model=make(),
        **{**SMOOTHING, "label_smoothing_factor": 0.0},
        **settings,
    )
    assert distance(ours, plain) > 1e-4

    callback, trainer = RegradCallback(NEUTRAL), make_trainer(model=make(), **SMOOTHING, **settings)
    callback.add_to(trainer)
    trainer.train()
    assert distance(weights(trainer.model), own) < 1e-6


def test_label_smoothing_that_is_out_of_reach_is_refused_before_the_first_step(
    make_trainer, weights, distance
):
    trainer = make_trainer([RegradCallback(["powergrad"])], **SMOOTHING)
    before = weights(trainer.model)
    rule = r"the Trainer computes label_smoothing_factor beside the model; pass .*callback.compute_loss"
    with pytest.raises(RegradError, match=rule):
        trainer.train()
    assert distance(weights(trainer.model), before) == 0


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


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_loss_without_cross_entropy_is_refused_before_the_first_step_with_what_to_do(
    make_trainer, weights, distance, cases, problem
):
    callback = RegradCallback(["xgrad", "powergrad"])
    model = cases.classifier()
    model.config.problem_type = problem
    rows = [{**row, "labels": torch.ones(5)} for row in cases.topics()]
    trainer = make_trainer([callback], model=model, data=rows)
    before = weights(trainer.model)
    rule = "'powergrad' corrects cross entropy, and the first training batch had none that it could reach"
    with pytest.raises(RegradError, match=rule):
        trainer.train()
    assert distance(weights(trainer.model), before) == 0
    assert callback.attachment.is_detached


def test_a_compiled_model_has_its_loss_corrected_beside_it_or_is_refused(
    make_trainer, weights, distance
):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    with pytest.raises(RegradError, match=r"if the model is compiled, .*compute_loss_func="):
        trained(make_trainer, weights, ["powergrad"], **compiled)
    ours, told, _ = trained(make_trainer, weights, ["powergrad"], BESIDE, **compiled)
    plain, plain_told, _ = trained(make_trainer, weights, ["powergrad"], max_steps=2)
    assert (distance(ours, plain), told) == (0, plain_told)


def test_compute_loss_is_the_models_own_without_a_correction_of_the_criterion_too(
    make_trainer, weights, distance, cases
):
    make, ends = cases.unnamed_language_model, []
    for where in (INSIDE, BESIDE):
        trained_weights, _, callback = trained(make_trainer, weights, ["agc"], where, model=make())
        ends.append(trained_weights)
        assert callback._inputs is None
    assert distance(*ends) == 0


def test_an_evaluation_before_training_has_the_models_own_loss(make_trainer, cases):
    callback = RegradCallback(["powergrad"])
    for make in (cases.unnamed_language_model, cases.aligned):
        settings = {"model": make(), "eval_on_start": True, "eval_strategy": "epoch"}
        beside = make_trainer(
            [callback], more={"compute_loss_func": callback.compute_loss}, **settings
        )
        plain = make_trainer(model=make())
        assert beside.evaluate()["eval_loss"] == pytest.approx(
            plain.evaluate()["eval_loss"], rel=1e-6
        )
        beside.train()
        plain.model.load_state_dict(beside.model.state_dict())
        assert beside.evaluate()["eval_loss"] == pytest.approx(
            plain.evaluate()["eval_loss"], rel=1e-6
        )


class Shrinking(LlamaForCausalLM):
    """A model whose own loss has a part beside cross entropy."""

    def forward(self, input_ids, labels=None, **options):
        outputs = super().forward(input_ids, labels=labels, **options)
        if labels is not None:
            outputs.loss = outputs.loss + outputs.logits.square().mean()
        return outputs


def test_a_loss_with_another_part_keeps_it_inside_and_is_refused_beside(
    make_trainer, weights, distance, cases
):
    model = Shrinking(cases.language_model().config)
    kept = weights(model)

    def train(corrections, where):
        model.load_state_dict(kept, strict=False)
        return trained(make_trainer, weights, corrections, where, model=model)[0]

    assert distance(train(NEUTRAL, INSIDE), train([], INSIDE)) == 0
    rule = "loss must be cross entropy of every label, got .* from the model itself"
    with pytest.raises(RegradError, match=rule):
        train(NEUTRAL, BESIDE)


class OwnSum(BertForSequenceClassification):
    """A model that cannot be told how many labels a step has."""

    accepts_loss_kwargs = False


def test_beside_a_model_that_counts_nothing_accumulation_is_refused(make_trainer, weights, cases):
    settings = {"model": OwnSum(cases.classifier().config), "data": cases.topics()}
    with pytest.raises(RegradError, match="the loss of OwnSum by, and it does not; leave compute_"):
        trained(make_trainer, weights, NEUTRAL, BESIDE, **settings)
    trained(make_trainer, weights, NEUTRAL, BESIDE, gradient_accumulation_steps=1, **settings)


@pytest.mark.parametrize(
    ("make", "shifts"),
    [("language_model", True), ("unnamed_language_model", True), ("aligned", False)],
)
def test_a_model_is_asked_whether_it_shifts_and_stays_as_it_is(cases, make, shifts):
    model = getattr(cases, make)().train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert shifts_labels(model) is shifts
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_add_to_needs_no_wire_and_leaves_a_loss_of_the_users_own(make_trainer, weights, distance):
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
        match=r"labels must be class indices of shape \[4\], got none; leave compute_loss_func out",
    ):
        compute_loss({"logits": logits}, None)
    with pytest.raises(RegradError, match=r"of shape \[4\], got \[4, 5\] of torch.float32"):
        compute_loss({"logits": logits}, torch.zeros(4, 5))
    with pytest.raises(RegradError, match="got a model that adds its aux_loss"):
        compute_loss(
            {"logits": logits, "aux_loss": torch.ones(())}, torch.zeros(4, dtype=torch.long)
        )
    with pytest.raises(
        RegradError, match="from one GPU per process, got several; start with torchrun"
    ):
        compute_loss({"logits": logits}, torch.zeros(4, dtype=torch.long), torch.ones(2, 1))
