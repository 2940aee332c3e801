"""The table of layouts: it is complete, keeps what was promised, and what it calls refused is refused."""

import importlib
import json
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
pytestmark = pytest.mark.timeout(900)
EVERYWHERE = {
    *(
        "1 process",
        "DDP",
        "FSDP2",
        "FSDP2 by accelerate",
        "accumulation",
        "bf16",
        "fp16",
        "fp16, fused",
    ),
    *("checkpointing", "checkpointing, re-entrant", "frozen", "tied", "tied, 2 processes"),
    *("DDP, static graph", "DDP, compressed", "DDP, `Join`", "`replicate`", "HSDP", "local SGD"),
    *("FSDP2, CPU offload", "FSDP2, meta device", "FSDP2, bf16 policy"),
    *("tensor parallel", "sequence parallel"),
    *("FSDP2 + tensor parallel", "HSDP + tensor parallel"),
}
IN_PARTS = ("pipeline", "pipeline, `model_group=`", "experts")
LATER = {"later", "later, 2 processes"}
PROMISED = {
    **dict.fromkeys(
        ("powergrad", "xgrad", "agc", "clip-norm", "clip-value", "centralization", "adanorm"),
        EVERYWHERE,
    ),
    "gcw": {"DDP", "FSDP2", "FSDP2 by accelerate", "accumulation", "bf16", "fp16", "fp16, fused"},
    "gcode": {"DDP", "DDP, static graph", "DDP, compressed", "accumulation"},
}


READ_ELEMENTS = {"clip-value", "powergrad", "xgrad"}
READ_NO_MOMENTS = {
    "agc",
    "centralization",
    "clip-norm",
    "clip-value",
    "gcode",
    "powergrad",
    "xgrad",
}


@pytest.fixture(scope="module")
def layouts():
    """The generator of the page."""
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("sharding")
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def verdicts(layouts):
    return layouts.kept()


def test_the_table_has_every_shipped_correction_and_every_column(layouts, verdicts, members):
    names = {
        name for m in members if m.is_plugin for name in m.project["entry-points"].get("regrad", {})
    }
    # A sample is another one where the batch is cut in another way: the plugin's tests have means.
    assert names - set(verdicts) == {"uniform-rows", "wta-crs"}
    titles = [column.title for column in layouts.COLUMNS]
    assert all(list(cells) == titles for cells in verdicts.values())


def test_the_page_and_the_cards_say_what_the_table_says(layouts, verdicts):
    for path, text in layouts.pages(verdicts).items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.name}: run python docs/sharding.py --render"
        )


def test_what_was_promised_to_be_exact_is_exact(verdicts):
    broken = [
        (name, title, verdicts[name][title])
        for name, titles in PROMISED.items()
        for title in titles
        if verdicts[name][title]["verdict"] != "exact"
    ]
    assert broken == []


def test_parts_of_a_model_are_exact_where_no_more_is_read_than_they_show(verdicts):
    for title in IN_PARTS:
        said = {name: cells[title]["verdict"] for name, cells in verdicts.items()}
        for name in ("clip-value", "centralization", "adanorm", "xgrad", "powergrad"):
            assert said[name] == "exact", (name, title)
        assert said["agc"] == said["gcw"] == "exact or refused"
        assert said["gcode"] == said["gcgd"] == "refused"
        assert said["clip-norm"] == ("exact" if "model_group" in title else "refused")


def test_what_exchanges_numbers_in_a_step_is_refused_where_processes_step_by_themselves(verdicts):
    for title in ("DDP, `Join`", "local SGD"):
        refused = {name for name, cells in verdicts.items() if cells[title]["verdict"] != "exact"}
        assert refused == {"adafisher", "gcode", "gcgd"}


