"""What a shell is told when a user presses tab, asked for as a shell asks."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import regrad
import torch
from regrad_runner.cli import completion
from regrad_runner.models.building import MODELS
from regrad_runner.models.torchvision import classifier_names
from regrad_runner.training.optimizers import optimizer_class
from regrad_runner.workloads.text import MODEL

CASES = {
    "regrad com": ["compare"],
    "regrad plugins d": ["doctor"],
    "regrad compare --see": ["--seeds", "--seed-by-run"],
    "regrad compare --workload cifar": ["cifar10", "cifar100"],
    "regrad train --model resnet5": ["resnet56", "resnet50"],
    "regrad train --optimizer adamw": ["adamw"],
    "regrad train --resume a": ["auto"],
    "regrad compare --corrections clip": ["clip-norm", "clip-update", "clip-value"],
    "regrad compare --corrections agc clip-n": ["clip-norm"],
    "regrad compare --corrections agc+clip-n": ["agc+clip-norm"],
    "regrad explain --correction al": ["all"],
    "regrad plugins show clip-v": ["clip-value"],
    "regrad plugins check ag": ["agc"],
}
ASK = """
import contextlib, io, json, os, sys
from regrad_runner.cli.main import main
said = {}
for line in json.loads(sys.argv[1]):
    os.environ |= {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_REGRAD_COMPLETE": "complete_bash"}
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([])
    said[line] = out.getvalue().split()
print(json.dumps([said, [name for name in ("torch", "pydantic.main", "mlflow") if name in sys.modules]]))
"""
needs_clipping = pytest.mark.skipif(
    "agc" not in regrad.available(), reason="regrad-clipping is not installed"
)


@needs_clipping
def test_a_shell_is_offered_names_and_flags_and_torch_is_not_imported_for_it():
    command = [sys.executable, "-c", ASK, json.dumps(list(CASES))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    said, heavy = json.loads(done.stdout)
    assert said == CASES
    assert "torch" not in heavy
    assert "mlflow" not in heavy


def ask(shell: str, line: str) -> str:
    """Ask the installed command as a shell's script does."""
    asked = {
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
        "_TYPER_COMPLETE_ARGS": line,
    }
    asked |= {"_REGRAD_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    command = [sys.executable, "-m", "regrad_runner"]
    return subprocess.run(
        command, env=os.environ | asked, capture_output=True, text=True, check=False, timeout=240
    ).stdout


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_zsh_and_fish_are_answered_in_their_own_way(shell):
    answer = ask(shell, "regrad sy")
    assert "sync" in answer
    assert "Send a folder" in answer


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_script_that_it_is_given(tmp_path):
    command = tmp_path / "regrad"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m regrad_runner "$@"\n')
    command.chmod(0o755)
    script = (
        'eval "$(_REGRAD_COMPLETE=source_bash regrad)"; complete -p regrad; '
        "COMP_WORDS=(regrad compare --workload dig); COMP_CWORD=3; _regrad_completion regrad dig --workload; "
        'echo "offered: ${COMPREPLY[*]}"'
    )
    where = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=where,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert "_regrad_completion" in done.stdout
    assert done.stdout.endswith("offered: digits digits-binary\n"), done


def test_the_names_are_those_that_the_commands_take():
    assert set(completion.models("")) == {*MODELS, MODEL, "binary-cnn", *classifier_names()}
    assert all(optimizer_class(name) for name in completion.optimizers(""))
    with pytest.raises(ValueError, match="there are: ") as problem:
        optimizer_class("none of them")
    assert set(completion.optimizers("")) == set(
        str(problem.value).partition("there are: ")[2].split(", ")
    )
    assert (
        {"adamw", "sgd"}
        < set(completion.optimizers(""))
        <= {n.lower() for n in dir(torch.optim)} | set(regrad.available("regrad.optimizers"))
    )
    assert completion.workloads("") == list(regrad.available("regrad.workloads"))
    assert completion.corrections("") == [*regrad.available(), "all"]


def test_what_is_refused_is_not_offered(monkeypatch):
    name = next(iter(regrad.available("regrad.workloads")))
    monkeypatch.setenv("REGRAD_DISABLE", name)
    assert name not in completion.workloads("")
