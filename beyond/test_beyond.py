"""What beyond/ relies on. `python -m unittest test_all` runs these too."""

import functools
import json
import os
import shutil
import unittest
from unittest import mock

import torch
import torch.nn.functional as F

import analyze
import beyond.__main__ as command_of_beyond
import beyond.filter as filter
import beyond.gain as gain
import beyond.recurrences as recurrences
import beyond.scalars as scalars
import beyond.seeds as seeds
import beyond.symmetry as symmetry
import data
import model
import train
from test_all import SHIPPED, TestCase, command, read, seeded

HERE = os.path.dirname(os.path.abspath(__file__))
# Of the heads of built_model.
KAPPA = torch.tensor([[0.3, 1.3], [-0.7, 0.3], [-1.7, -0.7]]).double()
SLOPES = torch.tensor([1.0, 0.6, 0.2]).double()  # and of its MLPs


def built_model(mlps: bool) -> model.Transformer:
    """A float64 model whose maps between data vectors are multiples of I.

    Data come in on dimensions 0 to 4 of the stream and are written to 5 to 9; the rest holds the position.
    Attention compares what a layer reads of both, each with itself. An MLP copies data, times a slope, by
    pairs of ReLUs, or does nothing.
    """
    config = model.Config(
        d_vocab=5, d_model=16, d_head=8, d_mlp=10, n_heads=2, n_layers=3, n_ctx=16
    )
    net = model.fold(model.Transformer(config, seeded()).double()).requires_grad_(False)
    basis = torch.linalg.svd(torch.ones(1, 16).double())[2][1:]  # what a LayerNorm leaves alone
    enters, written, rest = basis[:5], basis[5:10], basis[10:]
    for parameter in net.blocks.parameters():
        parameter.zero_()
    for module in net.modules():
        if isinstance(module, model.LayerNorm):
            module.w.fill_(1)
    net.embed.W_E.copy_(enters)
    net.unembed.W_U.copy_(written.T)
    net.pos_embed.W_pos.copy_(torch.randn(16, 5, generator=seeded(1), dtype=torch.double) @ rest)
    for l, block in enumerate(net.blocks):
        reads = enters if l == 0 else written
        for head in range(2):
            block.attn.W_V[head, :, :5] = reads.T
            block.attn.W_O[head, :5] = KAPPA[l, head] * written
            for W in (block.attn.W_Q, block.attn.W_K):
                W[head, :, :5] = (1 + head) * reads.T
                W[head, :, 5:] = rest[:3].T
        if mlps:
            block.mlp.W_in[:, :5] = written.T
            block.mlp.W_in[:, 5:] = -written.T
            block.mlp.W_out[:5] = SLOPES[l] * written
            block.mlp.W_out[5:] = -SLOPES[l] * written
    return net


def sequences(count: int = 20, d_vocab: int = 5) -> data.Sample:
    return data.sample(count, 9, seeded(), d_vocab, dtype=torch.double)


@functools.cache
def shipped() -> analyze.Study:
    """The study of the weights that ship, on fewer sequences and once for all tests."""
    with mock.patch.object(analyze, "POPULATION", 100):
        return analyze.open_study(SHIPPED)


FEW = {
    "SEQUENCES": 40,
    "PER_LENGTH": 20,
    "SAMPLED": 60,
    "RECURRENCES": 10,
    "FIELD": 6,
    "NOISE_FIELD": 2,
    "OTHERS": 20,
    "RESTRICTED": 6,
    "OF_A_KIND": 60,
}


def setUpModule():
    patch = mock.patch.multiple(symmetry, **FEW)
    patch.start()
    unittest.addModuleCleanup(patch.stop)


def verdict_of(claim, **replaced) -> str:
    """The verdict on the shipped weights with functions of symmetry.py replaced."""
    with mock.patch.multiple(symmetry, **replaced):
        return claim(shipped()).verdict


