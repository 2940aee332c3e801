r"""A training script that knows nothing of regrad: handwritten digits, plain PyTorch.

    regrad compare --corrections xgrad agc --measure 'loss=loss ([0-9.]+)' --lower-is-better \
        -- docs/examples/own_script.py --seed '{seed}'

Says after each epoch how it does on images that it does not train on. A run takes seconds.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--epochs", type=int, default=8)
asked = parser.parse_args()

torch.manual_seed(asked.seed)
images, labels = load_digits(return_X_y=True)
inputs = torch.tensor(images / 16, dtype=torch.float32)
targets = torch.tensor(labels)
order = torch.randperm(len(inputs))
train, held_out = order[:1200], order[1200:]

model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=asked.lr, momentum=0.9)
criterion = nn.CrossEntropyLoss()

for epoch in range(asked.epochs):
    model.train()
    for rows in train[torch.randperm(len(train))].split(32):
        optimizer.zero_grad()
        criterion(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        loss = criterion(model(inputs[held_out]), targets[held_out]).item()
    print(f"epoch {epoch + 1}: loss {loss:.4f}")
