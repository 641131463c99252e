"""The properties that the rest of the project relies on.

    python -m unittest test_all                     # under a minute; it runs beyond/test_beyond.py too
    python -m unittest test_all.Folding             # one group

Small models and few sequences, except where the shipped weights themselves are what is tested.
"""

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import unittest
import weakref
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import analyze
import data
import interventions
import model
import train

torch.set_num_threads(1)  # programs with two threads each slow one another ten times
os.environ["OMP_NUM_THREADS"] = "1"  # in those that the tests start too
HERE = os.path.dirname(os.path.abspath(__file__))
SHIPPED = os.path.join(HERE, "weights")
# That folder may be deleted.
BEYOND = os.path.exists(os.path.join(HERE, "beyond", "test_beyond.py"))
SMALL = model.Config(d_vocab=5, d_model=12, d_head=4, d_mlp=20, n_heads=3, n_layers=2, n_ctx=8)
SMALL_TASK = dataclasses.replace(SMALL, d_vocab=40, n_ctx=32)  # the task's dimensions


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(config: model.Config = SMALL, dtype=torch.float64) -> model.Transformer:
    """A model in which no bias is 0 and no LayerNorm is the identity, as after training."""
    transformer = model.Transformer(config, seeded()).to(dtype).requires_grad_(False)
    for parameter in transformer.parameters():
        parameter += 0.3 * torch.randn(
            parameter.shape, generator=seeded(parameter.numel()), dtype=dtype
        )
    return transformer


def random_input(
    config: model.Config = SMALL,
    batch: int = 4,
    positions: int = 6,
    dtype=torch.float64,
    seed: int = 1,
) -> torch.Tensor:
    return torch.randn(batch, positions, config.d_vocab, generator=seeded(seed), dtype=dtype)


def gelu_new(u: torch.Tensor) -> torch.Tensor:
    """GELU in the tanh form (Hendrycks & Gimpel, 2016)."""
    return 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))


def reference(state: dict, x: torch.Tensor, config: model.Config, edit: dict) -> torch.Tensor:
    """The equations of appendix A.1, head by head; `edit` changes values at named points."""

    def at(name, value):
        return edit[name](value) if name in edit else value

    def layer_norm(name, v):
        v = v - v.mean(-1, keepdim=True)
        scale = at(name + ".hook_scale", (v.pow(2).mean(-1, keepdim=True) + config.eps).sqrt())
        return at(name + ".hook_normalized", v / scale * state[name + ".w"] + state[name + ".b"])

    n = x.shape[1]
    future = torch.ones(n, n).triu(1).bool()
    v = at("hook_embed", x @ state["embed.W_E"])
    v = v + at("hook_pos_embed", state["pos_embed.W_pos"][:n].expand_as(v))
    for l in range(config.n_layers):
        block = f"blocks.{l}."
        here = lambda name, value: at(block + name, value)
        W = {name.removeprefix(block): weights for name, weights in state.items()}
        v = here("hook_resid_pre", v)
        u = layer_norm(block + "ln1", v)

        def read(letter):
            heads = zip(W["attn.W_" + letter], W["attn.b_" + letter])
            of_heads = torch.stack([u @ weight + bias for weight, bias in heads], 1)
            return here("attn.hook_" + letter.lower(), of_heads.transpose(1, 2)).transpose(1, 2)

        q, k, value = read("Q"), read("K"), read("V")  # [batch, head, pos, d_head]
        scores = (q @ k.mT / config.d_head**0.5).masked_fill(future, -torch.inf)
        scores = here("attn.hook_attn_scores", scores).exp()
        pattern = here("attn.hook_pattern", scores / scores.sum(-1, keepdim=True))
        z = here("attn.hook_z", (pattern @ value).transpose(1, 2))
        result = [z[:, :, h] @ weight for h, weight in enumerate(W["attn.W_O"])]
        result = here("attn.hook_result", torch.stack(result, 2))
        v = v + here("hook_attn_out", result.sum(2) + W["attn.b_O"])
        v = here("hook_resid_mid", v)
        pre = here("mlp.hook_pre", layer_norm(block + "ln2", v) @ W["mlp.W_in"] + W["mlp.b_in"])
        act = gelu_new(pre) if config.act_fn == "gelu_new" else pre.clamp(min=0)
        post = here("mlp.hook_post", act)
        v = v + here("hook_mlp_out", post @ W["mlp.W_out"] + W["mlp.b_out"])
        v = here("hook_resid_post", v)
    return layer_norm("ln_final", v) @ state["unembed.W_U"] + state["unembed.b_U"]


