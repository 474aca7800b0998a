"""Trains an xLSTM language model on text: by minutes, steps or tokens, on one device or many.

    python scripts/train.py --output runs/mine --data book.txt notes/*.txt --minutes 10
    python scripts/train.py --output runs/big --data crawl/*.parquet --size 160m --ratio 7:1 --tokens 3e9
    torchrun --nproc_per_node 8 scripts/train.py ...

The same command again goes on from the last checkpoint, after whatever ended it. When the training is complete, the
output directory has the model and its tokenizer (for AutoModelForCausalLM and AutoTokenizer, after `import hf_xlstm`),
loss_curve.png, metrics.json and report.md, all at once; until then an older run there stays what it was. More in
docs/training.md.
"""

import argparse
import json
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks

from helpers.bits_per_byte import bits_per_byte
from helpers.corpus import Corpus, files, hub_dataset, num_bytes, pieces, state_of_the_union
from helpers.errors import UserError, command
from helpers.models import load_model, load_tokenizer, read_config
from helpers.presets import DEFAULT, SIZES, slstm_positions
from helpers.report import plot_loss_curve, write_report
from helpers.tokens import Streams, Tokens, Windows, tokenise, train_tokenizer
from helpers.training import (
    SCHEDULES,
    Budget,
    Progress,
    Run,
    RunTrainer,
    bf16_is_faster,
    is_whole,
    last_checkpoint,
    read_progress,
)
from helpers.yardsticks import ByteNGram, lzma_bits_per_byte
from hf_xlstm import xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.files import appearing, check_room, locked, replacing, replacing_file, write_text


WORK = "checkpoints"  # in the output directory, until the training is complete
CONFIGURATION = "run.json"
# what a run leaves, and the next one in its place does not keep
OUTPUTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "loss_curve.png", "report.md", WORK)
YARDSTICK_BYTES = 64 * 2**20  # of longer texts an n-gram model and lzma would take too long
BYTES_PER_PARAMETER = 4 + 3 * 12  # the model, and three checkpoints with AdamW's moments


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> xLSTMForCausalLM:
    """A new model, or with `--model` an old one to go on with."""
    if args.model:
        model = load_model(args.model)
    else:
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if args.config:
            config = read_config(args.config)
            for name, value in ids.items():
                setattr(config, name, value)
        else:
            preset = SIZES[args.size] if args.size else DEFAULT
            layers = args.num_layers or preset.num_layers
            heads = args.num_heads or preset.num_heads
            slstm = slstm_positions(layers, args.ratio) if args.ratio else args.slstm_at
            try:
                config = xLSTMConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=args.hidden_size or preset.hidden_size,
                    num_hidden_layers=layers,
                    num_heads=heads,
                    layer_types=["slstm" if i in slstm else "mlstm" for i in range(layers)],
                    slstm_num_heads=heads,
                    **ids,
                )
            except ValueError as error:
                raise UserError(str(error)) from error
        model = xLSTMForCausalLM(config)
    if model.config.vocab_size < len(tokenizer):
        raise UserError(f"the model has {model.config.vocab_size} tokens, its tokenizer {len(tokenizer)}")
    return model


def measure_yardsticks(corpus: Corpus) -> dict[str, float]:
    """Held-out bits per byte of models that need no training time."""
    heldout_bytes = [text.encode() for text in corpus.heldout]
    text = b"".join(heldout_bytes)
    if corpus.nbytes is None or corpus.nbytes > YARDSTICK_BYTES:
        return {"lzma": lzma_bits_per_byte(text)}
    train_bytes = ["".join(pieces(document)).encode() for document in corpus.train]
    primer = b"".join(train_bytes)
    with ThreadPoolExecutor() as pool:  # lzma releases the interpreter lock
        alone = pool.submit(lzma_bits_per_byte, text)
        primed = pool.submit(lzma_bits_per_byte, text, primer)
        ngram = ByteNGram(train_bytes, order=5).bits_per_byte(heldout_bytes)
    return {"lzma": alone.result(), "lzma after the training text": primed.result(), "5-gram of bytes": ngram}


