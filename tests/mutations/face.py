"""Faults in finding, comparing and swapping faces."""
from __future__ import annotations

from harness.mutate import Mutation

FACE, HOSTING = "models/face/", "models/hosting/"
MATHS, DATA = "tests/unit/test_face_maths.py", "tests/unit/test_face_data.py"
HOST, NODES = "tests/host/test_face.py", "tests/host/test_face_nodes.py"

MUTATIONS = [
    # -- geometry and detection
    Mutation("the alignment may mirror", FACE + "geometry.py", "s[:, 0] * t[:, 1] - s[:, 1] * t[:, 0]",
             "s[:, 0] * t[:, 1] + s[:, 1] * t[:, 0]", (f"{MATHS}::test_the_similarity_is_the_least_squares_one",)),
    Mutation("the face of 128 pixels lies lower too", FACE + "geometry.py", "points[:, 0] += SHIFT", "points += SHIFT",
             (f"{MATHS}::test_templates",)),
    Mutation("the crop repeats the border", FACE + "geometry.py", '"bilinear", "zeros"', '"bilinear", "border"',
             (f"{MATHS}::test_a_crop_is_bilinear_and_black_outside",)),
    Mutation("the rim is one pixel of the picture", FACE + "geometry.py", "height, width, reach + 2)", "height, width, 2)",
             (f"{MATHS}::test_the_paste_mask_is_that_of_insightface",)),
    Mutation("the letterbox is centred", FACE + "detect.py", "canvas[:, :, :tall, :wide] = small",
             "canvas[:, :, height - tall:, width - wide:] = small", (f"{MATHS}::test_the_letterbox_lies_top_left_on_black",)),
    Mutation("cells have centres", FACE + "detect.py", "1).float() * stride", "1).float() * stride + stride / 2",
             (f"{MATHS}::test_decoding_by_hand",)),
    Mutation("rows run over x first", FACE + "detect.py", "[cell % across, cell // across]", "[cell // across, cell % across]",
             (f"{MATHS}::test_decoding_by_hand",)),
    Mutation("edges of boxes do not count", FACE + "detect.py", "(high - low + 1).clamp(min=0)", "(high - low).clamp(min=0)",
             (f"{MATHS}::test_suppression_counts_both_edge_pixels",)),
    Mutation("the ladder stays at its first step", FACE + "detect.py", "[(side, side) for side in sizes]",
             "[(sizes[0], sizes[0]) for side in sizes]", (f"{MATHS}::test_the_ladder_really_changes_the_size",)),
    # -- masks and swap
    Mutation("the border erodes the mask", FACE + "masks.py", "holes[:, high] - holes[:, low] < 0.5",
             "holes[:, high] - holes[:, low] + (side - (high - low)) < 0.5",
             (f"{MATHS}::test_the_paste_mask_is_that_of_insightface",)),
    Mutation("the blur has another sigma", FACE + "masks.py", "0.3 * (reach - 1) + 0.8", "0.3 * reach + 0.8",
             (f"{MATHS}::test_the_paste_mask_is_that_of_insightface",)),
    Mutation("boost deals out tiles", FACE + "swap.py",
             "parts = F.pixel_unshuffle(square[None], boost).reshape(3, boost * boost, side, side).transpose(0, 1)",
             "parts = square.unfold(1, side, side).unfold(2, side, side).reshape(3, boost * boost, side, side).transpose(0, 1)",
             (f"{MATHS}::test_boost_deals_out_whole_faces_and_puts_them_back",)),
    Mutation("the source is not brought to length 1", FACE + "swap.py", "mixed = unit(source.float())", "mixed = source.float()",
             (f"{MATHS}::test_the_identity_goes_through_the_map",)),
    Mutation("the identity map is transposed", FACE + "swap.py", "unit(mixed @ emap.to(mixed))", "unit(emap.to(mixed) @ mixed)",
             (f"{MATHS}::test_the_identity_goes_through_the_map",)),
    Mutation("the whole rectangle is written", FACE + "swap.py", "torch.where(touched[..., None], new, old)", "pasted.to(old)",
             (f"{MATHS}::test_a_swap_touches_its_mask_and_nothing_else",)),
    Mutation("the mask input is ignored", FACE + "swap.py", "mask = mask * limit[y0:y1, x0:x1].to(mask)", "mask = mask * 1",
             (f"{MATHS}::test_a_swap_touches_its_mask_and_nothing_else",)),
    Mutation("a restored crop is laid half a pixel off", FACE + "swap.py", "(points + 0.5) * finer - 0.5", "points * finer",
             (f"{MATHS}::test_restoring_by_nothing_changes_nothing",)),
    # -- choice, time, files
    Mutation("embeddings of two packs mix", FACE + "choose.py", "if have != wanted:", "if False:",
             (f"{DATA}::test_spaces_never_mix",)),
    Mutation("the blend does not bring to length 1", FACE + "choose.py", "(unit(rows) if mode == MODES[0] else rows)", "rows",
             (f"{DATA}::test_the_blend_is_the_weighted_mean_of_directions",)),
    Mutation("smoothing looks back only", FACE + "smooth.py", "points[index - side:index + side + 1]",
             "points[index - side:index + 1].repeat_interleave(2, 0)[:2 * side + 1]",
             (f"{DATA}::test_smoothing_stills_and_does_not_lag",)),
    Mutation("faces change chains at a cut", FACE + "smooth.py", "other = known and likeness(before, face) < SAME",
             "other = False", (f"{DATA}::test_chains_end_at_cuts_and_gaps",)),
    Mutation("gender is turned round", FACE + "storage.py", 'int(face.gender == "male")', 'int(face.gender == "female")',
             (f"{DATA}::test_saving_and_loading",)),
    Mutation("limbs are not dimmed", FACE + "drawing.py", "canvas * DIM * 255", "canvas * 255",
             (f"{DATA}::test_the_keypoint_picture_is_instantids",)),
    # -- networks and host
    Mutation("the identity map is the first tensor", FACE + "contract.py", "or tensors[-1:]", "or tensors[:1]",
             (f"{HOST}::test_the_identity_map_is_found_by_name",)),
    Mutation("weights are kept for ever", HOSTING + "face.py",
             "_loaded: weakref.WeakValueDictionary[tuple[str, int, int, str], Any] = weakref.WeakValueDictionary()",
             "_loaded: dict[Any, Any] = {}", (f"{HOST}::test_a_file_is_converted_once_and_let_go",)),
    Mutation("half files are stored in full", HOSTING + "face.py", 'if getattr(layer, "comfy_cast_weights", False):',
             "if False:", (f"{HOST}::test_half_files_keep_half_weights_and_compute_in_full",)),
    Mutation("every picture is looked at again", HOSTING + "face_batch.py", "if key not in self.known:", "if True:",
             (f"{NODES}::test_the_same_picture_is_looked_at_once",)),
    Mutation("the input is changed in place", HOSTING + "face_batch.py", "else image.clone()", "else image",
             (f"{NODES}::test_outside_of_the_mask_every_bit_stays",)),
    Mutation("all targets get the first source", HOSTING + "face_batch.py", "chosen = place % len(sources)", "chosen = 0",
             (f"{NODES}::test_several_sources_are_dealt_out",)),
]
