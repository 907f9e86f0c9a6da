"""Numbers, intervals, verdicts, tables and picture grids of the ablation."""
from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench._ablation import IDENTITIES, MEASURES, ROWS, Studio, save_grid
from bench._looks import HARD
from torch import Tensor

DRAWS = 2000
NAMES = {
    "none": "text only", "described": "text that tells the whole look",
    "global": "global level, trained alone", "local": "local level, trained alone", "both": "both levels, both encoders",
    "global_of_both": "both trained, local switched off", "local_of_both": "both trained, global switched off",
    "shuffled": "reference of another subject", "dino": "DINO only", "mae": "MAE only", "clip": "CLIP only",
    "coupled": "nine tenths of the pairs of one pose, no decoupling", "decoupled": "the same, decoupling",
    "ceiling": "judge on true renders", "coded": "judge on true renders through the first stage",
}
NAMES_OF = {"decoupling": NAMES | {"both": "pairs of any pose, no decoupling"}}  # by table, where it is not `NAMES`
TABLES = {"levels": ("none", "described", "global", "local", "both", "global_of_both", "local_of_both", "shuffled"),
          "encoders": ("dino", "mae", "clip", "both"),
          "decoupling": ("both", "coupled", "decoupled")}
OVER = (("retrieval_hard", "both", "local"), ("retrieval_hard", "local", "global"), ("retrieval_hard", "global", "none"),
        ("retrieval_hard", "both", "dino"), ("retrieval_hard", "both", "mae"), ("retrieval_hard", "both", "clip"),
        ("leak", "coupled", "decoupled"))
PREMISE = ("leak", "coupled", "both")  # pairs of one pose do leak, else there is nothing to decouple
GOALS = (("retrieval", "both", 0.85), ("retrieval_hard", "both", 0.60), ("scene", "both", 0.95), ("place", "both", 0.90))
MOST_LOST = 0.05  # retrieval that decoupling may cost
MOST_BY_CHANCE = 2 / IDENTITIES  # retrieval with a shuffled reference
FEWEST = 3  # training seeds that a verdict wants


