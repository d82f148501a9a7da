"""One step of the minimax: first D and F with T and Q fixed, then T and Q with D and F fixed (paper, section 3.5).

T runs once a step; both stages use its output. As in the paper, A2 and WR2 exist for the feature dissimilarity alone
and every other loss sees A1 and WR1 only, which saves memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mien import networks, recognisers
from mien.networks.blocks import head_mask
from training import objective, saving
from training.classifier import IdentityHead, augment_view
from training.config import RunConfig
from training.discriminators import Discriminators
from training.ema import EMA
from training.perceptual import AlexFeatures
from training.pool import ImagePool
from training.predictor import CodePredictor, code_classes


@dataclass(frozen=True)
class Codes:
    """The codes of a step, float ``[B, N]`` in {-0.5, +0.5}: two to anonymize, two wrong ones to recover with."""

    first: Tensor
    second: Tensor
    wrong: Tensor
    other_wrong: Tensor


def draw_codes(batch: int, bits: int, *, near_miss: float, generator: torch.Generator) -> Codes:
    """Uniform codes; a share ``near_miss`` of the first wrong ones is one to three bits away from right.

    Right is the inverse of ``first``. Wrong codes are never right, and pairs never equal.
    """

    def uniform() -> Tensor:
        return torch.randint(0, 2, (batch, bits), generator=generator).bool()

    def differ(code: Tensor, *others: Tensor) -> Tensor:
        # Equal codes are rare (2^-16); flipping one bit is enough to part them.
        for other in others:
            same = (code == other).all(dim=1)
            code = code.clone()
            code[same, 0] = ~code[same, 0]
        return code

    first = uniform()
    right = ~first
    second = differ(uniform(), first)
    count = torch.randint(1, min(4, bits + 1), (batch, 1), generator=generator)
    rank = torch.rand(batch, bits, generator=generator).argsort(dim=1).argsort(dim=1)
    near = right ^ (rank < count)
    is_near = torch.rand(batch, 1, generator=generator) < near_miss
    wrong = torch.where(is_near, near, differ(uniform(), right))
    other_wrong = differ(uniform(), right, wrong)
    return Codes(*(networks.codes_to_tensor(c) for c in (first, second, wrong, other_wrong)))


class Trainer:
    """All networks of a run, their optimizers, and the step over them.

    Args:
        config: the run.
        identities: number of training identities, for F's classification head.
        device: where everything lives.
    """

    def __init__(self, config: RunConfig, *, identities: int, device: torch.device) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        size, weights = config.crop_size, config.objective.weights
        self.transformer = networks.build(config.architecture, bits=config.bits, size=size)
        self.predictor = CodePredictor(config.bits, width=config.predictor.width)
        self.recogniser = recognisers.load(config.recogniser.name, config.recogniser.weights)
        self.head = IdentityHead(self.recogniser.embedding_size, max(1, identities))
        perceptual = config.objective.perceptual_weights
        projected = config.discriminator.projected_weights
        self.features = AlexFeatures(perceptual) if perceptual else None
        self.discriminators = Discriminators(
            config.discriminator,
            (self.features if projected == perceptual else AlexFeatures(projected)) if projected else None,
        )
        self.classifies = identities > 0 and bool(weights.adversarial or weights.recovery_class)
        # R costs a pass of T; with a reversible T it can be left out by giving the terms on it no weight.
        self.recovers = bool(
            weights.recovery or weights.perceptual or weights.recovered_identity
            or (self.classifies and (weights.recovery_class or config.recogniser.trainable))
            or (weights.gan and config.discriminator.on_recovered)
        )  # fmt: skip
        self.recogniser.eval().requires_grad_(False)
        for module in self._modules().values():
            module.to(device)
            if config.channels_last:
                module.to(memory_format=torch.channels_last)
        if self.features is not None:
            self.features.to(device)
        for frozen in self.discriminators._features:
            if frozen is not None:
                frozen.to(device)
        self.ema = EMA(self.transformer, config.ema)
        o = config.optimizer
        adam = {"betas": o.betas, "fused": device.type == "cuda"}
        self.optimizers = {
            "transformer": torch.optim.Adam(
                [*self.transformer.parameters(), *self.predictor.parameters()], lr=o.lr, **adam
            ),
            "discriminators": torch.optim.Adam(self.discriminators.parameters(), lr=o.lr_discriminator, **adam),
        }
        self.learns_recogniser = self.classifies and config.recogniser.trainable
        if self.learns_recogniser:
            self.optimizers["recogniser"] = torch.optim.Adam(
                [*self.recogniser.parameters(), *self.head.parameters()], lr=o.lr_recogniser, **adam
            )
        self._base_rates = {name: opt.param_groups[0]["lr"] for name, opt in self.optimizers.items()}
        self.pools = {
            kind: ImagePool(config.discriminator.pool_size, (3, size, size))
            for kind in ("anonymized", "recovered", "wrong")
        }
        mask = head_mask(size)
        border = 1 - 0.95 * mask
        self._border = (border / border.mean()).to(device)
        self._run_transformer: Callable[[Tensor, Tensor], Tensor] = self.transformer
        if config.compile:
            self._run_transformer = torch.compile(self.transformer)

    def _modules(self) -> dict[str, nn.Module]:
        return {
            "transformer": self.transformer,
            "predictor": self.predictor,
            "recogniser": self.recogniser,
            "head": self.head,
            "discriminators": self.discriminators,
        }

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, images: Tensor, identities: Tensor, nimg: int) -> dict[str, float]:
        """Both stages on one batch.

        Args:
            images: float ``[B, 3, S, S]`` in [-1, 1].
            identities: int64 ``[B]``, -1 where unlabelled.
            nimg: images seen before this step; with the seed it decides every random draw of the step.

        Returns:
            The losses, unweighted, and Q's accuracy.
        """
        # The step's draws come from (seed, nimg) alone, so that resuming needs no generator state.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + nimg)
        self._schedule(nimg)
        codes = draw_codes(
            len(images), self.config.bits, near_miss=self.config.objective.near_miss, generator=generator
        )
        codes = Codes(*(getattr(codes, f).to(self.device) for f in ("first", "second", "wrong", "other_wrong")))
        self.transformer.train()
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            made = self._generate(images, codes, generator)
        log = self._discriminate(images, identities, made, generator)
        log |= self._transform(images, identities, codes, made, generator, nimg)
        self.ema.update(self.transformer, len(images), nimg + len(images))
        return log

    def _generate(self, images: Tensor, codes: Codes, generator: torch.Generator) -> dict[str, Tensor]:
        o = self.config.objective
        twice = o.weights.feature > 0
        anonymized = self._run_transformer(
            torch.cat([images, images]) if twice else images,
            torch.cat([codes.first, codes.second]) if twice else codes.first,
        ).float()
        made = {"A1": anonymized[: len(images)]}
        if twice:
            made["A2"] = anonymized[len(images) :]
        source = made["A1"]
        if o.save:
            source = saving.save(source, jpeg_share=o.save_jpeg, rescale_share=o.save_rescale, generator=generator)
        keys = {"R": -codes.first} if self.recovers else {}
        if o.wrong_recovery:
            keys["WR1"] = codes.wrong
            if twice and o.wrong_pair:
                keys["WR2"] = codes.other_wrong
        if not keys:
            return made
        recovered = self._run_transformer(source.repeat(len(keys), 1, 1, 1), torch.cat(list(keys.values()))).float()
        return made | dict(zip(keys, recovered.chunk(len(keys)), strict=True))

    def _discriminate(
        self, images: Tensor, identities: Tensor, made: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, float]:
        """First stage: D learns real from made, F learns to see through A and WR."""
        c, log = self.config, {}
        if c.objective.weights.gan:
            optimizer = self.optimizers["discriminators"]
            kinds = self._judged(made)
            self.discriminators.requires_grad_(True)
            with self._autocast():
                pooled = {kind: self.pools[kind].exchange(x, generator) for kind, x in kinds.items()}
                fake, real = self.discriminators(pooled, images, generator)
                loss = objective.gan_discriminator(real, fake)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            log["d"] = loss.item()
        if self.learns_recogniser:
            optimizer = self.optimizers["recogniser"]
            self.recogniser.requires_grad_(True)
            self.head.requires_grad_(True)
            names = [n for n in ("A1", "WR1") if n in made]
            with self._autocast():
                everything = torch.cat([images, *(made[n].detach() for n in [*names, "R"])])
                logits = self.head(self.recogniser(everything)).float().chunk(len(names) + 2)
                loss = objective.classification(logits[:-1], identities)
                if c.recogniser.against_recovered:
                    loss = loss - c.recogniser.against_recovered * objective.classification(logits[-1:], identities)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            self.recogniser.requires_grad_(False)
            self.head.requires_grad_(False)
            log["f"] = loss.item()
        return log

    def _transform(
        self,
        images: Tensor,
        identities: Tensor,
        codes: Codes,
        made: dict[str, Tensor],
        generator: torch.Generator,
        nimg: int,
    ) -> dict[str, float]:
        """Second stage: T and Q against the updated D and F."""
        o, w = self.config.objective, self.config.objective.weights
        ramp = min(1.0, nimg / o.identity_ramp) if o.identity_ramp else 1.0
        terms: dict[str, tuple[float, Tensor]] = {}
        log: dict[str, float] = {}
        self.discriminators.requires_grad_(False)
        changed = [made[n] for n in ("A1", "WR1") if n in made]
        with self._autocast():
            if w.feature or w.identity or w.recovered_identity or self.classifies:
                embedded = self._embed(images, made, generator)
                e = {k: v.float() for k, v in embedded.items()}
                if w.feature:
                    terms["feature"] = (
                        w.feature * ramp,
                        objective.feature_dissimilarity(e["A1"], e["A2"], e.get("WR1"), e.get("WR2"), o.margin),
                    )
                if w.identity:
                    others = [v for k, v in e.items() if k not in ("I", "R")]
                    terms["identity"] = (w.identity * ramp, objective.identity(e["I"], others, o.margin))
                if w.recovered_identity:
                    terms["recovered_identity"] = (w.recovered_identity, objective.recovered_identity(e["I"], e["R"]))
                if self.classifies and w.adversarial:
                    logits = [self.head(e[n]) for n in ("A1", "WR1") if n in e]
                    terms["adversarial"] = (-w.adversarial * ramp, objective.classification(logits, identities))
                if self.classifies and w.recovery_class:
                    terms["recovery_class"] = (
                        w.recovery_class,
                        objective.classification([self.head(e["R"])], identities),
                    )
                log["cos(I,A)"] = F.cosine_similarity(e["I"], e["A1"]).mean().item()
                if "A2" in e:
                    log["cos(A1,A2)"] = F.cosine_similarity(e["A1"], e["A2"]).mean().item()
                if "WR1" in e:
                    log["cos(I,WR)"] = F.cosine_similarity(e["I"], e["WR1"]).mean().item()
            if w.gan:
                scores, _ = self.discriminators(self._judged(made), generator=generator)
                terms["gan"] = (w.gan, objective.gan_generator(scores))
            if w.auxiliary:
                pairs = [(images, made["A1"], codes.first)]
                if "R" in made:
                    pairs.append((made["A1"], made["R"], -codes.first))
                if "WR1" in made:
                    pairs.append((made["A1"], made["WR1"], codes.wrong))
                logits = self.predictor(torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])).float()
                read = logits.chunk(len(pairs))
                terms["auxiliary"] = (w.auxiliary, objective.auxiliary(read, [p[2] for p in pairs]))
                right = read[0].argmax(dim=2) == code_classes(codes.first)
                log["q_accuracy"] = right.float().mean().item()
            if self.features is not None and (w.perceptual or w.likeness):
                real = self.features(images)
                if w.perceptual:
                    terms["perceptual"] = (
                        w.perceptual,
                        self.features.distance(real, self.features(made["R"])).float().mean(),
                    )
                if w.likeness:
                    distances = [self.features.distance(real, self.features(x)).float().mean() for x in changed]
                    terms["likeness"] = (w.likeness, torch.stack(distances).mean())
            if w.recovery:
                terms["recovery"] = (w.recovery, objective.recovery(made["R"], images))
            weight = self._border if o.face_weighted_background else None
            if w.background:
                terms["background"] = (w.background, objective.background(changed, images, weight))
            if w.roughness:
                terms["roughness"] = (w.roughness, objective.roughness(changed, images))
            if w.range:
                terms["range"] = (w.range, objective.out_of_range(list(made.values())))
        loss = torch.stack([factor * value for factor, value in terms.values()]).sum()
        optimizer = self.optimizers["transformer"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.config.optimizer.clip)
        optimizer.step()
        return log | {"loss": loss.item()} | {name: value.item() for name, (_, value) in terms.items()}

    def _embed(self, images: Tensor, made: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """F's embeddings of I and of everything made; without a graph for I."""
        names = [n for n in made if n != "R" or self.classifies or self.config.objective.weights.recovered_identity]
        together = torch.cat([made[n] for n in names])
        if self.config.recogniser.embedding_augmentation:
            images, together = augment_view(images, generator), augment_view(together, generator)
        with torch.no_grad():
            real = self.recogniser(images)
        return {"I": real} | dict(zip(names, self.recogniser(together).chunk(len(names)), strict=True))

    def _judged(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        kinds = {"anonymized": made["A1"]}
        if self.config.discriminator.on_recovered:
            kinds["recovered"] = made["R"]
        if "WR1" in made:
            kinds["wrong"] = made["WR1"]
        return kinds

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.config.bf16 else nullcontext()

    def _schedule(self, nimg: int) -> None:
        o = self.config.optimizer
        factor = min(1.0, (nimg + 1) / o.warmup) if o.warmup else 1.0
        if o.cosine:
            progress = min(1.0, nimg / self.config.total_images)
            factor *= 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * progress)).item()
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._base_rates[name] * factor

    # -- F's start --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def centre_head(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start F's head from the mean embeddings of the training identities."""
        embeddings, labels = [], []
        for images, identities in batches:
            embeddings.append(self.recogniser(images.to(self.device)).float().cpu())
            labels.append(identities.cpu())
        self.head.cpu().centre_on(torch.cat(embeddings), torch.cat(labels))
        self.head.to(self.device)

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "modules": {k: m.state_dict() for k, m in self._modules().items()},
            "ema": self.ema.state_dict(),
            "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
            "pools": {k: p.state_dict() for k, p in self.pools.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, module in self._modules().items():
            module.load_state_dict(state["modules"][key])
        self.ema.load_state_dict(state["ema"])
        for key, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][key])
        for key, pool in self.pools.items():
            pool.load_state_dict(state["pools"][key])
