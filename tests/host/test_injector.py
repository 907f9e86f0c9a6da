"""The patch objects: what leaves no trace, what one call computes, what is refused, and cancel."""
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from host.support import (
    CURVES,
    PROMPT,
    CurveInput,
    adapter,
    adapter_state,
    base,
    blind,
    by_hand,
    call,
    cfg_guider,
    comfy,
    config_for,
    draw,
    encode,
    guidance,
    inject_into,
    injected,
    latent_of,
    new_adapter,
    patch_for,
    plain,
    prompt,
    run,
    run_guider,
    sample,
    subject,
)
from likeness.models.common.errors import LikenessError
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.injector import LocalInjection


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def snapshot(model: Any) -> Any:
    """All that a patch could leave on a MODEL; objects by identity, containers by content."""
    def plain_copy(value):
        if isinstance(value, dict):
            return {key: plain_copy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain_copy(item) for item in value]
        # The host moves a patch to a device by putting its copy into the list of the MODEL that it runs.
        return value.plan.number if isinstance(value, LocalInjection) else id(value)
    return [plain_copy(part) for part in (
        model.model_options, model.patches, model.object_patches, model.wrappers, model.callbacks, model.injections,
        model.additional_models, model.attachments, model.weight_wrapper_patches)]


def frozen(conditioning: Any) -> Any:
    """A deep copy with every tensor cloned."""
    return [[rows.clone(), copy.deepcopy({k: v for k, v in options.items() if k != "model_conds"}),
             {k: v.cond.clone() for k, v in options.get("model_conds", {}).items()}]
            for rows, options in conditioning]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "mini"])
def test_strength_zero_and_an_untrained_adapter_are_bit_equal(kind):
    before = plain(kind)
    off = injected(kind, strengths=Strengths(0.0, 0.0))
    assert off.model is base(kind)[0] and "passed through" in off.report
    assert torch.equal(run(off, kind=kind), before)
    positive, word = prompt(kind)
    who = subject(kind, trained=False)
    new = inject(base(kind)[0], positive, encode(kind, "blurry"), who, word, Strengths(1.0, 1.0))
    assert new.model is not base(kind)[0]
    assert torch.equal(run(new, kind=kind), before)
    assert not torch.equal(run(injected(kind), kind=kind), before), "the trained one does nothing either"


@pytest.mark.parametrize("level", ["global", "local"])
def test_each_level_acts_alone(level):
    before = plain()
    strengths = Strengths(1.0, 0.0) if level == "global" else Strengths(0.0, 1.0)
    done = injected(strengths=strengths)
    assert (done.model is base("sd15")[0]) == (level == "global")
    assert torch.equal(done.positive[0][0], prompt("sd15")[0][0][0]) == (level == "local")
    assert not torch.equal(run(done), before)


def test_a_clone_never_changes_its_parent():
    model, positive, negative = base("sd15")[0].clone(), prompt("sd15")[0], encode("sd15", "blurry")
    word = prompt("sd15")[1]
    kept = snapshot(model), frozen(positive), frozen(negative), word.rows.clone()
    before = run_guider(cfg_guider(model, positive, negative), latent_of("sd15"))
    first = inject(model, positive, negative, subject("sd15", 1), word, Strengths(1, 1, 0.2, 0.9))
    middle = snapshot(first.model), frozen(first.positive), frozen(first.negative)
    second = inject(first.model, first.positive, first.negative, subject("sd15", 2), word, Strengths(1, 1))
    assert len(second.model.model_options["transformer_options"]["patches"]["middle_patch"]) == 2
    # Applied beside each other on two clones of one parent.
    sister = inject(model.clone(), positive, negative, subject("sd15", 3), word, Strengths(1, 1))
    assert len(sister.model.model_options["transformer_options"]["patches"]["middle_patch"]) == 1
    for done in (first, second, sister):
        run(done)
    assert snapshot(model) == kept[0] and torch.equal(word.rows, kept[3])
    assert same(frozen(positive), kept[1]) and same(frozen(negative), kept[2])
    assert same(frozen(first.positive), middle[1]) and same(frozen(first.negative), middle[2])
    assert len(first.model.model_options["transformer_options"]["patches"]["middle_patch"]) == 1
    assert torch.equal(run_guider(cfg_guider(model, positive, negative), latent_of("sd15")), before)


def test_running_the_node_again_changes_nothing():
    first, again = injected(), injected()
    assert same(frozen(first.positive), frozen(again.positive)) and first.report == again.report
    plans = [done.model.model_options["transformer_options"]["patches"]["middle_patch"][0].plan for done in (first, again)]
    assert plans[0].number == plans[1].number
    assert same(*(list(plan.store.model.parameters()) for plan in plans))
    result = run(first)
    assert torch.equal(run(again), result) and torch.equal(run(first), result)


