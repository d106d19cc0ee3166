"""Curves in pages: what is drawn, and in a real browser what answers to the pointer."""

import json
import math
import re

import pytest
from browsing import CHROMIUM, open_browser
from playwright.sync_api import expect

from ftray.storage import write_bytes
from ftray.tracking.curves import MAX_POINTS, Curve, assets, figure, style, thin


def data_of(html: str) -> dict:
    found = re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_a_long_curve_keeps_its_spikes_and_its_ends():
    values = [1.0] * 50_000
    values[12_345], values[40_001] = 9.0, -9.0
    kept = thin(Curve("loss", range(1, 50_001), values))
    assert len(kept.steps) <= MAX_POINTS + 2
    points = dict(zip(kept.steps, kept.values, strict=True))
    assert (points[12_346], points[40_002]) == (9.0, -9.0)
    assert (min(points), max(points)) == (1, 50_000)
    assert list(kept.steps) == sorted(kept.steps)
    short = Curve("loss", [1, 2], [0.5, 0.4])
    assert thin(short) is short


def test_a_figure_is_a_picture_with_its_data_and_no_name_becomes_markup():
    html = figure([Curve("</script><b>x", [1, 2, 3], [1.0, math.nan, 0.123456789])], label="loss")
    assert "<svg" in html
    assert "<b>x" not in html
    (curve,) = data_of(html)["curves"]
    assert curve["label"] == "</script><b>x"
    assert curve["values"] == [1.0, None, 0.123457]
    assert "src=" not in style() + assets()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium")
    with open_browser() as browser:
        yield browser


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    page.close()
    assert complaints == []


def show(page, directory, *figures: str):
    path = directory / "page.html"
    body = f"<!doctype html><meta charset=utf-8>{style()}<div class=plots>{''.join(figures)}</div>{assets()}"
    write_bytes(path, body.encode())
    page.goto(f"file://{path}")


def point_at(page, share: float, *, number: int = 0) -> None:
    box = page.locator("figure.curves .u-over").nth(number).bounding_box()
    page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)


def scale_of(page, axis: str) -> list[float]:
    page.wait_for_timeout(50)  # the plot is drawn anew with the next frame
    return page.locator("figure.curves").evaluate(f"f => [f.plot.scales.{axis}.min, f.plot.scales.{axis}.max]")


def test_the_pointer_tells_values_a_drag_zooms_and_noise_is_smoothed_away(page, tmp_path):
    steps = list(range(1, 101))
    noisy = [2.0 + (-1) ** step for step in steps]  # 1, 3, 1, 3 ...
    show(page, tmp_path, figure([Curve("training loss", steps, noisy)], label="loss"))
    page.wait_for_selector("figure.curves canvas")
    assert page.locator("figure.curves svg").count() == 0  # the picture is replaced
    here = page.locator("figure.curves .here")
    assert here.inner_text() == "training loss 3"  # the last value, without a pointer
    point_at(page, 0.999)
    expect(here).to_have_text("step 100  training loss 3")
    page.locator("#smoothing").evaluate("e => { e.value = 0.99; e.dispatchEvent(new Event('input')) }")
    point_at(page, 0.5)
    point_at(page, 0.999)
    expect(here).to_contain_text("step 100")
    shown = float(here.inner_text().split()[-1])
    weights = [0.99 ** (100 - step) for step in steps]
    expected = sum(w * v for w, v in zip(weights, noisy, strict=True)) / sum(weights)
    assert shown == pytest.approx(expected, abs=1e-4)
    point_at(page, 0.25)
    page.mouse.down()
    point_at(page, 0.5)
    page.mouse.up()
    low, high = page.evaluate(
        "[...document.querySelectorAll('figure.curves')].map(f => [f.plot.scales.x.min, f.plot.scales.x.max])[0]"
    )
    assert 20 < low < 30 < 45 < high < 55


def test_one_of_many_curves_is_named_when_it_is_pointed_at(page, tmp_path):
    curves = [Curve(f"t{number:03d}", [1, 2, 3], [float(number)] * 3) for number in range(12)]
    show(page, tmp_path, figure(curves, label="loss"))
    page.wait_for_selector("figure.curves canvas")
    here = page.locator("figure.curves .here")
    assert here.inner_text() == "12 curves; point at one"
    box = page.locator("figure.curves .u-over").bounding_box()
    scale = page.evaluate(
        "(() => { const y = document.querySelector('figure.curves').plot.scales.y; return [y.min, y.max] })()"
    )
    height = box["height"] * (1 - (7 - scale[0]) / (scale[1] - scale[0]))
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + height)
    assert here.inner_text().split() == ["step", "2", "t007", "7"]
