"""The page itself, in Gradio: four tabs around the functions of `zoo.cli.app`."""

from __future__ import annotations

import html
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read when gradio is imported

import gradio as gr

from zoo.cli.app import exploring, generating, plot
from zoo.cli.app.service import Answer, Restored, Service
from zoo.cli.classify import UNKNOWN
from zoo.cli.errors import code_for, code_of, with_code
from zoo.cli.inputs import one_line
from zoo.cli.output import FailureError, UsageError
from zoo.cli.restoring import TASKS

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["build", "serve"]

_CSS = """
.zoo table {border-collapse: collapse; width: 100%} .zoo td, .zoo th {padding: 6px 10px; vertical-align: top}
.zoo th {text-align: left; font-weight: 600} .zoo small {opacity: .7}
.zoo .bar {position: relative; height: 20px; margin: 2px 0; border-radius: 3px; overflow: hidden;
  background: var(--background-fill-secondary)}
.zoo .bar i {position: absolute; inset: 0 auto 0 0; background: var(--color-accent); opacity: .35}
.zoo .bar span {position: absolute; inset: 0 6px; display: flex; justify-content: space-between; font-size: 13px;
  line-height: 20px}
#card th, #card td {overflow-wrap: normal; word-break: normal}
.zoo-plot {width: 100%; font-size: 12px} .zoo-plot text {fill: var(--body-text-color)}
.zoo-plot .grid {stroke: var(--border-color-primary)}
.zoo-plot polyline {fill: none; stroke: var(--color-accent); stroke-width: 1.5; pointer-events: none}
.zoo-plot circle {cursor: pointer; stroke: var(--body-background-fill)} .zoo-plot .best {fill: var(--color-accent)}
.zoo-plot .other {fill: var(--body-text-color-subdued); opacity: .55} .zoo-plot circle:hover {opacity: 1; r: 8px}
"""
_SCALES = ["", "1.5", "2", "3", "4", "8"]
_BUDGETS = {"1GB": 1, "2GB": 2, "4GB": 4, "8GB": 8, "16GB": 16}


def build(service: Service, *, keep: int = 600) -> gr.Blocks:
    """Return the page.

    Args:
        service: Behind it.
        keep: Seconds after which files of visitors are deleted.
    """
    with gr.Blocks(analytics_enabled=False, title="zoo", delete_cache=(60, keep)) as page:
        gr.Markdown(
            "# zoo\nClassify, restore and generate pictures on this machine. What you upload stays here and is "
            f"deleted after {max(1, round(keep / 60))} minutes."
        )
        with gr.Tab("Classify"):
            _classify_tab(service)
        with gr.Tab("Restore"):
            _restore_tab(service)
        with gr.Tab("Generate"):
            _generate_tab(service)
        with gr.Tab("Explore"):
            _explore_tab(service)
    return page


def serve(
    service: Service,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    open_browser: bool = False,
    max_file_size: str = "64mb",
    max_queue: int = 32,
    keep: int = 600,
    tell: Callable[[str], object] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Serve the page until it is interrupted; then everything of visitors is deleted.

    Args:
        service: Behind it.
        host: Address to serve at.
        port: None is the first free one from 7860.
        share: Ask Gradio for a public address.
        open_browser: Open the page.
        max_file_size: Of an upload, like "64mb".
        max_queue: Requests that may wait.
        keep: Seconds after which files of visitors are deleted.
        tell: Called with the address.
        stop: Ends the serving when set.

    Raises:
        UsageError: The address cannot be served at, or the size is none.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(service.folder / "uploads")
    if port is not None:
        _require_free(host, port)
    page = build(service, keep=keep)
    page.queue(max_size=max_queue, default_concurrency_limit=1, api_open=False)
    stop = stop or threading.Event()
    try:
        try:
            _, local, public = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                inbrowser=open_browser,
                max_file_size=max_file_size.lower(),
                allowed_paths=[str(exploring.cards_dir().resolve())],
                show_error=True,
                quiet=True,
                prevent_thread_lock=True,
                css=_CSS,
                theme=gr.themes.Default(),
                footer_links=[],
                ssr_mode=False,
                enable_monitoring=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"The page cannot be served at {host}: {one_line(error)}") from error
        if share and not public:
            raise FailureError("Gradio gave no public address; without --share the page is local.")
        if tell is not None:
            tell(public or local)
        threading.Thread(target=service.warm, daemon=True).start()
        while not stop.wait(min(30, keep)):
            service.sweep(keep)
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)
        service.close()


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"{host}:{port} cannot be served at: {error.strerror}. Leave out --port.") from error


def _said(error: Exception) -> Exception:
    """Return what the page shows of an error: its line."""
    return gr.Error(
        html.escape(with_code(one_line(error), code_of(error))),
        duration=30,
        title="This did not work",
        print_exception=False,
    )


