"""InstantID in the host: face tokens beside the text in all 70 attentions, and a ControlNet that reads them instead of it."""
from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..face.faces import Faces
from ..portrait import instantid as method
from .adapters import picture_hash
from .blocks import attention_blocks, check_fits
from .image_attention import ImagePlan, add_image_injection
from .injector import Timing
from .memory import ready
from .portrait_control import check_control, hint_of, with_control
from .portrait_faces import embeddings
from .portrait_files import InstantID
from .stamps import add_reader, stamped
from .stores import projected

AVERAGE, CONCAT, EACH = COMBINE = ("average", "concat", "one per latent")
ALL, NO_MIDDLE = LAYERS = ("all", "without the middle (older nodes)")
Conditioning = list[list[Any]]


class Strengths(NamedTuple):
    """weight: of the face tokens; control: of the ControlNet; start and end: shares of the sampling (0..1)."""
    weight: float = 0.8
    control: float = 0.8
    start: float = 0.0
    end: float = 1.0


class Applied(NamedTuple):
    """free: the positive prompt without the identity, for the customisation-free flow."""
    model: Any
    positive: Conditioning
    negative: Conditioning
    free: Conditioning
    report: str
    found: bool


class Tokens(NamedTuple):
    """face (n, l, width), and nothing (1, l, width), what a zero embedding makes, for the negative."""
    face: Tensor
    nothing: Tensor


def apply_instantid(model: Any, positive: Conditioning, negative: Conditioning, instantid: InstantID, faces: Faces,
                    strengths: Strengths, control: Any = None, picture: Tensor | None = None, combine: str = AVERAGE,
                    layers: str = ALL, mask: Tensor | None = None, on_missing: str = "error") -> Applied:
    """New MODEL and conditionings with the identity; what came in is left as it was. Raises LikenessError."""
    if not 0 <= strengths.start < strengths.end <= 1:
        raise LikenessError(f"The face would act from {strengths.start:g} to {strengths.end:g} of the sampling; the start must "
                            "be smaller than the end.")
    if (control is None) != (picture is None):
        raise LikenessError("InstantID's ControlNet and its picture belong together, and only one of them is connected; connect "
                            "both, the picture from Face Keypoints, or none.")
    numbers = _numbers(model, instantid.config)
    if layers != ALL:
        numbers = {key: number for key, number in numbers.items() if not key.startswith("middle.")}
    if control is not None:
        check_control(control, instantid.config.width)
    known = embeddings(faces, method.SPACE, method.PACK, "InstantID")
    found = [one for one in known if one is not None]
    if combine == EACH and found:
        # each keeps its latent; without a face that is the zero embedding, as in the negative
        _check_each(known, on_missing)
        shown = [torch.zeros_like(found[0]) if one is None else one for one in known]
    else:
        shown = found
    if not found:
        if on_missing == "error":
            raise LikenessError("There is no face in the FACES of InstantID Apply; choose a picture that shows a face, or set "
                                "on_missing to pass through.")
        return Applied(model, positive, negative, positive, "no face: passed through, nothing applied", False)
    guided = control is not None and strengths.control != 0.0
    if strengths.weight == 0.0 and not guided:
        return Applied(model, positive, negative, positive, "nothing is left to act: passed through", True)
    limit = _mask(mask)
    if limit is not None and strengths.weight != 0.0 and not limit.any():
        if on_missing == "error":
            raise LikenessError("The mask is empty, so the face would act nowhere; paint where it should be, disconnect the "
                                "mask, or set on_missing to pass through.")
        return Applied(model, positive, negative, positive, "the mask is empty: passed through, nothing applied", False)

    tokens = _tokens(instantid, torch.stack(shown), combine)
    number = _number(tokens, numbers, strengths, combine, mask)
    black = number ^ 1
    lines = [f"InstantID {instantid.name}: {len(found)} of {len(known)} picture(s) with a face, {combine}, "
             f"{tokens.face.shape[1]} tokens"]
    model = model.clone()
    add_reader(model)
    if strengths.weight != 0.0:
        # 5 MB a face at SDXL's size: the 340 million weights that make them need not stay on the device
        who, nobody = (projected(instantid.patcher, rows, numbers, 1 << 26) for rows in tokens)
        factors = tuple((key, strengths.weight) for key in numbers)
        add_image_injection(model, ImagePlan(number, black, who, nobody, "per latent" if combine == EACH else "all", factors,
                                             Timing(strengths.start, strengths.end), limit))
        lines.append(f"tokens {strengths.weight:g}: {len(numbers)} layers" + (", limited by a mask" if mask is not None else ""))
    else:
        lines.append("tokens 0: off")
    free = positive
    if guided:
        assert picture is not None
        inner = hint_of(control, picture, strengths.control, strengths.start, strengths.end)
        read = {number: tokens.face, black: tokens.nothing}
        made: dict[Any, Any] = {}
        # a simple Apply ControlNet on the positive acts on the negative too, unless that says otherwise
        inherited = next((entry[1].get("control") for entry in positive if entry[1].get("control_apply_to_uncond")), None)
        positive = with_control(positive, made, inner, read)
        negative = with_control(negative, made, inner, read, inherited)
        # the same object, which does nothing for a prompt without the stamp: all three run in one call
        free = positive
        lines.append(f"ControlNet {strengths.control:g}: reads the face, not the prompt")
    else:
        lines.append("ControlNet 0: off" if control is not None else "no ControlNet: the face has its place by chance")
    return Applied(model, [stamped(entry, number) for entry in positive], [stamped(entry, black) for entry in negative],
                   [stamped(entry, 0) for entry in free], "\n".join(lines), True)


