"""What beyond/ relies on. `python -m unittest test_all` runs these too."""

import functools
import os
import unittest
from unittest import mock

import torch
import torch.nn.functional as F

import analyze
import beyond.gain as gain
import beyond.mechanism as mechanism
import beyond.recurrences as recurrences
import beyond.seeds as seeds
import data
import model
import train
from test_all import SHIPPED, TestCase, command, seeded

HERE = os.path.dirname(os.path.abspath(__file__))


def scalar_model() -> model.Transformer:
    """A float64 model whose maps between data vectors are multiples of I, with attention as it comes.

    Data come in on dimensions 0 to 4 of the stream and are written to 5 to 9; the rest holds the position.
    Each MLP copies what it reads there, times a slope, by pairs of ReLUs.
    """
    config = model.Config(d_vocab=5, d_model=16, d_head=8, d_mlp=10, n_heads=2, n_layers=3, n_ctx=16,
                          initializer_range=0.4)
    net = model.fold(model.Transformer(config, seeded()).double()).requires_grad_(False)
    basis = torch.linalg.svd(torch.ones(1, 16).double())[2][1:]  # what a LayerNorm leaves alone
    read, write, rest = basis[:5], basis[5:10], basis[10:]
    net.embed.W_E.copy_(read), net.unembed.W_U.copy_(write.T), net.unembed.b_U.zero_()
    net.pos_embed.W_pos.copy_(torch.randn(16, 5, generator=seeded(1), dtype=torch.double) @ rest)
    for l, block in enumerate(net.blocks):
        attn, mlp = block.attn, block.mlp
        for parameter in (attn.W_V, attn.W_O, attn.b_O, mlp.W_in, mlp.b_in, mlp.W_out, mlp.b_out):
            parameter.zero_()
        for head in range(2):
            attn.W_V[head, :, :5] = (read if l == 0 else write).T
            attn.W_O[head, :5] = (0.3 + head - l) * write
        mlp.W_in[:, :5], mlp.W_in[:, 5:] = write.T, -write.T
        mlp.W_out[:5], mlp.W_out[5:] = (1 - 0.4 * l) * write, -(1 - 0.4 * l) * write
    return net


@functools.cache
def shipped() -> analyze.Study:
    """The study of the weights that ship, on fewer sequences and once for all tests."""
    with mock.patch.object(analyze, "POPULATION", 200):
        return analyze.open_study(SHIPPED)


class Filter(TestCase):
    def test_it_is_the_best_on_what_it_is_fitted_to_and_has_the_parity_of_n_plus_1(self):
        K = mechanism.fixed_filter(40)
        a = data.sample(500, 14, seeded(3), dtype=torch.double).a
        n = 13
        error = lambda row: (row @ a[:, :-1] - a[:, n + 1]).pow(2).mean()
        for step in torch.randn(5, 14, generator=seeded(), dtype=torch.double):
            self.assertLess(error(K[n]), error(K[n] + 0.05 * step))
        self.assertClose(K.sum(1)[6:], 1, 0.05)
        c = torch.tensor([-1.8, -1.2, 1.2, 1.8]).double()
        A, B = mechanism.strides(K.expand(4, -1, -1), c)
        self.assertClose(B[:, 8:], 0, 0.02)
        self.assertClose(A[:, 8:], 1, 0.25)
        self.assertEqual(torch.equal(K.triu(1), torch.zeros_like(K)), True)

    def test_a_fitted_filter_finds_a_filter_from_the_other_half_alone(self):
        x, K = torch.randn(20, 6, 40, generator=seeded()), torch.randn(6, 6, generator=seeded(1)).tril()
        self.assertClose(mechanism.fitted_filter(x, K @ x), K @ x, 1e-4)
        changed = K @ x
        changed[:10] = 0  # what a half says must not reach its own predictions
        self.assertClose(mechanism.fitted_filter(x, changed)[:10], (K @ x)[:10], 1e-4)
        self.assertClose(mechanism.fitted_filter(x, changed)[10:], 0, 1e-6)

    def test_strides_of_a_two_step_and_a_one_step_rule(self):
        c, w = torch.tensor([1.5]).double(), torch.zeros(1, 9, 9).double()
        w[:, 6, 5], w[:, 7, 7] = c**2, c
        A, B = mechanism.strides(w, c)
        found = torch.stack([A[0, 6], B[0, 6], A[0, 7], B[0, 7]])
        self.assertClose(found, torch.tensor([1.0, 0, 0, 1]), 1e-9)


    def test_parity_is_of_a_rule_of_two_steps_that_does_not_see_the_sign(self):
        study = shipped()
        c = torch.tensor([-2, -1.5, -1, 1, 1.5, 2]).double()
        one, two, none = (torch.diag_embed(torch.ones(14 - lag), -lag).double() for lag in (0, 1, 2))
        powers = c[:, None, None, None]
        rules = {"reproduced": powers**2 * two,
                 "partly": powers**2 * two + powers * one - powers**3 * none,  # what it adds cancels
                 "not reproduced": powers * one}
        for expected, w in rules.items():
            weights = mechanism.Weights(c, w.expand(-1, 2, -1, -1), None, None, None, None)
            with mock.patch.object(mechanism, "read_weights", return_value=weights):
                self.assertEqual(mechanism.claim_parity(study).verdict, expected)


