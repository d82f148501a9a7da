"""One step of the minimax: first D and F with T and Q fixed, then T and Q with D and F fixed (paper, section 3.5).

T runs once a step; both stages use its output. As in the paper, A2 and WR2 exist for the feature dissimilarity alone
and every other loss sees A1 and WR1 only, which saves memory.

A step is over a whole batch, of which every process holds a part and works through it in one or more micro-batches
(``accumulate``; then T runs a second time for the second stage instead of keeping every graph). Losses are scaled to a
micro-batch's share of the whole, so gradients and figures are those of the whole batch however it is divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mien import networks, recognisers
from mien.errors import MienError
from mien.networks.blocks import head_mask
from training import objective, saving, strategies
from training.classifier import IdentityHead, augment_view
from training.config import RunConfig
from training.discriminators import Discriminators
from training.distributed import World, alone
from training.draws import Draws
from training.ema import EMA
from training.perceptual import AlexFeatures
from training.pool import ImagePool
from training.pose import Pose, jitter, pose_distance
from training.predictor import CodePredictor, code_classes


@dataclass(frozen=True)
class Codes:
    """The codes of a step, float ``[B, N]`` in {-0.5, +0.5}: two to anonymize, two wrong ones to recover with."""

    first: Tensor
    second: Tensor
    wrong: Tensor
    other_wrong: Tensor


def draw_codes(bits: int, *, near_miss: float, draws: Draws) -> Codes:
    """Uniform codes, one row a sample; a share ``near_miss`` of the first wrong ones is one to three bits from right.

    Right is the inverse of ``first``. Wrong codes are never right, and pairs never equal.
    """
    batch = len(draws)

    def uniform() -> Tensor:
        return draws.rows(batch, bits) < 0.5

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
    count = 1 + (draws.rows(batch, 1) * min(3, bits)).long()
    rank = draws.rows(batch, bits).argsort(dim=1).argsort(dim=1)
    near = right ^ (rank < count)
    is_near = draws.rows(batch, 1) < near_miss
    wrong = torch.where(is_near, near, differ(uniform(), right))
    other_wrong = differ(uniform(), right, wrong)
    return Codes(*(networks.codes_to_tensor(c) for c in (first, second, wrong, other_wrong)))


class TrainingDiverged(MienError):
    """Losses or gradients were not finite for too many steps in a row."""


# Streams of draws; the data's augmentation has number 0.
_CODES, _SAVING, _JUDGING, _TRANSFORMING = range(1, 5)


@dataclass(frozen=True)
class Micro:
    """A micro-batch: consecutive samples of a step's batch.

    Attributes:
        images: float ``[B, 3, S, S]`` in [-1, 1].
        identities: int64 ``[B]``, -1 where unlabelled.
        codes: on the device.
        start: number of its first sample in the run.
        step: number of the whole batch's first sample in the run.
        share: of the whole batch.
        labelled_share: of the whole batch's labelled samples, in relation to this micro-batch's mean over them.
    """

    images: Tensor
    identities: Tensor
    codes: Codes
    seed: int
    start: int
    step: int
    share: float
    labelled_share: float

    def draws(self, stream: int) -> Draws:
        return Draws(self.seed, self.start, self.start + len(self.images), step=self.step, stream=stream)


class _Figures:
    """Sums a step's figures, each weighted with its micro-batch's share, without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, share: float) -> None:
        value = value.detach().float() * share
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def whole(self, world: World) -> dict[str, float]:
        """The figures of the whole batch, the same on all processes."""
        if not self._sums:
            return {}
        return dict(zip(self._sums, world.sum(*torch.stack(list(self._sums.values())).tolist()), strict=True))


