"""The page that `dev.py demo` writes: one file, pictures inside, readable in light and dark."""
from __future__ import annotations

import base64
import html
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

MIMES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}

STYLE = """
:root { color-scheme: light dark; --paper: #faf9f7; --ink: #23211e; --soft: #6d6860; --line: #e2ded6;
  --card: #fff; --mark: #b3541e; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --ink: #ece8e1; --soft: #9d968a;
  --line: #34312c; --card: #211f1c; --mark: #f0a36b; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 48px; }
h1 { font-size: 34px; letter-spacing: -.02em; margin: 0 0 6px; }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 0; }
.facts, .time, figcaption, summary { color: var(--soft); font-size: 14px; }
nav { display: flex; flex-wrap: wrap; gap: 8px; margin: 20px 0 8px; }
nav a { color: inherit; text-decoration: none; font-size: 14px; padding: 4px 12px; border-radius: 99px;
  border: 1px solid var(--line); background: var(--card); }
nav a:hover { border-color: var(--mark); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 22px 24px;
  margin: 20px 0; }
section > .head { display: flex; align-items: baseline; justify-content: space-between; gap: 16px; }
.lead { max-width: 76ch; margin: 8px 0 0; color: var(--soft); }
.notes { max-width: 76ch; }
.notes h3 { font-size: 15px; margin: 16px 0 4px; }
.notes p, .notes ul { margin: 6px 0; }
code { font-size: .92em; background: var(--paper); padding: 1px 5px; border-radius: 5px; }
summary { cursor: pointer; }
.row { display: flex; align-items: flex-start; gap: 18px; margin-top: 18px; }
.out { display: flex; flex-wrap: wrap; gap: 14px; }
@media (max-width: 760px) { .row { flex-direction: column; } }
figure { margin: 0; }
figure img, figure video { display: block; border-radius: 8px; border: 1px solid var(--line);
  background: repeating-conic-gradient(var(--line) 0 25%, transparent 0 50%) 0 0 / 16px 16px;
  max-width: 100%; }
img.pixels { image-rendering: pixelated; }
figcaption { margin-top: 5px; max-width: 260px; overflow-wrap: anywhere; }
.given { display: flex; flex: none; flex-direction: column; gap: 14px; padding-right: 18px;
  border-right: 2px solid var(--mark); }
.given img { max-width: 200px; height: auto; }
.error { color: var(--bad); margin: 12px 0 0; overflow-wrap: anywhere; white-space: pre-wrap; }
details { margin-top: 16px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
footer { color: var(--soft); font-size: 13px; padding: 12px 0 48px; }
"""


@dataclass
class Picture:
    data: bytes
    label: str = ""


@dataclass
class Section:
    """One workflow: pictures that went in, pictures that came out, what its notes say."""

    title: str
    notes: list[str] = field(default_factory=list)
    inputs: list[Picture] = field(default_factory=list)
    results: list[Picture] = field(default_factory=list)
    previews: list[Picture] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def shown_size(data: bytes) -> tuple[int, bool]:
    """(width on the page, pixel look): small pictures grow by whole steps, so that pixels stay square."""
    from PIL import Image, UnidentifiedImageError

    try:
        width, height = Image.open(io.BytesIO(data)).size
    except (UnidentifiedImageError, OSError):
        return 256, False
    longer = max(width, height)
    if longer <= 320:
        return width * max(1, 224 // longer), True
    return min(width, round(width * 420 / longer)) if longer > 420 else width, False


def figure(picture: Picture) -> str:
    data = picture.data
    source = base64.b64encode(data).decode()
    label = "" if picture.label in ("Save Image", "Preview Image") else html.escape(picture.label)
    caption = f"<figcaption>{label}</figcaption>" if label else ""
    if data[4:8] == b"ftyp" or data.startswith(b"\x1aE\xdf\xa3"):
        kind = "video/mp4" if data[4:8] == b"ftyp" else "video/webm"
        tag = f'<video src="data:{kind};base64,{source}" width="320" controls loop muted autoplay></video>'
        return f"<figure>{tag}{caption}</figure>"
    kind = next((m for mark, m in MIMES.items() if data.startswith(mark)), "image/png")
    width, pixels = shown_size(data)
    look = ' class="pixels"' if pixels else ""
    tag = f'<img src="data:{kind};base64,{source}" width="{width}" alt="{label}" loading="lazy"{look}>'
    return f"<figure>{tag}{caption}</figure>"


def inline(text: str) -> str:
    """One line of the notes' markdown: bold, italic, code."""
    text = html.escape(" ".join(text.split()))
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"(?<!\w)[*_]([^*_]+)[*_](?!\w)", r"<em>\1</em>", text)


