"""Faults in training on checkpoints and folders of pictures."""
from __future__ import annotations

from harness.mutate import Mutation

ROWS = ("tests/unit/test_training_data.py::test_each_bad_row_is_named",)
LICENCE = ("tests/host/test_training_realcustom.py::test_the_file_tells_the_licence_of_its_pictures",)

MUTATIONS = [
    # -- folders of pictures
    Mutation("a broken picture stops the check of its folder", "models/training/data.py",
             "except (Image.DecompressionBombError, SyntaxError) as error:", "except Image.DecompressionBombError as error:",
             ROWS),
    Mutation("a licence that was not given is an empty one", "nodes/training_miniature.py",
             '({"dataset_license": args.license} if args.license else {})', '{"dataset_license": args.license}', LICENCE),
]
