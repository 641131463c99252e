"""Train the transformer on affine recurrences (section 3.2 of the paper).

    python train.py                                   # the paper's run: 100,000 steps, into runs/paper
    python train.py --steps 2000 --out runs/short     # a short one
    python train.py --n-layers 1 --d-mlp 512 --out runs/toy    # every field of model.Config is an option
    python train.py --task linear-2 --steps 20000 --out runs/tasks/linear-2    # another task of data.py
    python train.py --resume                          # go on with a run that was stopped or killed
    python train.py --seeds 0-15 --out runs/seeds     # sixteen runs, into runs/seeds/seed_0000 and so on
    torchrun --nproc_per_node=4 train.py --seeds 0-63 --out runs/seeds    # the same, divided over four GPUs
    python train.py --benchmark                       # where the time of a step goes
    python analyze.py --all --run runs/paper          # then look at it; --seeds and others compare runs

The run folder gets config.json (model and training settings), log.csv (step, loss: mean since the row before,
eval_mse: on the fixed held-out set, seconds), weights.pt (the state dict), checkpoint.pt (all that resuming
needs) and steps/00001000.pt and so on: the weights alone, at steps ever further apart. Ctrl-C saves first. A
run that was killed and resumed ends, on the same machine, with the same bits as one that was not (of several
seeds as one on a GPU, unless the kill came while they were being saved).

Parts, in order: the settings of a run; Run, what a run folder holds; Trainer, which takes the steps; `train`,
the loop; `benchmark`; the command line.
"""

import argparse
import contextlib
import ctypes
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch

import data
from model import (Config, Transformer, check_settings, load_file, replacing, save_file, save_json, setting,
                   settings_beside)

FILES = ("config.json", "checkpoint.pt", "weights.pt", "log.csv")
COLUMNS = ("step", "loss", "eval_mse", "seconds")
HELD_OUT_PER_LENGTH = 128  # 1,536 held-out sequences; measuring on them costs about 3% of the time
CHUNK = 100  # steps between two looks at the losses, the only moments at which the host waits for the device
SAVE_SECONDS = 30  # between two checkpoints
BENCHMARK_STEPS = 240

# ------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Options:
    """The settings of training, each declared here once; the command line is made from this and Config."""

    task: str = setting("affine", f"what to learn: {', '.join(data.TASKS)}, such as linear-2")
    steps: int = setting(100_000, "optimizer steps; a longer run may go on from a shorter one")
    batch_size: int = setting(16, "sequences a step")
    lr: float = setting(1e-4, "learning rate of AdamW, constant")
    weight_decay: float = setting(0.01, "weight decay of AdamW, on every parameter", zero=True)
    seed: int = setting(0, "decides the initial weights and the training data", zero=True)
    eval_every: int = setting(1000, "steps between two rows of log.csv")
    dtype: str = setting("float32", "of the matrix products: float32 or bfloat16",
                         choices=("float32", "bfloat16"))
    tf32: bool = setting(False, "let CUDA round the factors of float32 products to TF32")
    no_steps: bool = setting(False, "keep no weights in steps/")
    no_graphs: bool = setting(False,
                              "launch every kernel of a step on CUDA, instead of replaying captured steps")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or cuda:N")
    threads: int = setting(torch.get_num_threads(), "CPU threads")
    out: str = setting(os.path.join("runs", "paper"), "run folder")

    # What may differ between two sittings of a run; of the rest, in config.json, only --steps may change.
    SITTING = ("no_steps", "no_graphs", "device", "threads", "out")

    def __post_init__(self):
        check_settings(self)
        data.find_task(self.task)
        device = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", self.device)
        if not device:
            raise ValueError(f"device must be cpu, cuda or cuda:N, not {self.device!r}")
        if self.device != "cpu" and int(device[1] or 0) >= (found := torch.cuda.device_count()):
            raise ValueError(f"there is no {self.device}: torch finds {found} CUDA devices; use cpu")
        if self.threads > 4096:
            raise ValueError(f"threads must be at most 4096, not {self.threads}")


