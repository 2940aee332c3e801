"""Which call of `step` is the outermost."""

import sys

import pytest
from regrad.nesting import StepUnderWay


def test_a_step_inside_a_step_is_a_part_of_it():
    step = StepUnderWay()

    def inner():
        frame = sys._getframe()
        return step.begin(frame), step.end(frame)

    def outer():
        frame = sys._getframe()
        return step.begin(frame), inner(), inner(), step.end(frame)

    assert outer() == (True, (False, False), (False, False), True)
    assert inner() == (True, True)


def test_a_step_that_raised_is_not_under_way_any_more():
    step = StepUnderWay()

    def raises():
        assert step.begin(sys._getframe())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        raises()
    assert not step.contains(sys._getframe())
    assert step.begin(sys._getframe())


def test_frames_below_the_step_are_inside_of_it_and_those_above_are_not():
    step = StepUnderWay()

    def below():
        return step.contains(sys._getframe())

    def whole():
        step.begin(sys._getframe())
        return below()

    assert not below()
    assert whole()
    assert not below()
