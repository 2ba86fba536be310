"""report.html, made by evaluation/page.py, used in a headless Chromium as a reader would."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from evaluation import page as report_page
from evaluation.metrics import METRICS, Measured, Measurer
from evaluation.page import Gallery, gallery_item, write_html
from evaluation.report import Report
from tests.chromium import BROWSER, Page
from tests.conftest import photograph

FACTS = {name: "1" for name in ("git_commit", "torch", "opencv", "numpy")} | {"date": "2026-01-31T12:00:00+00:00"}
LABELS = ["bicubic", "gan", "gan_ssl", "ground truth"]
NASTY = "</script><b>&amp;'\"x"  # in a file's name


def blurred(image: np.ndarray, times: int = 1) -> np.ndarray:
    for _ in range(times):
        image = ((image.astype(int) + np.roll(image, 1, 0) + np.roll(image, 1, 1)) // 3).astype(np.uint8)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Results over a set with ground truth, one of gray images and one without ground truth."""
    output = tmp_path_factory.mktemp("results")
    report = Report(Measurer(["default"], 4, "cpu"), {"Set2": 2, "gray": 1, "real": 1}, report_images=4)
    for i, name in enumerate(("one", NASTY)):
        H = photograph(60, 80, seed=i)
        report.add(
            report.examine("Set2", i, name, {"bicubic": blurred(H, 3), "gan": blurred(H, 2), "gan_ssl": blurred(H)}, H)
        )
    H = photograph(40, 50, channels=1)[..., 0]
    report.end_set("Set2", True)
    report.add(
        report.examine("gray", 0, "g", {"bicubic": blurred(H, 3), "gan": blurred(H, 2), "gan_ssl": blurred(H)}, H)
    )
    E = photograph(300, 200)
    report.end_set("gray", True)
    report.add(report.examine("real", 0, "r", {"bicubic": blurred(E), "gan": E, "gan_ssl": E}, None))
    report.end_set("real", False)
    content = {"models": {"gan": "gan.pth", "gan_ssl": "ssl.pth"}, "scale": 4}
    report.write(output, FACTS, content, n_channels=3)
    return output


