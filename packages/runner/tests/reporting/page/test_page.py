import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, median
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
import regrad
from regrad_runner.cli.main import main
from regrad_runner.reporting.figures import curves, rows
from regrad_runner.reporting.figures.drawing import draw_plain
from regrad_runner.reporting.figures.marks import Mark
from regrad_runner.reporting.page.repeat import command_to_repeat
from regrad_runner.reporting.page.write import write_page
from regrad_runner.reporting.report import show
from regrad_runner.reporting.report_data import read_report_data
from regrad_runner.reporting.summaries import summarize_results
from regrad_runner.results.about import LAYOUT, read_about
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.results.outcomes import Result
from regrad_runner.results.tables import read_rows
from regrad_runner.settings.config import CompareConfig
from regrad_runner.workloads.workload import Measure

SECTIONS = [
    "differences",
    "numbers",
    "training",
    "target",
    "overhead",
    "effects",
    "quality",
    "run",
]
PANELS = ["measure-steps-1", "measure-steps-2", "measure-steps-3"]  # one per correction
FIGURES = [
    "differences",
    "measure-steps",
    *PANELS,
    *("loss-steps", "measure-time", "loss-time"),
    "steps-to-target",
    "overhead",
    *("effect-relative-change", "effect-cosine", "effect-trigger-rate"),
    *("quality-cosine", "quality-norm-ratio", "quality-steps"),
]
needs_xgrad = pytest.mark.skipif(
    "xgrad" not in regrad.available(), reason="regrad-xgrad is not installed"
)


