"""The window: the time between moving weights and restoring them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regrad.errors import RegradError
from regrad.exchange import adopt_, extrapolate_, swap_
from regrad.hookspecs import LastStep
from regrad.kept_weights import Holds, Kept, Loaded, loaded_from
from regrad.samples import Samples, sample
from regrad.sharding import is_sharded, local, locals_of

Move = Tensor | LastStep | None


class Window:
    """Moves weights and restores them bit for bit, but for those that were written meanwhile.

    One buffer per parameter, kept from step to step: allocating it anew costs several times the
    copy. While the weights are moved it holds the true ones. After the optimizer's step it still
    holds those from before the step, so that a `LastStep` can be followed.

    Attributes:
        is_open: Whether the weights of this step were already asked for; true also
            when nothing had to be moved.
        moved: The parameters that are moved now.
        overwritten: Those that held other values than the window's at its last closing.
        overwritten_on_device: How many more there were so far whose values only their device
            knows; a scalar there, or None.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.moved: list[Tensor] = []
        self.overwritten: list[Tensor] = []
        self.overwritten_on_device: Tensor | None = None
        self._kept: dict[Tensor, Kept] = {}
        self._loaded: dict[Tensor, Loaded] = {}
        self._samples = Samples([])

    # ---- moving

    @torch.no_grad()
    def open(self, parameters: Sequence[Tensor], moves: Sequence[Move] | None) -> bool:
        """Move each parameter.

        Args:
            parameters: The live parameters. Overwritten until `close`.
            moves: One per parameter: a displacement of its local shape, a `LastStep`, or None.

        Returns:
            Whether any parameter was moved.

        Raises:
            RegradError: If the number of moves is not the number of parameters.
        """
        moves = moves or [None] * len(parameters)
        if len(moves) != len(parameters):
            raise RegradError(
                f"predict_weights must return {len(parameters)} displacements, got {len(moves)}"
            )
        pairs = zip(parameters, moves, strict=True)
        wanted = {parameter: move for parameter, move in pairs if move is not None}
        self.is_open = True
        self._take_loaded()
        if self._follows():
            self._forget_what_was_written()
        self._kept = {parameter: self._kept_of(parameter) for parameter in wanted}
        if not wanted:
            return False
        self.moved = self._move(wanted)
        self._watch()
        return bool(self.moved)

    def _move(self, wanted: Mapping[Tensor, Tensor | LastStep]) -> list[Tensor]:
        """Move the parameters, so that each buffer holds the true weights; return those moved."""
        displaced: dict[Tensor, Tensor] = {}
        followed: dict[Tensor, LastStep] = {}
        again: list[Tensor] = []
        for parameter, move in wanted.items():
            kept = self._kept[parameter]
            if isinstance(move, Tensor):
                displaced[parameter] = local(move)
                kept.holds = Holds.NOTHING
            elif kept.holds is Holds.AHEAD:
                again.append(parameter)
            elif kept.holds is Holds.BEFORE and _goes_anywhere(move):
                followed[parameter] = move
            elif kept.holds is Holds.BEFORE:
                kept.holds = Holds.NOTHING
            kept.is_followed = isinstance(move, LastStep)
        self._copy(parameter for parameter in wanted if self._holds(parameter, Holds.NOTHING))
        extrapolate_(locals_of(followed), self._buffers(followed), list(followed.values()))
        swap_(locals_of(again), self._buffers(again))
        if displaced:
            torch._foreach_add_(locals_of(displaced), list(displaced.values()))
        for kept in self._kept.values():
            kept.holds = Holds.TRUE
        moved = {*displaced, *followed, *again}
        return [parameter for parameter in wanted if parameter in moved]

    @torch.no_grad()
    def where_to(self, parameters: Sequence[Tensor], moves: Sequence[Move]) -> list[Tensor | None]:
        """Return where `open` would move each parameter, as a new tensor; None where it stays.

        Args:
            parameters: The live parameters.
            moves: As for `open`, of any number.
        """
        self._take_loaded()
        written = set(self._samples.rewritten())
        places: list[Tensor | None] = []
        # The window refuses a wrong number of moves, and says so better.
        for parameter, move in zip(parameters, moves, strict=False):
            if isinstance(move, LastStep) and parameter in written:
                places.append(None)
            else:
                places.append(self._place(parameter, move))
        return places

    def _place(self, parameter: Tensor, move: Move) -> Tensor | None:
        """Return where a parameter would go that nobody wrote since its last step, or None."""
        part = local(parameter.detach())
        if isinstance(move, Tensor):
            return part + local(move)
        kept = self._kept.get(parameter)
        if move is None or kept is None or not kept.fits(part):
            return None
        if kept.holds is Holds.AHEAD:
            return kept.tensor.clone()
        if kept.holds is Holds.BEFORE and _goes_anywhere(move):
            ahead = part.clone()
            extrapolate_([ahead], [kept.tensor.clone()], [move])
            return ahead
        return None

    def _follows(self) -> bool:
        """Say whether any parameter goes on along its last steps."""
        return any(kept.is_followed for kept in self._kept.values())

    def _kept_of(self, parameter: Tensor) -> Kept:
        """Return the buffer of a parameter, kept from step to step while it fits."""
        part = local(parameter)
        kept = self._kept.get(parameter)
        if kept is None or not kept.fits(part):
            return Kept(torch.empty_like(part, requires_grad=False))
        return kept

    def _holds(self, parameter: Tensor, content: Holds) -> bool:
        """Say whether that is what the buffer of a parameter holds."""
        return self._kept[parameter].holds is content

    def _buffers(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        return [self._kept[parameter].tensor for parameter in parameters]

    def _copy(self, parameters: Iterable[Tensor]) -> None:
        """Copy parameters into their buffers."""
        chosen = list(parameters)
        if chosen:
            torch._foreach_copy_(self._buffers(chosen), locals_of(chosen))

    # ---- what somebody else wrote

    def _watch(self) -> None:
        """Note what the parameters hold, to know later whether it is still there."""
        watched = list(self._kept)
        is_same = [*map(id, self._samples.tensors)] == [*map(id, watched)]
        if is_same and self._samples.is_in_place():
            self._samples.take()
        else:
            self._samples = Samples(watched)

    def rewritten(self) -> list[Tensor]:
        """Return the moved parameters that somebody else wrote. Reads nothing on a device."""
        if not self.moved:
            return []
        moved = set(self.moved)
        return [parameter for parameter in self._samples.rewritten() if parameter in moved]

    def _forget_what_was_written(self) -> tuple[set[Tensor], dict[Tensor, Tensor]]:
        """Let no buffer hold what is no longer of use because somebody else wrote the weights.

        Returns:
            The parameters that are known to be written; and, of others on a device, flags that
            only it can read. Where one is set, the buffer holds what was written.
        """
        written = {parameter for parameter in self._samples.rewritten() if parameter in self._kept}
        for parameter in written:
            self._kept[parameter].holds = Holds.NOTHING
        flags = {
            parameter: flag
            for parameter, flag in self._samples.flags().items()
            if parameter in self._kept and parameter not in written
        }
        fitting = [p for p in flags if self._kept[p].fits(local(p))]
        adopt_(self._buffers(fitting), locals_of(fitting), [flags[p] for p in fitting])
        return written, flags

    # ---- restoring

    @torch.no_grad()
    def close(self, *, before_step: bool = False) -> bool:
        """Restore the moved parameters that nobody else wrote.

        Args:
            before_step: Whether the optimizer steps now: the buffers then hold the weights from
                which it does. Else where parameters were moved to along their last step is kept,
                should the forward pass of this step come again.

        Returns:
            Whether any parameter was moved.
        """
        self.is_open = False
        if before_step:
            self._take_loaded()
        follows = self._follows()
        if not self.moved and not (before_step and follows):
            return False
        written, flags = self._forget_what_was_written()
        moved = self.moved
        self.moved = []
        self.overwritten = [parameter for parameter in moved if parameter in written]
        self._restore([p for p in moved if p not in written], comes_again=not before_step)
        self._count_on_device([flags[parameter] for parameter in moved if parameter in flags])
        if before_step:
            self._begin_step()
        elif follows:
            self._watch()
        return bool(moved)

    def _restore(self, parameters: Sequence[Tensor], *, comes_again: bool) -> None:
        """Give parameters their true weights; keep where they were if that may come again."""
        again: list[Tensor] = []
        if comes_again:
            again = [parameter for parameter in parameters if self._kept[parameter].is_followed]
        swap_(locals_of(again), self._buffers(again))
        for parameter in again:
            self._kept[parameter].holds = Holds.AHEAD
        rest = [parameter for parameter in parameters if self._holds(parameter, Holds.TRUE)]
        if rest:
            torch._foreach_copy_(locals_of(rest), self._buffers(rest))

    def _count_on_device(self, flags: list[Tensor]) -> None:
        """Add the flags that are set to the count of all so far."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for flag in flags:
            by_device.setdefault(flag.device, []).append(flag)
        for alike in by_device.values():
            count = torch.stack(alike).sum(dtype=torch.float32)
            if self.overwritten_on_device is not None:
                count += self.overwritten_on_device.to(count)
            self.overwritten_on_device = count

    # ---- the step

    def _begin_step(self) -> None:
        """Let the buffers hold the weights that the optimizer steps from."""
        followed = [parameter for parameter, kept in self._kept.items() if kept.is_followed]
        self._copy(p for p in followed if not self._holds(p, Holds.TRUE))
        for parameter in followed:
            kept = self._kept[parameter]
            kept.holds = Holds.TRUE
            kept.writes = local(parameter)._version
            kept.has_gradient = parameter.grad is not None

    def end_step(self) -> None:
        """Note that the optimizer stepped the parameters with a gradient, and those it wrote."""
        for parameter, kept in self._kept.items():
            if not (kept.is_followed and kept.holds is Holds.TRUE):
                continue
            if kept.has_gradient or local(parameter)._version != kept.writes:
                kept.holds = Holds.BEFORE
        self.note_writes()

    def note_writes(self) -> None:
        """Take what was written until now as the optimizer's doing."""
        if self._follows():
            self._watch()

    # ---- the checkpoint

    def true_weights(self) -> dict[Tensor, Tensor]:
        """Return copies of the true weights, by moved parameter.

        They are copies because the buffers are used again.
        """
        if not self.moved:
            return {}
        newer = set(self.rewritten())
        flags = self._samples.flags()
        copies: dict[Tensor, Tensor] = {}
        for parameter in self.moved:
            if parameter in newer:
                continue
            copy = parameter.detach().clone()
            part = local(copy)
            true = self._kept[parameter].tensor.to(part)
            if parameter in flags:
                true = torch.where(flags[parameter], part, true)
            part.copy_(true)
            copies[parameter] = copy
        return copies

    def state_dict(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """Return what a resumed run needs to predict the same: copies, by parameter name.

        Args:
            names: Of the parameters.

        Returns:
            Empty where no `LastStep` is followed; else "before", the weights before the last step;
            "ahead", where those are that were moved already in the step under way; "beside", a few
            of the weights that belong to either, but for shards: by them it is known later whether
            they were loaded too.
        """
        state: dict[str, Any] = {"before": {}, "ahead": {}, "beside": {}}
        written = set(self._samples.rewritten())
        moved = set(self.moved)
        for parameter, kept in self._kept.items():
            if parameter not in names or parameter in written or not kept.is_followed:
                continue
            live = local(parameter.detach())
            if parameter in moved:
                loaded = Loaded(Holds.AHEAD, live.clone(), sample(kept.tensor).clone())
            elif kept.holds in (Holds.BEFORE, Holds.AHEAD):
                loaded = Loaded(kept.holds, kept.tensor.clone(), sample(live).clone())
            else:
                continue
            if is_sharded(parameter):
                loaded.beside = None
            loaded.write(state, names[parameter])
        for parameter, loaded in self._loaded.items():
            if parameter in names:
                loaded.write(state, names[parameter])
        return state if state["before"] or state["ahead"] else {}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned; it is used with the weights of the next forward.

        Args:
            state: Empty, or as `state_dict` returned it.
            parameters: By name.
        """
        self._kept = {}
        self._samples = Samples([])
        self._loaded = {}
        for name, parameter in parameters.items():
            loaded = loaded_from(state, name)
            if loaded is not None:
                self._loaded[parameter] = loaded

    def _take_loaded(self) -> None:
        """Put what was loaded into the buffers, where it belongs to the weights there are."""
        loaded = self._loaded
        self._loaded = {}
        for parameter, one in loaded.items():
            part = local(parameter.detach())
            if one.is_of(part):
                tensor = torch.empty_like(part)
                tensor.copy_(one.tensor)
                self._kept[parameter] = Kept(tensor, holds=one.holds, is_followed=True)


def _goes_anywhere(step: LastStep) -> bool:
    """Say whether a last step is to be followed at all; a tensor is not read to know it."""
    return isinstance(step.factor, Tensor) or step.factor != 0
