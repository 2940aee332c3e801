import json
import math
import os
from contextlib import closing
from types import SimpleNamespace

import pytest
import regrad
import torch
from regrad_runner.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from regrad_runner.cli.main import main
from regrad_runner.results.folder import ResultsFolder
from regrad_runner.settings.arms import Arm
from regrad_runner.settings.config import TrainConfig
from regrad_runner.training.evaluation import Evaluator
from regrad_runner.training.resolving import resolved
from regrad_runner.training.run import TrainingRun
from regrad_runner.workloads.loading import load_workload, make_model
from regrad_runner.workloads.text import DrawnWindows
from torch.nn import functional as F

needs_plugins = pytest.mark.skipif(
    not {"xgrad", "powergrad", "agc", "gcw", "gcode"} <= regrad.available().keys(),
    reason="regrad-xgrad, regrad-powergrad, regrad-clipping, regrad-gcw and regrad-gcode are not installed",
)
SENTENCE = "Schöne Grüße aus dem Wald: the quick brown fox jumps over the lazy dog, number {}.\n"
TEXT = "".join(SENTENCE.format(number) for number in range(41)).encode()
SPEC = "text:context=7,target=5.5"
SMALL = {"model": "gpt:layers=1,heads=2", "width": 8, "batch_size": 16, "epochs": 1, "threads": 1}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "greetings.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="module")
def workload(file):
    return load_workload(SPEC, data_dir=file)


def predicted(samples):
    """Return the bytes that samples ask for, in order."""
    _, targets = samples.__getitems__(list(range(len(samples))))
    return bytes(targets[targets >= 0].tolist())


# the windows


def test_validation_and_test_predict_the_last_fifth_byte_by_byte_and_training_none_of_it(workload):
    first, second = round(0.8 * len(TEXT)), round(0.9 * len(TEXT))
    assert predicted(workload.validation) == TEXT[first:second]
    assert predicted(workload.test) == TEXT[second:]
    assert bytes(workload.train.text.tolist()) == TEXT[:first]
    assert len(workload.train) == (first - 1) // 7


def test_a_window_holds_bytes_and_those_that_follow_them(workload):
    for samples in (workload.train.with_seed(3), workload.test):
        inputs, targets = samples.__getitems__([4, 0, 5])
        assert inputs.shape == targets.shape == (3, 7)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        found = bytes(samples.text.tolist())
        assert all(
            bytes([*row.tolist(), last]) in found
            for row, last in zip(inputs, targets[:, -1], strict=True)
        )


def test_the_last_window_ends_with_the_text_and_what_is_beyond_counts_nothing(workload):
    _, last = workload.test[len(workload.test) - 1]
    left = (len(workload.test.text) - 1) % 7
    assert 0 < left < 7
    assert (last[:left] >= 0).all()
    assert (last[left:] == -100).all()


def test_a_training_window_is_a_function_of_seed_epoch_and_number_alone(workload):
    view, again, other = (workload.train.with_seed(seed) for seed in (1, 1, 2))
    first = view.__getitems__([5, 9])[0]
    assert torch.equal(first[1], again[9][0])
    assert not torch.equal(first, other.__getitems__([5, 9])[0])
    view.set_epoch(1)
    assert not torch.equal(first, view.__getitems__([5, 9])[0])


def test_training_windows_lie_anywhere_from_the_first_to_the_last_place():
    windows = DrawnWindows(torch.arange(20, dtype=torch.uint8), context=4)
    starts = set()
    for epoch in range(200):
        windows.set_epoch(epoch)
        starts |= set(windows.starts(list(range(len(windows)))).tolist())
    assert starts == set(range(16))


def test_a_smaller_training_set_is_the_first_bytes(file, workload):
    small = load_workload(SPEC, data_dir=file, train_size=20)
    assert len(small.train) == 20
    assert bytes(small.train.text.tolist()) == TEXT[: 20 * 7 + 1]
    assert predicted(small.test) == predicted(workload.test)


def test_the_texts_of_a_folder_follow_each_other_by_name(tmp_path, file, workload):
    (tmp_path / "b.txt").write_bytes(TEXT[1000:])
    (tmp_path / "a.txt").write_bytes(TEXT[:1000])
    (tmp_path / "c.md").write_bytes(b"\xff")
    assert torch.equal(load_workload(SPEC, data_dir=tmp_path).test.text, workload.test.text)


