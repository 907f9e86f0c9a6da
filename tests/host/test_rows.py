"""The row-stamp rule: the subject acts on a row if, and only if, that row's own conditioning carries it.

`Watch` stands round every call of the network. It tells whose text each row has from the numbers of the text
itself, computes that row alone, on the plain network with the local attention written out by hand, and compares.
No stamp, index or uuid takes part in that, so any guider, area or order of rows can be checked the same way.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from host.support import (
    base,
    by_hand,
    cfg_guider,
    comfy,
    comfy_extras,
    core,
    encode,
    injected,
    latent_of,
    prompt,
    run_guider,
    subject,
)
from likeness.models.common.errors import LikenessError
from likeness.models.common.records import Subject
from likeness.models.hosting import stamps
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.injector import LocalInjection


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


class Seen(NamedTuple):
    """One row of one call: who was expected, how far the network was off, how much the subject matters."""
    who: tuple[int, ...]
    error: float
    effect: float
    call: int


class Watch:
    """`texts`: (CONDITIONING, subjects that its rows carry). It holds no MODEL: a ring of references would make the
    host search its memory for leaks at every load."""

    def __init__(self, *texts: tuple[Any, tuple[Subject, ...]]):
        self.texts = [(row, who) for conditioning, who in texts for entry in conditioning for row in entry[0]]
        self.rows: list[Seen] = []
        self.calls = 0

    def __call__(self, apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
        x, t, c = args["input"], args["timestep"], dict(args["c"])
        out = apply_model(x, t, **c)
        options = self._bare(c.pop("transformer_options"))
        c.pop(stamps.KEY, None)
        for row in range(x.shape[0]):
            who = self._who(c["c_crossattn"][row])
            alone = {name: value[row:row + 1] for name, value in c.items()}

            def run(row=row, alone=alone, subjects=()):
                hand = [self._hand(s) for s in subjects]
                patches = options["patches"] | {"middle_patch": options["patches"].get("middle_patch", []) + hand}
                own = {**options, "patches": patches, "cond_or_uncond": [7]}
                return apply_model(x[row:row + 1], t[row:row + 1], transformer_options=own, **alone)
            plain = run()
            right = run(subjects=who) if who else plain
            scale = float(right.abs().max())
            self.rows.append(Seen(tuple(int(s.source_hash.split()[1]) for s in who),
                                  float((out[row:row + 1] - right).abs().max()) / scale,
                                  float((plain - right).abs().max()) / scale, self.calls))
        self.calls += 1
        return out

    def _who(self, text: torch.Tensor) -> tuple[Subject, ...]:
        for known, who in self.texts:
            if torch.equal(text[:known.shape[0]], known[:text.shape[0]]):
                return who
        raise AssertionError("a row came with a text that nobody gave")

    @staticmethod
    def _bare(options: dict[str, Any]) -> dict[str, Any]:
        patches = {name: [p for p in found if not isinstance(p, LocalInjection)]
                   for name, found in options.get("patches", {}).items()}
        wrappers = {kind: {key: w for key, w in by_key.items() if key != stamps.KEY}
                    for kind, by_key in options.get("wrappers", {}).items()}
        return {**options, "patches": patches, "wrappers": wrappers}

    @staticmethod
    def _hand(of: Subject) -> Any:
        keys = dict(of.adapter.config.layers)

        def patch(x, extra):
            key = f"{extra['block'][0]}.{extra['block'][1]}.{extra['block_index']}"
            local = of.get("local").flatten(0, 1)[None]
            return x + by_hand(of.adapter, key, x, local) if key in keys else x
        return patch

    def on(self, model: Any) -> Any:
        """A clone that is watched."""
        model = model.clone()
        model.set_model_unet_function_wrapper(self)
        return model

    def knows(self, conditioning: Any) -> Any:
        """A further CONDITIONING without a subject, noted and given back."""
        self.texts += [(row, ()) for entry in conditioning for row in entry[0]]
        return conditioning

    def check(self, *expected: tuple[int, ...]) -> None:
        """Every row is right, the subject matters where it is, and exactly these kinds of rows came."""
        assert {row.who for row in self.rows} == set(expected)
        for row in self.rows:
            assert row.error < 5e-6, row
            assert not row.who or row.effect > 1e-4, row

    def together(self) -> bool:
        """Whether rows with and without a subject shared a call."""
        kinds: dict[int, set] = {}
        for row in self.rows:
            kinds.setdefault(row.call, set()).add(row.who)
        return any(len(found) > 1 for found in kinds.values())


ONE, TWO, NONE = (1,), (2,), ()


def setup(kind: str = "sd15", negative: str = "blurry", **more: Any):
    """(injected, watch, watched model) of one subject with the number 1."""
    done = injected(kind, 1, negative=negative, **more)
    watch = Watch((done.positive, (subject(kind, 1),)), (done.negative, ()))
    return done, watch, watch.on(done.model)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "mini"])
def test_cfg(kind):
    done, watch, model = setup(kind)
    run_guider(cfg_guider(model, done.positive, done.negative), latent_of(kind))
    watch.check(ONE, NONE)
    assert watch.together(), "the stamp keeps positive and negative from one call"
    assert watch.calls == 1


def test_cfg_1_runs_only_the_positive():
    done, watch, model = setup()
    run_guider(cfg_guider(model, done.positive, done.negative, 1.0), latent_of("sd15"))
    watch.check(ONE)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("pairing", ["all", "per latent"])
def test_batches(batch, pairing):
    positive, word = prompt("sd15")
    who = subject("sd15", 1)
    done = inject(*_model_and(positive), who._replace(pairing=pairing), word, Strengths(1, 1))
    watch = Watch((done.positive, (who,)), (done.negative, ()))
    run_guider(cfg_guider(watch.on(done.model), done.positive, done.negative), latent_of("sd15", batch))
    watch.check(ONE, NONE)
    assert len(watch.rows) == 2 * batch


def _model_and(positive, kind="sd15", negative="blurry"):
        return base(kind)[0], positive, encode(kind, negative)


@pytest.mark.parametrize("style", ["regular", "nested"])
@pytest.mark.parametrize("place", [0, 1])
def test_dual_cfg(style, place):
    done, watch, model = setup()
    other = watch.knows(encode("sd15", "a sketch of a dog"))
    conds = [done.positive, other] if place == 0 else [other, done.positive]
    guider = comfy_extras.nodes_custom_sampler.DualCFGGuider.execute(model, *conds, done.negative, 3.0, 2.0, style)[0]
    run_guider(guider, latent_of("sd15"))
    watch.check(ONE, NONE)


@pytest.mark.parametrize("as_patch", [False, True])
def test_perp_neg(as_patch):
    done, watch, model = setup()
    empty = watch.knows(encode("sd15", ""))
    if as_patch:
        model = comfy_extras.nodes_perpneg.PerpNeg.execute(model, empty, 1.0)[0]
        guider = cfg_guider(model, done.positive, done.negative)
    else:
        guider = comfy_extras.nodes_perpneg.PerpNegGuider.execute(model, done.positive, done.negative, empty, 4.0, 1.0)[0]
    run_guider(guider, latent_of("sd15"))
    watch.check(ONE, NONE)


@pytest.mark.parametrize(("guidance", "before"), [
    ("sag", False), ("sag", True), ("pag", False), ("pag", True), ("slg", False), ("slg simple", True)])
def test_guidance_patches(guidance, before):
    """They call the network again with rows of their own choice: SAG the negative, the others the positive."""
    def guided(model):
        if guidance == "sag":
            return comfy_extras.nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]
        if guidance == "pag":
            return comfy_extras.nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0)[0]
        slg = comfy_extras.nodes_slg
        node = slg.SkipLayerGuidanceDiTSimple if "simple" in guidance else slg.SkipLayerGuidanceDiT
        more = {} if "simple" in guidance else {"scale": 3.0}
        return node.execute(model, start_percent=0.0, end_percent=1.0, double_layers="1", **more)[0]
    positive, word = prompt("sd15")
    model, positive, negative = _model_and(positive)
    done = inject(guided(model) if before else model, positive, negative, subject("sd15", 1), word, Strengths(1, 1))
    watch = Watch((done.positive, (subject("sd15", 1),)), (done.negative, ()))
    guider = cfg_guider(watch.on(done.model if before else guided(done.model)), done.positive, done.negative)
    side = 16 if guidance == "sag" else 8  # SAG cannot make its map of a middle block of one cell
    run_guider(guider, latent_of("sd15", 1, side, side))
    watch.check(ONE, NONE)
    assert watch.calls > 1, "the guidance made no call of its own"


def _area(conditioning):
    return core.ConditioningSetArea().append(conditioning, 48, 64, 16, 0, 1.0)[0]


def _mask(conditioning, bounds):
    mask = torch.zeros(1, 64, 64)
    mask[:, 8:40, 16:56] = 1.0
    return core.ConditioningSetMask().append(conditioning, mask, "mask bounds" if bounds else "default", 1.0)[0]


@pytest.mark.parametrize(("how", "side"), [
    ("area", "positive"), ("percent", "positive"), ("mask", "positive"), ("mask bounds", "positive"), ("area", "negative"),
    ("mask bounds", "negative"), ("area", "both")])
def test_areas_and_masks(how, side):
    """With an area the host copies entries between positive and negative, their uuid included."""
    done, watch, model = setup()

    def placed(conditioning):
        if how == "area":
            return _area(conditioning)
        if how == "percent":
            return core.ConditioningSetAreaPercentage().append(conditioning, 0.5, 0.6, 0.25, 0.0, 1.0)[0]
        return _mask(conditioning, how == "mask bounds")
    positive, negative = done.positive, done.negative
    if side in ("positive", "both"):
        positive = placed(positive) + watch.knows(encode("sd15", "a wide beach"))
    if side in ("negative", "both"):
        negative = placed(negative)
    run_guider(cfg_guider(model, positive, negative), latent_of("sd15"))
    watch.check(ONE, NONE)


def test_area_on_sdxl():
    done, watch, model = setup("sdxl")
    run_guider(cfg_guider(model, _area(done.positive), done.negative), latent_of("sdxl"))
    watch.check(ONE, NONE)


@pytest.mark.parametrize("first", [True, False])
def test_combine_of_a_stamped_and_a_plain_prompt(first):
    done, watch, model = setup()
    plain = watch.knows(encode("sd15", "a cat in the snow at night"))
    positive = done.positive + plain if first else plain + done.positive
    run_guider(cfg_guider(model, positive, done.negative), latent_of("sd15"))
    watch.check(ONE, NONE)


def test_injection_after_a_combine_reaches_its_own_prompt_only():
    """CLIP reads from left to right: both prompts have the same vectors at "cat", and only one is the word's."""
    here, word = prompt("sd15", "a cat on the beach")
    there, _ = prompt("sd15", "a cat in the snow")
    foreign = encode("sd15", "a cat in a room")
    model, positive, negative = _model_and(here + there + foreign)
    done = inject(model, positive, negative, subject("sd15", 1), word, Strengths(1, 1))
    watch = Watch((done.positive[:1], (subject("sd15", 1),)), (done.positive[1:], ()),
                  (done.negative, ()))
    assert torch.equal(done.positive[1][0], there[0][0]) and torch.equal(done.positive[2][0], foreign[0][0])
    run_guider(cfg_guider(watch.on(done.model), done.positive, done.negative), latent_of("sd15"))
    watch.check(ONE, NONE)


