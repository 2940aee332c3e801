"""The ends of axes and their ticks."""

from regrad_runner.reporting.figures.marks import Drawing, Mark
from regrad_runner.reporting.figures.scales import AxisScale, row_scale, value_scale
from regrad_runner.reporting.styles import Style


def drawing_of(values, *, kind="curves", far_off=(), reference=None, zoomed=False):
    """Return a figure: of each series its values, along steps of 10."""
    marks = []
    for series, numbers in values.items():
        for place, number in enumerate(numbers, start=1):
            x, y = (10.0 * place, number) if kind == "curves" else (number, None)
            marks.append(Mark(figure="f", series=series, x=x, y=y))
    return Drawing(
        name="f",
        kind=kind,
        title="",
        x_label="",
        marks=marks,
        styles={series: Style(role="ink") for series in values},
        far_off=frozenset(far_off),
        reference=reference,
        zoomed=zoomed,
    )


def test_the_axis_of_values_holds_the_second_half_and_the_target_and_nobody_far_off():
    drawing = drawing_of({"a": [9.0, 2.0, 1.0], "lost": [9.0, 8.0, 8.0]}, far_off=["lost"])
    scale = value_scale(drawing)
    assert (scale.low, scale.high) == (1 - 0.4, 9 + 0.4)
    zoomed = drawing_of({"a": [9.0, 2.0, 1.0]}, zoomed=True, reference=0.5)
    scale = value_scale(zoomed)
    assert (scale.low, scale.high) == (0.5, 2.05)


def test_rows_hold_the_reference_and_nobody_far_off():
    drawing = drawing_of(
        {"a": [1.0, 3.0], "lost": [90.0]}, kind="dots", reference=0.0, far_off=["lost"]
    )
    scale = row_scale(drawing)
    assert scale.low < 0
    assert 3 < scale.high < 4


def test_ticks_are_round_inside_the_axis_and_told_apart():
    ticks = AxisScale(low=-0.0123, high=0.0151).ticks(6)
    texts = [text for _, text in ticks]
    assert len(set(texts)) == len(texts) >= 3
    assert "0.000" in texts
    assert all(-0.0123 <= value <= 0.0151 for value, _ in ticks)
    assert [text for _, text in AxisScale(low=0.5, high=200, log=True).ticks(4)] == [
        "1",
        "10",
        "100",
    ]
    assert [text for _, text in AxisScale(low=1, high=4).ticks(8, whole=True)] == list("1234")
    assert AxisScale(low=-2500, high=0).ticks(3)[0][1] == "−2,000"


def test_an_axis_of_equal_values_has_room():
    scale = value_scale(drawing_of({"a": [0.0, 0.0]}))
    assert scale.low < 0 < scale.high
