"""`regrad run` on unmodified scripts of other libraries: as if attached by hand, bit for bit."""

import subprocess
import sys
import textwrap

import pytest
import torch

DATA = """
import sys
import tempfile
import torch
from torch import nn

generator = torch.Generator().manual_seed(1)
inputs = torch.randn(96, 20, generator=generator)
labels = inputs[:, :5].argmax(dim=1)
by_hand = sys.argv[2].split(",") if len(sys.argv) > 2 else None
"""
LIGHTNING = """
import warnings
import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(20, 32), nn.ReLU())
        self.head = nn.Linear(32, 5)
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch, index):
        return self.criterion(self.head(self.encoder(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


callbacks = []
if by_hand:
    from regrad_lightning import RegradCallback

    callbacks = [RegradCallback(by_hand, criterion="criterion")]
model = Classifier()
trainer = pl.Trainer(
    max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False, accelerator="cpu", callbacks=callbacks,
)
trainer.fit(model, DataLoader(TensorDataset(inputs, labels), batch_size=16))
torch.save(model.state_dict(), sys.argv[1])
"""
TRANSFORMERS = """
from transformers import Trainer, TrainingArguments


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, inputs=None, labels=None):
        logits = self.layers(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


callbacks = []
if by_hand:
    from regrad_transformers import RegradCallback

    callbacks = [RegradCallback(by_hand)]
rows = [{"inputs": row, "labels": label} for row, label in zip(inputs, labels)]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=2, per_device_train_batch_size=16, report_to=[],
        save_strategy="no", logging_strategy="no", use_cpu=True, seed=3, disable_tqdm=True,
    )
    trainer = Trainer(model=Classifier(), args=arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train()
torch.save(trainer.model.state_dict(), sys.argv[1])
"""
ACCELERATE = """
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
loader = DataLoader(TensorDataset(inputs, labels), batch_size=8)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
criterion = nn.CrossEntropyLoss()
if by_hand:
    import regrad

    criterion = regrad.attach(model, optimizer, by_hand, criterion).criterion
for images, targets in loader:
    with accelerator.accumulate(model):
        loss = criterion(model(images), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
torch.save(accelerator.unwrap_model(model).state_dict(), sys.argv[1])
"""
SCRIPTS = {"lightning": LIGHTNING, "transformers": TRANSFORMERS, "accelerate": ACCELERATE}


def weights(command, file):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(file), done.stderr


LONG = [
    pytest.param(name, marks=pytest.mark.long) if name != "accelerate" else name for name in SCRIPTS
]


@pytest.mark.long
@pytest.mark.parametrize("library", LONG)
def test_an_unmodified_script_trains_as_if_attached_by_hand(library, tmp_path):
    pytest.importorskip(library)
    script = tmp_path / "train.py"
    script.write_text(DATA + textwrap.dedent(SCRIPTS[library]))
    files = {name: str(tmp_path / name) for name in ("found", "wanted")}
    python = [sys.executable, str(script)]
    run = [sys.executable, "-m", "regrad_runner", "run", "--corrections", "xgrad", "powergrad"]
    found, said = weights([*run, "--", str(script), files["found"]], files["found"])
    wanted, _ = weights([*python, files["wanted"], "xgrad,powergrad"], files["wanted"])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "regrad: xgrad+powergrad on " in said
    assert "xgrad on weights: 100 % of tensors" in said
