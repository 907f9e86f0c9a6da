"""The live mask under every guider and sampler, and what a run asks of the model for it.

`same_as_static` is the check of them all: a run whose mask is made at its first step must be the run with that mask
given as a MASK, whose rows test_rows.py proves. `oracle` computes the mask again from stored maps of the network.
"""
from __future__ import annotations

from typing import Any

import pytest
import torch

from harness import tiny
from host import release
from host.support import (
    base,
    cfg_guider,
    comfy,
    comfy_extras,
    core,
    draw,
    encode,
    guidance,
    inject_into,
    latent_of,
    prompt,
    run_guider,
    sample,
    subject,
)
from host.test_neighbours import Couple
from host.test_realcustom_rows import foreign
from likeness.models.common.errors import LikenessError
from likeness.models.hosting import stamps
from likeness.models.hosting.guidance import NORMS, step_of
from likeness.models.hosting.guidance_runs import RUNS
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.row_masks import GUIDANCE_KEY
from likeness.models.hosting.word_maps import CAPTURE, Capture, Sought, Target, mark, word_shares
from likeness.models.realcustom.masks import subject_mask

SIGMAS = (14.0, 6.0, 2.0, 0.0)


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def mask_of(out: Any, name: str, step: int = -1) -> Any:
    """(b, h, w) that the run of this latent made."""
    return RUNS.find(out)[name].masks[step][1][:, 0]


def same_as_static(make: Any, run: Any) -> torch.Tensor:
    """make(**how to limit it) -> injected; run(injected) -> latent. The mask of the live run."""
    how = guidance(refresh=1)
    live = run(make(guidance=how))
    mask = mask_of(live, how.name)
    assert 0 < float((mask > 0).float().mean()) < 1
    torch.testing.assert_close(live, run(make(mask=mask)), atol=1e-4, rtol=1e-4)
    assert (live - run(make())).abs().max() > 1e-3, "the mask limits nothing"
    return mask


class Log:
    """Every call of the network: is it a guidance pass, its noise, rows, latents and masks."""

    def __init__(self):
        self.calls: list[dict[str, Any]] = []

    def __call__(self, apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
        c = args["c"]
        options = c["transformer_options"]
        self.calls.append({"guides": CAPTURE in options, "sigma": float(args["timestep"][0]), "x": args["input"].clone(),
                           "rows": args["input"].shape[0], "masks": dict(options.get(GUIDANCE_KEY, {}))})
        return apply_model(args["input"], args["timestep"], **c)

    def on(self, model: Any) -> Any:
        model = model.clone()
        model.set_model_unet_function_wrapper(self)
        return model

    def kind(self, guides: bool) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["guides"] == guides]


def oracle(kind: str, x: torch.Tensor, sigma: float, how: Any, text: Any, layers: slice = slice(None)) -> torch.Tensor:
    """The mask from all softmax maps of the plain network, read off its own layers (in its order)."""
    model = base(kind)[0]
    maps, hooks = [], []

    def look(layer, args, kwargs):
        q, k = layer.to_q(args[0]), layer.to_k(kwargs.get("context"))
        q, k = (t.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for t in (q, k))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        side = round((x.shape[-2] * x.shape[-1] / q.shape[2]) ** 0.5)
        grid = (-(-x.shape[-2] // side), -(-x.shape[-1] // side))
        maps.append(weights.transpose(2, 3).unflatten(-1, grid))
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith("attn2"):
            hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))

    def once(network, _, sigmas, extra_args=None, callback=None, disable=None, **options):
        return network(x, sigmas[:1].repeat(x.shape[0]), **(extra_args or {}))
    guider = cfg_guider(model, text, text, 1.0)
    try:
        guider.sample(torch.zeros_like(x), torch.zeros_like(x), comfy.samplers.KSAMPLER(once), torch.tensor([sigma, 0.0]),
                      disable_pbar=True, seed=0)
    finally:
        for hook in hooks:
            hook.remove()
    columns = torch.zeros(maps[0].shape[2])
    columns[list(how.word.columns)] = 1.0
    return subject_mask(maps[layers], columns, how.scope, how.strategy, tuple(maps[0].shape[-2:]))


