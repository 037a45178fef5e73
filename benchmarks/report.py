"""The demo's files: contact sheet, an animation per stream, and a report that needs nothing beside itself."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["Strip", "animation", "contact_sheet", "write"]

COLUMNS = 12
TEXT = 18  # pixels of a line of text
GAP = 4
INK, PAPER = (30, 30, 36), (250, 250, 248)
COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#8e6c8a", "#d4a017", "#3d405b")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e1e24; background: #fafaf8; max-width: 68rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
img { max-width: 100%; } .held { color: #2d6a4f; } .missed { color: #b3261e; font-weight: 600; }
.note { color: #666; } figure { margin: 1rem 0; } figcaption { color: #666; font-size: .9rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
"""


@dataclass(frozen=True)
class Strip:
    """A finished stream, three ways: ``[frames, 3, height, width]`` each, in [-1, 1], on the CPU.

    Attributes:
        name, tenant: of the stream.
        given: frames that were not generated.
        truth: as the renderer sees the path.
        dense: generated from the unquantised cache.
        quantised: generated from the shared pool.
    """

    name: str
    tenant: str
    given: int
    truth: Tensor
    dense: Tensor
    quantised: Tensor


def write(folder: Path, content: Mapping[str, Any], strips: Sequence[Strip]) -> Path:
    """Write ``contact_sheet.png``, ``<stream>.gif`` and ``report.html`` to `folder`; the report's path.

    `content` is a result file of the demo.
    """
    folder.mkdir(parents=True, exist_ok=True)
    label = content["config"]["format"]
    pictures: list[tuple[str, str]] = []
    for strip in strips:
        path = folder / f"{strip.name}.gif"
        path.write_bytes(animation(strip, label))
        pictures.append((f"{strip.name} ({strip.tenant})", _inline(path.read_bytes(), "gif")))
    sheet = ""
    if strips:
        contact_sheet(strips, label).save(folder / "contact_sheet.png")
        sheet = _inline((folder / "contact_sheet.png").read_bytes(), "png")
    path = folder / "report.html"
    path.write_text(_page(content, sheet, pictures), encoding="utf-8")
    return path


def _pixels(frames: Tensor, zoom: int) -> list[Image.Image]:
    bytes_ = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    size = (frames.shape[-1] * zoom, frames.shape[-2] * zoom)
    return [Image.fromarray(frame.numpy()).resize(size, Image.Resampling.NEAREST) for frame in bytes_]


def _write_text(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str) -> None:
    draw.text(at, text, fill=INK, font=ImageFont.load_default(13))


def animation(strip: Strip, label: str, *, zoom: int = 3, frames_per_second: int = 8) -> bytes:
    """GIF of truth, unquantised and quantised side by side; `label` names the quantised format."""
    panels = [_pixels(video, zoom) for video in (strip.truth, strip.dense, strip.quantised)]
    width, height = panels[0][0].size
    images = []
    for frame in range(len(panels[0])):
        image = Image.new("RGB", (3 * width + 2 * GAP, height + 2 * TEXT), PAPER)
        draw = ImageDraw.Draw(image)
        for place, (panel, title) in enumerate(zip(panels, ("truth", "unquantised", label), strict=True)):
            image.paste(panel[frame], (place * (width + GAP), TEXT))
            _write_text(draw, (place * (width + GAP) + 2, 1), title)
        doing = "given" if frame < strip.given else "generated"
        _write_text(draw, (2, TEXT + height + 1), f"{strip.name}   frame {frame + 1}, {doing}")
        images.append(image)
    stream = io.BytesIO()
    pause = 1000 // frames_per_second
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=pause, loop=0)
    return stream.getvalue()


