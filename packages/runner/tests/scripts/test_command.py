"""A script of the user's own, unmodified, with corrections attached by themselves."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import regrad
import torch
from regrad import RegradWarning
from regrad_runner.scripts.command import NOTHING_ATTACHED, ScriptRun, run
from regrad_runner.scripts.processes import SIZES
from torch import nn
from torch.nn import functional as F

DATA = """
import sys
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
inputs, targets = torch.randn(60, 4), torch.randint(0, 3, (60,))
batches = list(zip(inputs.split(10), targets.split(10)))
"""
LOOP = (
    DATA
    + """
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for x, y in batches:
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        F.cross_entropy(model(x), y)
    model.train()
torch.save(model.state_dict(), sys.argv[1])
"""
)
ADAMW = (
    DATA
    + """
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
for x, y in batches:
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    optimizer.step(closure)
    scheduler.step()
torch.save(model.state_dict(), sys.argv[1])
"""
)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Write a script, run it with corrections, and return its exit code."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])

    def start(text, *words, **options):
        file = tmp_path / "train.py"
        file.write_text(textwrap.dedent(text))
        return run(ScriptRun(words=(str(file), *words), **options))

    return start


def by_hand(corrections, **criterion):
    """Train as `LOOP` does, attached by hand, and return the weights."""
    names = {}
    exec(DATA, names)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attachment = regrad.attach(model, optimizer, corrections, F.cross_entropy)
    for x, y in names["batches"]:
        loss = attachment.criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    attachment.detach()
    return model.state_dict()


@pytest.mark.parametrize(
    "corrections", [("xgrad",), ("agc",), ("powergrad",), ("xgrad", "agc", "powergrad"), ()]
)
def test_a_script_trains_bit_for_bit_as_if_attached_by_hand(script, tmp_path, capsys, corrections):
    assert script(LOOP, str(tmp_path / "weights"), corrections=corrections) == 0
    found, wanted = torch.load(tmp_path / "weights"), by_hand(corrections)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    names = "+".join(corrections) or "no corrections"
    first = capsys.readouterr().err.splitlines()[0]
    assert "on SGD with Sequential: 6 steps corrected" in first
    assert set(first.removeprefix("regrad: ").split(" on ")[0].split("+")) == set(names.split("+"))


INSIDE = (
    DATA
    + """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    def forward(self, x, y):
        return nn.CrossEntropyLoss()(self.layers(x), y)

model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for x, y in batches:
    optimizer.zero_grad()
    model(x, y).backward()
    optimizer.step()
torch.save(model.layers.state_dict(), sys.argv[1])
"""
)


def test_the_loss_inside_a_model_is_corrected(script, tmp_path):
    assert script(INSIDE, str(tmp_path / "weights"), corrections=("powergrad", "xgrad")) == 0
    found, wanted = torch.load(tmp_path / "weights"), by_hand(["powergrad", "xgrad"])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_loss_inside_a_model_is_that_of_attach_with_the_criterion_inside(script, tmp_path):
    assert script(INSIDE, str(tmp_path / "found"), corrections=("powergrad", "xgrad")) == 0
    attaches = "import regrad\nmine = regrad.attach(model, optimizer, NAMES, 'inside')\n"
    attaches = attaches.replace("NAMES", "['powergrad', 'xgrad']")
    by_itself = INSIDE.replace("for x, y in batches:", attaches + "for x, y in batches:")
    by_itself += "mine.detach()\n"  # else the functions of torch stay replaced for other tests
    assert script(by_itself, str(tmp_path / "wanted")) == NOTHING_ATTACHED
    found, wanted = torch.load(tmp_path / "found"), torch.load(tmp_path / "wanted")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_script_without_a_cross_entropy_is_told_what_it_can_do(script, tmp_path):
    text = INSIDE.replace("nn.CrossEntropyLoss()(self.layers(x), y)", "self.layers(x).mean()")
    with pytest.warns(
        RegradWarning, match="'powergrad' changed nothing. With another loss"
    ) as said:
        assert script(text, str(tmp_path / "weights"), corrections=("powergrad",)) == 0
    assert len(said) == 1
    assert "attachment.criterion" not in str(said[0].message)


def test_a_loss_that_is_no_cross_entropy_of_torch_is_told_to_be_uncorrected(script, capsys):
    own_loss = "(-model(x).log_softmax(1).gather(1, y[:, None])).mean()"
    text = LOOP.replace("loss = F.cross_entropy(model(x), y)", f"loss = {own_loss}")
    with pytest.warns(RegradWarning, match="'powergrad' changed nothing"):
        assert script(text, "/dev/null", corrections=("powergrad", "xgrad")) == 0
    said = capsys.readouterr().err
    assert "  powergrad on criterion: nothing, since torch's cross entropy was not called" in said
    assert "  xgrad on weights: 100 % of tensors" in said


def test_a_step_whose_closure_makes_the_first_forward_pass_is_corrected(script, tmp_path):
    text = (
        DATA
        + """
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for x, y in batches:
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    optimizer.step(closure)
torch.save(model.state_dict(), sys.argv[1])
"""
    )
    corrections = ("powergrad", "centralization", "xgrad")
    assert script(text, str(tmp_path / "weights"), corrections=corrections) == 0
    found, wanted = torch.load(tmp_path / "weights"), by_hand(corrections)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_every_optimizer_of_a_script_is_attached_with_its_own_model(script, capsys):
    text = (
        DATA
        + """
