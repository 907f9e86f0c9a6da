"""Whether the decoupling branch keeps a pose out of the picture, in a world where a pose leaks soon.

CustAny's own training step on a base that draws at once and is trained too, as the paper trains its whole UNet: three layers
of perceptrons turn the rows of the prompt (word, scene, place, facing) into the miniature's latents. Half of the captions tell
where the creature faces. What stands for the class token tells it: the means of the picture's two halves. Drawings are judged
in latents by the nearest true one, so no trained judge is needed.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BATCH, PAIRS, TURNS = 64, 2048, 16
WIDTH, HIDDEN, LR, COUPLED = 96, 512, 2e-3, 0.95
TOLD = ("right", "left")
MEASURES = ("retrieval", "leak", "facing")


class Case(NamedTuple):
    """correlate: share of pairs whose reference has the target's facing; it comes by chance in half of the others."""
    correlate: float = COUPLED
    decouple: str = "channel"
    contrast_mode: str = "raw"
    weight_contrast: float = 0.5


CASES = {
    "free": Case(0.0, "off"),
    "coupled": Case(decouple="off"),
    "raw": Case(),  # as the paper prints it
    "raw_low": Case(weight_contrast=0.2),
    "abs": Case(contrast_mode="abs"),
    "clamp": Case(contrast_mode="clamp"),
}


class Drawer(nn.Module):
    """A base (see models/training/base.Base) that draws at once and is trained, too."""
    width, layers, device = WIDTH, (("output.0.0", HIDDEN),), torch.device("cpu")

    def __init__(self, words: list[str], embed_width: int, shape: tuple[int, ...], seed: int):
        super().__init__()
        g = torch.Generator().manual_seed(100 + seed)
        self.words, self.embed_width, self.shape = words, embed_width, shape
        self.table = torch.randn(len(words), WIDTH, generator=g)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.read = nn.Sequential(nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, HIDDEN), nn.GELU())
            self.draw = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, shape.numel()))

    def encode_text(self, captions: list[str], words: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.table[torch.tensor([[self.words.index(word) for word in caption.split("|")] for caption in captions])]
        return rows, torch.zeros(len(captions), dtype=torch.long), torch.ones(len(captions), dtype=torch.long)

    def timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.zeros(n)

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, None]:
        return torch.zeros_like(latents), latents, None

    def denoise(self, x_t: Tensor, t: Tensor, rows: Tensor, middle: Any = None, cross: Any = None) -> Tensor:
        h = self.read(rows.flatten(1))[:, None]
        return self.draw(middle("output.0.0", h) if middle else h).view(len(rows), *self.shape)


class Asked(NamedTuple):
    """What is drawn for the judge: n = 16 identities x TURNS; true latents of all identities, both facings, at what is asked."""
    features: list[tuple[Tensor, Tensor]]
    captions: list[tuple[str, str]]  # facing not told, and told against the reference
    words: list[str]
    identity: Tensor
    facing: Tensor   # (n,) of the reference
    truth: Tensor    # (n, 16, 2, ...)


def caption(kind: int, scene: int, place: int, facing: int | None) -> str:
    from likeness.models.demo import world

    return "|".join((world.KINDS[kind], world.SCENES[scene], world.PLACES[place], "" if facing is None else TOLD[facing]))


