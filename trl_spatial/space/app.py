"""
A page that ranks images by how well they match the spatial relations in a prompt.

`python app.py` runs it. `MODEL_ID` below is the model that scores; an environment variable of that name takes precedence.
"""

import html
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch

from trl_spatial import SpatialScore
from trl_spatial.gaussian_reward.losses import preference_probability


MODEL_ID = "ORG/SpatialScore-7B"
TITLE = "SpatialScore"

MAX_IMAGES = 32
MAX_PROMPT_LENGTH = 2000
MAX_FILE_SIZE = "20mb"
MAX_WAITING = 16
KEEP_UPLOADS = 3600  # seconds
IMAGE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"]

INTRODUCTION = """
# {title}

Which image matches the prompt best? Write a prompt that says where things are, add images made from it, and press Score.
Model: {model}
"""
EXPLANATION = """
**Higher is better.** The mean says how well the positions of the objects match the prompt. The standard
deviation (±) is the spread that the model learned from its training pairs: it does not warn of images or prompts that are
unlike those. P(better than next) is the model's probability that an image is preferred to the one ranked below it.
Scores compare images of the same prompt, not images of different prompts. Left and right are the
viewer's: left is the left side of the image.
"""
HEADERS = ["Rank", "Image", "Mean", "Std", "P(better than next)"]

PLACEHOLDER = '<p class="placeholder">Nothing has been scored yet.</p>'
PANEL: dict[str, Any] = dict(show_label=True, container=True, apply_default_css=False)

THEME = gr.themes.Default(
    primary_hue="blue",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
).set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
CSS = """
#gallery .grid-wrap { min-height: 0; max-height: none; }
#gallery .grid-container { padding-top: 28px; }
#gallery [data-testid="status-tracker"]:has(.error) { display: none; }

.placeholder, .scores, .ranking { font-size: 14px; line-height: 20px; font-variant-numeric: tabular-nums; }
.placeholder, .scores { margin: 28px 4px 4px; }
.placeholder, .scores .tick { color: var(--block-label-text-color); }

.scores { display: grid; gap: 6px; }
.scores .row { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 2fr); gap: 12px; align-items: center; }
.scores .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.scores .track { position: relative; height: 20px; }
.scores .track > * { position: absolute; }
.scores .line { top: -3px; bottom: -3px; border-left: 1px solid var(--border-color-primary); }
.scores .bar { top: 7px; height: 6px; border-radius: 3px; background: var(--color-accent); opacity: 0.35; }
.scores .dot { top: 4px; width: 12px; height: 12px; margin-left: -6px; border-radius: 50%; background: var(--color-accent); }
.scores .tick { transform: translateX(-50%); }

.ranking { margin-top: 24px; width: 100%; table-layout: fixed; border-collapse: collapse; }
.ranking :is(th, td) { width: 64px; padding: 6px 4px; text-align: right; }
.ranking :is(th, td):nth-child(1) { width: 52px; }
.ranking :is(th, td):nth-child(2) { width: auto; padding-left: 12px; text-align: left; overflow-wrap: anywhere; }
.ranking :is(th, td):nth-child(5) { width: 88px; }
.ranking th { vertical-align: bottom; font-weight: 600; }
.ranking td { border-top: 1px solid var(--border-color-primary); }

@media (max-width: 640px) {
  #gallery .grid-container { --grid-cols: 2 !important; }
  .ranking { font-size: 13px; }
  .ranking :is(th, td) { width: 48px; padding: 6px 2px; }
  .ranking :is(th, td):nth-child(1) { width: 38px; }
  .ranking :is(th, td):nth-child(5) { width: 72px; }
}
"""
# On a phone the result is below the form.
SHOW_RESULT = "() => document.getElementById('gallery').scrollIntoView({behavior: 'smooth', block: 'nearest'})"


class RankedImage(NamedTuple):
    """
    The file of an image, mean and standard deviation of its score, and the probability that it is preferred to the next image
    (`None` for the last one).
    """

    path: str
    mean: float
    std: float
    probability: float | None

    @property
    def name(self) -> str:
        return Path(self.path).name


def check_inputs(prompt: str, paths: list[str]) -> None:
    """Raises a `gr.Error` if the prompt is empty or too long, or there are no images or too many."""
    problem = None
    if not prompt.strip():
        problem = "The prompt is empty: write the text that the images should show."
    elif len(prompt) > MAX_PROMPT_LENGTH:
        problem = f"The prompt has {len(prompt)} characters: shorten it to {MAX_PROMPT_LENGTH}."
    elif not paths:
        problem = "There are no images: add at least one."
    elif len(paths) > MAX_IMAGES:
        problem = f"{len(paths)} images are too many: add at most {MAX_IMAGES} at a time."
    if problem:
        raise gr.Error(problem, print_exception=False)


def rank_images(scorer: SpatialScore, prompt: str, paths: list[str]) -> list[RankedImage]:
    """Scores images, given by their files, for one prompt; returns them best first. A `gr.Error` names the file that cannot be read."""
    try:
        scores = scorer.score([prompt] * len(paths), paths)
    except ValueError as error:
        raise gr.Error(name_files(str(error), paths), print_exception=False) from error
    mean, std = torch.from_numpy(scores.mean), torch.from_numpy(scores.std)
    order = mean.argsort(descending=True, stable=True)
    mean, std = mean[order], std[order]
    log_std = std.log()
    probability = preference_probability(mean[:-1], log_std[:-1], mean[1:], log_std[1:])
    columns = [paths[i] for i in order], mean.tolist(), std.tolist(), [*probability.tolist(), None]
    return [RankedImage(*row) for row in zip(*columns, strict=True)]


