"""Decoding and reading a prompt by an exported model, beside the same model in PyTorch.

decode     single-token steps: `forward` in a loop
prefill    reading a prompt, for the logits of its last token
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.generation import NEW_TOKENS, PROMPT_LENGTH
from benchmarks.cpu.harness import Measure, Turn, build, main, random_tokens, summarize, take_turns
from benchmarks.peers import HF_XLSTM
from benchmarks.provenance import relative_error, seconds, significant
from hf_xlstm.export import FORMATS, export_model, xLSTMExportedForCausalLM


def decode_turn(model, batch_size: int) -> Turn:
    outputs = model(random_tokens(batch_size, PROMPT_LENGTH), use_cache=True, logits_to_keep=1)
    cache, token = outputs.cache, outputs.logits[:, -1:].argmax(-1)

    def step() -> None:
        nonlocal token
        token = model(token, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)

    step()
    return lambda: NEW_TOKENS * seconds(step, NEW_TOKENS)


def prefill_turn(model, length: int) -> Turn:
    ids = random_tokens(1, length)
    model(ids[:, :128], use_cache=True, logits_to_keep=1)
    return partial(seconds, lambda: model(ids, use_cache=True, logits_to_keep=1))


@torch.no_grad()
def measure(size: str, weights: str, start, tokens: int, args: argparse.Namespace) -> dict:
    """The speeds of the model in PyTorch, in float32 and prepacked, and of its exports, with the error of their
    logits and the bytes of their files."""
    model = build(HF_XLSTM, size, torch.float32).eval()
    model.pack_for_decoding()
    ids = random_tokens(2, 100)
    expected = model(ids).logits
    turns, exports = {HF_XLSTM: start(model)}, {}
    for format in FORMATS:
        with tempfile.TemporaryDirectory() as directory:
            export_model(model, directory, format, weights)
            start_up = seconds(lambda: xLSTMExportedForCausalLM.from_pretrained(directory))
            exported = xLSTMExportedForCausalLM.from_pretrained(directory)
            exports[format] = {
                "error": significant(relative_error(exported(ids).logits, expected), 2),
                "start_up_seconds": significant(start_up),
                "bytes": sum(path.stat().st_size for path in Path(directory).iterdir()),
            }
            turns[format] = start(exported)
    results = summarize(take_turns(turns, args.rounds, args.seconds), tokens, [HF_XLSTM])
    return {"peers": results, "exports": exports}


def rows(quick: bool) -> dict[str, Measure]:
    sizes = ["128x2"] if quick else ["768x8", "512x12", "1024x9"]
    batch_sizes, length = ([2], 192) if quick else ([1, 8], 2048)
    table = {}
    for size in sizes:
        for weights in ("float32",) if quick else ("float32", "int8", "int4"):
            for batch_size in batch_sizes:
                start = partial(decode_turn, batch_size=batch_size)
                table[f"decode/{size}/{weights}/batch-{batch_size}"] = partial(
                    measure, size, weights, start, NEW_TOKENS * batch_size
                )
            start = partial(prefill_turn, length=length)
            table[f"prefill/{size}/{weights}/{length}"] = partial(measure, size, weights, start, length)
    return table


if __name__ == "__main__":
    main("exported", __doc__, rows)
