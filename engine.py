"""One step, one epoch, one evaluation. Handed objects; knows no model and no loss by name."""
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.content import Named, entry
from utils.cuda_graphs import Captured
from utils.distributed import average_gradients, rank, sum_over_ranks, world_size
from utils.log import Meter, peak_memory_gib, print_once, progress
from utils.metrics import no_samples, sample_results, teacher_metrics
from utils.optim import ModelEma, optimizer_form, restore_optimizer, set_hyperparameters
from utils.registry import NonFiniteLoss, UserError
from utils.rng import Position, fold_seed, position_of

SMALLEST_SCALE = 2.0 ** -14  # of the loss; it starts at 2 ** 16 and halves at every overflow
NO_LOSS_TERMS = {"grad_norm", "teacher_acc1", "teacher_entropy", "agreement"}
AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Masks(Protocol):
    """What the step asks of sparse training: models.sparsity.SparseMask."""

    masks: dict[str, Tensor]  # of the student's parameters, by name

    def step(self, step: int) -> None: ...
    def metrics(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Teacher(Protocol):
    """What the step asks of a teacher: models.distiller.FrozenTeacher, or its kept logits."""

    def teach(self, images: Tensor, position: Position) -> Any:
        """Logits and feature maps of a micro-batch, given what the student sees of it; valid until
        the next call."""

    def evaluated(self, evaluate: Callable[[nn.Module], Any]) -> Any:
        """What `evaluate` gives of the teacher's network, or gave before."""


@dataclass
class TrainState:
    """All that a run is: what a checkpoint saves and what it restores are this one list."""

    distiller: nn.Module  # the student and the losses, as checkpoints name their parameters
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEma | None  # of the student
    wrapped: nn.Module  # the distiller as the step calls it, itself or in DistributedDataParallel
    sparsity: Masks | None = None  # the student's
    step: int = 0  # updates done
    epoch: int = 0  # epochs done, their evaluation included
    best: dict[str, float] = field(default_factory=dict)  # best_acc1, best_acc1_ema, percent
    classes: list[str] = field(default_factory=list)  # names by label, for whoever reads the file
    meter: Meter = field(default_factory=Meter)  # of the epoch in progress
    captured: Captured = field(default_factory=Captured)  # what calls forward and backward

    def networks(self) -> dict[str, nn.Module]:
        """What is evaluated, by the suffix of its log keys: the student and its average."""
        networks = {"": self.distiller.student}
        if self.ema is not None:
            networks["_ema"] = self.ema.model
        return networks

    def metrics(self) -> dict[str, float]:
        """What the log shows beside the epoch's means."""
        return self.sparsity.metrics() if self.sparsity else {}

    def finish_epoch(self, acc1: dict[str, float]) -> list[str]:
        """Count the epoch with its top-1 by suffix, percent. Returns the suffixes that were never
        as good."""
        self.epoch += 1
        improved = [suffix for suffix in acc1 if acc1[suffix] > self.best[f"best_acc1{suffix}"]]
        for suffix in improved:
            self.best[f"best_acc1{suffix}"] = acc1[suffix]
        return improved

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.distiller.student.state_dict(),
            "losses": self.distiller.losses.state_dict(),
            "model_ema": self.ema.model.state_dict() if self.ema else None,
            "ema_updates": self.ema.num_updates if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sparsity": self.sparsity.state_dict() if self.sparsity else None,
            "step": self.step,
            "epoch": self.epoch,
            "classes": self.classes,
            "meter": self.meter.state_dict(),
            **self.best,
        }

    def form(self, saved: dict[str, Any], is_whole: bool) -> dict[str, Any]:
        """What `load_state_dict` takes, for `utils.content.check_form`: the state as it would be
        saved, but for what only `saved` can tell the size of. `is_whole`: nothing was lost from it.

        Raises ValueError where its optimizer is another one."""
        form = self.state_dict()
        # Overflows of float16 may have left out every update so far.
        is_whole = is_whole or (self.scaler.is_enabled() and not entry(saved, "optimizer", "state"))
        form["optimizer"] = optimizer_form(self.optimizer, entry(saved, "optimizer"), is_whole)
        sums = entry(saved, "meter", "sums")
        form["meter"] = {"sums": Named(float), "counts": dict.fromkeys(
            sums if isinstance(sums, dict) else (), float)}
        if self.sparsity:
            form["sparsity"]["masks"] = Named(torch.uint8)
        form["classes"] = [str] * len(self.classes)
        return form

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the form of `form`. Raises ValueError where masks do not fit."""
        copy_state(state["model"], self.distiller.student)
        copy_state(state["losses"], self.distiller.losses)
        if self.ema:
            copy_state(state["model_ema"], self.ema.model)
            self.ema.num_updates = state["ema_updates"]
        restore_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.sparsity:
            self.sparsity.load_state_dict(state["sparsity"])
        self.step, self.epoch = state["step"], state["epoch"]
        self.meter.load_state_dict(state["meter"])
        self.best = {name: state[name] for name in self.best}


@torch.no_grad()
def copy_state(saved: Mapping[str, Tensor], module: nn.Module) -> None:
    """Give a module the values of a state dict that has its names, shapes and dtypes. No hook of a
    module's, nor what else a file says of their versions, has part in it."""
    for name, value in module.state_dict().items():
        value.copy_(saved[name])