class Filter(TestCase):
    def test_it_is_the_best_on_what_it_is_fitted_to(self):
        K = filter.fixed_filter(40)
        a = data.sample(500, 14, seeded(3), dtype=torch.double).a
        error = lambda row: (row @ a[:, :-1] - a[:, 14]).pow(2).mean()
        for step in torch.randn(5, 14, generator=seeded(), dtype=torch.double):
            self.assertLess(error(K[13]), error(K[13] + 0.05 * step))
        # A sequence that stands still goes on standing still.
        self.assertClose(K.sum(1)[6:], 1, 0.05)
        self.assertTrue(torch.equal(K.triu(1), torch.zeros_like(K)))

    def test_a_fitted_filter_finds_a_filter_from_the_other_half_alone(self):
        x = torch.randn(20, 6, 40, generator=seeded())
        K = torch.randn(6, 6, generator=seeded(1)).tril()
        self.assertClose(filter.fitted_filter(x, K @ x), K @ x, 1e-4)
        changed = K @ x
        changed[:10] = 0  # what a half says must not reach its own predictions
        self.assertClose(filter.fitted_filter(x, changed)[:10], (K @ x)[:10], 1e-4)
        self.assertClose(filter.fitted_filter(x, changed)[10:], 0, 1e-6)

    def test_the_claim_needs_a_model_that_leads_early_and_trails_late(self):
        model_mse = torch.ones(12)
        for early, late, expected in (
            (3, 0.4, "reproduced"),
            (3, 0.6, "partly"),
            (1.5, 0.4, "not reproduced"),
        ):
            fixed = torch.cat([torch.full((5,), early), torch.ones(5), torch.full((2,), late)])
            with mock.patch.object(filter, "by_position", side_effect=[model_mse, fixed]):
                self.assertEqual(filter.claim_fixed_filter(shipped()).verdict, expected)


