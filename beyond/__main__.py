"""What goes past the paper: what the model computes (the article is beyond/README.md).

    python -m beyond --all                          # on the weights that ship, into beyond/figures/
    python -m beyond --fig 21                       # one figure; --list names them
    python -m beyond --all --run runs/paper         # another run, into runs/paper/figures

In the order of the article, each resting on those before it: filter.py, symmetry.py, scalars.py, gain.py.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"

import beyond.symmetry  # noqa: F401, in the order of the article: each enters its claims and figures
import beyond.scalars  # noqa: F401
import beyond.gain  # noqa: F401
from analyze import HERE, MODEL, TRUTH, Study, grid, moving_dimension, pick, run_command
from beyond.filter import FILTER, OURS, POSITIONS, errors, figure
from beyond.symmetry import CLOSED_FORM, asymmetry_by_position, compared, shares
from data import MAX_LENGTH


@figure(19, "the README's picture", 3)
def figure_summary(study: Study):
    title = "A transformer that continues $a_{n+1} = c\\,a_n + d$, beside a function of inner products"
    canvas, panels = grid(1, 3, 12, 4, title)

    axes = panels[0, 0]
    i = pick(study.test, -1.1)
    a = study.test.a[i]
    output = study.clean["output"][i]
    dimension = moving_dimension(a)
    predicted = range(3, MAX_LENGTH + 1)
    axes.plot(a[:, dimension], "o-", color=TRUTH, mfc="none", label="the truth")
    axes.plot(predicted, output[2:, dimension], "x", color=MODEL, label="the model's prediction")
    axes.set(title=f"one of the dimensions, c = {study.test.c[i]:.2f}", xlabel="n", ylabel="$a_n$")
    axes.legend(loc="upper left")

    axes = panels[0, 1]
    mse, rest = asymmetry_by_position(study)
    fixed = errors(study).filter.nanmean(0)
    axes.semilogy(POSITIONS, mse, ".-", color=MODEL, label="the model")
    axes.semilogy(POSITIONS, rest, ".-", color=CLOSED_FORM, label="its mean over rotations")
    axes.semilogy(POSITIONS, fixed, ".-", color=FILTER, label="a filter that infers nothing")
    axes.set(title="what of the error is asymmetry", xlabel="position", ylabel="mean squared error")
    axes.legend()

    axes = panels[0, 2]
    noise = compared(study, "white noise")
    judged = noise.sequences.first
    model = noise.sequences.output[:, judged:].flatten()
    closed_form = noise.prediction[:, judged:].flatten()
    axes.scatter(model, closed_form, s=3, lw=0, color=CLOSED_FORM)
    axes.axline((0, 0), slope=1, color="0.5", lw=0.8, zorder=0)
    share = shares(noise.prediction, noise.sequences).output
    title = f"on white noise, which is no recurrence:\n{share:.1%} of the output from the weights"
    axes.set(title=title, xlabel="the model", ylabel="closed form, a dot a component")
    return canvas


def main():
    run_command(OURS, __doc__, "mechanism", os.path.join(HERE, "beyond", "figures"))


if __name__ == "__main__":
    sys.argv[0] = "python -m beyond"  # else its errors would begin with __main__.py
    main()
