"""The corrections' state in the optimizer's state_dict: saved and loaded by scripts that know nothing of it."""

import copy
import io
import pickle
import warnings
import zipfile

import pytest
import regrad
import torch
from regrad import RegradError, RegradWarning, optimizer_state
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

STEPS, STOP = 8, 5
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "groups": lambda p: torch.optim.Adam([{"params": [q]} for q in p], lr=0.02),
}
WITHOUT = r"loaded without the state of 'lag'"


@pytest.fixture(scope="module")
def lag(toys):
    """A correction of all three kinds of state: tensors, numbers, and the weights that it predicts."""

    class Lag(toys.Shift):
        """Move weights along, and mix gradients with, the gradient of the step before."""

        name = "lag"
        needs = regrad.correction.Needs(
            stages=("weights", "gradient"), layouts=("plain", "ddp", "fsdp2")
        )

        def __init__(self, **options):
            super().__init__(**options)
            self.last = {}
            self.steps = 0

        def predict_weights(self, step):
            if not self.last:
                return None
            return [self.options.amount * self.last[name] / self.steps for name in step.names]

        def correct_gradients(self, step):
            self.steps += 1
            for name, gradient in zip(step.names, step.gradients, strict=True):
                before = self.last.get(name)
                self.last[name] = gradient.clone()
                if before is not None:
                    gradient.add_(before, alpha=0.3)

        def state_dict(self):
            if not self.last:
                return {}
            return {"last": {n: t.clone() for n, t in self.last.items()}, "steps": self.steps}

        def load_state_dict(self, state):
            self.last = {name: tensor.clone() for name, tensor in state.get("last", {}).items()}
            self.steps = state.get("steps", 0)

    return Lag


