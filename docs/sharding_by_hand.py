"""Columns whose other side is written by hand, because one process with whole batches is no equal.

A communication hook changes the gradients, a policy computes in half precision, `Join` lets one
process stop early, and local SGD averages weights. So each process also trains the whole model by
itself: it takes the gradients of every process's rows, one after the other, and does with them
what torch does between the processes.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from regrad_testing.clauses import difference
from regrad_testing.layout_clauses import ddp, digest
from regrad_testing.loops import Training
from regrad_testing.worker import WORLD
from sharding_cells import (
    FLOAT64,
    Case,
    Column,
    Seen,
    accelerator_here,
    compared,
    cut,
    rows_of,
    told,
    trained_apart,
    wrapped_by,
)
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.func import functional_call

PERIOD = 2
"""Steps between two averages of the weights."""
EARLIER = 2
"""Steps by which the second process stops before the first, under `Join`."""

Gradients = Sequence[Tensor]
Combine = Callable[[int, Sequence[Gradients]], Gradients]


class ByHand(Training):
    """Takes the gradients of every process's rows apart, and has one made of them.

    Attributes:
        combine: Returns the gradients of a step from its number and those of every process.
    """

    combine: Combine

    def backward(self, index: int, **how: Any) -> Tensor:
        """Leave the combined gradients in `.grad`.

        The rows of the processes are micro-batches here, so that corrections see one step.
        """
        parameters = list(self.model.parameters())
        sums: list[list[Tensor]] = [[] for _ in parameters]
        handles = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                functools.partial(note_sum, seen)
            )
            for parameter, seen in zip(parameters, sums, strict=True)
        ]
        loss = super().backward(index, parts=WORLD, **how)
        for handle in handles:
            handle.remove()
        apart = list(zip(*map(gradients_of, sums), strict=True))
        for parameter, gradient in zip(parameters, self.combine(index, apart), strict=True):
            parameter.grad = gradient
        return loss


def note_sum(sums: list[Tensor], parameter: Tensor) -> None:
    """Note what the gradients of a parameter add up to now."""
    if parameter.grad is not None:
        sums.append(parameter.grad.clone())


def gradients_of(sums: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of every process; each micro-batch had its share of the loss."""
    alone = [sums[0], *(later - earlier for earlier, later in itertools.pairwise(sums))]
    return [gradient * WORLD for gradient in alone]


def by_hand(case: Case, combine: Combine) -> ByHand:
    """Return a training whose gradients are combined by hand, before its first step."""
    training = ByHand(case.suite.problem, case.suite.optimizers[case.optimizer], case.suite.make())
    training.combine = combine
    return training


def beside(case: Case, training: Training, alone: Training) -> Seen:
    """Compare a training with the one by hand, which must not end as with whole batches."""
    far = difference(case.whole().weights(), alone.weights())[0]
    broken = "" if far > FLOAT64 else "nothing was tried: one process with whole batches ends there"
    return {**compared(training, alone), "broken": broken}


# Hooks on the communication of DDP.


class Bucket:
    """What a communication hook is given: the gradients of one process, in one piece.

    Args:
        gradients: In the order in which DDP has them.
    """

    def __init__(self, gradients: Gradients) -> None:
        sizes = [gradient.numel() for gradient in gradients]
        self._buffer = torch.cat([gradient.reshape(-1) for gradient in gradients])
        parts = torch.split(self._buffer, sizes)
        self._parts = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]

    def buffer(self) -> Tensor:
        """Return all gradients in one piece."""
        return self._buffer

    def gradients(self) -> list[Tensor]:
        """Return views of it, one per parameter."""
        return self._parts

    def index(self) -> int:
        """Return which bucket it is."""
        return 0

    def is_last(self) -> bool:
        """Say whether it is the last one of the step."""
        return True


Hook = Callable[[Any], Any]


def compressing(hook: Callable[..., Any]) -> Hook:
    """Return one of torch's hooks without state."""
    return functools.partial(hook, None)


def power_sgd() -> Hook:
    """Return PowerSGD of rank 1 that begins with the third step, with its state."""
    state = PowerSGDState(
        None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1
    )
    return functools.partial(powerSGD_hook, state)


HOOKS: dict[str, Callable[[], Hook]] = {
    "fp16": functools.partial(compressing, fp16_compress_hook),
    "bf16": functools.partial(compressing, bf16_compress_hook),
    "PowerSGD": power_sgd,
}


def with_hook(case: Case, make_hook: Callable[[], Hook]) -> Seen:
    """DDP with a hook, against the hook called by hand between backward and step."""
    orders: list[list[int]] = []

    def parallel(model: nn.Module) -> nn.Module:
        numbers = {parameter: number for number, parameter in enumerate(model.parameters())}
        hook = make_hook()

        # Torch looks for this annotation.
        def noting(
            _: Any,
            bucket: distributed.GradBucket,  # type: ignore[name-defined]
        ) -> torch.futures.Future[Tensor]:
            if not bucket.is_last() or bucket.index() != 0:
                raise NotImplementedError("the gradients must fit into one bucket")
            orders.append([numbers[parameter] for parameter in bucket.parameters()])
            return hook(bucket)  # type: ignore[no-any-return]

        wrapped = ddp(model)
        wrapped.register_comm_hook(None, noting)  # type: ignore[operator]
        return wrapped

    training = trained_apart(case, wrapped_by(parallel))
    hook = make_hook()

    def combine(index: int, apart: Sequence[Gradients]) -> Gradients:
        mine = apart[distributed.get_rank()]
        bucket = Bucket([mine[number] for number in orders[index]])
        hook(bucket).wait()
        reduced = dict(zip(orders[index], bucket.gradients(), strict=True))
        return [reduced[number] for number in range(len(mine))]

    return {**beside(case, training, by_hand(case, combine).run()), **told(training)}