def test_the_page_needs_nothing_from_elsewhere(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://""", page)
    assert page.count("</script>") == 2
    assert "<b>" not in page


def item(gallery: Gallery, pictures: dict[str, np.ndarray]) -> dict:
    gallery.add(gallery_item("set", "name", pictures, Measured({}, {})))
    return gallery.items[-1]


def test_pictures_are_embedded_without_losses_unless_they_are_very_large(monkeypatch):
    import base64
    import io

    from PIL import Image

    E = photograph(50, 60)
    whole = item(Gallery(), {"E": E})
    shown = Image.open(io.BytesIO(base64.b64decode(whole["pictures"]["E"].split(",")[1])))
    assert whole["lossless"]
    assert np.array_equal(np.asarray(shown), E)
    monkeypatch.setattr(report_page, "_LOSSLESS", 100)
    assert not item(Gallery(), {"E": E})["lossless"]
    monkeypatch.setattr(report_page, "_SIDE", 59)
    assert item(Gallery(), {"E": E})["pictures"]["E"].startswith("data:image/jpeg")


def test_a_page_that_would_get_too_large_leaves_images_out(monkeypatch, tmp_path):
    monkeypatch.setattr(report_page, "_PAGE", 1)
    gallery = Gallery()
    for seed in range(3):
        gallery.add(gallery_item("set", str(seed), {"E": photograph(20, 20, seed=seed)}, Measured({}, {})))
    assert [image["name"] for image in gallery.items] == ["0"]
    assert gallery.left_out == 2
    monkeypatch.setattr(report_page, "_LARGEST", 59)
    gallery.add(gallery_item("set", "strip", {"E": photograph(60, 20)}, Measured({}, {})))
    write_html({}, gallery, ["psnr"], 5, "note", tmp_path / "report.html")
    assert '"left_out":3' in (tmp_path / "report.html").read_text()


# ------------------------------------------------------------------------------------------------------- in a browser

in_browser = pytest.mark.skipif(BROWSER is None, reason="there is no chromium or chrome on the PATH")


@pytest.fixture(scope="module")
def browser(folder, tmp_path_factory):
    with Page((folder / "report.html").as_uri(), tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser, folder):
    browser.open("about:blank#")
    browser.open((folder / "report.html").as_uri())
    browser.eval("document.getElementById('viewer').scrollIntoView()")
    return browser


def texts(page: Page, selector: str) -> list[str]:
    return page.eval(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


def split(page: Page) -> float:
    """Percent from the left at which the divider stands; what is seen of the right picture must agree."""
    at = float(page.eval("document.getElementById('divider').getAttribute('aria-valuenow')"))
    clip = page.eval("document.querySelectorAll('.pane')[1].style.clipPath")
    assert float(clip.split()[-1].rstrip("%)")) == pytest.approx(at, abs=0.5)  # shown rounded to whole percents
    return at


def boxes(page: Page) -> list[list[float]]:
    """Left, top, width, height of each picture on the screen."""
    box = "(({left, top, width, height}) => [left, top, width, height])(e.getBoundingClientRect())"
    return page.eval(f"[...document.querySelectorAll('.world .picture')].map(e => {box})")


def shown(page: Page) -> list[str]:
    return texts(page, ".pane .tag")


@in_browser
def test_the_numbers_of_the_page_are_those_of_results_json(page, folder):
    found = json.loads((folder / "results.json").read_text())
    printed = page.eval("[...document.querySelectorAll('.means')].map(t => t.querySelector('tbody').innerText)")
    assert len(printed) == len(found["sets"]) == 2
    names = found["sets"]["Set2"]["means"]["gan"]
    for text, of_set in zip(printed, found["sets"].values(), strict=True):
        numbers = re.findall(r"(?<!\S)\d+\.\d+", text)
        assert numbers == [f"{m[n]:{METRICS[n].spec}}" for m in of_set["means"].values() for n in names]
        changes = [float(x.replace("\u2212", "-")) for x in re.findall(r"[+\u2212]\d+\.\d+", text)]
        expected = [float(f"{of_set['deltas']['gan_ssl'][name]:{METRICS[name].spec}}") for name in names]
        assert changes == expected
    rows = [row for row in found["images"] if row["image"] == NASTY]
    page.press("n")
    of_image = page.eval("document.querySelector('#values tbody').innerText")
    assert re.findall(r"(?<!\S)\d+\.\d+", of_image) == [f"{row[n]:{METRICS[n].spec}}" for row in rows for n in names]
    assert f"Set2/{NASTY}" in texts(page, "#values-title")[0]
    assert texts(page, "b") == []


@in_browser
def test_the_best_is_marked_and_what_ssl_changed_is_coloured(page, folder):
    means = json.loads((folder / "results.json").read_text())["sets"]["Set2"]["means"]
    best = texts(page, ".means:first-of-type td.best")
    assert f"{max(m['psnr'] for m in means.values()):.2f}" in best[0]
    assert page.eval("document.querySelectorAll('.means')[0].querySelectorAll('i.better').length") == 5


@in_browser
def test_the_slider_moves_by_keys_and_by_dragging(page):
    assert split(page) == 50
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert split(page) == 46
    page.press("ArrowRight", shift=True)
    assert split(page) == 56
    left, top, width, height = page.eval(
        "(b => [b.left, b.top, b.width, b.height])(document.getElementById('stage').getBoundingClientRect())"
    )
    page.drag((left + 0.56 * width, top + height / 2), (left + 0.2 * width, top + height / 2))
    assert split(page) == pytest.approx(20, abs=1)
    assert page.eval("document.activeElement.id") == "divider"
    before = boxes(page)
    page.drag((left + 0.6 * width, top + 40), (left + 0.5 * width, top + 60))  # elsewhere it is the picture that moves
    assert split(page) == pytest.approx(20, abs=1)
    assert boxes(page) == before  # the whole picture is in view: there is nowhere to move to


@in_browser
def test_any_two_pictures_can_be_compared(page):
    assert shown(page) == ["gan", "gan_ssl"]
    page.press("4", "Digit4")
    page.press("!", "Digit1", shift=True)
    assert shown(page) == ["bicubic", "ground truth"]
    page.press("x")
    assert shown(page) == ["ground truth", "bicubic"]
    sources = page.eval("[...document.querySelectorAll('.world .picture')].map(e => e.src)")
    pictures = page.eval("gallery[0].pictures")
    assert sources == [pictures["ground truth"], pictures["bicubic"]]
    page.eval("document.querySelector('[data-model=gan]').click()")
    assert shown(page) == ["ground truth", "gan"]


@in_browser
def test_all_pictures_zoom_and_move_together(page):
    page.press("g")
    assert shown(page) == LABELS
    before = boxes(page)
    page.press("+")
    page.press("s")
    left, top, width, _ = page.eval(
        "(b => [b.left, b.top, b.width, b.height])(document.querySelector('.pane').getBoundingClientRect())"
    )
    page.wheel(left + width / 2, top + 20, -200)
    time.sleep(0.2)  # the browser hands wheel events on with the next frame
    after = boxes(page)
    assert all(new[2] > 2 * old[2] for new, old in zip(after, before, strict=True))
    panes = page.eval(
        "[...document.querySelectorAll('.pane')].map(e => (b => [b.left, b.top])(e.getBoundingClientRect()))"
    )
    offsets = [[box[0] - pane[0], box[1] - pane[1]] for box, pane in zip(after, panes, strict=True)]
    assert np.ptp(offsets, axis=0) == pytest.approx([0, 0], abs=1)  # panes begin at fractions of a pixel
    page.press("0")
    assert boxes(page) == before


@in_browser
def test_overlays_come_and_go(page):
    def over() -> list[str]:
        return page.eval("[...document.querySelectorAll('.world .overlay')].map(e => e.src)")

    assert over() == []
    page.press("e")
    assert over() == 2 * [page.eval("gallery[0].edges")]
    page.press("d")
    assert over() == page.eval("[gallery[0].ssg.gan, gallery[0].ssg.gan_ssl]")
    assert page.eval("getComputedStyle(document.getElementById('legend')).display") == "flex"
    page.press("d")
    assert over() == []


@in_browser
def test_a_set_without_ground_truth_has_pictures_but_no_overlays(page):
    page.press("p")
    assert page.eval("document.getElementById('image').value") == "real/r"
    assert page.eval("[...document.querySelectorAll('#overlay-edges, #overlay-ssg')].every(e => e.disabled)")
    page.press("e")
    page.press("d")
    assert page.eval("document.querySelectorAll('.world .overlay').length") == 0
    page.press("g")
    assert shown(page) == LABELS[:3]


@in_browser
def test_the_address_brings_back_the_detail(page, folder):
    for key, code in (("n", ""), ("+", ""), ("a", ""), ("d", ""), ("1", "Digit1"), ("ArrowLeft", "")):
        page.press(key, code)
    page.eval("new Promise(done => setTimeout(done, 600))")  # the address follows once all is at rest
    state, address = page.eval("JSON.stringify(state)"), page.eval("location.href")
    page.open("about:blank#")
    page.open(address)
    assert json.loads(page.eval("JSON.stringify(state)")) == pytest.approx(json.loads(state), abs=1e-3)
    page.open("about:blank#")
    page.open((folder / "report.html").as_uri() + "#image=nothing&left=x&zoom=-3&split=abc")
    assert shown(page) == ["gan", "gan_ssl"]


@in_browser
def test_a_long_movement_changes_the_address_once(page):
    """Safari throws after a hundred changes in thirty seconds."""
    page.eval("window.changes = 0; history.replaceState = () => { changes++; }")
    for _ in range(120):
        page.press("ArrowRight")
    page.eval("new Promise(done => setTimeout(done, 600))")
    assert 1 <= page.eval("changes") < 50  # a slow machine may rest between two keys


@in_browser
def test_the_table_of_every_image_sorts_and_leads_to_the_image(page, folder):
    rows = [row for row in json.loads((folder / "results.json").read_text())["images"] if row["model"] == "gan_ssl"]
    page.eval("document.getElementById('all').open = true")
    for way in (1, -1):
        page.eval("document.querySelectorAll('#every thead button')[0].click()")
        ordered = sorted(rows, key=lambda row: way * row["psnr"])
        printed = [re.match(r"\d+\.\d\d", text)[0] for text in texts(page, "#every tbody td:nth-child(3)")]
        assert printed == [f"{row['psnr']:.2f}" for row in ordered]
    page.eval("document.querySelectorAll('#every tbody tr')[2].click()")
    assert page.eval("document.getElementById('image').value") == f"{ordered[2]['set']}/{ordered[2]['image']}"


@in_browser
def test_the_page_is_dark_where_the_system_is_and_on_demand(page):
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.eval(background)
    page.press("t")
    dark = page.eval(background)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < 600 < sum(map(int, re.findall(r"\d+", light)))


@in_browser
def test_a_choice_in_a_list_is_not_taken_for_a_key(page):
    page.eval("document.getElementById('right').focus()")
    page.press("x")
    page.press("ArrowRight", shift=True)
    assert split(page) == 50
    assert shown(page)[0] == "gan"


@in_browser
def test_the_checkpoints_of_runs_are_lines_over_the_steps(tmp_path: Path) -> None:
    report = Report(Measurer(["psnr", "ssg"], 4, "cpu"), {"Set1": 1}, report_images=1)
    H = photograph(60, 80)
    labels = {"a_100": 3, "a_20": 2, "b_100": 1}  # the second run has one checkpoint
    report.add(report.examine("Set1", 0, "one", {label: blurred(H, times) for label, times in labels.items()}, H))
    report.end_set("Set1", True)
    steps = {label: {"run": label[0], "step": int(label[2:])} for label in labels}
    report.write(tmp_path, FACTS, {"models": dict.fromkeys(labels, "x.pth"), "scale": 4, "steps": steps}, 3)
    with Page((tmp_path / "report.html").as_uri(), tmp_path / "profile") as page:
        assert texts(page, ".curves figcaption b") == ["PSNR", "SSG"]
        assert texts(page, "h2 small:has(.key)") == ["a", "b"]
        lines = page.eval("[...document.querySelectorAll('.curves polyline')].map(e => e.getAttribute('points'))")
        xs = [[float(point.split(",")[0]) for point in line.split()] for line in lines]
        assert [len(line) for line in xs] == [2, 1, 2, 1]
        assert xs[0][0] < xs[0][1] == xs[1][0]  # 20, then 100, where the other run's is too
        ys = [[float(point.split(",")[1]) for point in line.split()] for line in lines]
        assert ys[0][1] > ys[0][0] > ys[1][0]  # the more blurred, the lower its PSNR on the screen
        assert texts(page, ".curves title")[0].startswith("step 20: ")
        page.eval("document.documentElement.style.width = '360px'")
        assert page.eval("document.querySelector('.curves').scrollWidth <= 360")


@in_browser
@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_shows_every_column_of_the_tables(folder: Path, tmp_path: Path, width: int) -> None:
    edges = "(e => { const {left, right} = e.getBoundingClientRect(); return [left, right]; })"
    with Page((folder / "report.html").as_uri(), tmp_path / "profile", (width, 800)) as page:
        page.eval("document.querySelectorAll('details').forEach(e => { e.open = true; })")
        assert page.eval("document.documentElement.scrollWidth") <= width
        # The default metrics need no scrolling; the table of every image has one more column of names.
        hidden = page.eval("[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)")
        assert hidden[:3] == [0, 0, 0]
        page.eval("$('every').parentNode.scrollLeft = 1e6")
        box = page.eval(f"{edges}($('every').parentNode)")
        row = "document.querySelector('#every tbody tr')"
        name, last = (page.eval(f"{edges}({row}.children[{i}])") for i in (1, 6))
        assert texts(page, "#every thead th")[-1].startswith("SSG")
        assert box[0] <= name[0] < name[1] <= last[0] < last[1] <= box[1]
        # Of a table that is wider still, the names stay.
        page.eval("document.querySelector('.means').style.width = '800px'")
        page.eval("document.querySelector('.scroll').scrollLeft = 1e6")
        box, name = (page.eval(f"{edges}(document.querySelector('{what}'))") for what in (".scroll", ".means tbody th"))
        assert name[0] == pytest.approx(box[0], abs=2)  # but for the border
        assert page.eval("document.documentElement.scrollWidth") <= width
