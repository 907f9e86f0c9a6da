"""The subject's word: which rows of the CONDITIONING are its own, through everything that core does to prompts."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from host.support import (
    PROMPT,
    WINDOWS,
    adapter,
    base,
    cfg_guider,
    config_for,
    core,
    draw,
    encode,
    folder,
    latent_of,
    new_adapter,
    prompt,
    run_guider,
    subject,
)
from likeness.models.common.errors import LikenessError
from likeness.models.common.records import Word
from likeness.models.custany.layers import replace_word
from likeness.models.hosting import stamps
from likeness.models.hosting.adapters import word_delta
from likeness.models.hosting.inject import Strengths, inject
from likeness.models.hosting.prompt import HASH_KEY, TEXT_KEY, encode_prompt, tokens_report

ALL = ("sd15", "sdxl", "mini")
CAT = 2368
GLOBAL = Strengths(1.0, 0.0)


@pytest.fixture(autouse=True)
def _as_a_node():
    with torch.inference_mode():
        yield


def ids_at(word: Word) -> list[int]:
    """Token ids at the word's columns, counted over all windows by hand."""
    flat = [entry[0] for window in word.tokens[next(iter(word.tokens))] for entry in window]
    return [flat[column] for column in word.columns]


def into(conditioning: Any, word: Word, kind: str = "sd15", strengths: Strengths = GLOBAL, seed: int = 1, **more: Any):
    return inject(base(kind)[0], conditioning, [], subject(kind, seed, **more), word, strengths)


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (before != after).any(0).any(-1).nonzero()[:, 0].tolist()


# -- finding -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("text", "word", "columns", "weights"), [
    ("a photo of a cat on the beach", "cat", (5,), (1.0,)),
    ("a photo of a (cat:1.2) on the beach", "cat", (5,), (1.2,)),
    ("a ((cat)) on the beach", "cat", (2,), (1.21,)),
    ("(a (cat:0.5) here:1.2)", "cat", (2,), (0.5,)),
    ("A Photo of a CAT", "Cat", (5,), (1.0,)),
    ("a cat, a dog and a cat!", "cat", (2, 8), (1.0, 1.0)),
    ("a teddy bear on a box", "teddy bear", (2, 3), (1.0, 1.0)),
    ("a teddy (bear:1.5) on a box", "teddy bear", (2, 3), (1.0, 1.5)),
    ("(cat:1.3) and (cat:0.7)", "cat", (1, 3), (1.3, 0.7)),
    ("a cat \\(tabby\\) on a mat", "cat (tabby)", (2, 3, 4, 5), (1.0,) * 4),
    ("a cat-like robot", "cat", (2,), (1.0,)),
    ("cat", "cat", (1,), (1.0,)),
    ("a dog, a cat, and so on", " cat,", (5,), (1.0,)),
    ("a cat.", "\"cat\"", (2,), (1.0,)),
])
def test_columns_and_weights(kind, text, word, columns, weights):
    conditioning, found, there = encode_prompt(base(kind)[1], text, word)
    assert there and found.columns == columns and found.weights == pytest.approx(weights)
    assert found.window == WINDOWS[kind] and found.prompt == text
    assert torch.equal(conditioning[0][0], encode(kind, text)[0][0]), "not as core encodes it"
    assert torch.equal(found.rows, conditioning[0][0][0, list(columns)])
    raw = encode(kind, "".join(c for c in text.replace("\\(", "<").replace("\\)", ">") if c not in "()")
                 .replace("<", "\\(").replace(">", "\\)").translate(str.maketrans("", "", ":.0123456789")))
    assert torch.allclose(found.raw, raw[0][0][0, list(columns)], atol=1e-6), "weights are still in raw"


@pytest.mark.parametrize(("occurrence", "columns"), [(0, (2, 5, 9)), (1, (2,)), (2, (5,)), (3, (9,))])
def test_occurrences(occurrence, columns):
    text = "a cat and a cat on the big cat"
    _, found, _ = encode_prompt(base("sd15")[1], text, "cat", occurrence)
    assert found.columns == columns and found.firsts == tuple(range(len(columns))) and ids_at(found) == [CAT] * len(columns)
    with pytest.raises(LikenessError, match="3 times, occurrence 4 was asked"):
        encode_prompt(base("sd15")[1], text, "cat", 4)


