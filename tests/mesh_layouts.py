"""What the processes of `test_meshes.py` run: each correction on each layout against one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import regrad
import torch
from regrad.sharding import local, total_norm
from regrad_bop import Bop, Bop2
from regrad_centralization.functional import Unit as Means
from regrad_centralization.functional import subtract_, unit_means
from regrad_clipping.functional import Unit, clip_units_
from regrad_testing.clauses import difference
from regrad_testing.layout_clauses import fsdp2, fsdp2_by_columns
from regrad_testing.loops import whole
from regrad_tom import Tom
from regrad_xgrad import AdaM3
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

STEPS, ROWS, LENGTH, WIDTH, CLASSES = 5, 8, 4, 6, 3
FACTORS = (1.0, 1.0, 0.1)  # on the loss, so that gradients grow and shrink
LARGEST = 1e-12
"""How far a float64 weight may end from one process: sums are taken in another order."""


class Net(nn.Module):
    """A block with a class token and a gate of one output.

    Dimension 0 of the token, the gate and (on four processes) the head is smaller than
    the number of processes, so some of them hold nothing of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, WIDTH))
        self.up = nn.Linear(WIDTH, 8)
        self.down = nn.Linear(8, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.gather = nn.Identity()
        self.gate = nn.Linear(WIDTH, 1)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [N, C] of inputs [N, L, W]."""
        hidden = self.gather(self.norm(self.down(torch.tanh(self.up(inputs + self.token)))))
        pooled = (inputs + hidden).mean(dim=1)
        logits: Tensor = self.head(pooled * torch.sigmoid(self.gate(pooled)))
        return logits


def filled(kind: type[nn.Module]) -> nn.Module:
    """Return a model in float64 with the same weights on every process."""
    generator = torch.Generator().manual_seed(0)
    model = kind().double()
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(numbers / 2)
    return model


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Return inputs [ROWS, L, W] and classes [ROWS]."""
    generator = torch.Generator().manual_seed(100 + index)
    inputs = torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(CLASSES, (ROWS,), generator=generator)


Layout = Callable[[Any], tuple[int, int]]
# How a model is laid out. Each returns which of how many equal parts of a batch the process sees.


def by_rows(model: nn.Module) -> tuple[int, int]:
    fsdp2(model)
    return distributed.get_rank(), distributed.get_world_size()


def by_columns(model: nn.Module) -> tuple[int, int]:
    fsdp2_by_columns(model)
    return distributed.get_rank(), distributed.get_world_size()


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
SEQUENCE_PLAN = {
    "up": ColwiseParallel(),
    "down": RowwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "gather": PrepareModuleInput(
        input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True
    ),
}


def tensor_parallel(model: nn.Module) -> tuple[int, int]:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    parallelize_module(model, mesh, PLAN)
    return 0, 1


def two_dimensional(model: nn.Module) -> tuple[int, int]:
    """FSDP2 along one dimension of the mesh, tensor parallelism along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], PLAN)
    for part in (model.up, model.down, model.norm, model.gate, model.head):
        fully_shard(part, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return mesh.get_local_rank("data"), 2


def three_dimensional(model: nn.Module, replicas: int) -> tuple[int, int]:
    """Copies of shards (HSDP) along two dimensions of the mesh, tensor parallelism along one."""
    sizes = (replicas, 2 // replicas, 2)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "data", "tensor"))
    parallelize_module(model, mesh["tensor"], PLAN)
    for part in (model.up, model.down, model.norm, model.gate, model.head):
        fully_shard(part, mesh=mesh["copies", "data"])
    fully_shard(model, mesh=mesh["copies", "data"])
    row = mesh.get_local_rank("copies") * (2 // replicas) + mesh.get_local_rank("data")
    return row, 2


def two_copies(model: nn.Module) -> tuple[int, int]:
    """HSDP and tensor parallelism with two copies, each in one shard."""
    return three_dimensional(model, 2)


def two_shards(model: nn.Module) -> tuple[int, int]:
    """HSDP and tensor parallelism with one copy, in two shards."""
    return three_dimensional(model, 1)


def sequence_parallel(model: nn.Module) -> tuple[int, int]:
    """Tensor parallelism whose norm sees parts of the sequence: its gradients are pending sums."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    parallelize_module(model, mesh, SEQUENCE_PLAN)
    return 0, 1


@dataclass(frozen=True)
class Trial:
    """A correction on an optimizer, or the optimizer alone."""

    spec: str | None
    make: Callable[..., torch.optim.Optimizer]


momentum = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9)
decayed = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.05)
adamw = functools.partial(torch.optim.AdamW, lr=0.05)
adam = functools.partial(torch.optim.Adam, lr=0.05, weight_decay=0.05)
adagrad = functools.partial(torch.optim.Adagrad, lr=0.05)


