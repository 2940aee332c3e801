import os
import re
from pathlib import Path

import pytest
import yaml
from regrad_runner.settings.config import CompareConfig, TrainConfig
from regrad_runner.settings.continuing import first_difference
from regrad_runner.settings.flag import (
    HOW_IT_IS_TRAINED,
    WHAT_IS_TRAINED,
    WHERE_IT_GOES,
    Flag,
)
from regrad_runner.settings.loading import load_config, write_config
from regrad_runner.training.resolving import resolved
from regrad_runner.workloads.loading import load_workload


@pytest.fixture(scope="module")
def digits():
    return load_workload("digits")


def settings(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    return file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = settings(tmp_path, "epochs: 3\nseeds: 7\nlr: [0.1, 0.2]\n")
    config = load_config(CompareConfig, file=file, flags={"seeds": 8, "norm": None})
    assert (config.epochs, config.seeds, config.lr, config.norm) == (3, 8, (0.1, 0.2), None)


@pytest.mark.parametrize("rate", [0.1, "0.1", "1e-1", [0.1], ["0.1"]])
def test_one_learning_rate_may_be_written_alone(rate):
    assert load_config(CompareConfig, flags={"lr": rate}).lr == (0.1,)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"epochs": 0}, "epochs must be greater than 0, got 0"),
        ({"epochs": 1.5}, "epochs must be a valid integer, got 1.5"),
        ({"seeds": -1}, "seeds must be greater than 0, got -1"),
        ({"norm": "layer"}, "norm must be 'batch', 'group' or 'none', got 'layer'"),
        ({"lr": "fast"}, "lr must be a valid number, got 'fast'"),
        ({"lr": ["auto", 0.1]}, "lr must be a valid number, got 'auto'"),
        ({"lr": [0.1, 0.1]}, "lr must be different positive numbers, got 0.1, 0.1"),
        ({"lr": [0.1, -1]}, "lr must be different positive numbers, got 0.1, -1"),
        ({"lr": []}, "lr must be different positive numbers, got none"),
        ({"epoch": 3}, "no setting named 'epoch'; did you mean 'epochs'?"),
        (
            {"batch_size": 7, "accumulate": 2},
            r"batch_size must be a multiple of accumulate \(2\), got 7",
        ),
        ({"clip_norm": 0}, "clip_norm must be greater than 0, got 0"),
        ({"optimizer": ""}, "optimizer must not be empty, got ''; leave it out for the default"),
        ({"data_dir": "  "}, "data_dir must not be empty, got '  '"),
        ({"corrections": ["xgrad", ""]}, "corrections must not be empty, got ''"),
        ({"lr": [True, 0.1]}, "lr must not be yes or no, got True"),
        ({"lr": [2**53 + 1]}, "lr must be at most 9007199254740992, got 9007199254740993"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"corrections": ["a\x1b[31m"]}, r"at most 1000 printable characters, got 'a.x1b.31m'"),
        ({"tracking_uri": "./mlruns"}, "tracking_uri must be an absolute address, got './mlruns'"),
    ],
)
def test_a_bad_setting_is_one_line_with_name_rule_and_value(flags, message):
    with pytest.raises(ValueError, match=message) as problem:
        load_config(CompareConfig, flags=flags)
    assert "\n" not in str(problem.value)


