"""Every clause of the conformance kit, with the references beside this file."""

from regrad_clipping import AGC, ClipNorm, ClipUpdate, ClipValue
from regrad_testing import CorrectionSuite, load_beside

reference = load_beside(__file__, "reference")


class TestClipNorm(CorrectionSuite):
    correction = ClipNorm
    effective_options = {"max_norm": 0.05}
    no_effect = {"max_norm": 1e9}

    def reference(self, step):
        return reference.clip_norm(step.gradients, step.options.max_norm)


class TestClipValue(CorrectionSuite):
    correction = ClipValue
    effective_options = {"max_value": 0.01}
    no_effect = {"max_value": 1e9}

    def reference(self, step):
        return [
            reference.clip_value(gradient, step.options.max_value) for gradient in step.gradients
        ]


class TestClipUpdate(CorrectionSuite):
    correction = ClipUpdate
    effective_options = {"max_rms": 0.2}

    def reference(self, step):
        rows = zip(step.displacements, step.lrs, strict=True)
        return [
            reference.clip_update(displacement, rate, step.options.max_rms)
            for displacement, rate in rows
        ]


class TestAGC(CorrectionSuite):
    correction = AGC
    effective_options = {"max_ratio": 0.02}
    no_effect = {"max_ratio": 1e9}

    def reference(self, step):
        clipped = []
        for name, module, weight, gradient in zip(
            step.names, step.modules, step.weights, step.gradients, strict=True
        ):
            units = reference.units(module, name.rpartition(".")[2], weight.shape)
            bounds = step.options.max_ratio, step.options.weight_floor
            clip = reference.clip_adaptive(gradient.clone(), weight, units, *bounds).view(
                weight.shape
            )
            clipped.append(
                gradient if name == "3.weight" else clip
            )  # the head's weight is left alone
        return clipped
