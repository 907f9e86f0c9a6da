"""CustomNet's miniature on held-out buildings: view, place and background, read by the renderer's own rules.

Every rule also reads the true renders through the first stage: its own error stands beside the rows (`rule_...`). With
several --files (training seeds) each gets its rows, numbered, and the headline keys are the worst of them.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

BUILDINGS, PICTURES = 32, 256
VIEWS = [(a, e) for a in (-45.0, -15.0, 15.0, 45.0) for e in (-12.0, 12.0)]
DISTANCES = (-0.1, 0.05, 0.2)


def scenes() -> Any:
    """256 pictures: 32 held-out buildings, each from every one of 8 views, at drawn places before drawn scenes."""
    import torch
    from bench._view_rules import held_out

    from likeness.models.demo import views

    ids = held_out(BUILDINGS, 5)
    index = torch.arange(PICTURES) // len(VIEWS)
    generator = torch.Generator().manual_seed(6)
    camera = torch.tensor(VIEWS).repeat(BUILDINGS, 1)
    rows = {"azimuth": camera[:, 0], "elevation": camera[:, 1], "distance": torch.zeros(PICTURES)}
    scene = torch.randint(0, 5, (PICTURES,), generator=generator)
    return views.Scene(views.select(ids, index), rows, scene, views.draw_boxes(PICTURES, generator))


def turned() -> Any:
    """256 pictures of the same buildings, with cameras from all over the trained range."""
    import torch

    from likeness.models.demo import views

    scene, generator = scenes(), torch.Generator().manual_seed(8)

    def draw(most: float) -> Any:
        return (torch.rand(PICTURES, generator=generator) * 2 - 1) * most
    camera = {"azimuth": draw(views.AZIMUTH), "elevation": draw(views.ELEVATION), "distance": torch.zeros(PICTURES)}
    return scene._replace(camera=camera)


def angles(pictures: Any, scene: Any) -> dict[str, list[float]]:
    """How far the cameras of 256 pictures of `turned` are off, in degrees."""
    from bench import _view_rules as v

    azimuth, elevation = v.cameras(pictures, scene)
    return {"azimuth": (azimuth - scene.camera["azimuth"]).abs().tolist(),
            "elevation": (elevation - scene.camera["elevation"]).abs().tolist()}


def row(pictures: Any, scene: Any) -> dict[str, list[float]]:
    """What the rules say of 256 pictures of `scenes`."""
    from bench import _view_rules as v

    from likeness.models.demo import views

    found = v.distances(pictures, [v.with_camera(scene, a, e) for a, e in VIEWS]).argmin(1)
    wanted = [VIEWS.index((a, e)) for a, e in zip(scene.camera["azimuth"].tolist(), scene.camera["elevation"].tolist(),
                                                  strict=True)]
    true = views.render(scene)[1] > 0.5
    return {"retrieval": [float(a == b) for a, b in zip(found.tolist(), wanted, strict=True)],
            "placement_iou": v.iou(v.silhouettes(pictures, scene), true).tolist(),
            "background": (v.backgrounds(pictures, scene.box) == scene.scene).float().tolist()}


def summary(values: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the angles, means of the rest, and the means' 95 % intervals."""
    import torch
    from bench.custany import interval

    out: dict[str, float] = {}
    for name, numbers in values.items():
        if name in ("azimuth", "elevation"):
            out[f"{name}_median_deg"] = float(torch.tensor(numbers).median())
            continue
        low, high = interval(numbers)
        out |= {name: sum(numbers) / len(numbers), f"{name}_lo": low, f"{name}_hi": high}
    return {key: round(value, 4) for key, value in out.items()}


def distance_monotone(paint: Any) -> float:
    """Share of 86 held-out buildings whose outline shrinks with each step of the camera away (258 pictures)."""
    import torch
    from bench import _view_rules as v

    from likeness.models.demo import views

    n = 86
    ids = v.held_out(n, 9)
    box = torch.tensor([[8, 8, 56, 56]]).expand(n, 4)
    areas = []
    for far in DISTANCES:
        camera = {"azimuth": torch.zeros(n), "elevation": torch.zeros(n), "distance": torch.full((n,), far)}
        scene = views.Scene(ids, camera, torch.arange(n) % 5, box)
        areas.append(v.silhouettes(paint(scene), scene).sum((1, 2)))
    shrinks = (areas[0] > areas[1]) & (areas[1] > areas[2])
    return float(shrinks.float().mean())