one, other = nn.Linear(4, 4), nn.Linear(4, 3)
first = torch.optim.Adam(one.parameters())
second = torch.optim.SGD(other.parameters(), lr=0.1)
for x, y in batches:
    one(x).square().mean().backward()
    first.step()
    F.cross_entropy(other(x), y).backward()
    second.step()
"""
    )
    assert script(text, corrections=("xgrad",)) == 0
    said = capsys.readouterr().err
    assert "xgrad on Adam with Linear: 6 steps corrected" in said
    assert "xgrad on SGD with Linear: 6 steps corrected" in said
    assert script(text, corrections=("xgrad",), optimizer_classes=("sgd",)) == 0
    said = capsys.readouterr().err
    assert "on SGD with Linear" in said
    assert "Adam" not in said


def test_parts_that_are_called_by_themselves_are_attached_together(script, tmp_path, capsys):
    text = (
        DATA
        + """
encoder, decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 3)
optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1, momentum=0.9)
for x, y in batches:
    optimizer.zero_grad()
    F.cross_entropy(decoder(encoder(x)), y).backward()
    optimizer.step()
"""
    )
    assert script(text, corrections=("xgrad",), receipt=tmp_path / "receipt.json") == 0
    assert "xgrad on SGD with Sequential and Linear: 6 steps corrected" in capsys.readouterr().err
    (attached,) = json.loads((tmp_path / "receipt.json").read_text())["attached"]
    assert attached["modules"] == ["Sequential", "Linear"]
    assert len(attached["receipt"]["corrections"][0]["matched"]) == 4


def test_what_the_script_attaches_itself_is_left_alone(script, capsys):
    text = LOOP.replace(
        "for x, y in batches:",
        "import regrad\nattached = regrad.attach(model, optimizer, ['agc'])\nfor x, y in batches:",
    ).replace("torch.save(model.state_dict(), sys.argv[1])", "print(attached.receipt()['order'])")
    assert script(text, corrections=("xgrad",)) == NOTHING_ATTACHED
    assert capsys.readouterr().out == "['agc']\n"


def test_a_refusal_is_a_warning_and_an_exit_code(script, capsys):
    text = LOOP.replace("momentum=0.9", "momentum=0.9, nesterov=True")
    with pytest.warns(RegradWarning, match="SGD of Sequential trains uncorrected: .*look ahead"):
        assert script(text, "/dev/null", corrections=("xgrad",)) == NOTHING_ATTACHED
    assert "not attached: SGD: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("print('no torch')", "the script made no torch optimizer in this process"),
        (
            DATA + "optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)",
            "SGD: no module that holds its parameters was called in training mode",
        ),
    ],
)
def test_nothing_attached_is_exit_code_3_with_the_reason(script, capsys, text, reason):
    assert script(text, corrections=("agc",)) == NOTHING_ATTACHED
    said = capsys.readouterr().err
    assert reason in said
    assert said.endswith("regrad: nothing was corrected\n")


@pytest.mark.parametrize(("end", "code"), [("sys.exit(7)", 7), ("sys.exit()", 0), ("", 0)])
def test_a_script_keeps_its_exit_code(script, end, code):
    assert script(f"{LOOP}\n{end}", "/dev/null", corrections=("agc",)) == code


def test_a_traceback_shows_the_frames_of_the_script_alone(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    assert script("def f():\n    1 / 0\nf()", corrections=("agc",)) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert "ZeroDivisionError: division by zero" in said
    assert "runpy" not in said
    assert "regrad_runner" not in said


def test_a_wrong_name_is_refused_before_the_script_runs(script, tmp_path):
    with pytest.raises(ValueError, match="no correction named 'agd'"):
        script(f"open({str(tmp_path / 'ran')!r}, 'w')", corrections=("agd",))
    assert not (tmp_path / "ran").exists()


def test_seeds_are_set_and_moved(script, capsys):
    text = """
    import random, numpy, torch
    print(torch.initial_seed(), random.random(), numpy.random.rand())
    torch.manual_seed(1)
    print(torch.initial_seed(), torch.Generator().manual_seed(5).initial_seed())
    """
    with torch.random.fork_rng(devices=[]):
        script(text, seed=3)
        once = capsys.readouterr().out
        script(text, seed=3)
        assert capsys.readouterr().out == once
    assert once.splitlines()[0].startswith("3 ")
    assert once.splitlines()[1] == "1 5"


@pytest.mark.long
def test_processes_that_the_script_starts_itself_are_refused_instead_of_waited_for(tmp_path):
    file = tmp_path / "train.py"
    file.write_text(
        DATA
        + """