def from_settings(settings: dict) -> tuple[Options, Config]:
    """Options and Config with the values in `settings`, a flat dict such as config.json holds, and defaults
    for the rest. ValueError for a setting that there is not and for a value out of its range."""
    names = [{f.name for f in fields(kind)} for kind in (Options, Config)]
    if unknown := sorted(settings.keys() - set.union(*names)):
        raise ValueError(f"there is no setting {unknown[0]!r}; settings are those of train.py --help")
    options, config = (kind(**{name: settings[name] for name in known & settings.keys()})
                       for kind, known in zip((Options, Config), names))
    if config.n_ctx < data.MAX_LENGTH:
        raise ValueError(f"n_ctx must be at least {data.MAX_LENGTH}, the longest sequence")
    return options, config


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------------------------------------
# A run: what its folder holds


class Run:
    """Model, optimizer and the two random streams of a run, which go on where a checkpoint left them."""

    PROGRESS = ("step", "loss_sum", "loss_count", "seconds", "log")

    def __init__(self, settings: dict):
        self.options, config = from_settings(settings)
        self.settings = {k: v for k, v in (asdict(config) | asdict(self.options)).items()
                         if k not in Options.SITTING}
        self.task = data.find_task(self.options.task)
        # Drawn on the CPU, so that they are the same on every device; the lengths too, so that the host knows
        # them.
        self.lengths = torch.Generator().manual_seed(self.options.seed)
        self.model = Transformer(config, self.lengths).to(self.options.device)
        data_seed = torch.randint(2**62, (), generator=self.lengths).item()
        self.sequences = torch.Generator(self.options.device).manual_seed(data_seed)
        self.parameters = list(self.model.parameters())
        self.optimizer = adamw(self.parameters, self.options)
        self.step = 0
        self.loss_sum, self.loss_count = 0.0, 0  # since the last row of the log
        self.seconds = 0.0  # of training, over all sittings
        self.log: list[list[float]] = []

    def path(self, *names: str) -> str:
        return os.path.join(self.options.out, *names)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.cpu() for name, value in self.model.state_dict().items()}

    def state(self) -> dict:
        return {"settings": self.settings, "device": torch.device(self.options.device).type,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"],
                "lengths": self.lengths.get_state(), "sequences": self.sequences.get_state(),
                **{name: getattr(self, name) for name in self.PROGRESS}}

    def load_state(self, state: dict, path: str):
        """Go on from a checkpoint. ValueError, and no change, if it is none or belongs to another run."""
        mine = self.state()
        if missing := sorted(mine.keys() - state.keys()):
            raise ValueError(f"{path} is no checkpoint of train.py: it lacks {missing[0]!r}")
        begun = state["settings"]
        for name, value in self.settings.items():
            if name != "steps" and begun.get(name, value) != value:
                raise ValueError(f"{path} belongs to a run with {name} {begun[name]}, not {value}")
        if state["device"] != mine["device"]:
            there = state["device"]  # whose random streams differ from those of this device
            raise ValueError(f"{path} was written on {there}: resume with --device {there}")
        if state["step"] > self.options.steps:
            raise ValueError(f"{path} is at step {state['step']:,}, beyond --steps {self.options.steps:,}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})
        self.lengths.set_state(state["lengths"])
        self.sequences.set_state(state["sequences"])
        for name in self.PROGRESS:
            setattr(self, name, state[name])

    def save(self):
        """Write checkpoint.pt, then what follows from it, which resuming would write again after a kill."""
        save_file(self.state(), self.path("checkpoint.pt"))
        save_json(self.settings, self.path("config.json"))
        save_file(self.weights(), self.path("weights.pt"))
        rows = [f"{step},{loss:.8g},{eval_mse:.8g},{seconds:.1f}"
                for step, loss, eval_mse, seconds in self.log]
        with replacing(self.path("log.csv")) as f:
            f.write("\n".join([",".join(COLUMNS), *rows, ""]).encode())

    def save_step(self):
        """Keep the weights at this step."""
        os.makedirs(self.path("steps"), exist_ok=True)
        save_file(self.weights(), self.path("steps", f"{self.step:08d}.pt"))

    def lock(self):
        """Hold the run folder until `release` is called or the process ends, however it ends. ValueError if
        another process holds it: two would write the same files."""
        try:
            import fcntl
        except ImportError:  # this system has no such locks
            return
        folder = os.open(self.options.out, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.options.out} is in use by a run: stop that one first") from error
        except OSError:
            pass  # nor has this file system

    def release(self):
        """Nothing is held as long as `lock` has not been called."""

    def check(self, value: float, what: str):
        if not math.isfinite(value):
            then = "the last checkpoint is kept; try a smaller --lr, or without this seed"
            raise FloatingPointError(f"{what} is {value} (seed {self.options.seed}): {then}")


def adamw(parameters: list[torch.Tensor], options: Options) -> torch.optim.AdamW:
    """The paper's optimizer. Its moments exist from the start, so that a step can be captured and a
    checkpoint is always complete."""
    graphs = torch.device(options.device).type == "cuda" and not options.no_graphs
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True,
                                  capturable=graphs)
    for p in parameters:
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def is_kept(step: int) -> bool:
    """Whether steps/ keeps the weights: at 0, 1, 2, 4, .. 512, then 1, 2 and 5 thousand, and so on."""
    if step <= 512:
        return step & (step - 1) == 0
    return step % 1000 == 0 and str(step).rstrip("0") in ("1", "2", "5")


