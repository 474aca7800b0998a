"""The packed model: what README.md says of it, and how its text was made."""

import json
from pathlib import Path

import pytest
from corpus import conversations
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_xlstm
from hf_xlstm.commands.helpers.bits_per_byte import bits_per_byte
from hf_xlstm.commands.helpers.corpus import Records
from hf_xlstm_chat import path
from hf_xlstm_chat.__main__ import answers


HERE = Path(__file__).parent


def test_bits_per_byte():
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(model, hf_xlstm.xLSTMForCausalLM)
    stated = json.loads((HERE / "results.json").read_text("utf-8"))["xLSTM"]
    assert model.num_parameters() == stated["parameters"]
    excerpt = list(Records(HERE / "excerpt.jsonl", "text"))
    assert bits_per_byte(model, tokenizer, excerpt) == pytest.approx(stated["bits_per_byte_excerpt"], abs=1e-2)


def test_card_states_the_results():
    card, results = (HERE / "README.md").read_text("utf-8"), json.loads((HERE / "results.json").read_text("utf-8"))
    for model in "xLSTM", "Llama":
        assert f"{results[model]['bits_per_byte_windowed']:.3f}" in card
    for value in results["yardsticks"].values():
        assert f"{value:.3f}" in card


def test_chat():
    """A turn is a line, and two turns with one state are what the template and `generate` make of the whole text."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    messages, chat = [], answers(iter(lines := ["Hello! How  are you today?", "I am good, thanks."]))
    for line in lines:
        messages.append({"role": "user", "content": line})
        set_seed(0)
        said = next(chat)
        set_seed(0)
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        answer = tokenizer.decode(model.generate(**inputs)[0, inputs.input_ids.shape[1] :])
        assert said and answer == said + "\n"
        messages.append({"role": "assistant", "content": said})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    first, second = messages[1]["content"], messages[3]["content"]
    assert text == f"<|bos|>Hello! How are you today?\n{first}\nI am good, thanks.\n{second}\n"


def test_system_message_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(path)
    with pytest.raises(Exception, match="user and assistant only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be nice."}], tokenize=False)


def test_text():
    def conversation(*messages: tuple[str, str]) -> dict:
        parts = [[{"sender": sender, "text": text}] for sender, text in messages]
        return {"start": "2018", "messages": parts}

    turns = [("a", "hello"), ("a", "how  are you?"), ("b", "\nfine "), ("b", "you?"), ("a", " ")]
    turns += [("b", ""), ("a", "good!"), ("a", "and"), ("b", "x"), ("a", "y"), ("b", "z"), ("a", "u"), ("b", "v")]
    text = "hello. how are you?\nfine. you?\ngood! and\nx\ny\nz\nu\nv\n"
    assert list(conversations({"1": conversation(*turns)})) == [text]
    left_out = [
        turns[:6],
        [*turns, ("c", "hello")],
        [*turns, ("a", "mail me: me@home.org")],
        [*turns, ("a", "call 555123")],
        [*turns, ("a", "a a a a a a a a")],
    ]
    assert not list(conversations({str(i): conversation(*messages) for i, messages in enumerate(left_out)}))
