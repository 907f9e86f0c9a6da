"""Faults in training on checkpoints and folders of pictures."""
from __future__ import annotations

from harness.mutate import Mutation

ROWS = ("tests/unit/test_training_data.py::test_each_bad_row_is_named",)

MUTATIONS = [
    # -- folders of pictures
    Mutation("a broken picture stops the check of its folder", "models/training/data.py",
             "except (Image.DecompressionBombError, SyntaxError) as error:", "except Image.DecompressionBombError as error:",
             ROWS),
]
