"""The demo's results as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zoo.bench.caching import PSNR, RECOGNISED
from zoo.bench.report import Entry
from zoo.demo.page import Point, bars, before_after, page, picture, scatter, table, text
from zoo.demo.parts import ClassifiedPhoto, Generation, Merge, Upscaling

__all__ = ["Results", "headline", "render"]


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that the page shows.

    Args:
        generation: Samples and caches.
        upscalings: Photos, enlarged; those that were compressed before come in a section of their own.
        merge: A merged ViT.
        classified: Classified photos.
        denoiser: Name of the denoiser's weights.
        classifier: Name of the classifier's weights.
        environment: Processor and versions.
        threads: CPU threads of torch.
        date: When it was made.
        seconds: Time of all parts.
    """

    generation: Generation
    upscalings: Sequence[Upscaling]
    merge: Merge
    classified: Sequence[ClassifiedPhoto]
    denoiser: str
    classifier: str
    environment: Mapping[str, str]
    threads: int
    date: str
    seconds: float


def _speed(entry: Entry) -> float:
    return entry.speedup.median if entry.speedup is not None else 1.0


def _seconds(entry: Entry) -> str:
    milliseconds = entry.time.median if entry.time is not None else float("nan")
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.0f} ms"


def _decibels(value: float | None) -> str:
    return "-" if value is None else "equal" if np.isinf(value) else f"{value:.1f} dB"


def _gain(results: Results, scale: int) -> float:
    gains = [found.psnr[1] - found.psnr[0] for found in results.upscalings if found.scale == scale and not found.jpeg]
    return sum(gains) / len(gains)


def headline(results: Results) -> list[tuple[str, str]]:
    """Return the key numbers: (value, what it is)."""
    generation, merge = results.generation, results.merge
    scales = sorted({found.scale for found in results.upscalings if not found.jpeg})
    gains = " / ".join(f"{_gain(results, scale):+.2f}" for scale in scales) + " dB"
    count = len(generation.labels)
    return [
        (
            f"{_speed(generation.cache):.2f}x",
            f"as fast: {count} pictures with {generation.cache.name}, {_decibels(generation.cache.values[PSNR])} PSNR "
            "to those without",
        ),
        (
            f"{generation.uncached.values[RECOGNISED]:.0f} %",
            f"of {count} generated pictures recognised as their class (with the cache "
            f"{generation.cache.values[RECOGNISED]:.0f} %, by chance {100 / len(generation.names):.0f} %)",
        ),
        (
            gains,
            f"over bicubic, enlarging {' and '.join(f'x{scale}' for scale in scales)} (luma PSNR, mean of the photos)",
        ),
        (f"{_speed(merge.entries[0]):.2f}x", f"as fast as {merge.entries[-1].name}: {merge.entries[0].name}"),
    ]


def render(results: Results) -> str:
    """Return the page."""
    machine = f"{results.environment['device']}, {results.threads} threads"
    lead = (
        "<p>Networks trained for this zoo make, enlarge and recognise pictures, and the zoo&rsquo;s techniques make "
        f"them faster. Everything on this page was computed and measured in one run on this machine &mdash; "
        f"<strong>{text(machine)}</strong> &mdash; in {results.seconds:.0f} seconds, without a network connection.</p>"
    )
    facts = ", ".join(f"{text(key)} {text(value)}" for key, value in results.environment.items())
    foot = (
        f"<p>Made by <code>zoo demo</code>, {text(results.date)}: {facts}, {results.threads} threads. Speeds are "
        "medians of rounds in which all sides take turns, of caches by the processor time of one thread. Pictures and "
        "PSNR depend on the weights only, times on the machine and on what else it does.</p>"
    )
    return page(
        title="zoo: the demo",
        lead=lead,
        tiles=headline(results),
        sections=[
            ("Generate, and let a cache skip work", _generation(results)),
            ("Enlarge photos", _upscaling([found for found in results.upscalings if not found.jpeg])),
            ("Restore compressed photos", _compressed([found for found in results.upscalings if found.jpeg])),
            ("Merge a vision transformer", _merge(results.merge)),
            ("Classify photos", _photos(results)),
        ],
        foot=foot,
    )


