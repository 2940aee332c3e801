import json
import re
from types import SimpleNamespace

import pytest
import regrad
import torch
from regrad.correction import Control
from regrad_runner.settings import arms as module
from regrad_runner.settings.arms import created, expand, merged, must_beat, parts_of

NESTEROV = Control(name="nesterov", optimizer={"nesterov": True})
HEAD = Control(name="scaled-head", head_init=0.25, head_lr=0.25, body_lr=4.0)


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)


@pytest.fixture
def with_controls(monkeypatch):
    """Corrections that need no plugin: what `regrad.create` returns, by name."""

    def install(**controls):
        def create(text):
            name, _, options = text.partition(":")
            fields = SimpleNamespace(**dict(item.split("=") for item in options.split(",") if item))
            return SimpleNamespace(
                name=name, options=fields, control=lambda optimizer: controls[name]
            )

        monkeypatch.setattr(regrad, "create", create)

    return install


def test_every_correction_brings_its_control(with_controls, optimizer):
    with_controls(xgrad=NESTEROV, powergrad=HEAD)
    arms = expand(["powergrad", "xgrad", "xgrad+powergrad"], optimizer)
    assert [arm.name for arm in arms] == [
        "baseline",
        "powergrad",
        "xgrad",
        "xgrad+powergrad",
        "scaled-head",
        "nesterov",
        "nesterov+scaled-head",
    ]
    assert must_beat(arms) == {
        "powergrad": "scaled-head",
        "xgrad": "nesterov",
        "xgrad+powergrad": "nesterov+scaled-head",
    }
    assert arms[-1].control == Control(
        name="nesterov+scaled-head",
        optimizer={"nesterov": True},
        head_init=0.25,
        head_lr=0.25,
        body_lr=4.0,
    )


def test_equal_controls_run_once(with_controls, optimizer):
    with_controls(xgrad=NESTEROV, gcw=NESTEROV)
    arms = expand(["xgrad", "gcw", "xgrad:horizon=2"], optimizer)
    assert [arm.name for arm in arms] == ["baseline", "xgrad", "gcw", "xgrad:horizon=2", "nesterov"]
    assert set(must_beat(arms).values()) == {"nesterov"}


def test_different_controls_of_one_name_stay_apart(with_controls, optimizer):
    with_controls(
        a=HEAD, b=Control(name="scaled-head", head_init=0.3, head_lr=0.3, body_lr=1 / 0.3)
    )
    arms = expand(["a", "b"], optimizer)
    assert must_beat(arms) == {"a": "scaled-head", "b": "scaled-head (b)"}
    assert [arm.name for arm in arms[3:]] == ["scaled-head", "scaled-head (b)"]


CLIPPING = Control(name="clip-norm", corrections=("clip-norm",))


@pytest.mark.parametrize("order", [("agc", "clip-norm"), ("clip-norm", "agc")])
def test_a_control_that_is_an_arm_already_is_that_arm(with_controls, optimizer, order):
    with_controls(agc=CLIPPING, **{"clip-norm": None})
    arms = expand(order, optimizer)
    assert [arm.name for arm in arms] == ["baseline", *order]
    assert must_beat(arms) == {"agc": "clip-norm", "clip-norm": None}


EACH_OTHERS = {"agc": CLIPPING, "clip-norm": Control(name="agc", corrections=("agc",))}


@pytest.mark.parametrize(
    ("corrections", "names"),
    [
        (["agc"], ["baseline", "agc", "clip-norm"]),
        (["clip-norm"], ["baseline", "clip-norm", "agc"]),
        (["agc", "clip-norm"], ["baseline", "agc", "clip-norm"]),
        (["clip-norm", "agc"], ["baseline", "clip-norm", "agc"]),
    ],
)
def test_corrections_that_are_each_others_control_run_once(
    with_controls, optimizer, corrections, names
):
    with_controls(**EACH_OTHERS)
    arms = expand(corrections, optimizer)
    assert [arm.name for arm in arms] == names
    wanted = {"agc": "clip-norm", "clip-norm": "agc"}
    assert must_beat(arms).items() <= wanted.items()
    assert must_beat(arms).keys() >= set(corrections)


def test_a_stack_of_each_others_controls_has_none_but_in_a_larger_stack_they_stay(
    with_controls, optimizer
):
    with_controls(**EACH_OTHERS, xgrad=NESTEROV)
    arms = expand(["agc+clip-norm"], optimizer)
    assert [arm.name for arm in arms] == ["baseline", "agc+clip-norm"]
    assert must_beat(arms) == {"agc+clip-norm": None}
    arms = expand(["xgrad+agc+clip-norm"], optimizer)
    assert arms[-1].control == Control(
        name="nesterov+clip-norm+agc",
        optimizer={"nesterov": True},
        corrections=("clip-norm", "agc"),
    )


