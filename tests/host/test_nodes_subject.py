"""The nodes of families load, subject and inject: what they give, and one clear sentence for each bad input."""
from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness import mini as mini_module

PROMPT = "a photo of a cat in the snow"


def error():
    from likeness.models.common.errors import LikenessError
    return LikenessError


def refuses(match):
    """One sentence for the artist: it says what to do after a semicolon or a colon, and ends."""
    return pytest.raises(error(), match=match)


def node(nodes, name, *values, **named):
    with torch.inference_mode():
        return nodes[f"Likeness_{name}"].execute(*values, **named).args


@pytest.fixture(autouse=True)
def folders(host, nodes, tmp_path, monkeypatch):
    """Private output, input and temp folders, and empty model folders."""
    import folder_paths

    places = SimpleNamespace(likeness=tmp_path / "likeness", clip_vision=tmp_path / "clip_vision")
    for name in ("output", "input", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
        setattr(places, name, tmp_path / name)
    for name in ("likeness", "clip_vision"):
        entry = ([str(tmp_path / name)], folder_paths.supported_pt_extensions)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
        folder_paths.filename_list_cache.pop(name, None)
    yield places
    for name in ("likeness", "clip_vision"):  # the host would go on serving the test's list
        folder_paths.filename_list_cache.pop(name, None)


@pytest.fixture
def filled(folders, mini):
    """Adapter in models/likeness, encoders in models/clip_vision."""
    folders.likeness.mkdir()
    folders.clip_vision.mkdir()
    shutil.copy(mini.folder / mini_module.ADAPTER, folders.likeness / "any name.safetensors")
    for name in (mini_module.DINO, mini_module.MAE):
        shutil.copy(mini.folder / name, folders.clip_vision / name)
    return folders


def picture(count=1, height=50, width=70, channels=3, seed=0):
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


def masks(*filled, height=50, width=70):
    """One mask for each argument: True holds a subject, False is empty."""
    out = torch.zeros(len(filled), height, width)
    for number, full in enumerate(filled):
        out[number, 10:40, 20 + number:50] = float(full)
    return out


def subject_of(nodes, mini, seed=0, count=1, combine="concat", adapter=None):
    values = (adapter or mini.adapter, mini.encoders, picture(count, seed=seed), combine, "error")
    return node(nodes, "ExtractID", *values, mask=masks(*[True] * count))[0]


# -- loaders -------------------------------------------------------------------------------------------
def test_load_adapter_takes_the_encoders_by_their_contents(nodes, mini, filled):
    adapter, encoders, text = node(nodes, "LoadAdapter", "any name.safetensors")
    assert adapter.method == "custany" and adapter.sha256 == mini.adapter.sha256
    assert encoders.hash == mini.encoders.hash
    assert [item.name for item in encoders.items] == [mini_module.DINO, mini_module.MAE]
    assert str(filled.clip_vision) in text and "dinov2, width 48" in text and "random numbers" in text
    assert "not the very file" not in text


def test_load_adapter_says_when_an_encoder_is_another_file(nodes, mini, filled):
    files = mini_module.pack("models.common.files")
    files.save(filled.clip_vision / mini_module.DINO, mini_module.encoder_state("dinov2", 77),
               mini_module.encoder_metadata("dinov2"))
    adapter, encoders, text = node(nodes, "LoadAdapter", "any name.safetensors")
    assert text.count("not the very file of the training") == 1
    # and where an artist looks, since the loader shows nothing on itself
    said = node(nodes, "ExtractID", adapter, encoders, picture(), "concat", "error")[2]
    assert said.count(f"note: {mini_module.DINO} is not the very file") == 1 and said.count("note:") == 1
    assert "note:" not in node(nodes, "ExtractID", mini.adapter, mini.encoders, picture(), "concat", "error")[2]
    # the right one wins, though it stands behind the other in the list
    shutil.copy(mini.folder / mini_module.DINO, filled.clip_vision / "z.safetensors")
    text = node(nodes, "LoadAdapter", "any name.safetensors")[2]
    assert "z.safetensors" in text and "not the very file" not in text


def test_load_adapter_warns_of_a_plain_vit(nodes, filled):
    files = mini_module.pack("models.common.files")
    state, metadata = mini_module.encoder_state("mae", 77), mini_module.encoder_metadata("mae")
    plain = {key: value for key, value in metadata.items() if key != "likeness.family"}
    files.save(filled.clip_vision / mini_module.MAE, state, plain)
    assert "WARNING: a plain ViT" in node(nodes, "LoadAdapter", "any name.safetensors")[2]
    files.save(filled.clip_vision / mini_module.MAE, {**state, "decoder_pos_embed": state["cls_token"]
                                                      if "cls_token" in state else next(iter(state.values()))[:1]}, plain)
    text = node(nodes, "LoadAdapter", "any name.safetensors")[2]
    assert "not the very file" in text and "WARNING" not in text


def test_no_model_files(nodes, folders):
    """Missing and empty folder: a choice that says so, and a sentence that names the folder."""
    from likeness.nodes import _paths
    for _ in range(2):
        for name, places in (("LoadAdapter", (folders.likeness,)),
                             ("LoadEncoders", (folders.likeness, folders.clip_vision))):
            cls = nodes[f"Likeness_{name}"]
            assert cls.define_schema().inputs[0].options == [_paths.NO_FILE]
            sentence = cls.validate_inputs(_paths.NO_FILE)
            assert all(str(place) in sentence for place in places) and "Load Miniature World" in sentence
            with refuses("no model file"):
                node(nodes, name, _paths.NO_FILE, *(["none"] if name == "LoadEncoders" else []))
            cls.fingerprint_inputs(_paths.NO_FILE)
        folders.likeness.mkdir(exist_ok=True)
        folders.clip_vision.mkdir(exist_ok=True)
    assert "not in" in nodes["Likeness_LoadAdapter"].validate_inputs("gone.safetensors")


def test_a_folder_that_was_deleted_takes_no_node_away(nodes, filled):
    """The host remembers a folder's time and trips over it when it is gone."""
    from likeness.nodes import _paths
    for _ in range(2):  # the second time from the host's memory
        assert "any name.safetensors" in _paths.adapter_files()
    shutil.rmtree(filled.likeness)
    assert _paths.adapter_files() == [_paths.NO_FILE]
    filled.likeness.mkdir()


def test_files_that_are_no_adapters(nodes, mini, filled):
    folder = filled.likeness
    whole = (mini.folder / mini_module.ADAPTER).read_bytes()
    (folder / "page.safetensors").write_text("<!DOCTYPE html><html>log in</html>")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (folder / "cut.safetensors").write_bytes(whole[:-1000])
    (folder / "empty.safetensors").write_bytes(b"")
    shutil.copy(mini.folder / mini_module.DINO, folder / "encoder.safetensors")
    shutil.copy(mini.folder / mini_module.BASE, folder / "base.safetensors")
    expected = {"page": "web page", "pointer": "git-LFS", "cut": "cut off", "empty": "is empty",
                "encoder": "no subject adapter", "base": "no subject adapter"}
    for name, match in expected.items():
        assert nodes["Likeness_LoadAdapter"].validate_inputs(f"{name}.safetensors") is True
        with refuses(match):
            node(nodes, "LoadAdapter", f"{name}.safetensors")
    # and none of them stops the good one from finding its encoders
    assert len(node(nodes, "LoadAdapter", "any name.safetensors")[1].items) == 2


def test_a_missing_encoder_is_named(nodes, filled):
    (filled.clip_vision / mini_module.MAE).unlink()
    with refuses("needs a mae encoder of width 48, found dino.safetensors"):
        node(nodes, "LoadAdapter", "any name.safetensors")


def test_a_changed_file_is_read_again(nodes, mini, filled):
    cls = nodes["Likeness_LoadAdapter"]
    before = cls.fingerprint_inputs("any name.safetensors")
    assert before == cls.fingerprint_inputs("any name.safetensors")
    shutil.copy(mini.folder / mini_module.UNTRAINED, filled.likeness / "any name.safetensors")
    assert cls.fingerprint_inputs("any name.safetensors") != before


def test_load_encoders(nodes, mini, filled):
    encoders, text = node(nodes, "LoadEncoders", mini_module.DINO, mini_module.MAE)
    assert encoders.hash == mini.encoders.hash and text.count("encoder ") == 2
    one, _ = node(nodes, "LoadEncoders", mini_module.MAE, "none")
    assert [item.config.family for item in one.items] == ["mae"]
    with refuses("not a vision encoder"):
        node(nodes, "LoadEncoders", "any name.safetensors", "none")
    with refuses("trained with dinov2 48 . mae 48, the encoders are mae 48"):
        node(nodes, "ExtractID", mini.adapter, one, picture(), "concat", "error")
    choices = nodes["Likeness_LoadEncoders"].define_schema().inputs
    assert choices[0].options == ["any name.safetensors", mini_module.DINO, mini_module.MAE]
    assert choices[1].options[0] == "none"


def test_load_miniature(nodes, mini, monkeypatch, tmp_path):
    demo = mini_module.pack("models.hosting.demo")
    monkeypatch.setattr(demo, "WEIGHTS", mini.folder)
    model, clip, vae, adapter, encoders = node(nodes, "LoadDemo", "CustAny")
    assert adapter.sha256 == mini.adapter.sha256 and encoders.hash == mini.encoders.hash
    assert model.model.model_config.unet_config["context_dim"] == adapter.config.width
    assert clip.tokenize("cat") and vae.latent_channels == 48
    monkeypatch.setattr(demo, "WEIGHTS", tmp_path)
    with refuses("missing from this copy of the pack"):
        node(nodes, "LoadDemo", "CustAny")


# -- reference -----------------------------------------------------------------------------------------
def test_prepare_reference(nodes):
    image, mask = picture(2), masks(True, True)
    kept = image.clone(), mask.clone()
    out, cut, found = node(nodes, "PrepareReference", image, "subject on white", 0.1, 64, "error", mask=mask)
    assert out.shape == (2, 64, 64, 3) and cut.shape == (2, 64, 64) and found is True
    assert (out[:, :3] == 1).all() and (cut[:, :3] == 0).all() and cut[:, 32, 32].min() == 1
    assert torch.equal(image, kept[0]) and torch.equal(mask, kept[1])
    own = node(nodes, "PrepareReference", image, "subject on white", 0.0, 0, "error", mask=mask)[0]
    assert own.shape == (2, 30, 30, 3) and torch.equal(own[0], image[0, 10:40, 20:50])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (37, 5)])