# the measure


class Subset:
    """The first samples of a set, for evaluation."""

    evaluation_batch = 2

    def __init__(self, samples, size):
        self.samples, self.size = samples, size

    def __len__(self):
        return self.size

    def batches(self, size, *, indices, workers):
        return self.samples.batches(size, indices=indices, workers=workers)


def test_a_model_that_knows_nothing_needs_eight_bits_for_each_byte(workload):
    targets = workload.test.__getitems__([0, len(workload.test) - 1])[1]
    bits, counts = workload.score(torch.zeros(2, 256, 7), targets)
    assert counts.tolist() == [7, (len(workload.test.text) - 1) % 7]
    assert bits.tolist() == pytest.approx([8.0 * count for count in counts.tolist()], abs=1e-5)


def test_bits_are_worked_out_by_hand(workload):
    logits = torch.full((1, 256, 7), -1e9)
    logits[0, 65], logits[0, 66] = math.log(3.0), 0.0  # three quarters and a quarter
    bits, counts = workload.score(logits, torch.tensor([[65, 66, 66, -100, -100, -100, -100]]))
    assert (bits.item(), counts.item()) == (pytest.approx(2 - math.log2(3) + 2 + 2, abs=1e-6), 3)


@pytest.fixture(scope="module")
def config(workload):
    return resolved(TrainConfig(**SMALL, evaluations_per_epoch=2), workload)


def part_of(run, samples, rank, processes):
    """Return the sum and the number that one of several processes finds."""
    found = []

    def reduce(total, how):
        found.append(total)
        return total

    fake = SimpleNamespace(
        process_index=rank, num_processes=processes, device=torch.device("cpu"), reduce=reduce
    )
    fake.unwrap_model = lambda model: model
    Evaluator(
        fake,
        run.model,
        run.workload,
        attachment=run.attachment,
        dtype=torch.float32,
        workers=0,
    ).value_on(samples)
    return found[0]


@torch.no_grad()
def test_every_test_byte_counts_once_on_any_number_of_processes(workload, config):
    with closing(TrainingRun(config, workload, Arm("baseline"), seed=0, lr=0.01)) as run:
        value = run.value_on(workload.test)
        nats = 0.0
        for inputs, targets in workload.test.batches(1):
            logits = run.model(inputs)[0].T.double()
            nats -= sum(
                F.log_softmax(row, 0)[t].item()
                for row, t in zip(logits, targets[0], strict=True)
                if t >= 0
            )
        assert value == pytest.approx(nats / math.log(2) / (len(workload.test.text) - 1), abs=1e-6)
        for processes in (2, 3, 5):
            parts = [part_of(run, workload.test, rank, processes) for rank in range(processes)]
            bits, count = torch.stack(parts).sum(0).tolist()
            assert count == len(workload.test.text) - 1
            assert bits / count == pytest.approx(value, abs=1e-12)


@needs_plugins
@torch.no_grad()
def test_bits_are_those_of_the_probabilities_that_the_criterion_fits(workload, config):
    with closing(
        TrainingRun(config, workload, Arm("powergrad", ("powergrad:alpha=0.5",)), seed=0, lr=0.01)
    ) as run:
        run.model.head.weight.mul_(50)
        inputs, targets = workload.test.__getitems__([0, 1, 2])
        nats = F.cross_entropy(0.5 * run.model(inputs), targets)
        value = run.value_on(Subset(workload.test, 3))
    assert value == pytest.approx(nats.item() / math.log(2), abs=1e-5)


# whole runs


