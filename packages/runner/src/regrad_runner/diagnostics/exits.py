"""What a model with several exits is worth: each exit, and a budget of multiply-adds over a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrad_runner.models.exits import multiply_adds, predictions
from regrad_runner.models.residual import MultiExitNetwork
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.run import RunLog
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import make_model
from regrad_runner.workloads.samples import Samples

RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""How many samples leave at an exit for each that leaves at the one before, from early to late."""
DECAY_OF_SUMS = 0.5  # as the authors of boosted exits take it, and the default of the correction
EXITS_FILE = "exits.csv"
EXIT_LINE = "exit"
AS_PREDICTED = "as predicted"
BY_SUMS = "running sums"
# What is written behind the name of a metric.
WORDS_OF_METRIC = {AS_PREDICTED: "", BY_SUMS: " of sums"}


@dataclass(frozen=True, kw_only=True)
class ExitOutcome:
    """What answers taken at one exit, or for one budget, are worth, as `exits.csv` keeps it.

    Attributes:
        arm: Name of the arm.
        seed: Its seed.
        step: Optimizer steps done.
        answer: Where the answers are taken: "exit 2" for all images at the second exit, or "budget
            0.5" for exits that each have .5 times as many images as the one before.
        judged: "as predicted", or by "running sums" with a decay of .5 however it was trained.
        accuracy: Share of the test images that are labelled right.
        multiply_adds: Of one image in the mean.
    """

    arm: str
    seed: int
    step: int
    answer: str
    judged: str
    accuracy: float
    multiply_adds: float

    @property
    def is_budget(self) -> bool:
        """Whether images leave at different exits."""
        return self.answer.startswith("budget")


@dataclass(frozen=True)
class Answers:
    """What every exit says of a set of samples.

    Attributes:
        confidences: Largest softmax probability, shape [N exits, S samples].
        is_right: Whether the answer is right, shape [N, S].
    """

    confidences: Tensor
    is_right: Tensor

    @classmethod
    def of(cls, logits: Sequence[Tensor], targets: Tensor) -> Answers:
        """Return what logits, [S, C] of each exit, say of samples with targets [S]."""
        stacked = torch.stack(list(logits)).double()
        confidences = torch.softmax(stacked, 2).amax(2)
        return cls(confidences, stacked.argmax(2) == targets)

    @property
    def accuracies(self) -> list[float]:
        """The share of right answers of every exit."""
        return self.is_right.double().mean(1).tolist()


def shares(ratio: float, exits: int) -> list[float]:
    """Return which share of the samples leaves at each exit.

    Exit n has `ratio` times as many as exit n − 1.

    Example:
        >>> shares(2.0, 2)
        [0.3333333333333333, 0.6666666666666666]
    """
    powers = [ratio**number for number in range(exits)]
    return [power / sum(powers) for power in powers]


def thresholds(confidences: Tensor, wanted: Sequence[float]) -> list[float]:
    """Return the confidence at which a sample leaves, so that a share of them leaves at each exit.

    Args:
        confidences: On the validation samples, shape [N, S].
        wanted: The share that leaves at each exit, N numbers.

    Returns:
        N numbers: at exit n a sample leaves if its confidence is at least the n-th. The last is
        minus infinity, an earlier one infinity where none is to leave.

    Example:
        >>> confidences = torch.tensor([[0.9, 0.6, 0.8], [0.9, 0.9, 0.9]], dtype=torch.float64)
        >>> thresholds(confidences, [1 / 3, 2 / 3])
        [0.9, -inf]
    """
    count = confidences.shape[1]
    is_left = torch.ones(count, dtype=torch.bool)
    found: list[float] = []
    for at_exit, share in zip(confidences[:-1], wanted[:-1], strict=True):
        leaving = min(round(share * count), int(is_left.sum()))
        if leaving == 0:
            found.append(torch.inf)
            continue
        in_order = at_exit[is_left].sort(descending=True).values
        threshold = in_order[leaving - 1].item()
        found.append(threshold)
        is_left &= at_exit < threshold
    return [*found, -torch.inf]


def exit_taken(confidences: Tensor, at_least: Sequence[float]) -> Tensor:
    """Return at which exit, from 0, each sample leaves.

    Args:
        confidences: Shape [N, S].
        at_least: As `thresholds` returns them.

    Returns:
        Shape [S].

    Example:
        >>> exit_taken(torch.tensor([[0.9, 0.6], [0.5, 0.5]]), [0.8, -torch.inf])
        tensor([0, 1])
    """
    bounds = torch.tensor(at_least, dtype=confidences.dtype).unsqueeze(1)
    return (confidences >= bounds).int().argmax(0)