class Run:
    """A model, its optimizer, and an attachment that the saving and loading script does not know."""

    def __init__(self, toys, corrections, make="momentum", *, seed=0):
        self.toys = toys
        self.model = toys.Net(seed=seed)
        self.optimizer = OPTIMIZERS[make](list(self.model.parameters()))
        self.attachment = regrad.attach(self.model, self.optimizer, corrections)

    def steps(self, first, last):
        for index in range(first, last):
            self.toys.train_step(self.model, self.optimizer, seed=index)
        return self

    def weights(self):
        return self.toys.weights_of(self.model)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved(run):
    return through_a_file(
        {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    )


def load(run, state):
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    return run


def by_torch(first, again, _):
    load(again, saved(first))


def by_torch_optimizer_first(first, again, _):
    state = saved(first)
    again.optimizer.load_state_dict(state["optimizer"])
    again.model.load_state_dict(state["model"])


def in_memory(first, again, _):
    states = copy.deepcopy(get_state_dict(first.model, first.optimizer))
    set_state_dict(
        again.model, again.optimizer, model_state_dict=states[0], optim_state_dict=states[1]
    )


def in_memory_whole(first, again, _):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = copy.deepcopy(get_state_dict(first.model, first.optimizer, options=options))
    set_state_dict(
        again.model,
        again.optimizer,
        model_state_dict=states[0],
        optim_state_dict=states[1],
        options=options,
    )


def by_files(first, again, folder):
    model, optimizer = get_state_dict(first.model, first.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    model, optimizer = get_state_dict(again.model, again.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        again.model,
        again.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


QUIET = [  # what torch says of a checkpoint of one process, and of its own files
    "ignore:torch.distributed is disabled, unavailable or uninitialized",
    "ignore:.*TypedStorage is deprecated",
    "ignore:Please use DTensor instead",
]
quiet = pytest.mark.filterwarnings(*QUIET)


@quiet
@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize(
    "route", [by_torch, by_torch_optimizer_first, in_memory, in_memory_whole, by_files]
)
def test_model_and_optimizer_alone_resume_to_the_same_bits(
    toys, same_bits, lag, tmp_path, route, make
):
    if (route, make) == (in_memory_whole, "sgd"):
        pytest.skip("torch cannot load a whole optimizer state without a tensor")
    first = Run(toys, [lag(amount=0.05), toys.Tally()], make).steps(0, STOP)
    again = Run(toys, [lag(amount=0.05), toys.Tally()], make, seed=7)
    route(first, again, tmp_path)
    then = again.attachment.state_dict()["corrections"]
    assert same_bits(then, first.attachment.state_dict()["corrections"])
    assert again.attachment.metrics()["steps_applied"] == STOP
    first.steps(STOP, STEPS)
    again.steps(STOP, STEPS)
    assert same_bits(again.weights(), first.weights())
    assert again.attachment.metrics() == first.attachment.metrics()
    unlike = Run(toys, [lag(amount=0.05)], make).steps(0, STOP)
    unlike.attachment.corrections[0].load_state_dict({})
    assert not same_bits(unlike.steps(STOP, STEPS).weights(), first.weights())


@quiet
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_step_by_which_torch_makes_state_is_none_of_the_training(toys, same_bits, lag, make):
    asked, plain = (Run(toys, [lag(amount=0.05), toys.Spy()], make) for _ in range(2))
    for index in range(STOP):
        get_state_dict(asked.model, asked.optimizer)
        asked.optimizer.zero_grad()
        get_optimizer_state_dict(asked.model, asked.optimizer)
        asked.steps(index, index + 1)
        plain.steps(index, index + 1)
    assert asked.attachment.metrics()["steps_applied"] == STOP
    assert asked.attachment.corrections[1].indices == list(range(STOP))
    if "sgd" in str(type(asked.optimizer)).lower():  # torch counts its own step in other states
        assert asked.attachment.metrics() == plain.attachment.metrics()
        assert same_bits(asked.weights(), plain.weights())


@quiet
def test_the_step_by_which_torch_makes_state_restores_the_weights_that_are_moved(
    toys, same_bits, lag
):
    run = Run(toys, [lag(amount=0.05)], "sgd").steps(0, 2)
    run.optimizer.zero_grad()
    true = run.weights()
    toys.loss_of(run.model)
    assert not same_bits(run.weights(), true)
    get_optimizer_state_dict(run.model, run.optimizer)
    assert same_bits(run.weights(), true)


def test_a_first_step_of_rate_zero_with_gradients_counts(toys):
    class Parts(torch.nn.Module):
        """Its own forward is never called: the first step sees no forward."""

        def __init__(self):
            super().__init__()
            self.net = toys.Net()

        def forward(self, x):
            raise AssertionError

    model = Parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    spy = toys.Spy()
    attachment = regrad.attach(model, optimizer, [spy])
    for seed in range(3):
        toys.train_step(model.net, optimizer, seed=seed)
        schedule.step()
    assert spy.indices == [0, 1, 2]
    assert attachment.metrics()["steps_applied"] == 3


@quiet
def test_a_flattened_optimizer_state_carries_nothing_and_is_warned_about_once(toys, lag):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    first = Run(toys, [lag()]).steps(0, STOP)
    state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer, options=options))
    again = Run(toys, [lag()])
    set_optimizer_state_dict(again.model, again.optimizer, state, options=options)
    with pytest.warns(RegradWarning, match=WITHOUT) as caught:
        again.steps(STOP, STEPS)
    assert len(caught) == 1


@quiet
def test_a_checkpoint_in_files_without_the_state_is_an_error_of_torch_or_a_warning_of_ours(
    toys, lag, tmp_path
):
    first = Run(toys, []).steps(0, STOP)
    dcp.save(
        {"optimizer": get_optimizer_state_dict(first.model, first.optimizer)},
        checkpoint_id=tmp_path,
    )
    again = Run(toys, [lag()])
    state = {"optimizer": get_optimizer_state_dict(again.model, again.optimizer)}
    with pytest.raises(dcp.api.CheckpointException, match=r"optimizer.param_groups.*regrad"):
        dcp.load(state, checkpoint_id=tmp_path)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=tmp_path, planner=planner)
    set_optimizer_state_dict(again.model, again.optimizer, state["optimizer"])
    with pytest.warns(RegradWarning, match=WITHOUT):
        again.steps(STOP, STEPS)


# ---- at any moment


