"""PhotoMaker in the host: the identity of several pictures in the class word, beside the same prompt without it."""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import comfy.clip_vision
import comfy.utils
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..common.images import to_rgb
from ..face.faces import Faces
from ..portrait import photomaker as method
from .inject import between
from .memory import ready, stop_if_asked, to_intermediate
from .portrait_faces import embeddings
from .portrait_files import apply_lora, load_photomaker_parts
from .portrait_prompt import Stacked, stack
from .prompt import unweighted

# What our encoder reads of core's object, whose class belongs to a node file of the host.
CORE_PARTS = ("load_device", "vision_model", "visual_projection", "visual_projection_2", "fuse_module")
CHUNK = 4  # pictures at a time
Conditioning = list[list[Any]]


class PhotoMaker(NamedTuple):
    """PHOTOMAKER, core's type: answers core's encode for v1, and the pack's own for both."""
    patcher: Any
    config: method.PhotoMakerConfig
    name: str

    @property
    def load_device(self) -> torch.device:
        """Read by core's node."""
        return self.patcher.load_device

    @property
    def size(self) -> int:
        """Side in pixels of its pictures."""
        return self.patcher.model.size

    def __call__(self, id_pixel_values: Tensor, prompt_embeds: Tensor, class_tokens_mask: Tensor,
                 id_embeds: Tensor | None = None) -> Tensor:
        """Normalised pixels (1, n, 3, s, s), text (1, t, width), mask (1, t) of the repeated class word, for v2 embeddings
        (n, 512) -> text with the identity in the masked rows. Raises LikenessError."""
        if self.config.version == 2 and id_embeds is None:
            raise LikenessError("PhotoMaker v2 needs face embeddings, for which the PhotoMaker Encode of ComfyUI has no input; "
                                "use Likeness' PhotoMaker Encode with Analyze Faces.")
        if prompt_embeds.shape[-1] != self.config.width:
            raise LikenessError(f"This PhotoMaker fuses text of width {self.config.width}, the prompt has "
                                f"{prompt_embeds.shape[-1]}; encode it with the CLIP of an SDXL checkpoint.")
        pixels = id_pixel_values.flatten(0, 1)
        ready([self.patcher], CHUNK * 257 * self.config.vision * 80)
        module = self.patcher.model
        place = {"device": self.patcher.load_device, "dtype": next(module.parameters()).dtype}
        found, bar = [], comfy.utils.ProgressBar(len(pixels))
        for first in range(0, len(pixels), CHUNK):
            stop_if_asked()
            block = slice(first, first + CHUNK)
            known = None if id_embeds is None else id_embeds[block].to(**place)
            found.append(module.identities(pixels[block].to(**place), known))
            bar.update(len(found[-1]))
        identities = torch.cat(found).flatten(0, 1)
        mask = class_tokens_mask.to(prompt_embeds.device)
        rows = prompt_embeds[mask]
        out = prompt_embeds.clone()
        # core marks one row whatever the number of pictures: the first one's
        out[mask] = module.fuse(rows.to(**place), identities[:len(rows)]).to(rows)
        return out


class Encoded(NamedTuple):
    """free: the same prompt without the trigger, for the customisation-free flow."""
    positive: Conditioning
    free: Conditioning
    report: str
    found: bool


def load_photomaker(path: Path, model: Any, strength: float) -> tuple[PhotoMaker, Any, str]:
    """(PHOTOMAKER, MODEL with its LoRA, report). Raises LikenessError."""
    patcher, lora = load_photomaker_parts(path, strength != 0)
    config = patcher.model.config
    model, line = apply_lora(model, lora, strength, config.width)
    faces = (f"; it needs FACES of the pack {method.PACK}, {config.per} tokens a picture" if config.version == 2 else
             "; it needs no FACES")
    return PhotoMaker(patcher, config, path.name), model, f"{path.name}: PhotoMaker v{config.version}{faces}\n{line}"


