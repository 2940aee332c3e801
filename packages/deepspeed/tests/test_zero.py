"""ZeRO on two gloo processes against one process with whole batches, in float32."""

import functools
import importlib.util

import pytest
from regrad_testing import load_beside, run_on_processes

cases_zero = load_beside(__file__, "cases_zero")

TOLERANCE = 1e-6  # sums over processes are taken in another order
PATIENCE = 500.0  # seconds: importing DeepSpeed takes some on a busy machine
STAGES = (1, 2, 3)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed; `nox -s deepspeed` installs it",
    ),
    pytest.mark.timeout(600),
]


@functools.cache
def trained(stage, optimizer, parts):
    """Return what two processes say of a training with each correction, once."""
    return run_on_processes(cases_zero.trained_apart, stage, optimizer, parts, patience=PATIENCE)


@pytest.fixture(scope="module", params=STAGES)
def life(request, tmp_path_factory):
    """Return what two processes say of what an engine's life brings, and the stage."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    seen = run_on_processes(cases_zero.lived, request.param, folder, patience=PATIENCE)
    return request.param, seen


@pytest.mark.parametrize(("optimizer", "parts"), [("sgd", 1), ("adamw", 2)])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_end_as_one_with_whole_batches(stage, optimizer, parts):
    for seen in trained(stage, optimizer, parts):
        assert len(seen) > 10
        for name, one in seen.items():
            assert one["far"] <= TOLERANCE, name
            assert one["applied"] == cases_zero.STEPS, name
            assert one["layout"] == f"zero-{stage}", name
            # Another training, and so a test that would fail if nothing was corrected.
            assert name == "none" or one["effect"] > 100 * TOLERANCE, name


def test_a_training_that_is_resumed_ends_with_the_bits_of_one_that_is_not(life):
    _, seen = life
    for found in seen:
        assert set(found["resumed"]) == {
            *("adamw, attached first", "adamw, loaded first"),
            *("plain, attached first", "plain, loaded first"),
        }
        for case, one in found["resumed"].items():
            assert one["same"], case
            assert one["applied"] == cases_zero.STEPS, case


def test_a_checkpoint_of_other_corrections_is_refused_and_one_of_none_is_said(life):
    _, seen = life
    for found in seen:
        loaded = found["loaded_otherwise"]
        assert "must come from the same corrections; 'clip-norm' is new here" in loaded["refused"]
        assert len(loaded["told"]) == 1
        assert "loaded without the state of 'xgrad'" in loaded["told"][0]


def test_evaluating_and_saving_between_micro_batches_sees_the_true_weights(life):
    _, seen = life
    for found in seen:
        between = found["looked_at_in_between"]
        assert between.pop("far") <= TOLERANCE
        assert between == dict.fromkeys(("moved", "state", "evaluation", "saved"), True)


def test_a_step_that_deepspeed_leaves_out_is_left_out_by_corrections(life):
    _, seen = life
    for found in seen:
        skipped = found["skipped"]
        assert skipped["left out"]
        assert (skipped["steps_applied"], skipped["steps_skipped"]) == (cases_zero.STEPS, 1)
        assert skipped["far"] <= TOLERANCE


def test_weights_in_bfloat16_are_predicted_from_those_in_float32(life):
    _, seen = life
    for found in seen:
        assert found["predicted_in_bfloat16"]["wrong"] == []
        assert found["predicted_in_bfloat16"]["moved"]["relative_change"] > 0


def test_detach_leaves_no_trace_and_a_second_attachment_is_refused_before(life):
    _, seen = life
    for found in seen:
        detached = found["detached"]
        assert detached["left"] == []
        assert "already attached" in detached["twice"]
        assert detached["applied"] == 2


def test_the_receipt_says_how_deepspeed_clips(life):
    _, seen = life
    for found in seen:
        assert found["clipped"] == {
            "off": ["DeepSpeed does not clip (gradient_clipping is 0)"],
            "default": [
                "DeepSpeed clips the norm of corrected gradients at 1 (gradient_clipping): "
                "corrections come first"
            ],
        }


def test_what_cannot_be_exact_is_refused_with_what_to_do(life):
    stage, seen = life
    for found in seen:
        said = found["refused"]
        assert "attach must come after deepspeed.initialize" in said["before initialize"]
        assert "attach must come after deepspeed.initialize" in said["inner optimizer"]
        assert "model must be the engine of the optimizer, got Linear" in said["another model"]
        assert f"'gcode' is not exact on layout 'zero-{stage}': it reads" in said["micro"]
        assert "ZeRO keeps the optimizer's moments flat" in said["moments"]
        assert said["module and optimizer"] == ""
        if stage == 1:
            assert "must be that of ZeRO, stage 1, 2 or 3, got DeepSpeed's" in said["stage 0"]
        if stage > 1:
            assert "offload_optimizer and offload_param must be off" in said["offload"]
