"""Small helpers for pictures (b, h, w, c) with values 0..1, the layout of the host's IMAGE."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LikenessError

BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "grey": (0.5, 0.5, 0.5), "black": (0.0, 0.0, 0.0)}
Background = str | tuple[float, float, float]


def background_color(background: Background) -> tuple[float, float, float]:
    """RGB in 0..1 of a background; a triple passes through. Raises LikenessError for an unknown name."""
    if not isinstance(background, str):
        return background
    if background not in BACKGROUNDS:
        raise LikenessError(f"The background {background!r} is not known: choose {', '.join(BACKGROUNDS)}.")
    return BACKGROUNDS[background]


def as_image(image: Tensor) -> Tensor:
    """Any picture tensor -> float32 (b, h, w, c) with 1 to 4 channels, clamped to 0..1.

    Taken: (b, h, w, c), one picture (h, w, c) with 3 or 4 channels, grey (b, h, w) or (h, w), bytes 0..255. NaN is black, as
    where the host saves it.
    Raises LikenessError for other shapes and for pictures without pixels.
    """
    shape = tuple(image.shape)
    if image.ndim == 2:
        image = image[None, :, :, None]
    elif image.ndim == 3:
        image = image[None] if image.shape[-1] in (3, 4) else image[..., None]
    if image.ndim != 4 or not 1 <= image.shape[-1] <= 4:
        raise LikenessError(f"A picture of shape (batch, height, width, 1 to 4 channels) was expected, but "
                            f"{shape} came: connect an IMAGE.")
    if image.numel() == 0:
        raise LikenessError(f"The picture has no pixels, its shape is {shape}: check the node that made it.")
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    return torch.nan_to_num(image).clamp(0, 1)


def split_alpha(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Any picture -> (rgb (b, h, w, 3), alpha (b, h, w) with 1 = opaque = subject, or None without alpha).

    The colours under the alpha are left as they are. (The host's MASK of a loaded picture is 1 - alpha.)
    """
    image = as_image(image)
    channels = image.shape[-1]
    alpha = image[..., -1] if channels in (2, 4) else None
    rgb = image[..., :3] if channels >= 3 else image[..., :1].expand(-1, -1, -1, 3)
    return rgb, alpha


def composite(rgb: Tensor, mask: Tensor, background: Background = "white") -> Tensor:
    """Lay rgb (b, h, w, 3) over a plain background where mask (b, h, w) is 1."""
    color = rgb.new_tensor(background_color(background))
    # lerp is exact at both ends: a pixel outside the mask is the background, one inside is untouched.
    return torch.lerp(color.expand_as(rgb), rgb, mask.to(rgb)[..., None])


def to_rgb(image: Tensor, background: Background = "white") -> Tensor:
    """Any picture (RGBA, grey, one channel) -> (b, h, w, 3) in 0..1; alpha is laid over `background`."""
    rgb, alpha = split_alpha(image)
    return rgb if alpha is None else composite(rgb, alpha, background)


def to_chw(image: Tensor) -> Tensor:
    """(b, h, w, c) -> (b, c, h, w), contiguous."""
    return image.movedim(-1, 1).contiguous()


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(b, h, w, c) -> (b, height, width, c), bicubic with antialias, in 0..1; its own size: unchanged."""
    if image.shape[1:3] == (height, width):
        return image
    # In float32: the antialiased kernels do not exist for every type on every device.
    pixels = F.interpolate(to_chw(image).float(), size=(height, width), mode="bicubic", align_corners=False,
                           antialias=True)
    return pixels.clamp(0, 1).movedim(1, -1).contiguous().to(image.dtype)


def pad_to_square(image: Tensor, background: Background = "white") -> Tensor:
    """(b, h, w, 3) -> (b, s, s, 3), centred on the background; an odd pixel goes to the bottom or right."""
    height, width = image.shape[1:3]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    canvas = image.new_tensor(background_color(background)).repeat(image.shape[0], side, side, 1)
    canvas[:, top:top + height, left:left + width] = image
    return canvas
