"""Trains a small xLSTM language model for a given time and compares it with simpler models of the same text.

Writes to the output directory the model and its tokenizer (for AutoModelForCausalLM and AutoTokenizer, after
`import hf_xlstm`), loss_curve.png, metrics.json and report.md.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from helpers.bits_per_byte import bits_per_byte
from helpers.corpus import Corpus, num_bytes, state_of_the_union, text_files
from helpers.report import plot_loss_curve, write_report
from helpers.yardsticks import ByteNGram, lzma_bits_per_byte
from hf_xlstm import xLSTMConfig, xLSTMForCausalLM


WARMUP = 0.05  # share of the time in which the learning rate rises


class TimeBudget(TrainerCallback):
    """Training by the clock: anneals the learning rate over `seconds`, evaluates at equal intervals, then stops.

    The learning rate follows the time that has really passed, so it reaches zero on a machine of any speed, and on one
    that is shared.
    """

    def __init__(
        self,
        seconds: float,
        evaluate: Callable[[], float],
        evaluations: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.seconds = seconds
        self.evaluate = evaluate
        self.evaluations = evaluations
        self.clock = clock
        self.start: float | None = None
        self.train_curve: list[tuple[float, float]] = []  # (minutes, nats per token)
        self.heldout_curve: list[tuple[float, float]] = []  # (minutes, bits per byte)

    @property
    def elapsed(self) -> float:
        return 0.0 if self.start is None else self.clock() - self.start

    def learning_rate_factor(self, _step: int) -> float:
        """Linear warm-up, cosine to zero."""
        done = min(self.elapsed / self.seconds, 1.0)
        return min(done / WARMUP, 0.5 * (1 + math.cos(math.pi * done)))

    def on_train_begin(self, args, state, control, **kwargs):
        self.heldout_curve.append((0.0, self.evaluate()))
        self.start = self.clock()
        self.bar = tqdm(
            total=round(self.seconds), desc="training", unit="s", bar_format="{l_bar}{bar}| {n}/{total} s{postfix}"
        )

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.train_curve.append((self.elapsed / 60, float(logs["loss"])))
            self._show(state)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.elapsed >= self.seconds
        next_due = self.heldout_curve[-1][0] + self.seconds / 60 / self.evaluations
        if self.elapsed / 60 >= next_due or control.should_training_stop:
            self.heldout_curve.append((self.elapsed / 60, self.evaluate()))
            self._show(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def _show(self, state) -> None:
        curves = {"loss": self.train_curve, "held-out bits per byte": self.heldout_curve}
        last = [f"{name} {curve[-1][1]:.3f}" for name, curve in curves.items() if curve]
        self.bar.n = min(round(self.elapsed), self.bar.total)
        self.bar.set_postfix_str(", ".join([f"step {state.global_step}", *last]))


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, lossless on any text; every encoded text begins with BOS."""
    bos, eos, pad = special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def windows(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], length: int) -> torch.Tensor:
    """All documents, from BOS to EOS, as one stream cut into windows of shape (N, length)."""
    stream = [token for ids in tokenizer(list(documents)).input_ids for token in [*ids, tokenizer.eos_token_id]]
    count = len(stream) // length
    if count == 0:
        raise SystemExit(f"the text has {len(stream)} tokens, fewer than one window of --sequence-length {length}")
    return torch.tensor(stream[: count * length]).view(count, length)


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> xLSTMForCausalLM:
    layer_types = ["slstm" if i in args.slstm_at else "mlstm" for i in range(args.num_layers)]
    config = xLSTMConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_heads=args.num_heads,
        layer_types=layer_types if args.slstm_at else None,
        slstm_num_heads=args.num_heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return xLSTMForCausalLM(config)


