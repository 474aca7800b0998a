"""Exported models: the forward pass as programs that OpenVINO or ONNX Runtime runs, and a class on which `generate`
works as on the model itself.

A model becomes two programs, which take the recurrent state and return it:

    prefill    input_ids (B, T), attention_mask (B, T), positions (P,), state  ->  logits (B, P, vocabulary), state
    decode     input_ids (B, 1), state                                         ->  logits (B, 1, vocabulary), state

B, T and P may be any number from 1 on; `positions` says which tokens the logits are wanted of. Inside, the mLSTM is
its chunkwise form, the sLSTM a loop. Both formats come from ONNX: OpenVINO reads its loops, but not PyTorch's.

Exporting needs the packages of `pip install hf-xlstm[export]`, running a program only that of its format.
"""

import hashlib
import importlib
import json
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from .cache import STATE_NAMES, xLSTMCache
from .configuration_xlstm import xLSTMConfig
from .files import appearing
from .integration import (
    CACHE_NAME,
    CausalLMOutput,
    RecurrentGenerationMixin,
    one_cache,
    refuse_unknown,
)
from .modeling_xlstm import (
    causal_lm_loss,
    check_mask_columns,
    check_mask_values,
    packed_bounds,
    padding_mask,
    xLSTMForCausalLM,
    xLSTMPreTrainedModel,
)


__all__ = ["FORMATS", "WEIGHTS", "export_model", "xLSTMExportedForCausalLM"]

FORMATS = ("openvino", "onnx")
WEIGHTS = ("float32", "int8", "int4")
MANIFEST = "export.json"
PROGRAMS = ("prefill", "decode")
# Tokens of a prompt that one call reads, which bounds the memory of prefill.
PIECE = 2048
_ID = "hf_xlstm_export_id"  # in the metadata of both programs and of the manifest: which belong together


