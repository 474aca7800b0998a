"""A training run that survives: how far it is, what it saves and when, and where it goes on from."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_xlstm import xLSTMCache
from hf_xlstm.files import write_text
from hf_xlstm.optim import decayed_parameters
from hf_xlstm_cli.errors import UserError


PROGRESS = "progress.json"  # in a checkpoint: it is whole
STATES = "states-{}"  # in a checkpoint: those of one process, with `--stateful`


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    steps: int = 0
    seconds: float = 0.0  # of training, over all sittings
    train_curve: list[tuple[float, float]] = field(default_factory=list)  # (minutes, nats per token)
    heldout_curve: list[tuple[float, float]] = field(default_factory=list)  # (minutes, bits per byte)


FORETELL = 0.1  # the part of the time after which it can be told how many steps the rest will make
FEW_STEPS = 100  # of a training by the clock: on an idle machine the quickstart makes several hundred


def few_steps(steps: int, seconds: float) -> str:
    """Why a training by the clock makes few steps, and what helps."""
    return (
        f"{steps} steps in {seconds:.0f} s are few: the machine is busy or slow, or the time short. Give more "
        "--minutes or a number of --steps, stop what else is running, or train a smaller model."
    )


@dataclass(frozen=True)
class Budget:
    """When the training ends: after `seconds`, or if that is None after `steps`."""

    seconds: float | None
    steps: int

    def done(self, seconds: float, step: int) -> float:
        """The part that lies behind, 0 to 1, in the middle of a step that begins now."""
        if self.seconds is not None:
            return min(seconds / self.seconds, 1.0)
        return min((step + 0.5) / self.steps, 1.0)

    def is_over(self, progress: Progress) -> bool:
        return progress.steps >= self.steps if self.seconds is None else progress.seconds >= self.seconds


def learning_rate_factor(done: float, schedule: str, warmup: float = 0.05, decay: float = 0.2) -> float:
    """Linear rise over the part `warmup`, then either cosine to zero, or constant and over the last part `decay`
    linear to zero (warmup-stable-decay)."""
    fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else min(1.0, (1 - done) / decay)
    return min(done / warmup, fall) if warmup else fall


class Run(TrainerCallback):
    """Shows, evaluates, saves and ends a training.

    The clock and the signals are those of the first process, or of any that got one: all processes agree on them once
    per step, since no two may take another learning rate or end at another step.

    Args:
        evaluate: the model to its held-out bits per byte.
        evaluations: how often to call it, in equal parts of the budget.
        save_every: seconds between checkpoints. One more is saved after the first step, which shows that saving
            works, one on SIGINT and SIGTERM, and one at the end.
        clock: seconds.
    """

    def __init__(
        self,
        budget: Budget,
        evaluate: Callable[[torch.nn.Module], float],
        evaluations: int = 10,
        save_every: float = 600.0,
        progress: Progress | None = None,
        tokens_per_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.budget, self.evaluate, self.evaluations, self.save_every = budget, evaluate, evaluations, save_every
        self.progress = progress or Progress()
        self.tokens_per_step = tokens_per_step
        self.clock = clock
        self.save_states: Callable[[Path], None] = lambda folder: None
        self.report: Callable[[float], None] = lambda bits: None
        self.signal = 0  # the one that ended the training
        self._received = 0
        self._began = self._before = self._saved = 0.0
        self._first_step = 0
        self._foretold = False

    def learning_rate_factor(self, step: int, schedule: str) -> float:
        return learning_rate_factor(self.budget.done(self.progress.seconds, step), schedule)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.progress.heldout_curve:
            self._evaluate(model)
        self._handlers = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        self._began, self._before, self._first_step = self.clock(), self.progress.seconds, state.global_step
        self._saved = self.progress.seconds if state.global_step else -math.inf
        by_time = self.budget.seconds is not None
        self.bar = tqdm(
            total=self.budget.steps if self.budget.seconds is None else round(self.budget.seconds),
            initial=round(self.progress.seconds) if by_time else state.global_step,
            desc="training",
            unit="s" if by_time else "step",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} {unit}{postfix}",
            disable=not state.is_world_process_zero,
        )

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"the loss is {logs['loss']} at step {state.global_step}: nothing of it is saved; start again with a "
                "lower --learning-rate"
            )
        self.progress.train_curve.append((self.progress.seconds / 60, float(logs["loss"])))
        self._show(state)

    def on_step_end(self, args, state, control, **kwargs):
        seconds, self.signal = self._agree(self._before + self.clock() - self._began, self._received)
        self.progress.seconds, self.progress.steps = seconds, state.global_step
        over = self.budget.is_over(self.progress)
        control.should_training_stop = bool(over or self.signal)
        if not self.signal:
            done = self.budget.done(seconds, state.global_step)
            if over or done >= len(self.progress.heldout_curve) / self.evaluations:
                self._evaluate(kwargs["model"])
            if not self._foretold and self.budget.seconds is not None and done >= FORETELL:
                self._foretold = True
                if state.global_step < FEW_STEPS * done and state.is_world_process_zero:
                    self.bar.write(f"warning: {few_steps(state.global_step, seconds)}", file=sys.stderr)
        if control.should_training_stop or seconds - self._saved >= self.save_every:
            control.should_save = True
        self._show(state)

    def on_save(self, args, state, control, **kwargs):
        """Marks the checkpoint as whole, once every process has written its part."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        self.save_states(folder)
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            write_text(folder / PROGRESS, json.dumps(asdict(self.progress)))
        self._saved = self.progress.seconds

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        self.close()

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in getattr(self, "_handlers", {}).items():
            signal.signal(number, handler)
        self._handlers = {}

    def _interrupt(self, number: int, frame) -> None:
        """Ends the training after this step; a second signal ends the process at once."""
        self._received = number
        self.close()

    def _evaluate(self, model) -> None:
        bits = self.evaluate(model)
        self.progress.heldout_curve.append((self.progress.seconds / 60, bits))
        self.report(bits)

    @staticmethod
    def _agree(seconds: float, received: int) -> tuple[float, int]:
        state = PartialState()
        if state.num_processes == 1:
            return seconds, received
        both = torch.tensor([seconds, received], dtype=torch.float64, device=state.device)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        return both[0].item(), int(both[1].item())

    def _show(self, state) -> None:
        progress, spent = self.progress, self.progress.seconds - self._before
        steps = state.global_step - self._first_step
        parts = [f"step {state.global_step}"]
        parts += [f"loss {progress.train_curve[-1][1]:.3f}"] if progress.train_curve else []
        parts += [f"held-out bits per byte {progress.heldout_curve[-1][1]:.3f}"]
        if steps > 0 and spent > 0:
            parts.append(f"{steps * self.tokens_per_step / spent:,.0f} tokens/s")
            done, before = (
                (progress.seconds, self.budget.seconds)
                if self.budget.seconds is not None
                else (state.global_step, self.budget.steps)
            )
            rate = 1.0 if self.budget.seconds is not None else steps / spent
            parts.append(f"{tqdm.format_interval(max(before - done, 0) / rate)} left")
        self.bar.n = min(
            round(progress.seconds) if self.budget.seconds is not None else state.global_step, self.bar.total
        )
        self.bar.set_postfix_str(", ".join(parts))