def read_corpus(args: argparse.Namespace) -> Corpus:
    if args.dataset:
        return hub_dataset(args.dataset, args.dataset_config, args.split, args.text_field, args.heldout)
    if args.data:
        return files(args.data, args.heldout, args.text_field)
    return state_of_the_union()


def prepare(args: argparse.Namespace, corpus: Corpus, work: Path) -> tuple[PreTrainedTokenizerBase, dict[str, float]]:
    """The tokenizer, the tokens and the yardsticks in `work`: made by the first process that comes, then found."""
    folder, tokens, measured = work / "tokenizer", work / "tokens", work / "yardsticks.json"
    if not folder.exists():
        if args.tokenizer or args.model:
            tokenizer = load_tokenizer(args.tokenizer or args.model)
        else:
            preset = SIZES[args.size] if args.size else DEFAULT
            tokenizer = train_tokenizer(corpus.train, args.vocab_size or preset.vocab_size)
        with appearing(folder) as partial_folder:
            tokenizer.save_pretrained(partial_folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokens.exists():
        tokenise(corpus.train, tokenizer, tokens, corpus.nbytes)
    if not measured.exists():
        write_text(measured, json.dumps(measure_yardsticks(corpus)))
    return tokenizer, json.loads(measured.read_text(encoding="utf-8"))


def configuration(args: argparse.Namespace, arguments: TrainingArguments) -> dict:
    """What makes this run another one than the next: a checkpoint of one cannot go on as the other."""
    aside = ("output", "overwrite", "checkpoint_minutes", "report_to")
    options = {name: value for name, value in vars(args).items() if name not in aside}
    options["data_bytes"] = [path.stat().st_size for path in [*(args.data or []), *args.heldout]]
    return json.loads(json.dumps(options | {"processes": arguments.world_size}, default=str))


def choose_bf16(output: Path) -> bool:
    """Whether to train in bfloat16 where the user leaves it open: as the run that is to go on, else where it pays."""
    for found in (output / CONFIGURATION, output / WORK / CONFIGURATION):
        if found.exists():
            return json.loads(found.read_text(encoding="utf-8"))["bf16"]
    if torch.accelerator.is_available():
        return torch.cuda.is_available()
    return "WORLD_SIZE" not in os.environ and bf16_is_faster()  # processes that each measure would not agree


def is_complete(output: Path, wanted: dict) -> bool:
    found = output / CONFIGURATION
    return found.exists() and json.loads(found.read_text(encoding="utf-8")) == wanted


def claim_output(args: argparse.Namespace, wanted: dict) -> None:
    """Makes the output directory ready for this run.

    Raises:
        UserError: something else is there.
    """
    output, work = args.output, args.output / WORK
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file")
    if os.path.ismount(output):
        raise UserError(f"{output} is a mount point, which cannot be replaced as a whole: give a directory in it")
    if Path.cwd().is_relative_to(output.resolve()):
        raise UserError(f"{output} is the current directory, or above it: run from elsewhere")
    if not args.overwrite:
        for found in (output / CONFIGURATION, work / CONFIGURATION):
            old = json.loads(found.read_text(encoding="utf-8")) if found.exists() else wanted
            differences = [
                f"{name} {old.get(name)} instead of {wanted.get(name)}"
                for name in sorted(wanted.keys() | old.keys())
                if wanted.get(name) != old.get(name)
            ]
            if differences:
                raise UserError(
                    f"{output} has another run ({', '.join(differences)}): give another --output, or --overwrite"
                )
        if (output / "config.json").exists():
            raise UserError(f"{output} has a model: give another --output, or --overwrite")
    work.mkdir(parents=True, exist_ok=True)


def start_work(work: Path, wanted: dict) -> None:
    """Says whose checkpoints these are, and removes those of another run that is to be overwritten, and unfinished
    ones."""
    found = work / CONFIGURATION
    another = not found.exists() or json.loads(found.read_text(encoding="utf-8")) != wanted
    for path in work.iterdir():
        if another or (path.match("checkpoint-*") and not is_whole(path)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_text(found, json.dumps(wanted, indent=1))


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    use_cpu = not torch.accelerator.is_available()
    options = {
        "output_dir": str(args.output / WORK),
        "max_steps": args.steps or 10**9,  # else the clock ends the training
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "use_cpu": use_cpu,
        "use_cache": True,  # of the saved config: the model does without one while training
        "bf16": args.bf16,
        "train_sampling_strategy": "sequential" if args.stateful else "random",
        "logging_steps": 10,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": not use_cpu,
        "remove_unused_columns": False,
        "save_strategy": "no",  # `Run` says when
        "save_total_limit": 2,
        "report_to": args.report_to,
        "ddp_timeout": 24 * 3600,  # the other processes wait while the first one tokenises
        "seed": args.seed,
    }
    if args.gradient_checkpointing:
        options["gradient_checkpointing"] = True
    if "tensorboard" in args.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(args.output / "tensorboard"))
    try:
        arguments = TrainingArguments(**(options | args.trainer))
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # looks whether its package is there
        return arguments
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"--trainer or --report-to: {error}") from error