# -- what is asked, and what comes of it ------------------------------------------------------------------
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ("sd15", "sdxl", "mini"))
def test_masks_are_those_of_stored_maps(kind, norm):
    text, word = prompt(kind)
    how = guidance(word, norm=norm, refresh=2)
    done, log = inject_into(base(kind)[0], kind=kind, guidance=how), Log()
    run_guider(cfg_guider(log.on(done.model), done.positive, done.negative), latent_of(kind, 2), sigmas=SIGMAS)
    made, asked = log.kind(True), log.kind(False)
    assert [call["rows"] for call in made] == [2, 2] and [call["rows"] for call in asked] == [4, 4, 4]
    for call in asked[:2]:
        want = oracle(kind, call["x"][:2], call["sigma"], how, text)
        # stretching each layer by itself enlarges rounding, a random network looks nearly everywhere alike
        atol = 5e-4 if norm == "min_max_per_channel" else 2e-5
        torch.testing.assert_close(call["masks"][how.name], want, atol=atol, rtol=0)
    assert torch.equal(asked[2]["masks"][how.name], asked[1]["masks"][how.name])


@pytest.mark.parametrize("sampler, passes", (("euler", 3), ("heun", 5), ("dpm_2", 6), ("dpmpp_2m", 3)))
def test_refresh_counts_steps_not_evaluations(sampler, passes):
    how, log = guidance(refresh=3), Log()
    done = inject_into(base("sd15")[0], guidance=how)
    sigmas = (14.0, 9.0, 6.0, 4.0, 2.0, 1.0, 0.0)
    out = run_guider(cfg_guider(log.on(done.model), done.positive, done.negative), latent_of("sd15"), sigmas=sigmas,
                     sampler=sampler)
    made = log.kind(True)
    assert len(made) == passes and min(call["sigma"] for call in made) > 4.0
    kept = RUNS.find(out)[how.name].masks
    assert [step for step, _ in kept] == [0, 1, 2]
    for step, mask in kept:  # what the preview shows of a step is the mask at its own noise
        at_level = [call for call in log.kind(False) if abs(call["sigma"] - sigmas[step]) < 1e-3]
        assert torch.equal(at_level[-1]["masks"][how.name], mask)


def test_prompts_of_different_lengths_share_a_pass():
    """The host repeats the shorter text; its word's share must not shrink by that."""
    texts = ("a cat on the beach", "a dog " + "on the very wide and sunny beach " * 14)
    words = [prompt("sd15", text, word)[1] for text, word in zip(texts, ("cat", "dog"), strict=True)]
    entries = [prompt("sd15", text, word)[0] for text, word in zip(texts, ("cat", "dog"), strict=True)]
    how = [guidance(word, norm="max_norm", scope=1.0, refresh=1) for word in words]
    first = inject(base("sd15")[0], entries[0], encode("sd15", ""), subject("sd15", 1), words[0], Strengths(0, 1),
                   guidance=how[0])
    both = inject(first.model, entries[1], first.negative, subject("sd15", 2), words[1], Strengths(0, 1), guidance=how[1])
    log = Log()
    out = run_guider(cfg_guider(log.on(both.model), first.positive + both.positive, both.negative), latent_of("sd15"))
    assert len({call["rows"] for call in log.kind(True)}) == 1
    x = log.kind(True)[0]["x"][:1]
    for one, text in zip(how, entries, strict=True):
        torch.testing.assert_close(mask_of(out, one.name)[:, None], oracle("sd15", x, 6.0, one, text), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind, layers, kept", (("sd15", "way up", 9), ("sd15", "finest of the way up", 3),
                                                ("mini", "finest of the way up", 2)))
def test_layers_that_are_read(kind, layers, kept):
    """The mask has the size of the finest layer, whichever are read."""
    text, word = prompt(kind)
    how, log = guidance(word, refresh=1, layers=layers), Log()
    done = inject_into(base(kind)[0], kind=kind, guidance=how)
    run_guider(cfg_guider(log.on(done.model), done.positive, done.negative), latent_of(kind, 1, 16, 16))
    want = oracle(kind, log.kind(False)[0]["x"][:1], 6.0, how, text, slice(-kept, None))
    torch.testing.assert_close(log.kind(False)[0]["masks"][how.name], want, atol=2e-5, rtol=0)


