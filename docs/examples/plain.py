"""Plain PyTorch: one line attaches, one expression changes.

    python docs/examples/plain.py

Needs regrad-xgrad, regrad-powergrad and regrad-clipping. Takes seconds.
"""

import regrad
import torch
from torch import nn

torch.manual_seed(0)
inputs, targets = torch.randn(256, 20), torch.randint(4, (256,))
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
criterion = nn.CrossEntropyLoss()

attachment = regrad.attach(model, optimizer, ["xgrad", "powergrad", "agc"], criterion)
for epoch in range(4):
    for rows in torch.randperm(256).split(32):
        loss = attachment.criterion(model(inputs[rows]), targets[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

print(attachment)
for name, value in attachment.metrics().items():
    print(f"{name}: {value:.4g}")
attachment.detach()
