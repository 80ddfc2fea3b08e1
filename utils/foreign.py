"""What the flags of DeiT, ConvNeXt and timm are called here, or what to use in their place.

A flag that a program has itself always means what that program says.
"""
import argparse
import os
import shlex
from collections.abc import Mapping, Sequence

# Flag -> what it is here; of several, the first that the program has.
RENAMED = {
    "--bce-loss": ("--bce",), "--checkpoint-hist": ("--save-num",), "--data-dir": ("--data-path",),
    "--dataset": ("--data-set",), "--eval-crop-ratio": ("--crop-pct",),
    "--finetune": ("--student-weights", "--weights"),
    "--grad-accum-steps": ("--accum-steps",), "--img-size": ("--input-size",),
    "--initial-checkpoint": ("--student-weights",), "--kd-model-name": ("--teacher",),
    "--log-interval": ("--print-every",), "--model": ("--student",),
    "--model-key": ("--student-weights-key", "--weights-key"),
    "--nb-classes": ("--num-classes",), "--output": ("--output-dir", "--out"),
    "--resume": ("--checkpoint",), "--save-ckpt-freq": ("--save-freq",),
    "--save-ckpt-num": ("--save-num",), "--teacher-model": ("--teacher",),
    "--teacher-path": ("--teacher-weights",),
    "--workers": ("--num-workers",),
}
# Flag that is there or not, or has a word for it -> words for yes, words for no; of several, the
# first that the program has.
SWITCHES = {
    "--pretrained": ((["--student-weights", "published"], ["--student-weights", "random"]),
                     (["--weights", "published"], ["--weights", "random"])),
    "--ThreeAugment": ((["--aa", "3a"], []),),
    "--use-amp": ((["--amp", "auto"], ["--amp", "none"]),),
}
# Flag -> option of the network that --student names.
STUDENT_OPTIONS = {"--drop-path": "drop_path", "--head-init-scale": "head_init_scale",
                   "--layer-scale-init-value": "layer_scale_init"}
# What libraries call these options; of others, nothing is known.
LIBRARY_OPTIONS = {"timm": {"drop_path": "drop_path_rate"},
                   "torchvision": {"drop_path": "stochastic_depth_prob"}}

BOOLEANS = ("true", "false")
_SCHEDULE = ("The rate rises linearly from 0 and falls as a cosine: --lr, --min-lr, "
             "--warmup-epochs.")
_ERASING = "Of an image one rectangle is filled with noise, with the probability --reprob."
_LOGS = "Every epoch's numbers are in log.txt; --log-to tensorboard wandb sends them there, too."
_STARTER = "torchrun starts the processes; leave it out."
_CLASSES = "The number of classes comes from the data; leave it out."
_LOSS = "Losses are named with their options, for example --loss kd temperature=3."
# Flag -> why there is none.
EXPLAINED = {
    **dict.fromkeys(("--sched", "--decay-epochs", "--cooldown-epochs", "--patience-epochs",
                     "--decay-rate", "--warmup-lr", "--lr-noise"), _SCHEDULE),
    **dict.fromkeys(("--remode", "--recount", "--resplit"), _ERASING),
    **dict.fromkeys(("--enable-wandb", "--log-wandb", "--log-dir"), _LOGS),
    **dict.fromkeys(("--world-size", "--dist-url", "--dist-on-itp", "--local-rank"), _STARTER),
    **dict.fromkeys(("--distillation-type", "--distillation-alpha", "--distillation-tau"), _LOSS),
    **dict.fromkeys(("--nb-classes", "--num-classes"), _CLASSES),
    "--color-jitter": "Colours change as the policy of --aa says.",
    "--cutmix-minmax": "The boxes are drawn by --cutmix.",
    "--disable-eval": "Every epoch is evaluated.",
    "--dist-eval": "Evaluation is always shared among the processes; leave it out.",
    "--drop": "Use the student's option drop_path.",
    "--eval-data-path": "--data-path holds train/ and val/.",
    "--imagenet-default-mean-and-std": "A network knows what its weights expect; leave it out.",
    "--model-ema-eval": "The average is always evaluated beside the student; leave it out.",
    "--model-ema-force-cpu": "The average lies beside the student; leave it out.",
    "--model-prefix": "Prefixes of names in a file are found; leave it out.",
    "--pin-mem": "Memory is pinned where there is a GPU; leave it out.",
    "--save-ckpt": "Checkpoints are always written; see --save-freq and --save-num.",
    "--start-epoch": "A continued run knows its epoch; leave it out.",
    "--train-interpolation": "Crops are resized by a bicubic filter; leave it out.",
    "--unscale-lr": "--lr is never scaled with the batch; leave it out.",
}
# Flags of train_kd.py that eval.py has, too, under this name.
_OF_EVAL = {"--resume": "--checkpoint", "--student": "--model", "--student-weights": "--weights",
            **{flag: flag for flag in ("--data-set", "--data-path", "--input-size", "--crop-pct",
                                       "--batch-size", "--num-workers", "--device")}}


