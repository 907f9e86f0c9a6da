"""The miniature's face pack: three tiny networks that find, recognise and swap the heads of creatures."""
from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..demo import face_training as lessons
from ..demo.face_nets import WIDTH, HeadDetector, HeadRecogniser, HeadSwapper
from ..face.contract import MINIATURE, read_graph
from ..face.export import to_half, without_copies, write
from ..face.geometry import align, crop
from .demo import WEIGHTS

FOLDER = WEIGHTS / "faces"
SWAPPER = "head_swapper.onnx"
OPSET = 13
PAIRS, SCENES = 2048, 768
SEED_STEP = 1000  # between two trainings: each draws from several generators, with seeds side by side


def crops(pictures: Tensor, keypoints: Tensor, size: int) -> Tensor:
    """Aligned heads (n, 3, size, size) of pictures (n, 3, p, p) with points (n, 5, 2) in pixels."""
    return torch.stack([crop(picture.movedim(0, -1), align(points, size), size)
                        for picture, points in zip(pictures, keypoints, strict=True)])


def _export(model: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...], outputs: tuple[str, ...],
            open_sides: dict[str, dict[int, str]] | None = None) -> Any:
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer exporter needs a library that nothing else here needs
        path = Path(place) / "network.onnx"
        torch.onnx.export(model.eval(), inputs, str(path), input_names=names, output_names=outputs, opset_version=OPSET,
                          dynamo=False, dynamic_axes=open_sides)
        return without_copies(read_graph(path))


def export(folder: Path, detector: HeadDetector, recogniser: HeadRecogniser, swapper: HeadSwapper, command: str) -> None:
    """The three files, with the contracts of det_10g, w600k_r50 and inswapper_128_fp16."""
    strides = (8, 16, 32)
    names = tuple(f"{part}_{stride}" for part in ("score", "bbox", "kps") for stride in strides)
    write(_export(detector, (torch.zeros(1, 3, 64, 64),), ("input.1",), names, {"input.1": {2: "height", 3: "width"}}),
          folder / "head_detector.onnx", MINIATURE, command)
    write(_export(recogniser, (torch.zeros(1, 3, 112, 112),), ("input.1",), ("embedding",)), folder / "head_recogniser.onnx",
          MINIATURE, command)
    # The map is the identity: the swapper learned in the recogniser's own space.
    write(to_half(_export(swapper, (torch.zeros(1, 3, 128, 128), torch.zeros(1, WIDTH)), ("target", "source"), ("output",))),
          folder / SWAPPER, MINIATURE, command, torch.eye(WIDTH))


def train(folder: Path, command: str, log: Callable[[str], None], share: float = 1.0, seed: int = 0) -> None:
    """Draws, trains and writes the pack. share: of all work. seed: of the training, 0 is the one that ships."""
    started, chance = time.time(), SEED_STEP * seed
    pairs = lessons.draw_pairs(max(16, int(PAIRS * share)), 31 + chance, crops)
    scenes = lessons.draw_scenes(max(16, int(SCENES * share)), 32 + chance)
    log(f"{pairs.look.numel()} pairs and {scenes.picture.shape[0]} scenes drawn in {time.time() - started:.0f} s")
    recogniser = lessons.train_recogniser(pairs, max(2, int(lessons.RECOGNISER_STEPS * share)), log, chance)
    swapper = lessons.train_swapper(pairs, recogniser, max(2, int(lessons.SWAPPER_STEPS * share)), log, chance)
    detector = lessons.train_detector(scenes, max(2, int(lessons.DETECTOR_STEPS * share)), log, chance)
    folder.mkdir(parents=True, exist_ok=True)
    export(folder, detector, recogniser, swapper, command)
    log(f"face pack: made in {time.time() - started:.0f} s")