def _classify_tab(service: Service) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            files = gr.File(label="Pictures", file_count="multiple", height=160)
            models = gr.CheckboxGroup(
                list(service.offers.classifiers), value=list(service.offers.classifiers[:2]), label="Models"
            )
            gr.Markdown(
                "Of the shipped weights `.imagenette` know ten classes of photographs, `.cifar10` ten of small "
                "pictures. Below what they are sure of, the answer says that it is none that they know."
            )
            button = gr.Button("Classify", variant="primary")
        with gr.Column(scale=2):
            answers = gr.HTML("", elem_id="answers")

    def classify(files: list[str] | None, models: list[str], progress: Any = gr.Progress()) -> str:
        try:
            found, failed = service.classify(
                files, models, lambda done, total: progress((done, total), unit="pictures")
            )
        except Exception as error:
            raise _said(error) from error
        return answers_html(found, failed, models)

    button.click(classify, [files, models], answers, concurrency_id="work", api_visibility="undocumented")


def answers_html(found: Sequence[tuple[str, Sequence[Answer]]], failed: Sequence[str], models: Sequence[str]) -> str:
    """Return a table with a row a picture, a column a model, and a bar a class."""
    rows = []
    for name, answers in found:
        cells = "".join(f"<td>{_bars(answer)}</td>" for answer in answers)
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in models)
    table = f"<table><tr><th>picture</th>{head}</tr>{''.join(rows)}</table>" if rows else ""
    wrong = "".join(f"<p>⚠ {html.escape(with_code(line, code_for(line, 'pictures')))}</p>" for line in failed)
    return f'<div class="zoo">{table}{wrong}</div>'


def _bars(answer: Answer) -> str:
    bars = "".join(
        f'<div class="bar"><i style="width:{100 * entry["probability"]:.1f}%"></i>'
        f"<span><b>{html.escape(entry['label'])}</b><b>{100 * entry['probability']:.1f} %</b></span></div>"
        for entry in answer.top
    )
    if not answer.likely:
        bars = f"<b>{UNKNOWN}; perhaps</b>{bars}"
    return f"{bars}<small>{1000 * answer.seconds:.0f} ms, reading included</small>"


def _restore_tab(service: Service) -> None:
    tasks = [(f"{task}: {TASKS[task]}", task) for task in service.offers.tasks]
    with gr.Row():
        with gr.Column(scale=1):
            file = gr.File(label="Photo, of any format", file_count="single", height=160)
            task = gr.Dropdown(tasks, value="sr", label="What to mend")
            quality = gr.Radio(["fast", "balanced", "best"], value="fast", label="Quality")
            scale = gr.Dropdown([("usual", ""), *_SCALES[1:]], value="", label="Scale")
            budgets = _budgets()
            budget = gr.Dropdown(budgets, value="4GB" if "4GB" in budgets else budgets[-1], label="Memory budget")
            model = gr.Dropdown(
                [("chosen by task and quality", "auto"), *service.offers.restorers], value="auto", label="Model"
            )
            button = gr.Button("Restore", variant="primary")
        with gr.Column(scale=2):
            slider = gr.ImageSlider(label="before and after", type="filepath", interactive=False)
            said = gr.Markdown("", elem_id="restored")
            download = gr.DownloadButton("Download the result", interactive=False)

    def restore(
        file: str | None,
        task: str,
        quality: str,
        scale: str,
        budget: str,
        model: str,
        progress: Any = gr.Progress(),
    ) -> tuple[Any, str, Any]:
        try:
            done = service.restore(
                file,
                task=task,
                quality=quality,
                scale=scale,
                budget=budget,
                model=model,
                tell=lambda parts, total: progress((parts, total), desc="restoring", unit="parts"),
            )
        except Exception as error:
            raise _said(error) from error
        download = gr.DownloadButton(f"Download {done.file.name}", value=str(done.file), interactive=True)
        shown = tuple(_as_file(service, image) for image in (done.before, done.after))
        return shown, restored_text(done), download

    button.click(
        restore,
        [file, task, quality, scale, budget, model],
        [slider, said, download],
        concurrency_id="work",
        api_visibility="undocumented",
    )


def _budgets() -> list[str]:
    """Return the budgets that leave this machine some memory."""
    import psutil

    most = 0.7 * psutil.virtual_memory().total / 1e9
    return [name for name, size in _BUDGETS.items() if size <= most] or ["1GB"]


def restored_text(done: Restored) -> str:
    """Return what was done, as Markdown."""
    sizes = " → ".join(dict.fromkeys(f"{width}×{height}" for height, width in (done.size, done.output_size)))
    lines = [f"{sizes} pixels in {done.seconds:.2f} s by **{done.model}**, {done.method}"]
    if done.because:
        lines.append(f"Chosen because: {done.because}")
    return "\n\n".join(html.escape(line, quote=False) for line in (*lines, *done.notes))