@pytest.mark.parametrize(
    ("stack", "name"),
    [("xgrad+centralization", "nesterov+centralization"), ("agc+xgrad", "agc+nesterov")],
)
def test_a_part_of_a_stack_without_a_control_stays_in_the_control(
    with_controls, optimizer, stack, name
):
    with_controls(xgrad=NESTEROV, centralization=None, agc=None)
    arms = expand([stack], optimizer)
    assert must_beat(arms) == {stack: name}
    kept = next(part for part in stack.split("+") if part != "xgrad")
    assert arms[-1].control == Control(name=name, optimizer={"nesterov": True}, corrections=(kept,))


def test_a_stack_without_any_control_has_none(with_controls, optimizer):
    with_controls(agc=None, centralization=None)
    assert must_beat(expand(["agc+centralization"], optimizer)) == {"agc+centralization": None}


NADAM = Control(name="nadam", optimizer_class=torch.optim.NAdam)


def test_a_class_to_train_with_is_in_the_recipe_by_its_name_and_keeps_arms_apart(
    with_controls, optimizer
):
    with_controls(a=NADAM, b=Control(name="nadam", optimizer_class=torch.optim.RAdam), c=NADAM)
    arms = expand(["a", "b", "c"], optimizer)
    assert must_beat(arms) == {"a": "nadam", "b": "nadam (b)", "c": "nadam"}
    recipes = {arm.name: json.loads(json.dumps(arm.recipe)) for arm in arms}
    assert recipes["nadam"]["optimizer_class"] == "torch.optim.nadam.NAdam"
    assert recipes["nadam (b)"]["optimizer_class"] == "torch.optim.radam.RAdam"
    assert "optimizer_class" not in recipes["a"]


def test_a_stack_trains_with_the_one_class_that_its_controls_name():
    assert merged([NESTEROV, NADAM, None, NADAM]) == Control(
        name="nesterov+nadam+nadam",
        optimizer={"nesterov": True},
        optimizer_class=torch.optim.NAdam,
    )
    with pytest.raises(ValueError, match="must agree on the optimizer, got 'NAdam' and 'RAdam'"):
        merged([NADAM, Control(name="radam", optimizer_class=torch.optim.RAdam)])


def test_a_control_called_like_another_arm_gets_a_name_of_its_own(with_controls, optimizer):
    with_controls(a=Control(name="b", head_lr=2.0), b=None)
    assert [arm.name for arm in expand(["a", "b"], optimizer)] == ["baseline", "a", "b", "b (a)"]


def test_arms_keep_name_and_recipe_when_corrections_are_added_after_them(with_controls, optimizer):
    with_controls(
        a=HEAD, b=Control(name="scaled-head", head_init=0.3), c=CLIPPING, **{"clip-norm": NESTEROV}
    )
    before = {arm.name: arm.recipe for arm in expand(["a", "c"], optimizer)}
    after = {arm.name: arm.recipe for arm in expand(["a", "c", "b", "clip-norm"], optimizer)}
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"b", "scaled-head (b)", "nesterov"}


def test_without_controls_it_is_still_known_what_had_to_be_beaten(with_controls, optimizer):
    with_controls(xgrad=NESTEROV)
    arms = expand(["xgrad"], optimizer, controls=False)
    assert [arm.name for arm in arms] == ["baseline", "xgrad"]
    assert must_beat(arms) == {"xgrad": "nesterov"}


def test_a_correction_without_a_control_has_none_to_beat(with_controls, optimizer):
    with_controls(agc=None)
    arms = expand(["agc"], optimizer)
    assert [arm.name for arm in arms] == ["baseline", "agc"]
    assert must_beat(arms) == {"agc": None}


@pytest.mark.skipif("gcgd" not in regrad.available(), reason="needs the plugin regrad-gcgd")
def test_a_composition_must_beat_the_controls_of_its_parts_together(optimizer):
    arms = expand(["gcgd:gcode.weight=.2", "gcgd:gcode.norm=keep"], optimizer)
    flow = ("gcode:weight=0.2,flow=scale",)
    assert [arm.control for arm in arms[3:]] == [
        Control(name="nesterov+scaled-flow", optimizer={"nesterov": True}, corrections=flow),
        NESTEROV,
    ]
    assert [[c.name for c in module.create_all(arm)] for arm in arms[1:]] == [
        ["gcw", "gcode"]
    ] * 2 + [["gcode"], []]
    on_adam = expand(
        ["gcgd:gcode.weight=.2"], torch.optim.AdamW(optimizer.param_groups[0]["params"])
    )
    assert on_adam[-1].control == Control(
        name="nadam+scaled-flow",
        optimizer={"decoupled_weight_decay": True},
        optimizer_class=torch.optim.NAdam,
        corrections=flow,
    )


def test_the_same_arm_twice_is_refused(with_controls, optimizer):
    with_controls(agc=None)
    with pytest.raises(ValueError, match="corrections must be different, got 'agc' twice"):
        expand(["agc", "agc"], optimizer)


