import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from regrad_runner.cli.main import main
from regrad_runner.comparing.plan import make_plan
from regrad_runner.settings.config import CompareConfig
from regrad_runner.workloads import imagefolder
from regrad_runner.workloads.files import MEAN, STD, FileSet
from regrad_runner.workloads.loading import load_workload
from regrad_runner.workloads.samples import training_loader
from torchvision.transforms import v2


def picture(height, width, *, seed=0, grey=False):
    shape = (height, width) if grey else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def write_folders(
    root, splits=("train", "val"), *, classes=("ant", "bee"), count=10, size=(12, 12), grey=False
):
    for place, split in enumerate(splits):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = picture(*size, seed=1000 * place + 100 * label + index, grey=grey)
                image.save(folder / f"{index:03d}.png")
    return root


def as_pixels(image):
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


# small images, in memory


@pytest.mark.parametrize("held", ["val", "test"])
def test_small_images_are_those_of_the_files_and_the_held_folder_is_the_test_split(tmp_path, held):
    write_folders(tmp_path, ("train", held))
    workload = load_workload("imagefolder", data_dir=tmp_path)
    assert (len(workload.train), len(workload.validation), len(workload.test)) == (18, 2, 20)
    assert workload.test.labels.tolist() == [0] * 10 + [1] * 10
    assert torch.equal(workload.test.images[11], as_pixels(picture(12, 12, seed=1101)))
    assert torch.bincount(workload.validation.labels).tolist() == [1, 1]
    assert (workload.train.augment.shift, workload.train.augment.flip) == (1, True)
    assert workload.classes == 2


def test_with_both_folders_val_validates_and_every_training_image_trains(tmp_path):
    write_folders(tmp_path, ("train", "val", "test"))
    workload = load_workload("imagefolder", data_dir=tmp_path)
    assert (len(workload.train), len(workload.validation), len(workload.test)) == (20, 20, 20)
    assert torch.equal(workload.validation.images[0], as_pixels(picture(12, 12, seed=1000)))
    assert torch.equal(workload.test.images[0], as_pixels(picture(12, 12, seed=2000)))
    small = load_workload("imagefolder", data_dir=tmp_path, train_size=6)
    assert torch.bincount(small.train.labels).tolist() == [3, 3]
    assert len(small.validation) == 20


def test_classes_are_numbered_by_the_training_folders(tmp_path):
    write_folders(tmp_path, ("train",), classes=("ant", "bee", "cat"))
    write_folders(tmp_path, ("val",), classes=("bee", "cat"), count=3)
    workload = load_workload("imagefolder", data_dir=tmp_path)
    assert workload.classes == 3
    assert workload.test.labels.tolist() == [1] * 3 + [2] * 3


def test_images_of_other_sizes_are_resized_and_cut_to_the_size_asked_for_or_the_median(tmp_path):
    write_folders(tmp_path, size=(20, 30))
    assert load_workload("imagefolder", data_dir=tmp_path).train.images.shape[1:] == (3, 20, 20)
    assert load_workload("imagefolder", data_dir=tmp_path, image_size=8).train.images.shape[1:] == (
        3,
        8,
        8,
    )
    write_folders(tmp_path / "large", size=(90, 100))
    assert load_workload("imagefolder", data_dir=tmp_path / "large").train.images.shape[1:] == (
        3,
        64,
        64,
    )


def test_grey_images_stay_grey(tmp_path):
    write_folders(tmp_path, grey=True)
    workload = load_workload("imagefolder", data_dir=tmp_path)
    assert workload.test.images.shape == (20, 1, 12, 12)
    assert torch.equal(workload.test.images[0], as_pixels(picture(12, 12, seed=1000, grey=True)))


def test_the_last_class_counts_when_the_format_is_chosen(tmp_path):
    # 150 grey pictures of one class come first; a hundred all over the split are looked at.
    write_folders(tmp_path, classes=("a",), count=150, size=(4, 4), grey=True)
    write_folders(tmp_path, classes=("b",), count=150, size=(4, 4))
    assert load_workload("imagefolder", data_dir=tmp_path).train.channels == 3