def _check_each(known: list[Tensor | None], on_missing: str) -> None:
    """Raises LikenessError that names the pictures without a face, unless they may pass."""
    empty = [str(number) for number, one in enumerate(known, 1) if one is None]
    if empty and on_missing == "error":
        raise LikenessError(f"With one per latent every picture needs a face, and picture {', '.join(empty)} of {len(known)} "
                            "shows none; choose others, or set on_missing to pass through, and their latents get no face.")


def _numbers(model: Any, config: method.InstantIDConfig) -> dict[str, str]:
    """Layer of the host -> its number in the file. Raises LikenessError when they are not one another's."""
    check_fits(model, "sdxl", config.width, {})
    blocks = attention_blocks(model)
    keys = method.layer_keys(blocks)
    channels = [blocks[key] for key in keys]
    if channels != [width for _, width in config.layers]:
        raise LikenessError(f"This InstantID file has {len(config.layers)} layers for SDXL's attentions, the model has "
                            f"{len(keys)} of other widths; load an SDXL checkpoint.")
    return {key: number for key, (number, _) in zip(keys, config.layers, strict=True)}


def _mask(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    return torch.nan_to_num(mask.reshape(-1, *mask.shape[-2:]).float()).clamp(0, 1)


def _tokens(instantid: InstantID, found: Tensor, combine: str) -> Tokens:
    """Raw embeddings (n, 512) -> tokens in float32 on the CPU."""
    patcher = instantid.patcher
    ready([patcher], 1 << 26)
    embedding = found.mean(0, keepdim=True) if combine == AVERAGE else found
    rows = torch.cat([embedding, torch.zeros_like(found[:1])])
    parameter = next(patcher.model.parameters())
    tokens = patcher.model.tokens(rows.to(patcher.load_device, parameter.dtype)).float().cpu()
    face, nothing = tokens[:-1], tokens[-1:]
    if combine == CONCAT:
        # repeated tokens share their attention evenly: as long as the face's, and nothing else
        face, nothing = face.flatten(0, 1)[None], nothing.repeat(1, len(found), 1)
    return Tokens(face, nothing)


def _number(tokens: Tokens, numbers: dict[str, str], strengths: Strengths, combine: str, mask: Tensor | None) -> int:
    """An odd number that stands for this face with all its settings; the even one below it is its negative's."""
    label = repr((picture_hash(*tokens), sorted(numbers), strengths, combine, picture_hash(mask)))
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:6], "big") | 1
