import io
import itertools
import os
import socket

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from regrad_runner.workloads.folders import DataFolder
from regrad_runner.workloads.images import Augmentation, ImageSet, standardized
from regrad_runner.workloads.loading import load_workload
from regrad_runner.workloads.parquet import _Split
from regrad_runner.workloads.samples import training_loader
from regrad_runner.workloads.split import keep_stratified, take_stratified
from sklearn.datasets import load_digits


def pixels(*shape, seed=0):
    return torch.randint(
        1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def image_set(count=40, *, channels=1, side=8, augment=None, seed=0):
    images, labels = pixels(count, channels, side, side), torch.arange(count)
    return ImageSet(
        images,
        labels,
        mean=torch.zeros(channels),
        std=torch.ones(channels),
        augment=augment,
        seed=seed,
    )


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for pair in zip(one, other, strict=True)
        for a, b in zip(*pair, strict=True)
    )


# digits


@pytest.fixture(scope="module")
def digits():
    return load_workload("digits")


def test_digits_are_divided_once_and_completely(digits):
    parts = [digits.train, digits.validation, digits.test]
    assert [len(part) for part in parts] == [1077, 360, 360]
    raw, labels = load_digits(return_X_y=True)
    whole = sorted(
        (*row, label) for row, label in zip(raw.astype(int).tolist(), labels.tolist(), strict=True)
    )
    divided = [
        (*image.flatten().tolist(), label)
        for part in parts
        for image, label in zip(part.images, part.labels.tolist(), strict=True)
    ]
    assert sorted(divided) == [tuple(row) for row in whole]


def test_every_split_of_the_digits_has_each_digit_in_proportion(digits):
    for part in (digits.train, digits.validation, digits.test):
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        assert shares.min() > 0.09
        assert shares.max() < 0.11


def test_the_seed_of_the_split_decides_which_digit_goes_where(digits):
    again, other = load_workload("digits"), load_workload("digits", seed_of_split=1)
    assert torch.equal(again.train.images, digits.train.images)
    assert not torch.equal(other.test.images, digits.test.images)


def test_all_digits_are_scaled_by_the_training_pixels(digits):
    raw = digits.train.images.double()
    for part in (digits.train, digits.validation, digits.test):
        assert part.mean.item() == pytest.approx(raw.mean().item(), rel=1e-6)
        assert part.std.item() == pytest.approx(raw.std(correction=0).item(), rel=1e-6)
    images = torch.cat([images for images, _ in digits.validation.batches()])
    assert torch.equal(images, (digits.validation.images - digits.train.mean) / digits.train.std)


def test_digits_are_shifted_by_a_pixel_and_never_mirrored(digits):
    assert digits.train.augment == Augmentation(shift=1, flip=False)
    assert digits.validation.augment is digits.test.augment is None


def test_a_small_training_set_leaves_the_other_splits_alone(digits):
    small = load_workload("digits", train_size=100)
    assert torch.bincount(small.train.labels).tolist() == [10] * 10
    assert torch.equal(small.validation.images, digits.validation.images)
    assert torch.equal(small.test.images, digits.test.images)
    assert small.train.mean != digits.train.mean


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 9}, r"train_size must be from 10 \(the classes\) to 1067, got 9"),
        ({"train_size": 2000}, r"train_size must be from 10 \(the classes\) to 1067, got 2000"),
        (
            {"data_dir": "somewhere"},
            "data_dir must be left out for workload 'digits', got 'somewhere'",
        ),
    ],
)
def test_what_the_digits_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_workload("digits", **options)


def test_an_unknown_workload_is_refused_with_what_there_is():
    with pytest.raises(
        ValueError, match=r"no workload named 'digit'; installed: .*digits.*; did you mean 'digits'"
    ):
        load_workload("digit")


# image sets


