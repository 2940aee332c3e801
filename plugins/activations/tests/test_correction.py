"""What the corrections keep, what stays exact, what is unbiased, and what is refused."""

import gc
import math
import weakref

import pytest
import regrad
import torch
from regrad import RegradError
from regrad_activations import WTACRS, Int8Rows, UniformRows
from regrad_activations.functional import dequantise, quantise
from torch import nn
from torch.utils.checkpoint import checkpoint

ALL = [Int8Rows, UniformRows, WTACRS]
SAMPLED = [UniformRows, WTACRS]


def filled(model, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model.to(dtype)


def drawn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attached(model, correction):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return regrad.attach(model, optimizer, [correction])


def backward(model, inputs, autocast=None):
    """Return output, input gradient and parameters' gradients of one forward and backward."""
    model.zero_grad()
    inputs = inputs.detach().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        output = model(inputs)
    generator = torch.Generator().manual_seed(5)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.detach(), inputs.grad, gradients


LAYOUTS = {
    "rows": lambda: drawn(64, 6),
    "batches": lambda: drawn(4, 16, 6),
    "many dimensions": lambda: drawn(2, 2, 16, 6),
    "transposed": lambda: drawn(4, 6, 16).transpose(1, 2),
    "transposed matrix": lambda: drawn(6, 64).t(),
    "strided": lambda: drawn(64, 12)[:, ::2],
    "narrowed": lambda: drawn(64, 9)[:, :6],
    "expanded": lambda: drawn(1, 6).expand(64, 6),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ALL)
def test_all_but_the_weight_gradient_keeps_every_bit(kind, layout, bias):
    plain, model = (filled(nn.Sequential(nn.Linear(6, 5, bias=bias))) for _ in range(2))
    attachment = attached(model, kind())
    wanted = backward(plain, LAYOUTS[layout]())
    got = backward(model, LAYOUTS[layout]())
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    if bias:
        assert torch.equal(got[2]["0.bias"], wanted[2]["0.bias"])
    assert not torch.equal(got[2]["0.weight"], wanted[2]["0.weight"])
    assert 0 < attachment.metrics()[f"{kind.name}/saved_share"] < 0.5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_weight_gradient_is_that_of_the_rows_in_int8_also_where_all_sides_are_equal(
    bias, autocast
):
    dtype = torch.float64 if autocast is None else torch.float32
    plain, model = (filled(nn.Sequential(nn.Linear(16, 16, bias=bias)), dtype) for _ in range(2))
    inputs = drawn(16, 16, dtype=dtype)
    attached(model, Int8Rows())
    wanted = backward(plain, inputs, autocast)
    got = backward(model, inputs, autocast)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    saved = inputs if autocast is None else inputs.to(autocast)
    rounded = dequantise(*quantise(saved), dtype=saved.dtype)
    alone = filled(nn.Sequential(nn.Linear(16, 16, bias=bias)), dtype)
    expected = backward(alone, rounded.to(dtype), autocast)
    torch.testing.assert_close(got[2]["0.weight"], expected[2]["0.weight"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ALL)
def test_a_transposed_square_input_that_may_be_the_weight_is_kept_as_it_is(kind):
    plain, model = (filled(nn.Sequential(nn.Linear(16, 16))) for _ in range(2))
    attached(model, kind())
    wanted = backward(plain, drawn(16, 16).t())
    got = backward(model, drawn(16, 16).t())
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[2]["0.weight"], wanted[2]["0.weight"])


@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("inputs", [drawn(6), drawn(10, 6), drawn(0, 6)])
def test_ten_rows_or_fewer_are_all_kept(kind, inputs):
    plain, model = (filled(nn.Sequential(nn.Linear(6, 5))) for _ in range(2))
    attached(model, kind())
    wanted, got = backward(plain, inputs), backward(model, inputs)
    assert torch.equal(got[2]["0.weight"], wanted[2]["0.weight"])


def test_a_vector_is_one_row_in_int8():
    model = filled(nn.Sequential(nn.Linear(6, 5)))
    attached(model, Int8Rows())
    _, _, gradients = backward(model, drawn(6))
    assert gradients["0.weight"].isfinite().all()


@pytest.mark.parametrize("kind", SAMPLED)
def test_the_weight_gradient_is_unbiased_over_micro_batches(kind):
    """Means of 400 steps of two micro-batches, within 4 σ of the exact gradient."""
    model = filled(nn.Sequential(nn.Linear(6, 5)))
    rows = drawn(80, 6) * torch.linspace(0.1, 4, 80, dtype=torch.float64)[:, None]
    gradient = drawn(80, 5, seed=2)
    attachment = attached(model, kind())
    exact = gradient.T @ rows
    errors = []
    for _ in range(400):
        model.zero_grad()
        for part in (slice(40), slice(40, 80)):
            model(rows[part]).backward(gradient[part])
        errors.append(model[0].weight.grad - exact)
        attachment.optimizer.step()
    found = torch.stack(errors)
    variance = found.square().sum(dim=(1, 2)).mean()
    assert variance > 0
    assert found.mean(dim=0).norm() < 4 * math.sqrt(variance / 400)


@pytest.mark.parametrize("kind", SAMPLED)
def test_the_spread_in_one_layer_is_the_formulas(kind, reference):
    model = filled(nn.Sequential(nn.Linear(6, 5)))
    rows = drawn(40, 6) * torch.linspace(0.1, 4, 40, dtype=torch.float64)[:, None]
    gradient = drawn(40, 5, seed=2)
    attachment = attached(model, kind())
    exact = gradient.T @ rows
    squares = []
    for _ in range(400):
        model.zero_grad()
        model(rows).backward(gradient)
        squares.append((model[0].weight.grad - exact).square().sum())
        attachment.optimizer.step()
    told = (gradient.tolist(), rows.tolist())
    if kind is UniformRows:
        variance = reference.variance_of_uniform(*told, 12)
    else:
        falling, order = (rows.norm(dim=1) / rows.norm(dim=1).sum()).sort(descending=True)
        certain = reference.certain_number(falling.tolist(), 12)
        variance = reference.variance(*told, falling.tolist(), order.tolist(), 12, certain)
    found = torch.stack(squares)
    assert abs(found.mean() - variance) < 4 * found.std() / math.sqrt(400)


@pytest.mark.parametrize("kind", SAMPLED)
def test_the_weight_gradient_is_unbiased_under_autocast(kind):
    model = filled(nn.Sequential(nn.Linear(6, 5)), torch.float32)
    rows = drawn(64, 6, dtype=torch.float32)
    gradient = drawn(64, 5, seed=2, dtype=torch.float32).bfloat16()

    def weight_gradient():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(rows)
        output.backward(gradient)
        return model[0].weight.grad.double()

    exact = weight_gradient()
    attachment = attached(model, kind())
    errors = []
    for _ in range(400):
        errors.append(weight_gradient() - exact)
        attachment.optimizer.step()
    found = torch.stack(errors)
    variance = found.square().sum(dim=(1, 2)).mean()
    # bfloat16 rounds each of 30 sums, which is no part of the sample's error.
    rounding = 2**-8 * exact.norm()
    assert found.mean(dim=0).norm() < 4 * math.sqrt(variance / 400) + rounding


class Attention(nn.Module):
    """Three layers that read one tensor."""

    def __init__(self, *, writes=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.writes = writes

    def forward(self, inputs):
        hidden = inputs * 1
        one = self.q(hidden)
        if self.writes:
            with torch.no_grad():
                hidden.mul_(2)
        return one + self.k(hidden) + self.v(hidden)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_layers_that_read_one_tensor_share_one_short_form(kind, autocast):
    model = filled(Attention(), torch.float32)
    correction = kind()
    made = []
    shorten = correction._shorten
    correction._shorten = lambda *told: made.append(1) or shorten(*told)
    attached(model, correction)
    _, _, gradients = backward(model, drawn(64, 6, dtype=torch.float32), autocast)
    assert len(made) == 1
    assert torch.equal(gradients["q.weight"], gradients["k.weight"])
    assert torch.equal(gradients["q.weight"], gradients["v.weight"])


def test_a_tensor_that_was_written_to_is_sampled_anew():
    model = filled(Attention(writes=True))
    correction = UniformRows()
    attached(model, correction)
    backward(model, drawn(64, 6))
    assert correction.state_dict() == {"draws": 2}


@pytest.mark.parametrize("kind", ALL)
def test_neither_the_input_nor_its_short_form_outlive_their_use(kind):
    model = filled(nn.Sequential(nn.Linear(6, 5)))
    correction = kind()
    attachment = attached(model, correction)
    attachment.engine.applied = 33  # no step that the effect meter measures
    inputs = drawn(64, 6)
    gc.collect()
    gc.disable()
    try:
        output = model(inputs)
        reference = weakref.ref(inputs)
        kept = weakref.ref(next(iter(correction._shared.values()))[1]())
        del inputs
        assert reference() is None
        output.sum().backward()
        del output
        assert kept() is None
    finally:
        gc.enable()
    assert len(correction._shared) == 0


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_input_that_is_not_finite_shows_in_the_weight_gradient(kind, value):
    for row in range(0, 64, 7):
        model = filled(nn.Sequential(nn.Linear(6, 5, bias=False)))
        attached(model, kind())
        inputs = drawn(64, 6)
        inputs[row, 2] = value
        model(inputs).sum().backward()
        assert not model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ALL)
def test_a_scaled_loss_trains_as_an_unscaled_one(kind):
    """The scale is a power of two, and the rows are drawn without a look at gradients."""
    ends = []
    for enabled in (False, True):
        model = filled(nn.Linear(6, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        with regrad.attach(model, optimizer, [kind()]):
            for step in range(3):
                loss = model(drawn(64, 6, seed=step)).square().mean()
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", SAMPLED)
def test_the_same_seed_draws_the_same_and_a_resumed_run_goes_on(kind):
    def gradients(correction, steps):
        model = filled(nn.Sequential(nn.Linear(6, 5)))
        attachment = attached(model, correction)
        found = [backward(model, drawn(64, 6))[2]["0.weight"].clone() for _ in range(steps)]
        return found, attachment

    whole, _ = gradients(kind(), 4)
    other, _ = gradients(kind(seed=1), 4)
    half, attachment = gradients(kind(), 2)
    resumed = kind()
    resumed.load_state_dict(attachment.state_dict()["corrections"][kind.name])
    rest, _ = gradients(resumed, 2)
    for got, wanted, apart in zip([*half, *rest], whole, other, strict=True):
        assert torch.equal(got, wanted)
        assert not torch.equal(got, apart)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("kind", ALL)
def test_a_second_backward_reads_the_same_rows(kind):
    model = filled(nn.Sequential(nn.Linear(6, 5)))
    attached(model, kind())
    loss = model(drawn(64, 6)).square().sum()
    loss.backward(retain_graph=True)
    first = model[0].weight.grad.clone()
    model.zero_grad()
    loss.backward()
    assert torch.equal(model[0].weight.grad, first)


@pytest.mark.parametrize("kind", ALL)
def test_second_derivatives_go_through_what_backward_read(kind):
    model = filled(nn.Sequential(nn.Linear(6, 5)))
    attached(model, kind())
    inputs = drawn(64, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs).sum(), model[0].weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), inputs)
    # The weight gradient is linear in the input, with factor 1 per output here.
    torch.testing.assert_close(second, torch.full_like(inputs, 5.0))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("way", ["eval", "no_grad", "detached"])
def test_nothing_is_shortened_outside_of_training(kind, way):
    plain, model = (filled(nn.Sequential(nn.Linear(6, 5))) for _ in range(2))
    attachment = attached(model, kind())
    if way == "eval":
        model.eval()
    if way == "detached":
        attachment.detach()
    if way == "no_grad":
        with torch.no_grad():
            model(drawn(64, 6))
        assert f"{kind.name}/saved_share" not in attachment.metrics()
        return
    wanted, got = backward(plain, drawn(64, 6)), backward(model, drawn(64, 6))
    assert torch.equal(got[2]["0.weight"], wanted[2]["0.weight"])


def test_a_frozen_weight_keeps_no_input_and_stays_exact():
    model = filled(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)))
    model[0].weight.requires_grad_(False)
    attachment = attached(model, Int8Rows(layers=("0",)))
    backward(model, drawn(6, 6))
    assert "int8-rows/saved_share" not in attachment.metrics()


