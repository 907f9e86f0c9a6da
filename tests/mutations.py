"""Faults on purpose: each must turn one of its tests red (`python dev.py test --mutations [words of a name]`)."""
from __future__ import annotations

from harness.mutate import Mutation

HOSTING, COMMON, CUSTANY, REALCUSTOM = "models/hosting/", "models/common/", "models/custany/", "models/realcustom/"
HOST = "tests/host/test_"
# Few and quick sets of tests: every set is run once without a fault first.
ROWS = (f"{HOST}rows.py::test_cfg", f"{HOST}rows.py::test_batches", f"{HOST}rows.py::test_two_subjects_in_one_prompt",
        f"{HOST}rows.py::test_one_subject_in_two_places_is_not_doubled", f"{HOST}rows.py::test_process_cond_notes_the_area",
        f"{HOST}rows.py::test_injection_after_a_combine_reaches_its_own_prompt_only")
LAYERS = (f"{HOST}injector.py::test_one_call_by_hand", f"{HOST}injector.py::test_references_of_their_own_latents",
          f"{HOST}injector.py::test_strength_zero_and_an_untrained_adapter_are_bit_equal",
          f"{HOST}injector.py::test_a_clone_never_changes_its_parent", f"{HOST}injector.py::test_labels_of_other_settings_differ",
          f"{HOST}injector.py::test_each_latent_has_the_global_vector_of_its_own_reference")
LIMITS = (f"{HOST}limits.py",)
PROMPT = (f"{HOST}prompt.py",)
FILES = (f"{HOST}adapters.py",)
DEMO = (f"{HOST}demo.py",)
TRAINING = (f"{HOST}training_host.py::test_denoise_is_the_hosts_own_prediction",
            f"{HOST}training_host.py::test_training_and_use_are_one_network")
UNIT_MASKS = ("tests/unit/test_masks.py",)
RC = ("tests/unit/test_realcustom.py",)
RC_RELEASE = ("tests/unit/test_realcustom_release.py",)

