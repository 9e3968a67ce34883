"""The main job on the shipped weights, in one report: generate, classify, restore, and time what zoo makes fast.

Every number of the report is measured in the run that writes it.
"""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import zoo
from zoo.bench import Benchmark, Settings
from zoo.bench.caching import CacheResults, CacheSetting, builtin_settings, classifier, measure_caches
from zoo.bench.models import compare_models
from zoo.bench.report import plot
from zoo.bench.timing import environment, now, torch_threads
from zoo.data.resize import imresize
from zoo.metrics import psnr
from zoo.weights import CheckpointError, cards_dir

__all__ = ["WEIGHTS", "Section", "page", "run"]

WEIGHTS = ("repavit_tiny.cifar10", "cfsr_x2.bsds", "cfsr_x4.bsds", "pixeldit.cifar10")
_STEPS, _GUIDANCE, _PER_CLASS = 50, 3.0, 4

Told = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the report.

    Args:
        title: Its heading.
        body: Its content, HTML.
    """

    title: str
    body: str


def run(folder: str | Path, tell: Told = lambda _: None, threads: int = 2) -> Path:
    """Do everything and write `folder/report.html`, whole or not at all.

    Args:
        folder: Created if it is not there.
        tell: Told what comes next.
        threads: CPU threads of torch.

    Returns:
        The report.

    Raises:
        CheckpointError: A shipped weight is missing.
        ImportError: scikit-image, matplotlib or diffusers is not installed.
    """
    missing = [name for name in WEIGHTS if not (cards_dir() / name / "README.md").is_file()]
    if missing:
        raise CheckpointError(f"The demo needs shipped weights that are not there: {', '.join(missing)}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch_threads(threads):
        tell("generating pictures, with and without caches")
        results, sections = _generate(threads)
        tell("classifying a photo")
        sections.append(_classify())
        tell("upscaling a photo")
        sections.append(_restore())
        tell("merging a RePaViT and timing it against timm's ViT")
        sections.append(_merge(threads))
    facts = environment() | {"threads": str(threads), "date": now()}
    tell("writing the report")
    return _write(folder / "report.html", page(_summary(results), sections, facts))


# generate and classify -------------------------------------------------------------------------------


def _generate(threads: int) -> tuple[CacheResults, list[Section]]:
    pipe = zoo.create_pipeline("pixeldit.cifar10")
    pipe.to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names = [pipe.config.id2label[str(number)] for number in range(10)]
    labels = list(range(10)) * _PER_CLASS
    wanted = ("First Block Cache", "TaylorSeer")
    candidates = [
        setting
        for setting in builtin_settings(pipe, labels[:2], steps=_STEPS, guidance_scale=_GUIDANCE)
        if setting.method in wanted
    ]
    classify = classifier("repavit_tiny.cifar10")
    settings = Settings(batch=len(labels), threads=threads, rounds=2, warmup=1)
    results = measure_caches(
        pipe, labels, candidates, settings, steps=_STEPS, guidance_scale=_GUIDANCE, classify=classify
    )
    best = _chosen(results, candidates)
    rows = [("", "time", "speed-up", "PSNR to uncached", "recognised")]
    for entry in results.entries:
        quality = entry.values.get("PSNR (dB)")
        rows.append(
            (
                entry.name,
                f"{entry.time.median:.0f} ms" if entry.time else "",
                f"{entry.speedup.median:.2f}x" if entry.speedup else "1x",
                "" if quality is None else "identical" if quality == float("inf") else f"{quality:.1f} dB",
                f"{entry.values['recognised (%)']:.0f} %",
            )
        )
    benchmark = Benchmark(
        name="cache",
        title=f"{len(labels)} pictures, {_STEPS} steps: quality against time",
        conditions=settings.conditions(),
        environment=environment(),
        date=now(),
        reference=results.uncached.name,
        entries=results.entries,
    )
    shown = _grid(results.images[results.uncached.name], labels, names, classify)
    cached = _grid(results.images[best], labels, names, classify)
    body = (
        "<p>A diffusion transformer that we trained on CIFAR-10 draws 32x32 pictures, one class a column. Under each "
        "picture stands what <code>repavit_tiny.cifar10</code> takes it for; green means: the class asked for.</p>"
        f"<div class=pair><figure>{shown}<figcaption>{html.escape(results.uncached.name)}</figcaption></figure>"
        f"<figure>{cached}<figcaption>{html.escape(best)}</figcaption></figure></div>"
    )
    speed = (
        f"<p>The same {len(labels)} pictures with diffusers' caches through <code>zoo.enable_cache</code>, and with "
        "fewer steps in the same time. PSNR compares all pictures with the uncached ones.</p>"
        f"<figure class=plot>{_picture(_plot(benchmark), 'Quality against time')}</figure>{_table(rows)}"
    )
    return results, [Section(title="Generated pictures", body=body), Section(title="What caches bring", body=speed)]


def _chosen(results: CacheResults, candidates: Sequence[CacheSetting]) -> str:
    """Return the fastest cache of at least 30 dB, or else the most exact one."""
    names = {candidate.name for candidate in candidates}
    caches = [entry for entry in results.entries if entry.name in names and entry.speedup]
    good = [entry for entry in caches if entry.values["PSNR (dB)"] >= 30]
    if good:
        return max(good, key=lambda entry: entry.speedup.median if entry.speedup else 0.0).name
    return max(caches, key=lambda entry: entry.values["PSNR (dB)"]).name


def _grid(images: Tensor, labels: Sequence[int], names: Sequence[str], classify: Callable[[Tensor], Tensor]) -> str:
    found = classify(images).tolist()
    heads = "".join(f"<span class=head>{html.escape(name)}</span>" for name in names)
    cells = "".join(
        f"<span class='cell {'hit' if got == asked else 'miss'}'>{_picture(_pixels(image), names[asked])}"
        f"<i>{html.escape(names[got])}</i></span>"
        for image, asked, got in zip(images, labels, found, strict=True)
    )
    return f"<div class=grid>{heads}{cells}</div>"


def _classify() -> Section:
    from skimage import data

    photo = Image.fromarray(data.chelsea()[:300, 75:375])
    model = timm.create_model("repavit_tiny.cifar10", pretrained=True).eval()
    zoo.reparameterize(model, measure=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        chances = model(transform(photo)[None]).softmax(-1)[0]
    top = chances.topk(3)
    names = model.pretrained_cfg["label_names"]
    rows = [("class", "probability")]
    rows += [(names[int(k)], f"{100 * float(p):.1f} %") for p, k in zip(top.values, top.indices, strict=True)]
    small = np.asarray(photo.resize((32, 32), Image.Resampling.BICUBIC).resize((192, 192), Image.Resampling.NEAREST))
    body = (
        "<p>A photo of a cat (scikit-image's chelsea, CC0), and the 32x32 pixels that the network sees of it.</p>"
        f"<div class=pair><figure>{_picture(np.asarray(photo.resize((192, 192))), 'photo')}</figure>"
        f"<figure>{_picture(small, 'the same in 32x32')}</figure><div>{_table(rows)}</div></div>"
    )
    return Section(title="Classified photo", body=body)


# restore ---------------------------------------------------------------------------------------------


def _restore() -> Section:
    from skimage import data

    photo = np.ascontiguousarray(data.coffee()[80:344, 100:460])
    parts = []
    for scale in (2, 4):
        height, width = (side // scale * scale for side in photo.shape[:2])
        original = photo[:height, :width]
        small = imresize(original, 1 / scale)
        bicubic = imresize(small, float(scale))
        ours = zoo.restore(small, task="sr", scale=scale)
        quality = [float(psnr(_tensor(image), _tensor(original), space="y", crop=scale)) for image in (bicubic, ours)]
        parts.append(
            f"<h3>x{scale}: {quality[1]:.2f} dB with <code>cfsr_x{scale}.bsds</code>, {quality[0]:.2f} dB bicubic</h3>"
            f"<div class=compare style='aspect-ratio:{width}/{height}'>{_picture(ours, 'restored')}"
            f"<div class=over>{_picture(bicubic, 'bicubic')}</div><b class=left>bicubic</b><b class=right>ours</b>"
            "<input type=range min=0 max=100 value=50 aria-label='bicubic or restored' "
            "oninput=\"this.parentNode.style.setProperty('--x', this.value + '%')\"></div>"
        )
    body = (
        "<p>A photo (scikit-image's coffee, Rachel Michetti, CC0), shrunk as MATLAB's bicubic does and enlarged again; "
        "PSNR of the luma. Move the slider: left is bicubic, right is ours.</p>" + "".join(parts)
    )
    return Section(title="Upscaled photo", body=body)


# merge -----------------------------------------------------------------------------------------------


def _merge(threads: int) -> Section:
    model = timm.create_model("repavit_base").eval()
    report = zoo.reparameterize(model)
    benchmark = compare_models(
        ["repavit_base", "vit_base_patch16_224"], Settings(batch=4, threads=threads, rounds=5, warmup=1)
    )
    rows = [("", "parameters", "MACs", "time for 4 images", "speed-up")]
    for entry in benchmark.entries:
        rows.append(
            (
                entry.name,
                f"{(entry.params or 0) / 1e6:.1f} M",
                f"{(entry.macs or 0) / 1e9:.1f} G",
                f"{entry.time.median:.0f} ms" if entry.time else "",
                f"{entry.speedup.median:.2f}x" if entry.speedup else "1x",
            )
        )
    body = (
        "<p>RePaViT-Base (idle ratio 0.75, random weights: speed does not depend on them), merged by "
        "<code>zoo.reparameterize</code>, against timm's ViT of the same width and depth, 224x224, float32, in "
        "turns.</p>"
        f"{_table(rows)}<details><summary>What was folded</summary><pre>{html.escape(str(report))}</pre></details>"
    )
    return Section(title="Merged backbone", body=body)


# the page --------------------------------------------------------------------------------------------


def _summary(results: CacheResults) -> str:
    recognised = results.uncached.values["recognised (%)"]
    count = len(next(iter(results.images.values())))
    return (
        f"{count} pictures generated, {recognised:.0f} % of them recognised as the class asked for (chance: 10 %); a "
        "photo upscaled x2 and x4; a backbone merged. All with weights that zoo ships, on this machine, measured in "
        "this run."
    )


def page(summary: str, sections: Sequence[Section], facts: dict[str, str]) -> str:
    """Return the report as one self-contained HTML page: pictures, styles and script inside, no address outside.

    Args:
        summary: One paragraph, plain text.
        sections: In order.
        facts: What is said of machine and software.
    """
    said = " · ".join(f"{html.escape(key)} {html.escape(value)}" for key, value in facts.items())
    parts = "\n".join(f"<section><h2>{html.escape(part.title)}</h2>{part.body}</section>" for part in sections)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'><title>zoo demo</title>"
        f"<style>{_STYLE}</style><main><h1>zoo</h1><p class=lead>{html.escape(summary)}</p>\n{parts}"
        f"<footer>{said}</footer></main></html>\n"
    )


_STYLE = """
:root{color-scheme:light dark;--line:light-dark(#d5dae1,#3a404a);--soft:light-dark(#f5f7fa,#1c2026)}
body{margin:0;font:16px/1.55 system-ui,sans-serif;background:light-dark(#fff,#14171b);color:light-dark(#1d2530,#e6e9ee)}
main{max-width:1040px;margin:auto;padding:24px 20px 60px}h1{font-size:44px;margin:8px 0 0;letter-spacing:-1px}
.lead{font-size:19px;max-width:760px}section{border-top:1px solid var(--line);margin-top:36px;padding-top:8px}
h2{font-size:26px;margin:14px 0 4px}h3{font-weight:600;margin:26px 0 8px}code{font-size:.9em}
figure{margin:0}figcaption{font-size:14px;opacity:.75;margin-top:6px}img{display:block;max-width:100%}
.pair{display:flex;flex-wrap:wrap;gap:26px;align-items:flex-start}.pair>figure{flex:0 1 auto}
.grid{display:grid;grid-template-columns:repeat(10,minmax(0,46px));gap:4px 3px;font-size:8px;line-height:1.15}
.grid .head{text-align:center;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.cell{text-align:center;overflow:hidden}.cell img{width:100%;image-rendering:auto;border-radius:3px}
.cell i{font-style:normal;white-space:nowrap}.hit i{color:light-dark(#0a7a33,#4fd07f)}.miss i{opacity:.55}
table{border-collapse:collapse;margin:16px 0;font-variant-numeric:tabular-nums;font-size:15px}
table{display:block;overflow-x:auto}
th,td{padding:5px 16px 5px 0;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
th{font-weight:600}td+td,th+th{text-align:right}pre{overflow:auto;background:var(--soft);padding:12px;font-size:12px}
.plot img{border-radius:6px;max-width:min(100%,760px)}footer{margin-top:40px;font-size:13px;opacity:.7}
.compare{--x:50%;position:relative;max-width:760px;overflow:hidden;border-radius:6px;user-select:none}
.compare img{position:absolute;inset:0;width:100%;height:100%;object-fit:cover}
.over{position:absolute;inset:0;clip-path:inset(0 calc(100% - var(--x)) 0 0)}
.compare:after{content:"";position:absolute;top:0;bottom:0;left:var(--x);width:2px;background:#fff;pointer-events:none}
.compare input{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;cursor:ew-resize}
.compare b{position:absolute;bottom:8px;font-size:13px;color:#fff;background:#0009;padding:1px 8px;border-radius:9px}
.left{left:8px}.right{right:8px}
"""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rest)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _plot(benchmark: Benchmark) -> NDArray[np.uint8]:
    with tempfile.TemporaryDirectory() as folder:
        return np.asarray(Image.open(plot(benchmark, Path(folder) / "plot.png")).convert("RGB"))


def _tensor(image: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _picture(pixels: NDArray[Any], alt: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