def test_odd_pictures(nodes, mini, channels, size):
    image = picture(1, *size, channels)
    if channels == 4:
        image[..., 3] = 1
    out, cut, found = node(nodes, "PrepareReference", image, "subject on white", 0.1, 32, "error")
    assert out.shape == (1, 32, 32, 3) and torch.isfinite(out).all() and found
    subject, seen, _, _ = node(nodes, "ExtractID", mini.adapter, mini.encoders, image, "concat", "error")
    assert seen.shape == (1, 64, 64, 3) and torch.isfinite(subject.get("local")).all()


@pytest.mark.parametrize("shape", [(50, 70), (1, 50, 70), (1, 1, 50, 70), (1, 50, 70, 1), (1, 25, 35)])
def test_masks_of_any_shape(nodes, shape):
    mask = torch.ones(shape)
    out, cut, _ = node(nodes, "PrepareReference", picture(), "subject on white", 0.0, 70, "error", mask=mask)
    assert torch.equal(out[:, 10:60], picture()) and cut.sum() == 50 * 70


def test_empty_masks(nodes, mini):
    image, empty = picture(3), masks(True, False, True)
    with refuses("mask of picture 2 of 3 is empty.*Invert Mask.*pass through"):
        node(nodes, "PrepareReference", image, "subject on white", 0.1, 64, "error", mask=empty)
    out, cut, found = node(nodes, "PrepareReference", image, "subject on white", 0.1, 70, "pass through", mask=empty)
    assert found is True and cut[1].sum() == 0 and torch.equal(out[1, 10:60], image[1])
    assert node(nodes, "PrepareReference", image, "subject on white", 0.1, 64, "pass through", mask=empty * 0)[2] is False

    values = (mini.adapter, mini.encoders, image)
    with refuses("mask of picture 2 of 3 is empty"):
        node(nodes, "ExtractID", *values, "concat", "error", mask=empty)
    subject, seen, text, found = node(nodes, "ExtractID", *values, "concat", "pass through", mask=empty)
    assert subject.pictures == 2 and seen.shape[0] == 2 and found and "2 of 3" in text
    with refuses("one per latent"):
        node(nodes, "ExtractID", *values, "one per latent", "pass through", mask=empty)
    subject, seen, text, found = node(nodes, "ExtractID", *values, "concat", "pass through", mask=empty * 0)
    assert subject.pictures == 0 and subject.adapter is mini.adapter and not found and seen.shape[0] == 3