def contact_sheet(strips: Sequence[Strip], label: str, *, zoom: int = 1) -> Image.Image:
    """Three rows per stream over generated frames in even steps, under the given frames that they show again."""
    first = strips[0]
    frames = len(first.truth)
    picks = sorted({round(x) for x in torch.linspace(first.given, frames - 1, COLUMNS).tolist()})
    width, height = first.truth.shape[-1] * zoom, first.truth.shape[-2] * zoom
    margin = 8 * TEXT
    block = 2 * TEXT + 3 * (height + GAP)
    sheet = Image.new("RGB", (margin + len(picks) * (width + GAP), block * len(strips) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, strip in enumerate(strips):
        top = row * block + GAP
        _write_text(draw, (GAP, top), f"{strip.name}, {strip.tenant}: generated frame")
        for column, frame in enumerate(picks):
            _write_text(draw, (margin + column * (width + GAP), top + TEXT), str(frame + 1))
        for line, (video, title) in enumerate(
            zip((strip.truth, strip.dense, strip.quantised), ("truth", "unquantised", label), strict=True)
        ):
            y = top + 2 * TEXT + line * (height + GAP)
            _write_text(draw, (GAP, y + height // 2 - TEXT // 2), title)
            for column, picture in enumerate(_pixels(video[picks], zoom)):
                sheet.paste(picture, (margin + column * (width + GAP), y))
    return sheet


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _plot(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    return _inline(stream.getvalue(), "svg+xml")


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.2, 3.6))
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _memory_plot(results: Mapping[str, Any]) -> str:
    figure, axes = _axes("Memory of all streams", "chunk", "MB")
    series, summary = results["series"], results["summary"]
    chunks = range(1, len(series["used_nbytes"]) + 1)
    axes.plot(chunks, [x / 1e6 for x in series["dense_nbytes"]], color=COLOURS[1], label="history, unquantised")
    axes.plot(chunks, [x / 1e6 for x in series["used_nbytes"]], color=COLOURS[0], label="pages and codebooks")
    axes.axhline(summary["memory_nbytes"] / 1e6, color=COLOURS[2], linestyle="--", label="budget, everything included")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _plot(figure)


def _quality_plot(results: Mapping[str, Any], given: int) -> str:
    figure, axes = _axes("Each stream against its own unquantised run", "frame", "PSNR, dB")
    for place, row in enumerate(row for row in results["rows"] if row["finished"]):
        curve = row["psnr_curve"]
        frames = range(given + 1, given + 1 + len(curve))
        axes.plot(frames, curve, color=COLOURS[place % len(COLOURS)], label=row["stream"])
    if axes.lines:
        axes.legend(frameon=False)
    return _plot(figure)


def _cells(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _stream_table(results: Mapping[str, Any]) -> str:
    head = ["stream", "tenant", "unquantised MB", "used MB", "ratio", "read in 2 bits", "frames/s", "waits",
            "PSNR dB", "first", "last", "to truth", "unquantised to truth"]  # fmt: skip
    lines = [_cells(head, "th")]
    for row in results["rows"]:
        if not row["finished"]:
            lines.append(_cells([row["stream"], row["tenant"], row["decision"]]))
            continue
        numbers = [
            f"{row['dense_nbytes'] / 1e6:.1f}", f"{row['nbytes'] / 1e6:.1f}", f"{row['ratio']:.2f}",
            f"{row['quantised_share']:.0%}", f"{row['frames_per_second']:.2f}", str(row["waits"]),
            *(f"{row[key]:.2f}" for key in ("psnr", "psnr_first", "psnr_last", "psnr_truth", "psnr_truth_dense")),
        ]  # fmt: skip
        lines.append(_cells([row["stream"], row["tenant"], *numbers]))
    return f"<table>{''.join(lines)}</table>"


def _checks(results: Mapping[str, Any]) -> str:
    def line(check: Mapping[str, Any]) -> str:
        mark = "<td class=held>held</td>" if check["held"] else "<td class=missed>NOT HELD</td>"
        return f"<tr>{mark}<td>{html.escape(check['name'])}</td><td>{html.escape(check['text'])}</td></tr>"

    return f"<table class=text>{''.join(line(check) for check in results['checks'])}</table>"


def _figure(source: str, caption: str) -> str:
    text = html.escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _page(content: Mapping[str, Any], sheet: str, pictures: Sequence[tuple[str, str]]) -> str:
    results, config = content["results"], content["config"]
    summary = results["summary"]
    streams = len(results["rows"])
    lead = (
        f"{streams} streams of {config['given']} given and {config['generated']} generated frames shared one pool of "
        f"{config['format']} pages. Unquantised, their caches take {summary['dense_nbytes'] / 1e6:.0f} MB; the manager "
        f"had {summary['memory_nbytes'] / 1e6:.0f} MB for everything it allocates."
    )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    facts = f"{content['device']['name']}; {versions}; commit {content['commit']}; {content['date']}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>qvg-paged demo</title>",
        f"<style>{STYLE}</style><h1>qvg-paged demo</h1><p>{html.escape(lead)}</p>",
        f"<h2>What was promised</h2>{_checks(results)}",
        "<h2>Streams</h2><p class=note>PSNR is against the stream's own unquantised run with the same noise, over "
        f"generated frames.</p>{_stream_table(results)}",
        f"<div class=pair>{_figure(_memory_plot(results), 'Bytes in use after each chunk')}",
        f"{_figure(_quality_plot(results, config['given']), 'Generated frames, one line per stream')}</div>",
    ]
    if pictures:
        parts.append("<h2>Videos</h2><div class=pair>")
        parts += [_figure(source, caption) for caption, source in pictures]
        parts.append(f"</div><h2>Contact sheet</h2>{_figure(sheet, 'Generated frames in even steps')}")
    command = html.escape(content["command"])
    parts.append(f"<h2>Run</h2><p class=note><code>{command}</code><br>{html.escape(facts)}</p>")
    return "".join(parts) + "\n"
