"""The properties that the rest of the project relies on.

    python -m unittest test_all                     # about three minutes
    python -m unittest test_all.Folding             # one group

Small models and few sequences, except where the shipped weights themselves are what is tested.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import analyze
import data
import interventions
import model
import train

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = model.Config(d_vocab=5, d_model=12, d_head=4, d_mlp=20, n_heads=3, n_layers=2, n_ctx=8)
SMALL_TASK = dataclasses.replace(SMALL, d_vocab=40, n_ctx=32)  # the task's dimensions


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(config: model.Config = SMALL, dtype=torch.float64) -> model.Transformer:
    """A model in which no bias is 0 and no LayerNorm is the identity, as after training."""
    transformer = model.Transformer(config, seeded()).to(dtype).requires_grad_(False)
    for parameter in transformer.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(parameter.numel()), dtype=dtype)
    return transformer


def random_input(config: model.Config = SMALL, batch: int = 4, positions: int = 6, dtype=torch.float64,
                 seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, positions, config.d_vocab, generator=seeded(seed), dtype=dtype)


def gelu_new(u: torch.Tensor) -> torch.Tensor:
    """GELU in the tanh form (Hendrycks & Gimpel, 2016)."""
    return 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))


def reference(state: dict, x: torch.Tensor, config: model.Config, edit: dict) -> torch.Tensor:
    """The equations of appendix A.1, one sequence and one head at a time; `edit` changes values at named
    points."""

    def at(name, value):
        return edit[name](value[None])[0] if name in edit else value

    def layer_norm(name, v):
        v = v - v.mean(-1, keepdim=True)
        v = v / at(f"{name}.hook_scale", ((v**2).mean(-1, keepdim=True) + config.eps) ** 0.5)
        return at(f"{name}.hook_normalized", v * state[f"{name}.w"] + state[f"{name}.b"])

    outputs = []
    for vectors in x:
        n = len(vectors)
        v = at("hook_embed", vectors @ state["embed.W_E"]) + at("hook_pos_embed",
                                                                state["pos_embed.W_pos"][:n])
        for l in range(config.n_layers):
            block = f"blocks.{l}"
            p = {name: state[f"{block}.attn.{name}"]
                 for name in ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O")}
            v = at(f"{block}.hook_resid_pre", v)
            u = layer_norm(f"{block}.ln1", v)
            q, k, value = (at(f"{block}.attn.hook_{s.lower()}",
                              torch.stack([u @ p[f"W_{s}"][h] + p[f"b_{s}"][h]
                                           for h in range(config.n_heads)], 1)) for s in "QKV")
            scores = torch.full((config.n_heads, n, n), -torch.inf, dtype=x.dtype)
            for h in range(config.n_heads):
                for d in range(n):
                    for s in range(d + 1):
                        scores[h, d, s] = q[d, h] @ k[s, h] / config.d_head**0.5
            scores = at(f"{block}.attn.hook_attn_scores", scores)
            pattern = at(f"{block}.attn.hook_pattern", scores.exp() / scores.exp().sum(-1, keepdim=True))
            z = at(f"{block}.attn.hook_z",
                   torch.stack([pattern[h] @ value[:, h] for h in range(config.n_heads)], 1))
            result = at(f"{block}.attn.hook_result",
                        torch.stack([z[:, h] @ p["W_O"][h] for h in range(config.n_heads)], 1))
            v = at(f"{block}.hook_resid_mid", v + at(f"{block}.hook_attn_out", result.sum(1) + p["b_O"]))
            pre = at(f"{block}.mlp.hook_pre", layer_norm(f"{block}.ln2", v) @ state[f"{block}.mlp.W_in"]
                     + state[f"{block}.mlp.b_in"])
            act = {"relu": lambda u: u.clamp(min=0), "gelu_new": gelu_new}[config.act_fn]
            post = at(f"{block}.mlp.hook_post", act(pre))
            v = at(f"{block}.hook_resid_post",
                   v + at(f"{block}.hook_mlp_out",
                          post @ state[f"{block}.mlp.W_out"] + state[f"{block}.mlp.b_out"]))
        outputs.append(layer_norm("ln_final", v) @ state["unembed.W_U"] + state["unembed.b_U"])
    return torch.stack(outputs)


def command(main, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command line, without a new process."""
    out, err = io.StringIO(), io.StringIO()
    with (mock.patch.object(sys, "argv", [f"{main.__module__}.py", *arguments]),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
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
        for length in (3, 14, 32):
            s = data.sample(200, length, seeded(length))
            self.assertEqual(s.a.shape, (200, length + 1, 40))
            largest = s.a.abs().amax((1, 2), keepdim=True)
            self.assertClose((s.a[:, 1:] - (s.c[:, None, None] * s.a[:, :-1] + s.d[:, None])) / largest, 0,
                             2e-6)

    def test_largest_input_norm_is_uniform_between_1_and_2_and_the_last_target_is_not_counted(self):
        s = data.sample(4000, 14, seeded())
        norms = s.a.norm(dim=-1)
        largest = norms[:, :-1].amax(1)
        self.assertTrue(((largest > 1 - 1e-5) & (largest < 2 + 1e-5)).all())
        self.assertAlmostEqual(largest.mean().item(), 1.5, delta=0.03)
        self.assertTrue((norms[:, -1] > 2).any())

    def test_first_vector_and_d_are_independent_and_equally_large(self):
        s = data.sample(4000, 5, seeded())
        a_0, d = (v / s.d.norm(dim=-1, keepdim=True) for v in (s.a[:, 0], s.d))  # without the common scale
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
        for length in (0, -1, 2, 33):
            with self.assertRaisesRegex(ValueError, f"between 3, .* and n_ctx = 32, not {length}"):
                data.sample(4, length, seeded())
        with self.assertRaisesRegex(ValueError, "linear-3 must be between 5, "):
            data.sample(4, 4, seeded(), task="linear-3")
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
        wrong[:, 2] += 3.0
        self.assertEqual(data.mse(wrong, target, first=3).item(), 0)


class Tasks(TestCase):
    OTHERS = ("linear-1", "linear-2", "linear-3", "polynomial-1", "polynomial-2", "polynomial-3", "quadratic")

    def rows(self, name: str, a: torch.Tensor, n: int) -> torch.Tensor:
        """What a_n is a linear function of, [rows, d_vocab]: the scalars of the task multiply these."""
        if name == "quadratic":
            return torch.stack([a[n - 1] ** 2, a[n - 1]])
        return torch.stack([a[n - 1 - i] for i in range(int(name[-1]))])

    def test_affine_sequences_are_the_same_numbers_as_ever(self):
        g, uniform = seeded(7), lambda *shape: 4 * torch.rand(*shape, generator=g) - 2
        c, a_0, d, r = uniform(50), uniform(50, 40), uniform(50, 40), 1 + torch.rand(50, generator=g)
        powers = c[:, None] ** torch.arange(15)
        a = powers[..., None] * a_0[:, None] + (powers.cumsum(1) - powers)[..., None] * d[:, None]
        scale = r / a[:, :-1].norm(dim=-1).amax(1)
        s = data.sample(50, 14, seeded(7))
        self.assertTrue(torch.equal(s.a, a * scale[:, None, None]))
        self.assertTrue(torch.equal(s.d, d * scale[:, None]) and torch.equal(s.c, c))

    def test_sequences_obey_the_recurrence_of_their_task_within_bounds(self):
        for name in self.OTHERS:
            for length in (data.find_task(name).first + 1, 14, 32):
                with self.subTest(name, length=length):
                    s = data.sample(100, length, seeded(length), task=name, dtype=torch.float64)
                    largest = s.a[:, :-1].norm(dim=-1).amax(1)
                    self.assertTrue(((largest > 1 - 1e-9) & (largest < 2 + 1e-9)).all())
                    lags = s.c.shape[1] if name != "quadratic" else 1
                    for a, c, d in zip(*s):
                        for n in range(lags, length + 1):
                            self.assertClose(a[n], c @ self.rows(name, a, n) + d, 1e-12)
                    single = data.sample(1000, length, seeded(length), task=name)
                    self.assertTrue(all(value.isfinite().all() for value in single))

    def test_polynomials_are_polynomials_and_quadratic_maps_stay_within_their_bounds(self):
        for K in (1, 2, 3):
            a = data.sample(20, 10, seeded(), task=f"polynomial-{K}", dtype=torch.float64).a
            self.assertClose(a.diff(n=K + 1, dim=1), 0, 1e-12)
            self.assertGreater(a.diff(n=K, dim=1).abs().mean().item(), 1e-4)
        s = data.sample(500, 32, seeded(), task="quadratic")
        self.assertLess(s.a[:, -1].norm(dim=-1).max().item(), 4)
        b, c = s.c.T[..., None]
        k = b * s.d + c / 2 - c**2 / 4  # of x_n = x_{n-1}^2 + k
        self.assertTrue(((k > -1.9 - 1e-3) & (k < 0.25 + 1e-3)).all())
        self.assertTrue((b > 0).any() and (b < 0).any())

    def test_roots_are_those_of_the_specification(self):
        c = data.sample(4000, 4, seeded(), task="linear-1").c  # the paper's task
        self.assertAlmostEqual(c.std().item(), 4 / 12**0.5, delta=0.03)
        for K in (2, 3):
            c = data.sample(4000, 6, seeded(), task=f"linear-{K}", dtype=torch.float64).c.numpy()
            roots = np.array([np.roots([1, *-row]) for row in c])
            is_complex = np.abs(roots.imag) > 1e-9
            self.assertLess(np.abs(roots).max(), 2 + 1e-6)
            self.assertAlmostEqual(is_complex.any(1).mean(), 0.5, delta=0.03)
            self.assertEqual(set(is_complex.sum(1)), {0, 2})
            self.assertAlmostEqual(np.abs(roots[is_complex]).mean(), 1, delta=0.03)  # of U[0, 2]
            self.assertAlmostEqual(roots[is_complex].real.mean(), 0, delta=0.05)  # any angle
            self.assertAlmostEqual(roots[~is_complex].real.std(), 4 / 12**0.5, delta=0.04)

    def test_solvers_are_exact_where_the_next_vector_is_determined(self):
        for name in ("affine", *self.OTHERS):
            kind = data.find_task(name)
            for length in (kind.first + 1, 14, 32):
                a = data.sample(300, length, seeded(), task=name, dtype=torch.float64).a
                with self.subTest(name, length=length):
                    self.assertClose(kind.solve(a[:, :-1]), a[:, kind.first + 1 :], 1e-10)

    def test_one_position_earlier_the_next_vector_is_not_determined(self):
        """All unknowns of a task by least squares, on the vectors that are known at a position."""
        for name in ("affine", *self.OTHERS):
            first, errors, size = data.find_task(name).first, {0: 0.0, 1: 0.0}, 0.0
            for a in data.sample(30, 8, seeded(), 5, task=name, dtype=torch.float64).a:
                size += a[first + 1].norm()
                for earlier in errors:
                    known = first + 1 - earlier  # vectors
                    if name.startswith("polynomial"):
                        powers = torch.arange(known + 1, dtype=a.dtype)[:, None] ** torch.arange(first + 1)
                        v = torch.linalg.pinv(powers[:-1]) @ a[:known]
                        errors[earlier] += (powers[-1] @ v - a[known]).norm()
                        continue
                    task = "linear-1" if name == "affine" else name
                    lags, eye = 1 if name == "quadratic" else first - 1, torch.eye(5, dtype=a.dtype)
                    rows = [torch.cat([self.rows(task, a, n).T, eye], 1) for n in range(lags, known + 1)]
                    x = torch.linalg.pinv(torch.cat(rows[:-1])) @ a[lags:known].flatten()
                    errors[earlier] += (rows[-1] @ x - a[known]).norm()
            with self.subTest(name):
                self.assertLess(errors[0] / size, 1e-8)
                # A curve may be guessed from fewer vectors, though not found out.
                self.assertGreater(errors[1] / size, 0.01 if name.startswith("polynomial") else 0.2)

    def test_the_two_step_rule_is_exact_and_asks_for_c_squared_only(self):
        for c in (-2.0, -1.0, -0.3, 1e-3, 1.0, 1.7):
            a = data.sample(20, 14, seeded(), c_range=(c, c), dtype=torch.float64).a
            self.assertClose(data.two_step_rule(a[:, :-1]), a[:, 3:], 1e-9)
        still = torch.ones(1, 5, 40)
        self.assertTrue(torch.equal(data.two_step_rule(still), still[:, 2:]))

    def test_unknown_tasks_are_refused(self):
        for name in ("nonsense", "linear", "linear-0", "linear--1", "linear-x", "affine-2", "", "linear-1.5"):
            with self.assertRaisesRegex(ValueError, "task must be one of affine, quadratic, linear-K"):
                data.find_task(name)
        for name in ("linear-99", "polynomial-14"):
            with self.assertRaisesRegex(ValueError, f"task {name} is too long: .* 14"):
                data.find_task(name)
        self.assertEqual(list(data.find_task("linear-3").lengths), list(range(5, 15)))
        self.assertEqual([s.a.shape[1] for s in data.held_out(2, task="linear-3")], list(range(6, 16)))


class Model(TestCase):
    def test_outputs_are_those_of_the_papers_equations(self):
        outputs = []
        for act_fn in model.ACTIVATIONS:
            config = dataclasses.replace(SMALL, act_fn=act_fn)
            transformer, x = random_model(config), random_input()
            outputs.append(reference(transformer.state_dict(), x, config, {}))
            self.assertClose(transformer(x), outputs[-1], 1e-10)
            self.assertClose(transformer(x, cache={}), outputs[-1], 1e-10)
        self.assertGreater((outputs[0] - outputs[1]).abs().max(), 1e-3)

    def test_every_hook_point_replaces_what_it_names(self):
        transformer, x = random_model(), random_input()
        plain = transformer(x)
        for name in transformer.hook_names:
            with self.subTest(name):
                # Uneven over the last dimension, since a LayerNorm would not notice a constant; -inf stays
                # -inf.
                change = {name: lambda value: (1.2 * value + 0.1
                                               * torch.linspace(1, 2, value.shape[-1], dtype=value.dtype))}
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
        shapes = {"hook_embed": (b, p, d), "hook_pos_embed": (b, p, d), "blocks.1.hook_resid_pre": (b, p, d),
                  "blocks.1.ln1.hook_scale": (b, p, 1), "blocks.1.ln1.hook_normalized": (b, p, d)}
        shapes |= {f"blocks.1.attn.hook_{n}": (b, p, h, e)
                   for n in "qkvz"} | {f"blocks.1.attn.hook_{n}": (b, h, p, p)
                                       for n in ("attn_scores", "pattern")}
        shapes |= {"blocks.1.attn.hook_result": (b, p, h, d), "blocks.1.hook_attn_out": (b, p, d),
                   "blocks.1.hook_resid_mid": (b, p, d), "blocks.1.mlp.hook_pre": (b, p, m),
                   "blocks.1.mlp.hook_post": (b, p, m)}
        shapes |= {"blocks.1.hook_mlp_out": (b, p, d), "blocks.1.hook_resid_post": (b, p, d),
                   "ln_final.hook_scale": (b, p, 1), "ln_final.hook_normalized": (b, p, d)}
        self.assertEqual({name: tuple(cache[name].shape) for name in shapes}, shapes)

    def test_parameters_have_transformer_lens_names_and_shapes(self):
        shapes = {name: tuple(value.shape)
                  for name, value in model.Transformer(generator=seeded()).state_dict().items()}
        expected = {"embed.W_E": (40, 128), "pos_embed.W_pos": (32, 128), "ln_final.w": (128,),
                    "ln_final.b": (128,), "unembed.W_U": (128, 40), "unembed.b_U": (40,)}
        for l in range(3):
            expected |= {f"blocks.{l}.{ln}.{p}": (128,) for ln in ("ln1", "ln2") for p in "wb"}
            expected |= {f"blocks.{l}.attn.W_{n}": (8, 128, 64)
                         for n in "QKV"} | {f"blocks.{l}.attn.b_{n}": (8, 64) for n in "QKV"}
            expected |= {f"blocks.{l}.attn.W_O": (8, 64, 128), f"blocks.{l}.attn.b_O": (128,)}
            expected |= {f"blocks.{l}.mlp.W_in": (128, 3072), f"blocks.{l}.mlp.b_in": (3072,),
                         f"blocks.{l}.mlp.W_out": (3072, 128), f"blocks.{l}.mlp.b_out": (128,)}
        self.assertEqual(shapes, expected)

    def test_initial_weights_have_the_standard_deviation_of_the_specification(self):
        for config, std in ((model.Config(), 0.02), (model.Config(initializer_range=0.5), 0.5)):
            for name, value in model.Transformer(config, seeded()).state_dict().items():
                kind = name.split(".")[-1]
                if kind.startswith("W_"):
                    self.assertAlmostEqual(value.std().item() / std, 1, delta=0.04, msg=name)
                    self.assertAlmostEqual(value.mean().item() / std, 0, delta=0.05, msg=name)
                else:
                    self.assertTrue((value == (1 if kind == "w" else 0)).all(), name)

    def test_attention_is_causal(self):
        transformer, x = random_model(), random_input()
        changed = x.clone()
        changed[:, 4] += 1
        for cache in (None, {}):
            self.assertClose(transformer(changed, cache=cache)[:, :4], transformer(x, cache=cache)[:, :4],
                             1e-12)
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

    def test_settings_outside_their_range_are_refused(self):
        for name, value in (("n_heads", 0), ("d_mlp", 2.5), ("eps", 0.0), ("act_fn", "tanh"),
                            ("initializer_range", -1.0)):
            with self.assertRaisesRegex(ValueError, f"{name} must be"):
                model.Config(**{name: value})


class Folding(TestCase):
    def test_folding_preserves_outputs(self):
        for config, dtype, tolerance in ((SMALL, torch.float64, 1e-10),
                                         (model.Config(), torch.float64, 1e-10)):
            transformer, x = random_model(config, dtype), random_input(config, dtype=dtype)
            self.assertClose(model.fold(transformer)(x), transformer(x), tolerance)
        shipped, x = (model.load_weights(os.path.join(HERE, "weights", "weights.pt")),
                      data.sample(50, 14, seeded()).a[:, :-1])
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
        self.assertTrue(all(torch.equal(value, before[name])
                            for name, value in transformer.state_dict().items()))


class Files(TestCase):
    def run_folder(self, config: model.Config = SMALL) -> tuple[str, str]:
        """A folder with the config.json of a small model, and where its weights belong."""
        folder = self.folder()
        model.save_json(dataclasses.asdict(config) | {"steps": 5}, os.path.join(folder, "config.json"))
        return folder, os.path.join(folder, "weights.pt")

    def test_weights_survive_a_round_trip_bit_for_bit_and_config_json_says_how_they_are_used(self):
        config, x = dataclasses.replace(SMALL, act_fn="gelu_new", eps=0.1), random_input(dtype=torch.float32)
        folder, path = self.run_folder(config)
        transformer = random_model(config, torch.float32)
        os.mkdir(os.path.join(folder, "steps"))
        for place in (path, os.path.join(folder, "steps", "00000005.pt")):
            model.save_file(transformer.state_dict(), place)
            loaded = model.load_weights(place)
            self.assertEqual(loaded.config, config)
            self.assertTrue(torch.equal(loaded(x), transformer(x)))

    def test_weights_without_a_config_are_those_of_the_paper(self):
        path = os.path.join(self.folder(), "weights.pt")
        model.save_file(model.Transformer(generator=seeded()).state_dict(), path)
        self.assertEqual(model.load_weights(path).config, model.Config())

    def test_files_that_are_no_weights_are_refused(self):
        folder, path = self.run_folder()
        with self.assertRaises(FileNotFoundError):
            model.load_weights(path)
        state = random_model(dtype=torch.float32).state_dict()
        for change, says in (({"embed.W_E": torch.full((5, 12), torch.nan)}, "not finite"),
                             ({"embed.W_E": torch.zeros(6, 12)}, "of another model: .* is .*, expected"),
                             ({"extra": torch.zeros(1)}, "extra")):
            model.save_file(state | change, path)
            with self.assertRaisesRegex(ValueError, says):
                model.load_weights(path)
        for garbage in (b"", b"garbage", b"PK\x03\x04 truncated"):
            with open(path, "wb") as f:
                f.write(garbage)
            with self.assertRaisesRegex(ValueError, "damaged or is no weights file"):
                model.load_weights(path)
        model.save_file(state, path)
        for config, says in (("garbage", "damaged or is no config"), ('{"n_heads": "x"}', "n_heads must be")):
            with open(os.path.join(folder, "config.json"), "w") as f:
                f.write(config)
            with self.assertRaisesRegex(ValueError, says):
                model.load_weights(path)
        os.remove(os.path.join(folder, "config.json"))
        with self.assertRaisesRegex(ValueError, "lacks blocks.2"):
            model.load_weights(path)

    def test_a_failed_save_leaves_the_old_file(self):
        folder = self.folder()
        path = os.path.join(folder, "weights.pt")
        model.save_file({"x": torch.ones(2)}, path)
        with self.assertRaises(Exception):
            model.save_file({"x": lambda: None}, path)  # cannot be pickled
        self.assertEqual(model.load_file(path, "file")["x"].tolist(), [1, 1])
        self.assertEqual(os.listdir(folder), ["weights.pt"])

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_named_in_one_line(self):
        folder = self.folder()
        path = os.path.join(folder, "weights.pt")
        model.save_file({"x": torch.ones(2)}, path)
        os.symlink("/dev/full", f"{path}.tmp")
        with self.assertRaisesRegex(OSError, f"cannot write {path}: No space left on device"):
            model.save_file({"x": torch.zeros(2)}, path)
        self.assertEqual(model.load_file(path, "file")["x"].tolist(), [1, 1])


class Training(TestCase):
    def setUp(self):
        threads = torch.get_num_threads()  # which train.main sets
        self.addCleanup(torch.set_num_threads, threads)

    def settings(self, **changes) -> dict:
        small = dataclasses.asdict(SMALL_TASK) | {"steps": 6, "batch_size": 2, "eval_every": 3,
                                                  "device": "cpu"}
        return small | {"out": os.path.join(self.folder(), "run")} | changes

    def quietly(self, *runs: train.Run) -> bool:
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(train, "HELD_OUT_PER_LENGTH", 2):
            finished = train.train(list(runs))
        for run in runs:
            run.release()
        return finished

    def test_a_step_is_adamw_on_the_papers_loss(self):
        run, twin = train.Run(self.settings()), train.Run(self.settings())
        length = torch.randint(3, 15, (), generator=twin.lengths).item()
        a = data.sample(2, length, twin.sequences).a
        twin_loss = ((twin.model(a[:, :-1]) - a[:, 1:])[:, 2:] ** 2).mean()
        twin_loss.backward()
        self.assertClose(train.Trainer([run]).train_step(), twin_loss.detach(), 1e-6)
        for (name, after), before in zip(run.model.named_parameters(), twin.model.parameters()):
            g = before.grad
            with self.subTest(name):  # the moments are those of g alone, corrected to g and g^2
                expected = before * (1 - 1e-4 * 0.01) - 1e-4 * g / (g.abs() + 1e-8)
                self.assertClose(after.detach(), expected.detach(), 1e-7)

    def stack(self, seeds) -> tuple[list[train.Run], train.Trainer]:
        runs = [train.Run(self.settings(seed=seed)) for seed in seeds]
        return runs, train.Trainer(runs)

    def test_a_stacked_step_is_a_step_of_each_run(self):
        runs, stack = self.stack((1, 2, 3))
        alone = [train.Run(self.settings(seed=seed)) for seed in (1, 2, 3)]
        for length in (5, 14, 3):
            losses = stack.compute(length)
            self.assertClose(losses, torch.stack([train.Trainer([run]).compute(length) for run in alone]),
                             1e-6)
        stack.write_back()
        for a, b in zip(runs, alone):
            # AdamW divides by the gradient's size, so that rounding errors of tiny gradients show in the
            # weights
            for p, q in zip(a.parameters, b.parameters):
                self.assertClose(p.detach(), q.detach(), 2e-4)
                self.assertClose(a.optimizer.state[p]["exp_avg"], b.optimizer.state[q]["exp_avg"], 1e-6)
                self.assertEqual(a.optimizer.state[p]["step"], 3)
        self.assertGreater((runs[0].parameters[0] - runs[1].parameters[0]).abs().max(), 0.01)

    def test_a_stack_goes_on_where_its_runs_stopped(self):
        runs, stack = self.stack((1, 2))
        for _ in range(3):
            stack.train_step()
        stack.write_back()
        for run in runs:
            self.assertTrue(torch.equal(run.lengths.get_state(), runs[0].lengths.get_state()))
            run.step = 3
            os.makedirs(run.options.out)
            run.save()
        again = train.Trainer([train.open_run({"out": run.options.out}, resume=True) for run in runs])
        for _ in range(3):
            self.assertTrue(torch.equal(stack.train_step(), again.train_step()))

    def test_stacked_runs_write_what_single_runs_write(self):
        runs = [train.open_run(self.settings(seed=seed), resume=False) for seed in (1, 2)]
        first = [{name: p.detach().clone() for name, p in run.model.named_parameters()} for run in runs]
        self.assertTrue(self.quietly(*runs))
        for run, initial in zip(runs, first):
            self.assertEqual(sorted(os.listdir(run.options.out)), sorted([*train.FILES, "steps"]))
            self.assertEqual(sorted(os.listdir(run.path("steps"))), [f"0000000{n}.pt" for n in (0, 1, 2, 4)])
            self.assertEqual(analyze.read_log(run.path("log.csv"))["step"].tolist(), [3, 6])
            loaded, begun = (model.load_weights(run.path(name))
                             for name in ("weights.pt", "steps/00000000.pt"))
            self.assertEqual(loaded.config, SMALL_TASK)
            self.assertTrue(all(torch.equal(p, q) for p, q in zip(loaded.parameters(), run.parameters)))
            self.assertTrue(all(torch.equal(p, initial[name]) for name, p in begun.named_parameters()))
            single = train.open_run({"out": run.options.out, "steps": 7}, resume=True)
            self.assertTrue(self.quietly(single))

    def test_steps_are_kept_ever_further_apart(self):
        kept = [step for step in range(100_001) if train.is_kept(step)]
        powers = [2**k for k in range(10)]
        self.assertEqual(kept, [0, *powers, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000])
        run = train.open_run(self.settings(no_steps=True), resume=False)
        self.quietly(run)
        self.assertFalse(os.path.exists(run.path("steps")))

    def test_two_ranks_share_the_seeds_and_resume(self):
        out, single = self.folder(), os.path.join(self.folder(), "single")
        common = "--d-mlp 20 --batch-size 2 --threads 1 --device cpu --eval-every 2".split()

        def torchrun(*more: str):
            launch = "-m torch.distributed.run --nproc_per_node=2 --master_port=0 train.py --seeds 0-2"
            command_line = [sys.executable, *launch.split(), "--out", out, *more]
            done = subprocess.run(command_line, cwd=HERE, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)

        torchrun("--steps", "2", *common)
        shutil.rmtree(os.path.join(out, "seed_0001"))  # as if everything had been killed before seed 1 began
        torchrun("--steps", "4", "--resume", "--threads", "1")
        self.assertEqual(sorted(os.listdir(out)), ["seed_0000", "seed_0001", "seed_0002"])
        configs = [json.loads(read(os.path.join(out, f"seed_000{seed}", "config.json"))) for seed in range(3)]
        self.assertEqual([config.pop("seed") for config in configs], [0, 1, 2])
        self.assertEqual([configs[0]] * 3, configs)  # the one that began later too
        self.assertEqual(command(train.main, *common, "--seed", "2", "--steps", "4", "--out", single)[0], 0)
        weights = [read(os.path.join(run, "weights.pt")) for run in (single, os.path.join(out, "seed_0002"))]
        self.assertEqual(*weights)
        logs = [analyze.read_log(os.path.join(out, f"seed_000{seed}", "log.csv")) for seed in range(3)]
        self.assertEqual([log["step"].tolist()[-1] for log in logs], [4] * 3)

    def test_several_seeds_are_refused_before_any_is_touched(self):
        out = self.folder()
        os.makedirs(os.path.join(out, "seed_0001"))
        with open(os.path.join(out, "seed_0001", "weights.pt"), "wb") as f:
            f.write(b"precious")
        says = "seed_0001 already holds a run"
        self.assertRefused(1, says, train.main, "--seeds", "0-1", "--steps", "1", "--device", "cpu", "--out",
                           out)
        self.assertEqual(os.listdir(out), ["seed_0001"])
        self.assertEqual(read(os.path.join(out, "seed_0001", "weights.pt")), b"precious")

    def test_bfloat16_is_near_float32_and_keeps_float32_weights(self):
        runs = [train.Run(self.settings(dtype=dtype, batch_size=16)) for dtype in ("float32", "bfloat16")]
        trainers = [train.Trainer([run]) for run in runs]
        losses = torch.stack([torch.stack([trainer.train_step() for _ in range(20)]) for trainer in trainers])
        self.assertClose(losses[1] / losses[0], 1, 0.05)
        self.assertFalse(torch.equal(losses[0], losses[1]))
        self.assertTrue(all(p.dtype == torch.float32 for p in runs[1].parameters))

    def test_benchmark_parts_add_up(self):
        table = train.benchmark(self.settings(), 36)
        rows = {row[:14].strip(): row[14:].split() for row in table.splitlines()}
        parts = sum(float(rows[name][0]) for name in ("sampling", "forward", "backward", "AdamW"))
        self.assertAlmostEqual(parts, float(rows["step"][0]), delta=0.25 * parts)
        self.assertGreater(float(rows["products"][0]), 0)

    def test_a_step_makes_all_its_tensors_on_its_device(self):
        """Seen on the meta device, which like a GPU refuses to work with a tensor that was made on the
        CPU."""
        run, stack = train.Run(self.settings()), self.stack((1, 2))[1]
        run.model.to("meta")
        stack.named = {name: p.detach().to("meta").requires_grad_() for name, p in stack.named.items()}
        with mock.patch("torch.rand", lambda *shape, generator, **like: torch.empty(shape, **like)):
            for task in ("linear-2", "linear-3", "polynomial-2", "quadratic", "affine"):
                a = data.sample(2, 5, mock.Mock(device=torch.device("meta")), task=task).a
        losses = train.Trainer([run]).loss(a), stack.loss(torch.stack([a, a]))
        for loss, parameters in zip(losses, (run.model.parameters(), stack.named.values())):
            loss.sum().backward()
            self.assertEqual({p.grad.device.type for p in parameters}, {"meta"})

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_benchmark_times_the_captured_step_on_cuda(self):
        table = train.benchmark(self.settings(device="cuda"), 36)
        rows = {row[:14].strip(): row[14:].split() for row in table.splitlines()}
        self.assertLess(0, float(rows["captured step"][0]))
        self.assertLess(float(rows["captured step"][0]), float(rows["step"][0]))

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_captured_steps_are_the_plain_steps(self):
        for seeds in ((1,), (1, 2, 3)):
            runs = [[train.Run(self.settings(seed=seed, device="cuda")) for seed in seeds] for _ in range(2)]
            plain, captured = (train.Trainer(each) for each in runs)
            captured.capture()
            self.assertEqual(sorted(captured.graphs), list(range(3, 15)))
            for p, q in zip(plain.parameters, captured.parameters):
                self.assertTrue(torch.equal(p, q))  # capturing put everything back
            losses = [torch.stack([trainer.train_step().clone() for _ in range(30)])
                      for trainer in (plain, captured)]
            self.assertClose(losses[0] / losses[1], 1, 1e-3)

    def test_where_capturing_fails_training_goes_on_without(self):
        """The capture itself cannot be had without CUDA; that it fails, and is survived, can."""
        run, twin = (train.Run(self.settings(seed=4)) for _ in range(2))
        trainer, out = train.Trainer([run]), io.StringIO()
        names = ("Stream", "current_stream", "stream", "set_device", "set_stream", "synchronize")
        broken = mock.Mock(side_effect=RuntimeError("no capture here\nat all"))
        patches = {name: mock.MagicMock() for name in names} | {"graph_pool_handle": broken}
        with contextlib.redirect_stdout(out), mock.patch.multiple("torch.cuda", **patches):
            trainer.capture()
        self.assertEqual(out.getvalue(), "training without CUDA graphs, which failed: no capture here\n")
        self.assertEqual(trainer.graphs, {})
        other = train.Trainer([twin])
        for _ in range(3):  # the warm-up left no trace
            self.assertTrue(torch.equal(trainer.train_step(), other.train_step()))

    def test_training_lowers_the_loss(self):
        sizes = {"d_model": 32, "d_head": 8, "d_mlp": 64, "n_heads": 2, "initializer_range": 0.15}
        trainer = train.Trainer([train.Run(self.settings(lr=1e-3, batch_size=16, **sizes))])
        losses = torch.stack([trainer.train_step() for _ in range(300)])
        self.assertLess(losses[-50:].mean(), 0.5 * losses[:50].mean())

    def test_seeds_give_different_runs_and_the_same_seed_the_same(self):
        losses = [train.Trainer([train.Run(self.settings(seed=seed))]).train_step() for seed in (1, 1, 2)]
        self.assertEqual(losses[0], losses[1])
        self.assertNotEqual(losses[0], losses[2])

    def in_parts(self, device: str, seeds: tuple[int, ...], *parts: int) -> list[train.Run]:
        """The runs of `seeds`, trained together up to each step of `parts` in turn, in a sitting of its
        own."""
        all_settings = [self.settings(seed=seed, device=device) for seed in seeds]
        for before, steps in zip((0, *parts), parts):
            runs = [train.open_run(settings | {"steps": steps}, resume=before > 0)
                    for settings in all_settings]
            self.assertEqual([run.step for run in runs], [before] * len(runs))
            self.assertTrue(self.quietly(*runs))
        return runs

    def assertPartsMakeAWhole(self, device: str):
        for seeds in ((1,), (1, 2, 3)):
            for whole, part in zip(self.in_parts(device, seeds, 9), self.in_parts(device, seeds, 4, 9),
                                   strict=True):
                for a, b in zip(whole.model.parameters(), part.model.parameters()):
                    self.assertTrue(torch.equal(a, b))

    def test_a_run_in_two_parts_equals_one_in_one_part(self):
        self.assertPartsMakeAWhole("cpu")

    def test_every_task_trains_from_its_first_position_on_and_resumes_to_the_same_bits(self):
        for task in ("linear-2", "linear-3", "polynomial-1", "polynomial-3", "quadratic"):
            with self.subTest(task):
                whole = self.settings(task=task, steps=6, seed=3)
                self.assertTrue(self.quietly(whole_run := train.open_run(whole, resume=False)))
                part = self.settings(task=task, steps=2, seed=3)
                self.assertTrue(self.quietly(train.open_run(part, resume=False)))
                again = train.open_run({"out": part["out"], "steps": 6}, resume=True)
                self.assertEqual(again.options.task, task)
                self.assertTrue(self.quietly(again))
                for a, b in zip(whole_run.model.parameters(), again.model.parameters()):
                    self.assertTrue(torch.equal(a, b))
                with self.assertRaisesRegex(ValueError, f"task {task}, not affine"):
                    train.open_run({"out": part["out"], "task": "affine"}, resume=True)
                first, trainer = data.find_task(task).first, train.Trainer([again])
                a = data.sample(2, 14, seeded(), task=task).a
                error = (again.model(a[:, :-1]) - a[:, 1:])[:, first:].pow(2).mean()
                self.assertClose(trainer.loss(a).detach(), error.detach(), 1e-6)

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_a_run_in_two_parts_equals_one_in_one_part_on_cuda(self):
        self.assertPartsMakeAWhole("cuda")

    def test_a_killed_run_resumes_to_the_same_bits_and_the_same_log(self):
        folder = self.folder()
        script = "import train; train.SAVE_SECONDS = 0; train.CHUNK = 5; train.main()"
        arguments = [sys.executable, "-c", script, "--d-mlp", "20", "--steps", "400", "--eval-every", "10"]
        arguments += ["--batch-size", "2", "--device", "cpu", "--out"]
        start = lambda out, *more: subprocess.Popen([*arguments, os.path.join(folder, out), *more], cwd=HERE,
                                                    stdout=subprocess.PIPE, text=True)
        whole = start("whole")
        whole.communicate()
        self.assertEqual(whole.returncode, 0)

        killed = start("killed")
        killed.stdout.readline()  # the first row of the log is written: now it is somewhere after it
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        self.assertEqual(killed.returncode, -signal.SIGKILL)
        self.assertLess(train.load_file(os.path.join(folder, "killed", "checkpoint.pt"),
                                        "checkpoint")["step"], 400)
        resumed = start("killed", "--resume")  # the lock of the killed run does not outlive it
        resumed.communicate()
        self.assertEqual(resumed.returncode, 0)

        for name in ("weights.pt", os.path.join("steps", "00000256.pt")):
            self.assertEqual(*(read(os.path.join(folder, out, name)) for out in ("whole", "killed")))
        logs = [read(os.path.join(folder, out, "log.csv")).decode().split() for out in ("whole", "killed")]
        self.assertEqual(*([line.split(",")[:3] for line in log] for log in logs))
        self.assertEqual([line.split(",")[0] for line in logs[0]], ["step", *map(str, range(10, 401, 10))])

    def test_a_folder_in_use_is_refused_until_its_run_ends(self):
        settings = self.settings()
        run = train.open_run(settings, resume=False)
        before = read(run.path("checkpoint.pt"))
        with self.assertRaisesRegex(ValueError, "in use by a run: stop that one first"):
            train.open_run(settings, resume=True)
        child = [sys.executable, "train.py", "--resume", "--out", settings["out"]]
        done = subprocess.run(child, cwd=HERE, capture_output=True, text=True)
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)
        self.assertIn("in use by a run", done.stderr)
        self.assertEqual(read(run.path("checkpoint.pt")), before)
        run.release()
        self.assertEqual(train.open_run(settings, resume=True).step, 0)

    def test_saving_goes_by_the_clock_and_loses_nothing_at_the_end(self):
        run, saves = train.open_run(self.settings(steps=9, eval_every=1), resume=False), []
        save = run.save
        with mock.patch.object(run, "save", lambda: saves.append(run.step) or save()):
            self.quietly(run)
        self.assertEqual(saves, [9])
        self.assertEqual(analyze.read_log(run.path("log.csv"))["step"].tolist(), list(range(1, 10)))
        run, saves = train.open_run(self.settings(steps=9, eval_every=3), resume=False), []
        save, ticks = run.save, itertools.count(0, 10)
        with mock.patch.object(run, "save", lambda: saves.append(run.step) or save()):
            with mock.patch.object(train.time, "perf_counter", lambda: next(ticks)):
                self.quietly(run)
        self.assertGreater(len(saves), 1)
        self.assertEqual(saves[-1], 9)

    def test_an_interrupt_saves_between_two_steps_and_says_how_to_go_on(self):
        run = train.open_run(self.settings(steps=1000), resume=False)
        step, taken = train.Trainer.train_step, 0

        def interrupted_step(trainer):
            nonlocal taken
            taken += 1
            if taken == 5:
                signal.raise_signal(signal.SIGINT)
            return step(trainer)

        with mock.patch.object(train.Trainer, "train_step", interrupted_step):
            self.assertFalse(self.quietly(run))
        state = train.load_file(run.path("checkpoint.pt"), "checkpoint")
        self.assertEqual((state["step"], state["loss_count"]), (5, 2))  # the third step made a row of the log
        taken, out = 0, os.path.join(self.folder(), "a run")
        small = ["--d-mlp", "20", "--batch-size", "2", "--device", "cpu", "--out", out]
        with mock.patch.object(train.Trainer, "train_step", interrupted_step):
            status, said, _ = command(train.main, *small)
        self.assertEqual(status, 130)
        self.assertIn(f"python train.py --d-mlp 20 --batch-size 2 --device cpu --out '{out}' --resume", said)

    def test_an_interrupt_while_evaluating_saves_too(self):
        run = train.open_run(self.settings(steps=1000), resume=False)
        evaluate = data.evaluate

        def interrupted(*arguments):
            signal.raise_signal(signal.SIGINT)
            return evaluate(*arguments)

        with mock.patch.object(data, "evaluate", interrupted):
            self.assertFalse(self.quietly(run))
        state = train.load_file(run.path("checkpoint.pt"), "checkpoint")
        self.assertEqual((state["step"], state["log"][-1][0]), (4, 3))  # one more step: so the loop sees it

    def test_an_interrupt_in_the_last_step_of_a_seed_stops_those_after_it(self):
        out, step, taken = self.folder(), train.Trainer.train_step, []

        def interrupted(trainer):
            taken.append(trainer.runs[0].options.seed)
            if len(taken) == 2:
                signal.raise_signal(signal.SIGINT)
            return step(trainer)

        options = "--d-mlp 20 --batch-size 2 --device cpu --steps 2 --seeds 0-1 --out".split()
        with mock.patch.object(train.Trainer, "train_step", interrupted):
            self.assertEqual(command(train.main, *options, out)[0], 130)
            self.assertEqual(command(train.main, *options, out, "--resume")[0], 0)
        self.assertEqual(taken, [0, 0, 1, 1])

    def test_one_seed_that_diverges_saves_nothing_of_any(self):
        runs = [train.open_run(self.settings(seed=seed), resume=False) for seed in (1, 2)]
        before = [read(run.path("checkpoint.pt")) for run in runs]
        errors = iter([0.1, float("nan")])
        with (mock.patch.object(data, "evaluate", lambda *_: next(errors)),
              self.assertRaisesRegex(FloatingPointError, r"the held-out MSE .* is nan \(seed 2\)")):
            self.quietly(*runs)
        self.assertEqual([read(run.path("checkpoint.pt")) for run in runs], before)

    def test_a_line_never_wraps_on_a_terminal(self):
        terminal = io.StringIO()
        with (mock.patch.object(terminal, "isatty", lambda: True),
              mock.patch.dict(os.environ, {"COLUMNS": "30"})):
            train.Line(terminal).show("x" * 50)
        self.assertEqual(terminal.getvalue(), "\r" + "x" * 29 + "\x1b[K")

    def test_several_seeds_must_agree_in_all_but_the_seed(self):
        out = self.folder()
        small = ["--d-mlp", "20", "--batch-size", "2", "--device", "cpu", "--steps", "2", "--out"]
        self.assertEqual(command(train.main, *small, os.path.join(out, "seed_0000"))[0], 0)
        other = ["--seed", "1", "--lr", "0.01"]
        self.assertEqual(command(train.main, *small, os.path.join(out, "seed_0001"), *other)[0], 0)
        says = "seed_0001 was not trained with the settings of"
        self.assertRefused(1, says, train.main, "--seeds", "0-1", "--resume", "--device", "cpu", "--out", out)

    def test_a_toy_model_of_another_dimension_trains(self):
        run = train.open_run(self.settings(d_vocab=7), resume=False)
        self.assertTrue(self.quietly(run))
        self.assertEqual(model.load_weights(run.path("weights.pt")).config.d_vocab, 7)

    def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(self):
        run = train.open_run(self.settings(lr=1e30, steps=50, eval_every=50), resume=False)
        before = read(run.path("checkpoint.pt"))
        with self.assertRaisesRegex(FloatingPointError, r"the loss at step \d+ is (nan|inf) \(seed 0\)"):
            self.quietly(run)
        self.assertEqual(read(run.path("checkpoint.pt")), before)

    def test_folders_that_cannot_be_used_are_refused_and_left_as_they_are(self):
        settings = self.settings()
        with self.assertRaisesRegex(FileNotFoundError, "there is no checkpoint"):
            train.open_run(settings, resume=True)
        self.assertFalse(os.path.exists(settings["out"]))
        train.open_run(settings, resume=False).release()
        path = os.path.join(settings["out"], "checkpoint.pt")
        good = read(path)
        with self.assertRaisesRegex(ValueError, "already holds a run"):
            train.open_run(settings, resume=False)
        for changes, says in (({"lr": 1e-3}, "lr 0.0001, not 0.001"),
                              ({"batch_size": 3}, "batch_size 2, not 3"), ({"seed": 5}, "seed 0, not 5"),
                              ({"n_layers": 1}, "n_layers 2, not 1"),
                              ({"act_fn": "gelu_new"}, "act_fn relu, not gelu_new")):
            with self.assertRaisesRegex(ValueError, says):
                train.open_run({"out": settings["out"]} | changes, resume=True)
        self.assertEqual(read(path), good)
        config = os.path.join(settings["out"], "config.json")
        good_config = read(config)
        for bad, says in ((b'{"speed": 3}', "no setting 'speed'"), (b'{"lr": 3}', "lr 0.0001, not 3"),
                          (good_config[:20], "damaged or is no config")):
            with open(config, "wb") as f:
                f.write(bad)
            with self.assertRaisesRegex(ValueError, says):
                train.open_run({"out": settings["out"]}, resume=True)
            self.assertEqual(read(config), bad)
        os.remove(config)  # the checkpoint knows too
        train.open_run({"out": settings["out"]}, resume=True).release()
        self.assertEqual(read(config), good_config)
        train.open_run({"out": settings["out"], "steps": 77}, resume=True).release()
        longer = train.open_run({"out": settings["out"]}, resume=True)  # knows, even if it is killed at once
        longer.release()
        self.assertEqual(longer.options.steps, 77)
        for bad in (good[: len(good) // 2], b"garbage"):
            with open(path, "wb") as f:
                f.write(bad)
            with self.assertRaisesRegex(ValueError, "damaged or is no checkpoint"):
                train.open_run({"out": settings["out"]}, resume=True)
            self.assertEqual(read(path), bad)

    def test_bad_command_lines_are_refused_in_one_line(self):
        out = os.path.join(self.folder(), "run")
        for arguments, says in ((["--steps", "0"], "at least 1, not 0"),
                                (["--steps", "-5"], "at least 1, not -5"),
                                (["--steps", "many"], "invalid int"), (["--batch-size", "0"], "at least 1"),
                                (["--lr", "nan"], "finite"), (["--lr", "-1"], "above 0"),
                                (["--lr", "0"], "above 0"), (["--weight-decay", "inf"], "at least 0"),
                                (["--device", "nonsense"], "must be cpu, cuda or cuda:N"),
                                (["--device", "cuda:99"], "99"), (["--device", "cpu:"], "must be cpu, cuda"),
                                (["--threads", "99999"], "at most 4096"),
                                (["--benchmark", "--seeds", "0-1"], "neither --seeds nor --resume"),
                                (["--dtype", "float16"], "float32, bfloat16"),
                                (["--n-layers", "0"], "at least 1"), (["--act-fn", "tanh"], "relu, gelu_new"),
                                (["--task", "nonsense"], "must be one of affine"),
                                (["--task", "linear-0"], "K of at least 1"),
                                (["--task", "linear-99"], "too long"),
                                (["--initializer-range", "0"], "above 0"),
                                (["--initializer-range", "nan"], "above 0"),
                                (["--n-ctx", "8"], "n_ctx must be at least 14"),
                                (["--seeds", "5-2"], "seeds such as"), (["--seeds", "1,1"], "twice"),
                                (["--speed", "high"], "unrecognized")):
            trains = mock.patch.object(train, "train_all", side_effect=AssertionError("it trains"))
            with self.subTest(arguments), trains:
                self.assertRefused(2, says, train.main, *arguments, "--out", out)
        self.assertFalse(os.path.exists(out))
        for seeds in ([], ["--seeds", "0-1"]):
            self.assertRefused(1, "nothing to resume", train.main, "--resume", *seeds, "--out", out)
        self.assertFalse(os.path.exists(out))
        blocked = os.path.join(self.folder(), "file")
        open(blocked, "w").close()
        self.assertRefused(1, "file", train.main, "--device", "cpu", "--out", os.path.join(blocked, "run"))

    def test_every_setting_is_an_option_with_a_help_text(self):
        text = command(train.main, "--help")[1]
        for field in (*dataclasses.fields(train.Options), *dataclasses.fields(model.Config)):
            self.assertIn(train.flag(field.name), text)
            self.assertTrue(field.metadata["help"])

    @unittest.skipIf(torch.cuda.is_available(), "this machine has CUDA")
    def test_cuda_is_refused_where_there_is_none(self):
        out = os.path.join(self.folder(), "run")
        self.assertRefused(2, "use cpu", train.main, "--device", "cuda", "--out", out)

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_cuda_starts_from_the_same_weights_and_learns_the_same(self):
        cpu, cuda = (train.Run(self.settings(device=device)) for device in ("cpu", "cuda"))
        for a, b in zip(cpu.model.parameters(), cuda.model.parameters()):
            self.assertTrue(torch.equal(a, b.cpu()))
        a = data.sample(16, 14, seeded()).a
        losses = []
        for run in (cpu, cuda):
            trainer = train.Trainer([run])
            with mock.patch.object(data, "sample",
                                   lambda *_: data.Sample(a.to(run.options.device), None, None)):
                losses.append([trainer.train_step().item() for _ in range(20)])
        self.assertClose(torch.tensor(losses[0]) / torch.tensor(losses[1]), 1, 1e-3)


class Interventions(TestCase):
    def setUp(self):
        self.model, self.x, self.cache = random_model(), random_input(), {}
        self.plain = self.model(self.x, cache=self.cache)

    def test_zero_ablation_is_a_model_without_those_weights(self):
        hooks = interventions.replace_outputs(interventions.zero_outputs(self.model),
                                              [(0, 1), (0, 2), (1, 0)], mlps=[1])
        without = random_model()
        without.blocks[0].attn.W_O[[1, 2]] = 0
        without.blocks[1].attn.W_O[0] = 0
        without.blocks[1].mlp.W_out.zero_()
        without.blocks[1].mlp.b_out.zero_()
        self.assertClose(self.model(self.x, hooks=hooks), without(self.x), 1e-10)

    def test_mean_ablation_replaces_a_head_by_its_mean(self):
        at_each = interventions.mean_outputs(self.cache)
        over_positions = {name: mean.mean(0) for name, mean in at_each.items()}
        for means, dims in ((at_each, 0), (over_positions, (0, 1))):
            after = {}
            self.model(self.x, hooks=interventions.replace_outputs(means, [(0, 2)], [0]), cache=after)
            z = self.cache["blocks.0.attn.hook_z"]
            self.assertClose(after["blocks.0.attn.hook_z"][:, :, 2],
                             z.mean(dims)[..., 2, :].expand_as(z[:, :, 2]), 1e-12)
            self.assertTrue(torch.equal(after["blocks.0.attn.hook_z"][:, :, :2], z[:, :, :2]))
            mlp = self.cache["blocks.0.hook_mlp_out"]
            self.assertClose(after["blocks.0.hook_mlp_out"], mlp.mean(dims).expand_as(mlp), 1e-12)

    def test_recording_changes_nothing_and_keeps_the_last_pass(self):
        other, kept, name = random_input(seed=7), {}, "blocks.1.hook_resid_pre"
        hooks, cache = interventions.record([name], kept), {}
        self.assertTrue(torch.equal(self.model(self.x, hooks=hooks), self.model(self.x)))
        self.assertClose(self.model(other, hooks=hooks), self.model(other, cache=cache), 1e-12)
        self.assertClose(kept[name], cache[name], 1e-12)

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

    def test_patching_positions_changes_those_only(self):
        other, name = {}, "blocks.1.attn.hook_v"
        self.model(random_input(seed=7), cache=other)
        after: dict = {}
        self.model(self.x, hooks=interventions.patch_positions({name: other[name]}, [1, 3]), cache=after)
        for position in range(6):
            source = other if position in (1, 3) else self.cache
            self.assertTrue(torch.equal(after[name][:, position], source[name][:, position]))

    def test_a_held_scale_is_what_the_final_layernorm_divides_by(self):
        scale = "ln_final.hook_scale"
        doubled = self.model(self.x, hooks=interventions.hold({scale: 2 * self.cache[scale]}))
        biases = self.model.ln_final.b @ self.model.unembed.W_U + self.model.unembed.b_U
        self.assertClose(2 * (doubled - biases), self.plain - biases, 1e-10)

    def test_kept_and_removed_directions_add_up(self):
        name = "blocks.0.hook_attn_out"
        value = self.cache[name]
        mean, directions = (value.mean(0),
                            torch.linalg.qr(torch.randn(12, 2, generator=seeded(), dtype=torch.double))[0].T)
        kept = interventions.keep_directions(name, mean, directions)[name](value)
        removed = interventions.remove_directions(name, mean, directions)[name](value)
        self.assertClose(kept + removed, value + mean, 1e-12)
        self.assertEqual(torch.linalg.matrix_rank((kept - mean).flatten(0, 1)).item(), 2)
        self.assertClose((removed - mean) @ directions.T, 0, 1e-12)

    def test_pseudoinverse_qk_is_a_projection_of_rank_d_head(self):
        changed = interventions.pseudoinverse_qk(self.model, 1, [0, 2], seeded())
        P = model.qk_circuit(changed, 1)
        for head in (0, 2):
            self.assertClose(P[head] @ P[head], P[head], 1e-9)
            self.assertClose(P[head], P[head].T, 1e-9)
            self.assertAlmostEqual(P[head].trace().item(), SMALL.d_head, places=9)
            self.assertEqual(torch.linalg.matrix_rank(P[head]).item(), SMALL.d_head)
        self.assertClose(P[1], model.qk_circuit(self.model, 1)[1], 1e-12)
        self.assertTrue(torch.equal(self.model(self.x), random_model()(self.x)))  # which was not changed

    def test_random_qk_is_as_large_as_the_trained_one(self):
        changed = interventions.random_qk(self.model, 0, [0, 1], seeded())
        before, after = model.qk_circuit(self.model, 0), model.qk_circuit(changed, 0)
        self.assertClose(after.norm(dim=(1, 2)), before.norm(dim=(1, 2)), 1e-9)
        self.assertGreater((after - before)[:2].abs().max(), 0.01)
        self.assertClose(after[2], before[2], 1e-12)

    def test_qk_of_zero_is_uniform_attention(self):
        cache = {}
        interventions.replace_qk(self.model, 1, [1], 0.0, 0.0)(self.x, cache=cache)
        uniform = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
        self.assertClose(cache["blocks.1.attn.hook_pattern"][:, 1], uniform, 1e-7)
        self.assertClose(cache["blocks.1.attn.hook_pattern"][:, 0],
                         self.cache["blocks.1.attn.hook_pattern"][:, 0], 1e-12)


class Measures(TestCase):
    def test_eigenvalue_score_of_known_circuits(self):
        quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        for matrix, score in ((torch.eye(4), 1), (-torch.eye(4), -1), (quarter_turn, 0),
                              (torch.diag(torch.tensor([3.0, -1.0])), 0.5)):
            self.assertAlmostEqual(model.eigenvalue_score(matrix).item(), score, places=6)

    def test_eigenvalue_score_of_thin_factors_is_that_of_their_product(self):
        transformer = random_model()
        product = torch.stack([model.eigenvalue_score(model.ov_circuit(transformer, l))
                               for l in range(2)])
        self.assertClose(analyze.ov_eigenvalue_scores(transformer)[0], product, 1e-5)

    def test_effective_rank_of_known_matrices(self):
        rotation = torch.linalg.qr(torch.randn(6, 6, generator=seeded()))[0]
        for matrix, rank in ((torch.outer(torch.arange(1.0, 4), torch.ones(5)), 1), (rotation, 6),
                             (torch.diag(torch.tensor([2.0, 1.0, 0.0])), 9 / 5)):
            self.assertAlmostEqual(model.effective_rank(matrix).item(), rank, places=4)

    def test_identity_cosine_of_known_matrices(self):
        quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        half = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        for matrix, cosine in ((3 * torch.eye(5), 1), (-torch.eye(5), -1), (quarter_turn, 0),
                               (half, 0.5**0.5)):
            self.assertAlmostEqual(model.identity_cosine(matrix).item(), cosine, places=6)

    def test_share_outside_a_subspace(self):
        W_E = torch.eye(128)[:40]
        self.assertAlmostEqual(analyze.outside_share(W_E[3] + W_E[5], W_E).item(), 0, places=6)
        self.assertAlmostEqual(analyze.outside_share(torch.eye(128)[50], W_E).item(), 1, places=6)
        self.assertAlmostEqual(analyze.outside_share(torch.eye(128)[0] + torch.eye(128)[90], W_E).item(),
                               0.5**0.5, places=6)
        W_E = torch.randn(40, 128, generator=seeded())
        self.assertAlmostEqual(analyze.outside_share(torch.randn(500, 128, generator=seeded(1)),
                                                     W_E).mean().item(), (88 / 128) ** 0.5, delta=0.01)

    def test_line_and_plane_are_recovered(self):
        x = torch.randn(3, 50, generator=seeded(), dtype=torch.double)
        slope, intercept, r2 = analyze.fit_line(x, -2 * x + 1)
        self.assertClose(slope, -2, 1e-9)
        self.assertClose(intercept, 1, 1e-9)
        self.assertClose(r2, 1, 1e-9)
        noise = torch.randn(3, 50, generator=seeded(9), dtype=torch.double)
        self.assertClose(analyze.fit_line(x, x + noise)[2],
                         torch.stack([torch.corrcoef(torch.stack([u, u + v]))[0, 1] ** 2
                                      for u, v in zip(x, noise)]), 1e-9)
        coefficients, r2 = analyze.regress(3 * x - 0.5 * noise, x, noise)
        self.assertClose(coefficients, torch.tensor([3, -0.5]), 1e-9)
        self.assertAlmostEqual(r2, 1)

    def test_attention_scores_of_known_patterns(self):
        previous = torch.diag(torch.ones(13), -1)[None, None]
        previous[0, 0, 0, 0] = 1
        second = torch.zeros(1, 1, 14, 14)
        second[:, :, :, 1] = 1
        self.assertEqual(analyze.previous_token_score(previous).item(), 1)
        self.assertEqual(analyze.second_token_score(previous).item(), 0)
        self.assertEqual(analyze.second_token_score(second).item(), 1)
        uniform = torch.ones(1, 1, 14, 14).tril() / torch.arange(1, 15)[:, None]
        self.assertAlmostEqual(analyze.previous_token_score(uniform).item(),
                               sum(1 / (q + 1) for q in range(1, 14)) / 13, places=6)

    def test_components_sum_to_output(self):
        transformer, x, kept = random_model(), random_input(), {}
        y, target = transformer(x, cache=kept), random_input(seed=5)
        scale = kept["ln_final.hook_scale"]
        part = lambda component: model.direct_attribution(transformer, component, target, scale)
        total = part(kept["hook_embed"]) + part(kept["hook_pos_embed"])
        for l, block in enumerate(transformer.blocks):
            total = (total + part(kept[f"blocks.{l}.attn.hook_result"]).sum(-1)
                     + part(block.attn.b_O.expand_as(kept["hook_embed"]))
                     + part(kept[f"blocks.{l}.hook_mlp_out"]))
        biases = transformer.ln_final.b @ transformer.unembed.W_U + transformer.unembed.b_U
        self.assertClose(total + target @ biases, (y * target).sum(-1), 1e-9)

    def test_the_papers_attribution_forgets_the_size_of_a_component(self):
        transformer, target, component = (random_model(), random_input(seed=5),
                                          torch.randn(4, 6, 3, 12, generator=seeded(), dtype=torch.double))
        once = model.direct_attribution(transformer, component, target)
        self.assertEqual(once.shape, (4, 6, 3))
        self.assertClose(model.direct_attribution(transformer, 1000 * component, target), once, 1e-3)

    def test_the_solver_finds_the_next_vector_whatever_c_is(self):
        for c in (-2.0, -1.0, -1e-3, 0.0, 0.5, 1.0, 1.7):
            a = [torch.randn(1, 40, generator=seeded(), dtype=torch.float64)]
            d = torch.randn(1, 40, generator=seeded(1), dtype=torch.float64)
            for _ in range(6):
                a.append(c * a[-1] + d)
            a = torch.stack(a, 1)
            self.assertClose(data.solve_recurrence(a[:, :-1]), a[:, 3:], 1e-9)
        still = torch.ones(1, 5, 40)
        self.assertTrue(torch.equal(data.solve_recurrence(still), still[:, 2:]))

    def test_the_solver_is_least_squares_on_vectors_that_are_no_recurrence(self):
        x = torch.randn(1, 3, 4, generator=seeded(), dtype=torch.float64)
        # Unknowns c, d_0 .. d_3 of the equations x_1 = c x_0 + d and x_2 = c x_1 + d.
        equations = torch.cat([torch.cat([x[0, i][:, None], torch.eye(4, dtype=x.dtype)], 1)
                               for i in range(2)])
        c, *d = torch.linalg.lstsq(equations, x[0, 1:].flatten()[:, None]).solution[:, 0]
        self.assertClose(data.solve_recurrence(x)[0, 0], c * x[0, 2] + torch.stack(d), 1e-9)

    def test_alternation_of_known_patterns(self):
        n, s = torch.arange(14)[:, None], torch.arange(14)
        even = ((n - s) % 2 == 0).float().tril()
        checkerboard, columns = even, (s % 2 == 0).expand(14, 14).float().tril()
        patterns = torch.stack([p / p.sum(-1, keepdim=True) for p in (checkerboard, columns)])[None]
        found = analyze.alternation(patterns)
        self.assertClose(found["share"], 1, 1e-5)
        self.assertGreater(found["by distance"][0], 0.05)
        self.assertLess(found["by source"][0].abs(), 0.3 * found["by distance"][0])
        self.assertGreater(found["by source"][1], 0.05)
        self.assertLess(found["by distance"][1].abs(), 0.3 * found["by source"][1])
        trend = torch.arange(1.0, 15).expand(14, 14).tril()
        self.assertLess(analyze.alternation((trend / trend.sum(-1, keepdim=True))[None, None])["share"], 0.1)
        self.assertLess(analyze.alternation(torch.full((1, 1, 14, 14), 0.1))["share"].item(), 1e-9)

    def recurrences(self, c: float, count: int = 3, length: int = 9) -> torch.Tensor:
        u, fixed = torch.randn(2, count, 1, 40, generator=seeded(), dtype=torch.double)
        return fixed + c ** torch.arange(length)[:, None].double() * u

    def test_source_weights_of_predictors_whose_weights_are_known(self):
        for c in (-1.5, 0.7, 1.3):
            x = self.recurrences(c)
            v, other = (interventions.off_plane(x, seeded(seed)) for seed in (5, 6))
            self.assertClose(torch.einsum("bv,bpv->bp", v, x), 0, 1e-9)
            self.assertClose(v.norm(dim=-1), 1, 1e-12)
            # A fixed linear predictor, and the exact solver: c a_n + (a_n - c a_{n-1} + a_{n-1} - c a_{n-2})
            # / 2
            linear = lambda x: 2 * x - 3 * F.pad(x, (0, 0, 1, 0))[:, :-1]
            solver = lambda x: F.pad(data.solve_recurrence(x), (0, 0, 2, 0))
            two_steps = lambda x: F.pad(data.solve_two_steps(x), (0, 0, 4, 0))
            rule = lambda x: F.pad(data.two_step_rule(x), (0, 0, 2, 0))
            nearest = {2: 1, 0: -(c**2)} if abs(c) > 1 else {6: 1, 4: -(c**2)}  # where it reads a*
            for predict, expected in ((linear, {6: 2, 5: -3}),
                                      (solver, {6: c + 0.5, 5: 0.5 - c / 2, 4: -c / 2}),
                                      (two_steps, {6: 1, 5: c**2, 4: -(c**2)}),
                                      (rule, {5: c**2, **nearest})):
                w = interventions.source_weights(predict, x, v)
                wanted = torch.tensor([float(expected.get(s, 0)) for s in range(9)], dtype=torch.double)
                self.assertClose(w[:, 6], wanted.expand(3, -1), 1e-7)
                self.assertClose(w[:, 6], interventions.source_weights(predict, x, other)[:, 6], 1e-7)
                A, B = interventions.strides(w, c)
                total = (wanted * c ** (torch.arange(9) - 7.0)).sum()  # of u in a_7: all but linear are right
                self.assertClose((A + B)[:, 6], total, 1e-6)

    def test_strides_of_the_two_step_and_the_one_step_rule(self):
        c, w = 1.5, torch.zeros(1, 9, 9, dtype=torch.double)
        w[:, 6, 5], w[:, 7, 7] = c**2, c
        A, B = interventions.strides(w, c)
        self.assertClose(torch.stack([A[0, 6], B[0, 6], A[0, 7], B[0, 7]]), torch.tensor([1.0, 0, 0, 1]),
                         1e-9)

    def test_a_predictor_that_is_not_equivariant_has_weights_that_differ_with_the_direction(self):
        x, D = self.recurrences(1.2), torch.linspace(0, 2, 40, dtype=torch.double)
        directions = [interventions.off_plane(x, seeded(seed)) for seed in (5, 6)]
        first, second = (interventions.source_weights(lambda x: x * D, x, v) for v in directions)
        self.assertGreater((first - second).abs().max(), 0.05)
        for predict, low, high in ((lambda x: 2 * x, 0, 1e-9), (lambda x: x * D, 0.01, 1)):
            study = analyze.Study(model.Transformer(SMALL_TASK, seeded()), 0, 20)
            study.__dict__["exact"] = predict
            weights = analyze.read_weights(study, 1.2)
            self.assertTrue(low <= weights.spread <= high)
            self.assertEqual(weights.explained > 1 - 1e-9, high < 0.1)

    def test_weights_of_components_add_up_to_those_of_the_output(self):
        config = dataclasses.replace(SMALL_TASK, initializer_range=0.1)
        study = analyze.Study(model.Transformer(config, seeded()), 0, 20)
        weights, whole = analyze.component_weights(study, 1.5)
        names = ["embedding", *(f"{name}{l}{part}" for l in (0, 1) for name, part in (
            ("head ", ".0"), ("head ", ".1"), ("head ", ".2"), ("MLP ", "")))]
        self.assertEqual(list(weights), names)
        # Off by what moving a source does to the final scale, which is first order in a model that is not
        # equivariant.
        x, kept = analyze.read_weights(study, 1.5).sample.a[:2, :-1], {}
        study.exact(x, cache=kept)
        v = interventions.off_plane(x, study.generator("components 1.5"))

        def final_scale(x):
            cache = {}
            study.exact(x, cache=cache)
            return cache["ln_final.hook_scale"].log().expand(-1, -1, 40) * v[:, None]

        output = study.exact(x) - study.model.unembed.b_U.double()
        through_scale = interventions.source_weights(final_scale, x, v) * (output @ v[:, :, None])
        exact = interventions.source_weights(study.exact, x, v)
        self.assertClose(sum(weights.values()) - through_scale, exact, 1e-9)

    def test_interleaved_sequences_keep_what_their_names_say(self):
        c = torch.tensor([1.5, -1.3, 0.8, 1.9]).double()
        with mock.patch.object(data, "uniform", lambda g, low, high,
                               *shape: (low + (high - low)
                                        * torch.rand(*shape, generator=g, dtype=torch.double))):
            kinds = data.interleaved(14, c, seeded())
        off = lambda predicted, a: ((predicted
                                     - a[:, -predicted.shape[1] :]).abs().amax((1, 2)) > 1e-6).tolist()
        affine = {kind: off(data.solve_recurrence(a[:, :-1]), a) for kind, a in kinds.items()}
        stride = {kind: off(data.solve_two_steps(a[:, :-1]), a) for kind, a in kinds.items()}
        self.assertEqual(affine["recurrence"], [False] * 4)
        self.assertEqual(stride["recurrence"], [False] * 4)
        self.assertEqual(affine["interleaved"], [True] * 4)
        self.assertEqual(stride["interleaved"], [False] * 4)
        for kind in ("two fixed points", "two growths"):
            self.assertEqual(stride[kind], [True] * 4)
        for a in kinds.values():
            norm = a[:, :-1].norm(dim=-1).amax(1)
            self.assertTrue(((norm >= 1) & (norm <= 2)).all())

    def test_main_directions_are_those_of_the_variance(self):
        study = analyze.Study(model.Transformer(SMALL_TASK, seeded()), 0, 20)
        mean, directions, shares = analyze.main_directions(study, 0)
        self.assertClose(directions @ directions.T, torch.eye(12), 1e-4)
        self.assertAlmostEqual(shares.sum().item(), 1, places=5)
        varying = study.activations["blocks.0.hook_attn_out"] - mean
        self.assertClose((varying @ directions[0]).var() / varying.var((0, 1)).sum(), shares[0], 1e-2)

    def test_intervals_are_as_wide_as_the_statistics_vary(self):
        values, width = torch.randn(2000, generator=seeded()), lambda found: found[1] - found[0]
        found = analyze.interval(values)
        self.assertTrue(found[0] < values.mean() < found[1])
        self.assertAlmostEqual(width(found), 2 * 1.96 / 2000**0.5, delta=0.02)
        found = analyze.interval(values, of=torch.median)
        self.assertTrue(found[0] < values.median() < found[1])
        self.assertAlmostEqual(width(found), 2 * 1.96 * 1.2533 / 2000**0.5, delta=0.03)
        # Ten copies of each value, in the row of their sequence, say no more than one, nor do gaps.
        copies = values[:200, None].repeat(1, 10)
        found = analyze.interval(F.pad(copies, (0, 3), value=torch.nan), of=torch.nanmedian)
        self.assertAlmostEqual(width(found), 2 * 1.96 * 1.2533 / 200**0.5, delta=0.12)
        # Columns are drawn together: how far apart they are does not count.
        found = analyze.interval(torch.stack([values, values + 100], 1))
        self.assertAlmostEqual(width(found), 2 * 1.96 / 2000**0.5, delta=0.02)

    def test_intervals_of_a_ratio_know_that_both_sums_vary(self):
        size = torch.rand(1000, generator=seeded()) + 0.5
        self.assertClose(torch.tensor(analyze.interval(3 * size, size, of=analyze.ratio)), 3, 1e-5)
        noise = torch.randn(1000, generator=seeded(2))
        low, high = analyze.interval(3 * size + noise, size, of=analyze.ratio)
        self.assertAlmostEqual(high - low, 2 * 1.96 / 1000**0.5, delta=0.02)

    def test_circuits_are_what_the_model_computes(self):
        transformer, cache = model.fold(random_model()), {}
        transformer(random_input(), cache=cache)
        x = cache["blocks.1.ln1.hook_normalized"]
        attn = transformer.blocks[1].attn
        attn.b_Q.zero_(), attn.b_K.zero_()
        transformer(random_input(), cache=cache)
        scores = (torch.einsum("bqd,hdD,bkD->bhqk", x, model.qk_circuit(transformer, 1), x)
                  / SMALL.d_head**0.5)
        kept = cache["blocks.1.attn.hook_attn_scores"]
        self.assertClose(scores[kept.isfinite()], kept[kept.isfinite()], 1e-9)
        result = torch.einsum("bhqk,bkd,hdD->bqhD", cache["blocks.1.attn.hook_pattern"], x,
                              model.ov_circuit(transformer, 1))
        self.assertClose(result, cache["blocks.1.attn.hook_result"], 1e-9)


class Analysis(TestCase):
    @classmethod
    def setUpClass(cls):
        cls.counts = {"POPULATION": 40, "SMALL": 20, "HELD_OUT_PER_LENGTH": 10, "FEW": 10,
                      "EXAMPLES": 20}
        cls.counts |= {"QK_DRAWS": 2, "RESAMPLES": 50, "PER_C": 1}

    def setUp(self):
        for name, count in self.counts.items():
            patch = mock.patch.object(analyze, name, count)
            patch.start()
            self.addCleanup(patch.stop)

    def study(self, seed: int = 0, transformer: model.Transformer | None = None) -> analyze.Study:
        shipped = os.path.join(HERE, "weights")
        log = analyze.read_log(os.path.join(shipped, "log.csv"))
        transformer = transformer or model.load_weights(os.path.join(shipped, "weights.pt"))
        return analyze.Study(transformer, seed, 40, log)

    def test_a_claim_does_not_depend_on_what_else_is_computed(self):
        study = self.study(seed=3)
        after_others = [analyze.CLAIMS[name].function(study)
                        for name in ("alpha", "l0_ov_r2_random", "l0_orthogonal")][-1]
        alone = analyze.CLAIMS["l0_orthogonal"].function(self.study(seed=3))
        self.assertEqual(analyze.plain(after_others.measured), analyze.plain(alone.measured))

    def test_an_untrained_model_reproduces_no_learnt_claim(self):
        study = self.study().untrained
        learnt = """mse l0_prev_token l1_second_token l2_checkerboard l0_ov_r2 l0_ov_slope l2_ov_identity
            l1_ov_effective_rank l2_qk_identity lens_after_l0 eigenvalue_score alpha source_weights two_steps
            gain_control knob"""
        for name in learnt.split():
            self.assertEqual(analyze.CLAIMS[name].function(study).verdict, "not reproduced", name)

    def test_a_model_built_as_the_paper_says_reproduces_the_circuit_claims(self):
        study = self.study(transformer=model.Transformer(generator=seeded()))
        attn = study.model.blocks[2].attn
        half = torch.linalg.qr(torch.randn(8, 128, 64, generator=seeded()))[0]
        attn.W_Q.copy_(half), attn.W_K.copy_(half)
        attn.W_V.copy_(half), attn.W_O.copy_(-half.transpose(1, 2))
        for name in ("l2_ov_identity", "l2_qk_identity", "eigenvalue_score"):
            self.assertEqual(analyze.CLAIMS[name].function(study).verdict, "reproduced", name)

    def test_an_ov_circuit_that_copies_is_found_between_data_vectors(self):
        """Heads that copy what W_E reads into what W_U reads, times a factor: slope and R^2 must say so."""
        study = self.study(transformer=model.Transformer(generator=seeded()))
        net = study.model
        span = torch.linalg.qr(torch.randn(127, 127, generator=seeded()))[0][:, :40]
        basis = torch.linalg.svd(torch.ones(1, 128))[2][1:]  # what has mean 0
        net.embed.W_E.copy_(5 * span.T @ basis), net.unembed.W_U.copy_(basis.T @ span)
        net.pos_embed.W_pos.zero_()
        attn = net.blocks[0].attn
        attn.W_V.zero_(), attn.W_O.zero_()
        attn.W_V[0, :, :40], attn.W_O[0, :40] = basis.T @ span, span.T @ basis
        slope, intercept, r2 = analyze.ov_fits(study)["data vectors"]
        length = study.population.a[:, :-1].norm(dim=-1)
        self.assertTrue(torch.equal(slope.isnan(), length < 1))
        self.assertClose(r2[length >= 1], 1, 1e-4)
        self.assertClose((slope * length)[length >= 1], 128**0.5, 0.1)  # ln1 gives all the norm sqrt(128)
        self.assertEqual(analyze.CLAIMS["l0_ov_r2"].function(study).verdict, "reproduced")

    def test_ablations_and_held_scales_are_what_they_say(self):
        study = self.study()
        arms, x, target = analyze.ablations(study)["layer 1 heads"], study.test.a[:, :-1], study.test.a[:, 1:]
        means = interventions.mean_outputs(study.activations)
        hooks = interventions.replace_outputs(means, interventions.layer_heads(study.model, 1))
        ablated: dict = {}
        expected = analyze.squared_errors(study.model(x, hooks=hooks, cache=ablated), target)
        self.assertClose(arms["mean"] / expected, 1, 1e-3)
        over_positions = {name: value.mean(0) for name, value in means.items()}
        hooks = interventions.replace_outputs(over_positions, interventions.layer_heads(study.model, 1))
        for_all = analyze.squared_errors(study.model(x[:10], hooks=hooks), target[:10])
        self.assertClose(arms["mean over positions"] / for_all, 1, 1e-3)
        self.assertEqual(study.factor(study.baseline[:7]), 1)
        hooks = interventions.replace_outputs(means, interventions.layer_heads(study.model, 1))
        scale = "ln_final.hook_scale"
        alone = study.model(x, hooks=interventions.hold({scale: ablated[scale]}))
        self.assertClose(arms["scale alone"] / analyze.squared_errors(alone, target), 1, 1e-3)
        unchanged = study.record(x, scale)
        clean = study.model(x, hooks=hooks | interventions.hold({scale: unchanged[scale]}))
        self.assertClose(arms["mean, clean scale"] / analyze.squared_errors(clean, target), 1, 1e-3)
        self.assertClose(study.baseline / analyze.squared_errors(study.model(x), target), 1, 1e-3)

    def test_predictors_predict_the_vector_after_the_last_one_they_see(self):
        study = self.study()
        a = study.test.a
        errors = analyze.predictor_errors(study, a)
        self.assertEqual({e.shape for e in errors.values()}, {(40, 12)})
        self.assertEqual(list(errors), list(analyze.PREDICTORS))
        self.assertClose(errors["last vector"], ((a[:, 2:-1] - a[:, 3:]) ** 2).mean(-1), 1e-7)
        self.assertClose(errors["model"].mean(1), analyze.squared_errors(study.model(a[:, :-1]), a[:, 1:]),
                         1e-7)
        self.assertLess(errors["exact solver"].max(), 1e-9)
        fitted = {name: e.mean() for name, e in analyze.predictor_errors(study, study.population.a).items()}
        self.assertLess(fitted["best linear"], min(fitted["zero"], fitted["last vector"]))
        other = analyze.Study(model.Transformer(generator=seeded()), 0, 40, task="linear-3")
        errors = analyze.predictor_errors(other, other.test.a)
        self.assertEqual({e.shape for e in errors.values()}, {(40, 10)})
        self.assertEqual(set(analyze.PREDICTORS) - set(errors), {"two-step rule"})

    def test_neighbours_are_the_next_vector_and_those_before_it(self):
        a = torch.arange(10.0)[None, :, None]
        for first, count in ((2, 2), (3, 4), (1, 1)):
            target, *known = analyze.neighbours(a, first, count)
            self.assertEqual(target.flatten().tolist(), list(range(first + 1, 10)))
            for lag in range(count):
                self.assertEqual(known[lag].flatten().tolist(), list(range(first - lag, 9 - lag)))

    def test_errors_of_a_model_that_is_the_rule_are_those_of_the_rule(self):
        real, find = analyze.predictions, analyze.CLAIMS["rule_errors"].function

        def predictions(model_from):
            def made(study, a):
                target, found = real(study, a)
                return target, found | {"model": model_from(target, found)}

            return mock.patch.object(analyze, "predictions", made)

        with predictions(lambda target, found: found["two-step rule"]):
            self.assertEqual(find(self.study()).verdict, "reproduced")
            self.assertClose(torch.tensor(find(self.study()).measured), 1, 1e-5)
        with predictions(lambda target, found: torch.zeros_like(target)):
            self.assertEqual(find(self.study()).verdict, "not reproduced")
        with predictions(lambda target, found: found["exact solver"]):  # which errs elsewhere
            self.assertLess(find(self.study()).values["two growths"], 0.5)

    def test_the_knob_is_looked_for_at_the_position_that_layer_1_attends_to_most(self):
        study = self.study()
        pattern = study.activations["blocks.1.attn.hook_pattern"]
        self.assertEqual(analyze.favourite_source(study), 1)  # in the weights that ship
        pattern[:, :, 4:, 2] += 1
        self.assertEqual(analyze.favourite_source(study), 2)
        for favourite in (0, 1):
            study = self.study()
            with mock.patch.object(analyze, "favourite_source", lambda _: favourite):
                shares, found = analyze.knob_shares(study), analyze.claim_knob_favourite(study)
            self.assertEqual(found.measured, shares[f"position {favourite}"])
            self.assertEqual(list(found.values.values()),
                             [favourite, *found.measured, *shares[f"size up to {favourite}"]])
            self.assertEqual(found.verdict, "reproduced" if favourite == 1 else "not reproduced")
            self.assertGreater(min(shares["z"]), 0.5)
        back = analyze.follows(study, *analyze.patches(study)["z"], analyze.GROWING, analyze.DECAYING)
        self.assertEqual(back, shares["z"][::-1])
        self.assertNotEqual(back, shares["z"])

    def test_sequences_with_c_and_minus_c_are_one_draw_of_the_interval_of_two_steps(self):
        study, c = self.study(), torch.tensor(analyze.CS, dtype=torch.double)
        A = (1 + 0.3 * c[c.abs() >= 0.9].sign())[None, :, None].expand(2, -1, 14)
        with mock.patch.object(analyze, "strong_strides", lambda _: (A, 0 * A, A)):
            self.assertClose(torch.tensor(analyze.claim_two_steps(study).interval), 1, 1e-6)

    def test_factors_of_all_components_are_those_of_all_weights(self):
        study = self.study()
        total = sum(fixed for fixed, _ in analyze.factors_by_component(study).values())
        for i, c in enumerate(analyze.TAKEN_AT):
            whole = [analyze.component_weights(study, sign * c)[1].sum(-1)[:, 5:].mean() for sign in (1, -1)]
            self.assertClose(total[i], sum(whole) / 2, 0.05)

    def test_root_strides_tell_strides_of_two_from_the_last_steps(self):
        sample = data.sample(60, 14, seeded(), task="linear-2", dtype=torch.float64)
        c, w = sample.c, torch.zeros(2, 60, 14, 14, dtype=torch.double)
        for n in range(4, 14):
            w[0, :, n, n - 1], w[0, :, n, n - 3] = c[:, 0] ** 2 + 2 * c[:, 1], -(c[:, 1] ** 2)
            w[1, :, n, n], w[1, :, n, n - 1] = c.T
        two, one = (analyze.root_strides(analyze.Weights(sample, each, 0.0, 1.0)) for each in w)
        for found in (two, one):
            self.assertClose(found["A / z^2 + B / z (right: 1)"], 1, 1e-6)
            self.assertGreater(found["these two differ by"], 0.2)
        self.assertLess(two["A / z^2 is off strides of two by"], 1e-6)
        self.assertLess(one["A / z^2 is off the last steps by"], 1e-6)
        self.assertClose(two["A / z^2 is off the last steps by"], two["these two differ by"], 1e-6)
        roots = np.array([np.roots([1, *-row]) for row in c.numpy()])
        largest = torch.tensor(np.take_along_axis(roots, np.abs(roots).argmax(1)[:, None], 1)[:, 0])
        real, w = largest.imag.abs() < 1e-9, torch.zeros(60, 14, 14, dtype=torch.double)
        w[:, range(6, 14), range(5, 13)] = largest.real[:, None] ** 2  # right for the largest root only
        chosen = data.Sample(*(value[real] for value in sample))
        found = analyze.root_strides(analyze.Weights(chosen, w[real], 0.0, 1.0))
        self.assertLess(found["A / z^2 is off strides of two by"], 1e-6)
        curves = data.sample(9, 14, seeded(), task="polynomial-2", dtype=torch.float64)
        self.assertEqual(analyze.root_strides(analyze.Weights(curves, w[0, :9], 0.0, 1.0)), {})

    def test_tasks_and_depths_are_measured_and_drawn_side_by_side(self):
        out, missing = self.folder(), os.path.join(self.folder(), "missing")
        tasks = self.runs_folder({"task": "linear-2"}, {"task": "quadratic"}, {"task": "affine"})
        depths = self.runs_folder({"n_layers": 1}, {"n_layers": 2})
        self.assertRefused(1, "learnt linear-2", analyze.main, "--depths", tasks, "--out", out)
        for kind, folder in (("tasks", tasks), ("depths", depths)):
            self.assertRefused(1, "there is no run in", analyze.main, f"--{kind}", missing, "--out", out)
            self.assertRefused(2, "not allowed with", analyze.main, f"--{kind}", folder, "--all")
            self.assertRefused(2, "leave out --run", analyze.main, f"--{kind}", folder, "--run", folder)
            self.assertEqual(os.listdir(out), [])
            status, _, err = command(analyze.main, f"--{kind}", folder, "--out", out)
            self.assertEqual(status, 0, err)
            self.assertEqual(sorted(os.listdir(out)), [f"{kind}.json", f"{kind}.md", f"{kind}.png"])
            runs = json.loads(read(os.path.join(out, f"{kind}.json")))
            self.assertEqual(list(runs), sorted(os.listdir(folder)))
            for name, found in runs.items():
                study = analyze.open_study(os.path.join(folder, name), 0)
                first = study.task.first
                errors = (study.model(study.test.a[:, :-1]) - study.test.a[:, 1:])[:, first:] ** 2
                shown = found["by position"]
                shown = shown["model"] if kind == "tasks" else shown
                self.assertClose(torch.tensor(shown) / errors.mean((0, 2)), 1, 1e-3)
                if kind == "tasks":
                    self.assertEqual(found["first position"], first)
                    self.assertEqual("explained by source weights" in found, study.task.rotates)
                    self.assertEqual(found["learnt"], "no")
                else:
                    self.assertEqual(found["layers"], len(study.layers))
            for name in os.listdir(out):
                os.remove(os.path.join(out, name))

    def test_a_run_of_another_task_gets_what_has_a_meaning_for_it(self):
        for task, drawn in (("linear-2", True), ("quadratic", False)):
            run, out = (os.path.join(self.runs_folder({"task": task}), "seed_0000"),
                        os.path.join(self.folder(), "figures"))
            status, said, err = command(analyze.main, "--all", "--run", run, "--out", out)
            self.assertEqual(status, 0, err)
            (line,) = (line for line in said.splitlines() if line.startswith("left out"))
            self.assertIn(f"that learnt {task} sequences: ", line)
            for name in ("figure 20", "figure 22", "alpha", "l2_checkerboard", "two_steps"):
                self.assertIn(name, line)
            claims = json.loads(read(os.path.join(out, "results.json")))["claims"]
            self.assertEqual(set(claims),
                             {name for name, claim in analyze.CLAIMS.items() if claim.tasks == "any"})
            self.assertTrue(os.path.exists(os.path.join(out, "fig19_errors_by_position.png")))
            self.assertEqual(os.path.exists(os.path.join(out, "fig27_weight_sizes.png")), drawn)

    def runs_folder(self, *runs: dict) -> str:
        """Runs of untrained models with these settings, with a log of one row and two kept steps."""
        folder = self.folder()
        for i, changes in enumerate(runs):
            settings = dataclasses.asdict(SMALL_TASK) | {"n_layers": 3, "seed": i} | changes
            config = model.Config(**{f.name: settings[f.name] for f in dataclasses.fields(model.Config)})
            run = os.path.join(folder, f"seed_{settings['seed']:04d}")
            os.makedirs(os.path.join(run, "steps"))
            model.save_json(settings, os.path.join(run, "config.json"))
            for name in ("weights.pt", "steps/00000000.pt", "steps/00000064.pt"):
                state = model.Transformer(config, seeded(settings["seed"])).state_dict()
                model.save_file(state, os.path.join(run, name))
            with open(os.path.join(run, "log.csv"), "w") as f:
                f.write("step,loss,eval_mse,seconds\n10,1,1,1\n")
        return folder

    def test_seeds_are_compared_and_an_interrupted_comparison_goes_on(self):
        above = self.folder()
        folder, gelu = os.path.join(above, "relu"), os.path.join(above, "gelu")
        shutil.copytree(self.runs_folder({}, {"seed": 7}), folder)
        shutil.copytree(self.runs_folder({"act_fn": "gelu_new"}), gelu)
        out, measure, measured = os.path.join(self.folder(), "figures"), analyze.measure, []

        def interrupted(study, claims, progress, prefix, part):
            measured.append(prefix.strip())
            if len(measured) == 2:
                raise KeyboardInterrupt
            return measure(study, claims, progress, prefix, part)

        with mock.patch.object(analyze, "measure", interrupted):
            self.assertEqual(command(analyze.main, "--seeds", folder, gelu, "--out", out)[0], 130)
            self.assertEqual(os.listdir(out), [])
            status, _, err = command(analyze.main, "--seeds", folder, gelu, "--out", out)
            self.assertEqual(status, 0, err)
        self.assertEqual(measured, ["seed_0000", "seed_0007", "seed_0007", "seed_0000"])
        self.assertEqual(sorted(os.listdir(out)), ["seeds.json", "seeds.md", "seeds.png", "steps.png"])

        runs = json.loads(read(os.path.join(out, "seeds.json")))
        self.assertEqual(list(runs), ["relu/seed_0000", "relu/seed_0007", "gelu/seed_0000"])
        for name, found in runs.items():
            self.assertEqual(found, json.loads(read(os.path.join(above, name, "claims.json"))))
            self.assertEqual(list(found["claims"]), list(analyze.CLAIMS))
        seven = runs["relu/seed_0007"]
        self.assertEqual(list(seven["course"]), ["0", "64"])
        log = analyze.read_log(os.path.join(folder, "seed_0007", "log.csv"))
        alone = analyze.Study(model.load_weights(os.path.join(folder, "seed_0007", "weights.pt")), 0,
                              analyze.SMALL, log)
        for name, found in seven["course"]["0"].items():
            self.assertEqual(found["values"], analyze.plain(analyze.CLAIMS[name].function(alone).values))
        text = read(os.path.join(out, "seeds.md")).decode()
        self.assertEqual(text, analyze.seeds_markdown(runs))
        relu, gelu = analyze.by_setting(runs)
        small = "d_model 12, d_head 4, d_mlp 20, n_heads 3, step 10"
        self.assertEqual((relu, gelu), (f"relu, 0.02, {small}", f"gelu_new, 0.02, {small}"))
        self.assertIn(f"| {relu} | {gelu} | untrained |", text)
        fresh = runs["relu/seed_0000"]["claims"]["mse"]["untrained"]["values"]["all lengths"]
        self.assertRegex(text, rf"\n\| mse: all lengths \| .* \| {analyze.short(fresh)} \|\n")
        group = analyze.by_setting(runs)[relu]
        each = analyze.over_runs(group, "mse")["all lengths"]
        self.assertEqual(each.tolist(), [found["claims"]["mse"]["measured"] for found in group])
        self.assertIn(f"{analyze.short(each.std(ddof=1))}): {analyze.short(each.tolist())} |", text)
        zero, seven = (os.path.join(folder, name) for name in ("seed_0000", "seed_0007"))
        shutil.copy(os.path.join(zero, "weights.pt"), seven)  # other weights are measured anew
        self.assertEqual(command(analyze.main, "--seeds", folder, "--out", out)[0], 0)
        zero, seven = (json.loads(read(os.path.join(run, "claims.json"))) for run in (zero, seven))
        self.assertEqual(seven["claims"], zero["claims"])

    def test_runs_are_told_apart_by_what_they_were_trained_with(self):
        about = {"config": dataclasses.asdict(model.Config()), "task": "affine", "step": 100_000}
        small = {"config": about["config"] | {"n_layers": 1, "d_mlp": 20}}
        runs = {str(i): {"meta": about | changes} for i, changes in enumerate((
            {"step": 50_000}, small, {"task": "linear-2"}, {}, {}))}
        self.assertEqual({name: len(group) for name, group in analyze.by_setting(runs).items()},
                         {"relu, 0.02": 2, "relu, 0.02, d_mlp 20, n_layers 1": 1,
                          "relu, 0.02, task linear-2": 1, "relu, 0.02, step 50000": 1})
        self.assertEqual(next(iter(analyze.by_setting(runs))), "relu, 0.02")  # that of most runs

    def test_folders_without_runs_are_refused_and_nothing_is_written(self):
        folder, out = self.runs_folder({}, {}), os.path.join(self.folder(), "figures")
        refused = lambda status, says, *args: self.assertRefused(status, says, analyze.main, *args, "--out",
                                                                 out)
        refused(1, "there is no run in", "--seeds", os.path.join(folder, "missing"))
        refused(1, "there is no run in", "--seeds", os.path.join(folder, "seed_0000"))
        refused(2, "not allowed with", "--seeds", folder, "--all")
        refused(2, "not allowed with", "--seeds", folder, "--fig", "1")
        with open(os.path.join(folder, "seed_0001", "weights.pt"), "wb") as f:
            f.write(b"garbage")
        refused(1, "damaged", "--seeds", folder)
        self.assertFalse(os.path.exists(out))

    def test_a_model_with_fewer_layers_gets_what_has_a_meaning_for_it(self):
        run = os.path.join(self.runs_folder({"n_layers": 1}), "seed_0000")
        out = os.path.join(run, "figures")  # where it goes if nothing else is said
        status, said, err = command(analyze.main, "--all", "--run", run)
        self.assertEqual(status, 0, err)
        left_out = said.splitlines()[0]
        for name in ("figure 4", "figure 12", "l1_second_token", "l2_qk_pinv", "gain_control"):
            self.assertIn(name, left_out)
        claims = json.loads(read(os.path.join(out, "results.json")))["claims"]
        self.assertEqual(set(claims), {name for name, claim in analyze.CLAIMS.items() if claim.layers == 1})
        self.assertTrue(os.path.exists(os.path.join(out, "fig22_source_weights.png")))

    def test_all_of_it_twice_gives_the_same_bytes_and_figures_that_name_their_axes(self):
        first, second = (os.path.join(self.folder(), "figures") for _ in range(2))
        draw, canvases = analyze.plt.close, []
        with mock.patch.object(analyze.plt, "close", lambda canvas: canvases.append(canvas) or draw(canvas)):
            status, _, err = command(analyze.main, "--all", "--run", os.path.join(HERE, "weights"), "--out",
                                     first)
        self.assertEqual(status, 0, err)
        self.assertEqual(len(canvases), len(analyze.FIGURES))
        for canvas in canvases:
            with self.subTest(canvas.get_suptitle()):
                self.assertTrue(canvas.get_suptitle())
                panels = [axes for axes in canvas.axes if axes.get_label() != "<colorbar>"]
                self.assertTrue(canvas.get_supxlabel() or any(axes.get_xlabel() for axes in panels))
                self.assertTrue(canvas.get_supylabel()
                                or any(axes.get_ylabel() or len(axes.get_yticklabels()) > 9
                                       for axes in panels))
                for image in (image for axes in canvas.axes for image in axes.get_images()):
                    low, high = image.get_clim()
                    name = image.get_cmap().name
                    self.assertTrue(low == 0 and name == "Blues" or low == -high and name == "RdBu")
        with mock.patch.object(analyze, "draw", lambda *_: None):
            self.assertEqual(command(analyze.main, "--all", "--run", os.path.join(HERE, "weights"), "--out",
                                     second)[0], 0)
        for name in ("results.json", "results.md"):
            self.assertEqual(*(read(os.path.join(out, name)) for out in (first, second)))
        claims = json.loads(read(os.path.join(first, "results.json")))["claims"]
        self.assertEqual(list(claims), list(analyze.CLAIMS))
        for found in claims.values():
            self.assertTrue(set(found) >= {"claim", "paper", "measured", "interval", "control", "verdict",
                                           "why"})
            self.assertIn(found["verdict"], analyze.MARKS)
            self.assertEqual(set(found["values"]), set(found["untrained"]["values"]))

    def test_committed_results_belong_to_the_shipped_weights_and_this_code(self):
        results = json.loads(read(os.path.join(HERE, "figures", "results.json")))
        sha = hashlib.sha256(read(os.path.join(HERE, "weights", "weights.pt"))).hexdigest()
        code = analyze.code_of_numbers()
        self.assertTrue("def claim_mse(" in code and "def figure_loss(" not in code)
        code = hashlib.sha256(code.encode()).hexdigest()
        made_from = (results["meta"]["sha256"], results["meta"]["code"])
        self.assertEqual(made_from, (sha, code), "run python analyze.py --all")
        self.assertEqual(list(results["claims"]), list(analyze.CLAIMS))
        for name, found in results["claims"].items():
            claim = analyze.CLAIMS[name]
            self.assertEqual((found["claim"], found["paper"], found["why"]),
                             (claim.text, claim.paper, " ".join(claim.function.__doc__.split())))
        for number in analyze.FIGURES:
            self.assertTrue(os.path.exists(os.path.join(HERE, "figures", analyze.figure_file(number))))
        self.assertEqual(read(os.path.join(HERE, "figures", "results.md")).decode(),
                         analyze.markdown(results))
        runs = json.loads(read(os.path.join(HERE, "figures", "seeds.json")))
        first = next(iter(runs.values()))
        self.assertEqual(first["meta"]["sha256"], sha)
        for name, found in first["claims"].items():
            for key in ("verdict", "values"):
                self.assertEqual(found[key], results["claims"][name][key], name)
        text = read(os.path.join(HERE, "figures", "seeds.md")).decode()
        self.assertEqual(text, analyze.seeds_markdown(runs))

    def test_readme_and_findings_are_short_lines_and_name_what_is_there(self):
        for name, most in (("README.md", 120), ("FINDINGS.md", 120)):
            text = read(os.path.join(HERE, name)).decode()
            self.assertLessEqual(max(map(len, text.splitlines())), most, name)
            for target in re.findall(r"\]\(([^)#]+)", text):
                self.assertTrue(target.startswith("http") or os.path.exists(os.path.join(HERE, target)),
                                target)

    def test_the_readme_shows_the_committed_seeds(self):
        runs = json.loads(read(os.path.join(HERE, "figures", "seeds.json")))
        seeds = next(iter(analyze.by_setting(runs).values()))
        readme = read(os.path.join(HERE, "README.md")).decode().splitlines()
        for name in seeds[0]["claims"]:
            counts = " / ".join(map(str, analyze.count_verdicts(seeds, name)))
            if analyze.CLAIMS[name].paper is None:
                self.assertIn(f"`{name}` {counts}", " ".join(readme))
                continue
            (row,) = (line for line in readme if line.startswith(f"| `{name}` "))
            _, paper, ours, verdicts = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
            self.assertEqual((paper, verdicts), (analyze.CLAIMS[name].paper_text(), counts))
            means = [analyze.short(values.mean()) for values in analyze.over_runs(seeds, name).values()]
            self.assertIn(ours.split()[0], means)

    def test_bad_command_lines_are_refused_in_one_line_and_write_nothing(self):
        folder = self.folder()
        out, run = os.path.join(folder, "figures"), os.path.join(folder, "run")
        refused = lambda status, says, *args: self.assertRefused(status, says, analyze.main, *args, "--out",
                                                                 out)
        refused(2, "no figure 99", "--fig", "99")
        refused(2, "one of the arguments")
        refused(2, "invalid int value", "--all", "--seed", "x")
        refused(1, "no run folder", "--all", "--run", os.path.join(folder, "missing"))
        os.mkdir(run)
        refused(1, "no weights file", "--all", "--run", run)
        with open(os.path.join(run, "weights.pt"), "wb") as f:
            f.write(b"garbage")
        refused(1, "damaged", "--all", "--run", run)
        model.save_file(random_model(SMALL_TASK, torch.float32).state_dict(), os.path.join(run, "weights.pt"))
        refused(1, "blocks.2", "--all", "--run", run)
        model.save_file(model.Transformer().state_dict(), os.path.join(run, "weights.pt"))
        refused(1, "no training log", "--all", "--run", run)
        for config, says in (('{"n_layer": 3}', "no setting 'n_layer'"), ('{"n_layers"', "damaged"),
                             ('{"n_layers": 2}', "blocks.2"), ('{"task": "cubic"}', "task must be one of")):
            with open(os.path.join(run, "config.json"), "w") as f:
                f.write(config)
            refused(1, says, "--all", "--run", run)
        os.remove(os.path.join(run, "config.json"))
        for garbage in ("", "step,loss,eval_mse,seconds\n", "a,b\n1,2\n",
                        "step,loss,eval_mse,seconds\n1,x,y,z\n", "step,loss,eval_mse,seconds\n1,nan,1,1\n"):
            with open(os.path.join(run, "log.csv"), "w") as f:
                f.write(garbage)
            refused(1, "is no training log", "--all", "--run", run)
        self.assertFalse(os.path.exists(out))
        shipped = os.path.join(HERE, "weights")
        blocked = os.path.join(run, "weights.pt")
        self.assertRefused(1, "weights.pt", analyze.main, "--fig", "1", "--run", shipped, "--out", blocked)

    def test_list_names_every_figure_and_claim(self):
        status, out, _ = command(analyze.main, "--list")
        self.assertEqual((status, len(out.splitlines())), (0, len(analyze.FIGURES) + len(analyze.CLAIMS)))
        with self.assertRaisesRegex(ValueError, "figure 2 is already: loss against step"):
            analyze.figure(2, "another")(len)
        for name, claim in analyze.CLAIMS.items():  # its figure is drawn wherever it is measured
            shown = analyze.FIGURES[claim.figure]
            self.assertTrue(shown.layers <= claim.layers and shown.tasks in ("any", claim.tasks), name)


if __name__ == "__main__":
    unittest.main()
