"""Every case at a small size: it runs, both sides agree where they should, and nothing is left attached."""

import types

import pytest
import regrad
import torch
from regrad.window import Window
from regrad_bench import about, cases
from regrad_bench.all_cases import chosen_cases
from regrad_bench.alone_cases import alone_cases
from regrad_bench.cases import BEYOND_THE_METER, Attached, Setting
from regrad_bench.growth_cases import readers
from regrad_bench.measure import measure
from regrad_bench.step_cases import GOALS, that_go_together
from regrad_bench.tensors import Gradients, largest_difference, resnet50_gradients, square_layers
from regrad_bench.training import Trainer, resnet20
from torch import nn

QUICK = Setting(device=torch.device("cpu"), quick=True)
ALONE = {case.name: case for case in alone_cases()}
# float32, and for AdaNorm the difference of two large moments; the losses and the clips agree closely
EQUAL = {
    "alone/agc": 1e-6,
    "alone/agc-idle": 1e-6,
    "alone/clip-norm": 1e-6,
    "alone/centralization": 1e-5,
}
QUICK_WEIGHTS = resnet50_gradients(QUICK.device, quick=True).parameters
EQUAL |= {"alone/adanorm": 1e-4} | {name: 1e-6 for name in ALONE if "powergrad" in name}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# At a small size four processes are two.
@pytest.mark.long
@pytest.mark.parametrize("name", [c.name for c in chosen_cases() if c.name != "processes/4"])
def test_a_case_runs_at_a_small_size_or_says_why_not(name):
    (case,) = chosen_cases(name)
    state = torch.random.get_rng_state()
    result = measure(case, QUICK, pairs=2)
    assert torch.equal(state, torch.random.get_rng_state())
    if result.ratio is None:
        assert result.reason
        # No stages in a list of layers or in a transformer; no parameters in a loss; not everything
        # goes together.
        assert name.partition("/")[0] in ("growth", "vit", "gpt", "together")
        return
    assert 0 < result.low <= result.ratio <= result.high
    if case.only_memory:
        assert result.ours_ms is None
        assert result.memory_ratio == result.ratio
        return
    assert result.ours_ms > 0 < result.peer_ms
    assert (result.memory_ratio is not None) == (case.memory_goal is not None)


@pytest.mark.long
@pytest.mark.parametrize("name", EQUAL)
def test_both_sides_of_a_pair_compute_the_same(name):
    pair = ALONE[name].build(QUICK)
    assert pair.difference() <= EQUAL[name]
    pair.close()


def test_our_cautious_step_and_timms_move_the_weights_alike_and_mask_some():
    (case,) = chosen_cases("update/cautious-timm")
    pair = case.build(QUICK)
    assert pair.difference() <= 1e-4
    for _ in range(2):
        pair.prepare()
        pair.ours()
        pair.prepare()  # as a timing does: the sides take turns
        pair.peer()
    pair.prepare()  # turns the signs of every second row
    (group,) = pair.ours.__self__.optimizer.param_groups
    before = [parameter.detach().clone() for parameter in group["params"]]
    pair.ours()
    pairs = zip(group["params"], before, strict=True)
    stayed = [float((now == then).float().mean()) for now, then in pairs]
    assert 0.1 < sum(stayed) / len(stayed) < 0.9
    pair.peer()
    assert pair.difference() <= 1e-4
    pair.close()


@pytest.mark.parametrize(
    "name", [name for name in EQUAL if "agc" in name or "clip" in name or "central" in name]
)
def test_what_both_sides_agree_on_is_not_the_untouched_gradient(name):
    pair = ALONE[name].build(QUICK)
    pair.prepare()
    model = pair.ours.__self__.model
    before = [p.grad.clone() for p in model.parameters()]
    pair.ours()
    changed = largest_difference([p.grad for p in model.parameters()], before)
    assert changed == 0 if name == "alone/agc-idle" else changed > 0.01
    pair.close()


@pytest.mark.long
@pytest.mark.parametrize("name", ["alone/xgrad", "alone/xgrad-looped"])
def test_the_weights_move_in_every_call_that_is_timed(name, monkeypatch):
    moved = []
    close = Window.close

    def counted(window, **how):
        moved.append(len(window.moved))
        return close(window, **how)

    monkeypatch.setattr(Window, "close", counted)
    pair = ALONE[name].build(QUICK)
    for _ in range(4):  # beside the peer's steps
        pair.ours()
        pair.peer()
    assert moved[-4:] == [len(QUICK_WEIGHTS)] * 4
    pair.close()


def test_every_goal_of_the_project_has_a_case_or_a_correction_that_is_not_installed():
    names = {case.name for case in chosen_cases("step/*")}
    assert {f"step/{name}" for name in GOALS if name in regrad.available()} <= names
    assert {case.goal for case in chosen_cases("alone/*")} == {None, 0.2, 1.0, 1.1, 1.3, 1.6}


def test_resnet_50_has_161_tensors_and_quick_ones_are_small():
    cpu = torch.device("cpu")
    model = resnet50_gradients(cpu, quick=False)
    assert (len(model.parameters), sum(p.numel() for p in model.parameters)) == (161, 25_557_032)
    assert sum(p.numel() for p in resnet50_gradients(cpu, quick=True).parameters) < 10**6


