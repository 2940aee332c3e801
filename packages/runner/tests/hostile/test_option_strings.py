import math
from pathlib import Path

import pytest
import regrad
import torch
from hypothesis import strategies as st
from regrad_runner import training_command as train
from regrad_runner.comparing import compare
from regrad_runner.results.run import folder_name
from regrad_runner.settings.arms import expand
from regrad_runner.settings.specs import read_spec
from regrad_runner.training.optimizers import build_optimizer, spec_of
from regrad_runner.workloads.digits import DIGITS_DEFAULTS
from regrad_testing.files import load_beside

cases = load_beside(__file__, "cases")
CORRECTIONS = tuple(regrad.available())
OPTIMIZERS = (
    "sgd",
    "adamw",
    "adam",
    "rmsprop",
    "adagrad",
    "nadam",
    "rprop",
    "lbfgs",
    "muon",
    "sparseadam",
    "adafactor",
)
OPTIMIZERS += tuple(regrad.available("regrad.optimizers"))
VALUES = (
    "0",
    "-1",
    "0.5",
    "1e-3",
    "nan",
    "-inf",
    "1e999",
    "9" * 5000,
    "true",
    "none",
    "[1,2]",
    "(0.9,0.99)",
    "[",
    "]",
)
VALUES += (
    "[" * 3000 + "]",
    "(" * 300 + ")" * 300,
    "'a'",
    '"',
    "{}",
    "__import__('os')",
    "0x1F",
    "1_000",
    "١",
    "½",
)
VALUES += (
    "../../etc",
    "=1+1",
    "@SUM(1)",
    "<script>",
    "$\\frac$",
    "[/bold]",
    "a b",
    "\x00",
    "\x1b[31m",
    "\udcff",
    "\n",
)
OPTIONS = (
    "max_norm",
    "max_ratio",
    "max_value",
    "horizon",
    "alpha",
    "decay",
    "axis",
    "exclude",
    "gcw.prior",
    "prior",
)
OPTIONS += (
    "target",
    "placement",
    "lr",
    "momentum",
    "betas",
    "eps",
    "nesterov",
    "weight_decay",
    "fused",
    "foreach",
)
OPTIONS += (
    "capturable",
    "differentiable",
    "maximize",
    "amsgrad",
    "params",
    "__class__",
    "etas",
    "",
)
SIGNS = (":", "=", ",", "+", ".", "[", "]", " ", "-", "e")

values = (
    st.sampled_from(VALUES) | st.floats().map(str) | st.integers().map(str) | st.text(max_size=12)
)
options = st.lists(
    st.tuples(st.sampled_from(OPTIONS) | st.text(max_size=6), values).map("=".join), max_size=3
)
rubbish = st.lists(
    st.sampled_from((*SIGNS, *VALUES, *OPTIONS, *CORRECTIONS)) | st.text(max_size=5), max_size=8
)


def specs(names):
    name = st.sampled_from(names) | st.text(max_size=8)
    return (
        st.tuples(name, options.map(",".join)).map(":".join)
        | st.sampled_from(names)
        | rubbish.map("".join)
    )


stacks = st.lists(specs(CORRECTIONS or ("none",)), min_size=1, max_size=3).map("+".join)


def numbers_of(value):
    return [
        one
        for one in (value if isinstance(value, tuple | list) else [value])
        if isinstance(one, float)
    ]


@cases.hostile(250, stacks)
def test_any_text_makes_corrections_that_can_be_kept_or_a_clear_error(text):
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    arms, refused = cases.outcome(lambda: expand([text], sgd))
    if arms is None:
        assert cases.is_clear(refused)
        return
    assert arms[1].name == "+".join(part.strip() for part in arms[1].corrections)
    assert expand([text], sgd) == arms
    for correction in regrad.registry.create_all(arms[1].corrections):
        numbers = [
            number for value in vars(correction.options).values() for number in numbers_of(value)
        ]
        assert not any(map(math.isnan, numbers))
    for arm in arms:
        assert Path("runs", folder_name(arm.name)).parent == Path("runs")
        assert len(folder_name(arm.name)) < 150


@pytest.mark.skipif("agc" not in CORRECTIONS, reason="regrad-clipping is not installed")
@cases.hostile(50, st.floats(min_value=0, exclude_min=True, allow_infinity=False), st.booleans())
def test_a_written_number_is_the_number(value, spaced):
    text = f" agc : max_ratio = {value!r} " if spaced else f"agc:max_ratio={value!r}"
    assert regrad.create(text).options.max_ratio == value


@cases.hostile(150, specs(OPTIMIZERS))
def test_any_text_makes_an_optimizer_that_steps_or_a_clear_error(text):
    read, refused = cases.outcome(lambda: spec_of(text, DIGITS_DEFAULTS))
    if read is None:
        assert cases.is_clear(refused)
        return
    spec, lr = read
    assert spec_of(spec, DIGITS_DEFAULTS) == (spec, lr)
    optimizer = build_optimizer(spec, [torch.zeros(1, requires_grad=True)], lr=lr)
    for name, value in read_spec(spec)[1].items():
        assert optimizer.defaults[name] == value
        assert all(map(math.isfinite, numbers_of(value)))


TEXT_FLAGS = (
    "--workload",
    "--model",
    "--norm",
    "--mixed-precision",
    "--tracker",
    "--tracking-uri",
    "--data-dir",
)
NUMBER_FLAGS = (
    "--epochs",
    "--batch-size",
    "--seed",
    "--lr",
    "--clip-norm",
    "--accumulate",
    "--threads",
    "--workers",
)
NUMBER_FLAGS += (
    "--warmup-steps",
    "--train-size",
    "--checkpoint-every",
    "--keep-checkpoints",
    "--processes",
    "--seeds",
)
NUMBER_FLAGS += (
    "--evaluations-per-epoch",
    "--image-size",
    "--tuning-seeds",
    "--probe-every",
    "--probe-size",
)
wild_numbers = st.sampled_from(
    ("0", "-1", "1", "2", "50", "1e9", "99999999999", "9" * 40, "nan", "inf", "1.5", "")
)
words = st.one_of(
    st.tuples(st.just("--corrections"), specs(CORRECTIONS or ("none",))),
    st.tuples(st.just("--optimizer"), specs(OPTIMIZERS)),
    st.tuples(st.sampled_from(TEXT_FLAGS), values),
    st.tuples(st.sampled_from(NUMBER_FLAGS), wild_numbers),
    st.tuples(st.text(min_size=1, max_size=6)),
)


@cases.hostile(40, st.sampled_from(["train", "compare"]), st.lists(words, min_size=1, max_size=3))
def test_any_words_on_the_command_line_start_a_run_or_are_one_clear_line(tmp_path, name, flags):
    def accept(plan, display):
        raise cases.Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(train, "train", accept)
        patch.setattr(compare, "compare", accept)
        threads = torch.get_num_threads()
        code, out, err = cases.command(
            name, "--width", "4", *(word for flag in flags for word in flag)
        )
        torch.set_num_threads(threads)
    assert "Traceback" not in err
    if code == 2:
        assert out == ""
        assert err.startswith("regrad: ")
        assert cases.is_clear(err.removesuffix("\n"))
    else:
        assert code is None or (code == 0 and "--help" in str(flags))
    assert list(tmp_path.iterdir()) == []
