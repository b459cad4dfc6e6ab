"""The page: upload a photo, paint over what should go, look at the results.

It listens to nobody but this machine unless told otherwise, and loads nothing from elsewhere.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from moebius_jax.demo.painter import PREVIEW, Painter, Wishes, strokes_of
from moebius_jax.errors import UserError

# Names of fonts, not gradio's Font objects, so that nothing is asked of Google.
_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "Consolas", "monospace")
_CSS = """
#editor, #photo { min-height: 320px; }
.gradio-container { max-width: 1100px !important; margin: auto; }
"""

HIDDEN, SHOWN = gr.update(visible=False), gr.update(visible=True)


def build(painter: Painter, *, title: str = "Moebius") -> gr.Blocks:
    """The page, not launched yet; `launch` does."""
    actions = Actions(painter)
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {title}\nUpload, drop or paste a photo, paint over what should go: **Inpaint**.")
        with gr.Row():
            with gr.Column():
                with gr.Column() as first:
                    photo = _photo(label="Photo", sources=["upload", "clipboard"], elem_id="photo")
                with gr.Column(visible=False) as then:
                    editor = _editor()
                    another = gr.Button("Another photo", size="sm", elem_id="another")
                settings = _settings(painter)
            with gr.Column():
                run = gr.Button("Inpaint", variant="primary", elem_id="run")
                status = gr.Markdown(elem_id="status")
                slider = gr.ImageSlider(
                    label="Before and after", type="filepath", format="png", visible=False, elem_id="slider"
                )
                gallery = gr.Gallery(
                    label="Results", format="png", columns=4, height=180, visible=False, elem_id="gallery"
                )
                download = gr.DownloadButton("Download at full size", visible=False, elem_id="download")
        paths = gr.State([])  # kept by the server: a visitor chooses by number, not by a path of his own

        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        shown = [slider, gallery, download, paths, status]
        photo.upload(actions.show, photo, [editor, first, then], **quiet)
        painting = run.click(actions.paint, [photo, editor, *settings], shown, api_name="inpaint")
        everything = [photo, editor, settings[0], first, then, *shown]
        another.click(actions.clear, None, everything, cancels=[painting], **quiet)
        gallery.select(actions.choose, [paths, photo], [slider, download], **quiet)
    return page.queue(default_concurrency_limit=1, max_size=20)


def _photo(**options: Any) -> gr.Image:
    """An image component that hands over the uploaded file as it is: `Painter` reads it.

    gradio makes a component anew where an action returns an update of its properties, and forgets this; so
    actions return values of photos and of the editor, and show and hide the columns they are in.
    """
    component = gr.Image(type="filepath", image_mode=None, **options)
    component.preprocess = lambda payload: None if payload is None else payload.path
    return component


def _editor() -> gr.ImageEditor:
    """What is painted on; it hands over its layers as files, unread."""
    component = gr.ImageEditor(
        label="Paint over what should go",
        type="numpy",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(colors=["#ff3366"], color_mode="fixed", default_size=40),
        eraser=gr.Eraser(default_size=40),
        canvas_size=(PREVIEW, PREVIEW),
        elem_id="editor",
    )

    def layers(payload: Any) -> list[bytes]:
        found = payload
        if payload is not None and payload.id is not None:  # sent beforehand, piece by piece
            found = component.blob_storage.pop(payload.id, None)
        kept = [layer for layer in (found.layers if found else None) or [] if layer is not None]
        return [layer if isinstance(layer, bytes) else Path(layer.path).read_bytes() for layer in kept]

    component.preprocess = layers
    return component


def _settings(painter: Painter) -> list[gr.components.Component]:
    """An uploaded mask, then controls in the order of `Wishes`."""
    default, usual = Wishes(), painter.pipeline.defaults
    steps, fewest = usual.num_inference_steps, math.ceil(1 / usual.strength)  # of which one is run
    with gr.Accordion("More", open=False):
        return [
            _photo(label="Mask (white = repaint), of the photo's size", sources=["upload"]),
            gr.Slider(
                0,
                10,
                usual.guidance_scale,
                step=0.1,
                label="Guidance",
                info="1 takes half the time",
            ),
            gr.Slider(fewest, max(100, steps), steps, step=1, label="Steps"),
            gr.Number(default.seed, precision=0, minimum=0, maximum=2**32 - 1, label="Seed"),
            gr.Slider(1, painter.max_results, default.results, step=1, label="Results to choose from"),
            gr.Slider(
                0,
                64,
                default.mask_dilation,
                step=1,
                label="Grow the mask (pixels)",
                info="an object leaves a ghost where the mask stops at its edge",
            ),
            gr.Slider(0, 32, default.mask_blur, step=0.5, label="Soft edge (pixels of the model's square)"),
            gr.Slider(
                0,
                0.95,
                usual.refine,
                step=0.05,
                label="Refine large holes",
                info="paint them again at the photo's own size, at this strength; 0 is faster, and softer",
            ),
        ]


class Actions:
    """What happens on the page."""

    def __init__(self, painter: Painter) -> None:
        self._painter = painter

    def show(self, path: str | None) -> list[Any]:
        """A photo has been uploaded: it takes its place as something to paint on."""
        if path is None:
            return [gr.skip()] * 3
        with _notices():
            preview = self._painter.preview(path)
        return [preview, HIDDEN, SHOWN]

    def clear(self) -> list[Any]:
        """Back to the beginning."""
        return [None, None, None, SHOWN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, [], ""]

    def paint(
        self,
        photo: str | None,
        editor: list[bytes] | None,
        mask: str | None,
        guidance_scale: float,
        steps: int,
        seed: int,
        results: int,
        mask_dilation: int,
        mask_blur: float,
        refine: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how gradio is told that a function reports)
    ) -> Iterator[list[Any]]:
        """Inpaints `photo` where the editor's layers or `mask` are white; yields the results so far."""
        if photo is None:
            raise _notice("upload a photo first")
        if None in (guidance_scale, steps, seed, results, mask_dilation, mask_blur, refine):
            raise _notice("a number is missing")
        wishes = Wishes(
            guidance_scale=guidance_scale,
            steps=int(steps),
            seed=int(seed),
            results=int(results),
            mask_dilation=int(mask_dilation),
            mask_blur=mask_blur,
            refine=refine,
        )
        progress(0, desc="reading the photo")
        with _notices():
            picture = self._painter.open(photo)
            marked = self._painter.mask(picture, strokes_of(editor or []), mask)
        painted: list[str] = []

        def on_step(done: int, total: int | None) -> None:
            which = (
                f"{'painting' if total else 'going on with'} result {len(painted) + 1} of {wishes.results}"
            )
            progress((done, total), desc=which, unit="steps")

        progress(0, desc="preparing (the first picture compiles the program)")
        with _notices():
            for path in self._painter.paint(picture, marked, wishes, on_step):
                # gradio's own folder, which `delete_cache` clears
                painted.append(save_file_to_cache(path, get_upload_folder()))
                yield [
                    gr.update(value=(picture.rgb, painted[-1]), visible=True),
                    gr.update(value=painted, visible=wishes.results > 1),
                    gr.update(value=painted[-1], visible=True),
                    painted,
                    f"{len(painted)} of {wishes.results} · {path.stem}",
                ]

    def choose(self, paths: list[str], photo: str, event: gr.SelectData) -> list[Any]:
        """One of several results: to compare and to download."""
        chosen = paths[event.index]
        before = self._painter.open(photo).rgb
        return [gr.update(value=(before, chosen)), gr.update(value=chosen)]


@contextlib.contextmanager
def _notices() -> Iterator[None]:
    """What a visitor can put right is a notice on the page."""
    try:
        yield
    except UserError as error:
        raise _notice(str(error)) from None


def _notice(text: str) -> gr.Error:
    return gr.Error(text, title="Cannot be done", duration=None, print_exception=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
    """Where the page is served.

    Attributes:
        host: 127.0.0.1 is this machine alone; 0.0.0.0 all networks it is in.
        port: None takes the first free one from 7860 on.
        max_megabytes: of an uploaded file.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    max_megabytes: float = 50.0


def launch(page: gr.Blocks, address: Address, **options: Any) -> Any:
    """Serves the page until it is interrupted; `options` are gradio's.

    Raises:
        UserError: the port is taken.
    """
    theme = gr.themes.Base(font=list(_SANS), font_mono=list(_MONO))
    try:
        return page.launch(
            server_name=address.host,
            server_port=address.port,
            max_file_size=int(address.max_megabytes * 1e6),
            theme=theme,
            css=_CSS,
            footer_links=["api"],
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            **options,
        )
    except OSError as error:
        raise UserError(f"{address.host}:{address.port or ''}: the page cannot be served ({error})") from None