def test_more_than_fits_in_memory_is_refused_with_the_ways_on(tmp_path, monkeypatch):
    write_folders(tmp_path)
    monkeypatch.setattr(imagefolder, "MOST_BYTES", 40 * 3 * 144 - 1)
    with pytest.raises(
        ValueError,
        match=r"images must take at most .* GiB in memory, got .* \(40 of 12 pixels\); use",
    ):
        load_workload("imagefolder", data_dir=tmp_path)
    monkeypatch.setattr(imagefolder, "MOST_BYTES", 40 * 3 * 144)
    assert len(load_workload("imagefolder", data_dir=tmp_path).train) == 18


@pytest.mark.parametrize(
    ("count", "model", "batch_size", "lr"),
    [
        (20, "resnet8", 8, 0.05),
        (127, "resnet8", 8, 0.05),
        (128, "resnet8", 16, 0.05),
        (2_000, "resnet8", 64, 0.05),
        (2_001, "resnet20", 128, 0.1),
    ],
)
def test_few_images_get_a_small_network_and_an_epoch_of_eight_steps(count, model, batch_size, lr):
    found = imagefolder.defaults_for(count)
    assert (found.model, found.batch_size, found.lr) == (model, batch_size, lr)
    assert (found.reason == "") == (count > 2_000)


def test_a_plan_says_why_a_small_network_is_trained_unless_another_was_asked_for(tmp_path):
    write_folders(tmp_path)
    settings = {"workload": "imagefolder", "data_dir": str(tmp_path), "corrections": ()}
    plan = make_plan(CompareConfig(**settings), out=tmp_path / "out")
    assert plan.config.model == "resnet8"
    assert "a small network and batches of 8, because 18 training images are few" in plan.in_words()
    asked = make_plan(CompareConfig(**settings, model="resnet20"), out=tmp_path / "out")
    assert (asked.config.model, asked.config.batch_size) == ("resnet20", 8)
    assert "a small network" not in asked.in_words()


# large images, on the disk


@pytest.fixture
def large(tmp_path):
    return load_workload(
        "imagefolder", data_dir=write_folders(tmp_path, size=(80, 100)), image_size=72
    )


def test_large_images_are_read_batch_by_batch(large):
    assert isinstance(large.train, FileSet)
    assert [part.augment for part in (large.train, large.validation, large.test)] == [
        True,
        False,
        False,
    ]
    images, labels = large.train.__getitems__([3, 0])
    assert (images.shape, images.dtype) == ((2, 3, 72, 72), torch.float32)
    assert labels.tolist() == large.train.labels[[3, 0]].tolist()
    assert large.defaults.model == "resnet18"


def test_what_is_not_trained_on_is_resized_cut_and_standardised(large):
    images, _ = large.test.__getitems__([0])
    resized = v2.functional.resize(
        picture(80, 100, seed=1000), [round(72 * 256 / 224)], antialias=True
    )
    pixels = as_pixels(v2.functional.center_crop(resized, [72])).float() / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    assert torch.allclose(images[0], (pixels - mean) / std, atol=1e-6)