def test_whole_words_only():
    clip = base("sd15")[1]
    _, found, _ = encode_prompt(clip, "a housecat beside a cat", "cat")
    flat = [entry[0] for entry in found.tokens["l"][0]]
    assert flat.count(CAT) == 2 and found.columns == (flat.index(CAT, flat.index(CAT) + 1),)
    for text, word in (("a watermelon", "melon"), ("three cats", "cat"), ("a housecat", "cat"), ("a cathedral", "cat")):
        assert not encode_prompt(clip, text, word, on_missing="pass through")[2], (text, word)


def filler(count: int) -> str:
    return " ".join(["red"] * count)


@pytest.mark.parametrize("kind", ALL)
def test_at_the_windows_end_and_in_the_next_one(kind):
    size = WINDOWS[kind]
    for before, column in ((size - 3, size - 2), (size - 2, size + 1), (2 * (size - 2), 2 * size + 1)):
        text = f"{filler(before)} cat on the beach"
        conditioning, found = prompt(kind, text)
        assert found.columns == (column,) and ids_at(found) == [CAT]
        assert conditioning[0][0].shape[1] % size == 0
        done = into(conditioning, found, kind)
        assert changed(conditioning[0][0], done.positive[0][0]) == [column]
    assert "window 3: columns 1" in tokens_report(found)


def test_both_windows_at_once():
    text = f"cat {filler(90)} cat"
    conditioning, found = prompt("sd15", text)
    assert found.columns == (1, 77 + 17)
    assert changed(conditioning[0][0], into(conditioning, found).positive[0][0]) == [1, 94]


def test_a_word_that_the_window_cuts_is_named():
    text = f"{filler(74)} teddy bear on a box"
    with pytest.raises(LikenessError, match="cut in two"):
        encode_prompt(base("sd15")[1], text, "teddy bear")
    assert encode_prompt(base("sd15")[1], f"{filler(73)} teddy bear on a box", "teddy bear")[1].columns == (74, 75)
    with pytest.raises(LikenessError, match="is not in the prompt"):
        encode_prompt(base("sd15")[1], f"{filler(75)} bear teddy", "teddy bear")


@pytest.mark.parametrize("kind", ALL)
def test_textual_inversions(kind, monkeypatch):
    """Two vectors in the prompt are two columns that are no numbers."""
    clip = base(kind)[1]
    widths = {"sd15": {"clip_l": 64}, "sdxl": {"clip_l": 64, "clip_g": 96}, "mini": {"clip_l": 128}}[kind]
    save_file({key: draw(9, 2, width) for key, width in widths.items()}, folder() / f"thing_{kind}.safetensors")
    for name in widths:
        monkeypatch.setattr(getattr(clip.tokenizer, name), "embedding_directory", [str(folder())])
    text = f"a photo of embedding:thing_{kind} and a cat, cat embedding:thing_{kind} cat"
    conditioning, found = prompt(kind, text)
    assert ids_at(found) == [CAT] * 3 and found.columns == (8, 10, 13)
    plain = encode(kind, f"a photo of embedding:thing_{kind} and a dog, cat embedding:thing_{kind} cat")
    assert changed(conditioning[0][0], plain[0][0])[0] == 8
    assert changed(conditioning[0][0], into(conditioning, found, kind).positive[0][0]) == [8, 10, 13]
    with pytest.raises(LikenessError, match="embedding"):
        encode_prompt(clip, text, f"embedding:thing_{kind}")


def test_a_missing_word():
    clip = base("sd15")[1]
    with pytest.raises(LikenessError, match="did you mean cats"):
        encode_prompt(clip, "three cats and a dog", "cat")
    with pytest.raises(LikenessError, match='"zebra" is not in the prompt "a dog".*write it'):
        encode_prompt(clip, "a dog", "zebra")
    for sign in (",", " . ", "()"):
        with pytest.raises(LikenessError, match="no letters"):
            encode_prompt(clip, "a dog, (white).", sign)
        assert encode_prompt(clip, "a dog, (white).", sign, on_missing="pass through")[2] is False
    for empty in ("", "  "):
        with pytest.raises(LikenessError, match="word is empty"):
            encode_prompt(clip, "a dog", empty)
    conditioning, found, there = encode_prompt(clip, "a dog", "cat", on_missing="pass through")
    assert not there and found.columns == () and found.rows is None and "nothing will be injected" in tokens_report(found)
    done = into(conditioning, found, strengths=Strengths(1.0, 1.0))
    assert done.model is base("sd15")[0] and done.positive is conditioning and "passed through" in done.report
    gone, found, there = encode_prompt(clip, "a cat", "cat", 5, on_missing="pass through")
    assert not there and not found.columns