def state_shapes(config: xLSTMConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the state, by names such as "0.c", in their order, with their shapes without the batch."""
    heads, paper = config.num_heads, config.block_family == "paper"
    cells: dict[str, tuple[int, ...]] = {"mlstm": (heads, config.qk_head_dim, config.v_head_dim)}
    cells["slstm"] = (config.slstm_num_heads or heads, config.slstm_head_dim)
    shapes: dict[str, tuple[int, ...]] = {}
    for index, layer_type in enumerate(config.layers_block_type):
        cell = cells[layer_type]
        for name in STATE_NAMES[layer_type]:
            # of the mLSTM c is (H, K, V), n (H, K), m (H,); the sLSTM's are all (H, D)
            rank = {"c": 3, "n": 2, "m": 1}[name] if layer_type == "mlstm" else 2
            shapes[f"{index}.{name}"] = cell[:rank]
        if layer_type == "slstm":
            taps, width = config.slstm_conv_kernel_size, config.hidden_size
        else:
            taps, width = (config.mlstm_conv_kernel_size, config.v_dim) if paper else (0, 0)
        if taps > 0:
            shapes[f"{index}.conv"] = (taps - 1, width)
    return shapes


def cache_of(config: xLSTMConfig, state: Mapping[str, torch.Tensor]) -> xLSTMCache:
    """A cache that holds the tensors of `state`, named as in `state_shapes`."""
    cache = xLSTMCache(config)
    for index, layer in enumerate(cache.layers):
        layer.state = tuple(state[f"{index}.{name}"] for name in STATE_NAMES[layer.layer_type])
        if f"{index}.conv" in state:
            layer.conv_states[0] = state[f"{index}.conv"]
            layer.is_conv_states_initialized[0] = True
    return cache


def state_of(cache: xLSTMCache) -> dict[str, torch.Tensor]:
    """The tensors of a cache, named as in `state_shapes`; empty before the first token."""
    return {
        f"{index}.{name}": x
        for index, layer in enumerate(cache.layers)
        if layer.state is not None
        for name, x in layer.tensors().items()
    }


def empty_state(config: xLSTMConfig, batch_size: int) -> dict[str, torch.Tensor]:
    """The state before the first token, which is zeros."""
    return {name: torch.zeros(batch_size, *shape) for name, shape in state_shapes(config).items()}


class ForwardPass(nn.Module):
    """The forward pass of a causal language model with its state among arguments and results, for `torch.export`.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T) int64, or None where nothing is padding.
        positions: (P,) int64, the tokens of which the logits are wanted, or None for all.
        state: the tensors of `state_shapes(model.config)`, in that order. They are left alone.

    Returns:
        logits (B, P, vocabulary), and the new state in the same order.
    """

    def __init__(self, model: xLSTMForCausalLM):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        state: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        config = self.model.config
        # copies, because a cache is written in place
        cache = cache_of(config, {name: x.clone() for name, x in zip(state_shapes(config), state, strict=True)})
        keep = 0 if positions is None else positions
        logits = self.model(input_ids, attention_mask=attention_mask, cache=cache, logits_to_keep=keep).logits
        return logits, list(state_of(cache).values())


@torch.no_grad()
def export_forward(model: xLSTMForCausalLM, program: str) -> torch.export.ExportedProgram:
    """`ForwardPass` of a model as the program "prefill" or "decode" of `torch.export`, for every batch size, length
    and number of positions from 1 on."""
    auto = torch.export.Dim.AUTO
    batch_size, length = 2, 9  # more than 1, which PyTorch takes for a constant
    ids, state = torch.zeros(batch_size, length, dtype=torch.long), empty_state(model.config, batch_size)
    states = list(state.values()), [{0: auto}] * len(state)
    if program == "decode":
        arguments = ids[:, :1], None, None, states[0]
        dynamic = {0: auto}, None, None, states[1]
    else:
        arguments = ids, torch.ones_like(ids), torch.tensor([3, length - 1]), states[0]
        dynamic = {0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto}, states[1]
    return torch.export.export(ForwardPass(model).eval(), arguments, dynamic_shapes=dynamic, strict=False)


def export_model(
    model: xLSTMForCausalLM, directory: str | Path, format: str = "openvino", weights: str = "float32"
) -> None:
    """Writes a model as programs of another runtime, for `xLSTMExportedForCausalLM.from_pretrained(directory)`.

    Args:
        model: a float32 model on the CPU.
        directory: a new or empty directory. The tokenizer is not written.
        format: "openvino" or "onnx".
        weights: "float32", or "int8" or "int4": linear weights compressed by NNCF, with a scale per row or group.

    Raises:
        ImportError: a package is missing; the message has the line that installs it.
        ValueError: an unknown format, or a model that is not float32 or not on the CPU.
    """
    for name, value, known in (("format", format, FORMATS), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"Only a float32 model on the CPU is exported, this one is {model.dtype} on {model.device}.")
    for module in ("onnx", "onnxscript", "openvino" if format == "openvino" else "onnxruntime"):
        _need(module)
    if weights != "float32":
        _need("nncf")
    with appearing(directory) as target, tempfile.TemporaryDirectory(dir=target) as scratch:
        write_programs(model, export_onnx(model, Path(scratch)), target, format, weights)


@torch.no_grad()  # with gradients the loop of the sLSTM would also return what its backward pass needs
def export_onnx(model: xLSTMForCausalLM, directory: Path) -> dict[str, Path]:
    """Both programs of a model as files of ONNX with float32 weights, from which those of each runtime are made."""
    names = [f"state.{name}" for name in state_shapes(model.config)]
    paths = {program: directory / f"{program}.onnx" for program in PROGRAMS}
    training = model.training
    model.eval()
    try:
        for program, path in paths.items():
            inputs = ["input_ids", *(["attention_mask", "positions"] if program == "prefill" else []), *names]
            outputs = ["logits", *(f"new_{name}" for name in names)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = export_forward(model, program)
                torch.onnx.export(
                    exported, f=path, dynamo=True, verbose=False, input_names=inputs, output_names=outputs
                )
    finally:
        model.train(training)
    return paths


def write_programs(
    model: xLSTMForCausalLM, onnx_files: Mapping[str, Path], directory: Path, format: str, weights: str
) -> None:
    """The programs of `export_onnx` in the format of a runtime, and what `from_pretrained` reads beside them."""
    runtime, export_id = RUNTIMES[format], uuid.uuid4().hex
    for program, path in onnx_files.items():
        runtime.save(path, directory / program, weights, export_id)
    if format == "openvino":
        share_weights(directory)
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    manifest = {"format": format, "weights": weights, _ID: export_id}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _need(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"This needs the package {module}: pip install 'hf-xlstm[export]'") from error


def share_weights(directory: Path) -> None:
    """Lets the second program of OpenVINO in a directory read its constants from the file of the first, which gets
    those that only the second has."""

    def constants(tree: "ElementTree.ElementTree[Any]") -> Iterator[tuple[ElementTree.Element, slice]]:
        for data in tree.iterfind(".//layer[@type='Const']/data"):
            start = int(data.attrib["offset"])
            yield data, slice(start, start + int(data.attrib["size"]))

    programs = [directory / f"{program}.xml" for program in PROGRAMS]
    paths = [path.with_suffix(".bin") for path in programs]
    offsets: dict[bytes, int] = {}
    contents = np.memmap(paths[0], mode="r").data
    for _, place in constants(ElementTree.parse(programs[0])):
        offsets.setdefault(hashlib.sha256(contents[place]).digest(), place.start)
    tree, contents = ElementTree.parse(programs[1]), np.memmap(paths[1], mode="r").data
    with paths[0].open("ab") as file:
        for data, place in constants(tree):
            key = hashlib.sha256(contents[place]).digest()
            if key not in offsets:
                file.write(bytes(-file.tell() % 64))
                offsets[key] = file.tell()
                file.write(contents[place])
            data.set("offset", str(offsets[key]))
    tree.write(programs[1])
    paths[1].unlink()


def _compress(program, weights: str):
    """The program with the weights of its matrix products in 8 bits, a scale per row, or in 4 bits, a scale per 128 or
    fewer; then embeddings and head have 8."""
    import nncf

    if weights == "int8":
        return nncf.compress_weights(program, mode=nncf.CompressWeightsMode.INT8_ASYM)
    smaller = nncf.GroupSizeFallbackMode.ADJUST  # groups, where 128 does not divide the width
    options = nncf.AdvancedCompressionParameters(group_size_fallback_mode=smaller)
    # without zero points, which ONNX Runtime does not take as NNCF writes them
    return nncf.compress_weights(program, mode=nncf.CompressWeightsMode.INT4_SYM, advanced_parameters=options)


class OpenVINOProgram:
    """A program of OpenVINO, which computes in float32 on as many threads as PyTorch."""

    suffix = ".xml"

    @staticmethod
    def save(onnx_file: Path, target: Path, weights: str, export_id: str) -> None:
        """Writes the program in an ONNX file, its weights compressed, as `target` with a suffix."""
        import openvino

        program = openvino.convert_model(onnx_file)
        if weights != "float32":
            # a clone: NNCF stumbles over operations that the conversion has left without a use, which it has not
            program = _compress(program.clone(), weights)
        program.set_rt_info(export_id, _ID)
        openvino.save_model(program, target.with_suffix(".xml"), compress_to_fp16=False)

    def __init__(self, path: Path):
        openvino = _need("openvino")
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        weights = path.with_suffix(".bin")
        if not weights.is_file():  # `share_weights`
            weights = path.with_name(f"{PROGRAMS[0]}.bin")
        program = openvino.Core().read_model(path, weights)
        self.export_id = program.get_rt_info(_ID).astype(str) if program.has_rt_info(_ID) else None
        self.inputs = {name for port in program.inputs for name in port.names}
        self._program = openvino.Core().compile_model(program, "CPU", options)

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The results by name. The next call overwrites them."""
        results = self._program(inputs, share_inputs=True, share_outputs=True)
        return {name: x for port, x in results.items() for name in port.names}  # OpenVINO may add names of its own