def test_an_image_set_without_augmentation_only_scales():
    images = pixels(3, 2, 4, 4)
    mean, std = torch.tensor([10.0, 20.0]), torch.tensor([2.0, 4.0])
    batch, labels = ImageSet(images, torch.tensor([5, 6, 7]), mean=mean, std=std).__getitems__(
        [2, 0]
    )
    assert labels.tolist() == [7, 5]
    assert torch.equal(batch[0, 1], (images[2, 1].float() - 20) / 4)
    assert torch.equal(batch[1, 0], (images[0, 0].float() - 10) / 2)


def test_moments_are_those_of_each_training_channel():
    train, other = (pixels(20, 3, 4, 4, seed=seed) for seed in (0, 1))
    labels = torch.zeros(20, dtype=torch.int64)
    sets = standardized(
        (train, labels), (other, labels), (other, labels), augment=Augmentation(shift=1)
    )
    expected = train.double().transpose(0, 1).flatten(1)
    for one in sets:
        assert torch.allclose(one.mean.flatten(), expected.mean(1).float())
        assert torch.allclose(one.std.flatten(), expected.std(1, correction=0).float())


def test_a_channel_without_contrast_is_not_divided_by_zero():
    black, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    train, *_ = standardized(
        (black, labels), (black, labels), (black, labels), augment=Augmentation()
    )
    assert torch.equal(train[0][0], torch.zeros(1, 2, 2))


def test_an_augmented_image_is_a_shift_filled_with_black_and_perhaps_a_mirror():
    augmented = image_set(200, channels=2, side=4, augment=Augmentation(shift=1, flip=True))
    images, _ = augmented.__getitems__(list(range(200)))
    seen = set()
    for image, raw in zip(images, augmented.images, strict=True):
        padded = torch.nn.functional.pad(raw, (1, 1, 1, 1)).float()
        candidates = {
            (down, right, flip): mirrored[:, down : down + 4, right : right + 4]
            for flip, mirrored in ((False, padded), (True, padded.flip(2)))
            for down, right in itertools.product(range(3), repeat=2)
        }
        seen |= {
            change for change, candidate in candidates.items() if torch.equal(candidate, image)
        }
        assert any(torch.equal(candidate, image) for candidate in candidates.values())
    assert len(seen) == 18


def test_every_change_is_about_equally_frequent():
    count = 9000
    images = torch.zeros(count, 1, 3, 3, dtype=torch.uint8)
    images[:, :, 1, 1] = 1
    marked = ImageSet(
        images,
        torch.zeros(count),
        mean=torch.zeros(1),
        std=torch.ones(1),
        augment=Augmentation(shift=1),
        seed=3,
    )
    places = marked.__getitems__(list(range(count)))[0].sum(0).flatten()
    # Binomial: 1,000 expected, standard deviation 30.
    assert places.min() > 870
    assert places.max() < 1130


def test_augmentation_depends_on_seed_epoch_and_sample_alone():
    one = image_set(augment=Augmentation(shift=2, flip=True), seed=7)
    whole, _ = one.__getitems__(list(range(40)))
    torch.manual_seed(99)
    for indices in ([3], [39, 3, 0], list(range(39, -1, -1))):
        part, _ = one.__getitems__(indices)
        assert torch.equal(part, whole[indices])
    assert torch.equal(one[5][0], whole[5])


def test_augmentation_changes_with_the_seed_and_with_the_epoch():
    one = image_set(augment=Augmentation(shift=2), seed=7)
    everything = list(range(40))
    first = one.__getitems__(everything)[0]
    assert not torch.equal(one.with_seed(8).__getitems__(everything)[0], first)
    one.set_epoch(1)
    assert not torch.equal(one.__getitems__(everything)[0], first)
    one.set_epoch(0)
    assert torch.equal(one.__getitems__(everything)[0], first)


def test_a_view_shares_pixels_and_nothing_that_changes():
    one = image_set(augment=Augmentation(shift=1))
    view = one.with_seed(4)
    view.set_epoch(9)
    assert view.images is one.images
    assert (one.seed, one.epoch) == (0, 0)


