import functools
import io
import struct
import zlib

import pyarrow
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from regrad_runner.workloads.loading import load_workload
from regrad_testing.files import load_beside

cases = load_beside(__file__, "cases")
ROWS = 12


def encoded(kind, number, mode="RGB", size=(8, 8)):
    file = io.BytesIO()
    Image.new(mode, size, number).save(file, kind)
    return file.getvalue()


def png_of(width, height):
    """Return the start of a PNG that says it has so many pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


GOOD = [encoded("png", number) for number in range(ROWS)]
KINDS = [
    encoded(kind, 3)
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "ppm", "webp", "ico", "tga", "pcx", "sgi")
]
MODES = [encoded("png", 1, mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
SIZES = [encoded("png", 1, size=size) for size in ((1, 1), (1, 5), (3000, 1), (1, 3000), (70, 65))]
BOMBS = [png_of(60000, 60000), png_of(2**31 - 1, 2**31 - 1), png_of(0, 0), png_of(12000, 12000)]
NONE = [None, b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"]

places, changes = st.floats(0, 1, exclude_max=True), st.integers(1, 255)


def altered(content, place, change):
    at = int(place * len(content))
    return content[:at] + bytes([content[at] ^ change]) + content[at + 1 :]


def cut(content, place):
    return content[: int(place * len(content))]


spoilt_images = st.one_of(
    st.sampled_from(KINDS + MODES + SIZES),
    st.sampled_from(BOMBS + NONE),
    st.builds(cut, st.sampled_from(KINDS), places),
    st.builds(altered, st.sampled_from(KINDS), places, changes),
    st.binary(max_size=30),
)
image_columns = st.one_of(
    st.just(GOOD),
    st.tuples(spoilt_images, st.integers(0, ROWS - 1)).map(
        lambda p: [*GOOD[: p[1]], p[0], *GOOD[p[1] + 1 :]]
    ),
    spoilt_images.map(lambda image: [image] * ROWS),
)
TWO = [0, 1] * (ROWS // 2)
LABELS = [
    TWO,
    ["a", "b"] * 6,
    [True, False] * 6,
    [2**62, -1] * 6,
    [3] * ROWS,
    [*[3] * (ROWS - 1), 4],
    [None] * ROWS,
]
LABELS += [
    [0, None] * 6,
    [0.5, 1.5] * 6,
    [[0], [1]] * 6,
    [{"a": 1}, {"a": 2}] * 6,
    [b"a", b"b"] * 6,
    ["", "\x00"] * 6,
]
LABELS += [list(range(ROWS)), [float("nan"), 1.0] * 6]
label_columns = st.sampled_from(LABELS)
other_tables = st.sampled_from(
    [
        {"image": [1] * ROWS, "label": TWO},
        {"image": ["text"] * ROWS, "label": TWO},
        {"image": GOOD, "label": TWO},
        {"image": [{"bytes": "text"}] * ROWS, "label": TWO},
        {"image": [{"bytes": 3}] * ROWS, "label": TWO},
        {"image": [{"bytes": [1, 2]}] * ROWS, "label": TWO},
        {"image": [{"path": "nowhere.png"}] * ROWS, "label": TWO},
        {"image": [[{"bytes": b""}]] * ROWS, "label": TWO},
        {"picture": TWO, "label": TWO},
        {"image": [{"bytes": image} for image in GOOD]},
        {"label": TWO},
        {
            "image": pyarrow.array([], pyarrow.struct([("bytes", pyarrow.binary())])),
            "label": pyarrow.array([], "int64"),
        },
        {"image": pyarrow.nulls(ROWS), "label": TWO},
        {"image": pyarrow.nulls(0), "label": pyarrow.nulls(0)},
        {},
    ]
)


def bytes_of(columns):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def of_images(images, labels):
    return bytes_of(
        {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    )


FIT = of_images(GOOD, TWO)
files = st.one_of(
    st.just(FIT),
    st.builds(of_images, image_columns, label_columns),
    other_tables.map(bytes_of),
    st.builds(cut, st.just(FIT), places),
    st.builds(altered, st.just(FIT), places, changes),
    st.builds(
        altered, st.just(FIT), st.floats(0.9, 1, exclude_max=True), changes
    ),  # what the file says of itself
    st.binary(max_size=20),
    st.none(),
)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@cases.hostile(25, files, files, st.sampled_from([None, None, 4, 99]))
def test_any_folder_is_a_workload_of_all_its_images_or_a_clear_error(
    tmp_path, train, test, train_size
):
    for name, content in (("train", train), ("test", test)):
        path = tmp_path / f"{name}.parquet"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    load = functools.partial(load_workload, "parquet", data_dir=tmp_path, train_size=train_size)
    workload, refused = cases.outcome(load)
    if workload is None:
        assert cases.is_clear(refused)
        assert (train, test) != (FIT, FIT) or train_size == 99
    else:
        images = workload.test.images
        assert len(workload.train) + len(workload.validation) == (
            ROWS if train_size is None else train_size + 2
        )
        assert (len(images), len(workload.test.labels)) == (ROWS, ROWS)
        assert set(workload.test.labels.tolist()) <= set(range(workload.classes))
        if train == test == FIT:
            assert images[:, :, 0, 0].tolist() == [
                list(Image.open(io.BytesIO(image)).getpixel((0, 0))) for image in GOOD
            ]
            assert torch.equal(workload.test.labels, torch.tensor(TWO))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
