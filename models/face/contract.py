"""What an .onnx file is: told from the shapes of its inputs and outputs, never from its name."""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from .libraries import need

DETECTOR, RECOGNISER, LANDMARKS, LANDMARKS_3D, ATTRIBUTES, SWAPPER, UNKNOWN = (
    "detector", "recogniser", "106 landmarks", "3D landmarks", "gender and age", "swapper", "unknown network")
EMAP, EMAP_WIDTH = "buff2fs", 512
FLOAT16 = 10  # ONNX's number of the type
SPACES = ("w600k_r50", "glintr100")  # of buffalo_l and of antelopev2
MINIATURE = "miniature"  # of the heads of the miniature world's creatures
SPACE_KEY, LICENCE_KEY = "likeness.space", "likeness.licence"  # in the metadata of files that are made for this pack
# SHA-256 as published -> name
KNOWN = {
    "e4a3f08c753cb72d04e10aa0f7dbe3deebbf39567d4ead6dce08e98aa49e16af": "inswapper_128",
    "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91": "det_10g",
    "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43": "w600k_r50",
    "df5c06b8a0c12e422b2ed8947b8869faa4105387f199c477af038aa01f9a45cc": "1k3d68",
    "f001b856447c413801ef5c42091ed0cd516fcd21f2d6b79635b1e733a7109dbf": "2d106det",
    "4fde69b1c810857b88c64a335084f1c3fe8f01246c9a191b48c7bb756d6652fb": "genderage",
}

Shape = tuple[int, ...]  # 0 stands for an open side


class Contract(NamedTuple):
    """inputs, outputs: (name, shape) in the file's order. mean, std: what the network wants taken off its pixels 0..255.

    operators: the kinds of its nodes. space, licence: name of its embeddings and licence, where the file itself says them.
    half: whether it is stored or computes in float16.
    """
    kind: str
    inputs: tuple[tuple[str, Shape], ...]
    outputs: tuple[tuple[str, Shape], ...]
    mean: float
    std: float
    operators: tuple[str, ...]
    space: str = ""
    licence: str = ""
    half: bool = False

    @property
    def size(self) -> int:
        """Side of its square picture in pixels, 0 for any."""
        return next((shape[3] for _, shape in self.inputs if len(shape) == 4), 0)


def read_graph(path: str | Path) -> Any:
    """The parsed file. Raises LikenessError with one sentence for what is no whole ONNX file."""
    path = Path(path)
    files.check_file(path)
    onnx = need("onnx")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # the parser raises what it likes
        raise LikenessError(f"The file {path.name} is damaged, cut off or no ONNX file ({type(error).__name__}): download it "
                            "again.") from error
    if not model.graph.node or not model.graph.output:
        raise LikenessError(f"The file {path.name} is no ONNX file, it holds no network: download it again.")
    return model


def _shapes(values: Any) -> tuple[tuple[str, Shape], ...]:
    return tuple((value.name, tuple(max(side.dim_value, 0) for side in value.type.tensor_type.shape.dim)) for value in values)


def _kind(inputs: tuple[tuple[str, Shape], ...], outputs: tuple[tuple[str, Shape], ...]) -> str:
    pictures = [shape for _, shape in inputs if len(shape) == 4]
    last = outputs[0][1][-1] if outputs[0][1] else 0
    if len(pictures) != 1 or pictures[0][1] != 3:
        return UNKNOWN
    height, width = pictures[0][2:]
    if len(inputs) == 2 and len(outputs) == 1:
        square = len(outputs[0][1]) == 4 and height == width and height > 0 and height % 128 == 0
        return SWAPPER if square else UNKNOWN
    if len(inputs) != 1:
        return UNKNOWN
    if len(outputs) in (6, 9, 10, 15):
        return DETECTOR
    if height != width or len(outputs) != 1:
        return UNKNOWN
    if height == 192:
        return {212: LANDMARKS, 3309: LANDMARKS_3D}.get(last, UNKNOWN)
    if height == 96:
        return ATTRIBUTES if last == 3 else UNKNOWN
    return RECOGNISER if height >= 112 and height % 16 == 0 and len(outputs[0][1]) == 2 else UNKNOWN


def _pixels(kind: str, nodes: Any) -> tuple[float, float]:
    """mean and std; files that subtract and divide by themselves are told, as insightface does, from their first nodes."""
    if kind == SWAPPER:
        return 0.0, 255.0
    if kind != DETECTOR:
        names = [node.name for node in nodes[:8]]
        subtracts = any(name.startswith(("Sub", "_minus")) for name in names)
        divides = any(name.startswith(("Mul", "_mul")) for name in names)
        if (subtracts and divides) or (kind != RECOGNISER and "bn_data" in names[:3]):
            return 0.0, 1.0
    return 127.5, 127.5 if kind == RECOGNISER else 128.0


def _half(graph: Any) -> bool:
    """Whether any weight, input or cast is of float16."""
    values = [value.type.tensor_type.elem_type for value in graph.input]
    casts = [attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute]
    return FLOAT16 in (*values, *casts, *(tensor.data_type for tensor in graph.initializer))


def contract_of(model: Any) -> Contract:
    """What a parsed file is."""
    weights = {item.name for item in model.graph.initializer}
    inputs = _shapes([value for value in model.graph.input if value.name not in weights])
    outputs = _shapes(model.graph.output)
    kind = _kind(inputs, outputs)
    said = {item.key: item.value for item in model.metadata_props}
    mean, std = _pixels(kind, model.graph.node)
    operators = tuple(sorted({node.op_type for node in model.graph.node}))
    return Contract(kind, inputs, outputs, mean, std, operators, said.get(SPACE_KEY, ""), said.get(LICENCE_KEY, ""),
                    _half(model.graph))


def space_of(path: str | Path, contract: Contract) -> str:
    """Name of a recogniser's embeddings: what the file says, a known name, a known file under another name, else its name."""
    stem = Path(path).stem.lower()
    if contract.space or stem in SPACES:
        return contract.space or stem
    return KNOWN.get(files.sha256(path), stem)


def emap_of(path: str | Path, model: Any) -> Tensor:
    """The swapper's identity map (512, 512) float32: by its name, else the last tensor of the file.

    Raises LikenessError where it is gone, as in files that an optimiser cleaned."""
    onnx = need("onnx")
    tensors = list(model.graph.initializer)
    named = [item for item in tensors if item.name == EMAP] or tensors[-1:]
    if not named or tuple(named[0].dims) != (EMAP_WIDTH, EMAP_WIDTH):
        raise LikenessError(f"The swapper {Path(path).name} has no identity map ({EMAP}, {EMAP_WIDTH} x {EMAP_WIDTH}), which "
                            "tools that clean or optimise ONNX files remove: use the original file.")
    return torch.from_numpy(onnx.numpy_helper.to_array(named[0]).astype("float32").copy())
