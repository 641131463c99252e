"""Train the transformer on affine recurrences (section 3.2 of the paper).

    python train.py                                   # the paper's run: 100,000 steps, into runs/paper
    python train.py --steps 2000 --out runs/short     # a short one
    python train.py --resume                          # go on with a run that was stopped or killed
    python train.py --seeds 0-15 --out runs/seeds     # sixteen runs, into runs/seeds/seed_0000 and so on
    torchrun --nproc_per_node=4 train.py --seeds 0-63 --out runs/seeds    # the same, divided over four GPUs
    python train.py --benchmark                       # where the time of a step goes
    python analyze.py --all --run runs/paper --out runs/paper/figures     # then look at it, or at all seeds:
    python analyze.py --seeds runs/seeds --out runs/seeds/figures

The out folder gets log.csv (step, loss: mean since the row before, eval_mse: on the fixed held-out set, seconds),
snapshots.csv (what `analyze.snapshot` measures, every --snapshot-every steps from step 0 on, a column for each head, such
as prev_token_l0h3), weights.pt (the state dict) and checkpoint.pt (all that resuming needs), written every --eval-every
steps and at the end.
Ctrl-C saves first. A run that was killed and resumed ends, on the same machine, with the same bits as one that was not.
"""

import argparse
import ctypes
import dataclasses
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field

import torch

import data
from model import Config, Transformer, load_file, replacing, save_file

FILES = ("checkpoint.pt", "weights.pt", "log.csv", "snapshots.csv")
COLUMNS = ("step", "loss", "eval_mse", "seconds")
HELD_OUT_PER_LENGTH = 128  # 1,536 held-out sequences; measuring on them costs about 3% of the time
BENCHMARK_STEPS = 240
CHUNK = 100  # steps between two looks at the losses, the only moments at which the host waits for the device


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with exit status 2."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def whole_number(minimum: int):
    """An argparse type for whole numbers from `minimum` up."""

    def parse(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, not {text!r}")
        return int(text)

    return parse


def real_number(zero: bool):
    """An argparse type for finite positive numbers, and 0 where `zero` allows it."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > 0 or zero and value == 0)):
            raise argparse.ArgumentTypeError(f"must be a finite number {'of at least' if zero else 'above'} 0, not {text!r}")
        return value

    return parse


def device(text: str) -> str:
    """An argparse type for a device that this machine has."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, not {text!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not there: torch finds {torch.cuda.device_count()} CUDA devices on this machine; use cpu"
        )
    return text


def dtype(text: str) -> str:
    """An argparse type for the number formats that training knows."""
    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"must be float32 or bfloat16, not {text!r}")
    return text


def seed_list(text: str) -> list[int]:
    """An argparse type for seeds: 0-15, or 3, or 0,2,8-11."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise argparse.ArgumentTypeError(f"must be seeds such as 0-15 or 0,2,8-11, not {text!r}")
        seeds += range(int(first), int(last) + 1)
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"names a seed twice: {text!r}")
    return seeds


def option(default, type, help: str):
    return field(default=default, metadata={"type": type, "help": help})


@dataclass(frozen=True)
class Options:
    """The settings of a run. Each is declared here once; the command line is made from this table."""

    steps: int = option(100_000, whole_number(1), "optimizer steps; a longer run may go on from a shorter one")
    batch_size: int = option(16, whole_number(1), "sequences a step")
    lr: float = option(1e-4, real_number(zero=False), "learning rate of AdamW, constant")
    weight_decay: float = option(0.01, real_number(zero=True), "weight decay of AdamW, on every parameter")
    seed: int = option(0, whole_number(0), "decides the initial weights and the training data")
    eval_every: int = option(1000, whole_number(1), "steps between two rows of log.csv, each with a checkpoint")
    snapshot_every: int = option(500, whole_number(0), "steps between two rows of snapshots.csv; 0 for none")
    dtype: str = option("float32", dtype, "of the matrix products: float32 or bfloat16; weights and optimizer stay float32")
    tf32: bool = option(False, bool, "let CUDA round the factors of float32 products to TF32")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", device, "cpu, cuda or cuda:N")
    threads: int = option(torch.get_num_threads(), whole_number(1), "CPU threads")
    out: str = option(os.path.join("runs", "paper"), str, "folder of the run")

    # A run that is resumed must agree in these, or it would be neither the one run nor the other.
    HYPERPARAMETERS = ("batch_size", "lr", "weight_decay", "seed", "eval_every", "snapshot_every", "dtype", "tf32")

    def hyperparameters(self) -> dict:
        return {name: getattr(self, name) for name in self.HYPERPARAMETERS}

    def command(self) -> str:
        """The command line of this run, without what has its default value."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return " ".join(
            [
                "python train.py",
                *(flag(f.name) + (f" {shlex.quote(str(getattr(self, f.name)))}" if f.type is not bool else "") for f in changed),
            ]
        )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------------------------------------------------------
