"""Prompt lookup against plain decoding, on text that repeats itself: records with the same keys over and over.

A small model learns such records in a minute or two, then continues some of them greedily. Prompt lookup guesses the
next tokens from what followed the last ones earlier in the text; the model checks all guesses in one pass, and its
cache takes back what it rejects. The texts must be identical. Writes JSON.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import time
from pathlib import Path

import torch
import transformers

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM


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
    passes = 0

    def count(*args) -> None:
        nonlocal passes
        passes += 1

    hook = model.backbone.register_forward_hook(count)
    start = time.perf_counter()
    options = {} if guesses is None else {"prompt_lookup_num_tokens": guesses}
    ids = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, **options)
    seconds = time.perf_counter() - start
    hook.remove()
    result = {"guesses": guesses, "tokens_per_s": new_tokens / seconds, "tokens_per_pass": new_tokens / passes}
    return result, ids.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, help="write the JSON here instead of printing it")
    add("--steps", type=int, default=150, help="training steps")
    add("--new-tokens", type=int, default=256, help="length of the continuation")
    add("--guesses", type=int, nargs="+", default=[3, 5, 10, 20], help="tokens to look up at a time")
    add("--repeats", type=int, default=3, help="take the fastest of so many runs")
    args = parser.parse_args()

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
    loss = learn(model.train(), args.steps)
    model.eval()
    prompt = encode(records(-1, 6))
    expected = decode(model, prompt, args.new_tokens, None)[1]  # also the warm-up
    results = []
    for guesses in (None, *args.guesses):
        runs = [decode(model, prompt, args.new_tokens, guesses) for _ in range(args.repeats)]
        best = max((result for result, _ in runs), key=lambda result: result["tokens_per_s"])
        results.append(best | {"same_text": all(ids == expected for _, ids in runs)})
    for result in results:
        result["speedup"] = result["tokens_per_s"] / results[0]["tokens_per_s"]

    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    report = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": {"parameters": model.num_parameters(), "blocks": config.layer_types, "final_loss": loss},
        "prompt_tokens": prompt.shape[1],
        "new_tokens": args.new_tokens,
        "text": bytes(expected[0][prompt.shape[1] :]).decode(errors="replace"),
        "results": results,
    }
    text = json.dumps(report, indent=2) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