def test_a_state_saved_inside_the_window_is_that_of_the_true_weights(toys, same_bits, lag):
    first = Run(toys, [lag(amount=0.05)]).steps(0, STOP)
    true = first.weights()
    toys.loss_of(first.model, seed=99)
    assert not same_bits(first.weights(), true)
    state = saved(first)
    assert same_bits(state["model"], true)
    again = load(Run(toys, [lag(amount=0.05)]), state)
    again.steps(STOP, STEPS)
    first.steps(STOP, STEPS)
    assert same_bits(again.weights(), first.weights())


@quiet
def test_a_state_without_moments_saved_inside_the_window_is_known_again(toys, same_bits, lag):
    first = Run(toys, [lag(amount=0.05)], "sgd").steps(0, STOP)
    true = first.weights()
    toys.loss_of(first.model, seed=99).backward()
    states = copy.deepcopy(get_state_dict(first.model, first.optimizer))
    assert same_bits(dict(states[0]), true)
    first.optimizer.zero_grad()
    again = Run(toys, [lag(amount=0.05)], "sgd")
    set_state_dict(
        again.model, again.optimizer, model_state_dict=states[0], optim_state_dict=states[1]
    )
    assert again.attachment.metrics()["steps_applied"] == STOP


def test_a_state_saved_in_the_middle_of_an_accumulation_resumes_from_its_beginning(
    toys, same_bits, lag
):
    def micro_batch(run, seed):
        (toys.loss_of(run.model, seed=seed) / 2).backward()

    def accumulated(run, first, last):
        for seed in range(first, last):
            run.optimizer.zero_grad()
            micro_batch(run, 10 + seed)
            micro_batch(run, 20 + seed)
            run.optimizer.step()

    first, again = (Run(toys, [lag(amount=0.05), toys.Tally()]) for _ in range(2))
    accumulated(first, 0, STOP)
    first.optimizer.zero_grad()
    micro_batch(first, 10 + STOP)
    state = saved(first)
    micro_batch(first, 20 + STOP)
    first.optimizer.step()
    accumulated(first, STOP + 1, STEPS)
    load(again, state)
    accumulated(again, STOP, STEPS)
    assert same_bits(again.weights(), first.weights())


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_saved_after_skipped_steps_resumes_to_the_same_bits(toys, same_bits, lag, fused):
    def make():
        model = toys.Net(dtype=torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02, fused=fused)
        attachment = regrad.attach(model, optimizer, [lag(amount=0.05)])
        return model, optimizer, attachment, torch.amp.GradScaler("cpu", init_scale=4.0)

    def steps(run, first, last):
        model, optimizer, _, scaler = run
        for seed in range(first, last):
            optimizer.zero_grad()
            scaler.scale(toys.loss_of(model, seed=seed)).backward()
            if seed in (1, STOP - 1, STOP + 1):
                model.head.weight.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()

    first, again = make(), make()
    steps(first, 0, STOP)
    state = through_a_file([part.state_dict() for part in (first[0], first[1], first[3])])
    steps(first, STOP, STEPS)
    for part, loaded in zip((again[0], again[1], again[3]), state, strict=True):
        part.load_state_dict(loaded)
    steps(again, STOP, STEPS)
    assert same_bits(toys.weights_of(again[0]), toys.weights_of(first[0]))
    assert again[2].metrics()["steps_skipped"] == first[2].metrics()["steps_skipped"]
    assert again[2].metrics()["steps_applied"] == STEPS - 3


# ---- loaded before attach


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_an_optimizer_that_is_loaded_before_attach_resumes_to_the_same_bits(
    toys, same_bits, lag, make
):
    first = Run(toys, [lag(amount=0.05)], make).steps(0, STOP)
    state = saved(first)
    first.steps(STOP, STEPS)
    model = toys.Net(seed=7)
    optimizer = OPTIMIZERS[make](list(model.parameters()))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    attachment = regrad.attach(model, optimizer, [lag(amount=0.05)])
    assert attachment.metrics()["steps_applied"] == STOP
    assert "regrad" not in optimizer.param_groups[0]
    for seed in range(STOP, STEPS):
        toys.train_step(model, optimizer, seed=seed)
    assert same_bits(toys.weights_of(model), first.weights())