def write_results(
    args: argparse.Namespace,
    model: xLSTMForCausalLM,
    weights: dict | None,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict,
) -> None:
    """Puts the complete run in the place of whatever is in the output directory, in one step."""
    output = args.output.resolve()
    dropped = OUTPUTS if (output / "config.json").exists() else (WORK,)
    keep = [path.name for path in output.iterdir() if not any(path.match(pattern) for pattern in dropped)]
    with replacing(output, 4 * metrics["parameters"], keep) as folder:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
        with replacing_file(folder / "loss_curve.png") as picture:
            plot_loss_curve(
                picture,
                metrics["train_curve"],
                metrics["heldout_curve"],
                metrics["yardsticks"],
                title=f"xLSTM, {metrics['parameters'] / 1e6:.1f} M parameters",
            )
        write_report(folder / "report.md", metrics)
        write_text(folder / CONFIGURATION, (output / WORK / CONFIGURATION).read_text(encoding="utf-8"))


def warn(metrics: dict) -> None:
    """Says what a disappointing result is due to, where that can be seen."""
    better = [name for name, bits in metrics["yardsticks"].items() if bits < metrics["bits_per_byte"]]
    if metrics["arguments"]["minutes"] and metrics["steps"] < 100:
        print(
            f"warning: only {metrics['steps']} steps: the machine is busy or slow, or the time short. Give more "
            "--minutes, or a smaller model."
        )
    elif better:
        print(f"warning: worse than {', '.join(better)}: train for longer, or with more text.")


def existing(path: str) -> Path:
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return Path(path)


def positive(number: str) -> float:
    value = float(number)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {number}")
    return value


def positive_int(number: str) -> int:
    value = float(number)  # also 3e9
    if value != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {number}")
    return int(value)


def trainer_option(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths = {"nargs": "+", "type": existing, "metavar": "FILE"}

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
    run.add_argument(
        "--schedule", choices=SCHEDULES, default="cosine", help="or wsd, warmup-stable-decay (%(default)s)"
    )
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
        help="fields of TrainingArguments, such as gradient_accumulation_steps=4 fsdp=full_shard",
    )

    args = parser.parse_args()
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
    if args.checkpoint_minutes is None:
        args.checkpoint_minutes = min(10.0, (args.minutes or math.inf) / 10)
    return args


def main() -> int:
    return run(parse_arguments())


