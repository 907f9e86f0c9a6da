"""Two samplers on one GUIDANCE on a real server: each preview shows the masks of its own run, in every cache mode."""
from __future__ import annotations

import pytest

from harness import mini, paths
from workflows.test_cache_modes import MODES
from workflows.test_nodes_server import call, core, link, pixels


def graph(words: str = "this word"):
    sampling = {"model": link("inject"), "positive": link("inject", 1), "negative": link("inject", 2),
                "latent_image": link("empty"), "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal",
                "denoise": 1.0}
    prompt = {
        "demo": call("LoadDemo", method="CustAny"),
        "file": core("LoadImage", image="subject.png"),
        "id": call("ExtractID", adapter=link("demo", 3), encoders=link("demo", 4), image=link("file"), mask=link("file", 1),
                   combine="concat", margin=0.1, on_missing="error"),
        "prompt": call("EncodePrompt", clip=link("demo", 1), text="a cat on the beach", word="cat", occurrence=0,
                       on_missing="error"),
        "plain": core("CLIPTextEncode", clip=link("demo", 1), text=""),
        "empty": core("EmptyLatentImage", width=64, height=64, batch_size=1),
        "guide": call("GuidanceMask", word=link("prompt", 1), scope=0.25, strategy="max_norm", keep="top share", values="soft",
                      refresh_until_step=2),
        "inject": call("DualLevelInjector", model=link("demo"), positive=link("prompt"), negative=link("plain"),
                       subject=link("id"), word=link("prompt", 1), preset="custom", global_strength=1.0, local_strength=1.0,
                       start_percent=0.0, end_percent=1.0, guidance=link("guide")),
    }
    for name, seed in (("one", 1), ("two", 2)):
        prompt[name] = core("KSampler", seed=seed, **sampling)
        prompt[f"show {name}"] = call("PreviewGuidance", guidance=link("guide"), latent=link(name), words=words)
    return prompt


def draw_subject(path):
    import torch
    from PIL import Image

    picture = (torch.rand(60, 80, 4, generator=torch.Generator().manual_seed(0)) * 255).byte()
    picture[..., 3] = 0
    picture[10:50, 20:60, 3] = 255
    Image.fromarray(picture.numpy()).save(path)


@pytest.mark.parametrize("mode", MODES)
def test_each_preview_shows_its_own_masks(request, make_server, mode):
    server = make_server(flags=MODES[mode]) if MODES[mode] else request.getfixturevalue("server")
    weights = server.base / "custom_nodes" / paths.PACK_FOLDER / "models" / "demo" / "weights"
    if not (weights / mini.ADAPTER).is_file():
        mini.make_weights(weights)
    draw_subject(server.input / "subject.png")
    try:
        first = server.run(graph())
        assert first.ok, first.error
        one, two = (pixels(first, f"show {name}") for name in ("one", "two"))
        assert one.shape == two.shape and not bool((one == two).all())
        again = server.run(graph("every word of the run"))  # the previews run anew, the samplers only without a cache
        assert again.ok, again.error
        assert ("one" in again.executed) == (mode == "none")
        assert bool((pixels(again, "show one") == one).all()) and bool((pixels(again, "show two") == two).all())
    finally:
        if MODES[mode]:
            server.stop()
