"""What can be known of a model's parts on one process; what ranks compare is in `cases_ranks.py`."""

import types

import pytest
import regrad
import torch
from regrad import RegradError, ranks
from regrad.correction import Needs
from torch import distributed, nn


class Stage:
    """What torch's pipelines keep of a stage."""

    def __init__(self, submodule, number, many):
        self.submod, self.stage_index, self.num_stages = submodule, number, many


class OwnStage(Stage):
    """A stage of somebody's own."""


@pytest.fixture
def process_group(tmp_path):
    """A process group of this process alone, as a stage needs one."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def pipelining(monkeypatch, process_group):
    """A library of pipelines whose stages need no device."""
    library = types.SimpleNamespace(_PipelineStageBase=Stage)
    monkeypatch.setitem(ranks.sys.modules, "torch.distributed.pipelining.stage", library)


@pytest.fixture
def reader(toys):
    """A correction that reads the whole model, and has no advice for parts of it."""

    class Reader(toys.Scale):
        needs = Needs(stages=("gradient",), reads=("model",))

    return Reader


@pytest.mark.usefixtures("pipelining")
@pytest.mark.parametrize("kind", [Stage, OwnStage])
def test_a_stage_that_is_known_at_attach_is_refused_there(toys, reader, kind):
    model = toys.Net()
    stage = kind(model, 1, 4)
    with pytest.raises(
        RegradError, match=r"'scale' must see the whole model, .* stage 1 of 4; scale: leave it out"
    ):
        regrad.attach(model, toys.sgd(model), [reader()])
    stage.num_stages = 1
    regrad.attach(model, toys.sgd(model), [reader()])


@pytest.mark.usefixtures("pipelining")
def test_a_stage_that_shares_parameters_alone_is_known_too(toys, reader):
    model = toys.Net()
    twin = nn.ParameterList(model.body.parameters())
    stage = Stage(twin, 0, 2)
    with pytest.raises(RegradError, match="stage 0 of 2"):
        regrad.attach(model, toys.sgd(model), [reader()])
    del stage


@pytest.mark.usefixtures("pipelining")
def test_a_stage_that_is_made_after_attach_is_refused_at_the_first_step_with_nothing_changed(
    toys, reader, same_bits
):
    model = toys.Net()
    optimizer = toys.sgd(model)
    attachment = regrad.attach(model, optimizer, [reader()])
    stage = Stage(model, 0, 2)
    toys.loss_of(model).backward()
    before = toys.weights_of(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RegradError, match="stage 0 of 2"):
        optimizer.step()
    assert same_bits((toys.weights_of(model), [p.grad for p in model.parameters()]), before)
    stage.num_stages = 1
    optimizer.step()
    assert attachment.metrics()["steps_applied"] == 1


@pytest.mark.usefixtures("pipelining")
def test_a_stage_of_another_model_is_none_of_ours(toys, reader):
    other, model = toys.Net(), toys.Net()
    stage = Stage(other, 0, 2)
    regrad.attach(model, toys.sgd(model), [reader()])
    regrad.attach(other, toys.sgd(other), [toys.Scale()])
    del stage


def test_without_a_process_group_nobody_looks_through_all_objects(toys, reader, monkeypatch):
    library = types.SimpleNamespace(_PipelineStageBase=Stage)
    monkeypatch.setitem(ranks.sys.modules, "torch.distributed.pipelining.stage", library)
    monkeypatch.setattr(ranks.gc, "get_objects", lambda: pytest.fail("looked through them"))
    model = toys.Net()
    regrad.attach(model, toys.sgd(model), [reader()])


def test_a_lazy_modules_parameters_are_described_in_words():
    model = nn.LazyLinear(2)
    described = ranks._described(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert described == ["weight of a lazy module", "bias of a lazy module"]


def test_of_parameters_that_ranks_do_not_share_the_first_are_shown():
    whole, part = [f"{number} [2]" for number in range(6)], ["0 [2]"]
    assert ranks._only(whole, part) == "1 [2], 2 [2], 3 [2], … (5 in all)"
    assert ranks._only(part, whole) == "nothing else"
    model = nn.Linear(2, 1)
    other = nn.Parameter(torch.zeros(3))
    described = ranks._described(model, torch.optim.SGD([model.weight, other], lr=0.1))
    assert described == ["weight [1, 2]", "[3] outside the model", "bias [1] outside the optimizer"]
    assert ranks._only(part, part) == "the same in another order"


def test_a_few_numbers_tell_weights_apart_whatever_their_type():
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        model = nn.Linear(30, 40, dtype=dtype)
        before = ranks._samples(model)
        assert ranks._samples(model) == before
        with torch.no_grad():
            model.weight.mul_(1.5)
        assert ranks._are_copies([before, before])
        assert not ranks._are_copies([before, ranks._samples(model)])
    empty = nn.ParameterList([nn.Parameter(torch.zeros(0, 3))])
    assert ranks._samples(empty) == ranks._samples(empty)
