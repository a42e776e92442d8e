# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Times a forward pass and a training step of E2VPT beside the plain backbone, inserted prompts, LoRA and full tuning.

    python -m benchmarks.speed                    # ViT-B/16 at 224 pixels, batches of 1 and 8, M=10, n=5
    python -m benchmarks.speed --num_visual_prompts 100 --batch_sizes 8
    python -m benchmarks.speed --device cuda --dtype bfloat16 --compile --batch_sizes 64

Methods take turns in every round, so that whatever else the machine does hits all of them; a table gives the median
and the spread of the ratios of the rounds. `memory.py` measures memory.
"""

from __future__ import annotations

from benchmarks.baselines import METHODS, PLAIN_FORWARD
from benchmarks.timing import (
    build_on,
    forward_pass,
    machine,
    make_batch,
    parser_of,
    print_ratios,
    records,
    take_turns,
    training_step,
    use_smallest,
    write,
)


def main() -> None:
    args = parser_of(__doc__).parse_args()
    if args.smoke:
        use_smallest(args)
    print(
        f"{args.backbone}, {args.image_size} px, M={args.num_visual_prompts}, n={args.num_kv_prompts}, {machine(args)}"
    )
    warm_up = 3 if args.compile or args.device != "cpu" else 1
    for size in args.batch_sizes:
        batch = make_batch(size, args.image_size, args.device)
        names = [*(name for name in METHODS if name not in PLAIN_FORWARD), "e2vpt merged"]
        forwards = {name: forward_pass(build_on(name, args), batch, args) for name in names}
        seconds = take_turns(forwards, args.rounds, warm_up)
        print_ratios(f"Forward pass, batch {size}", seconds, "plain")
        write(records(seconds, "plain"), args, measured="forward", batch_size=size)
        del forwards
        steps = {name: training_step(build_on(name, args), batch, args) for name in METHODS if name != "plain"}
        seconds = take_turns(steps, args.rounds, warm_up)
        print_ratios(f"Training step, batch {size}", seconds, "lora")
        write(records(seconds, "lora"), args, measured="step", batch_size=size)


if __name__ == "__main__":
    main()
