"""PhotoMaker, InstantID and a ControlNet with random weights, for the tiny SDXL; FACES by hand.

What is cached here is shared by all tests: clone before you change anything.
"""
from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import portraits, tiny
from host.support import base, comfy, draw, encode, folder
from likeness.models.face.faces import Face, Faces
from likeness.models.hosting.portrait_files import InstantID, load_instantid
from likeness.models.hosting.portrait_instantid import Applied, Strengths, apply_instantid
from likeness.models.hosting.portrait_photomaker import Encoded, PhotoMaker, encode_photomaker, load_photomaker

TINY = portraits.TINY
PROMPT, TRIGGERED = "a woman in the rain", "a woman img in the rain"
ANTELOPE, BUFFALO = "glintr100", "w600k_r50"


@cache
def weights(kind: str) -> dict[str, dict[str, Tensor]]:
    """Of "instantid", "v1" or "v2"; strong enough to be seen in a picture."""
    shapes = portraits.instantid(TINY) if kind == "instantid" else portraits.photomaker(int(kind[1]), TINY)
    parts = portraits.random(shapes, len(kind))
    for part, gain in (("ip_adapter", 3.0), ("lora_weights", 0.7)):
        for name, value in parts.get(part, {}).items():
            parts[part][name] = gain * value
    return parts


@cache
def file(kind: str, ending: str = ".bin") -> Path:
    return portraits.write(folder() / f"{kind}{ending}", weights(kind))


@cache
def instantid() -> InstantID:
    with torch.inference_mode():
        return load_instantid(file("instantid"))


@cache
def photomaker(version: int) -> tuple[PhotoMaker, Any]:
    """(PHOTOMAKER, MODEL with its LoRA)."""
    with torch.inference_mode():
        return load_photomaker(file(f"v{version}"), base("sdxl")[0], 1.0)[:2]


@cache
def control_net(seed: int = 0) -> Any:
    """A ControlNet of the tiny SDXL."""
    with torch.inference_mode():
        tiny.register()
        return comfy.controlnet.load_controlnet(str(portraits.control_net(folder() / f"control_{seed}.safetensors", 40 + seed)))


def hint(seed: int = 0) -> Tensor:
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))


def face(seed: int, size: float = 50.0) -> Face:
    keypoints = torch.tensor([[20.0, 25.0], [40.0, 25.0], [30.0, 35.0], [22.0, 45.0], [38.0, 45.0]])
    # a raw embedding is some 20 long
    return Face(torch.tensor([10.0, 10.0, 10.0 + size, 10.0 + size]), keypoints, 0.9, 20 * draw(seed, 512) / 512 ** 0.5)


def faces(*frames: int | None | tuple[Face, ...], space: str = ANTELOPE) -> Faces:
    """One picture for each argument: the seed of its only face, None without one, or its faces."""
    found = tuple(one if isinstance(one, tuple) else () if one is None else (face(one),) for one in frames)
    return Faces(found, ((64, 64),) * len(frames), space)


def applied(*frames: Any, weight: float = 0.8, control: float = 0.8, model: Any = None, positive: Any = None,
            negative: Any = None, guided: bool = False, **more: Any) -> Applied:
    """InstantID Apply on the tiny SDXL, with a ControlNet if `guided`."""
    if guided:
        more = {"control": control_net(), "picture": hint()} | more
    strengths = Strengths(weight, control, more.pop("start", 0.0), more.pop("end", 1.0))
    return apply_instantid(model or base("sdxl")[0], positive or encode("sdxl", PROMPT), negative or encode("sdxl", "blurry"),
                           instantid(), faces(*(frames or (1,))), strengths, **more)


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 40, 56, 3, generator=torch.Generator().manual_seed(seed))


def encoded(version: int = 1, count: int = 1, text: str = TRIGGERED, trigger: str = "img", seed: int = 0, **more: Any) -> Encoded:
    if version == 2:
        more.setdefault("faces", faces(*range(1, count + 1), space=BUFFALO))
    return encode_photomaker(photomaker(version)[0], base("sdxl")[1], pictures(count, seed), text, trigger, **more)
