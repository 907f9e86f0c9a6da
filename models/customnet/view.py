"""The camera of a new picture, relative to the reference picture."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import LikenessError

# Positive azimuth: the camera goes to the right round the object, as in Zero-1-to-3, whose weights CustomNet started from.
# The published weights themselves were not seen; should they turn the other way, this is the one place to say so (the
# miniature does not hang on it).
AZIMUTH_SIGN = 1.0

Numbers = float | Sequence[float] | Tensor


class View(NamedTuple):
    """LIKENESS_VIEW: degrees and distance of the camera relative to the reference's, one row a picture.

    elevation: up is positive; distance: 0 as the reference, positive is further away. one_noise: every picture of
    the batch starts from the noise of the first."""
    azimuth: tuple[float, ...]
    elevation: tuple[float, ...]
    distance: tuple[float, ...]
    one_noise: bool = False

    def vector(self) -> Tensor:
        """(n, 4), see `view_vector`."""
        return view_vector([-e for e in self.elevation], self.azimuth, self.distance)


def view_vector(polar_deg: Numbers, azimuth_deg: Numbers, radius: Numbers) -> Tensor:
    """(n, 4) float32 [polar, sin azimuth, cos azimuth, radius] in radians, as Zero-1-to-3 and CustomNet read a camera.

    polar: degrees from the vertical axis, so positive is DOWN; single numbers serve all rows."""
    polar, azimuth, away = torch.broadcast_tensors(*(
        torch.atleast_1d(torch.as_tensor(n, dtype=torch.float32)) for n in (polar_deg, azimuth_deg, radius)))
    turn = torch.deg2rad(azimuth)
    return torch.stack([torch.deg2rad(polar), turn.sin(), turn.cos(), away], -1)


def turntable(start: float, end: float, count: int, elevation: float, distance: float, one_noise: bool) -> View:
    """`count` views from azimuth `start` to `end`; full turns do not show their first view twice."""
    turns = abs(end - start) / 360
    whole = count > 1 and round(turns) > 0 and math.isclose(turns, round(turns))
    step = (end - start) / (count if whole else max(1, count - 1))
    return View(tuple(start + step * k for k in range(count)), (elevation,) * count, (distance,) * count, one_noise)


def from_camera(camera: Any, reference_distance: float) -> tuple[float, float, float]:
    """(azimuth, elevation, distance) of core's LOAD3D_CAMERA: Y is up, the object's front looks along Z.

    distance: how much further than `reference_distance` (scene units), as a share of it; a zoom of 2 counts as half as far.
    A camera of parallel rays shows things as large from anywhere: 0. Raises LikenessError."""
    try:
        place, target = ([float(camera[name][axis]) for axis in "xyz"] for name in ("position", "target"))
        zoom = float(camera.get("zoom") or 1.0)
    except (TypeError, KeyError, ValueError) as error:
        raise LikenessError("The camera has no position and target; connect camera_info of core's Load 3D, or nothing."
                            ) from error
    x, y, z = (a - b for a, b in zip(place, target, strict=True))
    far = math.sqrt(x * x + y * y + z * z)
    if not far > 0 or not math.isfinite(far):
        raise LikenessError("The camera stands on its own target, so it looks nowhere; move it away from the object.")
    if not (zoom > 0 and math.isfinite(zoom)):
        raise LikenessError(f"The camera's zoom is {zoom:g}, it must be above 0; set it anew in core's Load 3D.")
    told = reference_distance > 0 and camera.get("cameraType") != "orthographic"
    away = far / zoom / reference_distance - 1 if told else 0.0
    return math.degrees(math.atan2(x, z)), math.degrees(math.asin(y / far)), away


def is_camera(value: Any) -> bool:
    """Whether a value looks like LOAD3D_CAMERA."""
    return isinstance(value, Mapping) and "position" in value