def test_steps():
    schedule = torch.tensor([14.0, 9.0, 6.0, 0.0])
    assert [step_of(s, schedule) for s in (20.0, 14.0, 13.0, 9.0, 7.0, 6.0, 0.5)] == [
        (0, False), (0, True), (0, False), (1, True), (1, False), (2, True), (2, False)]
    assert step_of(5.0, None) == (0, True)


def test_ending_the_pass_early_changes_nothing_but_the_time():
    done = [inject_into(base("sdxl")[0], kind="sdxl", guidance=guidance(prompt("sdxl")[1], early=early)) for early in (0, 1)]
    outs = [run_guider(cfg_guider(one.model, one.positive, one.negative), latent_of("sdxl"), sigmas=SIGMAS) for one in done]
    assert torch.equal(*outs)


def test_shares_do_not_hang_on_how_many_heads_go_at_a_time():
    q, k = draw(1, 2, 20, 96), draw(2, 2, 9, 96)
    heads = [t.unflatten(-1, (6, 16)).transpose(1, 2).double() for t in (q, k)]
    full = (heads[0] @ heads[1].mT / 4).softmax(-1).mean(1)
    want = torch.stack([full[..., [1, 4]].sum(-1), full[..., [7]].sum(-1)], 1).float()
    for limit in (1, 2 * 20 * 9 * 4, 1 << 20):
        torch.testing.assert_close(word_shares(q, k, 6, [(1, 4), (7,)], limit), want, atol=1e-6, rtol=0)
    assert word_shares(100 * q.half(), 100 * k.half(), 6, [(1, 4)]).isfinite().all()


def test_tokens_that_another_pack_appends_do_not_count():
    """IPAdapter-style packs of the older kind lengthen the keys; the word's share is one of the text."""
    target, sums = Target(9, (Sought("word", (1, 4), ("max_norm",)),)), []
    q, k = draw(1, 1, 16, 32), draw(2, 1, 13, 32)
    for keys in (k, k[:, :9]):
        capture = Capture([target], (), False)
        capture.add("output.0.0", q, keys, {stamps.KEY: stamps.RowStamps(((mark(0),),), (None,), (4, 4), 1.0), "n_heads": 2,
                                            "activations_shape": [1, 32, 4, 4]})
        sums.append(capture.sums[0, "word"].mean())
    torch.testing.assert_close(*sums)


# -- guiders ----------------------------------------------------------------------------------------------
def make(**more: Any) -> Any:
    return inject_into(base("sd15")[0], **more)


def dual(style: str) -> Any:
    def run(done):
        node = comfy_extras.nodes_custom_sampler.DualCFGGuider
        guider = node.execute(done.model, done.positive, encode("sd15", "a sketch"), done.negative, 3.0, 2.0, style)[0]
        return run_guider(guider, latent_of("sd15"), sigmas=SIGMAS)
    return run


def perp_neg(done):
    node = comfy_extras.nodes_perpneg.PerpNegGuider
    return run_guider(node.execute(done.model, done.positive, done.negative, encode("sd15", ""), 4.0, 1.0)[0], latent_of("sd15"))


def patched(patch: Any, side: int = 8) -> Any:
    def run(done):
        model = patch(done.model)
        return run_guider(cfg_guider(model, done.positive, done.negative), latent_of("sd15", 1, side, side), sigmas=SIGMAS)
    return run


def stock(**more: Any) -> Any:
    return lambda done: sample(done.model, done.positive, done.negative, steps=3, **more)


def combined(done):
    return sample(done.model, done.positive + encode("sd15", "a wide beach"), done.negative, steps=2)


def placed(setter: Any) -> Any:
    return lambda done: sample(done.model, setter(done.positive) + encode("sd15", "a wide beach"), done.negative, steps=2,
                               latent=latent_of("sd15", 1, 16, 16))


def ranged(done):
    set_range = core.ConditioningSetTimestepRange().set_range
    positive = set_range(encode("sd15", "a dog"), 0.0, 0.5)[0] + set_range(done.positive, 0.5, 1.0)[0]
    return run_guider(cfg_guider(done.model, positive, done.negative), latent_of("sd15"), sigmas=(14.0, 8.0, 1.0, 0.5, 0.0))


def ranged_twice(done):
    """One entry in two ranges of time, as prompt scheduling makes them."""
    set_range = core.ConditioningSetTimestepRange().set_range
    positive = set_range(done.positive, 0.0, 0.5)[0] + set_range(done.positive, 0.5, 1.0)[0]
    return run_guider(cfg_guider(done.model, positive, done.negative), latent_of("sd15"), sigmas=(14.0, 8.0, 1.0, 0.5, 0.0))


