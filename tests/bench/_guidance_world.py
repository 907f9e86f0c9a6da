"""The miniature for the guidance bench: its parts, a subject under a live mask, a sampling."""
from __future__ import annotations

from typing import Any

import comfy.sample
import torch
from torch import Tensor

from likeness.models.common import files
from likeness.models.demo.judge import Judge
from likeness.models.hosting import adapters, demo
from likeness.models.hosting.blocks import attention_blocks
from likeness.models.hosting.encoders import Encoders, make_encoder
from likeness.models.hosting.guidance import KEEPS, make_guidance
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.prompt import encode_prompt
from likeness.models.hosting.training_realcustom import config_of
from likeness.models.hosting.word_maps import FINE
from likeness.models.realcustom.adapter import RealCustom, release_names
from likeness.models.realcustom.config import to_metadata
from likeness.models.realcustom.projector import Projector

NEGATIVE, STEPS, CFG, NOISES, REFRESH = "", 20, 3.0, 4, 10
SCOPE = 0.22  # the share of a picture's cells that a creature of this world covers by a quarter or more


class World:
    """The shipped miniature: model, clip, vae, encoders, judge."""

    def __init__(self) -> None:
        self.model, self.clip, self.vae = demo.load_base()
        found = []
        for name in ("dino.safetensors", "mae.safetensors"):
            state, metadata = files.load(demo.WEIGHTS / name)
            found.append(make_encoder(state, metadata, files.sha256(demo.WEIGHTS / name), name))
        self.encoders = Encoders(tuple(found))
        state, metadata = files.load(demo.WEIGHTS / "judge.safetensors")
        self.judge, self.judged = Judge().eval(), metadata["accuracy"]
        self.judge.load_state_dict({key: value.float() for key, value in state.items()})

    def decode(self, samples: Tensor) -> Tensor:
        """(b, 3, 64, 64)."""
        return self.vae.decode(samples)[..., :3].movedim(-1, 1).float().clamp(0, 1)


def random_adapter(world_: World) -> Any:
    """A subject of an untrained adapter of the miniature's layout."""
    layers = tuple(attention_blocks(world_.model).items())
    config = config_of(128, layers, [item.config for item in world_.encoders.items], 64)
    module = RealCustom(config, Projector(config.vision, config.width, 4 * config.vision))
    module.init_weights(torch.Generator().manual_seed(0))
    adapter = adapters.make_adapter(release_names(module.state_dict(), 1), to_metadata(config), "random", "random")
    return adapters.extract(adapter, world_.encoders, torch.rand(1, 128, 128, 3), "concat", "random")


def injected(world_: World, who: Any, text: str, word: str, refresh: int = REFRESH, live: bool = True, into: Any = None,
             area: Tensor | None = None) -> Any:
    """One injector, with the live mask of its word or without any. into: what another injector gave; the sentence is the same
    one, or with `area` (1, h, w) another one for that part of the picture."""
    positive, found, _ = encode_prompt(world_.clip, text, word)
    if area is not None:  # what core's ConditioningSetMask writes
        positive = [[rows, {**more, "mask": area, "set_area_to_bounds": False, "mask_strength": 1.0}] for rows, more in positive]
    rest = world_.clip.encode_from_tokens_scheduled(world_.clip.tokenize(NEGATIVE))
    model = world_.model
    if into is not None:
        model, rest = into.model, into.negative
        positive = into.positive if area is None else positive
    guidance = make_guidance(found, SCOPE, "max_norm", KEEPS[0], True, refresh, layers=FINE) if live else None
    return inject(model, positive, rest, who, found, Strengths(0.0, 1.0), guidance=guidance)


def sampled(model: Any, positive: Any, negative: Any, seed: int) -> Tensor:
    latent = torch.zeros(NOISES, 48, 8, 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(model, noise, STEPS, CFG, "euler", "normal", positive, negative, latent, seed=seed,
                               disable_pbar=True)
