"""The step against the reference, and the loops that people have."""

import copy
import io
import pickle

import msgpack
import numpy as np
import pytest
import regrad
import torch
from regrad_velo import VeLO, load_weights, random_weights, save_weights
from regrad_velo.features import factored_axes
from regrad_velo.losses import loss_features, new_losses, with_loss

SHAPES = [(), (1,), (7,), (5, 3), (4, 4), (1, 6), (2, 3, 4), (3, 2, 2, 5), (2, 1, 2, 1, 2), (0, 3)]
ALWAYS_ZERO = 2
STEPS = 20


@pytest.fixture(scope="session")
def theta(reference):
    return reference.random_theta(0)


@pytest.fixture(scope="session")
def networks(theta, tmp_path_factory):
    def packed(tree):
        if isinstance(tree, dict):
            return {name: packed(branch) for name, branch in tree.items()}
        return msgpack.ExtType(1, msgpack.packb((tree.shape, "float32", tree.tobytes())))

    path = tmp_path_factory.mktemp("velo") / "params"
    path.write_bytes(msgpack.packb(packed(theta)))
    return load_weights(path)


def start(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [torch.nn.Parameter(values.to(dtype)) for values in drawn]


def give_gradients(weights, index):
    generator = torch.Generator().manual_seed(100 + index)
    scale = (1.0, 3000.0, 0.01, 0.0)[index % 4]
    for place, weight in enumerate(weights):
        gradient = scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.grad = gradient.to(weight.dtype) * (place != ALWAYS_ZERO)


def loss_at(index):
    """Falls, jumps up (the jump is clipped), and is negative in the end."""
    return 5.0 / (1 + index) + (1000.0 if index == 7 else 0.0) - 0.4


@pytest.mark.parametrize("num_steps", [STEPS, 8, 5000])
@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.filterwarnings("ignore:num_steps must be")
def test_twenty_steps_are_the_references_in_float64(reference, theta, networks, num_steps, passes):
    weights = start()
    filled = [weight for weight in weights if weight.numel()]
    optimizer = VeLO(weights, weights=networks, num_steps=num_steps, lr=0.7, pass_lstm_state=passes)
    plain = reference.VeLO(theta, num_steps, passes)
    values = [weight.detach().numpy().copy() for weight in filled]
    for index in range(STEPS):
        give_gradients(weights, index)
        before = copy.deepcopy(values)
        gradients = [weight.grad.numpy() for weight in filled]
        values = plain.step(values, gradients, loss_at(index), lr=0.7)
        optimizer.step(lambda index=index: loss_at(index))
        for old, wanted, got in zip(before, values, filled, strict=True):
            assert np.abs(wanted - old).max() > 0
            np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-10, atol=1e-10)


def test_float32_stays_near_the_reference(reference, theta, networks):
    weights = start(torch.float32)
    filled = [weight for weight in weights if weight.numel()]
    optimizer = VeLO(weights, weights=networks, num_steps=STEPS)
    plain = reference.VeLO(theta, STEPS)
    values = [weight.detach().double().numpy() for weight in filled]
    for index in range(STEPS):
        give_gradients(weights, index)
        gradients = [weight.grad.double().numpy() for weight in filled]
        values = plain.step(values, gradients, loss_at(index))
        optimizer.step(lambda index=index: loss_at(index))
    for wanted, got in zip(values, filled, strict=True):
        np.testing.assert_allclose(got.detach().double().numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (64, 64, 3, 3), (8, 3, 3, 3), (2, 2, 2)])
def test_the_factored_axes_are_the_published_ones_of_the_layer_turned_round(shape):
    last = len(shape) - 1
    published = np.argsort(shape[::-1], kind="stable")[-2:]
    assert factored_axes(shape) == tuple(last - int(axis) for axis in published)


def test_the_loss_features_are_the_references(reference):
    plain = reference.Losses(300)
    own = new_losses()
    for index in range(30):
        plain.add(loss_at(index))
        own = with_loss(own, loss_at(index), 300)
        np.testing.assert_allclose(loss_features(own, 300), plain.features(), atol=1e-12)
    assert any(loss_features(own, 300))


def test_a_step_beyond_the_last_warns_once_and_goes_on():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = VeLO([weight], weights=random_weights(0), num_steps=2)
    weight.grad = torch.ones(3)
    for _ in range(2):
        optimizer.step(lambda: 1.0)
    before = weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="num_steps must be the steps of the whole training"):
        optimizer.step(lambda: 1.0)
    optimizer.step(lambda: 1.0)
    assert not torch.equal(weight, before)


def make(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    model.to(dtype)
    return model, VeLO(model.parameters(), weights=random_weights(0), num_steps=20)


def backward(model, index):
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(8, 4, generator=generator).to(next(model.parameters()).dtype)
    loss = (model(inputs) - 1).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, indices=range(8)):
    for index in indices:
        optimizer.zero_grad()
        loss = backward(model, index)
        optimizer.step(lambda loss=loss: loss)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(dtype):
    wanted = train(*make(dtype))
    model, optimizer = make(dtype)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    resumed, other = make(dtype)
    resumed.load_state_dict(values)
    other.load_state_dict(state)
    wide = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for s in other.state.values() for t in s.values()} == {wide}
    assert torch.equal(train(resumed, other, range(3, 8)), wanted)


