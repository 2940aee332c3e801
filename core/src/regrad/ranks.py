"""What the ranks of a process group must hold alike: compared at attach and at the first step."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from regrad import registry, sharding
from regrad.errors import RegradError
from regrad.module_hooks import WRAPPER
from regrad.optimizers import parameters_of
from regrad.wrappers import innermost_module

if TYPE_CHECKING:
    from regrad.correction import Correction

SAMPLED = 8  # numbers read of each parameter, to see whether ranks hold the same weights
PARAMETERS_SHOWN = 3  # parameters named in a refusal


def reads_model(correction: Correction, *, in_parts: bool = False) -> bool:
    """Say whether a correction reads what only the whole model shows: its norm, or its record.

    Args:
        correction: Any.
        in_parts: Whether sums are taken over the processes that hold the parts of the model, so
            that a part shows all but the record.
    """
    return correction.needs.record or ("model" in correction.needs.reads and not in_parts)


def agree_across_ranks(
    model: nn.Module,
    optimizer: Optimizer,
    corrections: Sequence[Correction],
    *,
    model_group: Any = None,
) -> bool:
    """Raise on every rank unless all ranks can attach these corrections.

    Collective where a process group exists: every rank must call it.

    Args:
        model: As given to attach.
        optimizer: The innermost optimizer.
        corrections: In acting order.
        model_group: As given to attach: the processes that hold the parts of the model.

    Returns:
        Whether this settles the question. It does not if ranks hold different weights under the
        same names: parts of a model, or copies that data parallelism has yet to synchronise. In
        that case call `check_first_step` later.

    Raises:
        RegradError: If the ranks attach different corrections, versions or options;
            if they hold different parameters and a correction reads the whole model;
            if several processes of the group hold the same weights; if the process group
            cannot reach the parameters, or not every rank answers.
    """
    in_parts = model_group is not None
    wide = [c for c in corrections if reads_model(c, in_parts=in_parts)]
    summing = [c for c in corrections if in_parts and "model" in c.needs.reads]
    stage = _stage_of(model) if wide else None
    if not _are_several_ranks():
        _refuse_stages(wide, [stage])
        return True
    attached = str([f"{c!r} of {registry.origin(c)}" for c in corrections])
    mine = {
        "corrections": f"{attached} with model_group" if in_parts else attached,
        "parameters": _digest_of(_described(model, optimizer)),
        "stage": stage,
        "weights": _samples(model) if wide else {},
        "stages": _stages_of(model) if summing else [],
        "group": distributed.get_process_group_ranks(model_group) if summing else [],
        "held": _fingerprints(model) if summing else [],
    }
    everyone = _gather(mine, _device(optimizer))
    _refuse_other_corrections([theirs["corrections"] for theirs in everyone])
    _refuse_stages(wide, [theirs["stage"] for theirs in everyone])
    _refuse_missing_stages(summing, [theirs["stages"] for theirs in everyone])
    _refuse_shared_weights(summing, everyone)
    if wide and any(theirs["parameters"] != mine["parameters"] for theirs in everyone):
        _refuse_parts(wide, _gather(_described(model, optimizer), _device(optimizer)))
    return _are_copies([theirs["weights"] for theirs in everyone])


def check_first_step(
    model: nn.Module,
    optimizer: Optimizer,
    corrections: Sequence[Correction],
    *,
    proved: bool,
    in_parts: bool = False,
    stands_in: bool = False,
) -> None:
    """Raise unless the optimizer still trains the model, and weights that must be copies are.

    Called before the first step: data parallelism has made the ranks' weights the
    same by then, and whatever replaces the optimizer's parameters has done so.

    Args:
        model: As given to attach.
        optimizer: The innermost optimizer.
        corrections: In acting order.
        proved: What `agree_across_ranks` returned.
        in_parts: As for `reads_model`.
        stands_in: Whether the optimizer holds tensors that stand for the model's parameters.

    Raises:
        RegradError: If none of the optimizer's parameters belongs to the model any more, or a
            correction that reads the whole model sees a part of it.
    """
    if not stands_in:
        _refuse_replaced_parameters(model, optimizer)
    wide = [c for c in corrections if reads_model(c, in_parts=in_parts)]
    if not wide:
        return
    _refuse_stages(wide, [_stage_of(model)])
    if proved or not _are_several_ranks():
        return
    if not _are_copies(_gather(_samples(model), _device(optimizer))):
        raise RegradError(
            f"{_refused(wide)}, but the weights of the ranks differ: pipeline stages, experts, or "
            "copies that were never synchronised; if they are copies, broadcast the weights "
            f"before the first step, otherwise {_way_out(wide)}"
        )


def _refuse_replaced_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer if none of its parameters belongs to the model any more."""
    trained = [p for p in parameters_of(optimizer) if p.requires_grad]
    if trained and set(model.parameters()).isdisjoint(trained):
        raise RegradError(
            "optimizer must hold parameters of model, but they were replaced after attach(), as "
            "deepspeed.initialize and fully_shard do; build the optimizer and attach after them "
            "(DeepSpeed hides gradients; use DDP, FSDP2 or the layout of regrad-deepspeed)"
        )


