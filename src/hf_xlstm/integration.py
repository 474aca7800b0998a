"""What ties the models to Transformers' machinery: the name of the cache, loading and saving, and generation.

Everything that overrides a method of Transformers, or depends on how a version of it names things, is here,
except `create_masks_for_generate`, which stands beside the mask it makes in modeling_xlstm.py: what breaks when
Transformers moves is this file. `hf_xlstm.versions` says which versions are tested.
"""

import inspect
import re
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import TransformersKwargs, logging

from .cache import xLSTMCache
from .formats.weights import Layout, weights_from_theirs
from .versions import warn_if_untested


logger = logging.get_logger(__name__)
warn_if_untested()

# What this version of Transformers calls the cache, in `generate` and in outputs: `cache` from 5.24 on.
_names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if "cache" in _names else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

# Arguments without a meaning for these models that Transformers, its tokenizers or its trainers pass to every model.
PASSED_TO_EVERY_MODEL = frozenset(TransformersKwargs.__optional_keys__) | {
    "cache_position",
    "labels",
    "return_dict",
    "shift_labels",
    "token_type_ids",
}


def one_cache(**given) -> xLSTMCache | None:
    """The cache among arguments under its three names.

    Raises:
        ValueError: there are two, or it is none of ours.
    """
    given = {name: cache for name, cache in given.items() if cache is not None}
    if len(given) > 1:
        names = " and ".join(f"`{name}`" for name in given)
        raise ValueError(f"{names} are names of the same argument: pass only one of them.")
    for name, cache in given.items():
        if not isinstance(cache, xLSTMCache):
            ours, theirs = (f"{cls.__module__}.{cls.__qualname__}" for cls in (xLSTMCache, type(cache)))
            raise ValueError(f"`{name}` must be a {ours}, got a {theirs}.")
        return cache
    return None


def refuse_unknown(arguments: dict) -> None:
    """Raises TypeError for an argument that would change the result if it were honoured: anything but a flag or a
    number, unless Transformers passes it to every model. A cache or a mask under a name that `forward` does not know
    must not vanish: a model that forgets its state still writes fluent text."""
    for name, value in arguments.items():
        if name in PASSED_TO_EVERY_MODEL or value is None or isinstance(value, (bool, int, float, str)):
            continue
        raise TypeError(
            f"`forward` got an argument `{name}` ({type(value).__name__}) that it does not know and will not ignore. "
            "The state goes by the name `cache`, padding by `attention_mask`, packed documents by `seq_idx`, "
            "`cu_seq_lens_q` or `position_ids`."
        )


if CACHE_NAME == "cache":
    ModelOutput, CausalLMOutput = BaseModelOutputWithPast, CausalLMOutputWithPast
else:

    class _CacheNames:
        """The names of the cache that outputs have from Transformers 5.24 on, beside `past_key_values`."""

        @property
        def cache(self) -> xLSTMCache | None:
            return self.past_key_values

        @property
        def cache_params(self) -> xLSTMCache | None:
            return self.past_key_values

        def __getitem__(self, key):
            return super().__getitem__("past_key_values" if key in CACHE_NAMES else key)

    @dataclass
    class ModelOutput(_CacheNames, BaseModelOutputWithPast):
        """`BaseModelOutputWithPast` with the state as `.cache`, too."""

    @dataclass
    class CausalLMOutput(_CacheNames, CausalLMOutputWithPast):
        """`CausalLMOutputWithPast` with the state as `.cache`, too."""


class LoadingMixin:
    """Loading and saving: safetensors only, other implementations' layouts converted, nothing at random unseen."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        kwargs.setdefault("use_safetensors", True)  # never a pickle, unless asked for
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        if self._auto_class is None:  # else this is code that came with a checkpoint, which Transformers copies itself
            from .hub import save_code

            save_code(self, save_directory)
        super().save_pretrained(save_directory, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Converts the layouts of other implementations, and refuses a checkpoint that does not fit: nothing starts at
        random unseen."""
        load = PreTrainedModel._load_pretrained_model
        model.config.weight_mode = "single"
        try:
            if state_dict is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
                state_dict = model._weights_from_theirs(checkpoint_files)
            result = load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"The checkpoint cannot be read, a file is damaged or cut off: {error}.") from error
        if checkpoint_files:
            info = result[0]
            mismatched = [] if load_config.ignore_mismatched_sizes else [name for name, *_ in info.mismatched_keys]
            problems = {
                "lacks": info.missing_keys,
                # what one stage of a pipeline does not know belongs to another
                "has unknown": [] if hasattr(model, "_pp_stage") else info.unexpected_keys,
                "has misshapen": mismatched,
            }
            for problem, names in problems.items():
                # heads may come and go: a backbone can be loaded with a new one, or without the one it has
                body = sorted(n for n in names if re.match(r"(backbone\.)?(embeddings|blocks|out_norm)\.", n))
                if body:
                    raise ValueError(f"The checkpoint {problem} weights of {type(model).__name__}: {', '.join(body)}.")
        return result

    def _weights_from_theirs(self, checkpoint_files: list[str]) -> dict[str, torch.Tensor] | None:
        """The checkpoint under our names, or None if these are the names it has."""
        names = []
        for path in checkpoint_files:
            with safe_open(path, framework="pt") as file:
                names += file.keys()
        if Layout.of(names) == Layout("hf_xlstm"):
            return None
        weights = {name: x for path in checkpoint_files for name, x in load_file(path).items()}
        names = list(self.state_dict()) if hasattr(self, "backbone") else [f"backbone.{x}" for x in self.state_dict()]
        names = {name for name in names if name.startswith(("backbone.", "lm_head.")) or name in weights}
        if "lm_head.weight" in weights:  # also for a model without it, which drops it afterwards
            names.add("lm_head.weight")
        return weights_from_theirs(weights, names, self.config)

    def _initialize_weights(self, module: torch.nn.Module, is_custom_code: bool = False) -> None:
        # For code outside Transformers it would pass over modules that hold no parameter themselves; ours initialise
        # those of their children, through functions that leave loaded parameters alone.
        super()._initialize_weights(module)