def test_counts_that_do_not_fit(nodes, mini):
    for count, mask in ((3, masks(True, True)), (1, masks(True, True))):
        with refuses(f"{count} pictures but 2 masks"):
            node(nodes, "ExtractID", mini.adapter, mini.encoders, picture(count), "concat", "error", mask=mask)


# -- ID Extractor --------------------------------------------------------------------------------------
def test_extract(nodes, mini, folders):
    image, mask = picture(2), masks(True, True)
    kept = image.clone(), mask.clone()
    output = nodes["Likeness_ExtractID"].execute(mini.adapter, mini.encoders, image, "concat", "error", mask)
    subject, seen, text, found = output.args
    assert subject.get("global").shape == (2, 2, 128) and subject.get("local").shape == (2, 64, 128)
    assert (subject.method, subject.pairing, subject.base, subject.width) == ("custany", "all", "miniature", 128)
    assert subject.adapter is mini.adapter and subject.encoder_hash == mini.encoders.hash and found is True
    assert torch.equal(image, kept[0]) and torch.equal(mask, kept[1])
    # the preview is what the encoders saw: the same picture without a mask gives the same tokens
    again = node(nodes, "ExtractID", mini.adapter, mini.encoders, seen, "concat", "error",
                 mask=torch.ones(2, 64, 64), margin=0.0)[0]
    assert torch.equal(subject.get("local"), again.get("local"))
    shown = output.ui.as_dict()["images"]
    assert len(shown) == 2 and all((folders.temp / item["subfolder"] / item["filename"]).is_file() for item in shown)
    assert "2 x (2 global + 64 local)" in text and "25.7 %" in text and "concat" in text