def inpainting(done):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1.0
    return sample(done.model, done.positive, done.negative, steps=4, denoise=0.6, latent=draw(4, 1, 4, 8, 8), noise_mask=mask)


def controlled(done):
    control = comfy.controlnet.load_controlnet(str(tiny.ensure()[tiny.CONTROLNET]))
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    pair = core.ControlNetApplyAdvanced().apply_controlnet(done.positive, done.negative, control, hint, 0.8, 0.0, 1.0)
    return sample(done.model, *pair, steps=2)


def bounds(conditioning):
    mask = torch.zeros(1, 128, 128)
    mask[:, 16:80, 32:112] = 1.0
    return core.ConditioningSetMask().append(conditioning, mask, "mask bounds", 1.0)[0]


RUNS_OF = {
    "cfg": stock(), "cfg 1": stock(cfg=1.0), "batch 3": stock(latent=torch.zeros(3, 4, 8, 8)),
    "wide": stock(latent=torch.zeros(2, 4, 8, 24)), "heun": stock(sampler="heun"), "denoise": stock(denoise=0.5),
    "inpaint": inpainting, "dual": dual("regular"), "nested": dual("nested"), "perp-neg": perp_neg,
    "perp-neg patch": patched(lambda m: comfy_extras.nodes_perpneg.PerpNeg.execute(m, encode("sd15", ""), 1.0)[0]),
    "sag": patched(lambda m: comfy_extras.nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0)[0], 16),
    "pag": patched(lambda m: comfy_extras.nodes_pag.PerturbedAttentionGuidance.execute(m, 3.0)[0]),
    "slg": patched(lambda m: comfy_extras.nodes_slg.SkipLayerGuidanceDiT.execute(
        m, start_percent=0.0, end_percent=1.0, double_layers="1", scale=3.0)[0]),
    "combine": combined, "timestep range": ranged, "two ranges": ranged_twice, "controlnet": controlled,
    "area": placed(lambda c: core.ConditioningSetArea().append(c, 64, 96, 32, 16, 1.0)[0]),
    "mask bounds": placed(bounds),
}


@pytest.mark.parametrize("name", RUNS_OF)
def test_guiders_and_samplers(name):
    """CustAny under a live mask, as under the same MASK."""
    same_as_static(make, RUNS_OF[name])


def test_a_subject_for_a_part_of_the_steps():
    """The injector makes three entries of one prompt, each with its own time."""
    def part(**more):
        return make(strengths=Strengths(1.0, 1.0, 0.2, 0.7), **more)
    same_as_static(part, lambda done: sample(done.model, done.positive, done.negative, steps=8))


def test_every_guider_with_realcustom():
    """Negative rows attend to the black picture under the same mask."""
    def run(done):
        guider = comfy_extras.nodes_custom_sampler.Guider_DualCFG(done.model)
        guider.set_conds(done.positive, release.prompts()[0], done.negative)
        guider.set_cfg(3.0, 2.0, nested=True)
        x = release.IO["in.latent"]
        return guider.sample(x, torch.zeros_like(x), comfy.samplers.ksampler("heun"), release.levels(4), disable_pbar=True,
                             seed=0)
    how = release.guidance(refresh=1)
    live = run(release.injected(guidance=how))
    torch.testing.assert_close(live, run(release.injected(mask=mask_of(live, how.name))), atol=1e-4, rtol=1e-4)
    assert (live - run(release.injected())).abs().max() > 1e-3


def in_range(entries: Any, start: float, end: float) -> Any:
    return core.ConditioningSetTimestepRange().set_range(entries, start, end)[0]


