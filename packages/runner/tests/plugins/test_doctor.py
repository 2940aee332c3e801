"""The doctor on installations that are wrong in one way each, made of fake distributions in a temporary folder."""

import importlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest
from regrad_runner.cli.main import main
from regrad_runner.plugins import doctor, doctor_imports
from regrad_runner.plugins.doctor import examine, imports, show_findings
from regrad_runner.tracking.mlflow import HOST_TAG, TrackedRun, project
from regrad_runner.tracking.stores import Store

SOURCE = """
from regrad import Correction
from regrad.correction import Needs

class Gain(Correction):
    name = "gain"
    needs = Needs(stages=("gradient",))

    def correct_gradients(self, step):
        pass

class Typo(Correction):
    name = "typo"
    needs = Needs(stages=("gradient",))

    def correct_gradient(self, step):
        pass
"""
WELL = {
    "libraries": {"torch": "the CPU", "torchvision": "the CPU"},
    "device": {"kind": "cpu", "count": 0, "reasons": []},
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a distribution where this process and its children find it."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))

    def add(distribution, offers, *, source=SOURCE, needs=(), group="regrad"):
        module = distribution.replace("-", "_")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (site / f"{module}.py").write_text(source)
        required = "".join(f"Requires-Dist: {line}\n" for line in needs)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{required}"
        )
        lines = "".join(f"{name} = {module}:{value}\n" for name, value in offers.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        (info / "RECORD").write_text(f"{module}.py,,\n")
        importlib.invalidate_caches()
        return info

    return add


@pytest.fixture
def unimported(monkeypatch):
    """Let every import go well without a process, for looks at other things; change the answer by name."""
    answer = {name: {"seconds": 0.1, "problem": "", "found": found} for name, found in WELL.items()}

    def all_well(wanted):
        return {name: {"seconds": 0.1, "problem": "", "found": None} for name in wanted} | answer

    monkeypatch.setattr(doctor, "imports", all_well)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return answer


def wrong(tmp_path, **options):
    return {finding.check: finding for finding in examine(tmp_path, **options) if not finding.ok}


def test_nothing_is_wrong_with_what_is_right(tmp_path, unimported, capsys):
    assert wrong(tmp_path) == {}
    assert show_findings(examine(tmp_path)) == 0
    assert " checks, no problems" in capsys.readouterr().out


@pytest.mark.long
def test_a_plugin_that_breaks_on_import_or_ends_the_process_is_named_and_hides_no_other(install):
    install("a-good", {"gain": "Gain"})
    install("b-broken", {"broken": "Gain"}, source="print('{'); import no_such_module")
    install("c-ends", {"ends": "Gain"}, source="import os; os._exit(7)")
    install("d-typo", {"typo": "Typo"})
    seen = imports([f"regrad/{name}" for name in ("ends", "broken", "gain", "typo")])
    problems = {name.removeprefix("regrad/"): line["problem"] for name, line in seen.items()}
    assert problems["gain"] == problems["libraries"] == problems["device"] == ""
    assert (
        "plugin 'broken' (b-broken 1.0) could not be imported: No module named"
        in problems["broken"]
    )
    assert problems["ends"] == "importing it ends the process with exit code 7"
    assert "has no method 'correct_gradients'; did you mean 'correct_gradient'?" in problems["typo"]


def test_a_plugin_that_never_ends_its_import_is_named(monkeypatch):
    printed = [
        {"name": "libraries"},
        {"name": "device"},
        {"starts": "a"},
        {"name": "a"},
        {"starts": "b"},
    ]
    whole = {"seconds": 0.1, "problem": "", "found": None}
    text = "".join(json.dumps(line | whole if "name" in line else line) + "\n" for line in printed)

    def hangs(command, **options):
        if "b" in command:
            raise subprocess.TimeoutExpired(command, options["timeout"], output=text.encode())
        return subprocess.CompletedProcess(command, 0, text.replace('"a"', '"c"'), "")

    monkeypatch.setattr("subprocess.run", hangs)
    seen = imports(["a", "b", "c"])
    assert {name: line["problem"] for name, line in seen.items() if line["problem"]} == {
        "b": "importing it takes more than 300 s"
    }


def test_a_slow_import_is_measured_twice(monkeypatch):
    first = [
        {"name": name, "seconds": 9.0, "problem": "", "found": None}
        for name in ("libraries", "device", "a", "b")
    ]
    second = [
        {"name": name, "seconds": seconds, "problem": "", "found": None}
        for name, seconds in {"a": 8.0, "b": 0.1}.items()
    ]
    answers = iter([(first, ""), (second, "")])
    asked = []
    monkeypatch.setattr(doctor, "_run", lambda wanted: (asked.append(wanted), next(answers))[1])
    seen = imports(["a", "b"])
    assert asked == [["a", "b"], ["a", "b"]]
    assert (seen["a"]["seconds"], seen["b"]["seconds"]) == (8.0, 0.1)


@pytest.mark.parametrize(("load", "slow"), [(0.0, True), (1e9, False)])
def test_waiting_counts_unless_the_machine_is_busy(monkeypatch, capsys, load, slow):
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    doctor_imports.run_job("sleeps", lambda: time.sleep(0.2))
    (line,) = [
        json.loads(text)
        for text in capsys.readouterr().out.splitlines()
        if text.startswith('{"name"')
    ]
    assert (line["seconds"] >= 0.2) is slow


def test_a_process_that_ends_with_torch_is_said_of_torch(monkeypatch):
    monkeypatch.setattr(
        doctor,
        "_run",
        lambda wanted: ([{"starts": "libraries"}], "it ends the process with exit code -11"),
    )
    seen = imports(["a"])
    assert seen["libraries"]["problem"] == "it ends the process with exit code -11"
    assert seen["device"]["problem"] == seen["a"]["problem"] == "torch could not be imported"


def test_a_slow_plugin_says_how_to_see_why(install, tmp_path, unimported):
    install("a-slow", {"gain": "Gain"})
    unimported["regrad/gain"] = {"seconds": 7.0, "problem": "", "found": None}
    found = wrong(tmp_path)["plugin gain"]
    assert found.said == "a-slow 1.0: imports in 7.0 s"
    assert found.mend.endswith("-X importtime -c 'import a_slow'")


def test_one_name_of_two_distributions_and_one_module_of_two_are_found(
    install, tmp_path, unimported
):
    install("one-gain", {"gain": "Gain", "mine": "Gain"})
    info = install("other-gain", {"gain": "Gain"})
    (info / "RECORD").write_text("other_gain.py,,\none_gain.py,,\n")
    found = wrong(tmp_path)
    assert found["plugin gain"].said == "'gain' is offered by one-gain 1.0 and other-gain 1.0"
    assert found["plugin gain"].mend == "uninstall all but one"
    assert found["module one_gain"].said == "one-gain and other-gain both install it"


def test_a_plugin_for_a_newer_core_is_found_by_its_metadata(install, tmp_path, unimported):
    install(
        "regrad-later",
        {"gain": "Gain"},
        needs=["regrad<99,>=98", "torch>=2", "nothing-of-it ; extra == 'x'"],
    )
    found = wrong(tmp_path)
    assert list(found) == ["distribution regrad-later"]
    assert found["distribution regrad-later"].said.startswith("needs regrad<99,>=98, but 0.")
    assert (
        found["distribution regrad-later"].mend
        == "pip install 'regrad<99,>=98', or another version of regrad-later"
    )


def test_damaged_distributions_are_named_with_their_mend(install, tmp_path, unimported):
    install("regrad-good", {"good": "Gain"})
    (install("regrad-half", {"half": "Gain"}) / "METADATA").unlink()
    (install("a-neighbour", {}, group="others") / "METADATA").write_bytes(b"Name: \xff\n")
    (install("regrad-points", {}) / "entry_points.txt").write_text("[regrad]\nrubbish\n")
    found = wrong(tmp_path)
    assert set(found) == {
        f"distribution {name}" for name in ("regrad_half", "a_neighbour", "regrad_points")
    }
    folder = tmp_path / "site" / "regrad_half-1.0.dist-info"
    assert found["distribution regrad_half"].said == (
        f"it has no METADATA, or METADATA without a name: {folder}"
    )
    assert found["distribution regrad_half"].mend == (
        f"remove {folder}, then pip install --force-reinstall regrad_half"
    )
    assert "UnicodeDecodeError" in found["distribution a_neighbour"].said
    assert "entry_points.txt cannot be read" in found["distribution regrad_points"].said


def test_metadata_that_can_be_read_and_say_nonsense_are_named(install, tmp_path, unimported):
    info = install("odd", {"odd": "Gain"}, needs=["regrad", "!!! no requirement", "x; y == 'z'"])
    text = (info / "METADATA").read_text()
    (info / "METADATA").write_text(text.replace("Name: odd", "Name: ../../.."))
    info = install("regrad-gain", {"gain": "Gain"})
    text = (info / "METADATA").read_text()
    (info / "METADATA").write_text(text.replace("Version: 1.0", "Version: \x1b[1mone; rm -r x"))
    info = install("regrad-twice", {"twice": "Gain"})
    shutil.copytree(info, info.with_name("regrad_twice-2.0.dist-info"))
    (info / "RECORD").write_bytes(b"\xff")
    findings = [finding for finding in examine(tmp_path) if not finding.ok]
    said = {finding.said.partition(":")[0] for finding in findings}
    assert said >= {
        "its METADATA gives this name, which is not valid",
        "needs '!!! no requirement', which is not a valid requirement",
        "its METADATA gives the version '\\x1b[1mone; rm -r x'",
        "is installed twice, as 1.0 and 1.0",
    }
    (odd,) = (finding for finding in findings if "gives this name" in finding.said)
    assert odd.mend == f"remove {tmp_path}/site/odd-1.0.dist-info, then install what it belongs to"


def test_what_the_doctor_prints_is_obeyed_by_no_terminal_and_safe_to_paste(
    install, tmp_path, unimported, capsys
):
    install("regrad-\x1b[1mgain; rm x", {"\x1b[31mgain": "Gain"})
    unimported["regrad/\x1b[31mgain"] = {"seconds": 0.1, "problem": "\u202eno", "found": None}
    assert show_findings(examine(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    (finding,) = (f for f in examine(tmp_path) if "REGRAD_DISABLE" in f.mend)
    assert finding.mend.startswith("pip install --upgrade 'regrad-\x1b[1mgain; rm x'")
    assert show_findings([finding], as_json=True) == 1
    assert capsys.readouterr().out.isascii()


def test_the_process_that_imports_survives_what_ends_torch(install):
    (install("a-neighbour", {}, group="others") / "entry_points.txt").write_text("[x]\nrubbish\n")
    install("a-good", {"gain": "Gain"})
    seen = imports(["regrad/gain"])
    assert {line["problem"] for line in seen.values()} == {""}


def test_a_name_that_the_environment_leaves_out_is_said(install, tmp_path, unimported, monkeypatch):
    install("regrad-gain", {"gain": "Gain"})
    monkeypatch.setenv("REGRAD_DISABLE", "gain")
    assert wrong(tmp_path)["plugin gain"].mend == "take it off that list"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            {"problem": "RuntimeError: operator torchvision::nms does not exist", "found": None},
            "do not work together: RuntimeE",
        ),
        (
            {"problem": "", "found": {"torch": "CUDA 13.2", "torchvision": "the CPU"}},
            "are built for CUDA 13.2 and the CPU",
        ),
    ],
)
def test_a_torchvision_that_does_not_fit_torch_is_found(tmp_path, unimported, line, said):
    unimported["libraries"] = line
    found = wrong(tmp_path)["libraries"]
    assert said in found.said
    assert "--reinstall torch torchvision" in found.mend


