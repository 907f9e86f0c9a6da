"""Faults in PhotoMaker and InstantID."""
from __future__ import annotations

from harness.mutate import Mutation

HOSTING, PORTRAIT = "models/hosting/portrait_", "models/portrait/"
UNIT = ("tests/unit/test_portrait.py",)


def face(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/host/test_instantid.py::test_{name}" for name in names)


def maker(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/host/test_photomaker.py::test_{name}" for name in names)


ONE_CALL = face("cfg_in_one_call")
ROWS = maker("the_class_word_stands_once_for_every_token_and_carries_them")

MUTATIONS = [
    # -- modules
    Mutation("the source is not normalised with its own norm", PORTRAIT + "perceiver.py",
             "x, latents = self.norm1(x), self.norm2(latents)", "x, latents = self.norm2(x), self.norm2(latents)", UNIT),
    Mutation("the latents do not see themselves", PORTRAIT + "perceiver.py", "torch.cat([x, latents], 1)",
             "torch.cat([x, x], 1)", UNIT),
    Mutation("the perceiver has no residual round its MLP", PORTRAIT + "perceiver.py", "latents = latents + mlp(latents)",
             "latents = mlp(latents)", UNIT),
    Mutation("the fused word forgets the text", PORTRAIT + "photomaker.py", "self.mlp1(torch.cat([text, identity], -1)) + text",
             "self.mlp1(torch.cat([text, identity], -1))", UNIT),
    Mutation("identity before text", PORTRAIT + "photomaker.py", "torch.cat([text, identity], -1)",
             "torch.cat([identity, text], -1)", UNIT),
    Mutation("v2 looks at normed tokens", PORTRAIT + "photomaker.py", "hidden = self.vision(pixels, layers=(-1,)).hidden[0]",
             "hidden = self.vision.norm(self.vision(pixels, layers=(-1,)).hidden[0])", UNIT),
    Mutation("v2 keeps no residual", PORTRAIT + "photomaker.py", "return tokens + self.perceiver_resampler(tokens, hidden)",
             "return self.perceiver_resampler(tokens, hidden)", UNIT),
    Mutation("heads of the vision tower are 32 wide", PORTRAIT + "photomaker.py", "CLIP_HEAD_DIM, QFORMER_HEAD_DIM = 64, 128",
             "CLIP_HEAD_DIM, QFORMER_HEAD_DIM = 32, 128", UNIT),
    Mutation("unknown tensors are taken", PORTRAIT + "weights.py", '(got.keys() - wanted.keys(), "has the unknown part")',
             '(set(), "has the unknown part")', UNIT),
    Mutation("an IP-Adapter passes for InstantID", PORTRAIT + "instantid.py", "if resampler.source != EMBEDDING:", "if False:",
             UNIT),
    Mutation("the middle comes before the way up", PORTRAIT + "instantid.py", '("input", "output", "middle")',
             '("input", "middle", "output")', UNIT),
    # -- InstantID in the host
    Mutation("the negative gets the face", HOSTING + "instantid.py", "[stamped(entry, black) for entry in negative]",
             "[stamped(entry, number) for entry in negative]", ONE_CALL),
    Mutation("the free prompt gets the face", HOSTING + "instantid.py", "[stamped(entry, 0) for entry in free]",
             "[stamped(entry, number) for entry in free]", face("the_free_prompt_is_the_plain_one_and_shares_the_call")),
    Mutation("the free prompt loses its controls", HOSTING + "instantid.py", "        free = positive\n        lines",
             "        free = [[r, {k: v for k, v in o.items() if k != 'control'}] for r, o in positive]\n        lines",
             face("the_free_prompt_keeps_the_control_that_it_had")),
    Mutation("an empty face is a random one", HOSTING + "instantid.py", "torch.zeros_like(found[:1])",
             "torch.ones_like(found[:1])", ONE_CALL),
    Mutation("embeddings are normalised", HOSTING + "faces.py", "return face.embedding.float()",
             "return face.embedding.float() / face.embedding.norm()", ONE_CALL),
    Mutation("any recogniser will do", HOSTING + "faces.py", "if faces.space != space:", "if False:",
             face("wrong_wiring_is_one_sentence")),
    Mutation("the smallest face is taken", HOSTING + "faces.py", "max(frame, key=area)", "min(frame, key=area)",
             face("the_largest_face_of_a_picture")),
    Mutation("older nodes' gap is always there", HOSTING + "instantid.py", "if layers != ALL:", "if layers != '':",
             face("all_seventy_layers_or_sixty_as_older_nodes")),
    Mutation("the ControlNet reads the text", HOSTING + "control.py", 'part["crossattn_controlnet"] = context.to(x_noisy.device)',
             "context.to(x_noisy.device)", face("each_control_net_of_a_chain_reads_its_own")),
    Mutation("every ControlNet of the chain reads the face", HOSTING + "control.py",
             "before = self.previous_controlnet.get_control(x_noisy, t, cond,",
             'before = self.previous_controlnet.get_control(x_noisy, t, {**cond, "crossattn_controlnet": '
             'self._context(cond.get(KEY), x_noisy.shape[0] // batched_number)[1]},',
             face("each_control_net_of_a_chain_reads_its_own")),
    Mutation("the control acts without a stamp", HOSTING + "control.py", "if tokens is not None:",
             "tokens = next(iter(self.tokens.values())) if tokens is None else tokens\n            if True:",
             face("the_free_prompt_keeps_the_control_that_it_had")),
    Mutation("rows of the control are spread in the wrong place", HOSTING + "control.py", "    out[rows] = output",
             "    out[:len(rows)] = output", face("the_free_prompt_is_the_plain_one_and_shares_the_call")),
    Mutation("the negative loses the simple control", HOSTING + "instantid.py",
             "negative = with_control(negative, made, inner, read, inherited)",
             "negative = with_control(negative, made, inner, read)",
             face("a_control_for_the_positive_alone_still_reaches_the_negative")),
    Mutation("the control's network is not cleaned", HOSTING + "control.py", "        self.inner.cleanup()\n", "",
             face("the_host_counts_loads_and_cleans_the_control")),
    Mutation("pictures without a face are dropped", HOSTING + "instantid.py", "torch.stack(shown)", "torch.stack(found)",
             face("a_picture_without_a_face_keeps_its_latent")),
    Mutation("the control counts nobody", HOSTING + "control.py",
             "check_batch(None, max(tokens.shape[0] for tokens in self.tokens.values()), batch, transformer_options)", "pass",
             face("a_picture_without_a_face_keeps_its_latent")),
    Mutation("faces of a batch change places", HOSTING + "control.py", "tokens[(row % batch) % tokens.shape[0]]",
             "tokens[(row // batch) % tokens.shape[0]]", face("one_face_a_latent")),
    # -- PhotoMaker in the host
    Mutation("the trigger stays in the prompt", HOSTING + "prompt.py", "contents[window][place - 1 + per:]",
             "contents[window][place - 1:]", ROWS),
    Mutation("columns are shifted", HOSTING + "prompt.py", "first = window * size + place - 1", "first = window * size + place",
             ROWS),
    Mutation("the free prompt repeats the word", HOSTING + "prompt.py", "window, place, per, 1) for name",
             "window, place, per, count) for name", ROWS),
    Mutation("what does not fit is lost", HOSTING + "prompt.py", "[*over, *(contents[at + 1]", "[*(contents[at + 1]",
             maker("a_full_window_hands_its_end_to_the_next")),
    Mutation("two triggers are fine", HOSTING + "prompt.py", "if found.total != 1:", "if found.total < 1:",
             maker("the_trigger_is_asked_for")),
    Mutation("only the first picture counts", HOSTING + "photomaker.py", "identities[:len(rows)]",
             "identities[:1].expand(len(rows), -1)", maker("pictures_stay_in_their_order")),
    Mutation("the prompt weight is forgotten", HOSTING + "photomaker.py", "(strength * prompt.weight)", "strength",
             maker("a_prompt_weight_scales_what_comes_out_as_core_does")),
    Mutation("the identity meets the weighted word", HOSTING + "photomaker.py", "if prompt.weight != 1.0:", "if False:",
             maker("a_prompt_weight_scales_what_comes_out_as_core_does")),
    Mutation("pictures without a face go through", HOSTING + "photomaker.py",
             "return pictures[[number for number, _ in kept]],", "return pictures,",
             maker("pictures_without_a_face_are_left_out")),
    Mutation("foreign objects are called", HOSTING + "photomaker.py", 'and not hasattr(photomaker, "qformer_perceiver")', "",
             maker("foreign_objects_are_refused")),
    Mutation("v2 answers core's encode", HOSTING + "photomaker.py", "if self.config.version == 2 and id_embeds is None:",
             "if False:", maker("our_object_answers_cores_encode")),
    Mutation("the encoder is read for every strength", HOSTING + "files.py", "patcher = _encoders.get(version)", "patcher = None",
             maker("a_loaded_file_is_not_read_again")),
    Mutation("layers of a text encoder count as the model's", HOSTING + "files.py",
             "sum(name.startswith(UNET) for name in layers)", "len(layers)",
             maker("the_lora_in_the_names_of_other_releases")),
    Mutation("a LoRA of another model is laid on in part", HOSTING + "files.py", "if len(done) < used or not done:",
             "if not done:", maker("the_lora_in_the_names_of_other_releases")),
]
