"""What the page on layouts measures of every correction's suites, in every loop and layout.

A cell compares two trainings that must be one: two processes and one, a frozen
parameter and a constant, four parts of a batch and the batch. Mixed precision is
compared with the suite's reference, which is given the same gradients.
"""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import regrad
import torch
from regrad_testing import CorrectionSuite
from regrad_testing.checking import is_suite_of, own_suite
from regrad_testing.clauses import difference, same_bits
from regrad_testing.files import load_file
from regrad_testing.layout_clauses import ddp, digest
from regrad_testing.loop_clauses import LOST, OVERFLOW, SeveralCalls, distance
from regrad_testing.loops import Training
from regrad_testing.references import ReferenceTraining, can_follow
from regrad_testing.settings import as_bits, without_regrad
from regrad_testing.worker import WORLD
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

FLOAT64, FLOAT32 = 1e-12, 1e-6
SCALE = 2.0**12
Seen = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One suite of a correction on one of its optimizers."""

    suite: Any
    optimizer: str

    def train(self, **how: Any) -> Training:
        """Return a training with the correction attached, before its first step."""
        return self.suite.train(self.optimizer, **how)  # type: ignore[no-any-return]

    def whole(self) -> Training:
        """Return the finished training of one process with whole batches."""
        return self.suite.corrected(self.optimizer)  # type: ignore[no-any-return]

    def reference(self, kind: Any, correction: regrad.Correction) -> Any:
        """Return a training by the suite's reference, before its first step."""
        problem, rule = self.suite.problem, functools.partial(self.suite.reference, self.suite())
        optimizer = self.suite.optimizers[self.optimizer](problem.make_model().parameters())
        return kind(problem, optimizer, rule, correction.needs.stages, correction.options)


Measure = Callable[[Case], Seen]


def suites_of(name: str) -> list[Any]:
    """Return the suites for corrections in the plugin's own conformance tests."""
    file = own_suite(regrad.available()[name])
    if file is None:
        raise RuntimeError(
            f"{name} must be installed editable, so that its suites are found; run nox -s sharding"
        )
    module = load_file(file, f"sharding_suites_{name.replace('-', '_')}")
    classes = [
        cls
        for key, cls in vars(module).items()
        if key.startswith("Test") and issubclass(cls, CorrectionSuite)
    ]
    return [cls for cls in classes if is_suite_of(cls, name, regrad.load(name))]


def cases_of(name: str) -> dict[str, Case]:
    """Return every suite of a correction on every optimizer that it accepts."""
    found = {}
    for suite in suites_of(name):
        for optimizer in suite.trains_on():
            found[f"{suite.__name__} on {optimizer}"] = Case(suite, optimizer)
    return found


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        title: Its heading.
        tolerance: Largest difference of a weight that is called exact.
        ways: What is measured; all must agree.
        processes: On how many.
        cases: Returns what is given to each of the ways, by name, of a correction.
    """

    title: str
    tolerance: float
    ways: Mapping[str, Measure]
    processes: int = 1
    cases: Callable[[str], Mapping[str, Any]] = cases_of


def compared(got: Training, wanted: Training) -> Seen:
    """Return how far two finished trainings end apart, over the parameters that both have."""
    ends = {
        name.replace("_checkpoint_wrapped_module.", ""): weight
        for name, weight in whole_weights(got).items()
    }
    return {"far": difference(wanted.weights(), ends)[0]}


def whole_weights(training: Training) -> dict[str, Tensor]:
    """Return copies of the weights, whole where they are shards of any kind."""
    model = training.outer
    if not isinstance(model, FullyShardedDataParallel):
        return training.weights()
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return as_bits(dict(model.named_parameters()))


# One process.


def of_reference(case: Case) -> Seen:
    """The plain loop: the suite's reference where it has one, else a second time."""
    training = case.whole()
    if not has_reference(case):
        return compared(case.train().run(), training)
    ends = case.reference(ReferenceTraining, training.attachment.corrections[0]).run()[-1]
    return {"far": difference(ends, training.weights())[0]}


