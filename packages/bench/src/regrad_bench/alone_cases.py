"""One correction's own work on ResNet-50's tensors, beside peers that implement the same method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace

import regrad
import torch
from pytorch_optimizer import centralize_gradient
from pytorch_optimizer.base.optimizer import BaseOptimizer
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW

from regrad_bench.cases import Attached, Case, Pair, Setting
from regrad_bench.tensors import HEAD, Gradients, largest_difference, resnet50_gradients

# The largest norm allowed is far below that of the gradients: they are scaled.
MAX_NORM = 0.1
DECAY = 0.95
BETAS = (0.9, 0.999)
LARGE_LOGITS = 10**8
# Goals of the ratio, and for the largest size of the ratio of peak memories too.
LOSS_SIZES = {(8192, 50257): 1.0, (512, 50257): None, (128, 1000): 1.3, (128, 10): 1.3}


def alone_cases() -> list[Case]:
    """Return the cases: gradients, weights, moments, losses."""
    gradients = [
        Case(
            name="alone/agc", ours="agc, every unit clipped", peer="timm", build=_agc(0.1), goal=0.2
        ),
        Case(name="alone/agc-idle", ours="agc, no unit clipped", peer="timm", build=_agc(1e-4)),
        Case(
            name="alone/clip-norm",
            ours="clip-norm",
            peer="torch's clip_grad_norm_",
            build=_clip_norm,
        ),
        Case(
            name="alone/centralization",
            ours="centralization",
            peer="pytorch_optimizer",
            build=_centralization,
        ),
        Case(
            name="alone/adanorm",
            ours="adanorm, every tensor too short",
            peer="pytorch_optimizer",
            build=_adanorm,
        ),
    ]
    fused = Case(
        name="alone/xgrad",
        ours="xgrad's prediction and restore",
        peer="AdamW step, fused",
        build=_xgrad,
        goal=1.6,
    )
    looped = replace(
        fused, name="alone/xgrad-looped", peer="AdamW step, looped", build=_xgrad_looped, goal=None
    )
    compiled = replace(
        fused,
        name="alone/xgrad-compiled",
        ours="xgrad's prediction, compiled, and restore",
        build=_xgrad_compiled,
        goal=1.1,
    )
    held = Case(
        name="alone/xgrad-memory",
        ours="xgrad's first step",
        peer="one copy of the weights",
        build=_xgrad_memory,
        memory_goal=1.05,
    )
    losses = [_loss_case(*size, goal) for size, goal in LOSS_SIZES.items()]
    names = [name for name in regrad.available("regrad.optimizers") if _takes_weights_alone(name)]
    optimizers = [_optimizer_case(name) for name in names]
    return [*gradients, fused, looped, compiled, held, *losses, *optimizers]


def _sgd(gradients: Gradients) -> SGD:
    return SGD(gradients.parameters, lr=1e-6, momentum=0.9)


def _in_place(gradients: Gradients, correction: str, peer: Callable[[], object]) -> Pair:
    """Return a pair that changes the same gradients in place; each call gets them again."""
    attached = Attached(gradients.model, _sgd(gradients), [correction])

    def prepare() -> None:
        gradients.refill()
        attached.pass_the_meter()

    def result(call: Callable[[], object]) -> list[Tensor]:
        prepare()
        call()
        return [gradient.clone() for gradient in gradients.gradients]

    return Pair(
        ours=attached.correct,
        peer=peer,
        prepare=prepare,
        difference=lambda: largest_difference(result(attached.correct), result(peer)),
        close=attached.attachment.detach,
    )


def _agc(relative_size: float) -> Callable[[Setting], Pair]:
    def build(setting: Setting) -> Pair:
        gradients = resnet50_gradients(
            setting.device, quick=setting.quick, relative_size=relative_size
        )
        clipped = [p for name, p in gradients.model.named_parameters() if name != f"{HEAD}.weight"]
        return _in_place(gradients, f"agc:head={HEAD}", lambda: adaptive_clip_grad(clipped))

    return build


def _clip_norm(setting: Setting) -> Pair:
    gradients = resnet50_gradients(setting.device, quick=setting.quick)
    peer = lambda: clip_grad_norm_(gradients.parameters, MAX_NORM)  # noqa: E731
    return _in_place(gradients, f"clip-norm:max_norm={MAX_NORM}", peer)


def _centralization(setting: Setting) -> Pair:
    gradients = resnet50_gradients(setting.device, quick=setting.quick)

    def peer() -> None:
        for gradient in gradients.gradients:  # as its optimizers do
            centralize_gradient(gradient)

    return _in_place(gradients, "centralization", peer)


def _adanorm(setting: Setting) -> Pair:
    gradients = resnet50_gradients(setting.device, quick=setting.quick)
    optimizer = AdamW(gradients.parameters, lr=1e-6, betas=BETAS)
    optimizer.step()
    attached = Attached(gradients.model, optimizer, [f"adanorm:decay={DECAY}"])
    averages = [torch.zeros(1, device=setting.device) for _ in gradients.parameters]
    moments = [optimizer.state[p]["exp_avg"] for p in gradients.parameters]

    def peer() -> list[Tensor]:
        pairs = zip(gradients.gradients, averages, strict=True)
        return [
            BaseOptimizer.get_adanorm_gradient(g, adanorm=True, exp_grad_norm=e, r=DECAY)
            for g, e in pairs
        ]

    def difference() -> float:
        torch._foreach_zero_(moments)
        attached.correct()
        added = torch._foreach_mul(moments, BETAS[0] / (1 - BETAS[0]))
        return largest_difference(torch._foreach_add(gradients.gradients, added), peer())

    # A first gradient of this size keeps the averages above all later ones: the rule acts on every
    # tensor.
    gradients.refill(1e4)
    attached.correct()
    peer()
    gradients.refill()
    return Pair(
        ours=attached.correct,
        peer=peer,
        prepare=attached.pass_the_meter,
        difference=difference,
        close=attached.attachment.detach,
    )


def _xgrad(setting: Setting) -> Pair:
    return _xgrad_against(setting, "xgrad", fused=True, foreach=False)


def _xgrad_looped(setting: Setting) -> Pair:
    return _xgrad_against(setting, "xgrad", fused=False, foreach=False)


def _xgrad_compiled(setting: Setting) -> Pair:
    return _xgrad_against(setting, "xgrad:compiled=true", fused=True, foreach=False)


def _xgrad_against(setting: Setting, correction: str, **kind: bool) -> Pair:
    """Time the window beside a plain step on weights of its own.

    On the same weights the plain step would be another optimizer's, and the prediction would pause.
    """
    gradients = resnet50_gradients(setting.device, quick=setting.quick)
    attached_to = AdamW(gradients.parameters, lr=1e-6, betas=BETAS, **kind)
    attached = Attached(gradients.model, attached_to, [correction])
    others = resnet50_gradients(setting.device, quick=setting.quick)
    plain = AdamW(others.parameters, lr=1e-6, betas=BETAS, **kind)

    def prepare() -> None:
        """Take an optimizer step, which the next prediction extrapolates."""
        attached_to.step()
        attached.pass_the_meter()

    prepare()
    attached.predict_and_restore()
    return Pair(
        ours=attached.predict_and_restore,
        peer=plain.step,
        prepare=prepare,
        close=attached.attachment.detach,
    )


def _xgrad_memory(setting: Setting) -> Pair:
    """Compare what is allocated in a first step with one copy of the weights."""
    gradients = resnet50_gradients(setting.device, quick=setting.quick)

    def first_step() -> None:
        attached = Attached(gradients.model, _sgd(gradients), ["xgrad"])
        attached.correct()
        attached.correct()
        attached.attachment.detach()

    return Pair(ours=first_step, peer=lambda: [torch.empty_like(p) for p in gradients.parameters])


def _takes_weights_alone(name: str) -> bool:
    """Say whether an optimizer can be made of parameters and a learning rate, and nothing else."""
    parameters = inspect.signature(regrad.load(name, "regrad.optimizers")).parameters
    needed = [key for key, value in parameters.items() if value.default is value.empty]
    return needed == ["params"]


def _optimizer_case(name: str) -> Case:
    """Return the case of an installed optimizer: nothing is attached to it."""

    def build(setting: Setting) -> Pair:
        gradients = resnet50_gradients(setting.device, quick=setting.quick)
        kind = regrad.load(name, "regrad.optimizers")
        ours = kind(gradients.parameters, lr=1e-6)
        if "binary" in ours.defaults:
            ours = kind([{"params": _as_signs(gradients.parameters), "binary": True}], lr=1e-6)
        return Pair(ours=ours.step, peer=Adam(gradients.parameters, lr=1e-6).step)

    return Case(
        name=f"alone/optimizer-{name}",
        ours=f"{name}'s step",
        peer="Adam step, as torch takes it",
        build=build,
    )


def _as_signs(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return parameters of -1 and +1 with the gradients of others, for optimizers of such."""
    signs = []
    for parameter in parameters:
        sign = nn.Parameter(torch.where(parameter.detach() >= 0, 1.0, -1.0))
        sign.grad = parameter.grad
        signs.append(sign)
    return signs


