"""Faults in the live mask, its prediction and its training."""
from __future__ import annotations

from harness.mutate import Mutation

HOSTING, REALCUSTOM, TRAINING = "models/hosting/", "models/realcustom/", "models/training/"
GOLDEN = ("tests/host/test_guidance_golden.py",)
TRAIN = ("tests/unit/test_training_realcustom.py",)


def live(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/host/test_guidance.py::test_{name}" for name in names)


def masks(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/host/test_guidance_masks.py::test_{name}" for name in names)


MUTATIONS = [
    # -- one pass
    Mutation("every step has a mask of its own", HOSTING + "guidance.py", "if step < one.refresh or name", "if True or name",
             GOLDEN),
    Mutation("the first mask serves every latent", HOSTING + "guidance.py",
             "holds_word and not state.is_for(x_in, sigma)", "holds_word and state.x is None", GOLDEN),
    Mutation("the pass ends a layer too early", HOSTING + "word_maps.py", "layers[-1] if early", "layers[-2] if early", GOLDEN),
    Mutation("the heads are summed", HOSTING + "word_maps.py", "return out.mT / heads", "return out.mT",
             live("shares_do_not_hang_on_how_many_heads_go_at_a_time")),
    Mutation("the largest weight stays in the exponent", HOSTING + "word_maps.py",
             "weights.div_(weights.sum(-1, keepdim=True))", "weights.div_(weights.amax(-1, keepdim=True))",
             live("shares_do_not_hang_on_how_many_heads_go_at_a_time")),
    Mutation("appended tokens dilute the word", HOSTING + "word_maps.py", "k[part, :target.length]", "k[part]",
             live("tokens_that_another_pack_appends_do_not_count")),
    Mutation("all prompts of a pass have one mark", HOSTING + "guidance.py", "mark(len(targets))))", "mark(0)))",
             live("prompts_of_different_lengths_share_a_pass")),
    Mutation("refresh counts evaluations between two levels as later steps", HOSTING + "guidance.py",
             "sum(level >= sigma * (1 - 1e-4) for level in levels) - 1)", "sum(level > sigma * (1 + 1e-4) for level in levels))",
             live("steps", "refresh_counts_steps_not_evaluations")),
    Mutation("the preview shows the evaluation between two levels", HOSTING + "guidance.py", "if at_level or step not in steps:",
             "if True:",
             live("refresh_counts_steps_not_evaluations")),
    # -- guiders
    Mutation("a call without the word gets no mask", HOSTING + "guidance.py", "acting = [guide for guide in guides if ids &",
             "acting = [guide for guide in guides if any(stamp.guides for stamp in stamps) and ids &",
             masks("a_call_of_the_negative_alone_takes_the_masks_of_its_step")),
    Mutation("an area's mask is laid over the whole picture", HOSTING + "masks_of_run.py",
             "if all(one.area is None for one in made):", "if len(made) == 1:",
             masks("prompts_of_two_areas_make_one_picture_of_masks")),
    Mutation("of a prompt's parts in time only the last is kept", HOSTING + "guidance.py",
             "found[asks, place, times] = entry", "found[asks, place] = entry",
             live("guiders_and_samplers[two ranges]")),
    Mutation("of one prompt under two masks only the last is kept", HOSTING + "guidance.py",
             "found[asks, place, times] = entry", "found[asks, place[0], times] = entry",
             masks("one_prompt_under_two_masks_is_searched_in_both")),
    Mutation("while the subject's prompt rests its negative finds no mask", HOSTING + "guidance.py",
             "for name in names & held}", "for name in ()}", live("prompts_in_ranges_of_time_with_realcustom")),
    # -- masks that meet
    Mutation("overlapping masks share a place that is not full", HOSTING + "masks_of_run.py", ".sum(0).clamp(min=1.0)",
             ".sum(0).clamp(min=0.1)",
             masks("masks_that_overlap_add_or_share")),
    Mutation("the later prompt's area wipes the former's", HOSTING + "masks_of_run.py",
             "place.copy_(torch.maximum(place, F.interpolate(", "place.copy_(torch.minimum(place + 9, F.interpolate(",
             masks("prompts_of_two_areas_make_one_picture_of_masks")),
    Mutation("the artist's mask is left out", HOSTING + "masks_of_run.py",
             "return out * own[[k % own.shape[0] for k in range(out.shape[0])]]", "return out",
             masks("a_mask_multiplies_or_replaces")),
    Mutation("a mask in place of the word's asks the model all the same", HOSTING + "guidance.py",
             "for name, one in due.items() if not one.replace}", "for name, one in due.items()}",
             masks("a_mask_multiplies_or_replaces")),
    Mutation("the word is looked for outside of its prompt's mask", REALCUSTOM + "masks.py", "self.mean() * region",
             "self.mean()",
             masks("a_prompt_with_a_mask_is_searched_inside_it_only")),
    Mutation("columns stay where a row was taken out before them", HOSTING + "stamps.py", "return column - count if",
             "return column if",
             masks("columns_follow_rows_that_an_adapter_takes_out")),
    Mutation("columns forget the rows that an earlier injector took out", HOSTING + "inject.py",
             "return tuple(_place(column, dropped, word) for column in kept)", "return tuple(kept)",
             masks("columns_follow_rows_that_an_adapter_takes_out")),
    Mutation("a free model of its own does not know the run", HOSTING + "guider.py", 'if key in ("sample_sigmas", RUN)',
             'if key == "sample_sigmas"',
             masks("a_free_model_of_its_own_knows_the_run")),
    Mutation("a copy for another device shares its tensors", HOSTING + "realcustom.py", "_patcher(copy.deepcopy(store),",
             "_patcher(store,",
             masks("keys_and_values_can_be_copied_for_another_device")),
    # -- the recorder, the preview, the prediction
    Mutation("nine runs are kept", HOSTING + "guidance_runs.py", "while len(self._runs) > KEPT:",
             "while len(self._runs) > KEPT + 1:",
             masks("only_the_last_runs_are_kept_and_the_sentence_says_what_to_do")),
    Mutation("runs are told apart by their size", HOSTING + "guidance_runs.py",
             "digest.update(plain.view(torch.uint8).numpy().tobytes())", "digest.update(b\"\")",
             masks("two_samplers_on_one_guidance_each_keep_their_own")),
    Mutation("the prediction reads the first step", HOSTING + "predict_mask.py", "if step == self.stop - 1:", "if step == 0:",
             masks("the_prediction_is_the_mask_of_that_step")),
    Mutation("the prediction looks beyond its prompt's mask", HOSTING + "predict_mask.py", "look.regions.get(number), size)",
             "None, size)", masks("the_prediction_looks_inside_its_prompts_mask_only")),
    Mutation("the prediction walks on where the levels end", HOSTING + "predict_mask.py",
             "min(plan.stop, plan.steps, len(sigmas) - 1)", "min(plan.stop, plan.steps)",
             masks("the_prediction_ends_with_the_schedule_and_says_from_where_it_starts")),
    Mutation("the prediction sees the subject", HOSTING + "predict_mask.py", "ids = torch.zeros_like(stamp.cond)",
             "ids = stamp.cond.roll(1, 1)",
             masks("the_prediction_does_not_see_a_subject")),
    Mutation("the release's size is height first", "nodes/inject.py", "size = (8 * width, 8 * height)",
             "size = (8 * height, 8 * width)",
             masks("switches_of_the_release_on_the_prompt")),
    Mutation("the coarse layers of the way up count as fine", HOSTING + "word_maps.py", "reads(word.layers, key, size == finest)",
             "reads(word.layers, key, True)", live("layers_that_are_read")),
    # -- training
    Mutation("keys begin at zero, values do not", REALCUSTOM + "adapter.py", 'name.endswith(".v.weight"):',
             'name.endswith(".k.weight"):', TRAIN),
    Mutation("training knows no mask", TRAINING + "realcustom.py", "            if mask is not None:", "            if False:",
             TRAIN),
    Mutation("a dropped reference is the picture", TRAINING + "realcustom.py", "torch.where(place, nothing, part",
             "torch.where(~place, nothing, part", TRAIN),
    Mutation("all pairs are open from the start", "models/demo/recontext.py", "share = OPEN_AT_START +", "share = 1.0 +", TRAIN),
    Mutation("an adapter that goes on begins with the easy pairs again", "nodes/training_realcustom.py",
             "Curriculum(data, 0 if start else steps)", "Curriculum(data, steps)",
             ("tests/host/test_training_realcustom.py::test_the_recipe_in_two_parts_is_the_recipe_in_one",)),
    Mutation("every network has two residual blocks a level", REALCUSTOM + "config.py", "blocks = residual_blocks(plain)",
             "blocks = 2", TRAIN),
]
