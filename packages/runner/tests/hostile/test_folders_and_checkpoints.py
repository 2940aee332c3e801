import io
import json
import os
import pickle
import shutil
from contextlib import closing

import pytest
import torch
from hypothesis import strategies as st
from regrad_runner import training_command as train
from regrad_runner.checkpoints.checkpoint import load_latest, save_checkpoint
from regrad_runner.checkpoints.folder import (
    Content,
    checkpoints,
    checksum,
    read_latest,
    write_checkpoint,
)
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload
from regrad_testing.files import load_beside

cases = load_beside(__file__, "cases")
FILES = ("checksums.json", "receipt.json", "state.json", "tensors.pt")
JSON = ("receipt.json", "state.json")
SMALL = [
    "--train-size",
    "100",
    "--batch-size",
    "25",
    "--width",
    "4",
    "--epochs",
    "1",
    "--tracker",
    "none",
]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
rubbish = st.one_of(
    st.binary(max_size=40),
    values.map(lambda value: json.dumps(value).encode()),
    st.sampled_from(
        [
            b"",
            b"null",
            b"[]",
            b"{}",
            b'{"a": NaN}',
            b"[" * 3000,
            b"\xff\xfe",
            b"7" * 5000,
            b"\x80\x04N.",
        ]
    ),
)
places, changes = st.floats(0, 1, exclude_max=True), st.integers(1, 255)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        return self.how


TRAPS = [
    (os.mkdir, ("it-ran",)),
    (eval, ("__import__('os').mkdir('it-ran')",)),
    (exec, ("open('it-ran', 'w')",)),
]


def evil(how, plain):
    if plain:
        return pickle.dumps({"w": Trap(how)}, protocol=2)
    file = io.BytesIO()
    torch.save({"w": [Trap(how)]}, file)
    return file.getvalue()


def cut(place):
    return lambda content: content[: int(place * len(content))]


def flipped(place, change):
    def flip(content):
        at = int(place * len(content))
        return content[:at] + bytes([content[at] ^ change]) + content[at + 1 :]

    return flip


contents = st.one_of(
    st.builds(cut, places),
    st.builds(flipped, places, changes),
    rubbish.map(lambda new: lambda content: new),
    st.builds(evil, st.sampled_from(TRAPS), st.booleans()).map(lambda new: lambda content: new),
)


def with_valid_checksums(path):
    sums = {
        name: checksum(path / name)
        for name in FILES
        if name != "checksums.json" and (path / name).is_file()
    }
    (path / "checksums.json").write_text(json.dumps(sums))


def alter(path, name, change, *, signed):
    if (path / name).is_file():
        (path / name).write_bytes(change((path / name).read_bytes()))
    if signed:
        with_valid_checksums(path)


def swap(path, name, *, signed):
    other = path.with_name("step-00000001")
    one, two = (path / name).read_bytes(), (other / name).read_bytes()
    (path / name).write_bytes(two)
    (other / name).write_bytes(one)
    if signed:
        with_valid_checksums(path)


def remove(path, name, *, signed):
    (path / name).unlink()
    if signed:
        with_valid_checksums(path)


def folder_instead(path, name, *, signed):
    remove(path, name, signed=signed)
    (path / name).unlink(missing_ok=True)  # signing anew writes the checksums again
    (path / name).mkdir()


def as_it_is(path, name, *, signed):
    """Change nothing; sign anew."""
    alter(path, name, bytes, signed=signed)


def gone(path, name, *, signed):
    path.rename(path.with_name("step-later"))


def a_file(path, name, *, signed):
    path.with_name("step-99999999").write_text("a file")


def a_link(path, name, *, signed):
    path.with_name("step-99999999").symlink_to(name)


def with_change(change):
    return lambda path, name, *, signed: alter(path, name, change, signed=signed)


acts = contents.map(with_change) | st.sampled_from(
    [swap, remove, folder_instead, as_it_is, gone, a_file, a_link]
)
names = st.sampled_from((*FILES, "tensors.pt"))  # what can hold code oftener than the others


def same(read, step):
    return (
        torch.equal(read.tensors["w"], torch.full((20,), float(step)))
        and read.state["step"] == step
    )