def _generation(results: Results) -> str:
    found = results.generation
    count, classes, size = len(found.labels), len(found.names), found.images[0].shape[1]
    both = "".join(
        f"<div><h3>{text(head)}</h3>{_samples(found, index)}</div>"
        for index, head in enumerate(
            (
                f"Without a cache: {_seconds(found.uncached)}, {found.uncached.values[RECOGNISED]:.0f} % recognised",
                f"{found.cache.name}: {_seconds(found.cache)}, {found.cache.values[RECOGNISED]:.0f} % recognised",
            )
        )
    )
    return (
        f"<p><strong>{text(results.denoiser)}</strong>, a diffusion transformer of {found.params / 1e6:.1f} M "
        f"parameters on {size}x{size} pixels, draws {count} pictures, {count // classes} of each of "
        f"{classes} classes, in {found.steps} {text(found.scheduler)} steps with guidance {found.guidance_scale:g}. "
        "Neighbouring steps are much alike, so <code>zoo.enable_cache(pipe, config)</code> can leave out what a step "
        "before has computed: "
        f"<strong>{_speed(found.cache):.2f} times as fast</strong>, {_decibels(found.cache.values[PSNR])} PSNR to the "
        "pictures without a cache, from the same noise.</p>"
        f"<p>Below each picture stands what <strong>{text(results.classifier)}</strong>, our classifier, takes it for. "
        "Both networks are small and were trained for a short time: these are sketches, not photos.</p>"
        f'<div class="pair">{both}</div>'
        f"<h3>Speed and quality: caches, and simply fewer steps</h3>{_study(found)}"
    )


def _samples(found: Generation, side: int) -> str:
    cells = []
    for label, name in enumerate(found.names):
        cells.append(f'<span class="class">{text(name)}</span>')
        for index in [index for index, own in enumerate(found.labels) if own == label]:
            guess = found.predicted[side][index]
            css = ' class="hit"' if guess == label else ""
            image = picture(found.images[side][index], f"generated {name}", "pixels")
            cells.append(f"<div>{image}<small{css}>{text(found.names[guess])}</small></div>")
    columns = len(found.labels) // len(found.names)
    style = f"grid-template-columns:5.8em repeat({columns},minmax(0,1fr))"
    return f'<div class="samples" style="{style}">{"".join(cells)}</div>'


def _study(found: Generation) -> str:
    points = [
        Point(
            x=_speed(entry),
            y=entry.values[PSNR],
            series=_series(entry),
            label=_short(entry),
            marked=entry.name == found.cache.name,
        )
        for entry in found.study[1:]
        if np.isfinite(entry.values[PSNR])
    ]
    plot = (
        scatter(
            points,
            f"times as fast as {found.steps} steps without a cache",
            "PSNR to these (dB)",
            mark=(1.0, "no cache"),
        )
        if points
        else ""
    )
    rows = [
        (
            entry.name,
            _seconds(entry),
            str(entry.speedup or "1"),
            _decibels(entry.values.get(PSNR)),
            f"{entry.values['steps in the same time']:.0f}" if "steps in the same time" in entry.values else "",
            _decibels(entry.values["their PSNR (dB)"]) if "their PSNR (dB)" in entry.values else "",
        )
        for entry in found.study
    ]
    chosen = [index for index, entry in enumerate(found.study) if entry.name == found.cache.name]
    headings = ("", "time", "times as fast", "PSNR", "steps in the same time", "their PSNR")
    return (
        f"<p>Each cache was tried on {found.study_images} pictures, then as many steps without a cache as fit into its "
        f"time. A cache is worth it where it lies above the line of fewer steps. For the pictures above, the zoo took "
        f"{text(found.cache.name)}: {text(found.rule)}.</p>{plot}"
        f"<details><summary>All numbers</summary>{table(headings, rows, marked=chosen)}</details>"
    )


def _series(entry: Entry) -> str:
    return "fewer steps, no cache" if entry.series == "no cache" else entry.series


def _short(entry: Entry) -> str:
    """Return the setting without the method that the legend names."""
    return entry.name.removeprefix(f"{entry.series}, ").removeprefix("threshold ")


def _upscaling(found: Sequence[Upscaling]) -> str:
    return (
        "<p>Each photo is shrunk as MATLAB&rsquo;s bicubic <code>imresize</code> does it, the way of the "
        "super-resolution benchmarks, then enlarged by <code>zoo.restore</code> and by bicubic interpolation. Drag the "
        "divider.</p>" + _restored(found)
    )


def _compressed(found: Sequence[Upscaling]) -> str:
    quality = " and ".join(dict.fromkeys(str(each.jpeg) for each in found))
    return (
        f"<p>Photos from phones and from the web are compressed. This one is shrunk where it is to be enlarged, saved "
        f"as JPEG of quality {quality}, and restored by the weights for real photos, which <code>zoo.restore</code> "
        "takes by itself where it sees blocks or noise.</p>" + _restored(found)
    )


def _restored(found: Sequence[Upscaling]) -> str:
    """Return sliders, details and a table."""
    parts = []
    for name in dict.fromkeys(each.photo.name for each in found):
        own = [each for each in found if each.photo.name == name]
        sliders = "".join(_slider(each) for each in own)
        parts.append(f'<h3>{text(name)}</h3><div class="pair">{sliders}</div>{_crops(own[-1])}')
    rows = [
        (
            each.photo.name,
            f"x{each.scale}",
            f"{each.psnr[0]:.2f} dB / {each.ssim[0]:.4f}",
            f"{each.psnr[1]:.2f} dB / {each.ssim[1]:.4f}",
            f"{each.psnr[1] - each.psnr[0]:+.2f} dB",
            f"{each.seconds:.2f} s",
        )
        for each in found
    ]
    plain = "bicubic, or as it is" if any(each.scale == 1 for each in found) else "bicubic"
    credits = "; ".join(dict.fromkeys(f"{each.photo.name}: {each.photo.credit}" for each in found))
    return "".join(parts) + (
        table(("photo", "scale", f"{plain}: PSNR / SSIM", "network: PSNR / SSIM", "gain", "time, once"), rows)
        + f'<p class="soft">PSNR and SSIM of the whole picture on luma (BT.601), 8 bits, the scale&rsquo;s border '
        f"pixels left out. Photos from scikit-image. {text(credits)}.</p>"
    )