def test_an_optimizer_that_carries_another_state_is_refused_at_attach_and_nothing_changed(
    toys, lag, hooks_on
):
    state = saved(Run(toys, [lag(amount=0.05)]).steps(0, STOP))
    model = toys.Net()
    optimizer = toys.sgd(model)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    before = hooks_on(model, optimizer)
    with pytest.raises(RegradError, match=r"lag.amount was 0.05, is 0.5;.*param_groups\[0\]"):
        regrad.attach(model, optimizer, [lag()])
    assert hooks_on(model, optimizer) == before
    optimizer_state.take_out(optimizer.param_groups)
    attachment = regrad.attach(model, optimizer, [lag()])
    assert attachment.metrics()["steps_applied"] == 0


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("attach_first", [True, False])
def test_a_state_that_a_training_without_regrad_carried_along_is_out_of_date(
    toys, lag, make, attach_first
):
    state = saved(Run(toys, [lag()], make).steps(0, STOP))
    bare = load(Run(toys, [], make), state_without_key(state)).steps(STOP, STEPS)
    state = saved(bare)
    state["optimizer"]["param_groups"][0].setdefault("regrad", packed_in(bare, toys, lag, make))
    model = toys.Net(seed=7)
    optimizer = OPTIMIZERS[make](list(model.parameters()))
    run = None if not attach_first else regrad.attach(model, optimizer, [lag()])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    run = run or regrad.attach(model, optimizer, [lag()])
    with pytest.warns(RegradWarning, match=WITHOUT):
        toys.train_step(model, optimizer)
    assert run.metrics()["steps_applied"] == 1
    assert "regrad" not in optimizer.param_groups[0]


def state_without_key(state):
    optimizer = {key: value for key, value in state["optimizer"].items() if key != "regrad"}
    groups = copy.deepcopy(optimizer["param_groups"])
    optimizer_state.take_out(groups)
    return {"model": state["model"], "optimizer": {**optimizer, "param_groups": groups}}


def packed_in(bare, toys, lag, make):
    """Return the packed copy of another moment of the training."""
    state = Run(toys, [lag()], make).steps(0, STOP).optimizer.state_dict()
    return state["param_groups"][0]["regrad"]


# ---- what does not fit


def test_a_state_without_the_corrections_is_warned_about_once_where_there_is_something_to_lose(
    toys, lag
):
    state = saved(Run(toys, []).steps(0, STOP))
    assert "regrad" not in state["optimizer"]
    run = load(Run(toys, [lag(), toys.Scale()]), state)
    with pytest.warns(RegradWarning, match=WITHOUT) as caught:
        run.steps(STOP, STEPS)
    assert len(caught) == 1
    stateless = load(Run(toys, [toys.Scale()]), state)
    stateless.steps(STOP, STEPS)  # a warning would be an error


def test_a_state_that_came_beside_the_optimizers_is_no_missing_one(toys, same_bits, lag):
    first = Run(toys, [lag(amount=0.05)]).steps(0, STOP)
    own, state = first.attachment.state_dict(), state_without_key(saved(first))
    again = load(Run(toys, [lag(amount=0.05)]), state)
    again.attachment.load_state_dict(through_a_file(own))
    again.steps(STOP, STEPS)
    assert same_bits(again.weights(), first.steps(STOP, STEPS).weights())


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (lambda toys, lag: [lag(amount=0.1)], "lag.amount was 0.5, is 0.1"),
        (lambda toys, lag: [toys.Tally()], "'lag' is missing here; 'tally' is new here"),
        (lambda toys, lag: [lag(), toys.Tally()], "'tally' is new here"),
        (lambda toys, lag: [], "'lag' is missing here"),
    ],
)
def test_another_state_is_refused_before_the_optimizer_changed(toys, same_bits, lag, others, words):
    state = saved(Run(toys, [lag()]).steps(0, STOP))
    run = Run(toys, others(toys, lag)).steps(0, 2)
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(RegradError, match=f"{words}.*remove the key 'regrad'"):
        run.optimizer.load_state_dict(state["optimizer"])
    assert same_bits(copy.deepcopy(run.optimizer.state_dict()), before)