def _loss_case(rows: int, classes: int, goal: float | None) -> Case:
    def build(setting: Setting) -> Pair:
        shape = (min(rows, 16), min(classes, 100)) if setting.quick else (rows, classes)
        return _loss(shape, setting.device)

    return Case(
        name=f"alone/powergrad-{rows}x{classes}",
        ours=f"powergrad's loss and gradient, {rows} × {classes}",
        peer="F.cross_entropy",
        build=build,
        goal=goal,
        memory_goal=goal if rows * classes > LARGE_LOGITS else None,
        most_pairs=5 if rows * classes > LARGE_LOGITS else 1000,
        repeats=max(1, 10**6 // (rows * classes)),
    )


def _loss(shape: tuple[int, int], device: torch.device) -> Pair:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(shape, device=device).normal_(std=3, generator=generator).requires_grad_()
    target = torch.randint(shape[1], shape[:1], generator=generator, device=device)
    model = nn.Linear(1, 1, device=device)
    attached = Attached(model, SGD(model.parameters(), lr=0.1), ["powergrad"], F.cross_entropy)

    def forward_and_backward(criterion: Callable[..., Tensor]) -> None:
        criterion(logits, target).backward()  # type: ignore[no-untyped-call]
        logits.grad = None

    def difference() -> float:
        with torch.no_grad():
            return largest_difference(
                [attached.attachment.criterion(logits, target)], [F.cross_entropy(logits, target)]
            )

    return Pair(
        ours=lambda: forward_and_backward(attached.attachment.criterion),
        peer=lambda: forward_and_backward(F.cross_entropy),
        difference=difference,
        close=attached.attachment.detach,
    )
