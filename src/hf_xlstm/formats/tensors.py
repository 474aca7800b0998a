"""The tensors of a checkpoint, read one at a time."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .weights import Rule, convert, rules_from_foreign


__all__ = ["DTYPES", "ConvertedTensor", "TensorFiles", "native_tensors"]

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
SAVE_ID = "save_id"


class TensorFiles:
    """The tensors of safetensors files, by name.

    Args:
        paths: the files.

    Raises:
        ValueError: a file is damaged or cut off (the message names it).
    """

    def __init__(self, paths: Iterable[str | os.PathLike]):
        self.paths: dict[str, Path] = {}
        self.repeated: dict[str, Path] = {}
        self.save_ids: dict[Path, str | None] = {}
        for path in map(Path, paths):
            with open_safetensors(path) as file:
                self.save_ids[path] = (file.metadata() or {}).get(SAVE_ID)
                names = list(file.keys())
            self.repeated |= {name: path for name in names if name in self.paths}
            self.paths |= dict.fromkeys(names, path)

    def read(self, name: str) -> torch.Tensor:
        """A tensor. Its file is opened anew, so that the pages of other tensors do not stay in memory."""
        with open_safetensors(self.paths[name]) as file:
            return file.get_tensor(name)

    def read_meta(self, name: str) -> torch.Tensor:
        """Shape and dtype of a tensor, on the meta device."""
        path = self.paths[name]
        with open_safetensors(path) as file:
            part = file.get_slice(name)
            shape, dtype = part.get_shape(), part.get_dtype()
        if dtype not in TORCH_DTYPES:
            raise ValueError(f"{name} in {path} has dtype {dtype}, expected one of {', '.join(TORCH_DTYPES)}.")
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")

    def check_unique(self) -> None:
        """Raises ValueError naming a tensor that is in two files, and the second of them."""
        for name, path in self.repeated.items():
            raise ValueError(f"{name} is in {path} and in another file of the checkpoint.")

    def check_save(self, save_id: str | None) -> None:
        """Checks that the files are of one save, and of the one in which a configuration with `save_id` was written.
        What has no `save_id` fits everything.

        Raises:
            ValueError: they are not, as after a save over an older model that was cut off.
        """
        known = {path.name: found for path, found in self.save_ids.items() if found is not None}
        if save_id is not None:
            known = {"config.json": save_id} | known
        first = next(iter(known), None)
        others = [name for name, found in known.items() if found != next(iter(known.values()))]
        if others:
            directory = next(iter(self.save_ids)).parent
            raise ValueError(
                f"{first} and {', '.join(others)} in {directory} are not of the same save, which was cut off or mixed "
                f"with another one. If they are meant to go together, remove `{SAVE_ID}` from config.json."
            )


def open_safetensors(path: Path):
    """The open file. Raises ValueError naming it if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read, it is damaged or cut off: {error}.") from error


class ConvertedTensor:
    """A native parameter that is made from foreign tensors when it is read; to Transformers it looks like a slice of a
    safetensors file, which it reads one after the other."""

    def __init__(self, files: TensorFiles, rule: Rule, index: int, meta: torch.Tensor):
        self.files, self.rule, self.index, self.meta = files, rule, index, meta

    def get_shape(self) -> list[int]:
        return list(self.meta.shape)

    def get_dtype(self) -> str:
        return DTYPES[self.meta.dtype]

    def __getitem__(self, item) -> torch.Tensor:
        tensors = [self.files.read(name) for name in self.rule.foreign]
        return convert(self.rule.to_native, self.rule.foreign, tensors)[self.index][item].contiguous()


def native_tensors(files: TensorFiles, names: Iterable[str], config) -> dict[str, ConvertedTensor]:
    """The native parameters `names`, named as in `xLSTMForCausalLM`, of a foreign checkpoint; none is read yet.

    Raises:
        ValueError: the checkpoint lacks tensors, or has unknown or misshapen ones (the message names them).
    """
    files.check_unique()
    converted = {}
    for rule in rules_from_foreign(files.paths, files.read, names, config):
        meta = convert(rule.to_native, rule.foreign, map(files.read_meta, rule.foreign))
        for index, name in enumerate(rule.native):
            converted[name] = ConvertedTensor(files, rule, index, meta[index])
    return converted