def test_twice_the_same_injector_in_a_row_acts_twice():
    """Same number on model and prompt: the row's count of it decides, not the number of patches."""
    once = inject_into(base("sd15")[0])
    _, word = prompt("sd15")
    twice = inject(once.model, once.positive, once.negative, subject("sd15", 1), word, Strengths(0.0, 1.0))
    assert len(twice.model.model_options["transformer_options"]["patches"]["middle_patch"]) == 1
    result = run(twice)
    assert not torch.equal(result, run(once))
    assert torch.equal(sample(twice.model, once.positive, once.negative), run(once))


@CURVES
def test_labels_of_other_settings_differ():
    """Two injectors that differ in anything must not answer to each other's stamp."""
    points = [(0.0, 1.0), (0.3, 0.2), (1.0, 0.0)]
    curve, straight = CurveInput.from_raw(points), CurveInput.from_raw({"points": points, "interpolation": "linear"})
    half = torch.ones(1, 8, 8)
    half[..., 4:] = 0
    settings = [
        {}, {"strengths": Strengths(0.0, 0.9)}, {"strengths": Strengths(0.0, 1.0, 0.1)}, {"seed": 2}, {"mask": half},
        {"mask": half.flip(-1)}, {"curve": curve}, {"curve": straight}, {"layers": (("output.3.0", 0.5),)},
        {"guidance": guidance()}, {"guidance": guidance(scope=0.2)}]
    numbers = set()
    for more in settings:
        done = inject_into(base("sd15")[0], **more)
        numbers.add(done.model.model_options["transformer_options"]["patches"]["middle_patch"][0].plan.number)
    assert len(numbers) == len(settings)
    assert all(0 < number < 2 ** 48 for number in numbers)


def test_one_call_by_hand():
    patch, tokens = patch_for(n=2, strength=0.7)
    x = draw(1, 4, 4, 128)
    out = call(patch, x, [(), (5,), (4, 5), (4,)], chunks=2)
    hand = by_hand(adapter("sd15"), "output.3.0", x, tokens.flatten(0, 1)[None])
    assert torch.equal(out[0], x[0]) and torch.equal(out[3], x[3])
    assert torch.allclose(out[1:3], (x + 0.7 * hand)[1:3], atol=1e-5)
    assert torch.equal(call(patch, x, [()] * 4), x)
    assert torch.equal(call(patch, x, [(5,)] * 4, key=("output", 4, 1)), x), "a block that the adapter has not"
    assert torch.equal(patch(x, {"block": ("output", 3), "block_index": 0}), x), "no stamps, no action"


def test_references_of_their_own_latents():
    patch, tokens = patch_for(n=2, pairing="per latent")
    x = draw(1, 6, 4, 128)  # two chunks of three latents
    out = call(patch, x, [(5,)] * 6, chunks=2)
    for row in range(6):
        hand = by_hand(adapter("sd15"), "output.3.0", x[row:row + 1], tokens[row % 3 % 2][None])
        assert torch.allclose(out[row:row + 1], x[row:row + 1] + hand, atol=1e-5), row


def test_each_latent_has_the_global_vector_of_its_own_reference():
    """One per latent: the word of picture 2 must not be a mean with picture 1."""
    positive, word = prompt("sd15")
    who = subject("sd15", 4, n=3)._replace(pairing="per latent")
    done = inject(base("sd15")[0], positive, encode("sd15", ""), who, word, Strengths(1.0, 0.0))
    assert done.positive[0][0].shape == (3, 77, 64)
    for k in range(3):
        one = who._replace(pairing="all", tokens=tuple((name, t[k:k + 1]) for name, t in who.tokens))
        alone = inject(base("sd15")[0], positive, encode("sd15", ""), one, word, Strengths(1.0, 0.0))
        assert torch.allclose(done.positive[0][0][k], alone.positive[0][0][0], atol=1e-6)
    latent = latent_of("sd15", 4)
    out = sample(done.model, done.positive, done.negative, latent=latent, cfg=1.0)
    again = sample(done.model, [[done.positive[0][0][[0, 1, 2, 0]], done.positive[0][1]]], done.negative, latent=latent, cfg=1.0)
    assert torch.equal(out, again)


def test_rows_in_another_order_or_number_are_told():
    patch, _ = patch_for()
    with pytest.raises(LikenessError, match="rows"):
        call(patch, draw(1, 4, 4, 128), [(5,), ()], chunks=2)