def with_binary_matrices(
    kind: type[torch.optim.Optimizer], **options: float
) -> Callable[..., torch.optim.Optimizer]:
    """Return what makes an optimizer whose matrices are binary; it replaces them by their signs."""

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for parameter in parameters:
            if parameter.dim() < 2:
                others.append(parameter)
                continue
            part = local(parameter.detach())
            part.copy_(torch.where(part >= 0, 1.0, -1.0))
            matrices.append(parameter)
        # The own eps, 1e-8, lets AdamW's steps amplify the rounding of small gradients: 6e-12.
        rest = {"params": others, "eps": 1e-2}
        return kind([{"params": matrices, "binary": True}, rest], **options)

    return make


TRIALS = {
    "clip-norm": Trial("clip-norm:max_norm=0.05", momentum),
    "clip-value": Trial("clip-value:max_value=0.003", momentum),
    "agc": Trial("agc:max_ratio=0.01", momentum),
    "agc without head": Trial("agc:max_ratio=0.01,head=none", adamw),
    "centralization": Trial("centralization", momentum),
    "centralization decayed": Trial("centralization:placement=decayed", decayed),
    "centralization update": Trial("centralization:placement=update", adam),
    "cautious": Trial("cautious", momentum),
    "cautious adamw": Trial("cautious", adamw),
    "clip-update": Trial("clip-update:max_rms=0.05", momentum),
    "adanorm": Trial("adanorm:decay=0.5", momentum),
    "adanorm decayed": Trial("adanorm:decay=0.5", adam),
    "adanorm gradient": Trial("adanorm:decay=0.5,target=gradient", adamw),
    "gcw": Trial("gcw:layers=all,warmup_steps=1,fit_every=2", momentum),
    "gcw moment": Trial("gcw:layers=all,warmup_steps=1,fit_every=2,norm=keep", adamw),
    "gcw attention": Trial(
        "gcw:layers=all,warmup_steps=1,fit_every=2,predictor=attention,fit_target=hindsight",
        momentum,
    ),
    "xgrad": Trial("xgrad", momentum),
    "xgrad adamw": Trial("xgrad", adamw),
    "xgrad displacement": Trial("xgrad", adagrad),
    "powergrad": Trial("powergrad", momentum),
    # The networks here have one exit, whose gradient alpha changes all the same.
    "boosted": Trial("boosted:alpha=0.25", momentum),
    "adam3": Trial(None, functools.partial(AdaM3, lr=0.01)),
    "tom": Trial(None, functools.partial(Tom, lr=0.01)),
    "bop": Trial(None, with_binary_matrices(Bop, lr=0.2, threshold=1e-3)),
    "bop2": Trial(None, with_binary_matrices(Bop2, lr=0.2, threshold=0.1, second_rate=0.05)),
}
READ_STATE = ("xgrad", "xgrad adamw", "adanorm", "adanorm decayed", "gcw moment")