def test_square_layers_have_the_millions_asked_for():
    assert (
        sum(p.numel() for p in square_layers(2, torch.device("cpu"), quick=False).parameters)
        == 2 * 1024**2 + 10 * 1024
    )


@pytest.mark.parametrize(
    "name", [case.name for case in chosen_cases("growth/*") if case.name.endswith("agc")]
)
def test_the_small_side_of_growth_has_gradients_that_are_corrected(name):
    pair = chosen_cases(name)[0].build(QUICK)
    pair.prepare()
    layer = pair.peer.__self__.model[0]
    before = layer.weight.grad.clone()
    pair.peer()
    assert not torch.equal(layer.weight.grad, before)
    pair.prepare()
    assert torch.equal(layer.weight.grad, before)
    pair.close()


def test_corrections_that_go_together_are_attached_together():
    names = that_go_together(QUICK, 2)
    assert len(names) == 2
    with pytest.raises(
        ValueError, match="100 corrections that can be attached together must be installed"
    ):
        that_go_together(QUICK, 100)


def test_gradients_come_back_as_they_were():
    gradients = Gradients(nn.Linear(3, 2), relative_size=0.1)
    first = [g.clone() for g in gradients.gradients]
    for gradient in gradients.gradients:
        gradient.zero_()
    gradients.refill(2.0)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, gradients.gradients, strict=True))


def test_the_meter_does_not_look_while_a_correction_is_timed():
    model = nn.Linear(3, 2)
    gradients = Gradients(model, relative_size=0.1)
    attached = Attached(
        model, torch.optim.SGD(model.parameters(), lr=0.1), ["clip-norm:max_norm=0.001"]
    )
    before = gradients.gradients[0].clone()
    attached.correct()
    assert attached.engine.applied == BEYOND_THE_METER + 1
    assert not attached.engine.meter.sums
    assert gradients.gradients[0].norm() < before.norm()
    attached.attachment.detach()


def test_a_step_with_a_correction_trains_and_one_without_any_is_the_plain_step():
    pairs = [chosen_cases(f"step/{name}")[0].build(QUICK) for name in ("none", "clip-norm")]
    trained = []
    for pair in pairs:
        for side in (pair.ours, pair.peer):
            side()
            trained.append(
                torch.cat([p.detach().flatten() for p in side.__self__.model.parameters()])
            )
        pair.close()
    start = torch.cat(
        [p.detach().flatten() for p in Trainer(resnet20(QUICK), QUICK.device).model.parameters()]
    )
    none, plain, clipped, _ = trained
    assert torch.equal(none, plain)
    assert not torch.equal(plain, start)
    assert not torch.equal(plain, clipped)


def test_readers_have_names_of_their_own():
    assert [correction.name for correction in readers(3)] == ["reader-0", "reader-1", "reader-2"]


def test_a_pattern_that_fits_no_case_names_them_all():
    with pytest.raises(
        ValueError,
        match=r"only must match the name of a case, got 'nothing'; there are step/none, ",
    ):
        chosen_cases("nothing")


def test_an_accelerator_of_any_type_is_measured_and_named(monkeypatch):
    monkeypatch.setattr(cases, "accelerator", lambda: "xpu")
    assert [device.type for device in cases.devices_of("all")] == ["cpu", "xpu"]
    assert [device.type for device in cases.devices_of("xpu")] == ["xpu"]
    with pytest.raises(ValueError, match="device must be one of all, cpu, xpu, got 'cuda'"):
        cases.devices_of("cuda")
    monkeypatch.setattr(about, "accelerator", lambda: "xpu")
    named = types.SimpleNamespace(get_device_name=lambda number: f"device {number}")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: named)
    assert about.graphics() == "device 0"
    monkeypatch.setattr(torch, "get_device_module", lambda kind: types.SimpleNamespace())
    assert about.graphics() == "xpu"
    monkeypatch.setattr(about, "accelerator", lambda: None)
    assert about.graphics() == "no accelerator device"


def test_without_a_device_or_a_correction_a_case_says_not_measured(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    there = Setting(device=torch.device("cuda"), quick=True)
    result = measure(ALONE["alone/agc"], there, pairs=1)
    assert (result.verdict, result.reason, result.goal) == (
        "not measured",
        "no CUDA device here",
        0.2,
    )
    monkeypatch.setattr(regrad.registry, "available", lambda group="regrad": {})
    result = measure(ALONE["alone/agc"], QUICK, pairs=1)
    assert result.verdict == "not measured"
    assert "no correction named 'agc'" in result.reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [case.name for case in chosen_cases() if not case.host_only])
def test_a_case_runs_on_a_gpu_and_counts_its_launches(name):
    (case,) = chosen_cases(name)
    result = measure(case, Setting(device=torch.device("cuda"), quick=True), pairs=2)
    if result.reason is None and not case.only_memory:
        assert result.ours_launches > 0
        assert result.peer_launches > 0 or case.memory_goal is not None  # a copy is no kernel
