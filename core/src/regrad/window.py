"""The window: the time between moving weights and restoring them, and what a step did to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regrad.errors import RegradError
from regrad.exchange import adopt_, extrapolate_, join_, part_, swap_
from regrad.hookspecs import LastStep
from regrad.kept_weights import Holds, Kept, Loaded, loaded_from
from regrad.samples import Samples, sample
from regrad.sharding import is_sharded, local

Move = Tensor | LastStep | None


class Window:
    """Moves weights and restores them bit for bit, except those that were written meanwhile.

    One buffer per parameter, kept from step to step: allocating it again costs several times the
    copy. While the weights are moved it holds the true ones. After the optimizer's step it still
    holds those from before the step, so that the step can be corrected, and a `LastStep` followed.

    Attributes:
        is_open: Whether the weights of this step were already requested; true also
            when nothing had to be moved.
        overwritten: Those that held other values than the window's at its last closing.
        overwritten_on_device: How many more there were so far whose values only their device
            knows; a scalar there, or None.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.overwritten: list[Tensor] = []
        self.overwritten_on_device: Tensor | None = None
        self._kept: dict[Tensor, Kept] = {}
        self._moved: list[Kept] = []
        self._loaded: dict[Tensor, Loaded] = {}
        self._samples = Samples([])

    @property
    def moved(self) -> list[Tensor]:
        """The parameters that are moved now."""
        return [kept.parameter for kept in self._moved]

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
        self.is_open = True
        self._take_loaded()
        if self._follows():
            self._forget_what_was_written()
        pairs = zip(parameters, moves, strict=True)
        wanted = [(self._kept_of(p), move) for p, move in pairs if move is not None]
        others = self._unmoved(parameters)
        self._kept = others | {kept.parameter: kept for kept, _ in wanted}
        if not wanted:
            return False
        self._moved = self._move(wanted)
        self._watch()
        return bool(self._moved)

    def _move(self, wanted: Sequence[tuple[Kept, Tensor | LastStep]]) -> list[Kept]:
        """Move parameters, so that each buffer holds the true weights; return what was moved."""
        displaced: list[tuple[Kept, Tensor]] = []
        followed: list[tuple[Kept, LastStep]] = []
        again: list[Kept] = []
        stale: list[Kept] = []
        moved: list[Kept] = []
        for kept, move in wanted:
            kept.is_followed = isinstance(move, LastStep)
            if isinstance(move, Tensor):
                displaced.append((kept, local(move)))
            elif kept.holds is Holds.AHEAD:
                again.append(kept)
            elif kept.holds is Holds.BEFORE and _goes_anywhere(move):
                followed.append((kept, move))
            elif kept.holds is not Holds.TRUE:
                stale.append(kept)
                continue
            else:
                continue
            moved.append(kept)
        _copy([*stale, *(kept for kept, _ in displaced)])
        if displaced:
            live = [kept.live for kept, _ in displaced]
            torch._foreach_add_(live, [displacement for _, displacement in displaced])
        extrapolate_(*_pairs([kept for kept, _ in followed]), [step for _, step in followed])
        swap_(*_pairs(again))
        for kept, _ in wanted:
            kept.holds = Holds.TRUE
        return moved

    @torch.no_grad()
    def where_to(self, parameters: Sequence[Tensor], moves: Sequence[Move]) -> list[Tensor | None]:
        """Return where `open` would move each parameter, as a new tensor; None if it does not move.

        Args:
            parameters: The live parameters.
            moves: As for `open`, of any number.
        """
        self._take_loaded()
        written = set(self._samples.rewritten())
        places: list[Tensor | None] = []
        # The window refuses a wrong number of moves, with a better message.
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

    def _unmoved(self, parameters: Sequence[Tensor]) -> dict[Tensor, Kept]:
        """Return the buffers that are kept for other reasons than the moves of this step."""
        present = set(parameters)
        found: dict[Tensor, Kept] = {}
        for parameter, kept in self._kept.items():
            if kept.is_corrected and parameter in present:
                kept.is_followed = False
                found[parameter] = kept
        return found

    def _follows(self) -> bool:
        """Say whether any parameter goes on along its last steps."""
        return any(kept.is_followed for kept in self._kept.values())

    def _kept_of(self, parameter: Tensor) -> Kept:
        """Return the buffer of a parameter, kept from step to step while it fits."""
        part = local(parameter)
        kept = self._kept.get(parameter)
        if kept is None or not kept.fits(part):
            return Kept(parameter, torch.empty_like(part, requires_grad=False))
        return kept

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
        written = self._samples.rewritten() if self._moved else []
        if not written:
            return []
        moved = set(self.moved)
        return [parameter for parameter in written if parameter in moved]

    def _forget_what_was_written(self) -> dict[Tensor, Tensor]:
        """Empty the buffers that became useless because somebody else wrote the weights.

        It then holds nothing.

        Returns:
            Of parameters on a device flags that only it can read. Where one is set, the buffer
            holds what was written.
        """
        for parameter in self._samples.rewritten():
            if parameter in self._kept:
                self._kept[parameter].holds = Holds.NOTHING
        flags = {
            parameter: flag
            for parameter, flag in self._samples.flags().items()
            if parameter in self._kept and self._kept[parameter].holds is not Holds.NOTHING
        }
        fitting = [self._kept[p] for p in flags if self._kept[p].fits(local(p))]
        weights, buffers = _pairs(fitting)
        adopt_(buffers, weights, [flags[kept.parameter] for kept in fitting])
        return flags

    # ---- restoring

    def close(self, *, before_step: bool = False, corrected: Sequence[Tensor] = ()) -> bool:
        """Restore the moved parameters that nobody else wrote.

        Args:
            before_step: Whether the optimizer steps now: the buffers then hold the weights from
                which it does. Else where parameters were moved to along their last step is kept,
                should the forward pass of this step come again.
            corrected: The parameters of which `displacements` will be asked after the step.

        Returns:
            Whether any parameter was moved.
        """
        self.is_open = False
        if before_step:
            self._take_loaded()
        follows = self._follows()
        was_moved = bool(self._moved)
        if was_moved or (before_step and follows):
            self._restore_moved(before_step=before_step)
        if before_step:
            self._begin_step(corrected)
        elif was_moved and follows:
            self._watch()
        return was_moved

    @torch.no_grad()
    def _restore_moved(self, *, before_step: bool) -> None:
        """Do so, and note what was written meanwhile, also into parameters that were not moved."""
        flags = self._forget_what_was_written()
        moved = self._moved
        self._moved = []
        self.overwritten = [kept.parameter for kept in moved if kept.holds is Holds.NOTHING]
        _restore([kept for kept in moved if kept.holds is Holds.TRUE], comes_again=not before_step)
        if flags:
            found = [flags.get(kept.parameter) for kept in moved]
            self._count_on_device([flag for flag in found if flag is not None])

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

    @torch.no_grad()
    def _begin_step(self, corrected: Sequence[Tensor]) -> None:
        """Let the buffers hold the weights that the optimizer steps from, where that is needed."""
        for kept in self._kept.values():
            kept.is_corrected = False
        for parameter in corrected:
            kept = self._kept_of(parameter)
            kept.is_corrected = True
            self._kept[parameter] = kept
        needed = [kept for kept in self._kept.values() if kept.is_followed or kept.is_corrected]
        # Only of followed ones it is known whether somebody wrote them meanwhile.
        _copy([kept for kept in needed if kept.holds is not Holds.TRUE or not kept.is_followed])
        for kept in needed:
            kept.begin_step()

    @contextlib.contextmanager
    def displacements(
        self, decays: Mapping[Tensor, float | Tensor]
    ) -> Iterator[dict[Tensor, Tensor]]:
        """Show what the optimizer's step did, for the time of a block, and let it be changed.

        In the block the parameters hold the weights from before the step. Afterwards they hold
        those, less their decay, plus what the displacements hold then.

        Args:
            decays: Of the parameters that `close` was told of: the share of the weights that the
                step took off besides. The displacements are without it.

        Yields:
            The displacements of those that the optimizer stepped, by parameter; each of its kind
            and shape.
        """
        stepped = [k for k in self._kept.values() if k.is_corrected and k.was_stepped()]
        part_(*_pairs(stepped), [decays[kept.parameter] for kept in stepped])
        try:
            yield {kept.parameter: kept.as_parameter for kept in stepped}
        finally:
            followed = [kept for kept in stepped if kept.is_followed]
            others = [kept for kept in stepped if not kept.is_followed]
            join_(*_pairs(followed), [decays[kept.parameter] for kept in followed])
            join_(*_pairs(others), [decays[kept.parameter] for kept in others], goes_back=False)
            for kept in others:
                kept.holds = Holds.NOTHING

    def end_step(self) -> None:
        """Note that the optimizer stepped the parameters with a gradient, and those it wrote."""
        for kept in self._kept.values():
            if kept.holds is not Holds.TRUE:
                continue
            if not kept.is_followed:
                kept.holds = Holds.NOTHING
            elif kept.was_stepped():
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
        if not self._moved:
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
        """Restore what `state_dict` returned; it is used with the weights of the next forward.

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
        """Put what was loaded into the buffers, if it belongs to the current weights."""
        loaded = self._loaded
        self._loaded = {}
        for parameter, one in loaded.items():
            part = local(parameter.detach())
            if is_sharded(parameter):
                # It may be a sample of the whole weights.
                one.beside = None
            if one.is_of(part):
                tensor = torch.empty_like(part)
                tensor.copy_(one.tensor)
                self._kept[parameter] = Kept(parameter, tensor, holds=one.holds, is_followed=True)


def _goes_anywhere(step: LastStep) -> bool:
    """Say whether a last step is to be followed at all; a tensor is not read to know it."""
    return isinstance(step.factor, Tensor) or step.factor != 0


def _pairs(chosen: Sequence[Kept]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the live weights and the buffers."""
    return [kept.live for kept in chosen], [kept.tensor for kept in chosen]


def _copy(chosen: Sequence[Kept]) -> None:
    """Copy weights into their buffers."""
    if chosen:
        weights, buffers = _pairs(chosen)
        torch._foreach_copy_(buffers, weights)


def _restore(chosen: Sequence[Kept], *, comes_again: bool) -> None:
    """Give parameters their true weights; keep where they were if that may come again."""
    again = [kept for kept in chosen if kept.is_followed and comes_again]
    rest = [kept for kept in chosen if not (kept.is_followed and comes_again)]
    swap_(*_pairs(again))
    for kept in again:
        kept.holds = Holds.AHEAD
    if rest:
        weights, buffers = _pairs(rest)
        torch._foreach_copy_(weights, buffers)
    for kept in rest:
        if not kept.is_followed:
            kept.holds = Holds.NOTHING
