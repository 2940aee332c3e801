import json

import pytest
import regrad
import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from regrad import RegradError
from regrad_transformers import RegradCallback
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import TrainerCallback

FAR = (
    "xgrad:horizon=50"  # moves weights so far that nobody can take the predicted for the true ones
)


class At(TrainerCallback):
    """Does something at one event."""

    def __init__(self, event, action):
        setattr(
            self, event, lambda args, state, control, **objects: action(state, control, objects)
        )


def shifted_loss(model, batches):
    """The loss of a causal language model over several micro-batches, written out."""
    logits = torch.cat([model(input_ids=b["input_ids"]).logits[:, :-1] for b in batches])
    labels = torch.cat([b["labels"][:, 1:] for b in batches])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    "given", [False, True], ids=["the Trainer's optimizer", "an optimizer given"]
)
def test_the_trainer_trains_as_a_loop_written_out(make_trainer, weights, distance, given):
    corrections = ["xgrad", "agc:max_ratio=0.05", "adanorm"]
    batches, callback = [], RegradCallback(corrections)
    trainer = make_trainer([callback], weight_decay=0.0, max_grad_norm=0.5)
    collate, loop = trainer.data_collator, type(trainer.model)(trainer.model.config)
    loop.load_state_dict(trainer.model.state_dict())
    trainer.data_collator = lambda rows: batches.append(collate(rows)) or batches[-1]
    if given:
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2, weight_decay=0.0)
    trainer.train()

    optimizer = torch.optim.AdamW(loop.parameters(), lr=1e-2, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    before = weights(loop)
    with regrad.attach(loop.train(), optimizer, corrections) as attachment:
        for step in range(4):
            shifted_loss(loop, batches[2 * step : 2 * step + 2]).backward()
            torch.nn.utils.clip_grad_norm_(loop.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        theirs, ours = callback.attachment.metrics(), attachment.metrics()
    # float32: the loop has one sum where the Trainer adds two micro-batches, and Adam divides by small second moments
    assert (
        distance(weights(trainer.model), weights(loop))
        < 1e-5
        < 1e-2
        < distance(before, weights(loop))
    )
    assert theirs == pytest.approx(ours, rel=1e-3)
    assert theirs["steps_applied"] == 4
    assert theirs["xgrad/weights/share_touched"] == 1
    assert 0 < theirs["agc/gradient/share_touched"] < 1


def test_the_end_of_training_detaches_and_leaves_a_receipt(make_trainer, tmp_path):
    callback = RegradCallback([FAR])
    trainer = make_trainer(
        [
            callback,
            At(
                "on_step_end",
                lambda state, control, _: setattr(
                    control, "should_training_stop", state.global_step == 2
                ),
            ),
        ]
    )
    trainer.train()
    assert callback.attachment.is_detached
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())
    receipt = json.loads((tmp_path / "out" / "regrad.json").read_text())
    assert (receipt["order"], receipt["steps_applied"]) == (["xgrad"], 2)


def test_metrics_are_in_the_history_and_reach_callbacks_that_come_later_and_reporters_after_add_to(
    make_trainer,
):
    seen = []
    reporter = At("on_log", lambda state, control, objects: seen.append(dict(objects["logs"])))
    trainer = make_trainer([reporter], eval_strategy="steps", eval_steps=2)
    RegradCallback(["xgrad"]).add_to(trainer)
    trainer.train()
    training = [log for log in trainer.state.log_history if "loss" in log or "train_loss" in log]
    assert [log["regrad/steps_applied"] for log in training] == [2, 4, 4]
    assert all(0 < log["regrad/xgrad/weights/relative_change"] < 1 for log in training)
    assert [
        log["regrad/steps_applied"] for log in seen if "loss" in log or "train_loss" in log
    ] == [2, 4, 4]
    assert not any(key.startswith("regrad/") for log in seen if "eval_loss" in log for key in log)

    later = []
    reporter = At("on_log", lambda state, control, objects: later.append(dict(objects["logs"])))
    make_trainer([RegradCallback(["xgrad"]), reporter]).train()
    assert [log["regrad/steps_applied"] for log in later] == [2, 4, 4]


def test_evaluations_checkpoints_and_the_best_model_see_true_weights(
    make_trainer, tmp_path, weights, distance
):
    at_steps, evaluated = {}, {}
    notes = [
        At(
            "on_step_end",
            lambda state, control, objects: at_steps.update(
                {state.global_step: weights(objects["model"])}
            ),
        ),
        At(
            "on_evaluate",
            lambda state, control, objects: evaluated.update(
                {state.global_step: objects["metrics"]["eval_loss"]}
            ),
        ),
    ]
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(
        [RegradCallback([FAR]), *notes],
        **often,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    told = dict(evaluated)  # evaluating below notes again
    best = min(told, key=told.get)
    assert distance(weights(trainer.model), at_steps[best]) == 0
    for step, loss in told.items():
        assert (
            distance(
                load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors"),
                at_steps[step],
            )
            == 0
        )
        trainer.model.load_state_dict(at_steps[step])
        assert trainer.evaluate()["eval_loss"] == loss


def test_a_model_saved_between_two_micro_batches_holds_the_true_weights(
    make_trainer, tmp_path, weights, distance
):
    kept, apart = {}, []

    def save(state, control, objects):
        if state.global_step == 3:
            trainer.save_model(tmp_path / "inside")
            apart.append(distance(weights(trainer.model), kept))

    notes = [
        At("on_step_begin", lambda *_: kept.update(weights(trainer.model))),
        At("on_substep_end", save),
    ]
    trainer = make_trainer([RegradCallback([FAR]), *notes])
    before = At(
        "on_step_begin",
        lambda state, control, _: setattr(control, "should_training_stop", state.global_step == 3),
    )
    trainer.add_callback(before)
    trainer.train()
    assert apart[0] > 0.1  # the window was open
    assert distance(load_file(tmp_path / "inside" / "model.safetensors"), kept) == 0


@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step"])
def test_after_an_exception_inside_the_window_the_weights_are_true_and_training_can_begin_again(
    make_trainer, weights, distance, event
):
    kept = {}

    def fail(state, control, _):
        if state.global_step == 2 and not kept.get("failed"):
            kept["failed"], kept["moved"] = True, weights(trainer.model)
            raise KeyboardInterrupt

    callback = RegradCallback([FAR])
    trainer = make_trainer([callback, At(event, fail)])
    trainer.add_callback(At("on_step_begin", lambda *_: kept.update(true=weights(trainer.model))))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert distance(kept["moved"], kept["true"]) > 0.1
    callback.detach()
    assert distance(weights(trainer.model), kept["true"]) == 0
    first = callback.attachment
    trainer.train()
    assert callback.attachment is not first
    assert callback.attachment.metrics()["steps_applied"] == 4


def test_every_training_attaches_anew_also_where_model_and_optimizer_are_made_anew(
    make_trainer, cases
):
    callback, seen = RegradCallback(["xgrad", regrad.create("agc", max_ratio=0.05)]), []
    trainer = make_trainer([callback], model_init=cases.language_model)
    for _ in range(2):  # as a hyperparameter search does for every trial
        trainer.train()
        seen.append(callback.attachment)
        assert callback.attachment.is_detached
        assert callback.attachment.model is trainer.model
    assert seen[0].model is not seen[1].model
    assert seen[0].metrics() == seen[1].metrics()
    assert seen[1].corrections[1].options.max_ratio == 0.05


def test_checkpointed_activations_give_the_same_bits(make_trainer, weights, distance):
    ends = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            [RegradCallback(["xgrad", "agc"])], activation_checkpointing=checkpointing
        )
        trainer.train()
        ends.append(weights(trainer.model))
    assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules())
    assert distance(*ends) == 0


