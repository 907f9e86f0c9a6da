"""CustomNet as a model of the host: what a row sees of object, camera and place comes with that row's own conditioning."""
from __future__ import annotations

import logging
from typing import Any, NamedTuple

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.ops
import comfy.supported_models_base
import torch
from torch import Tensor

from ..common.errors import LikenessError
from ..common.records import brief
from ..customnet.config import PROJECTION, TEXT, UNET, VISION, Layout
from ..customnet.layers import ObjectToken
from ..customnet.view import AZIMUTH_SIGN
from ..demo.schedule import SAMPLING
from .customnet_unet import DualUNet, renamed, restored
from .demo import DemoLatent

log = logging.getLogger("likeness")
KEY = "likeness_customnet"  # in an entry's options: Shown


class Shown(NamedTuple):
    """What one conditioning entry shows; None where it shows nothing. n rows, one a picture, or one for all.

    embed (n, e); camera (n, 4); location and background (n, c, h, w), as the VAE encodes them; strength of the object,
    text: of the text."""
    embed: Tensor | None
    camera: Tensor | None
    location: Tensor | None
    background: Tensor | None
    strength: float = 1.0
    text: float = 1.0

    def __repr__(self) -> str:
        return brief(self)


class CustomNetModel(comfy.model_base.BaseModel):
    """The host's base model with the object token; rows without object get zeros, as the release's negatives do."""

    def __init__(self, model_config: Any, layout: Layout, model_type: Any, device: Any = None):
        super().__init__(model_config, model_type, device=device, unet_model=DualUNet)
        self.layout = layout
        # float32: 2.4 MB, and the camera's small numbers deserve their digits
        self.object_token = ObjectToken(layout.embed, layout.width, torch.float32, device, comfy.ops.manual_cast)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The host's own, and c_concat, object_context and text_scale of this entry."""
        out = super().extra_conds(**kwargs)
        shown: Shown = kwargs.get(KEY) or Shown(None, None, None, None)
        noise, device = kwargs["noise"], kwargs["device"]
        rows = noise.shape[0]
        self._check_text(kwargs.get("cross_attn"))
        self._check_background(shown)
        extra = [self._latents(shown.location, noise, "location")]
        if self.layout.variant == "inpaint":
            extra.append(self._latents(shown.background, noise, "background"))
        out["c_concat"] = comfy.conds.CONDNoiseShape(torch.cat(extra, 1).to(device))
        out["object_context"] = comfy.conds.CONDRegular(self._token(shown, rows, device))
        if shown.text != 1.0:
            out["text_scale"] = comfy.conds.CONDRegular(torch.full((1, 1), shown.text, device=device))
        return out

    def _check_text(self, text: Tensor | None) -> None:
        if text is not None and text.shape[-1] != self.layout.width:
            raise LikenessError(f"The prompt was read by a text encoder of width {text.shape[-1]}, this model was trained with "
                                f"{self.layout.width}; connect the CLIP of Load CustomNet.")

    def _check_background(self, shown: Shown) -> None:
        inpaint = self.layout.variant == "inpaint"
        if inpaint and shown.location is not None and shown.background is None:
            raise LikenessError("This is CustomNet's inpaint variant, which continues a background, and none came; connect one "
                                "to View Conditioner, or load the normal variant.")
        if inpaint and shown.background is None:
            log.warning("A prompt of this run did not go through View Conditioner, so CustomNet's inpaint variant sees no "
                        "background with it; take positive and negative from there.")
        if not inpaint and shown.background is not None:
            raise LikenessError("This is CustomNet's normal variant, which cannot see a background; disconnect it from View "
                                "Conditioner, or load the inpaint variant.")

    def _latents(self, latents: Tensor | None, noise: Tensor, what: str) -> Tensor:
        if latents is None:
            return torch.zeros_like(noise)
        if latents.shape[1] != noise.shape[1]:
            raise LikenessError(f"The {what} was encoded by a VAE of {latents.shape[1]} channels, this model wants "
                                f"{noise.shape[1]}; connect the VAE of Load CustomNet to View Conditioner.")
        if latents.shape[2:] != noise.shape[2:]:
            sizes = [f"{t.shape[-1] * 8} x {t.shape[-2] * 8}" for t in (latents, noise)]
            raise LikenessError(f"View Conditioner made the {what} for pictures of {sizes[0]}, the latent is {sizes[1]}; give it "
                                "the same width and height, or connect its own LATENT.")
        return _rows(latents, noise.shape[0]).to(noise.device)

    def _token(self, shown: Shown, rows: int, device: Any) -> Tensor:
        """(rows, 1, d)."""
        if shown.embed is None or shown.camera is None:
            return torch.zeros(rows, 1, self.layout.width, device=device)
        if shown.embed.shape[-1] != self.layout.embed:
            raise LikenessError(f"The reference was looked at by an image tower of width {shown.embed.shape[-1]}, this model was "
                                f"trained with {self.layout.embed}; connect the CLIP_VISION of Load CustomNet.")
        camera = _rows(shown.camera, rows) * torch.tensor([1.0, self.model_config.azimuth_sign, 1.0, 1.0])
        embed = _rows(shown.embed, rows)
        return self.object_token(embed.float().to(device), camera.float().to(device)) * shown.strength

    def state_dict_for_saving(self, unet_state_dict: Any, *parts: Any, **named: Any) -> dict[str, Tensor]:
        """A whole checkpoint under the authors' names, for core's save nodes."""
        out = super().state_dict_for_saving(unet_state_dict, *parts, **named)
        return {**out, **self.object_token.state_dict()}


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """One row for all, or one each. Raises LikenessError."""
    if tensor.shape[0] not in (1, rows):
        raise LikenessError(f"There are {tensor.shape[0]} views, places, references or backgrounds, but the latent holds {rows} "
                            "picture(s); connect the LATENT of View Conditioner, or make as many views as pictures.")
    return tensor if tensor.shape[0] == rows else tensor.repeat(rows, *[1] * (tensor.ndim - 1))


