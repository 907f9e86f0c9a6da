"""Faults in the ground: stamps, patches, prompts, files, the miniature, CustAny, training."""
from __future__ import annotations

from harness.mutate import Mutation

HOSTING, COMMON, CUSTANY, REALCUSTOM = "models/hosting/", "models/common/", "models/custany/", "models/realcustom/"
HOST = "tests/host/test_"
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
STEPS = (f"{HOST}training_host.py::test_the_network_is_made_ready_for_every_step",
         f"{HOST}training_host.py::test_lessons_of_other_weights_are_drawn_anew")
SHAPES = (f"{HOST}bench_shapes.py",)
FRAMES = (f"{HOST}windows_of_frames.py",)
LOSSES = ("tests/unit/test_custany_losses.py",)
TWO_PASSES = ("tests/unit/test_training_custany.py::test_two_passes_give_the_gradient_of_the_sum",
              "tests/unit/test_training_custany.py::test_decoupling_can_be_off")
LOOP = ("tests/unit/test_training_loop.py::test_ctrl_c_saves_and_goes_on_as_if_nothing_had_been",)
UNIT_MASKS = ("tests/unit/test_masks.py",)
FUZZ = tuple(f"{HOST}fuzz.py::test_{name}" for name in ("metadata_of_adapters", "saved_subjects", "masks"))
PICTURES = (f"{HOST}fuzz.py::test_pictures",)
BROKEN = (f"{HOST}fuzz.py::test_broken_pictures_through_the_nodes",)
KILLED = (f"{HOST}killed.py",)
FOLDERS = (f"{HOST}nodes_subject.py::test_a_folder_that_was_deleted_takes_no_node_away",)
PACKED = ("tests/unit/test_packed.py",)
WRITES = ("tests/unit/test_evidence.py::test_a_base_of_either_world_is_labelled_when_it_is_one",)
PORTIONS = ("tests/unit/test_files.py::test_a_large_file_is_read_in_portions",)
PICKLES = (f"{HOST}adapters.py::test_files_that_are_no_weights",)
TRAPS = ("tests/workflows/test_load.py::test_pickles_are_never_executed",)
CHANGED = (f"{HOST}nodes_subject.py::test_a_changed_file_is_read_again",)

