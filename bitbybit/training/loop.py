"""The training loop: float baselines and hashed fine-tuning, resumable to the bit."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitbybit.engine import fast_gradients
from bitbybit.errors import DivergenceError
from bitbybit.integer_base import IntegerHashLayer
from bitbybit.nn import HashConv2d, HashLinear
from bitbybit.noise import AnalogNoise, NoiseSpec
from bitbybit.training.evaluate import evaluate, first_non_finite_layer
from bitbybit.training.graphed_step import GraphedStep
from bitbybit.training.hints import Hints
from bitbybit.training.options import TrainOptions
from bitbybit.training.prepare import Prepared, prepare, reestimate_batch_norm
from bitbybit.training.run_folder import RunFolder
from bitbybit.training.teacher_answers import TeacherAnswers, answers_key
from bitbybit.utils.devices import has_bfloat16, pick_device
from bitbybit.utils.files import save_tensors, write_json

StepCallback = Callable[[int, int, int, float], None]  # epoch, step, steps in an epoch, loss
EpochCallback = Callable[[dict[str, Any]], None]
LOOK_EVERY = 25  # steps on a GPU, which waits where its loss is read


@dataclass
class TrainResult:
    """What a run ended with.

    Attributes:
        model: the chosen weights, in eval mode.
        summary: accuracies (0..1), the chosen epoch, the options.
        history: one row for each epoch, as in ``metrics.csv``.
    """

    model: nn.Module
    summary: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Rises linearly over the first ``warmup`` share of the steps, then falls as a half cosine."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """Adam or SGD over four groups: projections, latent codes, decayed weights, everything else.

    Projections and codes with a rate of 0 get no gradients any more.
    """
    projections, codes, decayed, rest = [], [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("_learnable_projection_matrix"):
            projections.append(parameter)
        elif name.endswith("code_weight"):
            codes.append(parameter)
        elif parameter.ndim >= 2:
            decayed.append(parameter)
        else:
            rest.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "lr": options.lr, "weight_decay": options.weight_decay},
        {"params": rest, "lr": options.lr, "weight_decay": 0.0},
        {"params": projections, "lr": options.lr_projection, "weight_decay": 0.0},
        {"params": codes, "lr": options.lr_codes, "weight_decay": 0.0},
    ]
    for group in groups[2:]:
        for parameter in group["params"]:
            parameter.requires_grad_(group["lr"] > 0)
    groups = [g for g in groups if g["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.Adam(groups, fused=True)


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether products are taken in bfloat16: as asked, or where the processor has them."""
    return precision == "bfloat16" if precision else has_bfloat16(device)


def freeze_norms(model: nn.Module) -> None:
    """Lets batch norm use the statistics that it has, until ``train()`` is called again."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def steps_between_looks(device: torch.device) -> int:
    """How often a step's loss is read, to be shown and to notice that training diverged."""
    return LOOK_EVERY if device.type == "cuda" else 1


def distillation_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, options: TrainOptions) -> Tensor:
    """Cross entropy, mixed with the divergence from the teacher's softened answer.

    Source: Hinton et al. 2015, equation 4: the soft part is scaled by the temperature squared.
    """
    hard = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
    if teacher_logits is None:
        return hard
    t = options.temperature
    soft = F.kl_div(
        F.log_softmax(logits / t, 1), F.log_softmax(teacher_logits / t, 1), log_target=True, reduction="batchmean"
    )
    return (1 - options.distill) * hard + options.distill * t * t * soft


def average_answer(logits: list[Tensor], temperature: float) -> Tensor:
    """Logits float32[n, classes] whose softmax at ``temperature`` is the mean of that of several networks' logits."""
    if len(logits) == 1:
        return logits[0]
    softened = torch.stack([F.log_softmax(one / temperature, 1) for one in logits])
    return temperature * softened.logsumexp(0)


def train(
    options: TrainOptions,
    output: str | Path,
    *,
    resume: bool = False,
    on_step: StepCallback | None = None,
    on_epoch: EpochCallback | None = None,
) -> TrainResult:
    """Trains as ``options`` say and leaves a run folder; the test split is used once, at the end.

    The folder holds ``options.json``, ``metrics.csv``, ``last.pt`` (everything a resume needs,
    rewritten after each epoch), ``model.pth`` (the epoch with the best held-out accuracy) and
    ``summary.json``.

    Raises:
        BitbybitError: the options, data or weights cannot be used; training diverged.
        OSError: the folder cannot be written.
    """
    folder = RunFolder(Path(output))
    if resume:
        options = folder.read_options()
    else:
        narrow = use_bfloat16(options.precision, pick_device(options.device))
        options = replace(options, precision="bfloat16" if narrow else "float32")  # the same where it goes on
        folder.start(options)
    state = folder.load_state() if resume else None
    torch.manual_seed(options.seed)
    setup = prepare(options, fit=state is None)
    session = _Session(setup, options, folder)
    if state is not None:
        session.restore(state)
    for epoch in range(session.epoch, options.epochs):
        row = session.run_epoch(epoch, on_step)
        if on_epoch:
            on_epoch(row)
    return session.finish()


