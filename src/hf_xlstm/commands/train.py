"""Trains a language model, from the options to the results; `hf_xlstm_cli.train` reads the options."""

import argparse
import importlib
import json
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler
from transformers.utils.logging import disable_progress_bar

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.files import appearing, check_room, locked, replacing, replacing_file, write_text
from hf_xlstm_cli.errors import UserError, need
from hf_xlstm_cli.presets import DEFAULT, SIZES, slstm_positions

from .helpers.bits_per_byte import bits_per_byte
from .helpers.corpus import Corpus, files, hub_dataset, num_bytes, pieces, state_of_the_union
from .helpers.models import check_directory, load_model, load_tokenizer, read_config
from .helpers.report import write_report
from .helpers.tokens import Streams, Tokens, Windows, tokenise, train_tokenizer
from .helpers.training import (
    FEW_STEPS,
    Budget,
    Progress,
    Run,
    RunTrainer,
    bf16_is_faster,
    few_steps,
    is_whole,
    last_checkpoint,
    read_progress,
)
from .helpers.yardsticks import ByteNGram, lzma_bits_per_byte


WORK = "checkpoints"  # in the output directory, until the training is complete
CONFIGURATION = "run.json"
# What a model and a run consist of, and the next one in their place does not keep. All else is the user's.
OUTPUTS = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.*", "merges.txt"),
    *("metrics.json", "loss_curve.png", "report.md", CONFIGURATION, WORK),
)
YARDSTICK_BYTES = 64 * 2**20  # of longer texts an n-gram model and lzma would take too long
BYTES_PER_PARAMETER = 4 + 3 * 12  # the model, and three checkpoints with AdamW's moments


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
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


def measure_yardsticks(corpus: Corpus, nbytes: int) -> dict[str, float]:
    """Held-out bits per byte of models that need no training time, `nbytes` being the size of the training text, which
    files of Parquet do not tell."""
    heldout_bytes = [text.encode() for text in corpus.heldout]
    text = b"".join(heldout_bytes)
    if corpus.nbytes is None or nbytes > YARDSTICK_BYTES:  # a stream is not read once more
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


def prepare(
    args: argparse.Namespace, corpus: Corpus, work: Path
) -> tuple[PreTrainedTokenizerBase, Tokens, dict[str, float]]:
    """The tokenizer, the tokens and the yardsticks in `work`: made by the first process that comes, then found."""
    folder, stream, measured = work / "tokenizer", work / "tokens", work / "yardsticks.json"
    if not folder.exists():
        if args.tokenizer or args.model:
            tokenizer = load_tokenizer(args.tokenizer or args.model)
        else:
            preset = SIZES[args.size] if args.size else DEFAULT
            tokenizer = train_tokenizer(corpus.train, args.vocab_size or preset.vocab_size)
        with appearing(folder) as partial_folder:
            tokenizer.save_pretrained(partial_folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not stream.exists():
        tokenise(corpus.train, tokenizer, stream, corpus.nbytes)
    tokens = Tokens(stream)
    if not measured.exists():
        write_text(measured, json.dumps(measure_yardsticks(corpus, tokens.nbytes)))
    return tokenizer, tokens, json.loads(measured.read_text(encoding="utf-8"))


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
        # what failed before it had a checkpoint, by a wrong option or text, is no run to protect
        for found in (output / CONFIGURATION, *([work / CONFIGURATION] if last_checkpoint(work) else [])):
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


def check_reporters(arguments: TrainingArguments) -> None:
    """Raises UserError for a reporter that Transformers does not know, whose package is not there, or that has no key:
    wandb would ask for it after the text has been read."""
    reporters = arguments.report_to or []
    try:
        for callback in get_reporting_integration_callbacks(reporters):
            callback()
        if "wandb" in reporters and arguments.process_index == 0:
            importlib.import_module("wandb").login()
    except Exception as error:  # of whatever kind: a reporter has its own
        # of all messages that of TensorBoard alone does not say it
        install = " Run `pip install tensorboard`." if "TensorBoard" in str(error) else ""
        raise UserError(f"--report-to: {error}{install}") from error


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
        "ddp_find_unused_parameters": False,  # there are none, and DDP would look for them in every step
        "ddp_timeout": 24 * 3600,  # the other processes wait while the first one tokenises
        "seed": args.seed,
    }
    if args.gradient_checkpointing:  # the new name, where there is one: the old one warns
        name = "activation_checkpointing"
        options[name if hasattr(TrainingArguments, name) else "gradient_checkpointing"] = True
    try:
        arguments = TrainingArguments(**(options | args.trainer))
        if "lr_scheduler_type" in args.trainer:  # looks whether its arguments are there, before hours of text
            more: dict = {"scheduler_specific_kwargs": arguments.lr_scheduler_kwargs}
            get_scheduler(arguments.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), 0, 1, **more)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"--trainer: {error}") from error
    if "tensorboard" in (arguments.report_to or []):
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(args.output / "tensorboard"))
    check_reporters(arguments)
    if arguments.fsdp and (use_cpu or arguments.world_size == 1):  # Accelerate would copy the model, in silence
        raise UserError("--trainer fsdp: a model is shared by several processes that have a GPU each")
    return arguments


