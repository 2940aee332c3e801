"""What a script trains with, seen at its first training forward; the script ends there.

A comparison asks this once, before its runs: which control each arm has depends on the optimizer
that the script makes. `python -m regrad_runner.scripts.probing QUESTION ANSWER -- SCRIPT ARGS...`
is how it does so, behind the script's own launcher.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import regrad
from regrad import Attachment, RegradError, registry
from regrad.correction import Control
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from regrad_runner.files import write_whole
from regrad_runner.scripts.attaching import AutomaticAttachment
from regrad_runner.scripts.controls import apply_control, check_fits
from regrad_runner.scripts.running import run_script
from regrad_runner.settings.arms import control_as_values, control_of_stack


class SeenEnough(BaseException):
    """Enough of the script was seen; no `except Exception` of its own stops this."""


class ScriptProbe(AutomaticAttachment):
    """Sees the first optimizer that can be attached to, and ends the script.

    Args:
        arms: Strings for `regrad.create`, by the name of the arm.
        classes: As for `AutomaticAttachment`.

    Attributes:
        answer: What was seen; None before it.
    """

    def __init__(self, arms: Mapping[str, Sequence[str]], *, classes: Sequence[str] = ()) -> None:
        super().__init__([], classes=classes)
        self._arms = arms
        self.answer: dict[str, Any] | None = None

    def _attachment(
        self, model: Any, optimizer: Optimizer, modules: Sequence[nn.Module]
    ) -> Attachment:
        """Note what each arm meets here, and end the script."""
        self.answer = {
            "optimizer": type(optimizer).__name__,
            "modules": [type(module).__name__ for module in modules],
            "controls": {},
            "refused": {},
            "refused_controls": {},
        }
        for arm, names in self._arms.items():
            try:
                corrections = registry.create_all(names)
                control = control_of_stack(names, optimizer)
                criterion = None
                if any("criterion" in correction.needs.stages for correction in corrections):
                    criterion = F.cross_entropy
                regrad.attach(model, optimizer, corrections, criterion).detach()
            except (RegradError, ValueError, TypeError) as problem:
                self.answer["refused"][arm] = " ".join(str(problem).split())
                continue
            if control is None:
                continue
            self.answer["controls"][arm] = control_as_values(control)
            try:
                self._try_control(control, model, optimizer, modules)
            except (RegradError, ValueError, TypeError) as problem:
                self.answer["refused_controls"][control.name] = " ".join(str(problem).split())
        raise SeenEnough

    def _try_control(
        self, control: Control, model: Any, optimizer: Optimizer, modules: Sequence[nn.Module]
    ) -> None:
        """Make a control's change and undo it, or raise the reason why it cannot be made."""
        corrections = registry.create_all(control.corrections)
        check_fits(control, corrections)
        whole = modules[0] if len(modules) == 1 else nn.ModuleList(modules)
        with apply_control(control, whole, optimizer):
            regrad.attach(model, optimizer, corrections).detach()


def probe(question: Path, answer: Path, words: Sequence[str]) -> int:
    """Run a script until it is seen, and write what was seen.

    Args:
        question: JSON with "arms" and "classes", as for `ScriptProbe`.
        answer: File for what was seen, as JSON; the first of several processes writes it.
        words: "SCRIPT ARGS..." or "-m MODULE ARGS...".

    Returns:
        0 once the script was seen; else its own exit code.
    """
    asked = json.loads(question.read_text(encoding="utf-8"))
    seeing = ScriptProbe(asked["arms"], classes=asked["classes"])
    with seeing:
        code = run_script(words, ends_quietly=SeenEnough)
    seen = seeing.answer or {"not_attached": seeing.waiting}
    if os.environ.get("RANK", "0") == "0":
        write_whole(answer, json.dumps(seen))
    return 0 if seeing.answer else code


if __name__ == "__main__":
    given = sys.argv[1:]
    end = given.index("--")
    sys.exit(probe(Path(given[0]), Path(given[1]), given[end + 1 :]))