def _plain(each: Upscaling) -> str:
    """Name what stands beside the network."""
    return f"JPEG {each.jpeg}" if each.scale == 1 else "bicubic"


def _slider(each: Upscaling) -> str:
    top, left, height, width = each.photo.window
    views = [image[top : top + height, left : left + width] for image in (each.bicubic, each.restored)]
    plain = _plain(each)
    caption = f"x{each.scale}: {plain} {each.psnr[0]:.2f} dB, <strong>{text(each.model)} {each.psnr[1]:.2f} dB</strong>"
    return before_after(views[0], views[1], (plain, each.model), caption)


def _crops(each: Upscaling) -> str:
    """Return a detail: what both methods get, what they make of it, and the original."""
    top, left, side = each.photo.detail
    cells = []
    for image, name in (
        (each.small.repeat(each.scale, 0).repeat(each.scale, 1), f"shrunk to 1/{each.scale}"),
        (each.bicubic, _plain(each)),
        (each.restored, each.model),
        (each.original, "original"),
    ):
        detail = picture(image[top : top + side, left : left + side], f"{each.photo.name}, detail: {name}")
        cells.append(f"<figure>{detail}<figcaption>{text(name)}</figcaption></figure>")
    return f'<div class="crops">{"".join(cells)}</div>'


def _merge(found: Merge) -> str:
    merged, rival = found.entries[0], found.entries[-1]
    rows = [
        (
            entry.name,
            entry.time.median if entry.time is not None else 0.0,
            f"{_seconds(entry)}" + (f", {_speed(entry):.2f}x" if entry.speedup is not None else ""),
        )
        for entry in found.entries
    ]
    report = found.report
    facts = [
        (
            "layers rewritten",
            str(len(report.layers)),
            "",
        ),
        ("parameters", f"{report.params_before / 1e6:.1f} M", f"{report.params_after / 1e6:.1f} M"),
    ]
    if report.macs_before is not None and report.macs_after is not None:
        facts.append(
            (
                "multiply-accumulates of these layers",
                f"{report.macs_before / 1e9:.2f} G",
                f"{report.macs_after / 1e9:.2f} G",
            )
        )
    facts.append(("largest relative change of the output", "", f"{found.check.value:.1e}"))
    spread = f"{merged.speedup.p20:.2f} to {merged.speedup.p80:.2f}" if merged.speedup is not None else ""
    return (
        "<p>In a RePaViT only some hidden channels of each feed-forward network have an activation; the idle rest is "
        "linear. <code>zoo.reparameterize(model)</code> multiplies that rest, its norms and the residual into one "
        f"matrix: the same function, <strong>{_speed(merged):.2f} times as fast</strong> as {text(rival.name)} here "
        f"(a fifth of the rounds below, a fifth above {text(spread)}). The weights are random: they do not change the "
        f"time. {found.rounds} rounds in turns, {found.batch} pictures of {found.image_size}x{found.image_size} at a "
        "time, float32.</p>"
        f"{bars(rows, marked=[0])}{table(('', 'before', 'after'), facts)}"
        f"<details><summary>The report of zoo.reparameterize</summary><pre>{text(report)}</pre></details>"
    )


def _photos(results: Results) -> str:
    cells = []
    for each in results.classified:
        rows = [(name, value, f"{100 * value:.0f} %") for name, value in each.top]
        remark = "" if each.belongs else " None of the ten classes fits: the network has to name one all the same."
        cells.append(
            f'<figure><div class="views">{picture(each.shown, each.photo.name)}'
            f"{picture(each.seen, f'{each.photo.name}, {each.seen.shape[1]} pixels wide', 'pixels')}</div>"
            f"{bars(rows, marked=[0], full=1.0)}<figcaption>{text(each.photo.name)} ({text(each.photo.credit)}), and "
            f"what the network sees.{remark}</figcaption></figure>"
        )
    side = results.classified[0].seen.shape[0] if results.classified else 32
    return (
        f"<p>The same classifier, {text(results.classifier)}, on real photos. It knows ten classes and was trained on "
        f"pictures of {side}x{side} pixels, so the photos are shrunk to that first; three photos say nothing about its "
        f'accuracy, which its model card states.</p><div class="photos">{"".join(cells)}</div>'
    )