def run(args: argparse.Namespace) -> int:
    """A whole training, from its options to its results; the exit status."""
    if args.bf16 is None:
        args.bf16 = choose_bf16(args.output)
    arguments = training_arguments(args)
    first = arguments.process_index == 0
    wanted, work = configuration(args, arguments), args.output / WORK
    tokens_per_step = (
        args.batch_size * args.sequence_length * arguments.world_size * arguments.gradient_accumulation_steps
    )
    if args.tokens:
        arguments.max_steps = -(-args.tokens // tokens_per_step)
    if is_complete(args.output, wanted):
        if first:
            print(f"{args.output} is complete: nothing to do")
        return 0
    with ExitStack() as stack:
        set_seed(args.seed)
        corpus = read_corpus(args)
        with arguments.main_process_first(local=False):
            if first:
                claim_output(args, wanted)
                if not stack.enter_context(locked(work)):
                    raise UserError(f"{args.output}: another process is training there")
                start_work(work, wanted)
            tokenizer, yardsticks = prepare(args, corpus, work)
            tokens = Tokens(work / "tokens")
        return train(args, arguments, corpus, tokenizer, tokens, yardsticks, tokens_per_step)


def train(
    args: argparse.Namespace,
    arguments: TrainingArguments,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    yardsticks: dict[str, float],
    tokens_per_step: int,
) -> int:
    first, work = arguments.process_index == 0, args.output / WORK
    if args.stateful:
        data = Streams(tokens, args.sequence_length, args.batch_size * arguments.world_size)
    else:
        data = Windows(tokens, args.sequence_length)
    checkpoint = last_checkpoint(work)
    budget = Budget(60 * args.minutes if args.minutes else None, None if args.minutes else arguments.max_steps)
    progress = Progress() if checkpoint is None else read_progress(checkpoint)
    over = budget.is_over(progress)
    set_seed(args.seed)
    model = load_model(checkpoint) if over else build_model(args, tokenizer)
    parameters = model.num_parameters()
    if first:
        check_room(args.output, BYTES_PER_PARAMETER * parameters if checkpoint is None else 0)
        print(f"{corpus.description}: {tokens.nbytes:,} bytes to train on, {num_bytes(corpus.heldout):,} held out")
        for name, value in yardsticks.items():
            print(f"  {name}: {value:.3f} bits per held-out byte")
        print(f"{len(tokens):,} tokens, {parameters:,} parameters")
        if checkpoint is not None:
            print(f"going on from {checkpoint}")

    # a glance at the held-out text while training: the beginnings of up to eight documents
    glance = [text[:8_000] for text in corpus.heldout[:: math.ceil(len(corpus.heldout) / 8)]]
    control = Run(
        budget,
        evaluate=partial(bits_per_byte, tokenizer=tokenizer, documents=glance),
        evaluations=args.evaluations,
        save_every=60 * args.checkpoint_minutes,
        progress=progress,
        tokens_per_step=tokens_per_step,
    )
    trainer = RunTrainer(
        model, arguments, train_dataset=data, run=control, schedule=args.schedule, stateful=args.stateful
    )
    trainer.remove_callback(ProgressCallback)  # `Run` has a bar
    if checkpoint is not None:
        trainer.load_states(checkpoint)
    if not over:  # else it was ended between its last step and the results
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk is any of the three
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            raise UserError(f"{work}: cannot write a checkpoint: {error}") from error
        finally:
            control.close()
    steps = progress.steps
    if control.signal:
        if first:
            print(f"interrupted after step {steps}: the same command goes on from there", file=sys.stderr)
        return 128 + control.signal

    bits = bits_per_byte(trainer.model, tokenizer, corpus.heldout)
    if not math.isfinite(bits):
        raise UserError(f"the held-out text costs {bits} bits per byte: nothing is saved; lower --learning-rate")
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not first:
        return 0
    model = trainer.accelerator.unwrap_model(trainer.model)
    bits_per_nat = len(tokens) / tokens.nbytes / math.log(2)  # of the training text: nats per token to bits per byte
    paths = ("data", "heldout", "output", "tokenizer", "config", "model", "overwrite", "report_to")
    metrics = {
        "corpus": corpus.description,
        "bits_per_byte": bits,
        "yardsticks": yardsticks,
        "parameters": parameters,
        "layer_types": model.config.layers_block_type,
        "train_bytes": tokens.nbytes,
        "train_tokens": len(tokens),
        "heldout_bytes": num_bytes(corpus.heldout),
        "steps": steps,
        "tokens_seen": steps * tokens_per_step,
        "training_seconds": progress.seconds,
        "device": f"{model.device.type}, {torch.get_num_threads()} threads",
        "train_curve": [(minutes, nats * bits_per_nat) for minutes, nats in progress.train_curve],
        "heldout_curve": progress.heldout_curve,
        "arguments": {name: value for name, value in vars(args).items() if name not in paths},
    }
    write_results(args, model, weights, tokenizer, metrics)
    print(f"held-out text: xLSTM {bits:.3f} bits per byte; wrote {args.output}/")
    warn(metrics)
    return 0


if __name__ == "__main__":
    command(main)