def _generate_tab(service: Service) -> None:
    pipelines = list(service.offers.pipelines)
    names = generating.choices_of(service, pipelines[0]) if pipelines else []
    with gr.Row():
        with gr.Column(scale=1):
            model = gr.Dropdown(pipelines, value=pipelines[0] if pipelines else None, label="Pipeline")
            subject = gr.Dropdown(
                names, value=names[0] if names else "", label="Class or prompt", allow_custom_value=True
            )
            count = gr.Slider(1, service.limits.images, value=4, step=1, label="Pictures")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed")
            steps = gr.Slider(2, service.limits.steps, value=20, step=1, label="Steps")
            cache = gr.Dropdown(list(generating.CACHES), value="cg-taylor", label="Cache")
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2):
            said = gr.Markdown("", elem_id="generated")
            with gr.Row():
                plain = gr.Gallery(label="without a cache", columns=2, object_fit="contain", height=360)
                cached = gr.Gallery(label="with the cache", columns=2, object_fit="contain", height=360)
            gr.Markdown("Computed and skipped steps:")
            timeline = gr.Image(show_label=False, interactive=False, buttons=["download", "fullscreen"])

    def classes(model: str) -> Any:
        try:
            names = generating.choices_of(service, model)
        except Exception as error:
            raise _said(error) from error
        return gr.Dropdown(choices=names, value=names[0] if names else "")

    def generate(
        model: str,
        subject: str,
        count: float,
        seed: float,
        steps: float,
        cache: str,
        progress: Any = gr.Progress(),
    ) -> tuple[Any, Any, str | None, str]:
        try:
            made = generating.generate(
                service,
                model,
                subject,
                count=int(count),
                seed=int(seed or 0),
                steps=int(steps),
                cache=cache,
                tell=lambda done, total: progress((done, total), desc="generating", unit="steps"),
            )
        except Exception as error:
            raise _said(error) from error
        drawing = None if made.timeline is None else str(made.timeline)
        plain, cached = (_named(service, images, made.names) for images in (made.plain, made.cached))
        return plain, cached, drawing, generated_text(made)

    model.change(classes, model, subject, queue=False, api_visibility="private")
    button.click(
        generate,
        [model, subject, count, seed, steps, cache],
        [plain, cached, timeline, said],
        concurrency_id="work",
        api_visibility="undocumented",
    )


def _as_file(service: Service, image: Image) -> str:
    """Write a picture for the page.

    Gradio writes pictures in memory to one file for equal ones, anew each time, so that a visitor who is just reading
    it gets a part; files it copies once and under another name first.
    """
    file = Path(tempfile.mkdtemp(dir=service.folder)) / "image.png"
    image.save(file)
    return str(file)


def _named(service: Service, images: Sequence[Image], names: Sequence[str]) -> list[tuple[str, str]]:
    from PIL.Image import Resampling

    shown = []
    for image, name in zip(images, names, strict=False):
        zoom = max(1, 192 // max(image.size))  # pictures of 32 pixels are to be seen
        large = image.resize((image.width * zoom, image.height * zoom), Resampling.NEAREST)
        shown.append((_as_file(service, large), name))
    return shown


def generated_text(made: generating.Generated) -> str:
    """Return times and likeness, as Markdown."""
    lines = f"Without a cache: **{made.plain_seconds:.2f} s**"
    if made.seconds is None:
        return lines
    like = "the same pictures" if made.psnr is None else f"PSNR {made.psnr:.1f} dB to the pictures without it"
    return f"{lines}. With it: **{made.seconds:.2f} s**, {made.plain_seconds / made.seconds:.2f} times as fast, {like}."


def _explore_tab(service: Service) -> None:
    every = exploring.rows(service.offers)
    tasks = ["all", *dict.fromkeys(row.task for row in every)]
    with gr.Row():
        text = gr.Textbox(label="Search", placeholder="any words: denoise, apache, repavit ...", scale=3)
        task = gr.Dropdown(tasks, value="all", label="Task", scale=1)
    table = gr.Dataframe(
        [row.cells() for row in every],
        headers=list(exploring.HEADINGS),
        datatype=["str", "str", "number", "number", "str", "number", "str", "str"],
        interactive=False,
        max_height=420,
        elem_id="models",
        wrap=False,
    )
    _, conditions = exploring.measured()
    gr.Markdown(
        "Click a row or a point for its card."
        + (f" Times: {conditions}; `zoo bench NAME` measures yours." if conditions else "")
    )
    points = gr.HTML(plot.drawing(every), js_on_load=plot.CLICKED, elem_id="points", padding=True)
    gr.Markdown(
        "ImageNet-1k accuracy, the authors', against the measured time. No other is both as fast and as good "
        "as those on the line."
    )
    card = gr.Markdown("", elem_id="card")

    def find(text: str, task: str) -> list[list[Any]]:
        return [row.cells() for row in exploring.search(text or "", task, service.offers)]

    def show(event: gr.SelectData) -> str:
        try:
            return exploring.card_of(str(event.row_value[0]), service.offers)
        except Exception as error:
            raise _said(error) from error

    def show_point(event: gr.EventData) -> str:
        try:
            return exploring.card_of(str(event.model), service.offers)
        except Exception as error:
            raise _said(error) from error

    gr.on([text.change, task.change], find, [text, task], table, queue=False, api_visibility="private")
    table.select(show, None, card, queue=False, api_visibility="private")
    points.click(show_point, None, card, queue=False, api_visibility="private")
