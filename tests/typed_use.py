"""A user's first script. `make lint` checks its types, by those that the package declares; no test runs it."""

import torch
from transformers import AutoTokenizer
from typing_extensions import assert_type

import hf_xlstm
from hf_xlstm import ops, xLSTMCache, xLSTMConfig, xLSTMForCausalLM


model = xLSTMForCausalLM.from_pretrained("runs/mine", dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained("runs/mine")
batch = tokenizer(["My fellow Americans"], return_tensors="pt")
outputs = model(**batch, labels=batch["input_ids"], use_cache=True)
outputs.loss.backward()
cache = xLSTMCache(model.config)
model(batch["input_ids"], cache=cache)
cache.save_pretrained("runs/prompt")
cache = xLSTMCache.from_pretrained("runs/prompt")
tokens = model.generate(**batch, cache=cache, max_new_tokens=20, do_sample=True)
print(tokenizer.decode(tokens[0]), cache.nbytes, cache.layers[0].tensors()["c"].shape)
model.save_pretrained("runs/copy", with_code=True)

small = xLSTMForCausalLM(xLSTMConfig(hidden_size=32, num_hidden_layers=2, num_heads=2, slstm_at=[1]))
q = k = v = torch.randn(1, 5, 2, 8)
gate = torch.randn(1, 5, 2)
h, state = ops.mlstm(q, k, v, gate, gate, output_final_state=True)
assert state is not None
h_step, state = ops.mlstm_step(q[:, 0], k[:, 0], v[:, 0], gate[:, 0], gate[:, 0], state)

assert_type(model, xLSTMForCausalLM)
assert_type(model.config, xLSTMConfig)
assert_type(cache, xLSTMCache)
assert_type(h, torch.Tensor)
assert_type(hf_xlstm.__version__, str)
