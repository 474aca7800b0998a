"""Generates text and measures the cost of contexts; `hf_xlstm_cli.generate` reads the options."""

import argparse
import time
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer, set_seed

from hf_xlstm.files import write_text
from hf_xlstm_cli.errors import UserError, need

from .helpers.models import check_directory, load_model, load_tokenizer
from .helpers.report import markdown_table


PREFILL_WINDOW = 512  # tokens per forward pass while reading a context, which bounds the memory of prefill


class Recorder(TextStreamer):
    """Prints the text as it comes and keeps it."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(text, stream_end)
        self.text += text


@torch.inference_mode()
def decoding_cost(model: PreTrainedModel, context: torch.Tensor, new_tokens: int = 100) -> dict[str, float]:
    """Reads `context` of shape (1, T), then decodes greedily: tokens per second of either, and memory in bytes."""
    process = need("psutil", "train").Process()
    cache: Any = None
    start = time.perf_counter()
    for ids in context.split(PREFILL_WINDOW, dim=1):
        outputs = model(ids, cache=cache, use_cache=True, logits_to_keep=1)
        cache = outputs.cache
    read = time.perf_counter()
    for _ in range(new_tokens):
        token = outputs.logits[:, -1:].argmax(-1)
        outputs = model(token, cache=cache, use_cache=True)
    token.tolist()  # waits for an accelerator
    end = time.perf_counter()
    return {
        "prefill": context.shape[1] / (read - start),
        "decode": new_tokens / (end - read),
        "state": cache.nbytes,
        "process": process.memory_info().rss,
    }


def compare_contexts(model: PreTrainedModel, prompt: torch.Tensor, lengths: list[int]) -> str:
    """A Markdown table of decoding cost after contexts of each length, the prompt repeated."""
    contexts = [prompt.repeat(1, n // prompt.shape[1] + 1)[:, :n] for n in lengths]
    for _ in range(2):  # the first round is for warming up: otherwise the first context seems to be the slow one
        costs = [decoding_cost(model, context) for context in contexts]
    rows = [
        ["decoding, tokens/s", *(f"{cost['decode']:,.0f}" for cost in costs)],
        ["reading the context, tokens/s", *(f"{cost['prefill']:,.0f}" for cost in costs)],
        ["state, kB", *(f"{cost['state'] / 1e3:,.0f}" for cost in costs)],
        ["whole process, MB", *(f"{cost['process'] / 1e6:,.0f}" for cost in costs)],
    ]
    return markdown_table(["context, tokens", *(f"{n:,}" for n in lengths)], rows)


def run(args: argparse.Namespace) -> None:
    """Prints the continuation, and the table if there are contexts to compare."""
    if args.contexts:
        need("psutil", "train")
    set_seed(args.seed)
    check_directory(args.model)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    if inputs.input_ids.shape[1] == 0:
        raise UserError("--prompt is empty, and the tokenizer has no BOS token to begin with")
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    streamer = Recorder(tokenizer, skip_special_tokens=True)
    model.generate(
        **inputs,
        streamer=streamer,
        max_new_tokens=args.max_new_tokens,
        **(sampling if args.temperature > 0 else {"do_sample": False}),
    )
    report = f"\n## Generated text\n\n{streamer.text}\n"
    if args.contexts:
        table = compare_contexts(model, inputs.input_ids, args.contexts)
        print(f"\n{table}")
        report += f"\n## Cost at short and long context\n\n{table}\n"
    if args.report:
        before = args.report.read_text(encoding="utf-8") if args.report.exists() else ""
        write_text(args.report, before + report)
