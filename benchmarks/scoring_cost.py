# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Times one pass of scoring, and the search of a pruning, beside one training epoch over the same batches.

    python -m benchmarks.scoring_cost                                # ViT-S/16 at 224 pixels, 4 batches of 8
    python -m benchmarks.scoring_cost --backbone vit-b --rounds 3

Training, `score_prompts` and `search_pruning` take turns in every round, so that whatever else the machine does hits
all of them. The table gives the median and the spread of the ratios of the rounds, in CPU and in wall seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import transformers

from benchmarks.baselines import BACKBONES, build
from benchmarks.timing import make_batch, print_ratios, take_turns
from peft_e2vpt import score_prompts, search_pruning


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="vit-s")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--num_visual_prompts", type=int, default=10)
    parser.add_argument("--num_kv_prompts", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--search", action="store_true", help="Time the search of all 55 candidates, too (slow).")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = build("e2vpt", args.backbone, args.image_size, args.num_visual_prompts, args.num_kv_prompts)
    batches = [make_batch(args.batch_size, args.image_size) for _ in range(args.num_batches)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def epoch() -> None:
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

    def scoring() -> None:
        score_prompts(model, batches)

    scores = score_prompts(model, batches)

    def searching() -> None:
        search_pruning(model, scores, batches)

    runs: dict[str, Callable[[], None]] = {"training": epoch, "scoring": scoring}
    if args.search:
        runs["search"] = searching
    title = f"{args.backbone}, M={args.num_visual_prompts}, n={args.num_kv_prompts}, {args.num_batches} batches of "
    print_ratios(title + str(args.batch_size), take_turns(runs, args.rounds), "training")


if __name__ == "__main__":
    main()
