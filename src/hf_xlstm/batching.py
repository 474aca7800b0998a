"""Continuous batching without pages: `model.generate_batch` and `transformers serve --continuous-batching`.

Transformers' own manager cuts keys and values of attention into pages. A state has constant size, so that a request
takes one row of a cache. `model.init_continuous_batching` returns a `RecurrentBatchingManager`, which is the interface
of Transformers' manager around a `BatchEngine`.
"""

import asyncio
import contextlib
import dataclasses
import gc
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

from .state_store import token_list


try:
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
    from transformers.generation.continuous_batching.requests import RequestStatus

    from .batch_engine import BatchEngine, Output, Request, prepare
except ImportError as error:
    raise ImportError(
        f"This version of Transformers has no continuous batching that hf_xlstm knows ({error}). `generate` works."
    ) from error


logger = logging.get_logger(__name__)

# Fields of a ContinuousBatchingConfig with an effect here, and such as are about hardware or processors that a state
# has no use for. Another one that is not at its default is refused.
HONOURED = {"max_requests_per_batch", "max_batch_tokens", "return_logprobs", "seed", "max_queue_size"}
HONOURED |= {"allow_block_sharing"}  # whether the model's store of states is used
NEEDLESS = {"per_request_processors", "drop_unsupported_processors", "auto_switch_to_flash", "use_async_batching"}
NEEDLESS |= {"disable_nccl_graph_mixing", "cpu_group_timeout"}