def write_results(
    args: argparse.Namespace,
    model: xLSTMForCausalLM,
    weights: dict | None,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict,
) -> None:
    """Puts the complete run in the place of whatever is in the output directory, in one step."""
    from .helpers.plots import plot_loss_curve  # matplotlib is an extra

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
    """Says, on the error output, what a disappointing result is due to, where that can be seen."""
    bits, steps, seconds = metrics["bits_per_byte"], metrics["steps"], metrics["training_seconds"]
    better = [f"{name} ({value:.2f})" for name, value in metrics["yardsticks"].items() if value < bits]
    text = f"warning: {bits:.2f} bits per byte" + (f", worse than {', '.join(better)}" if better else "")
    if metrics["arguments"]["minutes"] and steps < FEW_STEPS:
        text += f": {few_steps(steps, seconds)}"
    elif better:
        text += ": train for longer, or with more text."
    else:
        return
    print(text, file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """A whole training, from its options to its results; the exit status."""
    need("matplotlib", "train")
    disable_progress_bar()  # of Transformers, which has one for each checkpoint; that of the training stays
    if args.model:
        check_directory(args.model)
    if args.config:
        read_config(args.config)
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
        ready = [False]
        try:
            if first:
                claim_output(args, wanted)
                if not stack.enter_context(locked(work)):
                    raise UserError(f"{args.output}: another process is training there")
                start_work(work, wanted)
                prepare(args, corpus, work)
                ready = [True]
        finally:
            broadcast_object_list(ready)  # the others wait here
        if not ready[0]:
            return 2  # the first process says why
        return train(args, arguments, corpus, *prepare(args, corpus, work), tokens_per_step)


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
    budget = Budget(60 * args.minutes if args.minutes else None, arguments.max_steps)
    progress = Progress() if checkpoint is None else read_progress(checkpoint)
    over = budget.is_over(progress)
    set_seed(args.seed)
    model = load_model(checkpoint) if checkpoint is not None and over else build_model(args, tokenizer)
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
        except Exception as error:
            package = type(error).__module__.partition(".")[0]
            if package not in (arguments.report_to or []):
                raise
            raise UserError(f"--report-to {package}: {error}") from error
        finally:
            control.close()
    steps = progress.steps
    if control.signal:
        if first:
            print(f"interrupted after step {steps}: the same command goes on from there", file=sys.stderr)
        return 128 + control.signal

    trained: Any = trainer.model  # which may be wrapped
    bits = bits_per_byte(trained, tokenizer, corpus.heldout)
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