def test_evaluation_batches_hold_every_sample_once_in_order():
    batches = list(image_set(40).batches(16))
    assert [len(labels) for _, labels in batches] == [16, 16, 8]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(40))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(2),
            r"images must be uint8 of shape \[N, C, H, W\], got torch.float32",
        ),
        (
            pixels(2, 4, 4),
            torch.zeros(2),
            r"images must be uint8 of shape \[N, C, H, W\], got torch.uint8 \[2, 4, 4\]",
        ),
        (pixels(2, 1, 4, 4), torch.zeros(3), r"labels must have shape \[2\], got \[3\]"),
    ],
)
def test_unfit_tensors_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(images, labels, mean=torch.zeros(1), std=torch.ones(1))


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        image_set().with_seed(-1)


# loaders


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    return list(loader)


@pytest.fixture
def augmented():
    return image_set(41, augment=Augmentation(shift=2, flip=True))


def test_batches_are_the_same_in_two_arms_that_draw_differently(augmented):
    one, other = (training_loader(augmented, batch_size=8, seed=5) for _ in range(2))
    for epoch in range(2):
        torch.manual_seed(epoch)
        first = epoch_of(one, epoch)
        second = []
        other.set_epoch(epoch)
        for batch in other:
            torch.rand(17)  # an arm that draws
            second.append(batch)
        assert same(first, second)


def test_epochs_do_not_depend_on_the_epochs_before(augmented):
    through = training_loader(augmented, batch_size=8, seed=5)
    for epoch in range(3):
        last = epoch_of(through, epoch)
    assert same(epoch_of(training_loader(augmented, batch_size=8, seed=5), 2), last)


def test_order_changes_with_the_seed_and_with_the_epoch(augmented):
    loader, other = (training_loader(augmented, batch_size=8, seed=seed) for seed in (5, 6))
    runs = ((loader, 0), (loader, 1), (other, 0))
    labels = [torch.cat([y for _, y in epoch_of(*run)]).tolist() for run in runs]
    assert labels[0] != labels[1]
    assert labels[0] != labels[2]


def test_loaders_of_one_set_do_not_disturb_each_other(augmented):
    expected = epoch_of(training_loader(augmented, batch_size=8, seed=1), 3)
    one, other = (training_loader(augmented, batch_size=8, seed=seed) for seed in (1, 2))
    one.set_epoch(3)
    mixed = []
    other.set_epoch(5)
    for batch, _ in zip(one, other, strict=True):
        mixed.append(batch)
    assert same(mixed, expected)


def test_loading_draws_no_global_random_number(augmented):
    torch.manual_seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    epoch_of(training_loader(augmented, batch_size=8, seed=5), 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_an_epoch_holds_every_sample_once_and_leaves_out_what_fills_no_batch(augmented):
    kept = epoch_of(training_loader(augmented, batch_size=8, seed=0), 0)
    everything = epoch_of(training_loader(augmented, batch_size=8, seed=0, drop_last=False), 0)
    assert [len(labels) for _, labels in kept] == [8] * 5
    assert sorted(torch.cat([labels for _, labels in everything]).tolist()) == list(range(41))


@pytest.mark.parametrize("batch_size", [0, 42])
def test_a_batch_must_fit_the_set(augmented, batch_size):
    with pytest.raises(
        ValueError,
        match=rf"batch_size must be from 1 to 41 \(the training images\), got {batch_size}",
    ):
        training_loader(augmented, batch_size=batch_size, seed=0)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))


def test_accelerate_prepares_the_same_batches_without_a_draw(augmented, accelerator):
    prepared = accelerator.prepare(training_loader(augmented, batch_size=8, seed=5))
    state = torch.get_rng_state()
    for epoch in (0, 2):
        assert same(
            epoch_of(prepared, epoch),
            epoch_of(training_loader(augmented, batch_size=8, seed=5), epoch),
        )
    assert torch.equal(torch.get_rng_state(), state)


def shards(image_set, *, processes):
    return [
        prepare_data_loader(
            training_loader(image_set, batch_size=8, seed=5),
            num_processes=processes,
            process_index=index,
            split_batches=True,
            put_on_device=False,
        )
        for index in range(processes)
    ]