def build_state(distiller: nn.Module, optimizer: torch.optim.Optimizer, options: "StepOptions", *,
                ema: ModelEma | None = None, sparsity: Masks | None = None,
                wrapped: nn.Module | None = None, captured: Captured | None = None,
                classes: Sequence[str] = ()) -> TrainState:
    """The state of a run that begins. `wrapped`: the distiller in DDP; None: the distiller.
    `captured`: what calls forward and backward; None: directly."""
    best = {"best_acc1": -math.inf}
    if ema is not None:
        best["best_acc1_ema"] = -math.inf
    return TrainState(
        distiller=distiller, optimizer=optimizer, ema=ema, sparsity=sparsity,
        wrapped=distiller if wrapped is None else wrapped, best=best, classes=list(classes),
        captured=captured or Captured(),
        scaler=torch.amp.GradScaler(options.device.type,
                                    enabled=options.amp_dtype is torch.float16))


class StepOptions(NamedTuple):
    """How a step computes; nothing here depends on what is trained."""

    device: torch.device
    amp_dtype: torch.dtype | None  # None: float32 throughout
    memory_format: torch.memory_format
    accum_steps: int  # micro-batches per update
    clip_grad: float | None  # largest L2 norm of the gradient; None: as it is
    seed: int
    batch_transform: Callable[[Any], Tensor] | None = None  # loader's images -> floats, on device
    steps_per_epoch: int = 1
    epochs_kept: int = 0  # epochs whose images and mixing come back in turn; 0: none does

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype or torch.bfloat16,
                              enabled=self.amp_dtype is not None)

    def to_device(self, images: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        if self.batch_transform is not None:
            images = self.batch_transform(images)
        return images, labels.to(self.device, non_blocking=True)

    def position(self, step: int, micro: int) -> Position:
        return position_of(step, micro, rank(), steps_per_epoch=self.steps_per_epoch,
                           accum_steps=self.accum_steps, epochs_kept=self.epochs_kept)


def train_one_epoch(state: TrainState, loader: Any, teacher: Teacher | None, mix: Callable,
                    schedule: Callable[[int], dict[str, float]], *, options: StepOptions,
                    print_every: int,
                    after_update: Callable[[TrainState], bool],
                    on_print: Callable[[dict[str, float], int], None]) -> dict[str, float] | None:
    """Train epoch `state.epoch` from wherever `state.step` stands in it, to its end.

    `mix(images, labels, position)` -> (images, targets). `schedule(step)` -> lr and weight_decay.
    `on_print(values, step)` is given, every `print_every` updates, what is shown: the means since
    the epoch's start and the rates. `after_update(state)` returns True to stop early; the epoch
    then returns None, else the epoch's means: raw loss terms, `loss` (their weighted sum),
    `grad_norm`, `images_per_second`, and with a teacher those of `teacher_metrics`.
    Raises NonFiniteLoss at the next print interval after a term became NaN or infinite.
    """
    state.wrapped.train()
    steps_per_epoch = options.steps_per_epoch
    done = state.step - state.epoch * steps_per_epoch
    if done == 0:
        state.meter = Meter()
    images_of = options.position(state.epoch * steps_per_epoch, 0).epoch
    batches = iter(loader.start_at(images_of, done * options.accum_steps))
    start, num_images = time.perf_counter(), 0
    with progress(f"epoch {state.epoch}", steps_per_epoch, initial=done, unit="step") as bar:
        for _ in range(done, steps_per_epoch):
            hyperparameters = schedule(state.step)
            set_hyperparameters(state.optimizer, **hyperparameters)
            num_images += accumulate_gradients(state, batches, teacher, mix, options)
            optimizer_update(state, options.clip_grad)
            bar.update()
            if state.step % print_every == 0:
                means = checked_means(state)
                shown = "".join(f", {name.replace('_', ' ')} {value:.3f}"
                                for name, value in state.metrics().items())
                bar.set_postfix_str(
                    f"loss {means['loss']:.3f}, lr {hyperparameters['lr']:.1e}{shown}")
                on_print({**means, **hyperparameters, **state.metrics()}, state.step)
            if after_update(state):
                return None
    means = checked_means(state)
    seconds = time.perf_counter() - start
    # None when a resume found the epoch trained and only its evaluation missing.
    speed = num_images * world_size() / seconds if num_images else None
    return {**means, "images_per_second": speed}


def accumulate_gradients(state: TrainState, batches: Iterator, teacher: Teacher | None,
                         mix: Callable, options: StepOptions) -> int:
    """Forward and backward of the micro-batches of one update; the number of images seen here."""
    num_images = 0
    for micro in range(options.accum_steps):
        batch = next(batches)
        num_images += len(batch.images)
        images, labels = options.to_device(batch.images, batch.labels)  # (N, 3, H, W), (N,)
        position = options.position(state.step, micro)
        images, targets = mix(images, labels, position)
        torch.manual_seed(fold_seed(options.seed, "drop path", state.step, micro, rank()))
        teacher_output = None
        if teacher is not None:
            with options.autocast():
                teacher_output = teacher.teach(images, position)
        is_last = micro + 1 == options.accum_steps
        is_ddp = isinstance(state.wrapped, DistributedDataParallel)
        with nullcontext() if is_last or not is_ddp else state.wrapped.no_sync():
            groups = state.captured(partial(forward_backward, state, options), images, targets,
                                    teacher_output)
        for values in groups:
            state.meter.add(values, state.step)
    return num_images


def forward_backward(state: TrainState, options: StepOptions, images: Tensor, targets: Tensor,
                     teacher_output: Any) -> list[dict[str, Tensor]]:
    """Add the gradients of one micro-batch. Returns what is logged: the values of the losses, and
    those of the teacher."""
    with options.autocast():
        total, terms, student_logits = state.wrapped(images, targets, teacher_output)
    state.scaler.scale(total / options.accum_steps).backward()
    values = [{name: value.detach() for name, value in {**terms, "loss": total}.items()}]
    if teacher_output is not None:
        values.append(teacher_metrics(student_logits, teacher_output.logits, targets))
    return values


def optimizer_update(state: TrainState, clip_grad: float | None) -> None:
    """Apply the accumulated gradients; the average follows the weights that the update made."""
    if not isinstance(state.wrapped, DistributedDataParallel):
        average_gradients(state.distiller.parameters())
    state.scaler.unscale_(state.optimizer)
    limit = math.inf if clip_grad is None else clip_grad
    norm = nn.utils.clip_grad_norm_(state.distiller.parameters(), limit)  # the norm before clipping
    if state.scaler.is_enabled():
        # A float16 overflow makes the scaler skip the update: it counts as norm 0 in the mean.
        norm = torch.where(norm.isfinite(), norm, 0)
    state.meter.add({"grad_norm": norm}, state.step)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    masks = None
    if state.sparsity is not None:
        state.sparsity.step(state.step + 1)  # before the gradients go, which it may rank by
        masks = state.sparsity.masks
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(state.distiller.student, masks)
    state.step += 1


def checked_means(state: TrainState) -> dict[str, float]:
    """The epoch's means so far. Raises NonFiniteLoss, on all processes, when any value since the
    epoch's start was NaN or infinite."""
    means = state.meter.means()
    failures = state.meter.failures()
    if failures:
        step, name = failures[0]
        means |= {other: math.nan for at, other in failures if at == step}
        values = ", ".join(f"{key} {value:.4g}" for key, value in means.items())
        lr = max(group["lr"] for group in state.optimizer.param_groups)
        what = repr(name) if name in NO_LOSS_TERMS else f"loss term {name!r}"
        raise NonFiniteLoss(
            f"{what} became NaN or infinite at update "
            f"{step:.0f}, noticed at update {state.step} (means of the epoch until then: {values}; "
            f"lr {lr:.1e}, gradient scale "
            f"{state.scaler.get_scale():g}). The last checkpoint is from before it. Lower --lr, "
            "set --clip-grad, or try --amp none.")
    if state.scaler.is_enabled() and state.scaler.get_scale() < SMALLEST_SCALE:
        raise NonFiniteLoss(
            f"float16 gradients overflow however small they are scaled: the scale is "
            f"{state.scaler.get_scale():g} at update {state.step}, and no update was made for a "
            "while. Use --amp bf16 or none.")
    return means


class Evaluation(NamedTuple):
    """Percentages over all samples of all processes, and this process's per-sample results."""

    acc1: float
    acc5: float
    loss: float  # mean cross-entropy
    agreement: float | None  # with the reference's top-1
    num_samples: int
    samples: dict[str, Tensor]  # on the CPU: index (n,), label (n,), top5 (n, 5), prob (n,)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, *, options: StepOptions, description: str = "evaluate",
             reference: Tensor | None = None) -> Evaluation:
    """Accuracy of `model` over every readable sample exactly once, whatever the processes.

    `reference`: (data set size,) class predicted by another model, to count agreement with.
    """
    was_training = model.training
    model.eval()
    results = []
    with progress(description, len(loader)) as bar:
        for batch in loader:
            images, labels = options.to_device(batch.images, batch.labels)
            with options.autocast():
                logits = model(images)
            results.append((batch.indices, batch.labels, batch.readable,
                            *sample_results(logits, labels)))
            bar.update()
    model.train(was_training)
    columns = [torch.cat(column).cpu() for column in zip(*results)] if results else no_samples()
    readable = columns.pop(2)
    index, label, top5, prob, loss = (column[readable] for column in columns)
    hits = top5 == label[:, None]
    agreeing = top5[:, 0] == reference[index] if reference is not None else torch.zeros(0)
    counts = [len(index), hits[:, :1].sum(), hits.sum(), loss.double().sum(), agreeing.sum(),
              (~readable).sum()]
    total, first, five, loss_sum, agreed, skipped = sum_over_ranks(
        torch.tensor(counts, dtype=torch.float64)).tolist()
    assert total + skipped == loader.num_samples, (
        f"evaluated {total:.0f} and skipped {skipped:.0f} of {loader.num_samples} samples")
    samples = {"index": index, "label": label, "top5": top5, "prob": prob}
    total = max(total, 1)
    return Evaluation(100 * first / total, 100 * five / total, loss_sum / total,
                      100 * agreed / total if reference is not None else None, int(total), samples)


