"""What ties the models to Transformers' machinery: the name of the cache, loading and saving, and generation.

Everything that overrides a method of Transformers, or depends on how a version of it names things, is here,
except `create_masks_for_generate`, which stands beside the mask it makes in modeling_xlstm.py: what breaks when
Transformers moves is this file. `hf_xlstm.versions` says which versions are tested.
"""

import copy
import functools
import inspect
import json
import os
import re
import threading
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.generation.utils import GenerateOutput
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import ModelOutput as BaseOutput
from transformers.utils import TransformersKwargs, cached_file, logging

from .cache import xLSTMCache
from .formats.tensors import ConvertedTensor, TensorFiles, native_tensors
from .formats.weights import Layout
from .versions import warn_if_untested


if TYPE_CHECKING:
    from .batching import RecurrentBatchingManager
    from .configuration_xlstm import xLSTMConfig
    from .linear import PackedWeightsMixin
    from .modeling_xlstm import xLSTMModel

    class _Model(PackedWeightsMixin, PreTrainedModel):
        """What the mixins are mixed into."""

        config: xLSTMConfig
        backbone: xLSTMModel

else:
    _Model = object

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
    "tokenizer",  # from `generate(stop_strings=..., tokenizer=...)`
}


def one_cache(**given) -> xLSTMCache | None:
    """The cache among arguments under its three names.

    Raises:
        ValueError: there are two, or it is no `xLSTMCache` of this package.
    """
    given = {name: cache for name, cache in given.items() if cache is not None}
    if len(given) > 1:
        names = " and ".join(f"`{name}`" for name in given)
        raise ValueError(f"{names} are names of the same argument: pass only one of them.")
    for name, cache in given.items():
        if not isinstance(cache, xLSTMCache):
            expected, found = (f"{cls.__module__}.{cls.__qualname__}" for cls in (xLSTMCache, type(cache)))
            raise ValueError(f"`{name}` must be a {expected}, got a {found}.")
        return cache
    return None


def refuse_unknown(arguments: dict) -> None:
    """Raises TypeError for an argument that would change the result if it were honoured: anything but a flag or a
    number, unless Transformers passes it to every model. A cache or a mask under a name that `forward` does not know
    must not vanish: a model that forgets its state still writes fluent text."""
    for name, value in arguments.items():
        if name == "kwargs" and isinstance(value, dict):  # what pipeline parallelism makes of `**kwargs`
            refuse_unknown(value)
            continue
        if name in PASSED_TO_EVERY_MODEL or value is None or isinstance(value, (bool, int, float, str)):
            continue
        raise TypeError(
            f"`forward` got an argument `{name}` ({type(value).__name__}) that it does not know and will not ignore. "
            "The state goes by the name `cache`, padding by `attention_mask`, packed documents by `seq_idx`, "
            "`cu_seq_lens_q` or `position_ids`."
        )


def refuse_split_sequence() -> None:
    """Raises NotImplementedError where somebody else's mechanism has split the sequence over ranks: accelerate's
    `ParallelismConfig(cp_size=...)`, DeepSpeed's Ulysses (`sp_size=...`), PyTorch's `context_parallel`. They exchange
    what attention needs; the recurrent state would start anew on every rank, and gradients be wrong in silence."""
    if _sequence_is_split():
        raise NotImplementedError(
            "The sequence is split over ranks (context or sequence parallelism), which an xLSTM does not support: its "
            "recurrent state would start anew on every rank. Use data, tensor or pipeline parallelism."
        )


@torch._dynamo.assume_constant_result
def _sequence_is_split() -> bool:
    parallelism = AcceleratorState._shared_state.get("parallelism_config")
    if parallelism is not None and max(parallelism.cp_size, getattr(parallelism, "sp_size", 1)) > 1:
        return True
    # inside `context_parallel`, which replaces the function
    return str(F.scaled_dot_product_attention.__module__).startswith("torch.distributed.tensor")