MUTATIONS = [
    # -- stamps: who is a row
    Mutation("every row has the first row's stamp", HOSTING + "stamps.py",
             "if i) for row in rows), areas", "if i) for row in rows[:1] * len(rows)), areas", ROWS),
    Mutation("the negative has no room for a stamp", HOSTING + "inject.py",
             "negative = [stamped(entry, black) for entry in negative]", "negative = list(negative)", ROWS),
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
             "own = [frame_of(row, batch, extra_options) %", "own = [row %",
             LAYERS),
    Mutation("the injector writes into the MODEL that it got", HOSTING + "inject.py",
             "        model = model.clone()\n", "", LAYERS),
    Mutation("the mask is no part of the label", HOSTING + "inject.py",
             "strengths, picture_hash(mask), type", "strengths, type", LAYERS),
    Mutation("one per latent shares the mean in its word", HOSTING + "adapters.py",
             'if subject.pairing != "per latent":', "if True:", LAYERS),
    # -- where and when
    Mutation("masks beyond the batch are dropped", HOSTING + "row_masks.py", "        if count > batch:",
             "        if False:", LIMITS),
    Mutation("the rows of all prompts count as the batch", HOSTING + "injector.py",
             "else 0, batch, extra_options)", "else 0, x.shape[0], extra_options)", LIMITS),
    Mutation("the mask is dead", HOSTING + "injector.py", "added = added * mask", "added = added * 1.0", LIMITS),
    Mutation("the area is cut with swapped axes", HOSTING + "row_masks.py",
             "mask = mask[y:y + height, x:x + width]", "mask = mask[x:x + width, y:y + height]", LIMITS),
    Mutation("an empty mask passes", HOSTING + "row_masks.py", "if float(mask.max()) <= 0.0:", "if float(mask.max()) < 0.0:",
             LIMITS),
    Mutation("a window's first frame is the batch's", HOSTING + "row_masks.py",
             "return frames[row % batch] if frames", "return row % batch if frames",
             FRAMES),
    Mutation("the frame in front of a window is forgotten", HOSTING + "row_masks.py", "return (*((anchor,) if anchor is not None",
             "return (*((anchor,) if False", FRAMES),
    Mutation("a guidance mask of a window is that of the first frames", HOSTING + "guidance.py",
             "if one.mask is None or not frames else",
             "if True else", FRAMES),
    Mutation("masks beyond the frames pass in a window", HOSTING + "row_masks.py",
             "        if not frames_of(extra_options) or not batch:\n            return", "        return", FRAMES),
    Mutation("start and end are of the noise before other nodes", HOSTING + "injector.py",
             "if self.start > 0 and sigma > level(self.start) or self.end < 1 and sigma < level(self.end):",
             "if self.start > 0 and sigma > 3.33 or self.end < 1 and sigma < 0.83:", LIMITS),
    Mutation("a model with guidance holds the text encoder", HOSTING + "guidance.py",
             "word = word._replace(clip=None, tokens=None)",
             "word = word._replace()", (f"{HOST}guidance_masks.py::test_a_model_with_guidance_does_not_hold_the_text_encoder",)),
    Mutation("an accepted subject stays the other adapter's", HOSTING + "subjects.py",
             'metadata.get("encoder_hash", ""), adapter.sha256, adapter)',
             'metadata.get("encoder_hash", ""), metadata.get("adapter_hash", ""), adapter)',
             (f"{HOST}adapters.py::test_a_subject_for_another_adapter_is_of_that_one_from_then_on",)),
    Mutation("curves of one line are one curve", HOSTING + "inject.py", "type(curve).__name__, ", "",
             (f"{HOST}injector.py::test_labels_of_other_settings_differ",)),
    Mutation("the host does not know the subject's keys and values", HOSTING + "injector.py",
             "return [self.plan.patcher, self.plan.store]", "return [self.plan.patcher]",
             (f"{HOST}injector.py::test_what_acts_in_a_run_is_what_the_host_moved",)),
    Mutation("a missing guidance mask is no fault", HOSTING + "row_masks.py",
             "        if live is None:\n",
             "        if live is None:\n            return None\n        if False:\n", LIMITS),
    Mutation("the end is open", HOSTING + "injector.py", "self.end < 1 and sigma < level(self.end):", "False:",
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
    Mutation("any CONDITIONING of the same length is mine", HOSTING + "prompt.py",
             "or entry[0].shape[1] == total and alike(entry[0])", "or entry[0].shape[1] == total", PROMPT),
    Mutation("prompt weights make another text", HOSTING + "prompt.py",
             "F.cosine_similarity(got[list(columns)] - nothing, text[list(columns)] - nothing, dim=-1)",
             "F.cosine_similarity(got[list(columns)], text[list(columns)], dim=-1) - 0.3", PROMPT),
    # -- files and encoders
    Mutation("every pickle in the folder is read", HOSTING + "encoders.py",
             "if not files.is_safetensors(path) and all(map(fitting_files, range(len(wanted)))):", "if False:", FILES),
    Mutation("a plain ViT is as good as an MAE", HOSTING + "encoders.py",
             "out.append((exact or surer or fitting)[0])", "out.append((exact or fitting)[0])", FILES),
    Mutation("a copy for another device shares the weights", HOSTING + "adapters.py",
             "patcher.cached_patcher_init = (reload_adapter, (path,))",
             "patcher.cached_patcher_init = (lambda path, disable_dynamic=False: patcher, (path,))", FILES),
    Mutation("the encoder's hash does not count", HOSTING + "encoders.py", "out.append((exact or surer or fitting)[0])",
             "out.append((surer or fitting)[0])", FILES),
    Mutation("encoders in any order", HOSTING + "adapters.py", "    if got != wanted:\n",
             "    if sorted(got) != sorted(wanted):\n", FILES),
    Mutation("average keeps every reference", HOSTING + "adapters.py", 'if combine == "average":', "if False:", FILES),
    # -- faults: damaged, killed, hostile, replaced
    Mutation("a damaged list of encoders comes through as Python's own error", HOSTING + "adapters.py",
             "except (ValueError, TypeError, RecursionError) as error:", "except RecursionError as error:", FUZZ),
    Mutation("a saved subject may hold infinity", HOSTING + "subjects.py",
             "t.shape[2] == width and bool(torch.isfinite(t).all())", "t.shape[2] == width", FUZZ),
    Mutation("nan in a mask stays", COMMON + "masks.py", "torch.nan_to_num(mask).clamp(0, 1)", "mask.clamp(0, 1)",
             FUZZ + UNIT_MASKS),
    Mutation("a column of pixels is read as a row", COMMON + "masks.py", "mask[..., 0] if size == shape[1:3] else mask[:, 0]",
             "mask[..., 0]", UNIT_MASKS),
    Mutation("a picture serves as a mask", COMMON + "masks.py", "if mask.ndim != 3 or mask.numel() == 0:",
             "if mask.ndim == 4:\n        mask = mask.flatten(0, 1)\n    if mask.numel() == 0:", LIMITS),
    Mutation("the injected step of the true shapes is a plain one", "tests/bench/_shapes.py", "injected.append(run(options))",
             "injected.append(run({}))", SHAPES),
    Mutation("nan in a picture stays", COMMON + "images.py", "torch.nan_to_num(image).clamp(0, 1)", "image.clamp(0, 1)",
             PICTURES),
    Mutation("a broken pixel breaks the whole swapped face", "models/face/swap.py", "_sound(crop(picture, matrix, size, device))",
             "crop(picture, matrix, size, device)", BROKEN),
    Mutation("a place is shown on no picture", "nodes/view.py", "None if image is None else split_alpha(image)[0]", "image",
             BROKEN),
    Mutation("a half file has the ending of a model", COMMON + "files.py",
             'f".{path.name}.{uuid.uuid4().hex}.tmp"', 'f"{uuid.uuid4().hex}.{path.name}"', KILLED),
    Mutation("a file is written where the old one lies", COMMON + "files.py",
             "save_file(_ready(tensors), temporary, metadata", "save_file(_ready(tensors), path, metadata", KILLED),
    Mutation("a finished adapter is copied over the old one in place", COMMON + "files.py",
             "shutil.copyfile(source, temporary)", "shutil.copyfile(source, path)", KILLED),
    Mutation("pickles are executed", HOSTING + "encoders.py",
             "return unwrap(comfy.utils.load_torch_file(str(path), safe_load=True)), {}",
             "return unwrap(torch.load(str(path), weights_only=False)), {}", PICKLES),
    Mutation("the search for encoders executes what it finds", HOSTING + "encoders.py",
             "names, metadata = unwrap(comfy.utils.load_torch_file(str(path), safe_load=True)), {}",
             "names, metadata = unwrap(torch.load(str(path), weights_only=False)), {}", TRAPS),
    Mutation("a replaced file is not noticed", "nodes/_paths.py", "{stat.st_mtime_ns}:{stat.st_size}", "there", CHANGED),
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
    Mutation("the contrast loss is subtracted", CUSTANY + "losses.py",
             "weights[1] * decouple + weights[2] * contrast_", "weights[1] * decouple - weights[2] * contrast_", LOSSES),
    Mutation("the raw contrast looks at its size", CUSTANY + "losses.py", 'elif mode == "abs":', 'elif mode != "clamp":', LOSSES),
    Mutation("the decoupling gate lets everything through", CUSTANY + "decouple.py", "torch.sigmoid(self.mask) * pooled",
             "pooled", LOSSES),
    Mutation("the decoupling pass has the first one's prompt", "models/training/custany.py",
             "fused + masked[:, None].to(fused.dtype)", "fused", TWO_PASSES),
    Mutation("the decoupling pass aims at other noise", "models/training/custany.py",
             "decouple = losses.denoise(second, target, weight)", "decouple = losses.denoise(second, target.flip(0), weight)",
             TWO_PASSES),
    Mutation("the contrast pulls together", "models/training/custany.py", "weights[2] * contrast).backward()",
             "-weights[2] * contrast).backward()", TWO_PASSES),
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
    Mutation("the v target has the wrong sign", HOSTING + "training_base.py", "(latents - of_input) / of_output",
             "(of_input - latents) / of_output", TRAINING),
    Mutation("the UNet is made ready once", HOSTING + "training_base.py",
             "        ready([self.model], activation_bytes(self.layers, self.unet.model_channels, tuple(x_t.shape),"
             "\n                                             base.get_dtype_inference()))\n", "", STEPS),
    Mutation("lessons are kept by their number alone", "nodes/training_miniature.py", "cache_key(frozen, drawn)",
             "cache_key(drawn)", STEPS),
    Mutation("a cache is written in place", "models/demo/cache.py",
             'path.with_name(f"{path.name}.{os.getpid()}.part")', "path", STEPS),
    Mutation("Ctrl-C breaks the step", "models/training/loop.py", "        if self.asked:\n            raise",
             "        if True:\n            raise", LOOP),
    Mutation("Ctrl-C saves nothing", "models/training/loop.py", "if last_save != run.step:",
             "if last_save != run.step and not interrupt.asked:", LOOP),
    # -- the base in 8 bits
    Mutation("one scale for all rows of a packed weight", "models/demo/packed.py", "rows.abs().amax(1) / 127",
             "rows.abs().amax().repeat(rows.shape[0]) / 127", PACKED),
    Mutation("packed weights are cut off, not rounded", "models/demo/packed.py", ".round().to(torch.int8)",
             ".to(torch.int8)", PACKED),
    Mutation("the first stage is packed, too", "models/demo/packed.py", ' or name.startswith("first_stage.")', "", PACKED),
    Mutation("the recipe writes an unpacked base", "models/demo/recipe.py", "packed.pack(half(state))", "half(state)", WRITES),
    Mutation("a deleted folder takes the node away", "nodes/_paths.py", "except FileNotFoundError:", "except KeyError:", FOLDERS),
    Mutation("a file stays open for all its tensors", COMMON + "files.py", "if bits >= 8 * PORTION:", "if False:", PORTIONS),
]