def has_reference(case: Case) -> bool:
    """Say whether the suite says, step by step, what must come out on this optimizer."""
    return case.suite.reference is not None and can_follow(
        without_regrad(case.suite.optimizers[case.optimizer])
    )


def in_parts(case: Case) -> Seen:
    """Four micro-batches per step."""
    return compared(case.train().run(parts=4), case.whole())


def in_a_closure(case: Case) -> Seen:
    """Forward and backward inside `step(closure)`."""
    return compared(case.train().run(closure=True), case.whole())


def in_several_calls(case: Case) -> Seen:
    """An optimizer that calls its closure twice at the same weights, against once."""
    made = (functools.partial(SeveralCalls, calls=calls) for calls in (2, 1))
    return compared(
        *(Training(case.suite.problem, make, case.suite.make()).run(closure=True) for make in made)
    )


def checkpointed(case: Case, kind: CheckpointImpl) -> Seen:
    """Every child that follows the first one runs again in backward."""

    def wrap(model: nn.Module) -> nn.Module:
        for name, child in [*model.named_children()][1:]:
            setattr(model, name, checkpoint_wrapper(child, checkpoint_impl=kind))
        return model

    return compared(case.train(wrap=wrap).run(), case.whole())


def compiled_after(case: Case) -> Seen:
    """`torch.compile(model)` of an attached model, before its first call."""
    torch.compiler.reset()
    training = case.train()
    training.outer = torch.compile(training.model, backend="aot_eager")  # type: ignore[assignment]
    return compared(training.run(), case.whole())


def compiled_before(case: Case) -> Seen:
    """`torch.compile(model)` given to attach."""
    torch.compiler.reset()
    return compared(
        case.train(parallel=functools.partial(torch.compile, backend="aot_eager")).run(),
        case.whole(),
    )


def first_frozen(case: Case) -> Seen:
    """The first parameter without gradients, against the same numbers in a buffer."""
    frozen, constant = case.train(wrap=freeze_first), case.train(wrap=make_first_a_buffer)
    before, (name, weight) = (
        first_parameter(frozen.model)[1].detach().clone(),
        first_parameter(frozen.model),
    )
    seen = compared(frozen.run(), constant.run())
    return {
        **seen,
        "broken": "" if same_bits(weight.detach(), before) else f"the frozen {name} moved",
    }


def first_parameter(model: nn.Module) -> tuple[str, nn.Parameter]:
    """Return the first parameter and its name."""
    return next(model.named_parameters())


def freeze_first(model: nn.Module) -> nn.Module:
    """Return the model, its first parameter without gradients."""
    first_parameter(model)[1].requires_grad_(False)
    return model


def make_first_a_buffer(model: nn.Module) -> nn.Module:
    """Return the model, its first parameter a buffer."""
    name, weight = first_parameter(model)
    owner, _, leaf = name.rpartition(".")
    delattr(model.get_submodule(owner), leaf)
    model.get_submodule(owner).register_buffer(leaf, weight.detach())
    return model


