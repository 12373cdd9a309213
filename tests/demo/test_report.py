"""The page of the demo: it shows the numbers that were measured, and no others."""

import base64
import copy
import os
import re
import shutil
from html.parser import HTMLParser
from importlib.util import find_spec
from io import BytesIO
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from trl_spatial.demo.report import describe_change, write_report
from trl_spatial.figures.page import format_duration


PAPER = "https://huggingface.co/papers/2602.24233"
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page as its reader sees it: headings, tables, text outside of figures, images, links, ids."""

    def __init__(self, html):
        super().__init__()
        self.html, self.open_tags, self.tags = html, [], set()
        self.tables, self.ids, self.links, self.images = {}, [], [], []
        self.text, self.headline = "", ""
        self.feed(html)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if tag not in VOID:
            self.open_tags.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [attributes[name] for name in ("href", "src", "xlink:href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "table":
            self.caption, self.rows = "", []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag
        if tag in ("td", "th", "dd"):
            self.text += " "
        if tag == "table":
            self.tables[self.caption] = [tuple(row) for row in self.rows]

    def handle_data(self, data):
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        if "caption" in self.open_tags:
            self.caption += data
        if {"td", "th"} & set(self.open_tags):
            self.rows[-1][-1] += data
        if "h1" in self.open_tags:
            self.headline += data
        if not {"svg", "style", "title"} & set(self.open_tags):
            self.text += data


@pytest.fixture
def write(demo_run, tmp_path):
    """A function that writes the page of some results beside the pictures of the run, and reads it."""
    folder, _ = demo_run
    for path in folder.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)

    def write_and_read(results):
        return Page(write_report(results, tmp_path).read_text(encoding="utf-8"))

    return write_and_read


@pytest.fixture
def results(demo_run):
    """The results of the run, to be changed at will."""
    return copy.deepcopy(demo_run[1])


@pytest.fixture
def page(write, results):
    return write(results)


def share_cells(row):
    return f"{row['estimate']:.1%}".replace("%", " %"), f"{100 * row['low']:.1f}–{100 * row['high']:.1f} %"


def expected_tables(results):
    accuracy = results["reward_model"]["accuracy"]
    tables = {
        title: [(head, "Accuracy", "95 % interval", "Pairs")]
        + [(name.replace("_", " "), *share_cells(row), str(row["num_pairs"])) for name, row in accuracy[group].items()]
        for group, title, head in (
            ("level", "By number of changed relations", "Changes"),
            ("relation", "One change, by relation", "Relation"),
            ("operation", "One change, by kind of change", "Change"),
        )
    }
    tables["Calibration"] = [("Confidence", "Accuracy", "Pairs")] + [
        (f"{100 * row['confidence']:.1f} %", f"{100 * row['accuracy']:.1f} %", f"{row['num_pairs']:,}")
        for row in results["reward_model"]["reliability"]
    ]
    tables["Time of each stage"] = [
        ("Stage", "Time"), ("Preference pairs", "21 s"), ("Spatial-RL", "13 min 39 s"), ("Total", "14 min 0 s")
    ]  # fmt: skip
    tables["Demo arguments"] = [("Name", "Value"), ("seed", "0"), ("quick", "false"), ("output_dir", "null")]
    tables["Environment"] = [("Name", "Value"), *((k, str(v)) for k, v in results["environment"].items())]
    if "generator" in results:
        before, after = (results["generator"][side]["relations"] for side in ("before", "after"))
        head = ("Relation", "Before", "95 % interval", "After", "95 % interval", "Images")
        tables["Spatial accuracy by relation"] = [head] + [
            (name.replace("_", " "), *share_cells(before[name]), *share_cells(after[name]), "256") for name in before
        ]
    if "training" in results:
        settings = [(name, repr(value)) for name, value in results["training"]["settings"].items()]
        tables["Reinforcement learning settings"] = [("Name", "Value"), *settings]
        tables["Reinforcement learning"] = [
            ("Images drawn", "11,520"), ("Evaluations of the policy", "155,520"),
            ("Evaluations of the reference", "86,400"), ("Evaluations per image", "13.5"),
            ("… if all images were trained on", "21.0"), ("Time", "2 min 1 s"),
        ]  # fmt: skip
    return tables


def test_the_tables_hold_the_results(page, results):
    assert page.tables == expected_tables(results)


def test_the_headline_says_what_was_measured(page, results):
    before, after = (results["generator"][side]["spatial_accuracy"] for side in ("before", "after"))
    numbers = [f"{100 * row[key]:.1f}" for row in (before, after) for key in ("estimate", "low", "high")]
    assert re.findall(r"\d+\.\d", page.headline) == numbers
    assert "rose from" in page.headline and "1,024 images" in page.headline


@pytest.mark.parametrize(
    ("low", "high", "change", "words"),
    [(0.7, 0.8, "rose", "rose from"), (0.1, 0.2, "fell", "fell from"), (0.4, 0.5, "stayed", "overlapping intervals")],
)
def test_the_headline_does_not_claim_more_than_the_intervals(write, results, low, high, change, words):
    results["generator"]["before"]["spatial_accuracy"] = {"estimate": 0.45, "low": 0.41, "high": 0.49}
    results["generator"]["after"]["spatial_accuracy"] = {"estimate": (low + high) / 2, "low": low, "high": high}
    assert describe_change(results) == change
    assert words in write(results).headline


def test_no_number_is_typed_in(write, results):
    def flatten(value, key=""):
        if isinstance(value, dict):
            return {key: flatten(inner, key) for key, inner in value.items()}
        if isinstance(value, list):
            return [flatten(inner, key) for inner in value]
        if isinstance(value, str):
            return value if key in ("image", "chosen", "rejected") else "words"
        return value if isinstance(value, bool) else 7777 if isinstance(value, int) else 0.1234

    text = write(flatten(results)).text
    numbers = set(re.findall(r"\d[\d.,]*\d|\d", text))
    # … of 4 images, changes 1 to 3, intervals of 95 %, 0.1234 / 0.1234 = 100 %
    assert numbers <= {"7,777", "7777", "12.3", "0.1", "0.12", "0.123", "0.1234", "1", "2", "3", "4", "95", "100"}


@pytest.mark.parametrize(
    "missing", [("examples",), ("generator",), ("training",), ("generator", "training", "examples")]
)
def test_without_a_part_its_section_is_left_out(write, results, missing):
    sections = {"examples": {"examples"}, "generator": {"relations"}, "training": {"training"}}
    shown = set().union(*sections.values()) - set().union(*(sections[name] for name in missing))
    for name in missing:
        del results[name]
    page = write(results)
    assert page.tables == expected_tables(results)
    assert {name for names in sections.values() for name in names} & set(page.ids) == shown
    assert not re.search(r"undefined|none|nan\b", page.text, flags=re.IGNORECASE)
    if len(missing) == 3:
        assert not re.search(r"FLUX|before", page.text, flags=re.IGNORECASE)
        assert f"{100 * results['reward_model']['accuracy']['all']['all']['estimate']:.1f} %" in page.headline


def test_without_scored_pairs_there_are_none(write, results):
    del results["reward_model"]["examples"], results["examples"]
    page = write(results)
    assert not page.images and "pairs" not in page.ids and "ranked wrongly" not in page.text


def test_without_evaluations_during_training_there_is_no_curve_of_the_truth(write, results):
    results["training"]["evaluations"] = []
    page = write(results)
    assert "reward-training" in page.ids and "reward-held-out" not in page.ids and "truth-figure_1" not in page.ids


def test_the_pictures_are_those_of_the_run(page, demo_run):
    folder, results = demo_run
    files = [shot["image"] for row in results["examples"] for side in ("before", "after") for shot in row[side]]
    files += [row[role] for row in results["reward_model"]["examples"] for role in ("chosen", "rejected")]
    embedded = [image["src"].removeprefix("data:image/png;base64,") for image in page.images]
    assert [base64.b64decode(data) for data in embedded] == [(folder / file).read_bytes() for file in files]
    assert all((image["width"], image["height"], image["class"]) == ("64", "64", "pixelated") for image in page.images)


def test_the_verdicts_are_words_and_signs(page, results):
    shots = [shot for row in results["examples"] for side in ("before", "after") for shot in row[side]]
    assert page.text.count("✓ right") == sum(shot["is_correct"] for shot in shots) > 0
    assert page.text.count("✗ wrong") == sum(not shot["is_correct"] for shot in shots) > 0
    assert page.text.count("✓ ranked correctly") == page.text.count("✗ ranked wrongly") == 2
    for shot in shots:
        assert all(reason in page.text for reason in shot["reasons"])


def test_text_of_the_results_is_text(write, results, page):
    hostile = "<script>alert('1')</script> \"</p><img src=x onerror=alert(2)>& {{ 7 * 7 }}"
    results["examples"][0]["prompt"] = results["reward_model"]["examples"][0]["change"] = hostile
    results["examples"][0]["before"][1]["reasons"] = [hostile]
    results["environment"][hostile] = results["stages"][0]["title"] = hostile
    results["reward_model"]["accuracy"]["level"][hostile] = results["reward_model"]["accuracy"]["level"]["1"]
    hostile_page = write(results)
    assert hostile_page.tags == page.tags and len(hostile_page.images) == len(page.images)
    assert hostile_page.text.count(hostile) == 7


def test_nothing_refers_outside(page):
    assert set(re.findall(r"\w+://[^\s\"'<]+", page.html)) == {PAPER, "http://www.w3.org/2000/svg"}
    assert page.html.count(PAPER) == 1
    assert all(link.startswith(("#", "data:")) for link in page.links if link != PAPER)
    assert all(target.startswith("#") for target in re.findall(r"url\((.)", page.html))
    assert not {"script", "iframe", "object", "embed", "base"} & page.tags and "@import" not in page.html


def test_ids_are_unique_and_references_resolve(page):
    assert len(set(page.ids)) == len(page.ids)
    references = re.findall(r'(?:href="|url\()#([^")]+)', page.html)
    assert references and set(references) <= set(page.ids)


def test_the_same_results_give_the_same_bytes(page, write, results):
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red", "svg.hashsalt": "other"}):
        assert write(results).html == page.html


def luminance(color):
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(first, second):
    """WCAG 2's contrast ratio."""
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colors_are_the_pages_and_can_be_read_in_both_schemes(page):
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", page.html, re.S)
    ]
    assert len(schemes) == 2 and set(schemes[0]) == set(schemes[1])
    for colors in schemes:
        for name in ("ink", "quiet", "accent", "second", "right", "wrong"):
            assert min(contrast(colors[name], colors[ground]) for ground in ("paper", "raised")) >= 4.5
    for svg in re.findall(r"<svg.*?</svg>", page.html, re.S):
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {
            "none",
            *(f"var(--{name})" for name in schemes[0]),
        }


