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
    assert (tmp_path / "out" / "checkpoint-2" / "regrad.json").is_file()

    anew = make_trainer([RegradCallback(STATEFUL, restore=False)], **SAVING)
    anew.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert distance(weights(anew.model), weights(whole.model)) > 1e-5  # their state matters


def test_a_checkpoint_that_was_moved_is_resumed_from_where_the_callback_is_told(
    make_trainer, tmp_path, weights, distance
):
    whole = make_trainer([RegradCallback(STATEFUL)], **SAVING)
    whole.train()
    shutil.move(tmp_path / "out" / "checkpoint-2", tmp_path / "moved")
    shutil.copytree(
        tmp_path / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-2"
    )  # of another step
    place = str(tmp_path / "moved")
    with pytest.raises(
        RegradError,
        match=r"got none of step 2 of its run in .*checkpoint-2.*give RegradCallback the resume_from",
    ):
        make_trainer([RegradCallback(STATEFUL)], **SAVING).train(resume_from_checkpoint=place)
    resumed = make_trainer([RegradCallback(STATEFUL, resume_from_checkpoint=place)], **SAVING)
    resumed.train(resume_from_checkpoint=place)
    assert distance(weights(resumed.model), weights(whole.model)) == 0


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
            assert callback.attachment.is_detached
            assert not any(module._forward_pre_hooks for module in trainer.model.modules())

    with pytest.raises(
        RegradError, match=r"xgrad.horizon was 1.0, is 0.5; RegradCallback\(…, restore=False\)"
    ):
        resume(with_state, ["xgrad:horizon=0.5"])
    with pytest.raises(
        RegradError, match=r"of a training with corrections, got one without; .*restore=False"
    ):
        resume(bare, ["xgrad"])
    resume(bare, ["xgrad"], restore=False)
    file = tmp_path / "out" / "checkpoint-2" / "regrad.pt"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(
        RegradError,
        match=r"must be tensors and plain values, got another or half a file in .*regrad.pt",
    ):
        resume(with_state, ["xgrad"])
    file.unlink()
    with pytest.raises(RegradError, match=r"got none of step 2 of its run in .*, restore=False"):
        resume(with_state, ["xgrad"])


def test_a_state_file_that_would_run_code_is_not_loaded(make_trainer, tmp_path):
    make_trainer([RegradCallback(["xgrad"])], **SAVING).train()
    torch.save({"attachment": shutil.rmtree}, tmp_path / "out" / "checkpoint-2" / "regrad.pt")
    with pytest.raises(RegradError, match="must be tensors and plain values"):
        make_trainer([RegradCallback(["xgrad"])], **SAVING).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")
        )


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