class Trainer:
    """All networks of a run, their optimizers, and the step over them.

    Args:
        config: the run.
        identities: number of training identities, for F's classification head.
        device: where everything lives.
        world: the processes; by default this one alone.
    """

    def __init__(self, config: RunConfig, *, identities: int, device: torch.device, world: World | None = None) -> None:
        self.config, self.device = config, device
        self.world = world or alone(device)
        self.skipped = {"steps": 0, "in_a_row": 0}
        torch.manual_seed(config.seed)
        size, weights = config.crop_size, config.objective.weights
        self.transformer = networks.build(config.architecture, bits=config.bits, size=size)
        self.predictor = CodePredictor(config.bits, width=config.predictor.width)
        self.recogniser = recognisers.load(config.recogniser.name, config.recogniser.weights)
        self.head = IdentityHead(self.recogniser.embedding_size, max(1, identities))
        perceptual = config.objective.perceptual_weights
        projected = config.discriminator.projected_weights
        self.pose = Pose().to(device) if weights.pose else None
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
        for module in self._modules().values():
            self.world.broadcast_(module)
        self.ema = EMA(self.transformer, config.ema)
        o = config.optimizer
        adam = {"betas": o.betas, "fused": device.type == "cuda"}
        self.optimizers = {
            "transformer": torch.optim.Adam(self._transformers(), lr=o.lr, **adam),
            "discriminators": torch.optim.Adam(self.discriminators.parameters(), lr=o.lr_discriminator, **adam),
        }
        self.learns_recogniser = self.classifies and config.recogniser.trainable
        if self.learns_recogniser:
            self.optimizers["recogniser"] = torch.optim.Adam(
                [*self.recogniser.parameters(), *self.head.parameters()], lr=o.lr_recogniser, **adam
            )
        self._base_rates = {n: [group["lr"] for group in opt.param_groups] for n, opt in self.optimizers.items()}
        members = {
            "transformer": {"transformer": self.transformer, "predictor": self.predictor},
            "discriminators": {"discriminators": self.discriminators},
            "recogniser": {"recogniser": self.recogniser, "head": self.head},
        }
        self.players = {
            name: strategies.create(
                config.strategy,
                nn.ModuleDict(members[name]),
                optimizer,
                self.world,
                clip=o.clip if name == "transformer" else None,
            )
            for name, optimizer in self.optimizers.items()
        }
        self.pools = {
            kind: ImagePool(config.discriminator.pool_size, (3, size, size), config.batch, device)
            for kind in ("anonymized", "recovered", "wrong")
        }
        mask = head_mask(size)
        border = 1 - 0.95 * mask
        self._border = (border / border.mean()).to(device)
        self._run_transformer: Callable[[Tensor, Tensor], Tensor] = self.transformer
        if config.compile:
            self._run_transformer = torch.compile(self.transformer)

    def _transformers(self) -> list[dict[str, Any]]:
        """What is T's and Q's, in groups of one learning rate each."""
        rate, network = self.config.optimizer.lr_likenesses, self.transformer
        everything = [*network.parameters(), *self.predictor.parameters()]
        if not rate:
            return [{"params": everything}]
        if not isinstance(network, networks.CoverTransformer):
            raise ValueError("optimizer.lr_likenesses is of the cover transformer")
        faces = network.likenesses.faces.requires_grad_(True)
        return [{"params": [p for p in everything if p is not faces]}, {"params": [faces], "lr": rate}]

    def _modules(self) -> dict[str, nn.Module]:
        return {
            "transformer": self.transformer,
            "predictor": self.predictor,
            "recogniser": self.recogniser,
            "head": self.head,
            "discriminators": self.discriminators,
        }

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, images: Tensor, identities: Tensor, nimg: int, *, place: int = 0) -> dict[str, float]:
        """Both stages on one batch. All processes call it alike, each with its part of the batch.

        Args:
            images: float ``[B, 3, S, S]`` in [-1, 1].
            identities: int64 ``[B]``, -1 where unlabelled.
            nimg: images seen before this step; with the seed it decides every random draw of the step.
            place: of the part's first image in the whole batch.

        Returns:
            The losses of the whole batch, unweighted, and Q's accuracy; ``skipped`` alone where the step changed
            nothing, or not everything, because something in it was not finite.

        Raises:
            TrainingDiverged: that happened ``config.max_skipped`` times in a row.
        """
        self._schedule(nimg)
        self.transformer.train()
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        micros = self._micro_batches(images, identities, nimg, place)
        alone = len(micros) == 1
        with self._autocast(), nullcontext() if alone else torch.no_grad():
            made = [self._generate(micro) for micro in micros]
        # Checked before D's buffer keeps any of it. Every decision is taken by all processes together: one that left
        # out a collective operation would leave the others waiting in it.
        finite = torch.stack([torch.isfinite(x.detach()).all() for one in made for x in one.values()]).all()
        figures = _Figures()
        whole = not self.world.any(not bool(finite))
        if whole:
            whole = self._discriminate(micros, made, figures)
            taken = self._transform(micros, made[0] if alone else None, figures, nimg)
            if taken:
                self._average_buffers()
                size = round(1 / micros[0].share * len(micros[0].images))
                self.ema.update(self.transformer, size, nimg + size)
            whole = whole and taken
        if whole:
            self.skipped["in_a_row"] = 0
            return figures.whole(self.world)
        self.skipped = {k: v + 1 for k, v in self.skipped.items()}
        if self.skipped["in_a_row"] >= self.config.max_skipped:
            raise TrainingDiverged(
                f"losses or gradients were not finite in {self.skipped['in_a_row']} steps in a row, up to image {nimg};"
                " start again from an earlier checkpoint with a smaller optimizer.lr, optimizer.clip, or without bf16"
            )
        return {"skipped": 1.0}

    def _micro_batches(self, images: Tensor, identities: Tensor, nimg: int, place: int) -> list[Micro]:
        counts = self.world.sum(len(images), int((identities >= 0).sum()))
        pieces = min(self.config.accumulate, len(images))
        micros = []
        for i in range(pieces):
            part = slice(len(images) * i // pieces, len(images) * (i + 1) // pieces)
            labels = identities[part]
            start = nimg + place + part.start
            codes = draw_codes(
                self.config.bits,
                near_miss=self.config.objective.near_miss,
                draws=Draws(self.config.seed, start, start + len(labels), step=nimg, stream=_CODES),
            )
            micros.append(
                Micro(
                    images[part],
                    labels,
                    Codes(*(getattr(codes, f).to(self.device) for f in ("first", "second", "wrong", "other_wrong"))),
                    seed=self.config.seed,
                    start=start,
                    step=nimg,
                    share=len(labels) / counts[0],
                    labelled_share=int((labels >= 0).sum()) / max(1.0, counts[1]),
                )
            )
        return micros

    def _generate(self, micro: Micro) -> dict[str, Tensor]:
        o, images, codes = self.config.objective, micro.images, micro.codes
        twice = o.weights.feature > 0
        anonymized = self._run_transformer(
            torch.cat([images, images]) if twice else images,
            torch.cat([codes.first, codes.second]) if twice else codes.first,
        ).float()
        made = {"A1": anonymized[: len(images)]}
        if twice:
            made["A2"] = anonymized[len(images) :]
        keys = {"R": -codes.first} if self.recovers else {}
        if o.wrong_recovery:
            keys["WR1"] = codes.wrong
            if twice and o.wrong_pair:
                keys["WR2"] = codes.other_wrong
        if not keys:
            return made
        source = made["A1"] if o.through_anonymized else made["A1"].detach()
        if o.save:
            source = self._saved(micro, source)
        recovered = self._run_transformer(source.repeat(len(keys), 1, 1, 1), torch.cat(list(keys.values()))).float()
        return made | dict(zip(keys, recovered.chunk(len(keys)), strict=True))

    def _saved(self, micro: Micro, images: Tensor) -> Tensor:
        """A micro-batch's images saved and opened again; by the same draws whenever a step asks."""
        o = self.config.objective
        generator = micro.draws(_SAVING).generator()
        return saving.save(images, jpeg_share=o.save_jpeg, rescale_share=o.save_rescale, generator=generator)

    def _discriminate(self, micros: list[Micro], made: list[dict[str, Tensor]], figures: _Figures) -> bool:
        """First stage: D learns real from made, F learns to see through A and WR. Whether all of it was finite."""
        finite = True
        if self.config.objective.weights.gan:
            player = self.players["discriminators"]
            self.discriminators.requires_grad_(True)
            player.begin()
            for micro, one in zip(micros, made, strict=True):
                loss = player.backward(partial(self._judge, micro, one), last=micro is micros[-1])
                figures.add("d", loss, 1.0)
            finite = player.update() and finite
            self.discriminators.requires_grad_(False)
        if self.learns_recogniser:
            player = self.players["recogniser"]
            self.recogniser.requires_grad_(True)
            self.head.requires_grad_(True)
            player.begin()
            for micro, one in zip(micros, made, strict=True):
                loss = player.backward(partial(self._classify, micro, one), last=micro is micros[-1])
                figures.add("f", loss, 1.0)
            finite = player.update() and finite
            self.recogniser.requires_grad_(False)
            self.head.requires_grad_(False)
        return finite

    def _judge(self, micro: Micro, made: dict[str, Tensor]) -> Tensor:
        """D's loss on a micro-batch, scaled to its share."""
        draws = micro.draws(_JUDGING)
        place = micro.start - micro.step
        with self._autocast():
            pooled = {kind: self.pools[kind].exchange(x, draws, place) for kind, x in self._judged(made).items()}
            fake, real = self.discriminators(pooled, micro.images, draws)
            return objective.gan_discriminator(real, fake) * micro.share

    def _classify(self, micro: Micro, made: dict[str, Tensor]) -> Tensor:
        """F's loss on a micro-batch, scaled to its share."""
        names = [n for n in ("A1", "WR1") if n in made]
        with self._autocast():
            everything = torch.cat([micro.images, *(made[n].detach() for n in [*names, "R"])])
            logits = self.head(self.recogniser(everything)).float().chunk(len(names) + 2)
            loss = objective.classification(logits[:-1], micro.identities)
            against = self.config.recogniser.against_recovered
            if against:
                loss = loss - against * objective.classification(logits[-1:], micro.identities)
            return loss * micro.labelled_share

    def _transform(self, micros: list[Micro], made: dict[str, Tensor] | None, figures: _Figures, nimg: int) -> bool:
        """Second stage: T and Q against the updated D and F. Whether it was finite and taken."""
        player = self.players["transformer"]
        self.discriminators.requires_grad_(False)
        moved = [p.detach() for group in player.optimizer.param_groups[1:] for p in group["params"]]  # likenesses
        strengths = [faces.norm(dim=1, keepdim=True) for faces in moved]
        player.begin()
        for micro in micros:
            loss = player.backward(partial(self._ask, micro, made, figures, nimg), last=micro is micros[-1])
            figures.add("loss", loss, 1.0)
        taken = player.update()
        for faces, strength in zip(moved, strengths, strict=True):
            faces.mul_(strength / faces.norm(dim=1, keepdim=True))
        return taken

    def _ask(self, micro: Micro, made: dict[str, Tensor] | None, figures: _Figures, nimg: int) -> Tensor:
        """Equation 16 on a micro-batch, scaled to its share; makes the images where they are not given."""
        o, w = self.config.objective, self.config.objective.weights
        images, identities, codes = micro.images, micro.identities, micro.codes
        draws = micro.draws(_TRANSFORMING)
        ramp = min(1.0, nimg / o.identity_ramp) if o.identity_ramp else 1.0
        terms: dict[str, tuple[float, Tensor]] = {}
        if made is None:
            with self._autocast():
                made = self._generate(micro)
        changed = [made[n] for n in ("A1", "WR1") if n in made]
        with self._autocast():
            if w.feature or w.identity or w.recovered_identity or self.classifies:
                embedded = self._embed(images, made, draws)
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
                for name, one, other in (
                    ("cos(I,A)", "I", "A1"),
                    ("cos(A1,A2)", "A1", "A2"),
                    ("cos(I,WR)", "I", "WR1"),
                ):
                    if other in e:
                        figures.add(name, F.cosine_similarity(e[one], e[other]).mean(), micro.share)
            if w.gan:
                scores, _ = self.discriminators(self._judged(made), draws=draws)
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
                figures.add("q_accuracy", right.float().mean(), micro.share)
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
            if w.own or w.own_perceptual or w.steady:
                terms |= self._painted(micro, made["A1"])
            if self.pose is not None:
                placed = jitter(draws, len(images)).to(self.device)
                with torch.no_grad():
                    real_pose = self.pose(images, placed)
                poses = [pose_distance(real_pose, self.pose(x, placed)) for x in changed]
                terms["pose"] = (w.pose, torch.stack(poses).mean())
            if w.recovery:
                terms["recovery"] = (w.recovery, objective.recovery(made["R"], images))
            weight = self._border if o.face_weighted_background else None
            if w.background:
                terms["background"] = (w.background, objective.background(changed, images, weight))
            if w.roughness:
                terms["roughness"] = (w.roughness, objective.roughness(changed, images))
            if w.range:
                terms["range"] = (w.range, objective.out_of_range(list(made.values())))
        # The two means over labelled samples have another share than the means over all samples.
        shares = {n: micro.labelled_share if n in ("adversarial", "recovery_class") else micro.share for n in terms}
        for name, (_, value) in terms.items():
            figures.add(name, value, shares[name])
        return torch.stack([factor * shares[name] * value for name, (factor, value) in terms.items()]).sum()

    def _painted(self, micro: Micro, anonymized: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Terms on what a cover transformer paints: the face's own likeness, and the same face into the saved A."""
        network, w, images = self.transformer, self.config.objective.weights, micro.images
        if not isinstance(network, networks.CoverTransformer):
            raise ValueError("objective.weights.own, own_perceptual and steady are of the cover transformer")
        terms: dict[str, tuple[float, Tensor]] = {}
        if w.own or w.own_perceptual:
            own = network.painted(images, network.own(images)).float()
            if w.own:
                terms["own"] = (w.own, F.l1_loss(own, images))
            if w.own_perceptual and self.features is not None:
                distance = self.features.distance(self.features(own), self.features(images))
                terms["own_perceptual"] = (w.own_perceptual, distance.float().mean())
        if w.steady:
            with torch.no_grad():
                saved = self._saved(micro, anonymized.detach())
            again = network.painted(saved, network.likenesses(micro.codes.first)).float()
            terms["steady"] = (w.steady, F.l1_loss(again, anonymized.detach()))
        return terms

    @torch.no_grad()
    def _average_buffers(self) -> None:
        """Running statistics, where T's norm keeps some, are the mean of what the processes saw."""
        if self.world.size > 1:
            for buffer in self.transformer.buffers():
                if buffer.is_floating_point() and buffer.numel():
                    buffer.copy_(self.world.sum_(buffer.contiguous().clone()) / self.world.size)

    def _embed(self, images: Tensor, made: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """F's embeddings of I and of everything made; without a graph for I."""
        names = [n for n in made if n != "R" or self.classifies or self.config.objective.weights.recovered_identity]
        together = torch.cat([made[n] for n in names])
        if self.config.recogniser.embedding_augmentation:
            images, together = augment_view(images, draws), augment_view(together, draws)
        with torch.no_grad():
            real = self.recogniser(images)
        return {"I": real} | dict(zip(names, self.recogniser(together).chunk(len(names)), strict=True))

    def _judged(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        kinds = {"anonymized": made["A1"]}
        if self.config.discriminator.on_recovered:
            kinds["recovered"] = made["R"]
        if self.config.discriminator.on_wrong and "WR1" in made:
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
            for group, rate in zip(optimizer.param_groups, self._base_rates[name], strict=True):
                group["lr"] = rate * factor

    # -- what it begins with ------------------------------------------------------------------------------------------

    def start_from(self, transformer: nn.Module) -> None:
        """Begin with a trained T of the same architecture, in place of random weights; its average with it.

        A T without a painter is given a fresh one.
        """
        state = transformer.state_dict()
        fresh = {k: v for k, v in self.transformer.state_dict().items() if k.startswith("painter.") and k not in state}
        self.transformer.load_state_dict(state | fresh)
        self.world.broadcast_(self.transformer)
        self.ema.load_state_dict(self.transformer.state_dict())
        self.players["transformer"].weights_were_set()

    @torch.no_grad()
    def centre_head(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start F's head from the mean embeddings of the training identities.

        Args:
            batches: this process's part of the labelled samples: float ``[B, 3, S, S]``, int64 ``[B]``.
        """
        sums = torch.zeros_like(self.head.centres)
        for images, identities in batches:
            embeddings = F.normalize(self.recogniser(images.to(self.device)).float(), dim=1)
            sums.index_add_(0, identities.to(self.device), embeddings)
        present = self.world.sum_(sums).abs().sum(dim=1).nonzero().flatten()
        self.head.centre_on(sums[present], present)
        if "recogniser" in self.players:
            self.players["recogniser"].weights_were_set()

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, whole on every process; all processes call it alike."""
        part = self.world.part(self.config.batch)
        pools = {k: p.state_dict(part.start, part.stop) for k, p in self.pools.items()}
        for pool in pools.values():
            # Bits, not numbers, are summed: every slot is all zeros but on one process.
            self.world.sum_(pool["images"].view(torch.int16).view(-1).view(torch.int32))
            pool["filled"] = self.world.sum_(pool["filled"].int()).bool()
        return {
            "modules": {k: m.state_dict() for k, m in self._modules().items()},
            "ema": self.ema.state_dict(),
            "optimizers": {k: p.state_dict() for k, p in self.players.items()},
            "pools": pools,
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of :meth:`state_dict`'s; what a light checkpoint (:func:`training.checkpoint.light`) leaves
        out begins anew."""
        for key, module in self._modules().items():
            if key in state["modules"]:
                module.load_state_dict(state["modules"][key])
        self.ema.load_state_dict(state.get("ema", state["modules"]["transformer"]))
        for key, player in self.players.items():
            if "optimizers" in state:
                player.load_state_dict(state["optimizers"][key])
            else:
                player.weights_were_set()
        for key, pool in self.pools.items():
            if "pools" in state:
                pool.load_state_dict(state["pools"][key])
        self.skipped = dict(state.get("skipped", self.skipped))
