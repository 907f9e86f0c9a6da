"""InstantID in the host: which rows get the face in which layers, what the ControlNet reads, and who may stand beside it.

`Watch` stands round every call of the network. It computes each row alone on the plain network, with the attention of all
layers and the ControlNet written out from the file's tensors, and compares; no stamp and no index takes part in that.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from harness import tiny
from host.portraits import (
    BUFFALO,
    PROMPT,
    applied,
    control_net,
    face,
    faces,
    hint,
    instantid,
    weights,
)
from host.support import (
    COPIES,
    base,
    cfg_guider,
    comfy,
    comfy_extras,
    core,
    draw,
    encode,
    latent_of,
    prompt,
    run_guider,
    sample,
    subject,
)
from host.test_neighbours import Couple, ForeignReplace, foreign_attention
from likeness.models.common.errors import LikenessError
from likeness.models.hosting import image_attention, stamps
from likeness.models.hosting.blocks import attention_blocks
from likeness.models.hosting.image_attention import ImageInjection, ImagePlan
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.injector import Timing
from likeness.models.hosting.memory import patcher_of
from likeness.models.hosting.portrait_control import FaceControl
from likeness.models.hosting.portrait_instantid import CONCAT, EACH, NO_MIDDLE, apply_instantid
from likeness.models.hosting.portrait_instantid import Strengths as Dials
from likeness.models.hosting.stores import Pair, Store
from unit.test_portrait import perceiver

SDXL = [*(("input", n, d) for n, depth in ((4, 2), (5, 2), (7, 10), (8, 10)) for d in range(depth)),
        *(("output", n, d) for n, depth in ((0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2)) for d in range(depth)),
        *(("middle", 0, d) for d in range(10))]


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def tokens_of(*seeds: int) -> Tensor:
    """(1, l, width) by hand: one seed a face, their mean for several, zeros for none."""
    raw = torch.stack([face(seed).embedding for seed in seeds]).mean(0) if seeds else torch.zeros(512)
    state = weights("instantid")["image_proj"]
    return perceiver(state["latents"], raw[None, None], state, 2, 2)


class Who(NamedTuple):
    """What one text's rows carry: faces that act in the attentions, and what their ControlNet reads."""
    tokens: tuple[Tensor, ...] = ()
    control: Tensor | None = None


NOBODY = Who()


class Hand:
    """One layer's text attention with the faces beside it, from the tensors of the file."""

    def __init__(self, number: int, who: Who, weight: float):
        self.number, self.who, self.weight = number, who, weight

    def __call__(self, q, k, v, extra):
        heads, layers = extra["n_heads"], weights("instantid")["ip_adapter"]
        attention = torch.nn.functional.scaled_dot_product_attention

        def split(x):
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)
        out = attention(split(q), split(k), split(v))
        for tokens in self.who.tokens:
            keys, values = (tokens @ layers[f"{self.number}.to_{part}_ip.weight"].T for part in "kv")
            out = out + self.weight * attention(split(q), split(keys), split(values))
        return out.transpose(1, 2).flatten(2)


