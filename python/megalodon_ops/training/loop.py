"""The training loop: exact to resume, safe to interrupt."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from megalodon_ops.config import MegalodonConfig
from megalodon_ops.loss import IGNORE_INDEX, cross_entropy
from megalodon_ops.model import Megalodon
from megalodon_ops.tokenizer import BYTES, Tokenizer
from megalodon_ops.training import checkpoint as checkpoints
from megalodon_ops.training.checkpoint import Checkpoint
from megalodon_ops.training.data import Batch, Corpus, TokenFile, Windows, split_point
from megalodon_ops.training.display import Display
from megalodon_ops.training.errors import CommandError
from megalodon_ops.training.evaluation import DEFAULT_PIECE, bits_per_byte
from megalodon_ops.training.metrics import MetricsLog, draw_loss_curve
from megalodon_ops.training.options import TrainOptions

BETAS = (0.9, 0.98)
EPS = 1e-8
SMOOTHING = 0.95
PROBE_ROUNDS = 2
OPTIMIZER = "optimizer."
GENERATOR = "generator"
TOKENS_NAME = "tokens.u32"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class Interrupt:
    """The first Ctrl-C (or SIGTERM) only asks the loop to stop; the second aborts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # Straight to the descriptor: printing from a handler may re-enter a stream's lock.
        os.write(2, b"\nstopping: saving after this step (Ctrl-C again: abort without saving)\n")

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return self.signal is not None


@dataclass(frozen=True)
class Outcome:
    """How a session of a run ended.

    fullness: the part of its tokens that had a target, which the last of a document has not.
    signal: the one that stopped it, or None.
    """

    step: int
    seconds: float
    tokens_per_second: float
    fullness: float
    finished: bool
    signal: int | None
    checkpoint: Path


def make_optimizer(model: torch.nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW whose weight decay touches the weight matrices and nothing else.

    Norm weights, biases, gamma and beta, and CEMA's parameters have meanings near which they should
    not be pulled to zero; CEMA's and gamma are not all one-dimensional, so the name decides too.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and name.endswith(".weight")
        (matrices if is_matrix else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, eps=EPS, fused=True)


def training_step(
    model: Megalodon,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    dtype: str,
    clip: float,
) -> tuple[float, float]:
    """One step; returns (bits per token, gradient norm). No update if either is not finite."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden = model(batch.tokens, cu_seqlens=batch.cu_seqlens, outputs="hidden")
        weight = model.output.output.weight
        total = cross_entropy(hidden, weight, batch.targets, reduction="sum")
        loss = total / max(1, int((batch.targets != IGNORE_INDEX).sum()))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    bits = loss.item() / math.log(2)
    if math.isfinite(bits) and math.isfinite(norm):
        optimizer.step()
    return bits, norm


def probe_dtypes(model: Megalodon, options: TrainOptions, batch: Batch) -> dict[str, float]:
    """Seconds of one training step in each dtype on this machine: the best of two after a warm-up,
    taken in turn. Works on a copy and puts torch's generator back: the run is not changed."""
    seconds = {"float32": math.inf, "bfloat16": math.inf}
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model, options)
    with torch.random.fork_rng(devices=[]):
        for round_index in range(1 + PROBE_ROUNDS):
            for dtype in seconds:
                begin = time.perf_counter()
                training_step(model, optimizer, batch, dtype, options.clip)
                if round_index:
                    seconds[dtype] = min(seconds[dtype], time.perf_counter() - begin)
    return seconds