def test_what_acts_in_a_run_is_what_the_host_moved(monkeypatch):
    """The guider takes its options before the host loads the model: a patch that answered a move with a copy would act with
    what it held before. So all tensors of an injection lie under patchers, and the patch itself is never exchanged."""
    done, acting, real = injected(), [], LocalInjection.__call__
    (patch,) = done.model.model_options["transformer_options"]["patches"]["middle_patch"]
    monkeypatch.setattr(LocalInjection, "__call__", lambda self, *args: acting.append(self) or real(self, *args))
    for _ in range(2):
        run(done)
    assert all(one is patch for one in acting) and acting and not hasattr(patch, "to")
    assert patch.models() == [adapter("sd15").patcher, patch.plan.store]
    assert patch.plan.store in done.model.model_patches_models()
    size = sum(t.nbytes for t in patch.plan.store.model.parameters())
    assert patch.plan.store.model_size() == size > 0


def test_the_host_loads_the_adapter_with_the_model():
    done = injected()
    assert adapter("sd15").patcher in done.model.model_patches_models()
    run(done)
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert any(model is adapter("sd15").patcher or model.is_clone(adapter("sd15").patcher) for model in loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows(dtype):
    patch, _ = patch_for(mask=torch.ones(1, 4, 4))
    x = draw(1, 2, 4, 128)
    out = call(patch, x.to(dtype), [(5,), ()], chunks=2)
    assert out.dtype == dtype
    error = (out.float() - call(patch, x, [(5,), ()], chunks=2)).abs().max()
    assert error < (0.02 if dtype == torch.float16 else 0.15)


def test_a_base_of_another_kind_is_refused_by_name():
    positive, word = prompt("sd15")
    for kind, parts in (("sdxl", ("SD1.5", "64", "160")), ("sd3", ("SD1.5", "SD3")), ("mini", ("SD1.5", "the miniature"))):
        with pytest.raises(LikenessError) as caught:
            inject(base(kind)[0], positive, [], subject("sd15", 1), word, Strengths(1, 1))
        assert all(part in str(caught.value) for part in parts), str(caught.value)
    one_more = config_for("sd15")._replace(layers=(*config_for("sd15").layers, ("output.1.0", 128)))
    who = subject("sd15", 1, of=new_adapter(one_more))
    with pytest.raises(LikenessError, match="output.1.0"):
        inject(base("sd15")[0], positive, [], who, word, Strengths(1, 1))


def test_a_prompt_of_another_text_encoder_is_refused():
    _, word = prompt("mini")
    with pytest.raises(LikenessError, match="width 128.* needs 64"):
        inject(base("sd15")[0], prompt("sd15")[0], [], subject("sd15", 1), word, Strengths(1, 1))


def test_a_subject_without_its_adapter_or_without_pictures():
    positive, word = prompt("sd15")
    with pytest.raises(LikenessError, match="without its adapter"):
        inject(base("sd15")[0], positive, [], subject("sd15", 1)._replace(adapter=None), word, Strengths(1, 1))
    empty = subject("sd15", 1)._replace(tokens=(("global", torch.zeros(0, 2, 64)), ("local", torch.zeros(0, 0, 64))))
    done = inject(base("sd15")[0], positive, [], empty, word, Strengths(1, 1))
    assert done.positive is positive and "nothing injected" in done.report


def test_cancel_in_mid_sampling_leaves_no_trace():
    done = injected(mask=torch.ones(1, 8, 8))
    before = run(done, steps=3)
    kept = snapshot(done.model)
    seen = []

    def cancel(step, *_):
        seen.append(step)
        if step == 1:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(done, steps=3, callback=cancel)
    assert seen == [0, 1]
    assert snapshot(done.model) == kept
    assert torch.equal(run(done, steps=3), before)
    assert torch.equal(plain(steps=3), plain(steps=3))


def test_an_error_in_mid_sampling_leaves_no_trace():
    waiting = inject_into(base("sd15")[0], guidance=guidance())
    before = run(injected())
    with pytest.raises(LikenessError):
        run(waiting._replace(model=blind(waiting.model)))
    assert torch.equal(run(injected()), before)


def test_keys_and_values_are_projected_once_a_node():
    """The sampler's steps must not pay for the references again."""
    of = new_adapter(config_for("sd15"), seed=77)
    calls = []
    module = of.patcher.model
    real = module.keys_values
    module.keys_values = lambda *a: calls.append(a[0]) or real(*a)
    positive, word = prompt("sd15")
    done = inject(base("sd15")[0], positive, encode("sd15", ""), subject("sd15", 1, of=of), word, Strengths(0, 1))
    made = len(calls)
    run(done, steps=3)
    assert made == len(of.config.layers) == len(calls)


def test_random_adapters_of_other_seeds_differ():
    """Guards the helpers: an adapter that does nothing would make half of these tests empty."""
    assert PROMPT.split()[4] == "cat" and adapter_state(config_for("sd15"))["global_mlp.out.weight"].abs().max() > 0
    assert not torch.equal(run(inject_into(base("sd15")[0], 1)), run(inject_into(base("sd15")[0], 2)))