@pytest.mark.usefixtures("accelerator")
def test_processes_share_out_the_very_batch_of_one_process(augmented):
    parts = [epoch_of(shard, 2) for shard in shards(augmented, processes=2)]
    joined = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*parts, strict=True)]
    assert same(joined, epoch_of(training_loader(augmented, batch_size=8, seed=5), 2))


def test_a_resumed_epoch_goes_on_with_the_very_next_batch(augmented, accelerator):
    expected = epoch_of(training_loader(augmented, batch_size=8, seed=5), 2)[3:]
    prepared = accelerator.prepare(training_loader(augmented, batch_size=8, seed=5))
    prepared.set_epoch(2)
    assert same(list(skip_first_batches(prepared, 3)), expected)


@pytest.mark.usefixtures("accelerator")
def test_a_resumed_epoch_goes_on_on_two_processes(augmented):
    for shard, fresh in zip(
        shards(augmented, processes=2), shards(augmented, processes=2), strict=True
    ):
        expected = epoch_of(fresh, 2)[3:]
        shard.set_epoch(2)
        assert same(list(skip_first_batches(shard, 3)), expected)


# splits


def test_a_stratified_choice_keeps_the_shares():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    taken, rest = take_stratified(labels, 20, seed=0, what="size")
    assert np.bincount(labels[taken]).tolist() == [10, 6, 4]
    assert sorted([*taken, *rest]) == list(range(100))


def test_keeping_everything_keeps_the_order():
    assert keep_stratified(np.array([0, 1, 0]), None, seed=0).tolist() == [0, 1, 2]
    assert keep_stratified(np.array([0, 1, 0]), 3, seed=0).tolist() == [0, 1, 2]


def test_a_class_with_one_sample_cannot_be_divided():
    with pytest.raises(
        ValueError, match="every class must have at least 2 images to choose from, got 1 of class 1"
    ):
        take_stratified(np.array([0, 0, 0, 1]), 2, seed=0, what="size")


# parquet


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(file, kind, **options)
    return file.getvalue()


def write(folder, split, images, labels, *, features=None):
    folder.mkdir(exist_ok=True, parents=True)
    columns = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def write_set(folder, *, count=40, shape=(3, 16, 16), name=lambda label: label):
    images = pixels(count, *shape)
    for split, start in (("train", 0), ("test", 100)):
        labels = [name((start + index) % 2) for index in range(count)]
        write(folder, split, list(map(encoded, images)), labels)
    return images


def test_a_folder_of_parquet_files_becomes_a_workload(tmp_path):
    images = write_set(tmp_path)
    workload = load_workload("parquet", data_dir=tmp_path)
    assert (len(workload.train), len(workload.validation), len(workload.test)) == (36, 4, 40)
    assert workload.classes == 2
    assert torch.equal(workload.test.images, images)
    assert torch.equal(workload.test.labels, torch.arange(40) % 2)
    assert workload.train.augment == Augmentation(shift=2, flip=True)
    together = torch.cat([workload.train.images, workload.validation.images]).flatten(1)
    assert sorted(together.tolist()) == sorted(images.flatten(1).tolist())


def test_labels_stay_with_their_images(tmp_path):
    images = write_set(tmp_path)
    train = load_workload("parquet", data_dir=tmp_path, train_size=10).train
    numbers = {tuple(image.flatten().tolist()): index % 2 for index, image in enumerate(images)}
    assert [
        numbers[tuple(image.flatten().tolist())] for image in train.images
    ] == train.labels.tolist()
    assert torch.bincount(train.labels).tolist() == [5, 5]


def test_a_smaller_training_set_keeps_validation_and_test(tmp_path):
    write_set(tmp_path)
    whole, small = (
        load_workload("parquet", data_dir=tmp_path, train_size=size) for size in (None, 10)
    )
    assert torch.equal(whole.validation.images, small.validation.images)
    assert torch.equal(whole.test.images, small.test.images)