def refuse_existing(out: str):
    """ValueError if the folder `out` holds a run."""
    if there := [name for name in FILES if os.path.exists(os.path.join(out, name))]:
        raise ValueError(f"{out} already holds a run ({', '.join(there)}): --resume it or give another --out")


def open_run(settings: dict, resume: bool) -> Run:
    """A new run in an empty folder, or the one in the folder `settings["out"]`, locked.

    settings: values of Options and Config by name, the others being defaults or, resuming, what config.json
    says. Raises ValueError for a new run where there is one already, for a folder in use, for a
    checkpoint that is damaged and for a setting that differs from the run's; FileNotFoundError where there is
    nothing to resume; OSError for a folder that cannot be written.
    """
    out = settings.get("out", Options.out)
    checkpoint = os.path.join(out, "checkpoint.pt")
    if not resume:
        refuse_existing(out)
        run = Run(settings)
        os.makedirs(out, exist_ok=True)
        run.lock()
        refuse_existing(out)  # nobody has begun one in the meantime
        run.save()  # so that it can be resumed whenever it is killed, and a read-only folder shows now
        return run
    begun = load_file(checkpoint, "checkpoint").get("settings", {}) | settings_beside(checkpoint)
    run = Run(begun | settings)
    run.lock()
    run.load_state(load_file(checkpoint, "checkpoint"), checkpoint)  # as it is now that nobody else goes on
    run.save()  # with the settings that it goes on with
    return run


# ------------------------------------------------------------------------------------------------------------
# A step of training