class Watch:
    def __init__(self, *texts: tuple[Any, Who], weight: float = 0.8, strength: float = 0.8, layers: int = 70):
        self.texts = [(row, who) for conditioning, who in texts for entry in conditioning for row in entry[0]]
        self.weight, self.layers = weight, layers
        self.rows: list[tuple[bool, float, float, int]] = []
        self.calls = 0
        self.inner = control_net().copy().set_cond_hint(hint().movedim(-1, 1), strength)
        self.inner.model_sampling_current = base("sdxl")[0].model.model_sampling

    def __call__(self, apply_model: Any, args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], dict(args["c"])
        out = apply_model(x, t, **c)
        options = c.pop("transformer_options")
        c.pop(stamps.KEY, None)
        c.pop("control", None)
        bare = {**options, "cond_or_uncond": [7],
                "patches": {name: found for name, found in options.get("patches", {}).items() if name != image_attention.LIST},
                "wrappers": {kind: {key: w for key, w in by_key.items() if key not in (stamps.KEY, image_attention.LIST)}
                             for kind, by_key in options.get("wrappers", {}).items()}}
        for row in range(x.shape[0]):
            who = next(who for known, who in self.texts if torch.equal(c["c_crossattn"][row][:77], known[:77]))
            one = slice(row, row + 1)
            alone = {name: value[one] for name, value in c.items()}
            plain = apply_model(x[one], t[one], transformer_options=bare, **alone)
            slots = {key: Hand(2 * n + 1, who, self.weight) for n, key in enumerate(SDXL[:self.layers])}
            control = None if who.control is None else self.inner.get_control(
                x[one], t[one], {**alone, "c_crossattn": who.control}, 1, {})
            replaced = {**options.get("patches_replace", {}), "attn2": slots}
            right = apply_model(x[one], t[one], transformer_options={**bare, "patches_replace": replaced}, control=control,
                                **alone)
            scale = float(right.abs().max())
            self.rows.append((who is not NOBODY, float((out[one] - right).abs().max()) / scale,
                              float((plain - right).abs().max()) / scale, self.calls))
        self.calls += 1
        return out

    def on(self, model: Any) -> Any:
        model = model.clone()
        model.set_model_unet_function_wrapper(self)
        return model

    def check(self, *kinds: bool) -> None:
        """Every row is right, the face matters where it is, and exactly these kinds of rows came."""
        assert {row[0] for row in self.rows} == set(kinds)
        for who, error, effect, _ in self.rows:
            assert error < 2e-5 and (not who or effect > 1e-3), self.rows


def setup(*seeds: int, guided: bool = False, **more: Any):
    """(applied, watch, watched model)."""
    done = applied(*(seeds or (1,)), guided=guided, **more)
    face_tokens, nothing = tokens_of(*(seeds or (1,))), tokens_of()
    watch = Watch((done.positive, Who((face_tokens,), face_tokens if guided else None)),
                  (done.negative, Who((nothing,), nothing if guided else None)))
    return done, watch, watch.on(done.model)


# -- rows --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("guided", "batch"), [(False, 1), (True, 1), (True, 2)])
def test_cfg_in_one_call(guided, batch):
    done, watch, model = setup(guided=guided)
    run_guider(cfg_guider(model, done.positive, done.negative), latent_of("sdxl", batch))
    watch.check(True)
    assert watch.calls == 1 and len(watch.rows) == 2 * batch


@pytest.mark.parametrize("guided", [False, True])
def test_the_free_prompt_is_the_plain_one_and_shares_the_call(guided):
    """Three kinds of rows in one call of the CustomEnhancer guider; the free one is bit-equal to a model without InstantID."""
    done, watch, model = setup(guided=guided)
    watch.texts.append((encode("sdxl", "something else")[0][0][0], NOBODY))
    free = [[encode("sdxl", "something else")[0][0], done.free[0][1]]]
    plain = encode("sdxl", "something else")
    free[0][1]["pooled_output"] = plain[0][1]["pooled_output"]
    guider = comfy_extras.nodes_custom_sampler.DualCFGGuider.execute(model, done.positive, free, done.negative, 3.0, 2.0,
                                                                     "regular")[0]
    run_guider(guider, latent_of("sdxl"))
    watch.check(True, False)
    assert watch.calls == 1 and len(watch.rows) == 3
    ours = run_guider(cfg_guider(done.model, free, done.negative, 1.0), latent_of("sdxl"))
    assert torch.equal(ours, run_guider(cfg_guider(base("sdxl")[0], plain, done.negative, 1.0), latent_of("sdxl")))


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg(style):
    done, watch, model = setup(guided=True)
    other = encode("sdxl", "a dog")
    watch.texts += [(other[0][0][0], NOBODY)]
    guider = comfy_extras.nodes_custom_sampler.DualCFGGuider.execute(model, other, done.positive, done.negative, 3.0, 2.0,
                                                                     style)[0]
    run_guider(guider, latent_of("sdxl"))
    watch.check(True, False)


