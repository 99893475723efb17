"""The page: Gradio's components around the rest of this room, which knows nothing of it."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pra.demo import markup
from pra.demo.exhibit import Exhibit
from pra.demo.generation import EVERY_CLASS, MOST_GUIDANCE, MOST_PICTURES, MOST_STEPS, OWN_STEPS
from pra.demo.handlers import Handlers, Turn
from pra.demo.upload import MOST_BYTES
from pra.errors import PraError
from pra.utils.extras import import_failed

MOST_WAITING = 32
"""Requests in the queue, of which one is worked on at a time; the next visitor is told to try again."""

HOUR, DAY = 3600, 86400
"""Seconds: how often what visitors uploaded and made is looked through, and how old it gets."""

CSS = Path(__file__).with_name("page.css")

# On a phone the pictures lie below the controls.
TO_PICTURES = """(...values) => {
    const results = [...document.querySelectorAll('.results')].find((one) => one.offsetParent);
    if (window.innerWidth <= 700 && results) results.scrollIntoView({ behavior: 'smooth', block: 'start' });
    return values;
}"""


def gradio() -> Any:
    """The package, told to report to nobody.

    Raises:
        PraError: it cannot be imported.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise PraError(import_failed("the web demo", "gradio", "demo", error)) from None
    return gradio


def build_page(exhibits: Sequence[Exhibit]) -> Any:
    """The page of one model or two, as ``gradio.Blocks``."""
    gr = gradio()
    handlers = Handlers(exhibits)
    with gr.Blocks(analytics_enabled=False, title=_title(exhibits), fill_width=True, delete_cache=(HOUR, DAY)) as page:
        gr.HTML(markup.head(_title(exhibits), _subtitle(exhibits)), elem_id="title")
        kept = gr.State([], time_to_live=DAY)
        with gr.Tabs():
            with gr.Tab("Generate"):
                generating = _generate_tab(gr, handlers, kept)
            with gr.Tab("Complete"):
                completing = _complete_tab(gr, handlers, kept)
            with gr.Tab("Gallery", elem_classes="gallery-tab"):
                gallery = _gallery(gr, exhibits)
            with gr.Tab("About"):
                about = gr.HTML(elem_classes="about")
        for made in (generating, completing):
            made.then(lambda entries: entries, kept, gallery, show_progress="hidden", queue=False)
        page.load(handlers.about, None, about, show_progress="hidden")
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=4)


def launch_options() -> dict[str, Any]:
    """How the page is served, whatever its address: no share link, no server-side rendering, no foreign fonts."""
    gr = gradio()
    return {
        "theme": gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        "css": CSS.read_text(),
        "share": False,
        "ssr_mode": False,
        "footer_links": [],
        "max_file_size": MOST_BYTES,
        "quiet": True,
        "prevent_thread_lock": True,
    }


@dataclass(frozen=True)
class _Choices:
    """The controls that both tabs have, in the order of a handler's arguments."""

    label: Any
    seed: Any
    count: Any
    guidance: Any
    steps: Any

    def all(self) -> list[Any]:
        """In that order."""
        return [self.label, self.seed, self.count, self.guidance, self.steps]


