import pytest
import regrad
import torch
from regrad_gcw import GCW, functional
from regrad_gcw.slots import Memory, fit


def test_coefficients_that_are_switched_off_do_not_count_as_used():
    memory = Memory.begin(torch.zeros(1, dtype=torch.float64), [0.9], rows=2, attention=False)
    memory.tensors["learned"].fill_(0.5)
    for gradient in (1.0, -1.0, 1.0):  # g - 0 and then g - g_last point against what follows
        if memory.seen:
            memory.witness(torch.tensor([gradient]))
        memory.take(torch.tensor([gradient]), [0.0])
    # the prior gains -.9·1 and -.9·2, the learned less badly -.5 and -1, both surely below zero
    fit([memory], predictor="slot", gated=True)
    assert memory.tensors["gains"][-2:].flatten().tolist() == pytest.approx(
        [-0.9, -0.5, -1.8, -1.0]
    )
    assert memory.tensors["gate"].tolist() == [0.0, 0.0]
    assert memory.tensors["used"].tolist() == [0.0]
    assert memory.tensors["learned"].item() == pytest.approx(0.5 + 0.5 * -1)


def test_memories_of_one_model_share_the_start_of_their_attention():
    first, second = (
        Memory.begin(torch.zeros(n), [0.9, 0.0], rows=2, attention=True).tensors for n in (3, 5)
    )
    assert torch.equal(first["query"], second["query"])
    assert torch.equal(first["key"], second["key"])
    assert first["query"].shape == (functional.WIDTH,)


def test_the_prior_follows_a_momentum_that_changes_at_the_next_fit():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options = {"layers": "all", "predictor": "prior", "warmup_steps": 0, "fit_every": 2}
    with regrad.attach(model, optimizer, [GCW(**options)]) as attachment:
        seen = []
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.param_groups[0]["momentum"] = 0.5
            seen.append(attachment.metrics()["gcw/a_last"])
    assert seen == pytest.approx([0.9, 0.9, 0.5, 0.5, 0.5])
