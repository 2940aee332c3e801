"""Names with options: what a text means, and what is said of one that means nothing."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from regrad.specs import read_spec, write_spec


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-2", -2),
        ("1_000", 1000),
        (".9", 0.9),
        ("1e-3", 1e-3),
        ("1e+2", 100.0),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("true", True),
        ("False", False),
        ("none", None),
        ("None", None),
        ("auto", "auto"),
        ("two words", "two words"),
        ("head.weight", "head.weight"),
        ("a=b", "a=b"),
        ("C:/data", "C:/data"),
        ("don't", "don't"),
        ("0x1F", "0x1F"),
        ("'1'", "1"),
        ("'true'", "true"),
        ("''", ""),
        ("'a,b=[c]'", "a,b=[c]"),
        ('"it\'s"', "it's"),
        ("[]", ()),
        ("()", ()),
        ("[1,2.5]", (1, 2.5)),
        ("(0.9,0.99)", (0.9, 0.99)),
        ("[3,]", (3,)),
        ("[ a , b c ]", ("a", "b c")),
        ("[true,none,x]", (True, None, "x")),
        ("['blocks[0]','a,b']", ("blocks[0]", "a,b")),
    ],
)
def test_a_value_is_what_it_looks_like(text, value):
    name, options = read_spec(f"agc : first=1, option = {text} ,gcw.last=2")
    assert name == "agc"
    assert options == {"first": 1, "option": value, "gcw.last": 2}
    assert type(options["option"]) is type(value)


def test_nan_is_read_too():
    assert math.isnan(read_spec("agc:option=nan")[1]["option"])


@pytest.mark.parametrize("text", ["agc", " agc ", "agc:", "agc: "])
def test_a_name_may_come_without_options(text):
    assert read_spec(text) == ("agc", {})


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("agc:fast", "give 'fast' a value, or put quotes around text with commas"),
        ("agc:option=f(a,b)", "give 'b)' a value, or put quotes around text with commas"),
        ("agc:option=", "give 'option' a value; '' is empty text"),
        ("agc:option=,other=1", "give 'option' a value; '' is empty text"),
        ("agc:=1", "write the option's name before '='"),
        ("agc:.option=1", "write the option's name before '='"),
        ("agc:gcw.=1", "write the option's name before '='"),
        ("agc:gcw..option=1", "write the option's name before '='"),
        ("agc:option=1,", "remove the extra comma"),
        ("agc:,option=1", "remove the extra comma"),
        ("agc:a=1,,b=2", "remove the extra comma"),
        ("agc:option=[", "close the list with ']'"),
        ("agc:option=[1,2", "close the list with ']'"),
        ("agc:option=(1]", "close the list with ')'"),
        ("agc:option=['a' 1]", "close the list with ']'"),
        ("agc:option=[,]", "put numbers, words or quoted text"),
        ("agc:option=[1,,2]", "put numbers, words or quoted text"),
        ("agc:option=[[1]]", "put numbers, words or quoted text"),
        ("agc:option=[1]2", "put a comma before '2', or quotes around the whole text"),
        ("agc:option='a'b", "put a comma before 'b', or quotes around the whole text"),
        ("agc:option='a", "close the quotes"),
        ("agc:option=['a]", "close the quotes"),
    ],
)
def test_what_cannot_be_read_is_said_with_what_to_write(text, mend):
    form = f"must look like 'name:option=value,option=value', got {text!r}; {mend}"
    with pytest.raises(ValueError, match=re.escape(f"workload {form}")):
        read_spec(text, "workload")


def test_an_option_given_twice_is_refused():
    rule = "option 'a' must be given once, got 'agc:a=1,b=2,a=1'; remove all but one"
    with pytest.raises(ValueError, match=re.escape(rule)):
        read_spec("agc:a=1,b=2,a=1")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5000])
def test_a_number_beyond_floats_is_refused_shortly(number):
    with pytest.raises(ValueError, match=f"numbers must fit a float, got '{number[:20]}") as caught:
        read_spec(f"agc:option={number}")
    assert len(str(caught.value)) < 400


def test_a_long_text_is_shown_by_its_beginning():
    with pytest.raises(ValueError, match="…; put numbers") as caught:
        read_spec(f"agc:option={'[' * 3000}")
    assert len(str(caught.value)) < 400


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text("ab,=[]():. 1'"),
)


options_of_all_kinds = st.dictionaries(
    st.sampled_from(["a", "b.c", "d"]), values | st.tuples(values, values)
)


@settings(deadline=None)
@given(options_of_all_kinds)
def test_what_is_written_comes_back(options):
    assert read_spec(write_spec("agc", options)) == ("agc", options)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_any_text_comes_back_or_is_refused_for_its_quotes(text):
    options = {"axis": (text,)}
    if "'" in text and '"' in text:
        with pytest.raises(ValueError, match="axis must be without one kind of quotes"):
            write_spec("agc", options)
    else:
        assert read_spec(write_spec("agc", options)) == ("agc", options)


def test_numbers_that_are_not_finite_come_back():
    name, options = read_spec(write_spec("agc", {"a": float("inf"), "b": float("nan")}))
    assert name == "agc"
    assert options["a"] == float("inf")
    assert math.isnan(options["b"])


@pytest.mark.parametrize("value", [{"a": 1}, object(), ((1, 2), 3), 1j])
def test_a_value_without_a_form_is_refused(value):
    with pytest.raises(TypeError, match="option must be a number, a text, true, false, none"):
        write_spec("agc", {"option": value})


@settings(deadline=None)
@given(st.text(max_size=40) | st.text("agc:=,[]()'\".0123456789 e-_", max_size=40))
def test_any_text_is_read_or_refused_in_one_short_line(text):
    message = ""
    try:
        read_spec(text)
    except ValueError as error:
        message = str(error)
    assert len(message) < 1000
    assert "\n" not in message
