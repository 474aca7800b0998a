"""Trains a Llama of as many parameters as the chat model, on the same tokens in windows of the same length.

    python models/chat/peer.py runs/chat-llama --tokenizer runs/chat --text runs/chat-text --seconds 4070 \\
        --learning-rate 2e-3

The same command again goes on from the last checkpoint.

Its optimiser, schedule and loss are those of `hf-xlstm train`. Attention reaches as far as the window and does not see
other documents in it, as the xLSTM does not.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
from evaluation import windowed_bits_per_byte
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, ProgressCallback, TrainingArguments, set_seed

from hf_xlstm.commands.helpers.corpus import files
from hf_xlstm.commands.helpers.tokens import Tokens, Windows, tokenise
from hf_xlstm.commands.helpers.training import Budget, Progress, Run, RunTrainer, last_checkpoint, read_progress


LENGTH = 512  # tokens of a window
BATCH = 4  # windows of a step


def llama(vocab_size: int, **ids) -> LlamaForCausalLM:
    """The shape of the chat model: width 256, 4 blocks. The width of the feed-forward layer makes up the rest."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=664,
            max_position_embeddings=LENGTH,
            use_cache=False,  # with a cache, Llama would not tell the documents of a window apart
            **ids,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the chat model")
    parser.add_argument("--text", type=Path, required=True, help="directory that corpus.py wrote")
    parser.add_argument("--seconds", type=float, required=True, help="of processor time")
    parser.add_argument("--learning-rate", type=float, required=True)
    args = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    corpus = files([args.text / "train.jsonl"], [args.text / "heldout.jsonl"])
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "tokens").exists():
        tokenise(corpus.train, tokenizer, args.output / "tokens", corpus.nbytes)
    tokens = Tokens(args.output / "tokens")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = llama(len(tokenizer), **ids)
    print(f"{model.num_parameters():,} parameters")
    checkpoint = last_checkpoint(args.output)
    progress = Progress() if checkpoint is None else read_progress(checkpoint)
    run = Run(
        Budget(args.seconds, None),
        evaluate=partial(windowed_bits_per_byte, tokenizer=tokenizer, documents=corpus.heldout[::16], length=LENGTH),
        evaluations=1,
        progress=progress,
        tokens_per_step=BATCH * LENGTH,
        clock=time.process_time,
    )
    arguments = TrainingArguments(
        output_dir=str(args.output),
        max_steps=10**9,  # the clock ends the training
        per_device_train_batch_size=BATCH,
        learning_rate=args.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        use_cpu=True,
        logging_steps=10,
        logging_first_step=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",  # `Run` says when
        save_total_limit=1,
        report_to=[],
    )
    trainer = RunTrainer(model, arguments, train_dataset=Windows(tokens, LENGTH), run=run)
    trainer.remove_callback(ProgressCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if run.signal:
        return
    bits = windowed_bits_per_byte(model, tokenizer, corpus.heldout, LENGTH)
    model.save_pretrained(args.output)
    bits_per_nat = len(tokens) / tokens.nbytes / math.log(2)  # as `train` has it
    metrics = {
        "parameters": model.num_parameters(),
        "learning_rate": args.learning_rate,
        "steps": progress.steps,
        "processor_seconds": progress.seconds,
        "bits_per_byte": bits,
        "threads": torch.get_num_threads(),
        "train_curve": [nats * bits_per_nat for _, nats in progress.train_curve],  # after step 1, 10, 20, …
    }
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    print(f"{bits:.3f} bits per held-out byte after {progress.steps} steps, {progress.seconds:.0f} processor seconds")


if __name__ == "__main__":
    main()
