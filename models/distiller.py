"""The teacher, frozen; and everything with a gradient in one module, which DDP wraps once and the
optimizer sees as one."""
import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.base import ModelOutput, VisionModel
from models.layers import set_launches_free
from utils.cuda_graphs import Captured
from utils.registry import UserError, one_line
from utils.rng import Position

# Pixels that a CPU takes through the network at a time, so that maps stay in its caches: 4 images
# of 224 px, or 49 of 64. Nothing that a frozen network does depends on the others of a batch.
PIXELS_AT_A_TIME = 4 * 224 ** 2
# Channels whose 16-bit values fill 16 bytes: products on matrix units load no less at once.
WIDTH_MULTIPLE = 8
GIB_PER_FLOAT = 4 / 2 ** 30


def frozen_dtype(amp_dtype: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """What a FrozenTeacher holds its weights in: the half precision of the run on a GPU; None on
    other devices, where autocast is no slower."""
    return amp_dtype if device.type == "cuda" else None


class FrozenTeacher(nn.Module):
    """`model` for inference only: evaluation mode for ever, no gradient, folded, channels-last.

    It takes the batches of the student, normalised with `data_mean` and `data_std`, and gives
    `model` what its weights expect: its own normalisation and, where it is not the usual 224 px or
    the network accepts no other, their size, by the filter of its publisher. What it sees is what
    the student sees, so their publisher's crop has no part in it, nor when it is evaluated.

    `dtype`: a half precision that weights and maps are held in throughout, the caller's autocast
    being left; widths are then filled up to what matrix units take. None: the weights stay as they
    are, and autocast is the caller's.
    """

    def __init__(self, model: VisionModel, data_mean: tuple[float, ...],
                 data_std: tuple[float, ...], *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_parameters = model.num_parameters  # before folding
        self.dtype = dtype
        self.model = model.eval().fold().requires_grad_(False)
        # In a list, so that it is no part of this module: what is counted has the plain widths.
        self.plain = [copy.deepcopy(self.model).to("meta")]
        if dtype is not None:
            self.model.pad_widths(WIDTH_MULTIPLE).to_half(dtype)
        self.model.to(memory_format=torch.channels_last)
        self.feature_info, self.num_classes = model.feature_info, model.num_classes
        self.input_size, self.input_filter = model.input_size, model.input_filter
        self.is_compiled = False
        # Whether it resizes all images to that.
        self.fixed_size = model.fixed_size or model.input_size != VisionModel.input_size
        # (p - m) / s from x = (p - dm) / ds is x * (ds / s) + (dm - m) / s.
        data_mean, data_std, mean, std = [
            torch.tensor(values).view(1, 3, 1, 1)
            for values in (data_mean, data_std, model.input_mean, model.input_std)]
        self.renormalises = not (data_mean.equal(mean) and data_std.equal(std))
        self.register_buffer("scale", data_std / std)
        self.register_buffer("shift", (data_mean - mean) / std)
        self.captured = Captured()
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def describe_input(self) -> dict[str, Any]:
        """What the network is given, as plain values; no size where that is the images' own."""
        return {"mean": list(self.model.input_mean), "std": list(self.model.input_std),
                "size": self.input_size if self.fixed_size else None, "filter": self.input_filter}

    def logits_dtype(self, input_size: int, options: Any) -> torch.dtype:
        """That of its logits in a step of these options. Raises UserError where it does not run."""
        image = torch.zeros(1, 3, input_size, input_size, device=options.device)
        try:
            with options.autocast():
                return self(image.contiguous(memory_format=options.memory_format)).dtype
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"the teacher does not run at --input-size {input_size}: "
                            f"{one_line(error)}.") from error

    def count_macs(self, input_size: int) -> int:
        """MACs of one image of this side, folded, without what widths are filled up with."""
        return self.plain[0].count_macs(input_size)

    def compile(self) -> None:
        """Compile `forward_with_features` after its next call, in which the network prepares what
        depends on the size of its maps: that is neither captured nor a reason to compile again.
        `forward` stays as it is, for the batches of an evaluation have other sizes."""
        self.is_compiled = True
        self.forward_with_features = self._call_and_compile

    def capture(self) -> None:
        """Let `teach` replay a CUDA graph."""
        self.captured = Captured("the teacher", is_on=True)

    def _call_and_compile(self, images: Tensor) -> ModelOutput:
        output = self._run(images)
        self.forward_with_features = torch.compile(self._run)
        return output

    def forward(self, images: Tensor) -> Tensor | None:
        """(N, 3, H, W) -> logits (N, num_classes); None without a classifier (0 classes)."""
        return self._run(images).logits

    def forward_with_features(self, images: Tensor) -> ModelOutput:
        """(N, 3, H, W) -> logits and stage maps without gradient history."""
        return self._run(images)

    def teach(self, images: Tensor, position: Position) -> ModelOutput:
        """As the step asks for it; where a micro-batch stands changes nothing here. Valid until the
        next call."""
        return self.captured(self.forward_with_features, images)

    def evaluated(self, evaluate: Callable[["FrozenTeacher"], Any]) -> Any:
        """As an evaluation asks for it: nothing is known before."""
        return evaluate(self)

    @torch.no_grad()
    def _run(self, images: Tensor) -> ModelOutput:
        if self.renormalises:
            images = images * self.scale + self.shift
        if self.fixed_size and images.shape[-1] != self.input_size:
            images = F.interpolate(images, (self.input_size, self.input_size),
                                   mode=self.input_filter, antialias=True)
        if self.dtype is None:
            return self._in_parts(images)
        with torch.autocast(images.device.type, enabled=False):
            return self._in_parts(images.to(self.dtype))

    def _in_parts(self, images: Tensor) -> ModelOutput:
        at_a_time = max(1, PIXELS_AT_A_TIME // (images.shape[2] * images.shape[3]))
        if images.device.type != "cpu" or len(images) <= at_a_time:
            logits, features = self.model.forward_with_features(images)
        else:
            parts = [self.model.forward_with_features(part)
                     for part in images.split(at_a_time)]
            features = [torch.cat(maps) for maps in zip(*[part.features for part in parts])]
            logits = torch.cat([part.logits for part in parts]) if self.num_classes else None
        return ModelOutput(logits if self.num_classes else None, features)


def freeze_student(student: VisionModel, what: str) -> list[str]:
    """Take the gradients from all of `student` but its classifier (`what` is "backbone"), or from
    its stem and this number of stages. Returns the names of these modules and parameters. Raises
    UserError for other words."""
    if what == "backbone":
        kept = student.classifiers
        if not kept:
            raise UserError(f"--freeze backbone: {type(student).__name__} does not say which of "
                            "its layers is the classifier.")
        names = [name for name, _ in (*student.named_modules(), *student.named_parameters())
                 if name and not any(f"{name}.".startswith(f"{other}.")
                                     or f"{other}.".startswith(f"{name}.") for other in kept)]
    else:
        num_stages = len(student.feature_info)
        if not what.isdecimal() or int(what) > num_stages:
            raise UserError(f"--freeze must be backbone, or a number of stages, 0 to {num_stages} "
                            f"for this student; got {what}.")
        names = [name for part in student.parts()[:int(what) + 1] for block in part
                 for name in block]
    for name, parameter in student.named_parameters():
        if any(f"{name}.".startswith(f"{frozen}.") for frozen in names):
            parameter.requires_grad_(False)
    return names


class Distiller(nn.Module):
    """The student and the losses, whose projections train with it but are never part of it.

    `losses` maps a name to a module called `(student, teacher, targets)`; `weights` has its factor.
    What `freeze` names of the student (see the function) is left as it is, and stays in evaluation
    mode: BatchNorm normalises with its old statistics and keeps them, and no path is dropped.
    """

    def __init__(self, student: VisionModel, losses: dict[str, nn.Module],
                 weights: dict[str, float], freeze: str | None = None) -> None:
        super().__init__()
        self.student = student
        # By name, for SyncBatchNorm takes the places of modules.
        self.frozen = [] if freeze is None else freeze_student(student, freeze)
        self.losses = nn.ModuleDict(losses)
        self.weights = weights

    def forward(self, images: Tensor, targets: Tensor, teacher: ModelOutput | None
                ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The weighted sum of the losses, each raw term under its name, and the student's logits
        (N, num_classes) in float32, detached, for what is only logged.

        The losses are computed in float32, whatever the caller's autocast.
        """
        student = self.student.forward_with_features(images)
        with torch.autocast(images.device.type, enabled=False):
            terms = {name: loss(student, teacher, targets) for name, loss in self.losses.items()}
        total = sum(self.weights[name] * term for name, term in terms.items())
        return total, terms, student.logits.detach().float()

    def train(self, mode: bool = True) -> "Distiller":
        super().train(mode)
        modules = dict(self.student.named_modules())
        for name in self.frozen:
            if name in modules:  # else it is a parameter
                modules[name].eval()
        return self

    @property
    def has_batch_norm(self) -> bool:
        return any(isinstance(module, _BatchNorm) for module in self.modules())

    def capture(self) -> Captured:
        """What replays forward and backward of a step from a CUDA graph. Launches then cost the
        host nothing, and the student is told so."""
        set_launches_free(self.student, True)
        return Captured("the step", self.parameters(), is_on=True,
                        when_given_up=partial(set_launches_free, self.student, False))

    def describe_frozen(self) -> str:
        trained = sum(parameter.numel() for parameter in self.student.parameters()
                      if parameter.requires_grad)
        return (f"{trained:,} of the student's {self.student.num_parameters:,} parameters train; "
                "the others keep their weights and statistics")

    @torch.no_grad()
    def check(self, images: Tensor, targets: Tensor, teacher: FrozenTeacher | None,
              batch_size: int) -> None:
        """Raises UserError when teacher, student and losses do not go together on such images, or
        in batches of this size. Leaves no trace."""
        size = images.shape[-1]
        if self.student.fixed_size and self.student.input_size != size:
            raise UserError(f"the student takes {self.student.input_size} px only, and --input-size"
                            f" is {size}.")
        if batch_size == 1 and self.has_batch_norm:
            raise UserError("--batch-size 1 leaves BatchNorm nothing to average over; use 2 or "
                            "more.")
        was_training = self.training
        self.eval()
        try:
            output = None if teacher is None else teacher.forward_with_features(images)
            # forward itself: a compiled module would be compiled for this odd batch, too.
            self.forward(images, targets, output)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"teacher, student and losses do not go together at --input-size "
                            f"{size}: {one_line(error)}.") from error
        finally:
            self.train(was_training)

    def synchronise_batch_norms(self) -> None:
        """The student's and the losses', over all processes; in place."""
        self.student.synchronise_batch_norms()
        nn.SyncBatchNorm.convert_sync_batchnorm(self.losses)

    def no_weight_decay(self) -> set[str]:
        return {f"student.{name}" for name in self.student.no_weight_decay()}

    def layer_ids(self) -> dict[str, int]:
        """The student's; the losses' own parameters train at the full rate, as its head does."""
        ids = {f"student.{name}": i for name, i in self.student.layer_ids().items()}
        last = max(ids.values())
        return {name: ids.get(name, last) for name, _ in self.named_parameters()}


def describe_size(model: VisionModel | FrozenTeacher, input_size: int) -> str:
    """Its parameters, and channels and sides of its maps of such images."""
    size = model.input_size if model.fixed_size else input_size
    stages = " | ".join(f"{info.channels}x{math.ceil(size / info.stride)}^2"
                        for info in model.feature_info)
    return f"{model.num_parameters:,} parameters, stages {stages or 'not known'}"


def describe_cost(student: VisionModel, teacher: FrozenTeacher | None, input_size: int, *,
                  keeps_average: bool, num_moments: int) -> str:
    """GiB of parameters in float32, and the teacher's share of a step's MACs: its forward pass and
    three times the student's make a step (a backward pass is two forward ones). `num_moments`: what
    the optimizer keeps of a parameter."""
    number = student.num_parameters
    trained = sum(parameter.numel() for parameter in student.parameters()
                  if parameter.requires_grad)
    held = number * (2 if keeps_average else 1) + trained * (1 + num_moments)
    macs = student.count_macs(input_size)
    text = (f"student: {held * GIB_PER_FLOAT:.2f} GiB of weights, "
            f"gradients, optimizer state{' and average' if keeps_average else ''}; "
            f"{macs / 1e9:.3f} G MACs forward at {input_size} px")
    if teacher is None:
        return text
    size = teacher.input_size if teacher.fixed_size else input_size
    teacher_macs = teacher.count_macs(size)
    share = teacher_macs / (teacher_macs + 3 * macs)
    held = sum(value.nbytes for value in teacher.state_dict().values())
    return (f"{text}\nteacher: {held / 2 ** 30:.2f} GiB of weights; "
            f"{teacher_macs / 1e9:.3f} G MACs forward at {size} px, {share:.0%} of a step (its "
            "forward, and forward and backward of the student)")