def budgeted(
    validation: Answers, test: Answers, costs: Sequence[float], ratio: float
) -> tuple[float, float]:
    """Return the accuracy on the test samples and the mean cost, with thresholds of the validation.

    Args:
        validation: Choose the thresholds.
        test: Are judged.
        costs: Of the answer of each exit.
        ratio: Of the samples that leave at an exit to those that leave at the one before.

    References:
        Huang et al., 2018, "Multi-Scale Dense Networks for Resource Efficient Image
        Classification", section 3 (budgeted batch classification).
    """
    wanted = shares(ratio, len(costs))
    taken = exit_taken(test.confidences, thresholds(validation.confidences, wanted))
    is_right = test.is_right.gather(0, taken.unsqueeze(0))
    cost = torch.tensor(costs, dtype=torch.float64)[taken].mean()
    return is_right.double().mean().item(), cost.item()


def exit_outcomes(run: TrainingRun) -> list[ExitOutcome]:
    """Return what the exits of a run's model are worth on the test samples; none for one exit.

    Both as the run predicts and, so that plain training can be judged by the same rule, by the
    running sums of the outputs with a decay of .5. Call it on every process, at the end: it reads
    the test samples.

    Args:
        run: At its end. Of other models than `MultiExitNetwork` nothing is known of the costs.
    """
    if not isinstance(run.accelerator.unwrap_model(run.model), MultiExitNetwork):
        return []
    costs = _costs(run)
    criterion = run.attachment.criterion
    ways = {AS_PREDICTED: lambda outputs: predictions(criterion, outputs), BY_SUMS: running_sums}
    outputs = {
        split: _outputs(run, samples)
        for split, samples in (
            ("validation", run.workload.validation),
            ("test", run.workload.test),
        )
    }
    found: list[ExitOutcome] = []
    for judged, predicted in ways.items():
        validation, test = (
            Answers.of(predicted(logits), targets) for logits, targets in outputs.values()
        )
        worth = {
            f"exit {number}": (accuracy, float(cost))
            for number, (accuracy, cost) in enumerate(
                zip(test.accuracies, costs, strict=True), start=1
            )
        }
        for ratio in RATIOS:
            worth[f"budget {ratio:g}"] = budgeted(validation, test, costs, ratio)
        found += [
            ExitOutcome(
                arm=run.arm.name,
                seed=run.seed,
                step=run.position.step,
                answer=answer,
                judged=judged,
                accuracy=accuracy,
                multiply_adds=cost,
            )
            for answer, (accuracy, cost) in worth.items()
        ]
    return found


def exit_measures(outcomes: Sequence[ExitOutcome]) -> dict[str, float]:
    """Return accuracies and costs by the names that they have as metrics."""
    found: dict[str, float] = {}
    for outcome in outcomes:
        words = WORDS_OF_METRIC[outcome.judged]
        # Where an answer is taken at one exit its cost does not depend on how it is judged.
        words_of_cost = words if outcome.is_budget else ""
        found[f"{outcome.answer} test accuracy{words}"] = outcome.accuracy
        found[f"{outcome.answer} multiply-adds{words_of_cost}"] = outcome.multiply_adds
    return found


def keep_exits(record: RunLog, outcomes: Sequence[ExitOutcome]) -> None:
    """Add what exits are worth to the points of a run."""
    for outcome in outcomes:
        numbers = {"accuracy": outcome.accuracy, "multiply_adds": outcome.multiply_adds}
        labels = {"answer": outcome.answer, "judged": outcome.judged}
        record.log(EXIT_LINE, outcome.step, numbers, labels)


def kept_exits(folder: ResultsFolder) -> list[ExitOutcome]:
    """Return what the exits of the runs that ended are worth."""
    return folder.kept(EXIT_LINE, ExitOutcome)


def running_sums(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return each exit's output on top of half of the sum before it.

    Example:
        >>> running_sums([torch.tensor(2.0), torch.tensor(1.0)])
        [tensor(2.), tensor(2.)]
    """
    sums = [outputs[0]]
    for output in outputs[1:]:
        sums.append(output + DECAY_OF_SUMS * sums[-1])
    return sums


def _costs(run: TrainingRun) -> list[int]:
    """Return the multiply-adds of each exit of the run's model, counted on a new one."""
    config = run.config
    model: Any = make_model(
        run.workload, str(config.model), width=config.width, norm=config.norm, seed=0
    )
    images, _ = run.workload.test.__getitems__([0])
    return multiply_adds(model, images)


@torch.no_grad()
def _outputs(run: TrainingRun, samples: Samples) -> tuple[list[Tensor], Tensor]:
    """Return the logits [S, C] of every exit, and the targets [S], on the CPU.

    Every process does all of it, since each needs every sample for the thresholds.
    """
    model = run.accelerator.unwrap_model(run.model)
    model.eval()
    seen: list[tuple[Tensor, ...]] = []
    targets: list[Tensor] = []
    for inputs, wanted in samples.batches(
        samples.evaluation_batch, indices=list(range(len(samples))), workers=run.config.workers
    ):
        outputs = model(run.as_inputs(inputs.to(run.accelerator.device)))
        seen.append(tuple(output.float().cpu() for output in outputs))
        targets.append(wanted)
    model.train()
    return [torch.cat(parts) for parts in zip(*seen, strict=True)], torch.cat(targets)