def background_four(paint: Any) -> list[float]:
    """Each of 64 buildings at one place and view before four backgrounds that have nothing to do with it: right ones."""
    import torch
    from bench import _view_rules as v

    from likeness.models.demo import views

    count = PICTURES // 4
    ids = v.held_out(count, 12)
    four = views.select(ids, torch.arange(count).repeat_interleave(4))
    n = 4 * count
    generator = torch.Generator().manual_seed(3)
    camera = {name: value.repeat_interleave(4) for name, value in views.draw_cameras(count, generator).items()}
    scene = views.Scene(four, camera, (torch.arange(n) % 4 + torch.arange(n) // 4) % 5,
                        views.draw_boxes(count, generator).repeat_interleave(4, 0))
    return (v.backgrounds(paint(scene), scene.box) == scene.scene).float().tolist()


def identity_retrieval(pictures: Any, scene: Any) -> list[float]:
    """Whether the picture is nearest to its own building among 16, all from the prompted camera."""
    import torch
    from bench import _view_rules as v

    from likeness.models.demo import views

    others = v.held_out(BUILDINGS, 5)
    index = torch.arange(PICTURES) // len(VIEWS)
    rows = []
    for k in range(16):
        rows.append(scene._replace(identity=views.select(others, (index + 2 * k) % BUILDINGS)))
    return (v.distances(pictures, rows).argmin(1) == 0).float().tolist()


def load_peak(folder: Path, ending: str) -> float:
    """Peak memory of a process that loads a file of the true shapes (random float32) over the file's size."""
    script = Path(__file__).with_name("_load_peak.py")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for step in ("write", "load"):  # one process each: the writer's own memory must not count
            done = subprocess.run([sys.executable, str(script), step, place, "--ending", ending], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
        numbers = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers["peak"] / numbers["file"]


def chances(scene: Any, wide: Any) -> dict[str, float]:
    """What a method without any skill gets: a guess, the reference's own camera, the outline of the picture before."""
    from bench import _view_rules as v

    from likeness.models.demo import views

    true = views.render(scene)[1] > 0.5
    found = {"retrieval": 1 / len(VIEWS), "identity": 1 / 16, "background": 0.2, "background_four": 0.2,
             "distance_monotone": 1 / 6,  # one order of three areas
             "placement_iou": float(v.iou(true, true.roll(1, 0)).mean()),
             **{f"{name}_median_deg": float(wide.camera[name].abs().median()) for name in ("azimuth", "elevation")}}
    return {f"{name}_chance": round(value, 4) for name, value in found.items()}


def ideal(painter: Any, scene: Any, *_: Any) -> Any:
    """True renders through the first stage, in the place of a painter's pictures."""
    from likeness.models.demo import views

    return painter.through_first_stage(views.render(scene)[0])


def measured(paint: Any, scene: Any, wide: Any, seed: int = 0) -> tuple[dict[str, float], Any]:
    """All rows of one painter `paint(scene, seed, references)`, and its pictures of `scenes`."""
    import torch
    from bench import _view_rules as v

    from likeness.models.demo import views

    pictures = paint(scene, seed + 1)
    # an odd shift: the stranger is none of the sixteen, which are an even number of buildings apart
    strangers = views.select(v.held_out(BUILDINGS, 5), (torch.arange(PICTURES) // len(VIEWS) + 11) % BUILDINGS)
    values = {**row(pictures, scene), **angles(paint(wide, seed + 2), wide),
              "background_four": background_four(lambda asked: paint(asked, seed + 3)),
              "identity": identity_retrieval(pictures, scene),
              "identity_shuffled": identity_retrieval(paint(scene, seed + 5, strangers), scene)}
    return {**summary(values), "distance_monotone": round(distance_monotone(lambda asked: paint(asked, seed + 4)), 4)}, pictures


def ablated(name: str, painter: Any, scene: Any, whole: list[dict[str, float]]) -> dict[str, Any]:
    """Rows of a training without a part of the method, and whether each is worse: shown where its interval lies below that of
    every training seed of the whole method."""
    found = summary(row(painter.paint(scene, 500), scene))
    out: dict[str, Any] = {f"{name}_{key}": value for key, value in found.items()}
    for key in ("retrieval", "placement_iou", "background"):
        out[f"{name}_{key}_worse"] = "shown" if found[f"{key}_hi"] < min(
            seed[f"{key}_lo"] for seed in whole) else "not shown"
    return out


def through_nodes(nodes: Any, scene: Any, calls: int) -> dict[str, Any]:
    """Rows of what an artist's graph makes: a call a building, its eight views and places before one scene."""
    import torch
    from bench._view_nodes import CALL

    from likeness.models.demo import views

    one_sentence = scene._replace(scene=torch.arange(PICTURES) // CALL % 5)
    parts = views.blocks(one_sentence, CALL)[:calls]
    asked = views.blocks(one_sentence, CALL * len(parts))[0]
    pictures = torch.cat([nodes.paint(part, 900 + number) for number, part in enumerate(parts)])
    return {"nodes_pictures": len(pictures), **{f"nodes_{key}": value for key, value in summary(row(pictures, asked)).items()}}


def main(argv: list[str]) -> dict[str, Any]:
    import torch
    from bench._view_nodes import Nodes, turntable
    from bench._view_painter import Painter

    from likeness.models.demo import views
    from likeness.models.hosting.customnet import MINIATURE
    from likeness.models.hosting.demo import WEIGHTS

    parser = argparse.ArgumentParser(prog="dev.py bench customnet")
    parser.add_argument("--files", type=Path, nargs="*", default=[WEIGHTS / MINIATURE], help="one file a training seed")
    parser.add_argument("--shared", type=Path, help="file of the ablation with one shared attention")
    parser.add_argument("--no-location", type=Path, help="file of the ablation without location")
    parser.add_argument("--load", action="store_true", help="also load a file of the true shapes: 6 GB of disk and 8 of memory")
    parser.add_argument("--ending", choices=(".safetensors", ".pt"), default=".safetensors", help="of that file")
    parser.add_argument("--nodes", type=int, default=32,
                        help="calls of 8 pictures through the nodes' own way, with the first file; 0 leaves them out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("output/bench"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    scene, wide = scenes(), turned()
    out: dict[str, Any] = {"pictures_a_row": PICTURES, "training_seeds": len(args.files), **chances(scene, wide)}
    rows = []
    for number, file in enumerate(args.files, 1):
        painter = Painter(file, WEIGHTS)
        if number == 1:
            found = measured(partial(ideal, painter), scene, wide)[0]
            out |= {f"rule_{name}": value for name, value in found.items() if not name.startswith("identity_shuffled")}
        found, pictures = measured(painter.paint, scene, wide, 100 * number)
        rows.append(found)
        out |= {f"seed{number}_{name}": value for name, value in found.items()}
        sheet(views.render(scene)[0], pictures, args.out / f"customnet_{number}.png")
    for name in (name for name in rows[0] if not name.endswith(("_lo", "_hi"))):
        worst = (max if name.endswith(("_deg", "_shuffled")) else min)(rows, key=lambda found, name=name: found[name])
        out |= {key: worst[key] for key in (name, f"{name}_lo", f"{name}_hi") if key in worst}
    for name, file in (("shared_attention", args.shared), ("no_location", args.no_location)):
        if file is not None:
            out |= ablated(name, Painter(file, WEIGHTS), scene, rows)
    nodes = Nodes(args.files[0], WEIGHTS)
    if args.nodes > 0:
        out |= through_nodes(nodes, scene, args.nodes)
    out["turntable8_over_single"] = round(turntable(nodes), 4)
    if args.load:
        name = "load_peak_over_file" + ("_pt" if args.ending == ".pt" else "")
        out[name] = round(load_peak(Path(tempfile.gettempdir()), args.ending), 4)
    return out


def sheet(truth: Any, pictures: Any, path: Path) -> None:
    """True views above, the miniature's below: the first six buildings."""
    import torch
    from PIL import Image

    rows = [part[k:k + 8] for k in range(0, min(48, len(truth)), 8) for part in (truth, pictures)]
    grid = torch.stack(rows).permute(0, 3, 1, 4, 2).reshape(len(rows) * 64, 8 * 64, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((grid.clamp(0, 1) * 255).round().byte().numpy())
    picture.resize((picture.width * 2, picture.height * 2), 0).save(path)