def weights_after(
    trial: Trial,
    kind: type[nn.Module],
    layout: Layout | None,
    plain_steps: int = 0,
) -> dict[str, Tensor]:
    """Train, and return the whole weights.

    Args:
        trial: What to attach, and the optimizer.
        kind: Of the model.
        layout: None for one process.
        plain_steps: Steps before attach.
    """
    model = filled(kind)
    part, parts = layout(model) if layout else (0, 1)
    optimizer = trial.make(model.parameters())
    train(model, optimizer, F.cross_entropy, range(plain_steps), part, parts)
    criterion = F.cross_entropy
    specs = [] if trial.spec is None else [trial.spec]
    with regrad.attach(model, optimizer, specs, criterion) as attachment:
        train(model, optimizer, attachment.criterion, range(plain_steps, STEPS), part, parts)
        metrics = attachment.metrics()
    if (
        specs
        and layout is None
        and not any(value for name, value in metrics.items() if name.endswith("trigger_rate"))
    ):
        raise AssertionError(f"{trial.spec} changed nothing on one process")
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


@functools.cache
def alone_after(name: str, kind: type[nn.Module], **how: Any) -> dict[str, Tensor]:
    """Return the weights after the same training on one process."""
    return weights_after(TRIALS[name], kind, None, **how)


def train(model: Any, optimizer: Any, criterion: Any, steps: range, part: int, parts: int) -> None:
    for index in steps:
        inputs, classes = (t.chunk(parts)[part] for t in batch(index))
        optimizer.zero_grad()
        (criterion(model(inputs), classes) * FACTORS[index % len(FACTORS)]).backward()
        optimizer.step()
        model.eval()  # gathered shards must not hide what comes next
        with torch.no_grad():
            model(inputs)
        model.train()


def farthest(name: str, kind: type[nn.Module], layout: Layout, **how: Any) -> float:
    """Return how far the weight that differs most ends from one process."""
    alone = alone_after(name, kind, **how)
    seen = weights_after(TRIALS[name], kind, layout, **how)
    return difference(alone, seen)[0]


def all_trials(layout: Layout, _: int) -> dict[str, float]:
    """Return how far each trial ends from one process; one process group serves them all."""
    return {name: farthest(name, Net, layout) for name in TRIALS}


def after_plain_steps(layout: Layout, _: int) -> dict[str, float]:
    """Return the same where steps before attach have left pending sums in the optimizer's state."""
    return {name: farthest(name, Net, layout, plain_steps=1) for name in READ_STATE}


def head_in_parts(model: Any) -> tuple[int, int]:
    """A head whose outputs, the logits, are cut by classes."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    plan = {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    parallelize_module(model, mesh, plan)
    return 0, 1


def vocabulary_parallel(_: int) -> dict[str, float]:
    """Train powergrad on logits whose classes are in parts, in torch's own context for them."""
    with loss_parallel():
        return {"powergrad": farthest("powergrad", Net, head_in_parts)}


