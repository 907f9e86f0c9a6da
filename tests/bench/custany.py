"""CustAny on held-out identities, through the shipped nodes on the real server, and what injection costs.

Rows: text only, both levels, a shuffled reference (and each level alone with --all). 256 pictures a row: 16 held-out
identities x 4 prompts x 4 noises. The judge was trained apart on renders; its own accuracy stands beside the rows.
--only ablation measures the adapters of `train demo ablation` in this process: levels, encoders, decoupling, three seeds.
--only decoupling trains small networks in which a pose leaks soon, with and without the decoupling branch.
"""
from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import Any

from harness.paths import ROOT, HarnessError

IDENTITIES, PROMPTS, NOISES, STEPS, CFG = 16, 4, 4, 20, 3.0
ROWS = {"none": None, "both": (1.0, 1.0), "shuffled": (1.0, 1.0), "global": (1.0, 0.0), "local": (0.0, 1.0)}


def candidates(seed: int = 2024) -> dict[str, Any]:
    """16 held-out identities with different looks, all kinds among them; the same at every call with a seed."""
    import torch

    from likeness.models.demo import world

    generator = torch.Generator().manual_seed(seed)
    rows, _ = world.draw_split(200, generator, training=False)
    codes, keep = set(), []
    for index, code in enumerate(world.identity_code(rows).tolist()):
        kind = len(keep) % len(world.KINDS)
        if code not in codes and int(rows["kind"][index]) == kind:
            codes.add(code)
            keep.append(index)
        if len(keep) == IDENTITIES:
            break
    return world.select(rows, torch.tensor(keep))


def save_references(folder: Path, ids: dict[str, Any]) -> None:
    """Each identity in a scene of its own at 256 pixels, with its mask in the alpha channel as LoadImage reads it."""
    import torch
    from PIL import Image

    from likeness.models.demo import creatures, world

    n = ids["kind"].shape[0]
    generator = torch.Generator().manual_seed(7)
    pose = world.draw_poses(n, generator, world.Variation(mirror=True))
    scene = torch.randint(0, len(world.SCENES), (n,), generator=generator)
    drawn = creatures.draw_pictures(ids, pose, scene, torch.full((n, 8), 0.5), 256)
    rgba = torch.cat([drawn.picture, 1 - drawn.mask[:, None]], 1).permute(0, 2, 3, 1)
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.fromarray((rgba[k] * 255).round().byte().numpy(), "RGBA").save(folder / f"identity_{k:02d}.png")