def test_copies_and_pickles_step_as_the_original():
    model, optimizer = make()
    train(model, optimizer, range(3))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    copied = copy.deepcopy((model, optimizer))
    wanted = train(model, optimizer, range(3, 8))
    assert torch.equal(train(*copied, range(3, 8)), wanted)
    assert torch.equal(train(*pickled, range(3, 8)), wanted)


def test_a_state_of_other_networks_or_another_length_is_refused():
    model, optimizer = make()
    train(model, optimizer)
    state = optimizer.state_dict()
    for message, options in [
        ("saved with num_steps 30, got 20", {"weights": random_weights(0), "num_steps": 30}),
        ("saved with weights '", {"weights": random_weights(1), "num_steps": 20}),
    ]:
        other = VeLO(model.parameters(), **options)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(copy.deepcopy(state))
        assert not other.state
    with pytest.raises(ValueError, match="state_dict must be of VeLO"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


def test_without_the_loss_nothing_moves():
    model, optimizer = make()
    train(model, optimizer, range(2))
    before = train(model, optimizer, [])
    backward(model, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    for closure, message in [
        (None, r"call optimizer\.step\(lambda: loss\) after loss\.backward\(\)"),
        (lambda: None, "closure must return the loss, one number, got None"),
        (lambda: torch.ones(2), "closure must return the loss, one number"),
        (lambda: torch.tensor(torch.nan), "loss must be finite, got nan"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.step(closure)
    assert torch.equal(train(model, optimizer, []), before)
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]


def test_the_rate_scales_the_step_and_schedulers_move_it():
    moves = []
    for rate in (1.0, 0.5, torch.tensor(0.5)):
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = VeLO([weight], rate, weights=random_weights(0), num_steps=9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        weight.grad = torch.ones_like(weight)
        optimizer.step(lambda: 1.0)
        moves.append((weight.detach() - torch.tensor([1.0, -2.0])).tolist())
    np.testing.assert_allclose(moves[1], np.array(moves[0]) / 2, rtol=1e-9)
    assert moves[1] == moves[2]
    scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
        ({"num_steps": 2.5}, r"num_steps must be a whole number of at least 1, got 2\.5"),
        ({"num_steps": True}, "num_steps must be a whole number of at least 1, got True"),
        ({"lr": -1.0}, r"lr must be at least 0 and finite, got -1\.0"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a tensor of one element, got shape \[2\]"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=message):
        VeLO([weight], **{"weights": random_weights(0), "num_steps": 5, **options})


def test_complex_and_sparse_are_refused_before_anything_moves():
    complex_weight = torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))
    with pytest.raises(ValueError, match="parameters must be real and floating point"):
        VeLO([complex_weight], weights=random_weights(0), num_steps=5)
    table = torch.nn.Embedding(4, 2, sparse=True)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = VeLO([weight, *table.parameters()], weights=random_weights(0), num_steps=5)
    weight.grad = torch.ones(1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradients must be dense, got a sparse one"):
        optimizer.step(lambda: 1.0)
    assert weight.item() == 1.0


def test_shards_are_refused():
    class Shard(torch.nn.Parameter):
        device_mesh = None

    with pytest.raises(regrad.RegradError, match="parameters must be whole, got a DTensor"):
        VeLO([Shard(torch.ones(2))], weights=random_weights(0), num_steps=5)


def test_it_is_found_by_its_name_and_takes_the_same_steps_when_attached():
    assert regrad.load("velo", "regrad.optimizers") is VeLO
    wanted = train(*make())
    model, optimizer = make()
    with regrad.attach(model, optimizer, []) as attachment:
        assert torch.equal(train(model, attachment.optimizer), wanted)


@pytest.mark.parametrize(
    "name", ["centralization", "cautious", "clip-update:max_rms=1e-9", "xgrad"]
)
def test_corrections_that_read_no_state_act_on_it(name):
    if name.split(":")[0] not in regrad.available():
        pytest.skip("its plugin is not installed")
    wanted = train(*make())
    model, optimizer = make()
    with regrad.attach(model, optimizer, [name]) as attachment:
        got = train(model, attachment.optimizer)
    assert got.isfinite().all()
    assert not torch.equal(got, wanted)


def test_adanorm_on_the_moment_refuses_it():
    if "adanorm" not in regrad.available():
        pytest.skip("its plugin is not installed")
    model, optimizer = make()
    with pytest.raises(regrad.RegradError, match="VeLO"):
        regrad.attach(model, optimizer, ["adanorm:target=moment"])


def test_the_runner_refuses_it_in_one_line(tmp_path):
    optimizers = pytest.importorskip("regrad_runner.training.optimizers")
    path = tmp_path / "own.safetensors"
    save_weights(random_weights(0), path)
    message = r"lr must be one that 'velo:.*' can step with, got 1\.0: closure must return the loss"
    with pytest.raises(ValueError, match=message):
        optimizers.check_rate(f"velo:weights={path},num_steps=10", 1.0)
