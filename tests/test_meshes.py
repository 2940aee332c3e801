"""Every correction on meshes of processes, where it must end as it does on one; `mesh_layouts.py` has the layouts."""

from pathlib import Path

import pytest
from regrad_testing.files import load_file
from regrad_testing.processes import launch

FILE = Path(__file__).with_name("mesh_layouts.py")
PROCESSES = {
    "ByRows": 2,
    "ByColumns": 2,
    "TensorParallel": 2,
    "SequenceParallelism": 2,
    "TwoDimensional": 4,
    "ThreeDimensional": 4,
}
pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def layouts():
    """The module that the processes run."""
    return load_file(FILE, "regrad_mesh_layouts")


@pytest.fixture(scope="module", params=PROCESSES)
def results(request, layouts):
    """What the cases of one layout gave, per rank, started once."""
    suite = getattr(layouts, request.param)
    return launch(suite, processes=PROCESSES[request.param])


def require_exact(layouts, results, case):
    """Fail unless every rank measured everything, and all of it is what one process gives."""
    for rank, by_case in enumerate(results):
        measured = by_case[case]
        assert "error" not in measured, f"rank {rank}: {measured['error']}"
        far = {name: value for name, value in measured.items() if not value <= layouts.LARGEST}
        assert measured
        assert far == {}, f"rank {rank} ends far from one process"


def test_every_correction_ends_as_on_one_process(layouts, results):
    require_exact(layouts, results, "")
    assert {*results[0][""]} == {*layouts.TRIALS}


def test_what_only_some_layouts_have_is_exact_too(layouts, results):
    for case in results[0]:
        require_exact(layouts, results, case)


def test_stages_of_a_pipeline_are_exact_where_a_correction_reads_no_more_and_refused_else(layouts):
    results = launch(layouts.Pipelines)
    for case in results[0]:
        require_exact(layouts, results, case)


def test_experts_are_exact_where_a_correction_reads_no_more_than_its_own_and_refused_else(layouts):
    require_exact(layouts, launch(layouts.ExpertParallel), "")


def test_every_installed_correction_is_tried_or_refused_on_shards(layouts, members):
    offered = {
        name for m in members if m.is_plugin for name in m.project["entry-points"].get("regrad", {})
    }
    tried = {(trial.spec or "").partition(":")[0] for trial in layouts.TRIALS.values()}
    refused_on_shards = {"adafisher", "gcgd", "gcode", "int8-rows"}  # `docs/sharding.md`
    draw = {"uniform-rows", "wta-crs"}  # other rows on a shard: only their means agree
    assert offered - tried == refused_on_shards | draw