@pytest.mark.parametrize("name", ["baseline", "none"])
def test_no_arm_may_be_called_like_the_baseline(with_controls, optimizer, name):
    with_controls(**{name: None})
    with pytest.raises(
        ValueError, match=f"must not name the baseline, got '{name}'; it runs anyway"
    ):
        expand([name], optimizer)


def test_controls_that_contradict_each_other_are_refused():
    with pytest.raises(
        ValueError, match="the controls of a stack must agree on nesterov, got True and False"
    ):
        merged([NESTEROV, Control(name="plain", optimizer={"nesterov": False})])


def test_merged_controls_multiply_their_factors_and_join_their_corrections():
    one = Control(name="a", head_lr=2.0, corrections=("clip-norm",))
    other = Control(name="b", head_lr=3.0, corrections=("clip-norm", "agc"))
    assert merged([one, None, other]) == Control(
        name="a+b", head_lr=6.0, corrections=("clip-norm", "agc")
    )
    assert merged([None]) is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("xgrad", ("xgrad",)),
        ("xgrad + agc:max_ratio=1e+2", ("xgrad", "agc:max_ratio=1e+2")),
        ("a:x=1.5E+3+b", ("a:x=1.5E+3", "b")),
    ],
)
def test_a_plus_stacks_unless_it_belongs_to_a_number(text, parts):
    assert parts_of(text) == parts


@pytest.mark.parametrize("text", ["", "+", "xgrad+", "xgrad++agc"])
def test_an_empty_part_is_refused(text):
    with pytest.raises(
        ValueError, match=r"corrections must name one correction on each side of '\+'"
    ):
        parts_of(text)


@pytest.mark.skipif(
    not {"agc", "clip-norm"} <= regrad.available().keys(), reason="regrad-clipping is not installed"
)
@pytest.mark.parametrize(
    "text", ["clip-norm,agc:axis=auto", "clip-norm, agc:axis=auto", "clip-norm agc:axis=auto"]
)
def test_several_corrections_in_one_word_are_all_in_the_suggestion(text, optimizer):
    form = "write clip-norm agc:axis=auto or clip-norm+agc:axis=auto"
    with pytest.raises(ValueError, match=re.escape(form)):
        parts_of(text)
    with pytest.raises(ValueError, match=re.escape(form)):
        expand([text], optimizer)
    assert parts_of("agc:axis=auto,head=clip-norm") == ("agc:axis=auto,head=clip-norm",)


def test_an_unknown_correction_or_option_fails_early(optimizer):
    with pytest.raises(ValueError, match="no correction named 'no-such'"):
        expand(["no-such"], optimizer)


def test_an_unknown_option_becomes_a_value_error(monkeypatch):
    def create(text):
        raise TypeError("agc has no option 'h'")

    monkeypatch.setattr(regrad, "create", create)
    with pytest.raises(ValueError, match="agc has no option 'h'"):
        module.created("agc:h=1")


@pytest.mark.parametrize(
    ("text", "apart"),
    [
        ("xgrad,agc", ["xgrad", "agc"]),
        ("xgrad, agc;gcw", ["xgrad", "agc", "gcw"]),
        ("xgrad agc", ["xgrad", "agc"]),
        ("xgrad:horizon=2,agc", ["xgrad:horizon=2", "agc"]),
        (
            "agc:max_ratio=0.1,axis=0,xgrad:horizon=2",
            ["agc:max_ratio=0.1,axis=0", "xgrad:horizon=2"],
        ),
        ("xgrad,nothing,agc:axis=(0,1)", ["xgrad", "nothing", "agc:axis=(0,1)"]),
    ],
)
def test_corrections_with_commas_between_them_are_all_in_the_suggestion(text, apart):
    with pytest.raises(ValueError, match="corrections must be separated by spaces, got") as said:
        created(text)
    assert repr(text) in str(said.value)
    assert f"use --corrections {' '.join(apart)}, or {'+'.join(apart)} for all" in str(said.value)


@pytest.mark.parametrize(
    "text", ["xgrad", "agc:max_ratio=0.1,axis=0", "agc: max_ratio = 0.1", "a:b=[1,2]"]
)
def test_options_with_commas_between_them_are_of_one_correction(text):
    assert len(module._separated(text)) == 1


def test_one_correction_written_in_two_ways_is_one_arm(optimizer, monkeypatch):
    class Options(SimpleNamespace):
        pass

    def create(text):
        scale = float(text.partition("=")[2] or 1)
        return SimpleNamespace(
            name="a", options=Options(scale=scale), control=lambda optimizer: None
        )

    monkeypatch.setattr(regrad, "create", create)
    with pytest.raises(ValueError, match=r"must be different, got 'a' and 'a:scale=1', which are"):
        expand(["a", "a:scale=1"], optimizer)
    with pytest.raises(ValueError, match=r"got 'a:scale=2' and 'a:scale=2\.0', which are the same"):
        expand(["a:scale=2", "a:scale=3", "a:scale=2.0"], optimizer)
    assert len(expand(["a", "a:scale=2", "a+a:scale=2", "a:scale=2+a"], optimizer)) == 5
