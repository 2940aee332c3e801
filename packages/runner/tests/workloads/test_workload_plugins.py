import json
import sys
import tomllib
from pathlib import Path

import pytest
import regrad
import torch
from regrad import PluginLoadError
from regrad_runner.cli.main import main
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training.resolving import resolved
from regrad_runner.workloads.loading import WORKLOADS_GROUP, load_workload
from regrad_runner.workloads.samples import TensorSamples

EXAMPLE = Path(__file__).parents[4] / "docs" / "examples" / "workload_plugin"
BROKEN = """
from regrad_runner.workloads import Defaults, Measure, Workload
from regrad_runner.workloads.samples import TensorSamples
import torch

SAMPLES = TensorSamples(torch.zeros(2, 1), torch.zeros(2, 1))
DEFAULTS = Defaults(epochs=1, batch_size=1, lr=0.1, model="m")

class Own(Workload):
    def build_model(self, name, *, seed=0):
        return torch.nn.Linear(3, 1)
    def score(self, outputs, targets):
        return outputs, targets

def made(kind=Own, train=SAMPLES, measure=Measure()):
    return kind(name="x", measure=measure, train=train, validation=SAMPLES, test=SAMPLES, defaults=DEFAULTS)

def nothing(*, seed_of_split=0, data_dir=None, train_size=None):
    return 3
def bare(*, seed_of_split=0, data_dir=None, train_size=None):
    return made(kind=Workload)
def empty(*, seed_of_split=0, data_dir=None, train_size=None):
    return made(train=TensorSamples(torch.zeros(0, 1), torch.zeros(0, 1)))
def unmeasured(*, seed_of_split=0, data_dir=None, train_size=None):
    return made(measure=Measure(decimals=99))
def failing(*, seed_of_split=0, data_dir=None, train_size=None):
    return {}["key"]
def refusing(*, seed_of_split=0, data_dir=None, train_size=None):
    raise ValueError("data_dir must be a folder with counts.csv, got None")
def unfit(*, seed_of_split=0, data_dir=None, train_size=None):
    return made()
def arguments():
    return made()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make distributions importable, with the metadata that installing them writes."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def write(name, module, entries, text=None):
        info = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.1.0\n")
        lines = "".join(f"{key} = {value}\n" for key, value in entries.items())
        (info / "entry_points.txt").write_text(f"[{WORKLOADS_GROUP}]\n{lines}")
        if text is not None:
            (site / f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield write
    sys.modules.pop("regrad_decay", None)
    sys.modules.pop("broken_workloads", None)


@pytest.fixture
def example(install, monkeypatch):
    """Install the example of the documentation as its own pyproject.toml says."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    install(project["name"], "regrad_decay", project["entry-points"][WORKLOADS_GROUP])