def test_a_missing_gpu_is_wrong_only_where_one_is_asked_for(tmp_path, unimported, monkeypatch):
    assert wrong(tmp_path) == {}
    assert "torch finds none" in wrong(tmp_path, gpu=True)["device"].said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert wrong(tmp_path) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "CUDA_VISIBLE_DEVICES is '0'" in wrong(tmp_path)["device"].said
    unimported["device"] = {"problem": "", "found": {"kind": "cuda", "count": 2, "reasons": []}}
    assert wrong(tmp_path, gpu=True) == {}


@pytest.mark.usefixtures("ready_schema")
def test_a_database_that_two_hosts_write_is_found(tmp_path, unimported):
    folder = tmp_path / "outcome"
    folder.mkdir()
    for number, host in enumerate(("alpha", "beta")):
        run = TrackedRun(
            id=f"{number:032x}",
            experiment="digits",
            name="run",
            status="RUNNING",
            started=1_700_000_000_000,
            tags={HOST_TAG: host},
            folder=folder,
        )
        project(Store(folder), run)
        found = wrong(tmp_path)
        assert list(found) == ([f"database {folder / 'mlflow.db'}"] if host == "beta" else [])
    assert found[f"database {folder / 'mlflow.db'}"].said.startswith("alpha, beta have written it")
    assert (
        "mlflow server --backend-store-uri sqlite:///"
        in found[f"database {folder / 'mlflow.db'}"].mend
    )