@pytest.mark.long
@needs_plugins
def test_a_comparison_runs_through_and_says_that_lower_is_better(
    tmp_path, file, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = f"compare --workload {SPEC} --data-dir {file} --model gpt:layers=1,heads=2 --width 8 --optimizer adamw"
    words += " --batch-size 16 --epochs 1 --seeds 1 --lr 0.001,0.02 --tuning-seeds 1 --tuning-extensions 0"
    words += " --evaluations-per-epoch 4"
    words += (
        " --corrections powergrad xgrad agc gcw:layers=all --threads 1 --tracker none --out out"
    )
    words += " --probe-every 10 --probe-size 32"
    assert main(words.split()) == 0
    shown = capsys.readouterr()
    assert (
        "401 training windows: 8 arms × 1 seeds after 16 runs to choose learning rates" in shown.err
    )
    assert "test bits per byte" in shown.out
    assert "lower is better" in shown.out
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    wanted = {"name": "test bits per byte", "higher_is_better": False, "target": 5.5, "decimals": 4}
    wanted["on_validation"] = None
    assert (about["workload"], about["samples"], about["measure"]) == ("text", "windows", wanted)
    folder = ResultsFolder(tmp_path / "out")
    arms = ["baseline", "powergrad", "xgrad", "agc", "gcw:layers=all"]
    arms += ["scaled-head", "nadam", "clip-norm"]
    assert [result.arm for result in folder.results] == arms
    # Eight bits are those of a model that knows nothing; PowerGrad's are read from the probabilities that it fits.
    assert {result.arm: result.value for result in folder.results if not 3 < result.value < 7} == {}
    assert {result.lr for result in folder.results} == {0.02}
    assert [result.touched for result in folder.results] == [
        False,
        True,
        True,
        True,
        True,
        False,
        False,
        True,
    ]
    assert {result.steps_to_target for result in folder.results} <= {
        None,
        18,
        24,
        25,
    }  # every 6 of 25
    assert (tmp_path / "out" / "gradient_quality.csv").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "test bits per byte, lower is better" in page
    assert "Left of zero is better." in page
    assert "accuracy" not in page


@needs_plugins
@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_run_resumes_exactly_with_a_tied_head_too(tmp_path, workload, tied):
    settings = {**SMALL, "model": f"gpt:layers=1,heads=2,tied={tied}", "optimizer": "adamw"}
    config = resolved(TrainConfig(**settings), workload)
    arm = Arm("xgrad+agc", ("xgrad", "agc"))
    with closing(TrainingRun(config, workload, arm, seed=0, lr=0.01)) as run:
        paths = [save_checkpoint(run, tmp_path) for step in run.steps() if step == 9]
        whole = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with closing(TrainingRun(config, workload, arm, seed=0, lr=0.01)) as run:
        load_checkpoint(run, paths[0])
        assert run.position.step == 9
        assert sum(1 for _ in run.steps()) == run.total_steps - 9
        again = dict(run.model.named_parameters())
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert ("head.weight" in whole) == (tied == "false")


@needs_plugins
def test_explain_shows_what_changes_on_a_batch_of_bytes(file, capsys):
    words = f"explain --workload {SPEC} --data-dir {file} --model gpt:layers=1,heads=2 --width 8 --batch-size 16 --json"
    assert main([*words.split(), "--corrections", "powergrad", "agc"]) == 0
    power, clipping = json.loads(capsys.readouterr().out)["corrections"]
    assert power["rows"][0]["relative_change"] > 0
    assert {row["tensor"]: row["why"] for row in clipping["rows"]}["head.weight"].startswith(
        "'agc' leaves the"
    )


# what does not fit


@needs_plugins
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--corrections gcode", "'gcode' must find two stages or more, found none"),
        (
            "--corrections gcw",
            "layers must be named in a model without stages; it has tokens, positions, blocks.0",
        ),
        (
            "--corrections powergrad --model gpt:tied=true",
            "head must have weights of its own for control 'scaled-head'",
        ),
        ("--norm group", "norm must be left out for workload 'text', got 'group'"),
        ("--image-size 8", "image_size must be left out for workload 'text', got 8"),
        ("--download", "download must be left out for workload 'text', got True"),
        (
            "--model gtp",
            "no model named 'gtp' for workload 'text'; there is gpt; did you mean 'gpt'?",
        ),
        ("--model gpt:layers=two", "layers must be int, got 'two'"),
        ("--model gpt:depth=2", "model 'gpt' has no option 'depth'; allowed: layers, heads, tied"),
        ("--model gpt:width=8", "model 'gpt' must not set width, got 8; use the setting width"),
        ("--width 10", "width must be a multiple of heads (4), got 10"),
        ("--train-size 4000", "train_size must be from 1 to 401 (windows of 7 bytes), got 4000"),
        ("--batch-size 4000", "batch_size must be at most 401 (the training windows), got 4000"),
    ],
)
def test_what_does_not_fit_a_text_is_one_line_and_writes_nothing(
    tmp_path, file, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "compare",
                "--workload",
                SPEC,
                "--data-dir",
                str(file),
                "--corrections",
                "agc",
                *words.split(),
            ]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        (
            None,
            "text",
            "data_dir must be a UTF-8 file, or a folder with .*, got '.*some.txt': No such file",
        ),
        (b"", "text", "data_dir must hold text, got '.*some.txt', which is empty"),
        (
            b"short",
            "text",
            "data_dir must hold at least 1290 bytes for windows of 128, got 5 in '.*some.txt'",
        ),
        (
            b"caf\xe9 noir",
            "text",
            r"data_dir must hold UTF-8, got byte 3 \(0xe9\) of '.*some.txt': .*; convert it",
        ),
        (TEXT, "text:context=0", "context must be at least 1, got 0"),
        (TEXT, "text:context=1.5", "context must be int, got 1.5"),
        (TEXT, "text:target=0", "target must be positive, got 0"),
        (
            TEXT,
            "text:data_dir=x",
            "workload 'text' must not set data_dir, got 'x'; use the setting data_dir",
        ),
        (TEXT, "text:length=3", "workload 'text' has no option 'length'; allowed: context, target"),
        (
            TEXT,
            "text:context",
            "workload must look like 'name:option=value,option=value', got 'text:context'",
        ),
    ],
)
def test_a_file_or_option_that_is_unfit_is_refused(tmp_path, content, spec, message):
    path = tmp_path / "some.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_workload(spec, data_dir=path)


