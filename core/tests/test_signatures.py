"""What `inspect.signature` and `help` say of a correction's class."""

import inspect
import pydoc
from dataclasses import dataclass, field
from typing import Any, Literal

from regrad import Correction
from regrad.correction import Needs
from regrad.signatures import takes


class Plain(Correction):
    """A plugin that writes nothing but its options."""

    name = "plain"
    needs = Needs(stages=("gradient",))

    @dataclass(frozen=True, kw_only=True)
    class Options:
        factor: "float | None" = 0.5
        kind: Literal["one", "other"] = "one"
        names: tuple[str, ...] = field(default_factory=tuple)

    def correct_gradients(self, step):
        pass


class WithState(Plain):
    """One that takes options of its own besides, and more of them than its base."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Plain.Options):
        depth: int = 3

    @takes(Options)
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen = 0


class WithArguments(Plain):
    """One whose `__init__` names arguments."""

    def __init__(self, model, *, factor=1.0, **options):
        super().__init__(factor=factor, **options)


class Fixed(Plain):
    """One whose `__init__` takes no option."""

    def __init__(self):
        super().__init__(factor=0.25)


PLAIN = "factor: float | None = 0.5, kind: Literal['one', 'other'] = 'one', names: tuple[str, ...]"


def test_a_class_shows_its_options_without_writing_anything():
    assert str(inspect.signature(Plain)).startswith(f"(*, {PLAIN}")
    assert f"Plain(*, {PLAIN}" in pydoc.plain(pydoc.render_doc(Plain))


def test_a_subclass_shows_the_options_that_it_adds():
    assert list(inspect.signature(WithState).parameters) == ["factor", "kind", "names", "depth"]
    assert WithState(depth=4).seen == 0


def test_named_arguments_stay_and_the_options_take_the_place_of_the_rest():
    assert str(inspect.signature(WithArguments)).startswith("(model, *, factor=1.0, kind:")
    assert str(inspect.signature(Fixed)) == "()"
    assert str(inspect.signature(Correction)) == "()"


def test_an_object_has_no_signature_of_its_class():
    assert Plain().__signature__ is None