def test_combine(nodes, mini):
    both = subject_of(nodes, mini, count=2)
    average = subject_of(nodes, mini, count=2, combine="average")
    each = subject_of(nodes, mini, count=2, combine="one per latent")
    assert torch.equal(average.get("local"), both.get("local").mean(0, keepdim=True))
    assert each.pairing == "per latent" and torch.equal(each.get("local"), both.get("local"))
    assert len({s.source_hash for s in (both, average, each)}) == 1
    assert subject_of(nodes, mini, seed=1, count=2).source_hash != both.source_hash


def test_many_pictures_are_encoded_in_chunks(nodes, mini, monkeypatch):
    import comfy.utils
    steps = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update", lambda self, value: steps.append(self.total))
    many = subject_of(nodes, mini, count=20)
    assert many.pictures == 20 and steps == [6] * 6  # two encoders, three chunks
    image, mask = picture(20)[17:18], masks(*[True] * 20)[17:18]
    one = node(nodes, "ExtractID", mini.adapter, mini.encoders, image, "concat", "error", mask=mask)[0]
    assert torch.allclose(many.get("local")[17], one.get("local")[0], atol=1e-5)


def test_cancel_and_again(nodes, mini):
    import comfy.model_management as management
    expected = subject_of(nodes, mini, count=9)
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        subject_of(nodes, mini, count=9)
    assert torch.equal(subject_of(nodes, mini, count=9).get("local"), expected.get("local"))


def test_alpha_serves_as_mask(nodes, mini):
    image, mask = picture(), masks(True)
    expected = node(nodes, "ExtractID", mini.adapter, mini.encoders, image, "concat", "error", mask=mask)
    rgba = torch.cat([image, mask[..., None]], -1)
    got = node(nodes, "ExtractID", mini.adapter, mini.encoders, rgba, "concat", "error")
    assert torch.equal(expected[1], got[1]) and "25.7 %" in got[2]
    plain = node(nodes, "ExtractID", mini.adapter, mini.encoders, image, "concat", "error")
    assert "no mask" in plain[2] and not torch.equal(plain[1], got[1])


def test_another_margin_is_told(nodes, mini):
    values = (mini.adapter, mini.encoders, picture(), "concat", "error")
    assert "trained with 0.1" in node(nodes, "ExtractID", *values, mask=masks(True), margin=0.3)[2]
    assert "trained with" not in node(nodes, "ExtractID", *values, mask=masks(True))[2]