class Page(HTMLParser):
    """What a browser would find in a page: elements with their attributes, and texts."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.texts, self.within = [], {}, []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.within.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if self.within:
            self.texts.setdefault(self.within[-1], []).append(data)

    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


@pytest.fixture(scope="module")
def folder(make_comparison, tmp_path_factory):
    made = make_comparison(tmp_path_factory.mktemp("page") / "comparison")
    write(made)
    return made


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder.path / "report.html")


@pytest.fixture(scope="module")
def old(make_comparison, tmp_path_factory):
    return make_comparison(tmp_path_factory.mktemp("page") / "old", old=True, target=None)


def data_of(folder):
    measure = Measure(**read_about(folder.path)["measure"])
    return read_report_data(folder, measure, summarize_results(folder.results, measure))


def write(folder):
    return write_page(data_of(folder))


def marks(folder, figure, series, *, whole=True):
    kept = read_rows(folder.path / "figures.csv", Mark)
    return [
        m for m in kept if (m.figure, m.series) == (figure, series) and (m.seed is None) == whole
    ]


def test_the_parts_of_the_page_come_in_the_order_of_the_questions(page, folder):
    assert [i for i in page.ids() if i in SECTIONS] == SECTIONS
    figures = [
        attributes["data-figure"] for _, attributes in page.elements if "data-figure" in attributes
    ]
    assert figures == FIGURES
    files = {path.stem for path in (folder.path / "figures").iterdir()}
    assert files == set(FIGURES) - set(PANELS)


def test_the_first_words_are_the_answer(page, names):
    (headline,) = page.texts["h1"]
    assert headline.startswith(f"{names.script}, {names.image} and {names.long} are better than")


def test_a_control_stands_under_its_correction(folder, names):
    (drawing,) = rows.difference_rows(data_of(folder))
    assert list(drawing.styles)[:2] == [names.script, "nesterov"]


def test_small_figures_have_a_family_each_and_the_baseline(page, names):
    curves = [a["data-name"] for _, a in page.elements if "data-points" in a]
    assert curves[5:10] == ["baseline", names.script, "nesterov", "baseline", names.image]


def test_a_comparison_of_a_script_says_which_file_it_was(make_comparison, tmp_path):
    made = make_comparison(tmp_path)
    about = json.loads((tmp_path / "about.json").read_text())
    (tmp_path / "about.json").write_text(json.dumps(about | {"script_sha256": "ab" * 32}))
    write(made)
    said = " ".join(Page(tmp_path / "report.html").texts["p"])
    assert f"sha256 of the script {'ab' * 6}…" in said
    assert f"The script had the sha256 {'ab' * 32}." in said


def test_a_sentence_and_a_verdict_stand_for_every_arm(page, names):
    spans = page.texts["span"]
    for arm in names.arms:
        assert arm in spans
    assert {"baseline", "control"} <= set(spans)
    assert any(text.startswith("The baseline, 6 seeds") for text in page.texts["dd"])


def test_names_that_look_like_html_stay_text(page, names):
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert not {"img", "b", "iframe", "object", "foreignobject"} & set(tags)
    assert [
        name for _, attributes in page.elements for name in attributes if name.startswith("on")
    ] == []
    headings = page.texts["th"]
    assert names.script in headings
    assert names.image in headings
    assert any(names.image in text for text in page.texts["span"])  # in a figure
    assert not any(names.script in text for text in page.texts["script"])


def test_the_page_needs_nothing_from_anywhere(page):
    references = [
        (tag, name, value)
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "style", "data", "poster")
    ]
    assert [r for r in references if not r[2].startswith("#")] == [("link", "href", "data:,")]
    assert re.findall(r"url\((?!#)", page.source) == []
    assert "@import" not in page.source


def test_the_policy_allows_its_own_style_and_script_and_nothing_else(page):
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.source, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_figure_has_a_title_and_says_in_words_what_it_shows(page):
    figures = [a for _, a in page.elements if a.get("role") == "img"]
    assert len(figures) == len(FIGURES)
    for attributes in figures:
        assert set(attributes["aria-labelledby"].split()) <= set(page.ids())
    assert any(
        "steps-to-target" not in text and "baseline 55 (50 to 60)" in text
        for text in page.texts["p"]
    )
    assert len(page.ids()) == len(set(page.ids()))


def test_a_figure_refers_to_its_own_shapes_alone(page):
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page.source))
    assert wanted
    assert wanted <= set(page.ids())


def test_curves_are_median_and_quartiles_of_the_rows_of_curves_csv(folder, names):
    own = [point for point in folder.curves if point.arm == names.script]
    for figure, field in (("measure-steps", "value"), ("loss-steps", "loss")):
        for mark in marks(folder, figure, names.script):
            values = [getattr(point, field) for point in own if point.step == mark.x]
            assert mark.seeds == len(values) == 6
            assert (mark.low, mark.y, mark.high) == pytest.approx(
                tuple(np.quantile(values, (0.25, 0.5, 0.75)))
            )
    assert [mark.x for mark in marks(folder, "measure-steps", names.script)] == list(
        range(10, 81, 10)
    )


def test_against_time_a_point_stands_at_the_median_time_of_its_evaluation(folder, names):
    times = {
        step: median(p.seconds for p in folder.curves if (p.arm, p.step) == (names.long, step))
        for step in (10, 80)
    }
    found = marks(folder, "loss-time", names.long)
    assert [found[0].x, found[-1].x] == pytest.approx([times[10], times[80]])
    assert [mark.y for mark in found] == [
        mark.y for mark in marks(folder, "loss-steps", names.long)
    ]


def test_differences_and_intervals_are_those_of_the_verdicts(folder, names):
    for summary in summarize_results(folder.results, Measure(target=0.9)):
        if summary.verdict != "baseline":
            (mark,) = marks(folder, "differences", summary.arm)
            assert (mark.x, (mark.low, mark.high), mark.seeds) == (
                summary.difference,
                summary.interval,
                summary.pairs,
            )
            assert mean(
                m.x for m in marks(folder, "differences", summary.arm, whole=False)
            ) == pytest.approx(mark.x)


def test_steps_to_the_target_are_every_run_their_median_and_its_interval(folder, names):
    (mark,) = marks(folder, "steps-to-target", "baseline")
    assert [m.x for m in marks(folder, "steps-to-target", "baseline", whole=False)] == [
        50,
        52,
        54,
        56,
        58,
        60,
    ]
    assert (mark.x, mark.low, mark.high) == (55, 50, 60)
    (late,) = marks(folder, "steps-to-target", names.image)  # two of six missed: behind every hit
    assert [m.x for m in marks(folder, "steps-to-target", names.image, whole=False)][:2] == [
        None,
        None,
    ]
    assert (late.x, late.low, late.high) == (59, 54, None)


def test_overhead_is_what_was_measured_in_turns(folder, names):
    (mark,) = marks(folder, "overhead", names.long)
    assert (mark.x, mark.low, mark.high) == pytest.approx((1.3, 1.29, 1.32))
    assert marks(folder, "overhead", names.long, whole=False) == []


def test_the_page_says_how_many_samples_there_were_and_warns_of_few(page, names):
    said = " ".join([*page.texts["p"], *page.texts["li"]])
    assert f"Validation: 179 {names.image}, one is worth .0056; test: 360 {names.image}" in said
    assert f"Only 179 {names.image} for validation" in said


def test_the_page_offers_the_next_lower_rate_where_an_arm_is_unsteady(
    make_comparison, tmp_path, monkeypatch
):
    made = make_comparison(tmp_path)
    monkeypatch.setattr("regrad_runner.statistics.spreads.UNSTEADY_FROM", 1.0)
    write(made)
    said = " ".join(Page(tmp_path / "report.html").texts["li"])
    offer = f"compare --config {tmp_path / 'config.yaml'} --lr 0.0333333 --out {tmp_path}-lr-0.03"
    assert offer in said


def test_effects_over_training_have_a_curve_per_stage(folder, names):
    found = {f"{names.long}: xgrad, {stage}" for stage in ("weights", "gradient")}
    kept = read_rows(folder.path / "figures.csv", Mark)
    assert found <= {mark.series for mark in kept if mark.figure == "effect-relative-change"}
    assert {m.y for m in marks(folder, "effect-trigger-rate", f"{names.long}: xgrad, weights")} == {
        0.5
    }


def test_gradient_quality_is_told_raw_and_corrected(folder, names):
    (raw,) = marks(folder, "quality-cosine", f"{names.long}, raw")
    (corrected,) = marks(folder, "quality-cosine", f"{names.long}, corrected")
    assert raw.x == pytest.approx(0.4)
    assert corrected.x > raw.x
    assert len(marks(folder, "quality-cosine", "baseline, raw = corrected")) == 1


def test_what_is_drawn_is_what_the_rows_say(folder):
    (drawing,) = [d for d in curves.training_curves(data_of(folder)) if d.name == "measure-time"]
    lines = {
        line.get_label().removeprefix("\u200b"): line for line in draw_plain(drawing).axes[0].lines
    }
    for series in drawing.styles:
        own = [mark for mark in drawing.marks if mark.series == series]
        assert list(lines[series].get_xdata()) == [mark.x for mark in own]
        assert list(lines[series].get_ydata()) == [mark.y for mark in own]
    (overhead,) = rows.overhead_rows(data_of(folder))
    widths = [patch.get_width() for patch in draw_plain(overhead).axes[0].patches]
    assert widths == [mark.x for mark in overhead.marks if mark.seed is None]


def test_the_same_folder_gives_the_same_files_and_no_global_setting_changes(folder):
    paths = [
        folder.path / "report.html",
        folder.path / "figures.csv",
        *sorted((folder.path / "figures").iterdir()),
    ]
    before = {path.name: path.read_bytes() for path in paths}
    settings = {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}
    assert set(write(folder)) == set(paths)
    assert {path.name: path.read_bytes() for path in paths} == before
    assert settings == {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}
    for path in paths[2:]:
        assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_an_older_folder_is_shown_and_what_is_missing_is_said(old, names, capsys):
    show(old.path)
    assert str(old.path / "report.html") in capsys.readouterr().out
    page = Page(old.path / "report.html")
    assert [i for i in page.ids() if i in SECTIONS] == [
        s for s in SECTIONS if s not in ("target", "overhead", "quality")
    ]
    said = " ".join(page.texts["li"])
    for words in (
        "times of evaluations were kept",
        "effect over training was kept",
        "machine was kept",
        "no target",
        "Step times are unknown: they were not measured.",
    ):
        assert words in said
    estimated = marks(old, "loss-time", "nesterov")[-1].x
    assert estimated == pytest.approx(80 * 0.014)
    assert "0.0123" in page.texts["td"]  # the mean effect of the receipts


def test_a_secret_of_the_tracking_address_is_not_on_the_page(page):
    assert "secret" not in page.source
    assert "tracking_uri" not in page.source


def test_failed_runs_and_a_baseline_alone_can_be_shown(tmp_path, ended_run):
    about = {"layout": LAYOUT, "kind": "comparison", "measure": {"name": "loss", "target": None}}
    (tmp_path / "about.json").write_text(json.dumps(about))
    ended_run(tmp_path, Result(arm="baseline", seed=0, status="failed", value=None))
    assert [path.name for path in write(ResultsFolder(tmp_path))] == ["report.html", "figures.csv"]
    assert "1 of 1 runs failed and are left out" in (tmp_path / "report.html").read_text()
    ended_run(tmp_path, Result(arm="baseline", seed=2, status="diverged", value=None))
    write(ResultsFolder(tmp_path))
    assert "1 of 2 runs diverged: they have no number" in (tmp_path / "report.html").read_text()
    ended_run(tmp_path, Result(arm="baseline", seed=1, value=0.5, step_seconds=0.1, steps=3))
    written = write(ResultsFolder(tmp_path))
    assert [path.stem for path in written] == ["report", "figures"]


SETTINGS = {
    "corrections": ("agc:axis=[0,1]", "xgrad:horizon=2+powergrad", "clip-norm"),
    "seeds": 3,
    "lr": (0.03, 0.1),
    "controls": False,
    "optimizer": "sgd:momentum=0.9,nesterov=True",
    "data_dir": "my data/it's here",
    "download": True,
    "mixed_precision": "bf16",
    "probe_every": 7,
    "clip_norm": 0.5,
    "tracker": "none",
    "threads": 2,
    "warmup_steps": 5,
}


def words_of(command):
    """Return the words that a shell makes of a command."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("settings", [SETTINGS, {}], ids=["every kind of setting", "defaults"])
