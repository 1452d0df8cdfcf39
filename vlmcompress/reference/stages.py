"""The three stages of training: the tower and the language model apart, then both together."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from . import losses
from .batches import Batch, Encoder, Packed, make_batch
from .language import Looks, judge, run_llm
from .model import TowerStates, run_tower
from .scenes import PATCHES, Split
from .selection import draw_budget, objects_and_ground, score_patches, top
from .simulate import simulate_tokens
from .text_head import contrastive_loss
from .trainee import CLS_LAYERS, Mix, Trainee
from .worlds import ALL_KINDS

_POINTING = 0.5  # weight of answers looking at the asked objects
_WORD_POINTING = 0.2  # weight of words looking at what they name
_CHEAP = 64  # patches of a cheap tower step
_TEXT_SHARE = 0.3  # of the scenes are text-heavy
_SEEDS = 10**9  # scene indices of a stage: far from those of the others


class Stage:
    """One stage: what it trains, on what, and its loss.

    Args:
        trainee: everything there is to train.
        tokenizer: of the model.
        rank, world: this process among those that share the stage.
        batch: scenes per step and process.
        seed: of scene choice and of dropping.
    """

    name = "stage"
    rates: ClassVar[dict[str, float]] = {}
    last_rate = 0.1
    offset = 0

    def __init__(
        self,
        trainee: Trainee,
        tokenizer: PreTrainedTokenizerFast,
        rank: int = 0,
        world: int = 1,
        batch: int = 8,
        seed: int = 0,
    ) -> None:
        self.trainee, self.tokenizer = trainee, tokenizer
        self.rank, self.world, self.batch, self.seed = rank, world, batch, seed
        self.encode, self.mix = Encoder(tokenizer), Mix()

    def groups(self) -> list[dict]:
        """Parameter groups with their peak learning rates; the first matching prefix decides."""
        groups: dict[str, list[nn.Parameter]] = {prefix: [] for prefix in self.rates}
        for name, parameter in self.trainee.named_parameters():
            prefix = next((p for p in self.rates if name.startswith(p)), "")
            parameter.requires_grad_(self.rates.get(prefix, 0.0) > 0)
            if parameter.requires_grad:
                groups[prefix].append(parameter)
        return [
            {"params": rows, "peak": self.rates[prefix], "lr": 0.0}
            for prefix, rows in groups.items()
            if rows
        ]

    def draws(self, step: int) -> tuple[torch.Generator, torch.Generator]:
        """Randomness of a step: one stream that all processes share, one of their own."""
        shared = torch.Generator().manual_seed(self.seed * 7919 + step)
        own = torch.Generator().manual_seed((self.seed * 7919 + step) * 64 + self.rank + 1)
        return shared, own

    def take(self, step: int, batch: int, per_scene: int) -> Batch:
        """The step's scenes; no scene comes twice."""
        first = self.offset * _SEEDS + self.seed * 10**11
        first += (step * self.world + self.rank) * self.batch
        indices = range(first, first + batch)
        needs = self.mix.needs()
        return make_batch(Split.TRAIN, indices, per_scene, needs, self.encode, _TEXT_SHARE)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of one step."""
        raise NotImplementedError

    def _tower_losses(
        self, states: TowerStates, tokens: Tensor, kept: Tensor, batch: Batch, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Everything that supervises the tower, and how well it does."""
        trainee = self.trainee
        device = tokens.device
        labels = {k: v.to(device) for k, v in batch.labels.items()}
        here = losses.kept_labels(labels, kept)
        words, metrics = losses.word_losses(tokens, trainee.embedding, trainee.codes, here)
        total = sum(words.values()) + 0.5 * losses.place_loss(tokens, trainee.place, here)
        for layer in CLS_LAYERS:
            head = trainee.present[str(layer)]
            present, recall = losses.present_loss(
                states.hidden[layer][:, 0], head, labels["present"]
            )
            weight = 0.3 if layer == -1 else 1.0
            total = total + 0.3 * weight * present
            attention = states.attention[layer]
            total = total + 0.15 * weight * losses.attention_loss(attention, here["attention"])
            metrics[f"recall{layer}"] = recall
            metrics[f"mass{layer}"] = losses.object_mass(attention, here["share"])
        norm = trainee.model.model.vision_tower.post_layernorm
        patches = trainee.text_head.embed_patches(states.hidden[-2][:, 1:], norm)
        cls = trainee.text_head.embed_patches(states.hidden[-1][:, 0], norm)
        rng = np.random.default_rng([self.seed, step, self.rank])
        contrast = contrastive_loss(
            trainee.text_head, self.tokenizer, patches, cls, batch.scenes, kept, rng
        )
        metrics["contrast"] = contrast
        return total + 0.1 * contrast, metrics

    def _pointing(
        self, looks: Looks | None, packed: Packed, kept: Tensor, labels: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Weighted losses that teach the language model where to look (with eager attention)."""
        if looks is None:
            return packed.asked.new_zeros(()), {}
        labels = {k: labels[k].to(kept.device) for k in ("colour", "shape")}
        words = losses.word_pointing_loss(looks.words, packed, labels, self.trainee.codes)
        answers = losses.answer_pointing_loss(looks.answers, packed, kept)
        seen = {"pointing": answers.item(), "word_pointing": words.item()}
        return _POINTING * answers + _WORD_POINTING * words, seen

    def _count(self, logits: Tensor, target: Tensor, packed: Packed, update: bool) -> dict:
        right, kinds = judge(logits, target, packed)
        asked = np.bincount(kinds, minlength=len(ALL_KINDS))
        if update:
            self.mix.update(np.bincount(kinds, right, minlength=len(ALL_KINDS)), asked)
        return {"answers": float(right.mean())}


class TowerStage(Stage):
    """The tower alone: words for patches, labels and attention for [CLS], captions."""

    name = "tower"
    rates: ClassVar = {
        "model.model.vision_tower": 2e-3,
        "model.model.multi_modal_projector": 2e-3,
        "text_head": 2e-3,
        "present": 2e-3,
        "place": 2e-3,
    }
    offset = 1
    full_every = 8

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """One step on 64 patches; every eighth on all 196 of fewer images."""
        model = self.trainee.model
        full = step % self.full_every == self.full_every - 1
        batch = self.take(step, max(2, self.batch // 2) if full else self.batch, 1)
        _, own = self.draws(step)
        device = self.trainee.embedding.device
        share = batch.labels["share"].to(device)
        count = PATCHES if full else _CHEAP
        kept = objects_and_ground(share, count, own)
        states = run_tower(model.model.vision_tower, batch.pixels().to(device), kept)
        tokens = model.model.multi_modal_projector(states.hidden[-2][:, 1:])
        total, seen = self._tower_losses(states, tokens, kept, batch, step)
        prefix = "full_" if full else ""
        return total, {prefix + k: v.item() for k, v in seen.items() if torch.isfinite(v)}


class LanguageStage(Stage):
    """The language model alone, on simulated image tokens, with tokens dropped at random."""

    name = "language"
    rates: ClassVar = {
        "model.model.language_model.embed_tokens": 0.0,
        "model.model.language_model": 2e-3,
    }
    last_rate = 0.5  # the joint stage goes on from here
    offset = 2
    per_scene = 14

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """One step; the kept patches are objects first, in changing numbers."""
        trainee = self.trainee
        batch = self.take(step, self.batch, self.per_scene)
        shared, own = self.draws(step)
        tokens = simulate_tokens(trainee.codes, trainee.embedding, batch.labels, own)
        kept, contiguous = self._keep(batch, shared, own)
        kept = kept.to(tokens.device)
        tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
        packed = batch.packed.to(tokens.device)
        logits, target, looks = run_llm(trainee.model, tokens, kept, packed, contiguous)
        metrics = self._count(logits, target, packed, update=True)
        here = losses.kept_labels(batch.labels, kept.cpu())
        pointing, seen = self._pointing(looks, packed, kept, here)
        return losses.answer_loss(logits, target, packed) + pointing, {**metrics, **seen}

    @staticmethod
    def _keep(batch: Batch, shared: torch.Generator, own: torch.Generator) -> tuple[Tensor, bool]:
        chance = float(torch.rand(1, generator=shared))
        contiguous = bool(torch.rand(1, generator=shared) < 0.5)
        if chance < 0.5:
            size = int(torch.randint(36, 60, (1,), generator=shared))
            return objects_and_ground(batch.labels["share"], size, own), contiguous
        size = int(torch.randint(16, 32, (1,), generator=shared))
        attention = batch.labels["attention"]
        jitter = (0.5 * torch.randn(attention.shape, generator=own)).exp()
        return top(attention * jitter, size), contiguous


class JointStage(Stage):
    """Both together on real images, compressed in changing ways."""

    name = "joint"
    rates: ClassVar = {
        "model.model.vision_tower": 4e-4,
        "model.model.multi_modal_projector": 5e-4,
        "model.model.language_model.embed_tokens": 3e-4,
        "model.model.language_model": 1e-3,
        "text_head": 5e-4,
        "present": 5e-4,
        "place": 5e-4,
    }
    last_rate = 0.03
    offset = 3
    per_scene = 12
    full_share = 0.4

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """One step: a cheap one on 64 patches or one on all 196, then maybe compressed."""
        trainee = self.trainee
        tower, projector = (
            trainee.model.model.vision_tower,
            trainee.model.model.multi_modal_projector,
        )
        shared, own = self.draws(step)
        full = bool(torch.rand(1, generator=shared) < self.full_share)
        batch = self.take(step, max(2, self.batch * 3 // 4) if full else self.batch, self.per_scene)
        device = trainee.embedding.device
        share = batch.labels["share"].to(device)
        seen = objects_and_ground(share, PATCHES if full else _CHEAP, own)
        states = run_tower(tower, batch.pixels().to(device), seen)
        tokens = projector(states.hidden[-2][:, 1:])
        total, measured = self._tower_losses(states, tokens, seen, batch, step)
        how, picked, contiguous = self._compress(states, share, seen, shared, own)
        kept = seen.gather(1, picked)
        tokens = tokens.gather(1, picked[..., None].expand(-1, -1, tokens.shape[-1]))
        packed = batch.packed.to(device)
        logits, target, looks = run_llm(trainee.model, tokens, kept, packed, contiguous)
        answers = self._count(logits, target, packed, update=how != "random")
        metrics = {k: v.item() for k, v in measured.items() if torch.isfinite(v)}
        metrics[f"answers_{how}"] = answers["answers"]
        total = 0.25 * total + losses.answer_loss(logits, target, packed)
        if how != "random":  # a random choice may have lost what there is to look at
            here = losses.kept_labels(batch.labels, kept.cpu())
            pointing, found = self._pointing(looks, packed, kept, here)
            total, metrics = total + pointing, {**metrics, **found}
        return total, metrics

    @staticmethod
    def _compress(
        states: TowerStates,
        share: Tensor,
        seen: Tensor,
        shared: torch.Generator,
        own: torch.Generator,
    ) -> tuple[str, Tensor, bool]:
        """Rows of the seen patches that the language model gets, and how they are numbered."""
        everything = torch.arange(seen.shape[1], device=seen.device).expand_as(seen)
        chance = float(torch.rand(1, generator=shared))
        contiguous = bool(torch.rand(1, generator=shared) < 0.6)
        budget = draw_budget(shared, seen.shape[1])
        if chance < 0.4:
            return "all", everything, contiguous
        how = "cls" if chance < 0.75 else "coverage" if chance < 0.85 else "random"
        attention = states.attention[-2][:, 1:].detach()
        score = score_patches(how, attention, share.gather(1, seen), own)
        return how, top(score, budget), contiguous


STAGES = {stage.name: stage for stage in (TowerStage, LanguageStage, JointStage)}
