"""A chat with the model in the terminal, until the end of the input (Ctrl-D).

The state goes on from turn to turn: what has been said is read once, and the memory does not grow with it.
"""

import sys
from collections.abc import Iterable, Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import path


def answers(lines: Iterable[str]) -> Iterator[str]:
    """What the model says to each line, until it ends the conversation or there are no more lines."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids, cache = [tokenizer.bos_token_id], None
    for line in lines:
        read = len(ids := ids + tokenizer(" ".join(line.split()) + "\n", add_special_tokens=False).input_ids)
        turn = model.generate(torch.tensor([ids]), cache=cache, return_dict_in_generate=True)
        ids, cache = turn.sequences[0].tolist(), turn.cache
        yield tokenizer.decode(ids[read:], skip_special_tokens=True).strip()
        if ids[-1] == tokenizer.eos_token_id:
            return
        if tokenizer.decode(ids[-1]) != "\n":  # the answer had reached its longest
            ids += tokenizer("\n", add_special_tokens=False).input_ids


def prompt() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def main() -> None:
    print("Say something; Ctrl-D ends the chat.", file=sys.stderr)
    for answer in answers(prompt()):
        print(answer or "(The model ends the chat.)")


if __name__ == "__main__":
    main()
