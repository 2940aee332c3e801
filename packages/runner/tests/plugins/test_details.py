import json
from dataclasses import dataclass, replace
from email.message import Message

import pytest
import regrad
import torch
from regrad.correction import Control, Correction, Needs
from regrad.registry import Entry
from regrad_runner.cli.main import main
from regrad_runner.plugins import details as plugin_details
from regrad_runner.plugins.details import describe, show_plugin

README = "# regrad-thing\n\nA title.\n\n## What it changes\n\nThe *sign*.\n\nOf everything.\n\n## Rule\n\nNone.\n"


class Thing(Correction):
    r"""Turn every gradient round.

    By :math:`-1`, that is to say
    by half a turn.

    Args:
        angle: :math:`\phi` in degrees,
            from 0 to 360.
        axis: Which one.

    Raises:
        ValueError: Never.
    """

    name = "thing"
    needs = Needs(
        stages=("gradient",),
        layouts=("plain", "ddp"),
        after=("agc",),
        conflicts={"xgrad": "it turns too"},
        closures=True,
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        angle: float = 180.0
        axis: str | None = None

    def correct_gradients(self, step):
        """Turn."""

    def control(self, optimizer):
        if type(optimizer).__name__ == "AdamW":
            return None
        return Control(name="turned", optimizer={"maximize": True}, head_lr=-1.0)


class Other(Thing):
    name = "other"

    def control(self, optimizer):
        if type(optimizer).__name__ == "SGD":
            return None
        return Control(name="nadam", optimizer_class=torch.optim.NAdam)


@pytest.fixture
def installed(monkeypatch):
    """Install two corrections, and a third that is both of them."""
    both = regrad.Composition(parts=("thing", "other"))
    loaded = {"thing": Thing, "other": Other, "both": both}
    entries = {
        name: Entry(name, "regrad-thing", "1.2", f"regrad_thing:{name}", "A thing")
        for name in loaded
    }
    about = Message()
    about["Project-URL"] = "Home, https://example.org"
    about["Description"] = README
    monkeypatch.setattr(
        regrad,
        "available",
        lambda group="regrad": entries if group == "regrad" else {},
        raising=False,
    )
    monkeypatch.setattr(regrad, "load", lambda name, group="regrad": loaded[name], raising=False)
    monkeypatch.setattr("regrad.registry.load", lambda name, group="regrad": loaded[name])
    monkeypatch.setattr(plugin_details, "_metadata_of", lambda entry: about)
    return entries


def test_a_correction_is_described_by_what_it_declares(installed):
    details = describe("correction", installed["thing"])
    assert (
        details["description"]
        == "Turn every gradient round.\n\nBy -1, that is to say by half a turn."
    )
    assert details["options"] == [
        {
            "name": "angle",
            "type": "float",
            "default": 180.0,
            "meaning": r"\phi in degrees, from 0 to 360.",
        },
        {"name": "axis", "type": "str | None", "default": None, "meaning": "Which one."},
    ]
    assert details["needs"]["stages"] == ("gradient",)
    assert details["needs"]["conflicts"] == {"xgrad": "it turns too"}
    assert details["controls"] == {
        "sgd:momentum=0.9": {"name": "turned", "optimizer": {"maximize": True}, "head_lr": -1.0},
        "adamw": None,
    }
    assert details["links"] == {"Home": "https://example.org"}
    assert details["card"] == "The *sign*.\n\nOf everything."
    assert (details["distribution"], details["version"]) == ("regrad-thing", "1.2")


def test_a_composition_has_the_options_of_its_parts_under_their_names(installed):
    details = describe("correction", installed["both"])
    assert details["parts"] == ["thing", "other"]
    assert [option["name"] for option in details["options"]] == [
        "thing.angle",
        "thing.axis",
        "other.angle",
        "other.axis",
    ]
    assert details["needs"] == {"stages": ["gradient"]}
    assert details["controls"]["sgd:momentum=0.9"]["name"] == "turned"


def test_a_control_of_another_optimizer_says_its_class_in_plain_words(installed, capsys):
    nadam = {"name": "nadam", "optimizer_class": "torch.optim.nadam.NAdam"}
    assert describe("correction", installed["other"])["controls"] == {
        "sgd:momentum=0.9": None,
        "adamw": nadam,
    }
    show_plugin("other", as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["controls"]["adamw"] == nadam


@pytest.mark.usefixtures("installed")
def test_everything_is_printed_for_people(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plugins", "show", "thing"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "thing: correction",
        "from regrad-thing 1.2, regrad_thing:thing",
        "acts on: gradient",
        "exact on: plain, ddp",
        "acts after: agc",
        "supports closures that run several times: yes",
        "conflicts with xgrad: it turns too",
        "must beat on sgd:momentum=0.9: turned (optimizer maximize=True, head_lr -1.0)",
        "must beat on adamw: nothing but the baseline",
        "Home: https://example.org",
    ):
        assert line in shown.splitlines()
    assert "sparse" not in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", sorted(regrad.available("regrad.workloads")))
def test_every_workload_of_the_runner_says_what_its_options_mean(name):
    details = describe("workload", regrad.available("regrad.workloads")[name])
    assert len(details["description"]) > 40
    assert {"seed_of_split", "data_dir", "train_size"} <= {
        option["name"] for option in details["options"]
    }
    assert [option["name"] for option in details["options"] if not option["meaning"]] == []
    assert details["card"] == ""


@pytest.mark.parametrize("group", ["regrad", "regrad.optimizers"])
def test_whatever_is_installed_can_be_shown_and_says_what_each_option_means(group, capsys):
    kind = {"regrad": "correction", "regrad.optimizers": "optimizer"}[group]
    for name, entry in regrad.available(group).items():
        details = describe(kind, entry)
        assert details["description"], name
        parts = [option["name"] for option in details["options"] if not option["meaning"]]
        assert parts == [], name
        assert main(["plugins", "show", name]) == 0
        assert capsys.readouterr().out.startswith(f"{name}: {kind}\n")


def test_a_plugin_is_json_for_programs(capsys):
    assert main(["plugins", "show", "digits", "--json"]) == 0
    (details,) = json.loads(capsys.readouterr().out)
    assert (details["kind"], details["name"], details["value"]) == (
        "workload",
        "digits",
        "regrad_runner.workloads.digits:load",
    )
    assert details["options"][0]["name"] == "seed_of_split"


@pytest.mark.usefixtures("installed")
def test_escape_codes_of_a_plugin_are_shown_and_not_obeyed(installed, capsys):
    odd = "a \x1b[31mred\x07 \u202e thing"
    installed["thing"] = replace(installed["thing"], distribution=odd, version=odd, summary=odd)
    assert main(["plugins", "show", "thing"]) == 0
    shown = capsys.readouterr().out
    assert r"a \x1b[31mred\x07 \u202e thing" in shown
    assert set(shown) - {"\n"} == {letter for letter in shown if letter.isprintable()}
    assert main(["plugins", "show", "thing", "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert json.loads(shown)[0]["summary"] == odd
    installed[odd] = installed["thing"]
    assert main(["plugins", "show", "nothing"]) == 2
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


def test_a_distribution_of_an_odd_name_is_never_looked_up(monkeypatch, tmp_path):
    """What is called "../../.." is not read from there, and what is gone meanwhile has no card."""
    entry = Entry("digits", "../../..", "1.0", "regrad_runner.workloads.digits:load", "A thing")
    details = describe("workload", entry)
    assert (details["distribution"], details["links"], details["card"]) == ("../../..", {}, "")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("error", [KeyError, ValueError, RuntimeError])
def test_a_plugin_that_fails_on_its_control_is_named_in_one_line(monkeypatch, capsys, error):
    def fails(self, optimizer):
        raise error("no\x1b[31m\nreason")

    monkeypatch.setattr(Thing, "control", fails)
    assert main(["plugins", "show", "thing"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("regrad: plugin 'thing' cannot say what it must beat: ")
    assert said.removesuffix("\n").isprintable()