def blocks(markdown: str) -> list[str]:
    """The little markdown that notes use, one HTML block each: headings, lists, paragraphs."""
    out = []
    for chunk in re.split(r"\n\s*\n|\n(?=#)|(?<=\n)(?=[-*] )", markdown):
        lines = [line for line in chunk.splitlines() if line.strip()]
        if lines and lines[0].startswith("#"):
            out.append(f"<h3>{inline(lines.pop(0).lstrip('#'))}</h3>")
        if lines and re.match(r"[-*] ", lines[0]):
            item = f"<li>{inline(' '.join([lines[0][2:], *lines[1:]]))}</li>"
            if out and out[-1].endswith("</ul>"):
                out[-1] = out[-1].removesuffix("</ul>") + item + "</ul>"
            else:
                out.append(f"<ul>{item}</ul>")
        elif lines:
            out.append(f"<p>{inline(' '.join(lines))}</p>")
    return out


def figures(pictures: list[Picture]) -> str:
    return "".join(map(figure, pictures))


def section_html(number: int, section: Section) -> str:
    seconds = f'<span class="time">{section.seconds:.1f} s</span>' if section.seconds else ""
    name = html.escape(section.title)
    parts = [f'<section id="w{number}"><div class="head"><h2>{name}</h2>{seconds}</div>']
    notes = [block for text in section.notes for block in blocks(text)]
    lead = next((block for block in notes if block.startswith("<p>")), "")
    # The first sentences tell what the workflow is for; the rest is there for who wants to use it.
    parts.append(lead.replace("<p>", '<p class="lead">', 1))
    given = f'<div class="given">{figures(section.inputs)}</div>' if section.inputs else ""
    if given or section.results:
        parts.append(f'<div class="row">{given}<div class="out">{figures(section.results)}</div></div>')
    if section.previews:
        opened = "" if section.results else " open"
        parts.append(f"<details{opened}><summary>Previews on the way ({len(section.previews)})</summary>"
                     f'<div class="row"><div class="out">{figures(section.previews)}</div></div></details>')
    if len(notes) > 1:
        text = "".join(notes)
        parts.append(f'<details><summary>Notes of the workflow</summary><div class="notes">{text}</div></details>')
    if section.texts:
        text = html.escape("\n\n".join(section.texts))
        parts.append(f"<details><summary>What the nodes say</summary><pre>{text}</pre></details>")
    if section.error:
        parts.append(f'<p class="error">{html.escape(section.error)}</p>')
    return "".join(parts) + "</section>"


def write_gallery(path: Path, sections: list[Section], report: dict) -> None:
    """Write the page; it needs no other file and no network."""
    count = sum(bool(s.results or s.previews) for s in sections)
    pictures = sum(len(s.results) for s in sections)
    facts = (f"{count} workflow{'s' * (count != 1)}, {pictures} picture{'s' * (pictures != 1)}, "
             f"{report['seconds']:.0f} seconds in all. ComfyUI {report['host']} on the {report['device']}, "
             f"{report['system']}.")
    links = "".join(f'<a href="#w{i}">{html.escape(s.title)}</a>' for i, s in enumerate(sections))
    body = "".join(section_html(i, s) for i, s in enumerate(sections))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Likeness: demo</title><style>{STYLE}</style></head>
<body><header><h1>Likeness</h1><div class="facts">{html.escape(facts)}</div><nav>{links}</nav></header>
<main>{body}<footer>Made by <code>python dev.py demo</code>. Each saved picture carries its workflow: drop the
PNG file beside this page into ComfyUI to open it.</footer></main></body></html>
"""
    path.write_text(page, encoding="utf-8")
