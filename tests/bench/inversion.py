"""ResInversion and BiMD: evaluations, exactness, files, baselines, and what an identity does to a scene.

Counts and exactness run in this process on the shipped miniature; the evidence runs through the nodes on the real server.
"""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PARTS = ("evals", "psnr", "file", "baselines", "evidence")


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="dev.py bench inversion")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--steps", type=int, default=10, help="baselines: steps of both sides")
    parser.add_argument("--pictures", type=int, default=8, help="psnr: pictures; null-text takes a quarter of them")
    parser.add_argument("--curve", type=int, default=64, help="evidence: pictures for a point of the curve")
    parser.add_argument("--rows", type=int, default=256, help="evidence: pictures for a row of the comparison")
    parser.add_argument("--headline", type=int, default=10, help="evidence: steps without identity of the compared row")
    parser.add_argument("--points", type=int, nargs="*", default=[0, 4, 8, 10, 12, 14, 16, 18, 20],
                        help="evidence: steps without identity, the points of the curve")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("output/bench"))
    args = parser.parse_args(argv)

    import torch
    from bench import _inversion as costs

    torch.set_num_threads(args.threads)
    out: dict[str, Any] = {}
    if {"evals", "psnr", "baselines"} & set(args.only):
        with torch.inference_mode():  # as the host runs nodes
            bench = costs.Bench(args.pictures)
            if "evals" in args.only:
                out |= costs.evaluations(bench)
            if "baselines" in args.only:
                out |= costs.baselines(bench, args.steps)
            if "psnr" in args.only:
                out |= costs.exactness(bench, args.pictures, max(1, args.pictures // 4))
    if "file" in args.only:
        with torch.inference_mode():
            out |= costs.file_size()
    if "evidence" in args.only:
        from bench import _edits

        out |= _edits.evidence(args.curve, args.rows, args.headline, args.points, args.out)
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in out.items()}
