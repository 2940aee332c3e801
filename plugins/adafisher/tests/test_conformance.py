"""Every clause of the conformance kit, with the reference beside this file."""

import torch
from regrad_adafisher import AdaFisher
from regrad_testing import CorrectionSuite, Problem, load_beside
from torch import nn

reference = load_beside(__file__, "reference")


class Layers(nn.Module):
    """A convolution, layer normalisation and linear layers: all that do not mix samples."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 5, bias=False)
        self.gain = nn.GroupNorm(1, 5)  # of no supported kind
        self.head = nn.Linear(5, classes)

    def forward(self, images):
        tokens = torch.tanh(self.stem(images)).flatten(2).transpose(1, 2)
        mixed = self.mix(self.norm(tokens)).transpose(1, 2)
        return self.head(torch.tanh(self.gain(mixed)).mean(dim=2))


class SmallImages(Problem):
    def model(self):
        return Layers(self.classes)

    def inputs(self, size, generator):
        return torch.randn(size, 2, 4, 4, generator=generator, dtype=torch.float64)


class Suite(CorrectionSuite):
    """What the suites share: the rule by loops, from a forward and backward of its own."""

    problem = SmallImages()
    no_effect = {"damping": 1e30}

    def reference(self, step):
        model = self.problem.make_model()
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), step.weights, strict=True):
                parameter.copy_(weight)
        fisher = step.memory.setdefault(
            "fisher", reference.Fisher(step.options.average, step.options.damping)
        )
        if step.index % step.options.refresh == 0:
            batch = self.problem.batch(step.index)
            criterion = nn.CrossEntropyLoss()
            _, layers, _ = reference.observe(
                model, lambda net: criterion(net(batch.inputs), batch.targets) * batch.weight
            )
            for name, module, h, s in layers:
                fisher.refresh(name, module, h, s)
        return [
            self.divided(step.options, fisher, *row)
            for row in zip(step.names, step.modules, step.gradients, strict=True)
        ]

    @staticmethod
    def divided(options, fisher, name, module, gradient):
        where, _, attribute = name.rpartition(".")
        if where not in fisher.inputs:
            return gradient
        divisor = fisher.divisor(where, attribute, module, gradient)
        return gradient * options.damping / divisor


class TestPublished(Suite):
    correction = AdaFisher
    effective_options = {"refresh": 2}


class TestConvex(Suite):
    correction = AdaFisher
    effective_options = {"refresh": 3, "average": "ema", "damping": 0.1, "allow_adaptive": True}


class TestMean(CorrectionSuite):
    """The control."""

    correction = AdaFisher
    problem = SmallImages()
    effective_options = {"refresh": 3, "fisher": "mean"}
    no_effect = {"damping": 1e30}