def strided_units(_: int) -> dict[str, float]:
    """Compare norms and means of every kind of unit of twice cut tensors with those of the whole."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, float] = {}
    for shape in ((6, 2, 3), (12,), (8, 4), (2, 4)):
        for cut in range(len(shape)):
            whole_one = torch.randn(shape, generator=generator, dtype=torch.float64)
            holder = nn.Module()
            in_parts = distribute_tensor(whole_one.clone(), mesh["tensor"], [Shard(cut)])
            holder.weight = nn.Parameter(in_parts)
            fully_shard(holder, mesh=mesh["data"])
            part = holder.weight.detach()
            key = f"{shape} along {cut}"
            seen[f"{key}, norm"] = (total_norm([part]) - whole_one.norm()).abs().item()
            for unit in units_of_rank(len(shape)):
                clipped, wanted = part.clone(), whole_one.clone()
                bounds = {"max_ratio": 0.1, "weight_floor": 1e-3}
                clip_units_([clipped], [part * 0.1], [unit], **bounds)
                clip_units_([wanted], [whole_one * 0.1], [unit], **bounds)
                seen[f"{key}, {unit}"] = (whole(clipped) - wanted).abs().max().item()
                if len(shape) > 1 and unit.axis is not None:
                    centred, wanted = part.clone(), whole_one.clone()
                    subtract_([centred], [unit_means(centred, Means(unit.axis, unit.groups))])
                    subtract_([wanted], [unit_means(wanted, Means(unit.axis, unit.groups))])
                    seen[f"{key}, means of {unit}"] = (whole(centred) - wanted).abs().max().item()
    return seen


def units_of_rank(rank: int) -> list[Unit]:
    """Return units of every kind: along each dimension, in groups, and whole tensors."""
    grouped = [Unit(axis, 2) for axis in (None, *range(1, rank))]
    return [Unit(None), *map(Unit, range(rank)), *grouped]


# Pipelines: a rank holds some stages of the model, each with an optimizer of its own.

LINKS = ((WIDTH, 8), (8, 6), (6, 8), (8, CLASSES))
IN_PARTS = (
    *("clip-value", "agc without head", "centralization", "adanorm", "adanorm decayed"),
    *("gcw", "gcw moment", "xgrad", "xgrad adamw", "powergrad"),
)
REFUSED_IN_PARTS = ("clip-norm", "agc", "gcw", "gcode:stages=[0,1]")


def links(first: int, last: int) -> nn.Sequential:
    """Return layers `first` to `last` of the model, with the weights that they have in the whole."""
    whole_model = nn.Sequential(
        *(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in LINKS)
    ).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in whole_model.parameters():
            numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(numbers / 2)
    return whole_model[first:last]


def gpipe(rank: int, criterion: Any) -> tuple[list[nn.Sequential], Any]:
    part = links(2 * rank, 2 * rank + 2)
    return [part], ScheduleGPipe(stage_of(part, rank, 2), n_microbatches=2, loss_fn=criterion)


def one_forward_one_backward(rank: int, criterion: Any) -> tuple[list[nn.Sequential], Any]:
    part = links(2 * rank, 2 * rank + 2)
    return [part], Schedule1F1B(stage_of(part, rank, 2), n_microbatches=2, loss_fn=criterion)


def interleaved(rank: int, criterion: Any) -> tuple[list[nn.Sequential], Any]:
    parts = [links(index, index + 1) for index in (rank, rank + 2)]
    stages = [stage_of(p, index, 4) for p, index in zip(parts, (rank, rank + 2), strict=True)]
    return parts, ScheduleInterleaved1F1B(stages, n_microbatches=2, loss_fn=criterion)


def stage_of(part: nn.Module, index: int, many: int) -> PipelineStage:
    return PipelineStage(part, index, many, torch.device("cpu"))


def train_in_parts(
    trial: Trial,
    make_parts: Callable[..., Any],
    rank: int,
    group: Any = None,
    *,
    together: bool = False,
) -> list[Tensor]:
    """Train as `weights_after` does, in a pipeline; return the weights of this rank's stages.

    Args:
        trial: What to attach, and the optimizer.
        make_parts: Returns a rank's stages and the schedule.
        rank: Of this process.
        group: Given to attach as `model_group`.
        together: Attach a rank's stages as a list, with one optimizer.
    """
    now: list[Any] = [None, 1.0]  # the criterion, known once it is attached to, and the factor
    parts, schedule = make_parts(rank, lambda logits, classes: now[0](logits, classes) * now[1])
    attached = [[*parts]] if together else [[part] for part in parts]
    optimizers = [trial.make([p for m in models for p in m.parameters()]) for models in attached]
    attachments = [
        regrad.attach(models, optimizer, [trial.spec], F.cross_entropy, model_group=group)
        for models, optimizer in zip(attached, optimizers, strict=True)
    ]
    now[0] = attachments[-1].criterion
    for index in range(STEPS):
        inputs, classes = flat_batch(index)
        now[1] = FACTORS[index % len(FACTORS)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        schedule.step(*([inputs] if rank == 0 else []), **({"target": classes} if rank else {}))
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for part in parts for p in part.parameters()]


def flat_batch(index: int) -> tuple[Tensor, Tensor]:
    """Return inputs [ROWS, W] and classes [ROWS]."""
    inputs, classes = batch(index)
    return inputs.mean(dim=1), classes


def train_whole(trial: Trial) -> dict[str, Tensor]:
    """Return the weights after the same training on one process, by layer and name."""
    model = links(0, len(LINKS))
    optimizer = trial.make(model.parameters())
    attachment = regrad.attach(model, optimizer, [trial.spec], F.cross_entropy)
    for index in range(STEPS):
        inputs, classes = flat_batch(index)
        optimizer.zero_grad()
        loss = attachment.criterion(model(inputs), classes)
        (loss * FACTORS[index % len(FACTORS)]).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def farthest_in_parts(
    trial: Trial, make_parts: Callable[..., Any], rank: int, group: Any = None, **how: Any
) -> float:
    """Return how far the weight of this rank's stages that differs most ends from one process."""
    weights = train_in_parts(trial, make_parts, rank, group, **how)
    layers = (rank, rank + 2) if make_parts is interleaved else (2 * rank, 2 * rank + 1)
    mine = [w for key, w in train_whole(trial).items() if int(key[0]) in layers]
    return difference(dict(enumerate(mine)), dict(enumerate(weights)))[0]