class Trainer:
    """One run: its model, optimiser, data and place on the disk.

    `resume` is the checkpoint to go on from (with its training part), or None for a new run.
    """

    # Of the training text; reports are in bits per byte, whatever a token is.
    _tokens_per_byte = 1.0

    def __init__(
        self,
        config: MegalodonConfig,
        options: TrainOptions,
        corpus: Corpus,
        out: Path,
        display: Display,
        resume: Checkpoint | None = None,
        tokenizer: Tokenizer = BYTES,
    ) -> None:
        self.out, self.display, self.config = out, display, config
        self.step, self.seconds, self.trained_seconds = 0, 0.0, 0.0
        self._read = self._targets = 0  # tokens of this session, and those with a target
        self._corpus, self._fingerprint = corpus, corpus.fingerprint()
        if resume is not None and resume.settings.get("corpus") != self._fingerprint:
            raise CommandError(
                f"--resume: the corpus {corpus.name!r} is not the one this run was trained on"
            )
        self._held_out_start = split_point(corpus, options.held_out)
        self._tokenizer = tokenizer
        self._windows = self._open_windows(options)
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        self.model = Megalodon(config)
        self.options = options if resume is not None else self._choose_dtype(options)
        self.optimizer = make_optimizer(self.model, self.options)
        if resume is not None:
            self._restore(resume)

    def _open_windows(self, options: TrainOptions) -> Windows:
        """The training text in windows; what is no byte is encoded first."""
        source: Corpus | TokenFile = self._corpus
        stop = self._held_out_start
        if self._tokenizer is not BYTES:
            try:
                source = TokenFile(
                    self.out / TOKENS_NAME, self._corpus, self._held_out_start, self._tokenizer
                )
            except ValueError as error:
                raise CommandError(str(error)) from error
            stop = source.size
            self._tokens_per_byte = stop / max(1, self._held_out_start)
            self.display.say(
                f"{stop:,} tokens of {self._tokenizer.vocab_size:,} kinds, "
                f"{1 / max(self._tokens_per_byte, 1e-9):.2f} bytes each"
            )
        sizes = options.seq_len, options.batch_size
        return Windows(source, stop, *sizes, options.seed, options.pack)

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _choose_dtype(self, options: TrainOptions) -> TrainOptions:
        if options.dtype != "auto":
            return options
        seconds = probe_dtypes(self.model, options, self._windows.batch(0))
        dtype = min(seconds, key=seconds.__getitem__)
        self.display.say(
            f"dtype {dtype}: the faster here (a step takes {1e3 * seconds['float32']:.0f} ms in "
            f"float32, {1e3 * seconds['bfloat16']:.0f} ms in bfloat16)"
        )
        return dataclasses.replace(options, dtype=dtype)

    def _restore(self, saved: Checkpoint) -> None:
        checkpoints.load_weights(self.model, saved, self.out)
        try:
            self.step = int(saved.settings["step"])
            self.seconds = float(saved.settings["seconds"])
            self.trained_seconds = float(saved.settings["trained_seconds"])
            for name, parameter in self.model.named_parameters():
                if self.step == 0:  # interrupted before the first step: the optimiser has no state
                    break
                state = {
                    key: saved.training[f"{OPTIMIZER}{name}.{key}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
                if any(state[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
                    raise ValueError(f"the optimiser state of {name} has another shape")
                self.optimizer.state[parameter] = state
            torch.set_rng_state(saved.training[GENERATOR])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CommandError(
                f"the checkpoint in {self.out} has no complete training state ({error}); it can be "
                "used by generate and eval, not by --resume"
            ) from error
        if saved.settings.get("used_threads") != torch.get_num_threads():
            self.display.say(
                f"note: the run had {saved.settings.get('used_threads')} threads and goes on with "
                f"{torch.get_num_threads()}; losses may differ in their last bits"
            )

    def save(self) -> Path:
        """Write the checkpoint of the present step (atomically; raises CommandError)."""
        training = {GENERATOR: torch.get_rng_state()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                training[f"{OPTIMIZER}{name}.{key}"] = value
        settings = {
            "step": self.step,
            "seconds": self.seconds,
            "trained_seconds": self.trained_seconds,
            "options": dataclasses.asdict(self.options),
            "corpus": self._fingerprint,
            "tokenizer": self._tokenizer.identity(),
            "held_out_start": self._held_out_start,
            "used_threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        return checkpoints.save(
            Checkpoint(self.config, self.model.state_dict(), training, settings), self.out
        )

    def progress(self) -> float:
        """From 0 to 1: the part of the steps, or of the time, that is done."""
        if self.options.steps is not None:
            return self.step / self.options.steps
        assert self.options.minutes is not None
        return self.seconds / (60 * self.options.minutes)

    def evaluate(self, interrupt: Interrupt) -> float | None:
        """Held-out bits per byte (the first `eval_bytes` of the held-out part), or None."""
        stop = min(self._corpus.size, self._held_out_start + self.options.eval_bytes)
        pieces = self._corpus.pieces(self._held_out_start, stop, DEFAULT_PIECE)
        return bits_per_byte(self.model, pieces, lambda: interrupt.asked, self._tokenizer)

    def run(self, stop_after: int | None = None) -> Outcome:
        """Train to the end, or until Ctrl-C, or for `stop_after` steps; save; draw the curve."""
        metrics = MetricsLog(self.out, self.step)
        last_step = math.inf if stop_after is None else self.step + stop_after
        metrics.write(
            "session",
            self.step,
            parameters=self.parameter_count,
            dtype=self.options.dtype,
            threads=torch.get_num_threads(),
        )
        self.model.train()
        with Interrupt() as interrupt:
            try:
                with self.display:
                    self._loop(metrics, interrupt, last_step)
                path = self.save()
            except KeyboardInterrupt:
                raise CommandError(
                    f"aborted at step {self.step} without saving; the last checkpoint is as it was",
                    EXIT_INTERRUPTED,
                ) from None
            finally:
                metrics.close()
            draw_loss_curve(self.out)
        tokens = self.step * self.options.batch_size * self.options.seq_len
        return Outcome(
            self.step,
            self.seconds,
            tokens / max(self.trained_seconds, 1e-9),
            self._targets / max(self._read, 1),
            self.progress() >= 1,
            interrupt.signal,
            path,
        )

    def _loop(self, metrics: MetricsLog, interrupt: Interrupt, last_step: float) -> None:
        options = self.options
        tokens_per_step = options.batch_size * options.seq_len
        smooth_bits = smooth_seconds = 0.0
        begin = time.perf_counter() - self.seconds
        while self.progress() < 1 and self.step < last_step and not interrupt.asked:
            step_begin = time.perf_counter()
            rate = options.learning_rate(self.step, self.progress())
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batch = self._windows.batch(self.step)
            bits, norm = training_step(
                self.model, self.optimizer, batch, options.dtype, options.clip
            )
            if not (math.isfinite(bits) and math.isfinite(norm)):
                raise CommandError(
                    f"the loss or its gradient is not finite at step {self.step + 1}; stopped, and "
                    "what was saved before is intact; a lower --lr may help"
                )
            bits *= self._tokens_per_byte
            self.step += 1
            targets = int((batch.targets != IGNORE_INDEX).sum())
            self._read, self._targets = self._read + tokens_per_step, self._targets + targets
            step_seconds = time.perf_counter() - step_begin
            self.trained_seconds += step_seconds
            self.seconds = time.perf_counter() - begin
            # Averages start at the first value, not at zero.
            weight = SMOOTHING if smooth_seconds else 0.0
            smooth_bits = weight * smooth_bits + (1 - weight) * bits
            smooth_seconds = weight * smooth_seconds + (1 - weight) * step_seconds
            metrics.write(
                "train",
                self.step,
                bits_per_byte=bits,
                lr=rate,
                gradient_norm=norm,
                fullness=targets / tokens_per_step,
                tokens_per_second=tokens_per_step / step_seconds,
                seconds=self.seconds,
            )
            self.display.step(
                self.step,
                self.progress(),
                smooth_bits,
                tokens_per_step / smooth_seconds,
                self._seconds_left(smooth_seconds),
            )
            done = self.progress() >= 1
            if self._held_out_start < self._corpus.size and (
                done or self.step % options.eval_every == 0
            ):
                self._report(metrics, interrupt)
            if not done and self.step % options.checkpoint_every == 0:
                self.save()
            self.seconds = time.perf_counter() - begin

    def _report(self, metrics: MetricsLog, interrupt: Interrupt) -> None:
        held_out = self.evaluate(interrupt)
        if held_out is not None:
            metrics.write("eval", self.step, bits_per_byte=held_out, seconds=self.seconds)
            self.display.say(f"step {self.step}: held out {held_out:.3f} bits/byte")

    def _seconds_left(self, seconds_per_step: float) -> float:
        if self.options.steps is not None:
            return (self.options.steps - self.step) * seconds_per_step
        assert self.options.minutes is not None
        return max(0.0, 60 * self.options.minutes - self.seconds)
