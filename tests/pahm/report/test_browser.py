"""How the page of a run behaves in a browser without a network."""

import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from report_page import FAILURES, GRID, payload

from pahm.data.freihand import FreiHand

NAMES = ("chromium", "chromium-browser", "google-chrome")


CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH to open the page with")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def open_page(browser, path, **options):
    """The page, drawn, and the lists of its errors and of its requests beyond the file itself."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, **options)
    view = context.new_page()
    view.set_default_timeout(120_000)
    errors, requests = [], []
    view.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    view.on("pageerror", lambda error: errors.append(str(error)))

    def route(route):
        if route.request.url == path.as_uri():
            route.continue_()
        else:
            requests.append(route.request.url)
            route.abort()

    context.route(lambda url: not url.startswith(("data:", "blob:")), route)
    view.goto(path.as_uri())
    view.wait_for_function("document.documentElement.dataset.ready === 'yes'")
    return view, errors, requests


@pytest.fixture(scope="module")
def opened(browser, page):
    return open_page(browser, page)


@pytest.fixture
def view(opened):
    """The open page with our mesh of the first hand in the viewer, as it comes."""
    view = opened[0]
    view.select_option("#hand", "g0")
    view.select_option("#mesh", "ours-3")
    view.set_checked("#ghost", False)
    view.click("#reset")
    view.locator("#viewer").scroll_into_view_if_needed()
    return view


def pixels(view):
    """What the viewer shows, once two pictures in a row are the same."""
    before = None
    for _ in range(40):
        view.wait_for_timeout(250)
        now = view.locator("#viewer").screenshot()
        if now == before:
            break
        before = now
    return np.asarray(Image.open(io.BytesIO(now)).convert("RGB"), int)


def share_changed(a, b):
    return (np.abs(a - b).max(-1) > 12).mean()


def mesh_share(picture):
    """The part of the viewer, without its colour bar, that is not paper."""
    left = picture[:, : int(0.75 * picture.shape[1])]
    return (np.abs(left - left[2, 2]).max(-1) > 12).mean()


SHOWN = "(([mesh]) => [mesh.x, mesh.intensity, mesh.i.length])(document.getElementById('viewer').data)"


def camera(view):
    eye = view.evaluate("document.getElementById('viewer')._fullLayout.scene._scene.getCamera().eye")
    return np.array([eye[axis] for axis in "xyz"])


def test_page_asks_for_nothing_and_draws_everything(opened, view, page):
    _, errors, requests = opened
    assert errors == [] and requests == []
    assert view.locator("#grid tbody tr").count() == GRID
    assert view.locator("#failed tbody").count() == FAILURES
    assert view.locator("#failed .why .reason").count() == FAILURES
    broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).length"
    assert view.evaluate(broken) == 0 and view.evaluate("document.images.length") > 8 * GRID
    for chart in payload(page)["charts"]:
        lines = view.locator(f"[data-chart={chart['id']}] .scatterlayer .js-line")
        assert lines.count() == len(chart["traces"])
        for i in range(lines.count()):
            assert lines.nth(i).get_attribute("d").count(",") >= 1
    assert view.locator("canvas").count() <= 8
    assert mesh_share(pixels(view)) > 0.05


def test_dragging_and_arrow_keys_turn_the_mesh(view):
    start, front = camera(view), pixels(view)
    box = view.locator("#viewer").bounding_box()
    x, y = box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5
    view.mouse.move(x, y)
    view.mouse.down()
    for step in range(1, 7):
        # The viewer reads the mouse once a frame, and a CPU draws few.
        view.mouse.move(x + 10 * step, y + 3 * step)
        view.wait_for_timeout(100)
    view.mouse.up()
    turned = pixels(view)
    assert np.linalg.norm(camera(view) - start) > 0.3
    assert share_changed(front, turned) > 0.02
    view.select_option("#mesh", "ours-2")
    assert np.linalg.norm(camera(view) - start) > 0.3, "another mesh is seen from where the last one was"
    view.select_option("#mesh", "ours-3")
    view.click("#reset")
    np.testing.assert_allclose(camera(view), start)
    assert share_changed(front, pixels(view)) < 0.005
    view.focus("#viewer")
    view.keyboard.press("ArrowRight")
    view.keyboard.press("ArrowDown")
    assert np.linalg.norm(camera(view) - start) > 0.3
    assert np.linalg.norm(camera(view)) == pytest.approx(np.linalg.norm(start))
    assert share_changed(front, pixels(view)) > 0.02


def test_choosing_a_picture_shows_its_mesh_and_its_errors(view, page, data):
    def shown():
        return view.evaluate(SHOWN)

    x, _, faces = shown()
    first = pixels(view)
    assert (len(x), faces) == (778, 1538)
    chosen = payload(page)["hands"][2]
    view.locator("#grid tbody tr").nth(2).locator("img[alt*='of ours over']").click()
    other, errors, _ = shown()
    assert np.abs(np.subtract(other, x)).max() > 5
    assert np.mean(errors) == pytest.approx(chosen["meshes"][0]["mean"], abs=0.01)
    assert f"Image {chosen['index']}, ours, M1 (778): mean error" in view.inner_text("#readout")
    assert share_changed(first, pixels(view)) > 0.05
    view.locator("#grid tbody tr").nth(2).locator("img[alt*='M4 (98)']").click()
    assert len(shown()[0]) == 98 and view.locator(".pick[aria-pressed=true]").count() == 1
    view.locator("#failed tbody").nth(1).locator("img[alt*='true mesh']").first.click()
    assert shown()[1] is None and "the true mesh" in view.inner_text("#readout")
    assert view.input_value("#hand") == "f1"
    true = FreiHand(data, "evaluation").record(payload(page)["hands"][GRID + 1]["index"])["vertices"]
    np.testing.assert_allclose(shown()[0], 1000 * (true - true.mean(0))[:, 0], atol=0.03)


def test_truth_behind_the_mesh(view):
    before = pixels(view)
    view.set_checked("#ghost", True)
    assert view.evaluate("document.getElementById('viewer').data.length") == 2
    assert share_changed(before, pixels(view)) > 0.01


@pytest.mark.parametrize(("scheme", "dark"), [("dark", True), ("light", False)])
def test_a_narrow_page_in_either_scheme(browser, page, scheme, dark):
    view, errors, requests = open_page(browser, page, color_scheme=scheme)
    view.set_viewport_size({"width": 390, "height": 800})
    view.wait_for_function("document.documentElement.scrollWidth <= 390")
    red = int(re.search(r"\d+", view.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
    assert (red < 80) == dark
    view.locator("#grid tbody tr").nth(1).locator(".pick").first.click()
    box = view.locator("#viewer").bounding_box()
    assert errors == [] and requests == [] and box["width"] <= 390
    view.context.close()