def test_a_compiled_model_gives_the_bits_of_the_plain_one(make_trainer, weights, distance):
    ends, short = [], {"max_steps": 2, "gradient_accumulation_steps": 1}
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        callback = RegradCallback([FAR])
        trainer = make_trainer([callback], **short, **settings)
        trainer.train()
        ends.append(weights(trainer.model))
        assert callback.attachment.metrics()["xgrad/weights/share_touched"] == 1
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert distance(*ends) == 0


def test_what_attach_refuses_reaches_the_user_before_training(
    make_trainer, tmp_path, weights, distance
):
    trainer = make_trainer([RegradCallback(["xgrad"])])
    trainer.optimizer = torch.optim.LBFGS(trainer.model.parameters())
    before = weights(trainer.model)
    with pytest.raises(RegradError, match="'xgrad' must see one closure call; LBFGS makes several"):
        trainer.train()
    assert distance(weights(trainer.model), before) == 0
    assert trainer.state.global_step == 0


def test_deepspeed_is_refused_when_training_begins(make_trainer):
    callback = RegradCallback(["xgrad"])
    trainer = make_trainer([callback])
    sharded = DeepSpeedOptimizerWrapper(torch.optim.SGD(trainer.model.parameters(), lr=0.1))
    with pytest.raises(RegradError, match="DeepSpeed hides gradients; use DDP, FSDP2"):
        callback.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=sharded
        )


def test_options_are_checked_before_there_is_a_trainer():
    with pytest.raises(
        TypeError, match=r"corrections must be a list, got 'xgrad'; write \['xgrad'\]"
    ):
        RegradCallback("xgrad")
    with pytest.raises(TypeError, match="corrections must be names or Correction objects, got 3"):
        RegradCallback([3])
    with pytest.raises(ValueError, match="horizon must be"):
        RegradCallback(["xgrad:horizon=-1"])
