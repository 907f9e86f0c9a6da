"""Context windows over a batch of frames: what belongs to a frame stays with it, whichever window sees it."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from host.support import base, comfy, encode, injected, latent_of, prompt, sample, subject
from likeness.models.common.errors import LikenessError
from likeness.models.hosting import guidance
from likeness.models.hosting.guidance import make_guidance
from likeness.models.hosting.inject import Injected, Strengths, inject

FRAMES, WHITE = 8, 5
LOCAL = Strengths(0.0, 1.0)


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def windowed(model: Any, dim: int = 0) -> Any:
    """A clone that sees four frames at a time, as core's Context Windows node makes it; or four rows of cells (dim 2)."""
    windows, model = comfy.context_windows, model.clone()
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule("batched"),
        fuse_method=windows.get_matching_fuse_method("flat"), context_length=4, context_overlap=0, context_stride=1,
        closed_loop=False, dim=dim, freenoise=False)
    windows.create_prepare_sampling_wrapper(model)
    return model


def frames(done: Injected, windows: bool, steps: int = 1) -> Tensor:
    model = windowed(done.model) if windows else done.model
    return sample(model, done.positive, done.negative, latent=latent_of("sd15", FRAMES), steps=steps)


def changed(done: Injected, windows: bool) -> list[int]:
    plain = injected(strengths=Strengths(0.0, 0.0))
    apart = (frames(done, windows) - frames(plain, windows)).flatten(1).abs().amax(1)
    return (apart > 1e-4).nonzero()[:, 0].tolist()


def of_one_frame() -> Tensor:
    mask = torch.zeros(FRAMES, 16, 16)
    mask[WHITE] = 1.0
    return mask


@pytest.mark.parametrize("windows", [False, True])
def test_a_mask_a_frame(windows):
    assert changed(injected(strengths=LOCAL, mask=of_one_frame()), windows) == [WHITE]


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("windows", [False, True])
def test_a_mask_a_frame_in_the_guidance(replace, windows):
    own = make_guidance(prompt("sd15")[1], 0.9, "max_norm", "top share", False, 8, mask=of_one_frame(), replace=replace)
    assert changed(injected(strengths=LOCAL, guidance=own), windows) == [WHITE]


def test_a_reference_a_frame():
    positive, word = prompt("sd15")
    own = subject("sd15", n=FRAMES, pairing="per latent")
    done = inject(base("sd15")[0], positive, encode("sd15", "blurry"), own, word, LOCAL)
    torch.testing.assert_close(frames(done, True), frames(done, False), rtol=0, atol=0.01)  # another frame's: 70


@pytest.mark.parametrize("strengths", [LOCAL, Strengths(1.0, 1.0)])
def test_live_masks_stay_with_their_frames(strengths):
    """Each window has masks of its own that last over the steps; where a reference a frame stands in the prompt, the question
    for the mask has the window's own rows of it."""
    positive, word = prompt("sd15")
    own, live = subject("sd15", n=FRAMES, pairing="per latent"), make_guidance(word, 0.3, "max_norm", "top share", False, 1)
    done = inject(base("sd15")[0], positive, encode("sd15", "blurry"), own, word, strengths, guidance=live)
    apart = (frames(done, True, steps=4) - frames(done, False, steps=4)).flatten(1).abs().amax(1)
    assert apart.max() < 0.1, apart  # with another frame's masks: 10 and more


def test_windows_of_another_axis_have_masks_of_their_own(monkeypatch):
    """Rows of cells in place of frames: the same latents, but another part of the picture."""
    runs, begin = [], guidance.Run.__init__
    monkeypatch.setattr(guidance.Run, "__init__", lambda self: runs.append(self) or begin(self))
    live = make_guidance(prompt("sd15")[1], 0.3, "max_norm", "top share", False, 1)
    done = injected(strengths=LOCAL, guidance=live)
    sample(windowed(done.model, dim=2), done.positive, done.negative, steps=2)
    (run,) = runs
    assert len(run.states) == 2 and all(state.masks for state in run.states.values())


def test_more_masks_than_frames_are_told_in_a_window_too():
    with pytest.raises(LikenessError, match="9 masks and the batch holds 8 latents"):
        frames(injected(strengths=LOCAL, mask=torch.ones(FRAMES + 1, 16, 16)), True)
