import re
from pathlib import Path

import pytest
import regrad_runner.reporting.page
from regrad_runner.reporting.figures.svg import SHAPES
from regrad_runner.reporting.styles import MARKERS, PALETTE, arm_styles, colours
from regrad_runner.statistics.verdicts import ArmSummary

CSS = (Path(regrad_runner.reporting.page.__file__).parent / "templates" / "report.css").read_text()


def summary(arm, verdict="no evidence", control=None):
    return ArmSummary(
        arm=arm, seeds=6, failed=0, mean=0.5, sd=0.1, verdict=verdict, control=control
    )


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def themes():
    blocks = re.findall(r":root \{(.*?)\}", CSS, flags=re.DOTALL)
    found = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in blocks]
    assert len(found) == 3
    return dict(zip(("light", "dark", "print"), found, strict=True))


def test_contrast_is_that_of_the_guidelines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_lines_stand_out_from_the_page_and_text_can_be_read(theme):
    found = themes()[theme]
    for role in colours().keys() - {"paper", "grid", "quiet", "ink"}:
        assert contrast(found[role], found["paper"]) >= 3, role
    for role in ("ink", "quiet", "good", "half", "bad"):
        assert contrast(found[role], found["paper"]) >= 4.5, role


def test_the_light_page_has_the_colours_of_the_figures():
    light = themes()["light"]
    assert [light[f"arm-{n}"] for n in range(1, 7)] == [colour.lower() for colour in PALETTE]


def test_no_two_of_forty_corrections_look_alike_and_each_control_like_its_arm():
    arms = [
        summary("baseline", "baseline"),
        *(summary(f"a{n}", control="c") for n in range(40)),
        summary("c", "control"),
    ]
    styles = arm_styles(arms)
    looks = [(styles[f"a{n}"].role, styles[f"a{n}"].marker) for n in range(40)]
    assert len(set(looks)) == 40
    assert (styles["c"].role, styles["c"].marker) == looks[0]
    assert styles["c"].control
    assert styles["c"].dashes
    assert styles["baseline"].role == "ink"


def test_the_page_can_draw_every_marker():
    assert set(SHAPES) == set(MARKERS)
