"""What files of other programs hold beside tensors, read without running any of their code.

PyTorch's restricted reader makes an object only of a class or function that it was given a name
for. For each name here it is given a stand-in of ours, so that nothing of numpy, pathlib or a
program's own modules is imported or called, and nothing of such a value is kept.
"""
import argparse
import re
from collections import OrderedDict
from collections.abc import Callable


class LeftOut:
    """Stands where a file had a value of a class that holds data only."""

    def __new__(cls, *args: object) -> "LeftOut":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _dict(*args: object) -> OrderedDict:
    """The reader then fills in the items."""
    return OrderedDict()


def _list(*args: object) -> list:
    return []


_BY_MODULE = {
    "argparse": "Namespace",
    "builtins": "bool bytes dict float frozenset int list range slice str tuple",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "numpy": "dtype ndarray bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 "
             "float32 float64 str_ bytes_ datetime64 timedelta64",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.dtypes": "BoolDType Int8DType Int16DType Int32DType Int64DType UInt8DType UInt16DType "
                    "UInt32DType UInt64DType Float16DType Float32DType Float64DType StrDType "
                    "BytesDType DateTime64DType TimeDelta64DType",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode StringNode",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "torch.torch_version": "TorchVersion",
    "types": "SimpleNamespace",
    "typing": "Any",
    "uuid": "UUID SafeUUID",
}
# Kinds of dict and list, whose items the reader puts into these two alone.
_CONTAINERS: dict[str, Callable] = {
    "collections.defaultdict": _dict, "collections.deque": _list,
    "yacs.config.CfgNode": OrderedDict, "easydict.EasyDict": OrderedDict,
    "addict.addict.Dict": OrderedDict,
    "mmengine.config.config.ConfigDict": OrderedDict, "mmcv.utils.config.ConfigDict": OrderedDict}

HARMLESS: list[tuple[Callable, str]] = [
    *[(LeftOut, f"{module}.{name}") for module, names in _BY_MODULE.items()
      for name in names.split() if (module, name) != ("argparse", "Namespace")],
    (argparse.Namespace, "argparse.Namespace"),  # of published checkpoints
    *[(stand_in, name) for name, stand_in in _CONTAINERS.items()]]


def refused_global(error: Exception) -> str | None:
    """The class or function that PyTorch's reader says it refused; None where it names none."""
    found = re.search(r"GLOBAL ([\w.]+\w)", str(error))
    return found[1] if found else None