class _Session:
    """The mutable state of a run between epochs."""

    def __init__(self, setup: Prepared, options: TrainOptions, folder: RunFolder) -> None:
        self.setup, self.options, self.folder = setup, options, folder
        self.optimizer = make_optimizer(setup.model, options)
        total = options.epochs * len(setup.train)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, total, options.warmup)
        )
        for layer in setup.model.modules():
            if isinstance(layer, IntegerHashLayer):
                layer.code_share = options.code_share
        # Layers in float arithmetic choose their own types: a projection in bfloat16 would give other codes.
        exact = any(isinstance(layer, HashLinear | HashConv2d) for layer in setup.model.modules())
        narrow = not exact and use_bfloat16(options.precision, setup.device)
        self.narrow = torch.autocast(setup.device.type, torch.bfloat16, enabled=narrow)
        self.answers = self._kept_answers(narrow) if options.repeat_epochs else None
        self.hints = Hints(setup.model, setup.teacher) if setup.teacher is not None and options.hints > 0 else None
        self.noise = None if options.noise is None else AnalogNoise(setup.model, NoiseSpec(**options.noise))
        plain = exact or self.noise is not None or setup.device.type != "cuda"
        self.run_step = self._compute if plain else GraphedStep(self._compute, setup.model)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"epoch": -1, "val_accuracy": -1.0, "model": None}

    def _kept_answers(self, narrow: bool) -> TeacherAnswers:
        setup, options = self.setup, self.options
        assert setup.teacher is not None
        networks = [setup.teacher, *setup.more_teachers]
        key = answers_key(options, networks, setup.train.dataset, narrow)  # type: ignore[arg-type]
        folder = Path(options.answers_dir) if options.answers_dir else self.folder.root
        return TeacherAnswers(folder, key, options.repeat_epochs, self._ask)

    def run_epoch(self, epoch: int, on_step: StepCallback | None) -> dict[str, Any]:
        """Trains on all batches once, measures, and leaves a state to resume from.

        Raises:
            DivergenceError: a loss or a parameter is not finite; the state of the epoch before stays.
        """
        started = time.perf_counter()
        with contextlib.ExitStack() as attached:
            for part in (self.noise, self.hints):
                if part is not None:
                    part.attach()
                    attached.callback(part.detach)
            loss, accuracy = self._run_steps(epoch, on_step)
        for name, parameter in self.setup.model.named_parameters():
            if not parameter.isfinite().all():
                self._stop(f"{name} is not finite after epoch {epoch + 1}")
        validation = {"accuracy": math.nan, "loss": math.nan}
        if self.setup.val:
            validation = evaluate(self.setup.model, self.setup.val, self.setup.device, packed=True)
        row = {
            "epoch": epoch + 1,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "val_loss": validation["loss"],
            "val_accuracy": validation["accuracy"],
            "lr": self.scheduler.get_last_lr()[0],
            "seconds": time.perf_counter() - started,
        }
        self.history.append(row)
        self._keep_best(row)
        self.epoch = epoch + 1
        self._save()
        return row

    def _chip(self, seed: int, step: int) -> int:
        """The number of a step's chip, another one for every seed of the noise and of the run."""
        return step + (seed << 32) + (self.options.seed << 64)

    def _run_steps(self, epoch: int, on_step: StepCallback | None) -> tuple[float, float]:
        """All steps of an epoch; mean loss and accuracy over its images."""
        options, model, device, batches = self.options, self.setup.model, self.setup.device, self.setup.train
        repeated = epoch % options.repeat_epochs if options.repeat_epochs else epoch
        batches.sampler.epoch = repeated  # type: ignore[union-attr]
        model.train()
        if options.frozen_norms:
            freeze_norms(model)
        if self.answers is not None:
            self.answers.start(epoch)
        seen, steps, look_every = 0, len(batches), steps_between_looks(device)
        losses, correct = torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), device=device)
        for step, (images, labels) in enumerate(batches):
            images = images.to(device, memory_format=torch.channels_last)
            labels = labels.to(device)
            if self.noise is not None:
                self.noise.draw(self._chip(self.noise.spec.seed, epoch * steps + step))
            known = [] if self.answers is None else [self.answers.answer(images)]
            loss, logits = self.run_step(images, labels, *known)
            losses += loss * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            seen += len(labels)
            if step % look_every == 0 or step == steps - 1:
                value = loss.item()
                if not math.isfinite(value):
                    layer = first_non_finite_layer(model, images)
                    self._stop(f"loss {value} at epoch {epoch + 1}, step {step + 1}, first in {layer}")
            self.optimizer.step()
            self.scheduler.step()
            if on_step:
                on_step(epoch, step, steps, value)
        if self.answers is not None:
            self.answers.finish(epoch)
        return float(losses) / seen, float(correct) / seen

    def _stop(self, what: str) -> NoReturn:
        kept = f"the last good state is {self.folder.state}" if self.epoch else "no epoch had ended before"
        raise DivergenceError(f"training diverged: {what}; lower the learning rate; {kept}")

    def _ask(self, images: Tensor) -> Tensor:
        """The float networks' answer to a batch."""
        with torch.no_grad(), self.narrow:
            answers = [network(images).float() for network in (self.setup.teacher, *self.setup.more_teachers)]  # type: ignore[misc]
            return average_answer(answers, self.options.temperature)

    def _compute(self, images: Tensor, labels: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch; parameters have its gradients.  ``known``: the float networks' answer."""
        options, teacher_logits = self.options, known
        asked = self.setup.teacher is not None and (options.distill > 0 or self.hints is not None)
        if asked and known is None:
            teacher_logits = self._ask(images)
        with fast_gradients(), self.narrow:
            logits = self.setup.model(images).float()
        loss = distillation_loss(logits, labels, teacher_logits, options)
        if self.hints is not None:
            loss = loss + options.hints * self.hints.take()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), logits.detach()

    def _keep_best(self, row: dict[str, Any]) -> None:
        if self.setup.val and row["val_accuracy"] <= self.best["val_accuracy"]:
            return
        state = {k: v.detach().cpu().clone() for k, v in self.setup.model.state_dict().items()}
        self.best = {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"], "model": state}

    def _save(self) -> None:
        self.folder.save_state(
            {
                "epoch": self.epoch,
                "model": self.setup.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "best": self.best,
                "history": self.history,
                "rng": torch.get_rng_state(),
            }
        )
        self.folder.write_metrics(self.history)

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a run where its last whole epoch ended."""
        self.setup.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.best, self.history = state["epoch"], state["best"], state["history"]
        torch.set_rng_state(state["rng"])

    def _augmented_sample(self) -> Tensor:
        """Training images as training sees them: cropping's black borders widen the first layers' statistics."""
        loader, wanted = self.setup.train, self.options.calibration
        loader.sampler.epoch = self.options.epochs  # type: ignore[union-attr]
        batches: list[Tensor] = []
        for images, _ in loader:
            batches.append(images)
            if sum(map(len, batches)) >= wanted:
                break
        return torch.cat(batches)[:wanted]

    def _reestimate(self) -> bool:
        """Re-estimates batch norm, and takes it back where held-out accuracy falls; whether it was kept."""
        setup = self.setup
        reestimate_batch_norm(setup.model, self._augmented_sample(), setup.device)
        if setup.val is None:
            return True
        if evaluate(setup.model, setup.val, setup.device, packed=True)["accuracy"] >= self.best["val_accuracy"]:
            return True
        setup.model.load_state_dict(self.best["model"])
        return False

    def finish(self) -> TrainResult:
        """Takes the best epoch, and new batch-norm statistics if they help; measures the test split once."""
        setup, options = self.setup, self.options
        model = setup.model
        model.load_state_dict(self.best["model"])
        reestimated = options.hash_config is not None and not options.frozen_norms and self._reestimate()
        summary: dict[str, Any] = {
            "model": options.model,
            "dataset": options.dataset,
            "epoch": self.best["epoch"],
            "batch_norm_reestimated": reestimated,
            "val_accuracy": evaluate(model, setup.val, setup.device, packed=True)["accuracy"] if setup.val else None,
            "test_accuracy": evaluate(model, setup.test, setup.device, packed=True)["accuracy"],
            "seconds": sum(row["seconds"] for row in self.history),
            "options": options.to_dict(),
        }
        if setup.teacher is not None:
            summary["float_test_accuracy"] = evaluate(setup.teacher, setup.test, setup.device)["accuracy"]
        save_tensors(self.folder.weights, {k: v.detach().cpu() for k, v in model.state_dict().items()})
        write_json(self.folder.summary, summary)
        return TrainResult(model.eval(), summary, self.history)