def name_files(message: str, paths: list[str]) -> str:
    """HTML of an error of [`SpatialScore.score`], with file names in place of row numbers and paths."""
    message = re.sub(r"images\[(\d+)\]", lambda match: paths[int(match[1])], message)
    for path in paths:
        message = message.replace(path, Path(path).name)
    return html.escape(message)


def draw_scores(ranked: list[RankedImage]) -> str:
    """HTML: the mean of each score as a dot on a bar of one standard deviation to each side. The images come best first."""
    low = min(image.mean - image.std for image in ranked)
    high = max(image.mean + image.std for image in ranked)
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(value: float) -> str:
        return f"left: {100 * (value - low) / (high - low):.2f}%"

    ticks = round_numbers(low, high)
    lines = "".join(f'<span class="line" style="{place(tick)}"></span>' for tick in ticks)
    rows = []
    for rank, image in enumerate(ranked, start=1):
        width = f"width: {200 * image.std / (high - low):.2f}%"
        rows.append(
            f'<div class="row"><span class="name">{rank}. {html.escape(image.name)}</span><span class="track">{lines}'
            f'<span class="bar" style="{place(image.mean - image.std)}; {width}"></span>'
            f'<span class="dot" style="{place(image.mean)}"></span></span></div>'
        )
    axis = "".join(f'<span class="tick" style="{place(tick)}">{tick:g}</span>' for tick in ticks)
    rows.append(f'<div class="row"><span></span><span class="track">{axis}</span></div>')
    label = "Chart of the scores: a dot at each mean, a bar of one standard deviation to each side"
    return f'<div class="scores" role="img" aria-label="{label}">{"".join(rows)}</div>'


def round_numbers(low: float, high: float) -> list[float]:
    """Two to six round numbers between `low` and `high`, for the ticks of an axis."""
    power = 10 ** math.floor(math.log10(high - low))
    step = power * next(factor for factor in (0.2, 0.5, 1, 2, 5) if high - low <= 5 * factor * power)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tabulate_scores(ranked: list[RankedImage]) -> str:
    """HTML: the scores as a table. The images come best first."""
    rows = []
    for rank, image in enumerate(ranked, start=1):
        probability = "–" if image.probability is None else f"{image.probability:.1%}"
        cells = [str(rank), html.escape(image.name), f"{image.mean:.3f}", f"{image.std:.3f}", probability]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(f'<th scope="col">{name}</th>' for name in HEADERS)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table class="ranking" aria-label="Scores"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def describe_model(model: str) -> str:
    """Markdown: a link to a model on the Hub, or the name of a local folder."""
    if Path(model).exists():
        return f"`{Path(model).resolve().name}`"
    return f"[{model}](https://huggingface.co/{model.partition('@')[0]})"


def build_app(model: str) -> gr.Blocks:
    """Loads the model, a Hub id or a local folder, and builds the page. Raises `ValueError` if it cannot be loaded."""
    scorer = SpatialScore.from_pretrained(model)

    def score(prompt: str, files: list[str] | None) -> tuple[list[tuple[str, str]], str, str]:
        paths = [str(file) for file in files or []]
        check_inputs(prompt, paths)
        ranked = rank_images(scorer, prompt.strip(), paths)
        captions = [f"{rank}. {image.mean:.2f} ± {image.std:.2f}" for rank, image in enumerate(ranked, start=1)]
        shown = [(image.path, caption) for image, caption in zip(ranked, captions, strict=True)]
        return shown, draw_scores(ranked), tabulate_scores(ranked)

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEEP_UPLOADS, KEEP_UPLOADS)) as app:
        gr.Markdown(INTRODUCTION.format(title=TITLE, model=describe_model(model)))
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder="a red cup to the left of a blue book, and a lamp behind the book",
                    lines=3,
                    max_lines=8,
                    max_length=MAX_PROMPT_LENGTH,
                )
                files = gr.File(
                    label=f"Images, up to {MAX_IMAGES}",
                    file_count="multiple",
                    file_types=IMAGE_TYPES,
                    height=220,
                )
                button = gr.Button("Score", variant="primary")
                gr.Markdown(EXPLANATION)
            with gr.Column(scale=3):
                gallery = gr.Gallery(
                    label="Best first",
                    elem_id="gallery",
                    columns=3,
                    object_fit="contain",
                    height="auto",
                    interactive=False,
                    buttons=["fullscreen"],
                )
                chart = gr.HTML(PLACEHOLDER, label="Mean ± one standard deviation", **PANEL)
                table = gr.HTML(PLACEHOLDER, label="Scores", **PANEL)
        scored = gr.on(
            [button.click, prompt.submit],
            score,
            inputs=[prompt, files],
            outputs=[gallery, chart, table],
            show_progress_on=gallery,
            concurrency_limit=1,
            trigger_mode="once",
            api_name="score",
        )
        scored.success(None, js=SHOW_RESULT)
    return app


if __name__ == "__main__":
    app = build_app(os.environ.get("MODEL_ID") or MODEL_ID)
    app.queue(max_size=MAX_WAITING).launch(
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        max_file_size=MAX_FILE_SIZE,
        theme=THEME,
        css=CSS,
    )