def refuse_with_opacus(mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> None:
    """Raises NotImplementedError for what a layer gets beside its input where Opacus has been given the layer: for the
    gradients of each row it calls the layer again with the input alone. Padding behind a row's tokens makes no
    difference to them."""
    if cu_seqlens is not None or (mask is not None and (mask[:, 1:] > mask[:, :-1]).any()):
        raise NotImplementedError(
            "Opacus calls layers without mask and bounds, so that its gradients would be wrong for padding in front "
            "of tokens and for packed documents. Pad on the right instead."
        )


class _CacheNames:
    """The names of the cache that outputs have from Transformers 5.24 on, beside `past_key_values`."""

    past_key_values: xLSTMCache | None  # of the class that this is mixed into

    @property
    def cache(self) -> xLSTMCache | None:
        return self.past_key_values

    @property
    def cache_params(self) -> xLSTMCache | None:
        return self.past_key_values

    def __getitem__(self, key):
        return super().__getitem__("past_key_values" if key in CACHE_NAMES else key)


@functools.cache
def output_class(cls: type[Any]) -> type:
    """The class of outputs `cls` with the state as `.cache` on every version of Transformers."""
    if CACHE_NAME == "cache" or "past_key_values" not in cls.__dataclass_fields__:
        return cls
    return dataclass(type(cls.__name__, (_CacheNames, cls), {"__doc__": cls.__doc__}))


if TYPE_CHECKING:  # those of the newest version
    from transformers.modeling_outputs import BaseModelOutputWithPast as ModelOutput
    from transformers.modeling_outputs import CausalLMOutputWithPast as CausalLMOutput
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast as SequenceClassifierOutput
else:
    ModelOutput = output_class(BaseModelOutputWithPast)
    CausalLMOutput = output_class(CausalLMOutputWithPast)
    SequenceClassifierOutput = output_class(SequenceClassifierOutputWithPast)


def with_cache_name(function: Callable) -> Callable:
    """`function`, which returns outputs, with the state as their `.cache` on every version of Transformers."""
    if CACHE_NAME == "cache":
        return function

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        outputs = function(*args, **kwargs)
        return output_class(type(outputs))(**outputs) if isinstance(outputs, BaseOutput) else outputs

    return wrapper


INDEX = "model.safetensors.index.json"
SHARD = "model_{}.safetensors"  # as `xLSTMLarge` and the scaling-law runs of NX-AI number them, without an index
_saving = threading.RLock()


def check_json(directory: str | os.PathLike) -> None:
    """Raises ValueError naming a damaged file in a local directory: the index of a sharded checkpoint, of which
    Transformers does not say which file it is, or `generation_config.json`, which it would leave out in silence."""
    for name, fields in ((INDEX, ("weight_map", "metadata")), ("generation_config.json", ())):
        path = Path(directory, name)
        if not path.is_file():
            continue
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(part, dict) for part in (contents, *(contents[field] for field in fields))):
                raise TypeError(f"{', '.join(fields) or 'it'} must be a mapping")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read, it is damaged or cut off: {error}.") from error


def numbered_shards(directory: str | os.PathLike, subfolder: str = "", **kwargs) -> list[str]:
    """The files `model_0.safetensors`, `model_1.safetensors`, ... of a checkpoint, downloaded if it is on the Hub."""
    names = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")
    options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    options["_raise_exceptions_for_missing_entries"] = False
    files: list[str] = []
    while True:
        try:
            file = cached_file(directory, SHARD.format(len(files)), subfolder=subfolder or "", **options)
        except OSError:  # no such repository, no connection: the caller has met it before
            file = None
        if file is None:
            return files
        files.append(file)


@contextmanager
def weights_metadata(**metadata: str):
    """Adds to the metadata of all safetensors files that Transformers writes inside; there is no argument for it."""
    with _saving:  # the name is one for all threads
        save_file = modeling_utils.safe_save_file

        def save_with_metadata(*args, **kwargs):
            return save_file(*args, **kwargs | {"metadata": metadata | (kwargs.get("metadata") or {})})

        modeling_utils.safe_save_file = save_with_metadata
        try:
            yield
        finally:
            modeling_utils.safe_save_file = save_file


# Not quantised by default: heads, and the gates, which are small and decide what is remembered for how long. Names for
# quantisers that look for modules, and a regular expression for torchao's, which looks for parameters.
UNQUANTIZED_MODULES = ["lm_head", "score", "qa_outputs", "igate_preact", "fgate_preact", r".*\.[if]gate_preact"]


