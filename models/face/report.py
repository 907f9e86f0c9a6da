"""Check Files: which face files are there, what they are, and what is missing."""
from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..common import files
from ..common.errors import LikenessError
from .contract import EMAP, KNOWN, MINIATURE, SWAPPER, Contract, contract_of, emap_of, read_graph
from .libraries import LIBRARIES, there
from .pack import LICENCE

PACKS = {"buffalo_l": ("det_10g.onnx", "w600k_r50.onnx"), "antelopev2": ("scrfd_10g_bnkps.onnx", "glintr100.onnx")}
EXTRAS = {"2d106det.onnx": "the hull of Face Swap", "genderage.onnx": "gender and age in Select Faces"}
Step = Callable[[int], None]
USES = {"buffalo_l": "Face Swap and PhotoMaker v2", "antelopev2": "InstantID"}


def _shapes(contract: Contract) -> str:
    def text(items: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
        shown = ["x".join(str(side) if side else "?" for side in shape) or "any" for _, shape in items[:3]]
        return ", ".join(shown) + (f" and {len(items) - 3} more" if len(items) > 3 else "")

    return f"in {text(contract.inputs)}, out {text(contract.outputs)}"


class Described(NamedTuple):
    """One line on a file, and its contract; None where the line says what is wrong with it."""
    line: str
    contract: Contract | None


def describe(path: Path, hashed: bool, step: Step | None = None) -> Described:
    """Kind, shapes, operators and known hash of a file, or what is wrong with it. step: called while it is read."""
    try:
        model = read_graph(path)
        contract = contract_of(model)
        words = [f"{path.name}: {contract.kind}, {path.stat().st_size / 1e6:.1f} MB", _shapes(contract)]
        if contract.kind == SWAPPER:
            emap_of(path, model)
            words.append(f"identity map {EMAP} found")
        words.append("operators " + " ".join(contract.operators))
        if hashed:
            digest = files.sha256(path, step)
            words.append(f"sha256 {digest[:16]}..., {_known(path.stem, digest)}")
        return Described("; ".join(words), contract)
    except LikenessError as error:
        return Described(str(error), None)


def _is_swapper(path: Path, contract: Contract | None) -> bool:
    """By what it is; of a file that cannot be read, whose line says why, by its name."""
    if contract is None:
        return path.name.startswith("inswapper")
    return contract.kind == SWAPPER and contract.space != MINIATURE


def _known(stem: str, digest: str) -> str:
    if digest in KNOWN:
        return f"the published {KNOWN[digest]}"
    if stem in KNOWN.values():
        return f"not the published {stem}: download it again unless you made it"
    return "no published sum is known for this file"


def packages() -> list[str]:
    """Which installed packages own cv2 and onnxruntime; two in one folder overwrite each other."""
    owners = metadata.packages_distributions()
    lines = [f"{name}: {'installed' if there(name) else 'MISSING or broken'}" for name in LIBRARIES]
    for module in ("cv2", "onnxruntime"):
        names = sorted(set(owners.get(module, ())))
        listed = ", ".join(f"{name} {metadata.version(name)}" for name in names) or "no package"
        both = ". WARNING: they overwrite each other's files, keep one" if len(names) > 1 else ""
        lines.append(f"{module} comes from {listed}{both}")
    return lines


def check(root_names: list[str], packs: dict[str, list[Path]], loose: list[Path], hashed: bool,
          step: Step | None = None) -> str:
    """The report. root_names: folders that were searched. packs: name -> its files. loose: .onnx files outside of packs.
    step: called with the bytes that were read, while sums are made."""
    lines = ["Packages", *packages(), "", "Face packs"]
    told = {path: describe(path, hashed, step) for path in [*chain(*packs.values()), *loose]}
    for name, paths in sorted(packs.items()):
        lines += [f"{name}:", *(f"- {told[path].line}" for path in paths)]
    place = root_names[0] if root_names else "models/insightface"
    for name, wanted in PACKS.items():
        have = {path.name for path in packs.get(name, ())}
        lost = [file for file in wanted if file not in have]
        if lost:
            lines.append(f"missing for {USES[name]}: {', '.join(lost)}; they go into {place}/models/{name}")
        absent = EXTRAS.items() if have else ()
        lines += [f"not in {name}, and wanted for {use} alone: {file}" for file, use in absent if file not in have]
    lines += ["", "Swappers and other files", *(f"- {told[path].line}" for path in loose)]
    if not any(_is_swapper(path, own.contract) for path, own in told.items()):
        lines.append(f"missing for Face Swap: inswapper_128.onnx; it goes into {place}")
    return "\n".join([*lines, "", f"Licence: {LICENCE}, and so is everything that is made with them."])
