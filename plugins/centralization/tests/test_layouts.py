"""Two gloo processes train as one: half of every batch each, under DDP and FSDP2."""

import regrad
import torch
from regrad.sharding import is_sharded
from regrad_testing import run_on_processes
from regrad_testing.layout_clauses import fsdp2, fsdp2_by_columns
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SPECS = {"gradient": "centralization", "decayed": "centralization:placement=decayed"}


class Net(nn.Module):
    """Layers of every kind of output, with sizes that two processes cannot share evenly."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.spread = nn.ConvTranspose1d(3, 6, 2, groups=3)
        self.gain = nn.Parameter(torch.ones(6, 1))
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, tokens):
        x = self.table(tokens)
        x = self.spread((x + self.attention(x, x, x, need_weights=False)[0]).transpose(1, 2))
        return self.head(torch.tanh(self.norm(x * self.gain)).mean(2))


def make_model():
    generator = torch.Generator().manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
            )
    return model


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        yield (
            torch.randint(7, (8, 4), generator=generator),
            torch.randint(5, (8,), generator=generator),
        )


def whole(parameter):
    return parameter.full_tensor() if is_sharded(parameter) else parameter


def train(model, spec, part):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    with regrad.attach(model, optimizer, [spec]) as attachment:
        for inputs, target in batches():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[part]), target[part]).backward()
            optimizer.step()
        if attachment.metrics()[f"{attachment.corrections[0].name}/gradient/trigger_rate"] < 1:
            raise SystemExit(f"{spec} centred nothing")
    return [whole(parameter) for parameter in model.parameters()]


def farthest(seen, wanted):
    pairs = zip(seen, wanted, strict=True)
    return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)


def differences(rank):
    """Return how far every layout ends from one process, for both placements."""
    part = slice(4 * rank, 4 * rank + 4)
    seen = {}
    for name, spec in SPECS.items():
        alone = train(make_model(), spec, slice(None))
        models = {
            "ddp": DistributedDataParallel(make_model()),
            "rows": fsdp2(make_model()),
            "columns": fsdp2_by_columns(make_model()),
        }
        for layout, model in models.items():
            seen[f"{layout}-{name}"] = farthest(train(model, spec, part), alone)
    return seen


def test_two_processes_train_as_one_under_ddp_and_fsdp2():
    for seen in run_on_processes(differences):
        assert len(seen) == 6
        # float64: the mean of two half batches and of the whole round differently
        assert all(difference < 1e-14 for difference in seen.values()), seen
