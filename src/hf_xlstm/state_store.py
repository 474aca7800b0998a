"""Conversations that never read twice: snapshots of the state, found again by the text that led to it.

    store = StateStore(directory="runs/states")

    cache = store.find(model, ids)  # what has been read of the beginning of the text, in this or an earlier process
    output = model.generate(ids, cache=cache)  # reads the rest
    store.keep(model, output, cache)

A snapshot is found by a hash of the weights and of the tokens that were read, so that text that differs in one token,
or a model that differs in one number, never meets it. Batches and servers use `model.state_store`: see batching.py.
"""

import contextlib
import copy
import hashlib
import json
import shutil
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .cache import CACHE_FILE, xLSTMCache
from .files import locked
from .linear import checksum


logger = logging.get_logger(__name__)

# Entries of a configuration that say where a model comes from, or what its weights say themselves.
NOT_COMPUTED_WITH = {"_name_or_path", "architectures", "auto_map", "dtype", "save_id", "torch_dtype"}
NOT_COMPUTED_WITH |= {"transformers_version", "transformers_weights", "use_cache", "weight_mode"}


class StateStore:
    """Snapshots of one conversation's state each, in memory and optionally on disk, of any number of models. The ones
    that were not used for the longest time go first. Threads may share a store, processes may not.

    Args:
        max_bytes: of snapshots in memory.
        directory: where snapshots are written as well, so that they outlive the process; only in memory by default.
        max_disk_bytes: of snapshots in the directory, by default ten times `max_bytes`.
        every: tokens between the snapshots that a batch makes while it reads a prompt or writes a reply, beside those
            at the end of each prompt, reply and turn.

    Raises:
        RuntimeError: another store has the directory.
    """

    def __init__(
        self,
        max_bytes: int = 2**30,
        directory: str | Path | None = None,
        max_disk_bytes: int | None = None,
        every: int = 2048,
    ):
        if max_bytes < 0 or every < 1:
            raise ValueError(f"`max_bytes` must be at least 0 and `every` at least 1, got {max_bytes} and {every}.")
        self.max_bytes, self.every = max_bytes, every
        self.max_disk_bytes = 10 * max_bytes if max_disk_bytes is None else max_disk_bytes
        self.nbytes = self.disk_bytes = 0
        self._memory: OrderedDict[str, xLSTMCache] = OrderedDict()  # least recently used first, here and below
        self._files: OrderedDict[str, int] = OrderedDict()  # bytes of each
        self._lengths: Counter[int] = Counter()  # how many snapshots there are of so many tokens
        self._mutex = threading.RLock()
        self._lock = contextlib.ExitStack()
        self._directory: Path | None = None
        if directory is not None:
            self._open(Path(directory))

    def find(self, model: torch.nn.Module, ids: torch.Tensor | list[int]) -> xLSTMCache:
        """A cache of its own that has read the longest known beginning of a text, at most all but its last token; an
        empty one if none is known. It is on the model's device.

        Args:
            ids: the tokens of the whole text, (T,), (1, T) or a list.
        """
        weights = fingerprint(model)
        cache = self.longest(TextKeys(weights), token_list(ids))
        own: Any = model
        cache = xLSTMCache(own.config) if cache is None else cache.to(own.device)
        cache.read_by = weights
        return cache

    def keep(self, model: torch.nn.Module, ids: torch.Tensor | list[int], cache: xLSTMCache) -> None:
        """Keeps a copy of `cache`, which has read the beginning of a text, for whoever goes on from there.

        Args:
            ids: the tokens of the text, as in `find`; more than the cache has read are no harm.
            cache: of one sequence, without padding.

        Raises:
            ValueError: the weights are not those that it was read by, or it has read more than `ids`.
        """
        weights, tokens = fingerprint(model), token_list(ids)
        if getattr(cache, "read_by", weights) != weights:
            raise ValueError("The weights of the model have changed since `find`: this state belongs to the old ones.")
        seen = cache.get_seq_length()
        if cache.batch_size != 1 or seen > len(tokens):
            raise ValueError(
                f"`cache` must have read one text of at most {len(tokens)} tokens, it has read {seen} in "
                f"{max(cache.batch_size, 0)} rows."
            )
        self.add(TextKeys(weights), tokens[:seen], copy.deepcopy(cache).to("cpu"))

    def longest(self, keys: "TextKeys", tokens: list[int]) -> xLSTMCache | None:
        """`find` for a text whose keys are at hand: a cache on the CPU that belongs to the caller, or None."""
        with self._mutex:
            lengths = sorted(length for length in self._lengths if length < len(tokens))
            for key in reversed(keys.of(tokens, lengths)):
                cache = self._get(key)
                if cache is not None:
                    return copy.deepcopy(cache)
        return None

    def add(self, keys: "TextKeys", tokens: list[int], cache: xLSTMCache) -> None:
        """`keep` for a text whose keys are at hand. The cache is on the CPU, has read exactly `tokens`, and belongs to
        the store from now on."""
        if not tokens:
            return
        (key,) = keys.of(tokens, [len(tokens)])
        with self._mutex:
            self._remember(key, cache)
            if self._directory is not None and key not in self._files:
                self._write(key, cache)

    def clear(self) -> None:
        """Forgets everything, on disk as well."""
        with self._mutex:
            for key in list(self._memory):
                self._drop_memory(key)
            for key in list(self._files):
                self._drop_file(key)

    def close(self) -> None:
        """Gives the directory free for another process; the store goes on in memory."""
        with self._mutex:
            self._directory = None
            for key in list(self._files):
                self._uncount(key, self._memory)
            self._files.clear()
            self.disk_bytes = 0
            self._lock.close()

    def __len__(self) -> int:
        """Number of snapshots."""
        return len(self._memory.keys() | self._files.keys())

    def __deepcopy__(self, memo) -> "StateStore":
        return self  # a copied model uses the same store

    # ---- memory

    def _get(self, key: str) -> xLSTMCache | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            if key in self._files:
                self._files.move_to_end(key)
            return self._memory[key]
        if key not in self._files:
            return None
        try:
            cache = xLSTMCache.from_pretrained(self._path(key))
        except (OSError, ValueError) as error:
            logger.warning(f"A snapshot is dropped: {error}")
            self._drop_file(key)
            return None
        self._files.move_to_end(key)
        self._path(key).touch()  # in which order a later process finds them
        self._remember(key, cache)
        return cache

    def _remember(self, key: str, cache: xLSTMCache) -> None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return
        if cache.nbytes > self.max_bytes:
            return
        while self.nbytes + cache.nbytes > self.max_bytes:
            self._drop_memory(next(iter(self._memory)))
        self._count(key)
        self._memory[key] = cache
        self.nbytes += cache.nbytes

    def _drop_memory(self, key: str) -> None:
        self.nbytes -= self._memory.pop(key).nbytes
        self._uncount(key, self._files)

    def _count(self, key: str) -> None:
        if key not in self._memory and key not in self._files:
            self._lengths[int(key.split("-")[0])] += 1

    def _uncount(self, key: str, other: Iterable[str]) -> None:
        """Called when `key` has left one of the two places."""
        if key not in other:
            length = int(key.split("-")[0])
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]

    # ---- disk: a directory per snapshot, named by its key, with the file of `xLSTMCache.save_pretrained`

    def _path(self, key: str) -> Path:
        assert self._directory is not None  # it is where there are files
        return self._directory / key

    def _open(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if not self._lock.enter_context(locked(directory)):
            raise RuntimeError(f"{directory} is in use by another store, in this or another process.")
        self._directory = directory
        for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime):
            length, _, digest = path.name.partition("-")
            if not (path.is_dir() and length.isdigit() and len(digest) == 64):
                continue  # nothing of ours
            for file in path.iterdir():
                if file.name != CACHE_FILE:  # a killed process was writing it
                    file.unlink()
            if not (path / CACHE_FILE).exists():
                path.rmdir()
                continue
            self._count(path.name)
            self._files[path.name] = (path / CACHE_FILE).stat().st_size
            self.disk_bytes += self._files[path.name]
        self._make_room(0)

    def _write(self, key: str, cache: xLSTMCache) -> None:
        if cache.nbytes > self.max_disk_bytes:
            return
        self._make_room(cache.nbytes)
        path = self._path(key)
        try:
            cache.save_pretrained(path)
            size = (path / CACHE_FILE).stat().st_size
        except OSError as error:  # the disk is full, or gone: the text matters more than the snapshot
            logger.warning(f"A snapshot is not on disk: {error}")
            shutil.rmtree(path, ignore_errors=True)
            return
        self._count(key)
        self._files[key] = size
        self.disk_bytes += size
        self._make_room(0)

    def _make_room(self, nbytes: int) -> None:
        while self._files and self.disk_bytes + nbytes > self.max_disk_bytes:
            self._drop_file(next(iter(self._files)))

    def _drop_file(self, key: str) -> None:
        self.disk_bytes -= self._files.pop(key)
        self._uncount(key, self._memory)
        shutil.rmtree(self._path(key), ignore_errors=True)