def in_pipelines(rank: int) -> dict[str, float]:
    """Return how far each trial ends from one process, in every schedule."""
    seen = {}
    for name in IN_PARTS:
        schedules = [gpipe, interleaved]
        if name == "xgrad":  # the order of forwards and backwards can matter to nothing else
            schedules.append(one_forward_one_backward)
        for make_parts in schedules:
            far = farthest_in_parts(TRIALS[name], make_parts, rank)
            seen[f"{name}, {make_parts.__name__}"] = far
        far = farthest_in_parts(TRIALS[name], interleaved, rank, together=True)
        seen[f"{name}, together"] = far
    return seen


def summed_in_pipelines(rank: int) -> dict[str, float]:
    """Return how far the norm over all stages ends from one process; infinity where one is missed."""
    trial, world = TRIALS["clip-norm"], distributed.group.WORLD
    seen = {
        make_parts.__name__: farthest_in_parts(trial, make_parts, rank, world)
        for make_parts in (gpipe, one_forward_one_backward)
    }
    seen["together"] = farthest_in_parts(trial, interleaved, rank, world, together=True)
    reason = ""
    try:
        train_in_parts(trial, interleaved, rank, world)
    except regrad.RegradError as refusal:
        reason = str(refusal)
    told = "attach all stages of a process together" in reason
    return {**seen, "interleaved": 0.0 if told else float("inf")}


def refused_in_pipelines(rank: int) -> dict[str, float]:
    """Return 0 for each correction that is refused with its reason, infinity else."""
    seen = {}
    for make_parts in (gpipe, one_forward_one_backward, interleaved):
        parts, schedule = make_parts(rank, F.cross_entropy)
        for spec in REFUSED_IN_PARTS:
            reason = ""
            try:
                regrad.attach(parts[0], momentum(parts[0].parameters()), [spec]).detach()
            except regrad.RegradError as refusal:
                reason = str(refusal)
            told = "must see the whole model" in reason
            seen[f"{spec}, {make_parts.__name__}"] = 0.0 if told else float("inf")
        del schedule
    return seen


# Experts: a rank holds one of them, and a copy of everything else.


