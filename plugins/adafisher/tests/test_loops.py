"""Loops that people have: scalers, in-place operations, checkpoints, compiled models."""

import copy
from functools import partial

import pytest
import regrad
import torch
from regrad_adafisher import AdaFisher
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class Network(nn.Module):
    """Convolutions with batch normalisation, then tokens; in-place operations wherever possible."""

    def __init__(self, inplace=True):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Linear(4, 5)
        self.scale = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.inplace = inplace

    def forward(self, images):
        hidden = functional.relu(self.norm(self.stem(images)), inplace=self.inplace)
        tokens = hidden.flatten(2).transpose(1, 2).contiguous()
        # The output of a linear layer on tokens is a view.
        mixed = functional.relu(self.mix(tokens), inplace=self.inplace)
        return self.head(self.scale(mixed).mean(dim=1))


def make(dtype=torch.float64, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network(**options).to(dtype)


def batch(index, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(index)
    images = torch.randn(size, 2, 4, 4, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(3, (size,), generator=generator)


def loss_of(model, index, dtype=torch.float64):
    images, target = batch(index, dtype=dtype)
    return functional.cross_entropy(model(images), target)


def train(model, steps=3, call=None, backward=loss_of, **options):
    """Train and return the averages and the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with regrad.attach(model, optimizer, [AdaFisher(refresh=2, **options)]) as attachment:
        for index in range(steps):
            optimizer.zero_grad()
            backward(model if call is None else call, index).backward()
            optimizer.step()
        return flat(attachment), torch.cat([p.detach().flatten() for p in model.parameters()])


def flat(attachment):
    state = attachment.state_dict()["corrections"]["adafisher"]
    return torch.cat([kept[key] for kept in state.values() for key in ("inputs", "outputs")])


def require_same(found, wanted, tolerance=1e-12):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_operations_in_place_behind_a_layer_change_nothing():
    """They drop the hooks of views; full backward hooks would forbid them."""
    require_same(train(make(inplace=True)), train(make(inplace=False)))


def test_forwards_that_nobody_differentiates_do_not_count():
    def with_others(model, index):
        model.eval()
        loss_of(model, 50 + index)  # under grad
        model.train()
        kept = copy.deepcopy(model.state_dict())
        loss_of(model, 70 + index)
        model.load_state_dict(kept)  # of batch normalisation
        return loss_of(model, index)

    require_same(train(make(), backward=with_others), train(make()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_counts_once(reentrant):
    model = make()

    def call(images):
        return checkpoint(model, images.requires_grad_(), use_reentrant=reentrant)

    attached = train(model, call=call)
    wanted = train(make())
    # Batch normalisation counts a repeated forward's statistics again, which no gradient reads.
    require_same(attached, wanted)


def test_batches_of_sequences_of_different_lengths_add_up():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(model, optimizer, [AdaFisher()]) as attachment:
        for length in (3, 5, 2):
            generator = torch.Generator().manual_seed(length)
            tokens = torch.randn(2, length, 4, generator=generator, dtype=torch.float64)
            (model(tokens).square().mean() / 3).backward()
        optimizer.step()
        state = attachment.state_dict()["corrections"]["adafisher"]
    assert state["0"]["inputs"].shape == (2,)
    assert flat(attachment).isfinite().all()
    assert state["1"]["inputs"].shape == (5,)


@pytest.mark.parametrize("average", ["published", "ema"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_a_scaler_skips_leaves_nothing_behind(average, set_to_none):
    def steps(model, *, overflow):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        with regrad.attach(model, optimizer, [AdaFisher(refresh=2, average=average)]) as attachment:
            for index in range(4):
                if overflow and index == 2:
                    kept = copy.deepcopy(model.state_dict())
                    scaler.scale(loss_of(model, 90) * torch.inf).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=set_to_none)
                    model.load_state_dict(kept)
                for index_of_part in (index, index + 10):
                    scaler.scale(loss_of(model, index_of_part) / 2).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=set_to_none)
            return flat(attachment), torch.cat([p.detach().flatten() for p in model.parameters()])

    require_same(steps(make(), overflow=True), steps(make(), overflow=False))


def test_published_averages_do_not_see_the_scale_of_a_scaler_and_its_clipping():
    """Clipping between unscale_ and step hides the scale from the gradients themselves."""

    def steps(model, scale):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        with regrad.attach(model, optimizer, [AdaFisher(refresh=1)]) as attachment:
            for index in range(2):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, index)).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                scaler.step(optimizer)
                scaler.update()
            return (flat(attachment),)

    require_same(steps(make(), 2.0**16), steps(make(), 1))


@pytest.mark.parametrize("average", ["published", "ema"])
def test_under_autocast_averages_are_near_those_of_full_precision(average):
    def autocast(model, index):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model, index, dtype=torch.float32)

    full = partial(loss_of, dtype=torch.float32)
    low, _ = train(make(torch.float32), steps=1, backward=autocast, average=average)
    high, _ = train(make(torch.float32), steps=1, backward=full, average=average)
    assert low.dtype == torch.float32
    assert (low - high).abs().max() < 0.05
    assert (low - high).abs().max() > 0


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_model_compiled_after_attach_has_the_same_numbers():
    torch.compiler.reset()  # code compiled for another model would run without this one's hooks
    model = make()
    compiled = torch.compile(model, backend="eager")
    require_same(train(model, call=compiled), train(make()))


def test_a_model_that_was_compiled_and_called_is_refused():
    model = torch.compile(make(), backend="eager")
    model(batch(0)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(regrad.RegradError, match="before the first compiled call"):
        regrad.attach(model, optimizer, ["adafisher"])


def test_an_explanation_shows_what_the_first_refresh_would_do():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regrad.attach(
        model, optimizer, ["adafisher"], criterion=nn.CrossEntropyLoss()
    ) as attachment:
        explained = attachment.explain(batch(0))
        assert attachment.state_dict()["corrections"]["adafisher"] == {}
    rows = {row["tensor"]: row["relative_change"] for row in explained.rows}
    assert {*rows} == {name for name, _ in model.named_parameters()}
    assert all(0.8 < change < 0.9 for change in rows.values())  # 1 − λ/F, F in [.0074, .0088]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("average", ["published", "ema"])
def test_a_gpu_trains_as_the_cpu(average):
    def on_the_gpu(model, index):
        images, target = batch(index)
        return functional.cross_entropy(model(images.cuda()), target.cuda())

    here = train(make(), average=average)
    there = train(make().cuda(), backward=on_the_gpu, average=average)
    require_same([found.cpu() for found in there], here, tolerance=1e-9)
