"""Tiny ONNX networks with the inputs and outputs of the insightface packs, made at test time.

The detector finds magenta squares of 24, 48 or 96 pixels (one size for each stride): the face is the square four times as wide
round it, with the five points where the alignment template has them. The recogniser mixes the means of 64 blocks. The swapper
paints the crop with a colour that depends on the mapped identity. All are exact: no training, the same numbers everywhere.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

STRIDES = (8, 16, 32)
TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
NAMES = {"buffalo_l": ("det_10g.onnx", "w600k_r50.onnx"), "antelopev2": ("scrfd_10g_bnkps.onnx", "glintr100.onnx")}
SWAPPER = "inswapper_128.onnx"
OPSET = 11


class Graph:
    """A network in the making: nodes and tensors, then a file."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def tensor(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        from onnx import numpy_helper
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def save(self, path: Path, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> Path:
        import onnx
        from onnx import TensorProto, helper

        def values(sides: dict[str, list[Any]]) -> list[Any]:
            return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in sides.items()]

        graph = helper.make_graph(self.nodes, "tiny", values(inputs), values(outputs), self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="likeness tests")
        model.ir_version = 6
        onnx.checker.check_model(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, str(path))
        return path


def detector(path: Path, fixed: int = 0, keypoints: bool = True) -> Path:
    """Nine outputs (six without the points), any input size or one."""
    graph = Graph()
    graph.tensor("key.weight", np.array([1.0, -1.0, 1.0]).reshape(1, 3, 1, 1))
    graph.tensor("key.bias", [-2.5])
    graph.node("Conv", ["input.1", "key.weight", "key.bias"], "key")
    graph.node("Relu", ["key"], "magenta")
    peak = 3 * 127.5 / 128 - 2.5  # of a pure magenta pixel
    parts: dict[str, list[str]] = {"score": [], "box": [], "points": []}
    for stride in STRIDES:
        marker = 3 * stride
        # The mean of the marker's square less the mean of the ring round it, as a mix of two box means.
        for name, reach in (("inner", marker // 2), ("outer", marker)):
            graph.node("AveragePool", ["magenta"], f"{name}{stride}", kernel_shape=[2 * reach + 1] * 2, strides=[stride] * 2,
                       pads=[reach] * 4, count_include_pad=1)
        inner, outer = (marker + 1) ** 2, (2 * marker + 1) ** 2
        graph.node("Concat", [f"inner{stride}", f"outer{stride}"], f"means{stride}", axis=1)
        mix = np.array([1 + inner / (outer - inner), -outer / (outer - inner)]) * 40 / peak
        graph.tensor(f"find{stride}", np.stack([mix] * 2)[:, :, None, None])
        graph.tensor(f"find{stride}.bias", [-28.8, -40.8])  # the second anchor never fires
        graph.node("Conv", [f"means{stride}", f"find{stride}", f"find{stride}.bias"], f"logit{stride}")
        points = (TEMPLATE - 56) / 112 * 4 * marker / stride
        for name, width, value in (("score", 1, None), ("box", 4, np.full(4, 2 * marker / stride)), ("points", 10, points)):
            raw = f"logit{stride}"
            if value is not None:
                graph.tensor(f"{name}{stride}.weight", np.zeros((2 * width, 2, 1, 1)))
                graph.tensor(f"{name}{stride}.bias", np.tile(value.reshape(-1), 2))
                raw = graph.node("Conv", [raw, f"{name}{stride}.weight", f"{name}{stride}.bias"], f"{name}{stride}.map")
            turned = graph.node("Transpose", [raw], f"{name}{stride}.turned", perm=[0, 2, 3, 1])
            graph.tensor(f"{name}{stride}.shape", [-1, width], np.int64)
            flat = graph.node("Reshape", [turned, f"{name}{stride}.shape"], f"{name}{stride}.flat")
            parts[name].append(graph.node("Sigmoid", [flat], f"{name}{stride}") if name == "score" else flat)
    widths = {"score": 1, "box": 4, "points": 10}
    kept = list(widths) if keypoints else ["score", "box"]
    outputs = {name: [None, widths[part]] for part in kept for name in parts[part]}
    return graph.save(path, {"input.1": [1, 3, fixed or "h", fixed or "w"]}, outputs)


def recogniser(path: Path, seed: int = 1, width: int = 512) -> Path:
    """(n, 3, 112, 112) -> (n, 512): means of 14-pixel blocks through a random matrix."""
    graph = Graph()
    graph.tensor("mix", np.random.default_rng(seed).standard_normal((width, 192)))
    graph.node("AveragePool", ["input.1"], "blocks", kernel_shape=[14, 14], strides=[14, 14])
    graph.node("Flatten", ["blocks"], "row", axis=1)
    graph.node("Gemm", ["row", "mix"], "embedding", transB=1)
    return graph.save(path, {"input.1": ["n", 3, 112, 112]}, {"embedding": [1, width]})


def head(path: Path, size: int, width: int, seed: int) -> Path:
    """(n, 3, size, size) -> (n, width): the mean colour through a random matrix; landmarks, or gender and age."""
    graph = Graph()
    graph.tensor("mix", np.random.default_rng(seed).standard_normal((width, 3)) * 0.3)
    graph.node("GlobalAveragePool", ["data"], "mean")
    graph.node("Flatten", ["mean"], "row", axis=1)
    graph.node("Gemm", ["row", "mix"], "fc1", transB=1)
    return graph.save(path, {"data": ["n", 3, size, size]}, {"fc1": [1, width]})


def swapper(path: Path, seed: int = 2, half: bool = False, emap: str = "buff2fs", name_first: bool = False) -> Path:
    """target (1, 3, 128, 128), source (1, 512) -> a quarter of the target and three of the identity's colour.

    half: stored as float16 between casts. emap: name of the unused identity map, "" for none."""
    random = np.random.default_rng(seed)
    graph, dtype = Graph(), np.float16 if half else np.float32
    colour = random.standard_normal((3, 512)) * 60 / 512 ** 0.5
    matrix = np.linalg.qr(random.standard_normal((512, 512)))[0]
    if name_first and emap:
        graph.tensor(emap, matrix)
    graph.tensor("colour", colour, dtype)
    target, source = "target", "source"
    if half:
        target = graph.node("Cast", [target], "target.half", to=10)
        source = graph.node("Cast", [source], "source.half", to=10)
    graph.node("Gemm", [source, "colour"], "logit", transB=1)
    graph.node("Sigmoid", ["logit"], "paint")
    graph.node("Unsqueeze", ["paint"], "paint.map", axes=[2, 3])
    for name, what, share in (("kept", target, 0.25), ("new", "paint.map", 0.75)):
        graph.tensor(f"{name}.share", [share], dtype)
        graph.node("Mul", [what, f"{name}.share"], name)
    joined = graph.node("Add", ["kept", "new"], "output.half" if half else "output")
    if half:
        graph.node("Cast", [joined], "output", to=1)
    if emap and not name_first:
        graph.tensor(emap, matrix)
    return graph.save(path, {"target": [1, 3, 128, 128], "source": [1, 512]}, {"output": [1, 3, 128, 128]})


def pack(folder: Path, name: str = "buffalo_l", nested: bool = False) -> Path:
    """A whole pack below folder/models; returns the folder NAME."""
    place = folder / "models" / name
    inner = place / name if nested else place
    found, known = NAMES[name]
    detector(inner / found)
    recogniser(inner / known, seed=1 if name == "buffalo_l" else 7)
    head(inner / "2d106det.onnx", 192, 212, 3)
    head(inner / "1k3d68.onnx", 192, 3309, 4)
    head(inner / "genderage.onnx", 96, 3, 5)
    return place


def scene(width: int = 640, height: int = 480, faces: tuple[tuple[int, int, int], ...] = ((200, 160, 24),),
          skins: tuple[tuple[int, int, int], ...] = ((200, 170, 150), (120, 90, 70))) -> np.ndarray:
    """RGB picture (h, w, 3) of bytes with one face for each (x, y, side of its marker), on a striped ground."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = (90, 120, 100)
    image[::16] = (105, 135, 115)
    for number, (x, y, marker) in enumerate(faces):
        top, left = max(y - 2 * marker, 0), max(x - 2 * marker, 0)
        skin = np.array(skins[number % len(skins)])
        area = image[top:y + 2 * marker, left:x + 2 * marker]
        # light falls off to the right, so that a mirrored or shifted crop has other numbers
        area[:] = np.clip(skin - np.linspace(0, 40, area.shape[1])[None, :, None], 0, 255)
        image[max(y - marker // 2, 0):y + marker // 2 + 1, max(x - marker // 2, 0):x + marker // 2 + 1] = (255, 0, 255)
    return image