@pytest.mark.parametrize("start, end", ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.25, 0.75)))
def test_prompts_in_ranges_of_time_with_realcustom(start, end):
    """Prompt editing: the mask of the subject's range, and a plain negative before it and after it."""
    plain, negative, _ = release.prompts()
    sigmas, x = torch.tensor([14.0, 8.0, 1.5, 1.0, 0.5, 0.0]), release.IO["in.latent"]

    def run(done, split=False):
        others = [one for low, high in ((0.0, start), (end, 1.0)) if low < high for one in in_range(plain, low, high)]
        rows = done.negative
        if split:
            room = [stamps.stamped(entry, 0) for entry in negative]
            rows = [one for rows, low, high in ((room, 0.0, start), (done.negative, start, end), (room, end, 1.0)) if low < high
                    for one in in_range(rows, low, high)]
        guider = cfg_guider(done.model, in_range(done.positive, start, end) + others, rows, 3.5)
        return guider.sample(x, torch.zeros_like(x), comfy.samplers.ksampler("euler"), sigmas, disable_pbar=True, seed=0)
    how = release.guidance(refresh=1)
    live = run(release.injected(guidance=how))
    mask = mask_of(live, how.name)
    assert len(RUNS.find(live)[how.name].masks) == 1 and 0 < float((mask > 0).float().mean()) < 1
    torch.testing.assert_close(live, run(release.injected(mask=mask), True), atol=1e-4, rtol=1e-4)
    assert (live - run(release.injected(), True)).abs().max() > 1e-3, "the mask limits nothing"


@pytest.mark.parametrize("size", ((24, 16), (17, 13), (8, 31)))
def test_any_size_and_batch(size):
    x, how = draw(3, 3, 4, *size), release.guidance(refresh=2)
    done = release.injected(guidance=how)
    guider = cfg_guider(done.model, done.positive, done.negative, 3.5)
    out = guider.sample(x, torch.zeros_like(x), comfy.samplers.ksampler("euler"), release.levels(4), disable_pbar=True, seed=0)
    (_, first), (_, second) = RUNS.find(out)[how.name].masks
    assert first.shape == (3, 1, -(-size[0] // 2), -(-size[1] // 2)) and out.isfinite().all()
    kept = int(first[0].numel() * how.scope)
    assert [(mask > 0).sum().item() for mask in first] == [kept] * 3
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)


def test_cond_and_uncond_in_two_calls(monkeypatch):
    together = stock()(make(guidance=guidance()))
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)
    torch.testing.assert_close(stock()(make(guidance=guidance())), together, atol=1e-3, rtol=1e-3)


# -- neighbours -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("before", (True, False))
@pytest.mark.parametrize("whole", (True, False))
def test_beside_a_replaced_text_attention(before, whole):
    """IPAdapter-style, on either side of the injector: one picture, and the word is read all the same."""
    def run(first: bool):
        how = release.guidance()
        done = release.injected(foreign(release.model(), whole) if first else None, guidance=how)
        noise = release.noise_of(done.model if first else foreign(done.model, whole), done.positive)
        return noise
    assert torch.equal(run(True), run(False))


def test_beside_a_lora():
    model = base("sd15")[0].clone()
    state = model.model.state_dict()
    names = [name for name in state if name.endswith(".attn2.to_k.weight")]
    assert model.add_patches({name: (draw(3, *state[name].shape),) for name in names}, 0.1)
    plain = same_as_static(make, stock())
    assert not torch.equal(same_as_static(lambda **more: inject_into(model, **more), stock()), plain)


@pytest.mark.parametrize("form", ("ppm", "prompt control"))
def test_attention_couple_is_refused_by_name(form):
    couple = Couple([encode("sd15", text)[0][0] for text in ("a cat, red", "a dog, blue")], form)
    done = make(guidance=guidance())
    with pytest.raises(LikenessError, match="attention couple"):
        sample(couple.on(done.model), done.positive, done.negative)


def test_a_wrapper_that_asks_again_inside_the_pass_starts_no_other():
    """The mark of a guidance pass keeps ours out of calls that another wrapper makes within it."""
    log, how, busy = Log(), guidance(refresh=1), []

    def nosy(executor, model, conds, x, timestep, options):
        if CAPTURE in options["transformer_options"] and not busy:
            busy.append(True)
            plain = [[{**entry, "model_conds": {"c_crossattn": entry["model_conds"]["c_crossattn"]}} for entry in conds[0]]]
            comfy.samplers.calc_cond_batch(model, plain, x, timestep, options)
        return executor(model, conds, x, timestep, options)
    done = make(guidance=how)
    model = log.on(done.model)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "nosy", nosy)
    out = sample(model, done.positive, done.negative, steps=2)
    assert busy and len(log.kind(True)) == 2
    assert torch.allclose(out, sample(done.model, done.positive, done.negative, steps=2), atol=1e-5)