class Trainer:
    """Takes the steps of a run, or of several at the same step as one model whose parameters have one more
    dimension in front, [runs, ...].

    On a GPU, where a single run is too small to keep the chip busy, a stack costs little more than one. Its
    runs draw their own sequences but share the lengths, those of the first; everything else is as in a run of
    its own.
    """

    def __init__(self, runs: list[Run]):
        self.runs, self.options, self.model, self.task = runs, runs[0].options, runs[0].model, runs[0].task
        self.stacked = len(runs) > 1
        torch.set_float32_matmul_precision("high" if self.options.tf32 else "highest")
        self.parameters, self.optimizer = runs[0].parameters, runs[0].optimizer
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if self.stacked:
            self.named, _ = torch.func.stack_module_state([run.model for run in runs])
            self.parameters = list(self.named.values())
            self.optimizer = adamw(self.parameters, self.options)
            for stack, single in self.tensors():
                stack.copy_(torch.stack(single) if stack.dim() > single[0].dim() else single[0])

    def tensors(self):
        """Each moment and step count of the stack's optimizer, with those of the single runs."""
        for stacked, *single in zip(self.parameters, *(run.parameters for run in self.runs)):
            for name, value in self.optimizer.state[stacked].items():
                yield value, [run.optimizer.state[p][name] for run, p in zip(self.runs, single)]

    def sample(self, length: int) -> torch.Tensor:
        """A batch as data.sample draws it, [batch, length + 1, d_vocab], of a stack [runs, batch, ...]."""
        size, d_vocab, task = self.options.batch_size, self.model.config.d_vocab, self.options.task
        batches = [data.sample(size, length, run.sequences, d_vocab, task=task).a for run in self.runs]
        return torch.stack(batches) if self.stacked else batches[0]

    def loss(self, a: torch.Tensor) -> torch.Tensor:
        """The loss, [] or [runs]."""

        def one(predict: Callable, a: torch.Tensor) -> torch.Tensor:
            bfloat16 = self.options.dtype == "bfloat16"
            with torch.autocast(torch.device(self.options.device).type, torch.bfloat16, enabled=bfloat16):
                prediction = predict(a[:, :-1])
            return data.mse(prediction.float(), a[:, 1:], self.task.first)

        if not self.stacked:
            return one(self.model, a)
        call = torch.func.functional_call
        return torch.vmap(lambda p, a: one(lambda x: call(self.model, p, (x,)), a))(self.named, a)

    def backward(self, loss: torch.Tensor):
        self.optimizer.zero_grad()
        loss.sum().backward()

    def compute(self, length: int) -> torch.Tensor:
        """One step on sequences of `length` inputs: sample, loss, gradients, AdamW. Returns the loss."""
        loss = self.loss(self.sample(length))
        self.backward(loss)
        self.optimizer.step()
        return loss.detach()

    def train_step(self) -> torch.Tensor:
        """One step of the paper's training, on a batch of one random length. Returns the loss."""
        lengths = self.task.lengths
        length = torch.randint(lengths.start, lengths.stop, (), generator=self.runs[0].lengths).item()
        if length not in self.graphs:
            return self.compute(length)
        self.graphs[length].replay()
        return self.captured_loss

    @torch.no_grad()
    def write_back(self):
        """Bring the runs of a stack up to date with the steps taken."""
        if self.stacked:
            for i, run in enumerate(self.runs):
                run.lengths.set_state(self.runs[0].lengths.get_state())
                for stacked, single in zip(self.parameters, run.parameters):
                    single.copy_(stacked[i])
            for stack, single in self.tensors():
                for i, value in enumerate(single):
                    value.copy_(stack[i] if stack.dim() > value.dim() else stack)

    def capture(self):
        """Record the step as CUDA graphs, one for each length: replaying one costs a launch instead of
        several hundred.

        They share one memory pool, since only one runs at a time and none needs what another left behind.
        Where capturing fails, training goes on without.
        """
        # Libraries set themselves up in steps that really run; what those change is put back.
        torch.cuda.set_device(self.runs[0].sequences.device)
        generators, current = [run.sequences for run in self.runs], torch.cuda.current_stream()
        tensors = [*self.parameters,
                   *(value for state in self.optimizer.state.values() for value in state.values())]
        saved = [tensor.detach().clone() for tensor in tensors]
        states = [generator.get_state() for generator in generators]
        side = torch.cuda.Stream()
        try:
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for length in self.task.lengths:
                    loss = self.compute(length)
            current.wait_stream(side)
            self.captured_loss, graphs, pool = torch.zeros_like(loss), {}, torch.cuda.graph_pool_handle()
            for length in reversed(self.task.lengths):  # the largest first: the others fit into its memory
                graph = graphs[length] = torch.cuda.CUDAGraph()
                for generator in generators:
                    graph.register_generator_state(generator)
                self.optimizer.zero_grad()
                with torch.cuda.graph(graph, pool=pool):
                    self.captured_loss.copy_(self.compute(length))
            self.graphs = graphs
        except RuntimeError as error:
            # A capture that breaks off leaves its stream current, and another error on top of its cause.
            torch.cuda.set_stream(current)
            torch.cuda.synchronize()
            while isinstance(error.__context__, RuntimeError):
                error = error.__context__
            print(f"training without CUDA graphs, which failed: {str(error).splitlines()[0]}", flush=True)
            for group in self.optimizer.param_groups:
                group["capturable"] = False
        with torch.no_grad():
            for tensor, value in zip(tensors, saved):
                tensor.copy_(value)
        for generator, state in zip(generators, states):
            generator.set_state(state)


# ------------------------------------------------------------------------------------------------------------
# The loop


@contextlib.contextmanager
def interrupts():
    """Within it, Ctrl-C and SIGTERM break nothing off: they are put into the list that it gives."""
    came: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda number, _: came.append(number)) for number in signals]
    try:
        yield came
    finally:
        for number, handler in zip(signals, previous):
            signal.signal(number, handler)