@pytest.mark.parametrize("as_patch", [False, True])
def test_perp_neg(as_patch):
    done, watch, model = setup()
    empty = encode("sdxl", "")
    watch.texts += [(empty[0][0][0], NOBODY)]
    if as_patch:
        guider = cfg_guider(comfy_extras.nodes_perpneg.PerpNeg.execute(model, empty, 1.0)[0], done.positive, done.negative)
    else:
        guider = comfy_extras.nodes_perpneg.PerpNegGuider.execute(model, done.positive, done.negative, empty, 4.0, 1.0)[0]
    run_guider(guider, latent_of("sdxl"))
    watch.check(True, False)


@pytest.mark.parametrize("guidance", ["sag", "pag", "slg"])
def test_guidance_patches(guidance):
    done, watch, model = setup(guided=guidance == "pag")
    if guidance == "sag":
        model = comfy_extras.nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]
    elif guidance == "pag":
        model = comfy_extras.nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0)[0]
    else:
        model = comfy_extras.nodes_slg.SkipLayerGuidanceDiT.execute(model, scale=3.0, start_percent=0.0, end_percent=1.0,
                                                                    double_layers="1")[0]
    side = 16 if guidance == "sag" else 8
    run_guider(cfg_guider(model, done.positive, done.negative), latent_of("sdxl", 1, side, side))
    watch.check(True)
    assert watch.calls > 1


@pytest.mark.parametrize("side", ["positive", "both"])
def test_areas(side):
    """The host copies entries between positive and negative, and cuts the latent."""
    done, watch, model = setup()

    def placed(conditioning):
        return core.ConditioningSetArea().append(conditioning, 48, 64, 16, 0, 1.0)[0]
    wide = encode("sdxl", "a wide beach")
    watch.texts += [(wide[0][0][0], NOBODY)]
    negative = placed(done.negative) if side == "both" else done.negative
    run_guider(cfg_guider(model, placed(done.positive) + wide, negative), latent_of("sdxl"))
    watch.check(True, False)


def test_combine_and_timestep_ranges():
    done, watch, model = setup(guided=True)
    plain = encode("sdxl", "a dog")
    watch.texts += [(plain[0][0][0], NOBODY)]
    ranged = core.ConditioningSetTimestepRange()
    late = ranged.set_range(plain, 0.0, 0.5)[0] + ranged.set_range(done.positive, 0.5, 1.0)[0]
    run_guider(cfg_guider(model, late, done.negative), latent_of("sdxl"), sigmas=(14.0, 1.0, 0.0))
    watch.check(True, False)
    before = len(watch.rows)
    run_guider(cfg_guider(model, plain + done.positive, done.negative), latent_of("sdxl"))
    watch.check(True, False)
    assert len(watch.rows) == before + 3


def test_the_range_of_steps():
    """Outside of it the model is the plain one, tokens and ControlNet both."""
    done = applied(1, guided=True, start=0.5)
    plain = encode("sdxl", PROMPT), encode("sdxl", "blurry")
    latent = latent_of("sdxl")
    early = run_guider(cfg_guider(done.model, done.positive, done.negative), latent, sigmas=(14.0, 0.0))
    assert torch.equal(early, run_guider(cfg_guider(base("sdxl")[0], *plain), latent, sigmas=(14.0, 0.0)))
    late = run_guider(cfg_guider(done.model, done.positive, done.negative), latent, sigmas=(0.5, 0.0))
    assert not torch.equal(late, run_guider(cfg_guider(base("sdxl")[0], *plain), latent, sigmas=(0.5, 0.0)))


def test_no_stamp_no_action():
    done = applied(1, guided=True)
    plain = encode("sdxl", PROMPT), encode("sdxl", "blurry")
    latent = latent_of("sdxl")
    expected = run_guider(cfg_guider(base("sdxl")[0], *plain), latent)
    assert torch.equal(run_guider(cfg_guider(done.model, *plain), latent), expected)
    bare = [[[rows, {k: v for k, v in options.items() if k != "model_conds"}] for rows, options in entries]
            for entries in (done.positive, done.negative)]
    assert torch.equal(run_guider(cfg_guider(done.model, *bare), latent), expected), "a control without a stamp acted"


