"""Train the transformer on affine recurrences (section 3.2 of the paper).

    python train.py                                   # the paper's run: 100,000 steps, into runs/paper
    python train.py --n-layers 1 --d-mlp 512 --out runs/toy    # every field of model.Config is an option
    python train.py --resume                          # go on with a run that was stopped or killed
    python analyze.py --all --run runs/paper          # then look at it

    cp -r runs/paper runs/twin                        # what does the constant learning rate cost? Go on with
    python train.py --resume --out runs/twin --steps 106000 --decay-steps 6000     # one that falls to 0

The run folder gets config.json (all settings), log.csv (step, loss: mean since the row before, eval_mse: on
the fixed held-out set, seconds), weights.pt (the state dict), checkpoint.pt (all that resuming needs) and,
with --keep-steps, steps/00001000.pt and so on. A checkpoint is written with every row of the log: a run that
was killed, or stopped by Ctrl-C, goes on from its last row and ends, on the same machine, with the same bits.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields

import torch

import data
from model import Config, Transformer, check_settings, load_file, save, setting, settings_beside

HELD_OUT_PER_LENGTH = 128  # 1,536 held-out sequences
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)


@dataclass(frozen=True)
class Options:
    """The settings of training, each declared here once; the command line is made from this and Config."""

    task: str = setting("affine", "")  # in config.json, but no option of this command
    steps: int = setting(100_000, "optimizer steps; --resume may ask for more")
    decay_steps: int = setting(
        0, "learning rate falls to 0 over the last of --steps; 0: constant", least=0
    )
    batch_size: int = setting(16, "sequences a step")
    lr: float = setting(1e-4, "learning rate of AdamW")
    weight_decay: float = setting(0.01, "weight decay of AdamW, on every parameter", least=0)
    loss_from: int = setting(
        data.FIRST_POSITION, "first output position in the loss; 0: all pairs", least=0
    )
    seed: int = setting(0, "decides the initial weights and the training data", least=0)
    eval_every: int = setting(1000, "steps between two rows of log.csv")
    dtype: str = setting(
        "float32", "of matrix products: float32, bfloat16", choices=("float32", "bfloat16")
    )
    keep_steps: bool = setting(
        False, "keep the weights at steps 0, 1, 2, 4, .. 512, 1000, 2000, 5000, .."
    )
    no_graphs: bool = setting(
        False, "launch every kernel on CUDA, instead of replaying captured steps"
    )
    device: str = setting(DEVICES[0], "cpu or, where there is one, cuda", choices=DEVICES)
    out: str = setting(os.path.join("runs", "paper"), "run folder")

    SITTING = ("keep_steps", "no_graphs", "device", "out")  # of one sitting: not in config.json
    MAY_CHANGE = ("steps", "decay_steps", "keep_steps")  # when a run goes on

    def __post_init__(self):
        check_settings(self)
        first = data.find_task(self.task).first
        if self.loss_from > first:
            raise ValueError(f"loss_from must be 0 to {first}, not {self.loss_from}")
        if self.decay_steps > self.steps:
            raise ValueError(
                f"decay_steps must be 0 to steps = {self.steps:,}, not {self.decay_steps:,}"
            )


def from_settings(settings: dict) -> tuple[Options, Config]:
    """Options and Config with the values in `settings`, a flat dict such as config.json holds, and defaults
    for the rest; names that neither has are ignored. ValueError for a value out of its range."""

    def fill(kind):
        return kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})

    options = fill(Options)
    config = fill(Config)
    check_settings(config)
    if config.n_ctx < data.MAX_LENGTH:
        raise ValueError(f"n_ctx must be at least {data.MAX_LENGTH}, the longest sequence")
    return options, config


def to_settings(options: Options, config: Config) -> dict:
    """The opposite of `from_settings`: what config.json holds."""
    settings = asdict(config) | asdict(options)
    return {name: value for name, value in settings.items() if name not in Options.SITTING}


class Run:
    """Model, optimizer and the two random streams of a run: takes steps, saves and goes on."""

    def __init__(self, options: Options, config: Config):
        self.options = options
        self.settings = to_settings(options, config)
        self.task = data.find_task(options.task)

        # Drawn on the CPU, so that weights and lengths are the same on every device.
        self.lengths = torch.Generator().manual_seed(options.seed)
        self.model = Transformer(config, self.lengths).to(options.device)
        data_seed = torch.randint(2**62, (), generator=self.lengths).item()
        self.sequences = torch.Generator(options.device).manual_seed(data_seed)

        # Captured steps are replayed as they were recorded: they can only read a rate that is a tensor.
        self.captures = options.device == "cuda" and not options.no_graphs
        lr = torch.tensor(options.lr, device=options.device) if self.captures else options.lr
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=lr,
            weight_decay=options.weight_decay,
            fused=True,
            capturable=self.captures,
        )
        for p in self.model.parameters():  # from the start, so that a checkpoint is always complete
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # see `capture`

        self.done = 0  # steps
        self.saved = 0  # steps, at the last checkpoint
        self.seconds = 0.0
        self.log = "step,loss,eval_mse,seconds\n"

    def draw_length(self) -> int:
        """The number of inputs of the next batch: uniform over the lengths of the task."""
        lengths = self.task.lengths
        return torch.randint(lengths.start, lengths.stop, (), generator=self.lengths).item()

    def set_rate(self):
        """The learning rate of the next step: constant, but falling linearly to 0 over the last ones."""
        left = self.options.steps - self.done
        rate = self.options.lr * min(1, left / max(1, self.options.decay_steps))
        group = self.optimizer.param_groups[0]
        if self.captures:
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    def take_step(self, length: int) -> torch.Tensor:
        """One step of the paper's training, on a batch of sequences with `length` inputs. Returns the loss
        before it."""
        self.set_rate()
        self.done += 1
        if length in self.graphs:
            self.graphs[length].replay()
            return self.captured_loss.clone()
        return self.launch_step(length)

    def launch_step(self, length: int) -> torch.Tensor:
        """What a step consists of: sample, loss, gradients, AdamW."""
        options = self.options
        d_vocab = self.model.config.d_vocab
        batch = data.sample(options.batch_size, length, self.sequences, d_vocab, task=options.task)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            prediction = self.model(batch.inputs)  # [batch, length, d_vocab]
        loss = data.mse(prediction.float(), batch.targets, options.loss_from)

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> dict:
        """All that resuming needs."""
        return {
            "settings": self.settings,
            "keep_steps": self.options.keep_steps,
            "device": self.options.device,
            "threads": torch.get_num_threads(),
            "model": self.model.state_dict(),
            "moments": [self.optimizer.state[p] for p in self.model.parameters()],
            "lengths": self.lengths.get_state(),
            "sequences": self.sequences.get_state(),
            "done": self.done,
            "seconds": self.seconds,
            "log": self.log,
        }

    def load(self, state: dict):
        """Go on from a `state`, in the tensors that there are: captured steps know no others."""
        self.model.load_state_dict(state["model"])
        for p, moments in zip(self.model.parameters(), state["moments"], strict=True):
            for name, value in moments.items():
                self.optimizer.state[p][name].copy_(value)
        self.lengths.set_state(state["lengths"])
        self.sequences.set_state(state["sequences"])
        self.done = self.saved = state["done"]
        self.seconds = state["seconds"]
        self.log = state["log"]

    def write(self, value, name: str):
        save(value, os.path.join(self.options.out, name))

    def write_weights(self, name: str):
        self.write({name: value.cpu() for name, value in self.model.state_dict().items()}, name)

    def save(self):
        """Write checkpoint.pt, then what follows from it, which resuming would write again after a kill."""
        self.write(self.state(), "checkpoint.pt")
        self.saved = self.done
        self.write(self.log, "log.csv")
        self.write_weights("weights.pt")


# ---------- New runs and old ones ----------
def open_run(settings: dict, resume: bool) -> Run:
    """A new run or, to `resume`, the one in the folder settings["out"]. settings: values of Options and
    Config by name, the others being defaults or, resuming, the run's.

    ValueError for a new run where there is one, a damaged checkpoint or a setting, in config.json too, that
    is not the run's; FileNotFoundError where there is nothing to resume; OSError where it cannot write.
    """
    out = settings.get("out", Options.out)
    run = resume_run(out, settings) if resume else new_run(out, settings)
    if run.options.keep_steps:
        os.makedirs(os.path.join(out, "steps"), exist_ok=True)
    run.save()  # so that it can be resumed whenever it is killed, and a read-only folder shows now
    if run.options.keep_steps and run.done == 0:
        run.write_weights("steps/00000000.pt")
    return run


def new_run(out: str, settings: dict) -> Run:
    for name in ("checkpoint.pt", "weights.pt", "log.csv"):
        if os.path.exists(os.path.join(out, name)):
            raise ValueError(f"{out} already holds a run: --resume it or give another --out")
    run = Run(*from_settings(settings))
    os.makedirs(out, exist_ok=True)

    # Of two runs that begin in one folder at once only one can create this file.
    config = os.path.join(out, "config.json")
    try:
        with open(config, "x") as f:
            json.dump(run.settings, f, indent=1)
    except FileExistsError:
        raise ValueError(
            f"{out} belongs to a run that has just begun: give another --out; if that run was "
            f"killed at once, delete {config}"
        ) from None
    return run


def resume_run(out: str, settings: dict) -> Run:
    path = os.path.join(out, "checkpoint.pt")
    state, _ = load_file(path, "checkpoint")
    try:
        # It goes on where it ran, and keeps what it was asked to keep.
        begun = to_settings(*from_settings(state["settings"]))
        begun |= {"device": state["device"], "keep_steps": state.get("keep_steps", False)}
        for name, value in [*settings_beside(path).items(), *settings.items()]:
            if name not in Options.MAY_CHANGE and begun.get(name, value) != value:
                raise ValueError(f"{path} belongs to a run with {name} {begun[name]}, not {value}")
        run = Run(*from_settings(begun | settings))
        run.load(state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no checkpoint of this train.py: {str(error)[:99]!r}"
        ) from error
    if run.done > run.options.steps:
        raise ValueError(f"{path} is at step {run.done:,}, beyond --steps {run.options.steps:,}")

    if "threads" in state:  # another number of them would give other bits
        torch.set_num_threads(state["threads"])
    run.write(run.settings, "config.json")  # steps and decay_steps may be new
    return run


# ---------- The loop ----------
def is_kept(step: int) -> bool:
    """Whether --keep-steps keeps it: 0, 1, 2, 4, .. 512, then 1, 2 and 5 thousand, and so on."""
    return step & (step - 1) == 0 if step <= 512 else str(step).strip("0") in ("1", "2", "5")


def train(run: Run):
    """Train until `options.steps`, saving with every row of the log. FloatingPointError, and no checkpoint,
    if a loss since the last row is not finite; OSError where a file cannot be written."""
    options = run.options
    held_out = data.held_out(
        HELD_OUT_PER_LENGTH,
        device=options.device,
        task=options.task,
        d_vocab=run.model.config.d_vocab,
    )
    if run.captures:
        capture(run)

    losses = []  # since the last row
    first = run.done
    start = row_start = time.perf_counter()
    while run.done < options.steps:
        losses.append(run.take_step(run.draw_length()))
        if options.keep_steps and is_kept(run.done):
            run.write_weights(f"steps/{run.done:08d}.pt")

        row = ""
        if run.done % options.eval_every == 0 or run.done == options.steps:
            loss = torch.stack(losses).double().mean().item()
            eval_mse = data.evaluate(run.model, held_out, run.task.first)
            if not math.isfinite(loss + eval_mse):
                raise FloatingPointError(
                    f"the loss is not finite at or before step {run.done:,}: the last "
                    "checkpoint is kept; try a smaller --lr with another --out"
                )
            now = time.perf_counter()
            run.seconds += now - row_start
            row_start = now
            run.log += f"{run.done},{loss:.8g},{eval_mse:.8g},{run.seconds:.1f}\n"
            run.save()
            losses = []
            row = f"  loss {loss:.2e}  held-out MSE {eval_mse:.2e}"

        if row or run.done % 10 == 0:
            rate = (run.done - first) / (time.perf_counter() - start)
            left = f"{rate:.1f} steps/s  {(options.steps - run.done) / rate / 60:.0f} min left"
            progress(f"step {run.done:,}/{options.steps:,}{row}  {left}", stay=bool(row))


# ---------- CUDA graphs: nothing here happens on a CPU ----------
def capture(run: Run):
    """Record the step as CUDA graphs, one for each length: replaying one costs a launch instead of several
    hundred. Where that fails, training goes on without."""
    before = copy.deepcopy(run.state())
    torch.cuda.synchronize()  # the copy first
    stream = torch.cuda.current_stream()
    graphs = {}
    try:
        # Libraries set themselves up in steps that run.
        with torch.cuda.stream(torch.cuda.Stream()):
            for length in run.task.lengths:
                run.captured_loss = run.launch_step(length).clone()
        torch.cuda.synchronize()

        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others fit into its memory.
        for length in reversed(run.task.lengths):
            graphs[length] = torch.cuda.CUDAGraph()
            graphs[length].register_generator_state(run.sequences)
            run.optimizer.zero_grad()
            with torch.cuda.graph(graphs[length], pool=pool):
                run.captured_loss.copy_(run.launch_step(length))
        run.graphs = graphs
    except Exception as error:  # of whatever kind: plain steps need none of this
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        say(f"training without CUDA graphs, which failed: {str(error).splitlines()[0]}")
    run.load(before)


# ---------- The command line ----------
def say(text: str, end: str = "\n"):
    """Print a line. What cannot be printed, or has no reader any more, is lost and nothing else."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def progress(text: str, stay: bool = False):
    """A line on a terminal that is rewritten as work goes on; elsewhere, only what is to `stay`."""
    if sys.stdout.isatty():
        say(f"\r{text}\x1b[K", end="\n" if stay else "")
    elif stay:
        say(text)


