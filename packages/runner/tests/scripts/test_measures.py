"""The curve of a script's measure, from what it prints or writes."""

import json
import math
import os

import pytest
from regrad_runner.scripts.measures import (
    OutputReader,
    curve_in_csv,
    curve_in_file,
    curve_in_json,
)
from regrad_runner.settings.measure_source import read_measure_source


def heard(pattern, *lines):
    """Return steps and values that a pattern finds."""
    reader = OutputReader(pattern)
    new = [found for line in lines for found in reader.hear(line)]
    assert new == reader.seen
    return [(found.step, found.value) for found in reader.seen]


def pairs(curve):
    return [(found.step, found.value) for found in curve]


def test_all_matches_in_order_are_the_curve():
    assert heard("loss ([0-9.]+)", "loss 2.5 then loss 1.5", "nothing", "loss 1") == [
        (1, 2.5),
        (2, 1.5),
        (3, 1.0),
    ]


def test_a_group_named_step_gives_the_axis_wherever_it_stands():
    assert heard(r"step (?P<step>\d+): loss (\S+)", "step 20: loss 1e-3") == [(20, 0.001)]
    assert heard(r"loss (\S+) at (?P<step>\d+)", "loss 3 at 7") == [(7, 3.0)]


def test_a_step_that_is_no_number_counts_on():
    assert heard(r"(?P<step>\w+) (\d+)", "first 5", "nan 6", "9e99 7") == [(1, 5), (2, 6), (3, 7)]


def test_a_full_stop_or_comma_behind_a_number_does_not_hide_it():
    assert heard("loss ([0-9.,]+)", "val loss 0.52.", "loss 0.25,") == [(1, 0.52), (2, 0.25)]


@pytest.mark.parametrize(
    "pattern",
    [
        "val loss ([0-9.]+)",
        r"val loss (\d+\.\d{4})",
        r"val loss (\d+)",
        r"val loss ([0-9.]+e[-+]\d+)",
        r"val loss (\S+)",
        "val loss ([0-9.]+|nan)",
    ],
)
@pytest.mark.parametrize(
    ("word", "value"), [("nan", math.nan), ("inf", math.inf), ("-Infinity", -math.inf)]
)
def test_a_run_that_diverged_is_seen_although_the_pattern_asks_for_digits(pattern, word, value):
    ((step, found),) = heard(pattern, f"train loss 0.5, val loss {word}")
    assert step == 1
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_a_value_that_is_not_finite_is_seen_behind_one_that_is():
    (first, second) = heard("loss ([0-9.]+)", "loss 0.5, loss nan, info: inf")
    assert first == (1, 0.5)
    assert second[0] == 2
    assert math.isnan(second[1])


def test_words_that_only_look_like_numbers_are_none():
    assert heard("loss ([0-9.]+)", "loss nano", "loss: inf", "info 3") == []


JSON_LINES = '{"loss": 2.0, "step": 10}\nbroken\n{"loss": null}\n[1]\n{"loss": NaN, "step": 30}'


def test_json_lines_may_have_gaps_and_broken_lines():
    first, last = curve_in_json(JSON_LINES, "loss")
    assert (first.step, first.value) == (10, 2.0)
    assert last.step == 30
    assert math.isnan(last.value)


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ({"eval": {"loss": 1.5}}, "eval.loss"),
        ({"eval.loss": 1.5}, "eval.loss"),
        ([{"loss": 1.5}, {"other": 1}], "loss"),
        ({"log_history": [{"loss": 9.0, "step": 1}, {"eval_loss": 1.5}]}, "log_history.eval_loss"),
        ({"loss": "1.5"}, "loss"),
    ],
)
def test_json_may_be_one_object_a_list_or_a_history_inside(document, key):
    assert pairs(curve_in_json(json.dumps(document, indent=1), key)) == [(1, 1.5)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        "null",
        '{"loss": true}',
        '{"loss": {}}',
        f'{{"loss": 1{"0" * 400}}}',
        "[" * 99999,
    ],
)
def test_json_without_a_number_is_no_curve(text):
    assert curve_in_json(text, "loss") == []


def test_a_table_may_have_empty_cells_quoted_lines_and_short_rows():
    text = 'epoch,step,val_loss,note\n0,9,,"a\nb"\n0,19,1.5,\r\n1\n1,39,inf,x,y\n'
    assert pairs(curve_in_csv(text, "val_loss")) == [(19, 1.5), (39, math.inf)]
    assert curve_in_csv(text, "other") == []
    assert curve_in_csv("", "val_loss") == []


def test_what_is_no_table_is_refused_in_words():
    with pytest.raises(ValueError, match="file of the measure must be a table, got 'field larger"):
        curve_in_csv(f"loss\n{'1' * 200_000}\n", "loss")


def test_of_several_files_that_fit_the_last_one_written_counts(tmp_path):
    out = tmp_path / "out [1]"  # a name with signs that stand for others
    for number, loss in ((0, 3.0), (1, 2.0)):
        folder = out / f"version_{number}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"\ufeffloss,step\n{loss},1\n", encoding="utf-8")
        os.utime(folder / "metrics.csv", (number, number))
    absolute = read_measure_source("loss=csv:{out}/version_*/metrics.csv:loss")
    assert pairs(curve_in_file(absolute, {"out": str(out)}, tmp_path)) == [(1, 2.0)]
    relative = read_measure_source("loss=csv:**/metrics.csv:loss")
    assert pairs(curve_in_file(relative, {}, out)) == [(1, 2.0)]
    assert curve_in_file(read_measure_source("loss=csv:none/*.csv:loss"), {}, out) == []


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.json")
    source = read_measure_source("loss=json:metrics.json:loss")
    assert curve_in_file(source, {}, tmp_path) == []
