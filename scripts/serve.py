"""Serves xLSTM models over HTTP as OpenAI's API: `transformers serve`, with the classes of this package.

    python scripts/serve.py runs/mine --port 8000

The arguments are those of `transformers serve`. `/v1/completions` continues a text; `/v1/chat/completions` needs a
tokenizer with a chat template.
"""

import transformers
import typer
from transformers.cli.serve import Serve

import hf_xlstm


if __name__ == "__main__":
    # the server looks for the model's class by its name in Transformers, where another one has that name
    transformers.xLSTMForCausalLM = hf_xlstm.xLSTMForCausalLM
    typer.run(Serve)