def command_line(doc: str) -> argparse.ArgumentParser:
    """A parser with `doc` for help, errors of one line (exit status 2), and no value where none is given."""
    return argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )


def main(arguments: list[str] | None = None, task: str = "affine"):
    parser = command_line(__doc__)
    for f in fields(Options) + fields(Config):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif text:
            parser.add_argument(
                flag, type=f.type, metavar=f.type.__name__, help=f"{text} ({f.default})"
            )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the out folder"
    )
    given = vars(parser.parse_args(arguments)) | {"task": task}
    resume = given.pop("resume", False)
    try:
        # How many steps a resumed run has stands in its folder.
        from_settings({"steps": 2**61} | given if resume else given)
    except ValueError as error:
        parser.error(str(error))

    # Weights of dead units decay into numbers with which processors are slow.
    torch.set_flush_denormal(True)
    run = None
    try:
        run = open_run(given, resume)
        if resume:
            say(f"going on from step {run.done:,}")
        train(run)
    except (OSError, ValueError, FloatingPointError, RuntimeError) as error:  # that of too little memory
        sys.exit(f"{parser.prog}: error: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        if run:
            say(f"\nstopped; --resume goes on from step {run.saved:,}")
        sys.exit(130)
    say(f"{run.done:,} steps in {run.seconds / 60:.1f} min")


if __name__ == "__main__":
    main()
