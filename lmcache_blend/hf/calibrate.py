"""Calibration data of a Hugging Face model: its KV on some text, and the gradients that say what matters in it.

Each document is a file in a folder, so a fit that was cut short goes on where it stopped, and only one layer is in
memory.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmcache_blend.blend.chunks import read_layers
from lmcache_blend.blend.runner import Plan
from lmcache_blend.codecs.calibration import FitTarget
from lmcache_blend.hf.intercept import Forward
from lmcache_blend.hf.runner import HFRunner
from lmcache_blend.rotary import RotaryTable

SINKS = 4


class Documents:
    """A Calibration (codecs/calibration.py) over files of `capture`.

    rotary: of the model, for codecs of keys after RoPE: each document's keys are turned to the positions they had.
    """

    def __init__(self, target: FitTarget, files: Sequence[Path], rotary: RotaryTable | None = None):
        self.target, self._files = target, [safe_open(path, "pt") for path in files]
        self.ids: Sequence[Tensor] = [f.get_tensor("ids") for f in self._files]
        self.texts = frozenset(text_digest(x) for x in self.ids)
        self.lengths: Sequence[int] = [len(x) - SINKS for x in self.ids]
        self._angles = rotary and [rotary.at(torch.arange(SINKS, SINKS + n)) for n in self.lengths]

    def kv(self, layer: int) -> tuple[Tensor, Tensor]:
        pair = self._rows(f"k{layer}"), self._rows(f"v{layer}")
        if self._angles is None:
            return pair
        hk, dk, hv, dv = self.target.shapes[layer]
        documents = []
        for angles, *parts in zip(self._angles, *(x.split(list(self.lengths)) for x in pair), strict=True):
            heads = (x.unflatten(1, size).transpose(0, 1) for x, size in zip(parts, ((hk, dk), (hv, dv)), strict=True))
            documents.append([x.transpose(0, 1).flatten(1) for x in angles.rotate(layer, *heads)])
        k, v = (torch.cat(parts) for parts in zip(*documents, strict=True))
        return k, v

    def fisher(self, layer: int) -> tuple[Tensor, Tensor]:
        pair = []
        for slot in "kv":
            total = sum(f.get_tensor(f"m{slot}{layer}").double() for f in self._files)
            pair.append((total / sum(self.lengths)).float())  # pyright: ignore[reportAttributeAccessIssue]
        return pair[0], pair[1]

    def energy(self, layer: int) -> Tensor:
        parts = [self._rows(f"e{slot}{layer}") for slot in "kv"]
        return sum(((e / e.mean(0).clamp_min(1e-30)).sum(1) for e in parts), torch.zeros(sum(self.lengths)))

    def _rows(self, name: str) -> Tensor:
        return torch.cat([f.get_tensor(name).float() for f in self._files])


def fit_target(runner: HFRunner) -> FitTarget:
    """The runner's model as a fit sees it."""
    weight: Tensor = runner.model.get_input_embeddings().weight  # pyright: ignore[reportAssignmentType]
    return FitTarget(
        runner.model_id, runner.fingerprint, runner.kv_shapes, weight.detach().float().cpu().contiguous().numpy()
    )


def text_digest(ids: Tensor) -> str:
    """Digest of a document's first 64 tokens: a benchmark on the same document finds it, whatever the length."""
    return hashlib.sha256(ids[:64].to(torch.int64).cpu().numpy().tobytes()).hexdigest()[:16]


def capture(runner: HFRunner, ids: Tensor, context: int, path: Path, seed: int = 0) -> None:
    """Write one document's calibration data.

    ids: [T + n] int64; the first `context` = T are the document, the others continue it. Labels of the n rows are drawn
    from the model (seed), and the summed loss is differentiated by the KV of the T tokens, keys before RoPE: the
    expected
    outer product of that gradient is the Fisher information (Martens 2014, arXiv 1412.1193).
    File: ids [T]; per layer k, v [T - 4, H D] float16, mk, mv [H, D, D] summed outer products, ek, ev [T - 4, H]
    energies.
    """
    tokens, every = ids[:context], torch.arange(len(ids))
    kv = runner.new_kv(context)
    runner.forward([tokens], [kv], Plan([every[:context]]))
    angles = runner.rotary.at(every[:context])
    layers = read_layers(runner, kv, 0, context, angles)
    leaves = _Leaves(layers, angles, len(ids))
    n, rows = len(ids) - context, every[None, context:].to(runner.device)
    for parameter in runner.model.parameters():
        parameter.requires_grad_(False)
    with torch.enable_grad():
        forward = Forward([leaves], rows, runner.num_layers)  # pyright: ignore[reportArgumentType]
        logits = runner.run_rows(forward, ids[None, context:].to(runner.device), rows, n)
        assert logits is not None
        probabilities = logits[0].detach().softmax(-1)
        labels = torch.multinomial(
            probabilities.cpu(), 1, generator=torch.Generator().manual_seed(seed)
        ).to(logits.device)  # fmt: skip
        torch.nn.functional.cross_entropy(logits[0], labels[:, 0], reduction="sum").backward()
    out = {"ids": tokens.cpu().contiguous()}
    for i in range(runner.num_layers):
        for slot, leaf in zip("kv", leaves.pairs[i], strict=True):
            g = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            x, g = leaf.detach()[:, SINKS:].float().cpu(), g[:, SINKS:].float().cpu()
            largest = torch.finfo(torch.float16).max
            out[f"{slot}{i}"] = x.transpose(0, 1).flatten(1).clamp(-largest, largest).half().contiguous()
            out[f"m{slot}{i}"] = g.mT @ g
            out[f"e{slot}{i}"] = g.square().sum(2).T.contiguous()
    part = path.with_suffix(".part")
    save_file(out, part)
    part.replace(path)


class _Leaves:
    """Stands for a DenseKV whose content hangs on leaves of the autograd graph, keys before RoPE."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], angles, capacity: int):
        self.length, self.capacity, self._angles = capacity, capacity, angles
        self.pairs = [tuple(x.clone().requires_grad_() for x in pair) for pair in layers]
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._made:
            pair = self._angles.rotate(layer, *self.pairs[layer])
            room = [torch.cat((x, x.new_zeros(x.shape[0], self.capacity - x.shape[1], x.shape[2])), 1) for x in pair]
            self._made[layer] = (room[0], room[1])
        return self._made[layer]
