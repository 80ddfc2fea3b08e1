"""Weights from files and addresses: read safely, loaded strictly, classes matched by their names.

A network, the file of its weights and the data may each have classes of their own. A teacher's
outputs become the data's classes; a student's classifier starts anew where the file's classes are
others; under `--model` the network stays as its file has it.
"""
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from models.base import MODELS, VisionModel, model_from_spec
from models.published import PUBLISHED, local_file, published_source
from models.state_dicts import (
    State,
    check_finite,
    check_ordinary,
    classifier_entries,
    describe_difference,
    find_state,
    fitted,
    without_computed,
)
from utils.checkpoint import check_settings, load_file
from utils.classes import imagenet_wnids, match, shortened
from utils.content import is_list_of_words
from utils.distributed import barrier, is_first_here
from utils.log import print_once
from utils.registry import UserError, parse_spec


class Weights(NamedTuple):
    """What a file says of a network."""

    state: State  # under the file's names
    path: str | Path  # where it came from
    classes: list[str] | None = None  # by label; None: it does not name them
    spec: list[str] | None = None  # NAME key=value ... of the run that trained it
    is_published: bool = False  # so the model knows all about them


class Trained(NamedTuple):
    model: VisionModel
    settings: dict[str, Any]  # of the run, as args.yaml has them
    classes: list[str] | None  # names by label; None in files written before these were kept

    def preprocessing(self, input_size: int | None = None) -> dict[str, Any]:
        """Arguments of data.eval_transform: as the run evaluated; of weights without a run as their
        publisher did, at the size at which that is known. `input_size`: None for theirs."""
        size = input_size or self.settings.get("input_size") or self.model.input_size
        if self.settings:
            return {"input_size": size, "crop_pct": self.settings.get("crop_pct"),
                    "interpolation": self.settings.get("interpolation", "bicubic")}
        resize = self.model.input_resize if size == self.model.input_size else None
        return {"input_size": size, "resize": resize, "interpolation": self.model.input_filter}


def check_source(checkpoint: Path | None, model: list[str] | None, weights: str | None, *,
                 names_classes: bool) -> None:
    """Raises UserError unless a command line names one network: --checkpoint, which knows its
    classes, or --model with --weights."""
    if (checkpoint is None) == (model is None):
        raise UserError("give either --checkpoint FILE, or --model NAME with --weights SOURCE.")
    if model and not weights:
        raise UserError("--model needs --weights: a path, a URL, or the word published.")
    if checkpoint and (weights or names_classes):
        raise UserError("--checkpoint knows its weights and classes; leave out --weights and "
                        "--num-classes, or use --model NAME --weights FILE.")


def load_trained(path: Path, key: str | None = None) -> Trained:
    """The network with its weights, and what the file says of them. `key`: see `read_weights`."""
    content = load_file(path)
    settings = content.get("args")
    if not isinstance(settings, dict) or not is_list_of_words(settings.get("student")):
        raise UserError(f"{path} does not say which model it holds; that is known only of the "
                        "checkpoints of train_kd.py. Use --model NAME --weights FILE instead.")
    check_settings(settings, path)
    model = model_from_spec(settings["student"], "--student", settings.get("num_classes"))
    _load(model, read_weights(path, key, content=content))
    return Trained(model, settings, model.classes)


def load_named(spec: list[str], source: str, key: str | None, num_classes: int, *,
               flag: str = "--model") -> VisionModel:
    """The network of `num_classes` that `{flag} NAME key=value ...` names, with the weights that
    --weights names as they are: a path, an address, `published` or `random`."""
    model = _build(spec, flag, num_classes, source)
    with _naming("--weights"):
        weights = _obtain(model, spec, source, key, "--weights")
        if weights is not None:
            _load(model, weights, spec)
    return model