def translate(argv: Sequence[str], own: Mapping[str, argparse.Action]
              ) -> tuple[list[str], dict[str, str]]:
    """`argv` in the words of a program whose flags are `own`, and by name the options that flags
    give to its student. `--flag true|false` becomes `--flag` or `--no-flag`."""
    words, options, rest = [], {}, list(argv)
    while rest:
        flag, separator, value = dashed(rest.pop(0)).partition("=")
        if flag == "--local-rank" and separator and "LOCAL_RANK" in os.environ:
            continue  # torch.distributed.launch and DeepSpeed say it in both ways
        flag = renamed(flag, own)
        is_option = flag not in own and flag in STUDENT_OPTIONS and "--student" in own
        is_switch = _is_switch(flag, own)
        if rest and not separator and (is_option or is_switch and rest[0].lower() in BOOLEANS):
            separator, value = "=", rest.pop(0)
        if is_option:
            options[STUDENT_OPTIONS[flag]] = value
        elif is_switch and (not separator or value.lower() in BOOLEANS):
            words += _switched(flag, value.lower() != "false", own)
        else:
            words.append(flag + separator + value)
    return words, options


def explain(flag: str, words: Sequence[str]) -> str:
    """' A sentence.' for a flag of another program that has no equal here; else an empty string.
    `words`: the whole command line."""
    if flag == "--eval":
        return f" Evaluation is a program of its own: {_eval_command(words)}."
    sentence = EXPLAINED.get(flag) or EXPLAINED.get(flag.replace("--no-", "--", 1))
    return f" {sentence}" if sentence else ""


def dashed(word: str) -> str:
    """A flag with dashes for underscores; any other word as it is."""
    if not word.startswith("--"):
        return word
    flag, separator, value = word.partition("=")
    return flag.replace("_", "-") + separator + value


def renamed(flag: str, own: Mapping[str, argparse.Action]) -> str:
    """What a program whose flags are `own` calls this one; `flag` itself where it has no other."""
    if flag in own:
        return flag
    return next((name for name in RENAMED.get(flag, ()) if name in own), flag)


def _is_switch(flag: str, own: Mapping[str, argparse.Action]) -> bool:
    if flag in own:
        return isinstance(own[flag], argparse.BooleanOptionalAction) and flag[:5] != "--no-"
    return any(on[0] in own for on, _ in SWITCHES.get(flag, ()))


def _switched(flag: str, is_on: bool, own: Mapping[str, argparse.Action]) -> list[str]:
    if flag in own:
        return [flag if is_on else f"--no-{flag[2:]}"]
    return next(on if is_on else off for on, off in SWITCHES[flag] if on[0] in own)


def _eval_command(words: Sequence[str]) -> str:
    command, kept = ["python", "eval.py"], False
    for word in words:
        if word.startswith("--"):
            flag, separator, value = word.partition("=")
            kept = flag in _OF_EVAL
            word = _OF_EVAL.get(flag, flag) + separator + value
        if kept:
            command.append(word)
    if len(command) == 2:
        command += ["--checkpoint", "FILE", "--data-path", "FOLDER"]
    return shlex.join(command)