@cases.hostile(150, acts, names, st.booleans())
def test_any_altered_checkpoint_is_found_passed_over_or_refused_and_nothing_it_holds_is_run(
    tmp_path, act, name, signed
):
    shutil.rmtree(tmp_path / "all", ignore_errors=True)
    for step in (1, 2):
        content = Content({"w": torch.full((20,), float(step))}, {"step": step}, {"order": []})
        newest = write_checkpoint(tmp_path / "all", step, content, keep=2)
    act(newest, name, signed=signed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        found, refused = cases.outcome(lambda: read_latest(tmp_path / "all"))
    if found is None:
        assert cases.is_clear(refused)
    elif not signed:  # who signs anew writes another checkpoint
        path, read, lines = found
        assert same(read, 2) or (same(read, 1) and path.name == "step-00000001")
        assert len(lines) == len(list((tmp_path / "all").glob("damaged-*")))
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's configuration and workload, and a folder with two of its checkpoints."""
    folder, workload = tmp_path_factory.mktemp("trained"), load_workload("digits", train_size=100)
    config = resolved(
        TrainConfig(batch_size=25, epochs=1, width=4, threads=1, tracker="none"), workload
    )
    with closing(TrainingRun(config, workload, Arm("baseline"), seed=0, lr=0.05)) as run:
        for step in run.steps():
            if step > 1:
                save_checkpoint(run, folder / "checkpoints")
            if step == 3:
                break
    return config, workload, folder / "checkpoints"


def ways(value, way=()):
    """Yield the way to every value of nested JSON, the value itself first."""
    yield way
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in pairs:
        yield from ways(item, (*way, key))


def put(value, way, new):
    if not way:
        return new
    value[way[0]] = put(value[way[0]], way[1:], new)
    return value


REMOVED = object()


@cases.hostile(25, st.sampled_from(JSON), places, values | st.just(REMOVED))
def test_any_value_in_the_json_of_a_checkpoint_fits_the_run_or_is_a_clear_error(
    tmp_path, trained, name, place, new
):
    config, workload, saved = trained
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    shutil.copytree(saved, tmp_path / "checkpoints")
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    state = json.loads((newest / name).read_text())
    there = list(ways(state))
    way = there[int(place * len(there))]
    if new is REMOVED and way:
        holder = state
        for key in way[:-1]:
            holder = holder[key]
        del holder[way[-1]]
    else:
        state = put(state, way, None if new is REMOVED else new)
    (newest / name).write_text(json.dumps(state))
    with_valid_checksums(newest)
    with closing(TrainingRun(config, workload, Arm("baseline"), seed=0, lr=0.05)) as run:
        taken, refused = cases.outcome(lambda: load_latest(run, tmp_path / "checkpoints"))
        if taken is None:
            assert cases.is_clear(refused)
            return
        assert (run.position.step, run.position.epoch, run.position.batch) == (3, 0, 3)
        for _ in run.steps():  # what was taken can be gone on from
            pass
        assert run.position.step == run.total_steps
        run.evaluate()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that ended."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert cases.command("train", *SMALL, "--threads", "1", "--out", str(folder))[0] == 0
    return folder


@pytest.mark.long
@cases.hostile(
    30,
    st.sampled_from(
        (
            "about.json",
            "config.yaml",
            "results.csv",
            "runs/baseline/0/run.json",
            "runs/baseline/0/points.jsonl",
            "runs/baseline/0/receipt.json",
        )
    ),
    contents,
)
def test_any_altered_folder_is_shown_or_one_clear_line_and_is_left_as_it_is(
    tmp_path, finished, name, change
):
    def accept(plan, display):
        raise cases.Accepted

    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
    alter(folder, name, change, signed=False)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(train, "train", accept)
        for words in (
            ["report", "out"],
            ["report", "out", "--json"],
            ["train", "--resume", "--out", "out"],
        ):
            code, out, err = cases.command(*words)
            assert code in ({None, 2} if words[0] == "train" else {0, 2})
            if code == 2:
                assert out == ""
                assert err.startswith("regrad: ")
                assert cases.is_clear(err.removesuffix("\n"))
    assert {
        path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    } == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_refused_checkpoint_is_one_clear_line_with_exit_code_2_and_leaves_the_folder_alone(
    tmp_path, finished
):
    shutil.copytree(finished, tmp_path / "out")
    newest = checkpoints(tmp_path / "out" / "checkpoints")[-1]
    (newest / "tensors.pt").write_bytes(evil(TRAPS[0], plain=False))
    with_valid_checksums(newest)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    code, out, err = cases.command("train", "--resume", "--out", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert err.startswith("regrad: checkpoint must hold tensors and plain values only, got ")
    assert err.count("\n") == 1
    assert {
        path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()
    } == before
