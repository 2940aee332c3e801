import pytest
import regrad
import torch
from regrad_runner.settings.specs import read_spec
from regrad_runner.training.optimizers import (
    build_optimizer,
    of_another_class,
    optimizer_class,
    spec_of,
)
from regrad_runner.workloads.workload import Defaults

DEFAULTS = Defaults(
    epochs=1, batch_size=1, lr=0.05, momentum=0.9, weight_decay=5e-4, model="resnet8"
)


def parameters():
    return [torch.nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("sgd", {}),
        ("sgd:momentum=0.9", {"momentum": 0.9}),
        ("sgd: momentum = .9 , nesterov=true", {"momentum": 0.9, "nesterov": True}),
        ("sgd:foreach=none", {"foreach": None}),
    ],
)
def test_a_spec_is_a_name_with_options(text, options):
    assert read_spec(text) == ("sgd", options)


def test_a_spec_without_values_is_refused():
    with pytest.raises(
        ValueError,
        match="optimizer must look like 'name:option=value,option=value', got 'sgd:fast'",
    ):
        read_spec("sgd:fast")


def test_the_workloads_settings_belong_to_its_own_optimizer():
    assert spec_of(None, DEFAULTS) == ("sgd:momentum=0.9,weight_decay=0.0005", 0.05)
    assert spec_of("sgd:momentum=0", DEFAULTS) == ("sgd:momentum=0,weight_decay=0.0005", 0.05)
    assert spec_of("adamw", DEFAULTS) == ("adamw", 1e-3)


def test_a_complete_spec_stays_as_it_is():
    spec, _ = spec_of("sgd:nesterov=true", DEFAULTS)
    assert spec_of(spec, DEFAULTS)[0] == spec


def test_a_learning_rate_inside_the_spec_is_refused():
    with pytest.raises(
        ValueError, match=r"optimizer must not set lr, got 'adam:lr=0.1'; use the setting lr"
    ):
        spec_of("adam:lr=0.1", DEFAULTS)


def test_an_optimizer_gets_its_options_and_a_controls_changes():
    optimizer = build_optimizer(
        "sgd:momentum=0.9", parameters(), lr=0.1, changes={"nesterov": True}
    )
    group = optimizer.param_groups[0]
    assert (type(optimizer), group["momentum"], group["nesterov"], group["lr"]) == (
        torch.optim.SGD,
        0.9,
        True,
        0.1,
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sdg", "no optimizer named 'sdg'; there are: .*adamw.*sgd"),
        ("lbfgs", "no optimizer named 'lbfgs'"),
        pytest.param(
            "xgrad",
            "no optimizer named 'xgrad'; .*; 'xgrad' is a correction: give it to --corrections",
            marks=pytest.mark.skipif(
                "xgrad" not in regrad.available(), reason="needs regrad-xgrad"
            ),
        ),
        ("sgd:betas=1", "optimizer 'sgd' has no option 'betas'; allowed: momentum"),
        (
            "sgd:momentum=-1",
            "optimizer must be one that torch accepts, got 'sgd:momentum=-1': Invalid momentum",
        ),
        ("sgd:momentum=nan", "momentum must be finite, got nan in optimizer 'sgd:momentum=nan'"),
        ("sgd:momentum=-inf", "momentum must be finite, got -inf in optimizer"),
        ("sgd:momentum=fast", "optimizer must be one that torch accepts"),
    ],
)
def test_an_unfit_optimizer_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(spec, parameters(), lr=0.1)


def test_the_class_of_a_plugin_is_found_by_its_entry_point(monkeypatch):
    monkeypatch.setattr("regrad.available", lambda group: {"mine": None})
    monkeypatch.setattr("regrad.load", lambda name, group: torch.optim.Adam)
    assert optimizer_class("mine") is torch.optim.Adam


def test_another_class_keeps_what_both_have_group_by_group_and_its_own_defaults():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1], "lr": 0.3}, {"params": parameters[1:], "eps": 1e-4}]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), fused=True)
    nadam = of_another_class(adamw, torch.optim.NAdam, changes={"decoupled_weight_decay": True})
    assert type(nadam) is torch.optim.NAdam
    first, second = nadam.param_groups
    assert (first["lr"], first["eps"]) == (0.3, 1e-8)
    assert (second["lr"], second["eps"]) == (0.1, 1e-4)
    for group in (first, second, nadam.defaults):
        assert group["betas"] == (0.8, 0.9)
        assert group["weight_decay"] == 0.01
        assert group["decoupled_weight_decay"]
        assert group["momentum_decay"] == 4e-3
        assert "fused" not in group
    assert first["params"][0] is parameters[0]
    assert second["params"][0] is parameters[1]


def test_what_the_other_class_does_not_take_is_refused():
    adamw = torch.optim.AdamW(parameters())
    with pytest.raises(ValueError, match=r"optimizer_class must be one that takes .*, got NAdam: "):
        of_another_class(adamw, torch.optim.NAdam, changes={"no_such_option": 1})
    with pytest.raises(ValueError, match="got NAdam: Invalid momentum_decay"):
        of_another_class(adamw, torch.optim.NAdam, changes={"momentum_decay": -1.0})
