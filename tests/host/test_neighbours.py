"""Beside other packs: works in either order, or is refused with a sentence."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness import tiny
from host.support import (
    adapter,
    base,
    by_hand,
    cfg_guider,
    comfy,
    core,
    draw,
    encode,
    inject_into,
    injected,
    latent_of,
    plain,
    prompt,
    run,
    run_guider,
    sample,
    subject,
)
from likeness.models.hosting.inject import Strengths, inject


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


class ForeignReplace:
    """The kind of object that IPAdapter-style packs put into the attn2 slot: later packs call `add` on it."""

    def __init__(self, callback, **kwargs):
        self.callbacks, self.kwargs = [callback], [kwargs]

    def add(self, callback, **kwargs):
        self.callbacks.append(callback)
        self.kwargs.append(kwargs)
        return self

    def __call__(self, q, k, v, extra_options):
        heads = extra_options["n_heads"]
        out = comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)
        for callback, kwargs in zip(self.callbacks, self.kwargs, strict=True):
            out = out + callback(q, k, v, extra_options, **kwargs)
        return out


def foreign_attention(q, k, v, extra_options, tokens, weight):
    keys = tokens.repeat(1, 1, -(-q.shape[-1] // tokens.shape[-1]))[..., :q.shape[-1]].expand(q.shape[0], -1, -1)
    return weight * comfy.ldm.modules.attention.optimized_attention(q, keys, keys.flip(-1), extra_options["n_heads"])


def like_ipadapter(model: Any, weight: float = 0.6, seed: int = 21) -> Any:
    """As IPAdapter-style packs do it: into the slot, or onto the object that sits there already."""
    model = model.clone()
    slot = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for number in range(3, 12):
        key = ("output", number, 0)
        arguments = {"tokens": draw(seed, 1, 4, 64), "weight": weight}
        if key in slot:
            slot[key].add(foreign_attention, **arguments)
        else:
            model.set_model_attn2_replace(ForeignReplace(foreign_attention, **arguments), *key)
    return model


def output_patch(model: Any) -> Any:
    model = model.clone()
    model.set_model_attn2_output_patch(lambda n, extra: n * 1.1 + 0.05 * n.flip(-1))
    return model


def middle_patch(model: Any) -> Any:
    """As GLIGEN does it: reads the stream between the attentions and adds to it."""
    model = model.clone()
    model.set_model_patch(lambda x, extra: x + 0.3 * torch.tanh(x.roll(1, -1)), "middle_patch")
    return model


def lora(model: Any) -> Any:
    weights = comfy.utils.load_torch_file(str(tiny.ensure()[tiny.LORA]))
    return comfy.sd.load_lora_for_models(model, None, weights, 0.8, 0.0)[0]


NEIGHBOURS = {"ipadapter": like_ipadapter, "output patch": output_patch, "gligen": middle_patch, "lora": lora}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_in_either_order(name):
    """Both orders of the two nodes give one picture, in which both act."""
    other = NEIGHBOURS[name]
    model = base("sd15")[0]
    after, before = other(inject_into(model).model), inject_into(other(model))
    marked = before.positive, before.negative
    results = [sample(m, *marked) for m in (before.model, after)]
    if name == "gligen":  # the stream goes through both patches in list order
        assert not torch.equal(*results)
    else:
        assert torch.allclose(*results, rtol=1e-4, atol=1e-3)
    for result in results:
        assert not torch.equal(result, plain(model=other(model)))
        assert not torch.equal(result, run(inject_into(model)))
    assert torch.equal(plain(), plain(model=model))


def test_the_foreign_sum_is_exact():
    """One block with both: plain stream + ours, then the text attention + theirs, each as if alone."""
    key = ("output", 3)
    seen: dict[str, Tensor] = {}

    def spy(name):
        def patch(x, extra):
            if extra["block"] == key:
                seen[name] = x.clone()
            return x
        return patch
    model = like_ipadapter(base("sd15")[0]).clone()
    model.set_model_patch(spy("before"), "middle_patch")
    done = inject_into(model)
    done.model.set_model_patch(spy("after"), "middle_patch")
    run_guider(cfg_guider(done.model, done.positive, done.negative, 1.0), latent_of("sd15"))
    hand = seen["before"] + by_hand(adapter("sd15"), "output.3.0", seen["before"], subject("sd15").get("local"))
    assert torch.allclose(seen["after"], hand, atol=1e-4, rtol=1e-4)


def test_two_of_ours_and_an_ipadapter_between_them():
    model = base("sd15")[0]
    first = inject_into(model, 1)
    _, word = prompt("sd15")
    second = inject(like_ipadapter(first.model), first.positive, first.negative, subject("sd15", 2), word, Strengths(0, 1))
    result = sample(second.model, second.positive, second.negative)
    straight = inject(first.model, first.positive, first.negative, subject("sd15", 2), word, Strengths(0, 1))
    again = sample(like_ipadapter(straight.model), straight.positive, straight.negative)
    assert torch.allclose(result, again, rtol=1e-4, atol=1e-3)
    assert not torch.equal(result, sample(straight.model, straight.positive, straight.negative))


def test_gligen_that_comes_with_the_conditioning():
    """Core merges the patches of an entry into the call's; ours must not be lost, nor see it twice."""
    class Gligen(torch.nn.Module):
        def set_position(self, shape, params, device):
            return lambda x, extra: x + 0.2 * torch.tanh(x)

        def set_empty(self, shape, device):
            return lambda x, extra: x
    boxes = comfy.model_patcher.CoreModelPatcher(Gligen(), torch.device("cpu"), torch.device("cpu"))
    model = base("sd15")[0]
    done = inject_into(model)
    with_boxes = [[entry[0], {**entry[1], "gligen": ("position", boxes, [])}] for entry in done.positive]
    calls = [run_guider(cfg_guider(m, c, done.negative), latent_of("sd15")) for m in (model, done.model)
             for c in (done.positive, with_boxes)]
    assert all(not torch.equal(calls[a], calls[b]) for a in range(4) for b in range(a))