def test_the_command_to_repeat_has_the_same_settings_after_a_shell_and_the_parser(
    settings, monkeypatch
):
    config = CompareConfig(**settings)
    words = words_of(command_to_repeat(config.model_dump(mode="json")))
    assert words[:2] == ["regrad", "compare"]
    found = []

    def stop(config, **_):
        found.append(config)
        raise ValueError("far enough")

    monkeypatch.setattr("regrad_runner.comparing.plan.make_plan", stop)
    assert main(words[1:]) == 2
    assert found == [config]


def test_several_processes_are_launched_as_they_were():
    words = words_of(command_to_repeat({"corrections": ["agc"]}, processes=2))
    assert words[:6] == ["torchrun", "--nproc-per-node", "2", "-m", "regrad_runner", "compare"]


def test_a_comparison_of_the_baseline_alone_is_repeated_from_its_settings():
    assert (
        command_to_repeat({"corrections": [], "seeds": 2}) == "regrad compare --config config.yaml"
    )


@pytest.mark.long
@needs_xgrad
def test_compare_writes_the_page_and_the_command_on_it_gives_the_same_numbers(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    small = (
        "--train-size 100 --batch-size 25 --width 4 --epochs 2 --seeds 1 --evaluations-per-epoch 4"
    )
    assert (
        main(["compare", "--corrections", "xgrad:horizon=2", *small.split(), "--out", "first"]) == 0
    )
    assert "first/report.html" in capsys.readouterr().out
    kept = {path.name for path in Path("first/artifacts").rglob("*.*") if path.is_file()}
    assert {
        "report.html",
        "figures.csv",
        "effects.csv",
        "measure-steps.svg",
        "effect-cosine.svg",
    } <= kept
    page = Page(Path("first/report.html"))
    assert "torch" in page.texts["th"]  # of the machine
    command = "".join(page.texts["code"])
    shutil.rmtree("first/artifacts")
    assert main([*words_of(command)[1:], "--tracker", "none", "--out", "second"]) == 0
    first, second = (ResultsFolder(Path(name)) for name in ("first", "second"))
    told = [
        [(r.arm, r.seed, r.value, r.validation, r.lr) for r in folder.results]
        for folder in (first, second)
    ]
    assert told[0] == told[1]
    assert first.curves == second.curves
    assert all(math.isfinite(point.seconds) and point.seconds > 0 for point in first.curves)