def evaluate_teacher(teacher: Teacher | None, loader: Any, options: StepOptions
                     ) -> tuple[float | None, Tensor | None]:
    """Top-1 in percent; the class of every image of this process, -1 elsewhere (data set size,).
    None and None without a teacher, or without its classifier."""
    if teacher is None:
        return None, None
    if teacher.num_classes == 0:
        print_once("teacher: not evaluated, for it has no classifier; its feature maps alone teach")
        return None, None
    return teacher.evaluated(lambda network: _evaluate_network(network, loader, options))


def _evaluate_network(teacher: nn.Module, loader: Any, options: StepOptions
                      ) -> tuple[float, Tensor]:
    result = evaluate(teacher, loader, options=options, description="teacher")
    refuse_nan(result, "the teacher's")
    print_once(f"teacher: top-1 {result.acc1:.2f} %, top-5 {result.acc5:.2f} % on the "
               f"{result.num_samples:,} validation images, at the student's input size")
    warn_of_guessing(result.acc1, teacher.num_classes, result.num_samples)
    predictions = torch.full((loader.num_samples,), -1)
    predictions[result.samples["index"]] = result.samples["top5"][:, 0]
    return result.acc1, predictions


def refuse_nan(result: Evaluation, whose: str) -> None:
    """Raises UserError where logits were NaN or infinite, of which some class is always the top."""
    if math.isnan(result.loss):
        raise UserError(f"{whose} logits are NaN, so its accuracy means nothing. Its weights are "
                        "broken, or too large for this --amp.")


