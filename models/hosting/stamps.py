"""Row stamps: a row of a batch gets a subject only if its own conditioning says so.

Guiders order, repeat and split rows as they like, so neither `cond_or_uncond` nor uuids tell whose row is whose. A
small tensor in an entry's `model_conds` travels with the row through all of them. It is read in an APPLY_MODEL
wrapper and handed to our patches through transformer_options.
"""
from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import comfy.conds
import comfy.patcher_extension
import torch

from ..common.errors import LikenessError

KEY = "likeness_rows"
MADE = "likeness_shares"  # in the options of one call of the network: masks that its layers share
SLOTS = 8  # every stamped entry has the same width, else the host could not run them in one call

Conditioning = list[list[Any]]
Guides = tuple[tuple[str, tuple[int, ...]], ...]  # name of a guidance, columns of its word in an entry's rows


class Level:
    """Noise at a share of the sampling, by the table of the model that runs; each share is looked up once."""

    def __init__(self, model: Any):
        self._model = model
        self._known: dict[float, float] = {}

    def __call__(self, share: float) -> float:
        if share not in self._known:
            self._known[share] = float(self._model.model_sampling.percent_to_sigma(share))
        return self._known[share]


class RowStamps(NamedTuple):
    """What APPLY_MODEL found: ids and area (height, width, y, x in latent cells, or None) of every row."""
    ids: tuple[tuple[int, ...], ...]   # an id stands twice when it was injected twice
    areas: tuple[tuple[int, int, int, int] | None, ...]
    latent: tuple[int, int]   # height and width of the whole latent
    sigma: float
    level: Level = Level(None)  # asked only by what does not act through the whole sampling


def check_rows(stamps: RowStamps, rows: int) -> None:
    """Raises LikenessError where a layer sees other rows than were stamped."""
    if len(stamps.ids) != rows:
        raise LikenessError(f"Another node made {rows} rows out of {len(stamps.ids)} inside the model, as attention couple does, "
                            "and nothing tells which of them carry the subject; leave that node out, or the injector.")


class CondStamp(comfy.conds.CONDRegular):
    """(1, 8) ids; on its way into a batch it learns the area of its entry. guides: for whoever holds the entry itself."""

    def __init__(self, cond: torch.Tensor, guides: Guides = ()):
        super().__init__(cond)
        self.guides = guides

    def process_cond(self, batch_size: int, area=None, **kwargs):
        place = list(area)[:2] + list(area)[len(area) // 2:len(area) // 2 + 2] if area is not None else [0] * 4
        row = torch.cat([self.cond, torch.tensor([place], dtype=self.cond.dtype)], 1)
        return comfy.conds.CONDRegular(row.repeat(batch_size, 1))


def stamped(entry: list[Any], number: int, guides: Guides = ()) -> list[Any]:
    """A copy of one CONDITIONING entry that carries `number` and `guides` beside what it carried; 0 only makes room."""
    stamp = stamp_of(entry[1])
    old = stamp.cond[0].tolist() if stamp is not None else [0] * SLOTS
    known = dict(stamp.guides) if stamp is not None else {}
    if number:
        if 0 not in old:
            raise LikenessError(f"One prompt can carry {SLOTS} subjects, this would be one more; use fewer injectors in a row.")
        old[old.index(0)] = number
    return _with(entry, CondStamp(torch.tensor([old], dtype=torch.int64), tuple({**known, **dict(guides)}.items())))


def without(entry: list[Any], gone: Collection[int]) -> list[Any]:
    """A copy of one CONDITIONING entry that makes room for stamps and carries none of the subjects `gone`."""
    stamp = stamp_of(entry[1])
    left = [0 if number in gone else number for number in stamp.cond[0].tolist()] if stamp is not None else [0] * SLOTS
    return _with(entry, CondStamp(torch.tensor([left], dtype=torch.int64), stamp.guides if stamp is not None else ()))


def stamp_of(options: dict[str, Any]) -> CondStamp | None:
    """The stamp of an entry's options, as a node or as the sampler sees them."""
    return options.get("model_conds", {}).get(KEY)


def without_rows(entry: list[Any], start: int, count: int, end: int) -> list[Any]:
    """The entry after `count` of its rows from `start` on were taken out and what follows in the window moved up."""
    stamp = stamp_of(entry[1])
    if stamp is None or not stamp.guides:
        return entry

    def moved(column: int) -> int:
        return column - count if start + count <= column < end else column
    guides = tuple((name, tuple(moved(c) for c in columns if not start <= c < start + count)) for name, columns in stamp.guides)
    return _with(entry, CondStamp(stamp.cond, guides))


def _with(entry: list[Any], stamp: CondStamp) -> list[Any]:
    return [entry[0], {**entry[1], "model_conds": {**entry[1].get("model_conds", {}), KEY: stamp}}]


def numbers(options: dict[str, Any]) -> list[int]:
    """Ids in the options of a CONDITIONING entry, or of a converted one, in rising order."""
    stamp = options.get("model_conds", {}).get(KEY)
    return sorted(number for number in stamp.cond[0].tolist() if number) if stamp is not None else []


def _read(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """APPLY_MODEL: takes the stamp out of the model's inputs and into its options."""
    stamp = kwargs.pop(KEY, None)
    options = dict(transformer_options or {})
    if stamp is not None:
        rows = stamp.tolist()
        size = options.get(SIZE_KEY, tuple(x.shape[-2:]))
        areas = tuple(tuple(row[SLOTS:]) if row[SLOTS] else None for row in rows)
        options[KEY] = RowStamps(tuple(tuple(i for i in row[:SLOTS] if i) for row in rows), areas, size, float(t.max()),
                                 Level(executor.class_obj))
        options[MADE] = {}
    else:
        options.pop(KEY, None)
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


SIZE_KEY = "likeness_latent_size"


def _note_size(executor, model, conds, x_in, timestep, model_options):
    """CALC_COND_BATCH: notes the whole latent's size, which a row with an area never sees."""
    options = {**model_options.get("transformer_options", {}), SIZE_KEY: tuple(x_in.shape[-2:])}
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})


def add_reader(model: Any) -> None:
    """Puts the reading wrappers into a cloned MODEL, once however many of our patches it gets."""
    kinds = comfy.patcher_extension.WrappersMP
    for kind, wrapper in ((kinds.APPLY_MODEL, _read), (kinds.CALC_COND_BATCH, _note_size)):
        have = model.get_wrappers(kind, KEY) if hasattr(model, "get_wrappers") else []
        if wrapper not in have:
            model.add_wrapper_with_key(kind, KEY, wrapper)
