import pytest
import regrad
import torch
from accelerate import Accelerator
from regrad_runner.training.evaluation import Evaluator
from regrad_runner.workloads.samples import TensorSamples
from regrad_runner.workloads.workload import Defaults, Measure, Workload

SAMPLES = TensorSamples(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [1.0], [1.0]]))
SAMPLES.evaluation_batch = 2


class MeanOutput(Workload):
    """Is worth the mean of what the model returns."""

    def score(self, outputs, targets):
        return outputs[:, 0], targets[:, 0]


class MeanLogit(MeanOutput):
    """The same, of what a user reads as logits."""

    reads_probabilities = True


class SquaredOutputs(torch.nn.MSELoss):
    """Fits the squares of outputs, and says so."""

    def probabilities(self, outputs):
        return outputs.square()


@pytest.fixture
def model():
    """Doubles in training, and leaves as it is in evaluation."""

    class Model(torch.nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) * (2 if self.training else 1)

    model = Model(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    return model


def value_of(model, kind, *, criterion=None):
    workload = kind(
        name="mean",
        measure=Measure(),
        train=SAMPLES,
        validation=SAMPLES,
        test=SAMPLES,
        defaults=Defaults(epochs=1, batch_size=1, lr=0.1, model="linear"),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(
        model, optimizer, [], criterion=criterion or torch.nn.MSELoss()
    ) as attachment:
        evaluator = Evaluator(
            Accelerator(cpu=True),
            model,
            workload,
            attachment=attachment,
            dtype=torch.float32,
            workers=0,
        )
        return evaluator.value_on(SAMPLES)


def test_every_sample_counts_once_whatever_the_batch(model):
    assert value_of(model, MeanOutput) == pytest.approx(7 / 3)


def test_the_model_is_looked_at_in_evaluation_and_goes_on_in_training(model):
    value_of(model, MeanOutput)
    assert model.training


def test_a_measure_of_logits_is_given_the_logarithms_of_what_was_fitted(model):
    plain = value_of(model, MeanLogit)
    fitted = value_of(model, MeanLogit, criterion=SquaredOutputs())
    assert plain == pytest.approx(7 / 3)
    assert fitted == pytest.approx(torch.tensor([1.0, 4.0, 16.0]).log().mean().item())


def test_a_measure_of_the_order_alone_is_given_what_the_model_returned(model):
    assert value_of(model, MeanOutput, criterion=SquaredOutputs()) == pytest.approx(7 / 3)