class Chart:
    """A figure of the page, read as its reader does: places along an axis by the ticks of that axis."""

    def __init__(self, page, name):
        svg = next(svg for svg in re.findall(r"<svg.*?</svg>", page.html, re.S) if f'id="{name}-figure_1"' in svg)
        self.name, self.root = name, ElementTree.fromstring(svg)
        self.groups = {element.get("id"): element for element in self.root.iter() if element.get("id")}

    def ticks(self, axis):
        """Places of the ticks, and their texts."""
        places, texts = [], []
        for name, group in self.groups.items():
            if re.fullmatch(rf"{self.name}-{axis}tick_\d+", name):
                (text,) = group.iterfind(".//{*}text")
                grid_line = group.find(".//{*}path[@clip-path]")
                corner = {"x": text.get("x"), "y": text.get("y")}
                if grid_line is not None:
                    corner = dict(zip("xy", re.findall(r"[\d.]+", grid_line.get("d")), strict=False))
                places.append(float(corner[axis]))
                texts.append(text.text.replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " "))
        return np.array(places), texts

    def read(self, axis, places):
        ticks, texts = self.ticks(axis)
        values = np.array([float(text.removesuffix(" %")) / (100 if text.endswith("%") else 1) for text in texts])
        slope, intercept = np.polyfit(ticks, values, 1)
        np.testing.assert_allclose(slope * ticks + intercept, values, atol=1e-4)
        return slope * np.array(places) + intercept

    def dots(self, name):
        """Places of the markers of a group: x and y."""
        uses = self.groups[f"{self.name}-{name}"].iterfind(".//{*}use")
        return np.array([(float(use.get("x")), float(use.get("y"))) for use in uses]).T

    def lines(self, name):
        """Corners of the paths of a group, `(num_paths, num_corners, 2)`."""
        paths = self.groups[f"{self.name}-{name}"].iterfind("./{*}path")
        return np.array([re.findall(r"(\S+) (\S+) +(?=[LCz]|$)", path.get("d")) for path in paths], float)


