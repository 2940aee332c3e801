"""The command line: every command by its name."""

from __future__ import annotations

import typer

from regrad_runner.cli.compare import COMPARE_EXAMPLES, compare_command
from regrad_runner.cli.corrections_flag import ManyValues
from regrad_runner.cli.explain import EXPLAIN_EXAMPLES, explain_command
from regrad_runner.cli.help import Plain, PlainGroup, examples
from regrad_runner.cli.plugins import plugin_commands
from regrad_runner.cli.report import REPORT_EXAMPLES, report_command
from regrad_runner.cli.run import RUN_EXAMPLES, run_command
from regrad_runner.cli.sync import SYNC_EXAMPLES, sync_command
from regrad_runner.cli.train import TRAIN_EXAMPLES, train_command

app = typer.Typer(
    name="regrad",
    help="Compare gradient corrections on your data: paired seeds, controls, a plain verdict.",
    epilog=examples("regrad compare", "regrad plugins list", "regrad COMMAND --help"),
    cls=PlainGroup,
    pretty_exceptions_enable=False,
)
app.command("compare", cls=ManyValues, epilog=examples(*COMPARE_EXAMPLES))(compare_command)
app.command("train", cls=ManyValues, epilog=examples(*TRAIN_EXAMPLES))(train_command)
app.command("run", cls=ManyValues, epilog=examples(*RUN_EXAMPLES))(run_command)
app.command("report", cls=Plain, epilog=examples(*REPORT_EXAMPLES))(report_command)
app.command("sync", cls=Plain, epilog=examples(*SYNC_EXAMPLES))(sync_command)
app.command("explain", cls=ManyValues, epilog=examples(*EXPLAIN_EXAMPLES))(explain_command)
app.add_typer(plugin_commands, name="plugins")
