"""Conversion of checkpoints and states of other implementations to those of this package, and back (`formats/`).

A checkpoint is converted tensor by tensor, in the memory of its largest tensor. The target gets its name when it is
complete and has been compared with the source, or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tqdm.auto import tqdm

from .cache import xLSTMCache
from .configuration_xlstm import xLSTMConfig
from .files import appearing
from .formats.configs import config_to_large, config_to_wrapper, config_to_xlstm, ffn_fields, is_wrapper
from .formats.tensors import DTYPES, TensorFiles
from .formats.weights import Layout, check_names, convert, drop_tied_head, rules_from_foreign
from .hub import save_code
from .modeling_xlstm import xLSTMForCausalLM


__all__ = ["FORMATS", "Report", "cache_from_xlstm", "cache_to_xlstm", "convert_checkpoint", "native_shapes"]

FORMATS = ("hf_xlstm", "xlstm_large", "xlstm", "xlstm_wrapper")
INDEX = "model.safetensors.index.json"
# Files of a model that are copied as they are.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
COMPANIONS += ("generation_config.json",)


@dataclass(frozen=True)
class Report:
    """What a conversion wrote."""

    files: list[str]
    tensors: int
    nbytes: int
    verified: bool

    def __str__(self) -> str:
        compared = "equal to" if self.verified else "not compared with"
        return f"{self.tensors} tensors, {self.nbytes:,} bytes, {len(self.files)} file(s), {compared} the source"


class PickledTensors:
    """The tensors of a pickle that may hold nothing but tensors, by name; the counterpart of `TensorFiles`.

    Raises:
        ValueError: it is damaged or holds something else (the message names the file).
    """

    def __init__(self, path: Path):
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # whatever the unpickler meets in a file that is none
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is damaged or holds more than tensors (weights_only): {reason}") from error
        if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
            raise ValueError(f"{path} must hold a dictionary of tensors, and nothing else.")
        self.tensors = tensors
        self.paths = dict.fromkeys(tensors, path)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def read_meta(self, name: str) -> torch.Tensor:
        """Shape and dtype of a tensor, on the meta device."""
        return self.tensors[name].to("meta")

    def check_save(self, save_id: str | None) -> None:
        """Nothing to check: a pickle does not say of which save it is."""


AnyTensors = TensorFiles | PickledTensors


def open_tensors(directory: Path) -> AnyTensors:
    """The tensors of the checkpoint in a directory: of its safetensors files, or else of its only pickle."""
    paths = sorted(directory.glob("*.safetensors"))
    if paths:
        files = TensorFiles(paths)
        files.check_unique()
        return files
    pickles = [path for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(pattern))]
    if len(pickles) != 1:
        raise FileNotFoundError(f"{directory} has neither safetensors files nor a single .bin, .pt or .pth.")
    return PickledTensors(pickles[0])


@dataclass(frozen=True)
class Step:
    """Tensors to write, as a function of tensors to read: one direction of a `Rule`."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    function: Callable[..., tuple[torch.Tensor, ...]]

    def run(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self.outputs, convert(self.function, self.inputs, map(read, self.inputs)), strict=True))


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str = "hf_xlstm",
    *,
    fused: bool = False,
    slstm_backend: str = "vanilla",
    max_shard_size: int = 5 * 10**9,
    verify: bool = True,
) -> Report:
    """Converts the checkpoint in the directory `source`, of any layout, to the format of this package, or one in the
    format of this package to another.

    Args:
        target: a directory that does not exist yet, or an empty one. Until the conversion is complete there is only
            `<target>.partial-…`, which is removed if it fails, and by the next run if the process was killed.
        to: `"hf_xlstm"`, `"xlstm_large"` or `"xlstm"` (safetensors and `config.yaml`), or `"xlstm_wrapper"` (`xlstm`
            inside a Transformers model with remote code, which is not written).
        fused: write the weights of `xlstm_large` joined, as its `weight_mode="fused"` has them.
        slstm_backend: `"vanilla"` or `"cuda"`, of the `xlstm` package, which arrange sLSTM weights differently.
        max_shard_size: bytes per file of `hf_xlstm` and `xlstm_large`. The others have one file.
        verify: read what was written and compare it with the source, bit by bit.

    Raises:
        ValueError: tensors are missing, unknown or misshapen (the message names them), a file is damaged, or the
            target format has no such model.
        OSError: the target exists or another process is writing it, the source has no weights, or the disk is full.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise NotADirectoryError(f"{source} is not a directory.")
    if to not in FORMATS:
        raise ValueError(f"`to` must be one of {', '.join(FORMATS)}, got {to!r}.")
    config = read_configuration(source)
    files = open_tensors(source)
    files.check_save(config.save_id)
    config.save_id = None  # what is written appears at once
    if to == "hf_xlstm":
        steps = steps_to_native(files, config)
    else:
        prefix = "model." if to == "xlstm_wrapper" else ""
        layout = Layout(to.removesuffix("_wrapper"), prefix=prefix, joined=fused, slstm_backend=slstm_backend)
        steps = steps_to_foreign(files, config, layout)
    outputs = {name: x for step in steps for name, x in step.run(files.read_meta).items()}
    nbytes = sum(x.nbytes for x in outputs.values())
    shards = split_into_shards(steps, outputs, max_shard_size if to in ("hf_xlstm", "xlstm_large") else nbytes)
    names = shard_names(len(shards), to)

    with appearing(target, nbytes) as partial:
        write_configuration(partial, config, outputs, to, fused, slstm_backend)
        for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, partial / path.name)
        with tqdm(total=nbytes * (1 + verify), unit="B", unit_scale=True, desc="Converting") as progress:
            for name, shard in zip(names, shards):
                header = {output: outputs[output] for step in shard for output in step.outputs}
                tensors = (x for step in shard for x in step.run(files.read).values())
                write_safetensors(partial / name, header, tensors, progress.update)
            if to == "hf_xlstm" and len(shards) > 1:
                weight_map = {x: name for name, shard in zip(names, shards) for step in shard for x in step.outputs}
                index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
                (partial / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
            if verify:
                progress.set_description("Comparing")
                compare(steps, files, open_tensors(partial), progress.update)
    return Report(names, len(outputs), nbytes, verify)


def read_configuration(source: Path) -> xLSTMConfig:
    """The configuration in a directory. Raises ValueError naming the file if it does not describe a model."""
    try:
        fields, _ = xLSTMConfig.get_config_dict(source)
        kind = fields.get("model_type", xLSTMConfig.model_type)
        if kind != xLSTMConfig.model_type and not is_wrapper(fields):
            raise ValueError(f"its type is {kind}, not {xLSTMConfig.model_type}.")
        return xLSTMConfig.from_pretrained(source)
    except OSError:  # which names it
        raise
    except Exception as error:  # the type of the error depends on what is wrong with which field
        if str(source) in str(error):
            raise
        file = next((source / name for name in ("config.json", "config.yaml") if (source / name).exists()), source)
        raise ValueError(f"{file} does not describe a model: {error}") from error


def steps_to_native(files: AnyTensors, config: xLSTMConfig) -> list[Step]:
    """The steps from a checkpoint of any layout to the parameters of an `xLSTMForCausalLM`.

    `config` is changed to fit the tensors: implementations round the width of the feed-forward layers differently.
    """
    layout = Layout.of(files.paths)
    config.weight_mode = "single"
    for block in range(config.num_hidden_layers):
        name = layout.foreign_name(f"backbone.blocks.{block}.ffn.proj_down.weight")
        if name in files.paths:
            width = files.read_meta(name).shape[-1]
            if width != config.ffn_dim:
                for field, value in ffn_fields(config.hidden_size, width, config.block_family).items():
                    setattr(config, field, value)
            break
    shapes = native_shapes(config)
    steps = []
    for rule in rules_from_foreign(files.paths, files.read, shapes, config):
        step = Step(rule.foreign, rule.native, rule.to_native)
        check_shapes(step.run(files.read_meta), shapes, step.inputs)
        steps.append(step)
    return steps


def steps_to_foreign(files: AnyTensors, config: xLSTMConfig, layout: Layout) -> list[Step]:
    """The steps from a checkpoint of this package to one of another layout."""
    found = Layout.of(files.paths)
    if found != Layout("hf_xlstm"):
        raise ValueError(f"The source has the layout `{found.name}`: convert it to `hf_xlstm` first.")
    shapes = native_shapes(config)
    names = files.paths.keys()
    if config.tie_word_embeddings:
        names = drop_tied_head(names, files.read, found)
    check_names(shapes, names)
    check_shapes({name: files.read_meta(name) for name in shapes}, shapes)
    steps = [Step(rule.native, rule.foreign, rule.to_foreign) for rule in layout.rules(shapes, config)]
    if config.tie_word_embeddings and not layout.prefix:  # the package's `load_state_dict` wants it twice
        steps.append(Step(("backbone.embeddings.weight",), ("lm_head.weight",), lambda x: (x,)))
    return steps


def native_shapes(config: xLSTMConfig) -> dict[str, torch.Size]:
    """Shapes of all parameters of an `xLSTMForCausalLM` by name, without the head if it is tied."""
    with torch.device("meta"):
        model = xLSTMForCausalLM(config)
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def check_shapes(
    tensors: dict[str, torch.Tensor], shapes: dict[str, torch.Size], made_from: Iterable[str] = ()
) -> None:
    """Raises ValueError naming the tensors that do not have their shapes."""
    wrong = [
        f"{name} {tuple(x.shape)} instead of {tuple(shapes[name])}"
        for name, x in tensors.items()
        if x.shape != shapes[name]
    ]
    if wrong:
        origin = f" (from {', '.join(made_from)})" if made_from else ""
        raise ValueError(f"The checkpoint has misshapen weights: {', '.join(wrong)}{origin}.")


def split_into_shards(steps: list[Step], outputs: dict[str, torch.Tensor], max_shard_size: int) -> list[list[Step]]:
    shards: list[list[Step]] = [[]]
    free = max_shard_size
    for step in steps:
        nbytes = sum(outputs[name].nbytes for name in step.outputs)
        if nbytes > free and shards[-1]:
            shards.append([])
            free = max_shard_size
        shards[-1].append(step)
        free -= nbytes
    return shards


def shard_names(number: int, to: str) -> list[str]:
    if number == 1:
        return ["model.safetensors"]
    if to == "xlstm_large":
        return [f"model_{n}.safetensors" for n in range(number)]
    return [f"model-{n + 1:05d}-of-{number:05d}.safetensors" for n in range(number)]


def write_safetensors(
    path: Path,
    header: dict[str, torch.Tensor],
    tensors: Iterable[torch.Tensor],
    progress: Callable[[int], object],
) -> None:
    """The library's own writer wants all tensors of a file at once; this one takes one at a time, in the order of
    `header`, which has their shapes and dtypes."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, x in header.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}, expected one of {', '.join(map(str, DTYPES))}.")
        start, end = end, end + x.nbytes
        entries[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for x in tensors:
            file.write(_bytes(x).numpy().data)
            progress(x.nbytes)
        file.flush()
        os.fsync(file.fileno())  # a name must not survive a crash that the contents did not


def compare(steps: list[Step], files: AnyTensors, written: AnyTensors, progress: Callable[[int], object]) -> None:
    """Raises OSError unless what is written is what follows from the source."""
    for step in steps:
        for name, expected in step.run(files.read).items():
            actual = written.read(name)
            if actual.shape != expected.shape or not torch.equal(_bytes(actual), _bytes(expected)):
                raise OSError(f"{name} was not written as it should be.")
            progress(expected.nbytes)


def write_configuration(
    directory: Path,
    config: xLSTMConfig,
    outputs: dict[str, torch.Tensor],
    to: str,
    fused: bool,
    slstm_backend: str,
) -> None:
    if to == "hf_xlstm":
        with torch.device("meta"):
            model = xLSTMForCausalLM(config)
        config.architectures = [type(model).__name__]
        config.dtype = outputs["backbone.embeddings.weight"].dtype
        config.auto_map = save_code(directory)
        config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
        return
    if to == "xlstm_wrapper":
        fields = config_to_wrapper(config, slstm_backend)
        (directory / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
        return
    if to == "xlstm_large":
        fields = config_to_large(config, "fused" if fused else "single")
    else:
        fields = config_to_xlstm(config, slstm_backend)
    (directory / "config.yaml").write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")


# ---- states


def cache_from_xlstm(state: dict[str, dict], config: xLSTMConfig, seen_tokens: int) -> xLSTMCache:
    """The state that `xLSTMLMModel.step` returned after `seen_tokens` tokens.

    The package has the factor K ** -0.5 on k, and so in c and n; here it is on q. Its convolutions keep k inputs, of
    which the last k - 1 matter. Its c, n, m are (B, H, K, V), (B, H, K, 1), (B, H, 1, 1), and its sLSTM states one
    tensor (4, B, D).
    """
    cache = xLSTMCache(config)
    for index, layer in enumerate(cache.layers):
        foreign = state[f"block_{index}"]
        if foreign.get("conv_state"):
            layer.update_conv_state(foreign["conv_state"][0][:, 1:])
        if layer.layer_type == "mlstm":
            c, n, m = foreign["mlstm_state"]
            scale = c.shape[2] ** 0.5
            layer.update((c * scale, n.squeeze(-1) * scale, m.flatten(1)))
        else:
            layer.update(tuple(x.unflatten(-1, (-1, config.slstm_head_dim)) for x in foreign["slstm_state"]))
        device = layer.device
    cache.advance(seen_tokens, device)
    return cache


def cache_to_xlstm(cache: xLSTMCache, config: xLSTMConfig) -> dict[str, dict]:
    """The state for `xLSTMLMModel.step` to go on from. Raises ValueError before the first token."""
    state: dict[str, dict] = {}
    for index, layer in enumerate(cache.layers):
        foreign = state[f"block_{index}"] = {}
        if layer.state is None:
            raise ValueError("`cache` has read no token: there is no state to go on from.")
        if layer.conv_state is not None:  # the oldest input leaves with the next step
            foreign["conv_state"] = (torch.nn.functional.pad(layer.conv_state, (0, 0, 1, 0)),)
        if layer.layer_type == "mlstm":
            c, n, m = layer.state
            scale = config.qk_head_dim**-0.5
            foreign["mlstm_state"] = (c * scale, n[..., None] * scale, m[..., None, None])
        else:
            foreign["slstm_state"] = torch.stack([x.flatten(1) for x in layer.state])
    return state


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8)