def drawn(seeds: int, groups: int, each: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Bootstrap draws of cells (seeds, groups, each): training seeds anew, within each identities, pictures within those."""
    g = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        seed = torch.randint(0, seeds, (seeds, 1, 1), generator=g)
        group = torch.randint(0, groups, (seeds, groups, 1), generator=g)
        yield seed, group, torch.randint(0, each, (seeds, groups, each), generator=g)


def spread(values: Tensor, groups: int = 1, over: Tensor | None = None) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (seeds, pictures), or of its ratio to the mean of `over`; an identity's pictures
    stand together, `groups` identities."""
    cells, below = (None if one is None else one.unflatten(1, (groups, -1)) for one in (values, over))
    assert cells is not None
    found = [cells[draw].mean() / (1.0 if below is None else below[draw].mean()) for draw in drawn(*cells.shape)]
    ordered = torch.stack(found).sort().values
    return float(ordered[round(0.025 * DRAWS) - 1]), float(ordered[round(0.975 * DRAWS) - 1])


def entry(name: str, values: Tensor) -> dict[str, float]:
    """Mean and both ends of its interval."""
    low, high = spread(values, IDENTITIES)
    return {name: float(values.mean()), f"{name}_lo": low, f"{name}_hi": high}


def paired(name: str, more: dict[int, dict[str, Any]], less: dict[int, dict[str, Any]], measure: str) -> dict[str, float]:
    """How much one row has over another, picture by picture: both have the same identities, prompts, references and noises."""
    seeds = sorted(more.keys() & less.keys())
    if not seeds:
        return {}
    return entry(name, torch.stack([torch.tensor(more[seed][measure]) - torch.tensor(less[seed][measure]) for seed in seeds]))


def verdict(numbers: dict[str, Any], measure: str, a: str, b: str) -> str:
    """Whether a is above b: only where the intervals do not overlap, and never from one or two trainings."""
    if min(numbers[f"seeds_{a}"], numbers[f"seeds_{b}"]) < FEWEST:
        return f"not judged, fewer than {FEWEST} training seeds"
    if numbers[f"{measure}_{a}_lo"] > numbers[f"{measure}_{b}_hi"]:
        return "shown"
    return "the other way round" if numbers[f"{measure}_{a}_hi"] < numbers[f"{measure}_{b}_lo"] else "not shown"


def summary(rows: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Flat numbers from what was measured: row -> training seed -> entry."""
    out: dict[str, Any] = {}
    for row, found in rows.items():
        for measure in MEASURES:
            out |= entry(f"{measure}_{row}", torch.tensor([seed[measure] for seed in found.values()]))
        first = next(iter(found.values()))
        out[f"seeds_{row}"], out[f"pictures_{row}"] = len(found), len(found) * len(first[MEASURES[0]])
        if row in ROWS:
            out[f"memory_mib_{row}"] = first["memory_mib"]
    for measure, a, b in OVER:
        if a in rows and b in rows:
            out[f"verdict_{measure}_{a}_over_{b}"] = verdict(out, measure, a, b)
            out |= paired(f"more_{measure}_{a}_than_{b}", rows[a], rows[b], measure)
    measure, a, b = PREMISE
    if a in rows and b in rows:
        out[f"premise_{measure}_{a}_over_{b}"] = verdict(out, measure, a, b)
    for measure, row, wanted in GOALS:
        if row in rows:
            out[f"goal_{measure}_{row}"] = f"{'reached' if out[f'{measure}_{row}'] >= wanted else 'missed'}, {wanted}"
    if "shuffled" in rows:
        fell = out["retrieval_shuffled"] <= MOST_BY_CHANCE
        out["goal_retrieval_shuffled"] = f"{'reached' if fell else 'missed'}, at most {MOST_BY_CHANCE}"
    coupled, decoupled = (rows.get(name, {}) for name in ("coupled", "decoupled"))
    if coupled.keys() & decoupled.keys():
        for measure in ("retrieval", "retrieval_hard"):
            out |= paired(f"lost_{measure}_decoupled", coupled, decoupled, measure)
        most = out["lost_retrieval_decoupled"]
        out["goal_lost_retrieval_decoupled"] = f"{'reached' if most <= MOST_LOST else 'missed'}, at most {MOST_LOST}"
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in out.items()}


def markdown(numbers: dict[str, Any]) -> str:
    """The tables for EVIDENCE.md."""
    out = []
    for title, rows in TABLES.items():
        if sum(f"retrieval_{row}" in numbers for row in rows) < 2:
            continue  # nothing to compare
        out += [f"### {title}", "",
                "| | trainings x steps, pictures | retrieval@1 of 16 | hard, of 64 | of those that differ in one | scene | "
                "place | faces as the reference | time over text only | MiB of weights, keys, values |",
                "|---|---|---|---|---|---|---|---|---|---|"]
        for row in (*rows, "ceiling", "coded"):
            if f"retrieval_{row}" in numbers:
                trained = f"{numbers[f'seeds_{row}']} x {steps}, " if (steps := numbers.get(f"steps_{row}")) else ""
                cells = [f"{trained}{numbers[f'pictures_{row}']}"]
                # Creatures of the easy world face one way, references of it both: half of them agree, whatever an adapter does.
                cells += ["" if m == "leak" and numbers["world"] == "easy" else
                          f"{numbers[f'{m}_{row}']:.2f} ({numbers[f'{m}_{row}_lo']:.2f} to {numbers[f'{m}_{row}_hi']:.2f})"
                          for m in MEASURES]
                more = [f"{numbers[f'{m}_{row}']:.2f}" if f"{m}_{row}" in numbers else ""
                        for m in ("time_over_plain", "memory_mib")]
                out.append(f"| {' | '.join([NAMES_OF.get(title, NAMES)[row], *cells, *more])} |")
        chances = " | ".join(f"{numbers[name]:.3f}" for name in ("chance", "chance_hard", "chance_near"))
        out += [f"| chance | | {chances} | 0.20 | 0.33 | {'' if numbers['world'] == 'easy' else '0.50'} | | |", ""]
    lines = [f"Missing: {numbers['missing']}. Goals ask for means. A verdict asks whether the rows' own intervals lie apart. "
             "`more_` and `lost_` compare picture by picture: an interval above 0 there means a difference, also where the "
             "verdict is \"not shown\".", ""]
    lines += [f"- `{key}`: {numbers[key]}" for key in numbers if key.startswith(("verdict_", "premise_", "goal_"))]
    lines += [f"- `{key}`: {numbers[key]} ({numbers[f'{key}_lo']} to {numbers[f'{key}_hi']}), picture by picture"
              for key in numbers if key.startswith(("more_", "lost_")) and not key.endswith(("_lo", "_hi"))]
    return "\n".join([*out, *lines]) + "\n"


def labelled(strips: list[tuple[str, Tensor]], path: Path) -> None:
    """A grid with the rows' names on the left; each strip is (columns, 3, 64, 64)."""
    from PIL import Image, ImageDraw

    grid = torch.nn.functional.pad(torch.stack([strip for _, strip in strips]), (1, 1, 1, 1), value=1.0)
    save_grid(torch.nn.functional.interpolate(grid.flatten(0, 1), scale_factor=2).unflatten(0, grid.shape[:2]), path)
    with Image.open(path) as picture:
        sheet = Image.new("RGB", (picture.width + 230, picture.height), "white")
        sheet.paste(picture, (230, 0))
        for number, (name, _) in enumerate(strips):
            words = textwrap.fill(name, 30)
            ImageDraw.Draw(sheet).multiline_text((6, number * 132 + 50), words, fill="black", font_size=14)
        sheet.save(path)


def read_strip(path: Path) -> Tensor:
    """(2, 16, 3, 64, 64) of a file that the studio kept."""
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        pixels = torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    rows, columns = pixels.shape[1] // 64, pixels.shape[2] // 64
    return pixels.view(3, rows, 64, columns, 64).permute(1, 3, 0, 2, 4)


def grids(studio: Studio, rows: dict[str, dict[int, dict[str, Any]]], seed: int) -> None:
    """One sheet a table with the pictures of one training seed."""
    t = studio.trials(seed)
    first = torch.arange(len(t.ids["kind"])) * studio.each
    who = torch.arange(len(first))

    def reference(turn: int) -> Tensor:
        shown = t.picture[who, t.mirror[first + turn]]
        return torch.nn.functional.interpolate(shown, (64, 64), mode="area")
    for title, names in TABLES.items():
        if len(rows.keys() & set(names)) < 2:
            continue
        turns = (0, 1) if title == "decoupling" else (0,)
        called, strips = NAMES_OF.get(title, NAMES), []
        for turn in turns:
            strips.append(("reference", reference(turn)))
            strips += [(called[name], read_strip(studio.strip(name, seed))[turn]) for name in names if name in rows
                       and studio.has(name, seed)]
        labelled(strips, studio.folder / f"ablation_{title}.png")


def _same(name: str, steps: set[int]) -> int:
    """Of all trainings that are compared; raises HarnessError where they differ."""
    from harness.paths import HarnessError

    if len(steps) > 1:
        told = " and ".join(map(str, sorted(steps)))
        raise HarnessError(f"The trainings of {name} had {told} steps; compared ones must be equal.")
    return steps.pop()


def ablation(weights: Path | None, adapters: Path, folder: Path, only: list[str], seeds: list[int], each: int,
             threads: int) -> dict[str, Any]:
    """All rows whose adapters are there, with what is missing named; writes tables and grids into `folder`."""
    from harness.paths import HarnessError
    from likeness.models.hosting.demo import WEIGHTS

    unknown = sorted(set(only) - set(ROWS))
    if unknown or each < 2:
        raise HarnessError(f"There is no row {unknown[0]}, there are {', '.join(ROWS)}." if unknown else
                           "--each must be 2 or more: references face both ways.")
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():  # as the host runs nodes
        studio = Studio(weights or WEIGHTS, adapters, folder, each)
        rows: dict[str, dict[int, dict[str, Any]]] = {}
        missing = []
        for seed in seeds:
            for name in ("ceiling", "coded", *(only or ROWS)):
                if name in ROWS and not studio.has(name, seed):
                    missing.append(f"{name}_{seed}")
                else:
                    rows.setdefault(name, {})[seed] = studio.measure(name, seed)
        trained = {name: _same(name, {studio.steps(name, seed) for seed in found})
                   for name, found in rows.items() if name in ROWS}
        _same("the table", {steps for steps in trained.values() if steps} or {0})
        near = [count for seed in seeds for count in studio.trials(seed).near]
        out = {"training_seeds": len(seeds), "chance": round(1 / IDENTITIES, 4), "chance_hard": round(1 / HARD, 4),
               "chance_near": round(sum(1 / (1 + count) for count in near) / len(near), 4), "chance_leak": 0.5,
               "judge_on_renders": studio.judge_says, "hard_in_one_attribute": round(sum(near) / len(near), 1),
               "device": str(studio.model.load_device), "world": studio.world,
               "missing": ", ".join(missing) or "nothing", **summary(rows)}
        out |= {f"time_over_plain_{name}": round(studio.time_over_plain(name, seeds[0]), 3) for name in rows
                if name in ROWS and seeds[0] in rows[name]}
        out |= {f"steps_{name}": steps for name, steps in trained.items()}
        grids(studio, rows, seeds[0])
    (folder / "ablation.md").write_text(markdown(out), encoding="utf-8")
    return out