def pooled(features: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Means of the left and the right half for the class token, which in the miniature learned from mirrored views who it is
    and hardly tells where it faces."""
    out = []
    for _, patches in features:
        side = round(patches.shape[1] ** 0.5)
        grid = patches.float().unflatten(1, (side, side))
        halves = torch.cat([half.mean((1, 2)) for half in grid.chunk(2, 2)], 1)
        out.append((halves, halves[:, None]))
    return out


def asked(base: Any, seed: int) -> Asked:
    """Held-out identities; each turn has one scene and place, and half of the references face left."""
    from bench._ablation import FIRST, IDENTITIES
    from bench.custany import candidates

    from likeness.models.demo import creatures, world
    from likeness.models.demo.lessons import REFERENCE_VARIATION

    ids, g = candidates(FIRST + seed), torch.Generator().manual_seed(700 + seed)
    who = torch.arange(IDENTITIES)
    parts: list[list[tuple[Tensor, Tensor]]] = []
    truth, captions, words = [], [], []
    for turn in range(TURNS):
        scene, place, facing = turn % len(world.SCENES), turn % len(world.PLACES), (who + turn) % 2
        pose = world.draw_poses(IDENTITIES, g, REFERENCE_VARIATION) | {"mirror": facing}
        parts.append(pooled(base.features(creatures.draw_references(ids, pose).picture)))
        kinds = ids["kind"].tolist()
        captions += [(caption(kind, scene, place, None), caption(kind, scene, place, 1 - side))
                     for kind, side in zip(kinds, facing.tolist(), strict=True)]
        words += [world.KINDS[kind] for kind in kinds]
        drawn = {}
        for kind in sorted(set(kinds)):
            for side in (0, 1):
                pose = world.draw_poses(IDENTITIES, g) | {"place": torch.full((IDENTITIES,), place),
                                                          "mirror": torch.full((IDENTITIES,), side)}
                looks = {**ids, "kind": torch.full((IDENTITIES,), kind)}
                scenes, details = torch.full((IDENTITIES,), scene), torch.full((IDENTITIES, 8), 0.5)
                drawn[kind, side] = base.encode_image(creatures.draw_pictures(looks, pose, scenes, details).picture)
        truth += [torch.stack([drawn[kind, 0], drawn[kind, 1]], 1) for kind in kinds]
    features = [(torch.cat([part[e][0] for part in parts]), torch.cat([part[e][1] for part in parts]))
                for e in range(len(parts[0]))]
    facings = torch.cat([(who + turn) % 2 for turn in range(TURNS)])
    # An identity's drawings stand together: the intervals draw identities.
    order = torch.arange(len(words)).view(TURNS, IDENTITIES).T.flatten()
    return Asked([(cls[order], patches[order]) for cls, patches in features], [captions[k] for k in order],
                 [words[k] for k in order], who.repeat(TURNS)[order], facings[order], torch.stack(truth)[order])


def trained(case: Case, seed: int, data: Any, encoders: tuple[tuple[str, int], ...], steps: int) -> tuple[Any, Drawer]:
    """Adapter and drawer after some steps of CustAny's own step."""
    from likeness.models.custany.config import CustAnyConfig
    from likeness.models.demo import world
    from likeness.models.training.base import Batch
    from likeness.models.training.config import TrainConfig
    from likeness.models.training.custany import CustAnyTask

    words = ["", *TOLD, *world.KINDS, *world.SCENES, *(place for place in world.PLACES if place not in TOLD)]
    base = Drawer(words, data.embeds.shape[1], data.latents.shape[1:], seed)
    settings = TrainConfig(seed=seed, decouple=case.decouple, contrast_mode=case.contrast_mode,
                           weight_contrast=case.weight_contrast, drop_text=0, drop_reference=0, drop_both=0, global_off=0,
                           local_off=1)  # the branch acts on the word alone
    task = CustAnyTask(base, CustAnyConfig(WIDTH, encoders, base.layers), settings)
    parameters = [*base.parameters(), *(p for module in task.modules().values() for p in module.parameters())]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = torch.Generator().manual_seed(seed)
    features, whole = pooled(data.features), (~data.garment).nonzero()[:, 0]  # a hat alone faces nowhere
    for _ in range(steps):
        index = whole[torch.randint(0, len(whole), (BATCH,), generator=g)]
        tell = torch.rand(BATCH, generator=g) < 0.5
        facts = zip(data.identity["kind"][index].tolist(), data.scene[index].tolist(), data.pose["place"][index].tolist(),
                    data.pose["mirror"][index].tolist(), tell.tolist(), strict=True)
        captions = [caption(kind, scene, place, side if told else None) for kind, scene, place, side, told in facts]
        batch = Batch(None, None, data.latents[index].float(), captions, [text.split("|")[0] for text in captions],
                      [(cls[index], patches[index]) for cls, patches in features], data.embeds[index].float(), None)
        optimizer.zero_grad(set_to_none=True)
        task.step(batch, g)
        optimizer.step()
        rate.step()
    return task, base


@torch.no_grad()
def judged(task: Any, base: Drawer, t: Asked) -> dict[str, list[float]]:
    """Per picture 1 or 0. retrieval: the nearest of the 16 looks is its own; leak: facing untold, it faces as its reference;
    facing: told to face the other way, it does."""
    tokens, _ = task.adapter.encode(t.features)
    out: dict[str, list[float]] = {}
    rows_of = torch.arange(len(t.identity))
    for which, names in enumerate((("retrieval", "leak"), ("facing",))):
        rows, _, _ = base.encode_text([texts[which] for texts in t.captions], t.words)
        rows = rows.clone()
        rows[:, 0] += task.adapter.word_delta(tokens, rows[:, 0])
        drawn = base.denoise(rows, rows, rows)
        far = (t.truth - drawn[:, None, None]).square().flatten(3).mean(-1)
        side = far[rows_of, t.identity].argmin(1)
        hits = {"retrieval": far.amin(2).argmin(1) == t.identity, "leak": side == t.facing, "facing": side == 1 - t.facing}
        out |= {name: hits[name].float().tolist() for name in names}
    return out


def decoupling(only: list[str], seeds: list[int], steps: int, threads: int) -> dict[str, Any]:
    """Every case with every training seed: flat numbers with their intervals, verdicts on what decoupling takes and costs."""
    from bench._ablation import IDENTITIES
    from bench._ablation_table import entry, paired, verdict

    from harness.paths import HarnessError
    from likeness.models.demo import lessons, world
    from likeness.models.hosting.demo import WEIGHTS
    from likeness.models.hosting.training_base import MiniatureBase

    unknown = sorted(set(only) - set(CASES))
    if unknown:
        raise HarnessError(f"There is no row {unknown[0]}, there are {', '.join(CASES)}.")
    cases = {name: case for name, case in CASES.items() if not only or name in only}
    torch.set_num_threads(threads)
    base = MiniatureBase(WEIGHTS / "base.safetensors", [WEIGHTS / "dino.safetensors", WEIGHTS / "mae.safetensors"])
    halves = tuple((config.family, 2 * config.width) for _, config in base.encoders)
    data = {share: lessons.prepare(PAIRS, 21, world.Variation(mirror=True), base.encode_image, base.features, base.embed_image,
                                   share) for share in sorted({case.correlate for case in cases.values()})}
    rows: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in cases}
    for seed in seeds:
        t = asked(base, seed)
        for name, case in cases.items():
            rows[name][seed] = judged(*trained(case, seed, data[case.correlate], halves, steps), t)
            print(f"{name}, training seed {seed}: {[round(sum(v) / len(v), 3) for v in rows[name][seed].values()]}", flush=True)
    out: dict[str, Any] = {"training_seeds": len(seeds), "steps": steps, "pictures_a_row": len(seeds) * IDENTITIES * TURNS,
                           "chance_retrieval": 1 / IDENTITIES, "chance_leak": 0.5}
    for name, found in rows.items():
        out[f"seeds_{name}"] = len(found)
        for measure in MEASURES:
            out |= entry(f"{measure}_{name}", torch.tensor([row[measure] for row in found.values()]))
    for name in sorted(rows.keys() - {"coupled"}) if "coupled" in rows else ():
        out[f"verdict_leak_coupled_over_{name}"] = verdict(out, "leak", "coupled", name)
        out |= paired(f"less_leak_{name}", rows["coupled"], rows[name], "leak")
        out |= paired(f"lost_retrieval_{name}", rows["coupled"], rows[name], "retrieval")
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in out.items()}