class ONNXProgram:
    """A program of ONNX Runtime, on as many threads as PyTorch."""

    suffix = ".onnx"

    @staticmethod
    def save(onnx_file: Path, target: Path, weights: str, export_id: str) -> None:
        """Writes the program in an ONNX file, its weights compressed, as `target` with a suffix."""
        import onnx

        program = onnx.load(onnx_file)
        if weights != "float32":
            program = _compress(program, weights)
        program.metadata_props.add(key=_ID, value=export_id)
        location = f"{target.name}.onnx.data"
        onnx.save(program, target.with_suffix(".onnx"), save_as_external_data=True, location=location)

    def __init__(self, path: Path):
        onnxruntime = _need("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._program = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.export_id = self._program.get_modelmeta().custom_metadata_map.get(_ID)
        self.inputs = {x.name for x in self._program.get_inputs()}
        self._outputs = [x.name for x in self._program.get_outputs()]

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The results by name."""
        return dict(zip(self._outputs, self._program.run(self._outputs, inputs), strict=True))


RUNTIMES: dict[str, type[OpenVINOProgram] | type[ONNXProgram]] = {"openvino": OpenVINOProgram, "onnx": ONNXProgram}


class xLSTMExportedForCausalLM(xLSTMPreTrainedModel, RecurrentGenerationMixin):
    """A language model that `export_model` has written, run by OpenVINO or ONNX Runtime on the CPU.

    `generate`, `pipeline` and streamers work as on `xLSTMForCausalLM`. Its state is the same `xLSTMCache`: a
    conversation begun on either of them goes on on the other one.

    ```python
    >>> model = xLSTMExportedForCausalLM.from_pretrained("exported")
    >>> model.generate(ids, max_new_tokens=50)
    ```

    It has no parameters, is not trained, and computes logits only: there are no hidden states, and no embeddings go
    in. Neither packed documents nor the recording of a cache, which speculative decoding needs, are exported.
    """

    pack_in_generate = False  # the weights are in the programs

    def __init__(self, config: xLSTMConfig, programs: Mapping[str, OpenVINOProgram | ONNXProgram]):
        super().__init__(config)
        self._programs = dict(programs)
        self._lock = threading.Lock()
        self.loss_function = causal_lm_loss

    @property
    def export_id(self) -> str | None:
        """Which export it is: another one, also of the same model, has another id."""
        return self._programs["decode"].export_id

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "xLSTMExportedForCausalLM":
        """The exported model in a directory.

        Raises:
            ValueError: the directory holds no exported model, or a file of another one.
            ImportError: the runtime of its format is not installed; the message has the line that installs it.
        """
        directory = Path(directory)
        path = directory / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{directory} holds no exported model: it has no {MANIFEST}. Write one by `export_model`."
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            runtime, export_id = RUNTIMES[manifest["format"]], manifest[_ID]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: it is damaged, or of a newer version.") from error
        config = xLSTMConfig.from_pretrained(directory)
        names = {f"state.{name}" for name in state_shapes(config)}

        def load(name: str) -> OpenVINOProgram | ONNXProgram:
            file = directory / f"{name}{runtime.suffix}"
            if not file.is_file():
                raise ValueError(f"{directory} is incomplete: it lacks {file.name}.")
            program = runtime(file)
            if program.export_id != export_id:
                raise ValueError(f"{file} belongs to another export than {path}.")
            if not names <= program.inputs:
                raise ValueError(f"{file} does not fit {directory / 'config.json'}: it has another state.")
            return program

        with ThreadPoolExecutor() as pool:  # a runtime prepares a program on one core
            programs = dict(zip(PROGRAMS, pool.map(load, PROGRAMS), strict=True))
        model = cls(config, programs).eval()
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        model.name_or_path = str(directory)
        return model

    def save_pretrained(self, *args, **kwargs):
        raise NotImplementedError("An exported model is its directory: copy that, or export the model again.")

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: xLSTMCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: xLSTMCache | None = None,
        cache_params: xLSTMCache | None = None,
        seq_idx: torch.IntTensor | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutput | tuple:
        """As `xLSTMForCausalLM.forward`; what the programs do not have raises NotImplementedError."""
        refuse_unknown(kwargs)
        cache = one_cache(cache=cache, past_key_values=past_key_values, cache_params=cache_params)
        if input_ids is None or inputs_embeds is not None:
            raise NotImplementedError("An exported model reads `input_ids`, not `inputs_embeds`.")
        if kwargs.get("output_hidden_states"):
            raise NotImplementedError("An exported model has no hidden states.")
        if cache is not None and cache.record_past:
            raise NotImplementedError("An exported model cannot record its `cache`, which speculative decoding needs.")
        batch_size, length = input_ids.shape
        if length == 0:
            raise ValueError("The input has no tokens.")
        mask = padding_mask(attention_mask, batch_size, length)
        check_mask_columns(attention_mask, length, cache)
        if packed_bounds(seq_idx, cu_seq_lens_q, position_ids, mask, input_ids) is not None:
            raise NotImplementedError("An exported model cannot read packed documents: pass them as rows of a batch.")
        check_mask_values(attention_mask)
        if cache is None:
            cache = xLSTMCache(self.config)
        cache.prepare(self.config, batch_size)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        positions, order = torch.arange(length)[keep].unique(return_inverse=True)
        logits = self._read(input_ids, mask, positions, cache)[:, order]
        cache.advance(length, self.device)
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        named: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        outputs = CausalLMOutput(loss=loss, logits=logits, **named)
        return outputs.to_tuple() if return_dict is False else outputs

    def _read(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: xLSTMCache
    ) -> torch.Tensor:
        """The logits (B, P, vocabulary) of tokens at ascending positions (P,); the cache goes on past all of them."""
        state = state_of(cache) or empty_state(self.config, ids.shape[0])
        if ids.shape[1] == 1 and mask is None:
            return self._run("decode", {"input_ids": ids}, state, cache)
        logits = []
        for start in range(0, ids.shape[1], PIECE):
            piece = ids[:, start : start + PIECE]
            inside = positions[(positions >= start) & (positions < start + PIECE)] - start
            inputs = {
                "input_ids": piece,
                "attention_mask": torch.ones_like(piece) if mask is None else mask[:, start : start + PIECE].long(),
                "positions": inside
                if len(inside)
                else torch.zeros(1, dtype=torch.long),  # a program wants at least one
            }
            logits.append(self._run("prefill", inputs, state, cache)[:, : len(inside)])
            state = state_of(cache)
        return torch.cat(logits, dim=1)

    def _run(
        self, program: str, inputs: dict[str, torch.Tensor], state: dict[str, torch.Tensor], cache: xLSTMCache
    ) -> torch.Tensor:
        """Runs a program from `state`, writes the new one into `cache`, and returns the logits."""
        inputs |= {f"state.{name}": x.float() for name, x in state.items()}  # of a model of any dtype
        with self._lock:  # a program has one place for its results
            results = self._programs[program]({name: x.contiguous().numpy() for name, x in inputs.items()})
            new = {name: torch.from_numpy(results[f"new_state.{name}"]) for name in state}
            for index, layer in enumerate(cache.layers):
                if f"{index}.conv" in new:
                    layer.update_conv_state(new[f"{index}.conv"])
                layer.update(tuple(new[f"{index}.{name}"] for name in STATE_NAMES[layer.layer_type]))
            return torch.from_numpy(results["logits"]).clone()
