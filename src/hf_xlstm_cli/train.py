"""Trains an xLSTM language model on text: by minutes, steps or tokens, on one device or many.

    hf-xlstm train --output runs/mine --data book.txt notes/*.txt --minutes 10
    hf-xlstm train --output runs/big --data crawl/*.parquet --size 160m --ratio 7:1 --tokens 3e9
    torchrun --nproc_per_node 8 -m hf_xlstm_cli train ...

The same command again goes on from the last checkpoint, after whatever ended it. When the training is complete, the
output directory has the model and its tokenizer (for AutoModelForCausalLM and AutoTokenizer, after `import hf_xlstm`),
loss_curve.png, metrics.json and report.md, all at once; until then an older run there stays what it was. More in
docs/training.md.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import Parser, existing, positive, positive_int
from .presets import DEFAULT, SCHEDULES, SIZES, slstm_positions


LEAST_VOCAB_SIZE = 256 + 3
# fields of TrainingArguments that options here decide, and the length, the batch and the places that depend on them
DECIDED = {
    "output_dir": "--output",
    "max_steps": "--steps",
    "num_train_epochs": "--steps or --tokens",
    "per_device_train_batch_size": "--batch-size",
    "report_to": "--report-to",
}


def trainer_option(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__)
    paths: dict[str, Any] = {"nargs": "+", "type": existing, "metavar": "FILE"}

    text = parser.add_argument_group("text (by default the State of the Union addresses)")
    text.add_argument("--data", **paths, help="UTF-8 texts, a document each; .jsonl and .parquet, a document a record")
    text.add_argument("--dataset", metavar="NAME", help="a data set of the Hub, streamed")
    text.add_argument("--dataset-config", metavar="NAME", help="its configuration")
    text.add_argument("--split", default="train", metavar="NAME", help="its split (%(default)s)")
    text.add_argument("--text-field", default="text", metavar="NAME", help="field of records (%(default)s)")
    text.add_argument("--heldout", **paths, default=[], help="held-out texts (about 5 %% of the data, 4 MB at most)")
    text.add_argument("--tokenizer", metavar="DIR", help="directory or Hub name (a new byte-level BPE)")
    text.add_argument(
        "--vocab-size", type=positive_int, metavar="N", help=f"of a new tokenizer ({DEFAULT.vocab_size})"
    )

    model = parser.add_argument_group("model")
    model.add_argument("--size", choices=SIZES, help="a common size, instead of the quickstart's")
    model.add_argument("--config", type=existing, metavar="FILE", help="config.json of a new model")
    model.add_argument(
        "--model", metavar="DIR", help="a model to go on with, directory or Hub name, and its tokenizer"
    )
    model.add_argument("--hidden-size", type=positive_int, metavar="N", help=f"width ({DEFAULT.hidden_size})")
    model.add_argument("--num-layers", type=positive_int, metavar="N", help=f"blocks ({DEFAULT.num_layers})")
    model.add_argument("--num-heads", type=positive_int, metavar="N", help=f"heads per layer ({DEFAULT.num_heads})")
    model.add_argument("--ratio", metavar="M:S", help="mLSTM to sLSTM blocks, such as 7:1; 1:0 for no sLSTM")
    model.add_argument(
        "--slstm-at", type=int, nargs="*", metavar="LAYER", help="sLSTM layers, counted from 0 (1; none with --size)"
    )

    run = parser.add_argument_group("training")
    run.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the model and the report")
    run.add_argument("--overwrite", action="store_true", help="replace the run or model in DIR once this is complete")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=positive, help="training time (3)")
    length.add_argument("--steps", type=positive_int, metavar="N", help="training steps")
    length.add_argument("--tokens", type=positive_int, metavar="N", help="training tokens, such as 3e9")
    run.add_argument("--sequence-length", type=positive_int, default=128, metavar="N", help="tokens (%(default)s)")
    run.add_argument("--stateful", action="store_true", help="each window goes on from the state of the one before it")
    run.add_argument(
        "--batch-size", type=positive_int, default=8, metavar="N", help="windows per device (%(default)s)"
    )
    run.add_argument("--learning-rate", type=positive, metavar="X", help=f"at its peak ({DEFAULT.learning_rate})")
    run.add_argument("--schedule", choices=SCHEDULES, help=f"or wsd, warmup-stable-decay ({SCHEDULES[0]})")
    run.add_argument("--weight-decay", type=float, default=0.1, metavar="X", help="of the matrices (%(default)s)")
    run.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="autocast (where it is faster)")
    run.add_argument("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    run.add_argument("--seed", type=int, default=0, help="initialisation and order of windows (%(default)s)")
    run.add_argument("--evaluations", type=positive_int, default=10, metavar="N", help="on the way (%(default)s)")
    run.add_argument("--checkpoint-minutes", type=positive, metavar="X", help="between checkpoints (10, or a tenth)")
    run.add_argument("--report-to", nargs="+", default=[], metavar="NAME", help="such as tensorboard wandb")
    run.add_argument(
        "--trainer",
        nargs="+",
        type=trainer_option,
        default=[],
        metavar="NAME=VALUE",
        help="fields of TrainingArguments, such as gradient_accumulation_steps=4 fsdp=true",
    )

    args = parser.parse_args(arguments)
    if args.heldout and not (args.data or args.dataset):
        parser.error("--heldout needs --data or --dataset")
    if args.data and args.dataset:
        parser.error("--data and --dataset exclude each other")
    shape = [
        name for name in ("size", "hidden_size", "num_layers", "num_heads", "ratio", "slstm_at") if vars(args)[name]
    ]
    for name in ("config", "model"):
        if vars(args)[name] and shape:
            parser.error(f"--{name} excludes --{shape[0].replace('_', '-')}")
    if args.model and (args.config or args.tokenizer or args.vocab_size):
        parser.error("--model brings its own configuration and tokenizer")
    if args.tokenizer and args.vocab_size:
        parser.error("--vocab-size is that of a new tokenizer, --tokenizer names an old one")
    if args.vocab_size and args.vocab_size < LEAST_VOCAB_SIZE:
        parser.error(f"--vocab-size must be at least {LEAST_VOCAB_SIZE}: all bytes, and three special tokens")
    if not 0 <= args.weight_decay < math.inf:
        parser.error(f"--weight-decay must be 0 or more, got {args.weight_decay}")
    if args.ratio and args.slstm_at is not None:
        parser.error("--ratio and --slstm-at exclude each other")
    if args.stateful and args.gradient_checkpointing:
        parser.error("--stateful excludes --gradient-checkpointing, which runs blocks twice")
    preset = SIZES[args.size] if args.size else DEFAULT
    layers = args.num_layers or preset.num_layers
    if args.slstm_at is None:
        args.slstm_at = [1] if preset is DEFAULT and layers > 1 else []
    if not set(args.slstm_at) <= set(range(layers)):
        parser.error(f"--slstm-at names layers from 0 to {layers - 1}")
    try:
        slstm_positions(layers, args.ratio or "1:0")
    except ValueError as error:
        parser.error(f"--ratio: {error}")
    args.learning_rate = args.learning_rate or preset.learning_rate
    args.trainer = dict(args.trainer)
    if args.minutes is args.steps is args.tokens is None:
        args.minutes = 3.0
    for name in args.trainer.keys() & DECIDED.keys():
        parser.error(f"--trainer {name}: give {DECIDED[name]} instead")
    if "lr_scheduler_type" in args.trainer:
        if args.schedule or args.minutes:
            parser.error("--trainer lr_scheduler_type takes the place of --schedule, and needs --steps or --tokens")
    else:
        for name in args.trainer.keys() & {"warmup_steps", "warmup_ratio", "lr_scheduler_kwargs"}:
            parser.error(f"--trainer {name} needs lr_scheduler_type: --schedule has a warm-up of its own")
        args.schedule = args.schedule or SCHEDULES[0]
    if args.checkpoint_minutes is None:
        args.checkpoint_minutes = min(10.0, (args.minutes or math.inf) / 10)
    return args