def warn_of_guessing(acc1: float, num_classes: int, num_samples: int) -> None:
    """Print a warning where this top-1, in percent, is no more than guessing gives: the mean of a
    class drawn at random and two standard deviations of its mean over so many images."""
    chance = 1 / num_classes
    most = chance + 2 * math.sqrt(chance * (1 - chance) / max(num_samples, 1))
    if acc1 <= 100 * min(most, 1 - chance):
        print_once(f"warning: the teacher's top-1 of {acc1:.2f} % on {num_samples:,} images is no "
                   f"better than guessing among {num_classes} classes ({100 * chance:.2f} %). Its "
                   "weights may be of other classes, random, or of images normalised otherwise; a "
                   "student will learn nothing good from it.")


def epoch_record(state: TrainState, means: dict[str, float], results: dict[str, Evaluation],
                 best: list[str], skipping: Sequence[Any]) -> dict[str, Any]:
    """What log.txt says of the epoch that just ended, under ConvNeXt's key names.

    `means`: of `train_one_epoch`. `results` by suffix of the network, `best` the suffixes that were
    never as good. `skipping`: the loaders, of training and of evaluation, that skip bad images.
    """
    speed = means.pop("images_per_second")
    record = {"epoch": state.epoch - 1,
              **{f"train_{name}": value for name, value in means.items()}, **state.metrics()}
    for suffix, result in results.items():
        record |= {f"test_loss{suffix}": result.loss, f"test_acc1{suffix}": result.acc1,
                   f"test_acc5{suffix}": result.acc5}
        if result.agreement is not None:
            record[f"agreement{suffix}"] = result.agreement
        record[f"is_best{suffix}"] = suffix in best
    record["n_parameters"] = state.distiller.student.num_parameters
    record["images_per_second"] = speed
    if skipping:
        bad = torch.tensor([float(len(loader.bad)) for loader in skipping])
        record["skipped_train"], record["skipped_test"] = sum_over_ranks(bad).tolist()
    record["peak_memory_gib"] = peak_memory_gib(next(state.distiller.parameters()).device)
    return record
