"""The command `regrad-bench`: one run, one table of ratios."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from regrad_runner.cli.help import Plain, examples
from regrad_runner.errors import BadInput, checking_input

EVERY_DEVICE = "all"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def flag(text: str, *names: str, metavar: str | None = None) -> Any:
    """Return an option with its help text."""
    return typer.Option(*names, help=text, metavar=metavar)


@app.command(
    cls=Plain, epilog=examples("regrad-bench --quick", "regrad-bench --only 'alone/*' --csv FILE")
)
def bench(
    *,
    only: Annotated[
        str, flag("Cases whose name matches, such as 'alone/*'.", metavar="PATTERN")
    ] = "*",
    pairs: Annotated[int, flag("Pairs to time; some cases take fewer.", metavar="N")] = 20,
    threads: Annotated[int, flag("CPU threads.", metavar="N")] = 1,
    device: Annotated[
        str, flag("all, cpu, or an accelerator's type, such as cuda.", metavar="NAME")
    ] = EVERY_DEVICE,
    quick: Annotated[bool, flag("Use small sizes to see that all runs.", "--quick")] = False,
    json: Annotated[bool, flag("Print JSON instead of a table.", "--json")] = False,
    csv: Annotated[Path | None, flag("Also write the results as CSV.", metavar="FILE")] = None,
    markdown: Annotated[
        Path | None, flag("Also write them to a page, between its marks.", metavar="FILE")
    ] = None,
) -> int:
    """Time every correction against the plain step and against peers with the same method."""
    with checking_input():
        _check(pairs=pairs, threads=threads, markdown=markdown)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the profiler is first imported
    import torch  # noqa: PLC0415 - the help needs none of it
    from rich.console import Console  # noqa: PLC0415

    from regrad_bench import about, report  # noqa: PLC0415
    from regrad_bench.all_cases import chosen_cases, estimated_minutes  # noqa: PLC0415
    from regrad_bench.apart import measure_apart  # noqa: PLC0415
    from regrad_bench.cases import Setting, devices_of  # noqa: PLC0415
    from regrad_bench.peers import findings  # noqa: PLC0415

    with checking_input():
        devices = devices_of(device)
        cases = chosen_cases(only)
    torch.set_num_threads(threads)
    conditions = about.about(_typed(), pairs=pairs, quick=quick)
    settings = [Setting(device=each, quick=quick) for each in devices]
    names = [case.name for case in cases]
    tell = Console(stderr=True).print
    minutes = estimated_minutes(cases, quick=quick)
    tell(f"{len(cases)} cases, about {minutes:.0f} minutes on each device; --only takes fewer")
    results = measure_apart(names, settings, pairs=pairs, threads=threads, tell=tell)
    found = findings()
    if csv:
        csv.write_text(report.to_csv(results), encoding="utf-8")
    if markdown:
        report.write_between_marks(markdown, report.to_markdown(results, found, conditions))
    if json:
        Console(soft_wrap=True).out(report.to_json(results, found, conditions), highlight=False)
    else:
        report.show(results, found, conditions)
    return 0


def _check(*, pairs: int, threads: int, markdown: Path | None) -> None:
    """Raise `ValueError` for impossible requests, before anything is timed."""
    for name, value in (("pairs", pairs), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    if markdown is not None and not markdown.is_file():
        raise ValueError(f"markdown must be a page that exists, got {str(markdown)!r}")


def _typed() -> str:
    return shlex.join(["regrad-bench", *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words after the command's name; None for those of the process.

    Returns:
        The exit code: 0, or 2 for bad input with nothing timed. A missed goal is a
        result, not a failure.
    """
    # typer has its own copy of click, by no public name
    usage_error: Any = typer.BadParameter.__base__
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(app(words, prog_name="regrad-bench", standalone_mode=False) or 0)
    except BadInput as problem:
        return _complain(str(problem))
    except usage_error as problem:
        return _complain(problem.format_message())


def _complain(problem: str) -> int:
    sys.stderr.write(f"regrad-bench: {problem}\n")
    return 2
