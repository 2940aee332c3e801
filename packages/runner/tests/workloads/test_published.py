import hashlib
import http.server
import pickle
import tarfile
import threading
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from regrad_runner.cli.main import main
from regrad_runner.workloads.loading import load_workload
from regrad_runner.workloads.published import cifar10, cifar100, fashion_mnist
from torchvision import datasets

CLASSES = 4
PER_CLASS = 20


def pixels(count, *shape, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_batch(file, images, labels, *, key):
    """Write images [N, 3, 32, 32] as the authors of CIFAR do: a pickled dict with a row of 3,072 bytes per image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps({"data": images.reshape(len(images), -1), key: labels}))
    return [file.name, hashlib.md5(file.read_bytes()).hexdigest()]


def write_cifar(root, monkeypatch, kind, *, key, files):
    """Write a small data set in the format of CIFAR, and let torchvision take its checksums for the published ones."""
    labels = list(range(CLASSES)) * PER_CLASS
    images = {
        name: pixels(len(labels), 3, 32, 32, seed=seed)
        for seed, name in enumerate([*files, "test"])
    }
    folder = root / kind.base_folder
    lists = [write_batch(folder / name, images[name], labels, key=key) for name in files]
    test = write_batch(folder / kind.test_list[0][0], images["test"], labels, key=key)
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: list("abcd")}))
    monkeypatch.setattr(kind, "train_list", lists)
    monkeypatch.setattr(kind, "test_list", [test])
    monkeypatch.setattr(
        kind, "meta", {**kind.meta, "md5": hashlib.md5(meta.read_bytes()).hexdigest()}
    )
    return np.concatenate([images[name] for name in files]), images["test"], labels


def write_cifar10(root, monkeypatch):
    return write_cifar(
        root, monkeypatch, datasets.CIFAR10, key="labels", files=["data_batch_1", "data_batch_2"]
    )


def write_idx(file, values):
    """Write bytes in the format of MNIST: type, number of dimensions, sizes, content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    file.write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes())


def write_fashion(root):
    labels = np.array(list(range(10)) * 6, dtype=np.uint8)
    images = {name: pixels(60, 28, 28, seed=seed) for seed, name in enumerate(("train", "t10k"))}
    for name, values in images.items():
        write_idx(root / "FashionMNIST" / "raw" / f"{name}-images-idx3-ubyte", values)
        write_idx(root / "FashionMNIST" / "raw" / f"{name}-labels-idx1-ubyte", labels)
    return images["train"], images["t10k"], labels


def as_rows(image_set):
    return sorted(zip(image_set.images.flatten(1).tolist(), image_set.labels.tolist(), strict=True))


def test_the_images_are_those_of_the_files(tmp_path, monkeypatch):
    train, test, labels = write_cifar10(tmp_path, monkeypatch)
    workload = load_workload("cifar10", data_dir=tmp_path)
    assert torch.equal(workload.test.images, torch.from_numpy(test))
    assert workload.test.labels.tolist() == labels
    assert (workload.train.channels, workload.train.image_size, workload.classes) == (
        3,
        32,
        CLASSES,
    )
    everything = [
        (row.flatten().tolist(), label) for row, label in zip(train, labels * 2, strict=True)
    ]
    assert sorted(as_rows(workload.train) + as_rows(workload.validation)) == sorted(everything)


def test_a_tenth_of_the_training_images_validates_with_every_class_in_proportion(
    tmp_path, monkeypatch
):
    write_cifar10(tmp_path, monkeypatch)
    workload = load_workload("cifar10", data_dir=tmp_path)
    assert torch.bincount(workload.validation.labels).tolist() == [4] * CLASSES
    assert torch.bincount(workload.train.labels).tolist() == [36] * CLASSES
    small = load_workload("cifar10", data_dir=tmp_path, train_size=8)
    assert torch.bincount(small.train.labels).tolist() == [2] * CLASSES
    assert len(small.validation) == 8
    other = load_workload("cifar10", data_dir=tmp_path, seed_of_split=1)
    assert not torch.equal(other.validation.images, workload.validation.images)
    assert torch.equal(other.test.images, workload.test.images)


def test_training_images_are_shifted_and_mirrored_and_all_are_scaled_by_their_moments(
    tmp_path, monkeypatch
):
    write_cifar10(tmp_path, monkeypatch)
    workload = load_workload("cifar10", data_dir=tmp_path)
    assert (workload.train.augment.shift, workload.train.augment.flip) == (4, True)
    assert workload.validation.augment is workload.test.augment is None
    raw = workload.train.images.double()
    assert torch.allclose(workload.test.mean.flatten(), raw.mean((0, 2, 3)).float())
    assert torch.allclose(workload.test.std.flatten(), raw.std((0, 2, 3), correction=0).float())


def test_the_fine_labels_of_cifar100_are_read(tmp_path, monkeypatch):
    _, test, labels = write_cifar(
        tmp_path, monkeypatch, datasets.CIFAR100, key="fine_labels", files=["train"]
    )
    workload = load_workload("cifar100", data_dir=tmp_path)
    assert torch.equal(workload.test.images, torch.from_numpy(test))
    assert workload.test.labels.tolist() == labels
    assert (workload.name, workload.classes) == ("cifar100", CLASSES)