# Half precision by FSDP2's policy.


def with_policy(model: nn.Module) -> Any:
    """Shard a model that computes in bfloat16, and reduces in the precision of its weights."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float64)
    return cut(model, mp_policy=policy)


def in_half(training: Training, inputs: Tensor) -> Tensor:
    """Call a model with weights and inputs in bfloat16."""
    # The casts are to be those of the weights that a correction has moved.
    training.attachment.engine.prepare_forward(training.model)
    named = training.model.named_parameters()
    halves = {name: parameter.to(torch.bfloat16) for name, parameter in named}
    logits: Tensor = functional_call(training.model, halves, (inputs.to(torch.bfloat16),))
    return logits


def mean(_: int, apart: Sequence[Gradients]) -> Gradients:
    """Return the mean of the processes' gradients."""
    return [torch.stack(alike).mean(dim=0) for alike in zip(*apart, strict=True)]


def under_policy(case: Case) -> Seen:
    """FSDP2 with a policy, against casts by hand and the mean of the gradients."""
    training = trained_apart(case, wrapped_by(with_policy))
    alone = by_hand(case, mean)
    alone.outer = functools.partial(in_half, alone)  # type: ignore[assignment]
    return {**beside(case, training, alone.run()), **told(training)}


# Processes that stop at different steps, and processes that train by themselves for a while.


def joined(case: Case) -> Seen:
    """One process stops early; from then on torch halves the gradient of the other."""
    rank = distributed.get_rank()
    problem = case.suite.problem
    end = problem.steps - EARLIER
    training = case.train(parallel=ddp, rows=rows_of(problem, rank))
    outer: Any = training.outer  # DDP, which can be joined
    with Join([outer]):
        training.run(range(end if rank else problem.steps))
    alone = case.train().run(range(end))
    alone.rows = rows_of(problem, 0)
    for index in range(end, problem.steps):
        alone.run([index], weight=problem.batch(index).weight / WORLD)
    return {**beside(case, training, alone), "ranks": [digest(training.weights())]}


def replicas(case: Case, *, averages_at: Callable[[int], bool]) -> Training:
    """Return this process's replica, trained beside those of the others and averaged by hand."""
    problem = case.suite.problem
    everyone = [case.train(rows=rows_of(problem, rank)) for rank in range(WORLD)]
    for index in range(problem.steps):
        for replica in everyone:
            replica.run([index])
        if averages_at(index):
            average(everyone)
    return everyone[distributed.get_rank()]


@torch.no_grad()
def average(everyone: Sequence[Training]) -> None:
    """Give all replicas the mean of their weights."""
    for alike in zip(*(replica.model.parameters() for replica in everyone), strict=True):
        together = torch.stack([parameter.detach() for parameter in alike]).mean(dim=0)
        for parameter in alike:
            parameter.copy_(together)


def by_torch(case: Case) -> Seen:
    """Torch's PostLocalSGDOptimizer, which averages after the first step of every period."""

    def layout(make: Any) -> Any:
        def wrapped(parameters: Any, **options: Any) -> Any:
            averager = PeriodicModelAverager(period=PERIOD, warmup_steps=0)
            return PostLocalSGDOptimizer(make(parameters, **options), averager)

        return wrapped, None

    training = trained_apart(case, layout)
    alone = replicas(case, averages_at=lambda index: index % PERIOD == 0)
    return beside(case, training, alone)


def by_accelerate(case: Case) -> Seen:
    """Accelerate's LocalSGD around DDP, which averages after the last step of every period."""
    from accelerate.local_sgd import LocalSGD  # noqa: PLC0415 - only workers need it

    accelerator = accelerator_here()
    rank = distributed.get_rank()
    training = case.train(parallel=ddp, rows=rows_of(case.suite.problem, rank))
    with LocalSGD(accelerator=accelerator, model=training.outer, local_sgd_steps=PERIOD) as local:
        for index in range(case.suite.problem.steps):
            training.run([index])
            local.step()
    alone = replicas(case, averages_at=lambda index: index % PERIOD == PERIOD - 1)
    return beside(case, training, alone)


COLUMNS = [
    Column(
        "DDP, compressed",
        FLOAT64,
        {name: functools.partial(with_hook, make_hook=make) for name, make in HOOKS.items()},
        WORLD,
    ),
    Column("DDP, `Join`", FLOAT64, {"": joined}, WORLD),
    Column("FSDP2, bf16 policy", FLOAT64, {"": under_policy}, WORLD),
    Column("local SGD", FLOAT64, {"torch": by_torch, "accelerate": by_accelerate}, WORLD),
]