class InCheckpoint(nn.Module):
    def __init__(self, *, use_reentrant):
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.use_reentrant = use_reentrant

    def forward(self, inputs):
        return checkpoint(self.layer, inputs, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_inside_an_activation_checkpoint_are_refused(kind, use_reentrant):
    model = filled(InCheckpoint(use_reentrant=use_reentrant))
    attached(model, kind())
    with pytest.raises(RegradError, match="layer"):
        backward(model, drawn(64, 6))
    assert model.layer.weight.grad is None


@pytest.mark.parametrize("kind", ALL)
def test_a_compiled_model_is_refused(kind):
    model = torch.compile(filled(nn.Sequential(nn.Linear(6, 5))), backend="eager")
    with pytest.raises(RegradError, match="compiled model"):
        attached(model, kind())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("linear", "must find an nn.Linear"),
        (("0",), "got '0'; there: none"),
    ],
)
def test_a_model_without_such_layers_is_refused(layers, message):
    with pytest.raises(RegradError, match=message):
        attached(nn.Sequential(nn.Conv1d(2, 2, 1)), Int8Rows(layers=layers))


def test_an_empty_list_of_layers_is_refused():
    with pytest.raises(RegradError, match=r"got \(\)"):
        attached(nn.Sequential(nn.Linear(2, 2)), Int8Rows(layers=()))


