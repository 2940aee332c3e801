"""`regrad run` as it is typed."""

import json
import subprocess
import sys

import pytest
from regrad_runner.cli.main import main

SCRIPT = """
import sys
import torch
from torch import nn

model = nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(4):
    loss = nn.functional.cross_entropy(model(torch.ones(5, 3)), torch.zeros(5, dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(sys.argv[1:], __name__)
"""


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "train.py"
    file.write_text(SCRIPT)
    return file


def test_a_script_is_run_as_python_would_and_its_words_are_its_own(script, tmp_path):
    receipt = tmp_path / "receipt.json"
    command = [sys.executable, "-m", "regrad_runner", "run", "--corrections", "xgrad", "agc"]
    command += ["--trace", "--receipt", str(receipt), "--", str(script), "--correction", "1", "-m"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['--correction', '1', '-m'] __main__\n"
    said = done.stderr.splitlines()
    assert said[0].startswith("regrad: SGD was created; it waits for")
    assert said[1] == "regrad: SGD is attached with Linear, before a forward of Linear"
    assert said[2] == "regrad: xgrad+agc on SGD with Linear: 4 steps corrected"
    kept = json.loads(receipt.read_text())
    assert kept["script"][1:] == ["--correction", "1", "-m"]
    assert kept["attached"][0]["receipt"]["steps_applied"] == 4


@pytest.mark.long
def test_processes_of_a_launcher_each_attach_and_one_of_them_speaks(tmp_path):
    file = tmp_path / "train.py"
    file.write_text(
        "import torch\n"
        "from torch import nn\n"
        "torch.distributed.init_process_group('gloo')\n"
        "model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)\n"
        "for _ in range(3):\n"
        "    model(torch.ones(4, 3)).square().sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "regrad_runner", "run", "--corrections", "xgrad", "--", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("regrad: xgrad on SGD with Linear: 3 steps corrected") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "script must be given after '--', such as: -- train.py --lr 0.001"),
        (["--corrections", "agc", "train.py"], "script must come after '--'"),
        (["--", "no_such.py"], "script must be a file, got 'no_such.py'"),
        (["--", "python", "train.py"], "script must be given without 'python'"),
        (["--", "-m"], "module must be named after '-m'"),
        (["--corrections", "agd", "--", __file__], "no correction named 'agd'"),
        (["--shift-seeds", "--", __file__], "shift_seeds must be given with --seed"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(words, message, capsys):
    assert main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