def test_the_curves_go_through_the_measurements(page, results):
    training = results["training"]
    for chart_name, group, rows, key in (
        ("reward", "training", training["steps"], "reward"),
        ("reward", "held-out", training["evaluations"], "reward"),
        ("truth", "spatial-accuracy", training["evaluations"], "spatial_accuracy"),
        ("truth", "objects-present", training["evaluations"], "objects_present"),
    ):
        chart = Chart(page, chart_name)
        ((x, y),) = (corners.T for corners in chart.lines(group))
        np.testing.assert_allclose(chart.read("x", x), [row["step"] for row in rows], atol=1e-4)
        np.testing.assert_allclose(chart.read("y", y), [row[key] for row in rows], atol=1e-4)
    assert Chart(page, "truth").ticks("y")[1] == ["0 %", "25 %", "50 %", "75 %", "100 %"]


def check_intervals(chart, group, rows):
    x, _ = chart.dots(group)
    np.testing.assert_allclose(chart.read("x", x), [row["estimate"] for row in rows], atol=1e-4)
    ends = chart.read("x", chart.lines(f"{group}-intervals")[:, :, 0])
    np.testing.assert_allclose(ends, [(row["low"], row["high"]) for row in rows], atol=1e-4)


def test_the_dots_of_a_relation_are_in_its_row(page, results):
    chart = Chart(page, "relations")
    rows, names = chart.ticks("y")
    for side in ("before", "after"):
        relations = results["generator"][side]["relations"]
        check_intervals(chart, side, list(relations.values()))
        _, y = chart.dots(side)
        nearest = np.abs(y[:, None] - rows).argmin(axis=1)
        assert [names[row] for row in nearest] == [name.replace("_", " ") for name in relations]


