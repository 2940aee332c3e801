import shutil

import pytest
import torch
from regrad import RegradError
from regrad_transformers import RegradCallback
from transformers import TrainerCallback

STATEFUL = ["xgrad", "adanorm", "gcw:layers=all,warmup_steps=1,allow_double_lookahead=true"]
SAVING = {"save_strategy": "steps", "save_steps": 2}


def test_a_resumed_training_ends_with_the_same_bits(make_trainer, tmp_path, weights, distance):
    whole = make_trainer([RegradCallback(STATEFUL)], **SAVING)
    whole.train()
    callback = RegradCallback(STATEFUL)
    resumed = make_trainer([callback], **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert distance(weights(resumed.model), weights(whole.model)) == 0
    assert callback.attachment.metrics()["steps_applied"] == 4
    held = sorted(path.name for path in (tmp_path / "out" / "checkpoint-2").glob("regrad*"))
    assert held == ["regrad.json"]  # for people; the state is in optimizer.pt, once

    anew = make_trainer([RegradCallback(STATEFUL, restore=False)], **SAVING)
    anew.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert distance(weights(anew.model), weights(whole.model)) > 1e-5  # their state matters


def test_a_checkpoint_that_was_moved_is_resumed_like_any_other(
    make_trainer, tmp_path, weights, distance
):
    whole = make_trainer([RegradCallback(STATEFUL)], **SAVING)
    whole.train()
    shutil.move(tmp_path / "out" / "checkpoint-2", tmp_path / "moved")
    resumed = make_trainer([RegradCallback(STATEFUL)], **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert distance(weights(resumed.model), weights(whole.model)) == 0


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_a_training_with_another_optimizer_is_resumed_too(
    make_trainer, tmp_path, weights, distance, optim
):
    corrections = ["xgrad", "agc"]
    whole = make_trainer([RegradCallback(corrections)], **SAVING, optim=optim)
    whole.train()
    callback = RegradCallback(corrections)
    resumed = make_trainer([callback], **SAVING, optim=optim)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert distance(weights(resumed.model), weights(whole.model)) == 0
    assert callback.attachment.metrics()["steps_applied"] == 4


def test_a_checkpoint_with_the_state_is_resumed_without_the_callback(make_trainer, tmp_path):
    make_trainer([RegradCallback(STATEFUL)], **SAVING).train()
    bare = make_trainer(**SAVING)
    bare.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert bare.state.global_step == 4


def test_a_checkpoint_that_does_not_fit_is_refused_with_what_to_do_and_leaves_nothing_attached(
    make_trainer, tmp_path
):
    make_trainer([RegradCallback(["xgrad"])], **SAVING).train()
    make_trainer(folder="bare", **SAVING).train()
    with_state, bare = (str(tmp_path / folder / "checkpoint-2") for folder in ("out", "bare"))

    def resume(place, corrections, **options):
        callback = RegradCallback(corrections, **options)
        trainer = make_trainer([callback], **SAVING)
        try:
            trainer.train(resume_from_checkpoint=place)
        finally:
            assert callback.attachment is None or callback.attachment.is_detached
            assert not any(module._forward_pre_hooks for module in trainer.model.modules())

    with pytest.raises(
        RegradError, match=r"xgrad.horizon was 1.0, is 0.5; .*RegradCallback\(…, restore=False\)"
    ):
        resume(with_state, ["xgrad:horizon=0.5"])
    with pytest.raises(
        RegradError, match=r"from training with corrections, got one without; .*restore=False"
    ):
        resume(bare, ["xgrad"])
    resume(bare, ["xgrad"], restore=False)
    file = tmp_path / "out" / "checkpoint-2" / "optimizer.pt"
    held = torch.load(file, weights_only=True)
    group = held["param_groups"][0]
    group["regrad"] = group["regrad"][:400]
    torch.save(held, file)
    with pytest.raises(RegradError, match=r"got a damaged packed copy; .*restore=False"):
        resume(with_state, ["xgrad"])


def test_only_a_receipt_is_written_where_only_the_model_is_saved(make_trainer, tmp_path):
    make_trainer([RegradCallback(["xgrad"])], **SAVING, save_only_model=True).train()
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoint-2").glob("regrad*")) == [
        "regrad.json"
    ]


class Signal(TrainerCallback):
    """What SIGTERM does to a Trainer with `enable_jit_checkpoint`, without the wait."""

    def __init__(self, event, step):
        self.step, self.trainer = step, None
        setattr(self, event, self._ask)

    def _ask(self, args, state, control, **_):
        (jit,) = [c for c in self.trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
        jit.jit_manager.is_checkpoint_requested = state.global_step == self.step


# After either event come the Trainer's own checks at a step's end, or right before the optimizer: inside the window.
@pytest.mark.parametrize("event", ["on_optimizer_step", "on_substep_end"])
def test_a_checkpoint_on_a_signal_is_whole_also_inside_the_window(
    make_trainer, tmp_path, weights, distance, event
):
    corrections = ["xgrad:horizon=50", "adanorm"]
    whole = make_trainer([RegradCallback(corrections)])
    whole.train()
    signal = Signal(event, 1)
    stopped = make_trainer([RegradCallback(corrections), signal], enable_jit_checkpoint=True)
    signal.trainer = stopped
    stopped.train()
    assert stopped.state.global_step == 2
    (place,) = (tmp_path / "out").glob("checkpoint-*")
    assert place.name == ("checkpoint-2" if event == "on_optimizer_step" else "checkpoint-1")
    resumed = make_trainer([RegradCallback(corrections)])
    resumed.train(resume_from_checkpoint=str(place))
    assert distance(weights(resumed.model), weights(whole.model)) == 0