class Fronted(nn.Module):
    """A model behind two layers that hold one weight, or behind one that is called twice."""

    def __init__(self, net: nn.Module, *, tied: bool) -> None:
        super().__init__()
        like = first_parameter(net)[1]
        many = like.shape[1]
        make = (
            functools.partial(nn.Conv2d, many, many, 1)
            if like.dim() == 4
            else functools.partial(nn.Linear, many, many)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.one, self.other = (make(dtype=like.dtype) for _ in range(2))
        if tied:
            self.other.weight, self.other.bias = self.one.weight, self.one.bias
        else:
            self.other = self.one
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(inputs + torch.tanh(self.other(torch.tanh(self.one(inputs)))))
        return logits


def tied(case: Case) -> Seen:
    """Two modules that hold one weight, against one module called twice."""
    both = (
        case.train(wrap=functools.partial(Fronted, tied=is_tied)).run() for is_tied in (True, False)
    )
    return compared(*both)


# Mixed precision: the reference is given the weights before each step, and makes the step itself.


class Alongside(ReferenceTraining):
    """The reference, on the gradients that autocast gives in float32 weights.

    Attributes:
        dtype: What autocast computes in.
        scale: That of the GradScaler, 1 without.
    """

    dtype, scale = torch.bfloat16, 1.0

    def step_from(self, weights: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """Return the weights after one step from `weights`."""
        self.weights = [weights[name].double() for name in self.names]
        self._step(index)
        return dict(zip(self.names, self.weights, strict=True))

    def _gradients(self, index: int, points: Any) -> list[Tensor]:
        batch = self.problem.batch(index, torch.float32)
        leaves = [point.float().requires_grad_() for point in points]
        model, factor = self.problem.make_model(torch.float32), batch.weight * self.scale
        with torch.autocast("cpu", dtype=self.dtype):
            logits = functional_call(
                model, dict(zip(self.names, leaves, strict=True)), (batch.inputs,)
            )
            told = tree_map(lambda each: each.detach().double(), logits)
            slope = self._ask("criterion", index, logits=told, targets=batch.targets)
            loss = type(self.problem).criterion(logits, batch.targets) * factor
        if slope is None:
            gradients = torch.autograd.grad(loss, leaves)
        else:
            outputs = tree_leaves(logits)
            parts = zip(tree_leaves(slope), outputs, strict=True)
            slopes = [(part * factor).to(output.dtype) for part, output in parts]
            gradients = torch.autograd.grad(outputs, leaves, slopes)
        return [gradient.double() / self.scale for gradient in gradients]


def under(function: Any, dtype: torch.dtype) -> Any:
    """Return a function that runs under autocast."""

    def called(*arguments: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return function(*arguments)

    return called


def mixed(case: Case, dtype: torch.dtype, *, scale: float | None = None, **options: Any) -> Seen:
    """Autocast around forward and loss, float32 weights; a GradScaler meets one overflow."""
    corrections = case.suite.make()
    problem = case.suite.problem
    make = case.suite.optimizers[case.optimizer]
    how = {"dtype": torch.float32, "scale": scale, **options}
    training = Training(problem, make, corrections, **how)
    # A reference that reads hidden states computes them itself, without autocast's rounding.
    if not has_reference(case) or "hidden" in corrections[0].needs.stages:
        plain = Training(problem, make, None, **how)
        ends = [run_mixed(each, dtype) for each in (training, plain)]
        far, usual = (
            distance(t, w)
            for t, w in zip(ends, (case.whole(), case.suite.plain(case.optimizer)), strict=True)
        )
        return {"bound": far, "usual": usual}
    reference, worst = case.reference(Alongside, corrections[0]), [0.0]
    reference.dtype = dtype

    def compare(index: int, before: dict[str, Tensor], used: float) -> None:
        reference.scale = used
        worst.append(difference(reference.step_from(before, index), training.weights())[0])

    run_mixed(training, dtype, compare)
    return {"far": max(worst)}


def run_mixed(
    training: Training, dtype: torch.dtype, then: Callable[..., None] = lambda *_: None
) -> Training:
    """Train under autocast; call `then(index, weights before, scale)` after each real step."""
    training.outer, training.criterion = (
        under(training.outer, dtype),
        under(training.criterion, dtype),
    )
    for index in range(training.problem.steps):
        if index == OVERFLOW and training.scaler.is_enabled():
            training.step(LOST, overflow=True)
        before, scale = (
            as_bits(training.model.state_dict()),
            training.scaler.get_scale(),
        )  # a skip leaves a window open
        training.step(index)
        then(index, before, scale)
    return training


def mixed_and_fused(case: Case) -> Seen:
    """The optimizer's fused form, which a GradScaler hands scaled gradients."""
    try:
        without_regrad(functools.partial(case.suite.optimizers[case.optimizer], fused=True))
    except (TypeError, RuntimeError):
        return {}  # it has no such form
    return mixed(case, torch.float16, scale=SCALE, fused=True)


# Parameters that come later, on one process and on two.


class Held(Training):
    """Withholds the first parameter's gradient while `held`."""

    held = True

    def backward(self, index: int, **how: Any) -> Tensor:
        """Leave the other gradients in `.grad`."""
        loss = super().backward(index, **how)
        if self.held:
            first_parameter(self.model)[1].grad = None
        return loss


def trained_later(case: Case, layout: "Layout", *, as_group: bool, **how: Any) -> Training:
    """Train with the first parameter frozen at first; `as_group` the optimizer gets it later."""
    make, parallel = layout(case.suite.optimizers[case.optimizer])

    def partly(parameters: Any, **options: Any) -> Any:
        return make(list(parameters)[1:] if as_group else parameters, **options)

    training = Training(case.suite.problem, partly, case.suite.make(), parallel=parallel, **how)
    middle = training.problem.steps // 2
    first_parameter(training.model)[1].requires_grad_(False)
    training.run(range(middle))
    late = first_parameter(training.model)[1].requires_grad_(True)
    if as_group:
        training.optimizer.add_param_group({"params": [late]})
        training.base_rates.append(training.base_rates[0])
    return training.run(range(middle, training.problem.steps))


def later(case: Case, *, as_group: bool) -> Seen:
    """A parameter that is unfrozen, against one whose gradient was withheld."""
    held = Held(case.suite.problem, case.suite.optimizers[case.optimizer], case.suite.make())
    middle, steps = held.problem.steps // 2, held.problem.steps
    held.run(range(middle))
    held.held = False
    return compared(trained_later(case, alone, as_group=as_group), held.run(range(middle, steps)))


# Two processes.

Layout = Callable[[Any], tuple[Any, Callable[[nn.Module], nn.Module] | None]]


def alone(make: Any) -> tuple[Any, None]:
    """Return how one process makes its optimizer and wraps its model."""
    return make, None


def wrapped_by(parallel: Callable[[nn.Module], nn.Module]) -> Layout:
    """Return the layout of a model that is wrapped before its optimizer is made."""
    return lambda make: (make, parallel)


def ddp_with_unused(model: nn.Module) -> nn.Module:
    """Wrap a model of which parameters may go without gradients."""
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def accelerator_here() -> Any:
    """Return an Accelerator for this process of a group that is there already."""
    from accelerate import Accelerator  # noqa: PLC0415 - only workers need it
    from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: PLC0415

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    rank = str(distributed.get_rank())
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": str(distributed.get_world_size()),
        "ACCELERATE_USE_CPU": "true",
    }
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }  # asked for, though the group is there already
    return Accelerator(cpu=True)


def by_accelerate(make: Any) -> tuple[Any, Callable[[nn.Module], nn.Module]]:
    """Return the layout of accelerate's FSDP2, which swaps a model's parameters."""
    from accelerate import DistributedType  # noqa: PLC0415 - only workers need it
    from accelerate.utils import FullyShardedDataParallelPlugin  # noqa: PLC0415

    accelerator, models = accelerator_here(), list[nn.Module]()
    # An FSDP plugin given to it on a CPU would be taken for DDP, in silence.
    accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap"
    )

    def keep(model: nn.Module) -> nn.Module:
        models.append(model)
        return model

    def prepared(parameters: Any, **options: Any) -> Any:
        return accelerator._prepare_fsdp2(models.pop(), make(parameters, **options))[1]

    return prepared, keep


