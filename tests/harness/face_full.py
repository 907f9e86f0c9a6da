"""Random networks of the true sizes of buffalo_l and inswapper_128: the layouts as public descriptions give them.

Their files are as large as the real ones (17, 174 and 553 MB), so they show what conversion, memory and time really cost.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .face_pack import STRIDES, Graph, head


class Layers(Graph):
    """A graph whose nodes name themselves and draw their own weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random, self.count = np.random.default_rng(seed), 0

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        self.count += 1
        return self.node(kind, list(inputs), f"x{self.count}", **attributes)

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        self.count += 1
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        values = self.random.standard_normal(shape, dtype=np.float32) * np.float32(scale * (2 / fan) ** 0.5)
        return self.tensor(f"w{self.count}", values)

    def constant(self, value: float, *shape: int) -> str:
        self.count += 1
        return self.tensor(f"w{self.count}", np.full(shape, value, np.float32))

    def conv(self, x: str, before: int, after: int, kernel: int = 3, stride: int = 1, pad: int | None = None,
             scale: float = 1.0) -> str:
        pads = [kernel // 2 if pad is None else pad] * 4
        return self.add("Conv", x, self.weight(after, before, kernel, kernel, scale=scale), self.constant(0, after),
                        kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)

    def norm(self, x: str, width: int) -> str:
        return self.add("BatchNormalization", x, self.constant(1, width), self.constant(0, width), self.constant(0, width),
                        self.constant(1, width), epsilon=1e-5)


def recogniser(path: Path) -> Path:
    """IResNet-50: blocks 3, 4, 14, 3."""
    g = Layers(1)
    x = g.add("PRelu", g.conv("input.1", 3, 64), g.constant(0.25, 64, 1, 1))
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 14), (512, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 else 1
            y = g.conv(g.norm(x, before), before, width, scale=0.7)
            y = g.conv(g.add("PRelu", y, g.constant(0.25, width, 1, 1)), width, width, stride=stride, scale=0.4)
            x = g.add("Add", y, g.conv(x, before, width, 1, stride, scale=0.7) if block == 0 else x)
            before = width
    flat = g.add("Flatten", g.norm(x, 512), axis=1)
    g.node("Gemm", [flat, g.weight(512, 25088), g.constant(0, 512)], "683", transB=1)
    return g.save(path, {"input.1": ["n", 3, 112, 112]}, {"683": [1, 512]})


def detector(path: Path) -> Path:
    """A residual body, a neck of two ways (PAFPN) and three heads of 80 channels, with SCRFD's nine outputs.

    The neck enlarges to the size that its neighbour turns out to have, so that size is computed in the graph."""
    g = Layers(2)
    x = g.add("Relu", g.conv(g.add("Relu", g.conv("input.1", 3, 28, stride=2)), 28, 56))
    x, before, levels = g.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), 56, []
    for stage, (width, blocks) in enumerate(((56, 3), (88, 4), (88, 2), (224, 3))):
        for block in range(blocks):
            stride = 2 if block == 0 and stage else 1
            y = g.conv(g.add("Relu", g.conv(x, before, width, stride=stride)), width, width, scale=0.4)
            x = g.add("Relu", g.add("Add", y, g.conv(x, before, width, 1, stride) if before != width or stride > 1 else x))
            before = width
        if stage:
            levels.append((x, width))
    none, two, four, axis = (g.tensor(name, value, kind) for name, value, kind in (
        ("none", [], np.float32), ("two", [2], np.int64), ("four", [4], np.int64), ("axis", [0], np.int64)))
    own = [g.conv(level, width, 56, 1) for level, width in levels]
    for k in (1, 0):
        size = g.add("Concat", g.add("Slice", g.add("Shape", own[k + 1]), axis, two, axis),
                     g.add("Slice", g.add("Shape", own[k]), two, four, axis), axis=0)
        larger = g.add("Resize", own[k + 1], none, none, size, mode="nearest", nearest_mode="floor",
                       coordinate_transformation_mode="asymmetric")
        own[k] = g.add("Add", own[k], larger)
    own = [g.conv(level, 56, 56) for level in own]
    for k in (1, 2):
        own[k] = g.add("Add", own[k], g.conv(own[k - 1], 56, 56, stride=2))
    names: dict[str, list[str]] = {"score": [], "bbox": [], "kps": []}
    for stride, y in zip(STRIDES, own, strict=True):
        for k in range(3):
            y = g.add("Relu", g.conv(y, 56 if k == 0 else 80, 80))
        for name, sides in (("score", 1), ("bbox", 4), ("kps", 10)):
            shape = g.tensor(f"{name}_{stride}.shape", [-1, sides], np.int64)
            out = g.add("Transpose", g.conv(y, 80, 2 * sides, scale=0.1), perm=[0, 2, 3, 1])
            flat = f"{name}_{stride}"
            if name == "score":
                g.node("Sigmoid", [g.add("Reshape", out, shape)], flat)
            else:
                g.node("Reshape", [out, shape], flat)
            names[name].append(flat)
    sides = {"score": 1, "bbox": 4, "kps": 10}
    return g.save(path, {"input.1": [1, 3, "h", "w"]}, {flat: [None, sides[name]] for name in names for flat in names[name]})


