"""Stands in for upstream's module of this name: every mode of `generate`, against what a plain forward pass gives."""

import torch
from parameterized import parameterized


MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20},
    "beam_search": {"num_beams": 3},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "several_sequences": {"do_sample": True, "num_return_sequences": 2},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
}
# exact by definition: each must return what greedy decoding returns
EQUAL_TO_GREEDY = {
    "without_cache": {"use_cache": False},
    "prefill_in_chunks": {"prefill_chunk_size": 3},
    "static_cache": {"cache_implementation": "static"},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
}


class GenerationTesterMixin:
    max_new_tokens = 8

    def _generators(self, batch_size: int = 2):
        """Each generating class with two prompts, and options that make the length of the answer certain."""
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            config.pad_token_id, config.eos_token_id = 0, None
            torch.manual_seed(0)
            model = model_class(config).eval()
            model.generation_config.eos_token_id = None
            prompts = inputs["input_ids"][:batch_size].clamp(min=1)
            options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "pad_token_id": 0}
            yield model, prompts, options

    @parameterized.expand(MODES.items())
    def test_generate(self, _, mode):
        for model, prompts, options in self._generators():
            output = model.generate(prompts, **options | mode)
            expected = (len(prompts) * mode.get("num_return_sequences", 1), prompts.shape[1] + self.max_new_tokens)
            self.assertEqual(tuple(output.shape), expected)

    @parameterized.expand(EQUAL_TO_GREEDY.items())
    def test_generate_equals_greedy(self, name, mode):
        for model, prompts, options in self._generators(batch_size=1 if name == "prompt_lookup" else 2):
            greedy = model.generate(prompts, **options)
            torch.testing.assert_close(model.generate(prompts, **options | mode), greedy)

    def test_generate_greedy_matches_forward(self):
        for model, prompts, options in self._generators():
            sequences = prompts
            for _ in range(self.max_new_tokens):
                next_token = model(sequences, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                sequences = torch.cat([sequences, next_token], dim=1)
            torch.testing.assert_close(model.generate(prompts, **options), sequences)

    def test_generate_beam_search_without_cache(self):
        for model, prompts, options in self._generators():
            beams = options | {"num_beams": 3, "num_return_sequences": 3}
            cached, plain = (model.generate(prompts, **beams, use_cache=use_cache) for use_cache in (True, False))
            torch.testing.assert_close(cached, plain)

    def test_generate_assisted(self):
        for model, prompts, options in self._generators(batch_size=1):
            torch.manual_seed(1)
            assistant = type(model)(model.config).eval()
            assistant.generation_config.eos_token_id = None
            for helper in (assistant, model):  # one whose tokens are mostly refused, one whose tokens are all taken
                assisted = model.generate(prompts, **options, assistant_model=helper)
                torch.testing.assert_close(assisted, model.generate(prompts, **options))

    def test_generate_left_padded_batch(self):
        for model, prompts, options in self._generators(batch_size=1):
            padded = torch.nn.functional.pad(prompts, (4, 0))
            batch = torch.cat([padded, torch.cat([prompts[:, :4], prompts], dim=1)])
            mask = torch.ones_like(batch)
            mask[0, :4] = 0
            together = model.generate(batch, attention_mask=mask, **options)
            torch.testing.assert_close(together[:1, 4:], model.generate(prompts, **options))

    def test_generate_from_inputs_embeds(self):
        for model, prompts, options in self._generators():
            embeddings = model.get_input_embeddings()(prompts)
            expected = model.generate(prompts, **options)[:, prompts.shape[1] :]
            torch.testing.assert_close(model.generate(inputs_embeds=embeddings, **options), expected)

    def test_generate_continues_from_cache(self):
        for model, prompts, options in self._generators():
            first = model.generate(prompts, **options | {"max_new_tokens": 3}, return_dict_in_generate=True)
            rest = options | {"max_new_tokens": self.max_new_tokens - 3}
            continued = model.generate(first.sequences, cache=first.cache, **rest)
            torch.testing.assert_close(continued, model.generate(prompts, **options))

    def test_generate_dict_output(self):
        for model, prompts, options in self._generators():
            flags = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
            output = model.generate(prompts, **options, **flags, output_hidden_states=True)
            self.assertEqual(len(output.logits), self.max_new_tokens)
            self.assertEqual(len(output.hidden_states), self.max_new_tokens)
            self.assertEqual(len(output.hidden_states[0]), model.config.num_hidden_layers + 1)
            self.assertEqual(output.cache.get_seq_length(), output.sequences.shape[1] - 1)

    def test_generate_compiled_forward(self):
        for model, prompts, options in self._generators():
            torch.compiler.reset()
            greedy = model.generate(prompts, **options)
            model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(model.generate(prompts, **options, cache_implementation="static"), greedy)

    def test_logits_to_keep(self):
        for model, prompts, _ in self._generators():
            logits = model(prompts).logits
            torch.testing.assert_close(model(prompts, logits_to_keep=1).logits, logits[:, -1:])
            kept = torch.tensor([0, 2])
            torch.testing.assert_close(model(prompts, logits_to_keep=kept).logits, logits[:, kept])
