"""What a CustAny adapter is made of, and how its file says so."""
from __future__ import annotations

import json
from typing import NamedTuple

from ..common.errors import LikenessError
from ..common.images import BACKGROUNDS

METADATA_KEY = "likeness.custany"
CATEGORY_MODES = ("keep_rest", "drop_rest")
FUSE_MODES = ("features", "tokens")


class CustAnyConfig(NamedTuple):
    """Sizes and choices of one adapter; training and use must agree on all of them.

    width: channels of the base's text rows. encoders: (family, channels) in the order of the features.
    layers: (key, channels) with key "output.<block>.<transformer index>". grid: tokens a side that all
    patch grids are brought to (0 = the first encoder's own). margin: fraction of the crop's longer side.
    """
    width: int
    encoders: tuple[tuple[str, int], ...]
    layers: tuple[tuple[str, int], ...]
    head_dim: int = 64
    grid: int = 0
    category_mode: str = "keep_rest"
    fuse: str = "features"
    background: str = "white"
    resolutions: tuple[int, ...] = ()
    base: str = "sd15"
    margin: float = 0.1

    def check(self) -> CustAnyConfig:
        """Return self; raise LikenessError that names the first field which cannot work."""
        if self.width < 1 or not self.encoders or not self.layers:
            raise LikenessError("A CustAny adapter needs a width, encoders and layers, got width "
                                f"{self.width}, {len(self.encoders)} encoders and {len(self.layers)} layers.")
        for name, known in (
                ("category_mode", CATEGORY_MODES), ("fuse", FUSE_MODES), ("background", BACKGROUNDS)):
            value = getattr(self, name)
            if value not in known:
                raise LikenessError(f"CustAny knows {name} {' and '.join(known)}, got '{value}'.")
        if self.resolutions and len(self.resolutions) != len(self.encoders):
            raise LikenessError(f"CustAny expects one resolution for each of its {len(self.encoders)} "
                                f"encoders, got {len(self.resolutions)}.")
        keys = [key for key, _ in self.layers]
        if len(set(keys)) != len(keys):
            raise LikenessError("CustAny expects each attention layer once, got a key twice.")
        for key, channels in self.layers:
            parts = key.split(".")
            if len(parts) != 3 or not (parts[1].isdigit() and parts[2].isdigit()):
                raise LikenessError(f"CustAny layer keys look like 'output.3.0', got '{key}'.")
            if self.head_dim < 1 or channels % self.head_dim:
                raise LikenessError(f"The {channels} channels of CustAny layer {key} cannot be split into "
                                    f"heads of {self.head_dim}.")
        return self


def sd15_layers() -> tuple[tuple[str, int], ...]:
    """The nine transformer blocks of SD1.5's up-sampling path."""
    return tuple((f"output.{block}.0", channels) for first, channels in ((3, 1280), (6, 640), (9, 320))
                 for block in range(first, first + 3))


def sdxl_layers() -> tuple[tuple[str, int], ...]:
    """First and last transformer block of SDXL's up-sampling blocks; all 36 would be 276 M parameters."""
    return tuple((f"output.{block}.{index}", channels) for block in range(6)
                 for channels, last in ((1280, 9) if block < 3 else (640, 1),) for index in (0, last))


def preset(base: str, encoders: tuple[tuple[str, int], ...] = (("dinov2", 1024), ("mae", 1024)),
           resolutions: tuple[int, ...] = (224, 256)) -> CustAnyConfig:
    """Config for "sd15" or "sdxl"; DINOv2 at 224 / 14 and MAE at 256 / 16 give the same 16 x 16 grid."""
    if base not in ("sd15", "sdxl"):
        raise LikenessError(f"CustAny has presets for the bases sd15 and sdxl, got '{base}'.")
    width, layers = (768, sd15_layers()) if base == "sd15" else (2048, sdxl_layers())
    config = CustAnyConfig(width, tuple(encoders), layers, grid=16, resolutions=tuple(resolutions), base=base)
    return config.check()


def to_metadata(config: CustAnyConfig) -> dict[str, str]:
    """The safetensors metadata that `from_metadata` reads back."""
    return {METADATA_KEY: json.dumps(config._asdict())}


def from_metadata(metadata: dict[str, str]) -> CustAnyConfig:
    """Read the config of a file; raises LikenessError when it is missing, damaged or of a newer version."""
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise LikenessError(f"This file holds no '{METADATA_KEY}' entry in its metadata, so it is not a "
                            "CustAny adapter of this pack; choose a file that the trainer wrote.")
    try:
        fields = json.loads(text)
        unknown = sorted(set(fields) - set(CustAnyConfig._fields))
        if unknown:
            raise LikenessError("This CustAny adapter uses settings that this version does not know "
                                f"({', '.join(unknown)}); update the pack.")
        for name in ("encoders", "layers"):
            fields[name] = tuple((str(key), int(size)) for key, size in fields[name])
        fields["resolutions"] = tuple(int(size) for size in fields.get("resolutions", ()))
        return CustAnyConfig(**fields).check()
    except LikenessError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LikenessError(f"The '{METADATA_KEY}' entry of this adapter cannot be read ({error}); download "
                            "or train the file again.") from error