# -- several faces -----------------------------------------------------------------------------------------
def test_several_pictures_are_one_mean_face():
    done, watch, model = setup(1, 2, 3)
    assert "3 of 3 picture(s)" in done.report
    run_guider(cfg_guider(model, done.positive, done.negative), latent_of("sdxl"))
    watch.check(True)


def test_side_by_side():
    done = applied(1, 2, guided=True, combine=CONCAT)
    both = torch.cat([tokens_of(1), tokens_of(2)], 1)
    watch = Watch((done.positive, Who((both,), both)), (done.negative, Who((tokens_of(),), tokens_of())))
    run_guider(cfg_guider(watch.on(done.model), done.positive, done.negative), latent_of("sdxl"))
    watch.check(True)
    assert watch.calls == 1


def test_one_face_a_latent():
    done = applied(1, 2, guided=True, combine=EACH)
    both = run_guider(cfg_guider(done.model, done.positive, done.negative), latent_of("sdxl", 2))
    for number, seed in enumerate((1, 2)):
        alone = applied(seed, guided=True)
        expected = run_guider(cfg_guider(alone.model, alone.positive, alone.negative), latent_of("sdxl", 2))
        torch.testing.assert_close(both[number], expected[number], rtol=1e-4, atol=1e-3)
    with pytest.raises(LikenessError, match="2 references, one per latent, and the batch holds 1"):
        run_guider(cfg_guider(done.model, done.positive, done.negative), latent_of("sdxl", 1))


@pytest.mark.parametrize("weight", [0.8, 0.0])
def test_a_picture_without_a_face_keeps_its_latent(weight):
    """Of three pictures the middle one shows nobody: its latent gets the zero embedding, the third keeps the third face."""
    with pytest.raises(LikenessError, match=r"needs a face, and picture 2 of 3 shows none; choose"):
        applied(1, None, 3, combine=EACH)
    done = applied(1, None, 3, guided=True, combine=EACH, weight=weight, on_missing="pass through")
    assert "2 of 3 picture(s)" in done.report and done.found
    out = run_guider(cfg_guider(done.model, done.positive, done.negative), latent_of("sdxl", 3))
    again = applied(1, 2, 3, guided=True, combine=EACH, weight=weight)
    full = run_guider(cfg_guider(again.model, again.positive, again.negative), latent_of("sdxl", 3))
    near = [bool(torch.allclose(a, b, rtol=1e-4, atol=1e-3)) for a, b in zip(out, full, strict=True)]
    assert near == [True, False, True]
    stamped = {**done.negative[0][1], "pooled_output": done.positive[0][1]["pooled_output"]}
    nobody = run_guider(cfg_guider(done.model, [[done.positive[0][0], stamped]], done.negative), latent_of("sdxl", 3))
    torch.testing.assert_close(out[1], nobody[1], rtol=1e-4, atol=1e-3)
    with pytest.raises(LikenessError, match="3 references, one per latent, and the batch holds 2"):
        run_guider(cfg_guider(done.model, done.positive, done.negative), latent_of("sdxl", 2))


def test_the_largest_face_of_a_picture():
    alone = applied(2)
    group = applied((face(1, 20), face(2, 60), face(3, 40)))
    results = [run_guider(cfg_guider(d.model, d.positive, d.negative), latent_of("sdxl")) for d in (alone, group)]
    assert torch.equal(*results)


def test_two_people_in_one_prompt_and_in_two():
    first = applied(1, guided=True)
    second = applied(2, model=first.model, positive=first.positive, negative=first.negative)
    one, two, nothing = tokens_of(1), tokens_of(2), tokens_of()
    watch = Watch((second.positive, Who((one, two), one)), (second.negative, Who((nothing, nothing), nothing)))
    run_guider(cfg_guider(watch.on(second.model), second.positive, second.negative), latent_of("sdxl"))
    watch.check(True)
    other = applied(2, model=first.model, positive=encode("sdxl", "a man in the snow"), negative=first.negative)
    watch = Watch((first.positive, Who((one,), one)), (other.positive, Who((two,))),
                  (other.negative, Who((nothing, nothing), nothing)))
    run_guider(cfg_guider(watch.on(other.model), first.positive + other.positive, other.negative), latent_of("sdxl"))
    watch.check(True)


