"""Options: read from text, checked before anything changes."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
import regrad
from hypothesis import given, settings
from hypothesis import strategies as st
from regrad import Correction, PluginLoadError
from regrad.correction import Needs, Options


class Sample(Correction):
    """One option of every kind that the text can hold."""

    name = "sample"
    needs = Needs(stages=("gradient",))

    @dataclass(frozen=True, kw_only=True)
    class Options(Options):
        real: float = 0.0
        whole: int = 0
        flag: bool = False
        text: str = ""
        kind: Literal["plain", "fancy"] = "plain"
        maybe: float | None = None
        several: tuple[float, ...] = ()
        words: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            if self.whole < 0:
                raise ValueError(f"whole must be at least 0, got {self.whole!r}")

    def correct_gradients(self, step):
        pass


@pytest.fixture(autouse=True, scope="module")
def offered(tmp_path_factory):
    """Offer `Sample` as an installed distribution does, for this module."""
    site = tmp_path_factory.mktemp("site")
    info = site / "regrad_sample-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: regrad-sample\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[regrad]\nsample = {__name__}:Sample\n")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(site))
    yield
    patch.undo()


def options(text):
    return vars(regrad.create(f"sample:{text}").options)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("real=0.25", "real", 0.25),
        ("real=1e-3", "real", 1e-3),
        ("real=-2", "real", -2),
        ("whole=12", "whole", 12),
        ("flag=true", "flag", True),
        ("flag=False", "flag", False),
        ("text=auto", "text", "auto"),
        ("kind=fancy", "kind", "fancy"),
        ("maybe=none", "maybe", None),
        ("maybe=2.5", "maybe", 2.5),
        ("several=[1,2.5]", "several", (1, 2.5)),
        ("several=(3,)", "several", (3,)),
        ("several=[]", "several", ()),
        ("words=[head,layer.0]", "words", ("head", "layer.0")),
        (" real = 0.25 ", "real", 0.25),
    ],
)
def test_text_becomes_the_value_it_shows(text, name, value):
    read = options(text)[name]
    assert read == value
    assert type(read) is type(value)


def test_several_options_are_separated_by_commas():
    read = options("real=1.5,several=[1,2],flag=true")
    assert (read["real"], read["several"], read["flag"]) == (1.5, (1, 2), True)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "reel=1",
            TypeError,
            "sample has no option 'reel'; allowed: real, whole, .*; did you mean 'real'",
        ),
        ("real=abc", TypeError, "real must be float, got 'abc'"),
        ("whole=1.5", TypeError, "whole must be int, got 1.5"),
        ("whole=true", TypeError, "whole must be int, got True"),
        ("flag=1", TypeError, "flag must be bool, got 1"),
        ("kind=odd", TypeError, "kind must be .*plain.*fancy.*, got 'odd'"),
        ("several=[a]", TypeError, "several must be .*, got"),
        ("whole=-1", ValueError, "whole must be at least 0, got -1"),
        ("real", ValueError, "options must look like 'name:option=value.*, got 'sample:real'"),
        ("=1", ValueError, "options must look like"),
        ("real=1,real=2", ValueError, "option 'real' must be given once"),
        ("several=[1,2", ValueError, "options must .*, got '"),
        ("several=[1", ValueError, "options must look like .*, got 'sample:several=\\[1'"),
        ("several=[12", ValueError, "options must look like .*, got 'sample:several=\\[12'"),
        ("several=[1)", ValueError, "options must look like .*, got 'sample:several=\\[1\\)'"),
        ("several=1]", (ValueError, TypeError), "several|options"),
        ("several=[1,[2,3]]", ValueError, "options must look like"),
        ("several=[1]2]", ValueError, "options must look like"),
        ("several=[1,,2]", ValueError, "options must look like"),
        ("several=[,]", ValueError, "options must look like"),
        ("several=[", ValueError, "options must look like"),
        ("text=", ValueError, "options must look like"),
        ("real=1,", ValueError, "options must look like"),
        (",real=1", ValueError, "options must look like"),
        ("real=1e999", ValueError, "numbers must fit a float, got '1e999'"),
        ("real=" + "9" * 5000, ValueError, "numbers must fit a float, got '99999"),
    ],
)
def test_what_cannot_be_read_or_is_not_allowed_says_so(text, error, message):
    with pytest.raises(error, match=message):
        options(text)


def test_a_correction_without_options_says_that_it_has_none(toys):
    with pytest.raises(TypeError, match="spy has no option 'factor'"):
        toys.Spy(factor=1)


def test_options_are_frozen(toys):
    with pytest.raises(AttributeError):
        toys.Scale().options.factor = 2.0


words = st.text("abcdefghijklmnopqrstuvwxyz_.", min_size=1, max_size=8).filter(
    lambda word: word not in {"true", "false", "none", "nan", "inf", "infinity"}
)
reals = st.floats(allow_nan=False)


@settings(deadline=None)
@given(
    real=reals,
    whole=st.integers(0, 10**12),
    flag=st.booleans(),
    text=words,
    kind=st.sampled_from(["plain", "fancy"]),
    maybe=st.none() | reals,
    several=st.lists(reals, max_size=4).map(tuple),
    chosen=st.lists(words, max_size=3).map(tuple),
)
def test_writing_options_and_reading_them_again_is_a_round_trip(
    real, whole, flag, text, kind, maybe, several, chosen
):
    values = {
        "real": real,
        "whole": whole,
        "flag": flag,
        "text": text,
        "kind": kind,
        "maybe": maybe,
    }
    values |= {"several": several, "words": chosen}

    def written(value):
        if isinstance(value, tuple):
            return f"[{','.join(map(written, value))}]"
        return str(value)

    text = ",".join(f"{name}={written(value)}" for name, value in values.items())
    assert options(text) == values
    assert vars(regrad.create("sample", **values).options) == values


@pytest.mark.long
@settings(deadline=None)
@given(text=st.text(max_size=40) | st.text("sample:=,[]().0123456789ab e-_", max_size=40))
def test_no_text_raises_anything_but_a_value_type_or_load_error(text):
    for spec in (text, f"sample:{text}", f"sample:real={text}", f"sample:several=[{text}]"):
        try:
            made = regrad.create(spec)
        except (ValueError, TypeError, PluginLoadError):
            continue
        assert isinstance(made, Correction)


@pytest.mark.long
@settings(deadline=None)
@given(text=st.text(max_size=20))
def test_no_name_raises_anything_but_a_value_type_or_load_error(text):
    with pytest.raises((ValueError, TypeError, PluginLoadError)):
        regrad.load(f"no-such-{text}")


TEXTS = st.text("ab1,=[](). -", max_size=8)
REALS = st.floats(allow_nan=False)


@settings(deadline=None, max_examples=200)
@given(
    real=REALS,
    whole=st.integers(min_value=0),
    flag=st.booleans(),
    text=TEXTS,
    kind=st.sampled_from(["plain", "fancy"]),
    maybe=st.none() | REALS,
    several=st.lists(REALS, max_size=3).map(tuple),
    words=st.lists(TEXTS, max_size=3).map(tuple),
)
def test_a_correction_written_as_text_comes_back_with_all_of_its_options(**options):
    correction = Sample(**options)
    assert regrad.create(correction.as_text()).options == correction.options


def test_options_at_their_defaults_are_not_written():
    assert Sample().as_text() == "sample"
    assert Sample(whole=0, text="0.5", words=("a", "b,c")).as_text() == (
        "sample:text='0.5',words=[a,'b,c']"
    )


def test_what_options_derive_from_others_is_not_written():
    @dataclass(frozen=True, kw_only=True)
    class Options:
        rate: float = 1.0
        square: float = field(init=False, default=0.0)

        def __post_init__(self):
            object.__setattr__(self, "square", self.rate**2)
            object.__setattr__(self, "root", self.rate**0.5)

    class Rated(Correction):
        name = "rated"

    Rated.Options = Options
    assert Rated(rate=4.0).as_text() == "rated:rate=4.0"
    assert Rated().as_text() == "rated"


def test_an_option_without_a_default_is_always_written():
    @dataclass(frozen=True, kw_only=True)
    class Options:
        rate: float

    class Rated(Correction):
        name = "rated"

    Rated.Options = Options
    assert Rated(rate=0.5).as_text() == "rated:rate=0.5"
