"""The properties that the rest of the project relies on.

    python -m unittest test_all                     # under a minute
    python -m unittest test_all.Folding             # one group

Small models and few sequences, except where the shipped weights themselves are what is tested.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import torch

import analyze
import data
import interventions
import model
import train

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = model.Config(d_vocab=5, d_model=12, d_head=4, d_mlp=20, n_heads=3, n_layers=2, n_ctx=8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(config: model.Config = SMALL, dtype=torch.float64) -> model.Transformer:
    """A model in which no bias is 0 and no LayerNorm is the identity, as after training."""
    transformer = model.Transformer(config, seeded()).to(dtype).requires_grad_(False)
    for parameter in transformer.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(parameter.numel()), dtype=dtype)
    return transformer


def random_input(config: model.Config = SMALL, batch: int = 4, positions: int = 6, dtype=torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, positions, config.d_vocab, generator=seeded(seed), dtype=dtype)


def reference(state: dict, x: torch.Tensor, config: model.Config, edit: dict) -> torch.Tensor:
    """The equations of appendix A.1, one sequence and one head at a time; `edit` changes values at named points."""

    def at(name, value):
        return edit[name](value[None])[0] if name in edit else value

    def layer_norm(name, v):
        v = v - v.mean(-1, keepdim=True)
        v = v / at(f"{name}.hook_scale", ((v**2).mean(-1, keepdim=True) + config.eps) ** 0.5)
        return at(f"{name}.hook_normalized", v * state[f"{name}.w"] + state[f"{name}.b"])

    outputs = []
    for vectors in x:
        n = len(vectors)
        v = at("hook_embed", vectors @ state["embed.W_E"]) + at("hook_pos_embed", state["pos_embed.W_pos"][:n])
        for l in range(config.n_layers):
            block = f"blocks.{l}"
            p = {name: state[f"{block}.attn.{name}"] for name in ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O")}
            v = at(f"{block}.hook_resid_pre", v)
            u = layer_norm(f"{block}.ln1", v)
            q, k, value = (
                at(f"{block}.attn.hook_{s.lower()}", torch.stack([u @ p[f"W_{s}"][h] + p[f"b_{s}"][h] for h in range(config.n_heads)], 1))
                for s in "QKV"
            )
            scores = torch.full((config.n_heads, n, n), -torch.inf, dtype=x.dtype)
            for h in range(config.n_heads):
                for d in range(n):
                    for s in range(d + 1):
                        scores[h, d, s] = q[d, h] @ k[s, h] / config.d_head**0.5
            scores = at(f"{block}.attn.hook_attn_scores", scores)
            pattern = at(f"{block}.attn.hook_pattern", scores.exp() / scores.exp().sum(-1, keepdim=True))
            z = at(f"{block}.attn.hook_z", torch.stack([pattern[h] @ value[:, h] for h in range(config.n_heads)], 1))
            result = at(f"{block}.attn.hook_result", torch.stack([z[:, h] @ p["W_O"][h] for h in range(config.n_heads)], 1))
            v = at(f"{block}.hook_resid_mid", v + at(f"{block}.hook_attn_out", result.sum(1) + p["b_O"]))
            pre = at(f"{block}.mlp.hook_pre", layer_norm(f"{block}.ln2", v) @ state[f"{block}.mlp.W_in"] + state[f"{block}.mlp.b_in"])
            post = at(f"{block}.mlp.hook_post", pre.clamp(min=0))
            v = at(
                f"{block}.hook_resid_post",
                v + at(f"{block}.hook_mlp_out", post @ state[f"{block}.mlp.W_out"] + state[f"{block}.mlp.b_out"]),
            )
        outputs.append(layer_norm("ln_final", v) @ state["unembed.W_U"] + state["unembed.b_U"])
    return torch.stack(outputs)


def command(main, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command line, without a new process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [f"{main.__module__}.py", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):  # what Python does with a message: print it, and exit with 1
                print(status, file=sys.stderr)
                status = 1
    return status or 0, out.getvalue(), err.getvalue()


def read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


class TestCase(unittest.TestCase):
    def assertClose(self, a, b, tolerance):
        self.assertLess((torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item(), tolerance)

    def folder(self) -> str:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return folder.name

    def assertRefused(self, status: int, says: str, main, *arguments: str):
        """The command ends with `status` and one line on standard error that contains `says`."""
        got, _, err = command(main, *arguments)
        self.assertEqual((got, len(err.strip().splitlines())), (status, 1), err)
        self.assertIn(says, err)


class Data(TestCase):
    def test_sequences_are_affine_recurrences_with_the_c_and_d_they_carry(self):
        for length in (1, 3, 14, 32):
            s = data.sample(200, length, seeded(length))
            self.assertEqual(s.a.shape, (200, length + 1, 40))
            largest = s.a.abs().amax((1, 2), keepdim=True)
            self.assertClose((s.a[:, 1:] - (s.c[:, None, None] * s.a[:, :-1] + s.d[:, None])) / largest, 0, 2e-6)

    def test_largest_input_norm_is_uniform_between_1_and_2_and_the_last_target_is_not_counted(self):
        s = data.sample(4000, 14, seeded())
        norms = s.a.norm(dim=-1)
        largest = norms[:, :-1].amax(1)
        self.assertTrue(((largest > 1 - 1e-5) & (largest < 2 + 1e-5)).all())
        self.assertAlmostEqual(largest.mean().item(), 1.5, delta=0.03)
        self.assertTrue((norms[:, -1] > 2).any())

    def test_first_vector_and_d_are_independent_and_equally_large(self):
        s = data.sample(4000, 5, seeded())
        a_0, d = s.a[:, 0] / s.d.norm(dim=-1, keepdim=True), s.d / s.d.norm(dim=-1, keepdim=True)  # the common scale drops out
        self.assertAlmostEqual((a_0**2).mean().item() / (d**2).mean().item(), 1, delta=0.05)
        self.assertAlmostEqual((a_0 * d).mean().item() / (d**2).mean().item(), 0, delta=0.02)

    def test_c_is_uniform_and_ranges_can_be_chosen(self):
        c = data.sample(4000, 3, seeded()).c
        self.assertAlmostEqual(c.std().item(), 4 / 12**0.5, delta=0.03)
        c = data.sample(1000, 3, seeded(), c_range=(-1.1, -0.9)).c
        self.assertTrue(((c >= -1.1) & (c <= -0.9)).all())

    def test_a_generator_decides_the_sample(self):
        self.assertTrue(torch.equal(data.sample(8, 5, seeded(3)).a, data.sample(8, 5, seeded(3)).a))
        self.assertFalse(torch.equal(data.sample(8, 5, seeded(3)).a, data.sample(8, 5, seeded(4)).a))

    def test_lengths_that_the_model_has_no_positions_for_are_refused(self):
        for length in (0, -1, 33):
            with self.assertRaisesRegex(ValueError, "between 1 and n_ctx = 32"):
                data.sample(4, length, seeded())
        with self.assertRaisesRegex(ValueError, "batch"):
            data.sample(0, 5, seeded())

    def test_held_out_set_is_fixed_and_has_every_length(self):
        first, second = data.held_out(2), data.held_out(2)
        self.assertEqual([s.a.shape[1] - 1 for s in first], list(range(3, 15)))
        self.assertTrue(all(torch.equal(s.a, t.a) for s, t in zip(first, second)))

    def test_mse_is_that_of_a_3_and_later(self):
        target = data.sample(6, 5, seeded()).a[:, 1:]
        wrong = target.clone()
        wrong[:, :2] = 100.0  # a_1 and a_2
        self.assertEqual(data.mse(wrong, target).item(), 0)
        wrong[:, 2] += 3.0  # a_3: one of three positions
        self.assertAlmostEqual(data.mse(wrong, target).item(), 3.0, places=5)
        self.assertClose(analyze.squared_errors(wrong, target).mean(), data.mse(wrong, target), 1e-5)
        with self.assertRaises(ValueError):
            data.mse(target[:, :2], target[:, :2])


class Model(TestCase):
    def test_outputs_are_those_of_the_papers_equations(self):
        transformer, x = random_model(), random_input()
        expected = reference(transformer.state_dict(), x, SMALL, {})
        self.assertClose(transformer(x), expected, 1e-10)
        self.assertClose(transformer(x, cache={}), expected, 1e-10)

    def test_every_hook_point_replaces_what_it_names(self):
        transformer, x = random_model(), random_input()
        plain = transformer(x)
        for name in transformer.hook_names:
            with self.subTest(name):
                # Uneven over the last dimension, since a LayerNorm would not notice a constant; -inf stays -inf.
                change = {name: lambda value: 1.2 * value + 0.1 * torch.linspace(1, 2, value.shape[-1], dtype=value.dtype)}
                cache, before = {}, {}
                changed = transformer(x, hooks=change)
                self.assertClose(changed, reference(transformer.state_dict(), x, SMALL, change), 1e-9)
                self.assertGreater((changed - plain).abs().max(), 1e-4)
                self.assertClose(transformer(x, hooks=change, cache=cache), changed, 1e-10)
                transformer(x, cache=before)
                seen = change[name](before[name])
                finite = seen.isfinite()
                self.assertClose(cache[name][finite], seen[finite], 1e-10)

    def test_cache_has_every_hook_point_in_order_and_in_transformer_lens_shapes(self):
        transformer, cache = random_model(), {}
        transformer(random_input(), cache=cache)
        self.assertEqual(sorted(cache), sorted(transformer.hook_names))
        b, p, h, d, e, m = 4, 6, SMALL.n_heads, SMALL.d_model, SMALL.d_head, SMALL.d_mlp
        shapes = {
            "hook_embed": (b, p, d),
            "hook_pos_embed": (b, p, d),
            "blocks.1.hook_resid_pre": (b, p, d),
            "blocks.1.ln1.hook_scale": (b, p, 1),
            "blocks.1.ln1.hook_normalized": (b, p, d),
        }
        shapes |= {f"blocks.1.attn.hook_{n}": (b, p, h, e) for n in "qkvz"} | {
            f"blocks.1.attn.hook_{n}": (b, h, p, p) for n in ("attn_scores", "pattern")
        }
        shapes |= {
            "blocks.1.attn.hook_result": (b, p, h, d),
            "blocks.1.hook_attn_out": (b, p, d),
            "blocks.1.hook_resid_mid": (b, p, d),
            "blocks.1.mlp.hook_pre": (b, p, m),
            "blocks.1.mlp.hook_post": (b, p, m),
        }
        shapes |= {
            "blocks.1.hook_mlp_out": (b, p, d),
            "blocks.1.hook_resid_post": (b, p, d),
            "ln_final.hook_scale": (b, p, 1),
            "ln_final.hook_normalized": (b, p, d),
        }
        self.assertEqual({name: tuple(cache[name].shape) for name in shapes}, shapes)

    def test_parameters_have_transformer_lens_names_and_shapes(self):
        shapes = {name: tuple(value.shape) for name, value in model.Transformer(generator=seeded()).state_dict().items()}
        expected = {
            "embed.W_E": (40, 128),
            "pos_embed.W_pos": (32, 128),
            "ln_final.w": (128,),
            "ln_final.b": (128,),
            "unembed.W_U": (128, 40),
            "unembed.b_U": (40,),
        }
        for l in range(3):
            expected |= {f"blocks.{l}.{ln}.{p}": (128,) for ln in ("ln1", "ln2") for p in "wb"}
            expected |= {f"blocks.{l}.attn.W_{n}": (8, 128, 64) for n in "QKV"} | {f"blocks.{l}.attn.b_{n}": (8, 64) for n in "QKV"}
            expected |= {f"blocks.{l}.attn.W_O": (8, 64, 128), f"blocks.{l}.attn.b_O": (128,)}
            expected |= {
                f"blocks.{l}.mlp.W_in": (128, 3072),
                f"blocks.{l}.mlp.b_in": (3072,),
                f"blocks.{l}.mlp.W_out": (3072, 128),
                f"blocks.{l}.mlp.b_out": (128,),
            }
        self.assertEqual(shapes, expected)

    def test_initial_weights_have_the_standard_deviation_of_the_specification(self):
        for name, value in model.Transformer(generator=seeded()).state_dict().items():
            kind = name.split(".")[-1]
            if kind.startswith("W_"):
                self.assertAlmostEqual(value.std().item(), 0.8 / 128**0.5, delta=0.003, msg=name)
                self.assertAlmostEqual(value.mean().item(), 0, delta=0.004, msg=name)
            else:
                self.assertTrue((value == (1 if kind == "w" else 0)).all(), name)

    def test_attention_is_causal(self):
        transformer, x = random_model(), random_input()
        changed = x.clone()
        changed[:, 4] += 1
        for cache in (None, {}):
            self.assertClose(transformer(changed, cache=cache)[:, :4], transformer(x, cache=cache)[:, :4], 1e-12)
            self.assertGreater((transformer(changed) - transformer(x))[:, 4].abs().max(), 1e-3)

    def test_a_pass_can_start_at_any_layer(self):
        transformer, x, cache = random_model(), random_input(), {}
        y = transformer(x, cache=cache)
        for layer in range(SMALL.n_layers):
            self.assertClose(transformer.run_from(layer, cache[f"blocks.{layer}.hook_resid_pre"]), y, 1e-10)
        self.assertClose(transformer.run_from(SMALL.n_layers, cache["blocks.1.hook_resid_post"]), y, 1e-10)
        with self.assertRaisesRegex(ValueError, "between 0 and n_layers = 2"):
            transformer.run_from(3, cache["blocks.1.hook_resid_post"])

    def test_inputs_of_another_form_are_refused(self):
        transformer = model.Transformer(SMALL)
        for shape in ((4, 6, 7), (6, 5), (4, 9, 5), (4, 0, 5)):
            with self.assertRaisesRegex(ValueError, "x must be"):
                transformer(torch.zeros(shape))
        with self.assertRaisesRegex(ValueError, "no tokens"):
            transformer(torch.zeros(4, 6, 5, dtype=torch.long))

    def test_unknown_hooks_and_hooks_that_return_another_shape_are_refused(self):
        transformer, x = random_model(), random_input()
        with self.assertRaisesRegex(KeyError, "blocks.0.attn.hook_pattern"):
            transformer(x, hooks={"blocks.0.attn.hook_patern": lambda v: v})
        for returned in (None, torch.zeros(3)):
            with self.assertRaisesRegex(ValueError, "must return a tensor of shape"):
                transformer(x, hooks={"hook_embed": lambda v: returned})

    def test_sizes_below_1_are_refused(self):
        with self.assertRaisesRegex(ValueError, "n_heads"):
            model.Config(n_heads=0)


class Folding(TestCase):
    def test_folding_preserves_outputs(self):
        for config, dtype, tolerance in ((SMALL, torch.float64, 1e-10), (model.Config(), torch.float64, 1e-10)):
            transformer, x = random_model(config, dtype), random_input(config, dtype=dtype)
            self.assertClose(model.fold(transformer)(x), transformer(x), tolerance)
        shipped, x = model.load_weights(os.path.join(HERE, "weights", "weights.pt")), data.sample(50, 14, seeded()).a[:, :-1]
        self.assertClose(model.fold(shipped)(x), shipped(x), 1e-5)

    def test_folding_leaves_nothing_to_fold(self):
        folded = model.fold(random_model())
        for name, value in folded.state_dict().items():
            kind = name.split(".")[-1]
            if kind in ("w", "b", "b_V"):
                self.assertTrue((value == (1 if kind == "w" else 0)).all(), name)
            if kind in ("W_Q", "W_K", "W_V", "W_in", "W_U"):
                self.assertClose(value.mean(-2), 0, 1e-12)
            if kind in ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out"):
                self.assertClose(value.mean(-1), 0, 1e-12)

    def test_folding_changes_a_copy(self):
        transformer = random_model()
        before = {name: value.clone() for name, value in transformer.state_dict().items()}
        model.fold(transformer)
        self.assertTrue(all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items()))


class Files(TestCase):
    def test_weights_survive_a_round_trip_bit_for_bit(self):
        path, transformer = os.path.join(self.folder(), "weights.pt"), random_model(dtype=torch.float32)
        model.save_file(transformer.state_dict(), path)
        loaded = model.load_weights(path, SMALL)
        self.assertTrue(torch.equal(loaded(random_input(dtype=torch.float32)), transformer(random_input(dtype=torch.float32))))

    def test_files_that_are_no_weights_are_refused(self):
        path = os.path.join(self.folder(), "weights.pt")
        with self.assertRaises(FileNotFoundError):
            model.load_weights(path)
        state = random_model(dtype=torch.float32).state_dict()
        model.save_file(state, path)
        with self.assertRaisesRegex(ValueError, "lacks blocks.2"):
            model.load_weights(path)
        with self.assertRaisesRegex(ValueError, "written for another model: .* is .*, expected"):
            model.load_weights(path, model.Config(d_vocab=6, d_model=12, d_head=4, d_mlp=20, n_heads=3, n_layers=2, n_ctx=8))
        model.save_file(state | {"embed.W_E": torch.full((5, 12), torch.nan)}, path)
        with self.assertRaisesRegex(ValueError, "not finite"):
            model.load_weights(path, SMALL)
        model.save_file(state | {"extra": torch.zeros(1)}, path)
        with self.assertRaisesRegex(ValueError, "extra"):
            model.load_weights(path, SMALL)
        for garbage in (b"", b"garbage", b"PK\x03\x04 truncated"):
            with open(path, "wb") as f:
                f.write(garbage)
            with self.assertRaisesRegex(ValueError, "damaged or is no weights file"):
                model.load_weights(path, SMALL)

    def test_a_failed_save_leaves_the_old_file(self):
        folder = self.folder()
        path = os.path.join(folder, "weights.pt")
        model.save_file({"x": torch.ones(2)}, path)
        with self.assertRaises(Exception):
            model.save_file({"x": lambda: None}, path)  # cannot be pickled
        self.assertEqual(model.load_file(path, "file")["x"].tolist(), [1, 1])
        self.assertEqual(os.listdir(folder), ["weights.pt"])


class Training(TestCase):
    def setUp(self):
        threads = torch.get_num_threads()  # which train.main sets
        self.addCleanup(torch.set_num_threads, threads)

    def options(self, **changes) -> train.Options:
        settings = {"steps": 6, "batch_size": 2, "eval_every": 3, "device": "cpu", "out": os.path.join(self.folder(), "run")}
        return train.Options(**(settings | changes))

    def quietly(self, *runs: train.Run) -> bool:
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(train, "HELD_OUT_PER_LENGTH", 2):
            return train.train(list(runs))

    def test_a_step_is_adamw_on_the_papers_loss(self):
        run = train.Run(self.options(), model.Config(d_model=12, d_head=4, d_mlp=20, n_heads=3, n_layers=2))
        twin = train.Run(self.options(), run.model.config)
        length = torch.randint(3, 15, (), generator=twin.lengths).item()
        a = data.sample(2, length, twin.sequences).a
        twin_loss = ((twin.model(a[:, :-1]) - a[:, 1:])[:, 2:] ** 2).mean()
        twin_loss.backward()
        self.assertClose(run.train_step(), twin_loss.detach(), 1e-6)
        for (name, after), before in zip(run.model.named_parameters(), twin.model.parameters()):
            g = before.grad
            with self.subTest(name):  # the first step: both moments are those of g alone, bias-corrected to g and g^2
                expected = before * (1 - 1e-4 * 0.01) - 1e-4 * g / (g.abs() + 1e-8)
                self.assertClose(after.detach(), expected.detach(), 1e-7)

    def stack(self, seeds) -> tuple[list[train.Run], train.Stack]:
        runs = [train.Run(self.options(seed=seed), SMALL_TASK) for seed in seeds]
        return runs, train.Stack(runs)

    def test_a_stacked_step_is_a_step_of_each_run(self):
        runs, stack = self.stack((1, 2, 3))
        alone = [train.Run(run.options, SMALL_TASK) for run in runs]
        for length in (5, 14, 3):
            losses = stack.compute(length)
            self.assertClose(losses, torch.stack([run.compute(length) for run in alone]), 1e-6)
        stack.write_back()
        for a, b in zip(runs, alone):
            # AdamW divides by the gradient's size, so that rounding errors of tiny gradients show in the weights
            for p, q in zip(a.parameters, b.parameters):
                self.assertClose(p.detach(), q.detach(), 1e-4)
                self.assertClose(a.optimizer.state[p]["exp_avg"], b.optimizer.state[q]["exp_avg"], 1e-6)
                self.assertEqual(a.optimizer.state[p]["step"], 3)
        self.assertGreater((runs[0].parameters[0] - runs[1].parameters[0]).abs().max(), 0.01)

    def test_a_stack_goes_on_where_its_runs_stopped(self):
        runs, stack = self.stack((1, 2))
        for _ in range(3):
            stack.train_step()
        stack.write_back()
        for run in runs:
            self.assertTrue(torch.equal(run.lengths.get_state(), stack.lengths.get_state()))
            run.step = 3
            os.makedirs(run.options.out)
            run.save()
        again = train.Stack([train.open_run(run.options, resume=True, config=SMALL_TASK) for run in runs])
        for _ in range(3):
            self.assertTrue(torch.equal(stack.train_step(), again.train_step()))

    def test_stacked_runs_write_what_single_runs_write(self):
        runs = [train.open_run(self.options(seed=seed, snapshot_every=2), resume=False, config=SMALL_TASK) for seed in (1, 2)]
        self.assertTrue(self.quietly(*runs))
        for run in runs:
            self.assertEqual(sorted(os.listdir(run.options.out)), sorted(train.FILES))
            self.assertEqual([row[0] for row in analyze.read_log(os.path.join(run.options.out, "log.csv"))], [3, 6])
            loaded = model.load_weights(os.path.join(run.options.out, "weights.pt"), SMALL_TASK)
            self.assertTrue(all(torch.equal(p, q) for p, q in zip(loaded.parameters(), run.parameters)))
            self.assertEqual([row["step"] for row in run.snapshots], [0, 2, 4, 6])
            self.assertEqual(len({row["mse"] for row in run.snapshots}), 4)
            self.assertClose(run.snapshots[-1]["mse"], data.evaluate(loaded, data.held_out(2)[-1:]), 1e-6)
            single = train.open_run(dataclasses.replace(run.options, steps=7), resume=True, config=SMALL_TASK)
            self.assertTrue(self.quietly(single))

    def test_two_ranks_share_the_seeds_and_resume(self):
        out, single = self.folder(), os.path.join(self.folder(), "single")
        common = "--batch-size 2 --threads 1 --device cpu --eval-every 2".split()

        def torchrun(*more: str):
            launch = "-m torch.distributed.run --nproc_per_node=2 --master_port=0 train.py --seeds 0-2".split()
            done = subprocess.run([sys.executable, *launch, *common, "--out", out, *more], cwd=HERE, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)

        torchrun("--steps", "2")
        shutil.rmtree(os.path.join(out, "seed_0001"))  # as if everything had been killed before seed 1 began
        torchrun("--steps", "4", "--resume")
        self.assertEqual(sorted(os.listdir(out)), ["seed_0000", "seed_0001", "seed_0002"])
        self.assertEqual(command(train.main, *common, "--seed", "2", "--steps", "4", "--out", single)[0], 0)
        self.assertEqual(read(os.path.join(single, "weights.pt")), read(os.path.join(out, "seed_0002", "weights.pt")))
        logs = [analyze.read_log(os.path.join(out, f"seed_000{seed}", "log.csv")) for seed in range(3)]
        self.assertEqual([log["step"].tolist() for log in logs], [[2, 4]] * 3)

    def test_snapshots_come_from_step_0_on_and_change_nothing(self):
        with_some = train.open_run(self.options(steps=7, snapshot_every=2, eval_every=4), resume=False, config=SMALL_TASK)
        with_none = train.open_run(self.options(steps=7, snapshot_every=0, eval_every=4), resume=False, config=SMALL_TASK)
        for run in (with_some, with_none):
            self.assertTrue(self.quietly(run))
        for a, b in zip(with_some.model.parameters(), with_none.model.parameters()):
            self.assertTrue(torch.equal(a, b))
        self.assertEqual([row["step"] for row in with_some.snapshots], [0, 2, 4, 6])
        self.assertFalse(os.path.exists(os.path.join(with_none.options.out, "snapshots.csv")))
        series = analyze.read_snapshots(os.path.join(with_some.options.out, "snapshots.csv"))
        expected = analyze.snapshot(train.Run(with_some.options, SMALL_TASK).model, data.held_out(2)[-1])  # before training
        self.assertEqual(series.keys() - {"step"}, expected.keys())
        for name, value in expected.items():
            self.assertClose(torch.from_numpy(series[name])[0], value, 1e-5)

    def test_several_seeds_are_refused_before_any_is_touched(self):
        out = self.folder()
        os.makedirs(os.path.join(out, "seed_0001"))
        with open(os.path.join(out, "seed_0001", "weights.pt"), "wb") as f:
            f.write(b"precious")
        self.assertRefused(1, "seed_0001 already holds a run", train.main, "--seeds", "0-1", "--steps", "1", "--out", out)
        self.assertEqual(os.listdir(out), ["seed_0001"])
        self.assertEqual(read(os.path.join(out, "seed_0001", "weights.pt")), b"precious")

    def test_bfloat16_is_near_float32_and_keeps_float32_weights(self):
        exact, rough = (train.Run(self.options(dtype=dtype, batch_size=16), SMALL_TASK) for dtype in ("float32", "bfloat16"))
        losses = torch.stack([torch.stack([run.train_step() for _ in range(20)]) for run in (exact, rough)])
        self.assertClose(losses[1] / losses[0], 1, 0.05)
        self.assertFalse(torch.equal(losses[0], losses[1]))
        self.assertTrue(all(p.dtype == torch.float32 for p in rough.parameters))

    def test_benchmark_parts_add_up(self):
        table = train.benchmark(self.options(), 36, SMALL_TASK)
        rows = {row[:14].strip(): row[14:].split() for row in table.splitlines()}
        parts = sum(float(rows[name][0]) for name in ("sampling", "forward", "backward", "AdamW"))
        self.assertAlmostEqual(parts, float(rows["step"][0]), delta=0.25 * parts)
        self.assertGreater(float(rows["products"][0]), 0)

    def test_a_step_makes_all_its_tensors_on_its_device(self):
        """Seen on the meta device, which like a GPU refuses to work with a tensor that was made on the CPU."""
        run, stack = train.Run(self.options(), SMALL_TASK), self.stack((1, 2))[1]
        run.model.to("meta")
        stack.named = {name: p.detach().to("meta").requires_grad_() for name, p in stack.named.items()}
        with mock.patch("torch.rand", lambda *shape, device, generator: torch.empty(shape, device=device)):
            a = data.sample(2, 5, mock.Mock(device=torch.device("meta"))).a
        for loss, parameters in ((run.loss(a), run.model.parameters()), (stack.loss(torch.stack([a, a])), stack.named.values())):
            loss.sum().backward()
            self.assertEqual({p.grad.device.type for p in parameters}, {"meta"})

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_benchmark_times_the_captured_step_on_cuda(self):
        table = train.benchmark(self.options(device="cuda"), 36, SMALL_TASK)
        rows = {row[:14].strip(): row[14:].split() for row in table.splitlines()}
        self.assertLess(0, float(rows["captured step"][0]))
        self.assertLess(float(rows["captured step"][0]), float(rows["step"][0]))

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_captured_steps_are_the_plain_steps(self):
        for seeds in ((1,), (1, 2, 3)):
            plain, captured = ([train.Run(self.options(seed=seed, device="cuda"), SMALL_TASK) for seed in seeds] for _ in range(2))
            plain, captured = (train.Stack(runs) if len(runs) > 1 else runs[0] for runs in (plain, captured))
            captured.captured = train.CapturedSteps(captured)
            for p, q in zip(plain.parameters, captured.parameters):
                self.assertTrue(torch.equal(p, q))  # capturing put everything back
            losses = [torch.stack([trainer.train_step().clone() for _ in range(30)]) for trainer in (plain, captured)]
            self.assertClose(losses[0] / losses[1], 1, 1e-3)

    def test_training_lowers_the_loss(self):
        torch.manual_seed(0)
        run = train.Run(self.options(lr=1e-3, batch_size=16), model.Config(d_model=32, d_head=8, d_mlp=64, n_heads=2, n_layers=2))
        losses = torch.stack([run.train_step() for _ in range(300)])
        self.assertLess(losses[-50:].mean(), 0.5 * losses[:50].mean())

    def test_seeds_give_different_runs_and_the_same_seed_the_same(self):
        first, again, other = (train.Run(self.options(seed=seed), SMALL_TASK).train_step() for seed in (1, 1, 2))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)

    def in_parts(self, device: str, seeds: tuple[int, ...], *parts: int) -> list[train.Run]:
        """The runs of `seeds`, trained together up to each step of `parts` in turn, in a sitting of its own."""
        all_options = [self.options(seed=seed, device=device, steps=parts[-1]) for seed in seeds]
        for before, steps in zip((0, *parts), parts):
            runs = [train.open_run(dataclasses.replace(o, steps=steps), resume=before > 0, config=SMALL_TASK) for o in all_options]
            self.assertEqual([run.step for run in runs], [before] * len(runs))
            self.assertTrue(self.quietly(*runs))
        return runs

    def assertPartsMakeAWhole(self, device: str):
        for seeds in ((1,), (1, 2, 3)):
            for whole, part in zip(self.in_parts(device, seeds, 9), self.in_parts(device, seeds, 4, 9), strict=True):
                self.assertEqual([row["step"] for row in part.snapshots], [0])
                for a, b in zip(whole.model.parameters(), part.model.parameters()):
                    self.assertTrue(torch.equal(a, b))

    def test_a_run_in_two_parts_equals_one_in_one_part(self):
        self.assertPartsMakeAWhole("cpu")

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_a_run_in_two_parts_equals_one_in_one_part_on_cuda(self):
        self.assertPartsMakeAWhole("cuda")

    def test_a_killed_run_resumes_to_the_same_bits_and_the_same_log(self):
        folder = self.folder()
        arguments = [sys.executable, "train.py", "--steps", "40", "--eval-every", "10", "--batch-size", "2", "--device", "cpu"]
        arguments += ["--snapshot-every", "20", "--out"]
        start = lambda out: subprocess.Popen([*arguments, os.path.join(folder, out)], cwd=HERE, stdout=subprocess.PIPE, text=True)
        whole = start("whole")
        whole.communicate()
        self.assertEqual(whole.returncode, 0)

        killed = start("killed")
        killed.stdout.readline()  # the first row of the log is written: now it is somewhere after it
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        self.assertEqual(killed.returncode, -signal.SIGKILL)
        self.assertLess(train.load_file(os.path.join(folder, "killed", "checkpoint.pt"), "checkpoint")["step"], 40)
        subprocess.run([*arguments, os.path.join(folder, "killed"), "--resume"], cwd=HERE, check=True, stdout=subprocess.DEVNULL)

        a, b = (torch.load(os.path.join(folder, out, "weights.pt"), weights_only=True) for out in ("whole", "killed"))
        self.assertEqual(a.keys(), b.keys())
        self.assertTrue(all(torch.equal(a[name], b[name]) for name in a))
        logs = [
            [line.split(",")[:3] for line in read(os.path.join(folder, out, "log.csv")).decode().split()] for out in ("whole", "killed")
        ]
        self.assertEqual(logs[0], logs[1])
        self.assertEqual([row[0] for row in logs[0]], ["step", "10", "20", "30", "40"])
        whole, killed = (read(os.path.join(folder, out, "snapshots.csv")).decode() for out in ("whole", "killed"))
        self.assertEqual(whole, killed)
        self.assertEqual([line.split(",")[0] for line in whole.split()], ["step", "0", "20", "40"])

    def test_an_interrupt_saves_between_two_steps_and_says_how_to_go_on(self):
        options = self.options(steps=1000)
        run = train.open_run(options, resume=False, config=SMALL_TASK)
        step, taken = run.train_step, 0

        def interrupted_step():
            nonlocal taken
            taken += 1
            if taken == 5:
                signal.raise_signal(signal.SIGINT)
            return step()

        with mock.patch.object(run, "train_step", interrupted_step):
            self.assertFalse(self.quietly(run))
        state = train.load_file(os.path.join(options.out, "checkpoint.pt"), "checkpoint")
        self.assertEqual((state["step"], state["loss_count"]), (5, 2))  # the third step made a row of the log
        self.assertEqual(options.command().split()[:4], ["python", "train.py", "--steps", "1000"])

    def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(self):
        options = self.options(lr=1e30, steps=50, eval_every=50)
        run = train.open_run(options, resume=False, config=SMALL_TASK)
        before = read(os.path.join(options.out, "checkpoint.pt"))
        with self.assertRaisesRegex(FloatingPointError, r"the loss at step \d+ is (nan|inf)"):
            self.quietly(run)
        every_step = train.Run(dataclasses.replace(options, snapshot_every=1), SMALL_TASK)
        with self.assertRaisesRegex(FloatingPointError, r"after step 1 the MSE on sequences of 14 inputs is (nan|inf) \(seed 0\)"):
            self.quietly(every_step)
        self.assertEqual(read(os.path.join(options.out, "checkpoint.pt")), before)

    def test_folders_that_cannot_be_used_are_refused_and_left_as_they_are(self):
        options = self.options()
        with self.assertRaisesRegex(FileNotFoundError, "nothing to resume"):
            train.open_run(options, resume=True, config=SMALL_TASK)
        self.assertFalse(os.path.exists(options.out))
        train.open_run(options, resume=False, config=SMALL_TASK)
        path = os.path.join(options.out, "checkpoint.pt")
        good = read(path)
        with self.assertRaisesRegex(ValueError, "already holds a run"):
            train.open_run(options, resume=False, config=SMALL_TASK)
        for changes, says in (
            ({"lr": 1e-3}, "lr 0.0001, not 0.001"),
            ({"batch_size": 3}, "batch_size 2, not 3"),
            ({"seed": 5}, "seed 0, not 5"),
        ):
            with self.assertRaisesRegex(ValueError, says):
                train.open_run(self.options(out=options.out, **changes), resume=True, config=SMALL_TASK)
        self.assertEqual(read(path), good)
        for bad in (good[: len(good) // 2], b"garbage"):
            with open(path, "wb") as f:
                f.write(bad)
            with self.assertRaisesRegex(ValueError, "damaged or is no checkpoint"):
                train.open_run(options, resume=True, config=SMALL_TASK)
            self.assertEqual(read(path), bad)

    def test_bad_command_lines_are_refused_in_one_line(self):
        out = os.path.join(self.folder(), "run")
        for arguments, says in (
            (["--steps", "0"], "at least 1, not '0'"),
            (["--steps", "-5"], "at least 1, not '-5'"),
            (["--steps", "many"], "whole number"),
            (["--batch-size", "0"], "at least 1"),
            (["--lr", "nan"], "finite"),
            (["--lr", "-1"], "above 0"),
            (["--lr", "0"], "above 0"),
            (["--weight-decay", "inf"], "at least 0"),
            (["--device", "nonsense"], "must be cpu, cuda or cuda:N"),
            (["--device", "cuda:99"], "99"),
            (["--dtype", "float16"], "float32 or bfloat16"),
            (["--seeds", "5-2"], "seeds such as"),
            (["--seeds", "1,1"], "twice"),
            (["--speed", "high"], "unrecognized"),
        ):
            with self.subTest(arguments):
                self.assertRefused(2, says, train.main, *arguments, "--out", out)
        self.assertFalse(os.path.exists(out))
        self.assertRefused(1, "nothing to resume", train.main, "--resume", "--out", out)
        blocked = os.path.join(self.folder(), "file")
        open(blocked, "w").close()
        self.assertRefused(1, "file", train.main, "--out", os.path.join(blocked, "run"))

    @unittest.skipIf(torch.cuda.is_available(), "this machine has CUDA")
    def test_cuda_is_refused_where_there_is_none(self):
        self.assertRefused(2, "use cpu", train.main, "--device", "cuda", "--out", os.path.join(self.folder(), "run"))

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_cuda_starts_from_the_same_weights_and_learns_the_same(self):
        cpu, cuda = (train.Run(self.options(device=device)) for device in ("cpu", "cuda"))
        for a, b in zip(cpu.model.parameters(), cuda.model.parameters()):
            self.assertTrue(torch.equal(a, b.cpu()))
        a = data.sample(16, 14, seeded()).a
        losses = []
        for run in (cpu, cuda):
            with mock.patch.object(data, "sample", lambda *_: data.Sample(a.to(run.options.device), None, None)):
                losses.append([run.train_step().item() for _ in range(20)])
        self.assertClose(torch.tensor(losses[0]) / torch.tensor(losses[1]), 1, 1e-3)


SMALL_TASK = model.Config(d_model=12, d_head=4, d_mlp=20, n_heads=3, n_layers=2)  # small, but with the task's 40 dimensions


class Interventions(TestCase):
    def setUp(self):
        self.model, self.x, self.cache = random_model(), random_input(), {}
        self.plain = self.model(self.x, cache=self.cache)

    def test_zero_ablation_is_a_model_without_those_weights(self):
        hooks = interventions.replace_outputs(interventions.zero_outputs(self.model), [(0, 1), (0, 2), (1, 0)], mlps=[1])
        without = random_model()
        without.blocks[0].attn.W_O[[1, 2]] = 0
        without.blocks[1].attn.W_O[0] = 0
        without.blocks[1].mlp.W_out.zero_()
        without.blocks[1].mlp.b_out.zero_()
        self.assertClose(self.model(self.x, hooks=hooks), without(self.x), 1e-10)

    def test_mean_ablation_replaces_a_head_by_its_mean(self):
        for over_positions, dims in ((False, 0), (True, (0, 1))):
            means = interventions.mean_outputs(self.cache, over_positions)
            after = {}
            self.model(self.x, hooks=interventions.replace_outputs(means, [(0, 2)], [0]), cache=after)
            z = self.cache["blocks.0.attn.hook_z"]
            self.assertClose(after["blocks.0.attn.hook_z"][:, :, 2], z.mean(dims)[..., 2, :].expand_as(z[:, :, 2]), 1e-12)
            self.assertTrue(torch.equal(after["blocks.0.attn.hook_z"][:, :, :2], z[:, :, :2]))
            self.assertClose(
                after["blocks.0.hook_mlp_out"],
                self.cache["blocks.0.hook_mlp_out"].mean(dims).expand_as(z[:, :, 0, :1].expand(-1, -1, SMALL.d_model)),
                1e-12,
            )

    def test_mean_ablation_over_one_sequence_changes_nothing_on_it(self):
        one, cache = self.x[:1], {}
        y = self.model(one, cache=cache)
        heads = [head for l in range(SMALL.n_layers) for head in interventions.layer_heads(self.model, l)]
        hooks = interventions.replace_outputs(interventions.mean_outputs(cache), heads, range(SMALL.n_layers))
        self.assertClose(self.model(one, hooks=hooks), y, 1e-12)

    def test_patching_every_output_of_another_input_leaves_only_its_embedding(self):
        other, cache = random_input(seed=7), {}
        y = self.model(other, cache=cache)
        heads = [head for l in range(SMALL.n_layers) for head in interventions.layer_heads(self.model, l)]
        hooks = interventions.replace_outputs(cache, heads, range(SMALL.n_layers))
        self.assertGreater((self.model(self.x, hooks=hooks) - y).abs().max(), 1e-3)
        hooks["hook_embed"] = lambda _: cache["hook_embed"]
        self.assertClose(self.model(self.x, hooks=hooks), y, 1e-12)

    def test_pseudoinverse_qk_is_a_projection_of_rank_d_head(self):
        changed = interventions.pseudoinverse_qk(self.model, 1, [0, 2], seeded())
        P = analyze.qk_circuit(changed, 1)
        for head in (0, 2):
            self.assertClose(P[head] @ P[head], P[head], 1e-9)
            self.assertClose(P[head], P[head].T, 1e-9)
            self.assertAlmostEqual(P[head].trace().item(), SMALL.d_head, places=9)
            self.assertEqual(torch.linalg.matrix_rank(P[head]).item(), SMALL.d_head)
        self.assertClose(P[1], analyze.qk_circuit(self.model, 1)[1], 1e-12)
        self.assertTrue(torch.equal(self.model(self.x), random_model()(self.x)))  # the model passed in is as it was

    def test_random_qk_is_as_large_as_the_trained_one(self):
        changed = interventions.random_qk(self.model, 0, [0, 1], seeded())
        before, after = analyze.qk_circuit(self.model, 0), analyze.qk_circuit(changed, 0)
        self.assertClose(after.norm(dim=(1, 2)), before.norm(dim=(1, 2)), 1e-9)
        self.assertGreater((after - before)[:2].abs().max(), 0.01)
        self.assertClose(after[2], before[2], 1e-12)

    def test_qk_of_zero_is_uniform_attention(self):
        cache = {}
        interventions.replace_qk(self.model, 1, [1], 0.0, 0.0)(self.x, cache=cache)
        self.assertClose(cache["blocks.1.attn.hook_pattern"][:, 1], analyze.uniform_pattern(6)[0].double(), 1e-7)
        self.assertClose(cache["blocks.1.attn.hook_pattern"][:, 0], self.cache["blocks.1.attn.hook_pattern"][:, 0], 1e-12)


class Measures(TestCase):
    def test_eigenvalue_score_of_known_circuits(self):
        quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        for matrix, score in ((torch.eye(4), 1), (-torch.eye(4), -1), (quarter_turn, 0), (torch.diag(torch.tensor([3.0, -1.0])), 0.5)):
            self.assertAlmostEqual(analyze.eigenvalue_score(matrix).item(), score, places=6)

    def test_eigenvalue_score_of_thin_factors_is_that_of_their_product(self):
        transformer = random_model()
        product = torch.stack([analyze.eigenvalue_score(analyze.ov_circuit(transformer, l)) for l in range(2)])
        self.assertClose(analyze.ov_eigenvalue_scores(transformer), product, 1e-5)

    def test_effective_rank_of_known_matrices(self):
        self.assertAlmostEqual(analyze.effective_rank(torch.outer(torch.arange(1.0, 4), torch.ones(5))).item(), 1, places=5)
        self.assertAlmostEqual(analyze.effective_rank(torch.linalg.qr(torch.randn(6, 6, generator=seeded()))[0]).item(), 6, places=4)
        self.assertAlmostEqual(analyze.effective_rank(torch.diag(torch.tensor([2.0, 1.0, 0.0]))).item(), 9 / 5, places=5)

    def test_identity_cosine_of_known_matrices(self):
        quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        half = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        for matrix, cosine in ((3 * torch.eye(5), 1), (-torch.eye(5), -1), (quarter_turn, 0), (half, 0.5**0.5)):
            self.assertAlmostEqual(analyze.identity_cosine(matrix).item(), cosine, places=6)

    def test_share_outside_a_subspace(self):
        W_E = torch.eye(128)[:40]
        self.assertAlmostEqual(analyze.outside_share(W_E[3] + W_E[5], W_E).item(), 0, places=6)
        self.assertAlmostEqual(analyze.outside_share(torch.eye(128)[50], W_E).item(), 1, places=6)
        self.assertAlmostEqual(analyze.outside_share(torch.eye(128)[0] + torch.eye(128)[90], W_E).item(), 0.5**0.5, places=6)
        W_E = torch.randn(40, 128, generator=seeded())
        self.assertAlmostEqual(
            analyze.outside_share(torch.randn(500, 128, generator=seeded(1)), W_E).mean().item(), (88 / 128) ** 0.5, delta=0.01
        )

    def test_line_and_plane_are_recovered(self):
        x = torch.randn(3, 50, generator=seeded(), dtype=torch.double)
        slope, intercept, r2 = analyze.fit_line(x, -2 * x + 1)
        self.assertClose(slope, -2, 1e-9)
        self.assertClose(intercept, 1, 1e-9)
        self.assertClose(r2, 1, 1e-9)
        noise = torch.randn(3, 50, generator=seeded(9), dtype=torch.double)
        self.assertClose(
            analyze.fit_line(x, x + noise)[2],
            torch.stack([torch.corrcoef(torch.stack([u, u + v]))[0, 1] ** 2 for u, v in zip(x, noise)]),
            1e-9,
        )
        coefficients, r2 = analyze.regress(3 * x - 0.5 * noise, x, noise)
        self.assertClose(coefficients, torch.tensor([3, -0.5]), 1e-9)
        self.assertAlmostEqual(r2, 1)

    def test_attention_scores_of_known_patterns(self):
        previous = torch.diag(torch.ones(13), -1)[None, None]
        previous[0, 0, 0, 0] = 1
        second = torch.zeros(1, 1, 14, 14)
        second[:, :, :, 1] = 1
        self.assertEqual(
            [f(previous).item() for f in (analyze.previous_token_score, analyze.second_token_score, analyze.same_parity_score)], [1, 0, 0]
        )
        self.assertEqual(analyze.second_token_score(second).item(), 1)
        self.assertAlmostEqual(analyze.same_parity_score(torch.eye(14)[None, None]).item(), 1)
        uniform = analyze.uniform_pattern(14)
        self.assertAlmostEqual(analyze.previous_token_score(uniform).item(), sum(1 / (q + 1) for q in range(1, 14)) / 13, places=6)

    def test_components_sum_to_output(self):
        transformer, x, kept = random_model(), random_input(), {}
        y, target = transformer(x, cache=kept), random_input(seed=5)
        scale = kept["ln_final.hook_scale"]
        part = lambda component: analyze.direct_attribution(transformer, component, target, scale)
        total = part(kept["hook_embed"]) + part(kept["hook_pos_embed"])
        for l, block in enumerate(transformer.blocks):
            total = (
                total
                + part(kept[f"blocks.{l}.attn.hook_result"]).sum(-1)
                + part(block.attn.b_O.expand_as(kept["hook_embed"]))
                + part(kept[f"blocks.{l}.hook_mlp_out"])
            )
        biases = transformer.ln_final.b @ transformer.unembed.W_U + transformer.unembed.b_U
        self.assertClose(total + target @ biases, (y * target).sum(-1), 1e-9)

    def test_the_papers_attribution_forgets_the_size_of_a_component(self):
        transformer, target, component = (
            random_model(),
            random_input(seed=5),
            torch.randn(4, 6, 3, 12, generator=seeded(), dtype=torch.double),
        )
        once = analyze.direct_attribution(transformer, component, target)
        self.assertEqual(once.shape, (4, 6, 3))
        self.assertClose(analyze.direct_attribution(transformer, 1000 * component, target), once, 1e-3)

    def test_the_solver_finds_the_next_vector_whatever_c_is(self):
        for c in (-2.0, -1.0, -1e-3, 0.0, 0.5, 1.0, 1.7):
            a = [torch.randn(1, 40, generator=seeded(), dtype=torch.float64)]
            d = torch.randn(1, 40, generator=seeded(1), dtype=torch.float64)
            for _ in range(6):
                a.append(c * a[-1] + d)
            a = torch.stack(a, 1)
            self.assertClose(analyze.solve_recurrence(a[:, :-1]), a[:, 3:], 1e-9)
        still = torch.ones(1, 5, 40)
        self.assertTrue(torch.equal(analyze.solve_recurrence(still), still[:, 2:]))

    def test_the_solver_is_least_squares_on_vectors_that_are_no_recurrence(self):
        x = torch.randn(1, 3, 4, generator=seeded(), dtype=torch.float64)
        # Unknowns c, d_0 .. d_3 of the equations x_1 = c x_0 + d and x_2 = c x_1 + d.
        equations = torch.cat([torch.cat([x[0, i][:, None], torch.eye(4, dtype=x.dtype)], 1) for i in range(2)])
        c, *d = torch.linalg.lstsq(equations, x[0, 1:].flatten()[:, None]).solution[:, 0]
        self.assertClose(analyze.solve_recurrence(x)[0, 0], c * x[0, 2] + torch.stack(d), 1e-9)

    def test_the_course_of_a_measure_has_its_middle_and_its_peak(self):
        steps = torch.arange(0, 400, 10).numpy()
        for start, end in ((0.0, 1.0), (2.0, -1.0)):
            values = torch.full((40,), end, dtype=torch.double)
            values[:3] = torch.tensor([start, start + 0.4 * (end - start), start + 0.6 * (end - start)])
            expected = {"start": start, "end": end, "halfway": 20, "peak": end, "peak_step": 30}
            self.assertEqual(analyze.course(steps, values.numpy()), expected)
        self.assertIsNone(analyze.course(steps, 0 * values.numpy())["halfway"])
        values[5] = 9.0
        self.assertEqual(analyze.course(steps, values.numpy())["peak_step"], 50)

    def test_bootstrap_interval_of_a_mean(self):
        values = torch.randn(400, generator=seeded())
        low, high = analyze.bootstrap(values, seeded(1))
        self.assertTrue(low < values.mean() < high)
        self.assertAlmostEqual(high - low, 2 * 1.96 / 400**0.5, delta=0.03)
        groups = torch.stack([values, values + 100])
        low, high = analyze.bootstrap(groups, seeded(1))
        self.assertAlmostEqual(high - low, 2 * 1.96 / 800**0.5, delta=0.03)  # resampled within groups: their distance does not count

    def test_circuits_are_what_the_model_computes(self):
        transformer, cache = model.fold(random_model()), {}
        transformer(random_input(), cache=cache)
        x = cache["blocks.1.ln1.hook_normalized"]
        attn = transformer.blocks[1].attn
        attn.b_Q.zero_(), attn.b_K.zero_()
        transformer(random_input(), cache=cache)
        scores = torch.einsum("bqd,hdD,bkD->bhqk", x, analyze.qk_circuit(transformer, 1), x) / SMALL.d_head**0.5
        kept = cache["blocks.1.attn.hook_attn_scores"]
        self.assertClose(scores[kept.isfinite()], kept[kept.isfinite()], 1e-9)
        result = torch.einsum("bhqk,bkd,hdD->bqhD", cache["blocks.1.attn.hook_pattern"], x, analyze.ov_circuit(transformer, 1))
        self.assertClose(result, cache["blocks.1.attn.hook_result"], 1e-9)


class Analysis(TestCase):
    def setUp(self):
        for name, count in {
            "POPULATION": 40,
            "HELD_OUT_PER_LENGTH": 10,
            "HEAD_ABLATION": 10,
            "EXAMPLES": 20,
            "QK_DRAWS": 2,
            "RESAMPLES": 50,
        }.items():
            patch = mock.patch.object(analyze, name, count)
            patch.start()
            self.addCleanup(patch.stop)

    def test_the_same_command_gives_the_same_bytes(self):
        first, second = self.folder(), self.folder()
        for out in (first, second):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                analyze.run(analyze.Study(os.path.join(HERE, "weights"), seed=3), out, [], list(analyze.CLAIMS))
        for name in ("results.json", "results.md"):
            self.assertEqual(read(os.path.join(first, name)), read(os.path.join(second, name)))

    def test_a_claim_does_not_depend_on_what_else_is_computed(self):
        study = analyze.Study(os.path.join(HERE, "weights"), seed=3)
        after_others = [analyze.CLAIMS[name].measure(study) for name in ("alpha", "l0_ov_r2_random", "l0_orthogonal")][-1]
        alone = analyze.CLAIMS["l0_orthogonal"].measure(analyze.Study(os.path.join(HERE, "weights"), seed=3))
        self.assertEqual(analyze.plain(after_others.measured), analyze.plain(alone.measured))

    def test_an_untrained_model_reproduces_no_learnt_claim(self):
        study = analyze.Study(os.path.join(HERE, "weights"), seed=0)
        study.model = study.untrained
        for name in (
            "mse",
            "l0_prev_token",
            "l1_second_token",
            "l2_checkerboard",
            "l0_ov_r2",
            "l0_ov_slope",
            "l1_ov_effective_rank",
            "l2_ov_identity",
            "l2_qk_identity",
            "lens_after_l0",
            "eigenvalue_score",
            "alpha",
        ):
            self.assertEqual(analyze.CLAIMS[name].measure(study).verdict, "not reproduced", name)

    def test_a_model_built_as_the_paper_says_reproduces_the_circuit_claims(self):
        study = analyze.Study(os.path.join(HERE, "weights"), seed=0)
        study.model = model.fold(model.Transformer(generator=seeded())).requires_grad_(False)
        attn = study.model.blocks[2].attn
        half = torch.linalg.qr(torch.randn(8, 128, 64, generator=seeded()))[0]
        attn.W_Q.copy_(half), attn.W_K.copy_(half)
        attn.W_V.copy_(half), attn.W_O.copy_(-half.transpose(1, 2))
        for name in ("l2_ov_identity", "l2_qk_identity", "eigenvalue_score"):
            self.assertEqual(analyze.CLAIMS[name].measure(study).verdict, "reproduced", name)

    def test_predictors_predict_the_vector_after_the_last_one_they_see(self):
        study = analyze.Study(os.path.join(HERE, "weights"), seed=0)
        a = study.test.a
        predictions = {name: predict(a[:, :-1]) for name, predict in study.predictors.items()}
        self.assertEqual({p.shape for p in predictions.values()}, {a[:, 3:].shape})
        self.assertTrue(torch.equal(predictions["predict_last_vector"], a[:, 2:-1]))
        self.assertClose(predictions["model"], study.model(a[:, :-1])[:, 2:], 1e-5)
        self.assertClose(predictions["exact_solver"], a[:, 3:], 1e-5)
        errors = {name: e.mean() for name, e in study.predictor_errors(study.population.a[:, :-1], study.population.a[:, 1:]).items()}
        self.assertLess(errors["best_linear_of_3"], errors["best_linear_of_2"])
        self.assertLess(errors["best_linear_of_2"], min(errors["predict_zero"], errors["predict_last_vector"]))

    def test_errors_by_c_are_those_of_the_sequences_with_such_a_c(self):
        study = analyze.Study(os.path.join(HERE, "weights"), seed=0)
        near_0 = (study.test.c >= 0) & (study.test.c < 0.25)
        self.assertClose(study.errors_by_c["model"][8], study.test_errors["model"][near_0].mean(), 1e-9)

    def test_sequences_out_of_distribution_differ_as_they_say(self):
        studied = analyze.Study(os.path.join(HERE, "weights"), seed=0).out_of_distribution
        mse = {what: {value: {name: e.mean() for name, e in errors.items()} for value, errors in studied[what].items()} for what in studied}
        for length, errors in studied["length"].items():
            self.assertEqual(errors["model"].shape[1], length - 2)
        for name in ("predict_zero", "predict_last_vector", "best_linear_of_2", "exact_solver"):  # these are linear in the vectors
            for factor, errors in mse["scale"].items():
                self.assertAlmostEqual(errors[name] / mse["scale"][1.0][name] / factor**2, 1, delta=0.2)
        for sigma, errors in mse["noise"].items():  # the noise of the last vector adds to the error of repeating it
            added = errors["predict_last_vector"] - mse["scale"][1.0]["predict_last_vector"]
            self.assertAlmostEqual(added, sigma**2, delta=0.05 * mse["scale"][1.0]["predict_last_vector"])
        self.assertTrue(all(errors["exact_solver"] < 1e-10 for what in ("length", "c") for errors in mse[what].values()))
        self.assertGreater(mse["c"][2.875]["best_linear_of_2"], 3 * mse["c"][0.125]["best_linear_of_2"])

    def test_snapshots_are_what_the_claims_measure(self):
        study = analyze.Study(os.path.join(HERE, "weights"), seed=0)
        snapshot = analyze.snapshot(model.load_weights(study.weights_file), study.population)
        claims = {
            name: analyze.CLAIMS[name].measure(study) for name in ("mse", "l0_prev_token", "l0_orthogonal", "dla_sign", "l2_qk_identity")
        }
        for expected, got in (
            (claims["mse"].control["length_14"], snapshot["mse"]),
            (claims["l0_prev_token"].measured, snapshot["prev_token"][0]),
            (claims["l0_orthogonal"].measured, snapshot["l0_orthogonal"]),
            (claims["dla_sign"].measured, snapshot["dla_paper"]),
            (claims["dla_sign"].control["standard_next_by_head"], snapshot["dla_standard"]),
            (claims["l2_qk_identity"].measured, snapshot["qk_identity"][2]),
        ):
            self.assertClose(got, expected, 1e-5)

    def seeds_folder(self, *seeds: int) -> str:
        """Runs of untrained models of the paper's size, with a log of one row."""
        folder = self.folder()
        for seed in seeds:
            run = os.path.join(folder, f"seed_{seed:04d}")
            os.mkdir(run)
            model.save_file(model.Transformer(generator=seeded(seed)).state_dict(), os.path.join(run, "weights.pt"))
            with open(os.path.join(run, "log.csv"), "w") as f:
                f.write("step,loss,eval_mse,seconds\n10,1,1,1\n")
        return folder

    def test_seeds_are_compared_and_an_interrupted_comparison_goes_on(self):
        folder, out = self.seeds_folder(0, 7), os.path.join(self.folder(), "figures")
        measure, measured = analyze.measure, []

        def interrupted(study, *arguments):
            measured.append(os.path.basename(os.path.dirname(study.weights_file)))
            if len(measured) == 2:
                raise KeyboardInterrupt
            return measure(study, *arguments)

        with mock.patch.object(analyze, "measure", interrupted):
            self.assertEqual(command(analyze.main, "--seeds", folder, "--out", out)[0], 130)
            self.assertEqual(os.listdir(out), ["seeds.partial.json"])
            self.assertEqual(command(analyze.main, "--seeds", folder, "--out", out)[0], 0)
        self.assertEqual(measured, ["seed_0000", "seed_0007", "seed_0007"])
        self.assertEqual(sorted(os.listdir(out)), ["seeds.json", "seeds.md", "seeds.png"])

        results = json.loads(read(os.path.join(out, "seeds.json")))
        self.assertEqual(list(results["seeds"]), ["seed_0000", "seed_0007"])
        self.assertEqual(list(results["claims"]), list(analyze.CLAIMS))
        for name, claim in results["claims"].items():
            self.assertEqual(sum(claim["verdicts"].values()), 2)
            for label, group in claim["values"].items():
                values = [found[name]["values"][label] for found in results["seeds"].values()]
                self.assertEqual(group["seeds"], values)
                self.assertClose(torch.tensor(group["mean"]), torch.tensor(values).mean(), 1e-4)
        alone = analyze.CLAIMS["eigenvalue_score"].measure(analyze.Study(os.path.join(folder, "seed_0007"), seed=0))
        self.assertEqual(results["seeds"]["seed_0007"]["eigenvalue_score"]["measured"], analyze.plain(alone.measured))

    def test_summaries_are_means_over_heads_and_factors_over_the_unchanged_error(self):
        claims = json.loads(read(os.path.join(HERE, "figures", "results.json")))["claims"]
        self.assertEqual(list(analyze.SUMMARIES), list(claims))
        summaries = {name: analyze.summarise(name, claim) for name, claim in claims.items()}
        by_layer = claims["dla_sign"]["control"]["paper_next_by_layer"]
        self.assertClose(torch.tensor(list(summaries["dla_sign"]["values"].values())), torch.tensor(by_layer), 1e-5)
        ablation = claims["l1_mean_ablation"]
        factor = ablation["measured"] / ablation["control"]["unchanged"]
        self.assertAlmostEqual(summaries["l1_mean_ablation"]["values"]["layer 1"], factor, delta=1e-4 * factor)
        self.assertEqual(summaries["alpha"]["controls"]["free: a_n"], claims["alpha"]["control"]["after_layer_0"]["a_n"])

    def test_folders_without_comparable_seeds_are_refused_and_nothing_is_written(self):
        folder, out = self.seeds_folder(0, 1), os.path.join(self.folder(), "figures")
        refused = lambda status, says, *arguments: self.assertRefused(status, says, analyze.main, *arguments, "--out", out)
        refused(1, "there is no run in", "--seeds", os.path.join(folder, "missing"))
        refused(1, "there is no run in", "--seeds", os.path.join(folder, "seed_0000"))
        refused(2, "give it by itself", "--seeds", folder, "--all")
        refused(2, "give it by itself", "--seeds", folder, "--fig", "1")
        table = os.path.join(folder, "seed_0001", "snapshots.csv")
        with open(table, "w") as f:
            f.write("step,loss\n1,2\n")
        refused(1, "is no table of snapshots", "--seeds", folder)
        with open(table, "w") as f:
            f.write("step,mse\n1,2\n")
        refused(1, "it lacks dla_paper", "--seeds", folder)
        os.remove(table)
        with open(os.path.join(folder, "seed_0001", "log.csv"), "a") as f:
            f.write("20,1,1,1\n")
        refused(1, "seed_0000 is at step 10, another seed at 20", "--seeds", folder)
        os.remove(os.path.join(folder, "seed_0001", "weights.pt"))
        refused(1, "no weights file", "--seeds", folder)
        self.assertFalse(os.path.exists(out))

    def test_committed_seeds_belong_to_the_tables_and_the_readme_shows_them(self):
        results = json.loads(read(os.path.join(HERE, "figures", "seeds.json")))
        shipped = hashlib.sha256(read(os.path.join(HERE, "weights", "weights.pt"))).hexdigest()
        self.assertEqual(results["meta"]["sha256"]["seed_0000"], shipped)
        self.assertEqual(list(results["claims"]), list(analyze.CLAIMS))
        self.assertGreaterEqual(len(results["seeds"]), 5)
        self.assertEqual(results["claims"], analyze.over_seeds(results["seeds"]))
        single = json.loads(read(os.path.join(HERE, "figures", "results.json")))["claims"]
        for name, found in results["seeds"]["seed_0000"].items():
            self.assertEqual((found["measured"], found["verdict"]), (single[name]["measured"], single[name]["verdict"]), name)
        text, readme = (read(os.path.join(HERE, path)).decode() for path in (os.path.join("figures", "seeds.md"), "README.md"))
        self.assertEqual(text, analyze.seeds_markdown(results))
        rows = [row for row in text.splitlines() if row.startswith("| [`")]
        self.assertEqual(len(rows), len(analyze.CLAIMS))
        for row in rows:
            row = row.replace("(results.md#", "(figures/results.md#")
            self.assertTrue(row in readme, row)

    def test_committed_results_belong_to_the_shipped_weights_and_the_tables(self):
        results = json.loads(read(os.path.join(HERE, "figures", "results.json")))
        self.assertEqual(results["meta"]["sha256"], hashlib.sha256(read(os.path.join(HERE, "weights", "weights.pt"))).hexdigest())
        self.assertEqual(list(results["claims"]), list(analyze.CLAIMS))
        for name, claim in results["claims"].items():
            self.assertEqual(list(claim), ["claim", "paper", "measured", "interval", "control", "verdict", "why"])
            self.assertEqual((claim["claim"], claim["paper"]), (analyze.CLAIMS[name].claim, analyze.CLAIMS[name].paper))
            self.assertIn(claim["verdict"], ("reproduced", "partly", "not reproduced"))
        for number in analyze.FIGURES:
            self.assertTrue(os.path.exists(os.path.join(HERE, "figures", analyze.figure_file(number))))
        self.assertEqual(read(os.path.join(HERE, "figures", "results.md")).decode(), analyze.markdown(results))

    def test_the_readme_shows_the_committed_results(self):
        readme = read(os.path.join(HERE, "README.md")).decode()
        rows = [row for row in read(os.path.join(HERE, "figures", "results.md")).decode().splitlines() if row.startswith("| [`")]
        self.assertEqual(len(rows), len(analyze.CLAIMS))
        for row in rows:
            row = row.replace("(fig", "(figures/fig").replace("(#", "(figures/results.md#")
            self.assertTrue(row in readme, row)

    def test_figures_name_their_axes(self):
        study = analyze.Study(os.path.join(HERE, "weights"), seed=0)
        for number, entry in analyze.FIGURES.items():
            figure = entry.draw(study)
            with self.subTest(number):
                self.assertTrue(figure.get_suptitle())
                panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
                self.assertTrue(any(axes.get_xlabel() for axes in panels) and any(axes.get_ylabel() for axes in panels))
                for axes in figure.axes:
                    for image in axes.get_images():
                        low, high = image.get_clim()
                        self.assertTrue(low == 0 and image.get_cmap().name == "Blues" or low == -high and image.get_cmap().name == "RdBu")
            analyze.plt.close(figure)

    def test_bad_command_lines_are_refused_in_one_line_and_write_nothing(self):
        folder = self.folder()
        out = os.path.join(folder, "figures")
        self.assertRefused(2, "no figure 99", analyze.main, "--fig", "99", "--out", out)
        self.assertRefused(2, "nothing to do", analyze.main, "--out", out)
        self.assertRefused(2, "whole number", analyze.main, "--all", "--seed", "x", "--out", out)
        self.assertRefused(1, "no run folder", analyze.main, "--all", "--run", os.path.join(folder, "missing"), "--out", out)
        run = os.path.join(folder, "run")
        os.mkdir(run)
        self.assertRefused(1, "no weights file", analyze.main, "--all", "--run", run, "--out", out)
        with open(os.path.join(run, "weights.pt"), "wb") as f:
            f.write(b"garbage")
        self.assertRefused(1, "damaged", analyze.main, "--all", "--run", run, "--out", out)
        model.save_file(random_model(SMALL_TASK, torch.float32).state_dict(), os.path.join(run, "weights.pt"))
        self.assertRefused(1, "blocks.2", analyze.main, "--all", "--run", run, "--out", out)
        model.save_file(model.Transformer().state_dict(), os.path.join(run, "weights.pt"))
        self.assertRefused(1, "no training log", analyze.main, "--all", "--run", run, "--out", out)
        for garbage in ("", "step,loss,eval_mse,seconds\n", "a,b\n1,2\n", "step,loss,eval_mse,seconds\n1,x,y,z\n"):
            with open(os.path.join(run, "log.csv"), "w") as f:
                f.write(garbage)
            self.assertRefused(1, "is no training log", analyze.main, "--all", "--run", run, "--out", out)
        self.assertFalse(os.path.exists(out))
        self.assertRefused(
            1, "weights.pt", analyze.main, "--fig", "1", "--run", os.path.join(HERE, "weights"), "--out", os.path.join(run, "weights.pt")
        )

    def test_list_names_every_figure_and_claim(self):
        status, out, _ = command(analyze.main, "--list")
        self.assertEqual((status, len(out.splitlines())), (0, len(analyze.FIGURES) + len(analyze.CLAIMS)))


if __name__ == "__main__":
    unittest.main()