def test_flat_and_partitioned_layouts_are_exact_where_no_more_is_read_than_they_offer(verdicts):
    for title, names in (
        ("FSDP1", READ_ELEMENTS),
        ("ZeroRedundancyOptimizer", READ_NO_MOMENTS),
    ):
        exact = {name for name, cells in verdicts.items() if cells[title]["verdict"] == "exact"}
        assert exact >= names
        for name in verdicts.keys() - exact:
            reasons = " ".join(verdicts[name][title]["reasons"])
            assert "which this layout does not offer" in reasons


def test_parameters_may_come_later_on_every_layout_on_which_a_correction_is_exact(verdicts):
    for name, cells in verdicts.items():
        for title in LATER:
            assert cells[title]["verdict"] in {"exact", "exact or refused"}, (
                name,
                title,
                cells[title],
            )


def test_numbers_are_within_their_columns_bound_and_refusals_have_a_reason(layouts, verdicts):
    bounds = {column.title: column.tolerance for column in layouts.COLUMNS}
    for name, cells in verdicts.items():
        for title, cell in cells.items():
            assert cell.get("far", 0.0) <= bounds[title], (name, title)
            assert bool(cell["reasons"]) == ("refused" in cell["verdict"]), (name, title)
            assert ("bound" in cell) == (cell["verdict"] == "bounded"), (name, title)


def test_what_the_table_calls_refused_on_one_process_is_refused_with_that_reason(layouts, verdicts):
    refused = 0
    for column in layouts.COLUMNS:
        for name, cells in verdicts.items():
            if column.processes > 1 or cells[column.title]["verdict"] != "refused":
                continue
            measured = layouts.measures(name, column).values()
            said = {measure().get("refused") for measure in measured}
            assert said == set(cells[column.title]["reasons"]), (name, column.title)
            refused += 1
    assert refused


def test_a_difference_a_lost_rank_and_a_bound_that_is_passed_are_no_verdict(layouts):
    column = layouts.COLUMNS[0]
    exact = {"far": column.tolerance, "broken": ""}
    assert layouts.verdict_of("a", column, {"way": exact})["verdict"] == "exact"
    assert layouts.verdict_of("a", column, {"way": exact, "other": {"refused": "why"}})[
        "reasons"
    ] == ["why"]
    wrong = {
        "ends 2.0e-12 away": {"far": 2e-12},
        "the ranks end apart": {**exact, "broken": "the ranks end apart"},
        "ends 0.20 away": {"bound": 0.2, "usual": 0.01},
        "nothing was measured": {},
    }
    for message, seen in wrong.items():
        with pytest.raises(layouts.NotExactError, match=message):
            layouts.verdict_of("a", column, {"way": seen})


def test_what_one_rank_alone_sees_is_no_verdict(layouts):
    fine = {"far": 1e-16, "ranks": ["a"]}
    assert layouts.of_all_ranks([fine, {**fine, "far": 3e-16}]) == {
        **fine,
        "far": 3e-16,
        "broken": "",
    }
    for other, message in (
        ({**fine, "ranks": ["b"]}, "the ranks end apart"),
        ({"refused": "why"}, "not all ranks refuse"),
        ({"error": "Traceback"}, "Traceback"),
        ({**fine, "broken": "nothing was tried"}, "nothing was tried"),
    ):
        assert message in layouts.of_all_ranks([fine, other])["broken"]


def test_another_verdict_or_reason_is_told_as_a_difference(layouts, verdicts):
    other = json.loads(json.dumps(verdicts))
    name, title = next(
        (n, t) for n, cells in other.items() for t, c in cells.items() if c["verdict"] == "refused"
    )
    assert layouts.differences(other, verdicts) == []
    other[name][title]["reasons"] = ["another"]
    assert len(layouts.differences(other, verdicts)) == 1


def test_shares_are_rounded_up_to_one_digit(layouts):
    assert [layouts.percent(share) for share in (0.0, 0.00041, 0.0123, 0.02, 0.5)] == [
        "0 %",
        "0.05 %",
        "2 %",
        "2 %",
        "50 %",
    ]
