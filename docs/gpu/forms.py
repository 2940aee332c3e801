"""A corrected step beside the plain one, in the forms that a GPU has: foreach, fused, compiled.

Usage: python docs/gpu/forms.py FILE.csv --seconds S [--device cuda] [--quick] [--warm]

The step is the bench's, a ResNet-20 on one batch, with xgrad on every form of the optimizer, and
with several corrections on the compiled model. --warm compiles and times nothing: the compiler
keeps what it made for the next process.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from regrad import RegradError, RegradWarning
from regrad_bench.cases import Attached, Setting
from regrad_bench.timing import clock_for, interleave
from regrad_bench.training import Trainer, resnet20
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

PAIRS = 20
WARM_UP = 3
SMALL_RATE = 1e-3


@dataclass(frozen=True)
class Form:
    """One line of the table.

    Attributes:
        correction: Its name, or "" for an attachment without any.
        optimizer: "sgd" or "adamw".
        fused: Whether the optimizer updates in one kernel; else by foreach.
        compiled: Whether the model is compiled.
    """

    correction: str
    optimizer: str = "sgd"
    fused: bool = False
    compiled: bool = False


FORMS = (
    Form("xgrad"),
    Form("xgrad", fused=True),
    Form("xgrad", "adamw"),
    Form("xgrad", "adamw", fused=True),
    Form("", compiled=True),
    Form("xgrad", compiled=True),
    Form("agc:head=fc", compiled=True),
    Form("centralization", compiled=True),
    Form("powergrad", compiled=True),
)


@dataclass(frozen=True)
class Timed(Form):
    """A form, timed.

    Attributes:
        ours_ms: Median milliseconds of the corrected step.
        plain_ms: The same of the plain step.
        ratio: Median of the ratios, pair by pair.
        reason: Why it was not timed, or "".
    """

    ours_ms: float | None = None
    plain_ms: float | None = None
    ratio: float | None = None
    reason: str = ""


def main() -> None:
    """Time every form until the time is up; what is timed is kept at once."""
    parser = argparse.ArgumentParser(description="Time forms of the step.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--warm", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore", RegradWarning)
    torch.set_num_threads(1)
    ends = time.monotonic() + asked.seconds
    setting = Setting(device=torch.device(asked.device), quick=asked.quick)
    rows: list[Timed] = []
    for form in FORMS:
        if time.monotonic() > ends:
            rows.append(Timed(**asdict(form), reason="no time left"))
        elif asked.warm:
            warm(form, setting)
        else:
            rows.append(timed(form, setting))
            write(asked.file, rows)
            sys.stdout.write(f"{in_words(rows[-1])}\n")


def warm(form: Form, setting: Setting) -> None:
    """Let the compiler do its work, if the form is compiled."""
    if form.compiled:
        torch.compiler.reset()
        trainer, _ = corrected(form, setting)
        trainer.step()


def timed(form: Form, setting: Setting) -> Timed:
    """Time a form beside the plain step of the same form."""
    try:
        return _timed(form, setting)
    except (RegradError, ValueError, RuntimeError) as problem:  # the compiler's are of the last
        reason = " ".join(str(problem).split())
        return Timed(**asdict(form), reason=f"{type(problem).__name__}: {reason[:200]}")


def _timed(form: Form, setting: Setting) -> Timed:
    torch.compiler.reset()  # it gives up on a class of which it has compiled several models
    ours, attached = corrected(form, setting)
    plain = trainer_of(form, setting)
    seen = interleave(
        ours.step,
        plain.step,
        pairs=1 if setting.quick else PAIRS,
        clock=clock_for(setting.device),
        prepare=attached.pass_the_meter,
        warm_up=1 if setting.quick else WARM_UP,
    )
    attached.attachment.detach()
    ours_seconds, plain_seconds = seen.medians
    return Timed(
        **asdict(form),
        ours_ms=ours_seconds * 1000,
        plain_ms=plain_seconds * 1000,
        ratio=seen.ratio,
    )


def corrected(form: Form, setting: Setting) -> tuple[Trainer, Attached]:
    """Return a trainer with the form's correction attached."""
    trainer = trainer_of(form, setting)
    corrections = [form.correction] if form.correction else []
    attached = Attached(trainer.model, trainer.optimizer, [*corrections], F.cross_entropy)
    trainer.criterion = attached.attachment.criterion
    return trainer, attached


def trainer_of(form: Form, setting: Setting) -> Trainer:
    """Return a trainer with the form's optimizer, its model compiled if the form is."""
    trainer = Trainer(resnet20(setting), setting.device)
    trainer.optimizer = _optimizer(form, trainer)
    if form.compiled:
        # Small sizes try the way; a compiler takes minutes on a CPU.
        backend = "aot_eager" if setting.quick else "inductor"
        trainer.model = torch.compile(trainer.model, backend=backend)  # type: ignore[assignment]
    return trainer


def _optimizer(form: Form, trainer: Trainer) -> Optimizer:
    """Return the form's optimizer of a trainer's model."""
    parameters = trainer.model.parameters()
    fused, foreach = form.fused, not form.fused
    if form.optimizer == "adamw":
        return AdamW(parameters, lr=SMALL_RATE, fused=fused, foreach=foreach)
    return SGD(parameters, lr=SMALL_RATE, momentum=0.9, fused=fused, foreach=foreach)


def in_words(row: Timed) -> str:
    """Say what was measured."""
    how = "fused" if row.fused else "foreach"
    model = "compiled" if row.compiled else "eager"
    name = f"{row.correction or 'no correction'}, {row.optimizer} {how}, {model}"
    if row.ratio is None:
        return f"{name}: not timed, {row.reason}"
    return f"{name}: {row.ours_ms:.3f} ms, plain {row.plain_ms:.3f} ms, ratio {row.ratio:.3f}"


def write(path: Path, rows: list[Timed]) -> None:
    """Write what was timed as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
