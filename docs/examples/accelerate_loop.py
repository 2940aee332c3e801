"""Accelerate: attach after `prepare`; the loop stays.

    python docs/examples/accelerate_loop.py

Needs accelerate, regrad-xgrad and regrad-clipping. Takes seconds. `accelerate launch`
and torchrun start it on several processes: each then reads its share of the rows, and
all end with the same weights.
"""

import regrad
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
rows = TensorDataset(torch.randn(256, 20), torch.randint(4, (256,)))
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, loader = accelerator.prepare(
    model, optimizer, DataLoader(rows, batch_size=32, shuffle=True)
)

attachment = regrad.attach(model, optimizer, ["xgrad", "agc"])
for epoch in range(4):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

accelerator.print(attachment)
# Accumulation: 4 epochs of 8 batches on one process are 16 optimizer steps, and corrections.
for name, value in attachment.metrics().items():
    accelerator.print(f"{name}: {value:.4g}")
attachment.detach()
accelerator.end_training()