def test_a_database_of_others_is_no_error(tmp_path, unimported):
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table other (x)")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mlflow.db").write_text("no database")
    assert wrong(tmp_path) == {}


def test_a_stale_mlruns_is_found(tmp_path, unimported):
    (tmp_path / "mlruns").mkdir()
    assert "without a tracking URI" in wrong(tmp_path)["./mlruns"].said


def test_the_command_prints_for_people_and_for_programs_and_exits_with_1(
    tmp_path, unimported, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "doctor", "--json"]) == 0
    (tmp_path / "mlruns").mkdir()
    capsys.readouterr()
    assert main(["plugins", "doctor", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["check"] for row in rows if not row["ok"]] == ["./mlruns"]
    assert main(["plugins", "doctor"]) == 1
    assert "fix: look at it, then remove it" in capsys.readouterr().out
    assert main(["plugins", "doctor", "nowhere"]) == 2
    assert "folder must be a folder, got 'nowhere'" in capsys.readouterr().err


@pytest.mark.long
def test_this_installation_imports_whole():
    names = [
        f"{group}/{name}"
        for group in doctor.GROUPS.values()
        for name in doctor.regrad.available(group)
    ]
    assert [line["problem"] for line in imports(names).values() if line["problem"]] == []
    assert "regrad_runner.plugins.doctor" in sys.modules
