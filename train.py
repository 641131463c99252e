"""Train the transformer on affine recurrences (section 3.2 of the paper).

    python train.py                                   # the paper's run: 100,000 steps, into runs/paper
    python train.py --steps 2000 --out runs/short     # a short one
    python train.py --resume                          # go on with a run that was stopped or killed
    python analyze.py --run runs/paper --out figures  # then look at it

The out folder gets log.csv (step, loss: mean since the row before, eval_mse: on the fixed held-out set, seconds),
weights.pt (the state dict) and checkpoint.pt (all that resuming needs), written every --eval-every steps and at the end.
Ctrl-C saves first. A run that was killed and resumed ends, on the same machine, with the same bits as one that was not.
"""

import argparse
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
from model import Config, Transformer, load_file, save_file

FILES = ("checkpoint.pt", "weights.pt", "log.csv")
COLUMNS = ("step", "loss", "eval_mse", "seconds")
HELD_OUT_PER_LENGTH = 128  # 1,536 held-out sequences; measuring on them costs about 3% of the time
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
        raise argparse.ArgumentTypeError(f"{text!r} is not there: torch finds {torch.cuda.device_count()} CUDA devices on this machine; use cpu")
    return text


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
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", device, "cpu, cuda or cuda:N")
    threads: int = option(torch.get_num_threads(), whole_number(1), "CPU threads")
    out: str = option(os.path.join("runs", "paper"), str, "folder for log.csv, weights.pt and checkpoint.pt")

    # A run that is resumed must agree in these, or it would be neither the one run nor the other.
    HYPERPARAMETERS = ("batch_size", "lr", "weight_decay", "seed", "eval_every")

    def hyperparameters(self) -> dict:
        return {name: getattr(self, name) for name in self.HYPERPARAMETERS}

    def command(self) -> str:
        """The command line of this run, without what has its default value."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return " ".join(["python train.py", *(f"{flag(f.name)} {shlex.quote(str(getattr(self, f.name)))}" for f in changed)])


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------------------------------------------------------
# One run


class Run:
    """A training run: model, optimizer and the two random streams, which go on where a checkpoint left them."""

    def __init__(self, options: Options, config: Config = Config()):
        self.options = options
        # Initial weights and sequence lengths are drawn on the CPU: the same weights on every device, and the host
        # knows each length without waiting for the device. The sequences are drawn where they are used.
        self.lengths = torch.Generator().manual_seed(options.seed)
        self.model = Transformer(config, self.lengths).to(options.device)
        data_seed = torch.randint(2**62, (), generator=self.lengths).item()
        self.sequences = torch.Generator(options.device).manual_seed(data_seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
        self.step = 0
        self.loss_sum = 0.0  # since the last row of the log
        self.loss_count = 0
        self.seconds = 0.0  # of training, over all sittings
        self.log: list[list[float]] = []

    def train_step(self) -> torch.Tensor:
        """One step of the paper's training: a batch of one random length, its loss, AdamW. Returns the loss, a scalar on the device."""
        length = torch.randint(data.MIN_LENGTH, data.MAX_LENGTH + 1, (), generator=self.lengths).item()
        a = data.sample(self.options.batch_size, length, self.sequences, self.model.config.d_vocab).a
        loss = data.mse(self.model(a[:, :-1]), a[:, 1:])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> dict:
        return {
            "config": dataclasses.asdict(self.model.config),
            "hyperparameters": self.options.hyperparameters(),
            "device": torch.device(self.options.device).type,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lengths": self.lengths.get_state(),
            "sequences": self.sequences.get_state(),
            **{name: getattr(self, name) for name in ("step", "loss_sum", "loss_count", "seconds", "log")},
        }

    def load_state(self, state: dict, path: str):
        """Go on from a checkpoint. ValueError if it is none or belongs to another run; then this run is as it was."""
        mine = self.state()
        if missing := sorted(mine.keys() - state.keys()):
            raise ValueError(f"{path} is no checkpoint of train.py: it lacks {missing[0]!r}")
        for kind in ("config", "hyperparameters"):
            for name, value in mine[kind].items():
                if state[kind].get(name) != value:
                    raise ValueError(f"{path} belongs to a run with {name} {state[kind].get(name)}, not {value}: give the same value, or another --out folder")
        if state["device"] != mine["device"]:
            raise ValueError(f"{path} was written on {state['device']}: resume with --device {state['device']}, whose random streams differ from those of {mine['device']}")
        if state["step"] > self.options.steps:
            raise ValueError(f"{path} is already at step {state['step']:,}, beyond --steps {self.options.steps:,}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lengths.set_state(state["lengths"])
        self.sequences.set_state(state["sequences"])
        for name in ("step", "loss_sum", "loss_count", "seconds", "log"):
            setattr(self, name, state[name])

    def save(self):
        """Write checkpoint.pt, then what follows from it. A kill in between does no harm: resuming starts from the checkpoint."""
        save_file(self.state(), os.path.join(self.options.out, "checkpoint.pt"))
        self.save_results()

    def save_results(self):
        save_file({name: value.cpu() for name, value in self.model.state_dict().items()}, os.path.join(self.options.out, "weights.pt"))
        path = os.path.join(self.options.out, "log.csv")
        with open(path + ".tmp", "w") as f:
            f.write(",".join(COLUMNS) + "\n")
            f.writelines(f"{step},{loss:.8g},{eval_mse:.8g},{seconds:.1f}\n" for step, loss, eval_mse, seconds in self.log)
        os.replace(path + ".tmp", path)


def open_run(options: Options, resume: bool, config: Config = Config()) -> Run:
    """A new run in an empty folder, or the one that `options.out` holds.

    Raises ValueError for a new run where there is one already, and for a checkpoint that is damaged or belongs to other
    hyperparameters; FileNotFoundError where there is nothing to resume; OSError for a folder that cannot be written.
    """
    there = [name for name in FILES if os.path.exists(os.path.join(options.out, name))]
    if resume:
        path = os.path.join(options.out, "checkpoint.pt")
        if not there:
            raise FileNotFoundError(f"nothing to resume in {options.out}: leave out --resume to start a run there")
        state = load_file(path, "checkpoint")
        run = Run(options, config)
        run.load_state(state, path)
        run.save_results()
    else:
        if there:
            raise ValueError(f"{options.out} already holds a run ({', '.join(there)}): go on with --resume, or choose another folder with --out")
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

    def __init__(self, run: Run):
        self.first_step, self.start, self.live = run.step, time.perf_counter(), sys.stdout.isatty()

    def show(self, run: Run, loss: float, new_row: bool):
        if not (self.live or new_row):
            return
        rate = (run.step - self.first_step) / (time.perf_counter() - self.start)
        left = (run.options.steps - run.step) / rate
        left = f"{left / 60:.0f} min" if left >= 100 else f"{left:.0f} s"
        held_out = f"{run.log[-1][2]:.2e}" if run.log else "none yet"
        line = f"step {run.step:,}/{run.options.steps:,}  loss {loss:.2e}  held-out MSE {held_out}  {rate:.1f} steps/s  {left} left"
        print(f"\r{line}\x1b[K" if self.live else line, end="" if self.live else "\n", flush=True)

    def finish(self):
        if self.live:
            print()


def train(run: Run) -> bool:
    """Train until `options.steps`, saving every `eval_every` steps. False if it was stopped early (and saved) by Ctrl-C.

    Raises FloatingPointError, and saves nothing more, as soon as a loss is not finite.
    """
    options = run.options
    held_out = data.held_out(HELD_OUT_PER_LENGTH, device=options.device)
    losses = torch.empty(CHUNK, device=options.device)
    progress = Progress(run)
    clock = time.perf_counter()
    with StopRequest() as stop:
        while run.step < options.steps and not stop.requested:
            room = min(CHUNK, options.eval_every - run.step % options.eval_every, options.steps - run.step)
            done = 0
            while done < room and not stop.requested:
                losses[done] = run.train_step()
                done += 1
            values = losses[:done].tolist()
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss at step {run.step + i + 1:,} is {value}: the last good checkpoint is kept; try a smaller --lr")
                run.loss_sum += value
            run.loss_count += done
            run.step += done

            new_row = run.step == options.steps or run.step % options.eval_every == 0
            if new_row:
                eval_mse = data.evaluate(run.model, held_out)
                if not math.isfinite(eval_mse):
                    raise FloatingPointError(f"the held-out MSE after step {run.step:,} is {eval_mse}: the last good checkpoint is kept; try a smaller --lr")
            now = time.perf_counter()
            run.seconds, clock = run.seconds + now - clock, now
            if new_row:
                run.log.append([run.step, run.loss_sum / run.loss_count, eval_mse, run.seconds])
                run.loss_sum, run.loss_count = 0.0, 0
            if new_row or stop.requested:
                run.save()
            progress.show(run, sum(values) / done, new_row)
    progress.finish()
    return run.step == options.steps


def main():
    parser = CommandLine(__doc__)
    for f in dataclasses.fields(Options):
        parser.add_argument(flag(f.name), type=f.metadata["type"], default=f.default, help=f"{f.metadata['help']} (default: {f.default})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the out folder")
    arguments = vars(parser.parse_args())
    resume = arguments.pop("resume")
    options = Options(**arguments)

    # Both come before the first parallel work, since threads inherit the denormal mode. Weights of units that
    # died decay into denormal numbers, with which some processors are slow.
    torch.set_flush_denormal(True)
    torch.set_num_threads(options.threads)
    try:
        run = open_run(options, resume)
        if run.step:
            print(f"resuming {options.out} at step {run.step:,}")
        finished = train(run)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if not finished:
        print(f"stopped and saved at step {run.step:,}; go on with: {options.command()} --resume")
        sys.exit(130)
    print(f"{run.step:,} steps in {run.seconds / 60:.1f} min, held-out MSE {run.log[-1][2]:.2e}; now: python analyze.py --run {shlex.quote(options.out)} --out {shlex.quote(os.path.join(options.out, 'figures'))}")


if __name__ == "__main__":
    main()