import os, subprocess
from torch import distributed

rank = int(os.environ.get("LOCAL_RANK", "0"))
if rank == 0:
    other = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": "1"})
meet = "file://" + sys.argv[1]
distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
model = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for x, y in batches:
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
if rank == 0:
    other.wait()
distributed.destroy_process_group()
"""
    )
    known = {key: value for key, value in os.environ.items() if key not in {"LOCAL_RANK", *SIZES}}
    command = [sys.executable, "-m", "regrad_runner", "run", "--corrections", "xgrad", "--"]
    done = subprocess.run(
        [*command, str(file), str(tmp_path / "meet")],
        env={**known, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == NOTHING_ATTACHED, done.stderr
    assert "not attached: SGD: the script started 2 processes by itself" in done.stderr
    assert "torchrun --nproc-per-node 2 -m regrad_runner run" in done.stderr


def test_moved_seeds_are_those_of_the_script_plus_a_thousand_for_each_seed(tmp_path):
    file = tmp_path / "train.py"
    file.write_text(
        "import random, numpy, torch\n"
        "torch.manual_seed(1); numpy.random.seed(2); random.seed(4)\n"
        "print(torch.initial_seed(), torch.Generator().manual_seed(5).initial_seed())\n"
        "print(numpy.random.rand() == numpy.random.RandomState(3002).rand())\n"
        "print(random.random() == random.Random(3004).random())\n"
        "print(isinstance(torch.default_generator, torch.Generator))\n"
    )
    body = (
        "from regrad_runner.scripts.command import ScriptRun, run; "
        f"run(ScriptRun(words=({str(file)!r},), seed=3, shifts_seeds=True))"
    )
    said = subprocess.check_output([sys.executable, "-c", body], text=True)
    assert said.splitlines() == ["3001 3005", "True", "True", "True"]


def test_a_control_changes_the_optimizer_that_lives(script, tmp_path):
    assert script(LOOP, str(tmp_path / "found"), control="nesterov") == 0
    by_itself = LOOP.replace("momentum=0.9", "momentum=0.9, nesterov=True")
    assert script(by_itself, str(tmp_path / "wanted")) == 0
    found, wanted = torch.load(tmp_path / "found"), torch.load(tmp_path / "wanted")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.skipif("xgrad" not in regrad.available(), reason="needs the plugin regrad-xgrad")
@pytest.mark.parametrize("step", ["optimizer.step(closure)", "closure()\n    optimizer.step()"])
def test_nadam_as_a_control_is_nadam_from_the_first_step_on(script, tmp_path, step):
    text = ADAMW.replace("optimizer.step(closure)", step)
    by_itself = text.replace("AdamW(", "NAdam(decoupled_weight_decay=True, params=")
    assert script(text, str(tmp_path / "found"), control="nadam") == 0
    assert script(by_itself, str(tmp_path / "wanted")) == 0
    assert script(text, str(tmp_path / "plain")) == 0
    found, wanted = torch.load(tmp_path / "found"), torch.load(tmp_path / "wanted")
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(torch.load(tmp_path / "plain")["0.weight"], wanted["0.weight"])


@pytest.mark.skipif("xgrad" not in regrad.available(), reason="needs the plugin regrad-xgrad")
def test_a_control_whose_attachment_is_refused_leaves_the_script_as_it_was(script, tmp_path):
    with pytest.warns(RegradWarning, match="SGD of Sequential trains uncorrected: .*look ahead"):
        code = script(LOOP, str(tmp_path / "found"), corrections=("xgrad",), control="nesterov")
    assert code == NOTHING_ATTACHED
    assert script(LOOP, str(tmp_path / "wanted")) == 0
    found, wanted = torch.load(tmp_path / "found"), torch.load(tmp_path / "wanted")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