def test_timestep_ranges():
    """The subject's prompt takes over in the middle of the sampling."""
    done, watch, model = setup()
    plain = watch.knows(encode("sd15", "a dog"))
    ranged = core.ConditioningSetTimestepRange()
    positive = ranged.set_range(plain, 0.0, 0.5)[0] + ranged.set_range(done.positive, 0.5, 1.0)[0]
    run_guider(cfg_guider(model, positive, done.negative), latent_of("sd15"), sigmas=(14.0, 8.0, 1.0, 0.0))
    watch.check(ONE, NONE)
    assert ONE not in {row.who for row in watch.rows if row.call == 0}
    assert ONE in {row.who for row in watch.rows if row.call == watch.calls - 1}


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_two_subjects_in_a_combine(kind):
    """Two injectors in a row on the model, each on its own prompt."""
    first = injected(kind, 1, "a cat on the beach", "cat")
    positive, word = prompt(kind, "a dog in the snow", "dog")
    second = inject(first.model, positive, first.negative, subject(kind, 2), word, Strengths(1, 1))
    watch = Watch((first.positive, (subject(kind, 1),)), (second.positive, (subject(kind, 2),)),
                  (second.negative, ()))
    run_guider(cfg_guider(watch.on(second.model), first.positive + second.positive, second.negative), latent_of(kind))
    watch.check(ONE, TWO, NONE)