GARBAGE = [
    3,
    "words",
    [],
    {},
    {"corrections": {}},
    {"corrections": [], "effects": {}, "receipt": {}},
    {"corrections": {}, "effects": {}, "receipt": {}},
    {"corrections": {}, "effects": {}, "receipt": {"corrections": [1], "steps_applied": 1}},
    {
        "corrections": {},
        "effects": {},
        "receipt": {"corrections": [{"name": 1}], "steps_applied": 1, "steps_skipped": 0},
    },
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_under_the_key_is_refused_in_words(toys, same_bits, lag, garbage):
    run = Run(toys, [lag()]).steps(0, STOP)
    before = copy.deepcopy(run.optimizer.state_dict())
    state = {**copy.deepcopy(before), "regrad": garbage}
    with pytest.raises(RegradError, match=r"must hold what regrad saved there, got .*; remove it"):
        run.optimizer.load_state_dict(state)
    assert same_bits(copy.deepcopy(run.optimizer.state_dict()), before)
    with pytest.raises(ValueError, match=r"must be what Attachment.state_dict\(\) returned, got "):
        run.attachment.load_state_dict(garbage)


@pytest.mark.parametrize("garbage", [b"", b"words", 3, None, "pickled"])
def test_a_damaged_packed_copy_is_refused_in_words(toys, lag, garbage):
    run = Run(toys, [lag()]).steps(0, STOP)
    state = run.optimizer.state_dict()
    del state["regrad"]
    group = state["param_groups"][0]
    packed = group["regrad"]
    group["regrad"] = (
        pickle.dumps({"mark": [], "own": zipfile.ZipFile}, 2) if garbage == "pickled" else garbage
    )
    if garbage is None:
        group["regrad"] = packed[: len(packed) // 2]
    with pytest.raises(RegradError, match="must hold what regrad saved there, got a damaged"):
        run.optimizer.load_state_dict(state)


def test_a_state_of_a_correction_that_is_damaged_names_the_correction(toys, lag):
    run = Run(toys, [lag()]).steps(0, STOP)
    state = copy.deepcopy(run.optimizer.state_dict())
    state["regrad"]["corrections"]["lag"] = {"last": 3}
    with pytest.raises(RegradError, match="state of correction 'lag' must be what its state_dict"):
        run.optimizer.load_state_dict(state)


# ---- where regrad is missing


@quiet
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_checkpoint_with_the_state_loads_where_nothing_is_attached(toys, same_bits, lag, make):
    first = Run(toys, [lag()], make).steps(0, STOP)
    state = saved(first)
    model = toys.Net()
    optimizer = OPTIMIZERS[make](list(model.parameters()))
    optimizer.load_state_dict(state["optimizer"])
    assert same_bits(optimizer.state_dict()["state"], state["optimizer"]["state"])
    toys.train_step(model, optimizer)
    states = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer))
    set_optimizer_state_dict(model, optimizer, states)
    toys.train_step(model, optimizer)


def test_a_saved_optimizer_is_read_without_regrad(toys, lag, tmp_path, python):
    run = Run(toys, [lag(), toys.Tally()]).steps(0, STOP)
    torch.save(run.optimizer.state_dict(), tmp_path / "optimizer.pt")
    printed = python(
        "import sys; sys.modules['regrad'] = None\n"
        "import torch\n"
        f"state = torch.load({str(tmp_path / 'optimizer.pt')!r}, weights_only=True)\n"
        "print(sorted(state['regrad']['corrections']))\n"
        f"torch.load({str(tmp_path / 'optimizer.pt')!r}, weights_only=False)"
    )
    assert printed == "['lag', 'tally']\n"


def test_after_detach_the_optimizer_saves_what_torch_saves(toys, lag):
    run = Run(toys, [lag()]).steps(0, STOP)
    run.attachment.detach()
    state = run.optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    assert not any("regrad" in str(key) for group in state["param_groups"] for key in group)


def test_copies_and_pickles_of_the_optimizer_hold_no_hook(toys, lag):
    run = Run(toys, [lag()]).steps(0, 2)
    for other in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        assert other.state_dict().keys() == {"state", "param_groups"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(other.state_dict())