def test_a_setting_without_a_near_match_lists_what_there_is():
    with pytest.raises(
        ValueError,
        match="no setting named 'zzz'; allowed: tracker, tracking_uri, workload, data_dir",
    ):
        load_config(TrainConfig, flags={"zzz": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "config must map settings to values, got list"),
        ("epochs: [", "config must be YAML"),
        ("", "config must map settings to values, got NoneType"),
        ("!!python/object:os.system {}", "config must be YAML"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as problem:
        load_config(CompareConfig, file=settings(tmp_path, text), flags={})
    assert "\n" not in str(problem.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config must be a readable file"):
        load_config(CompareConfig, file=tmp_path / "none.yaml", flags={})


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match=r"readable file, got '.*pipe.yaml': not a regular file"):
        load_config(CompareConfig, file=tmp_path / "pipe.yaml", flags={})


def test_what_is_left_open_comes_from_the_workload(digits):
    config = resolved(load_config(CompareConfig, flags={"epochs": 3}), digits)
    assert config.epochs == 3
    assert (config.batch_size, config.model, config.lr) == (64, "resnet8", (0.05,))
    assert config.optimizer == "sgd:momentum=0.9,weight_decay=0.0"


def test_another_optimizer_brings_its_own_learning_rate(digits):
    config = resolved(load_config(TrainConfig, flags={"optimizer": "adamw"}), digits)
    assert (config.optimizer, config.lr) == ("adamw", 1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_rate_that_no_step_can_be_made_with_is_refused_before_one_is(digits, optimizer):
    for kind, rate in ((TrainConfig, 1e39), (CompareConfig, (0.1, 1e308))):
        with pytest.raises(
            ValueError, match=f"lr must .*'{optimizer}.*got 1e\\+3|lr must keep weights"
        ):
            resolved(load_config(kind, flags={"lr": rate, "optimizer": optimizer}), digits)


def test_auto_is_a_third_of_the_rate_that_suits_the_rate_and_three_times_it(digits):
    complete = resolved(CompareConfig(lr="auto"), digits)
    assert resolved(CompareConfig(), digits).rates == (0.05,)
    assert complete.rates == (0.0167, 0.05, 0.15)
    assert resolved(complete, digits) == complete
    assert CompareConfig(lr=["auto"]).lr == "auto"
    assert CompareConfig(lr="auto").rates == ()


def test_resolving_twice_changes_nothing(digits):
    for kind in (CompareConfig, TrainConfig):
        once = resolved(load_config(kind, flags={}), digits)
        assert resolved(once, digits) == once


def test_a_batch_larger_than_the_training_images_is_refused(digits):
    with pytest.raises(
        ValueError, match=r"batch_size must be at most 1077 \(the training images\), got 2000"
    ):
        resolved(load_config(TrainConfig, flags={"batch_size": 2000}), digits)


@pytest.mark.parametrize("kind", [CompareConfig, TrainConfig])
def test_written_settings_read_back_as_they_were(tmp_path, digits, kind):
    config = resolved(
        load_config(kind, flags={"clip_norm": 1e-4, "corrections": ["agc:max_ratio=0.1", "xgrad"]}),
        digits,
    )
    again = load_config(kind, file=settings(tmp_path, write_config(config)), flags={})
    assert again == config


def test_written_settings_are_plain_yaml(digits):
    assert yaml.safe_load(write_config(resolved(CompareConfig(), digits)))["lr"] == [0.05]


def test_the_first_difference_that_matters_is_named():
    old = CompareConfig(epochs=3, seeds=4, tracker="none")
    assert first_difference(old, CompareConfig(epochs=3, seeds=4, processes=2, threads=3)) is None
    assert first_difference(old, CompareConfig(epochs=5, seeds=5)) == "epochs 3 there and 5 here"


def test_every_setting_is_documented():
    for kind in (CompareConfig, TrainConfig):
        for name, field in kind.model_fields.items():
            (flag,) = (item for item in field.metadata if isinstance(item, Flag))
            assert re.fullmatch(r"\w.*\w\.", flag.meaning), name
            assert flag.group in {WHAT_IS_TRAINED, HOW_IT_IS_TRAINED, WHERE_IT_GOES}, name


def test_a_workload_of_few_images_has_a_batch_that_fits_and_one_that_is_asked_for_is_kept():
    few = load_workload("digits", train_size=20)
    assert resolved(load_config(TrainConfig, flags={}), few).batch_size == len(few.train) == 20
    assert resolved(load_config(TrainConfig, flags={"batch_size": 5}), few).batch_size == 5
    with pytest.raises(
        ValueError, match=r"batch_size must be at most 20 \(the training images\), got 21"
    ):
        resolved(load_config(TrainConfig, flags={"batch_size": 21}), few)