def test_a_mask_limits_the_tokens_and_two_halves_are_the_whole():
    left = torch.zeros(1, 64, 64)
    left[:, :, :32] = 1
    whole = applied(1)
    first = applied(1, mask=left)
    both = applied(1, mask=1 - left, model=first.model, positive=first.positive, negative=first.negative)
    latent = latent_of("sdxl", 1, 16, 16)
    results = [run_guider(cfg_guider(d.model, d.positive, d.negative), latent) for d in (whole, both, first)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)
    assert not torch.allclose(results[0], results[2], rtol=1e-2, atol=1e-1)


# -- layers ------------------------------------------------------------------------------------------------
def test_all_seventy_layers_or_sixty_as_older_nodes():
    done, old = applied(1), applied(1, layers=NO_MIDDLE)
    assert "70 layers" in done.report and "60 layers" in old.report
    one, nothing = tokens_of(1), tokens_of()
    watch = Watch((old.positive, Who((one,))), (old.negative, Who((nothing,))), layers=60)
    ours = run_guider(cfg_guider(watch.on(old.model), old.positive, old.negative), latent_of("sdxl"))
    watch.check(True)
    assert not torch.allclose(ours, run_guider(cfg_guider(done.model, done.positive, done.negative), latent_of("sdxl")))


def test_the_big_projections_need_not_stay_for_the_sampling():
    stores = applied(1).model.model_patches_models()
    assert instantid().patcher not in stores and len(stores) == 2
    per_token = 2 * sum(channels for _, channels in instantid().config.layers)
    assert [store.model_size() for store in stores] == [4 * 4 * per_token] * 2


# -- the ControlNet ----------------------------------------------------------------------------------------
class Spy:
    """Texts that a ControlNet's network read."""

    def __init__(self, control: Any, monkeypatch: Any):
        self.read: list[Tensor] = []
        network, forward = control.control_model, control.control_model.forward

        def look(*args, **kwargs):
            self.read += list(kwargs["context"])
            return forward(*args, **kwargs)
        monkeypatch.setattr(network, "forward", look)


@pytest.mark.parametrize("order", ["text first", "face first"])
def test_each_control_net_of_a_chain_reads_its_own(order, monkeypatch):
    """The face's one reads tokens only; a pose or depth ControlNet goes on reading the prompt."""
    mine, theirs = Spy(control_net(), monkeypatch), Spy(control_net(1), monkeypatch)
    pair = encode("sdxl", PROMPT), encode("sdxl", "blurry")

    def posed(positive, negative):
        return core.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control_net(1), hint(5), 0.7, 0.0, 1.0)
    if order == "text first":
        positive, negative = posed(*pair)
        done = applied(1, guided=True, positive=positive, negative=negative)
    else:
        done = applied(1, guided=True)
        positive, negative = posed(done.positive, done.negative)
        done = done._replace(positive=positive, negative=negative)
    result = run_guider(cfg_guider(done.model, done.positive, done.negative), latent_of("sdxl"))
    face_tokens = [tokens_of(), tokens_of(1)]
    assert len(mine.read) == len(theirs.read) == 2
    for rows in mine.read:
        assert any(torch.allclose(rows, tokens[0], atol=1e-4) for tokens in face_tokens)
    for rows in theirs.read:
        assert any(torch.equal(rows, entry[0][0].to(rows)) for entry in (pair[0][0], pair[1][0]))
    alone = applied(1, guided=True)
    for other in (run_guider(cfg_guider(alone.model, alone.positive, alone.negative), latent_of("sdxl")),
                  run_guider(cfg_guider(base("sdxl")[0], *posed(*pair)), latent_of("sdxl"))):
        assert not torch.allclose(result, other, rtol=1e-2, atol=1e-1)