def load_student(spec: list[str], source: str, key: str | None, classes: Sequence[str], *,
                 dry_run: bool = False) -> VisionModel:
    """The network that `--student` names, to train on `classes`, with the weights that
    --student-weights names. The rows of its classifier are the file's, by name, where the file has
    the same classes in any order; else the classifier keeps its random start, and that is said.

    In a dry run it is enough that published weights have an address."""
    if len(classes) < 2:
        raise UserError(f"the data has one class only ({shortened(classes)}), of which there is "
                        "nothing to learn. Give each class a folder or label of its own.")
    model = _build(spec, "--student", len(classes), source)
    if model.num_classes != len(classes):
        raise UserError(f"--student {' '.join(spec)} gives {model.num_classes} logits, and the "
                        f"data has {len(classes)} classes. Give its function a parameter "
                        "num_classes.")
    with _naming("--student-weights"):
        weights = _obtain(model, spec, source, key, "--student-weights", dry_run)
        if weights is not None:
            state, number = _fit(model, weights)
            state |= _student_rows(model, weights, state, number, classes)
            _load_fitted(model, state, weights, spec)
    model.classes = list(classes)
    return model


def _student_rows(model: VisionModel, weights: Weights, state: State, number: int,
                  classes: Sequence[str]) -> State:
    """What takes the place of the classifiers' entries in `state`, which are for `number` classes:
    nothing where they are the data's `classes` already."""
    own = classifier_entries(model)
    try:
        labels = match(weights.classes, number, classes) if number == len(classes) else None
    except UserError:
        labels = None
    if labels is None:
        print_once(f"student: its classifier starts anew for the data's {len(classes)} classes; "
                   f"those of {weights.path} are {number or 'none'}"
                   f"{number and ' others' or ''}")
        return own
    if labels == list(range(number)):
        return {}
    print_once(f"student: the {number} rows of its classifier are put into the data's order, "
               f"matched by name ({classes[0]} was class {labels[0]})")
    return {name: state[name][labels] for name in own}


def load_teacher(spec: list[str], source: str, key: str | None, classes: Sequence[str], *,
                 needs_logits: bool = True, dry_run: bool = False) -> VisionModel:
    """The network that `--teacher` names with the weights that --teacher-weights names, its classes
    made the data's; see `match_teacher`."""
    model = _build(spec, "--teacher", len(classes), source)
    with _naming("--teacher-weights"):
        weights = _obtain(model, spec, source, key, "--teacher-weights", dry_run)
        if weights is not None:
            state, number = _fit(model, weights)
            if number not in (0, model.num_classes):
                model = _build(spec, "--teacher", number, source)
            if number == 0 < model.num_classes:
                state |= classifier_entries(model)  # never asked
                model.num_classes = number
            _load_fitted(model, state, weights, spec)
        elif source == "published":  # in a dry run
            known = model.published_classes if model.is_of_library else imagenet_wnids()
            if known == []:
                model.num_classes = 0
            elif known is not None:
                model = _build(spec, "--teacher", len(known), source)
                model.classes = known
        elif model.classes is None and model.num_classes == len(classes):
            model.classes = list(classes)  # random weights take any
        match_teacher(model, classes, spec, source, needs_logits=needs_logits)
    return model


def match_teacher(model: VisionModel, classes: Sequence[str], spec: Sequence[str], source: str, *,
                  needs_logits: bool) -> None:
    """Put the classes of a teacher into the order of the data's `classes`, by name, and cut off all
    others. One that lacks some becomes a teacher without logits (0 classes) where no loss needs
    them. Raises UserError where one does."""
    if model.num_classes == 0:
        if needs_logits:
            raise UserError(f"{' '.join(spec)} with the weights {source} has no classifier, and a "
                            "loss needs its logits. Let its feature maps alone teach, with "
                            "--loss ce --loss fd.")
        return
    try:
        labels = match(model.classes, model.num_classes, classes)
    except UserError as error:
        if not needs_logits:
            print_once(f"teacher: {source} {error}; its feature maps alone teach")
            model.num_classes, model.classes = 0, None
            return
        raise UserError(
            f"{source} {error}. Classes are matched by name. Train the teacher on this data first, "
            f"python train_kd.py --teacher none --student {' '.join(spec)} --student-weights "
            f"{source} --data-path ..., and name the checkpoint-best.pth of that run; or let its "
            "feature maps alone teach, with --loss ce --loss fd.") from None
    if len(labels) < model.num_classes:
        print_once(f"teacher: of its {model.num_classes} classes the data's {len(labels)} are "
                   f"kept, matched by name ({classes[0]} was its class {labels[0]})")
    elif labels != list(range(len(labels))):
        print_once(f"teacher: its {len(labels)} classes are put into the data's order, matched by "
                   f"name ({classes[0]} was its class {labels[0]})")
    elif model.classes is None and not set(classes) <= set(imagenet_wnids()):
        print_once("teacher: its weights do not name their classes: its class k is taken for the "
                   f"data's class k ({shortened(classes)})")
    if labels != list(range(model.num_classes)):
        model.keep_classes(labels)
    model.classes = list(classes)


