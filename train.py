"""Train the transformer on affine recurrences (section 3.2 of the paper).

    python train.py                                   # the paper's run: 100,000 steps, into runs/paper
    python train.py --n-layers 1 --d-mlp 512 --out runs/toy    # every field of model.Config is an option
    python train.py --resume                          # go on with a run that was stopped or killed
    python analyze.py --all --run runs/paper          # then look at it

The run folder gets config.json (all settings), log.csv (step, loss: mean since the row before, eval_mse: on
the fixed held-out set, seconds), weights.pt (the state dict), checkpoint.pt (all that resuming needs) and,
with --keep-steps, steps/00001000.pt and so on. Checkpoints are written with rows of the log: a run that was
killed, or stopped by Ctrl-C, goes on from the last and ends, on the same machine, with the same bits.
"""

import argparse
import contextlib
import copy
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields

import torch

import data
from model import Config, Transformer, check_settings, load_file, save, setting, settings_beside

HELD_OUT_PER_LENGTH, SAVE_SECONDS = 128, 2  # 1,536 held-out sequences; the least time between checkpoints
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)


@dataclass(frozen=True)
class Options:
    """The settings of training, each declared here once; the command line is made from this and Config."""

    task: str = setting("affine", "")  # in config.json, but no option of this command
    steps: int = setting(100_000, "optimizer steps; --resume may ask for more")
    batch_size: int = setting(16, "sequences a step")
    lr: float = setting(1e-4, "learning rate of AdamW, constant")
    weight_decay: float = setting(0.01, "weight decay of AdamW, on every parameter", least=0)
    loss_from: int = setting(data.FIRST_POSITION, "first output position in the loss; 0: all pairs", least=0)
    seed: int = setting(0, "decides the initial weights and the training data", least=0)
    eval_every: int = setting(1000, "steps between two rows of log.csv")
    dtype: str = setting("float32", "of matrix products: float32, bfloat16", choices=("float32", "bfloat16"))
    keep_steps: bool = setting(False, "keep the weights at steps 0, 1, 2, 4, .. 512, 1000, 2000, 5000, ..")
    no_graphs: bool = setting(False, "launch every kernel on CUDA, instead of replaying captured steps")
    device: str = setting(DEVICES[0], "cpu or cuda", choices=("cpu", "cuda"))
    out: str = setting(os.path.join("runs", "paper"), "run folder")
    SITTING = ("keep_steps", "no_graphs", "device", "out")  # may differ between two sittings; steps may grow

    def __post_init__(self):
        check_settings(self)
        first = data.find_task(self.task).first
        if self.loss_from > first:
            raise ValueError(f"loss_from must be 0 to {first}, not {self.loss_from}")
        if self.device not in DEVICES:
            raise ValueError("there is no CUDA device here: use --device cpu")


def from_settings(settings: dict) -> tuple[Options, Config]:
    """Options and Config with the values in `settings`, a flat dict such as config.json holds, and defaults
    for the rest; names that neither has are ignored. ValueError for a value out of its range."""
    options, config = (kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})
                       for kind in (Options, Config))
    if config.n_ctx < data.MAX_LENGTH:
        raise ValueError(f"n_ctx must be at least {data.MAX_LENGTH}, the longest sequence")
    return options, config


