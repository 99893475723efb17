"""The page: Gradio's components around :mod:`.handlers`."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pra.demo.exhibit import Exhibit, chooser
from pra.demo.generation import EVERY_CLASS, LONGEST_CAPTION, MOST_GUIDANCE, MOST_PICTURES, MOST_STEPS, OWN_STEPS
from pra.demo.handlers import SMALL, Handlers, Turn, html
from pra.demo.upload import MOST_BYTES
from pra.errors import PraError, one_line
from pra.utils.extras import import_failed

MOST_WAITING = 32
"""Requests in the queue; the next visitor is told to try again."""
MOST_LISTED = 1000
"""Most classes in the list; others are typed, since a browser takes seconds for long lists."""
MOST_EXAMPLES, SHOWN_EXAMPLE = 5, 60
"""Examples of captions, and letters of one."""
HOUR, DAY = 3600, 86400
"""Seconds between two clean-ups of visitors' files, and the age at which files are deleted."""

# On a phone the pictures lie below the controls.
TO_PICTURES = """(...values) => {
    const results = [...document.querySelectorAll('.results')].find((one) => one.offsetParent);
    if (window.innerWidth <= 700 && results) results.scrollIntoView({ behavior: 'smooth', block: 'start' });
    return values;
}"""


def gradio() -> Any:
    """Import Gradio without its telemetry."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise PraError(import_failed("the web demo", "gradio", "demo", error), code="not-installed") from None
    return gradio


def build_page(exhibits: Sequence[Exhibit]) -> Any:
    """Return the page of one model or two, as ``gradio.Blocks``."""
    gr = gradio()
    handlers = Handlers(exhibits)
    title, line = " and ".join(exhibit.name for exhibit in exhibits), "One model generates pictures, row by row."
    small = all(exhibit.model.config.image_size[0] <= SMALL for exhibit in exhibits)
    if len(exhibits) > 1:
        asked = "captions, classes" if any(exhibit.reads_captions for exhibit in exhibits) else "classes"
        line = f"Two models side by side, with the same {asked}, seeds and guidance."
    with gr.Blocks(analytics_enabled=False, title=title, fill_width=True, delete_cache=(HOUR, DAY)) as page:
        gr.HTML(html("head", title, line), elem_id="title")
        kept = gr.State([], time_to_live=DAY)
        with gr.Tabs():
            with gr.Tab("Generate"):
                generating = _tab(gr, handlers, kept, "Generate")
            with gr.Tab("Complete"):
                completing = _tab(gr, handlers, kept, "Complete")
            with gr.Tab("Gallery", elem_classes="gallery-tab"):
                gr.HTML(html("words", "Your pictures, the newest first."))
                gallery = gr.Gallery(
                    show_label=False,
                    format="png",
                    columns=6,
                    buttons=["download", "fullscreen"],  # and no folder that shares them
                    object_fit="contain",
                    interactive=False,
                    elem_classes="small" if small else "",
                )
            with gr.Tab("About"):
                about = gr.HTML(elem_classes="about")
        for made in (generating, completing):
            made.then(lambda entries: entries, kept, gallery, show_progress="hidden", queue=False)
        page.load(handlers.about, None, about, show_progress="hidden")
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=4)


def launch_options() -> dict[str, Any]:
    """Return Gradio's options: no share link, no server-side rendering, no foreign fonts."""
    gr = gradio()
    return {
        "theme": gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        "css": Path(__file__).with_name("page.css").read_text(),
        "share": False,
        "ssr_mode": False,
        "footer_links": [],
        "max_file_size": MOST_BYTES,
        "quiet": True,
        "prevent_thread_lock": True,
    }


def _tab(gr: Any, handlers: Handlers, kept: Any, name: str) -> Any:
    """Build a tab, and return the event of a press of its button."""
    exhibits, completes = handlers.exhibits, name == "Complete"
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            upload = _upload(gr, handlers) if completes else [gr.State(None), gr.State(None)]
            known = chooser(exhibits)
            label, count = (known.model.condition.null, 4) if completes else (EVERY_CLASS, 10)
            if known.reads_captions:
                label = known.model.condition.null
            caption = _caption(gr, exhibits)
            choices = _choices(gr, exhibits, label, count, "Continuations" if completes else "Pictures")
            tier = _tier(gr, exhibits)
            with gr.Row():
                press = gr.Button(name, variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=5, min_width=300, elem_classes="results"):
            status = gr.HTML(html("words", "Pictures appear here."), elem_classes="status")
            stage = gr.HTML(elem_classes="stage")
    return _connect(gr, press, stop, handlers.make, [*upload, *choices, caption, tier], (stage, status, kept))