# One run, or several in one


class Trainer:
    """A step of training, for one run or a stack of them. What differs is how sequences are drawn and the loss is computed.

    A subclass has `options`, `lengths` (a CPU generator), `generators` (of the sequences), `parameters` and `optimizer`.
    """

    captured = None  # the step as CUDA graphs, see CapturedSteps

    def sample(self, length: int) -> torch.Tensor:
        """A batch of sequences, [..., batch, length + 1, d_vocab]."""
        raise NotImplementedError

    def loss(self, a: torch.Tensor) -> torch.Tensor:
        """The loss of each run, [] or [runs]."""
        raise NotImplementedError

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
        """One step of the paper's training, on a batch of one random length. Returns the loss, [] or [runs], on the device."""
        # Drawn on the CPU, so that the host knows the length without waiting for the device.
        length = torch.randint(data.MIN_LENGTH, data.MAX_LENGTH + 1, (), generator=self.lengths).item()
        return self.captured.replay(length) if self.captured else self.compute(length)

    def write_back(self):
        """Bring the runs up to date with the steps taken."""


def autocast(options: Options):
    """Matrix products in bfloat16 where the options say so."""
    return torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.dtype == "bfloat16")


def adamw(parameters: list[torch.Tensor], options: Options) -> torch.optim.AdamW:
    """The paper's optimizer. Its moments exist from the start, so that a step can be captured and a checkpoint is always complete."""
    cuda = torch.device(options.device).type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True, capturable=cuda)
    for p in parameters:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


