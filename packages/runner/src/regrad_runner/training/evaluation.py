"""The workload's measure on a set of samples, each process evaluating its part."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from regrad import Attachment
from torch import Tensor, nn

from regrad_runner.models.exits import predictions
from regrad_runner.training.building import as_inputs
from regrad_runner.workloads.samples import Samples
from regrad_runner.workloads.workload import Workload


class Evaluator:
    """Evaluates a model on samples: of several exits the last one's prediction.

    Args:
        accelerator: Of the run.
        model: As the accelerator prepared it.
        workload: Whose measure it is.
        attachment: Of the corrections. If its criterion fits probabilities other than softmax, its
            method `probabilities` returns them.
        dtype: Number format of the weights.
        workers: Processes that make the batches; 0 for this one alone.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        workload: Workload,
        *,
        attachment: Attachment,
        dtype: torch.dtype,
        workers: int,
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        self._workload = workload
        self._attachment = attachment
        self._dtype = dtype
        self._workers = workers

    @torch.no_grad()
    def value_on(self, samples: Samples) -> float:
        """Return the measure on these samples. Call it on every process."""
        self._share_buffers()
        self._model.eval()
        sums = self._sums_of_own_part(samples)
        self._model.train()
        total, count = self._accelerator.reduce(sums, "sum").tolist()
        return float(total / count)

    def _sums_of_own_part(self, samples: Samples) -> Tensor:
        """Return, of this process's part, the sum of the scores and the number they are over."""
        accelerator = self._accelerator
        model = accelerator.unwrap_model(self._model)
        device = accelerator.device
        own = range(accelerator.process_index, len(samples), accelerator.num_processes)
        sums = torch.zeros(2, device=device, dtype=torch.float64)
        seen = 0
        for inputs, targets in samples.batches(
            samples.evaluation_batch,
            indices=self._as_long_as_others(own, len(samples)),
            workers=self._workers,
        ):
            returned = model(as_inputs(inputs.to(device), self._dtype))
            outputs = self._as_fitted(self._last_prediction(returned))
            scores = self._workload.score(outputs, targets.to(device))
            still_own = max(0, len(own) - seen)
            sums += torch.stack([score[:still_own].sum().double() for score in scores])
            seen += len(inputs)
        return sums

    def _as_long_as_others(self, own: range, count: int) -> list[int]:
        """Return indices of this process, filled up to the length that the longest part has.

        The processes of a sharded model would wait for one that has fewer batches. What is filled
        in is not counted.
        """
        longest = -(-count // self._accelerator.num_processes)
        return [*own, *[0] * (longest - len(own))]

    def _last_prediction(self, outputs: Any) -> Tensor:
        """Return the logits that the model, or the last of its exits, predicts with."""
        if isinstance(outputs, Tensor):
            return outputs
        return predictions(self._attachment.criterion, outputs)[-1]

    def _as_fitted(self, outputs: Tensor) -> Tensor:
        """Return the logarithms of the fitted probabilities, if the measure reads them."""
        if not self._workload.reads_probabilities:
            return outputs
        probabilities = getattr(self._attachment.criterion, "probabilities", None)
        if probabilities is None:
            return outputs
        return probabilities(outputs.double()).log()  # type: ignore[no-any-return]

    def _share_buffers(self) -> None:
        """Give every process the buffers of the first one, which a checkpoint holds."""
        if self._accelerator.num_processes == 1:
            return
        for buffer in self._accelerator.unwrap_model(self._model).buffers():
            torch.distributed.broadcast(buffer, src=0)