def test_fashion_mnist_is_grey_and_of_28_pixels(tmp_path):
    _, test, labels = write_fashion(tmp_path)
    workload = load_workload("fashion-mnist", data_dir=tmp_path)
    assert torch.equal(workload.test.images[:, 0], torch.from_numpy(test))
    assert workload.test.labels.tolist() == labels.tolist()
    assert (workload.train.channels, workload.train.image_size, workload.classes) == (1, 28, 10)
    assert workload.train.augment.shift == 3


def test_the_folder_of_the_data_set_itself_may_be_named(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    write_fashion(tmp_path)
    assert len(load_workload("cifar10", data_dir=tmp_path / "cifar-10-batches-py").test) == 80
    assert len(load_workload("fashion-mnist", data_dir=tmp_path / "FashionMNIST").test) == 60


def test_without_a_folder_data_in_the_working_directory_is_read(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "data", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert len(load_workload("cifar10").test) == 80


@pytest.mark.parametrize(
    "workload", [cifar10, cifar100, fashion_mnist], ids=lambda workload: workload.name
)
def test_what_is_missing_is_said_in_one_line_with_both_ways_on(
    tmp_path, monkeypatch, capsys, workload
):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--workload", workload.name, "--data-dir", "there"]) == 2
    said = capsys.readouterr().err
    for words in (
        workload.files,
        workload.title,
        "got 'there' without it",
        "--download",
        "--data-dir",
    ):
        assert words in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_not_read(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    with (tmp_path / "cifar-10-batches-py" / "data_batch_2").open("ab") as file:
        file.write(b"!")
    with pytest.raises(
        ValueError,
        match=r"data_dir must be .*, got '.*' with a damaged or incomplete one; --download",
    ):
        load_workload("cifar10", data_dir=tmp_path)


def test_a_truncated_file_of_fashion_mnist_is_not_read(tmp_path):
    write_fashion(tmp_path)
    file = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="with a damaged or incomplete one"):
        load_workload("fashion-mnist", data_dir=tmp_path)


@pytest.mark.parametrize("place", ["train.parquet", "data/train-00000-of-00001.parquet"])
def test_parquet_files_are_the_business_of_another_workload(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="it holds parquet files, which --workload parquet reads"):
        load_workload("cifar10", data_dir=tmp_path)


def test_more_images_than_there_are_cannot_be_kept(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    with pytest.raises(
        ValueError, match=r"train_size must be from 4 \(the classes\) to 140, got 150"
    ):
        load_workload("cifar10", data_dir=tmp_path, train_size=150)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture
def publisher(tmp_path):
    """Serve a folder on this machine, as the publisher does on the network."""
    folder = tmp_path / "published"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_data_are_fetched_only_when_asked_for_and_only_once(
    tmp_path, monkeypatch, publisher, capsys
):
    folder, address = publisher
    _, test, _ = write_cifar10(tmp_path / "original", monkeypatch)
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "original" / "cifar-10-batches-py", arcname="cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "url", address + archive.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="without it; --download fetches it there"):
        load_workload("cifar10", data_dir=tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    fetched = load_workload("cifar10", data_dir=tmp_path / "mine", download=True)
    assert torch.equal(fetched.test.images, torch.from_numpy(test))
    archive.unlink()
    assert len(load_workload("cifar10", data_dir=tmp_path / "mine", download=True).test) == 80
    assert len(load_workload("cifar10", data_dir=tmp_path / "mine").test) == 80
    assert capsys.readouterr().out == ""


def test_a_publisher_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch, publisher):
    _, address = publisher
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}nothing.tar.gz")
    with pytest.raises(
        ValueError,
        match=r"download must reach the publisher of CIFAR-10, got: .*404.*; or copy cifar",
    ):
        load_workload("cifar10", data_dir=tmp_path / "mine", download=True)


@pytest.mark.parametrize("option", [{"download": True}, {"image_size": 16}])
def test_an_option_that_a_workload_does_not_have_is_refused(option):
    (name,) = option
    with pytest.raises(
        ValueError, match=f"{name} must be left out for workload 'digits', got {option[name]}"
    ):
        load_workload("digits", **option)


def test_a_comparison_runs_on_it(tmp_path, monkeypatch):
    write_fashion(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "baseline.yaml").write_text("corrections: []\n")
    words = "--workload fashion-mnist --data-dir . --model resnet8 --width 4 --batch-size 9 --epochs 2 --seeds 1"
    assert (
        main(
            [
                "compare",
                *words.split(),
                "--tracker",
                "none",
                "--config",
                "baseline.yaml",
                "--out",
                "out",
            ]
        )
        == 0
    )


def test_the_small_data_sets_of_these_tests_are_what_torchvision_reads(tmp_path, monkeypatch):
    train, _, _ = write_cifar10(tmp_path, monkeypatch)
    image, label = datasets.CIFAR10(tmp_path)[1]
    assert isinstance(image, Image.Image)
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1), train[1])
    assert label == 1