MUTATIONS = [
    # -- stamps: who is a row
    Mutation("every row has the first row's stamp", HOSTING + "stamps.py",
             "if i) for row in rows), areas", "if i) for row in rows[:1] * len(rows)), areas", ROWS),
    Mutation("the negative has no room for a stamp", HOSTING + "inject.py",
             "negative = [stamped(entry, 0) for entry in negative]", "negative = list(negative)", ROWS),
    Mutation("the second subject overwrites the first", HOSTING + "stamps.py",
             "old[old.index(0)] = number", "old[0] = number", ROWS),
    Mutation("height and place of an area are swapped", HOSTING + "stamps.py",
             "list(area)[:2] + list(area)[len(area) // 2:len(area) // 2 + 2]",
             "list(area)[len(area) // 2:len(area) // 2 + 2] + list(area)[:2]", ROWS),
    Mutation("one subject over two branches acts twice", HOSTING + "inject.py",
             "if number not in _numbers(model):", "if number:", ROWS),
    Mutation("prompts that begin alike are one prompt", HOSTING + "prompt.py",
             "torch.allclose(entry_rows[0, places], rows, atol=1e-6)",
             "torch.allclose(entry_rows[0, places[:-1]], rows[:-1], atol=1e-6)", ROWS),
    # -- the patch layer
    Mutation("a row without the stamp gets the subject", HOSTING + "injector.py",
             "if count > turn]", "if count >= turn]", LAYERS),
    Mutation("the residual is lost", HOSTING + "injector.py",
             "return x.index_add(0, index, (added * weight).to(x.dtype))",
             "return x.index_copy(0, index, (added * weight).to(x.dtype))", LAYERS),
    Mutation("references follow the row, not the latent", HOSTING + "injector.py",
             "tokens[[(row % batch) % tokens.shape[0] for row in rows]]", "tokens[[row % tokens.shape[0] for row in rows]]",
             LAYERS),
    Mutation("the injector writes into the MODEL that it got", HOSTING + "inject.py",
             "        model = model.clone()\n", "", LAYERS),
    Mutation("the mask is no part of the label", HOSTING + "inject.py",
             "strengths, picture_hash(mask), getattr", "strengths, getattr", LAYERS),
    Mutation("one per latent shares the mean in its word", HOSTING + "adapters.py",
             'if subject.pairing != "per latent":', "if True:", LAYERS),
    # -- where and when
    Mutation("the mask is dead", HOSTING + "injector.py", "added = added * mask", "added = added * 1.0", LIMITS),
    Mutation("the area is cut with swapped axes", HOSTING + "row_masks.py",
             "mask = mask[y:y + height, x:x + width]", "mask = mask[x:x + width, y:y + height]", LIMITS),
    Mutation("an empty mask passes", HOSTING + "inject.py", "if float(mask.max()) <= 0.0:", "if float(mask.max()) < 0.0:",
             LIMITS),
    Mutation("a missing guidance mask is no fault", HOSTING + "row_masks.py",
             "        if live is None:\n",
             "        if live is None:\n            return None\n        if False:\n", LIMITS),
    Mutation("the end is open", HOSTING + "injector.py", "if not self.end <= sigma <= self.start:", "if not sigma <= self.start:",
             LIMITS),
    Mutation("progress runs backwards between two steps", HOSTING + "injector.py",
             "return (index - (sigma - level)", "return (index + (sigma - level)", LIMITS),
    # -- the word
    Mutation("windows are one column short", COMMON + "columns.py", "row += len(window)", "row += len(window) - 1", PROMPT),
    Mutation("a part of a word is a word", COMMON + "columns.py", "(at == 0 or ends_word(window[at - 1]))", "True", PROMPT),
    Mutation("occurrences count from zero", COMMON + "columns.py", "starts[occurrence - 1:occurrence]",
             "starts[occurrence:occurrence + 1]", PROMPT),
    Mutation("prompt weights are forgotten", HOSTING + "inject.py", "return word_delta(subject, raw) * weight",
             "return word_delta(subject, raw)", PROMPT),
    Mutation("a concatenated prompt is not searched", HOSTING + "prompt.py",
             "for shift in range(0, entry_rows.shape[1], word.window):", "for shift in range(0, 1, word.window):", PROMPT),
    Mutation("a T5 beside the CLIP does not matter", HOSTING + "prompt.py", "set(tokens) <= set(known)",
             "set(tokens) & set(known)", PROMPT),
    Mutation("the next injector does not follow dropped tokens", HOSTING + "inject.py",
             "return column - sum(", "return column - 0 * sum(", PROMPT),
    # -- files and encoders
    Mutation("the encoder's hash does not count", HOSTING + "encoders.py", "out.append((exact or fitting)[0])",
             "out.append(fitting[0])", FILES),
    Mutation("encoders in any order", HOSTING + "adapters.py", "    if got != wanted:\n",
             "    if sorted(got) != sorted(wanted):\n", FILES),
    Mutation("average keeps every reference", HOSTING + "adapters.py", 'if combine == "average":', "if False:", FILES),
    # -- the miniature
    Mutation("the vocabulary is shifted by a row", HOSTING + "demo.py", "table[token] = small[row + 3]",
             "table[token] = small[row + 2]", DEMO),
    Mutation("preview colours without the whitening", HOSTING + "demo.py",
             '.mean(1) * first_stage["scale"].float()', ".mean(1)", DEMO),
    # -- CustAny's modules
    Mutation("the two encoders' patches are swapped", CUSTANY + "adapter.py", "self.local_mlp(torch.cat(patches, -1))",
             "self.local_mlp(torch.cat(patches[::-1], -1))", FILES),
    Mutation("the word comes before the class tokens", CUSTANY + "adapter.py",
             "torch.cat([tokens.flatten(1), word.to(tokens.dtype)], -1)",
             "torch.cat([word.to(tokens.dtype), tokens.flatten(1)], -1)", FILES),
    Mutation("the query is not normalised", CUSTANY + "layers.py", "self.to_q(self.norm(x))", "self.to_q(x)", LAYERS),
    Mutation("an untrained layer changes the picture", CUSTANY + "layers.py", "init_linear(self.to_out, generator, zero=True)",
             "init_linear(self.to_out, generator)", LAYERS),
    Mutation("the delta falls on the row after the word", CUSTANY + "layers.py", "hit = index[None] == first[:, None]",
             "hit = index[None] == first[:, None] + 1", TRAINING),
    # -- masks and training
    Mutation("the box loses its last column", COMMON + "masks.py", "int(columns[-1]) + 1, int(rows[-1]) + 1",
             "int(columns[-1]), int(rows[-1]) + 1", UNIT_MASKS),
    Mutation("the mask is not laid on the background", COMMON + "masks.py", "picture = composite(rgb, mask, background)",
             "picture = rgb", UNIT_MASKS),
    Mutation("the v target has the wrong sign", HOSTING + "training_base.py", "(noise - sigma * latents)",
             "(noise + sigma * latents)", TRAINING),
    # -- RealCustom++: projector, masks, files
    Mutation("the queries of the projector come from the local side", REALCUSTOM + "projector.py",
             "attention(self.to_q(self.norm1(deep)),", "attention(self.to_q(self.norm2(deep)),", RC),
    Mutation("the projector's base sees the local features", REALCUSTOM + "projector.py",
             "base = self.projector_base(deep)", "base = self.projector_base(local[:, :deep.shape[1]])", RC),
    Mutation("the trained factor scales the base too", REALCUSTOM + "projector.py",
             "return base + (fine if self.scale_value is None else self.scale_value.value.to(fine) * fine)",
             "return (base + fine) * (1 if self.scale_value is None else self.scale_value.value.to(fine))", RC),
    Mutation("the shallow form forgets a block", REALCUSTOM + "projector.py", "torch.cat(earlier, 1), self.attention",
             "torch.cat(earlier[1:], 1), self.attention", RC),
    Mutation("the word's columns are a mean", REALCUSTOM + "masks.py",
             'torch.einsum("bthw,t->bhw", mean, columns.reshape(-1).to(mean))[:, None]',
             'torch.einsum("bthw,t->bhw", mean, columns.reshape(-1).to(mean) / columns.sum())[:, None]', RC),
    Mutation("the word's columns are shifted", REALCUSTOM + "masks.py", "columns.reshape(-1).to(mean))",
             "columns.reshape(-1).roll(1).to(mean))", RC),
    Mutation("no layer is normalised by itself", REALCUSTOM + "masks.py", "layer = min_max(layer) if self.per_layer else layer",
             "layer = layer + 0", RC),
    Mutation("binary keeps only what is not zero", REALCUSTOM + "masks.py", 'torch.ones_like(values) if "binary" in words',
             'torch.zeros_like(values) if "binary" in words', RC),
    Mutation("the threshold is the scope itself", REALCUSTOM + "masks.py", "mask < 1 - scope", "mask < scope", RC),
    Mutation("self maps are normalised over all channels", REALCUSTOM + "masks.py", "planes = min_max(planes)",
             "planes = planes / planes.amax((1, 2, 3), keepdim=True)", RC),
    Mutation("the way up is counted as the way down", REALCUSTOM + "config.py", 'else f"output.{at}.{depth}"',
             'else f"output.{at + 1}.{depth}"', RC),
    Mutation("shallow files are read as highres", REALCUSTOM + "config.py", 'shallow = "projector2.0.weight" in names',
             'shallow = "projector3.0.weight" in names', RC),
    # -- RealCustom++: the release's pixels, schedule and solver
    Mutation("pixels are rounded, not cut off", REALCUSTOM + "preprocess.py", "(pixels * 255).to(torch.uint8)",
             "(pixels * 255).round().to(torch.uint8)", RC_RELEASE),
    Mutation("the whole picture has no aligned corners", REALCUSTOM + "preprocess.py", "align_corners=True",
             "align_corners=False", RC_RELEASE),
    Mutation("the phases of the quarters are transposed", REALCUSTOM + "preprocess.py", "(b p q) c h w", "(b q p) c h w",
             RC_RELEASE),
    Mutation("the app's pixels are not rounded to bfloat16", REALCUSTOM + "preprocess.py", "align_corners=False).to(dtype)",
             "align_corners=False)", RC_RELEASE),
    Mutation("timesteps are cut off, not rounded", REALCUSTOM + "schedule.py", "[round(TRAINED - 1", "[int(TRAINED - 1",
             RC_RELEASE),
    Mutation("a second-order step starts where it stands", REALCUSTOM + "schedule.py", "x = ratio * before -",
             "x = ratio * x -", RC_RELEASE),
    Mutation("betas are linear, not scaled linear", REALCUSTOM + "schedule.py",
             "torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, TRAINED) ** 2", "torch.linspace(0.00085, 0.012, TRAINED)", RC_RELEASE),
    Mutation("columns begin at the start token", REALCUSTOM + "phrase.py", "return 1 + min(length(prompt[:end]), WINDOW)",
             "return min(length(prompt[:end]), WINDOW)", RC_RELEASE),
]