def test_report_for_the_artist():
    _, found = prompt("sd15", f"a (teddy bear:1.2), {filler(80)} teddy bear", "teddy bear")
    lines = tokens_report(found).splitlines()
    assert lines == ['word: "teddy bear", 2 times, 2 tokens each', "window 1: columns 2, 3, weight 1.2",
                     "window 2: columns 10, 11"]


@pytest.mark.parametrize("kinds", [("t5xxl",), ("l", "t5xxl"), ("l", "g", "t5xxl"), ("qwen25_7b",)])
def test_text_encoders_of_another_kind_are_refused(kinds):
    class Clip:
        def tokenize(self, text):
            return {kind: [[(1, 1.0)] * 8] for kind in kinds}
    with pytest.raises(LikenessError, match=f"tokenizers {', '.join(kinds)}"):
        encode_prompt(Clip(), "a cat", "cat")


def test_sd3_and_no_clip_are_refused():
    with pytest.raises(LikenessError, match="t5xxl"):
        encode_prompt(base("sd3")[1], "a cat", "cat")
    with pytest.raises(LikenessError, match="CLIP input is empty"):
        encode_prompt(None, "a cat", "cat")


# -- what goes into the word ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("weight", [1.2, 0.6])
def test_the_weight_rule(kind, weight):
    """Core makes (z - z_empty) * w + z_empty of a row z: done by hand on the fused vector, it is row + w * delta."""
    column = 5
    conditioning, found = prompt(kind, f"a photo of a (cat:{weight}) on the beach")
    z, empty = encode(kind, PROMPT)[0][0][0, column], encode(kind, "")[0][0][0, column]
    delta = word_delta(subject(kind, 1), z[None])[0, 0]
    fused = (z + delta - empty) * weight + empty
    assert torch.allclose(into(conditioning, found, kind).positive[0][0][0, column], fused, atol=2e-5)
    half = into(conditioning, found, kind, Strengths(0.5, 0.0)).positive[0][0][0, column]
    assert torch.allclose(half, (z + 0.5 * delta - empty) * weight + empty, atol=2e-5)


def test_each_occurrence_has_its_own_vector_and_weight():
    conditioning, found = prompt("sd15", "a (cat:1.4) and a (cat:0.8)")
    plain = encode("sd15", "a cat and a cat")[0][0][0]
    out = into(conditioning, found).positive[0][0][0]
    for column, weight in ((2, 1.4), (5, 0.8)):
        delta = word_delta(subject("sd15", 1), plain[column][None])[0, 0]
        assert torch.allclose(out[column], conditioning[0][0][0, column] + weight * delta, atol=1e-5)


@pytest.mark.parametrize("mode", ["keep_rest", "drop_rest"])
def test_words_of_several_tokens(mode):
    """The first token gets the vector, made from the mean of all; the rest stays or goes, as in training."""
    conditioning, found = prompt("sd15", "a teddy bear, (a teddy bear:1.1)", "teddy bear")
    assert found.columns == (2, 3, 6, 7)
    of = new_adapter(config_for("sd15", category_mode=mode))
    who = subject("sd15", 1, of=of)
    out = inject(base("sd15")[0], conditioning, [], who, found, GLOBAL).positive[0][0]
    expected = conditioning[0][0].clone()
    for first, weight in ((6, 1.1), (2, 1.0)):
        at = first // 2 - 1 if first == 2 else 2
        delta = weight * word_delta(who, found.raw[at:at + 2].mean(0, keepdim=True))[0]
        expected = replace_word(expected, torch.tensor([first]), torch.tensor([2]), delta, mode)
    assert torch.allclose(out, expected, atol=1e-5)
    assert len(changed(conditioning[0][0], out)) == (2 if mode == "keep_rest" else 75)