def test_there_are_never_more_validation_images_than_training_images_asked_for(tmp_path):
    write_set(tmp_path)
    small = load_workload("parquet", data_dir=tmp_path, train_size=2)
    assert (len(small.train), len(small.validation), len(small.test)) == (2, 2, 40)


def test_shards_in_the_data_folder_are_read_in_order(tmp_path):
    images = pixels(60, 3, 8, 8)
    for split, shard in itertools.product(("train", "test"), range(2)):
        half = list(map(encoded, images[30 * shard : 30 * shard + 30]))
        write(tmp_path / "data", f"{split}-0000{shard}-of-00002", half, [shard] * 30)
    workload = load_workload("parquet", data_dir=tmp_path)
    assert torch.equal(workload.test.images, images)
    assert workload.test.labels.tolist() == [0] * 30 + [1] * 30


def test_files_with_the_image_feature_of_datasets_are_read(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    images = pixels(20, 3, 8, 8)
    for split in ("train", "test"):
        write(tmp_path, split, list(map(encoded, images)), [0, 1] * 10, features=features)
    assert torch.equal(load_workload("parquet", data_dir=tmp_path).test.images, images)


def test_class_names_are_numbered_in_sorted_order(tmp_path):
    write_set(tmp_path, name=lambda label: ["zebra", "ant"][label])
    assert load_workload("parquet", data_dir=tmp_path).test.labels.tolist() == [1, 0] * 20


def test_grey_images_stay_grey_and_jpeg_is_read(tmp_path):
    smooth = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    jpeg = encoded(smooth, "jpeg", quality=100)
    for split in ("train", "test"):
        write(tmp_path, split, [jpeg] * 20, [0, 1] * 10)
    images = load_workload("parquet", data_dir=tmp_path).test.images
    assert images.shape == (20, 1, 8, 8)
    assert (images[0].int() - smooth.int()).abs().max() <= 3  # what JPEG loses at its best quality


def test_one_colour_image_among_grey_ones_makes_all_rgb(tmp_path):
    grey, colour = pixels(19, 1, 8, 8), pixels(1, 3, 8, 8)
    for split in ("train", "test"):
        write(tmp_path, split, [*map(encoded, grey), encoded(colour[0])], [0, 1] * 10)
    images = load_workload("parquet", data_dir=tmp_path).test.images
    assert torch.equal(images[:19], grey.expand(-1, 3, -1, -1))
    assert torch.equal(images[19:], colour)


def test_images_of_other_sizes_are_resized_and_cut_to_the_median_square(tmp_path):
    images = [pixels(3, 12, 12, seed=index) for index in range(18)]
    wide = torch.full((3, 24, 72), 9, dtype=torch.uint8)
    wide[:, :, :12] = 200
    for split in ("train", "test"):
        write(tmp_path, split, [encoded(image) for image in [*images, wide, wide]], [0, 1] * 10)
    test = load_workload("parquet", data_dir=tmp_path).test.images
    assert test.shape == (20, 3, 12, 12)
    assert torch.equal(test[0], images[0])
    assert test[19].unique().tolist() == [9]  # the middle, without the bright edge


def test_large_images_are_reduced(tmp_path):
    write_set(tmp_path, count=20, shape=(3, 100, 90))
    assert load_workload("parquet", data_dir=tmp_path).train.images.shape[1:] == (3, 64, 64)


def test_images_are_made_as_small_as_asked_for_by_averages(tmp_path):
    chequered = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).mul(255).byte()
    images = pixels(19, 1, 16, 16)
    for split in ("train", "test"):
        write(tmp_path, split, list(map(encoded, [*images, chequered[None]])), [0, 1] * 10)
    workload = load_workload("parquet", data_dir=tmp_path, image_size=8)
    assert workload.train.images.shape[1:] == workload.validation.images.shape[1:] == (1, 8, 8)
    assert workload.train.augment == Augmentation(shift=1, flip=True)
    # Every second pixel would be black or white; an average of four is grey.
    grey = workload.test.images[19, 0, 2:-2, 2:-2].int()
    assert (grey - 127).abs().max() <= 1
    # Bicubic overshoots at an edge, but keeps the mean up to rounding and clipping.
    difference = workload.test.images[:19].float().mean() - images.float().mean()
    assert difference.abs() < 2