class SourceWeights(TestCase):
    def test_source_weights_of_predictors_whose_weights_are_known(self):
        for c in (-1.5, 0.7):
            u, fixed = torch.randn(2, 3, 1, 40, generator=seeded(), dtype=torch.double)
            x = fixed + c ** torch.arange(9)[:, None].double() * u
            v = mechanism.off_plane(x, seeded(5))
            self.assertClose(torch.einsum("bv,bpv->bp", v, x), 0, 1e-9)
            linear = lambda x: 2 * x - 3 * F.pad(x, (0, 0, 1, 0))[:, :-1]
            solver = lambda x: F.pad(data.solve_recurrence(x), (0, 0, 2, 0))
            for predict, expected in ((linear, {6: 2, 5: -3}),
                                      (solver, {6: c + 0.5, 5: 0.5 - c / 2, 4: -c / 2})):
                wanted = torch.tensor([float(expected.get(s, 0)) for s in range(9)]).double()
                w = mechanism.source_weights(predict, x, v)
                self.assertClose(w[:, 6], wanted.expand(3, -1), 1e-7)


class ScalarTransformer(TestCase):
    def test_it_is_exact_where_every_map_is_a_multiple_of_I(self):
        net = scalar_model()
        self.assertClose(net.embed.W_E @ net.unembed.W_U, 0, 1e-12)
        ov = torch.stack([model.data_ov_circuit(net, l) for l in range(3)])
        kappa = ov.diagonal(dim1=-2, dim2=-1).mean(-1)
        self.assertClose(ov, kappa[..., None, None] * torch.eye(5), 1e-12)
        x = data.sample(20, 9, seeded(), 5, dtype=torch.double).a[:, :-1]
        cache: dict = {}
        output = net(x, cache=cache)
        slopes = 1 - 0.4 * torch.arange(3).double()
        ours = mechanism.scalar_transformer(cache, kappa, slopes, x)
        self.assertClose(ours, output, 1e-10)
        self.assertGreater((output - output.mean(0)).abs().max(), 0.1)
        rows = mechanism.worked_pass(cache, kappa, slopes, 8)
        self.assertClose(rows["divided by ln_final"] @ x[0], output[0, 8], 1e-10)
        self.assertEqual(len(rows), 7)

    def test_the_trained_model_turns_with_its_inputs_as_far_as_the_claim_says(self):
        study = shipped()
        turn = torch.linalg.qr(torch.randn(40, 40, generator=seeded()))[0]
        x = study.test.a[:200, :-1]
        turned, output = study.model(x @ turn), study.model(x) @ turn
        self.assertGreater(data.explained(turned[:, 4:], output[:, 4:]), 0.99)
        x = torch.randn(50, 14, 40, generator=seeded()) / 4
        turned, output = study.model(x @ turn), study.model(x) @ turn
        self.assertGreater(data.explained(turned[:, 4:], output[:, 4:]), 0.97)

    def test_half_way_to_the_model_explains_three_quarters_of_its_error(self):
        study = shipped()
        x, truth = mechanism.kinds(study)["white noise"]
        output, half = study.model(x), (study.model(x) + truth) / 2
        with mock.patch.object(mechanism, "predictions", return_value={"half": half, "model's": output}):
            found = mechanism.scores.__wrapped__(study, "white noise")
        self.assertClose(torch.tensor(found["half"][1]), 0.75, 1e-4)  # half as far off: a quarter is left
        self.assertClose(torch.tensor(found["model's"]), 1, 1e-6)

    def test_a_kind_is_evidence_only_where_every_rival_leaves_four_times_as_much(self):
        study, rivals = shipped(), mechanism.LESS

        def judge(left: dict[str, float], strong: str = "", ours: float = 0.99, error: float = 0.95) -> str:
            """The verdict where rivals leave 0.03, or `left` on these kinds but for a `strong` one."""
            def scores(_, kind):
                shares = dict.fromkeys(rivals, [1 - left.get(kind, 0.03)]) | {strong: [0.97]}
                return shares | {"scalar transformer": [ours, error]}
            with mock.patch.object(mechanism, "scores", scores):
                return mechanism.claim_scalar_transformer(study).verdict

        predictors = {"scalar transformer", "without layer 1", *rivals}  # all but these two are rivals
        self.assertEqual(set(mechanism.predictions(study, "4 inputs")), predictors)
        two = {"white noise": 0.05, "noise 0.1": 0.05}
        self.assertEqual(judge(two), "reproduced")
        self.assertEqual(judge({"white noise": 0.05}), "partly")
        self.assertEqual(judge({"two growths": 0.05, "noise 0.1": 0.05}), "partly")
        self.assertEqual(judge({"recurrences": 0.05, "4 inputs": 0.05}), "not reproduced")
        self.assertEqual(judge({kind: 0.2 for kind in two}, ours=0.96), "not reproduced")
        self.assertEqual(judge(two, error=0.89), "not reproduced")
        for name in rivals:
            self.assertEqual(judge(two, strong=name), "not reproduced", name)

    def test_kinds_are_what_their_names_say(self):
        found = mechanism.kinds(shipped())
        for kind, (x, target) in found.items():
            longest = x.norm(dim=-1).amax(1)
            if "noise 0" not in kind:
                self.assertTrue(((longest > 1 - 1e-4) & (longest < 2 + 1e-4)).all(), kind)
                self.assertTrue(torch.equal(x[:, 1:], target[:, :-1]), kind)
        solved = {kind: data.solve_recurrence(x.double()) for kind, (x, _) in found.items()}
        off = {kind: (solved[kind] - target[:, 2:]).abs().max().item() for kind, (_, target) in found.items()}
        self.assertLess(max(off["recurrences"], off["|c| 2.5 to 3"], off["4 inputs"]), 1e-4)
        self.assertGreater(min(off["two growths"], off["white noise"]), 0.1)

    def test_scalars_put_in_change_nothing_where_they_are_what_the_model_has(self):
        net = scalar_model()
        study = mock.Mock(model=net, layers=range(3), heads=range(2))
        x = data.sample(20, 9, seeded(), 5, dtype=torch.double).a[:, :-1]
        for l in range(3):
            kappa = model.data_ov_circuit(net, l).diagonal(dim1=-2, dim2=-1).mean(-1)
            with mock.patch.object(torch, "eye", lambda n, eye=torch.eye: eye(n).double()):
                same, none = (gain.put_scalars(study, l, numbers) for numbers in (kappa, 0 * kappa))
            self.assertClose(net(x, hooks=same), net(x), 1e-10)
            self.assertGreater((net(x, hooks=none) - net(x)).abs().max(), 1e-3)
        kappa, cache = model.data_ov_circuit(net, 0).diagonal(dim1=-2, dim2=-1).mean(-1), {}
        net(x, cache=cache)
        slopes = mock.patch.object(gain, "scalars", return_value=(None, 1 - 0.4 * torch.arange(3).double()))
        with slopes, mock.patch.object(gain, "look", return_value=cache):
            same, none = (gain.put_layer_0(study, x, numbers) for numbers in (kappa, 0 * kappa))
        self.assertClose(net(x, hooks=same), net(x), 1e-10)
        self.assertGreater((net(x, hooks=none) - net(x)).abs().max(), 1e-3)