def test_layers_are_chosen_by_names_and_patterns():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    for layers, wanted in (("1.*", {"1.0", "1.1"}), (("0", "1.1"), {"0", "1.1"}), ((0,), {"0"})):
        correction = Int8Rows(layers=layers)
        attached(model, correction).detach()
        assert set(correction._names.values()) == wanted


def test_layers_that_compute_something_else_are_left_out():
    class Masked(nn.Linear):
        def forward(self, inputs):
            return nn.functional.linear(inputs, self.weight * 2, self.bias)

    parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(6, 6), Masked(6, 6), parametrized)
    correction = Int8Rows()
    attached(model, correction)
    assert set(correction._names.values()) == {"0"}


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
@pytest.mark.parametrize("kind", SAMPLED)
def test_a_share_outside_of_its_range_is_refused(kind, share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        kind(share=share)


def test_a_seed_below_zero_is_refused():
    with pytest.raises(ValueError, match="seed must be at least 0"):
        WTACRS(seed=-1)


def test_two_of_them_are_refused_together():
    model = nn.Sequential(nn.Linear(6, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RegradError, match="saved inputs"):
        regrad.attach(model, optimizer, [Int8Rows(), UniformRows()])


def test_the_controls_are_the_simpler_rules():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert WTACRS(share=0.5).control(optimizer).corrections == ("uniform-rows:share=0.5",)
    assert UniformRows().control(optimizer).corrections == ("int8-rows",)
    assert Int8Rows().control(optimizer) is None
    assert WTACRS().control(optimizer).name == "uniform-rows"


def test_a_control_shortens_the_inputs_of_the_same_layers():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    wanted = UniformRows(share=0.5, layers=("head", "body.*"))
    control = WTACRS(share=0.5, layers=("head", "body.*")).control(optimizer)
    assert vars(regrad.create(control.name).options) == vars(wanted.options)
    control = wanted.control(optimizer)
    assert regrad.create(control.name).options.layers == ("head", "body.*")


def test_metrics_say_what_wta_crs_wins():
    model = filled(nn.Sequential(nn.Linear(6, 5)))
    attachment = attached(model, WTACRS())
    rows = drawn(64, 6)
    rows[4:] *= 1e-3
    backward(model, rows)
    seen = attachment.metrics()
    assert seen["wta-crs/certain_share"] == pytest.approx(4 / 19)
    assert seen["wta-crs/variance_ratio"] < 0.1
    model = filled(nn.Sequential(nn.Linear(6, 5)))
    attachment = attached(model, WTACRS())
    backward(model, nn.functional.normalize(drawn(64, 6)))
    seen = attachment.metrics()
    assert seen["wta-crs/certain_share"] < 0.1
    # With equal norms, drawing with replacement costs (M − 1)/(M − k) more or less.
    assert 1.3 < seen["wta-crs/variance_ratio"] < 1.5


def test_the_effect_meter_sees_the_inputs_in_the_steps_that_it_measures():
    model = filled(nn.Sequential(nn.Linear(6, 5)))
    attachment = attached(model, Int8Rows())
    backward(model, drawn(64, 6))
    measured = attachment.engine.meter.sums["int8-rows", "hidden"][1].clone()
    attachment.engine.applied = 33
    backward(model, drawn(64, 6))
    assert torch.equal(attachment.engine.meter.sums["int8-rows", "hidden"][1], measured)
    assert 0 < attachment.metrics()["int8-rows/hidden/relative_change"] < 0.01
