"""Lightning: a callback corrects the fit; true weights are validated and saved.

    python docs/examples/lightning_trainer.py

Needs regrad-lightning, regrad-xgrad and regrad-powergrad.
"""

import tempfile
import warnings

import lightning.pytorch as pl
import torch
from regrad_lightning import RegradCallback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", message=".*does not have many workers")
CORRECTIONS = ["xgrad", "powergrad:alpha=0.5"]


class Classifier(pl.LightningModule):
    """Nothing in it knows of regrad."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of one batch."""
        return self.criterion(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log the loss at the true weights, by the criterion as it is."""
        self.log("val_loss", self.criterion(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return any optimizer of torch."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def make_trainer(callback: RegradCallback, folder: str, epochs: int) -> pl.Trainer:
    """Accumulate two batches per step and clip, before the corrections see the gradient."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    place = {"accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": False}
    steps = {"max_epochs": epochs, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    return pl.Trainer(callbacks=[callback], **steps, **place, **quiet)


def main() -> None:
    """Fit for four epochs, then for two and two more from a checkpoint."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(512, 20, generator=generator)
    targets = inputs[:, :5].argmax(dim=1)
    train = DataLoader(TensorDataset(inputs[:384], targets[:384]), batch_size=16)
    held_out = DataLoader(TensorDataset(inputs[384:], targets[384:]), batch_size=128)

    with tempfile.TemporaryDirectory() as folder:
        callback = RegradCallback(CORRECTIONS, criterion="criterion")
        whole = Classifier()
        trainer = make_trainer(callback, folder, epochs=4)
        trainer.fit(whole, train, held_out)

        first = make_trainer(RegradCallback(CORRECTIONS, criterion="criterion"), folder, epochs=2)
        first.fit(Classifier(), train, held_out)
        first.save_checkpoint(f"{folder}/half.ckpt")
        resumed = Classifier()
        again = make_trainer(RegradCallback(CORRECTIONS, criterion="criterion"), folder, epochs=4)
        again.fit(resumed, train, held_out, ckpt_path=f"{folder}/half.ckpt")

    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    difference = max((one - other).abs().max().item() for one, other in pairs)
    numbers = callback.attachment.metrics()
    print(callback.attachment)
    loss = trainer.callback_metrics["val_loss"]
    moved = numbers["xgrad/weights/relative_change"]
    cosine = numbers["powergrad/criterion/cosine"]
    print(f"steps: {numbers['steps_applied']:.0f}, validation loss {loss:.3f}")
    print(f"xgrad moved the weights by {moved:.1e} of their norm")
    print(f"powergrad turned the gradient of the logits: cosine {cosine:.3f}")
    print(f"resumed against uninterrupted: largest difference {difference}")
    if difference:
        raise SystemExit("the two should be the same, bit for bit")


if __name__ == "__main__":
    main()
