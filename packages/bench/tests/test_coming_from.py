"""What docs/coming_from.md says of peers is what they do here; where a peer changes, a test fails."""

import pytest
import regrad
import torch
from pytorch_optimizer import AdaBelief, AdaFactor, AdamP, AdaNorm, Lookahead, centralize_gradient
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

STEPS, SHORT = (
    60,
    0.2,
)  # the second half's gradients are shorter, so that AdaNorm has something to do


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(make_optimizer, *, corrections=(), before_step=None) -> tuple[list[Tensor], dict]:
    """Return the weights after some steps, and what the corrections did."""
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer, generator = make_optimizer(model), torch.Generator().manual_seed(1)
    with regrad.attach(model, optimizer, list(corrections), criterion) as attachment:
        for step in range(STEPS):
            inputs = 3 * torch.randn(6, 12, generator=generator, dtype=torch.float64)
            targets = torch.randint(5, (6,), generator=generator)
            (criterion(model(inputs), targets) * (1 if step < STEPS // 2 else SHORT)).backward()
            if before_step:
                before_step(model)
            optimizer.step()
            optimizer.zero_grad()
        return [
            parameter.detach().clone() for parameter in model.parameters()
        ], attachment.metrics()


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    ("mode", "value", "correction"),
    [
        ("norm", 0.1, "clip-norm:max_norm=0.1"),
        ("value", 0.01, "clip-value:max_value=0.01"),
        ("agc", 0.01, "agc:max_ratio=0.01,head=none"),
    ],
)
def test_what_timm_clips_is_clipped_to_the_same_bits(mode, value, correction):
    def clip(model):
        dispatch_clip_grad(model.parameters(), value=value, mode=mode)

    theirs, _ = train(sgd, before_step=clip)
    ours, metrics = train(sgd, corrections=[correction])
    assert metrics[f"{correction.partition(':')[0]}/gradient/trigger_rate"] > 0
    assert difference(ours, theirs) == 0


def test_timm_clips_the_head_where_it_is_given_all_parameters():
    theirs, _ = train(
        sgd,
        before_step=lambda model: dispatch_clip_grad(model.parameters(), value=0.01, mode="agc"),
    )
    without, _ = train(
        sgd,
        before_step=lambda model: dispatch_clip_grad(but_the_heads(model), value=0.01, mode="agc"),
    )
    ours, _ = train(sgd, corrections=["agc:max_ratio=0.01"])
    assert difference(ours, theirs) > 0.1
    assert difference(ours, without) == 0


def but_the_heads(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but the weight of the head."""
    return [parameter for name, parameter in model.named_parameters() if name != "2.weight"]


def test_adam_with_adanorm_is_the_optimizer_of_pytorch_optimizer():
    theirs, _ = train(lambda model: AdaNorm(model.parameters(), lr=0.01))
    plain, _ = train(lambda model: torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.99)))
    ours, metrics = train(
        lambda model: torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.99)),
        corrections=["adanorm"],
    )
    assert metrics["adanorm/moment/trigger_rate"] > 0
    assert difference(ours, theirs) < 1e-5
    assert difference(plain, theirs) > 0.01


@pytest.mark.parametrize(
    ("kind", "option"),
    [(AdaBelief, "use_gc"), (AdaFactor, "use_gc"), (AdaFactor, "adanorm"), (AdamP, "adanrom")],
)
def test_some_optimizers_of_pytorch_optimizer_take_an_option_that_they_do_not_have_and_ignore_it(
    kind, option
):
    ignored, _ = train(lambda model: kind(model.parameters(), lr=1e-3, **{option: True}))
    plain, _ = train(lambda model: kind(model.parameters(), lr=1e-3))
    assert difference(ignored, plain) == 0


@pytest.mark.parametrize(
    ("kind", "option"), [(AdaBelief, "adanorm"), (AdamP, "adanorm"), (AdamP, "use_gc")]
)
def test_others_take_it_and_use_it(kind, option):
    used, _ = train(lambda model: kind(model.parameters(), lr=1e-3, **{option: True}))
    plain, _ = train(lambda model: kind(model.parameters(), lr=1e-3))
    assert difference(used, plain) > 1e-3


@pytest.mark.parametrize("name", ["adanrom", "centralization:use_gc=true"])
def test_what_we_do_not_have_is_refused(name):
    model = network()
    with pytest.raises((ValueError, TypeError), match=r"no correction named|has no option"):
        regrad.attach(model, sgd(model), [name])


def test_pytorch_optimizer_centralizes_depthwise_layers_and_we_leave_them_alone():
    layer = nn.Conv2d(4, 4, 3, groups=4)
    gradient = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    theirs = gradient.clone()
    centralize_gradient(theirs)
    assert not torch.allclose(theirs, gradient)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with regrad.attach(layer, optimizer, ["centralization"]):
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.clone()
        layer.train()(torch.zeros(1, 4, 3, 3))
        optimizer.step()
    assert torch.equal(layer.weight.detach(), before - gradient)


def test_corrections_work_on_the_optimizer_inside_lookahead():
    _, metrics = train(
        lambda model: Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2), k=5),
        corrections=["centralization"],
    )
    assert metrics["steps_applied"] == STEPS
    assert metrics["centralization/gradient/share_touched"] > 0


def test_option_names_of_ours_that_stand_for_theirs():
    assert regrad.create("agc").options.max_ratio == 0.01
    assert regrad.create("agc").options.weight_floor == 1e-3
    assert regrad.create("centralization:conv_only=true").options.conv_only
    assert regrad.create("adanorm").options.decay == 0.95
