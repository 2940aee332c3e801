import pytest
from regrad.errors import RegradError
from regrad_runner.errors import in_one_line
from torch._utils import ExceptionWrapper


def test_the_first_line_of_an_error_is_said():
    assert in_one_line(ValueError("one\ntwo")) == "one"
    assert in_one_line(ValueError()) == "ValueError"


def test_of_an_error_in_a_loaders_process_the_words_are_said_and_not_its_traceback():
    try:
        raise RegradError("image must be whole, got 'a: b.png'")
    except RegradError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(RegradError) as caught:
        wrapped.reraise()
    assert str(caught.value).startswith("Caught RegradError in DataLoader worker process 0.\n")
    assert in_one_line(caught.value) == "image must be whole, got 'a: b.png'"
