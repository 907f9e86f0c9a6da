"""Faces: pasting into 4K, loads for a second picture, a video on both back ends; the miniature's swap and what BiMD makes of it.

The networks of the first three are synthetic (tests/harness/face_pack.py), so seconds are those of all that lies round them;
--full takes random networks of the true sizes instead.
"""
from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("paste", "reloads", "video", "swap", "seam")
BACKENDS = ("torch", "onnxruntime")
WARM = 0.2  # share of a video after which memory must not grow


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def best(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds after one run to warm up."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


class Files:
    """A pack and a swapper on disk, loaded by back end."""

    def __init__(self, full: bool):
        from harness import face_pack
        from likeness.models.hosting import face
        self.face, self.root = face, Path(tempfile.mkdtemp(prefix="likeness-faces-"))
        self.folder = face_pack.pack(self.root)
        self.swapper_file = self.root / face_pack.SWAPPER
        if full:
            from harness import face_full
            face_full.pack(self.folder, self.swapper_file)
        else:
            face_pack.swapper(self.swapper_file)

    def models(self, backend: str) -> Any:
        return self.face.load_models(self.folder, backend)[0]

    def swapper(self, backend: str) -> Any:
        return self.face.load_swapper(self.swapper_file, backend)[0]


def scene(width: int, height: int, *spots: tuple[int, int, int]) -> Any:
    import torch

    from harness import face_pack
    return torch.from_numpy(face_pack.scene(width, height, spots)).float()[None] / 255


def faces_at(spots: tuple[tuple[int, int, int], ...], size: tuple[int, int], frames: int) -> Any:
    """Target faces as the synthetic detector gives them, whatever the detector of the pack is."""
    import torch

    from harness.face_pack import TEMPLATE
    from likeness.models.face.faces import Face, Faces
    found = []
    for x, y, marker in spots:
        points = torch.tensor((TEMPLATE - 56) / 112 * 4 * marker + [x, y], dtype=torch.float32)
        box = torch.tensor([x - 2.0 * marker, y - 2.0 * marker, x + 2.0 * marker, y + 2.0 * marker])
        generator = torch.Generator().manual_seed(x)
        found.append(Face(box, points, 1.0, torch.randn(512, generator=generator)))
    return Faces((tuple(found),) * frames, (size,) * frames, "w600k_r50")


def paste(files: Files, repeats: int) -> dict[str, float]:
    """One face into 3840 x 2160: the whole node's work against the whole of INSwapper.get, network and crop in both."""
    from insightface.app.common import Face as Theirs
    from insightface.model_zoo import get_model

    from likeness.models.face.swap import Paste
    from likeness.models.hosting.face_batch import Job, swap
    spots = ((1920, 1080, 144),)
    image, target = scene(3840, 2160, *spots), faces_at(spots, (2160, 3840), 1)
    ours = files.swapper("onnxruntime")
    job = Job(Paste(1, "insightface"))
    mine = best(lambda: swap(ours, image, target, job, target=target), repeats)
    theirs = get_model(str(files.swapper_file), providers=["CPUExecutionProvider"])
    face = target.frames[0][0]
    other = Theirs(bbox=face.box.numpy(), kps=face.keypoints.numpy(), embedding=face.embedding.numpy())
    frame = (image[0] * 255).byte().numpy()[..., ::-1].copy()
    reference = best(lambda: theirs.get(frame, other, other), repeats)
    return {"paste4k_s": mine, "paste4k_insightface_s": reference, "paste4k_over_insightface": mine / reference}


def reloads(files: Files) -> dict[str, int]:
    """What a second picture reads, converts, opens or moves to the device again."""
    import comfy.model_management as management

    from likeness.models.face import networks
    from likeness.models.hosting import face, face_batch
    count = {"second": 0}

    def counted(place: Any, name: str) -> Callable[[], None]:
        real = getattr(place, name)

        def wrapper(*words: Any, **named: Any) -> Any:
            count["second"] += 1
            return real(*words, **named)

        setattr(place, name, wrapper)
        return lambda: setattr(place, name, real)

    spots = ((200, 160, 24), (448, 304, 48))
    first, second = scene(640, 480, *spots), scene(640, 480, spots[1])
    held = [(files.models(backend), files.swapper(backend)) for backend in BACKENDS]
    for number, image in enumerate((first, second)):
        undo = []
        if number:
            undo = [counted(face, "read_graph"), counted(face, "convert"), counted(networks.Session, "__init__")]
            resident = {id(entry.model) for entry in management.current_loaded_models}
        for (models, swapper), backend in zip(held, BACKENDS, strict=True):
            job = face_batch.Job(sizes=(640,), on_missing="pass through")
            face_batch.swap(swapper, image, faces_at(spots[:1], (480, 640), 1), job, models)
            if number:  # a second workflow with the same files, while the first one's nodes are in the cache
                files.face.load_network(files.folder / "w600k_r50.onnx", models.recogniser.contract, backend)
                count["second"] += sum(id(entry.model) not in resident for entry in management.current_loaded_models)
        for put_back in undo:
            put_back()
    return {"reloads_second_picture": count["second"]}


class Memory:
    """What the process holds while a node goes through a video, read where the node asks whether it was cancelled."""

    def __init__(self) -> None:
        import psutil
        self.process, self.read, self.spent = psutil.Process(), list[int](), 0.0

    def __call__(self) -> None:
        begin = time.perf_counter()
        gc.collect()  # what waits to be collected is no leak
        self.read.append(self.process.memory_info().rss)
        self.spent += time.perf_counter() - begin

    def growth(self, frames: int) -> float:
        """How much a straight line through the readings of `frames` pictures, without the first of them, rises over the video,
        as a share. What comes later is the drawing, which fills the output."""
        late = self.read[int(frames * WARM):frames]
        slope, begin = statistics.linear_regression(range(len(late)), late)
        return slope * len(late) / begin

    def rise(self) -> int:
        """Bytes from the first reading to the highest."""
        return max(self.read) - self.read[0]


def video(files: Files, frames: int, backend: str) -> dict[str, float]:
    """Analyze Faces and Face Swap, the nodes themselves, on two faces that walk through 1280 x 720."""
    import torch

    from harness.pack import pack_nodes
    from likeness.models.hosting import face_batch, memory
    nodes = pack_nodes()
    pictures = torch.empty(frames, 720, 1280, 3)
    for number in range(frames):
        # whole cells of the detector after its letterbox to 640
        shift = 16 * (number % 8)
        pictures[number] = scene(1280, 720, (400 + shift, 320, 48), (928 - shift, 400, 48))[0]
        pictures[number, 0, 0, 0] = number / frames  # no two frames are the same picture
    source = faces_at(((400, 320, 48),), (720, 1280), 1)
    target = None if (files.folder / "synthetic").exists() else faces_at(((400, 320, 48), (928, 400, 48)), (720, 1280), frames)
    common = {"detection_size": "640", "threshold": 0.5, "on_missing": "pass through"}
    swapping = {"boost": 2, "mask_kind": "hull", "identity_weight": 1.0, "colour_match": 0.0, "restore_visibility": 1.0,
                "assign": "in turn", "feather": 0.15, "smoothing": 0}

    def run(name: str, **inputs: Any) -> tuple[Any, float, Memory]:
        """The first output, seconds a frame, and the memory meanwhile."""
        watch, real = Memory(), memory.stop_if_asked
        for place in (face_batch, memory):
            place.stop_if_asked = watch
        try:
            begin = time.perf_counter()
            result = nodes[f"Likeness_{name}"].execute(image=pictures, **common, **inputs).result
            seconds = time.perf_counter() - begin - watch.spent
        finally:
            for place in (face_batch, memory):
                place.stop_if_asked = real
        return result[0], seconds / frames, watch

    found, looked, first = run("AnalyzeFaces", face_models=files.models(backend))
    done, swapped, second = run("SwapFaces", swapper=files.swapper(backend), source=source, target=target or found, **swapping)
    faces = sum(map(len, (target or found).frames))
    assert done.shape == pictures.shape and faces == 2 * frames, f"{faces} faces in {frames} frames"
    return {f"video_{backend}_analyse_s_a_frame": looked, f"video_{backend}_swap_s_a_frame": swapped,
            f"video_{backend}_s_a_frame": looked + swapped,
            f"video_{backend}_memory_growth": max(first.growth(frames), second.growth(frames)),
            f"video_{backend}_analyse_batches": first.rise() / pictures.nbytes}


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="dev.py bench faces")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--frames", type=int, default=100, help="video: frames of 1280 x 720")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=256, help="swap and seam: pictures")
    parser.add_argument("--identities", type=int, default=64, help="seam: how many of them the pictures show")
    parser.add_argument("--packs", type=Path, nargs="*", default=[],
                        help="swap: face packs of several training seeds (default: the one that ships)")
    parser.add_argument("--full", action="store_true", help="random networks of the true sizes in the video")
    args = parser.parse_args(argv)

    import torch
    from bench import _face_miniature
    torch.set_num_threads(args.threads)
    try:
        import cv2
        cv2.setNumThreads(args.threads)
    except ImportError:
        sys.exit("This bench compares with insightface, which is not installed.")
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.WARNING)
    out: dict[str, Any] = {"threads": args.threads, "networks": "random, full size" if args.full else "synthetic"}
    with torch.inference_mode():  # as the host runs nodes
        files = Files(False)
        (files.folder / "synthetic").touch()
        if "paste" in args.only:
            out |= paste(files, args.repeats)
        if "reloads" in args.only:
            out |= reloads(files)
        if "video" in args.only:
            chosen = Files(True) if args.full else files
            out["frames"] = args.frames
            for backend in BACKENDS:
                out |= video(chosen, args.frames, backend)
    if "swap" in args.only:
        out |= _face_miniature.heads(args.pictures, args.packs, say)
    if "seam" in args.only:
        out |= _face_miniature.seam(min(args.identities, args.pictures), max(args.pictures // args.identities, 1), say)
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in out.items()}
