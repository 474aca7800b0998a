"""Prompt lookup against plain decoding, on text that repeats itself: records with the same keys over and over.

A small model learns such records in a minute or two, then continues some of them greedily. Prompt lookup guesses the
next tokens from what followed the last ones earlier in the text; the model checks all guesses in one pass, and its
cache takes back what it rejects. The texts must be identical.
"""

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path

import torch

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import Measure, main
from benchmarks.provenance import seconds, significant


def records(seed: int, number: int) -> str:
    choose = random.Random(seed).choice
    lines = []
    for i in range(number):
        name, language = choose(("Ada", "Grace", "Edsger", "Barbara")), choose(("en", "de", "fr"))
        lines.append(json.dumps({"id": 1000 + i, "name": name, "language": language, "score": choose(range(10))}))
    return "\n".join([*lines, ""])


def encode(text: str) -> torch.Tensor:
    return torch.tensor([list(text.encode())])


def learn(model: xLSTMForCausalLM, steps: int, length: int = 192, batch_size: int = 8) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = torch.cat([encode(records(batch_size * step + i, 4))[:, :length] for i in range(batch_size)])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def decode(model: xLSTMForCausalLM, prompt: torch.Tensor, new_tokens: int, guesses: int | None) -> tuple[dict, list]:
    """Speed, and the ids. `guesses`: how many tokens to look up at a time; None: plain decoding."""
    passes, ids = 0, []

    def count(*args) -> None:
        nonlocal passes
        passes += 1

    def generate() -> None:
        options = {} if guesses is None else {"prompt_lookup_num_tokens": guesses}
        ids.extend(model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, **options).tolist())

    hook = model.backbone.register_forward_hook(count)
    tokens_per_second = significant(new_tokens / seconds(generate))
    hook.remove()
    speed = {"tokens_per_second": tokens_per_second, "tokens_per_pass": significant(new_tokens / passes)}
    return {"guesses": guesses} | speed, ids


def measure(steps: int, new_tokens: int, guesses: list[int], args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=256,
        hidden_size=256,
        num_hidden_layers=4,
        num_heads=4,
        layer_types=["mlstm", "mlstm", "mlstm", "slstm"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = xLSTMForCausalLM(config)
    loss = learn(model.train(), steps)
    model.eval()
    prompt = encode(records(-1, 6))
    _, expected = decode(model, prompt, new_tokens, None)  # also the warm-up
    results = []
    for count in (None, *guesses):
        runs = [decode(model, prompt, new_tokens, count) for _ in range(args.rounds)]
        best = max((result for result, _ in runs), key=lambda result: result["tokens_per_second"])
        if not all(ids == expected for _, ids in runs):
            raise AssertionError(f"Prompt lookup with {count} guesses writes another text.")
        results.append(best)
    for result in results:
        result["speedup"] = significant(result["tokens_per_second"] / results[0]["tokens_per_second"], 3)
    return {
        "model": {"parameters": model.num_parameters(), "blocks": config.layer_types, "final_loss": loss},
        "prompt_tokens": prompt.shape[1],
        "new_tokens": new_tokens,
        "text": bytes(expected[0][prompt.shape[1] :]).decode(errors="replace"),
        "results": results,
    }


def rows(quick: bool) -> dict[str, Measure]:
    """Training steps, length of the continuation, tokens to look up at a time."""
    return {"records": partial(measure, 2, 8, [3]) if quick else partial(measure, 150, 256, [3, 5, 10, 20])}


if __name__ == "__main__":
    main("speculative", __doc__, rows)
