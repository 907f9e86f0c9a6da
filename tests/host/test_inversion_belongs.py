"""What a recording belongs to: model, prompts and all that hangs on them, guider; anything else is refused in one sentence."""
from __future__ import annotations

import pytest
import torch

from host.inversion_nets import (
    FREE,
    ID,
    NEG,
    OTHER,
    TwoSlots,
    counted,
    error,
    guider,
    lora,
    make,
    net,
    picture,
    psnr,
    rebuilt,
    recorded,
    text,
)
from host.support import comfy, draw
from likeness.models.common.errors import LikenessError
from likeness.models.hosting.bimd import mismatches
from likeness.models.hosting.fingerprint import free_hash, model_hash
from likeness.models.hosting.inversions import check_belongs
from likeness.models.hosting.portrait_control import FaceControl
from likeness.models.hosting.stamps import stamped


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def test_another_model_is_refused():
    model, latent = net("eps"), picture("eps")
    others = {"lora": lora(model), "checkpoint": make("eps", seed=9)}
    who = guider(model, 3.0)
    inversion = recorded(who, 6, latent)
    for name, other in others.items():
        with pytest.raises(LikenessError, match="fingerprint.*accept_mismatch"):
            rebuilt(guider(other, 3.0), inversion, latent)
        assert psnr(rebuilt(guider(other, 3.0), inversion, latent, accept=True), inversion.anchors[0]) < 50, name
        assert any("accepted" in note for note in check_belongs(inversion, guider(other, 3.0), True))
    back = recorded(guider(others["lora"], 3.0), 6, latent)
    with pytest.raises(LikenessError, match="fingerprint"):
        check_belongs(back, who, False)
    assert psnr(rebuilt(who, inversion, latent), inversion.anchors[0]) > 50
    with pytest.raises(LikenessError, match="recorded at cfg 3, the guider has 2"):
        rebuilt(guider(model, 2.0), inversion, latent)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_another_free_prompt_is_refused(cfg):
    """The identity's own prompt may be any; at cfg 1 the negative may be any too."""
    who, latent = guider(net("eps"), cfg), picture("eps")
    inversion = recorded(who, 3, latent)
    assert check_belongs(inversion, who, False) == []
    assert check_belongs(inversion, guider(net("eps"), cfg, positive=OTHER), False) == []
    others = [guider(net("eps"), cfg, free=OTHER)] + ([guider(net("eps"), cfg, negative=OTHER)] if cfg > 1 else [])
    for other in others:
        with pytest.raises(LikenessError, match="prompt.*accept_mismatch"):
            rebuilt(other, inversion, latent)
        assert any("prompt" in note for note in check_belongs(inversion, other, True))
    if cfg == 1:
        assert check_belongs(inversion, guider(net("eps"), cfg, negative=OTHER), False) == []
    plain = recorded(who, 3, latent, residuals=False)
    assert check_belongs(plain, others[0], False) == [], "a plain DDIM inversion is not tied to its prompt"


def with_control(conditioning, strength=0.8, end=0.5, hint=0.3):
    control = comfy.controlnet.ControlBase()
    control.set_cond_hint(torch.full((1, 3, 8, 8), hint), strength, (0.0, end))
    return [[entry[0], {**entry[1], "control": control}] for entry in conditioning]


def with_hook(strength, seed=3):
    hook = comfy.hooks.WeightHook(strength, 0.0)
    hook.weights = {"layer.lora_up.weight": draw(seed, 4, 4)}
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return [[entry[0], {**entry[1], "hooks": group}] for entry in FREE]


def test_what_hangs_on_a_prompt_counts():
    def of(conditioning):
        return free_hash(guider(net("eps"), 3.0, free=conditioning))

    def more(**options):
        return [[entry[0], {**entry[1], **options}] for entry in FREE]
    alike = [FREE, text(32), more(start_percent=None), [stamped(entry, 0) for entry in FREE]]
    different = [
        more(start_percent=0.2), more(area=(4, 4, 0, 0)), more(strength=0.5), more(mask=torch.ones(1, 8, 8)),
        more(mask=torch.zeros(1, 8, 8)), more(guidance=3.5), more(pooled_output=draw(4, 1, 8)),
        more(concat_latent_image=draw(5, 1, 4, 8, 8)), more(reference_latents=[draw(5, 1, 4, 8, 8)]),
        [stamped(entry, 7) for entry in FREE], [stamped(entry, 9) for entry in FREE],
        with_control(FREE), with_control(FREE, strength=0.4), with_control(FREE, end=0.9), with_control(FREE, hint=0.6),
        with_hook(0.5), with_hook(0.9), with_hook(0.5, seed=4), FREE + OTHER, OTHER + FREE,
    ]
    assert {of(conditioning) for conditioning in alike} == {of(FREE)}
    assert len({of(conditioning) for conditioning in [FREE, *different]}) == len(different) + 1
    black = {of([stamped(entry, number) for entry in FREE]) for number in (8, 10)}
    assert len(black) == 1 and of(FREE) not in black, "a black picture in the negative is that of any subject"
    assert of(with_control(FREE)) == of(with_control(FREE)) and of(with_hook(0.5)) == of(with_hook(0.5))


