"""Puts a trained chat model into the package: weights in bfloat16, its tokenizer, how turns are written, and how to
sample.

    python models/chat/pack.py runs/chat
"""

import argparse
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from hf_xlstm_chat import path


# A turn is a line.
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role not in ("user", "assistant") -%}
{{- raise_exception("This model knows the roles user and assistant only.") -}}
{%- endif -%}
{{- message.content.split() | join(" ") + "\\n" -}}
{%- endfor -%}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory that `hf-xlstm train` wrote")
    run, folder = parser.parse_args().run, Path(path)
    folder.mkdir(exist_ok=True)
    # config.json says float32: the weights are stored in half of the space, and computed with where a CPU is fast
    shutil.copy(run / "config.json", folder)
    with safe_open(run / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name).bfloat16() for name in file.keys()}  # noqa: SIM118  no dictionary
        save_file(weights, folder / "model.safetensors", file.metadata())
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (line_end,) = tokenizer("\n", add_special_tokens=False).input_ids
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, line_end],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=100,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    ).save_pretrained(folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