class ClosedForm(TestCase):
    def test_it_is_the_mean_over_rotations(self):
        net, sample = shipped().model, data.sample(6, 14, seeded())
        x = sample.inputs
        sampled = symmetry.rotated_outputs(net, x, 100, seeded(1)).mean(0)
        wrong = (sampled - sample.targets)[:, 2:]
        predicted_wrong = (symmetry.closed_forms(net, x) - sample.targets)[:, 2:]
        self.assertGreater(data.explained(predicted_wrong, wrong), 0.9)

    def test_turning_the_inputs_turns_its_predictions(self):
        net, x = shipped().model, data.sample(2, 14, seeded()).inputs
        Q = symmetry.random_rotation(40, seeded(1))
        turned = symmetry.closed_forms(net, x @ Q)
        self.assertClose(turned, symmetry.closed_forms(net, x) @ Q, 1e-4)
        self.assertGreater((net(x @ Q) - net(x) @ Q).abs().max(), 1e-3)  # which the model's do not

    def test_it_is_the_model_where_every_map_is_a_multiple_of_I(self):
        net, x = built_model(mlps=False), sequences().inputs
        noise = torch.randn(3, 9, 5, generator=seeded(), dtype=torch.double)
        for inputs in (x, noise):
            self.assertClose(symmetry.closed_forms(net, inputs), net(inputs), 1e-9)
        blind = built_model(mlps=False)
        blind.blocks[0].attn.W_Q.zero_()
        # And its attention does compare vectors.
        self.assertGreater((blind(x) - net(x)).abs().max(), 1e-3)

    def test_moments_are_those_of_samples(self):
        z = torch.randn(400_000, generator=seeded(), dtype=torch.double)
        mu, s = torch.tensor([-1.0, 0.2, 3.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
        for act_fn, f in model.ACTIVATIONS.items():
            values = f(mu[:, None] + s[:, None] * z)
            mean, slope = symmetry.moments(act_fn, mu, s)
            self.assertClose(mean, values.mean(1), 0.01)
            self.assertClose(slope, (values * z).mean(1) / s, 0.01)
        mean, slope = symmetry.moments("relu", torch.tensor([-1.0, 2.0]), torch.zeros(2))
        self.assertEqual((mean.tolist(), slope.tolist()), ([0, 2], [0, 1]))

    def test_coordinates_are_those_of_the_span(self):
        for x, dimensions in (
            (data.sample(1, 14, seeded()).inputs[0], 2),
            (torch.randn(14, 40), 14),
        ):
            L, e = symmetry.coordinates(x)
            self.assertEqual(len(e), dimensions)
            self.assertClose(L @ e, x, 1e-5)
            self.assertClose(e @ e.T, torch.eye(dimensions), 1e-5)

    def test_of_an_untrained_model_it_explains_nothing(self):
        finding = symmetry.claim_mean_field(shipped().untrained)
        self.assertEqual(finding.verdict, "not reproduced")
        self.assertLess(max(finding.measured), 0.1)

    def test_the_claim_fails_for_predictors_that_know_less(self):
        self.assertEqual(symmetry.claim_mean_field(shipped()).verdict, "reproduced")
        actual = symmetry.fielded

        def told(prediction):
            return lambda study, kind: actual(study, kind)._replace(
                prediction=prediction(actual(study, kind))
            )

        self.assertEqual(
            verdict_of(symmetry.claim_mean_field, fielded=told(lambda f: f.truth)), "not reproduced"
        )
        filtered = told(lambda f: filter.filtered(f.x))
        self.assertEqual(verdict_of(symmetry.claim_mean_field, fielded=filtered), "not reproduced")
        strong = lambda study, kind: {"a rival": 0.005}
        self.assertEqual(verdict_of(symmetry.claim_mean_field, field_rivals=strong), "partly")


class Symmetry(TestCase):
    def test_rotations_are_orthogonal_and_prefer_no_direction(self):
        Q = torch.stack([symmetry.random_rotation(5, seeded(i)) for i in range(2000)])
        self.assertClose(Q @ Q.transpose(1, 2), torch.eye(5), 1e-5)
        self.assertClose(Q.mean(0), 0, 0.05)
        self.assertClose((Q**2).mean(0), 0.2, 0.02)

    def test_error_is_asymmetry_and_the_error_of_the_mean(self):
        found = symmetry.turned(shipped(), 8)
        target = found.sample.targets[:, 2:]
        each = (found.outputs[:, :, 2:] - target).pow(2).mean()
        variance = found.outputs.var(0)[:, 2:].mean()
        of_mean = (found.outputs.mean(0)[:, 2:] - target).pow(2).mean()
        self.assertClose(of_mean + variance * 15 / 16, each, 1e-8)

    def test_a_symmetric_model_has_no_asymmetry_and_fails_the_claim(self):
        net, x = built_model(mlps=False), sequences().inputs
        self.assertClose(
            symmetry.rotated_outputs(net.float(), x.float(), 4, seeded()).var(0), 0, 1e-9
        )
        self.assertEqual(symmetry.claim_rotations(shipped()).verdict, "reproduced")
        actual = symmetry.turned

        def less(study, length):
            found = actual(study, length)
            mean = found.outputs.mean(0)
            return found._replace(outputs=mean + 0.4 * (found.outputs - mean))

        self.assertEqual(verdict_of(symmetry.claim_rotations, turned=less), "not reproduced")
        self.assertEqual(symmetry.claim_rotations(shipped().untrained).verdict, "not reproduced")

    def test_angles_finds_the_layers_that_compare_vectors(self):
        net = built_model(mlps=False)
        for l, block in enumerate(net.blocks):
            if l < 2:
                block.attn.W_Q[:, :, :5] = 0  # attention there sees positions alone
        x = sequences(100).inputs
        sums: dict = {}
        for i in range(64):
            cache: dict = {}
            net(x @ symmetry.random_rotation(5, seeded(i)).double(), cache=cache)
            for name, value in cache.items():
                sums[name] = sums.get(name, 0) + value / 64
        output = net(x)
        noise = 0.02 * torch.randn(output.shape, generator=seeded(), dtype=torch.double)
        # What the model is a little wrong about.
        sample = mock.Mock(inputs=x, targets=output + noise)
        found = symmetry.Turned(sample, output, None, sums)
        study = mock.Mock(model=net, layers=range(3))
        with mock.patch.object(symmetry, "turned", lambda study, length: found):
            times = symmetry.without_directions.__wrapped__(study)
        self.assertClose(times[:2], 1, 0.1)
        self.assertGreater(times[2].min(), 1.5)
        self.assertEqual(self.judged(times), "not reproduced")

    def judged(self, times: torch.Tensor) -> str:
        replaced = {
            "without_directions": lambda study: times,
            "score_variances": lambda study: ([], []),
        }
        return verdict_of(symmetry.claim_angles, **replaced)

    def test_angles_is_judged_as_its_docstring_says(self):
        ones = [1.0, 1.0, 1.0]
        for expected, times in (
            ("reproduced", [[6, 6, 3], ones, [1.4, 1, 1]]),
            ("partly", [[20, 10, 3], ones, [2, 2, 2]]),
            ("partly", [[6, 6, 1.5], ones, ones]),
            ("not reproduced", [[9, 9, 5], ones, [2, 2, 2]]),
            ("not reproduced", [[4, 4, 4], ones, ones]),
        ):
            self.assertEqual(self.judged(torch.tensor(times)), expected)

    def test_eight_numbers_are_the_first_ones(self):
        self.assertEqual(symmetry.claim_numbers(shipped()).verdict, "reproduced")
        actual = symmetry.number_directions(shipped())
        last_first = {
            name: point._replace(directions=point.directions.flip(0))
            for name, point in actual.items()
        }
        with mock.patch.object(symmetry, "number_directions", lambda study: last_first):
            mses = symmetry.restricted_mses.__wrapped__(shipped())
        self.assertEqual(
            verdict_of(symmetry.claim_numbers, restricted_mses=lambda study: mses), "not reproduced"
        )
        # All of them: nothing is restricted.
        with mock.patch.object(symmetry, "DIRECTIONS", (128,)):
            unrestricted = symmetry.restricted_mses.__wrapped__(shipped())[0]
        found = symmetry.fielded(shipped(), "recurrences")
        self.assertClose(unrestricted / data.mse(found.prediction, found.truth), 1, 1e-3)

    def test_kinds_are_what_their_names_say(self):
        off = {}
        for kind, (x, target) in symmetry.kinds(shipped()).items():
            longest = x.norm(dim=-1).amax(1)
            if kind != "noise 0.1":
                self.assertTrue(((longest > 1 - 1e-4) & (longest < 2 + 1e-4)).all(), kind)
                self.assertTrue(torch.equal(x[:, 1:], target[:, :-1]), kind)
            off[kind] = (data.solve_recurrence(x.double()) - target[:, 2:]).abs().max().item()
        self.assertEqual(set(off), set(symmetry.KINDS))
        self.assertLess(max(off["recurrences"], off["|c| 2.5 to 3"], off["4 inputs"]), 1e-4)
        self.assertGreater(min(off["two growths"], off["white noise"]), 0.1)

    def test_half_way_to_the_model_explains_three_quarters_of_its_error(self):
        x, truth = symmetry.kinds(shipped())["white noise"]
        output = shipped().model(x)
        half = symmetry.shares((output + truth) / 2, output, truth, "white noise")
        self.assertAlmostEqual(half.error, 0.75, places=4)  # half as far off: a quarter is left
        self.assertAlmostEqual(
            symmetry.shares(output, output, truth, "white noise").error, 1, places=5
        )


class Scalars(TestCase):
    def test_they_are_exact_where_every_map_is_a_multiple_of_I(self):
        net, x, cache = built_model(mlps=True), sequences().inputs, {}
        output = net(x, cache=cache)
        study = mock.Mock(model=net, layers=range(3))
        self.assertClose(scalars.traces(study), KAPPA, 1e-12)
        self.assertClose(scalars.scalar_transformer(cache, KAPPA, SLOPES, x), output, 1e-10)
        self.assertGreater((output - output.mean(0)).abs().max(), 0.1)
        self.assertEqual(len(scalars.data_steps(cache, KAPPA, SLOPES)), 7)

    def test_put_in_they_change_nothing_where_they_are_what_the_model_has(self):
        net, x, cache = built_model(mlps=True), sequences().inputs, {}
        output = net(x, cache=cache)
        study = mock.Mock(model=net, layers=range(3))
        for l in range(3):
            same = scalars.put_scalars(study, l, KAPPA[l])
            none = scalars.put_scalars(study, l, 0 * KAPPA[l])
            self.assertClose(net(x, hooks=same), output, 1e-10)
            self.assertGreater((net(x, hooks=none) - output).abs().max(), 1e-3)
        taken = mock.patch.object(scalars, "patterns_and_scales", return_value=cache)
        with taken, mock.patch.object(scalars, "mlp_slopes", return_value=SLOPES):
            same = scalars.put_layer_0(study, x, KAPPA[0])
            none = scalars.put_layer_0(study, x, 0 * KAPPA[0])
        self.assertClose(net(x, hooks=same), output, 1e-10)
        self.assertGreater((net(x, hooks=none) - output).abs().max(), 1e-3)

    def test_put_in_fails_where_a_layer_minds(self):
        fine = {
            "layer 0 as a whole": [1.5] * 3,
            "layer 1's heads": [1.0] * 3,
            "layer 2's heads": [1.0] * 3,
            "layer 2's heads, 0": [9.0] * 3,
        }
        for changes, expected in (
            ({}, "reproduced"),
            ({"layer 0 as a whole": [3.0] * 3}, "partly"),
            ({"layer 1's heads": [1.1] * 3}, "not reproduced"),
            ({"layer 2's heads, 0": [2.0] * 3}, "not reproduced"),
        ):
            with mock.patch.object(scalars, "put_in", return_value=fine | changes):
                self.assertEqual(scalars.claim_put_in(shipped()).verdict, expected)

    def test_a_kind_is_evidence_only_where_every_rival_leaves_four_times_as_much(self):
        rivals = scalars.RIVALS

        def judge(
            left: dict[str, float], strong: str = "", ours: float = 0.99, error: float = 0.95
        ) -> str:
            """The verdict where rivals leave 0.03, or `left` on these kinds but for a `strong` one."""

            def scores(_, kind):
                found = dict.fromkeys(
                    (*rivals, "without layer 1"), symmetry.Shares(1 - left.get(kind, 0.03), 0)
                )
                found[strong] = symmetry.Shares(0.97, 0)
                return found | {"scalar transformer": symmetry.Shares(ours, error)}

            with mock.patch.object(scalars, "scores", scores):
                return scalars.claim_scalar_transformer(shipped()).verdict

        # All but these two are rivals.
        predictors = {"scalar transformer", "without layer 1", *rivals}
        self.assertEqual(set(scalars.predictions(shipped(), "4 inputs")), predictors)
        two = {"white noise": 0.05, "noise 0.1": 0.05}
        self.assertEqual(judge(two), "reproduced")
        self.assertEqual(judge({"white noise": 0.05}), "partly")
        self.assertEqual(judge({"two growths": 0.05, "noise 0.1": 0.05}), "partly")
        self.assertEqual(judge({"recurrences": 0.05, "4 inputs": 0.05}), "not reproduced")
        self.assertEqual(judge({kind: 0.2 for kind in two}, ours=0.96), "not reproduced")
        self.assertEqual(judge(two, error=0.89), "not reproduced")
        for name in rivals:
            self.assertEqual(judge(two, strong=name), "not reproduced", name)


class Gain(TestCase):
    def test_the_part_along_a_direction_is_a_projection(self):
        value = torch.randn(4, 6, 12, generator=seeded(), dtype=torch.double)
        direction = F.normalize(torch.randn(12, generator=seeded(1), dtype=torch.double), dim=0)
        written = gain.Written(value.mean(0), direction)
        part = gain.along(value, written)
        self.assertClose((value - value.mean(0) - part) @ direction, 0, 1e-12)
        self.assertEqual(torch.linalg.matrix_rank(part.flatten(0, 1)).item(), 1)

    def test_shares_of_the_damage(self):
        clean, ablated, held, alone = torch.tensor([1.0, 11.0, 3.0, 7.0])
        arms = gain.Arms(clean, ablated, held, alone)
        self.assertClose(gain.mended(arms), 0.8, 1e-6)
        self.assertClose(gain.comes_back(arms), 0.6, 1e-6)
        other = gain.Arms(clean, ablated, 9 * clean, 3 * clean)
        for layers, expected in (
            ((other, arms, other), "reproduced"),
            ((arms, arms, other), "partly"),
            ((other, other, other), "not reproduced"),
        ):
            layers = [gain.Arms(*(number.expand(5) for number in layer)) for layer in layers]
            with mock.patch.object(gain, "arms", lambda study, l: layers[l]):
                self.assertEqual(gain.claim_gain_control(shipped()).verdict, expected)


class Recurrences(TestCase):
    def test_solvers_are_exact_where_the_next_vector_is_determined(self):
        for name in ("affine", "linear-2", "linear-3"):
            task = data.find_task(name)
            for length in (task.first + 1, 14):
                sample = data.sample(200, length, seeded(), task=name, dtype=torch.float64)
                with self.subTest(name, length=length):
                    self.assertClose(
                        task.solve(sample.inputs), sample.targets[:, task.first :], 1e-9
                    )

    def test_sequences_obey_their_recurrence(self):
        for K in (2, 3):
            a, c, d = data.sample(50, 12, seeded(), task=f"linear-{K}", dtype=torch.float64)
            expected = (
                sum(c[:, i, None, None] * a[:, K - 1 - i : -1 - i] for i in range(K)) + d[:, None]
            )
            self.assertClose(a[:, K:], expected, 1e-9)

    def test_a_task_trains_from_its_first_position_on_resumes_and_is_compared(self):
        out = os.path.join(self.folder(), "_$5_x$")
        small = ["--d-mlp", "16", "--eval-every", "2", "--device", "cpu", "--out", out]
        few = mock.patch.object(recurrences, "TESTED", 20), mock.patch.object(
            recurrences, "FIELD", 2
        )
        with mock.patch.object(train, "HELD_OUT_PER_LENGTH", 2), few[0], few[1]:
            for more in (["--steps", "2"], ["--steps", "4", "--resume"]):
                status, _, err = command(recurrences.main, "train", "linear-2", *more, *small)
                self.assertEqual(status, 0, err)
            config = model.load_file(os.path.join(out, "config.json"), "JSON")[0]
            self.assertEqual(
                (config["task"], config["loss_from"], config["steps"]), ("linear-2", 3, 4)
            )
            status, _, err = command(
                recurrences.main, "compare", out, "--out", os.path.join(out, "c")
            )
        self.assertEqual(status, 0, err)
        found = model.load_file(os.path.join(out, "c", "recurrences.json"), "JSON")[0]
        self.assertEqual([run["task"] for run in found.values()], ["linear-2"])
        for status, says, arguments in (
            (2, "invalid choice", ["train", "nonsense"]),
            (2, "required", []),
            (2, "invalid choice", ["train", "affine"]),
            (1, "no weights file", ["compare", out + "x"]),
        ):
            self.assertRefused(status, says, recurrences.main, *arguments)
        for arguments in (["train", "--help"], ["train", "linear-2", "--help"]):
            status, said, _ = command(recurrences.main, *arguments)
            self.assertEqual(status, 0)
            self.assertIn("--decay-steps", said)


class Seeds(TestCase):
    def runs(self, changes: dict[str, dict]) -> dict[str, str]:
        """Run folders, {name: path}, with the shipped weights and results, and changes of config.json."""
        folder = self.folder()
        results = model.load_file(
            os.path.join(os.path.dirname(HERE), "figures", "results.json"), "JSON"
        )[0]
        paths = {}
        for name, change in changes.items():
            paths[name] = os.path.join(folder, name)
            os.makedirs(os.path.join(paths[name], "figures"))
            shutil.copy(os.path.join(SHIPPED, "weights.pt"), paths[name])
            meta = results["meta"] | {"config": results["meta"]["config"] | change}
            model.save(
                results | {"meta": meta}, os.path.join(paths[name], "figures", "results.json")
            )
        return paths

    def compare(self, *runs: str) -> dict:
        out = self.folder()
        with mock.patch.object(analyze.Figure, "savefig"):
            status, _, err = command(seeds.main, *runs, "--out", out)
        self.assertEqual(status, 0, err)
        strict = lambda name: self.fail(f"{name} in a JSON file")
        return json.loads(read(os.path.join(out, "seeds.json")), parse_constant=strict)["runs"]

    def test_settings_but_for_the_seed_are_headings(self):
        changes = {
            "one": {"seed": 1},
            "other": {"lr": 0.1},
            "old": {"tf32": False},
            "gelu": {"act_fn": "gelu_new"},
        }
        found = self.compare(SHIPPED, *self.runs(changes).values())
        self.assertEqual(list(found), ["weights", "one", "old", "other", "gelu"])
        headings = [seeds.heading(run) for run in found.values()]
        self.assertEqual(headings, ["relu", "relu", "relu", "relu, lr 0.1", "gelu_new"])

    def test_runs_are_called_by_what_tells_them_apart(self):
        paths = self.runs({"a/runs/toy": {}, "b/runs/toy": {}, "b/_old": {}})
        self.assertEqual(list(self.compare(*paths.values())), ["a/runs/toy", "b/runs/toy", "_old"])
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(paths["b/_old"])
        self.assertEqual(list(self.compare(".")), ["_old"])
        self.assertRefused(1, "given twice", seeds.main, ".", paths["b/_old"], "--out", "x")

    def test_results_of_other_weights_and_damaged_ones_are_refused(self):
        path = self.runs({"run": {}})["run"]
        with open(os.path.join(path, "weights.pt"), "ab") as f:
            f.write(b"trained further")
        self.assertRefused(
            1, "was measured on other weights than", seeds.main, path, "--out", path + "x"
        )
        model.save({"meta": {}, "claims": {}}, os.path.join(path, "figures", "results.json"))
        self.assertRefused(
            1, "is not as the two commands write it", seeds.main, path, "--out", path + "x"
        )
        self.assertRefused(1, "there is no result", seeds.main, path + "y", "--out", path + "x")
        self.assertFalse(os.path.exists(path + "x"))


class Committed(TestCase):
    def test_committed_results_are_those_of_the_shipped_weights(self):
        results = model.load_file(os.path.join(HERE, "figures", "mechanism.json"), "JSON")[0]
        self.assertEqual(
            results["meta"]["sha256"], model.load_weights(f"{SHIPPED}/weights.pt").sha256
        )
        values = results["claims"]["scalar_transformer"]["values"]
        self.assertClose(scalars.traces(shipped()), torch.tensor(values["kappa"]), 1e-4)
        x = symmetry.kinds(shipped())["recurrences"][0][:2]
        self.assertEqual(symmetry.closed_forms(shipped().model, x).shape, x.shape)

    def test_all_committed_runs_were_measured_by_the_rules_of_today(self):
        together = model.load_file(os.path.join(HERE, "figures", "seeds.json"), "JSON")[0]["runs"]
        claims = analyze.PAPER.claims | filter.OURS.claims
        for run, found in together.items():
            for name, of_run in found["claims"].items():
                self.assertEqual(
                    of_run["why"], " ".join(claims[name].function.__doc__.split()), (run, name)
                )
        ours = model.load_file(os.path.join(HERE, "figures", "mechanism.json"), "JSON")[0]["claims"]
        for name, found in ours.items():
            self.assertEqual(
                found["measured"], together["weights"]["claims"][name]["measured"], name
            )

    def test_the_table_of_findings_is_that_of_the_committed_runs(self):
        together = model.load_file(os.path.join(HERE, "figures", "seeds.json"), "JSON")[0]["runs"]
        text = read(os.path.join(os.path.dirname(HERE), "FINDINGS.md")).decode()
        table = text.split("| --- |", 1)[1].split("\n\n")[0]
        rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
        names = [row[0].split("`")[1] for row in rows]
        self.assertEqual(names, list(seeds.claims_of(together, of_paper=True)))
        for column, heading in ((3, "relu"), (4, "gelu_new")):
            group = [found for found in together.values() if seeds.heading(found) == heading]
            self.assertGreaterEqual(len(group), 2)
            for name, row in zip(names, rows):
                claims = [found["claims"][name] for found in group]
                self.assertEqual(row[column], self.over(claims), (name, heading))
                verdicts = [seeds.WORDS[claim["verdict"]] for claim in claims]
                counts = {word: verdicts.count(word) for word in seeds.WORDS.values()}
                counted = [f"{count} {word}" for word, count in counts.items() if count]
                expected = verdicts[0] if len(counted) == 1 else ", ".join(counted)
                self.assertEqual(row[column + 2], expected, (name, heading))

    def over(self, claims: list[dict]) -> str:
        """What was measured over runs, as in the table: a range of numbers or of counts of heads."""
        heads = [claim["values"].get("heads that do") for claim in claims]
        numbers = [claim["measured"] for claim in claims] if None in heads else heads
        if any(isinstance(number, list) for number in numbers):
            return "-"
        ends = dict.fromkeys(f"{number:.3g}" for number in (min(numbers), max(numbers)))
        return " to ".join(ends) + ("" if None in heads else " of 8")

    def test_every_claim_has_a_figure_that_is_drawn_wherever_it_is_measured(self):
        for claim in filter.OURS.claims.values():
            self.assertIn(claim.figure, filter.OURS.figures)
        self.assertTrue(command_of_beyond.__doc__)

    def test_bad_command_lines_are_refused_in_one_line(self):
        self.assertRefused(2, "there is no figure 27", command_of_beyond.main, "--fig", "27")


if __name__ == "__main__":
    unittest.main()