@pytest.mark.parametrize("before", [True, False])
def test_beside_a_controlnet(before):
    """ControlNetApply copies the entries: stamp and word survive, and the control net sees no subject of its own."""
    control = comfy.controlnet.load_controlnet(str(tiny.ensure()[tiny.CONTROLNET]))
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))

    def controlled(positive, negative):
        return core.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, hint, 0.8, 0.0, 1.0)
    positive, word = prompt("sd15")
    negative = encode("sd15", "blurry")
    model, who, strengths = base("sd15")[0], subject("sd15", 1), Strengths(1.0, 1.0)
    if before:
        pair = controlled(positive, negative)
        done = inject(model, *pair, who, word, strengths)
        result = run(done)
    else:
        done = inject(model, positive, negative, who, word, strengths)
        pair = controlled(done.positive, done.negative)
        result = sample(done.model, *pair)
    both = [run(injected()), sample(model, *controlled(positive, negative))]
    assert all(not torch.equal(result, other) for other in both)
    other = controlled(*inject(model, positive, negative, who, word, strengths)[1:3])
    assert torch.allclose(result, sample(done.model, *other), rtol=1e-4, atol=1e-3)


class Couple:
    """Attention couple: the positive's rows are multiplied for the text attention and mixed back by masks.

    form "ppm": the base prompt is the first of the parts; form "prompt control": parts join what the row had. Both
    multiply in `attn2_patch` and reduce in `attn2_output_patch` of the same block call.
    """

    def __init__(self, conds: list[Tensor], form: str):
        self.conds, self.form = conds, form

    def on(self, model: Any) -> Any:
        model = model.clone()
        model.set_model_attn2_patch(self.multiply)
        model.set_model_attn2_output_patch(self.reduce)
        return model

    def multiply(self, q, k, v, extra):
        chunks = extra["cond_or_uncond"]
        batch = q.shape[0] // len(chunks)
        qs, ks = [], []
        for number, kind in enumerate(chunks):
            rows = slice(number * batch, (number + 1) * batch)
            if kind == 1:
                qs.append(q[rows])
                ks.append(k[rows])
            else:
                parts = [k[rows]] if self.form == "prompt control" else []
                parts += [c.expand(batch, -1, -1).to(k) for c in self.conds]
                qs.append(q[rows].repeat(len(parts), 1, 1))
                ks.append(torch.cat([p[:, :k.shape[1]] for p in parts]))
        k = torch.cat(ks)
        return torch.cat(qs), k, k

    def reduce(self, n, extra):
        chunks = extra["cond_or_uncond"]
        parts = len(self.conds) + (self.form == "prompt control")
        batch = n.shape[0] // sum(1 if kind == 1 else parts for kind in chunks)
        out, at = [], 0
        height, width = extra["activations_shape"][-2:]
        for kind in chunks:
            many = 1 if kind == 1 else parts
            rows = n[at:at + many * batch].unflatten(0, (many, batch))
            at += many * batch
            if many > 1:  # the left half belongs to the first part, the right to the last
                mask = torch.zeros(many, height, width, device=n.device)
                mask[0, :, : -(-width // 2)] = 1.0
                mask[-1, :, -(-width // 2):] = 1.0
                rows = rows * mask.reshape(many, 1, -1, 1).to(n)
            out.append(rows.sum(0))
        return torch.cat(out)


@pytest.mark.parametrize("form", ["ppm", "prompt control"])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_couple_in_both_orders(form, batch):
    """The middle of a block lies before its rows are multiplied, so the order of the nodes makes no difference."""
    conds = [encode("sd15", text)[0][0] for text in ("a cat, red", "a dog, blue")]
    model, latent, couple = base("sd15")[0], latent_of("sd15", batch), Couple(conds, form)
    ours_last = inject_into(couple.on(model))
    ours_first = couple.on(inject_into(model).model)
    marked = ours_last.positive, ours_last.negative
    results = [sample(m, *marked, latent=latent) for m in (ours_last.model, ours_first)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], sample(couple.on(model), *marked, latent=latent))
    assert not torch.equal(results[0], sample(inject_into(model).model, *marked, latent=latent))