class RecurrentBatchingManager(ContinuousBatchingManager):
    """Runs requests on a thread of its own; they join and leave a batch at any token. It is Transformers' manager in
    all that a user calls, with these differences:

    - Sampling is each request's own: `add_request(ids, temperature=0.7, top_p=0.9)` takes any parameter of generation
      but beams and other models, and continues as `generate` would, with all its logits processors.
    - A request that is cancelled, or fails at whatever point, ends with an output whose status is FAILED.
    - States are kept in `model.state_store`, if there is one, and continued from there.

    Args:
        generation_config: of requests that do not say otherwise, as in `generate`.
        continuous_batching_config: `max_requests_per_batch` (64) that write at the same time, `max_batch_tokens` (512)
            of prompts read in one pass, `return_logprobs`, `seed`, `max_queue_size`, and `allow_block_sharing=False`
            not to use the store. What else can be set there is about pages, and refused.
    """

    # narrower, or never None, in the class above
    model: Any
    generation_config: Any
    _generation_thread: Any

    def __init__(
        self,
        model,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints=None,
    ):
        options = continuous_batching_config or ContinuousBatchingConfig()
        for field in dataclasses.fields(options):
            if field.name not in HONOURED | NEEDLESS and getattr(options, field.name) != field.default:
                raise ValueError(f"`{field.name}` is about pages of attention or their kernels: a state has neither.")
        if getattr(model, "_device_mesh", None) is not None or hasattr(model, "_pp_stage"):
            raise NotImplementedError("Batches of a model that is split over ranks are not supported: use vLLM.")
        self.model = model.eval()
        self.generation_config, self.continuous_batching_config = generation_config, options
        self.fatal_error: Exception | None = None
        self.warmed_up = True  # there is nothing to warm up
        self._new: queue.Queue[Request] = queue.Queue(options.max_queue_size)
        self._cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._number = 0
        self._expected: dict[str, tuple] = {}
        self._ids: set[str] = set()  # of requests that have not ended
        self._outputs: deque[Output] = deque()
        self._handlers: dict[str, tuple[Callable, asyncio.AbstractEventLoop]] = {}
        self._changed = threading.Condition()  # guards all of these and what follows
        self._ending: str | None = None  # "flush" or "now"
        self._pauses, self._paused = 0, False
        self._running = False
        self._generation_thread = None
        self._make_engine()

    def _make_engine(self) -> None:
        options = self.continuous_batching_config
        self.engine = BatchEngine(
            self.model,
            lambda request: self._deliver(request.output()),
            self.model.state_store if options.allow_block_sharing else None,
            options.max_requests_per_batch,
            options.max_batch_tokens,
            options.return_logprobs,
            options.seed,
        )

    @property
    def background_thread_status(self) -> "RecurrentBatchingManager":
        """Where newer versions of Transformers look for `fatal_error`."""
        return self

    # ---- starting and stopping

    def warmup(self) -> None:
        pass

    def switch_to_cb_friendly_attn(self, *args, **kwargs) -> None:
        pass

    def is_running(self) -> bool:
        return self._running

    def start(self) -> None:
        if self.is_running():
            logger.warning("Manager thread is already running.")
            return
        self.fatal_error, self._ending, self._running = None, None, True
        self._generation_thread = threading.Thread(target=self._run, name="hf_xlstm batching", daemon=True)
        self._generation_thread.start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Ends the thread: after the requests that have been added, or with `hard_stop` at once, and they fail."""
        if self._generation_thread is None:
            logger.warning("Manager not started.")
            return
        if block and self._pauses:
            raise RuntimeError("Cannot stop a manager that is paused: it would wait forever.")
        with self._changed:
            self._ending = "now" if hard_stop or self._ending == "now" else "flush"
            self._changed.notify_all()
        if block:
            self.join(time.perf_counter(), timeout)
        if keep_for_next_session:
            self.model._cached_continuous_batching_manager = self
        gc.collect()

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        if self._generation_thread is None:
            return
        self._generation_thread.join(timeout)
        if self._generation_thread.is_alive():
            logger.warning(f"The thread has not ended within {timeout} s.")
        else:
            self._generation_thread = None

    def destroy(self) -> None:
        if self.is_running():
            self.stop()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Keeps the thread from using the model, to change its weights for example. Requests go on afterwards."""
        with self._changed:
            if not self.is_running():
                raise RuntimeError("Cannot pause: the manager is not running.")
            self._pauses += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._paused or not self.is_running())
        try:
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

    # ---- requests

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        generation_config: GenerationConfig | None = None,
        **parameters,
    ) -> str | None:
        """Adds a text to continue, and returns the id under which its outputs come; None if the manager is ending.

        Args:
            input_ids: its tokens.
            request_id: chosen by default.
            streaming: an output after each token, not only at the end.
            record_timestamps: the time of each token is in the output.
            generation_config: in place of the manager's.
            parameters: of generation, such as `temperature`, and `tokenizer` for `stop_strings`.

        Raises:
            ValueError: a request with this id has not ended. What is wrong with a request itself is in its output.
        """
        if self.fatal_error is not None or self._ending is not None:
            reason = "has failed" if self.fatal_error is not None else "is ending"
            logger.warning(f"The manager {reason}: the request is dropped.")
            return None
        with self._changed:
            if request_id is None:
                request_id = f"req_{self._number}"
                self._number += 1
            if request_id in self._ids:
                raise ValueError(f"There is a request with the id {request_id} already.")
            self._ids.add(request_id)
            expected, tokenizer = self._expected.pop(request_id, (None, None))
        config = generation_config or expected or self.generation_config
        given = {"max_new_tokens": max_new_tokens, "eos_token_id": eos_token_id, "tokenizer": tokenizer}
        if eos_token_id == -1:  # Transformers' way to say that there is none
            given["eos_token_id"] = None
        parameters = {name: x for name, x in given.items() if x is not None} | parameters
        flags = {"streaming": streaming, "record_timestamps": record_timestamps}
        prompt: list[int] = []
        try:
            prompt = token_list(input_ids)
            request = prepare(self.model, request_id, prompt, config, **flags, **parameters)
        except Exception as error:
            replies = parameters.get("num_return_sequences") or getattr(config, "num_return_sequences", None) or 1
            for name in (request_id, *(f"{request_id}__child#{index}" for index in range(replies - 1))):
                text = f"{type(error).__name__}: {error}"
                self._deliver(Output(name, prompt, error=text, status=RequestStatus.FAILED))
            return request_id
        try:
            self._new.put(request, timeout=10)
        except queue.Full:
            self._ids.discard(request_id)
            raise
        with self._changed:
            self._changed.notify_all()
        if self._ending is not None and not self.is_running():  # it ended in this moment
            self._drain("The manager has ended.")
        return request_id

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **parameters,
    ) -> list[str | None]:
        """`add_request` for several texts."""
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "streaming": streaming,
            "record_timestamps": record_timestamps,
        }
        return [self.add_request(input_ids, **options, **parameters) for input_ids in inputs]

    def expect(self, request_id: str, generation_config: GenerationConfig, tokenizer=None) -> None:
        """The configuration of a request that somebody else, who does not know of it, adds under this id."""
        with self._changed:
            self._expected[request_id] = generation_config, tokenizer

    def cancel_request(self, request_id: str) -> None:
        """Ends a request, which frees its row. One that has ended, or never was, is no error."""
        self._cancelled.put(request_id)
        with self._changed:
            self._changed.notify_all()

    # ---- outputs

    def _deliver(self, output: Output) -> None:
        with self._changed:
            if output.is_finished():
                self._ids.discard(output.request_id)
            entry = self._handlers.get(output.request_id)
            if entry is None:
                self._outputs.append(output)
                self._changed.notify_all()
                return
            if output.is_finished():
                del self._handlers[output.request_id]
        callback, loop = entry
        try:
            loop.call_soon_threadsafe(callback, output)
        except RuntimeError:  # the loop, and with it whoever waited, has ended
            self.cancel_request(output.request_id)

    def register_result_handler(self, request_id: str, callback: Callable[[Output], None]) -> None:
        """Has `callback` called in the running event loop with each output of a request, also those that came before,
        until its last.

        Raises:
            ValueError: it has a handler.
        """
        loop = asyncio.get_running_loop()
        with self._changed:
            if request_id in self._handlers:
                raise ValueError(f"There is a request with the id {request_id} already.")
            self._handlers[request_id] = callback, loop
            early = [output for output in self._outputs if output.request_id == request_id]
            if early:
                self._outputs = deque(output for output in self._outputs if output.request_id != request_id)
            for output in early:  # before any that comes in the meantime
                self._deliver(output)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> Output | None:
        """The next output, of that request if one is given. None after `timeout` seconds, or if nothing is there and
        the manager is not running."""

        def find() -> Output | None:
            for output in self._outputs:
                if request_id is None or output.request_id == request_id:
                    return output
            return None

        with self._changed:
            self._changed.wait_for(lambda: find() is not None or not self.is_running(), timeout)
            output = find()
            if output is not None:
                self._outputs.remove(output)
            return output

    def __iter__(self) -> Iterator[Output]:
        """The outputs as they come, until the manager ends."""
        while True:
            output = self.get_result(timeout=0.1)
            if output is not None:
                yield output
            elif not self.is_running():
                return

    def request_id_iter(self, request_id: str) -> Iterator[Output]:
        """The outputs of one request, to the last."""
        while True:
            output = self.get_result(request_id, timeout=0.1)
            if output is not None:
                yield output
                if output.is_finished():
                    return
            elif not self.is_running():
                return

    # ---- the thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                with self.model._packed_during_generate():
                    while len(self.engine) and self._ending != "now" and not self._pauses:
                        self.engine.run()
                        self._take_in()
            self._drain("The manager was stopped before this request ended.")
        except Exception as error:
            logger.error(f"The manager has failed: {error}", exc_info=True)
            self.fatal_error = error
            self._drain(f"The manager has failed: {type(error).__name__}: {error}")
        finally:
            with self._changed:
                self._ending, self._running = self._ending or "now", False
                self._changed.notify_all()
            self._drain("The manager has ended.")  # what was added in the meantime

    def _wait_for_work(self) -> bool:
        """Sleeps until there is something to do; whether there is, or it is time to end."""
        while True:
            with self._changed:
                if self._pauses:
                    self._paused = True
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: not self._pauses)
                    self._paused = False
                    self.engine.forget_weights()
                if self._ending is None and self._new.empty() and self._cancelled.empty() and not len(self.engine):
                    self._changed.wait()
                    continue
                ending = self._ending
            self._take_in()
            if ending == "now" or (ending == "flush" and not len(self.engine)):
                return False
            if len(self.engine):
                return True

    def _take_in(self) -> None:
        while not self._new.empty():
            self.engine.add(self._new.get())
        while not self._cancelled.empty():
            self.engine.cancel(self._cancelled.get())

    def _drain(self, error: str) -> None:
        with self._changed:  # whoever adds a request to a manager that has ended drains, too
            with contextlib.suppress(queue.Empty):
                while True:
                    self.engine.add(self._new.get_nowait())
            self.engine.fail_all(error)


__all__ = ["RecurrentBatchingManager"]