def replicated_by_ddp(model: nn.Module) -> nn.Module:
    """Have the model itself replicated: there is no wrapper."""
    from torch.distributed._composable.replicate import replicate  # noqa: PLC0415 - for workers

    return replicate(model)


def replicated_by_fsdp2(model: nn.Module) -> Any:
    """Have the model replicated by what shards others."""
    from torch.distributed._composable.replicate_with_fsdp import replicate  # noqa: PLC0415

    return replicate(model)


def cut(model: nn.Module, *, sizes: tuple[int, ...] = (WORLD,), **options: Any) -> Any:
    """Shard a model by FSDP2, child by child, on a mesh of these sizes."""
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - for workers
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "data")[-len(sizes) :])
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def cut_in_one(model: nn.Module) -> Any:
    """Shard a model whose children share weights, as one group."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - only workers need it

    return fully_shard(model)


def kept_on_the_host(model: nn.Module) -> Any:
    """Shard a model whose shards, gradients and optimizer are kept on the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy  # noqa: PLC0415 - only workers need it

    return cut(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def from_the_meta_device(model: nn.Module) -> Any:
    """Shard a model that has no values yet, and fill its shards afterwards."""
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - for workers

    values = as_bits(dict(model.named_parameters()))
    cut(model.to("meta")).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            where: Any = parameter
            whole = distribute_tensor(values[name], where.device_mesh, where.placements)
            parameter.copy_(whole)
    return model


def fsdp1(model: nn.Module, **options: Any) -> nn.Module:
    """Lay a model out in flat tensors."""
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def by_zero(make: Any) -> tuple[Any, Callable[[nn.Module], nn.Module]]:
    """Return the layout of DDP with an optimizer that is cut by rank."""

    def partitioned(parameters: Any, **options: Any) -> Any:
        kind: Any = functools.partial(make, **options)
        return ZeroRedundancyOptimizer(list(parameters), kind)

    return partitioned, ddp


def trained_apart(case: Case, layout: Layout, **how: Any) -> Training:
    """Train each process on its own rows, with evaluations in between."""
    make, parallel = layout(case.suite.optimizers[case.optimizer])
    rows = rows_of(case.suite.problem, distributed.get_rank())
    training = Training(
        case.suite.problem, make, case.suite.make(), parallel=parallel, rows=rows, **how
    )
    for index in range(training.problem.steps):
        training.run([index])
        training.evaluate(index)
    return training


def apart(case: Case, layout: Layout) -> Seen:
    """Each process its own rows, against one with all rows."""
    training = trained_apart(case, layout)
    return {**compared(training, case.whole()), **told(training)}


def later_apart(case: Case, layout: Layout, *, as_group: bool) -> Seen:
    """A parameter that is unfrozen, against one process."""
    rows = rows_of(case.suite.problem, distributed.get_rank())
    training = trained_later(case, layout, as_group=as_group, rows=rows)
    return {**compared(training, trained_later(case, alone, as_group=as_group)), **told(training)}


def tied_apart(case: Case, layout: Layout) -> Seen:
    """Two modules that hold one weight, against one process."""
    wrap = functools.partial(Fronted, tied=True)
    training = trained_apart(case, layout, wrap=wrap)
    return {**compared(training, case.train(wrap=wrap).run()), **told(training)}


def rows_of(problem: Any, rank: int) -> slice:
    """Return the rows of every batch that a process sees."""
    size = problem.batch_size // distributed.get_world_size()
    return slice(rank * size, (rank + 1) * size)


def told(training: Training) -> Seen:
    """Return hashes of what must be the same on all ranks; of shards, what is no tensor."""
    state: Any = training.correction_state()
    state = without_tensors(state) if training.attachment.engine.is_sharded() else state
    return {"ranks": [digest(whole_weights(training)), digest(state)]}


def without_tensors(state: Any) -> Any:
    """Return nested dictionaries without their tensors; what lists hold stays."""
    if not isinstance(state, Mapping):
        return state
    return {
        key: without_tensors(value) for key, value in state.items() if not isinstance(value, Tensor)
    }