def token_list(ids: torch.Tensor | Iterable[int]) -> list[int]:
    """The tokens of one text given as (T,), (1, T) or a list."""
    if isinstance(ids, torch.Tensor):
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.ndim != 1:
            raise ValueError(f"The tokens of one text are wanted, (T,) or (1, T), got {tuple(ids.shape)}.")
        return ids.tolist()
    return [int(token) for token in ids]


class TextKeys:
    """The keys of the beginnings of one text, which may grow. What was hashed last is not hashed again: of a long
    conversation only what is new.

    Args:
        weights: `fingerprint` of those that read the text.
    """

    def __init__(self, weights: str):
        self.weights = weights
        self._start()

    def _start(self) -> None:
        self._digest, self._hashed = hashlib.sha256(self.weights.encode()), 0

    def of(self, tokens: list[int], lengths: list[int]) -> list[str]:
        """The keys of the beginnings of `tokens` that have these lengths, in ascending order."""
        if lengths and lengths[0] < self._hashed:
            self._start()
        keys = []
        for length in lengths:
            self._digest.update(array("q", tokens[self._hashed : length]))
            self._hashed = length
            keys.append(f"{length}-{self._digest.hexdigest()}")
        return keys


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str:
    """A hash of all that decides what `model` makes of a text: its class and configuration, every parameter and buffer
    by checksums that each single number changes, and the adapters in use.

    Nothing is remembered from call to call, so that a change is noticed however it was made: by an optimizer, through
    `parameter.data`, in NumPy. A call takes as long as reading the weights once, about one step of decoding.
    """
    whole: Any = model.config
    config = {name: x for name, x in whole.to_dict().items() if name not in NOT_COMPUTED_WITH}
    digest = hashlib.sha256(f"{type(model).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    if (export_id := getattr(model, "export_id", None)) is not None:  # an exported model has no parameters
        digest.update(export_id.encode())
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(checksum(x).cpu().numpy().data)
    for name, module in model.named_modules():
        active = getattr(module, "active_adapters", None)  # of a layer of PEFT; models have a method of that name
        if active is not None and not callable(active):
            facts = active, getattr(module, "disable_adapters", None), getattr(module, "scaling", None)
            digest.update(f"{name} {facts}".encode())
    return digest.hexdigest()


__all__ = ["StateStore", "fingerprint"]
