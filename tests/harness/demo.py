"""`dev.py demo`: every shipped workflow on the real server, a report and a gallery."""
from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import sys
import time
from pathlib import Path

from . import workflows
from .gallery import Picture, Section, write_gallery
from .paths import ROOT, HarnessError, host_dir, host_version
from .server import Server

ENDINGS = {
    b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"RIFF": "webp", b"\x1aE\xdf\xa3": "webm",
}


def ending(data: bytes) -> str:
    """File ending told from the first bytes."""
    if data[4:8] == b"ftyp":
        return "mp4"
    return next((name for mark, name in ENDINGS.items() if data.startswith(mark)), "bin")


def title(path: Path) -> str:
    return path.stem.replace("_", " ").strip()


def slug(path: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") or "workflow"


def clear(out: Path) -> None:
    """Remove what the last demo wrote (its report lists it), nothing else that may lie there."""
    try:
        old = json.loads((out / "report.json").read_text(encoding="utf-8"))
        names = [name for row in old["workflows"] for name in row["images"]]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in [*names, "index.html", "server.log", "report.json"]:
        (out / Path(name).name).unlink(missing_ok=True)


def run_one(server: Server, path: Path, out: Path, timeout: float) -> tuple[dict, Section]:
    """Run one workflow; its row of the report and its section of the gallery."""
    row: dict = {"name": path.stem, "status": "failed", "seconds": 0.0, "images": [], "error": ""}
    section = Section(title(path))
    try:
        workflow = workflows.load(path)
        section.notes = workflows.notes(workflow)
        info = server.object_info()
        prompt = workflows.to_prompt(workflow, info)
    except Exception as e:  # a file that cannot be converted is a failure of that file, not of the demo
        row["error"] = section.error = f"{type(e).__name__}: {e}"
        return row, section
    own = workflows.own_files(workflow)
    missing = sorted(set(workflows.missing_models(prompt, info, own)))
    if missing:
        row.update(status="models not present", missing=missing)
        section.error = ("Not run, it needs files of your own: " if own else "Not run, these model files are not present: ")
        section.error += ", ".join(f"{name} in {own[name]}" if name in own else name for name in missing)
        return row, section
    for name in workflows.input_pictures(prompt):
        if (server.input / name).is_file():
            section.inputs.append(Picture((server.input / name).read_bytes(), name))
    try:
        result = server.run(prompt, timeout=timeout, workflow=workflow)
    except Exception as e:  # the server is gone: the report shall still say which workflow took it down
        row["error"] = section.error = f"{type(e).__name__}: {e}\n{server.log(15)}"
        return row, section
    row["seconds"] = section.seconds = round(result.seconds, 2)
    # Saved pictures before previews, each in the order of the prompt's nodes.
    found = [
        (view["type"] != "output", node, data)
        for node, files in result.files.items()
        for view, data in zip(files, result.images[node], strict=True)
    ]
    order = list(prompt)
    found.sort(key=lambda item: (item[0], order.index(item[1]) if item[1] in order else len(order)))
    for number, (preview, node, data) in enumerate(found, 1):
        name = f"{slug(path)}-{number:02d}.{ending(data)}"
        (out / name).write_bytes(data)
        row["images"].append(name)
        about = prompt.get(node, {})
        label = about.get("_meta", {}).get("title") or about.get("class_type", "")
        (section.previews if preview else section.results).append(Picture(data, label))
    section.texts = [
        str(t) for output in result.outputs.values() for t in output.get("text", []) if str(t).strip()
    ]
    if not result.ok:
        row["error"] = section.error = result.error or result.status
    elif not row["images"]:
        row["error"] = section.error = "It ran, but no picture came out of it."
    else:
        row["status"] = "ok"
    return row, section


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py demo")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "demo")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one workflow")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    paths = [p for p in workflows.shipped() if args.only.lower() in p.stem.lower()]
    if not paths:
        named = f" with {args.only!r} in its name" if args.only else ""
        raise HarnessError(f"There is no workflow{named} in {workflows.WORKFLOWS}.")
    args.out.mkdir(parents=True, exist_ok=True)
    clear(args.out)
    models = [host_dir() / "models", *([args.models] if args.models else [])]
    print("Starting ComfyUI ...", flush=True)
    rows, sections = [], []
    with Server(models=models) as server:
        ready = time.monotonic() - begin
        print(f"ComfyUI {host_version()} on {'the CPU' if server.cpu else 'the graphics card'}, "
              f"ready after {ready:.0f} s", flush=True)
        workflows.copy_inputs(server.input)
        for path in paths:
            row, section = run_one(server, path, args.out, args.timeout)
            rows.append(row)
            sections.append(section)
            what = row["error"] or ", ".join(row.get("missing", [])) or f"{len(row['images'])} pictures"
            print(f"  {row['status']:>18}  {row['seconds']:7.1f} s  {row['name']}: {what}", flush=True)
        report = {
            "host": host_version(), "device": "CPU" if server.cpu else "graphics card",
            "python": platform.python_version(), "system": platform.platform(),
            "seconds_until_ready": round(ready, 1), "seconds": round(time.monotonic() - begin, 1),
            "workflows": rows,
        }
        shutil.copyfile(server.log_path, args.out / "server.log")
    (args.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    write_gallery(args.out / "index.html", sections, report)
    failed = [r["name"] for r in rows if r["status"] == "failed"]
    done = [r for r in rows if r["status"] == "ok"]
    print(f"{len(done)} of {len(rows)} workflows ran in {report['seconds']:.0f} s.\n"
          f"Gallery: {args.out / 'index.html'}")
    if failed:
        print(f"Failed: {', '.join(failed)}. Log of the server: {args.out / 'server.log'}", file=sys.stderr)
    return 1 if failed or not done else 0