def test_a_text_needs_a_place_and_a_folder_a_text(tmp_path):
    with pytest.raises(ValueError, match="data_dir must be given for workload 'text'"):
        load_workload("text")
    with pytest.raises(
        ValueError, match=r"data_dir must be a UTF-8 file, or a folder with .* without one"
    ):
        load_workload("text", data_dir=tmp_path)


def test_the_split_has_no_seed(file):
    with pytest.raises(ValueError, match="seed_of_split must be 0 for workload 'text'"):
        load_workload("text", data_dir=file, seed_of_split=1)


def test_sizes_of_the_model_come_from_its_name_and_the_width_from_its_setting(workload):
    model = make_model(workload, "gpt:layers=2,heads=3,tied=true", width=12, norm=None, seed=0)
    assert (len(model.blocks), model.blocks[0].attention.heads, model.positions.weight.shape) == (
        2,
        3,
        (7, 12),
    )
    assert model.head.weight is model.tokens.weight


def test_a_pipe_and_a_device_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for place, said in (
        (tmp_path / "pipe.txt", r"got '.*pipe.txt': not a regular file"),
        (tmp_path / "zero", r"got '.*zero': not a regular file"),
        (tmp_path, r"data_dir must hold regular files, got another kind in '.*pipe.txt'"),
    ):
        with pytest.raises(ValueError, match=said):
            load_workload("text", data_dir=place)


def test_hidden_texts_of_a_folder_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "._a.txt").write_bytes(b"\xff")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.txt").write_bytes(b"\xff")
    text = load_workload("text:context=7", data_dir=tmp_path)
    assert bytes(text.train.text.tolist()) == TEXT[: round(0.8 * len(TEXT))]


@pytest.mark.parametrize("how", ["symlink_to", "hardlink_to"])
def test_a_text_that_stands_twice_in_a_folder_is_refused(tmp_path, how):
    (tmp_path / "a.txt").write_bytes(TEXT)
    getattr(tmp_path / "b.txt", how)(tmp_path / "a.txt")
    with pytest.raises(
        ValueError, match=r"each file once, got one file as '.*a.txt' and '.*b.txt'"
    ):
        load_workload("text", data_dir=tmp_path)


def test_a_link_out_of_a_folder_of_texts_is_refused_and_one_that_was_named_is_followed(
    tmp_path, file
):
    (tmp_path / "a.txt").symlink_to(file)
    with pytest.raises(ValueError, match=r"hold no link that points outside it, got '.*a.txt' to"):
        load_workload("text", data_dir=tmp_path)
    assert len(load_workload("text", data_dir=tmp_path / "a.txt").train)
