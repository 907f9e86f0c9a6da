"""What a RealCustom++ file is, told from its tensor names and shapes, and its tensors under the names of our modules."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..common.errors import LikenessError

METADATA_KEY = "likeness.realcustom"
PROJECTOR = "encoder_hidden_states_vision_projection."
# What training tools and exporters put in front of every name.
_WRAPPERS = re.compile(r"(?:(?:module|unet|model\.diffusion_model|_orig_mod)\.)+")
_LAYER = re.compile(r"(?:(down|up)_blocks\.(\d+)\.attentions\.(\d+)|mid_block\.attentions\.0)"
                    r"\.transformer_blocks\.(\d+)\.attn2\.to_(k|v)_vision\.weight")
FULL_UNET = 100  # tensors: an adapter has none besides its own, the UNets of SD1.5 and SDXL have 686 and 1680
_BASES = {2048: "sdxl", 768: "sd15", 128: "miniature"}


class RealCustomConfig(NamedTuple):
    """width: of the text rows. vision: of the features, all encoders side by side. layers: ("output.3.0", channels).

    encoders: (family, width) in the order of the features. blocks: for each encoder the blocks whose output is
    read, counted from 0, the deepest last. shallow: earlier blocks in place of the four sub-pictures.
    """
    width: int
    vision: int
    encoders: tuple[tuple[str, int], ...]
    blocks: tuple[tuple[int, ...], ...]
    layers: tuple[tuple[str, int], ...]
    shallow: bool = False
    adaptive: bool = False
    base: str = "sdxl"
    size: int = 384            # side of the picture that the encoders see
    registers: tuple[int, ...] = (0, 4)  # of each encoder: DINOv2 exists with and without

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side of the picture for each encoder."""
        return (self.size,) * len(self.encoders)


class Split(NamedTuple):
    """projector and layers: an adapter's tensors under our names; base: the rest, a UNet in diffusers names."""
    projector: dict[str, Any]
    layers: dict[str, Any]
    base: dict[str, Any]


def layer_key(name: str, blocks: int = 2) -> tuple[str, str] | None:
    """("output.3.0", "k") of the diffusers name of an image projection, None for any other tensor.

    blocks: residual blocks a level. The host counts one entry more than that a level, going down (the first is the input
    convolution) and going up."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    way, level, number, depth, which = match.groups()
    if way is None:
        return f"middle.0.{depth}", which
    at = (blocks + 1) * int(level) + int(number)
    return (f"input.{at + 1}.{depth}" if way == "down" else f"output.{at}.{depth}"), which


def layer_name(key: str, which: str, blocks: int = 2) -> str:
    """The diffusers name of an image projection: the other way round."""
    part, number, depth = key.split(".")
    level, at = divmod(int(number) - (part == "input"), blocks + 1)
    place = {"input": f"down_blocks.{level}.attentions.{at}", "output": f"up_blocks.{level}.attentions.{at}",
             "middle": "mid_block.attentions.0"}[part]
    return f"{place}.transformer_blocks.{depth}.attn2.to_{which}_vision.weight"


def residual_blocks(names: Iterable[str]) -> int:
    """Residual blocks a level of the network whose image projections have these names: one less than attentions going up."""
    found = [match.groups() for match in map(_LAYER.fullmatch, names) if match is not None and match[1] is not None]
    return max([1, *(int(number) + (way == "down") for way, _, number, *_ in found)])


def split(state: Mapping[str, Any]) -> Split:
    """Sorts the tensors of a file (or their shapes) into projector, image K/V and everything else."""
    out = Split({}, {}, {})
    plain = {_WRAPPERS.sub("", name, count=1): value for name, value in state.items()}
    blocks = residual_blocks(plain)
    for name, value in plain.items():
        found = layer_key(name, blocks)
        if name.startswith(PROJECTOR):
            out.projector[name[len(PROJECTOR):]] = value
        elif found is not None:
            out.layers[f"{found[0]}.{found[1]}"] = value
        else:
            out.base[name] = value
    return out


def base_of(width: int) -> str:
    """The family of base models whose text rows have this width."""
    return _BASES.get(width, f"text width {width}")


def is_own(name: str) -> bool:
    """Whether a tensor of this name is the adapter's and no part of a UNet in the same file."""
    return PROJECTOR in name or name.endswith(("attn2.to_k_vision.weight", "attn2.to_v_vision.weight"))


