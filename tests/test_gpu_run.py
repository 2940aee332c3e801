"""`docs/gpu/run.sh` from end to end, on the CPU, in an environment of what a lent machine has."""

import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from regrad_runner.workloads.images import Augmentation, ImageSet

FOLDER = Path(__file__).parent.parent / "docs" / "gpu"
# What the machine has, with what these need; no MLflow, no datasets, no pydantic, no nox.
THERE = (
    *("torch", "torchvision", "torchdiffeq", "pluggy", "pyarrow", "pillow", "numpy", "scipy"),
    *("scikit-learn", "accelerate", "psutil", "pyyaml", "matplotlib", "jinja2", "markupsafe"),
    *("packaging", "rich", "pytest", "pytest-timeout", "hypothesis"),
)
NOT_THERE = ("mlflow", "datasets", "nox", "pydantic", "docstring_parser", "regrad", "timm")
IMAGES = {"train": 400, "test": 20}  # more than a batch of the settings


def with_needs(names, normal):
    """Return distributions with all that they need here."""
    found = {}
    waiting = list(names)
    while waiting:
        name = normal(waiting.pop())
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        needs = map(Requirement, found[name].requires or [])
        waiting += [
            need.name
            for need in needs
            if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return found.values()


def top_levels(distribution):
    """Return the files and folders of a distribution that lie beside those of others."""
    parts = {path.parts[0] for path in distribution.files or []}
    return {
        Path(str(distribution.locate_file(part)))
        for part in parts
        if part not in ("..", "__pycache__") and not part.startswith("__editable__")
    }


@pytest.fixture(scope="module")
def machine(tmp_path_factory, normal_name):
    """Return the interpreter of an environment that has `THERE` and nothing else."""
    folder = tmp_path_factory.mktemp("machine")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in with_needs(THERE, normal_name):
        for path in top_levels(distribution):
            if not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


def write_wheel(folder, distribution, source=None):
    """Write what a distribution installs as a wheel; of a member, its source."""
    about = next(path for path in top_levels(distribution) if path.name.endswith(".dist-info"))
    tops = top_levels(distribution)
    if source is not None:
        tops = {about, *source.iterdir()}
    with zipfile.ZipFile(folder / f"{about.stem}-py3-none-any.whl", "w") as wheel:
        for top in tops:
            for path in [top, *top.rglob("*")]:
                if path.is_file() and "__pycache__" not in path.parts:
                    wheel.write(path, path.relative_to(top.parent))


def write_images(path, count, seed):
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        stream = io.BytesIO()
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "label": index % 10})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, members):
    """Return a folder like the one that `run.sh --pack` makes, with a few images of noise."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "wheels").mkdir()
    for member in members:
        write_wheel(
            folder / "wheels", metadata.distribution(member.project["name"]), member.path / "src"
        )
    (listed,) = re.findall(
        r"MISSING=\((.*?)\)", (FOLDER / "pack.sh").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    for name in listed.split():
        write_wheel(folder / "wheels", metadata.distribution(name))
    own = FOLDER / "on_device" / "src"
    with zipfile.ZipFile(folder / "wheels" / "regrad_on_device-0.1.0-py3-none-any.whl", "w") as w:
        for path in own.rglob("*.py"):
            w.write(path, path.relative_to(own))
        about = "regrad_on_device-0.1.0.dist-info"
        w.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: regrad-on-device\nVersion: 0.1.0\n"
        )
        w.writestr(
            f"{about}/entry_points.txt", "[regrad.workloads]\non-device = regrad_on_device:load\n"
        )
    (folder / "data").mkdir()
    for seed, (split, count) in enumerate(IMAGES.items()):
        write_images(folder / "data" / f"{split}.parquet", count, seed)
    return folder


def test_the_machine_lacks_what_a_lent_one_lacks(machine):
    looked_up = (
        "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    )
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(
        [machine, "-c", looked_up, *NOT_THERE, "torch"],
        capture_output=True,
        text=True,
        check=True,
        env=clean,
    )
    assert found.stdout.strip() == "['torch']"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_everything_runs_without_a_network_and_leaves_its_results_in_one_file(
    machine, packed, tmp_path
):
    out, archive = tmp_path / "out", tmp_path / "all.tar.gz"
    words = ("--tiny", "--device", "cpu", "--jobs", "2", "--minutes", "12")
    ended = subprocess.run(
        ["bash", FOLDER / "run.sh", out, "--packed", packed, *words, "--archive", archive],
        env=os.environ | {"PYTHON": str(machine), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    logs = [path.read_text(encoding="utf-8") for path in sorted(out.glob("logs/*"))]
    told = "\n".join([ended.stdout, ended.stderr, *logs])
    assert ended.returncode == 0, told
    assert "it failed" not in ended.stdout, told
    assert "exit code 1" not in ended.stdout, told
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert "10 arms, 30 runs choose rates" in summary, told
    assert re.search(r"runs have \d of 8 epochs", summary), told
    assert "cifar10 (exit code 0)" in summary, told
    assert "cifar10-no-norm (exit code 0)" in summary, told
    with tarfile.open(archive) as content:
        names = content.getnames()
    wanted = {
        "summary.md",
        "bench/cases.csv",
        "bench/forms.csv",
        "bench/synchronisations.csv",
        "cifar10/results.csv",
        "cifar10/report.html",
        "cifar10-no-norm/results.csv",
    }
    assert wanted - set(names) == set(), told
    assert len([name for name in names if name.endswith("receipt.json")]) == 13, told
    assert archive.stat().st_size < 15 * 2**20


@pytest.fixture
def on_device():
    """Return the workload's module, without installing it."""
    path = FOLDER / "on_device" / "src" / "regrad_on_device" / "__init__.py"
    spec = importlib.util.spec_from_file_location("regrad_on_device", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("augment", [None, Augmentation(shift=2, flip=True)])
def test_images_on_the_device_are_those_of_the_cpu_number_by_number(on_device, augment):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (12, 3, 8, 8), generator=generator, dtype=torch.uint8)
    mean, std = torch.tensor([100.0, 110.0, 120.0]), torch.tensor([50.0, 60.0, 70.0])
    images = ImageSet(pixels, torch.arange(12) % 3, mean=mean, std=std, augment=augment)
    moved = on_device.ImageSetOnDevice(images, torch.device("cpu"))
    for epoch in range(3):
        expected, there = images.with_seed(5), moved.with_seed(5)
        expected.set_epoch(epoch)
        there.set_epoch(epoch)
        for indices in ([3, 0, 11], [7]):
            ours, labels = there.__getitems__(indices)
            theirs, same_labels = expected.__getitems__(indices)
            assert torch.equal(ours, theirs)
            assert torch.equal(labels, same_labels)
            assert ours.is_contiguous(memory_format=torch.channels_last)


def test_a_model_on_the_device_has_its_weights_in_channels_last(on_device, tmp_path):
    for seed, split in enumerate(IMAGES):
        write_images(tmp_path / f"{split}.parquet", 40, seed)
    workload = on_device.load(data_dir=tmp_path)
    model = workload.build_model("resnet8")
    assert (len(workload.train), len(workload.validation)) == (30, 10)  # at least one of each class
    assert model.stages[1][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_missing_file_is_one_line(on_device, tmp_path):
    with pytest.raises(ValueError, match=r"data_dir must hold train\.parquet, got"):
        on_device.load(data_dir=tmp_path)
