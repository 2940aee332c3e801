"""The window: weights move before the forward pass and come back bit for bit."""

import pytest
import regrad
import torch
from regrad import RegradError
from regrad.window import Window


@pytest.fixture
def shifted(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    shift, spy = toys.Shift(amount=0.1), toys.Spy()
    attachment = regrad.attach(model, optimizer, [shift, spy])
    return model, optimizer, shift, spy, attachment


def moved_by(toys, model, true, amount):
    now = toys.weights_of(model)
    return all(
        torch.equal(now[name], weight + toys.away(weight, amount)) for name, weight in true.items()
    )


def test_the_forward_sees_moved_weights_and_the_correction_true_ones(toys, same_bits, shifted):
    model, optimizer, shift, spy, _ = shifted
    for index in range(3):
        true = toys.weights_of(model)
        loss = toys.loss_of(model, seed=index)
        assert moved_by(toys, model, true, 0.1)
        loss.backward()
        assert moved_by(toys, model, true, 0.1)
        optimizer.step()
        assert same_bits(spy.weights[index], true)
        optimizer.zero_grad()
    assert shift.calls == 3


def test_the_gradient_is_that_at_the_moved_weights_and_the_update_starts_at_the_true_ones(
    toys, shifted
):
    model, optimizer, *_ = shifted
    twin = toys.moved(toys.Net(), 0.1)
    toys.loss_of(twin).backward()
    true = toys.weights_of(model)
    toys.train_step(model, optimizer)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.detach(), true[name] - 0.1 * other.grad, rtol=0, atol=1e-15
        )


def test_restoring_is_bit_exact_for_zeros_of_both_signs_and_tiny_numbers(same_bits):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        values = torch.randn(64, generator=generator).to(dtype)
        values[:4] = torch.tensor([0.0, -0.0, 1e-40, -1e-7], dtype=dtype)
        parameter = torch.nn.Parameter(values.clone())
        window = Window()
        window.open([parameter], [torch.randn(64, generator=generator).to(dtype)])
        assert not same_bits(parameter, values)
        window.close()
        assert same_bits(parameter, values)


