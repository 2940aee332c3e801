import copy
import io
import math

import pytest
import regrad
import torch
from regrad_gcode import GCODE
from torch import nn

loss_of = nn.functional.cross_entropy


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.05, **options)


def step_of(model, optimizer, inputs, target):
    optimizer.zero_grad()
    loss_of(model(inputs), target).backward()
    optimizer.step()


def train(model, batches, *corrections):
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, corrections) as attachment:
        for inputs, target in batches:
            step_of(model, optimizer, inputs, target)
        return [p.detach().clone() for p in model.parameters()], attachment.metrics()


def parts_of(model):
    return (
        nn.Sequential(model.stem, nn.Tanh()),
        model.layer1,
        model.layer2,
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head),
    )


CASES = [{}, {"norm": "keep"}, {"flow": "scale"}]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_every_gradient_is_that_of_the_reference(options, reference, make_network, make_batches):
    model, batches = make_network(), make_batches(4, size=2)
    optimizer = sgd(model)
    correction = GCODE(weight=0.5, warmup_steps=3, fit_every=2, **options)
    with regrad.attach(model, optimizer, [correction]):
        for index, (inputs, target) in enumerate(batches):
            optimizer.zero_grad()
            loss_of(model(inputs), target).backward()
            factor = reference.strength(0.5, 3, index)
            if factor:
                weights = [correction.state_dict()[name]["branch"] for name in ("layer1", "layer2")]
                branches = [(weights[0], 1, 1), (weights[1], 2, 1)]
                expected = reference.train_gradients(
                    parts_of(copy.deepcopy(model)),
                    lambda z, y=target: loss_of(z, y),
                    inputs,
                    branches,
                    factor,
                    **options,
                )
            else:
                expected = torch.autograd.grad(
                    loss_of(model(inputs), target), [*model.parameters()]
                )
            for parameter, wanted in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-12)
            optimizer.step()


def test_fits_are_adam_on_the_mean_square_between_branch_and_stage(make_network, make_batches):
    model, batches = make_network(), make_batches(9)
    optimizer, correction = sgd(model), GCODE(fit_every=3, learning_rate=0.01)
    twins, fits = {}, 0
    with regrad.attach(model, optimizer, [correction]):
        for index, (inputs, target) in enumerate(batches):
            optimizer.zero_grad()
            loss_of(model(inputs), target).backward()
            if not twins:
                branches = {
                    name: copy.deepcopy(pair.branch) for name, pair in correction._pairs.items()
                }
                twins = {
                    name: (b, torch.optim.Adam(b.parameters(), lr=0.01))
                    for name, b in branches.items()
                }
            if index % 3 == 2:
                fits += 1
                hidden = [torch.tanh(model.stem(inputs))]
                hidden += [model.layer1(hidden[0])]
                hidden += [model.layer2(hidden[1])]
                for before, after, (branch, adam) in zip(
                    hidden, hidden[1:], twins.values(), strict=False
                ):
                    branch.requires_grad_(True)
                    adam.zero_grad()
                    (branch(before.detach()) - after.detach()).square().mean().backward()
                    adam.step()
            optimizer.step()
            for name, (branch, _) in twins.items():
                for key, value in correction.state_dict()[name]["branch"].items():
                    torch.testing.assert_close(value, branch.state_dict()[key], rtol=0, atol=1e-13)
    assert fits == 3


