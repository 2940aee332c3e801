import csv
import io
import json

import pytest
from regrad_bench import report
from regrad_bench.about import about, processor
from regrad_bench.measure import Result
from regrad_bench.peers import Finding
from rich.console import Console

DONE = {
    "ours": "ours",
    "peer": "theirs",
    "device": "cpu",
    "pairs": 3,
    "ours_ms": 12.345,
    "peer_ms": 50.0,
}
MET = Result(name="alone/a", **DONE, ratio=0.1999, low=0.1, high=0.3, goal=0.2, difference=1e-7)
MISSED = Result(name="alone/b", **DONE, ratio=0.2001, low=0.1, high=0.3, goal=0.2)
FREE = Result(name="step/c", **DONE, ratio=25.2, low=20.0, high=30.0)
ABSENT = Result(
    name="alone/a",
    ours="ours",
    peer="theirs",
    device="cuda",
    goal=0.2,
    reason="no CUDA device here",
)
FOUND = Finding(
    peer="some 1.0", what="AGC of a gain", peer_error=0.61, our_error=1e-16, why="wrong unit"
)


def test_a_goal_is_met_at_most_at_its_ratio():
    assert [r.verdict for r in (MET, MISSED, FREE, ABSENT)] == [
        "met",
        "missed",
        "no goal",
        "not measured",
    ]


def test_memory_beyond_its_goal_is_a_missed_goal():
    within = Result(name="x", **DONE, ratio=0.5, goal=1.0, memory_ratio=1.0, memory_goal=1.0)
    beyond = Result(name="x", **DONE, ratio=0.5, goal=1.0, memory_ratio=1.01, memory_goal=1.0)
    assert (within.verdict, beyond.verdict) == ("met", "missed")


def test_milliseconds_beyond_their_goal_are_a_missed_goal():
    within = Result(name="x", **DONE, ratio=0.5, goal=1.0, goal_ms=13)
    beyond = Result(name="x", **DONE, ratio=0.5, goal=1.0, goal_ms=12)
    assert (within.verdict, beyond.verdict) == ("met", "missed")
    assert report.cells(within)[8] == "≤ 1 and 13 ms"


def test_the_cells_of_a_result_by_hand():
    expected = [
        "alone/a",
        "ours",
        "theirs",
        "12.3",
        "50",
        "0.200",
        "0.100 to 0.300",
        "–",
        "≤ 0.2",
        "met",
    ]
    assert report.cells(MET) == expected
    assert report.cells(ABSENT)[3:] == ["–"] * 5 + ["≤ 0.2", "not measured: no CUDA device here"]
    assert len(report.cells(ABSENT)) == len(report.HEADINGS)


def test_the_table_for_people_has_every_case():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table([FREE, MET, MISSED]))
    text = console.export_text()
    assert all(word in text for word in ("step/c", "alone/a", "met", "missed", "≤ 0.2"))


def test_json_and_csv_hold_every_field_and_the_verdict():
    told = json.loads(report.to_json([MET, ABSENT], [FOUND], {"Machine": "m"}))
    assert (told["about"], told["results"][0]["ratio"], told["results"][1]["ratio"]) == (
        {"Machine": "m"},
        0.1999,
        None,
    )
    assert [row["verdict"] for row in told["results"]] == ["met", "not measured"]
    assert told["peers"][0]["peer_error"] == 0.61
    rows = list(csv.DictReader(io.StringIO(report.to_csv([MET, ABSENT]))))
    assert (rows[0]["name"], float(rows[0]["ratio"]), rows[0]["verdict"]) == (
        "alone/a",
        0.1999,
        "met",
    )
    assert (rows[1]["ratio"], rows[1]["reason"]) == ("", "no CUDA device here")


def test_the_page_says_what_was_met_missed_and_not_measured():
    text = report.to_markdown([FREE, MET, MISSED, ABSENT], [FOUND], {"Machine": "some processor"})
    assert "- Machine: some processor\n" in text
    assert "- Goals met: `alone/a`.\n- Goals missed: `alone/b`.\n" in text
    assert "## On a GPU (CUDA)\n\nNot measured: no CUDA device here.\n" in text
    assert (
        "| alone/a | ours | theirs | 12.3 | 50 | 0.200 | 0.100 to 0.300 | – | ≤ 0.2 | met | 1e-07 |"
        in text
    )
    assert "| some 1.0 | AGC of a gain | 0.61 | 1e-16 | wrong unit |" in text
    assert text.index("### The whole step") < text.index("### The correction alone")


def test_a_page_keeps_what_stands_around_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        report.write_between_marks(page, "new\n")
    assert page.read_text(encoding="utf-8") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END}{report.BEGIN}"])
def test_a_page_without_the_marks_is_refused_and_left_alone(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="markdown must name a page with the marks"):
        report.write_between_marks(page, "new\n")
    assert page.read_text(encoding="utf-8") == text


def test_the_conditions_name_machine_versions_command_and_date():
    told = about("regrad-bench --pairs 3", pairs=3, quick=True)
    assert processor() in told["Machine"]
    assert told["Command"] == "`regrad-bench --pairs 3`, 3 pairs at most"
    assert all(
        f"{name} " in told["Versions"] for name in ("torch", "timm", "pytorch-optimizer", "regrad")
    )
    assert "the numbers mean nothing" in told["Sizes"]
    assert "Sizes" not in about("regrad-bench", pairs=3, quick=False)
