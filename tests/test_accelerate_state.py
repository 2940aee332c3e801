"""What Accelerate's save_state keeps of the corrections, the attachment registered or not, as docs/start.md says."""

import pytest
import regrad
import torch

STEPS, SAVED_AFTER = 40, 25


@pytest.fixture
def accelerate():
    """Accelerate, with nothing left over from another test."""
    module = pytest.importorskip("accelerate")
    module.state.AcceleratorState._reset_state(True)
    yield module
    module.state.AcceleratorState._reset_state(True)


def prepare(accelerate, corrections, *, registered):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    attachment = regrad.attach(model, optimizer, corrections)
    if registered:
        accelerator.register_for_checkpointing(attachment)
    return accelerator, model, optimizer, attachment


def train(accelerator, model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        size = 0.1 if step % 3 == 0 else 1.0  # gradients that get short, for AdaNorm
        inputs = size * torch.randn(8, 6, generator=generator)
        targets = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        accelerator.backward(torch.nn.functional.cross_entropy(model(inputs), targets))
        optimizer.step()


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize(
    "corrections", [["adanorm"], ["gcw:layers=all,warmup_steps=1,fit_every=2"], ["xgrad", "agc"]]
)
def test_a_resume_from_accelerates_state_is_exact_with_a_registered_attachment_and_without(
    accelerate, tmp_path, corrections, registered
):
    accelerator, model, optimizer, attachment = prepare(
        accelerate, corrections, registered=registered
    )
    with attachment:
        train(accelerator, model, optimizer, range(SAVED_AFTER))
        accelerator.save_state(str(tmp_path))
        train(accelerator, model, optimizer, range(SAVED_AFTER, STEPS))
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    accelerator, model, optimizer, attachment = prepare(
        accelerate, corrections, registered=registered
    )
    with attachment:
        accelerator.load_state(str(tmp_path))
        train(accelerator, model, optimizer, range(SAVED_AFTER, STEPS))
        assert attachment.metrics()["steps_applied"] == STEPS
    assert all(map(torch.equal, model.parameters(), expected))
