"""The command line: every command by its name."""

from __future__ import annotations

import typer

from regrad_runner.cli import compare, explain, plugins, report, sync, train
from regrad_runner.cli.corrections_flag import ManyValues
from regrad_runner.cli.help import Plain, PlainGroup, examples

app = typer.Typer(
    name="regrad",
    help="Compare gradient corrections on your data: paired seeds, controls, a plain verdict.",
    epilog=examples("regrad compare", "regrad plugins list", "regrad COMMAND --help"),
    cls=PlainGroup,
    pretty_exceptions_enable=False,
)
app.command("compare", cls=ManyValues, epilog=examples(*compare.EXAMPLES))(compare.compare_command)
app.command("train", cls=ManyValues, epilog=examples(*train.EXAMPLES))(train.train_command)
app.command("report", cls=Plain, epilog=examples(*report.EXAMPLES))(report.report_command)
app.command("sync", cls=Plain, epilog=examples(*sync.EXAMPLES))(sync.sync_command)
app.command("explain", cls=ManyValues, epilog=examples(*explain.EXAMPLES))(explain.explain_command)
app.add_typer(plugins.plugin_commands, name="plugins")