def test_images_that_have_the_size_asked_for_are_left_alone(tmp_path):
    images = write_set(tmp_path)
    workload = load_workload("parquet", data_dir=tmp_path, image_size=16)
    assert torch.equal(workload.test.images, images)


@pytest.mark.parametrize("size", [3, 65])
def test_an_image_size_out_of_its_range_is_refused(tmp_path, size):
    write_set(tmp_path)
    with pytest.raises(
        ValueError, match=f"image_size must be from 4 to 64 for workload 'parquet', got {size}"
    ):
        load_workload("parquet", data_dir=tmp_path, image_size=size)


def test_a_part_of_the_test_images_has_each_class_in_proportion(tmp_path):
    images = write_set(tmp_path)
    whole = load_workload("parquet", data_dir=tmp_path)
    part = load_workload("parquet:test_size=10", data_dir=tmp_path)
    assert torch.bincount(part.test.labels).tolist() == [5, 5]
    numbers = {tuple(image.flatten().tolist()): index for index, image in enumerate(images)}
    kept = [numbers[tuple(image.flatten().tolist())] for image in part.test.images]
    assert kept == sorted(kept)
    assert part.test.labels.tolist() == [row % 2 for row in kept]
    assert torch.equal(part.train.images, whole.train.images)
    assert torch.equal(part.validation.images, whole.validation.images)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("test_size=1", r"test_size must be from 2 \(the classes\) to 38, got 1"),
        ("test_size=39", r"test_size must be from 2 \(the classes\) to 38, got 39"),
        ("test_size=many", r"test_size must be int \| None, got 'many'"),
    ],
)
def test_a_test_size_out_of_its_range_is_refused(tmp_path, spec, reason):
    write_set(tmp_path)
    with pytest.raises(ValueError, match=reason):
        load_workload(f"parquet:{spec}", data_dir=tmp_path)


def test_sixteen_bits_become_eight(tmp_path):
    shallow = pixels(8, 8)
    deep = datasets.Image().encode_example(shallow.numpy().astype(np.uint16) * 257)["bytes"]
    for split in ("train", "test"):
        write(tmp_path, split, [deep] * 20, [0, 1] * 10)
    assert torch.equal(load_workload("parquet", data_dir=tmp_path).test.images[0, 0], shallow)


def test_reading_uses_no_network_and_leaves_nothing_behind(tmp_path, monkeypatch):
    write_set(tmp_path / "images")

    def refuse(*address):
        raise OSError(f"a connection was opened: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    load_workload("parquet", data_dir=tmp_path / "images")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "test.parquet",
        "train.parquet",
    ]


def test_a_reader_is_closed_when_reading_is_interrupted(tmp_path):
    # One that is left open can keep the interpreter from ending.
    write_set(tmp_path)
    split = _Split.find(DataFolder(tmp_path), "train")
    with pytest.raises(KeyboardInterrupt), split._column("image") as (_, tables):
        next(tables)
        raise KeyboardInterrupt
    assert tables.gi_frame is None


