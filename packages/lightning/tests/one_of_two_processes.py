"""One of two gloo processes, started by torchrun: fit under Lightning's strategies, print how far from one process.

Usage: torchrun --nproc-per-node 2 one_of_two_processes.py FOLDER
"""

import logging
import os
import sys
import warnings
from pathlib import Path

import regrad
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from regrad_lightning import RegradCallback
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.simplefilter("ignore")
FOLDER = Path(sys.argv[1])
RANK = int(os.environ["RANK"])
GLOBAL_BATCH, ACCUMULATE = 8, 2
SPECS = ["powergrad", "xgrad", "centralization", "adanorm", "agc:max_ratio=0.05"]
TWICE = "allow_double_lookahead=true"
RESUMED = [f"xgrad:{TWICE}", f"gcw:warmup_steps=2,fit_every=2,layers=all,{TWICE}"]


def samples():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(48, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(4, (48,), generator=generator)


class Classifier(LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)
        ).double()
        self.criterion = nn.CrossEntropyLoss()
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = self.criterion(self.net(inputs), targets)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / ACCUMULATE)
        if (batch_idx + 1) % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


class Sharded(Classifier):
    def configure_model(self):
        if not isinstance(self.net[0].weight, DTensor):
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def fit(module, callback, strategy, epochs=2, **options):
    place = {"accelerator": "cpu", "devices": 2, "default_root_dir": FOLDER, "strategy": strategy}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    files = {
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
    }  # Lightning's own sampler would shuffle
    trainer = Trainer(max_epochs=epochs, callbacks=[callback], **place, **quiet, **files)
    data = TensorDataset(*samples())
    sampler = DistributedSampler(
        data, num_replicas=2, rank=RANK, shuffle=False
    )  # the same global batches of 8
    trainer.fit(module, DataLoader(data, batch_size=GLOBAL_BATCH // 2, sampler=sampler), **options)
    return trainer


def weights(module):
    return [
        p.full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for p in module.net.parameters()
    ]


def one_process(specs, criterion=None, accumulate=1, epochs=2):
    """The plain loop over the same global batches, in this process alone."""
    module = Classifier()
    optimizer = module.configure_optimizers()
    inputs, targets = samples()
    with regrad.attach(module.net, optimizer, specs, module.criterion) as attachment:
        for _ in range(epochs):
            for index, batch in enumerate(
                zip(inputs.split(GLOBAL_BATCH), targets.split(GLOBAL_BATCH), strict=True)
            ):
                loss = (attachment.criterion if criterion else module.criterion)(
                    module.net(batch[0]), batch[1]
                )
                (loss / accumulate).backward()
                if (index + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
    return weights(module)


def say(name, value):
    if RANK == 0:
        sys.stdout.write(f"{name} {value}\n")
        sys.stdout.flush()


def difference(one, other):
    return max(
        (a.detach() - b.detach()).abs().max().item() for a, b in zip(one, other, strict=True)
    )


def refusal(module, callback, strategy, **options):
    try:
        fit(module, callback, strategy, **options)
    except regrad.RegradError as error:
        return str(error).replace("\n", " ")
    return "nothing was refused"


def data_parallel():
    module, callback = Classifier(), RegradCallback(SPECS, criterion="criterion")
    fit(module, callback, "ddp")
    say("ddp", difference(weights(module), one_process(SPECS, criterion=True)))
    rates = {
        key: rate
        for key, rate in callback.attachment.metrics().items()
        if key.endswith("trigger_rate")
    }
    say("acting", sorted(key.partition("/")[0] for key, rate in rates.items() if rate > 0))
    module = Classifier(manual=True)
    fit(module, RegradCallback(SPECS[1:]), DDPStrategy())
    say("manual", difference(weights(module), one_process(SPECS[1:], accumulate=ACCUMULATE)))


def resumed():
    whole = Classifier()
    fit(whole, RegradCallback(RESUMED), "ddp")
    half = fit(Classifier(), RegradCallback(RESUMED), "ddp", epochs=1)
    half.save_checkpoint(FOLDER / "half.ckpt")
    again = Classifier()
    fit(again, RegradCallback(RESUMED), "ddp", ckpt_path=FOLDER / "half.ckpt")
    say("resume", difference(weights(again), weights(whole)))
    say("resumed-to-one", difference(weights(again), one_process(RESUMED)))


def sharded():
    module, callback = Sharded(), RegradCallback(SPECS, criterion="criterion")
    fit(module, callback, sharding())
    say("fsdp2", difference(weights(module), one_process(SPECS, criterion=True)))
    half, again = Sharded(), Sharded()
    fit(half, RegradCallback(RESUMED), sharding(), epochs=1).save_checkpoint(FOLDER / "shards")
    callback = RegradCallback(RESUMED)
    fit(again, callback, sharding(), ckpt_path=FOLDER / "shards")
    say("fsdp2-resume", difference(weights(again), one_process(RESUMED)))
    say("fsdp2-steps", callback.attachment.metrics()["steps_applied"])
    say("fsdp2-refused", refusal(Sharded(), RegradCallback(["gcode"]), sharding()))
    say(
        "fsdp2-whole",
        refusal(Sharded(), RegradCallback(RESUMED), sharding(), ckpt_path=FOLDER / "half.ckpt"),
    )


def sharding():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


data_parallel()
resumed()
sharded()
distributed.barrier()
distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads may outlive the group and abort the interpreter's own exit