def test_dropped_tokens_and_the_next_injector():
    """The first word's rest is taken out, so everything after it moved: the second WORD must follow."""
    text = "a teddy bear and a polar bear"
    of = new_adapter(config_for("sd15", category_mode="drop_rest"))
    conditioning, first = prompt("sd15", text, "teddy bear")
    _, second = prompt("sd15", text, "polar bear")
    assert first.columns == (2, 3) and second.columns == (6, 7)
    one = inject(base("sd15")[0], conditioning, [], subject("sd15", 1, of=of), first, GLOBAL)
    two = inject(one.model, one.positive, [], subject("sd15", 2, of=of), second, GLOBAL)
    other = inject(base("sd15")[0], conditioning, [], subject("sd15", 2, of=of), second, GLOBAL)
    reverse = inject(other.model, other.positive, [], subject("sd15", 1, of=of), first, GLOBAL)
    assert torch.equal(two.positive[0][0], reverse.positive[0][0])
    d1 = word_delta(subject("sd15", 1, of=of), first.raw.mean(0, keepdim=True))[0, 0]
    d2 = word_delta(subject("sd15", 2, of=of), second.raw.mean(0, keepdim=True))[0, 0]
    source, rows = conditioning[0][0][0], two.positive[0][0][0]
    expected = torch.cat([source[:2], (source[2] + d1)[None], source[4:6], (source[6] + d2)[None], source[8:],
                          torch.zeros(2, 64)])
    assert torch.allclose(rows, expected, atol=1e-6)
    _, part = prompt("sd15", text, "bear", 1)
    with pytest.raises(LikenessError, match="part of another subject's word"):
        inject(one.model, one.positive, [], subject("sd15", 3, of=of), part, GLOBAL)


# -- through core's conditioning nodes -----------------------------------------------------------------
def test_hash_and_text_travel():
    conditioning, found = prompt("sd15")
    assert conditioning[0][1][HASH_KEY] == found.prompt_hash and conditioning[0][1][TEXT_KEY] == PROMPT
    placed = core.ConditioningSetArea().append(conditioning, 32, 32, 8, 8, 1.0)[0]
    assert placed[0][1][HASH_KEY] == found.prompt_hash
    assert HASH_KEY not in encode("sd15", PROMPT)[0][1]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("other", [
    "a wide beach", "a photo of a cat in the snow", f"{filler(90)}", "a photo of a cat on the beach by night"])
def test_concat(kind, other):
    """As `to` the word stays where it is, as `from` it moves by whole windows, whatever the other prompt says."""
    conditioning, found = prompt(kind)
    size, stock = WINDOWS[kind], encode(kind, other)
    ours, _ = prompt(kind, other, other.split()[0])
    shift = stock[0][0].shape[1]
    for with_hash in (stock, ours):
        as_to = core.ConditioningConcat().concat(conditioning, with_hash)[0]
        assert changed(as_to[0][0], into(as_to, found, kind).positive[0][0]) == [5]
        as_from = core.ConditioningConcat().concat(with_hash, conditioning)[0]
        assert changed(as_from[0][0], into(as_from, found, kind).positive[0][0]) == [5 + shift]
    assert shift % size == 0


def test_concat_in_the_middle_with_a_second_window():
    conditioning, found = prompt("sd15", f"{filler(80)} (cat:1.3)")
    stock = encode("sd15", "a beach")
    join = core.ConditioningConcat().concat
    three = join(join(stock, conditioning)[0], stock)[0]
    done = into(three, found)
    assert changed(three[0][0], done.positive[0][0]) == [77 + found.columns[0]]
    expected = three[0][0][0, 77 + found.columns[0]] + 1.3 * word_delta(subject("sd15", 1), found.raw)[0, 0]
    assert torch.allclose(done.positive[0][0][0, 77 + found.columns[0]], expected, atol=1e-5)


def test_combine():
    conditioning, found = prompt("sd15")
    other = encode("sd15", "a dog")
    done = into(conditioning + other, found, strengths=Strengths(1.0, 1.0))
    assert changed(conditioning[0][0], done.positive[0][0]) == [5] and torch.equal(done.positive[1][0], other[0][0])
    assert "1 of 2 prompts do not hold the word" in done.report
    number = [e[1]["model_conds"][stamps.KEY].cond[0, 0].item() for e in done.positive]
    assert number[0] > 0 and number[1] == 0