def with_unquantized_modules(config):
    """A configuration of quantisation that, unless it names others, leaves UNQUANTIZED_MODULES as they are."""
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.copy(config)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(config, name) and getattr(config, name) is None:
            setattr(config, name, list(UNQUANTIZED_MODULES))
    return config


Model = TypeVar("Model", bound="LoadingMixin")


class LoadingMixin(_Model):
    """Loading and saving: safetensors only, other implementations' layouts converted, nothing at random unseen."""

    # whether `save_pretrained` writes the code along, unless told: see `register_for_auto_class` and `push_to_hub`
    _saves_code = False

    @classmethod
    def from_pretrained(
        cls: type[Model], pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs
    ) -> Model:
        """As in Transformers, and also weights in `model_{n}.safetensors` without an index. Pickles are read only with
        `use_safetensors=False`."""
        kwargs.setdefault("use_safetensors", True)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = with_unquantized_modules(kwargs["quantization_config"])
        if pretrained_model_name_or_path is not None:
            check_json(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError:
            if pretrained_model_name_or_path is None or not numbered_shards(pretrained_model_name_or_path, **kwargs):
                raise
        # The first shard has a name that the configuration may tell; `_load_pretrained_model` finds the others.
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            kwargs["config"] = copy.copy(config)
            kwargs["config"].transformers_weights = SHARD.format(0)
        else:
            kwargs["transformers_weights"] = SHARD.format(0)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """Makes `save_pretrained` write the code along from now on, so that what it saves opens without this package.

        One call covers the configuration as well. The code of a class of your own is copied by Transformers, and so is
        that of a copy of this package beside a checkpoint.
        """
        try:
            from .hub import AUTO_MAP  # noqa: F401  not there in such a copy

            cls._saves_code = cls.__module__.rpartition(".")[0] == __package__
        except ImportError:
            pass
        if not cls._saves_code:
            super().register_for_auto_class(auto_class)

    def push_to_hub(self, *args, **kwargs) -> str:
        """As in Transformers; the code is sent along."""
        self._saves_code = True
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            del self._saves_code

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args,
        with_code: bool | None = None,
        **kwargs,
    ) -> None:
        """As in Transformers, but the configuration of the model stays as it is.

        Args:
            with_code: write the code of this package into the directory, so that the model opens without the package,
                by `trust_remote_code=True`. By default when the model is meant to be shared: with `push_to_hub`, and
                after `register_for_auto_class`.
        """
        if with_code is None:
            with_code = push_to_hub or self._saves_code
        live, save_id = self.config, uuid.uuid4().hex
        self.config = copy.deepcopy(live)  # in which Transformers, too, writes dtype, class and the like
        self.config.save_id = save_id
        try:
            if with_code and self._auto_class is None and self.should_save_on_this_rank(is_main_process):
                from .hub import save_code

                self.config.auto_map = save_code(save_directory)
            with weights_metadata(save_id=save_id):
                super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
        finally:
            self.config = live

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Loads native and foreign checkpoints, and refuses one that does not fit: nothing starts at random unseen."""
        model.config.weight_mode = "single"
        save_id, model.config.save_id, model.config.transformers_weights = model.config.save_id, None, None
        if state_dict is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            directory, name = os.path.split(checkpoint_files[0])
            if name == SHARD.format(0):
                checkpoint_files = numbered_shards(directory)
            files = TensorFiles(checkpoint_files)
            files.check_save(save_id)
            state_dict = model._tensors_from_foreign(files)
            if state_dict is not None and is_deepspeed_zero3_enabled():  # which takes tensors only
                state_dict = {name: x[...] for name, x in state_dict.items()}
        load = PreTrainedModel._load_pretrained_model
        result = load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        if checkpoint_files:
            info = result[0]
            mismatched = [] if load_config.ignore_mismatched_sizes else [name for name, *_ in info.mismatched_keys]
            problems = {
                # what could not be quantised is not missing: Transformers raises, and says why
                "lacks": info.missing_keys - info.conversion_errors.keys(),
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

    def _tensors_from_foreign(self, files: TensorFiles) -> dict[str, ConvertedTensor] | None:
        """The parameters in a foreign checkpoint, converted one by one while Transformers reads them; None if the
        checkpoint is native.

        Transformers' own `WeightConverter` does not fit, not even for `weight_mode="fused"`: its rules are registered
        by the name of a class or model type, which Transformers' xLSTM has as well; its `Chunk` splits into equal
        parts, which q, k and v are not; and `save_pretrained` would join the weights again under a configuration that
        says they are single.
        """
        if Layout.of(files.paths) == Layout("hf_xlstm"):
            return None
        own = list(self.state_dict()) if hasattr(self, "backbone") else [f"backbone.{x}" for x in self.state_dict()]
        names = {name for name in own if name.startswith(("backbone.", "lm_head.")) or name in files.paths}
        if "lm_head.weight" in files.paths:  # also for a model without a head, which drops it afterwards
            names.add("lm_head.weight")
        return native_tensors(files, names, self.config)

    def _initialize_weights(self, module: torch.nn.Module, is_custom_code: bool = False) -> None:
        # For code outside Transformers it would pass over modules that hold no parameter themselves; ours initialise
        # those of their children, through functions that leave loaded parameters alone.
        super()._initialize_weights(module)


class RecurrentGenerationMixin(GenerationMixin, _Model):
    """`generate` for a model whose cache is its recurrent state: always an `xLSTMCache`, continued where it stands."""

    #: A `StateStore` that `generate_batch` and servers keep conversations in and continue them from; None is none.
    state_store: Any = None

    def init_continuous_batching(
        self, generation_config=None, continuous_batching_config=None, workload_hints=None
    ) -> "RecurrentBatchingManager":
        """As in Transformers, with rows of a cache in place of pages: what `generate_batch` and servers run on."""
        from .batching import RecurrentBatchingManager

        cached = getattr(self, "_cached_continuous_batching_manager", None)
        if cached is not None:
            return cached
        if continuous_batching_config is None:
            continuous_batching_config = getattr(generation_config, "continuous_batching_config", None)
        return RecurrentBatchingManager(self, generation_config, continuous_batching_config, workload_hints)

    def generate(
        self,
        *args,
        cache: xLSTMCache | None = None,
        past_key_values: xLSTMCache | None = None,
        cache_params: xLSTMCache | None = None,
        **kwargs,
    ) -> GenerateOutput | torch.LongTensor:
        """`GenerationMixin.generate`, on every version with `cache` as the name of the state to continue from: an
        `xLSTMCache` that has read the beginning of the prompt. `past_key_values` and `cache_params`, its names before
        Transformers 5.24, are aliases."""
        cache = one_cache(cache=cache, past_key_values=past_key_values, cache_params=cache_params)
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        with self._packed_during_generate():
            return with_cache_name(super().generate)(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, *args) -> None:
        """The cache is always the recurrent one; `cache_implementation` decides whether to compile for it."""
        if model_kwargs.get(CACHE_NAME) is not None or not generation_config.use_cache:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, *args)
            return
        cache = model_kwargs[CACHE_NAME] = xLSTMCache(self.config)
        cache.is_static = "static" in (generation_config.cache_implementation or "")
        if (generation_config.cache_implementation or "").startswith(("offloaded", "quantized")):
            logger.warning_once(
                f"cache_implementation={generation_config.cache_implementation!r} has no effect: the cache is the "
                "recurrent state, of constant size, and stays where it is, as it is."
            )
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

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs) -> torch.Tensor:
        """A mask of ones: padding is what `attention_mask` says. Transformers would mask every token whose id is
        `pad_token_id`, but that has a default, and may be the id of a word."""
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        if not mask.all():
            logger.warning_once(
                f"The prompt has tokens whose id is pad_token_id={generation_config.pad_token_id}, and no "
                "`attention_mask`: they are read like any other. Pass `attention_mask` if they are padding."
            )
        return torch.ones_like(mask)

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
        if "prepare_inputs_for_generation" in vars(self) and cache is not None:
            # PEFT's prompt tuning stands in for this method and looks for the cache under its old name: where it finds
            # none, it puts the prompt in front of every token
            inputs["past_key_values"] = inputs.pop(CACHE_NAME)
        return inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration: bool = True):
        """Reads the prompt, in pieces of `prefill_chunk_size` tokens if that is set."""
        inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **model_kwargs)
        size = generation_config.prefill_chunk_size
        if size is None:
            return self(**inputs, return_dict=True)
        if all(inputs.get(name) is None for name in CACHE_NAMES):
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
            if cache is not None and not records:
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