class CustomNetConfig(comfy.supported_models_base.BASE):
    """What the host asks of a model family."""
    unet_config: dict[str, Any] = {}
    unet_extra_config = {"num_heads": 8, "num_head_channels": -1}
    latent_format = comfy.latent_formats.SD15
    memory_usage_factor = 1.0
    azimuth_sign = AZIMUTH_SIGN
    text_encoder_key_prefix = [TEXT]
    clip_vision_prefix = VISION

    def inpaint_model(self) -> bool:
        return False  # in the host's sense: its own mask channels

    def process_unet_state_dict(self, state_dict):
        return renamed(state_dict)

    def process_unet_state_dict_for_saving(self, state_dict):
        return {f"{UNET}{name}": value for name, value in restored(state_dict).items()}

    def process_clip_state_dict_for_saving(self, state_dict):
        return {name.replace("clip_l.", TEXT, 1): value for name, value in state_dict.items()
                if "logit_scale" not in name and "text_projection" not in name}

    def process_vae_state_dict_for_saving(self, state_dict):
        return {f"{self.vae_key_prefix[0]}{name}": value for name, value in state_dict.items()}

    def build(self, layout: Layout, device: Any = None) -> CustomNetModel:
        """The model without weights."""
        return CustomNetModel(self, layout, self.model_type({}), device)


class MiniatureConfig(CustomNetConfig):
    """The same in the miniature world."""
    unet_extra_config: dict[str, Any] = {}
    latent_format = DemoLatent
    sampling_settings = SAMPLING
    azimuth_sign = 1.0  # trained by this pack, with its own cameras

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION


def projection_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The object token's own tensors of a file, in float32."""
    return {name: value.float() for name, value in state.items() if name.startswith(PROJECTION)}