class RecurrentGenerationMixin(GenerationMixin):
    """`generate` for a model whose cache is its recurrent state: always an `xLSTMCache`, continued where it stands."""

    def generate(self, *args, cache=None, past_key_values=None, cache_params=None, **kwargs):
        """`GenerationMixin.generate`, on every version with `cache` as the name of the state to continue from: an
        `xLSTMCache` that has read the beginning of the prompt. `past_key_values` and `cache_params`, its names before
        Transformers 5.24, are aliases."""
        cache = one_cache(cache=cache, past_key_values=past_key_values, cache_params=cache_params)
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, *args) -> None:
        """The cache is always the recurrent one; `cache_implementation` decides whether to compile for it."""
        if model_kwargs.get(CACHE_NAME) is not None or not generation_config.use_cache:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, *args)
            return
        cache = model_kwargs[CACHE_NAME] = xLSTMCache(self.config)
        cache.is_static = "static" in (generation_config.cache_implementation or "")
        if generation_config.is_assistant:
            cache.activate_past_recording()
        compiles_prefill = generation_config.prefill_chunk_size and self._valid_auto_compile_criteria(
            model_kwargs, generation_config
        )
        if compiles_prefill:
            # a masked token allocates the states of every layer and leaves them empty, so that the first chunk finds
            # a state like the later ones and needs no graph of its own
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            masked = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
            self.backbone(masked, attention_mask=masked, cache=cache)
            cache.advance(-1, self.device)

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, attention_mask=None, inputs_embeds=None, **kwargs
    ) -> dict:
        """The arguments of one forward pass: the tokens that the cache has not read yet, and their padding."""
        cache = kwargs.get(CACHE_NAME)
        if cache is not None and next_sequence_length is not None:
            attention_mask = None  # generated tokens, none of which is padding
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        inputs.pop("position_ids", None)  # of no use to a recurrent model, and reason to recompile
        if cache is not None and next_sequence_length is None:
            name = "input_ids" if inputs.get("inputs_embeds") is None else "inputs_embeds"
            inputs[name] = inputs[name][:, unread(cache, inputs[name].shape[1], attention_mask) :]
        return inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration: bool = True):
        """Reads the prompt, in pieces of `prefill_chunk_size` tokens if that is set."""
        inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **model_kwargs)
        size = generation_config.prefill_chunk_size
        if size is None:
            return self(**inputs, return_dict=True)
        if inputs.get(CACHE_NAME) is None:
            raise ValueError("`prefill_chunk_size` needs a cache: `use_cache=True`.")
        compiles = self._valid_auto_compile_criteria(model_kwargs, generation_config)
        forward = self.get_compiled_call(generation_config.compile_config) if compiles else self.__call__
        name = "input_ids" if inputs.get("inputs_embeds") is None else "inputs_embeds"
        prompt, mask = inputs.pop(name), inputs.pop("attention_mask", None)
        if mask is not None:
            mask = mask[:, -prompt.shape[1] :]
        for start in range(0, prompt.shape[1], size):
            piece = {name: prompt[:, start : start + size].clone(memory_format=torch.contiguous_format)}
            if mask is not None and not mask[:, start : start + size].all():
                piece["attention_mask"] = mask[:, start : start + size]
            outputs = forward(**inputs, **piece, return_dict=True)
        return outputs

    def _assisted_decoding(self, *args, **kwargs):
        """Speculative decoding; it switches on the recording of the cache, which ends with it."""
        cache = kwargs.get(CACHE_NAME)
        records = cache is None or cache.record_past
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            if not records:
                cache.deactivate_past_recording()

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        try:
            super().adjust_generation_fn(*args, **kwargs)
        except (OSError, TypeError):
            # Beside a checkpoint with `config.yaml` Transformers finds neither generation_config.json nor config.json;
            # the model already has what follows from its configuration.
            logger.info("There is no generation configuration.")


def unread(cache: xLSTMCache, length: int, attention_mask: torch.Tensor | None) -> int:
    """Index of the first token that `cache` has not read, in a prompt of `length` tokens. As everywhere in
    Transformers the prompt is the whole text, unless its mask is longer: then it is what follows.

    Raises:
        ValueError: the cache has read all of the prompt, or more.
    """
    seen = cache.get_seq_length()
    if attention_mask is not None and attention_mask.shape[1] > length:
        return 0
    if seen and seen >= length:
        raise ValueError(
            f"`cache` has read {seen} tokens and the prompt has {length}: nothing is left to read. The prompt is the "
            "whole text, of which the cache has read the beginning; keep at least its last token out of the cache."
        )
    return seen
