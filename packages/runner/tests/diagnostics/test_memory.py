from dataclasses import dataclass, field

import regrad
import torch
from regrad.correction import Correction, Needs
from regrad_runner.diagnostics.memory import bytes_held
from torch import nn


@dataclass
class Memory:
    tensors: dict = field(default_factory=dict)


class Keeps(Correction):
    """Keep tensors in many ways, some of them the model's."""

    name = "keeps"
    needs = Needs(stages=("gradient",))

    def setup(self, attachment):
        self.branch = nn.Linear(3, 2)  # 8 numbers
        self.adam = torch.optim.Adam(
            self.branch.parameters()
        )  # 16 and two counters of one number after a step
        self.memories = {"a": Memory({"m": torch.zeros(10)}), "views": [torch.zeros(6)[1:]]}
        self.theirs = [
            *attachment.model.parameters(),
            attachment.model.running,
            attachment.optimizer,
        ]

    def correct_gradients(self, step):
        with torch.enable_grad():
            self.branch(torch.ones(3)).sum().backward()
        self.adam.step()
        self.adam.zero_grad()


def attached():
    model = nn.Linear(4, 4)
    model.register_buffer("running", torch.zeros(7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attachment = regrad.attach(model, optimizer, [Keeps()])
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return attachment


def test_every_tensor_of_its_own_counts_once_and_none_of_the_model_or_its_optimizer():
    attachment = attached()
    (keeps,) = attachment.corrections
    assert bytes_held(keeps, besides=attachment) == 4 * (8 + 16 + 2 + 10 + 6)
    keeps.again = keeps.memories["a"].tensors["m"].view(2, 5)
    assert bytes_held(keeps, besides=attachment) == 4 * (8 + 16 + 2 + 10 + 6)


def test_what_holds_no_tensor_holds_nothing():
    attachment = attached()
    assert bytes_held({"a": [1, "text", print, torch, nn.Linear]}, besides=attachment) == 0