def adamw(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def bf16_is_faster() -> bool:
    """Many processors multiply matrices in bfloat16 several times faster, others only emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1024, 1024, dtype=dtype)
        x @ x  # warm-up
        start = time.perf_counter()
        x @ x
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def train(model: xLSTMForCausalLM, data: torch.Tensor, budget: TimeBudget, args: argparse.Namespace) -> int:
    """Returns the number of steps."""
    use_cpu = not torch.accelerator.is_available()
    optimizer = adamw(model, args.learning_rate)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=10**9,  # the budget ends the training
            per_device_train_batch_size=args.batch_size,
            max_grad_norm=1.0,
            use_cpu=use_cpu,
            use_cache=True,  # of the saved config: the model does without one while training
            bf16=torch.cuda.is_available() or (use_cpu and bf16_is_faster()),
            logging_steps=10,
            logging_first_step=True,
            dataloader_pin_memory=not use_cpu,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=[{"input_ids": window, "labels": window} for window in data],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, budget.learning_rate_factor)),
        callbacks=[budget],
    )
    trainer.remove_callback(ProgressCallback)  # counts steps, whose number is not known here
    trainer.train()
    return trainer.state.global_step


def measure_yardsticks(corpus: Corpus) -> dict[str, float]:
    """Held-out bits per byte of models that need no training time."""
    train_bytes = [text.encode() for text in corpus.train]
    heldout_bytes = [text.encode() for text in corpus.heldout]
    primer, text = b"".join(train_bytes), b"".join(heldout_bytes)
    with ThreadPoolExecutor() as pool:  # lzma releases the interpreter lock
        alone = pool.submit(lzma_bits_per_byte, text)
        primed = pool.submit(lzma_bits_per_byte, text, primer)
        ngram = ByteNGram(train_bytes, order=5).bits_per_byte(heldout_bytes)
    return {"lzma": alone.result(), "lzma after the training text": primed.result(), "5-gram of bytes": ngram}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    files = {"nargs": "+", "type": Path, "metavar": "FILE"}

    text = parser.add_argument_group("text")
    text.add_argument("--data", **files, help="UTF-8 texts, a document each (default: State of the Union addresses)")
    text.add_argument("--heldout", **files, default=[], help="held-out texts (default: the end of every --data file)")
    text.add_argument("--vocab-size", type=int, default=2048, help="of the byte-level BPE tokenizer (%(default)s)")

    model = parser.add_argument_group("model")
    model.add_argument("--hidden-size", type=int, default=192, help="width (%(default)s)")
    model.add_argument("--num-layers", type=int, default=4, help="number of blocks (%(default)s)")
    model.add_argument("--num-heads", type=int, default=4, help="heads per layer (%(default)s)")
    model.add_argument(
        "--slstm-at",
        type=int,
        nargs="*",
        default=[1],
        metavar="LAYER",
        help="layers that are sLSTM, counted from 0; the others are mLSTM (%(default)s)",
    )

    run = parser.add_argument_group("training")
    run.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the model and the report")
    run.add_argument("--minutes", type=float, default=3.0, help="training time (%(default)s)")
    run.add_argument("--sequence-length", type=int, default=128, help="tokens per window (%(default)s)")
    run.add_argument("--batch-size", type=int, default=8, help="windows per step (%(default)s)")
    run.add_argument("--learning-rate", type=float, default=6e-3, help="at its peak (%(default)s)")
    run.add_argument(
        "--seed", type=int, default=0, help="of the initialisation and the order of windows (%(default)s)"
    )

    args = parser.parse_args()
    if args.heldout and not args.data:
        parser.error("--heldout needs --data")
    if not set(args.slstm_at) <= set(range(args.num_layers)):
        parser.error(f"--slstm-at names layers from 0 to {args.num_layers - 1}")
    return args


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "evaluation.json").unlink(missing_ok=True)  # by eval.py, of the model that was here
    set_seed(args.seed)

    corpus = text_files(args.data, args.heldout) if args.data else state_of_the_union()
    train_bytes, heldout_bytes = num_bytes(corpus.train), num_bytes(corpus.heldout)
    print(f"{corpus.description}: {train_bytes:,} bytes to train on, {heldout_bytes:,} held out")
    yardsticks = measure_yardsticks(corpus)
    for name, value in yardsticks.items():
        print(f"  {name}: {value:.3f} bits per held-out byte")

    tokenizer = train_tokenizer(corpus.train, args.vocab_size)
    data = windows(tokenizer, corpus.train, args.sequence_length)
    model = build_model(args, tokenizer)
    print(f"{data.numel():,} tokens, {model.num_parameters():,} parameters")

    # a glance at the held-out text while training: the beginnings of up to eight documents
    glance = [text[:8_000] for text in corpus.heldout[:: math.ceil(len(corpus.heldout) / 8)]]
    budget = TimeBudget(60 * args.minutes, evaluate=lambda: bits_per_byte(model, tokenizer, glance))
    steps = train(model, data, budget, args)
    training_seconds = budget.elapsed
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    bits = bits_per_byte(model, tokenizer, corpus.heldout)
    bits_per_nat = data.numel() / train_bytes / math.log(2)  # of the training text: nats per token to bits per byte
    metrics = {
        "corpus": corpus.description,
        "bits_per_byte": bits,
        "yardsticks": yardsticks,
        "parameters": model.num_parameters(),
        "layer_types": model.config.layer_types or ["mlstm"] * model.config.num_hidden_layers,
        "train_bytes": train_bytes,
        "train_tokens": data.numel(),
        "heldout_bytes": heldout_bytes,
        "steps": steps,
        "tokens_seen": steps * args.batch_size * args.sequence_length,
        "training_seconds": training_seconds,
        "device": f"{model.device.type}, {torch.get_num_threads()} threads",
        "train_curve": [(minutes, nats * bits_per_nat) for minutes, nats in budget.train_curve],
        "heldout_curve": budget.heldout_curve,
        "arguments": {name: value for name, value in vars(args).items() if name not in ("data", "heldout", "output")},
    }
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    plot_loss_curve(
        args.output / "loss_curve.png",
        metrics["train_curve"],
        metrics["heldout_curve"],
        yardsticks,
        title=f"xLSTM, {model.num_parameters() / 1e6:.1f} M parameters",
    )
    write_report(args.output / "report.md", metrics)
    print(f"held-out text: xLSTM {bits:.3f} bits per byte; wrote {args.output}/")


if __name__ == "__main__":
    main()