@pytest.mark.long
@pytest.mark.usefixtures("example")
def test_the_example_is_compared_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "compare --workload decay:detectors=3 --model mlp:layers=2 --width 16 --no-controls --seeds 6 --out out"
    extra = ["--corrections", "clip-norm"] if "clip-norm" in regrad.available() else []
    assert (
        main(
            [
                *words.split(),
                *extra,
                "--epochs",
                "6",
                "--tracker",
                "none",
                "--evaluations-per-epoch",
                "2",
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    assert "decay, 600 training samples: " in said.err
    assert "test squared error" in said.out
    assert "lower is better" in said.out
    folder = ResultsFolder(tmp_path / "out")
    assert {result.status for result in folder.results} == {"finished"}
    # Ages are spread evenly over 2.5 lifetimes, a variance of .52: it learned.
    assert all(result.value < 0.2 for result in folder.results)
    first = next(result for result in folder.results if result.seed == 0)
    assert f"baseline, seed 0: test squared error {first.value:.5f}, 0.02 " in said.err
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert (about["samples"], about["measure"]["decimals"]) == ("samples", 5)
    settings = (tmp_path / "out" / "config.yaml").read_text()
    assert "workload: decay:detectors=3\n" in settings
    assert "model: mlp:layers=2\nwidth: 16\nnorm: null\n" in settings


@pytest.mark.usefixtures("example")
def test_the_example_is_listed_and_shown_with_its_options(capsys):
    assert main(["plugins", "list", "--json"]) == 0
    listed = {
        entry["name"]: entry
        for entry in json.loads(capsys.readouterr().out)
        if entry["kind"] == "workload"
    }
    assert (listed["decay"]["distribution"], listed["decay"]["version"]) == (
        "regrad-decay",
        "0.1.0",
    )
    assert "text" in listed
    assert main(["plugins", "show", "decay", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["options"][-1]["meaning"] == "How many detectors count, at least 1."


@pytest.mark.usefixtures("example")
def test_the_squared_error_is_a_mean_over_samples():
    workload = load_workload("decay")
    outputs, targets = torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [4.0]])
    errors, counts = workload.score(outputs, targets)
    assert (errors.tolist(), counts.tolist()) == ([4.0, 0.0], [1.0, 1.0])
    assert isinstance(workload.train, TensorSamples)
    assert resolved(TrainConfig(), workload).optimizer == "adam:weight_decay=0.0"


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--norm group", "norm must be left out for workload 'decay', got 'group'"),
        ("--model cnn", "no model named 'cnn' for workload 'decay'; there is mlp"),
        ("--workload decay:detectors=0", "detectors must be at least 1, got 0"),
        ("--workload decay:size=1", "workload 'decay' has no option 'size'; allowed: detectors"),
        ("--optimizer sgd --corrections powergrad", "criterion must be nn.CrossEntropyLoss"),
    ],
)
def test_what_does_not_fit_the_example_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    if "powergrad" in words and "powergrad" not in regrad.available():
        pytest.skip("regrad-powergrad is not installed")
    monkeypatch.chdir(tmp_path)
    base = [] if "--workload" in words else ["--workload", "decay"]
    assert main(["train", *base, *words.split(), "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


FAULTS = {
    "missing": (
        "nowhere:load",
        "plugin 'missing' .regrad-broken 0.1.0.* could not be imported: No module named",
    ),
    "nothing": (
        "nothing",
        "workload 'nothing' .regrad-broken 0.1.0. must return a Workload, got int",
    ),
    "bare": (
        "bare",
        "workload 'bare' .regrad-broken 0.1.0. must return a Workload that implements build_model, got",
    ),
    "empty": (
        "empty",
        "workload 'empty' .regrad-broken 0.1.0. must have Samples in train, got TensorSamples",
    ),
    "unmeasured": (
        "unmeasured",
        "workload 'unmeasured' .regrad-broken 0.1.0. must have a Measure with decimals from 0",
    ),
    "failing": ("failing", "workload 'failing' .regrad-broken 0.1.0. failed: KeyError: 'key'"),
    "arguments": (
        "arguments",
        "workload 'arguments' .regrad-broken 0.1.0. failed: TypeError: arguments.. got an",
    ),
}


def test_a_broken_workload_is_named_with_its_distribution_and_disturbs_no_other(install, capsys):
    places = {
        name: place if ":" in place else f"broken_workloads:{place}"
        for name, (place, _) in FAULTS.items()
    }
    more = {name: f"broken_workloads:{name}" for name in ("refusing", "unfit")}
    install("regrad-broken", "broken_workloads", {**places, **more}, BROKEN)
    for name, (_, message) in FAULTS.items():
        with pytest.raises(PluginLoadError, match=message):
            load_workload(name)
    with pytest.raises(ValueError, match=r"data_dir must be a folder with counts\.csv, got None"):
        load_workload("refusing")
    assert load_workload("digits", train_size=20).name == "digits"
    assert main(["train", "--workload", "unfit", "--out", "nothing"]) == 2
    assert "model must fit the samples of workload 'x', got: " in capsys.readouterr().err