class Run:
    """Model, optimizer and the two random streams of a run: takes steps, saves and goes on."""

    def __init__(self, options: Options, config: Config):
        self.options, self.task = options, data.find_task(options.task)
        settings = asdict(config) | asdict(options)
        self.settings = {name: value for name, value in settings.items() if name not in Options.SITTING}
        # Drawn on the CPU, so that weights and lengths are the same on every device.
        self.lengths = torch.Generator().manual_seed(options.seed)
        self.model = Transformer(config, self.lengths).to(options.device)
        data_seed = torch.randint(2**62, (), generator=self.lengths).item()
        self.sequences = torch.Generator(options.device).manual_seed(data_seed)
        self.captures = options.device == "cuda" and not options.no_graphs
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, fused=True,
                                           weight_decay=options.weight_decay, capturable=self.captures)
        for p in self.model.parameters():  # from the start, so that a checkpoint is always complete
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                       "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.done, self.seconds, self.log = 0, 0.0, "step,loss,eval_mse,seconds\n"

    def loss(self, a: torch.Tensor) -> torch.Tensor:
        """The MSE of the predictions from `loss_from` on; a [batch, length + 1, d_vocab]."""
        bfloat16 = self.options.dtype == "bfloat16"
        with torch.autocast(self.options.device, torch.bfloat16, enabled=bfloat16):
            prediction = self.model(a[:, :-1])
        return data.mse(prediction.float(), a[:, 1:], self.options.loss_from)

    def compute(self, length: int) -> torch.Tensor:
        """Sample, loss, gradients and AdamW on sequences of `length` inputs. Returns the loss."""
        size, d_vocab, task = self.options.batch_size, self.model.config.d_vocab, self.options.task
        loss = self.loss(data.sample(size, length, self.sequences, d_vocab, task=task).a)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self) -> torch.Tensor:
        """One step of the paper's training, on a batch of one random length. Returns the loss."""
        lengths = self.task.lengths
        length = torch.randint(lengths.start, lengths.stop, (), generator=self.lengths).item()
        self.done += 1
        if length not in self.graphs:
            return self.compute(length)
        self.graphs[length].replay()
        return self.captured_loss

    def capture(self):
        """Record the step as CUDA graphs, one for each length: replaying one costs a launch instead of
        several hundred. Where that fails, training goes on without."""
        before, stream, graphs = copy.deepcopy(self.state()), torch.cuda.current_stream(), {}
        try:
            with torch.cuda.stream(torch.cuda.Stream()):  # libraries set themselves up in steps that run
                for length in self.task.lengths:
                    self.captured_loss = self.compute(length).clone()
            torch.cuda.synchronize()
            pool = torch.cuda.graph_pool_handle()
            for length in reversed(self.task.lengths):  # the largest first: the others fit into its memory
                graph = graphs[length] = torch.cuda.CUDAGraph()
                if hasattr(graph, "register_generator_state"):  # newer versions do it by themselves
                    graph.register_generator_state(self.sequences)
                self.optimizer.zero_grad()
                with torch.cuda.graph(graph, pool=pool):
                    self.captured_loss.copy_(self.compute(length))
            self.graphs = graphs
        except Exception as error:  # of whatever kind: plain steps need none of this
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize()
            say(f"training without CUDA graphs, which failed: {str(error).splitlines()[0]}")
        self.load(before)

    def state(self) -> dict:
        """All that resuming needs."""
        moments = [self.optimizer.state[p] for p in self.model.parameters()]
        return {"settings": self.settings, "device": self.options.device, "model": self.model.state_dict(),
                "moments": moments, "lengths": self.lengths.get_state(),
                "sequences": self.sequences.get_state(), "done": self.done, "seconds": self.seconds,
                "log": self.log}

    def load(self, state: dict):
        """Go on from a `state`, in the tensors that there are: captured steps know no others."""
        self.model.load_state_dict(state["model"])
        for p, moments in zip(self.model.parameters(), state["moments"], strict=True):
            for name, value in moments.items():
                self.optimizer.state[p][name].copy_(value)
        self.lengths.set_state(state["lengths"])
        self.sequences.set_state(state["sequences"])
        self.done, self.seconds, self.log = state["done"], state["seconds"], state["log"]

    def save(self):
        """Write checkpoint.pt, then what follows from it, which resuming would write again after a kill."""
        save(self.state(), os.path.join(self.options.out, "checkpoint.pt"))
        save(self.settings, os.path.join(self.options.out, "config.json"))
        save(self.log, os.path.join(self.options.out, "log.csv"))
        self.save_weights("weights.pt")

    def save_weights(self, *names: str):
        weights = {name: value.cpu() for name, value in self.model.state_dict().items()}
        save(weights, os.path.join(self.options.out, *names))