def _are_several_ranks() -> bool:
    """Say whether there is a process group of more than one rank."""
    return _is_process_group_there() and distributed.get_world_size() > 1


def _is_process_group_there() -> bool:
    """Say whether this process is in a process group, if only by itself."""
    return distributed.is_available() and distributed.is_initialized()


def _device(optimizer: Optimizer) -> torch.device:
    """Return the first device of parameters that the process group can reach.

    Raises:
        RegradError: If it can reach none of them.
    """
    parameters = parameters_of(optimizer)
    backends = distributed.get_backend_config()
    reached = [entry.partition(":")[0] for entry in backends.split(",")]
    for parameter in parameters:
        if parameter.device.type in reached:
            return parameter.device
    kind = parameters[0].device.type
    raise RegradError(
        f"parameters must be where the process group can reach them, got {kind} with the "
        f"backends {backends}; move the model to its device before attach, or give "
        f"init_process_group a backend for {kind} too"
    )


def _gather(value: Any, device: torch.device) -> list[Any]:
    """Return what every rank gives, in their order; values that JSON can hold.

    `all_gather_object` would need numpy.
    """
    mine = torch.tensor([*json.dumps(value).encode()], dtype=torch.uint8, device=device)
    size = torch.tensor([mine.numel()], device=device)
    sizes = [torch.empty_like(size) for _ in range(distributed.get_world_size())]
    try:
        distributed.all_gather(sizes, size)
        lengths = [int(length.item()) for length in sizes]
        padded = torch.cat([mine, mine.new_zeros(max(lengths) - mine.numel())])
        table = [torch.empty_like(padded) for _ in lengths]
        distributed.all_gather(table, padded)
    except RuntimeError as error:
        raise RegradError(
            "attach() must be called on every rank of the process group, in the same order; "
            f"not all of them answered: {error}"
        ) from error
    rows = zip(table, lengths, strict=True)
    return [json.loads(bytes(row[:length].tolist())) for row, length in rows]