def load_weights(model: VisionModel, source: str | Path, key: str | None = None) -> None:
    """Load a file or an address strictly into `model`, and say which of its weights; `key`: see
    `read_weights`. Raises UserError with what is missing, unexpected or of another shape, and for
    NaN; the model is then as it was."""
    _load(model, read_weights(local_file(source), key))


def read_weights(path: Path, key: str | None = None, *, key_flag: str = "--weights-key",
                 content: dict[str, Any] | None = None) -> Weights:
    """The state dict in a file (`content`, where that was read before) and what is said of it. Runs
    no code from the file.

    `key` names the dict to take (`model`, `model_ema`, ...); by default that which published files
    have, or the only one; of a checkpoint-best-ema.pth the average, which was chosen for it."""
    if content is None:
        content = load_file(path)
    key, state = find_state(content, Path(path), key, key_flag)
    print_once(f"weights: {path}{key and f', {key}'}")
    check_ordinary(state, path)
    settings, classes = content.get("args"), content.get("classes")
    spec = settings.get("student") if isinstance(settings, dict) else None
    return Weights(state, path, classes if is_list_of_words(classes) else None,
                   spec if is_list_of_words(spec) else None)


@contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Begin the sentence of a UserError with the flag that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def _build(spec: list[str], flag: str, num_classes: int, source: str) -> VisionModel:
    """The network that `flag` names, of random weights; of published ones it knows how they were
    evaluated."""
    model = model_from_spec(spec, flag, num_classes)
    known = PUBLISHED.get(MODELS.resolve(spec[0]))
    if known and known.is_named(source) and known.size == model.input_size:
        model.input_resize, model.input_filter = known.resize, known.interpolation
    return model


def _obtain(model: VisionModel, spec: list[str], source: str, key: str | None, flag: str,
            dry_run: bool = False) -> Weights | None:
    """The weights that `flag` names for the model of `spec`; None for those that it has. One
    process of a machine downloads."""
    if source == "random":
        return None
    is_published = source == "published"
    address = source
    if is_published:
        address = (f"of {spec[0]} itself" if model.is_of_library else
                   published_source(MODELS.resolve(spec[0])))
    if dry_run and is_published:
        print_once(f"{flag} published: {address}, not fetched in a dry run")
        return None
    if is_published and model.is_of_library:
        return _from_library(model, spec)
    if is_first_here():
        local_file(address)
    barrier()
    weights = read_weights(local_file(address), key, key_flag=f"{flag}-key")
    if is_published:
        return weights._replace(path=address, classes=imagenet_wnids(), is_published=True)
    return weights._replace(path=address)


def _from_library(model: VisionModel, spec: list[str]) -> Weights:
    """What the library of a network publishes for it. One process of a machine downloads first."""
    state = model.published_state() if is_first_here() else None
    barrier()
    state = state or model.published_state()
    path = f"{' '.join(spec)}, published"
    print_once(f"weights: {path}")
    return Weights(state, path, model.published_classes or None, is_published=True)


def _load(model: VisionModel, weights: Weights, spec: Sequence[str] | None = None) -> None:
    state, number = _fit(model, weights)
    if number != model.num_classes:
        raise _does_not_fit(model, weights, state, number)
    _load_fitted(model, state, weights, spec)


def _fit(model: VisionModel, weights: Weights) -> tuple[State, int]:
    """See `fitted`. Raises UserError, too, where the file names another number of classes."""
    state, number = fitted(model, weights.state, weights.path)
    names = weights.classes
    if names is not None and number and not len(names) == len(set(names)) == number:
        raise UserError(f"{weights.path} names {len(set(names))} classes, and its classifier has "
                        f"{number}. Use another copy of the file.")
    return state, number


def _does_not_fit(model: VisionModel, weights: Weights, state: State, number: int) -> UserError:
    difference = describe_difference(without_computed(state), without_computed(model.state_dict()))
    return UserError(f"{weights.path} does not fit {type(model).__name__}: {difference} The file "
                     f"is for {number} classes, the model has {model.num_classes} (--num-classes "
                     "says how many).")