# -- prompt and injector -------------------------------------------------------------------------------
def test_subject_prompt(nodes, mini):
    conditioning, word, text, found = node(nodes, "EncodePrompt", mini.clip, PROMPT, "Cat", 0, "error")
    assert found and word.columns == (5,) and "columns 5" in text
    other = mini.clip.encode_from_tokens_scheduled(mini.clip.tokenize(PROMPT))
    assert torch.equal(conditioning[0][0], other[0][0])
    same, place, _, _ = node(nodes, "EncodePrompt", mini.clip, PROMPT, "cat", 0, "error", conditioning=other)
    assert torch.equal(same[0][0], other[0][0]) and place.columns == word.columns
    assert "likeness_prompt" not in str(other[0][1].keys())


@pytest.mark.parametrize(("text", "word", "occurrence", "match"), [
    (PROMPT, "cta", 0, "\"cta\" is not in the prompt.*did you mean cat"),
    (PROMPT, "cat", 2, "1 time, occurrence 2"),
    (PROMPT, " ", 0, "word is empty"),
    ("catalogue", "cat", 0, "not in the prompt"),
])
def test_words_that_are_not_there(nodes, mini, text, word, occurrence, match):
    with refuses(match):
        node(nodes, "EncodePrompt", mini.clip, text, word, occurrence, "error")


def test_a_missing_word_may_pass(nodes, mini):
    conditioning, word, text, found = node(nodes, "EncodePrompt", mini.clip, PROMPT, "dog", 0, "pass through")
    assert not found and "not in the prompt" in text
    out = node(nodes, "DualLevelInjector", mini.model, conditioning, conditioning, subject_of(nodes, mini), word,
               "custom", 1.0, 1.0, 0.0, 1.0)
    assert out[0] is mini.model and out[1] is conditioning and "passed through" in out[3]


def test_prompt_errors(nodes, mini):
    with refuses("CLIP input is empty"):
        node(nodes, "EncodePrompt", None, PROMPT, "cat", 0, "error")
    encoded = node(nodes, "EncodePrompt", mini.clip, "a dog", "dog", 0, "error")[0]
    with refuses("encoded from \"a dog\", the text here is"):
        node(nodes, "EncodePrompt", mini.clip, PROMPT, "cat", 0, "error", conditioning=encoded)


@pytest.fixture
def graph(nodes, mini):
    """Function: keywords of the injector -> its four outputs, for one subject and prompt."""
    positive, word, _, _ = node(nodes, "EncodePrompt", mini.clip, PROMPT, "cat", 0, "error")
    negative = mini.clip.encode_from_tokens_scheduled(mini.clip.tokenize(""))
    subject = subject_of(nodes, mini)

    def run(preset="custom", global_=1.0, local=1.0, start=0.0, end=1.0, subject=subject, **more):
        return node(nodes, "DualLevelInjector", mini.model, positive, negative, subject, word, preset, global_, local,
                    start, end, **more)
    return run


def plan(model):
    return model.model_options["transformer_options"]["patches"]["middle_patch"][0].plan


def test_injector(graph, mini):
    model, positive, negative, text = graph(global_=0.5, local=0.75)
    assert model is not mini.model and dict(plan(model).strength) == {f"output.{n}.0": 0.75 for n in range(4)}
    assert "global 0.5" in text and "local 0.75" in text and "preset" not in text
    assert "patches" not in mini.model.model_options["transformer_options"]


@pytest.mark.parametrize(("preset", "levels"), [
    ("balanced", (1.0, 1.0)), ("strong likeness", (1.15, 1.25)), ("free pose", (1.0, 0.6)),
    ("word only", (1.0, 0.0)), ("details only", (0.0, 1.0)),
])
def test_a_preset_replaces_the_sliders_and_says_so(graph, preset, levels):
    got, expected = graph(preset, 0.1, 0.2), graph("custom", *levels)
    assert got[3].splitlines()[0].startswith(f"preset {preset}: global {levels[0]:g}, local {levels[1]:g};")
    assert got[3].splitlines()[1:] == expected[3].splitlines()
    assert torch.equal(got[1][0][0], expected[1][0][0])
    if levels[1]:
        assert plan(got[0]).number == plan(expected[0]).number