def _upload(gr: Any, handlers: Handlers) -> list[Any]:
    config = handlers.exhibits[0].model.config
    rows, step = config.grid[0], config.group[0]
    inputs = [
        gr.File(label="Your picture, of any size", height=160, elem_id="upload"),
        gr.Slider(0, rows, rows // 2 // step * step, step=step, label="Rows of patches to keep"),
    ]
    preview = gr.HTML(elem_classes="upload")
    for changed in inputs:
        changed.change(handlers.preview, inputs, preview, show_progress="hidden", trigger_mode="always_last")
    return inputs


def _caption(gr: Any, exhibits: Sequence[Exhibit]) -> Any:
    """Return a text box with examples that fill it, or an empty state for models that do not read captions."""
    readers = [exhibit for exhibit in exhibits if exhibit.reads_captions]
    if not readers:
        return gr.State("")
    box = gr.Textbox(
        label="Caption",
        info=f"Read by {readers[0].name}" if len(readers) < len(exhibits) else None,
        placeholder="What to draw",
        max_lines=6,
        max_length=LONGEST_CAPTION,
    )
    examples = list(dict.fromkeys(text for exhibit in readers for text in exhibit.model.captions))[:MOST_EXAMPLES]
    if examples:
        labels = [one_line(text, SHOWN_EXAMPLE) for text in examples]
        gr.Examples([[text] for text in examples], box, example_labels=labels, examples_per_page=MOST_EXAMPLES)
    return box


def _tier(gr: Any, exhibits: Sequence[Exhibit]) -> Any:
    """Return a choice of measured settings; of models without them, an empty state."""
    names = list(dict.fromkeys(tier.name for exhibit in exhibits for tier in exhibit.tiers))
    if not names:
        return gr.State("")
    choices = [("the settings above", ""), *((name, name) for name in reversed(names))]
    return gr.Radio(
        choices, value="", label="Quality and time", info="Measured on this model: FID against seconds per image"
    )


def _choices(gr: Any, exhibits: Sequence[Exhibit], label: int, count: int, counted: str) -> list[Any]:
    """Return the controls of both tabs, in the order of a handler's arguments."""
    model = chooser(exhibits).model
    every = len(model.classes)
    classes = [(one_line(name), number) for number, name in enumerate(model.classes[:MOST_LISTED])]
    several, more = every > 1, every > MOST_LISTED
    offered = [("each class in turn", EVERY_CLASS), *classes, ("no class", model.condition.null)]
    chosen = gr.Dropdown(
        offered,
        value=label if several else 0,
        label="Class",
        info=f"The first {MOST_LISTED:,} of {every:,}; type the name or the number of any other" if more else None,
        allow_custom_value=more,
        visible=several,
    )
    with gr.Row():
        seed = gr.Number(0, label="First seed", precision=0, min_width=120)
        dice = gr.Button("New seed", size="sm", min_width=100, scale=0, elem_classes="dice")
    number = gr.Slider(1, MOST_PICTURES, count, step=1, label=counted)
    own = " and ".join(str(min(exhibit.model.sampling.steps, MOST_STEPS)) for exhibit in exhibits)
    told = f"{OWN_STEPS}: {'each' if len(exhibits) > 1 else 'the'} model's own ({own})"
    with gr.Accordion("Sampling settings", open=False):
        scale = min(model.sampling.guidance, MOST_GUIDANCE)
        guidance = gr.Slider(0, MOST_GUIDANCE, scale, step=0.1, label="Guidance scale (1: no guidance)")
        steps = gr.Slider(OWN_STEPS, MOST_STEPS, OWN_STEPS, step=1, label="Solver steps", info=told)
    dice.click(lambda: random.randrange(10**6), None, seed, show_progress="hidden", queue=False)
    return [chosen, seed, number, guidance, steps]


def _connect(gr: Any, press: Any, stop: Any, handler: Any, inputs: list[Any], outputs: tuple[Any, Any, Any]) -> Any:
    """Let a press start the handler; one at a time for all visitors and tabs, which share the models' device."""
    turn, number = gr.State(Turn()), gr.State(0)
    stop.click(Turn.next, turn, None, queue=False, show_progress="hidden")
    pressed = press.click(Turn.next, turn, number, queue=False, show_progress="hidden", js=TO_PICTURES)
    return pressed.then(
        handler,
        [outputs[2], turn, number, *inputs],
        list(outputs),
        show_progress="minimal",
        show_progress_on=outputs[1],
        concurrency_limit=1,
        concurrency_id="models",
    )
