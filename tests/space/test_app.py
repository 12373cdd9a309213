"""The page that scores images, in parts and in a browser."""

import html
import re

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from trl_spatial.gaussian_reward.losses import preference_probability
from trl_spatial.space import app


PROMPT = "a red cube to the left of a blue sphere"


@pytest.fixture(scope="module")
def expected(scorer, image_paths):
    """Rows of the table: rank, name, mean, std, P(better than next), as [`SpatialScore.score`] has it."""
    mean, std = scorer.score([PROMPT] * len(image_paths), image_paths)
    order = np.argsort(-mean)
    assert order.tolist() != sorted(order) and np.diff(mean[order]).max() < -1e-3
    rows = []
    for rank, index in enumerate(order):
        chance = "–"
        if rank + 1 < len(order):
            pair = [torch.tensor([float(v)]) for i in order[rank : rank + 2] for v in (mean[i], np.log(std[i]))]
            chance = f"{preference_probability(*pair).item():.1%}"
        rows.append([str(rank + 1), image_paths[index].name, f"{mean[index]:.3f}", f"{std[index]:.3f}", chance])
    return rows


def cells(text):
    """The body of a table in HTML, as text."""
    return [
        [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", text)[1:]
    ]


# ---------------------------------------------------------------- parts


def test_the_ranking_is_that_of_the_scores(scorer, image_paths, expected):
    ranked = app.rank_images(scorer, PROMPT, [str(path) for path in image_paths])
    assert cells(app.tabulate_scores(ranked)) == expected


def test_one_image_is_ranked_alone(scorer, image_paths):
    (image,) = app.rank_images(scorer, PROMPT, [str(image_paths[0])])
    assert image.probability is None and image.std > 0
    assert app.draw_scores([image]).count('class="dot"') == 1


def test_the_chart_shows_the_numbers():
    """Oracle: an axis through the ticks gives back means and standard deviations."""
    ranked = [
        app.RankedImage("/x/a.png", 2.5, 0.5, 0.9),
        app.RankedImage("/x/b.png", 1.0, 0.25, 0.9),
        app.RankedImage("/x/c.png", -3.0, 1.5, None),
    ]
    text = app.draw_scores(ranked)
    ticks = np.array(re.findall(r'class="tick" style="left: (\S+)%">([^<]+)<', text), float)
    slope, intercept = np.polyfit(*ticks.T, 1)
    dots = np.array(re.findall(r'class="dot" style="left: (\S+)%"', text), float)
    np.testing.assert_allclose(slope * dots + intercept, [2.5, 1.0, -3.0], atol=2e-3)
    bars = np.array(re.findall(r'class="bar" style="left: (\S+)%; width: (\S+)%"', text), float)
    np.testing.assert_allclose(slope * bars[:, 0] + intercept, [2.0, 0.75, -4.5], atol=2e-3)
    np.testing.assert_allclose(slope * bars[:, 1], [1.0, 0.5, 3.0], atol=2e-3)
    assert bars[:, 0].min() >= 0 and bars.sum(1).max() <= 100


@pytest.mark.parametrize("center", [0.0, -7.3, 1e4])
@pytest.mark.parametrize("span", [1.0, 1.001, 2.5, 3.7, 9.99, 10.0, 0.004, 2e5])
def test_an_axis_has_a_few_round_ticks(center, span):
    low, high = center - span / 2, center + span / 2
    ticks = app.round_numbers(low, high)
    assert 2 <= len(ticks) <= 6 and low <= ticks[0] + 1e-9 * abs(center) and ticks[-1] <= high + 1e-9 * abs(center)
    step = ticks[1] - ticks[0]
    assert np.allclose(np.diff(ticks), step) and f"{step:.0e}"[0] in "125"


def test_images_without_any_spread_are_drawn():
    assert "left: 50.00%" in app.draw_scores([app.RankedImage("a.png", 1.0, 0.0, None)])


def test_names_are_text():
    hostile = "<img src=x onerror=alert(1)>&\"'${7*7}.png"
    for text in (app.draw_scores, app.tabulate_scores):
        drawn = text([app.RankedImage(f"folder/{hostile}", 1.0, 1.0, None)])
        assert "<img" not in drawn and "&lt;img src=x onerror=alert(1)&gt;&amp;&quot;&#x27;" in drawn
    assert app.name_files(f"images[0] is /a/{hostile}", [f"/a/{hostile}"]).count("&lt;img") == 2


@pytest.mark.parametrize(
    ("prompt", "num_images", "message"),
    [
        ("", 1, "prompt is empty"),
        (" \n", 1, "prompt is empty"),
        ("x" * 2001, 1, "2001 characters: shorten it to 2000"),
        ("x", 0, "no images"),
        ("x", 33, "33 images are too many: add at most 32"),
    ],
)
def test_what_cannot_be_scored_is_said(prompt, num_images, message):
    with pytest.raises(gr.Error, match=message):
        app.check_inputs(prompt, ["a.png"] * num_images)
    app.check_inputs("x" * 2000, ["a.png"] * 32)


def test_an_image_that_cannot_be_read_is_named(scorer, image_paths, damaged_path, tmp_path):
    narrow, text = tmp_path / "narrow.png", tmp_path / "text.png"
    Image.new("RGB", (1000, 2)).save(narrow)
    text.write_text("no image")
    for path, problem in ((damaged_path, "cannot be decoded"), (narrow, "too narrow"), (text, "cannot be opened")):
        with pytest.raises(gr.Error) as error:
            app.rank_images(scorer, PROMPT, [*map(str, image_paths), str(path)])
        assert error.value.message.startswith(html.escape(path.name)) and problem in error.value.message
        assert str(path.parent) not in error.value.message


def test_the_page_does_not_show_where_a_model_lies(checkpoint):
    assert app.describe_model(str(checkpoint)) == "`tiny-reward`"
    assert app.describe_model("org/model@v1") == "[org/model@v1](https://huggingface.co/org/model)"


# ---------------------------------------------------------------- in a browser


KEEP_MESSAGES = """
window.messages = [];
new MutationObserver(() => {
  for (const toast of document.querySelectorAll(".toast-body")) messages.push(toast.innerText);
}).observe(document, { childList: true, subtree: true, characterData: true });
"""


@pytest.fixture
def open_page(browser):
    """A function that opens a page, and what it asked of whom and complained about."""
    contexts = []

    def open_url(url, width=1280, height=900):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        context.set_default_timeout(120_000)
        tab, requests, errors = context.new_page(), [], []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.add_init_script(KEEP_MESSAGES)
        tab.goto(url)
        tab.get_by_label("Prompt").wait_for()
        return tab, requests, errors

    yield open_url
    for context in contexts:
        context.close()


def fill_in(tab, prompt, paths):
    tab.get_by_label("Prompt").fill(prompt)
    tab.locator("input[type=file]").set_input_files(paths)
    tab.locator(".file-preview tr").nth(len(paths) - 1).wait_for()


def press_score(tab):
    tab.get_by_role("button", name="Score", exact=True).click()


def wait_for_message(tab, text):
    """Of an error, which the page shows for some seconds only: the whole text."""
    return tab.wait_for_function("part => messages.find((text) => text.includes(part))", arg=text).json_value()


def read_table(tab):
    rows = tab.get_by_role("table", name="Scores").get_by_role("row").all()
    return [row.get_by_role("cell").all_inner_texts() for row in rows[1:]]


def stays_here(requests, url):
    return all(request.startswith((url, "data:", "blob:")) for request in requests)


@pytest.mark.parametrize("size", [(390, 800), (1280, 900)], ids=["phone", "desktop"])
def test_the_served_page_ranks_images(served, open_page, expected, image_paths, size):
    url, proxy = served
    tab, requests, errors = open_page(url, *size)
    fill_in(tab, PROMPT, image_paths)
    press_score(tab)
    tab.get_by_role("table", name="Scores").wait_for()
    assert read_table(tab) == expected

    captions = [f"{rank}. {float(mean):.2f} ± {float(std):.2f}" for rank, _, mean, std, _ in expected]
    shown = tab.get_by_role("button", name="Thumbnail")
    shown.nth(len(expected) - 1).wait_for()
    assert [text.strip() for text in shown.all_inner_texts()] == captions
    tab.wait_for_function("[...document.querySelectorAll('#gallery img')].every(i => i.complete && i.naturalWidth)")
    sizes = tab.evaluate("[...document.querySelectorAll('#gallery img')].map(i => [i.naturalWidth, i.naturalHeight])")
    by_name = {path.name: Image.open(path).size for path in image_paths}
    assert [tuple(size) for size in sizes] == [by_name[name] for _, name, *_ in expected]

    chart = tab.get_by_role("img", name="Chart of the scores")
    assert [text.strip() for text in chart.locator(".row .name").all_inner_texts()] == [
        f"{rank}. {name}" for rank, name, *_ in expected
    ]
    assert tab.get_by_role("heading", level=1).inner_text() == "SpatialScore"
    body = tab.locator("body").inner_text()
    assert "tiny-reward" in body and "Higher is better" in body and "viewer's" in body
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert not errors and stays_here(requests, url) and proxy.requests == []


def test_the_served_page_says_what_is_wrong(served, open_page, expected, image_paths, damaged_path):
    url, proxy = served
    tab, requests, errors = open_page(url)
    press_score(tab)
    wait_for_message(tab, "The prompt is empty: write the text")
    tab.get_by_label("Prompt").fill(PROMPT)
    press_score(tab)
    wait_for_message(tab, "There are no images: add at least one.")
    fill_in(tab, PROMPT, [image_paths[0], damaged_path])
    press_score(tab)
    message = wait_for_message(tab, "torn's.png cannot be decoded")
    assert "/" not in message and "&" not in message
    assert tab.get_by_role("table", name="Scores").count() == 0
    tab.get_by_role("button", name="Clear").click()
    fill_in(tab, PROMPT, image_paths)  # and it goes on
    press_score(tab)
    tab.get_by_role("table", name="Scores").wait_for()
    assert read_table(tab) == expected
    assert not errors and stays_here(requests, url) and proxy.requests == []


def test_the_app_of_a_built_space_runs(built, open_page, expected, image_paths):
    url, proxy = built
    tab, requests, errors = open_page(url)
    assert tab.title() == tab.get_by_role("heading", level=1).inner_text() == "Which image?"
    fill_in(tab, PROMPT, image_paths)
    press_score(tab)
    tab.get_by_role("table", name="Scores").wait_for()
    assert read_table(tab) == expected
    assert not errors and stays_here(requests, url) and proxy.requests == []