def test_a_face_that_acts_on_other_prompts_does_not_count():
    """InstantID hangs its control on the prompt without the face as well, so that all rows share one call; another face may use
    the recording."""
    def free(tokens):
        control = FaceControl(comfy.controlnet.ControlBase(), {7: tokens})
        return free_hash(guider(net("eps"), 3.0, free=[[entry[0], {**entry[1], "control": control}] for entry in FREE]))
    plain = free_hash(guider(net("eps"), 3.0))
    assert free(torch.zeros(1, 4, 8)) == free(torch.ones(1, 4, 8)) == plain


def test_core_nodes_that_change_whole_steps_are_refused():
    """Core's CFG Override acts round the whole guider, where a recording does not look."""
    model = net("eps").clone()
    model.add_wrapper(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, lambda executor, *a, **k: executor(*a, **k))
    with pytest.raises(LikenessError, match="CFG Override on the model .* bypass"):
        recorded(guider(model), 3, picture("eps"))


def test_a_guider_that_mixes_in_its_own_way():
    """Core's DualCFGGuider: its evaluations are counted at the network, and all its numbers belong to the recording."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    def dual(second):
        who = Guider_DualCFG(net("eps"))
        who.set_conds(ID, FREE, NEG)
        who.set_cfg(3.0, second)
        return who
    latent = picture("eps", 2)
    with counted(net("eps")) as seen:
        inversion = recorded(dual(2.0), 3, latent)
    assert inversion.evaluations * 2 == seen.rows and inversion.calls == seen.calls
    assert error(rebuilt(dual(2.0), inversion, latent), inversion.anchors[0]) < 2e-3
    with pytest.raises(LikenessError, match="another one"):
        rebuilt(dual(4.0), inversion, latent)


@pytest.mark.parametrize("kind", ["easycache", "lazycache"])
def test_step_caches_are_refused(kind):
    """They repeat an earlier answer, so neither way would hold what the model does."""
    model = net("eps").clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, kind, lambda executor, *a, **k: executor(*a, **k))
    with pytest.raises(LikenessError, match="(?i)" + kind + ".*bypass"):
        recorded(guider(model), 3, picture("eps"))
    inversion = recorded(guider(net("eps")), 3, picture("eps"))
    with pytest.raises(LikenessError, match="(?i)" + kind + ".*accept_mismatch"):
        rebuilt(guider(model), inversion, picture("eps"))


def test_the_fingerprint_is_the_models_own():
    """Not of what is loaded at the moment, nor of attention patches; of every weight patch and its strength."""
    model = make("eps", seed=2)
    plain, patched = model_hash(model), lora(model)
    assert model_hash(make("eps", seed=2)) == plain != model_hash(make("eps", seed=3))
    assert len({plain, model_hash(patched), model_hash(lora(model, 0.4)), model_hash(lora(model, seed=8))}) == 4
    assert model_hash(TwoSlots().on(model)) == plain
    patched = lora(model, 0.1, where="weight")  # so that every value the hash looks at is another one while it is loaded
    with_lora = model_hash(patched)
    recorded(guider(patched), 2, picture("eps"))
    assert (model_hash(model), model_hash(patched)) == (plain, with_lora)
    recorded(guider(model), 2, picture("eps"))
    assert (model_hash(model), model_hash(patched)) == (plain, with_lora)


def test_another_prediction_is_another_model():
    """Model Sampling nodes change what the network's answer means, not its weights."""
    model, latent = make("eps", seed=2), picture("eps")
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
    v = ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]
    terminal = ModelSamplingDiscrete().patch(model, "eps", True)[0]
    inversion = recorded(guider(model), 4, latent)
    assert any("V_PREDICTION" in clause for clause in mismatches(inversion, guider(v), None))
    before = model_hash(terminal)
    own = recorded(guider(terminal), 4, latent)
    recorded(guider(model), 2, latent)
    assert model_hash(terminal) == before == own.model_hash, "the loaded model's schedule is in the fingerprint"
    assert check_belongs(own, guider(terminal), False) == []
