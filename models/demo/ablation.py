"""Which adapters the tables of evidence compare, and how their folders are called."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

SEEDS, STEPS = (0, 1, 2), 2600
# Short runs have to learn the subject and nothing else: its own places count nine times, the noisier of two timesteps is
# taken, and no step goes to a sample whose reference is dropped (both levels are off then, the adapter has no part in it).
RECIPE = {"lr": 2e-3, "noisiest_of": 2, "subject_weight": 8.0, "drop_reference": 0.0, "drop_both": 0.0}


class Variant(NamedTuple):
    """What differs from one trained adapter to the next; everything else is the recipe's."""
    encoders: tuple[str, ...] = ("dino", "mae")
    # Share of pairs whose reference stands as the target does; on an easy base, where no pose varies, none can leak.
    correlate: float = 0.0
    decouple: str = "off"
    # Chance of a sample without this level; 1 trains the other alone.
    global_off: float = 0.1
    local_off: float = 0.1


VARIANTS = {
    "both": Variant(),
    "global": Variant(local_off=1.0),
    "local": Variant(global_off=1.0),
    "dino": Variant(("dino",)),
    "mae": Variant(("mae",)),
    "clip": Variant(("clip",)),
    "coupled": Variant(correlate=0.9),
    "decoupled": Variant(correlate=0.9, decouple="channel"),
}


def folder_of(adapters: Path, variant: str, seed: int) -> Path:
    """Where the run of a variant and training seed lies."""
    return adapters / f"{variant}_{seed}"