class Line:
    """A line on a terminal that is rewritten as work goes on; elsewhere, only lines that are to stay."""

    def __init__(self, stream):
        self.stream, self.live = stream, stream.isatty()

    def show(self, text: str, stay: bool = True):
        if self.live:
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be rewritten
            print(f"\r{text}\x1b[K", end="", file=self.stream, flush=True)
        elif stay:
            print(text, file=self.stream, flush=True)

    def clear(self):
        self.show("", stay=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.live:
            print(file=self.stream)  # so that what comes next, an error perhaps, has a line of its own


def progress_text(runs: list[Run], first_step: int, seconds: float, loss: float) -> str:
    """Where training is, its rate since `first_step` and the time left."""
    run, seeds = runs[0], f"{len(runs)} seeds  " if len(runs) > 1 else ""
    rate = (run.step - first_step) / seconds
    left = (run.options.steps - run.step) / rate
    left = f"{left / 60:.0f} min" if left >= 100 else f"{left:.0f} s"
    held_out = f"{sum(r.log[-1][2] for r in runs) / len(runs):.2e}" if run.log else "none yet"
    text = f"{seeds}step {run.step:,}/{run.options.steps:,}  loss {loss:.2e}  held-out MSE {held_out}  "
    return f"{text}{rate:.1f} steps/s  {left} left"


def train(runs: list[Run]) -> bool:
    """Train runs that are at the same step, as one, until `options.steps`.

    False if they were stopped by Ctrl-C, and saved. Raises FloatingPointError, and saves nothing more, as
    soon as a loss is not finite; OSError where a file cannot be written.
    """
    options, trainer = runs[0].options, Trainer(runs)
    is_row = lambda step: step == options.steps or step % options.eval_every == 0
    if torch.device(options.device).type == "cuda" and not options.no_graphs:
        trainer.capture()
    d_vocab = trainer.model.config.d_vocab
    held_out = data.held_out(HELD_OUT_PER_LENGTH, device=options.device, d_vocab=d_vocab, task=options.task)
    losses = torch.empty(CHUNK, len(runs), device=options.device)
    step, clock = runs[0].step, time.perf_counter()
    saved, cost, end = clock, 0.0, False
    if step == 0 and not options.no_steps:
        for run in runs:
            run.save_step()

    first_step, start = step, clock
    with interrupts() as came, Line(sys.stdout) as line:
        while step < options.steps and not end:
            room = next(i for i in range(1, CHUNK + 1) if i == CHUNK or is_row(step + i) or is_kept(step + i))
            for done in range(1, room + 1):
                losses[done - 1] = trainer.train_step()
                if came:
                    break
            values = losses[:done].tolist()
            for i, row in enumerate(values):
                for run, value in zip(runs, row):
                    run.check(value, f"the loss at step {step + i + 1:,}")
                    run.loss_sum += value
            step += done

            end = step == options.steps or bool(came)
            keep = is_kept(step) and not options.no_steps
            # Many seeds on a slow disk take long to save: never more than a twentieth of the time.
            save = end or time.perf_counter() - saved >= max(SAVE_SECONDS, 20 * cost)
            if is_row(step) or keep or save:
                trainer.write_back()
            evaluations = []
            for run in runs if is_row(step) else ():
                evaluations.append(data.evaluate(run.model, held_out, trainer.task.first))
                run.check(evaluations[-1], f"the held-out MSE after step {step:,}")
            now = time.perf_counter()
            for i, run in enumerate(runs):
                run.step, run.loss_count, run.seconds = step, run.loss_count + done, run.seconds + now - clock
                if evaluations:
                    run.log.append([step, run.loss_sum / run.loss_count, evaluations[i], run.seconds])
                    run.loss_sum, run.loss_count = 0.0, 0
                if keep:
                    run.save_step()
                if save:
                    run.save()
            clock = now
            if save:
                saved = time.perf_counter()
                cost = saved - now
            loss = sum(map(sum, values)) / (done * len(runs))
            line.show(progress_text(runs, first_step, now - start, loss), stay=is_row(step))
    return not came


def has_begun(settings: dict) -> bool:
    return os.path.exists(os.path.join(settings.get("out", Options.out), "checkpoint.pt"))


def train_all(settings: list[dict], resume: bool) -> bool:
    """Train runs that differ in their seeds, one after the other on a CPU, all as one on a GPU. False if they
    were stopped. Resuming several starts those that had not begun yet. Raises what `open_run` and `train`
    raise."""
    old = [s for s in settings if resume and has_begun(s)]
    new = [s for s in settings if s not in old]
    for s in new:
        refuse_existing(s.get("out", Options.out))  # before any of them writes something
    runs = [open_run(s, resume=True) for s in old]
    for run in runs:
        if run.settings | {"seed": 0} != runs[0].settings | {"seed": 0}:
            raise ValueError(f"{run.options.out} was not trained with the settings of {runs[0].options.out}")
    runs += [open_run(s, resume=False) for s in new]
    for run in runs:
        if run.step:
            print(f"resuming {run.options.out} at step {run.step:,}", flush=True)
    groups = [[run] for run in runs]
    if runs and runs[0].sequences.device.type == "cuda":
        # As one; but a kill in the middle of saving may have left some ahead of the others.
        groups = [[run for run in runs if run.step == step] for step in sorted({run.step for run in runs})]
    for group in groups:
        if not train(group):
            return False
        for run in group:
            last = f", held-out MSE {run.log[-1][2]:.2e}" if run.log else ""
            print(f"{run.options.out}: {run.step:,} steps in {run.seconds / 60:.1f} min{last}", flush=True)
    return True


# ------------------------------------------------------------------------------------------------------------
# Where the time goes


def benchmark(settings: dict, steps: int) -> str:
    """Where the time of a step goes: a table of medians over rounds of one step of each length.

    The floor, measured in the same rounds, is the products with the weight matrices, forward and backward,
    and one pass of AdamW over memory: parameters, gradients and two moments read, all but the gradients
    written.
    """
    run = Run(settings)
    trainer, options, config = Trainer([run]), run.options, run.model.config
    cuda, lengths = run.sequences.device.type == "cuda", run.task.lengths
    h, d, m, v = config.n_heads * config.d_head, config.d_model, config.d_mlp, config.d_vocab
    layers = [(v, d)] + config.n_layers * (3 * [(d, h)] + [(h, d), (d, m), (m, d)]) + [(d, v)]
    # AdamW moves 16 + 12 bytes a parameter, a copy 8 bytes a number.
    source = torch.randn(sum(p.numel() for p in run.parameters) * 28 // 8, device=options.device)
    target = torch.empty_like(source)

    def products(length: int) -> Callable:
        random = lambda *shape: torch.randn(shape, device=options.device, dtype=getattr(torch, options.dtype))
        rows = options.batch_size * length
        factors = [(random(rows, i), random(rows, o), random(i, o)) for i, o in layers]

        def multiply():
            for n, (x, y, W) in enumerate(factors):
                x @ W
                x.T @ y
                if n:  # nobody needs the gradient of the data
                    y @ W.T

        if not cuda:
            return multiply
        multiply()  # sets the library up; then it is captured too, or launching kernels would be timed
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            multiply()
        return graph.replay

    bare = {length: products(length) for length in lengths}
    if cuda and not options.no_graphs:
        trainer.capture()
    kept: list[torch.Tensor] = []
    parts: dict[str, Callable] = {
        "sampling": lambda length: kept.append(trainer.sample(length)),
        "forward": lambda _: kept.append(trainer.loss(kept[-1])),
        "backward": lambda _: trainer.backward(kept.pop()),
        "AdamW": lambda _: trainer.optimizer.step(),
        "products": lambda length: bare[length](),
        "memory": lambda _: target.copy_(source),
    }
    if trainer.graphs:
        parts["captured step"] = lambda length: trainer.graphs[length].replay()
    rounds: list[dict[str, float]] = []
    for _ in range(3 + max(3, steps // len(lengths))):
        spent = dict.fromkeys(parts, 0.0)
        for length in lengths:
            for name, part in parts.items():
                start = time.perf_counter()
                part(length)
                if cuda:
                    torch.cuda.synchronize()
                spent[name] += 1e3 * (time.perf_counter() - start) / len(lengths)
            kept.clear()
        rounds.append(spent | {"step": sum(spent[name] for name in list(parts)[:4])})
    times = {name: torch.tensor([spent[name] for spent in rounds[3:]]) for name in rounds[0]}  # 3 warm up

    rows = [f"{'ms per step':14}{'median':>9}{'5%':>9}{'95%':>9}"]
    for name, values in times.items():
        rows.append(f"{name:14}" + "".join(f"{values.quantile(q).item():9.3f}" for q in (0.5, 0.05, 0.95)))
    best = times["captured step" if trainer.graphs else "step"].median().item()
    floor = (times["products"].median() + times["memory"].median()).item()
    rate = f"{1e3 / best:.1f} steps per second"
    rows.append(f"{rate}; floor {floor:.3f} ms (products + memory), ratio {best / floor:.2f}")
    return "\n".join(rows)


# ------------------------------------------------------------------------------------------------------------
# The command line


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser with errors of one line, exit status 2, that returns only what was given."""

    def __init__(self, doc: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=raw, allow_abbrev=False,
                         argument_default=argparse.SUPPRESS)

    def error(self, message: str):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def seed_list(text: str) -> list[int]:
    """An argparse type for seeds: 0-15, or 3, or 0,2,8-11."""
    parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in text.split(",")]
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) if part else range(0) for part in parts]
    seeds = [seed for each in ranges for seed in each]
    if not all(ranges) or len(set(seeds)) < len(seeds):
        wanted = "must be seeds such as 0-15 or 0,2,8-11, none twice"
        raise argparse.ArgumentTypeError(f"{wanted}, not {text!r}")
    return seeds


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    for group, kind in (("training", Options), ("the model", Config)):
        group = parser.add_argument_group(group)
        for f in fields(kind):
            if f.type is bool:
                group.add_argument(flag(f.name), action="store_true", help=f.metadata["help"])
            else:
                text = f"{f.metadata['help']} (default: {f.default})"
                group.add_argument(flag(f.name), type=f.type, help=text, metavar=f.type.__name__)
    parser.add_argument("--seeds", type=seed_list,
                        help="train several, such as 0-15, each into OUT/seed_NNNN; torchrun shares them out")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the out folder")
    text = f"train nothing: time the parts of a step, over --steps steps if given, else {BENCHMARK_STEPS}"
    parser.add_argument("--benchmark", action="store_true", help=text)
    return parser


def keep_freed_memory():
    """Let glibc keep the memory that a step frees for the next one. It would hand it back to the system and
    get fresh pages, and a page fault for each, hundreds a step. Does nothing where the C library is another
    one."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def main():
    parser = command_line()
    given = vars(parser.parse_args())
    resume, seeds, bench = (given.pop(name, None) for name in ("resume", "seeds", "benchmark"))
    rank, ranks, local_rank = (int(os.environ.get(name, n))
                               for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if bench and (seeds or resume):
        parser.error("--benchmark goes with neither --seeds nor --resume: it trains nothing")
    if ranks > 1 and not seeds:
        parser.error("under torchrun give --seeds: a single run is trained by a single process")
    if ranks > 1 and torch.cuda.is_available() and given.get("device", "cuda") == "cuda":
        given["device"] = f"cuda:{local_rank}"
    try:
        options, _ = from_settings(given)
    except ValueError as error:
        parser.error(str(error))

    runs = [given]
    if seeds:
        runs = [given | {"seed": s, "out": os.path.join(options.out, f"seed_{s:04d}")} for s in seeds]
    if options.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(options.device).index or 0)
    keep_freed_memory()
    # The next two come before the first parallel work, since threads inherit the denormal mode. Weights of
    # units that died decay into denormal numbers, with which some processors are slow.
    torch.set_flush_denormal(True)
    torch.set_num_threads(options.threads)
    try:
        if bench:
            print(benchmark(given, given.get("steps", BENCHMARK_STEPS)))
            return
        begun = [run for run in runs if has_begun(run)]
        if resume and not begun:
            raise FileNotFoundError(f"nothing to resume in {options.out}: leave out --resume to start")
        if resume and seeds:  # those that had not begun are trained as the first that had
            first = load_file(os.path.join(begun[0]["out"], "checkpoint.pt"), "checkpoint")
            runs = [run if run in begun else first.get("settings", {}) | run for run in runs]
        finished = train_all(runs[rank::ranks], bool(resume))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        sys.exit(f"{parser.prog}: error: out of memory; try a smaller --batch-size or fewer --seeds")
    except KeyboardInterrupt:
        sys.exit(130)
    if not finished:
        again = shlex.join(word for word in sys.argv if word != "--resume")
        print(f"stopped and saved; go on with: python {again} --resume")
        sys.exit(130)
    what = "--seeds" if seeds else "--all --run"
    figures = shlex.quote(os.path.join(options.out, "figures"))
    print(f"now: python analyze.py {what} {shlex.quote(options.out)} --out {figures}")


if __name__ == "__main__":
    main()