class Gain(TestCase):
    def test_kept_and_removed_directions_add_up(self):
        value = torch.randn(4, 6, 12, generator=seeded(), dtype=torch.double)
        directions = torch.linalg.qr(torch.randn(12, 2, generator=seeded(1), dtype=torch.double))[0].T
        kept = gain.keep_directions("x", value.mean(0), directions)["x"](value)
        removed = gain.remove_directions("x", value.mean(0), directions)["x"](value)
        self.assertClose(kept + removed, value + value.mean(0), 1e-12)
        self.assertClose((removed - value.mean(0)) @ directions.T, 0, 1e-12)

    def test_all_follows_a_whole_stream_and_nothing_what_comes_too_late(self):
        study, ranges = analyze.open_study(SHIPPED), ((0.3, 0.5), (1.6, 1.9))
        with mock.patch.object(gain, "L1_Z", "blocks.1.hook_resid_post"):  # so that it is recorded
            whole = gain.follows(study, [gain.L1_Z], list(range(14)), [], *ranges)
        self.assertClose(torch.tensor(whole), 1, 1e-4)
        late = gain.follows(study, [gain.L1_K, gain.L1_V], list(range(13)), [13], *ranges)
        self.assertClose(torch.tensor(late), 0, 1e-4)

    def test_what_sizes_predict_is_all_of_sizes_and_nothing_of_noise(self):
        study = analyze.open_study(SHIPPED)
        sizes = [s.a[:, :-1].norm(dim=-1, keepdim=True).log() for s in (study.population, study.test)]
        self.assertGreater(gain.predicted_by_sizes(study, *sizes), 0.999)
        noise = [torch.randn(1000, 14, 1, generator=seeded(i)) for i in range(2)]
        self.assertLess(gain.predicted_by_sizes(study, *noise), 0.02)