def prompt_for(identity: int, kind: str, scene: str, place: str, strengths: tuple[float, float] | None, reference: int,
               seed: int) -> dict:
    """One API prompt: NOISES pictures of one identity in one scene."""
    text = f"a photo of a {kind} {scene}, {place}"
    graph: dict[str, Any] = {
        "world": {"class_type": "Likeness_LoadDemo", "inputs": {"method": "CustAny"}},
        "picture": {"class_type": "LoadImage", "inputs": {"image": f"identity_{reference:02d}.png"}},
        "id": {"class_type": "Likeness_ExtractID", "inputs": {
            "adapter": ["world", 3], "encoders": ["world", 4], "image": ["picture", 0], "mask": ["picture", 1],
            "combine": "concat", "margin": 0.1, "on_missing": "error"}},
        "prompt": {"class_type": "Likeness_EncodePrompt", "inputs": {
            "clip": ["world", 1], "text": text, "word": kind, "occurrence": 0, "on_missing": "error"}},
        "empty": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["world", 1], "text": ""}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": NOISES}},
    }
    model, positive, negative = ["world", 0], ["prompt", 0], ["empty", 0]
    if strengths is not None:
        graph["inject"] = {"class_type": "Likeness_DualLevelInjector", "inputs": {
            "model": model, "positive": positive, "negative": negative, "subject": ["id", 0], "word": ["prompt", 1],
            "preset": "custom", "global_strength": strengths[0], "local_strength": strengths[1], "start_percent": 0.0,
            "end_percent": 1.0}}
        model, positive, negative = ["inject", 0], ["inject", 1], ["inject", 2]
    graph["sample"] = {"class_type": "KSampler", "inputs": {
        "model": model, "positive": positive, "negative": negative, "latent_image": ["latent", 0], "seed": seed, "steps": STEPS,
        "cfg": CFG, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}}
    graph["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["world", 2]}}
    graph["save"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
    if strengths is None:
        del graph["id"], graph["picture"]
    return graph


def read(data: list[bytes]) -> Any:
    import numpy as np
    import torch
    from PIL import Image

    pictures = [torch.from_numpy(np.array(Image.open(io.BytesIO(d)).convert("RGB"))).permute(2, 0, 1).float() / 255 for d in data]
    return torch.stack(pictures)


def interval(hits: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    import torch

    values = torch.tensor(hits)
    draws = torch.randint(0, len(hits), (2000, len(hits)), generator=torch.Generator().manual_seed(0))
    means = values[draws].mean(1).sort().values
    return float(means[49]), float(means[1949])


def ratio(parts: list[float], wholes: list[float]) -> tuple[float, float, float]:
    """Sum of the parts by sum of the wholes, with its 95 % bootstrap interval over pictures."""
    import torch

    pairs = torch.tensor([parts, wholes], dtype=torch.float64)
    count = pairs.shape[1]
    draws = torch.randint(0, count, (2000, count), generator=torch.Generator().manual_seed(0))
    above, below = pairs[:, draws].sum(-1)
    ratios = (above / below).sort().values
    return float(pairs[0].sum() / pairs[1].sum()), float(ratios[49]), float(ratios[1949])


def measure(server: Any, ids: dict[str, Any], row: str, judge: Any, sheet: list) -> dict[str, float]:
    """Runs one row; retrieval among the 16 by look, scene and named place, each with its interval over the identities."""
    import torch
    from bench._ablation_table import spread

    from likeness.models.demo import world
    from likeness.models.demo.judge import likelihoods

    hits: dict[str, list[float]] = {"retrieval": [], "scene": [], "place": []}
    started = time.time()
    for k in range(IDENTITIES):
        for j in range(PROMPTS):
            scene, place = (k + j) % len(world.SCENES), (k + 2 * j) % len(world.PLACES)
            reference = (k + 5) % IDENTITIES if row == "shuffled" else k
            kind = world.KINDS[int(ids["kind"][k])]
            graph = prompt_for(k, kind, world.SCENES[scene], world.PLACES[place], ROWS[row], reference, 1000 * k + j)
            result = server.run(graph, timeout=600)
            if not result.ok:
                raise RuntimeError(f"{row}, identity {k}: {result.error}")
            pictures = read(result.images["save"])
            with torch.no_grad():
                answers = judge(pictures)
            hits["retrieval"] += (likelihoods(judge, pictures, ids).argmax(1) == k).float().tolist()
            hits["scene"] += (answers["scene"].argmax(1) == scene).float().tolist()
            hits["place"] += (answers["place"].argmax(1) == place).float().tolist()
            if j == 0:
                sheet.append(pictures[0])
    out: dict[str, float] = {}
    for name, values in hits.items():
        low, high = spread(torch.tensor([values]), IDENTITIES)
        out |= {f"{name}_{row}": sum(values) / len(values), f"{name}_{row}_lo": low, f"{name}_{row}_hi": high}
    out[f"seconds_{row}"] = round((time.time() - started) / len(hits["scene"]), 3)
    return {key: round(value, 4) for key, value in out.items()}


def load_judge(weights: Path, world: str = "easy") -> tuple[Any, str]:
    """The judge of a folder of weights, and what its file says of its own accuracy on held-out renders. Raises HarnessError
    for one that never saw this world."""
    from likeness.models.common import files
    from likeness.models.demo.judge import Judge

    state, metadata = files.load(weights / "judge.safetensors")
    if world not in metadata.get("worlds", "easy").split():
        raise HarnessError(f"The judge in {weights.name} never saw the {world} world; make one that did: python dev.py train "
                           f"demo judge --weights {weights}.")
    judge = Judge().eval()
    judge.load_state_dict({k: v.float() for k, v in state.items()})
    return judge, metadata["accuracy"]


def quality(rows: list[str], folder: Path) -> dict[str, Any]:
    """The table of retrieval, scene and place, and a sheet of pictures beside it."""
    import torch
    from PIL import Image

    from harness.server import Server
    from likeness.models.hosting.demo import WEIGHTS

    judge, accuracy = load_judge(WEIGHTS)
    ids = candidates()
    out: dict[str, Any] = {"identities": IDENTITIES, "chance": round(1 / IDENTITIES, 4),
                           "pictures_a_row": IDENTITIES * PROMPTS * NOISES, "judge_on_renders": accuracy}
    with Server(cpu=True) as server:
        save_references(server.input, ids)
        sheet = [read([(server.input / f"identity_{k:02d}.png").read_bytes()])[0] for k in range(IDENTITIES)]
        sheet = list(torch.nn.functional.interpolate(torch.stack(sheet), (64, 64), mode="area"))
        for row in rows:
            out |= measure(server, ids, row, judge, sheet)
    grid = torch.stack(sheet).view(-1, IDENTITIES, 3, 64, 64)
    grid = torch.nn.functional.pad(grid, (1, 1, 1, 1), value=1.0).permute(0, 3, 1, 4, 2).reshape(-1, IDENTITIES * 66, 3)
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((grid.clamp(0, 1) * 255).round().byte().numpy())
    picture.resize((picture.width * 2, picture.height * 2), 0).save(folder / "custany.png")
    return out


def overhead(family: str, threads: int) -> dict[str, float]:
    """One CFG step (two rows) at the true shapes with random weights: with two references over without."""
    from bench._shapes import step_seconds

    plain, injected, peak = step_seconds(family, threads)
    return {f"overhead_{family}": round(injected / plain, 4), f"seconds_plain_{family}": round(plain, 2),
            f"seconds_injected_{family}": round(injected, 2), f"peak_ram_gib_{family}": round(peak, 2)}


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="dev.py bench custany")
    parser.add_argument("--all", action="store_true", help="also each level alone")
    parser.add_argument("--only", choices=("quality", "sd15", "sdxl", "ablation", "decoupling"), nargs="*",
                        default=["quality", "sd15", "sdxl"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapters", type=Path, default=ROOT / "output" / "train" / "demo" / "ablation",
                        help="ablation: folder of `train demo ablation`")
    parser.add_argument("--weights", type=Path, default=None, help="ablation: base, encoders, judge (default: the pack's own)")
    parser.add_argument("--rows", nargs="+", default=[], help="ablation, decoupling: only these rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="ablation, decoupling: training seeds")
    parser.add_argument("--steps", type=int, default=800, help="decoupling: of each training")
    parser.add_argument("--each", type=int, default=6, help="ablation: pictures of each of the 16 identities of a seed")
    parser.add_argument("--out", type=Path, default=Path("output/bench"))
    args = parser.parse_args(argv)
    if {"ablation", "decoupling"} & set(args.only) and len(args.only) > 1:
        raise HarnessError("ablation and decoupling have runs of their own: they name their rows as quality does.")
    out: dict[str, Any] = {}
    if "quality" in args.only:
        out |= quality(list(ROWS) if args.all else ["none", "both", "shuffled"], args.out)
    if "ablation" in args.only:
        from bench import _ablation_table

        out |= _ablation_table.ablation(args.weights, args.adapters, args.out, args.rows, args.seeds, args.each, args.threads)
    if "decoupling" in args.only:
        from bench import _decoupling

        out |= _decoupling.decoupling(args.rows, args.seeds, args.steps, args.threads)
    for family in ("sd15", "sdxl"):
        if family in args.only:
            out |= overhead(family, args.threads)
    return out