def _load_fitted(model: VisionModel, state: State, weights: Weights,
                 spec: Sequence[str] | None) -> None:
    """`state`: what `fitted` gave, for the model's own number of classes. `spec`: what the user
    called the model; None: the file did."""
    check_finite(without_computed(state), weights.path)
    if spec is not None:
        _check_function(spec, weights)
        _check_input(model, weights)
    own = model.state_dict()
    wanted = without_computed(own)
    counts = {name: value for name, value in state.items() if name in own
              and name.endswith("num_batches_tracked") and value.shape == own[name].shape}
    model.load_state_dict({**{name: state[name] for name in wanted}, **counts}, strict=False)
    if weights.classes is not None and len(weights.classes) == model.num_classes:
        model.classes = weights.classes


# Options that change how a network starts or trains, or what it is given, not what it computes.
NO_FUNCTION = frozenset({"num_classes", "drop_path", "dropout", "head_init_scale", "input_size",
                         "layer_scale_init", "zero_init_residual", "image_size",
                         "published_scale"})


def _check_function(spec: Sequence[str], weights: Weights) -> None:
    """Raises UserError where a run of this project trained the weights in another network of the
    same shapes: with other heads, another eps or another normalisation of its input."""
    if weights.spec is None:
        return
    here, there = _settings_of(spec), _settings_of(weights.spec)
    if here["network"] is not there["network"]:
        return
    different = sorted(name for name in here.keys() | there.keys()
                       if here.get(name) != there.get(name))
    if different:
        raise UserError(f"{weights.path} was trained as `{' '.join(weights.spec)}`, which has "
                        f"another {different[0]} than `{' '.join(spec)}`. Name it as it was.")


def _settings_of(spec: Sequence[str]) -> dict[str, Any]:
    """What a network computes depends on, by the names of its options."""
    name, options = parse_spec(spec, "--model")
    settings = {**MODELS.defaults(name), **options, "network": MODELS.builder(name)}
    return {key: list(value) if isinstance(value, tuple) else value
            for key, value in settings.items() if key not in NO_FUNCTION}


def _check_input(model: VisionModel, weights: Weights) -> None:
    """Raises UserError where the config.json beside a file of timm's or transformers' says that its
    weights take images normalised otherwise. Of other programs' files nothing says it: the
    normalisation is printed."""
    said = _said_beside(Path(weights.path))
    if said is not None:
        stats = [*said.mean, *said.std]
        own = [*model.input_mean, *model.input_std]
        if any(abs(there - here) > 1e-3 for there, here in zip(stats, own)):
            raise UserError(f"{weights.path}: the {said.file} beside it says that it takes images "
                            f"normalised with {described_input(*said[:2])}, and here they are with "
                            f"{described_input(model.input_mean, model.input_std)}. Add its "
                            "options to the model.")
    elif weights.spec is None and not weights.is_published:
        print_once(f"images for {Path(weights.path).name} are normalised with "
                   f"{described_input(model.input_mean, model.input_std)}; these are options of "
                   "the model, should its weights expect others")


def described_input(mean: Sequence[float], std: Sequence[float]) -> str:
    """As options of a model: input_mean=0.5,0.5,0.5 input_std=0.5,0.5,0.5."""
    return " ".join(f"{name}={','.join(f'{value:g}' for value in values)}"
                    for name, values in (("input_mean", mean), ("input_std", std)))


class InputBeside(NamedTuple):
    mean: list[float]
    std: list[float]
    file: str


def _said_beside(path: Path) -> InputBeside | None:
    """The normalisation in the files that the Hugging Face hub keeps beside its weights; None where
    there is none. (timm: config.json; transformers: preprocessor_config.json.)"""
    if path.stem not in ("model", "pytorch_model"):
        return None
    for file, section, mean, std in (("config.json", "pretrained_cfg", "mean", "std"),
                                     ("config.json", None, "mean", "std"),
                                     ("preprocessor_config.json", None, "image_mean", "image_std")):
        try:
            content = json.loads((path.parent / file).read_text())
            content = content[section] if section else content
            found = InputBeside([float(value) for value in content[mean]],
                                [float(value) for value in content[std]], file)
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if len(found.mean) == len(found.std) == 3:
            return found
    return None