def test_restoring_is_bit_exact_after_the_model_changed_its_precision(toys, same_bits):
    model = toys.Net(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spy = toys.Spy()
    regrad.attach(model, optimizer, [toys.Shift(), spy])
    toys.train_step(model, optimizer)
    model.double()
    toys.train_step(model, optimizer)
    true = toys.weights_of(model)
    toys.train_step(model, optimizer)
    assert same_bits(spy.weights[2], true)


def test_a_prediction_with_the_wrong_number_of_displacements_is_refused_with_nothing_moved(
    toys, same_bits
):
    class Short(toys.Shift):
        def predict_weights(self, step):
            return super().predict_weights(step)[:-1]

    model = toys.Net()
    regrad.attach(model, toys.sgd(model), [Short()])
    true = toys.weights_of(model)
    with pytest.raises(RegradError, match="must return 6 displacements, got 5"):
        toys.loss_of(model)
    assert same_bits(toys.weights_of(model), true)


def test_entries_of_none_stay_where_they_are(toys):
    class Head(toys.Shift):
        def predict_weights(self, step):
            moves = super().predict_weights(step)
            return [
                m if n.startswith("head") else None for n, m in zip(step.names, moves, strict=True)
            ]

    model = toys.Net()
    optimizer = toys.sgd(model)
    regrad.attach(model, optimizer, [Head()])
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    moved = [
        name for name, now in toys.weights_of(model).items() if not torch.equal(now, true[name])
    ]
    assert moved == ["head.weight", "head.bias"]
    optimizer.step()


def test_no_prediction_in_evaluation_mode_or_without_gradients(toys, same_bits, shifted):
    model, _, shift, *_ = shifted
    true = toys.weights_of(model)
    with torch.no_grad():
        toys.loss_of(model)
    with torch.inference_mode():
        toys.loss_of(model)
    model.eval()
    toys.loss_of(model)
    assert shift.calls == 0
    assert same_bits(toys.weights_of(model), true)


def test_an_evaluation_forward_closes_the_window_and_the_next_training_forward_predicts_again(
    toys, same_bits, shifted
):
    model, optimizer, shift, spy, _ = shifted
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    model.eval()
    with torch.no_grad():
        evaluated = toys.loss_of(model)
    assert same_bits(toys.weights_of(model), true)
    torch.testing.assert_close(evaluated, toys.loss_of(toys.Net().eval()).detach(), rtol=0, atol=0)
    model.train()
    toys.loss_of(model).backward()
    assert moved_by(toys, model, true, 0.1)
    optimizer.step()
    assert shift.calls == 2
    assert same_bits(spy.weights[0], true)


def test_an_evaluation_between_forward_and_backward_is_loud_on_plain_tensors(toys, shifted):
    model, *_ = shifted
    loss = toys.loss_of(model)
    model.eval()
    toys.loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_training_forward_without_gradients_inside_the_window_sees_moved_weights_as_documented(
    toys, shifted
):
    model, *_ = shifted
    toys.loss_of(model).backward()
    with torch.no_grad():
        inside = toys.loss_of(model)
    twin = toys.moved(toys.Net(), 0.1)
    torch.testing.assert_close(inside, toys.loss_of(twin).detach(), rtol=0, atol=0)


def test_state_dict_inside_the_window_holds_copies_of_the_true_weights(toys, same_bits, shifted):
    model, optimizer, *_ = shifted
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    moved = toys.weights_of(model)
    saved = model.state_dict()
    assert same_bits(dict(saved), true)
    assert same_bits(toys.weights_of(model), moved)
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    for tensor in saved.values():
        tensor.requires_grad_(False).mul_(1)
    optimizer.step()
    toys.train_step(model, optimizer, seed=1)
    toys.loss_of(model)
    assert same_bits(dict(saved), kept)


def test_changing_such_a_state_dict_changes_no_weight(toys, same_bits, shifted):
    model, optimizer, _, spy, _ = shifted
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    optimizer.step()
    assert same_bits(spy.weights[0], true)


def test_state_dict_inside_the_window_keeps_a_prefix_and_one_copy_per_tied_group(toys):
    model = toys.Tied().double()
    outer = torch.nn.ModuleDict({"net": model})
    regrad.attach(model, toys.sgd(model), [toys.Shift()])
    true = toys.weights_of(model)["first.weight"]
    model(toys.batch()[0])
    saved = outer.state_dict()
    assert set(saved) == {"net.first.weight", "net.second.weight"}
    assert torch.equal(saved["net.first.weight"], true)
    assert saved["net.first.weight"].data_ptr() == saved["net.second.weight"].data_ptr()
    assert saved["net.first.weight"].data_ptr() != model.first.weight.data_ptr()


def test_a_generator_trained_through_the_discriminator_meets_predicted_weights_as_documented(
    toys, same_bits, shifted
):
    discriminator, optimizer, *_ = shifted
    toys.loss_of(discriminator, seed=0).backward()
    optimizer.step()
    true = toys.weights_of(discriminator)
    toys.loss_of(discriminator, seed=1)  # the generator's pass, in training mode
    assert moved_by(toys, discriminator, true, 0.1)
    discriminator.eval()
    toys.loss_of(discriminator, seed=1)
    assert same_bits(toys.weights_of(discriminator), true)


def test_a_submodules_state_dict_inside_the_window_sees_moved_weights_as_documented(toys, shifted):
    model, *_ = shifted
    true = toys.weights_of(model)
    toys.loss_of(model)
    before = true["head.weight"]
    assert torch.equal(model.head.state_dict()["weight"], before + toys.away(before, 0.1))


def test_loading_inside_the_window_writes_what_was_loaded(toys, same_bits, shifted):
    model, optimizer, _, spy, _ = shifted
    other = toys.Net(seed=5)
    toys.loss_of(model).backward()
    model.load_state_dict(other.state_dict())
    assert same_bits(toys.weights_of(model), toys.weights_of(other))
    optimizer.step()
    assert same_bits(spy.weights[0], toys.weights_of(other))


def test_a_partial_load_inside_the_window_leaves_the_rest_at_the_true_weights(
    toys, same_bits, shifted
):
    model, optimizer, _, spy, _ = shifted
    true = toys.weights_of(model)
    other = {"head.weight": torch.full((2, 4), 9.0, dtype=torch.float64)}
    toys.loss_of(model).backward()
    model.load_state_dict(other, strict=False)
    assert same_bits(toys.weights_of(model), {**true, **other})
    optimizer.step()
    assert same_bits(spy.weights[0], {**true, **other})


def test_loading_the_optimizer_inside_the_window_restores_the_weights(toys, same_bits, shifted):
    model, optimizer, *_ = shifted
    true = toys.weights_of(model)
    toys.loss_of(model).backward()
    optimizer.load_state_dict(optimizer.state_dict())
    assert same_bits(toys.weights_of(model), true)


def test_reentrant_checkpointing_of_a_part_gives_the_same_numbers(toys, same_bits):
    class Checkpointed(toys.Net):
        def forward(self, x):
            hidden = torch.tanh(self.body(x))
            return self.head(
                torch.utils.checkpoint.checkpoint(self.norm, hidden, use_reentrant=True)
            )

    results = []
    for kind in (toys.Net, Checkpointed):
        model = kind()
        optimizer = toys.sgd(model)
        regrad.attach(model, optimizer, [toys.Shift()])
        for seed in range(3):
            toys.train_step(model, optimizer, seed=seed)
        results.append(toys.weights_of(model))
    assert same_bits(*results)


def test_reentrant_checkpointing_of_the_whole_model_is_never_silently_wrong(toys, same_bits):
    results = []
    for checkpointed in (False, True):
        model = toys.Net()
        optimizer = toys.sgd(model)
        regrad.attach(model, optimizer, [toys.Shift()])
        inputs, labels = toys.batch()
        inputs.requires_grad_()
        logits = (
            torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=True)
            if checkpointed
            else model(inputs)
        )
        try:
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
        except RegradError:
            return
        results.append(toys.weights_of(model))
    assert same_bits(*results)


def test_a_forward_that_raises_leaves_a_window_that_the_next_step_reuses(toys, same_bits, shifted):
    model, optimizer, shift, spy, _ = shifted
    true = toys.weights_of(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 99, dtype=torch.float64))
    toys.train_step(model, optimizer)
    assert shift.calls == 1
    assert same_bits(spy.weights[0], true)
