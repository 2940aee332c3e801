"""The order in which corrections act, and what is refused."""

import pytest
import regrad
from regrad import Correction, RegradError, order
from regrad.correction import Needs


def make(name, *, stages=("gradient",), **needs):
    """Return a correction of that name which does nothing."""
    hooks = {
        "gradient": "correct_gradients",
        "moment": "correct_moments",
        "weights": "predict_weights",
    }
    hooks |= {"criterion": "wrap_criterion"}
    body = {hooks[stage]: lambda self: None for stage in stages}
    return type(
        name, (Correction,), {"name": name, "needs": Needs(stages=stages, **needs), **body}
    )()


def resolve_order(corrections):
    """Return the acting order and the reasons as lists."""
    ordered, reasons = order.resolve_order(corrections)
    return list(ordered), list(reasons)


def names(corrections):
    return [c.name for c in resolve_order(corrections)[0]]


def test_the_users_order_holds_where_nobody_declares_anything():
    given = [make(name) for name in "dbca"]
    assert resolve_order(given) == (given, [])


def test_a_declared_before_or_after_moves_a_correction_and_says_why():
    ordered, reasons = resolve_order(
        [make("clip", after=("center",)), make("other"), make("center")]
    )
    assert [c.name for c in ordered].index("center") < [c.name for c in ordered].index("clip")
    assert any("'clip' declares after 'center'" in reason for reason in reasons)
    ordered, reasons = resolve_order([make("clip"), make("center", before=("clip",))])
    assert [c.name for c in ordered] == ["center", "clip"]
    assert reasons == ["'clip' acts after 'center': 'center' declares before 'clip'"]


def test_a_declaration_that_already_holds_gives_no_reason():
    assert resolve_order([make("a"), make("b", after=("a",))])[1] == []


def test_there_is_one_reason_per_moved_correction_and_it_names_the_one_it_had_to_follow():
    ordered, reasons = resolve_order(
        [make("x", after=("z",)), make("a"), make("b"), make("z"), make("c")]
    )
    assert [c.name for c in ordered] == [*"abzxc"]
    assert reasons == ["'x' acts after 'z': 'x' declares after 'z'"]


def test_a_chain_of_declarations_is_followed():
    assert names([make("c", after=("b",)), make("b", after=("a",)), make("a")]) == ["a", "b", "c"]


def test_declarations_count_only_in_a_shared_stage():
    given = [make("late", stages=("moment",)), make("early", before=("late",))]
    assert resolve_order(given) == (given, [])


def test_names_that_are_not_attached_do_not_matter():
    given = [make("a", after=("absent",), before=("gone",), conflicts={"nobody": "a reason"})]
    assert resolve_order(given) == (given, [])


def test_a_cycle_is_refused_and_names_the_declarations():
    with pytest.raises(RegradError, match="cycle") as caught:
        resolve_order([make("a", after=("b",)), make("b", after=("a",)), make("c")])
    assert "'a' declares after 'b'" in str(caught.value)
    assert "'b' declares after 'a'" in str(caught.value)


def test_a_conflict_is_refused_with_its_reason_whoever_declares_it():
    one, other = make("a", conflicts={"b": "both rotate"}), make("b")
    for pair in ([one, other], [other, one]):
        with pytest.raises(RegradError, match=r"cannot work together: both rotate"):
            resolve_order(pair)


@pytest.mark.parametrize(("stage", "resource"), [("weights", "window"), ("criterion", "criterion")])
def test_two_owners_of_a_stage_that_has_one_owner_are_refused(stage, resource):
    with pytest.raises(
        RegradError, match=f"'a' and 'b' cannot work together: both own .*{resource}"
    ):
        resolve_order([make("a", stages=(stage,)), make("b", stages=(stage,))])


def test_two_owners_of_a_declared_resource_are_refused():
    with pytest.raises(RegradError, match=r"both own .*look-ahead"):
        resolve_order([make("a", exclusive=("look-ahead",)), make("b", exclusive=("look-ahead",))])


def test_print_and_receipt_say_what_was_moved(toys):
    model = toys.Net()
    first, second = make("clip", after=("center",)), make("center")
    attachment = regrad.attach(model, toys.sgd(model), [first, second])
    assert [c.name for c in attachment.corrections] == ["center", "clip"]
    reason = "'clip' acts after 'center': 'clip' declares after 'center'"
    assert reason in str(attachment)
    assert str(attachment).index("center") < str(attachment).index("clip")
    receipt = attachment.receipt()
    assert receipt["order"] == ["center", "clip"]
    assert reason in receipt["notes"]


def test_an_unmoved_order_prints_no_reason(toys):
    model = toys.Net()
    attachment = regrad.attach(model, toys.sgd(model), [toys.Scale(factor=0.25), toys.Add()])
    assert str(attachment) == "regrad attachment: Scale(factor=0.25) → Add(amount=1.0)"