def test_a_control_for_the_positive_alone_still_reaches_the_negative():
    """Core's simple Apply ControlNet lets the host copy it; behind ours it must act on the negative as before."""
    positive = core.ControlNetApply().apply_controlnet(encode("sdxl", PROMPT), control_net(1), hint(5), 0.7)[0]
    simple = applied(1, guided=True, positive=positive)
    pair = core.ControlNetApplyAdvanced().apply_controlnet(encode("sdxl", PROMPT), encode("sdxl", "blurry"), control_net(1),
                                                           hint(5), 0.7, 0.0, 1.0)
    advanced = applied(1, guided=True, positive=pair[0], negative=pair[1])
    results = [run_guider(cfg_guider(d.model, d.positive, d.negative), latent_of("sdxl")) for d in (simple, advanced)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_the_free_prompt_keeps_the_control_that_it_had(monkeypatch):
    mine, theirs = Spy(control_net(), monkeypatch), Spy(control_net(1), monkeypatch)
    pair = core.ControlNetApplyAdvanced().apply_controlnet(encode("sdxl", PROMPT), encode("sdxl", "blurry"), control_net(1),
                                                           hint(5), 0.7, 0.0, 1.0)
    done = applied(1, guided=True, positive=pair[0], negative=pair[1])
    ours = run_guider(cfg_guider(done.model, done.free, done.negative, 1.0), latent_of("sdxl"))
    assert not mine.read and len(theirs.read) == 1
    assert torch.equal(ours, run_guider(cfg_guider(base("sdxl")[0], pair[0], pair[1], 1.0), latent_of("sdxl")))


@COPIES
def test_the_host_counts_loads_and_cleans_the_control():
    done = applied(1, guided=True)
    control = done.positive[0][1]["control"]
    assert isinstance(control, FaceControl) and control is done.negative[0][1]["control"] is done.free[0][1]["control"]
    assert done.positive[0][1]["control_apply_to_uncond"] is False
    assert control.get_models() == [control_net().control_model_wrapped]
    run_guider(cfg_guider(done.model, done.positive, done.negative), latent_of("sdxl"))
    assert control.inner.model_sampling_current is None and control.inner.cond_hint is None
    other = control.copy()
    assert other.inner is not control.inner and other.tokens is control.tokens
    twin = control.deepclone_multigpu(torch.device("cpu"), autoregister=True)
    assert control.multigpu_clones == {torch.device("cpu"): twin} and twin.inner.control_model is not control.inner.control_model
    assert control.get_models() == [twin.inner.control_model_wrapped, control_net().control_model_wrapped]


# -- neighbours --------------------------------------------------------------------------------------------
def like_ipadapter(model: Any) -> Any:
    model = model.clone()
    slot = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    tokens = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(21))
    for key in SDXL:
        if key in slot:
            slot[key].add(foreign_attention, tokens=tokens, weight=0.6)
        else:
            model.set_model_attn2_replace(ForeignReplace(foreign_attention, tokens=tokens, weight=0.6), *key)
    return model


def lora(model: Any) -> Any:
    model = model.clone()
    state = model.model.state_dict()
    names = [name for name in state if ".attn2.to_k.weight" in name]
    model.add_patches({name: (0.3 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(3)),)
                       for name in names}, 1.0)
    return model


def custany(model: Any, positive: Any = None, negative: Any = None):
    own, word = prompt("sdxl")
    return inject(model, positive or own, negative or encode("sdxl", "blurry"), subject("sdxl"), word, Strengths(0.0, 1.0))


@pytest.mark.parametrize("other", [like_ipadapter, lora])
def test_neighbours_in_either_order(other):
    after, before = applied(1), applied(1, model=other(base("sdxl")[0]))
    results = [run_guider(cfg_guider(m, before.positive, before.negative), latent_of("sdxl"))
               for m in (other(after.model), before.model)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)
    plain = encode("sdxl", PROMPT), encode("sdxl", "blurry")
    for alone in (run_guider(cfg_guider(after.model, after.positive, after.negative), latent_of("sdxl")),
                  run_guider(cfg_guider(other(base("sdxl")[0]), *plain), latent_of("sdxl"))):
        assert not torch.allclose(results[0], alone, rtol=1e-2, atol=1e-1)