def test_training_images_are_parts_of_theirs_and_sometimes_mirrored(tmp_path):
    # A ramp from left to right: its slope says whether it was mirrored, its range how much of it is seen.
    ramp = np.tile(np.linspace(0, 255, 96, dtype=np.uint8), (96, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    files = FileSet(
        [tmp_path / "ramp.png"] * 200,
        torch.zeros(200, dtype=torch.int64),
        side=72,
        augment=True,
        seed=1,
    )
    images, _ = files.__getitems__(list(range(200)))
    levels = (images[:, 0] * STD[0] + MEAN[0]).mean(1)
    change = levels[:, -1] - levels[:, 0]
    assert 60 < (change < 0).sum() < 140  # binomial: 100 expected, standard deviation 7
    assert (
        change.abs().min() > 0.15
    )  # a part of .08 of the area, 3/4 as wide as high, is a quarter as wide
    assert change.abs().max() > 0.9


def test_changes_depend_on_seed_epoch_and_sample_alone(large):
    one = large.train.with_seed(7)
    whole, _ = one.__getitems__(list(range(18)))
    state = torch.get_rng_state()
    for indices in ([3], [17, 3, 0]):
        torch.manual_seed(indices[0])
        part, _ = one.__getitems__(indices)
        assert torch.equal(part, whole[indices])
    torch.set_rng_state(state)
    one.__getitems__([0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    one.set_epoch(1)
    assert not torch.equal(one[5][0], whole[5])
    assert not torch.equal(large.train.with_seed(8)[5][0], whole[5])


def test_workers_make_the_same_batches(large):
    def epoch(workers, number):
        loader = training_loader(large.train, batch_size=6, seed=3, workers=workers)
        loader.set_epoch(number)
        return [images for images, _ in loader]

    for number in (0, 2):
        assert all(map(torch.equal, epoch(0, number), epoch(2, number)))
    assert not torch.equal(epoch(2, 0)[0], epoch(2, 2)[0])
    alone, together = (list(large.test.batches(8, workers=workers)) for workers in (0, 2))
    assert all(
        torch.equal(a, b)
        for one, other in zip(alone, together, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert [len(labels) for _, labels in together] == [8, 8, 4]


@pytest.mark.parametrize("size", [72, 12])
def test_a_file_that_is_no_image_is_found_before_anything_is_trained(tmp_path, size):
    write_folders(tmp_path, size=(80, 80))
    (tmp_path / "val" / "bee" / "003.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError,
        match=r"image must be a JPEG, PNG or the like, got something else in '.*003.png'; supported are",
    ):
        load_workload("imagefolder", data_dir=tmp_path, image_size=size)


def test_the_head_of_so_many_large_images_is_read_beforehand(tmp_path, monkeypatch):
    write_folders(tmp_path, size=(80, 80))
    (tmp_path / "val" / "bee" / "003.png").write_bytes(b"no image")
    monkeypatch.setattr(imagefolder, "OPENED", 2)
    large = load_workload("imagefolder", data_dir=tmp_path, image_size=72)
    with pytest.raises(ValueError, match=r"got something else in '.*003.png'; supported are"):
        large.test.__getitems__([13])
    (tmp_path / "val" / "bee" / "003.png").unlink()
    with pytest.raises(
        ValueError, match=r"image must be a readable file, got '.*003.png': No such file"
    ):
        large.test.__getitems__([13])


SMALL_RUN = [
    "--workload",
    "imagefolder",
    "--image-size",
    "66",
    "--model",
    "resnet8",
    "--width",
    "2",
]
SMALL_RUN += ["--batch-size", "5", "--tracker", "none", "--lr", "0.01", "--epochs", "1"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_is_damaged_behind_its_head_is_one_line_that_names_it(
    tmp_path, monkeypatch, capsys, workers
):
    write_folders(tmp_path / "images", size=(80, 80), count=6)
    spoilt = tmp_path / "images" / "val" / "bee" / "003.png"
    spoilt.write_bytes(spoilt.read_bytes()[:9000])
    monkeypatch.chdir(tmp_path)
    words = ["train", *SMALL_RUN, "--data-dir", "images", "--workers", workers, "--out", "out"]
    assert main(words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("regrad:")]
    assert line.startswith(
        "regrad: image must be a JPEG, PNG or the like, got something else in "
        "'images/val/bee/003.png': "
    )


@pytest.mark.long
def test_in_a_comparison_a_damaged_image_is_named_by_the_run_that_failed(
    tmp_path, monkeypatch, capsys
):
    write_folders(tmp_path / "images", size=(80, 80), count=6)
    spoilt = tmp_path / "images" / "val" / "bee" / "003.png"
    spoilt.write_bytes(spoilt.read_bytes()[:9000])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "baseline.yaml").write_text("corrections: []\nseeds: 1\nworkers: 1\n")
    words = ["compare", "--config", "baseline.yaml", *SMALL_RUN, "--data-dir", "images"]
    assert main([*words, "--out", "out"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "seed 0 failed: UnreadableImage: image must be a JPEG, PNG or the like, got" in said


def test_workers_change_no_weight_of_a_run(tmp_path, monkeypatch):
    write_folders(tmp_path / "images", size=(80, 80), count=6)
    monkeypatch.chdir(tmp_path)
    words = "--workload imagefolder --data-dir images --image-size 66 --model resnet8 --width 2 --batch-size 5"
    words = [*words.split(), "--tracker", "none", "--lr", "0.01"]
    assert main(["train", *words, "--epochs", "2", "--out", "whole"]) == 0
    assert main(["train", *words, "--epochs", "2", "--workers", "1", "--out", "workers"]) == 0
    weights = [
        torch.load(p, weights_only=True)["model"]
        for p in sorted(tmp_path.glob("w*/checkpoints/*4/*.pt"))
    ]
    assert len(weights) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# what is not there


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (
            lambda root: None,
            {"data_dir": None},
            "data_dir must be a folder with train and val, .*, got None; name it",
        ),
        (
            lambda root: None,
            {},
            "data_dir must be a folder with train .*, got '.*': none of them in it",
        ),
        (
            lambda root: root.rmdir(),
            {},
            "data_dir must be a folder with train .*, got '.*': no folder",
        ),
        (
            lambda root: write_folders(root, ("train",)),
            {},
            "data_dir must be .*, got '.*': only train in it",
        ),
        (
            lambda root: write_folders(root, ("val", "test")),
            {},
            "data_dir must be .*, got '.*': only val, test in it",
        ),
        (
            lambda root: (write_folders(root), (root / "train" / "cat").mkdir()),
            {},
            "data_dir must be .*, got no image in '.*cat'; their names end in .jpg",
        ),
        (
            lambda root: write_folders(root, classes=("ant",)),
            {},
            "train' must have at least 2 classes, got 'ant' alone",
        ),
        (
            lambda root: (write_folders(root), write_folders(root, ("val",), classes=("cat",))),
            {},
            "val' must have the classes of the training images, got 'cat'",
        ),
        (write_folders, {"image_size": 3}, "image_size must be at least 4, got 3"),
        (
            write_folders,
            {"train_size": 30},
            r"train_size must be from 2 \(the classes\) to 16, got 30",
        ),
    ],
)
def test_unfit_folders_are_refused_in_one_line(tmp_path, spoil, options, message):
    root = tmp_path / "images"
    root.mkdir()
    spoil(root)
    with pytest.raises(ValueError, match=message) as caught:
        load_workload("imagefolder", **{"data_dir": root, **options})
    assert "\n" not in str(caught.value)


# what is none of the data, or would be read twice


def add_images(folder, count=3, seed=5000):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(12, 12, seed=seed + index).save(folder / f"extra-{index}.png")


@pytest.mark.parametrize(
    "place",
    [
        "train/.ipynb_checkpoints",
        "train/ant/.ipynb_checkpoints",
        "val/.hidden",
        "train/__MACOSX",
        "train/ant/@eaDir/000.png",
    ],
)
def test_a_hidden_folder_is_no_class_and_its_images_are_no_data(tmp_path, place):
    write_folders(tmp_path)
    add_images(tmp_path / place)
    workload = load_workload("imagefolder", data_dir=tmp_path)
    assert workload.classes == 2
    assert (len(workload.train), len(workload.validation), len(workload.test)) == (18, 2, 20)


@pytest.mark.parametrize("name", ["._000.png", ".000.png.part", "notes.txt", "png"])
def test_a_hidden_file_and_one_of_another_ending_are_no_data(tmp_path, name):
    write_folders(tmp_path)
    (tmp_path / "train" / "ant" / name).write_bytes(b"no image")
    assert len(load_workload("imagefolder", data_dir=tmp_path).train) == 18


def test_images_below_a_class_are_found_in_the_order_of_their_folders(tmp_path):
    write_folders(tmp_path)
    add_images(tmp_path / "val" / "ant" / "b" / "deeper", count=1, seed=7)
    add_images(tmp_path / "val" / "ant" / "a", count=1, seed=8)
    images = load_workload("imagefolder", data_dir=tmp_path).test.images
    assert len(images) == 22
    assert torch.equal(images[10], as_pixels(picture(12, 12, seed=8)))
    assert torch.equal(images[11], as_pixels(picture(12, 12, seed=7)))
    assert torch.equal(images[12], as_pixels(picture(12, 12, seed=1100)))


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("train/loop", "..", "hold each folder once, got one folder as '{0}' and '{0}/train/loop'"),
        ("train/loop", ".", "one folder as '{0}/train' and '{0}/train/loop'"),
        ("train/ant/loop", "..", "one folder as '{0}/train' and '{0}/train/ant/loop'"),
        ("train/ant/loop", ".", "one folder as '{0}/train/ant' and '{0}/train/ant/loop'"),
        ("train/cat", "ant", "one folder as '{0}/train/ant' and '{0}/train/cat'"),
        ("train/held", "../val/ant", "one folder as '{0}/train/held' and '{0}/val/ant'"),
        ("test", "train", "one folder as '{0}/train' and '{0}/test'"),
        (
            "train/cat",
            "../../elsewhere",
            "hold no link that points outside it, got '{0}/train/cat'",
        ),
        ("test", "../elsewhere", "hold no link that points outside it, got '{0}/test' to"),
        (
            "train/ant/x.png",
            "../../../elsewhere/extra-0.png",
            "no link that points outside it, got",
        ),
        ("train/ant/x.png", "000.png", "each file once, got one file as '{0}/train/ant/000.png'"),
        ("train/ant/x.png", "../bee/000.png", "each file once, got one file as '{0}/train/ant/x"),
        ("train/ant/x.png", "../../val/ant/000.png", "each file once, got one file as"),
        ("train/ant/x.png", "gone.png", "hold files that are there, got a broken link '{0}/train"),
        ("train/ant/x.png", "x.png", "hold files that are there, got a broken link '{0}/train/ant"),
    ],
)
def test_a_link_that_leaves_or_enters_again_is_refused(tmp_path, link, target, message):
    root = write_folders(tmp_path / "images")
    add_images(tmp_path / "elsewhere")
    (root / link).symlink_to(target)
    with pytest.raises(ValueError, match=re.escape(message.format(root))) as caught:
        load_workload("imagefolder", data_dir=root)
    assert "\n" not in str(caught.value)


def test_a_link_within_the_folder_to_what_is_read_nowhere_else_is_followed(tmp_path):
    root = write_folders(tmp_path / "images")
    add_images(root / "pool" / "cats", count=10)
    (root / "train" / "cat").symlink_to("../pool/cats")
    picture(12, 12, seed=9).save(root / "pool" / "one.png")
    (root / "val" / "bee" / "one.png").symlink_to("../../pool/one.png")
    workload = load_workload("imagefolder", data_dir=root)
    assert workload.classes == 3
    assert len(workload.train) + len(workload.validation) == 30
    assert len(workload.test) == 21


def test_the_folder_itself_may_be_a_link(tmp_path):
    write_folders(tmp_path / "images")
    (tmp_path / "link").symlink_to("images")
    assert len(load_workload("imagefolder", data_dir=tmp_path / "link").train) == 18


@pytest.mark.parametrize("other", ["train/ant/again.png", "train/bee/again.png", "val/ant/x.png"])
def test_a_hard_link_makes_no_second_image(tmp_path, other):
    write_folders(tmp_path)
    (tmp_path / other).hardlink_to(tmp_path / "train" / "ant" / "000.png")
    with pytest.raises(ValueError, match="data_dir must hold each file once, got one file as"):
        load_workload("imagefolder", data_dir=tmp_path)


def test_a_file_that_is_linked_from_elsewhere_is_read_once_and_is_no_fault(tmp_path):
    root = write_folders(tmp_path / "images")
    (tmp_path / "copy.png").hardlink_to(root / "train" / "ant" / "000.png")
    assert len(load_workload("imagefolder", data_dir=root).train) == 18


@pytest.mark.parametrize("size", [12, 72])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, size):
    write_folders(tmp_path)
    os.mkfifo(tmp_path / "train" / "ant" / "pipe.png")
    with pytest.raises(ValueError, match=r"hold regular files, got another kind in '.*pipe.png'"):
        load_workload("imagefolder", data_dir=tmp_path, image_size=size)


def test_a_pipe_of_another_name_is_no_data(tmp_path):
    write_folders(tmp_path)
    os.mkfifo(tmp_path / "train" / "pipe")
    os.mkfifo(tmp_path / "train" / "ant" / "pipe")
    assert len(load_workload("imagefolder", data_dir=tmp_path).train) == 18


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_folders(tmp_path)

    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"must be readable, got '.*train': Permission denied"):
        load_workload("imagefolder", data_dir=tmp_path)
