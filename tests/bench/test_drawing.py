"""Figures: no two methods alike, names and ticks that do not overlap, axes that panels share, nothing cut."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft_bench.report.drawing import LABEL_HEIGHT, log_ticks, spread_labels, vega_lite_spec
from regraft_bench.report.figures import Figure, Line, Panel
from regraft_bench.report.render import load_rows
from regraft_bench.report.styles import COLOURS, METHODS, choose_styles
from regraft_bench.studies import STUDIES, study

RESULTS = Path(__file__).parents[2] / "results"
DRAWINGS = sorted(RESULTS.glob("*/*.svg"))
NAMES = st.lists(st.sampled_from([*METHODS, *(f"setting {number}" for number in range(20))]), unique=True, max_size=25)


@settings(deadline=None)
@given(NAMES)
def test_no_two_names_have_one_style_and_a_colour_comes_again_only_where_there_is_no_other(names):
    styles = choose_styles(names)
    assert list(styles) == names
    assert len(set(styles.values())) == len(names)
    free = [name for name in names if name not in METHODS]
    listed = {styles[name].colour for name in names if name in METHODS}
    fresh = [styles[name].colour for name in free[: len(COLOURS) - len(listed)]]
    assert len({*fresh, *listed}) == len(fresh) + len(listed)


@settings(deadline=None)
@given(NAMES, NAMES)
def test_a_method_of_the_table_keeps_its_style_whatever_else_is_drawn(names, others):
    both = choose_styles([*names, *others])
    for name in set(names) & METHODS.keys():
        assert choose_styles(names)[name] == both[name]


def test_more_lines_than_one_can_tell_apart_are_refused():
    with pytest.raises(ValueError, match="61 lines"):
        choose_styles(map(str, range(61)))


@settings(deadline=None)
@given(st.lists(st.floats(0, 200), max_size=6))
def test_labels_are_a_line_apart_in_their_order_and_within_the_panel(places):
    moved = spread_labels(places, LABEL_HEIGHT, 210)
    order = sorted(range(len(places)), key=lambda number: places[number])
    inner = [moved[number] for number in order]
    assert all(b - a >= LABEL_HEIGHT - 1e-9 for a, b in pairwise(inner))
    assert all(place <= 210 for place in inner)
    if all(b - a >= LABEL_HEIGHT for a, b in pairwise(sorted(places))):
        assert moved == places, "labels that do not overlap stay"


@settings(deadline=None)
@given(st.floats(-9, 9), st.floats(0.5, 9))
def test_a_logarithmic_axis_has_a_few_round_ticks(power, width):
    low, high = 10**power, 10 ** (power + width)
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert all(low <= tick <= high for tick in ticks)
    assert all(f"{tick:.0e}"[0] in "12357" for tick in ticks)


def draw(*panels: list[Line]) -> dict:
    figure = Figure(
        "f", "title", (), tuple(Panel("p", "x", "y", lambda _, own=own: own) for own in panels), "Look here."
    )
    return vega_lite_spec(figure, [])


def test_panels_of_one_axis_share_its_range_and_a_caption_says_what_to_see():
    spec = draw([Line("a", (0.0, 1.0), (0.0, 1.0))], [Line("b", (0.0, 5.0), (-3.0, 1.0))])
    axes = [part["layer"][0]["encoding"] for part in spec["concat"]]
    assert axes[0]["x"]["scale"] == axes[1]["x"]["scale"]
    assert axes[0]["y"]["scale"]["domain"] == [-3.16, 1.16]
    assert spec["title"]["subtitle"] == ["Look here."]


def test_up_to_six_lines_are_named_at_their_ends_and_more_in_one_legend():
    lines = [Line(str(number), (0.0, 1.0), (0.0, float(number))) for number in range(7)]
    few, many = draw(lines[:6]), draw(lines)
    assert [label["n"] for label in few["concat"][0]["layer"][-1]["data"]["values"]] == list("012345"[::-1])
    assert few["concat"][0]["layer"][0]["encoding"]["color"]["legend"] is None
    assert many["concat"][0]["layer"][0]["encoding"]["color"]["legend"]
    assert "text" not in {layer["mark"]["type"] for layer in many["concat"][0]["layer"]}


@pytest.mark.parametrize("name", STUDIES)
def test_in_every_committed_figure_methods_differ_in_colour_while_there_are_colours(name):
    one = study(name)
    rows = load_rows(RESULTS, one)
    for figure in one.figures:
        panels = figure.collect_panels(rows)
        names = dict.fromkeys(line.name for panel, own in panels if isinstance(panel, Panel) for line in own)
        styles = choose_styles(names).values()
        assert len(set(styles)) == len(names)
        assert len({style.colour for style in styles}) == min(len(names), len(COLOURS)), figure.name
        assert figure.caption, figure.name


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_in_committed_drawings_nothing_is_cut_and_ticks_do_not_overlap(path):
    drawing = path.read_text(encoding="utf-8")
    assert "…" not in drawing
    for group in re.findall(r'<g class="mark-text role-axis-label".*?</g>', drawing, re.DOTALL):
        texts = re.findall(r'transform="translate\(([-\d.]+),([-\d.]+)\)"[^>]*>([^<]*)<', group)
        shown = sorted((float(x), float(y), text) for x, y, text in texts if text)
        for (x, y, text), (next_x, next_y, _) in pairwise(shown):
            if y == next_y:
                assert next_x - x >= 5 * len(text), (text, x, next_x)
