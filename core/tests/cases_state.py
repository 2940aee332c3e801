"""The state in the optimizer's state_dict, on two processes; see `test_processes.py`."""

import copy
import itertools
import tempfile
import warnings

import regrad
import toys
from regrad import RegradError
from shared_cases import WORLD, close, full_weights, raises
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Adam

STEPS, STOP, BATCH = 6, 3, 32


class Momentum(toys.Push):
    """Mix every gradient with the one before: each process keeps its part of the shards."""

    name = "mix"
    needs = regrad.correction.Needs(
        stages=("weights", "gradient"), layouts=("plain", "ddp", "fsdp2")
    )

    def __init__(self, **options):
        super().__init__(**options)
        self.last = {}

    def correct_gradients(self, step):
        for name, gradient in zip(step.names, step.gradients, strict=True):
            part = toys.local(gradient)
            before = self.last.get(name)
            self.last[name] = part.clone()
            if before is not None:
                part.add_(before, alpha=0.3)

    def state_dict(self):
        return {name: tensor.clone() for name, tensor in self.last.items()}

    def load_state_dict(self, state):
        self.last = {name: tensor.clone() for name, tensor in state.items()}


OPTIMIZERS = {
    "plain": lambda model: SGD(model.parameters(), lr=0.1),
    "momentum": toys.sgd,
    "adam": lambda model: Adam(model.parameters(), lr=0.02),
}


def made(layout, kind, *, amount=0.02, seed=0):
    model = toys.Net(seed=seed)
    if layout == "fsdp2":
        for part in (model.body, model.norm, model.head, model):  # shards without elements too
            fully_shard(part)
    elif layout == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = OPTIMIZERS[kind](model)
    return model, optimizer, regrad.attach(model, optimizer, [Momentum(amount=amount)])


def steps(run, rank, first, last):
    model, optimizer, _ = run
    for seed in range(first, last):
        inputs, labels = (t.chunk(WORLD)[rank] for t in toys.batch(BATCH, seed=seed))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def by_torch(first, again, folder):
    """Each process has a file of its own, as a script without checkpoint library does it."""
    states = copy.deepcopy([part.state_dict() for part in first[:2]])
    for part, state in zip(again[:2], states, strict=True):
        part.load_state_dict(state)


def in_memory(first, again, folder):
    states = copy.deepcopy(get_state_dict(*first[:2]))
    set_state_dict(*again[:2], model_state_dict=states[0], optim_state_dict=states[1])


def by_files(first, again, folder):
    dcp.save(dict(zip("mo", get_state_dict(*first[:2]), strict=True)), checkpoint_id=folder)
    state = dict(zip("mo", get_state_dict(*again[:2]), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(*again[:2], model_state_dict=state["m"], optim_state_dict=state["o"])


def shared_folder():
    folder = [tempfile.mkdtemp() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(folder)
    return folder[0]


def resumes(rank, layout, route, kind):
    first = made(layout, kind)
    steps(first, rank, 0, STOP)
    again = made(layout, kind, seed=7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # its own, of its own checkpoints
        route(first, again, shared_folder())
    assert again[2].metrics()["steps_applied"] == STOP
    for run in (first, again):
        steps(run, rank, STOP, STEPS)
    close(full_weights(again[0]), full_weights(first[0]), tolerance=0)
    assert again[2].metrics() == first[2].metrics()


def case_the_optimizer_alone_resumes_under_ddp(rank):
    for route in (by_torch, in_memory, by_files):
        for kind in OPTIMIZERS:
            resumes(rank, "ddp", route, kind)


def case_the_optimizer_alone_resumes_under_fsdp2(rank):
    for route in (by_torch, in_memory, by_files):
        for kind in OPTIMIZERS:
            resumes(rank, "fsdp2", route, kind)


def whole_state(run):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return copy.deepcopy(get_state_dict(*run[:2], options=options))


def load_whole(run, states, *, broadcast):
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_model_state_dict(run[0], states[0], options=options)
    set_optimizer_state_dict(*run[:2], states[1], options=options)


def case_a_whole_state_starts_the_corrections_anew_on_every_process(rank):
    for layout, kind, broadcast in itertools.product(
        ("fsdp2", "ddp"), ("momentum", "adam"), (True, False)
    ):
        first = made(layout, kind)
        steps(first, rank, 0, STOP)
        states = [whole_state(first)]
        if not broadcast:  # what the first process saved, every process reads
            distributed.broadcast_object_list(states)
        again = made(layout, kind, seed=7)
        load_whole(again, states[0], broadcast=broadcast)
        assert again[2].metrics()["steps_applied"] == 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(again, rank, STOP, STEPS)
        said = [str(warning.message) for warning in caught]
        assert sum("loaded without the state of 'mix'" in text for text in said) == 1, said


def case_a_whole_state_loads_where_nothing_is_attached(rank):
    for broadcast in (True, False):
        first = made("fsdp2", "adam")
        steps(first, rank, 0, STOP)
        states = [whole_state(first)]
        if not broadcast:
            distributed.broadcast_object_list(states)
        bare = made("fsdp2", "adam", seed=7)
        bare[2].detach()
        load_whole(bare, states[0], broadcast=broadcast)
        steps(bare, rank, STOP, STEPS)


def case_a_state_that_one_process_refuses_changes_none(rank):
    first = made("fsdp2", "momentum")
    steps(first, rank, 0, STOP)
    state = copy.deepcopy(first[1].state_dict())
    if rank == 0:
        state["regrad"] = "garbage"
    again = made("fsdp2", "momentum")
    words = ["must hold what regrad saved there"] if rank == 0 else ["another process refused"]
    raises(RegradError, words, lambda: again[1].load_state_dict(state))
    assert not again[1].state


def case_the_step_by_which_torch_makes_state_is_none_under_fsdp2(rank):
    asked, plain = made("fsdp2", "plain"), made("fsdp2", "plain")
    for index in range(STEPS):
        asked[1].zero_grad()
        get_state_dict(*asked[:2])
        for run in (asked, plain):
            steps(run, rank, index, index + 1)
    assert asked[2].metrics() == plain[2].metrics()
    close(full_weights(asked[0]), full_weights(plain[0]), tolerance=0)


def case_an_optimizer_of_shards_that_is_loaded_before_attach_resumes(rank):
    for kind in OPTIMIZERS:
        first = made("fsdp2", kind)
        steps(first, rank, 0, STOP)
        states = copy.deepcopy([part.state_dict() for part in first[:2]])
        model, optimizer, attachment = made("fsdp2", kind, seed=7)
        attachment.detach()
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        again = model, optimizer, regrad.attach(model, optimizer, [Momentum(amount=0.02)])
        for run in (first, again):
            steps(run, rank, STOP, STEPS)
        close(full_weights(again[0]), full_weights(first[0]), tolerance=0)
        assert again[2].metrics()["steps_applied"] == STEPS
