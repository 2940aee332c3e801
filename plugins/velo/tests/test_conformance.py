"""Every clause of the conformance kit, with the reference beside this file.

The kit steps without a loss: here step t has the loss 1/t. (At a constant loss its means differ
by rounding alone, which the published features divide by 1e-8.)
"""

import numpy as np
import torch
from regrad_testing import OptimizerSuite, load_beside
from regrad_velo import VeLO, VeLOWeights

reference = load_beside(__file__, "reference")
theta = reference.random_theta(0)


def networks():
    """Return the reference's networks under our names."""
    names = {
        "unused": "linear",
        "others": "linear_1",
        "own": "linear_2",
        "gates": "rnn/linear",
        "mixing": "rnn_to_controls",
        "factor": "step_size",
    }
    tensors = {}
    for ours, theirs in names.items():
        tensors[f"{ours}.weight"] = theta["rnn_params"][theirs]["w"]
        tensors[f"{ours}.bias"] = theta["rnn_params"][theirs]["b"]
    tensors.update(theta["lstm_init_state"])
    bank = theta["ff_mod_stack"]["~"]
    parts = [bank[f"w0__{index}"] for index in range(14)]
    tensors["bank.0.weight"] = np.concatenate(parts, axis=1)
    for layer in range(3):
        tensors[f"bank.{layer}.bias"] = bank[f"b{layer}"]
        if layer > 0:
            tensors[f"bank.{layer}.weight"] = bank[f"w{layer}"]
    return VeLOWeights({name: torch.tensor(value) for name, value in tensors.items()})


NETWORKS = networks()


class FallingLoss(VeLO):
    """VeLO that is told a loss of 1/t at step t, whatever the closure returns."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, lr, weights=NETWORKS, num_steps=100)

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = self.param_groups[0]["training"]["losses"]["steps"]
        super().step(lambda: 1 / (1 + taken))
        return loss


class TestVeLO(OptimizerSuite):
    optimizer = FallingLoss
    options = {"lr": 1.0}
    variants = ({"lr": 0.1},)
    tolerance = 1e-10
    layouts = ("ddp",)

    def reference(self, step):
        rule = step.memory.setdefault("rule", reference.VeLO(theta, 100))
        filled = [place for place, weight in enumerate(step.weights) if weight.numel()]
        weights = [step.weights[place].numpy() for place in filled]
        gradients = [step.gradients[place].numpy() for place in filled]
        moved = list(step.weights)
        values = rule.step(weights, gradients, 1 / (1 + step.index), lr=step.options["lr"])
        for place, value in zip(filled, values, strict=True):
            moved[place] = torch.tensor(value, dtype=torch.float64).reshape(moved[place].shape)
        return moved