class SumOfGradients(torch.autograd.Function):
    """What every rank reads: the gradients of all ranks add up."""

    @staticmethod
    def forward(_: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(_: Any, slope: Tensor) -> Tensor:
        together = slope.clone()
        distributed.all_reduce(together)
        return together


class SumOfOutputs(torch.autograd.Function):
    """What every rank adds to: the gradient is that of the sum."""

    @staticmethod
    def forward(_: Any, output: Tensor) -> Tensor:
        together = output.clone()
        distributed.all_reduce(together)
        return together

    @staticmethod
    def backward(_: Any, slope: Tensor) -> Tensor:
        return slope


class Experts(nn.Module):
    """Two experts, weighted by a gate, between a layer before and a head behind them.

    Args:
        held: Which experts are here. The outputs of the others come from other ranks.
    """

    def __init__(self, held: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 2)
        for number in (0, 1):
            self.add_module(f"expert{number}", nn.Linear(WIDTH, 8))
        self.head = nn.Linear(8, CLASSES)
        self.held = held

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits [N, C] of inputs [N, W]."""
        hidden = torch.tanh(self.before(inputs))
        shares = torch.softmax(self.gate(hidden), dim=-1)
        if len(self.held) < 2:
            hidden, shares = SumOfGradients.apply(hidden), SumOfGradients.apply(shares)
        experts = [getattr(self, f"expert{number}") for number in self.held]
        outputs = [
            torch.tanh(expert(hidden)) * shares[:, [number]]
            for expert, number in zip(experts, self.held, strict=True)
        ]
        mixed = torch.stack(outputs).sum(dim=0)
        if len(self.held) < 2:
            mixed = SumOfOutputs.apply(mixed)
        logits: Tensor = self.head(mixed)
        return logits


def train_experts(trial: Trial, held: tuple[int, ...], group: Any = None) -> dict[str, Tensor]:
    """Return the weights of the experts that are here, and of everything else, after training."""
    model = filled(Experts)
    model.held = held
    for number in {0, 1}.difference(held):
        delattr(model, f"expert{number}")
    optimizer = trial.make(model.parameters())
    attachment = regrad.attach(model, optimizer, [trial.spec], F.cross_entropy, model_group=group)
    for index in range(STEPS):
        inputs, classes = flat_batch(index)
        optimizer.zero_grad()
        loss = attachment.criterion(model(inputs), classes)
        (loss * FACTORS[index % len(FACTORS)]).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def farthest_expert(trial: Trial, rank: int) -> float:
    """Return how far the weight that differs most ends from one process."""
    seen = train_experts(trial, (rank,))
    return difference(seen, train_experts(trial, (0, 1)))[0]


def with_experts(rank: int) -> dict[str, float]:
    """Return how far each trial ends from one process, and infinity for one that is not refused."""
    seen = {name: farthest_expert(TRIALS[name], rank) for name in IN_PARTS}
    different = "expert0.weight [8, 6], expert0.bias [8] on 0, expert1.weight [8, 6]"
    refused = [(spec, None, different) for spec in REFUSED_IN_PARTS]
    shared = "must see each weight once in model_group, but before.weight [6, 6] is the same"
    refused.append(("clip-norm", distributed.group.WORLD, shared))
    for spec, group, wanted in refused:
        reason = ""
        try:
            train_experts(Trial(spec, momentum), (rank,), group)
        except regrad.RegradError as refusal:
            reason = str(refusal)
        seen[f"{spec} refused, {group is not None}"] = 0.0 if wanted in reason else float("inf")
    return seen


class Pipelines:
    """Stages of a model on two processes."""

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Any]]:
        """Return what each process runs."""
        return {
            "": in_pipelines,
            "refused": refused_in_pipelines,
            "summed": summed_in_pipelines,
        }


class ExpertParallel:
    """An expert on each of two processes, and copies of everything else."""

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Any]]:
        """Return what each process runs."""
        return {"": with_experts}


class ByRows:
    """FSDP2 on two processes: dimension 0 is cut."""

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Any]]:
        """Return what each process runs."""
        return {"": functools.partial(all_trials, by_rows)}


class ByColumns:
    """FSDP2 on two processes: dimension 1 is cut where its size allows it."""

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Any]]:
        """Return what each process runs."""
        return {"": functools.partial(all_trials, by_columns)}


class TensorParallel:
    """Tensor parallelism alone, on two processes."""

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Any]]:
        """Return what each process runs."""
        return {"": functools.partial(all_trials, tensor_parallel), "classes": vocabulary_parallel}


class SequenceParallelism:
    """Tensor parallelism with parts of the sequence, on two processes."""

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Any]]:
        """Return what each process runs."""
        return {
            "": functools.partial(all_trials, sequence_parallel),
            "later": functools.partial(after_plain_steps, sequence_parallel),
        }


class TwoDimensional:
    """FSDP2 with tensor parallelism inside, on four processes."""

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Any]]:
        """Return what each process runs."""
        return {"": functools.partial(all_trials, two_dimensional), "units": strided_units}


class ThreeDimensional:
    """HSDP with tensor parallelism inside, on four processes: two copies of one shard."""

    @classmethod
    def cases(cls) -> dict[str, Callable[[int], Any]]:
        """Return what each process runs."""
        return {"": functools.partial(all_trials, two_copies)}
