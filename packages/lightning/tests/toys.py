"""Small LightningModules, data and trainers, and the plain loop that a fit must equal bit for bit."""

import regrad
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def samples(count=24):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 6, generator=generator), torch.randint(
        4, (count,), generator=generator
    )


def loader(batch_size=4, count=24):
    return DataLoader(TensorDataset(*samples(count)), batch_size=batch_size)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)
        )


class Classifier(LightningModule):
    """The usual: `training_step` calls a child and the loss module, never the LightningModule itself."""

    def __init__(self, kind="sgd"):
        super().__init__()
        self.net = network()
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0]))
        self.kind = kind
        self.validated = []
        self.validation_losses = []

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = self.criterion(self.net(inputs), targets)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append(weights(self))
        inputs, targets = batch
        self.validation_losses.append(self.criterion(self.net(inputs), targets))

    def configure_optimizers(self):
        optimizer = optimizer_for(self.net, self.kind)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def optimizer_for(net, kind="sgd"):
    if kind == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=0.02)
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def trainer(folder, *callbacks, **options):
    """A quiet trainer on one CPU."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    place = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(folder),
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{"max_epochs": 2, **place, **quiet, **options})


def weights(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def difference(one, other):
    """The largest absolute difference of two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def plain_loop(
    corrections, *, accumulate=1, clip=None, dtype=None, batches=12, kind="sgd", corrected=False
):
    """Train the same network by a written-out loop; return its weights and the attachment."""
    module = Classifier(kind)
    optimizer = optimizer_for(module.net, kind)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    attachment = regrad.attach(module.net, optimizer, corrections, module.criterion)
    criterion = attachment.criterion if corrected else module.criterion
    for index, (inputs, targets) in enumerate([*loader(), *loader()][:batches]):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = criterion(module.net(inputs), targets) / accumulate
        loss.backward()
        if (index + 1) % accumulate == 0:
            if clip is not None:
                clip(module.net.parameters())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    attachment.detach()
    return weights(module), attachment