def test_average():
    conditioning, found = prompt("sd15")
    other, _ = prompt("sd15", "a dog", "dog")
    as_to = core.ConditioningAverage().addWeighted(conditioning, other, 0.7)[0]
    assert changed(as_to[0][0], into(as_to, found).positive[0][0]) == [5]
    as_from = core.ConditioningAverage().addWeighted(other, conditioning, 0.7)[0]
    with pytest.raises(LikenessError) as caught:
        into(as_from, found)
    assert PROMPT in str(caught.value) and '"a dog"' in str(caught.value)


@pytest.mark.parametrize("with_hash", [True, False])
@pytest.mark.parametrize("text", ["a dog in the snow", "a photo of a cat in the snow", ""])
def test_a_word_of_another_prompt_is_refused(text, with_hash):
    """Also one that begins alike: the vectors at "cat" are the same there, the prompt is not."""
    _, found = prompt("sd15")
    conditioning = encode("sd15", text)
    if with_hash:
        conditioning = encode_prompt(base("sd15")[1], text, "zebra", on_missing="pass through")[0]
    with pytest.raises(LikenessError) as caught:
        into(conditioning, found)
    assert PROMPT in str(caught.value) and (f'"{text}"' in str(caught.value)) == with_hash


def test_the_same_prompt_from_cores_own_node_is_accepted():
    _, found = prompt("sd15")
    stock = encode("sd15", PROMPT)
    assert changed(stock[0][0], into(stock, found).positive[0][0]) == [5]


# -- the optional CONDITIONING input -------------------------------------------------------------------
def test_looking_up_in_a_prompt_of_another_node():
    clip = base("sd15")[1]
    stock = encode("sd15", PROMPT)
    stock = [[stock[0][0] * 1.5, {**stock[0][1], "kept": 1}]]  # an encoder with rules of its own
    conditioning, found, there = encode_prompt(clip, PROMPT, "cat", conditioning=stock)
    assert there and conditioning[0][0] is stock[0][0] and conditioning[0][1]["kept"] == 1
    assert HASH_KEY not in stock[0][1] and conditioning[0][1][HASH_KEY] == found.prompt_hash
    assert torch.equal(found.rows, stock[0][0][0, [5]]) and found.rows is not stock[0][0]
    assert changed(stock[0][0], into(conditioning, found).positive[0][0]) == [5]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("text", ["a dog in the snow", "robot", "", f"{filler(20)}"])
def test_looking_up_in_a_prompt_of_another_text_is_refused(kind, text):
    """It has as many rows, and nothing in it says which text it was."""
    clip, stock = base(kind)[1], encode(kind, text)
    with pytest.raises(LikenessError, match="another text than") as caught:
        encode_prompt(clip, PROMPT, "cat", conditioning=stock)
    assert PROMPT in str(caught.value)
    # beside the right one it stays without our hash, so that nothing is injected into it
    conditioning, found, _ = encode_prompt(clip, PROMPT, "cat", conditioning=[*stock, *encode(kind, PROMPT)])
    assert HASH_KEY not in conditioning[0][1] and conditioning[1][1][HASH_KEY] == found.prompt_hash
    assert torch.equal(found.rows, encode(kind, PROMPT)[0][0][0, [5]])
    assert not encode_prompt(clip, PROMPT, "zebra", conditioning=stock, on_missing="pass through")[2]


@pytest.mark.parametrize("kind", ALL)
def test_variants_of_the_same_text_are_accepted(kind):
    """Prompt weights of another scheme, rows of another layer, a scale: the word stands there all the same."""
    clip = base(kind)[1]
    skipped = clip.clone()
    skipped.clip_layer(-2 if kind != "sdxl" else -1)
    for other in (encode(kind, "a photo of a (cat:1.4) on the (beach:0.6)"), encode(kind, "a photo of a (cat:0.3) on the beach"),
                  skipped.encode_from_tokens_scheduled(clip.tokenize(PROMPT))):
        conditioning, found, there = encode_prompt(clip, PROMPT, "cat", conditioning=other)
        assert there and conditioning[0][1][HASH_KEY] == found.prompt_hash
        assert changed(other[0][0], into(conditioning, found, kind).positive[0][0]) == [5]