def open_run(settings: dict, resume: bool) -> Run:
    """A new run in a folder without one or, to `resume`, the one in the folder settings["out"]. settings:
    values of Options and Config by name, the others being defaults or, resuming, the run's. ValueError for a
    new run where there is one, a damaged checkpoint or a setting, in config.json too, that is not the run's;
    FileNotFoundError where there is nothing to resume; OSError where it cannot write."""
    out = settings.get("out", Options.out)
    path, files = os.path.join(out, "checkpoint.pt"), ("checkpoint.pt", "weights.pt", "log.csv")
    if not resume and any(os.path.exists(os.path.join(out, name)) for name in files):
        raise ValueError(f"{out} already holds a run: --resume it or give another --out")
    state = load_file(path, "checkpoint")[0] if resume else {}
    begun = state.get("settings", {})
    for name, value in [*settings_beside(path).items(), *settings.items()]:
        if name in begun and name != "steps" and value != begun[name]:
            raise ValueError(f"{path} belongs to a run with {name} {begun[name]}, not {value}")
    run = Run(*from_settings(begun | settings))
    if resume:
        try:
            run.load(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no checkpoint of this train.py: {str(error)[:99]!r}") from error
        if state["device"] != run.options.device:  # with other random streams
            raise ValueError(f"{path} was written on {state['device']}: add --device {state['device']}")
        if run.done > run.options.steps:
            raise ValueError(f"{path} is at step {run.done:,}, beyond --steps {run.options.steps:,}")
    os.makedirs(os.path.join(out, "steps") if run.options.keep_steps else out, exist_ok=True)
    run.save()  # so that it can be resumed whenever it is killed, and a read-only folder shows now
    if run.options.keep_steps and not resume:
        run.save_weights("steps", f"{0:08d}.pt")
    return run


def is_kept(step: int) -> bool:
    """Whether --keep-steps keeps it: 0, 1, 2, 4, .. 512, then 1, 2 and 5 thousand, and so on."""
    return step & (step - 1) == 0 if step <= 512 else str(step).strip("0") in ("1", "2", "5")


def train(run: Run):
    """Train until `options.steps`, saving with the rows of the log. FloatingPointError, and no checkpoint, if
    a loss since the last row is not finite; OSError where a file cannot be written."""
    options, d_vocab = run.options, run.model.config.d_vocab
    held_out = data.held_out(HELD_OUT_PER_LENGTH, device=options.device, d_vocab=d_vocab, task=options.task)
    if run.captures:
        run.capture()
    losses, row = torch.empty(min(options.eval_every, options.steps), device=options.device), ""
    first, start = run.done, time.perf_counter()
    last_row, row_time, save_time, shown = first, start, start, start
    while run.done < options.steps:
        loss = run.step()
        losses[run.done - last_row - 1] = loss
        if options.keep_steps and is_kept(run.done):
            run.save_weights("steps", f"{run.done:08d}.pt")
        ends, now = run.done == options.steps, time.perf_counter()
        if is_row := ends or run.done % options.eval_every == 0:
            loss = losses[: run.done - last_row].double().mean().item()
            mse = data.evaluate(run.model, held_out, run.task.first)
            if not math.isfinite(loss + mse):
                raise FloatingPointError(f"the loss is not finite at or before step {run.done:,}: the last "
                                         "checkpoint is kept; try a smaller --lr with another --out")
            now = time.perf_counter()
            run.seconds, row_time, last_row = run.seconds + now - row_time, now, run.done
            run.log += f"{run.done},{loss:.8g},{mse:.8g},{run.seconds:.1f}\n"
            row = f"  loss {loss:.2e}  held-out MSE {mse:.2e}"
            if ends or now - save_time > SAVE_SECONDS:
                run.save()
                save_time = time.perf_counter()
        if is_row or now - shown > 0.5:
            rate, shown = (run.done - first) / (now - start), now
            left = f"{rate:.1f} steps/s  {(options.steps - run.done) / rate / 60:.0f} min left"
            progress(f"step {run.done:,}/{options.steps:,}{row}  {left}", is_row)


def say(text: str, stream=None, end: str = "\n"):
    """Print a line. What cannot be printed, or has no reader any more, is lost and nothing else."""
    stream = stream or sys.stdout
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, file=stream, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # what Python still holds for it goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress(text: str, stay: bool = False):
    """A line on a terminal that is rewritten as work goes on; elsewhere, only what is to `stay`."""
    if sys.stderr and sys.stderr.isatty():
        text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be rewritten
        say(f"\r{text}\x1b[K", sys.stderr, end="\n" if stay else "")
    elif stay:
        say(text)


def command_line(doc: str) -> argparse.ArgumentParser:
    """A parser with `doc` for help, errors of one line (exit status 2), and no value where none is given."""
    return argparse.ArgumentParser(usage=argparse.SUPPRESS, description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter,
                                   argument_default=argparse.SUPPRESS)


def main(arguments: list[str] | None = None, task: str = "affine"):
    parser = command_line(__doc__)
    for f in fields(Options) + fields(Config):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif text:
            parser.add_argument(flag, type=f.type, metavar=f.type.__name__, help=f"{text} ({f.default})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the out folder")
    given = vars(parser.parse_args(arguments)) | {"task": task}
    resume, run = given.pop("resume", False), None
    try:
        from_settings(given)
    except ValueError as error:
        parser.error(str(error))
    torch.set_flush_denormal(True)  # weights of dead units decay into numbers with which processors are slow
    try:
        run = open_run(given, resume)
        train(run)
    except (OSError, ValueError, FloatingPointError, RuntimeError) as error:  # that of too little memory
        sys.exit(f"{parser.prog}: error: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        if run:
            saved = load_file(os.path.join(run.options.out, "checkpoint.pt"), "checkpoint")[0]["done"]
            say(f"\nstopped; --resume goes on from step {saved:,}")
        sys.exit(130)
    say(f"{run.done:,} steps in {run.seconds / 60:.1f} min, in {run.options.out}")


if __name__ == "__main__":
    main()