def test_beside_custany_in_either_order():
    """Both read the same stamps and stand in different places of a block."""
    first = custany(base("sdxl")[0])
    one = applied(1, model=first.model, positive=first.positive, negative=first.negative)
    own = applied(1, positive=prompt("sdxl")[0])
    two = custany(own.model, own.positive, own.negative)
    results = [run_guider(cfg_guider(d.model, d.positive, d.negative), latent_of("sdxl")) for d in (one, two)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)
    for alone in (first, own):
        result = run_guider(cfg_guider(alone.model, alone.positive, alone.negative), latent_of("sdxl"))
        assert not torch.allclose(results[0], result, rtol=1e-2, atol=1e-1)


def realcustom(model: Any, positive: Any, negative: Any) -> tuple[Any, Any, Any]:
    """RealCustom++'s image attention in the way up, with keys and values out of the air."""
    widths = {key: width for key, width in attention_blocks(model).items() if key.startswith("output.")}
    stores = [patcher_of(Store({key: Pair(draw(seed, 1, 9, c), draw(seed + 1, 1, 9, c)) for key, c in widths.items()}))
              for seed in (61, 63)]
    model = model.clone()
    stamps.add_reader(model)
    strengths = tuple((key, 0.7) for key in widths)
    image_attention.add_image_injection(model, ImagePlan(5, 4, *stores, "all", strengths, Timing()))
    return model, [stamps.stamped(e, 5) for e in positive], [stamps.stamped(e, 4) for e in negative]


def test_beside_realcustom_in_either_order():
    """Both stand beside the text attention of a layer; each asks the stamps for its own rows."""
    pair = encode("sdxl", PROMPT), encode("sdxl", "blurry")
    theirs = realcustom(base("sdxl")[0], *pair)
    after = applied(1, model=theirs[0], positive=theirs[1], negative=theirs[2])
    ours = applied(1)
    runs = [(after.model, after.positive, after.negative), realcustom(ours.model, ours.positive, ours.negative)]
    results = [run_guider(cfg_guider(*one), latent_of("sdxl")) for one in runs]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)
    for alone in (theirs, (ours.model, ours.positive, ours.negative)):
        assert not torch.allclose(results[0], run_guider(cfg_guider(*alone), latent_of("sdxl")), rtol=1e-2, atol=1e-1)


def test_attention_couple_is_refused():
    """It makes more rows out of a row inside the block, and nothing tells whose they are."""
    couple = Couple([encode("sdxl", text)[0][0] for text in ("red", "blue")], "ppm")
    done = applied(1)
    with pytest.raises(LikenessError, match="attention couple does, and nothing tells which of them carry"):
        run_guider(cfg_guider(couple.on(done.model), done.positive, done.negative), latent_of("sdxl"))


# -- invariants and refusals -------------------------------------------------------------------------------
def test_strength_0_passes_through():
    pair = encode("sdxl", PROMPT), encode("sdxl", "blurry")
    done = applied(1, guided=True, weight=0.0, control=0.0, positive=pair[0], negative=pair[1])
    assert done.model is base("sdxl")[0] and done.positive is pair[0] and done.negative is pair[1] and done.free is pair[0]
    assert "passed through" in done.report and done.found
    tokens_only = applied(1, guided=True, control=0.0)
    assert "control" not in tokens_only.positive[0][1] and "ControlNet 0: off" in tokens_only.report
    control_only = applied(1, guided=True, weight=0.0)
    assert not control_only.model.model_patches_models() and "tokens 0: off" in control_only.report


