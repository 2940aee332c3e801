"""What counts as loaded from a network: every way that a page has, and no link that only leads somewhere."""

import importlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))
loaded = importlib.import_module("loaded")
sys.path.remove(str(DOCS))

LOADS = [
    '<script src="https://a.example/x"></script>',
    "<SCRIPT SRC='HTTPS://a.example/x'></SCRIPT>",
    '<script async src=" //a.example/x "></script>',
    '<script>fetch("https://a.example/x")</script>',
    '<script type="module">import a from "https://a.example/x"</script>',
    "<script>s.src = `//a.example/x`</script>",
    "<body onload=\"location='https://a.example/x'\">",
    '<link rel="stylesheet" href="https://a.example/x">',
    '<link rel="preconnect" href="//a.example/x">',
    '<link rel="dns-prefetch" href="//a.example/x">',
    '<link rel="alternate stylesheet" href="https://a.example/x">',
    '<link rel="icon" href="https://a.example/x">',
    '<link rel="preload" imagesrcset="a.png, https://a.example/x 2x">',
    '<img src="http://a.example/x">',
    '<img src="a.png" srcset="b.png 1x, https://a.example/x 2x">',
    '<picture><source srcset="https://a.example/x"></picture>',
    '<video poster="https://a.example/x"></video>',
    '<iframe src="https://a.example/x"></iframe>',
    "<iframe srcdoc=\"<img src='https://a.example/x'>\"></iframe>",
    '<object data="https://a.example/x"></object>',
    '<base href="https://a.example/x">',
    '<meta http-equiv="Refresh" content="0; URL=https://a.example/x">',
    '<svg><image xlink:href="https://a.example/x"/></svg>',
    '<svg><use href="https://a.example/x#b"/></svg>',
    "<p style=\"background: url('https://a.example/x')\">",
    "<style>@import 'https://a.example/x';</style>",
    "<style>@import url(//a.example/x);</style>",
    '<style>@font-face { src: url( "https://a.example/x" ) format("woff2") }</style>',
    '<style>p { background: image-set("https://a.example/x" 2x) }</style>',
]
LEADS = [
    '<a href="https://a.example/x">there</a>',
    '<link rel="canonical" href="https://a.example/x">',
    '<link rel="license" href="https://a.example/x">',
    '<script src="_static/x.js"></script>',
    '<script src="/x.js"></script>',
    "<script>// see https://a.example/x\n/* or 'https://a.example/x' */</script>",
    '<script>document.createElementNS("http://www.w3.org/2000/svg", "g")</script>',
    '<script type="application/json">{"seen": "https://a.example/x"}</script>',
    "<img src=\"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>\">",
    '<svg xmlns="http://www.w3.org/2000/svg"><use href="#a"/></svg>',
    "<style>p { background: url(fonts/x.woff2) } /* url(https://a.example/x) */</style>",
    '<p title="https://a.example/x">src="https://a.example/x"</p>',
]


@pytest.mark.parametrize("page", LOADS)
def test_an_address_that_a_page_loads_is_found(page):
    (address,) = loaded.loaded_by_page(page)
    assert "//a.example/x" in address.lower()


@pytest.mark.parametrize("page", LEADS)
def test_a_link_a_file_and_a_name_are_not_loaded_from_a_network(page):
    assert loaded.loaded_by_page(page) == []


def test_style_sheets_scripts_and_pictures_beside_the_pages_are_read_and_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.css").write_text("@import '//a.example/x';", encoding="utf-8")
    (tmp_path / "x.js").write_text("import('https://a.example/x')", encoding="utf-8")
    (tmp_path / "x.svg").write_text("<image href='https://a.example/x'/>", encoding="utf-8")
    (tmp_path / "x.txt").write_text("<img src='https://a.example/x'>", encoding="utf-8")
    assert loaded.loaded_in(tmp_path) == [
        "a/x.css: //a.example/x",
        "x.js: https://a.example/x",
        "x.svg: https://a.example/x",
    ]


def test_the_command_ends_with_an_error_where_something_is_loaded(tmp_path):
    command = [sys.executable, str(DOCS / "loaded.py"), str(tmp_path)]
    page = tmp_path / "x.html"
    for text, code in (("<a href='https://a.example/x'>", 0), ("<img src='//a.example/x'>", 1)):
        page.write_text(text, encoding="utf-8")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, bool(done.stderr)) == (code, bool(code))


def test_a_report_loads_nothing_from_a_network(tmp_path):
    from regrad_runner.reporting.page.write import write_page
    from regrad_runner.reporting.report_data import read_report_data
    from regrad_runner.reporting.summaries import summarize_results
    from regrad_runner.results.folder import ResultsFolder, start_folder
    from regrad_runner.results.outcomes import CurvePoint, Result, numbers_of
    from regrad_runner.results.points import Point, keep_point
    from regrad_runner.results.run import begin_run
    from regrad_runner.results.tables import read_rows
    from regrad_runner.settings.config import CompareConfig
    from regrad_runner.settings.loading import load_config
    from regrad_runner.workloads.workload import Measure

    published = DOCS / "results" / "cifar10-adamw"
    kept = tmp_path / "comparison"
    config = load_config(CompareConfig, file=published / "config.yaml", flags={})
    start_folder(kept, config, json.loads((published / "about.json").read_text(encoding="utf-8")))
    curves = read_rows(published / "curves.csv", CurvePoint)
    for result in read_rows(published / "results.csv", Result):
        values = {"name": result.arm, "arm": result.arm, "seed": result.seed, "lr": result.lr}
        with begin_run(kept, values) as record:
            for row in curves:
                if (row.arm, row.seed) == (result.arm, result.seed):
                    point = {f.name: getattr(row, f.name) for f in fields(Point)}
                    keep_point(record, Point(**point))
            record.end(result.status, result=numbers_of(result))
    folder, measure = ResultsFolder(kept), Measure()
    write_page(read_report_data(folder, measure, summarize_results(folder.results, measure)))
    assert (kept / "report.html").is_file()
    assert list(kept.glob("figures/*.svg"))
    assert loaded.loaded_in(kept) == []