def test_looking_up_in_a_concat_of_other_nodes():
    clip, join = base("sd15")[1], core.ConditioningConcat().concat
    own, other = encode("sd15", PROMPT), encode("sd15", "a beach")
    for joined, column in ((join(own, other)[0], 5), (join(other, own)[0], 82)):
        conditioning, found, _ = encode_prompt(clip, PROMPT, "cat", conditioning=joined)
        assert changed(joined[0][0], into(conditioning, found).positive[0][0]) == [column]
    with pytest.raises(LikenessError, match="154 rows and none"):
        encode_prompt(clip, PROMPT, "cat", conditioning=join(other, other)[0])


def test_looking_up_what_cannot_be_there():
    clip = base("sd15")[1]
    long = f"{filler(80)} cat"
    with pytest.raises(LikenessError, match="77 rows, but the word stands at row 83"):
        encode_prompt(clip, long, "cat", conditioning=encode("sd15", "a dog"))
    ours, _ = prompt("sd15", "a dog", "dog")
    with pytest.raises(LikenessError) as caught:
        encode_prompt(clip, PROMPT, "cat", conditioning=ours)
    assert '"a dog"' in str(caught.value) and PROMPT in str(caught.value)


# -- S+ ------------------------------------------------------------------------------------------------
def splus_tokens(word: Word, vectors: list[dict[str, torch.Tensor]]) -> dict[str, list]:
    """A placeholder vector right after the word, another one for each layer: the variants as windows."""
    place = word.columns[-1] + 1
    return {key: [[*windows[0][:place], (vector[key], 1.0), *windows[0][place:-1]] for vector in vectors]
            for key, windows in word.tokens.items()}


class PerLayerText:
    """What a method with S+ does: each attention layer reads its own text, on stamped rows only."""

    def __init__(self, stack: torch.Tensor, number: int | None):
        self.stack, self.number = stack, number

    def on(self, model: Any) -> Any:
        model = model.clone()
        stamps.add_reader(model)
        model.set_model_attn2_patch(self)
        return model

    def __call__(self, q, k, v, extra):
        found = extra.get(stamps.KEY)
        layer = extra["transformer_index"] % self.stack.shape[0]
        every = self.number is None
        rows = [row for row in range(k.shape[0]) if every or (found and self.number in found.ids[row])]
        if rows:
            k = k.clone()
            k[rows] = self.stack[layer].to(k)
        return q, k, k


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "mini"])
def test_splus_through_the_same_sockets(kind):
    """WORD's tokens and CLIP are enough for a per-layer text stack, the stamps for its rows."""
    conditioning, word = prompt(kind)
    layers, size = 5, WINDOWS[kind]
    widths = {"sd15": {"l": 64}, "sdxl": {"l": 64, "g": 96}, "mini": {"l": 128}}[kind]
    vectors = [{key: draw(70 + k, width) for key, width in widths.items()} for k in range(layers)]
    tokens = splus_tokens(word, vectors)
    rows = word.clip.encode_from_tokens_scheduled(tokens)[0][0]
    stack = rows.reshape(layers, size, -1)
    apart = [word.clip.encode_from_tokens_scheduled({key: [windows[k]] for key, windows in tokens.items()})[0][0]
             for k in range(layers)]
    assert torch.allclose(stack, torch.cat(apart), atol=1e-5)
    assert not torch.equal(stack[0], stack[1])
    place = word.columns[-1] + 1
    assert torch.allclose(stack[:, :place], conditioning[0][0][:, :place].expand(layers, -1, -1), atol=1e-5)

    model, negative, latent = base(kind)[0], encode(kind, "blurry"), latent_of(kind)
    positive = [stamps.stamped(entry, 41) for entry in conditioning]
    negative = [stamps.stamped(entry, 0) for entry in negative]
    out = run_guider(cfg_guider(PerLayerText(stack, 41).on(model), positive, negative, 3.0), latent)
    cond = run_guider(cfg_guider(PerLayerText(stack, None).on(model), positive, negative, 1.0), latent)
    uncond = run_guider(cfg_guider(model, negative, negative, 1.0), latent)
    hand = uncond + 3.0 * (cond - uncond)
    assert (out - hand).abs().max() < 1e-4 * hand.abs().max()
    assert not torch.allclose(cond, run_guider(cfg_guider(model, positive, negative, 1.0), latent), rtol=1e-3)


def test_the_word_keeps_what_it_was_made_of():
    _, word = prompt("sd15")
    assert word.clip is base("sd15")[1] and ids_at(word) == [CAT]
    assert adapter("sd15").config.width == word.rows.shape[-1]