def is_realcustom(names: Iterable[str]) -> bool:
    """Whether a file with these tensor names holds a RealCustom++ adapter, alone or inside a whole UNet."""
    found = split(dict.fromkeys(names))
    return bool(found.layers) and "projector_base.weight" in found.projector


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", value))


def identify(state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> RealCustomConfig:
    """Config from names and shapes; `likeness.realcustom` in the metadata names other encoders than the release's.

    Raises LikenessError for a file that lacks a part."""
    parts = split(state)
    names = parts.projector
    try:
        width, vision = _shape(names["projector_base.weight"])
    except (KeyError, ValueError) as error:
        raise LikenessError("This RealCustom++ file lacks its projector (encoder_hidden_states_vision_projection.*); "
                            "download it again.") from error
    keys = sorted({name.rpartition(".")[0] for name in parts.layers}, key=_order)
    for key in keys:
        if {f"{key}.k", f"{key}.v"} - parts.layers.keys():
            raise LikenessError(f"This RealCustom++ file has only one of the two image projections of the layer {key}; "
                                "download it again.")
    layers = tuple((key, _shape(parts.layers[f"{key}.k"])[0]) for key in keys)
    shallow = "projector2.0.weight" in names
    config = RealCustomConfig(width, vision, (("siglip", 1152), ("dinov2", 1024)), ((25,), (22,)), layers, shallow,
                              "scale_value.value" in names, base_of(width))
    if shallow:
        config = config._replace(blocks=((7, 13, 19, 25), (4, 10, 16, 22)))
    return _check(config._replace(**_fields(metadata or {})))


def _fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file of our own trainer says that its shapes cannot."""
    try:
        fields = json.loads(metadata.get(METADATA_KEY, "{}"))
        known: dict[str, Any] = {"base": str, "size": int, "registers": lambda v: tuple(int(n) for n in v),
                 "encoders": lambda v: tuple((str(family), int(width)) for family, width in v),
                 "blocks": lambda v: tuple(tuple(int(n) for n in row) for row in v)}
        return {name: read(fields[name]) for name, read in known.items() if name in fields}
    except (ValueError, TypeError, AttributeError) as error:
        raise LikenessError(f"The '{METADATA_KEY}' entry of this adapter cannot be read ({error}); download or train the "
                            "file again.") from error


def _check(config: RealCustomConfig) -> RealCustomConfig:
    if sum(width for _, width in config.encoders) != config.vision:
        names = " + ".join(f"{family} {width}" for family, width in config.encoders)
        raise LikenessError(f"The RealCustom++ projector reads features of width {config.vision}, which {names} do not give; "
                            f"the file needs a '{METADATA_KEY}' entry that names its encoders.")
    depth = 4 if config.shallow else 1
    if any(len(row) != depth for row in config.blocks) or not (
            len(config.blocks) == len(config.encoders) == len(config.registers)):
        raise LikenessError(f"The '{METADATA_KEY}' entry of this adapter must name {depth} block(s) for each of its encoders; "
                            "train the file again.")
    return config


def to_metadata(config: RealCustomConfig) -> dict[str, str]:
    """The safetensors metadata that `identify` reads back."""
    fields = config._asdict()
    return {METADATA_KEY: json.dumps({name: fields[name] for name in ("base", "size", "registers", "encoders", "blocks")})}


def _order(key: str) -> tuple[int, int, int]:
    """Layers in the order of the network: down, middle, up."""
    part, number, depth = key.split(".")
    return ("input", "middle", "output").index(part), int(number), int(depth)