class Recurrences(TestCase):
    OTHERS = ("linear-2", "linear-3", "polynomial-1", "polynomial-2", "polynomial-3", "quadratic")

    def test_solvers_are_exact_where_the_next_vector_is_determined(self):
        for name in ("affine", *self.OTHERS):
            task = data.find_task(name)
            for length in (task.first + 1, 14):
                a = data.sample(200, length, seeded(), task=name, dtype=torch.float64).a
                with self.subTest(name, length=length):
                    self.assertClose(task.solve(a[:, :-1]), a[:, task.first + 1 :], 1e-9)
                    longest = a[:, :-1].norm(dim=-1).amax(1)
                    self.assertTrue(((longest > 1 - 1e-9) & (longest < 2 + 1e-9)).all())

    def test_sequences_obey_their_recurrence(self):
        for K in (1, 2, 3):
            a = data.sample(20, 10, seeded(), task=f"polynomial-{K}", dtype=torch.float64).a
            self.assertClose(a.diff(n=K + 1, dim=1), 0, 1e-12)
        for K in (2, 3):
            a, c, d = data.sample(50, 12, seeded(), task=f"linear-{K}", dtype=torch.float64)
            expected = sum(c[:, i, None, None] * a[:, K - 1 - i : -1 - i] for i in range(K)) + d[:, None]
            self.assertClose(a[:, K:], expected, 1e-9)

    def test_a_task_trains_from_its_first_position_on_resumes_and_is_compared(self):
        out = os.path.join(self.folder(), "linear")
        small = ["--d-mlp", "16", "--eval-every", "2", "--device", "cpu", "--out", out]
        with mock.patch.object(train, "HELD_OUT_PER_LENGTH", 2), mock.patch.object(recurrences, "TESTED", 20):
            for more in (["--steps", "2"], ["--steps", "4", "--resume"]):
                status, _, err = command(recurrences.main, "train", "linear-2", *more, *small)
                self.assertEqual(status, 0, err)
            config = model.load_file(os.path.join(out, "config.json"), "JSON")[0]
            self.assertEqual((config["task"], config["loss_from"], config["steps"]), ("linear-2", 3, 4))
            status, _, err = command(recurrences.main, "compare", out, "--out", os.path.join(out, "c"))
        self.assertEqual(status, 0, err)
        found = model.load_file(os.path.join(out, "c", "recurrences.json"), "JSON")[0]
        self.assertEqual([run["task"] for run in found.values()], ["linear-2"])
        for status, says, arguments in ((2, "invalid choice", ["train", "nonsense"]), (2, "required", []),
                                        (1, "no weights file", ["compare", out + "x"])):
            got, _, err = command(recurrences.main, *arguments)
            self.assertEqual((got, len(err.strip().splitlines())), (status, 1), err)
            self.assertIn(says, err)