class Run(Trainer):
    """A training run: model, optimizer and the two random streams, which go on where a checkpoint left them."""

    PROGRESS = ("step", "loss_sum", "loss_count", "seconds", "log", "snapshots")

    def __init__(self, options: Options, config: Config = Config()):
        self.options = options
        # Initial weights are drawn on the CPU as well: the same on every device.
        self.lengths = torch.Generator().manual_seed(options.seed)
        self.model = Transformer(config, self.lengths).to(options.device)
        data_seed = torch.randint(2**62, (), generator=self.lengths).item()
        self.sequences = torch.Generator(options.device).manual_seed(data_seed)
        self.generators = [self.sequences]
        self.parameters = list(self.model.parameters())
        self.optimizer = adamw(self.parameters, options)
        self.step = 0
        self.loss_sum = 0.0  # since the last row of the log
        self.loss_count = 0
        self.seconds = 0.0  # of training, over all sittings
        self.log: list[list[float]] = []
        self.snapshots: list[dict[str, float]] = []

    def sample(self, length: int) -> torch.Tensor:
        return data.sample(self.options.batch_size, length, self.sequences, self.model.config.d_vocab).a

    def loss(self, a: torch.Tensor) -> torch.Tensor:
        with autocast(self.options):
            prediction = self.model(a[:, :-1])
        return data.mse(prediction.float(), a[:, 1:])

    def state(self) -> dict:
        return {
            "config": dataclasses.asdict(self.model.config),
            "hyperparameters": self.options.hyperparameters(),
            "device": torch.device(self.options.device).type,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lengths": self.lengths.get_state(),
            "sequences": self.sequences.get_state(),
            **{name: getattr(self, name) for name in self.PROGRESS},
        }

    def load_state(self, state: dict, path: str):
        """Go on from a checkpoint. ValueError if it is none or belongs to another run; then this run is as it was."""
        mine = self.state()
        if missing := sorted(mine.keys() - state.keys()):
            raise ValueError(f"{path} is no checkpoint of train.py: it lacks {missing[0]!r}")
        for kind in ("config", "hyperparameters"):
            for name, value in mine[kind].items():
                if state[kind].get(name) != value:
                    raise ValueError(
                        f"{path} belongs to a run with {name} {state[kind].get(name)}, not {value}: "
                        "give the same value, or another --out folder"
                    )
        if state["device"] != mine["device"]:
            raise ValueError(
                f"{path} was written on {state['device']}, whose random streams differ from those of {mine['device']}: "
                f"resume with --device {state['device']}"
            )
        if state["step"] > self.options.steps:
            raise ValueError(f"{path} is already at step {state['step']:,}, beyond --steps {self.options.steps:,}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lengths.set_state(state["lengths"])
        self.sequences.set_state(state["sequences"])
        for name in self.PROGRESS:
            setattr(self, name, state[name])

    def save(self):
        """Write checkpoint.pt, then what follows from it. A kill in between does no harm: resuming starts from the checkpoint."""
        save_file(self.state(), os.path.join(self.options.out, "checkpoint.pt"))
        self.save_results()

    def save_results(self):
        save_file({name: value.cpu() for name, value in self.model.state_dict().items()}, os.path.join(self.options.out, "weights.pt"))
        rows = [f"{step},{loss:.8g},{eval_mse:.8g},{seconds:.1f}" for step, loss, eval_mse, seconds in self.log]
        self.save_table("log.csv", [",".join(COLUMNS), *rows])
        if self.snapshots:
            rows = [",".join(f"{value:.8g}" for value in row.values()) for row in self.snapshots]
            self.save_table("snapshots.csv", [",".join(self.snapshots[0]), *rows])

    def save_table(self, name: str, lines: list[str]):
        with replacing(os.path.join(self.options.out, name)) as f:
            f.write("\n".join([*lines, ""]).encode())

    @torch.no_grad()
    def take_snapshot(self, sequences: data.Sample):
        """Add a row of what the model does to `sequences` to the snapshots. FloatingPointError if its output is not finite."""
        from analyze import snapshot  # not at the top: analyze.py imports the command line of this file

        try:
            measures = snapshot(self.model, sequences)
        except FloatingPointError as error:
            raise self.diverged(f"after step {self.step:,} {error}") from error
        row = {"step": self.step}
        for name, value in measures.items():
            if value.dim():
                row |= {f"{name}_l{l}h{h}": v for l, heads in enumerate(value.tolist()) for h, v in enumerate(heads)}
            else:
                row[name] = value.item()
        self.snapshots.append(row)

    def diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(f"{what} (seed {self.options.seed}): the last good checkpoint is kept; try a smaller --lr")


class Stack(Trainer):
    """Several runs at the same step, trained as one model whose parameters have one more dimension in front, [runs, ...].

    On a GPU, where a single run is too small to keep the chip busy, this costs little more than one. The runs draw their
    own sequences but share the lengths, those of the first run; everything else is as in a run of its own.
    """

    def __init__(self, runs: list[Run]):
        self.runs, self.options = runs, runs[0].options
        self.lengths = runs[0].lengths
        self.generators = [run.sequences for run in runs]
        self.named, _ = torch.func.stack_module_state([run.model for run in runs])
        self.parameters = list(self.named.values())
        self.optimizer = adamw(self.parameters, self.options)
        for stacked, *single in zip(self.parameters, *(run.parameters for run in runs)):
            self.optimizer.state[stacked]["step"].copy_(runs[0].optimizer.state[single[0]]["step"])
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[stacked][moment].copy_(torch.stack([run.optimizer.state[p][moment] for run, p in zip(runs, single)]))

    def sample(self, length: int) -> torch.Tensor:
        return torch.stack([run.sample(length) for run in self.runs])

    def loss(self, a: torch.Tensor) -> torch.Tensor:
        def one(parameters: dict[str, torch.Tensor], a: torch.Tensor) -> torch.Tensor:
            with autocast(self.options):
                prediction = torch.func.functional_call(self.runs[0].model, parameters, (a[:, :-1],))
            return data.mse(prediction.float(), a[:, 1:])

        return torch.vmap(one)(self.named, a)

    @torch.no_grad()
    def write_back(self):
        for i, run in enumerate(self.runs):
            for stacked, single in zip(self.parameters, run.parameters):
                single.copy_(stacked[i])
                state = self.optimizer.state[stacked]
                run.optimizer.state[single]["step"].copy_(state["step"])
                for moment in ("exp_avg", "exp_avg_sq"):
                    run.optimizer.state[single][moment].copy_(state[moment][i])
            run.lengths.set_state(self.lengths.get_state())


class CapturedSteps:
    """The step of a trainer as CUDA graphs, one for each length: replaying one costs a launch instead of several hundred.

    They share one memory pool, since only one runs at a time and none needs what another left behind.
    """

    def __init__(self, trainer: Trainer):
        # Libraries set themselves up in steps that really run; what those change is put back before capturing.
        tensors = [*trainer.parameters, *(value for state in trainer.optimizer.state.values() for value in state.values())]
        saved = [tensor.detach().clone() for tensor in tensors]
        states = [generator.get_state() for generator in trainer.generators]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for length in data.LENGTHS:
                loss = trainer.compute(length)
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            for tensor, value in zip(tensors, saved):
                tensor.copy_(value)
        for generator, state in zip(trainer.generators, states):
            generator.set_state(state)

        self.loss, self.graphs, pool = torch.zeros_like(loss), {}, torch.cuda.graph_pool_handle()
        for length in reversed(data.LENGTHS):  # the largest first: the others fit into its memory
            graph = torch.cuda.CUDAGraph()
            for generator in trainer.generators:
                graph.register_generator_state(generator)
            trainer.optimizer.zero_grad()
            with torch.cuda.graph(graph, pool=pool):
                self.loss.copy_(trainer.compute(length))
            self.graphs[length] = graph

    def replay(self, length: int) -> torch.Tensor:
        self.graphs[length].replay()
        return self.loss


def refuse_existing(out: str):
    """ValueError if the folder `out` holds a run."""
    if there := [name for name in FILES if os.path.exists(os.path.join(out, name))]:
        raise ValueError(f"{out} already holds a run ({', '.join(there)}): go on with --resume, or choose another folder with --out")


def open_run(options: Options, resume: bool, config: Config = Config()) -> Run:
    """A new run in an empty folder, or the one that `options.out` holds.

    Raises ValueError for a new run where there is one already, and for a checkpoint that is damaged or belongs to other
    hyperparameters; FileNotFoundError where there is nothing to resume; OSError for a folder that cannot be written.
    """
    if resume:
        path = os.path.join(options.out, "checkpoint.pt")
        if not os.path.exists(path):
            raise FileNotFoundError(f"nothing to resume in {options.out}: it holds no checkpoint.pt; leave out --resume to start a run")
        state = load_file(path, "checkpoint")
        run = Run(options, config)
        run.load_state(state, path)
        run.save_results()
    else:
        refuse_existing(options.out)
        run = Run(options, config)
        os.makedirs(options.out, exist_ok=True)
        run.save()  # so that a run can be resumed whenever it is killed, and a folder that cannot be written is known now
    return run


class StopRequest:
    """Within `with StopRequest() as stop`, Ctrl-C and SIGTERM set `stop.requested` instead of breaking off a step half-way."""

    def __enter__(self):
        self.requested = False
        self.previous = {s: signal.signal(s, self.request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def request(self, *_):
        self.requested = True

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Progress:
    """One line on a terminal that is rewritten as training goes on; elsewhere, one line for each row of the log."""

    def __init__(self, runs: list[Run]):
        self.runs, self.first_step, self.start, self.live = runs, runs[0].step, time.perf_counter(), sys.stdout.isatty()
        self.what = f"{len(runs)} seeds  " if len(runs) > 1 else ""

    def show(self, loss: float, new_row: bool):
        run = self.runs[0]
        if not (self.live or new_row):
            return
        rate = (run.step - self.first_step) / (time.perf_counter() - self.start)
        left = (run.options.steps - run.step) / rate
        left = f"{left / 60:.0f} min" if left >= 100 else f"{left:.0f} s"
        held_out = f"{sum(r.log[-1][2] for r in self.runs) / len(self.runs):.2e}" if run.log else "none yet"
        line = (
            f"{self.what}step {run.step:,}/{run.options.steps:,}  loss {loss:.2e}  held-out MSE {held_out}  {rate:.1f} steps/s  {left} left"
        )
        print(f"\r{line}\x1b[K" if self.live else line, end="" if self.live else "\n", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.live:
            print()  # so that what comes next, an error perhaps, has a line of its own


def train(runs: list[Run]) -> bool:
    """Train runs that are at the same step, as one, until `options.steps`, saving every `eval_every` steps.

    False if they were stopped early (and saved) by Ctrl-C. Raises FloatingPointError, and saves nothing more, as soon as
    a loss is not finite.
    """
    options = runs[0].options
    trainer = Stack(runs) if len(runs) > 1 else runs[0]
    if torch.device(options.device).type == "cuda":
        trainer.captured = CapturedSteps(trainer)
    held_out = data.held_out(HELD_OUT_PER_LENGTH, device=options.device)
    losses = torch.empty(CHUNK, len(runs), device=options.device)
    step, clock = runs[0].step, time.perf_counter()
    intervals = [every for every in (options.eval_every, options.snapshot_every) if every]
    for run in runs:
        if options.snapshot_every and not run.snapshots:  # before the first step
            run.take_snapshot(held_out[-1])

    def check(run: Run, value: float, what: str):
        if not math.isfinite(value):
            raise run.diverged(f"{what} is {value}")

    with StopRequest() as stop, Progress(runs) as progress:
        while step < options.steps and not stop.requested:
            room = min(CHUNK, options.steps - step, *(every - step % every for every in intervals))
            done = 0
            while done < room and not stop.requested:
                losses[done] = trainer.train_step()
                done += 1
            values = losses[:done].tolist()
            for i, row in enumerate(values):
                for run, value in zip(runs, row):
                    check(run, value, f"the loss at step {step + i + 1:,}")
                    run.loss_sum += value
            step += done

            new_row = step == options.steps or step % options.eval_every == 0
            new_snapshot = options.snapshot_every and step % options.snapshot_every == 0
            if new_row or new_snapshot or stop.requested:
                trainer.write_back()
            evaluations = [data.evaluate(run.model, held_out) if new_row else 0.0 for run in runs]
            now = time.perf_counter()
            for run, eval_mse in zip(runs, evaluations):
                check(run, eval_mse, f"the held-out MSE after step {step:,}")
                run.step, run.loss_count, run.seconds = step, run.loss_count + done, run.seconds + now - clock
                if new_row:
                    run.log.append([step, run.loss_sum / run.loss_count, eval_mse, run.seconds])
                    run.loss_sum, run.loss_count = 0.0, 0
                if new_snapshot:
                    run.take_snapshot(held_out[-1])
                if new_row or stop.requested:
                    run.save()
            clock = now
            progress.show(sum(map(sum, values)) / (done * len(runs)), new_row)
    return step == options.steps


def benchmark(options: Options, steps: int, config: Config = Config()) -> str:
    """Where the time of a step goes: a table with the median and spread over rounds of one step of each length.

    The floor, measured in the same rounds, is the bare matrix products of a step, forward and backward, and one pass of
    AdamW over memory: parameters, gradients and two moments read, all but the gradients written.
    """
    run, cuda = Run(options, config), torch.device(options.device).type == "cuda"
    h, d, m, v = config.n_heads * config.d_head, config.d_model, config.d_mlp, config.d_vocab
    layers = [(v, d)] + config.n_layers * (3 * [(d, h)] + [(h, d), (d, m), (m, d)]) + [(d, v)]
    floor_dtype = getattr(torch, options.dtype)
    weights = [torch.randn(i, o, device=options.device, dtype=floor_dtype) for i, o in layers]
    size = sum(p.numel() for p in run.parameters)
    source = torch.randn(4 * size, device=options.device)
    target = torch.empty_like(source)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    def products(length: int):
        for n, (x, y, W) in enumerate(zip(inputs[length], outputs[length], weights)):
            x @ W
            x.T @ y
            if n:  # nobody needs the gradient of the data
                y @ W.T

    inputs = {
        n: [torch.randn(options.batch_size * n, i, device=options.device, dtype=floor_dtype) for i, _ in layers] for n in data.LENGTHS
    }
    outputs = {
        n: [torch.randn(options.batch_size * n, o, device=options.device, dtype=floor_dtype) for _, o in layers] for n in data.LENGTHS
    }
    names = ["sampling", "forward", "backward", "AdamW"]
    rounds: dict[str, list[float]] = {name: [] for name in [*names, "step", "products", "memory", "captured step"]}
    bare = dict.fromkeys(data.LENGTHS, None)
    if cuda:  # the floor is captured as well, or it would be the time of launching kernels
        captured = CapturedSteps(run)
        for length in data.LENGTHS:
            products(length)  # sets the library up
            bare[length] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(bare[length]):
                products(length)
    warm_up = 3
    for i in range(warm_up + max(3, steps // len(data.LENGTHS))):
        spent = dict.fromkeys(rounds, 0.0)
        for length in data.LENGTHS:
            times = [clock()]
            a = run.sample(length)
            times.append(clock())
            loss = run.loss(a)
            times.append(clock())
            run.backward(loss)
            times.append(clock())
            run.optimizer.step()
            times.append(clock())
            for name, start, end in zip(names, times, times[1:]):
                spent[name] += end - start
            spent["step"] += times[-1] - times[0]
            start = clock()
            bare[length].replay() if cuda else products(length)
            spent["products"] += clock() - start
            start = clock()
            target.copy_(source)
            # a copy moves 8 bytes a number; AdamW reads 16 and writes 12 for each parameter, of which there are a quarter
            spent["memory"] += (clock() - start) * 28 / 32
        if cuda:
            start = clock()
            for length in data.LENGTHS:
                captured.replay(length)
            spent["captured step"] += clock() - start
        if i >= warm_up:
            for name, value in spent.items():
                rounds[name].append(value / len(data.LENGTHS))

    quantiles = {name: torch.tensor(values).quantile(torch.tensor([0.5, 0.05, 0.95])).tolist() for name, values in rounds.items()}
    step, floor = quantiles["step"][0], quantiles["products"][0] + quantiles["memory"][0]
    rows = [f"{'ms per step':14}{'median':>9}{'5%':>9}{'95%':>9}{'share':>8}"]
    for name, (median, low, high) in quantiles.items():
        if name != "captured step" or cuda:
            share = f"{median / step:8.0%}" if name in names else ""
            rows.append(f"{name:14}{median:9.3f}{low:9.3f}{high:9.3f}{share}")
    best = quantiles["captured step"][0] if cuda else step
    if options.snapshot_every:
        sequences, times = data.held_out(HELD_OUT_PER_LENGTH, device=options.device)[-1], []
        for _ in range(4):
            start = clock()
            run.take_snapshot(sequences)
            times.append(clock() - start)
        each = sorted(times[1:])[1]  # the first loads what it needs
        rows.append(
            f"a snapshot takes {each:.0f} ms; one every {options.snapshot_every} steps adds {each / options.snapshot_every / best:.1%} to the time"
        )
    rows.append(f"{1e3 / best:.1f} steps per second; floor {floor:.3f} ms (products + memory), ratio {best / floor:.2f}")
    return "\n".join(rows)


def train_all(options: list[Options], resume: bool, start_missing: bool) -> bool:
    """Train runs one after the other on a CPU, all as one on a GPU. False if they were stopped.

    With `start_missing`, resuming starts those that had not begun yet. Raises what `open_run` and `train` raise.
    """
    new = [not resume or (start_missing and not os.path.exists(os.path.join(o.out, "checkpoint.pt"))) for o in options]
    for o, is_new in zip(options, new):
        if is_new:
            refuse_existing(o.out)  # before any of them writes something
    runs = [open_run(o, not is_new) for o, is_new in zip(options, new)]
    for run in runs:
        if run.step:
            print(f"resuming {run.options.out} at step {run.step:,}")
    if torch.device(runs[0].options.device).type == "cuda":  # after a kill in the middle of saving some runs may be ahead
        groups = [[run for run in runs if run.step == step] for step in sorted({run.step for run in runs})]
    else:
        groups = [[run] for run in runs]
    for group in groups:
        if not train(group):
            return False
        for run in group:
            print(f"{run.options.out}: {run.step:,} steps in {run.seconds / 60:.1f} min, held-out MSE {run.log[-1][2]:.2e}")
    return True


def keep_freed_memory():
    """Let glibc keep the memory that a step frees for the next one. It would hand it back to the system and get fresh pages,
    and a page fault for each, hundreds a step. Does nothing where the C library is another one."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


def main():
    parser = CommandLine(__doc__)
    for f in dataclasses.fields(Options):
        if f.type is bool:
            parser.add_argument(flag(f.name), action="store_true", help=f.metadata["help"])
        else:
            parser.add_argument(
                flag(f.name), type=f.metadata["type"], default=f.default, help=f"{f.metadata['help']} (default: {f.default})"
            )
    parser.add_argument(
        "--seeds", type=seed_list, help="train several seeds, such as 0-15, each into OUT/seed_NNNN; torchrun divides them over its ranks"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the out folder")
    parser.add_argument(
        "--benchmark",
        action="store_true",
        help=f"train nothing: time the parts of a step, over --steps steps if given, else {BENCHMARK_STEPS}",
    )
    arguments = vars(parser.parse_args())
    resume, seeds, bench = (arguments.pop(name) for name in ("resume", "seeds", "benchmark"))
    options = Options(**arguments)

    rank, ranks, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if ranks > 1 and not seeds:
        parser.error("under torchrun give --seeds: a single run is trained by a single process")
    if options.device.startswith("cuda"):
        if ranks > 1:
            options = dataclasses.replace(options, device=f"cuda:{local_rank}")
        torch.cuda.set_device(torch.device(options.device).index or 0)
    if seeds:
        runs = [dataclasses.replace(options, seed=seed, out=os.path.join(options.out, f"seed_{seed:04d}")) for seed in seeds[rank::ranks]]
    else:
        runs = [options]
    if not runs:
        return  # more ranks than seeds

    keep_freed_memory()
    # Both come before the first parallel work, since threads inherit the denormal mode. Weights of units that
    # died decay into denormal numbers, with which some processors are slow.
    torch.set_flush_denormal(True)
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    try:
        if bench:
            print(benchmark(options, options.steps if options.steps != Options.steps else BENCHMARK_STEPS))
            return
        finished = train_all(runs, resume, start_missing=bool(seeds))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if not finished:
        print(f"stopped and saved; go on with: {options.command()}{' --seeds ' + ','.join(map(str, seeds)) if seeds else ''} --resume")
        sys.exit(130)
    what = "--seeds" if seeds else "--all --run"
    print(f"now: python analyze.py {what} {shlex.quote(options.out)} --out {shlex.quote(os.path.join(options.out, 'figures'))}")


if __name__ == "__main__":
    main()