def encode_photomaker(photomaker: Any, clip: Any, image: Tensor, text: str, trigger: str, faces: Faces | None = None,
                      start: float = 0.2, strength: float = 1.0, on_missing: str = "error") -> Encoded:
    """Both conditionings of one prompt; from `start` (0..1 of the sampling) on the identity acts. Raises LikenessError."""
    version, per, size = _kind(photomaker)
    pictures, known, line = _pictures(image, faces, version, on_missing)
    lines = [line]
    if not len(pictures):
        free = clip.encode_from_tokens_scheduled(stack(clip, text, trigger, 1).free)
        return Encoded(free, free, f"{line}: the prompt without an identity is passed through", False)
    prompt = stack(clip, text, trigger, len(pictures) * per)
    free = clip.encode_from_tokens_scheduled(prompt.free)
    if strength == 0.0:
        return Encoded(free, free, f"{line}\nstrength 0: the prompt without an identity", True)
    plain = clip.encode_from_tokens_scheduled(prompt.tokens)
    raw = plain[0][0][:, list(prompt.columns)]
    if prompt.weight != 1.0:  # the identity meets the word itself; core's weight scales what comes out
        raw = unweighted(clip, prompt.tokens, prompt.columns, text)[None]
    pixels = comfy.clip_vision.clip_preprocess(pictures.to(photomaker.load_device), size).float()[None]
    raw = raw.to(photomaker.load_device)
    more = {} if known is None else {"id_embeds": known}
    fused = photomaker(id_pixel_values=pixels, prompt_embeds=raw.clone(),  # core's object writes into it
                       class_tokens_mask=torch.ones(raw.shape[:2], dtype=torch.bool, device=raw.device), **more)
    delta = to_intermediate((fused - raw) * (strength * prompt.weight))
    positive: Conditioning = []
    for number, (rows, options) in enumerate(plain):
        rows = rows.clone()
        rows[:, list(prompt.columns)] += delta.to(rows)
        positive += between(free[number % len(free)], [rows, options], start, 1.0)
    lines.append(_columns(prompt, len(prompt.columns)))
    lines.append(f"identity {strength:g} from {start:g} of the sampling on" + (", the plain prompt before" if start > 0 else ""))
    return Encoded(positive, free, "\n".join(lines), True)


def _kind(photomaker: Any) -> tuple[int, int, int]:
    """(version, tokens a picture, side of a picture); core's own object is v1. Raises LikenessError for any other."""
    if isinstance(photomaker, PhotoMaker):
        return photomaker.config.version, photomaker.config.per, photomaker.size
    if all(hasattr(photomaker, part) for part in CORE_PARTS) and not hasattr(photomaker, "qformer_perceiver"):
        return 1, 1, 224
    raise LikenessError(f"The PHOTOMAKER is a {type(photomaker).__name__} of another pack; load the file with Likeness' Load "
                        "PhotoMaker, or with the loader of ComfyUI.")


def _pictures(image: Tensor, faces: Faces | None, version: int, on_missing: str) -> tuple[Tensor, Tensor | None, str]:
    """Pictures (n, h, w, 3), for v2 their embeddings (n, 512), and a line for the report."""
    pictures = to_rgb(image)
    count = len(pictures)
    if version == 1:
        return pictures, None, f"PhotoMaker v1: {count} picture(s)" + ("" if faces is None else "; v1 does not look at FACES")
    if faces is None:
        raise LikenessError(f"PhotoMaker v2 needs FACES of the same pictures; connect Analyze Faces with the pack {method.PACK}.")
    found = embeddings(faces, method.SPACE, method.PACK, "PhotoMaker v2")
    if len(found) != count:
        raise LikenessError(f"The FACES come from {len(found)} picture(s) and the IMAGE has {count}; connect the same batch to "
                            "Analyze Faces and here.")
    missing = [str(number) for number, one in enumerate(found, 1) if one is None]
    if missing and on_missing == "error":
        raise LikenessError(f"There is no face in picture {', '.join(missing)} of {count}; choose other pictures, or set "
                            "on_missing to pass through, which leaves them out.")
    kept = [(number, one) for number, one in enumerate(found) if one is not None]
    line = f"PhotoMaker v2: {len(kept)} of {count} picture(s) with a face"
    return pictures[[number for number, _ in kept]], torch.stack([one for _, one in kept]) if kept else None, line


def _columns(prompt: Stacked, count: int) -> str:
    first = prompt.columns[0]
    place = f"row {first}" if count == 1 else f"rows {first} to {first + count - 1}"
    weight = f", weight {prompt.weight:g}" if prompt.weight != 1.0 else ""
    return f"class word \"{prompt.word}\" {count} time{'s' if count > 1 else ''}: {place}{weight}"