class Seeds(TestCase):
    def test_runs_are_set_beside_one_another_by_setting(self):
        folder, shipped = self.folder(), os.path.join(os.path.dirname(HERE), "figures", "results.json")
        found = model.load_file(shipped, "JSON")[0]
        for name, act_fn in (("relu_1", "relu"), ("gelu_1", "gelu_new")):
            os.makedirs(os.path.join(folder, name, "figures"))
            config = found["meta"]["config"] | {"act_fn": act_fn}
            changed = found | {"meta": found["meta"] | {"config": config}}
            model.save(changed, os.path.join(folder, name, "figures", "results.json"))
        runs = [SHIPPED, *(os.path.join(folder, name) for name in ("relu_1", "gelu_1"))]
        with mock.patch.object(analyze.Figure, "savefig"):
            status, _, err = command(seeds.main, *runs, "--out", os.path.join(folder, "out"))
        self.assertEqual(status, 0, err)
        together = model.load_file(os.path.join(folder, "out", "seeds.json"), "JSON")[0]["runs"]
        self.assertEqual(len(together), 3)
        self.assertEqual({len(group) for group in seeds.by_setting(together).values()}, {2, 1})
        got, _, err = command(seeds.main, os.path.join(folder, "none"), "--out", os.path.join(folder, "out"))
        self.assertEqual((got, len(err.strip().splitlines())), (1, 1), err)


class Committed(TestCase):
    def test_committed_results_are_those_of_the_shipped_weights(self):
        results = model.load_file(os.path.join(HERE, "figures", "mechanism.json"), "JSON")[0]
        study = shipped()
        self.assertEqual(results["meta"]["sha256"], model.load_weights(f"{SHIPPED}/weights.pt").sha256)
        for name, found in results["claims"].items():
            self.assertEqual(found["why"], " ".join(mechanism.OURS.claims[name].function.__doc__.split()))
        kappa, slopes = mechanism.scalars(study)
        values = results["claims"]["scalar_transformer"]["values"]
        self.assertClose(kappa, torch.tensor(values["kappa"]), 1e-4)
        self.assertClose(slopes, torch.tensor(values["slopes of the MLPs"]), 0.05)
        together = model.load_file(os.path.join(HERE, "figures", "seeds.json"), "JSON")[0]["runs"]
        ours = together["weights"]["claims"]
        for name, found in results["claims"].items():
            self.assertEqual(found["measured"], ours[name]["measured"])

    def test_all_committed_runs_were_measured_by_the_rules_of_today(self):
        together = model.load_file(os.path.join(HERE, "figures", "seeds.json"), "JSON")[0]["runs"]
        claims = analyze.PAPER.claims | mechanism.OURS.claims
        for run, found in together.items():
            for name, of_run in found["claims"].items():
                self.assertEqual(of_run["why"], " ".join(claims[name].function.__doc__.split()), (run, name))

    def test_the_readme_shows_the_committed_seeds(self):
        together = model.load_file(os.path.join(HERE, "figures", "seeds.json"), "JSON")[0]["runs"]
        settings = seeds.by_setting(together)
        groups = list(settings.values())
        with open(os.path.join(os.path.dirname(HERE), "README.md"), encoding="utf-8") as f:
            lines = [line.strip(" |\n").split(" | ") for line in f if line.startswith("| ")]
        names = [name.split(",")[0].removesuffix("_new") for name in settings]
        self.assertEqual([cell.lower() for cell in lines[0][2:4]], names)
        rows = [line for line in lines if line[0].startswith("`")]
        shown = {row[0].split("`")[1]: row[2:] for row in rows}
        self.assertEqual(set(shown), set(seeds.claim_names(together, of_paper=True)))
        for name, cells in shown.items():
            expected = [f(group, name) for f in (seeds.cell, seeds.words) for group in groups]
            self.assertEqual(cells, expected, name)

    def test_every_claim_has_a_figure_that_is_drawn_wherever_it_is_measured(self):
        self.assertEqual(sorted(mechanism.OURS.figures), list(range(19, 27)))
        for name, claim in mechanism.OURS.claims.items():
            self.assertLessEqual(mechanism.OURS.figures[claim.figure].layers, max(claim.layers, 3), name)


if __name__ == "__main__":
    unittest.main()