def test_the_memory_format_does_not_matter(make_network, make_batches):
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        batches = [
            (inputs.contiguous(memory_format=memory_format), target)
            for inputs, target in make_batches(4)
        ]
        model = make_network().to(memory_format=memory_format)
        weights, _ = train(model, batches, GCODE(weight=0.5, warmup_steps=1, fit_every=1))
        found.append(weights)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_fits_make_the_branch_follow_its_stage(make_network, make_batches):
    model, batches = make_network(), make_batches(1) * 150
    losses = []
    for count in (2, 150):
        correction = GCODE(fit_every=1, learning_rate=0.01, weight=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with regrad.attach(model, optimizer, [correction]):
            for inputs, target in batches[:count]:
                step_of(model, optimizer, inputs, target)
            losses.append([correction.metrics()[f"fit_loss_layer{stage}"] for stage in (1, 2)])
    assert all(last < 0.4 * first for first, last in zip(*losses, strict=True))


class Normalised(nn.Module):
    """With batch normalisation, and a ReLU in place after every stage."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, 1, 1)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4))
        self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.layer3 = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.relu(self.layer1(self.relu(self.stem(x))))
        x = self.relu(self.layer3(self.relu(self.layer2(x))))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture
def make_normalised():
    def make(dtype=torch.float64):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Normalised().to(dtype)

    return make


def test_the_forward_keeps_every_bit_the_heads_gradient_too_and_the_stems_changes(
    make_normalised, make_batches
):
    model, batches = make_normalised(torch.float32), make_batches(6, dtype=torch.float32)
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [GCODE(weight=0.5, warmup_steps=1)]):
        for index, (inputs, target) in enumerate(batches):
            plain = copy.deepcopy(model)
            expected = plain(inputs)
            loss_of(expected, target).backward()
            optimizer.zero_grad()
            logits = model(inputs)
            loss_of(logits, target).backward()
            assert torch.equal(logits, expected)
            for name, buffer in plain.named_buffers():
                assert torch.equal(model.get_buffer(name), buffer)
            changed = {
                n: not torch.equal(p.grad, plain.get_parameter(n).grad)
                for n, p in model.named_parameters()
            }
            whole = {n: index > 0 and not n.startswith(("head", "layer3")) for n in changed}
            dead = (
                "layer1.0.bias",
                "layer2.0.bias",
            )  # batch normalisation leaves rounding errors of their gradients
            assert all(changed[n] == whole[n] for n in changed if n not in dead)
            optimizer.step()


def test_writing_in_place_behind_a_stage_gives_the_numbers_of_a_copy(make_normalised, make_batches):
    results = []
    for inplace in (True, False):
        model = make_normalised()
        model.relu.inplace = inplace
        results.append(
            train(model, make_batches(9), GCODE(weight=0.5, warmup_steps=2, fit_every=2))
        )
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one, other)
    assert results[0][1] == results[1][1]


class Viewed(nn.Module):
    """Stages end in a view; torch drops the hooks of a view that is written to."""

    def __init__(self, inplace):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3, 1, 1), nn.Linear(8, 3)
        self.layer1 = nn.Sequential(
            nn.Conv2d(4, 4, 3, 1, 1), nn.Unflatten(1, (4, 1)), nn.Flatten(1, 2)
        )
        self.layer2 = nn.Sequential(
            nn.Conv2d(4, 8, 3, 2, 1), nn.Unflatten(1, (8, 1)), nn.Flatten(1, 2)
        )
        self.relu = nn.ReLU(inplace)

    def forward(self, x):
        return self.head(
            self.relu(self.layer2(self.relu(self.layer1(self.stem(x))))).mean(dim=(2, 3))
        )


def test_a_view_written_in_place_behind_a_stage_is_refused(make_batches):
    inputs, target = make_batches(1, dtype=torch.float32)[0]
    for inplace in (False, True):
        model = Viewed(inplace)
        optimizer = sgd(model)
        with regrad.attach(model, optimizer, [GCODE(weight=0.5, warmup_steps=1)]) as attachment:
            step_of(model, optimizer, inputs, target)
            if inplace:
                with pytest.raises(
                    regrad.RegradError, match="'layer2' ends in a view that is written in place"
                ):
                    step_of(model, optimizer, inputs, target)
            else:
                step_of(model, optimizer, inputs, target)
                assert {"gcode/cosine_layer1", "gcode/cosine_layer2"} <= set(attachment.metrics())


def test_a_weight_of_zero_changes_no_bit(make_network, make_batches):
    batches = make_batches(9)
    corrected, _ = train(make_network(), batches, GCODE(weight=0.0, warmup_steps=1))
    plain, _ = train(make_network(), batches)
    assert all(torch.equal(a, b) for a, b in zip(corrected, plain, strict=True))


def test_the_weight_grows_from_zero_over_the_warm_up(make_network, make_batches):
    model, correction = make_network(), GCODE(weight=0.2, warmup_steps=4)
    optimizer, seen = sgd(model), []
    with regrad.attach(model, optimizer, [correction]):
        for inputs, target in make_batches(7):
            seen.append(correction._strength())
            step_of(model, optimizer, inputs, target)
    assert seen == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2], rel=1e-15)


def test_norm_keep_keeps_the_norm_of_every_sample(make_network, make_batches):
    model, (inputs, target) = make_network(), make_batches(1)[0]
    optimizer, norms = sgd(model), {}

    def remember(module, arguments, output):
        output.register_hook(lambda g: norms.setdefault("stem", []).append(g))

    for norm in ("keep", "free"):
        twin = copy.deepcopy(model)
        optimizer = sgd(twin)
        with regrad.attach(
            twin, optimizer, [GCODE(weight=0.5, warmup_steps=1, norm=norm)]
        ) as attachment:
            step_of(twin, optimizer, inputs, target)
            step_of(twin, optimizer, inputs, target)
            norms[norm] = attachment.metrics()["gcode/norm_ratio_layer1"]
    assert norms["keep"] == pytest.approx(1.0, rel=1e-5)
    assert abs(norms["free"] - 1) > 1e-3


def test_the_models_state_has_no_new_key_and_the_task_never_trains_the_branch(
    make_network, make_batches
):
    model, keys = make_network(), set(make_network().state_dict())
    optimizer, correction = sgd(model), GCODE(weight=0.5, warmup_steps=1, fit_every=100)
    states = []
    with regrad.attach(model, optimizer, [correction]):
        for inputs, target in make_batches(5):
            step_of(model, optimizer, inputs, target)
            states.append(correction.state_dict())
        branches = [p for pair in correction._pairs.values() for p in pair.branch.parameters()]
    assert set(model.state_dict()) == keys
    assert {id(p) for p in branches}.isdisjoint(map(id, model.parameters()))
    assert all(p.grad is None for p in branches)
    for name, kept in states[0].items():
        assert all(
            torch.equal(value, states[-1][name]["branch"][key])
            for key, value in kept["branch"].items()
        )


def test_a_fit_leaves_the_network_alone(make_network, make_batches):
    batches = make_batches(6)
    fitted, metrics = train(make_network(), batches, GCODE(weight=0.0, fit_every=1))
    plain, _ = train(make_network(), batches)
    assert all(torch.equal(a, b) for a, b in zip(fitted, plain, strict=True))
    assert metrics["gcode/fit_loss_layer1"] > 0


def test_evaluation_and_no_grad_do_nothing(make_network, make_batches):
    model, batches = make_network(), make_batches(6)
    optimizer, correction = sgd(model), GCODE(fit_every=1)
    with regrad.attach(model, optimizer, [correction]):
        with torch.no_grad():
            model(batches[0][0])
        model.eval()
        model(batches[0][0]).sum().backward()
        assert correction.state_dict() == {}
        model.train()
        step_of(model, optimizer, *batches[1])
        step_of(model, optimizer, *batches[2])
        passages = [pair.passages for pair in correction._pairs.values()]
        model.eval()
        gradients = torch.autograd.grad(model(batches[3][0]).sum(), [*model.parameters()])
        with torch.no_grad():
            model.train()(batches[3][0])
        assert [pair.passages for pair in correction._pairs.values()] == passages
    expected = torch.autograd.grad(model(batches[3][0]).sum(), [*model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_detach_removes_everything_even_from_a_graph_that_waits(make_network, make_batches):
    model, batches = make_network(), make_batches(3)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    optimizer = sgd(model)
    attachment = regrad.attach(model, optimizer, [GCODE(weight=0.5, warmup_steps=1)])
    step_of(model, optimizer, *batches[0])
    waiting = loss_of(model(batches[1][0]), batches[1][1])
    attachment.detach()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    gradients = torch.autograd.grad(waiting, [*model.parameters()])
    expected = torch.autograd.grad(
        loss_of(model(batches[1][0]), batches[1][1]), [*model.parameters()]
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_a_correction_attached_again_goes_on_with_its_branches(make_network, make_batches):
    model, correction, batches = make_network(), GCODE(fit_every=1), make_batches(4)
    optimizer = sgd(model)
    for part in (batches[:2], batches[2:]):
        with regrad.attach(model, optimizer, [correction]):
            for inputs, target in part:
                step_of(model, optimizer, inputs, target)
    assert {int(kept["adam"]["state"][0]["step"]) for kept in correction.state_dict().values()} == {
        2
    }  # the first step after an attach does not fit


@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_a_resumed_run_is_the_same_bit_for_bit(at, make_network, make_batches):
    batches, options = make_batches(9), {"weight": 0.5, "warmup_steps": 2, "fit_every": 2}
    whole, _ = train(make_network(), batches, GCODE(**options))
    model = make_network()
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [GCODE(**options)]) as attachment:
        for inputs, target in batches[:at]:
            step_of(model, optimizer, inputs, target)
        saved = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), attachment.state_dict()], saved)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    model = make_network(seed=5)
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [GCODE(**options)]) as attachment:
        for target, state in zip((model, optimizer, attachment), states, strict=True):
            target.load_state_dict(state)
        for inputs, target in batches[at:]:
            step_of(model, optimizer, inputs, target)
    assert all(torch.equal(a, b) for a, b in zip(whole, model.parameters(), strict=True))


def test_a_state_that_came_before_the_branches_is_kept_for_them(make_network, make_batches):
    model, first, batches = make_network(), GCODE(fit_every=1), make_batches(3)
    train(model, batches, first)
    state = first.state_dict()
    second = GCODE(fit_every=1000, seed=9)
    second.load_state_dict(state)
    assert set(second.state_dict()) == {"layer1", "layer2"}
    train(model, batches, second)
    for name, kept in state.items():
        for key, value in kept["branch"].items():
            assert torch.equal(second.state_dict()[name]["branch"][key], value)


def test_a_state_of_other_stages_is_refused(make_network, make_batches):
    model, correction = make_network(), GCODE()
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [correction]):
        step_of(model, optimizer, *make_batches(1)[0])
        state = correction.state_dict()
        state["layer9"] = state.pop("layer2")
        with pytest.raises(
            regrad.RegradError,
            match="state must be for the stages layer1, layer2, got layer1, layer9",
        ):
            correction.load_state_dict(state)


def test_no_global_random_number_is_drawn_and_the_seed_alone_fixes_the_branches(
    make_network, make_batches
):
    states = []
    for seed, outside in ((0, 1), (0, 2), (7, 1)):
        with torch.random.fork_rng():
            torch.manual_seed(outside)
            correction, before = GCODE(seed=seed), torch.get_rng_state()
            train(make_network(), make_batches(2), correction)
            assert torch.equal(torch.get_rng_state(), before)
        states.append(correction.state_dict()["layer2"]["branch"]["project.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_meter_sees_the_effect_and_metrics_tell_coherence_per_pair(make_network, make_batches):
    model, (inputs, target) = make_network(), make_batches(1)[0]
    optimizer, correction = sgd(model, momentum=0.0), GCODE(weight=0.5, warmup_steps=1)
    seen = {}
    with regrad.attach(model, optimizer, [correction]) as attachment:
        step_of(model, optimizer, inputs, target)
        assert "gcode/hidden/relative_change" not in attachment.metrics()
        optimizer.zero_grad()
        logits = model(inputs)
        loss_of(logits, target).backward()
        before, after = (correction._pairs["layer1"].witnessed[side].flatten() for side in (0, 1))
        seen["cosine"] = nn.functional.cosine_similarity(before, after, dim=0).item()
        seen["norm_ratio"] = (after.norm() / before.norm()).item()
        optimizer.step()
        metrics = attachment.metrics()
    for key, value in seen.items():
        assert metrics[f"gcode/{key}_layer1"] == pytest.approx(value, rel=1e-6)
    assert metrics["gcode/hidden/relative_change"] > 0
    assert metrics["gcode/hidden/share_touched"] == 1
    assert 0 < metrics["gcode/cosine_layer2"] < 1


def test_the_receipt_names_the_stages(make_network, make_batches):
    model = make_network()
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [GCODE()]) as attachment:
        step_of(model, optimizer, *make_batches(1)[0])
        assert "'gcode' sees the stages layer1, layer2" in attachment.receipt()["notes"]


def test_explain_shows_each_pair_and_changes_nothing(make_network, make_batches):
    model, batches = make_network(), make_batches(4)
    optimizer = sgd(model)
    with regrad.attach(
        model, optimizer, [GCODE(weight=0.5, warmup_steps=2)], nn.CrossEntropyLoss()
    ) as attachment:
        for inputs, target in batches[:3]:
            step_of(model, optimizer, inputs, target)
        before = attachment.state_dict()["corrections"]["gcode"]
        rows = attachment.explain(batches[3]).rows
        after = attachment.state_dict()["corrections"]["gcode"]
    assert {row["tensor"] for row in rows if row["relative_change"] > 0} == {"layer1", "layer2"}
    for name, kept in before.items():
        assert all(
            torch.equal(value, after[name]["branch"][key]) for key, value in kept["branch"].items()
        )


def test_the_control_scales_the_same_layers_by_the_same_options():
    made = GCODE(weight=0.25, stages=("a.0", 3), adjoint=True, learning_rate=1e-5)
    control = made.control(None)
    assert control.name == "scaled-flow"
    (spec,) = control.corrections
    again = regrad.create(spec)
    assert vars(again.options) == {**vars(made.options), "flow": "scale"}
    assert again.control(None) is None
    assert GCODE().control(None).corrections == ("gcode:flow=scale",)
    assert GCODE(norm="keep").control(None) is None


def test_the_control_keeps_directions_and_takes_the_branchs_norms(make_network, make_batches):
    model, (inputs, target), ratios = make_network(), make_batches(1)[0], {}
    for flow in ("branch", "scale"):
        twin = copy.deepcopy(model)
        optimizer, correction = (
            torch.optim.SGD(twin.parameters(), lr=0.0),
            GCODE(weight=0.5, warmup_steps=1, flow=flow),
        )
        with regrad.attach(twin, optimizer, [correction]):
            step_of(twin, optimizer, inputs, target)
            optimizer.zero_grad()
            loss_of(twin(inputs), target).backward()
            before, after = correction._pairs["layer2"].witnessed
            ratios[flow] = after.flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
            if flow == "scale":
                cosines = nn.functional.cosine_similarity(before.flatten(1), after.flatten(1))
                torch.testing.assert_close(cosines, torch.ones_like(cosines))
    torch.testing.assert_close(ratios["branch"], ratios["scale"], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, "weight must be at least 0 and finite, got -0.1"),
        ({"weight": math.inf}, "weight must be at least 0 and finite, got inf"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1, got 0"),
        ({"fit_every": 0}, "fit_every must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"norm": "keep", "flow": "scale"}, "norm must be 'free' with flow='scale', the control"),
        ({"stages": ("a",)}, r"stages must be two or more different names, got \('a',\)"),
        ({"stages": ("a", "a")}, r"stages must be two or more different names, got \('a', 'a'\)"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GCODE(**options)


def test_an_unknown_solver_or_flow_is_refused():
    with pytest.raises(TypeError, match=r"solver must be .*'midpoint', .*got 'scipy'"):
        GCODE(solver="scipy")
    with pytest.raises(TypeError, match=r"flow must be .*'branch', 'scale'.*got 'none'"):
        GCODE(flow="none")


def test_a_model_without_stages_is_refused_at_its_first_training_forward_and_not_before():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 3)).double()
    with regrad.attach(model, sgd(model), ["gcode"]):
        with pytest.raises(regrad.RegradError, match="'gcode' must find two stages or more"):
            model(torch.ones(2, 2, 6, 6, dtype=torch.float64))
        assert model[1].weight.grad is None


def test_a_compiled_model_is_refused(make_network):
    model = make_network()
    with pytest.raises(
        regrad.RegradError, match="'gcode' must see the stages of a model that is not compiled"
    ):
        regrad.attach(torch.compile(model, backend="eager"), sgd(model), [GCODE()])


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own compiler
def test_a_model_compiled_after_attach_gives_the_same_numbers(make_network, make_batches):
    batches, options = make_batches(5), {"weight": 0.5, "warmup_steps": 1}
    plain, _ = train(make_network(), batches, GCODE(**options))
    model = make_network()
    optimizer = sgd(model)
    with regrad.attach(model, optimizer, [GCODE(**options)]):
        compiled = torch.compile(model, backend="eager")
        for inputs, target in batches:
            step_of(compiled, optimizer, inputs, target)
    assert all(torch.equal(a, b) for a, b in zip(plain, model.parameters(), strict=True))
