"""A folder of face networks: which file is what."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..common.errors import LikenessError
from .contract import DETECTOR, RECOGNISER, UNKNOWN, Contract, contract_of, read_graph
from .detect import check_detector
from .libraries import need

LICENCE = "insightface's models are for non-commercial research only"


class Found(NamedTuple):
    """One file of a pack; contract None where it cannot be read, and then `why`."""
    path: Path
    contract: Contract | None
    why: str = ""

    @property
    def kind(self) -> str:
        return self.contract.kind if self.contract is not None else "unreadable"


def folder_of(folder: Path) -> Path:
    """The folder that holds the .onnx files: itself, or NAME inside NAME as some archives unpack."""
    nested = folder / folder.name
    return nested if not list(folder.glob("*.onnx")) and list(nested.glob("*.onnx")) else folder


def look(folder: Path, paths: Iterable[Path] = ()) -> list[Found]:
    """Every .onnx file of a pack by name, with what it is. paths: its files where they lie in more folders than one; of several
    with one name the first that can be read."""
    need("onnx")
    named: dict[str, Found] = {}
    for path in sorted(paths or folder_of(folder).glob("*.onnx"), key=lambda path: path.name):
        if path.name in named and named[path.name].contract is not None:
            continue
        try:
            named[path.name] = Found(path, contract_of(read_graph(path)))
        except LikenessError as error:
            named.setdefault(path.name, Found(path, None, str(error)))
    return list(named.values())


def seen(found: list[Found]) -> str:
    """The files with their kinds, for a sentence."""
    return ", ".join(f"{item.path.name} ({item.kind})" for item in found) or "no .onnx file"


def pick(folder: Path, found: list[Found]) -> Mapping[str, Found]:
    """kind -> its first file by name. Raises LikenessError without a detector or a recogniser."""
    out: dict[str, Found] = {}
    for item in found:
        if item.contract is not None and item.kind != UNKNOWN:
            out.setdefault(item.kind, item)
    for kind in (DETECTOR, RECOGNISER):
        if kind not in out:
            broken = " ".join(item.why for item in found if item.contract is None)
            raise LikenessError(f"The face pack {folder.name} has no {kind}, it holds {seen(found)}: put the whole pack, such as "
                                f"buffalo_l or antelopev2, into {folder}. {broken}".strip())
    detector = out[DETECTOR]
    assert detector.contract is not None
    check_detector(detector.path.name, detector.contract)
    return out
