import json
import subprocess
import sys

import pytest
from regrad_bench import command, report
from regrad_bench.apart import measure_apart, measure_named
from regrad_bench.cases import Setting

QUICK = ["--quick", "--pairs", "1", "--device", "cpu", "--only", "alone/clip-norm"]


@pytest.mark.long
def test_the_command_measures_in_other_processes_and_writes_what_was_asked_for(tmp_path):
    page, table = tmp_path / "page.md", tmp_path / "table.csv"
    page.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    words = [*QUICK, "--json", "--markdown", str(page), "--csv", str(table)]
    start = "import sys; from regrad_bench.command import main; sys.exit(main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", start, *words], capture_output=True, text=True, check=True
    )
    told = json.loads(run.stdout)
    assert [row["name"] for row in told["results"]] == ["alone/clip-norm"]
    assert told["results"][0]["ratio"] > 0
    assert told["peers"]
    assert "alone/clip-norm on cpu" in run.stderr
    assert "alone/clip-norm" in page.read_text(encoding="utf-8")
    assert table.read_text(encoding="utf-8").count("\n") == 2


def test_a_case_is_measured_by_its_name_with_the_threads_asked_for():
    import torch

    before, cpu = torch.get_num_threads(), Setting(device=torch.device("cpu"), quick=True)
    try:
        assert measure_named("alone/clip-norm", cpu, 1, 2).ratio > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert measure_apart([], [cpu], pairs=1, threads=1) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--pairs", "0"], "pairs must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--device", "tpu"], "device must be one of all, cpu, cuda, got 'tpu'"),
        (["--markdown", "nowhere.md"], "markdown must be a page that exists, got 'nowhere.md'"),
        (["--only", "nothing"], "only must match the name of a case, got 'nothing'"),
        (["--speed"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_code_2(words, complaint, capsys):
    assert command.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("regrad-bench: ")
    assert complaint in told
    assert told.count("\n") == 1


def test_every_flag_is_in_the_readme():
    from pathlib import Path

    from typer.main import get_command

    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    flags = [name for parameter in get_command(command.app).params for name in parameter.opts]
    assert [
        name
        for name in flags
        if name.startswith("--") and name != "--help" and f"`{name}" not in text
    ] == []
