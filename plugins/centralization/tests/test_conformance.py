"""Every clause of the conformance kit, with the reference beside this file."""

from functools import partial

import torch
from regrad_centralization import Centralization
from regrad_testing import CorrectionSuite, StagedImages, load_beside

reference = load_beside(__file__, "reference")


class TestGradient(CorrectionSuite):
    correction = Centralization

    def reference(self, step):
        rows = zip(step.modules, step.weights, step.gradients, strict=True)
        return [
            reference.centralize(gradient, reference.outputs(module, weight.shape))
            if weight.dim() > 1
            else gradient
            for module, weight, gradient in rows
        ]


class TestDecayed(CorrectionSuite):
    correction = Centralization
    effective_options = {"placement": "decayed"}
    optimizers = {
        "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
        "adamw": partial(torch.optim.AdamW, lr=0.01),  # decoupled: refused, so left out
    }

    def reference(self, step):
        corrected = []
        for module, weight, gradient in zip(
            step.modules, step.weights, step.gradients, strict=True
        ):
            decayed = gradient + 0.1 * weight
            centred = reference.centralize(decayed, reference.outputs(module, weight.shape))
            corrected.append(centred - 0.1 * weight if weight.dim() > 1 else gradient)
        return corrected


class TestUpdate(CorrectionSuite):
    correction = Centralization
    effective_options = {"placement": "update"}
    optimizers = {
        "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    }

    def reference(self, step):
        rows = zip(step.modules, step.weights, step.displacements, strict=True)
        return [
            reference.centralize(displacement, reference.outputs(module, weight.shape))
            if weight.dim() > 1
            else displacement
            for module, weight, displacement in rows
        ]


class TestConvolutions(CorrectionSuite):
    correction = Centralization
    effective_options = {"conv_only": True}
    problem = StagedImages()
    processes = 1

    def reference(self, step):
        rows = zip(step.modules, step.weights, step.gradients, strict=True)
        return [
            reference.centralize(gradient, reference.outputs(module, weight.shape))
            if weight.dim() == 4
            else gradient
            for module, weight, gradient in rows
        ]