def swapper(path: Path) -> Path:
    """Down to 1024 channels at 32 pixels, six blocks styled by the identity (AdaIN), and up again."""
    g = Layers(3)
    half = g.tensor("scales", [1, 1, 2, 2])
    epsilon, roi = g.tensor("epsilon", [1e-8]), g.tensor("roi", [])

    def styled(x: str) -> str:
        style = g.add("Gemm", "source", g.weight(2048, 512), g.constant(0, 2048), transB=1)
        style = g.add("Unsqueeze", style, axes=[2, 3])
        parts = [g.add("Slice", style, g.tensor(f"b{g.count}{k}", [1024 * k], np.int64),
                       g.tensor(f"e{g.count}{k}", [1024 * (k + 1)], np.int64), g.tensor(f"a{g.count}{k}", [1], np.int64))
                 for k in range(2)]
        centred = g.add("Sub", x, g.add("ReduceMean", x, axes=[2, 3], keepdims=1))
        spread = g.add("ReduceMean", g.add("Mul", centred, centred), axes=[2, 3], keepdims=1)
        even = g.add("Mul", centred, g.add("Reciprocal", g.add("Sqrt", g.add("Add", spread, epsilon))))
        return g.add("Add", g.add("Mul", even, parts[0]), parts[1])

    pads = g.tensor("reflect", [0, 0, 3, 3, 0, 0, 3, 3], np.int64)
    x = g.add("LeakyRelu", g.conv(g.add("Pad", "target", pads, mode="reflect"), 3, 128, 7, 1, 0), alpha=0.2)
    for before, after, stride in ((128, 256, 1), (256, 512, 2), (512, 1024, 2)):
        x = g.add("LeakyRelu", g.conv(x, before, after, 3, stride), alpha=0.2)
    for _ in range(6):
        y = g.add("Relu", styled(g.conv(x, 1024, 1024)))
        x = g.add("Add", x, styled(g.conv(y, 1024, 1024)))
    for before, after, grows in ((1024, 512, True), (512, 256, True), (256, 128, False)):
        if grows:
            x = g.add("Resize", x, roi, half, mode="linear", coordinate_transformation_mode="half_pixel")
        x = g.add("LeakyRelu", g.conv(x, before, after), alpha=0.2)
    x = g.add("Tanh", g.conv(g.add("Pad", x, pads, mode="reflect"), 128, 3, 7, 1, 0, scale=0.2))
    g.node("Div", [g.add("Add", x, g.tensor("one", [1])), g.tensor("two", [2])], "output")
    g.tensor("buff2fs", np.linalg.qr(g.random.standard_normal((512, 512)))[0])
    return g.save(path, {"target": [1, 3, 128, 128], "source": [1, 512]}, {"output": [1, 3, 128, 128]})


def pack(folder: Path, swapper_file: Path) -> Path:
    """The files of buffalo_l that the nodes use, and the swapper."""
    detector(folder / "det_10g.onnx")
    recogniser(folder / "w600k_r50.onnx")
    head(folder / "2d106det.onnx", 192, 212, 3)
    head(folder / "genderage.onnx", 96, 3, 5)
    swapper(swapper_file)
    return folder