def test_a_clone_changes_no_parent_and_a_second_run_changes_nothing():
    pair = encode("sdxl", PROMPT), encode("sdxl", "blurry")
    kept = [[entry[0].clone() for entry in entries] for entries in pair]
    done = applied(1, guided=True, positive=pair[0], negative=pair[1])
    applied(2, model=done.model, positive=done.positive, negative=done.negative)
    again = applied(1, guided=True)
    results = [run_guider(cfg_guider(d.model, d.positive, d.negative), latent_of("sdxl")) for d in (done, again)]
    assert torch.equal(*results)
    assert all(set(entry[1]) == {"pooled_output"} for entries in pair for entry in entries)
    assert all(torch.equal(a, b[0]) for rows, entries in zip(kept, pair, strict=True) for a, b in zip(rows, entries, strict=True))
    lists = [m.model_options["transformer_options"].get("patches", {}).get(image_attention.LIST, [])
             for m in (base("sdxl")[0], done.model)]
    assert [len(one) for one in lists] == [0, 1] and isinstance(lists[1][0], ImageInjection)


def test_no_face():
    with pytest.raises(LikenessError, match="no face in the FACES of InstantID Apply; choose"):
        applied(None, None)
    done = applied(None, guided=True, on_missing="pass through")
    assert not done.found and done.model is base("sdxl")[0] and "passed through" in done.report
    assert "control" not in done.positive[0][1] and done.free is done.positive
    assert "1 of 2 picture(s)" in applied(None, 4).report


def test_an_empty_mask_may_pass():
    done = applied(1, guided=True, mask=torch.zeros(1, 8, 8), on_missing="pass through")
    assert not done.found and done.model is base("sdxl")[0] and "the mask is empty" in done.report
    assert "control" not in done.positive[0][1] and done.free is done.positive
    only_control = applied(1, guided=True, weight=0.0, mask=torch.zeros(1, 8, 8))  # which the mask does not limit
    assert only_control.found and "reads the face" in only_control.report


class Adapter(comfy.controlnet.ControlBase):
    pass


def refused(says: str, found: Any = None, control: Any = None, picture: Any = None, model: Any = None, **more: Any) -> None:
    """One sentence for the artist: it says what to do after a semicolon, and ends."""
    pair = encode("sdxl", PROMPT), encode("sdxl", "blurry")
    dials = Dials(0.8, 0.8, more.pop("start", 0.0), more.pop("end", 1.0))
    with pytest.raises(LikenessError, match=says) as caught:
        apply_instantid(model or base("sdxl")[0], *pair, instantid(), found or faces(1), dials, control, picture, **more)
    assert ";" in str(caught.value) and str(caught.value).endswith(".")


def test_wrong_wiring_is_one_sentence():
    refused("of glintr100 .the pack antelopev2., these faces come from w600k_r50; choose antelopev2", faces(1, space=BUFFALO))
    refused("come from no recogniser; choose antelopev2", faces(1, space=""))
    refused("needs a face embedding of 512 numbers, a face here has none", faces((face(1)._replace(embedding=None),)))
    refused(r"a face here has one of the shape \(128,\)", faces((face(1)._replace(embedding=torch.zeros(128)),)))
    refused("load a SDXL checkpoint", model=base("sd15")[0])
    refused("only one of them is connected; connect both", picture=hint())
    refused("only one of them is connected; connect both", control=control_net())
    refused("from 0.6 to 0.5 of the sampling", start=0.6, end=0.5)
    refused("The mask is empty", mask=torch.zeros(1, 8, 8))


def test_other_controls_are_refused():
    sd15 = comfy.controlnet.load_controlnet(str(tiny.ensure()[tiny.CONTROLNET]))
    refused("a ControlBase reads none; load InstantID's own", control=comfy.controlnet.ControlBase(), picture=hint())
    refused("reads text of width 64, the face tokens have 160; load InstantID's own", control=sd15, picture=hint())


def test_a_whole_run_of_a_stock_sampler_with_everything_on():
    done = applied(1, guided=True)
    out = sample(done.model, done.positive, done.negative, kind="sdxl", steps=2, sampler="dpmpp_2m")
    assert torch.isfinite(out).all()
    assert torch.equal(out, sample(done.model, done.positive, done.negative, kind="sdxl", steps=2, sampler="dpmpp_2m"))
