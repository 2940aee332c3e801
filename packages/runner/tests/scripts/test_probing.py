"""What a script trains with, seen at its first training forward."""

import json
import sys

import pytest
from regrad_runner.scripts.probing import probe
from regrad_runner.settings.arms import control_from_values

SCRIPT = """
import pathlib
import sys
import torch
from torch import nn

model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, inputs):
        return self.head(self.embedding(inputs[:, 0].long()))


if sys.argv[1] == "tied":
    model = Tied()
optimizer = {
    "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
    "lbfgs": lambda: torch.optim.LBFGS(model.parameters()),
    "tied": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "none": lambda: None,
}[sys.argv[1]]()
try:
    nn.functional.cross_entropy(model(torch.zeros(2, 4)), torch.zeros(2).long()).backward()
except Exception:
    pass
pathlib.Path(sys.argv[2]).write_text("trained")
"""


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Probe the script with an optimizer, and return the exit code and what was seen."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(optimizer, arms, classes=()):
        (tmp_path / "train.py").write_text(SCRIPT)
        question = tmp_path / "question.json"
        question.write_text(json.dumps({"arms": arms, "classes": [*classes]}))
        words = [str(tmp_path / "train.py"), optimizer, str(tmp_path / "trained")]
        code = probe(question, tmp_path / "answer.json", words)
        return code, json.loads((tmp_path / "answer.json").read_text())

    return run


ARMS = {"baseline": [], "xgrad": ["xgrad"], "agc": ["agc"], "clip-norm": ["clip-norm"]}


@pytest.mark.parametrize(("optimizer", "control"), [("sgd", "nesterov"), ("adamw", "nadam")])
def test_controls_come_from_the_optimizer_that_the_script_makes(ask, tmp_path, optimizer, control):
    code, seen = ask(optimizer, ARMS)
    assert code == 0
    assert seen["optimizer"].lower() == optimizer
    assert seen["modules"] == ["Sequential"]
    assert seen["refused"] == {}
    names = {arm: control_from_values(values).name for arm, values in seen["controls"].items()}
    assert names == {"xgrad": control, "agc": "clip-norm", "clip-norm": "agc"}
    assert not (tmp_path / "trained").exists()  # the script ended there, whatever it catches


def test_what_does_not_fit_is_refused_with_the_reason(ask):
    code, seen = ask("lbfgs", ARMS)
    assert code == 0
    assert "xgrad" in seen["refused"]
    assert all(seen["refused"].values())
    assert "xgrad" not in seen["controls"]


def test_a_script_that_trains_nothing_of_what_was_asked_for_is_run_to_its_end(ask, tmp_path):
    assert ask("none", ARMS) == (0, {"not_attached": []})
    assert (tmp_path / "trained").read_text() == "trained"
    _, seen = ask("sgd", ARMS, classes=["Adam"])
    assert "controls" not in seen


def test_a_control_that_cannot_be_made_is_said_before_anything_runs(ask):
    arms = {"baseline": [], "powergrad": ["powergrad"], "agc": ["agc"]}
    code, seen = ask("tied", arms)
    assert code == 0
    assert seen["refused"] == {}
    assert set(seen["controls"]) == {"powergrad", "agc"}
    assert list(seen["refused_controls"]) == ["scaled-head"]
    assert "head must have weights of its own" in seen["refused_controls"]["scaled-head"]