def _generate_tab(gr: Any, handlers: Handlers, kept: Any) -> Any:
    """The event of a press of the button."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            choices = _choices(gr, handlers.exhibits, EVERY_CLASS, 10, "Pictures")
            press, stop = _buttons(gr, "Generate")
        with gr.Column(scale=5, min_width=300, elem_classes="results"):
            status, stage = _stage(gr)
    return _connect(gr, press, stop, handlers.generate, choices.all(), (stage, status, kept))


def _complete_tab(gr: Any, handlers: Handlers, kept: Any) -> Any:
    """The event of a press of the button."""
    model = handlers.exhibits[0].model
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            upload = gr.File(label="Your picture, of any size", height=160, elem_id="upload")
            rows = gr.Slider(
                0, model.config.grid[0], model.config.grid[0] // 2, step=1, label="Rows of patches to keep"
            )
            preview = gr.HTML(elem_classes="upload")
            choices = _choices(gr, handlers.exhibits, model.condition.null, 4, "Continuations")
            press, stop = _buttons(gr, "Complete")
        with gr.Column(scale=5, min_width=300, elem_classes="results"):
            status, stage = _stage(gr)
    for changed in (upload.change, rows.change):
        changed(handlers.preview, [upload, rows], preview, show_progress="hidden", trigger_mode="always_last")
    return _connect(gr, press, stop, handlers.complete, [upload, rows, *choices.all()], (stage, status, kept))


def _choices(gr: Any, exhibits: Sequence[Exhibit], label: int, count: int, counted: str) -> _Choices:
    model = exhibits[0].model
    classes = [(name, number) for number, name in enumerate(model.classes)]
    several = len(classes) > 1
    offered = [("each class in turn", EVERY_CLASS), *classes, ("no class", model.condition.null)]
    chosen = gr.Dropdown(offered, value=label if several else 0, label="Class", visible=several)
    with gr.Row():
        seed = gr.Number(0, label="Seed of the first", precision=0, min_width=120)
        dice = gr.Button("Another seed", size="sm", min_width=100, scale=0, elem_classes="dice")
    number = gr.Slider(1, MOST_PICTURES, count, step=1, label=counted)
    with gr.Accordion("How to sample", open=False):
        scale = min(model.sampling.guidance, MOST_GUIDANCE)
        guidance = gr.Slider(0, MOST_GUIDANCE, scale, step=0.1, label="Guidance (1 is none)")
        steps = gr.Slider(OWN_STEPS, MOST_STEPS, OWN_STEPS, step=1, label="Solver steps", info=_recommended(exhibits))
    dice.click(lambda: random.randrange(10**6), None, seed, show_progress="hidden", queue=False)
    return _Choices(chosen, seed, number, guidance, steps)


def _buttons(gr: Any, name: str) -> tuple[Any, Any]:
    with gr.Row():
        return gr.Button(name, variant="primary", min_width=120), gr.Button("Stop", min_width=80)


def _stage(gr: Any) -> tuple[Any, Any]:
    return gr.HTML(markup.say("The pictures appear here."), elem_classes="status"), gr.HTML(elem_classes="stage")


def _gallery(gr: Any, exhibits: Sequence[Exhibit]) -> Any:
    small = all(exhibit.model.config.image_size[0] <= markup.SMALL for exhibit in exhibits)
    gr.HTML(markup.say("What you have made, the newest first."))
    return gr.Gallery(
        show_label=False,
        format="png",
        columns=6,
        buttons=["download", "fullscreen"],  # and none that would share them
        object_fit="contain",
        interactive=False,
        elem_classes="small" if small else "",
    )


def _connect(gr: Any, press: Any, stop: Any, handler: Any, inputs: list[Any], outputs: tuple[Any, Any, Any]) -> Any:
    """One request at a time, of whichever visitor and tab: they share the models' device."""
    turn, number = gr.State(Turn()), gr.State(0)
    stop.click(Turn.next, turn, None, queue=False, show_progress="hidden")
    pressed = press.click(Turn.next, turn, number, queue=False, show_progress="hidden", js=TO_PICTURES)
    return pressed.then(
        handler,
        [*inputs, outputs[2], turn, number],
        list(outputs),
        show_progress="minimal",
        show_progress_on=outputs[1],
        concurrency_limit=1,
        concurrency_id="models",
    )


def _title(exhibits: Sequence[Exhibit]) -> str:
    return " and ".join(exhibit.name for exhibit in exhibits)


def _recommended(exhibits: Sequence[Exhibit]) -> str:
    """The steps that the models take unless a visitor says otherwise."""
    told = " and ".join(str(min(exhibit.model.sampling.steps, MOST_STEPS)) for exhibit in exhibits)
    return f"{OWN_STEPS}: what {'each' if len(exhibits) > 1 else 'the'} model recommends ({told})"


def _subtitle(exhibits: Sequence[Exhibit]) -> str:
    if len(exhibits) > 1:
        return "Two models side by side: the same classes, seeds and guidance for both."
    return "Pictures generated by one model, row by row."
