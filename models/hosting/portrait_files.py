"""Files of PhotoMaker and InstantID: parts in one file, as nested dicts in a .bin and as prefixes in a .safetensors."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ..common import files
from ..common.errors import LikenessError
from ..portrait import instantid, photomaker
from ..portrait.weights import part
from ..vision.load import looks_like
from .blocks import check_fits
from .memory import compute_dtype, patcher_of

ENCODER, LORA = "id_encoder.", "lora_weights."
UNET = "unet."  # before the names of a LoRA's layers
DOWN = ("down.weight", "lora_A.weight", "lora_A.default.weight")  # one for each layer, in old and new releases
# Encoders by their file, for as long as some node's output still holds them, and the LoRA of those whose LoRA was asked for.
_encoders: weakref.WeakValueDictionary[tuple[str, int, int], Any] = weakref.WeakValueDictionary()
_loras: weakref.WeakKeyDictionary[Any, dict[str, Tensor]] = weakref.WeakKeyDictionary()


class InstantID(NamedTuple):
    """LIKENESS_INSTANTID: `patcher.model` is the method's module."""
    patcher: Any
    config: instantid.InstantIDConfig
    name: str


def read_parts(path: str | Path, only: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """{"part.name": tensor} of a file, `only` those of which it says yes. Raises LikenessError for one that cannot be read as
    weights."""
    path = Path(path)
    files.check_file(path)
    if files.is_safetensors(path):
        return files.load(path, only=only)[0]
    try:
        found = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:  # the unpickler raises what it likes
        raise LikenessError(f"The file {path.name} cannot be read as weights ({type(error).__name__}); download it again."
                            ) from error
    return {name: value for name, value in _flat(found).items() if only is None or only(name)}


def _flat(found: Any, prefix: str = "") -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in found.items() if isinstance(found, Mapping) else ():
        out |= {f"{prefix}{name}": value} if isinstance(value, Tensor) else _flat(value, f"{prefix}{name}.")
    return out


def _other(path: Path, state: Mapping[str, Any], what: str, wanted: str) -> LikenessError:
    guess = ("InstantID's ip-adapter" if instantid.is_instantid(state) else
             "PhotoMaker" if photomaker.is_photomaker(part(state, ENCODER)) else looks_like(state))
    return LikenessError(f"The file {path.name} is no {what}" + (f", it looks like {guess}" if guess else "")
                         + f"; choose {wanted}.")


def load_instantid(path: str | Path) -> InstantID:
    """Raises LikenessError for any other file."""
    path = Path(path)
    patcher = _instantid(path)
    return InstantID(patcher, patcher.model.config, path.name)


def _instantid(path: Path, disable_dynamic: bool = False) -> Any:
    """Also the host's factory for a copy with weights of its own."""
    state = read_parts(path)
    if not instantid.is_instantid(state):
        raise _other(path, state, "InstantID file", "InstantID's ip-adapter.bin")
    patcher = patcher_of(instantid.build(state, comfy.ops.manual_cast, _dtype()), disable_dynamic)
    patcher.cached_patcher_init = (_instantid, (path,))
    return patcher


def load_photomaker_parts(path: str | Path, with_lora: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """(patcher of the identity encoder, the LoRA, empty unless wished). What is loaded and in use is not read again.

    Raises LikenessError for any other file."""
    path = Path(path)
    files.check_file(path)
    version = files.version(path)
    patcher = _encoders.get(version)
    if patcher is None:
        state = read_parts(path, None if with_lora else _no_lora)
        patcher = _encoders[version] = _photomaker(path, False, state)
        if with_lora:
            _loras[patcher] = part(state, LORA)
    elif with_lora and patcher not in _loras:
        _loras[patcher] = part(read_parts(path, lambda name: name.startswith(LORA)), LORA)
    return patcher, _loras[patcher] if with_lora else {}


def _no_lora(name: str) -> bool:
    return not name.startswith(LORA)


def _photomaker(path: Path, disable_dynamic: bool = False, state: dict[str, Tensor] | None = None) -> Any:
    state = read_parts(path, _no_lora) if state is None else state
    encoder = part(state, ENCODER)
    # core reads a bare encoder too
    encoder = encoder if encoder or not photomaker.is_photomaker(state) else state
    if not photomaker.is_photomaker(encoder):
        raise _other(path, state, "PhotoMaker file", "photomaker-v1.bin or photomaker-v2.bin")
    patcher = patcher_of(photomaker.build(encoder, comfy.ops.manual_cast, _dtype()), disable_dynamic)
    patcher.cached_patcher_init = (_photomaker, (path,))
    return patcher


def _dtype() -> torch.dtype:
    return compute_dtype(comfy.model_management.get_torch_device())


def apply_lora(model: Any, lora: Mapping[str, Tensor], strength: float, width: int) -> tuple[Any, str]:
    """A MODEL with PhotoMaker's LoRA, and a line for the report; strength 0: the model itself.

    width: of the text that the encoder fuses. Raises LikenessError for a model or a LoRA of another kind."""
    check_fits(model, "sdxl", width, {})
    if strength == 0.0:
        return model, "LoRA 0: off"
    if not lora:
        return model, "the file has no LoRA part, so the likeness will be weak: the release's own file has one"
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    for name, target in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items():
        if name.endswith(".weight"):  # as newer releases of diffusers write them
            keys.setdefault(f"unet.{name[:-len('.weight')]}", f"diffusion_model.{target}")
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), keys)
    layers = [name for name in lora if name.endswith(DOWN)]
    used = sum(name.startswith(UNET) for name in layers)
    model = model.clone()
    done = model.add_patches(patches, strength)
    if len(done) < used or not done:
        raise LikenessError(f"Only {len(done)} of the {used or len(layers)} layers of PhotoMaker's LoRA belong to this model; "
                            "load an SDXL checkpoint, or set lora_strength to 0.")
    rest = len(layers) - len(done)
    return model, f"LoRA {strength:g}: {len(done)} layers of the model" + (
        f"; {rest} more of the file are not of its UNet and stay out" if rest else "")