def command(main, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command line, without a new process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["program.py", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
            # What Python does with a message: print it, and exit with 1.
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
    return status or 0, out.getvalue(), err.getvalue()


def read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def analyze_main():
    analyze.run_command(analyze.PAPER, analyze.__doc__, "results", os.path.join(HERE, "figures"))


class TestCase(unittest.TestCase):
    def assertClose(self, a, b, tolerance):
        self.assertLess((torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item(), tolerance)

    def folder(self) -> str:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return folder.name

    def run_folder(self, config: model.Config = SMALL) -> tuple[str, str]:
        """A folder with the config.json of a small model, and where its weights belong."""
        folder = self.folder()
        model.save(dataclasses.asdict(config) | {"steps": 5}, os.path.join(folder, "config.json"))
        return folder, os.path.join(folder, "weights.pt")

    def assertRefused(self, status: int, says: str, main, *arguments: str):
        """The command ends with `status` and one line on standard error that contains `says`."""
        got, _, err = command(main, *arguments)
        self.assertEqual((got, len(err.strip().splitlines())), (status, 1), err)
        self.assertIn(says, err)


class Data(TestCase):
    def test_affine_sequences_are_the_same_numbers_as_ever(self):
        g = seeded(7)
        c = 4 * torch.rand(50, generator=g) - 2
        a_0 = 4 * torch.rand(50, 40, generator=g) - 2
        d = 4 * torch.rand(50, 40, generator=g) - 2
        r = 1 + torch.rand(50, generator=g)
        powers = c[:, None] ** torch.arange(15)
        a = powers[..., None] * a_0[:, None] + (powers.cumsum(1) - powers)[..., None] * d[:, None]
        scale = r / a[:, :-1].norm(dim=-1).amax(1)
        s = data.sample(50, 14, seeded(7))
        self.assertTrue(torch.equal(s.a, a * scale[:, None, None]))
        self.assertTrue(torch.equal(s.d, d * scale[:, None]) and torch.equal(s.c, c))

    def test_largest_input_norm_is_uniform_between_1_and_2_and_the_last_target_is_not_counted(self):
        s = data.sample(4000, 14, seeded())
        norms = s.a.norm(dim=-1)
        largest = norms[:, :-1].amax(1)
        self.assertTrue(((largest > 1 - 1e-5) & (largest < 2 + 1e-5)).all())
        self.assertAlmostEqual(largest.mean().item(), 1.5, delta=0.03)
        self.assertTrue((norms[:, -1] > 2).any())

    def test_lengths_that_the_model_has_no_positions_for_are_refused(self):
        for length in (0, -1, 2, 33):
            with self.assertRaisesRegex(ValueError, f"between 3 and n_ctx = 32, not {length}"):
                data.sample(4, length, seeded())
        with self.assertRaisesRegex(ValueError, "task must be one of affine"):
            data.sample(4, 4, seeded(), task="nonsense")
        with self.assertRaisesRegex(ValueError, "batch"):
            data.sample(0, 5, seeded())

    def test_ranges_of_c_with_which_numbers_overflow_are_refused(self):
        for most, length in ((3.2, 32), (14, 14)):
            a = data.sample(1000, length, seeded(), c_range=(-most, most)).a
            longest = a[:, :-1].norm(dim=-1).amax(1)
            self.assertTrue(((longest > 1 - 1e-4) & (longest < 2 + 1e-4)).all())
        for c_range in ((-6.0, 6.0), (-1000.0, 1000.0), (0.0, torch.nan)):
            with self.assertRaisesRegex(ValueError, "c. must be below 3.22 with 32 inputs"):
                data.sample(1000, 32, seeded(), c_range=c_range)

    def test_mse_is_that_of_a_3_and_later(self):
        target = data.sample(6, 5, seeded()).targets
        wrong = target.clone()
        wrong[:, :2] = 100.0  # a_1 and a_2
        self.assertEqual(data.mse(wrong, target).item(), 0)
        wrong[:, 2] += 3.0  # a_3: one of three positions
        self.assertAlmostEqual(data.mse(wrong, target).item(), 3.0, places=5)
        self.assertClose(data.squared_errors(wrong, target).mean(), data.mse(wrong, target), 1e-5)
        self.assertEqual(data.mse(wrong, target, first=3).item(), 0)
        with self.assertRaises(ValueError):
            data.mse(target[:, :2], target[:, :2])


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
        transformer, x, before = random_model(), random_input(), {}
        plain = transformer(x, cache=before)

        def change(value):
            # Uneven, since a LayerNorm would not notice a constant; -inf stays -inf.
            return 1.2 * value + 0.1 * torch.linspace(1, 2, value.shape[-1], dtype=value.dtype)

        for name in transformer.hook_names:
            with self.subTest(name):
                hooks, cache = {name: change}, {}
                changed = transformer(x, hooks=hooks)
                expected = reference(transformer.state_dict(), x, SMALL, hooks)
                self.assertClose(changed, expected, 1e-9)
                self.assertGreater((changed - plain).abs().max(), 1e-4)
                self.assertClose(transformer(x, hooks=hooks, cache=cache), changed, 1e-10)
                finite = before[name].isfinite()
                self.assertClose(cache[name][finite], change(before[name])[finite], 1e-10)

    def test_cache_has_every_hook_point_in_transformer_lens_shapes(self):
        transformer, cache = random_model(), {}
        transformer(random_input(), cache=cache)
        self.assertEqual(sorted(cache), sorted(transformer.hook_names))
        stream, scale = (4, 6, SMALL.d_model), (4, 6, 1)
        of_head, of_mlp = (4, 6, SMALL.n_heads, SMALL.d_head), (4, 6, SMALL.d_mlp)
        scores = (4, SMALL.n_heads, 6, 6)
        ends = {
            "embed": stream,
            "resid_pre": stream,
            "resid_mid": stream,
            "resid_post": stream,
            "out": stream,
            "normalized": stream,
            "scale": scale,
            "hook_q": of_head,
            "hook_k": of_head,
            "hook_v": of_head,
            "hook_z": of_head,
            "attn_scores": scores,
            "pattern": scores,
            "result": (4, 6, SMALL.n_heads, SMALL.d_model),
            "hook_pre": of_mlp,
            "hook_post": of_mlp,
        }
        for name, value in cache.items():
            (end,) = (end for end in ends if name.endswith(end))
            self.assertEqual(tuple(value.shape), ends[end], name)

    def test_parameters_have_transformer_lens_names_and_shapes(self):
        expected = {
            "embed.W_E": [40, 128],
            "pos_embed.W_pos": [32, 128],
            "ln_final.w": [128],
            "ln_final.b": [128],
            "unembed.W_U": [128, 40],
            "unembed.b_U": [40],
        }
        block = {
            "attn.W_O": [8, 64, 128],
            "attn.b_O": [128],
            "mlp.W_in": [128, 3072],
            "mlp.b_in": [3072],
            "mlp.W_out": [3072, 128],
            "mlp.b_out": [128],
        }
        block |= {f"{ln}.{p}": [128] for ln in ("ln1", "ln2") for p in "wb"}
        block |= {f"attn.W_{letter}": [8, 128, 64] for letter in "QKV"}
        block |= {f"attn.b_{letter}": [8, 64] for letter in "QKV"}
        for l in range(3):
            expected |= {f"blocks.{l}.{name}": shape for name, shape in block.items()}
        state = model.Transformer(generator=seeded()).state_dict()
        self.assertEqual({name: list(value.shape) for name, value in state.items()}, expected)

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
            self.assertClose(
                transformer(changed, cache=cache)[:, :4], transformer(x, cache=cache)[:, :4], 1e-12
            )
            self.assertGreater((transformer(changed) - transformer(x))[:, 4].abs().max(), 1e-3)

    def test_a_pass_can_start_at_any_layer(self):
        transformer, x, cache = random_model(), random_input(), {}
        y = transformer(x, cache=cache)
        for layer in range(SMALL.n_layers):
            resid = cache[f"blocks.{layer}.hook_resid_pre"]
            self.assertClose(transformer.run_from(layer, resid), y, 1e-10)
        last = cache["blocks.1.hook_resid_post"]
        self.assertClose(transformer.run_from(SMALL.n_layers, last), y, 1e-10)
        with self.assertRaisesRegex(ValueError, "between 0 and n_layers = 2"):
            transformer.run_from(3, last)


class Folding(TestCase):
    def test_folding_preserves_outputs(self):
        for config in (SMALL, model.Config()):
            transformer, x = random_model(config), random_input(config)
            self.assertClose(model.fold(transformer)(x), transformer(x), 1e-10)
        shipped = model.load_weights(os.path.join(SHIPPED, "weights.pt"))
        x = data.sample(50, 14, seeded()).inputs
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


class Files(TestCase):
    def test_weights_survive_a_round_trip_bit_for_bit_and_config_json_says_how_they_are_used(self):
        config = dataclasses.replace(SMALL, act_fn="gelu_new", eps=0.1)
        transformer, x = random_model(config, torch.float32), random_input(dtype=torch.float32)
        # In a run called steps too.
        run = os.path.join(self.folder(), "steps")
        os.makedirs(os.path.join(run, "steps"))
        model.save(dataclasses.asdict(config), os.path.join(run, "config.json"))
        for place in ("weights.pt", "steps/00000005.pt"):
            model.save(transformer.state_dict(), os.path.join(run, place))
            loaded = model.load_weights(os.path.join(run, place))
            self.assertEqual(loaded.config, config)
            self.assertTrue(torch.equal(loaded(x), transformer(x)))

    def test_files_that_are_no_weights_are_refused(self):
        folder, path = self.run_folder()

        def refused(says: str):
            with self.assertRaisesRegex((FileNotFoundError, ValueError), says):
                model.load_weights(path)

        refused("there is no weights file")
        state = random_model(dtype=torch.float32).state_dict()
        for change, says in (
            ({"embed.W_E": torch.full((5, 12), torch.nan)}, "not finite"),
            ({"embed.W_E": torch.zeros(6, 12)}, "of another model .*size mismatch"),
            ({"extra": torch.zeros(1)}, "extra"),
        ):
            model.save(state | change, path)
            refused(says)
        for garbage in (b"", b"garbage", b"PK\x03\x04 truncated"):
            with open(path, "wb") as f:
                f.write(garbage)
            refused("damaged or is no weights file")
        model.save(state, path)
        config = os.path.join(folder, "config.json")
        model.save({"n_heads": "x"}, config)
        refused("n_heads must be")
        os.truncate(config, 5)
        refused("damaged or is no config")
        os.remove(config)
        refused("of another model .*blocks.2")

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_named_in_one_line(self):
        folder = self.folder()
        path = os.path.join(folder, "weights.pt")
        model.save({"x": torch.ones(2)}, path)
        os.symlink("/dev/full", f"{path}.{os.getpid()}.tmp")
        with self.assertRaisesRegex(OSError, f"cannot write {path}: No space left on device"):
            model.save({"x": torch.zeros(2)}, path)
        self.assertEqual(model.load_file(path, "file")[0]["x"].tolist(), [1, 1])


class Interventions(TestCase):
    def setUp(self):
        self.model, self.x, self.cache = random_model(), random_input(), {}
        self.plain = self.model(self.x, cache=self.cache)

    def test_mean_ablation_replaces_a_head_by_its_mean(self):
        means, after = interventions.mean_outputs(self.cache), {}
        self.model(self.x, interventions.replace_outputs(means, [(0, 2)], [0]), after)
        ablated, z = after["blocks.0.attn.hook_z"], self.cache["blocks.0.attn.hook_z"]
        self.assertClose(ablated[:, :, 2], z[:, :, 2].mean(0).expand_as(z[:, :, 2]), 1e-12)
        self.assertTrue(torch.equal(ablated[:, :, :2], z[:, :, :2]))
        mlp = self.cache["blocks.0.hook_mlp_out"]
        self.assertClose(after["blocks.0.hook_mlp_out"], mlp.mean(0).expand_as(mlp), 1e-12)

    def test_patching_positions_changes_those_only(self):
        other, name = {}, "blocks.1.attn.hook_v"
        self.model(random_input(seed=7), cache=other)
        after: dict = {}
        self.model(
            self.x, hooks=interventions.patch_positions({name: other[name]}, [1, 3]), cache=after
        )
        for position in range(6):
            source = other if position in (1, 3) else self.cache
            self.assertTrue(torch.equal(after[name][:, position], source[name][:, position]))

    def test_a_held_scale_is_what_the_final_layernorm_divides_by(self):
        scale = "ln_final.hook_scale"
        doubled = self.model(self.x, hooks=interventions.hold({scale: 2 * self.cache[scale]}))
        biases = self.model.ln_final.b @ self.model.unembed.W_U + self.model.unembed.b_U
        self.assertClose(2 * (doubled - biases), self.plain - biases, 1e-10)

    def test_pseudoinverse_qk_is_a_projection_of_rank_d_head(self):
        changed = interventions.pseudoinverse_qk(self.model, 1, [0, 2], seeded())
        P = model.qk_circuit(changed, 1)
        for head in (0, 2):
            self.assertClose(P[head] @ P[head], P[head], 1e-9)
            self.assertClose(P[head], P[head].T, 1e-9)
            self.assertAlmostEqual(P[head].trace().item(), SMALL.d_head, places=9)
        self.assertClose(P[1], model.qk_circuit(self.model, 1)[1], 1e-12)
        self.assertTrue(torch.equal(self.model(self.x), random_model()(self.x)))  # is not changed


class Measures(TestCase):
    def test_eigenvalue_score_of_known_circuits(self):
        quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        for matrix, score in (
            (torch.eye(4), 1),
            (-torch.eye(4), -1),
            (quarter_turn, 0),
            (torch.diag(torch.tensor([3.0, -1.0])), 0.5),
        ):
            self.assertAlmostEqual(analyze.eigenvalue_score(matrix).item(), score, places=6)

    def test_effective_rank_of_known_matrices(self):
        rotation = torch.linalg.qr(torch.randn(6, 6, generator=seeded()))[0]
        for matrix, rank in (
            (torch.outer(torch.arange(1.0, 4), torch.ones(5)), 1),
            (rotation, 6),
            (torch.diag(torch.tensor([2.0, 1.0, 0.0])), 9 / 5),
        ):
            self.assertAlmostEqual(analyze.effective_rank(matrix).item(), rank, places=4)

    def test_identity_cosine_of_known_matrices(self):
        quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        half = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        for matrix, cosine in (
            (3 * torch.eye(5), 1),
            (-torch.eye(5), -1),
            (quarter_turn, 0),
            (half, 0.5**0.5),
        ):
            self.assertAlmostEqual(analyze.identity_cosine(matrix).item(), cosine, places=6)

    def test_components_sum_to_output(self):
        transformer, x, cache = random_model(), random_input(), {}
        y, target = transformer(x, cache=cache), random_input(seed=5)
        scale = cache["ln_final.hook_scale"]

        def part(component):
            return analyze.direct_attribution(transformer, component, target, scale)

        total = part(cache["hook_embed"]) + part(cache["hook_pos_embed"])
        for l, block in enumerate(transformer.blocks):
            total += part(cache[f"blocks.{l}.attn.hook_result"]).sum(-1)
            total += part(block.attn.b_O.expand_as(cache["hook_embed"]))
            total += part(cache[f"blocks.{l}.hook_mlp_out"])
        biases = transformer.ln_final.b @ transformer.unembed.W_U + transformer.unembed.b_U
        self.assertClose(total + target @ biases, (y * target).sum(-1), 1e-9)

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

    def test_alternation_of_known_patterns(self):
        n, s = torch.arange(14)[:, None], torch.arange(14)

        def alternation(pattern):
            pattern = pattern.expand(14, 14).float().tril()
            return analyze.alternation((pattern / pattern.sum(-1, keepdim=True))[None, None])

        checkerboard = alternation((n - s) % 2 == 0)
        columns = alternation(s % 2 == 0)
        self.assertClose(torch.cat([checkerboard.share, columns.share]), 1, 1e-5)
        self.assertGreater(checkerboard.by_distance, 0.05)
        self.assertLess(columns.by_distance.abs(), 0.1 * checkerboard.by_distance)
        self.assertLess(alternation(s + 1).share.item(), 0.1)  # a trend
        self.assertLess(alternation(torch.ones(1)).share.item(), 1e-9)

    def test_intervals_are_as_wide_as_the_statistics_vary(self):
        values = torch.randn(2000, generator=seeded())
        for of, spread in ((torch.mean, 1), (torch.median, 1.2533)):
            low, high = analyze.interval(values, of=of)
            self.assertTrue(low < of(values) < high)
            self.assertAlmostEqual(high - low, 2 * 1.96 * spread / 2000**0.5, delta=0.03)

    def test_circuits_are_what_the_model_computes(self):
        transformer, cache = model.fold(random_model()), {}
        transformer.blocks[1].attn.b_Q.zero_()
        transformer.blocks[1].attn.b_K.zero_()
        transformer(random_input(), cache=cache)
        x = cache["blocks.1.ln1.hook_normalized"]
        QK, OV = model.qk_circuit(transformer, 1), model.ov_circuit(transformer, 1)
        scores = torch.einsum("bqd,hdD,bkD->bhqk", x, QK, x) / SMALL.d_head**0.5
        seen = cache["blocks.1.attn.hook_attn_scores"]
        self.assertClose(scores[seen.isfinite()], seen[seen.isfinite()], 1e-9)
        pattern = cache["blocks.1.attn.hook_pattern"]
        result = torch.einsum("bhqk,bkd,hdD->bqhD", pattern, x, OV)
        self.assertClose(result, cache["blocks.1.attn.hook_result"], 1e-9)


class NothingSilentlyWrong(TestCase):
    def test_a_hook_may_write_into_what_it_gets_and_nothing_else_changes(self):
        transformer, x, plain = random_model(), random_input(), {}
        y = transformer(x, cache=plain)
        names = transformer.hook_names
        for i, name in enumerate(names):
            with self.subTest(name):
                seen: dict = {}
                transformer(x, hooks={name: lambda value: value.zero_()}, cache=seen)
                self.assertTrue(all(torch.equal(seen[n], plain[n]) for n in names[:i]))
        resid = plain["blocks.1.hook_resid_pre"]
        before = resid.clone()
        transformer.run_from(1, resid, {"blocks.1.hook_resid_pre": lambda value: value.zero_()})
        self.assertTrue(torch.equal(resid, before))
        # Neither the input nor a parameter was written into.
        self.assertTrue(torch.equal(x, random_input()))
        self.assertClose(transformer(x), y, 1e-12)

    def test_entries_of_a_cache_share_no_memory(self):
        transformer, x, cache = random_model(), random_input(), {}
        y = transformer(x, cache=cache)
        memory = [value.untyped_storage().data_ptr() for value in cache.values()]
        self.assertEqual(len(set(memory)), len(memory))
        for value in cache.values():
            value.fill_(7.0)
        self.assertClose(transformer(x), y, 1e-12)

    def test_gradients_reach_the_entries_of_a_cache(self):
        transformer, cache = random_model().requires_grad_(True), {}
        loss = transformer(random_input(), cache=cache).pow(2).mean()
        points = [cache["hook_embed"], cache["blocks.1.attn.hook_z"]]
        for gradient in torch.autograd.grad(loss, points):
            self.assertGreater(gradient.abs().max(), 0)

    def test_joined_hooks_all_act_in_the_order_given(self):
        transformer, x = random_model(), random_input()
        zero = interventions.zero_outputs(transformer)
        one, other, both = (
            interventions.replace_outputs(zero, heads)
            for heads in ([(0, 0)], [(0, 2)], [(0, 0), (0, 2)])
        )
        expected = transformer(x, hooks=both)
        joined = interventions.join(one, other)
        self.assertTrue(torch.equal(transformer(x, hooks=joined), expected))
        # | keeps only the last.
        self.assertGreater((transformer(x, hooks=one | other) - expected).abs().max(), 1e-3)
        seen: dict = {}
        name = "blocks.0.attn.hook_z"
        transformer(x, hooks=interventions.join(one, interventions.record([name], seen), other))
        self.assertEqual(seen[name][:, :, 0].abs().max(), 0)
        self.assertGreater(seen[name][:, :, 2].abs().max(), 0)

    def test_wrong_shapes_dtypes_and_names_are_refused_in_one_line_that_says_what_is_right(self):
        transformer, x = random_model(dtype=torch.float32), random_input(dtype=torch.float32)
        point = "blocks.0.hook_attn_out"
        for returned, says in (
            (lambda v: v > 0, "float32.*not .*bool"),
            (lambda v: None, "NoneType"),
            (lambda v: v[:, :1], "shape"),
            (lambda v: v.double(), "float64"),
        ):
            with self.assertRaisesRegex(ValueError, f"the hook at {point} must return .*{says}"):
                transformer(x, hooks={point: returned})
        for bad in (
            x.double(),
            x.long(),
            x[0],
            x[..., :3],
            torch.zeros(2, 9, 5),
            torch.zeros(2, 0, 5),
        ):
            with self.assertRaisesRegex(ValueError, "^x must be .*, not [^\n]*$"):
                transformer(bad)
        resid = torch.zeros(2, 4, 12)
        for bad in (resid[0], torch.zeros(2, 50, 12), resid.double(), x):
            with self.assertRaisesRegex(ValueError, "^resid must be "):
                transformer.run_from(1, bad)
        with self.assertRaisesRegex(KeyError, "blocks.0.attn.hook_pattern"):
            transformer(x, hooks={"blocks.0.attn.hook_patern": lambda v: v})

    def test_heads_layers_and_positions_may_be_lists_tensors_or_arrays(self):
        transformer, x = random_model(), random_input()
        zeros = interventions.zero_outputs(transformer)
        heads, positions = torch.tensor([[1, 0], [1, 2], [0, 1]]), torch.tensor([1, 2])
        hooks = interventions.replace_outputs(zeros, heads.tolist(), [1])
        patch = interventions.patch_positions({"hook_embed": torch.zeros(4, 6, 12)}, [1, 2])
        expected = transformer(x, hooks=interventions.join(hooks, patch))
        for convert in (lambda t: t, lambda t: t.numpy(), lambda t: tuple(t.unbind())):
            hooks = interventions.replace_outputs(zeros, convert(heads), convert(torch.tensor([1])))
            embed = {"hook_embed": torch.zeros(4, 6, 12)}
            patch = interventions.patch_positions(embed, convert(positions))
            found = transformer(x, hooks=interventions.join(hooks, patch))
            self.assertTrue(torch.equal(found, expected))
            changed = interventions.replace_qk(transformer, 1, convert(positions), 0.0, 0.0)
            W_Q = changed.blocks[1].attn.W_Q
            self.assertEqual(W_Q.abs().amax((1, 2)).gt(0).tolist(), [True, False, False])

    def test_patches_of_no_or_wrong_positions_and_of_patterns_are_refused(self):
        cache: dict = {}
        random_model()(random_input(), cache=cache)
        value = {"blocks.0.attn.hook_v": cache["blocks.0.attn.hook_v"]}
        for positions in ([], [-1], [6]):
            with self.assertRaisesRegex(ValueError, "positions must be some of 0 to 5"):
                interventions.patch_positions(value, positions)
        with self.assertRaisesRegex(ValueError, r"is \[batch, head, dest, src\]"):
            interventions.patch_positions({"blocks.0.attn.hook_pattern": torch.zeros(1)}, [0])
        with self.assertRaisesRegex(ValueError, "does not broadcast"):
            random_model()(
                random_input(), hooks=interventions.hold({"hook_embed": torch.zeros(7, 7)})
            )

    def test_weights_of_compiled_parallel_and_transformer_lens_models_load(self):
        folder, path = self.run_folder()
        state = random_model(dtype=torch.float32).state_dict()
        lens = {"blocks.0.attn.mask": torch.ones(8, 8).tril().bool()}
        lens["blocks.1.attn.IGNORE"] = torch.zeros(())
        kinds = [state, state | lens]
        for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
            kinds.append({f"{prefix}{name}": value for name, value in state.items()})
        for weights in kinds:
            model.save(weights, path)
            loaded = model.load_weights(path)
            self.assertTrue(torch.equal(loaded.embed.W_E, state["embed.W_E"]))
        self.assertEqual(loaded.sha256, hashlib.sha256(read(path)).hexdigest())

        # The same names and shapes, another function.
        model.save(state | {"blocks.0.attn.mask": torch.ones(8, 8).bool()}, path)
        with self.assertRaisesRegex(ValueError, "blocks.0.attn.mask is not causal"):
            model.load_weights(path)
        settings = dataclasses.asdict(SMALL) | {"use_attn_scale": False}
        model.save(settings, os.path.join(folder, "config.json"))
        with self.assertRaisesRegex(ValueError, "says use_attn_scale False: here it is always"):
            model.load_weights(path)

    def test_models_can_be_pickled_and_copied(self):
        for act_fn in model.ACTIVATIONS:
            transformer = random_model(dataclasses.replace(SMALL, act_fn=act_fn))
            copied = pickle.loads(pickle.dumps(transformer))
            self.assertTrue(torch.equal(copied(random_input()), transformer(random_input())))

    def test_the_surroundings_change_nothing(self):
        folder = self.folder()
        with open(os.path.join(folder, "matplotlibrc"), "w") as f:
            f.write("lines.linewidth: 20\nfigure.facecolor: red\n")
        there, here = os.path.join(folder, "there"), os.path.join(folder, "here")
        program = [sys.executable, os.path.join(HERE, "analyze.py"), "--fig", "1", "--out", there]
        env = os.environ | {"MPLBACKEND": "no_such_backend"}
        done = subprocess.run(program, cwd=folder, env=env, capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        command(analyze_main, "--fig", "1", "--out", here)
        name = "fig01_sequences.png"
        self.assertEqual(read(os.path.join(there, name)), read(os.path.join(here, name)))
        self.assertNotIn("matplotlib.pyplot", sys.modules)  # importing analyze chooses no backend


class Training(TestCase):
    def settings(self, **changes) -> dict:
        small = {"steps": 6, "batch_size": 2, "eval_every": 3, "device": "cpu"}
        out = os.path.join(self.folder(), "run")
        return dataclasses.asdict(SMALL_TASK) | small | {"out": out} | changes

    def run_of(self, **changes) -> train.Run:
        return train.Run(*train.from_settings(self.settings(**changes)))

    def quietly(self, run: train.Run) -> train.Run:
        with contextlib.redirect_stdout(io.StringIO()):
            with mock.patch.object(train, "HELD_OUT_PER_LENGTH", 2):
                train.train(run)
        return run

    def test_a_step_is_adamw_on_the_papers_loss(self):
        for loss_from in (2, 0):
            run, twin = self.run_of(loss_from=loss_from), self.run_of()
            length = run.draw_length()
            sample = data.sample(2, length, twin.sequences)
            off = twin.model(sample.inputs) - sample.targets
            loss = off[:, loss_from:].pow(2).mean()
            loss.backward()
            self.assertClose(run.take_step(length), loss.detach(), 1e-6)
            for after, before in zip(run.model.parameters(), twin.model.parameters()):
                # The moments are those of g alone, corrected to g and g^2.
                g = before.grad
                expected = before * (1 - 1e-4 * 0.01) - 1e-4 * g / (g.abs() + 1e-8)
                self.assertClose(after.detach(), expected.detach(), 1e-7)

    def assertPartsMakeAWhole(self, device: str, **changes):
        settings = self.settings(steps=10, eval_every=5, device=device, **changes)
        whole = self.quietly(train.open_run(settings, resume=False))
        half = {"out": os.path.join(self.folder(), "half"), "device": device}
        run = train.open_run(settings | half, resume=False)
        with mock.patch.object(train.data, "evaluate", side_effect=[1.0, KeyboardInterrupt]):
            self.assertRaises(KeyboardInterrupt, self.quietly, run)  # with the second row

        resumed = train.open_run(half, resume=True)
        self.assertEqual(resumed.done, 5)
        self.quietly(resumed)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
            self.assertTrue(torch.equal(a, b))
        last = [run.log.split()[-1].split(",")[:3] for run in (whole, resumed)]
        self.assertEqual(*last)
        self.assertEqual(len(resumed.log.split()), len(whole.log.split()))
        return whole

    def test_a_run_in_two_parts_equals_one_in_one_part(self):
        constant = self.assertPartsMakeAWhole("cpu")
        falling = self.assertPartsMakeAWhole("cpu", decay_steps=7)
        self.assertFalse(torch.equal(constant.model.embed.W_E, falling.model.embed.W_E))

    def test_the_learning_rate_falls_linearly_to_0_over_the_last_steps(self):
        run = self.run_of(steps=10, decay_steps=4)
        rates = []
        for _ in range(10):
            run.take_step(3)
            rates.append(run.optimizer.param_groups[0]["lr"] / 1e-4)
        np.testing.assert_allclose(rates, [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])

    def test_a_finished_run_goes_on_with_more_steps_and_another_end(self):
        settings = self.settings(steps=5, eval_every=5)
        self.quietly(train.open_run(settings, resume=False))
        more = {"out": settings["out"], "steps": 10, "decay_steps": 5}
        twin = self.quietly(train.open_run(more, resume=True))
        whole = self.quietly(
            train.open_run(self.settings(steps=10, eval_every=5, decay_steps=5), False)
        )
        self.assertTrue(torch.equal(twin.model.embed.W_E, whole.model.embed.W_E))
        config = json.loads(read(os.path.join(settings["out"], "config.json")))
        self.assertEqual((config["steps"], config["decay_steps"]), (10, 5))

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_a_run_in_two_parts_equals_one_in_one_part_on_cuda(self):
        self.assertPartsMakeAWhole("cuda", decay_steps=7)

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_captured_steps_are_the_plain_steps(self):
        captured, plain = (
            self.run_of(device="cuda", no_graphs=no_graphs) for no_graphs in (False, True)
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train.capture(captured)
        self.assertTrue(captured.graphs)
        for length in (3, 14, 5, 14):
            self.assertClose(captured.take_step(length).cpu(), plain.take_step(length).cpu(), 1e-6)

    def test_a_killed_run_resumes_to_the_same_bits_and_the_same_log(self):
        folder = self.folder()
        arguments = "--d-mlp 20 --steps 60 --eval-every 5 --batch-size 2 --device cpu --keep-steps"
        script = "import train; train.HELD_OUT_PER_LENGTH = 2; train.main()"
        program = [sys.executable, "-c", script, *arguments.split(), "--out", f"{folder}/killed"]
        killed = subprocess.Popen(program, cwd=HERE, stdout=subprocess.PIPE)
        killed.stdout.readline()  # the first row of the log is written: now it is somewhere after it
        killed.kill()
        killed.communicate()
        self.assertEqual(killed.returncode, -signal.SIGKILL)
        with mock.patch.object(train, "HELD_OUT_PER_LENGTH", 2):
            # What else it was given it knows, --keep-steps too.
            resumed = command(train.main, "--resume", "--out", f"{folder}/killed")
            whole = command(train.main, *arguments.split(), "--out", f"{folder}/whole")
        self.assertEqual([resumed[0], whole[0]], [0, 0], resumed + whole)
        for name in ("weights.pt", "steps/00000032.pt", "steps/00000000.pt"):
            self.assertEqual(read(f"{folder}/whole/{name}"), read(f"{folder}/killed/{name}"))
        logs = [read(f"{folder}/{run}/log.csv").decode().split() for run in ("whole", "killed")]
        whole, killed = ([line.split(",")[:3] for line in log] for log in logs)
        self.assertEqual(whole, killed)
        self.assertEqual([row[0] for row in whole[1:]], [str(step) for step in range(5, 61, 5)])

    def test_an_interrupt_ends_with_a_line_that_says_where_it_goes_on(self):
        out = os.path.join(self.folder(), "run")
        with mock.patch.object(train.Run, "take_step", side_effect=KeyboardInterrupt):
            status, said, _ = command(train.main, "--d-mlp", "20", "--out", out)
        self.assertEqual(status, 130)
        self.assertIn("stopped; --resume goes on from step 0", said)

    def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(self):
        run = train.open_run(self.settings(lr=1e30, steps=50, eval_every=10), resume=False)
        path = os.path.join(run.options.out, "checkpoint.pt")
        before = read(path)
        with self.assertRaisesRegex(
            FloatingPointError, "not finite at or before step 10: the last"
        ):
            self.quietly(run)
        self.assertEqual(read(path), before)

    def test_what_cannot_be_printed_loses_nothing_but_the_print(self):
        with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stream:
            with contextlib.redirect_stdout(stream):
                train.say("s\u00e4")
            self.assertIn(b"s\\xe4", stream.buffer.getvalue())
        with mock.patch("builtins.print", side_effect=BrokenPipeError):  # nobody reads it
            run = self.quietly(train.open_run(self.settings(), resume=False))
        self.assertEqual(len(run.log.split()), 3)

    def test_folders_that_cannot_be_used_are_refused_and_left_as_they_are(self):
        settings = self.settings()
        out = settings["out"]

        def refused(says: str, resume: bool = True, **changes):
            given = {"out": out} | changes if resume else settings
            with self.assertRaisesRegex((FileNotFoundError, ValueError), says):
                train.open_run(given, resume)

        refused("there is no checkpoint")
        self.assertFalse(os.path.exists(out))
        train.open_run(settings, resume=False)
        refused("lr 0.0001, not 0.001", lr=1e-3)
        refused("n_layers 2, not 1", n_layers=1)
        refused("loss_from 2", loss_from=0)
        refused("act_fn relu", act_fn="gelu_new")
        refused("task affine", task="x")
        config = os.path.join(out, "config.json")
        model.save(json.loads(read(config)) | {"lr": 3.0}, config)
        refused("lr 0.0001, not 3.0")
        path = os.path.join(out, "checkpoint.pt")
        for size in (9999, 9):
            os.truncate(path, size)
            refused("damaged or is no checkpoint")
            self.assertEqual(os.path.getsize(path), size)
        # Each of them says that a run is here.
        for name in ("checkpoint.pt", "weights.pt", "log.csv"):
            refused("already holds a run", resume=False)
            os.remove(os.path.join(out, name))
        refused("just begun.* delete .*config.json", resume=False)

    def test_of_two_runs_that_begin_in_one_folder_the_second_is_refused(self):
        settings = self.settings()
        with mock.patch.object(train.Run, "save"):  # the first has not come to write anything yet
            train.open_run(settings, resume=False)
        config = read(os.path.join(settings["out"], "config.json"))
        with self.assertRaisesRegex(ValueError, "belongs to a run that has just begun"):
            train.open_run(settings | {"seed": 2}, resume=False)
        self.assertEqual(read(os.path.join(settings["out"], "config.json")), config)

    def test_a_run_is_resumed_with_its_number_of_threads(self):
        settings = self.settings()
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(2)
        train.open_run(settings, resume=False)
        torch.set_num_threads(1)
        train.open_run({"out": settings["out"]}, resume=True)
        self.assertEqual(torch.get_num_threads(), 2)

    def test_bad_command_lines_are_refused_in_one_line(self):
        out = os.path.join(self.folder(), "run")
        for arguments, says in (
            (["--steps", "0"], "at least 1, not 0"),
            (["--steps", "many"], "invalid int"),
            (["--lr", "nan"], "finite"),
            (["--lr", "0"], "at least"),
            (["--weight-decay", "-1"], "at least 0"),
            (["--device", "x"], "device must be one of"),
            (["--decay-steps", "-1"], "at least 0"),
            (["--steps", "9", "--decay-steps", "10"], "0 to steps = 9, not 10"),
            (["--dtype", "float16"], "float32, bfloat16"),
            (["--n-layers", "0"], "1"),
            (["--act-fn", "tanh"], "relu, gelu_new"),
            (["--loss-from", "3"], "0 to 2"),
            (["--n-ctx", "8"], "at least 14"),
            (["--speed", "high"], "unrecognized"),
        ):
            trains = mock.patch.object(train, "train", side_effect=AssertionError("it trains"))
            with self.subTest(arguments), trains:
                self.assertRefused(2, says, train.main, *arguments, "--out", out)
        self.assertFalse(os.path.exists(out))
        self.assertRefused(1, "there is no checkpoint", train.main, "--resume", "--out", out)
        blocked = os.path.join(self.folder(), "file")
        open(blocked, "w").close()
        self.assertRefused(
            1, "file", train.main, "--device", "cpu", "--out", os.path.join(blocked, "run")
        )


class Analysis(TestCase):
    @classmethod
    def setUpClass(cls):
        counts = {
            "POPULATION": 24,
            "UNTRAINED": 12,
            "HELD_OUT_PER_LENGTH": 10,
            "FEW": 6,
            "EXAMPLES": 12,
            "CHUNK": 10,
            "QK_DRAWS": 2,
            "RESAMPLES": 50,
        }
        for name, count in counts.items():
            patch = mock.patch.object(analyze, name, count)
            patch.start()
            cls.addClassCleanup(patch.stop)

    def study(self, transformer: model.Transformer | None = None) -> analyze.Study:
        study = analyze.open_study(SHIPPED)
        if transformer is None:
            return study
        return analyze.Study(transformer, 40, study.log, study.settings)

    def test_an_untrained_model_reproduces_no_learnt_claim(self):
        study = self.study().untrained
        learnt = """mse l0_prev_token l1_second_token l2_checkerboard l0_ov_r2 l0_ov_slope l2_ov_identity
            l1_ov_effective_rank l2_qk_identity lens_after_l0 refinement eigenvalue_score alpha"""
        for name in learnt.split():
            self.assertEqual(
                analyze.PAPER.claims[name].function(study).verdict, "not reproduced", name
            )

    def test_a_model_built_as_the_paper_says_reproduces_the_circuit_claims(self):
        study = self.study(model.Transformer(generator=seeded()))
        attn, W_U = study.model.blocks[2].attn, study.model.unembed.W_U
        attn.W_V.zero_(), attn.W_O.zero_(), attn.W_Q.zero_(), attn.W_K.zero_()
        attn.W_V[:, :, :40], attn.W_O[:, :40] = W_U, -torch.linalg.pinv(W_U)
        attn.W_Q[:, :, :40], attn.W_K[:, :, :40] = W_U, W_U
        for name in ("l2_ov_identity", "l2_qk_identity", "eigenvalue_score"):
            self.assertEqual(analyze.PAPER.claims[name].function(study).verdict, "reproduced", name)

    def test_ablations_and_held_scales_are_what_they_say(self):
        study = self.study()
        x, target = study.test.inputs, study.test.targets
        heads = interventions.layer_heads(study.model, 1)
        means = interventions.mean_outputs(study.activations)
        hooks = interventions.replace_outputs(means, heads)
        expected = data.squared_errors(study.model(x, hooks=hooks), target)
        self.assertClose(study.errors(1, hooks) / expected, 1, 1e-3)
        scale = study.clean[analyze.SCALE]
        hold = interventions.hold({analyze.SCALE: scale})
        held = study.model(x, hooks=interventions.join(hooks, hold))
        found = study.errors(1, hooks, scale=scale)
        self.assertClose(found / data.squared_errors(held, target), 1, 1e-3)
        self.assertClose(study.baseline / data.squared_errors(study.model(x), target), 1, 1e-3)
        claimed = analyze.claim_l1_mean_ablation(study).measured
        self.assertClose(claimed, expected.mean(), 1e-5)
        self.assertClose(study.near(-1).c, -1, 0.1)

    def test_all_of_it_is_measured_and_figures_name_their_axes(self):
        canvases, out = [], os.path.join(self.folder(), "figures")
        keep = lambda canvas, *_, **__: canvases.append(canvas)
        with mock.patch.object(analyze.Figure, "savefig", keep):
            status, _, err = command(analyze_main, "--all", "--run", SHIPPED, "--out", out)
        self.assertEqual(status, 0, err)
        for canvas in canvases:
            with self.subTest(canvas.get_suptitle()):
                self.assertTrue(canvas.get_suptitle())
                labels = [axes.get_xlabel() for axes in canvas.axes if not axes.get_label()]
                self.assertTrue(canvas.get_supxlabel() or any(labels))
                for image in sum((axes.get_images() for axes in canvas.axes), []):
                    low, high = image.get_clim()
                    middle = low if image.get_cmap().name == "Blues" else low + high
                    self.assertEqual(middle, 0)
        claims = json.loads(read(os.path.join(out, "results.json")))["claims"]
        self.assertEqual(list(claims), list(analyze.PAPER.claims))
        columns = "claim paper measured interval values verdict why untrained"
        self.assertEqual(" ".join(claims["mse"]), columns)
        # What else is computed changes no number.
        study = self.study()
        for name in ("alpha", "l2_qk_pinv", "l0_ov_r2_random", "mse"):
            again = analyze.plain(analyze.PAPER.claims[name].function(study).measured)
            self.assertEqual(again, claims[name]["measured"], name)

    def test_what_cannot_be_measured_is_named_and_the_rest_is_written(self):
        catalogue, out = analyze.Catalogue(), self.folder()
        catalogue.figure(1, "drawn")(analyze.figure_sequences)

        def claim(name: str, measure):
            def find(study):
                """A rule."""
                return analyze.Finding(measure(), "partly", {"a control": torch.nan})

            find.__name__ = f"claim_{name}"
            catalogue.claim("a claim", None, 1)(find)

        claim("well", lambda: 1.0)
        claim("endless", lambda: [1.0, torch.inf])
        claim("singular", lambda: torch.linalg.inv(torch.zeros(2, 2)))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            analyze.analyse(catalogue, self.study(), out, [], "results")
        self.assertIn("claim endless cannot be had of this model: what it me", said.getvalue())
        self.assertIn("claim singular cannot be had of this model: ", said.getvalue())
        strict = lambda name: self.fail(f"{name} in a JSON file")
        results = json.loads(read(os.path.join(out, "results.json")), parse_constant=strict)
        self.assertEqual(list(results["claims"]), ["well"])
        self.assertEqual(results["claims"]["well"]["values"], {"a control": None})

    def test_a_model_that_has_died_is_analysed_as_far_as_it_can_be(self):
        dead = model.Transformer(generator=seeded())
        for parameter in dead.parameters():
            parameter.data.zero_()
        with contextlib.redirect_stdout(io.StringIO()) as said, mock.patch.object(
            analyze.Figure, "savefig"
        ):
            study = self.study(dead)
            study.meta = {"config": {}}
            analyze.analyse(analyze.PAPER, study, self.folder(), [], "results")
        self.assertIn("claim l0_ov_r2 cannot be had", said.getvalue())
        self.assertIn("written to", said.getvalue())

    def test_what_a_study_has_computed_goes_with_it_or_with_its_model(self):
        study = self.study()
        before = analyze.held_out_errors(study)
        self.assertIs(analyze.held_out_errors(study), before)
        study.model.unembed.W_U.zero_()
        self.assertGreater(analyze.held_out_errors(study).mean(), 10 * before.mean())
        activations = weakref.ref(study.activations["blocks.0.hook_resid_pre"])
        self.assertIsNotNone(activations())
        del study
        gc.collect()
        self.assertIsNone(activations())

    def test_a_model_with_fewer_layers_gets_what_has_a_meaning_for_it(self):
        run = os.path.join(self.folder(), "run")
        arguments = "--n-layers 1 --d-mlp 20 --steps 1 --eval-every 1 --keep-steps --out".split()
        with mock.patch.object(train, "HELD_OUT_PER_LENGTH", 2):
            command(train.main, *arguments, run)
        with mock.patch.object(analyze.Figure, "savefig"):
            status, said, err = command(analyze_main, "--all", "--run", run)
        self.assertEqual(status, 0, err)
        for name in ("figure 4", "figure 12", "l1_second_token", "l2_qk_pinv"):
            self.assertIn(name, said.splitlines()[0])
        claims = json.loads(read(os.path.join(run, "figures", "results.json")))["claims"]
        one = [name for name, claim in analyze.PAPER.claims.items() if claim.layers == 1]
        self.assertEqual(list(claims), one)
        self.assertEqual(command(analyze_main, "--fig", "1", "--run", run, "--step", "1")[0], 0)
        self.assertIn("fig01_sequences.png", os.listdir(os.path.join(run, "figures", "step_1")))
        self.assertRefused(1, "no weights file", analyze_main, "--all", "--run", run, "--step", "7")

    def test_bad_command_lines_are_refused_in_one_line_and_write_nothing(self):
        folder = self.folder()
        out, run = os.path.join(folder, "figures"), os.path.join(folder, "run")
        os.mkdir(run)

        def refused(status: int, says: str, *arguments: str):
            self.assertRefused(status, says, analyze_main, *arguments, "--out", out)

        def run_refused(says: str, name: str = "", content: str = ""):
            if name:
                with open(os.path.join(run, name), "w") as f:
                    f.write(content)
            refused(1, says, "--all", "--run", run)

        refused(2, "no figure 99", "--fig", "99")
        refused(2, "one of the arguments")
        refused(1, "no run folder", "--all", "--run", os.path.join(folder, "missing"))
        run_refused("no weights file")
        run_refused("damaged", "weights.pt", "garbage")
        weights = os.path.join(run, "weights.pt")
        model.save(random_model(SMALL_TASK, torch.float32).state_dict(), weights)
        run_refused("of another model")
        model.save(model.Transformer().state_dict(), weights)
        run_refused("no training log")
        run_refused("damaged", "config.json", '{"n_')
        run_refused("blocks", "config.json", '{"n_layers": 2}')
        run_refused("x, not", "config.json", '{"task": "x"}')
        os.remove(os.path.join(run, "config.json"))
        for garbage in ("", "step,loss,eval_mse\n", "a,b\n1,2\n", "step,loss,eval_mse\n1,nan,1\n"):
            run_refused("is no training log", "log.csv", garbage)
        self.assertFalse(os.path.exists(out))
        self.assertRefused(1, "weights.pt", analyze_main, "--fig", "1", "--out", weights)

    def test_list_names_every_figure_and_claim_and_a_taken_number_is_refused(self):
        status, out, _ = command(analyze_main, "--list")
        entries = len(analyze.PAPER.figures) + len(analyze.PAPER.claims)
        self.assertEqual((status, len(out.splitlines())), (0, entries))
        with self.assertRaisesRegex(ValueError, "2 is taken by: loss against step"):
            analyze.figure(2, "another")(len)
        # Its figure is drawn wherever it is measured.
        for (name, claim) in analyze.PAPER.claims.items():
            self.assertLessEqual(analyze.PAPER.figures[claim.figure].layers, claim.layers, name)


class Committed(TestCase):
    def test_committed_results_are_those_of_the_shipped_weights(self):
        figures = os.path.join(HERE, "figures")
        results = json.loads(read(os.path.join(figures, "results.json")))
        sha256 = hashlib.sha256(read(os.path.join(SHIPPED, "weights.pt"))).hexdigest()
        self.assertEqual(results["meta"]["sha256"], sha256)
        for name, found in results["claims"].items():  # a claim that is not there yet is no fault
            claim = analyze.PAPER.claims[name]
            rule = " ".join(claim.function.__doc__.split())
            written = (found["claim"], found["paper"], found["why"])
            self.assertEqual(written, (claim.text, claim.paper, rule))
            self.assertIn(analyze.PAPER.file(claim.figure), os.listdir(figures))
        with mock.patch.object(analyze, "POPULATION", 200):
            study = analyze.open_study(SHIPPED)
        tolerances = {"eigenvalue_score": 1e-3, "l2_qk_identity": 1e-3, "l0_prev_token": 0.02}
        for name, tolerance in tolerances.items():
            again = analyze.plain(analyze.PAPER.claims[name].function(study).measured)
            committed = torch.tensor(results["claims"][name]["measured"])
            self.assertClose(torch.tensor(again), committed, tolerance)

    def test_the_links_of_the_texts_work(self):
        for name in ("README.md", "FINDINGS.md", *(["beyond/README.md"] if BEYOND else [])):
            path = os.path.join(HERE, name)
            for target in re.findall(r"\]\(([^)#]+)", read(path).decode()):
                file = os.path.join(os.path.dirname(path), target)
                there = os.path.exists(file) or ("beyond/" in target and not BEYOND)
                self.assertTrue(target.startswith("http") or there, target)


def load_tests(loader, tests, _):
    """The tests of beyond/ too, where that folder is."""
    if BEYOND:
        tests.addTests(loader.loadTestsFromName("beyond.test_beyond"))
    return tests


if __name__ == "__main__":
    unittest.main()
