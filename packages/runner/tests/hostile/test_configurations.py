import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st
from regrad_runner.settings.config import CompareConfig, TrainConfig
from regrad_runner.settings.loading import load_config, write_config
from regrad_runner.training.resolving import resolved
from regrad_runner.workloads.loading import load_workload
from regrad_testing.files import load_beside

cases = load_beside(__file__, "cases")
NAMES = sorted({*CompareConfig.model_fields, *TrainConfig.model_fields})
TAGGED = (
    "!!python/object/apply:os.mkdir ['it-ran']",
    "!!python/object/new:os.mkdir ['it-ran']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!!python/object/apply:pathlib.Path.mkdir [it-ran]",
    "!!timestamp never",
    "!!int many",
    "!!float [1]",
    "!!bool perhaps",
    "!!binary '½'",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!own 3",
)
ODD = (
    "2020-99-99",
    "0x" + "f" * 4000,
    "1" * 5000,
    "[" * 2000,
    "{a: " * 300,
    "&a [*a]",
    "*nobody",
    ".nan",
    ".inf",
    "1e999",
)
ODD += (
    "yes",
    "~",
    "0o17",
    "1:30",
    "'\\x00'",
    '"\\u0000"',
    '"\\ud800"',
    "|\n  two\n  lines",
    "3.0",
    "-0",
    "<<: 1",
    "? [1]",
    "%",
)
BOMB = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
)
fit = st.sampled_from(
    (1, 2, 0.5, "digits", "sgd:momentum=0.9", ["xgrad"], "none", "group", "bf16", [0.1, 0.2], True)
)
mappings = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), fit | values, max_size=4)
documents = st.one_of(
    mappings.map(
        lambda mapping: yaml.safe_dump(mapping, allow_unicode=True).encode("utf-8", "surrogatepass")
    ),
    st.tuples(st.sampled_from(NAMES), st.sampled_from(TAGGED + ODD)).map(
        lambda pair: f"{pair[0]}: {pair[1]}".encode()
    ),
    st.sampled_from([f"{BOMB}{name}: *j".encode() for name in NAMES[:4]]),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")),
    st.binary(max_size=40),
)
kinds = st.sampled_from([TrainConfig, CompareConfig])


@pytest.fixture(scope="module")
def digits():
    return load_workload("digits")


@pytest.mark.long
@cases.hostile(250, kinds, documents)
def test_any_file_is_settings_that_can_be_written_and_read_again_or_a_clear_error(
    tmp_path, digits, kind, document
):
    file = tmp_path / "settings.yaml"
    file.write_bytes(document)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        config, refused = cases.outcome(
            lambda: resolved(load_config(kind, file=file, flags={}), digits)
        )
        if config is None:
            assert cases.is_clear(refused)
        else:
            file.write_text(write_config(config), encoding="utf-8")
            assert load_config(kind, file=file, flags={}) == config
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize("value", TAGGED)
def test_a_tag_runs_nothing_and_imports_nothing(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    Path("settings.yaml").write_text(f"data_dir: {value}\n", encoding="utf-8")
    code, out, err = cases.command("train", "--config", "settings.yaml")
    assert (code, out) == (2, "")
    assert err.startswith(
        (
            "regrad: config must be YAML, got 'settings.yaml': ",
            "regrad: data_dir must be a valid string",
        )
    )
    assert not Path("it-ran").exists()
    assert not any(name.startswith("yaml.") for name in set(sys.modules) - before)


def test_yes_is_no_number_and_seven_letters_are_no_list(tmp_path):
    file = tmp_path / "settings.yaml"
    for text, message in (
        ("epochs: yes", "epochs must be a valid integer, got 'yes'"),
        ("epochs: true", "epochs must not be yes or no, got True"),
        ("epochs: 0x" + "f" * 4000, "epochs must be at most 9007199254740992, got a very long int"),
        ("corrections: xgrad", "corrections must be a valid tuple, got 'xgrad'"),
        ("lr: .nan", "lr must be a finite number, got nan"),
        (
            'optimizer: "sgd\\n"',
            "optimizer must be at most 1000 printable characters, got 'sgd\\\\n'",
        ),
        ("seed: 4294967296", "seed must be less than or equal to 4294967295, got 4294967296"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_config(TrainConfig, file=file, flags={})