def test_an_empty_subject_passes_through(graph, mini, nodes):
    empty = node(nodes, "ExtractID", mini.adapter, mini.encoders, picture(), "concat", "pass through",
                 mask=masks(False))[0]
    model, _, _, text = graph(subject=empty)
    assert model is mini.model and "empty: passed through" in text
    with refuses("nothing to save"):
        node(nodes, "SaveSubject", empty, "x")


def test_injector_errors(graph, nodes):
    validate = nodes["Likeness_DualLevelInjector"].validate_inputs
    for start, end in ((0.8, 0.5), (0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        assert f"{start:g} to {end:g}" in validate(start, end)
    assert validate(0.0, 1.0) is True and validate(None, 0.4) is True
    with refuses("start must be"):
        graph(start=0.8, end=0.5)
    with refuses("curve input got a list"):
        graph(curve=[[0, 0], [1, 1]])
    with refuses("mask is empty"):
        graph(mask=masks(False))
    with refuses("layer weights name output.9.0"):
        graph(layer_weights=(("output.9.0", 0.5),))


def test_an_adapter_of_another_base(nodes, mini, graph, tiny_checkpoint):
    model, clip, _ = tiny_checkpoint("sd15")
    positive, word, _, _ = node(nodes, "EncodePrompt", clip, PROMPT, "cat", 0, "error")
    with refuses("trained for the miniature .text width 128."):
        node(nodes, "DualLevelInjector", model, positive, positive, subject_of(nodes, mini), word, "custom", 1.0, 1.0,
             0.0, 1.0)
    flow = tiny_checkpoint("sd3")[0]
    with refuses("another kind of network"):
        node(nodes, "DualLevelInjector", flow, positive, positive, subject_of(nodes, mini), word, "custom", 1.0, 1.0,
             0.0, 1.0)


def test_a_picture_through_all_nodes(graph, mini):
    """The subject changes the picture, each level for itself, and the same graph gives the same picture."""
    import comfy.sample

    def sample(out):
        latent = torch.zeros(1, 48, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 1)
        with torch.inference_mode():
            return comfy.sample.sample(out[0], noise, 1, 4.0, "euler", "normal", out[1], out[2], latent, seed=1)

    plain, both = sample(graph("custom", 0.0, 0.0)), sample(graph())
    word, details = sample(graph("word only")), sample(graph("details only"))
    for one, other in ((plain, both), (plain, word), (plain, details), (both, word), (both, details)):
        assert (one - other).abs().max() > 1e-4
    assert torch.equal(both, sample(graph()))


def test_layer_weights(nodes, mini, graph):
    weights, text = node(nodes, "LayerWeights", mini.adapter, "custom", 0.5, 1.0, 0.0, 1.0, 1.0, "output.3.0: 0.25")
    assert weights == (("output.0.0", 0.5), ("output.1.0", 0.5), ("output.2.0", 0.0), ("output.3.0", 0.25))
    assert "coarse: output.0.0: 0.5" in text and "no such layers" in text
    out = graph(local=2.0, layer_weights=weights)
    assert dict(plan(out[0]).strength) == {"output.0.0": 1.0, "output.1.0": 1.0, "output.3.0": 0.5}
    preset, _ = node(nodes, "LayerWeights", mini.adapter, "fine", 0.5, 1.0, 0.0, 1.0, 1.0)
    assert [factor for _, factor in preset] == [0.0, 0.0, 1.0, 1.0]
    with refuses("cannot be read"):
        node(nodes, "LayerWeights", mini.adapter, "all", 1.0, 1.0, 1.0, 1.0, 1.0, "output.3.0 0.5")


# -- saved subjects ------------------------------------------------------------------------------------
def load(nodes, name, adapter, accept=False, **more):
    return node(nodes, "LoadSubject", name, adapter, accept, **more)


def test_save_and_load(nodes, mini, folders):
    subject = subject_of(nodes, mini, count=2, combine="one per latent")
    output = nodes["Likeness_SaveSubject"].execute(subject, "pets/cat")
    path = Path(output.args[0])
    assert path == folders.output / "likeness" / "subjects" / "pets" / "cat_00001_.safetensors" and path.is_file()
    assert output.ui.as_dict() == {"text": (str(path),)}
    assert node(nodes, "SaveSubject", subject, "pets/cat")[0].endswith("cat_00002_.safetensors")
    assert not list(path.parent.glob("*.tmp"))
    choices = nodes["Likeness_LoadSubject"].define_schema().inputs[0].options
    assert choices == ["pets/cat_00001_.safetensors [output]", "pets/cat_00002_.safetensors [output]"]
    assert nodes["Likeness_LoadSubject"].validate_inputs(choices[0]) is True
    loaded, text = load(nodes, choices[0], mini.adapter, encoders=mini.encoders)
    assert loaded._replace(tokens=()) == subject._replace(tokens=()) and "note" not in text
    for name, tensor in subject.tokens:
        assert torch.equal(loaded.get(name), tensor)
    load(nodes, choices[0], mini.adapter)


def test_the_other_folders(nodes, mini, folders):
    from likeness.nodes import _paths
    assert nodes["Likeness_LoadSubject"].define_schema().inputs[0].options == [_paths.nothing_saved(_paths.SUBJECTS)]
    sentence = nodes["Likeness_LoadSubject"].validate_inputs(_paths.nothing_saved(_paths.SUBJECTS))
    assert str(folders.input) in sentence and str(folders.likeness / "subjects") in sentence
    with refuses("no saved subject yet"):
        load(nodes, _paths.nothing_saved(_paths.SUBJECTS), mini.adapter)
    path = Path(node(nodes, "SaveSubject", subject_of(nodes, mini), "cat")[0])
    (folders.likeness / "subjects" / "pets").mkdir(parents=True)
    shutil.copy(path, folders.input / "mine.safetensors")
    shutil.move(path, folders.likeness / "subjects" / "pets" / "cat.safetensors")
    assert list(_paths.saved_files(_paths.SUBJECTS)) == ["mine.safetensors [input]", "pets/cat.safetensors [models]"]
    for name in _paths.saved_files(_paths.SUBJECTS):
        assert load(nodes, name, mini.adapter)[0].pictures == 1
    # a saved subject is no choice of the model loaders
    assert _paths.adapter_files() == [_paths.NO_FILE]
    before = nodes["Likeness_LoadSubject"].fingerprint_inputs("mine.safetensors [input]")
    node(nodes, "SaveSubject", subject_of(nodes, mini, seed=2, count=2), "other")
    shutil.copy(folders.output / "likeness/subjects/other_00001_.safetensors", folders.input / "mine.safetensors")
    assert nodes["Likeness_LoadSubject"].fingerprint_inputs("mine.safetensors [input]") != before


@pytest.mark.parametrize("prefix", ["../../out", "a/../../../out"])
def test_names_that_lead_out_of_the_folder(nodes, mini, prefix):
    with refuses("leads out of the folder"):
        node(nodes, "SaveSubject", subject_of(nodes, mini), prefix)


@pytest.fixture
def saved(nodes, mini, folders):
    """Function: changes of the metadata, other tokens -> name of a saved subject that is like that."""
    files = mini_module.pack("models.common.files")
    path = Path(node(nodes, "SaveSubject", subject_of(nodes, mini), "cat")[0])
    tensors, metadata = files.load(path)

    def save(tokens=None, **changes):
        files.save(path, tensors if tokens is None else tokens, {**metadata, **changes})
        return f"{path.name} [output]"
    return save


def test_a_subject_of_another_adapter(nodes, mini, saved):
    name = saved()
    with refuses("made with the adapter custany.safetensors .*connected one is untrained.safetensors"):
        load(nodes, name, mini.untrained)
    subject, text = load(nodes, name, mini.untrained, True)
    assert subject.adapter is mini.untrained and "accepted" in text
    for changes in ({"base": "sdxl"}, {"width": "2048"}, {"method": "realcustom"}):
        with refuses("load the adapter custany.safetensors"):
            load(nodes, saved(**changes), mini.adapter, True)


def test_a_subject_of_other_encoders(nodes, mini, saved):
    name = saved(encoder_hash="0123+4567")
    assert "note" in load(nodes, name, mini.adapter)[1]
    with refuses("other encoder files .0123.4567. than the connected ones"):
        load(nodes, name, mini.adapter, encoders=mini.encoders)
    assert "note" in load(nodes, name, mini.adapter, True, encoders=mini.encoders)[1]


def test_subjects_that_cannot_be_read(nodes, mini, saved, folders):
    with refuses("format version 2.*update the pack"):
        load(nodes, saved(format_version="2"), mini.adapter)
    with refuses("is no saved subject"):
        load(nodes, saved(format="pt"), mini.adapter)
    good = {"global": torch.zeros(1, 2, 128), "local": torch.zeros(1, 64, 128)}
    for tokens in ({"global": good["global"]}, {**good, "local": torch.zeros(1, 64, 64)},
                   {**good, "global": torch.zeros(1, 3, 128)}, {**good, "local": torch.zeros(2, 64, 128)},
                   {**good, "local": torch.full((1, 64, 128), float("nan"))}, {**good, "more": torch.zeros(1)}):
        with refuses("is damaged"):
            load(nodes, saved(tokens), mini.adapter)
    with refuses("is damaged"):
        load(nodes, saved(pairing="sometimes"), mini.adapter)
    (folders.input / "page.safetensors").write_text("<html>log in</html>")
    with refuses("web page"):
        load(nodes, "page.safetensors [input]", mini.adapter)
    with refuses("is not there"):
        load(nodes, "../secret.safetensors [input]", mini.adapter)


# -- blend ---------------------------------------------------------------------------------------------
def test_blend_average(nodes, mini):
    a, b = subject_of(nodes, mini), subject_of(nodes, mini, seed=5, count=2)
    for weight in (0.0, 0.3, 1.0):
        subject, text = node(nodes, "BlendSubjects", a, b, weight, "average")
        for name in ("global", "local"):
            x, y = (s.get(name).mean(0, keepdim=True) for s in (a, b))
            assert torch.allclose(subject.get(name), (1 - weight) * x + weight * y, atol=1e-6)
        assert subject.adapter is mini.adapter and f"{100 * weight:.0f} % subject_b" in text
    assert subject.source_hash not in (a.source_hash, b.source_hash)


def test_blend_concat(nodes, mini):
    """The local tokens of both, and a word that takes the weighted mean of the two subjects' means."""
    adapters = mini_module.pack("models.hosting.adapters")
    a, b, word = subject_of(nodes, mini), subject_of(nodes, mini, seed=5, count=3), torch.randn(1, 128)
    subject, text = node(nodes, "BlendSubjects", a, b, 0.25, "concat")
    assert torch.equal(subject.get("local"), torch.cat([a.get("local"), b.get("local")])) and "of both" in text
    mean = 0.75 * a.get("global").mean(0) + 0.25 * b.get("global").mean(0)
    assert torch.allclose(subject.get("global").mean(0), mean, atol=1e-6)
    expected = adapters.word_delta(a._replace(tokens=(("global", mean[None]), a.tokens[1])), word)
    assert torch.allclose(adapters.word_delta(subject, word), expected, atol=1e-5)


def test_blend_one_per_latent(nodes, mini):
    each = subject_of(nodes, mini, count=2, combine="one per latent")
    one, three = subject_of(nodes, mini, seed=5), subject_of(nodes, mini, seed=5, count=3)
    subject, _ = node(nodes, "BlendSubjects", each, one, 0.5, "average")
    assert subject.pairing == "per latent" and subject.get("local").shape == (2, 64, 128)
    assert torch.allclose(subject.get("local")[1], (each.get("local")[1] + one.get("local")[0]) / 2, atol=1e-6)
    subject, _ = node(nodes, "BlendSubjects", each, one, 0.5, "concat")
    assert subject.get("local").shape == (2, 128, 128) and subject.get("global").shape == (2, 2, 128)
    with refuses("for 2 latents, the other for 3"):
        node(nodes, "BlendSubjects", each, three, 0.5, "average")


def test_blend_refuses_other_adapters(nodes, mini):
    a, b = subject_of(nodes, mini), subject_of(nodes, mini, adapter=mini.untrained)
    with refuses("custany with the adapter custany.safetensors .*custany with the adapter untrained.safetensors"):
        node(nodes, "BlendSubjects", a, b, 0.5, "average")
    empty = node(nodes, "ExtractID", mini.adapter, mini.encoders, picture(), "concat", "pass through",
                 mask=masks(False))[0]
    assert node(nodes, "BlendSubjects", a, empty, 0.5, "concat")[0] is a
    assert node(nodes, "BlendSubjects", empty, a, 0.5, "average")[0] is a