def spoilt(folder, split, *, images=None, labels=None, **columns):
    """Write a good set, then one split of it anew."""
    write_set(folder)
    good = [encoded(image) for image in pixels(20, 3, 8, 8)]
    if columns:
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    else:
        write(folder, split, images or good, labels or [0, 1] * 10)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "test.parquet").unlink(),
            "data_dir must be a folder with .*, got '.*' without test files",
        ),
        (
            lambda folder: (folder / "test.parquet").write_text("no parquet, only text"),
            "test.parquet: Parquet magic bytes not found",
        ),
        (
            lambda folder: spoilt(folder, "train", image=[1], digit=[1]),
            "train.parquet: columns must be image and label, got image, digit$",
        ),
        (
            lambda folder: spoilt(folder, "train", picture=[1] * 20, label=[0, 1] * 10),
            "train.parquet: columns must be image and label, got",
        ),
        (
            lambda folder: spoilt(folder, "train", image=[1] * 20, label=[0, 1] * 10),
            "image must be a struct with bytes, got Value",
        ),
        (
            lambda folder: spoilt(folder, "train", labels=[0.5, 1.5] * 10),
            "label must be an integer or a string, got 0.5 in the train split",
        ),
        (
            lambda folder: spoilt(folder, "train", labels=[0, None] * 10),
            "label must be given for every image",
        ),
        (
            lambda folder: spoilt(folder, "train", labels=[3] * 20),
            "label must have at least 2 classes in the train split, got 3 alone",
        ),
        (
            lambda folder: spoilt(folder, "train", labels=[3] * 19 + [4]),
            "every class must have at least 2 images to choose from, got 1 of class 1",
        ),
        (
            lambda folder: spoilt(folder, "test", labels=[0, 7] * 10),
            "label must be one that the train split has, got 7 in the test split",
        ),
        (
            lambda folder: spoilt(folder, "test", images=[b"not an image"] * 20),
            "image must be a JPEG, PNG or the like, got something else in row 0 of the test split",
        ),
        (
            lambda folder: spoilt(folder, "train", images=[None] * 20),
            "image must hold the bytes of an image file, got none in row 0 of the train",
        ),
    ],
)
def test_unfit_files_are_refused_in_one_line(tmp_path, spoil, message):
    write_set(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_workload("parquet", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_files_without_rows_are_refused(tmp_path):
    write_set(tmp_path)
    features = datasets.Features(
        {"image": {"bytes": datasets.Value("binary")}, "label": datasets.Value("int64")}
    )
    write(tmp_path, "train", [], [], features=features)
    with pytest.raises(ValueError, match="the train split must hold images, got none"):
        load_workload("parquet", data_dir=tmp_path)


@pytest.mark.parametrize("folder", [None, "missing"])
def test_a_missing_folder_is_refused(tmp_path, folder):
    with pytest.raises(
        ValueError, match=r"data_dir must be a folder with train.parquet and test.parquet, .*, got "
    ):
        load_workload("parquet", data_dir=folder and tmp_path / folder)


def test_more_images_than_there_are_cannot_be_kept(tmp_path):
    write_set(tmp_path)
    with pytest.raises(
        ValueError, match=r"train_size must be from 2 \(the classes\) to 34, got 50"
    ):
        load_workload("parquet", data_dir=tmp_path, train_size=50)


# what is read once


def test_a_pipe_among_parquet_files_is_not_waited_for(tmp_path):
    write_set(tmp_path)
    (tmp_path / "test.parquet").unlink()
    os.mkfifo(tmp_path / "test.parquet")
    with pytest.raises(
        ValueError, match=r"hold regular files, got another kind in '.*test.parquet'"
    ):
        load_workload("parquet", data_dir=tmp_path)


@pytest.mark.parametrize("how", ["symlink_to", "hardlink_to"])
def test_a_parquet_file_that_both_trains_and_tests_is_refused(tmp_path, how):
    write_set(tmp_path)
    (tmp_path / "test.parquet").unlink()
    getattr(tmp_path / "test.parquet", how)(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"one file as '.*train.parquet' and '.*test.parquet'"):
        load_workload("parquet", data_dir=tmp_path)


def test_links_of_a_cache_are_followed(tmp_path):
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    write_set(tmp_path / "blobs")
    for split in ("train", "test"):
        (tmp_path / "snapshot" / f"{split}.parquet").symlink_to(f"../blobs/{split}.parquet")
    assert len(load_workload("parquet", data_dir=tmp_path / "snapshot").test)


def test_a_hidden_parquet_file_is_none_of_the_shards(tmp_path):
    write_set(tmp_path)
    (tmp_path / ".train-1.parquet").write_bytes(b"half")
    assert len(load_workload("parquet", data_dir=tmp_path).test)
