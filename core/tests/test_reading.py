"""What corrections read, and the layouts that follow from it."""

from dataclasses import replace
from typing import get_args

import pytest
from regrad.correction import Needs
from regrad.reading import IN_WORDS, OFFERS, Implied, Reading, layouts_with


def test_everything_that_can_be_read_has_words_and_is_offered_by_one_process():
    assert {*IN_WORDS} == {*get_args(Reading)} == OFFERS["plain"]


@pytest.mark.parametrize(
    ("reads", "layouts"),
    [
        ((), ("plain",)),
        (("micro",), ("plain", "ddp")),
        (("model", "units"), ("plain", "ddp", "fsdp2")),
    ],
)
def test_layouts_follow_from_what_is_read(reads, layouts):
    needs = Needs(stages=("gradient",), reads=reads)
    assert needs.layouts[: len(layouts)] == layouts
    assert ("fsdp2" in needs.layouts) == ("fsdp2" in layouts)
    assert needs == Needs(stages=("gradient",), reads=reads)


def test_a_copy_that_reads_something_else_has_other_layouts():
    needs = Needs(stages=("gradient",))
    assert replace(needs, reads=("micro",)).layouts == layouts_with(("micro",))
    assert replace(needs, closures=True).layouts == ("plain",)


def test_a_list_of_layouts_stays_as_it_was_given():
    listed = Needs(stages=("gradient",), layouts=("plain", "ddp"), reads=("elements",))
    assert listed.layouts == replace(listed, reads=("units",)).layouts == ("plain", "ddp")
    assert not isinstance(listed.layouts, Implied)