def test_two_subjects_in_one_prompt():
    """Chained injectors: the row carries both ids and gets both attentions, one after the other."""
    text = "a cat and a dog on the beach"
    first = injected("sd15", 1, text, "cat")
    _, word = prompt("sd15", text, "dog")
    second = inject(first.model, first.positive, first.negative, subject("sd15", 2), word, Strengths(1, 1))
    assert len(second.positive) == 1
    watch = Watch((second.positive, (subject("sd15", 1), subject("sd15", 2))), (second.negative, ()))
    run_guider(cfg_guider(watch.on(second.model), second.positive, second.negative), latent_of("sd15"))
    watch.check((1, 2), NONE)


def test_one_subject_in_two_places_is_not_doubled():
    """The same subject, word and prompt in two branches that meet again: each entry gets it once."""
    positive, word = prompt("sd15")
    model, positive, negative = _model_and(positive)
    left = core.ConditioningSetArea().append(positive, 32, 64, 0, 0, 1.0)[0]
    right = core.ConditioningSetArea().append(positive, 32, 64, 32, 0, 1.0)[0]
    who = subject("sd15", 1)
    first = inject(model, left, negative, who, word, Strengths(1, 1))
    second = inject(first.model, right, first.negative, who, word, Strengths(1, 1))
    watch = Watch((first.positive, (who,)), (second.negative, ()))
    run_guider(cfg_guider(watch.on(second.model), first.positive + second.positive, second.negative), latent_of("sd15"))
    watch.check(ONE, NONE)