def test_the_dots_of_the_pairs_and_chance(page, results):
    chart = Chart(page, "pairs")
    accuracy = results["reward_model"]["accuracy"]
    assert chart.ticks("y")[1] == ["all pairs", "1 change", "2 changes", "3 changes"]
    check_intervals(chart, "accuracy", [accuracy["all"]["all"], *accuracy["level"].values()])
    np.testing.assert_allclose(chart.read("x", chart.lines("chance")[0, :, 0]), 0.5, atol=1e-4)


def test_the_reliability_diagram(page, results):
    chart, bins = Chart(page, "calibration"), results["reward_model"]["reliability"]
    bounds = [(dot.min(axis=0), dot.max(axis=0)) for dot in chart.lines("bins")]
    x, y = np.mean(bounds, axis=1).T
    np.testing.assert_allclose(chart.read("x", x), [row["confidence"] for row in bins], atol=1e-4)
    np.testing.assert_allclose(chart.read("y", y), [row["accuracy"] for row in bins], atol=1e-4)
    x, y = chart.lines("diagonal")[0].T
    np.testing.assert_allclose(chart.read("x", x), chart.read("y", y), atol=1e-4)


def test_a_failure_leaves_the_previous_page(write, results, tmp_path):
    write(results)
    page = (tmp_path / "report.html").read_bytes()
    (tmp_path / "no.png").write_bytes(b"GIF89a, not a PNG")
    results["examples"][0]["before"][0]["image"] = "no.png"
    with pytest.raises(ValueError, match=r"no\.png is not a PNG file: it begins with b'GIF89a, '"):
        write(results)
    results["examples"][0]["before"][0]["image"] = "missing.png"
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        write(results)
    del results["seconds"], results["examples"]
    with pytest.raises(UndefinedError, match="seconds"):
        write(results)
    assert (tmp_path / "report.html").read_bytes() == page


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.6, "1 h 0 min")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


READABLE = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    const box = parent.getBoundingClientRect();
    if (!text || !box.width) continue;
    const isDrawn = parent instanceof SVGTextContentElement;
    const style = getComputedStyle(parent);
    found.push({
      text, isDrawn, height: box.height, left: box.left, right: box.right,
      size: parseFloat(style.fontSize) * (isDrawn ? parent.getScreenCTM().a : 1),
      color: isDrawn ? style.fill : style.color,
      isScrolled: parent.closest(".scroll") !== null,
    });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of the system, driven by playwright."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    missing = (
        "`pip install playwright`" if find_spec("playwright") is None else "a Chromium, e.g. `apt install chromium`"
    )
    if path is None or find_spec("playwright") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            f"The page is not opened: it takes {missing}."
        )
    from playwright.sync_api import sync_playwright

    flags = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
             "disable-component-update", "disable-sync"]  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[f"--{flag}" for flag in flags])
        yield browser
        browser.close()


def as_hex(color):
    return "#" + "".join(f"{int(channel):02x}" for channel in re.findall(r"\d+", color)[:3])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(360, 740), (1280, 900)], ids=["phone", "desktop"])
def test_a_browser_shows_it(browser, page, tmp_path, size, scheme):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    context.set_default_timeout(120_000)
    tab, events, requests = context.new_page(), [], []
    tab.on("console", lambda message: events.append(message.text))
    tab.on("pageerror", lambda error: events.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url.split(":")[0]))
    tab.goto((tmp_path / "report.html").as_uri())

    ground = as_hex(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert luminance(ground) < 0.02 if scheme == "dark" else luminance(ground) > 0.9
    pixels = np.asarray(Image.open(BytesIO(tab.screenshot())).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 100
    assert luminance(as_hex(str(np.median(pixels, axis=0).astype(int)))) == pytest.approx(luminance(ground), abs=0.05)

    for _ in ("closed", "opened"):
        texts = tab.evaluate(READABLE)
        assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        outside = [t["text"] for t in texts if not t["isScrolled"] and (t["left"] < 0 or t["right"] > size[0])]
        assert not outside
        assert not [t for t in texts if t["size"] < 12 or t["height"] < 12]
        assert min(contrast(as_hex(t["color"]), ground) for t in texts) >= 4.5
        tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert len([t for t in texts if t["isDrawn"]]) > 40 and "Settings and environment" in {t["text"] for t in texts}
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth === 64)")

    context.close()
    assert not events and set(requests) <= {"file", "data"}