class RunTrainer(Trainer):
    """Trainer with the schedule of a `Run`, or its own if `schedule` is None, and with states that go on from window
    to window if `stateful`.

    The first batch item `first` (B,) tells the windows that begin with a zero state.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        run: Run,
        schedule: str | None = "cosine",
        stateful: bool = False,
        **kwargs,
    ):
        super().__init__(model, arguments, callbacks=[run], **kwargs)
        self.run, self.schedule, self.stateful = run, schedule, stateful
        self.states: xLSTMCache | None = None
        run.save_states, run.report = self.save_states, self.report

    def create_scheduler(self, num_training_steps, optimizer=None):
        schedule = self.schedule
        if schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,  # type: ignore[arg-type]
                lambda step: self.run.learning_rate_factor(step, schedule),
            )
        return self.lr_scheduler

    def get_decay_parameter_names(self, model):
        return decayed_parameters(model)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not self.stateful:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        if inputs.pop("first").any():
            self.states = None
        loss, outputs = super().compute_loss(
            model, {**inputs, "cache": self.states, "use_cache": True}, return_outputs=True, **kwargs
        )
        self.states = outputs.cache
        return (loss, outputs) if return_outputs else loss

    def report(self, bits: float) -> None:
        """Sends held-out bits per byte to the reporters."""
        due = self.control.should_log
        self.log({"eval_bits_per_byte": bits})
        self.control.should_log = due  # the loss of this step, which any log takes for logged

    def save_states(self, checkpoint: Path) -> None:
        if self.states is not None:
            self.states.save_pretrained(checkpoint / STATES.format(self.args.process_index))

    def load_states(self, checkpoint: Path) -> None:
        """The states after the last step before `checkpoint`, without which its next window would begin from zero."""
        if self.stateful:
            folder = checkpoint / STATES.format(self.args.process_index)
            self.states = xLSTMCache.from_pretrained(folder, device=self.args.device)


def is_whole(checkpoint: Path) -> bool:
    return (checkpoint / PROGRESS).exists()


def last_checkpoint(directory: Path) -> Path | None:
    """The last whole checkpoint of a run."""
    whole = filter(is_whole, directory.glob("checkpoint-*"))
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def read_progress(checkpoint: Path) -> Progress:
    return Progress(**json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")))


def bf16_is_faster() -> bool:
    """Many processors multiply matrices in bfloat16 several times faster, others only emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1024, 1024, dtype=dtype)
        x @ x  # warm-up
        start = time.perf_counter()
        x @ x
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]