def _described(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return names and shapes: of the optimizer's parameters in its order, then of all others."""
    named = _named(model)
    names = {parameter: f"{name} {_shape(parameter)}" for name, parameter in named.items()}
    held = parameters_of(optimizer)
    lines = [names.get(p, f"{_shape(p)} outside the model") for p in held]
    trained = set(held)
    lines += [f"{line} outside the optimizer" for p, line in names.items() if p not in trained]
    return lines


def _digest_of(lines: Sequence[str]) -> str:
    """Return a hash of lines that is the same only for the same ones."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _shape(parameter: Tensor) -> str:
    """Return the shape of the whole parameter, in words where a lazy module has not made it yet."""
    if is_lazy(parameter):
        return "of a lazy module"
    return str([*parameter.shape])


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by their names, without those of wrappers."""
    named = innermost_module(model).named_parameters()
    return {re.sub(WRAPPER, "", name): parameter for name, parameter in named}


def _samples(model: nn.Module) -> dict[str, str]:
    """Return digests of some numbers of every parameter, by this rank's place in their mesh.

    Ranks at one place hold copies of one another. A parameter that is not a DTensor has
    the same place, "everywhere", on all ranks.
    """
    found: dict[str, list[Tensor]] = {}
    for parameter in _named(model).values():
        # A class of its own says: quantised, or not there yet.
        if type(parameter) is nn.Parameter or sharding.is_sharded(parameter):
            found.setdefault(_place(parameter), []).append(_some_numbers(parameter))
    return {place: _digest(numbers) for place, numbers in found.items()}


def _place(parameter: Tensor) -> str:
    """Return this rank's coordinates in the mesh of a parameter."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return "everywhere"
    return f"{mesh.get_coordinate()} of {[*mesh.shape]}"


def _fingerprints(model: nn.Module) -> list[str]:
    """Return name, shape and a digest of some numbers of every parameter that is not constant.

    Constant ones, as new biases, are alike without being the same.
    """
    found = []
    for name, parameter in _named(model).items():
        if type(parameter) is not nn.Parameter and not sharding.is_sharded(parameter):
            continue
        numbers = _some_numbers(parameter)
        if bool((numbers != numbers[:1]).any()):
            found.append(f"{name} {_shape(parameter)} {_digest([numbers])}")
    return found


@torch.no_grad()
def _some_numbers(parameter: Tensor) -> Tensor:
    """Return up to `SAMPLED` numbers of the local part, evenly spaced, in float64."""
    part = sharding.local(parameter.detach())
    if part.is_complex():
        part = torch.view_as_real(part)
    flat = part.reshape(-1)
    step = max(1, flat.numel() // SAMPLED)
    return flat[::step][:SAMPLED].to(torch.float64)


def _digest(numbers: Sequence[Tensor]) -> str:
    """Return a hash of tensors that is the same only for the same bits."""
    first, *others = numbers
    values = torch.cat([first, *(tensor.to(first.device) for tensor in others)])
    raw = values.cpu().view(torch.uint8)
    return hashlib.sha256(bytes(raw.tolist())).hexdigest()


def _are_copies(samples: Sequence[Mapping[str, str]]) -> bool:
    """Say whether ranks at the same place sampled the same numbers."""
    seen: dict[str, str] = {}
    for of_rank in samples:
        for place, digest in of_rank.items():
            if seen.setdefault(place, digest) != digest:
                return False
    return True


def _stage_of(model: nn.Module) -> str | None:
    """Return which of several pipeline stages of torch runs the model or a part of it, or None."""
    stages = _stages_of(model)
    if not stages:
        return None
    index, many = min(stages)
    return f"stage {index} of {many}"


def _stages_of(model: nn.Module) -> list[tuple[int, int]]:
    """Return numbers of torch's pipeline stages that run a part of the model, of how many each."""
    parts: set[nn.Module | Tensor] = {*model.modules(), *model.parameters()}
    found: list[tuple[int, int]] = []
    for stage in _pipeline_stages():
        submodule = stage.submod
        is_ours = not parts.isdisjoint([*submodule.modules(), *submodule.parameters()])
        if stage.num_stages > 1 and is_ours:
            found.append((stage.stage_index, stage.num_stages))
    return found


def _pipeline_stages() -> Iterator[Any]:
    """Yield the stages of torch.distributed.pipelining: a module does not know which it is in.

    A stage needs a process group. Without one there is none, and no need to look for it among
    all objects, which takes a good part of a second.
    """
    if not _is_process_group_there():
        return
    pipelining = sys.modules.get("torch.distributed.pipelining.stage")
    kind = getattr(pipelining, "_PipelineStageBase", None)
    if kind is None:
        return
    kinds = {kind, *_subclasses(kind)}
    for candidate in gc.get_objects():
        # `isinstance` would ask proxies for their `__class__`, which may import or warn.
        if type(candidate) in kinds:
            yield candidate


def _subclasses(kind: Any) -> Iterator[Any]:
    """Yield what inherits from a class, directly or not."""
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _refuse_other_corrections(corrections: Sequence[str]) -> None:
    """Refuse ranks that attach different corrections, versions or options."""
    first = corrections[0]
    for rank, theirs in enumerate(corrections):
        if theirs != first:
            raise RegradError(f"ranks must attach the same, got {first} on 0, {theirs} on {rank}")


def _refuse_stages(wide: Sequence[Correction], stages: Sequence[str | None]) -> None:
    """Refuse corrections that read the whole model if it is cut into pipeline stages."""
    known = [stage for stage in stages if stage is not None]
    if wide and known:
        raise RegradError(
            f"{_refused(wide)}, but torch.distributed.pipelining runs this one as {known[0]}; "
            f"{_way_out(wide)}"
        )


def _refuse_missing_stages(
    summing: Sequence[Correction], stages: Sequence[Sequence[tuple[int, int]]]
) -> None:
    """Refuse sums over the model where one attachment of each rank does not make it whole."""
    known: set[int] = set()
    many = 0
    for of_rank in stages:
        for index, of_how_many in of_rank:
            known.add(index)
            many = max(many, of_how_many)
    if summing and len(known) < many:
        raise RegradError(
            f"{_refused(summing)}, but the stages that are attached are {sorted(known)} of {many}; "
            "attach all stages of a process together: attach([stage, …], one optimizer, …)"
        )


def _refuse_shared_weights(
    summing: Sequence[Correction], everyone: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse sums over a group if several of its processes hold the same weights.

    Weights that experts share, or copies under data parallelism, would be counted several
    times. Stages of torch's pipelines are known to be different parts.
    """
    if not summing or any(theirs["stages"] for theirs in everyone):
        return
    for group in {tuple(theirs["group"]) for theirs in everyone}:
        seen: dict[str, int] = {}
        for rank in group:
            for held in everyone[rank]["held"]:
                other = seen.setdefault(held, rank)
                if other != rank:
                    name = held.rpartition(" ")[0]
                    raise RegradError(
                        f"{_names(summing)} must see each weight once in model_group, but {name} "
                        f"is the same on {other} and {rank}, as weights that experts share and "
                        "copies are; clip in the loop there, or give different parts other names"
                    )


def _refuse_parts(wide: Sequence[Correction], described: Sequence[Sequence[str]]) -> None:
    """Refuse corrections that read the whole model if ranks hold different parameters."""
    first = described[0]
    for rank, theirs in enumerate(described):
        if theirs != first:
            raise RegradError(
                f"{_refused(wide)}, but ranks hold different parameters, as pipeline stages and "
                f"experts do: {_only(first, theirs)} on 0, {_only(theirs, first)} on {rank}; "
                f"{_way_out(wide)}"
            )


def _only(lines: Sequence[str], others: Sequence[str]) -> str:
    """Return the first lines that the others lack."""
    known = set(others)
    lacking = [line for line in lines if line not in known]
    if not lacking:
        return "nothing else" if known != set(lines) else "the same in another order"
    shown = lacking[:PARAMETERS_SHOWN]
    if len(lacking) > PARAMETERS_SHOWN:
        shown.append(f"… ({len(lacking)} in all)")
    return ", ".join(shown)


def _refused(wide: Sequence[Correction]) -> str:
    return f"{_names(wide)} must see the whole model"


def _names(corrections: Sequence[Correction]) -> str:
    return ", ".join(repr(correction.name) for correction in corrections)


def _way_out(wide: Sequence[Correction]) -> str:
    """Return what each correction says of models in parts."""
    advice: list[str] = []
    for correction in wide:
        mend = correction.needs.conflicts.get("parts", "leave it out")
        advice.append(f"{correction.name}: {mend}")
    return "; ".join(advice)
