"""Entry points of installed distributions, by fake distributions in a temporary folder."""

import importlib
import itertools
import re
import sys

import pytest
import regrad
from regrad import Composition, Correction, PluginLoadError, RegradError, registry
from regrad.correction import API_VERSION

SOURCE = """
from dataclasses import dataclass
from regrad import Composition, Correction
from regrad.correction import Needs, Options

class Gain(Correction):
    name = "gain"
    needs = Needs(stages=("gradient",))

    @dataclass(frozen=True, kw_only=True)
    class Options(Options):
        amount: float = 0.5
        power: int = 1

    def correct_gradients(self, step):
        pass

class Tilt(Gain):
    name = "tilt"

class Nameless(Correction):
    needs = Needs(stages=("gradient",))

class Newer(Gain):
    name = "newer"
    api_version = {api} + 1

class Older(Gain):
    name = "older"
    api_version = {api} - 1

pair = Composition(parts=("gain", "tilt"))
not_a_correction = object()
def function(): return "called"
"""
modules = itertools.count()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a distribution with entry points; all are gone after the test."""

    def add(
        name,
        entries,
        *,
        version="1.0",
        source=SOURCE,
        folder="site",
        group="regrad",
        file=None,
        needs=(),
    ):
        site = tmp_path / folder
        module = f"fake_plugin_{next(modules)}"
        info = site / f"{(file or name).replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(source.replace("{api}", str(API_VERSION)))
        required = "".join(f"Requires-Dist: {line}\n" for line in needs)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: A fake\n" + required
        )
        lines = "".join(f"{key} = {module}:{value}\n" for key, value in entries.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        return module

    return add


def test_available_reads_metadata_alone(install):
    module = install(
        "regrad-gain", {"gain": "Gain"}, version="1.2", source="raise RuntimeError('imported')"
    )
    entry = regrad.available()["gain"]
    assert (entry.name, entry.distribution, entry.version) == ("gain", "regrad-gain", "1.2")
    assert entry.value == f"{module}:Gain"
    assert entry.summary == "A fake"
    assert entry.refused is None
    assert module not in sys.modules


def test_importing_regrad_and_listing_imports_no_torch(python):
    code = "import regrad, sys; regrad.available(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert python(code) == "False False\n"


def test_installing_does_not_activate(install, toys):
    install("regrad-gain", {"gain": "Gain"})
    model = toys.Net()
    assert str(regrad.attach(model, toys.sgd(model), [])) == "regrad attachment: no corrections"


def test_a_correction_is_created_by_name_with_options_from_the_text_and_from_keywords(install):
    install("regrad-gain", {"gain": "Gain"})
    assert issubclass(regrad.load("gain"), Correction)
    assert vars(regrad.create("gain").options) == {"amount": 0.5, "power": 1}
    assert vars(regrad.create("gain:amount=0.25,power=3").options) == {"amount": 0.25, "power": 3}
    assert vars(regrad.create("gain", amount=2).options)["amount"] == 2
    assert vars(regrad.create("gain:amount=0.25", amount=2.0).options)["amount"] == 2.0
    assert repr(regrad.create("gain:power=3")) == "Gain(amount=0.5, power=3)"


def test_attach_takes_names_and_the_receipt_says_where_they_come_from(install, toys):
    install("regrad-gain", {"gain": "Gain"}, version="3.1")
    model = toys.Net()
    attachment = regrad.attach(model, toys.sgd(model), ["gain:power=2", toys.Scale()])
    first, second = attachment.receipt()["corrections"]
    assert (first["name"], first["distribution"], first["version"]) == (
        "gain",
        "regrad-gain",
        "3.1",
    )
    assert first["options"] == {"amount": 0.5, "power": 2}
    assert (second["distribution"], second["version"]) == ("local", "")


def test_a_correction_of_ones_own_with_the_name_of_an_installed_one_is_called_local(install, toys):
    install("regrad-scale", {"scale": "Gain"})
    model = toys.Net()
    receipt = regrad.attach(model, toys.sgd(model), [toys.Scale()]).receipt()
    assert receipt["corrections"][0]["distribution"] == "local"


def test_a_plugin_that_fails_on_import_is_named_with_its_cause_and_leaves_the_others_alone(install):
    install("regrad-gain", {"gain": "Gain"})
    install(
        "regrad-broken", {"broken": "Broken"}, version="0.3", source="import no_such_module_at_all"
    )
    assert set(regrad.available()) >= {"gain", "broken"}
    message = r"plugin 'broken' \(regrad-broken 0.3\) could not be imported: No module named 'no_such_module_at_all'"
    with pytest.raises(PluginLoadError, match=message) as caught:
        regrad.create("broken")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert regrad.create("gain").name == "gain"


@pytest.mark.parametrize("source", ["1 / 0", "def broken(:", "Other = 1", "raise SystemExit(3)"])
def test_any_way_of_failing_on_import_is_the_plugins_and_named(install, source):
    install("regrad-broken", {"broken": "Broken"}, source=source)
    with pytest.raises(
        PluginLoadError, match=r"plugin 'broken' \(regrad-broken 1.0\) could not be imported"
    ):
        regrad.load("broken")


def test_two_distributions_with_one_name_are_refused_and_both_named(install):
    install("regrad-gain", {"gain": "Gain"})
    install("rival-gain", {"gain": "Gain", "tilt": "Tilt"}, version="2.0")
    assert "regrad-gain 1.0 and rival-gain 2.0" in regrad.available()["gain"].refused
    with pytest.raises(
        PluginLoadError, match=r"'gain' is offered by regrad-gain 1.0 and rival-gain 2.0; uninstall"
    ):
        regrad.create("gain")
    assert regrad.create("tilt").name == "tilt"


@pytest.mark.parametrize("spelling", ["regrad-gain", "Regrad_Gain", "regrad.gain"])
def test_the_same_distribution_found_twice_is_one(install, spelling):
    install("regrad-gain", {"gain": "Gain"}, folder="lib")
    # The name of the folder differs as well, so that importlib itself does not take the two for one.
    install(spelling, {"gain": "Gain"}, folder="lib64", file=f"{spelling}.copy")
    assert regrad.available()["gain"].refused is None
    assert regrad.create("gain").name == "gain"


def test_a_linked_site_folder_lists_a_distribution_once(install, tmp_path, monkeypatch):
    install("regrad-gain", {"gain": "Gain"}, folder="lib")
    (tmp_path / "lib64").symlink_to(tmp_path / "lib")
    monkeypatch.syspath_prepend(str(tmp_path / "lib64"))
    assert regrad.available()["gain"].refused is None
    assert regrad.create("gain").name == "gain"


def test_a_distribution_without_metadata_does_not_stop_the_listing(install, tmp_path):
    install("regrad-gain", {"gain": "Gain"})
    install("regrad-half", {"half": "Gain"})
    (tmp_path / "site" / "regrad_half-1.0.dist-info" / "METADATA").unlink()
    assert regrad.create("gain").name == "gain"
    assert "gain" in regrad.available()


def test_a_distribution_without_a_summary_is_listed(install, tmp_path):
    install("regrad-gain", {"gain": "Gain"})
    (tmp_path / "site" / "regrad_gain-1.0.dist-info" / "METADATA").write_text(
        "Name: regrad-gain\nVersion: 1.0\n"
    )
    assert regrad.available()["gain"].summary == ""


@pytest.mark.parametrize(
    ("name", "mend"), [("newer", "a newer regrad"), ("older", "a newer version of the plugin")]
)
def test_a_plugin_for_another_api_is_refused_and_says_what_to_install(install, name, mend):
    install("regrad-other", {name: name.title()})
    with pytest.raises(
        PluginLoadError, match=rf"plugin '{name}' \(regrad-other 1.0\) .*api \d+.*install {mend}"
    ):
        regrad.create(name)


@pytest.mark.parametrize("source", [SOURCE, "from regrad.correction import NameOfTomorrow"])
def test_a_plugin_for_a_newer_core_names_the_version_that_it_needs(install, source):
    needs = ["torch>=2.12", "regrad-data>=2", "regrad<0.9,>=0.8"]
    install("regrad-other", {"newer": "Newer"}, source=source, needs=needs)
    with pytest.raises(
        PluginLoadError, match=r"plugin 'newer' \(regrad-other 1.0, for regrad<0.9,>=0.8\) "
    ):
        regrad.create("newer")


@pytest.mark.parametrize(
    ("variable", "names", "reason"),
    [
        (
            "REGRAD_DISABLE",
            "other, gain",
            "REGRAD_DISABLE in the environment leaves out 'gain'; take it off that list",
        ),
        (
            "REGRAD_PLUGINS",
            "tilt other",
            "REGRAD_PLUGINS in the environment leaves out 'gain'; put it on that list",
        ),
    ],
)
def test_the_environment_leaves_out_corrections_by_name(
    install, monkeypatch, variable, names, reason
):
    install("regrad-pair", {"gain": "Gain", "tilt": "Tilt", "pair": "pair"})
    monkeypatch.setenv(variable, names)
    assert regrad.available()["gain"].refused == reason
    with pytest.raises(PluginLoadError, match=re.escape(reason)):
        regrad.create("gain")
    assert regrad.create("tilt").name == "tilt"
    monkeypatch.setenv("REGRAD_PLUGINS", "pair tilt" if variable == "REGRAD_PLUGINS" else "")
    with pytest.raises(
        PluginLoadError, match=re.escape(reason)
    ):  # a part is left out of its composition too
        regrad.create("pair")


@pytest.mark.parametrize("variable", ["REGRAD_DISABLE", "REGRAD_PLUGINS"])
@pytest.mark.parametrize("names", ["", " ", ","])
def test_an_empty_list_leaves_nothing_out(install, monkeypatch, variable, names):
    install("regrad-gain", {"gain": "Gain"})
    monkeypatch.setenv(variable, names)
    assert regrad.create("gain").name == "gain"


def test_the_list_of_corrections_says_nothing_of_optimizers_and_workloads(install, monkeypatch):
    install("regrad-tom", {"tom": "function"}, group="regrad.optimizers")
    monkeypatch.setenv("REGRAD_PLUGINS", "gain")
    assert regrad.load("tom", "regrad.optimizers")() == "called"
    monkeypatch.setenv("REGRAD_DISABLE", "tom")
    with pytest.raises(PluginLoadError, match="REGRAD_DISABLE in the environment leaves out 'tom'"):
        regrad.load("tom", "regrad.optimizers")


def test_a_name_claimed_twice_is_said_before_what_the_environment_leaves_out(install, monkeypatch):
    install("regrad-gain", {"gain": "Gain"})
    install("rival-gain", {"gain": "Gain"}, version="2.0")
    monkeypatch.setenv("REGRAD_DISABLE", "gain")
    assert "uninstall all but one" in regrad.available()["gain"].refused


def test_a_part_beside_its_composition_is_the_same_correction_twice_and_both_are_named(
    install, toys
):
    install("regrad-pair", {"gain": "Gain", "tilt": "Tilt", "pair": "pair"})
    model = toys.Net()
    for given in (["pair", "gain"], ["gain", "pair"]):
        with pytest.raises(
            RegradError, match=re.escape(f"must be different, got 'gain' twice in {given}")
        ):
            regrad.attach(model, toys.sgd(model), given)


def test_a_class_whose_name_differs_from_its_entry_point_is_refused(install):
    install("regrad-gain", {"gains": "Gain"})
    with pytest.raises(
        PluginLoadError,
        match=r"plugin 'gains' \(regrad-gain 1.0\) must offer a class .*name.*'gains'",
    ):
        regrad.load("gains")


def test_a_class_without_a_name_is_refused(install):
    install("regrad-gain", {"gain": "Nameless"})
    with pytest.raises(PluginLoadError, match=r"plugin 'gain' \(regrad-gain 1.0\)"):
        regrad.load("gain")


def test_an_object_that_is_no_correction_is_refused(install):
    install("regrad-gain", {"gain": "not_a_correction"})
    with pytest.raises(
        PluginLoadError, match="must offer a Correction class or a Composition, got <object"
    ):
        regrad.load("gain")


def test_an_unknown_name_lists_what_is_installed_and_the_nearest(install):
    install("regrad-gain", {"gain": "Gain"})
    with pytest.raises(
        ValueError, match=r"no correction named 'gian'; installed: .*gain.*; did you mean 'gain'"
    ):
        regrad.create("gian")


def test_other_groups_follow_the_same_rules(install):
    install("regrad-tom", {"tom": "function"}, group="regrad.optimizers")
    install(
        "regrad-data",
        {"digit": "function"},
        group="regrad.workloads",
        source="import no_such_module_at_all",
    )
    assert regrad.load("tom", "regrad.optimizers")() == "called"
    assert "tom" not in regrad.available()
    with pytest.raises(
        PluginLoadError, match=r"plugin 'digit' \(regrad-data 1.0\) could not be imported"
    ):
        regrad.load("digit", "regrad.workloads")
    with pytest.raises(ValueError, match=r"no optimizer named 'tim'; installed: .*tom"):
        regrad.load("tim", "regrad.optimizers")


def test_a_composition_becomes_its_parts_with_prefixed_options(install, toys):
    install("regrad-pair", {"gain": "Gain", "tilt": "Tilt", "pair": "pair"})
    assert regrad.load("pair") == Composition(parts=("gain", "tilt"))
    made = regrad.create("pair:gain.amount=0.25,tilt.power=4", **{"gain.power": 2})
    assert [(c.name, vars(c.options)) for c in made] == [
        ("gain", {"amount": 0.25, "power": 2}),
        ("tilt", {"amount": 0.5, "power": 4}),
    ]
    model = toys.Net()
    assert [c.name for c in regrad.attach(model, toys.sgd(model), ["pair"]).corrections] == [
        "gain",
        "tilt",
    ]


@pytest.mark.parametrize("option", ["amount=1", "other.amount=1", "gain.amonut=1"])
def test_an_option_of_a_composition_that_no_part_has_is_refused(install, option):
    install("regrad-pair", {"gain": "Gain", "tilt": "Tilt", "pair": "pair"})
    with pytest.raises(
        TypeError, match=r"'pair' must start with .*gain, tilt|has no option 'amonut'"
    ):
        regrad.create(f"pair:{option}")


def test_a_part_that_is_missing_is_named(install):
    install("regrad-pair", {"gain": "Gain", "pair": "pair"})
    with pytest.raises(ValueError, match="no correction named 'tilt'"):
        regrad.create("pair")


def test_a_damaged_neighbour_leaves_the_others_and_the_receipt_alone(install, toys, tmp_path):
    install("regrad-gain", {"gain": "Gain"}, version="3.1")
    for name, file, content in (
        ("regrad-half", "METADATA", b""),
        ("regrad-bytes", "METADATA", b"Name: \xff\n"),
        ("regrad-points", "entry_points.txt", b"[regrad]\nrubbish\n"),
        ("../../..", "RECORD", b"../../../x,,\n"),
    ):
        folder = re.sub(r"\W", "_", name)
        install(name, {folder: "Tilt"}, file=folder)
        (tmp_path / "site" / f"{folder}-1.0.dist-info" / file).write_bytes(content)
    model = toys.Net()
    receipt = regrad.attach(model, toys.sgd(model), ["gain"]).receipt()
    assert receipt["corrections"][0]["distribution"] == "regrad-gain"
    assert regrad.available()["_" * 8].distribution == "../../.."
    with pytest.raises(ValueError, match=r"has it, but it has no METADATA.*; reinstall it"):
        regrad.load("regrad_half")


@pytest.mark.parametrize("value", ["", "two words:X", "a-b:C", "!!!", ":", "a:b:c"])
def test_an_entry_point_that_names_no_object_says_how_it_must_look(install, tmp_path, value):
    install("regrad-gain", {"gain": "Gain"})
    points = tmp_path / "site" / "regrad_gain-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"[regrad]\ngain = {value}\n")
    importlib.invalidate_caches()
    with pytest.raises(PluginLoadError, match=r"plugin 'gain' .*'module:attribute', got"):
        regrad.load("gain")


def test_errors_show_what_a_plugin_says_without_its_escape_codes(install):
    source = r"raise RuntimeError('\x1b[31mred\u202e')"
    install("regrad-\x1b[1m", {"gain": "Gain"}, file="odd", source=source, needs=["regrad<\x1b[2m"])
    with pytest.raises(PluginLoadError) as caught:
        regrad.load("gain")
    assert str(caught.value).isprintable()
    assert r"(regrad-\x1b[1m 1.0, for regrad<\x1b[2m)" in str(caught.value)
    assert r"\x1b[31mred\u202e" in str(caught.value)
    install("other-\x1b[1m", {"gain": "Gain"}, file="other")
    with pytest.raises(PluginLoadError, match="is offered by") as caught:
        regrad.load("gain")
    assert str(caught.value).isprintable()


def test_a_name_of_another_group_is_said_to_be_that(install, toys):
    install("regrad-tom", {"tom": "function"}, group="regrad.optimizers")
    install("regrad-data", {"digit": "function"}, group="regrad.workloads")
    install("regrad-gain", {"gain": "Gain"})
    model = toys.Net()
    with pytest.raises(
        ValueError, match=r"'tom' is an optimizer: train with it .*load\('tom', 'regrad.optimiz"
    ):
        regrad.attach(model, toys.sgd(model), ["tom"])
    for name in ("adamw", "SGD"):
        with pytest.raises(ValueError, match=rf"'{name}' is an optimizer of torch: train with it"):
            regrad.attach(model, toys.sgd(model), [name])
    with pytest.raises(ValueError, match="'digit' is a workload: give it to --workload"):
        regrad.create("digit")
    with pytest.raises(
        ValueError, match=r"no optimizer named 'gain'.*'gain' is a correction: give"
    ):
        regrad.load("gain", "regrad.optimizers")


@pytest.mark.parametrize(
    "text", ["gain, tilt", "gain,tilt", "gain+tilt", "gain tilt", " gain ; tilt", "gain+tilt,"]
)
def test_several_corrections_in_one_text_are_taken_apart_in_the_error(install, toys, text):
    install("regrad-pair", {"gain": "Gain", "tilt": "Tilt"})
    model = toys.Net()
    for given, kind in ((text, TypeError), ([text], ValueError)):
        with pytest.raises(kind, match=re.escape("write ['gain', 'tilt']")):
            regrad.attach(model, toys.sgd(model), given)


def test_options_stay_with_their_correction_when_a_text_is_taken_apart(install):
    install("regrad-pair", {"gain": "Gain", "tilt": "Tilt"})
    parts = registry.several_in("gain:amount=1e+2,power=3 , tilt:amount=[gain,tilt]+gain")
    assert parts == ["gain:amount=1e+2,power=3", "tilt:amount=[gain,tilt]", "gain"]
    quoted = "gain:amount='gain, tilt',power=\"gain+tilt\""
    lists = "gain:amount=[gain,tilt]"
    for one in ("gain", lists, quoted, "gains,tilts", "", "gain:power=2,amount=1"):
        assert registry.several_in(one) == []
    with pytest.raises(ValueError, match=re.escape("write ['gain:power=2', 'tilt']")):
        regrad.create("gain:power=2,tilt")
    with pytest.raises(ValueError, match=re.escape("write ['gain:power=2', 'tilt']")):
        regrad.create("gain:power=2+tilt")


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (None, "got None; write []"),
        ("gain", "write ['gain']"),
        ({"gain": {"amount": 0.5}}, "got a dict; write [regrad.create('gain', amount=0.5)]"),
        ({"gain"}, "got a set, which has no order; write ['gain']"),
        (3, "corrections must be a list, got 3"),
        (b"gain", "corrections must be a list, got b'gain'"),
        ([("gain", {"amount": 0.5})], "write [regrad.create('gain', amount=0.5)]"),
        ([{"gain": {"gain.a": 1}}], "write [regrad.create('gain', **{'gain.a': 1})]"),
        ([["gain", "tilt"]], "write ['gain', 'tilt']"),
        ([None], "corrections must be names or Correction objects, got None"),
        ([Composition(parts=("gain",))], "write the name it is installed under"),
    ],
)
def test_corrections_in_a_wrong_form_are_refused_with_the_right_one(toys, hooks_on, given, form):
    model = toys.Net()
    optimizer = toys.sgd(model)
    before = hooks_on(model, optimizer)
    with pytest.raises(TypeError, match=re.escape(form)):
        regrad.attach(model, optimizer, given)
    assert hooks_on(model, optimizer) == before


def test_a_class_an_object_and_an_optimizer_are_refused_with_the_right_form(toys):
    model = toys.Net()
    optimizer = toys.sgd(model)
    for given in (toys.Scale, [toys.Scale]):
        with pytest.raises(TypeError, match=r"got the class Scale; write \[Scale\(\)\]"):
            regrad.attach(model, optimizer, given)
    with pytest.raises(TypeError, match=r"must be a list, got Scale\(.*; write \[Scale\("):
        regrad.attach(model, optimizer, toys.Scale())
    for given in (optimizer, [optimizer], [type(optimizer)]):
        with pytest.raises(TypeError, match=r"got the optimizer SGD; it is the argument before"):
            regrad.attach(model, optimizer, given)


def test_corrections_may_come_from_a_generator(toys):
    model = toys.Net()
    attachment = regrad.attach(model, toys.sgd(model), (c for c in [toys.Scale()]))
    assert [c.name for c in attachment.corrections] == ["scale"]


def test_a_spec_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match=r"spec must be a name such as 'agc:max_ratio=0.02', got 3"):
        regrad.create(3)
