import dataclasses
import json

import pytest
from regrad_runner.diagnostics.explaining import Cost, Explained, Explanation
from regrad_runner.reporting.explanation import TENSORS_SHOWN, as_json, as_text


def row(index, *, change, why="changed", stage="gradient"):
    name = f"layer{index}.weight"
    return {
        "stage": stage,
        "tensor": name,
        "shape": [4, 3],
        "relative_change": change,
        "cosine": 0.5,
        "why": why,
    }


SPARED = "'agc' leaves the classifier head alone: layer90.weight"
ROWS = [
    *(row(index, change=0.001 * (index + 1)) for index in range(20)),
    *(row(index, change=0.0, why="unchanged: not one of its tensors") for index in range(80, 90)),
    row(90, change=0.0, why=SPARED),
]


def explanation(**values):
    usual = {
        **{
            "name": "agc",
            "version": "regrad-clipping 0.1.0",
            "settings": "AGC()",
            "stages": ("gradient",),
        },
        **{
            "rows": ROWS,
            "refuses": {"other": "both clip"},
            "ordered": {"gcw": "'gcw' declares before 'agc'"},
        },
        **{
            "notes": [SPARED],
            "cost": Cost(seconds=0.002, share_of_step=0.1, state_bytes=3 << 20, window_bytes=0),
        },
    }
    one = Explained(**{**usual, **values})
    return Explanation(
        corrections=[one], plain_step_seconds=0.02, step_seconds=0.025, notes=["read this"]
    )


def test_a_long_table_shows_what_changes_most_and_what_a_note_speaks_of_and_counts_the_rest():
    lines = as_text(explanation()).splitlines()
    assert lines[:2] == [
        "agc: AGC(), from regrad-clipping 0.1.0",
        "  gradient: changes 20 of 31 tensors, by 0.001 to 0.02 of their norm",
    ]
    table = [line.split()[0] for line in lines if line.startswith("    ")]
    assert table == [
        "tensor",
        *(f"layer{19 - i}.weight" for i in range(TENSORS_SHOWN)),
        "layer90.weight",
        "…",
    ]
    assert lines[3].split() == ["layer19.weight", "4×3", "0.02", "0.5000", "changed"]
    assert f"    … and {31 - TENSORS_SHOWN - 1} more; --all shows them" in lines


def test_every_tensor_is_shown_in_the_models_order_if_asked_for():
    text = as_text(explanation(), every_tensor=True)
    places = [text.index(f"{row['tensor']} ") for row in ROWS]
    assert places == sorted(places)
    assert "--all" not in text


def test_cost_conflicts_order_and_notes_are_told():
    text = as_text(explanation())
    for line in (
        "  costs 2 ms in its hooks, 10.0 % of a plain step; holds 3.0 MiB from step to step",
        "  cannot work with other: both clip",
        "  ordered with gcw: 'gcw' declares before 'agc'",
        f"  {SPARED}",
        "a step takes 25 ms with all of them, 20 ms without: 1.25 times as long",
        "read this",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"stages": ("criterion",)},
            "(its work in the forward and backward pass shows only in the time of whole steps)",
        ),
        (
            {"cost": Cost(seconds=0, share_of_step=0, state_bytes=0, window_bytes=2048)},
            "holds nothing and 2.0 KiB for",
        ),
        (
            {"rows": [row(0, change=0.0, why="unchanged: x")]},
            "gradient: changes none of 1 tensors at this step",
        ),
        (
            {"rows": [row(0, change=0.25)]},
            "gradient: changes 1 of 1 tensors, by 0.25 of their norm",
        ),
    ],
)
def test_the_words_fit_the_case(values, told):
    assert told in as_text(explanation(**values))


def test_json_is_complete():
    read = json.loads(as_json(explanation()))
    assert read == json.loads(json.dumps(dataclasses.asdict(explanation())))
    assert len(read["corrections"][0]["rows"]) == len(ROWS)
    assert read["corrections"][0]["cost"]["state_bytes"] == 3 << 20


def test_without_corrections_there_is_only_the_step():
    nothing = Explanation(corrections=[], plain_step_seconds=0.02, step_seconds=0.02, notes=[])
    assert (
        as_text(nothing) == "a step takes 20 ms with all of them, 20 ms without: 1.00 times as long"
    )