def test_average_and_concat_of_the_same_pictures_are_two_subjects():
    """Same pictures, same hashes, other tokens: each of two prompts must get its own."""
    positive, word = prompt("sd15")
    several = subject("sd15", 1, n=2)
    mean = several._replace(tokens=tuple((name, t.mean(0, keepdim=True)) for name, t in several.tokens))
    model, positive, negative = _model_and(positive)
    one = inject(model, positive, negative, several, word, Strengths(0, 1))
    two = inject(one.model, positive, one.negative, mean, word, Strengths(0, 1))
    ids = [set(c[0][1]["model_conds"][stamps.KEY].cond[0].tolist()) - {0} for c in (one.positive, two.positive)]
    assert ids[0] and ids[1] and ids[0] != ids[1]


@pytest.mark.parametrize("why", ["memory", "length"])
def test_cond_and_uncond_in_two_calls(why, monkeypatch):
    negative = "blurry"
    if why == "memory":
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)
    else:
        negative = "blurry, bad, ugly, dull, flat, dark " * 42  # more than four windows are not padded to match
    done, watch, model = setup(negative=negative)
    run_guider(cfg_guider(model, done.positive, done.negative), latent_of("sd15", 2))
    watch.check(ONE, NONE)
    assert not watch.together()


def test_no_stamp_no_action():
    """The injected model with the prompts as they were, and the injected prompts on the plain model."""
    done = injected(strengths=Strengths(0.0, 1.0))
    positive, _ = prompt("sd15")
    model, positive, negative = _model_and(positive)
    latent = latent_of("sd15")
    plain = run_guider(cfg_guider(model, positive, negative), latent)
    assert torch.equal(run_guider(cfg_guider(done.model, positive, negative), latent), plain)
    assert torch.equal(run_guider(cfg_guider(model, done.positive, done.negative), latent), plain)
    assert not torch.equal(run_guider(cfg_guider(done.model, done.positive, done.negative), latent), plain)


def test_negative_can_carry_a_subject_too():
    """Swapped inputs: nothing in the pack knows what a positive is."""
    done, watch, model = setup()
    run_guider(cfg_guider(model, done.negative, done.positive), latent_of("sd15"))
    watch.check(ONE, NONE)


def test_one_prompt_holds_eight_subjects_and_says_no_to_the_ninth():
    entry = encode("sd15", "a cat")[0]
    for number in range(1, stamps.SLOTS + 1):
        entry = stamps.stamped(entry, number)
        assert entry[1]["model_conds"][stamps.KEY].cond[0, :number].tolist() == list(range(1, number + 1))
    assert entry[1]["model_conds"][stamps.KEY].cond.shape == (1, stamps.SLOTS)
    with pytest.raises(LikenessError, match="8 subjects"):
        stamps.stamped(entry, 99)


def test_the_reader_is_there_once():
    done = injected()
    again = injected(seed=2)
    second = inject(done.model, again.positive, done.negative, subject("sd15", 2), prompt("sd15")[1], Strengths(0, 1))
    for kind in ("apply_model", "calc_cond_batch"):
        assert len(second.model.get_wrappers(kind, stamps.KEY)) == 1
    assert len(second.model.model_options["transformer_options"]["patches"]["middle_patch"]) == 2


def test_rows_that_another_node_multiplied_are_refused():
    """Stamps that do not belong to the rows any more must never be guessed."""
    done = injected(strengths=Strengths(0.0, 1.0))

    def doubled(apply_model, args):
        c = dict(args["c"])
        rows = c.pop(stamps.KEY)
        options = c.pop("transformer_options")
        twice = {name: value.repeat(2, 1, 1) for name, value in c.items()}
        out = apply_model(args["input"].repeat(2, 1, 1, 1), args["timestep"].repeat(2), transformer_options=options,
                          **twice, **{stamps.KEY: rows})
        return out[:out.shape[0] // 2]
    model = done.model.clone()
    model.set_model_unet_function_wrapper(doubled)
    with pytest.raises(LikenessError, match="rows"):
        run_guider(cfg_guider(model, done.positive, done.negative), latent_of("sd15"))


def test_process_cond_notes_the_area():
    stamp = stamps.CondStamp(torch.tensor([[5, 0, 0, 0, 0, 0, 0, 0]]))
    whole = stamp.process_cond(batch_size=2, area=None).cond
    part = stamp.process_cond(batch_size=2, area=[3, 4, 1, 2]).cond
    assert whole.shape == part.shape == (2, stamps.SLOTS + 4)
    assert whole[0, stamps.SLOTS:].tolist() == [0] * 4 and part[1, stamps.SLOTS:].tolist() == [3, 4, 1, 2]
    assert stamp.can_concat(stamps.CondStamp(torch.zeros(1, stamps.SLOTS, dtype=torch.int64)))


