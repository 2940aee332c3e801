"""Values by which an optimizer's state is known again."""

import math

import pytest
import torch
from regrad.marks import are_close, mark_of, mark_of_weights


def test_a_state_is_known_by_the_first_values_of_its_tensors_in_any_order():
    first = {"a": torch.tensor([3.0, 9.0]), "step": 4}
    second = {"b": torch.tensor([[1.0]]), "empty": torch.empty(0)}
    wanted = {"of_weights": False, "values": [1.0, 3.0]}
    assert mark_of({0: first, 1: second}) == wanted
    assert mark_of({1: second, 0: first, "else": None}) == wanted


def test_a_state_without_a_tensor_has_no_mark_and_the_weights_stand_for_it():
    assert mark_of({}) is None
    assert mark_of({0: {"step": 4}}) is None
    weights = [torch.tensor([2.0, 5.0]), torch.tensor([math.nan]), torch.tensor([-1.0 + 2j])]
    assert mark_of_weights(weights) == {"of_weights": True, "values": [-1.0, 0.0, 2.0]}


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.004, 2.0], True),
        ([0.0], [1e-8], True),
        ([1.0, 2.0], [1.1, 2.0], False),
        ([1.0, 2.0], [1.0], False),
        ([], [], True),
    ],
)
def test_values_that_differ_by_rounding_are_the_same(then, now, expected):
    assert are_close(then, now) is expected
