"""The names that pickles of tensors need: what they would make, as plain records.

Nothing here is a function of torch, and nothing calls one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Name:
    """A name that could be imported, and is not."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Table:
    """A dictionary, as pairs: nothing in it is compared or hashed."""

    pairs: list[tuple[object, object]]


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A record of the archive that tensors are views of."""

    kind: Name
    key: str
    num_elements: int
    """Of the numbers that `kind` says, or bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor: what it would have been made of, as it is written there."""

    storage: Storage
    offset: object
    shape: object
    strides: object
    dtype: Name | None
    """None: as the storage says."""


#: Kinds of storages, and of numbers, by the name that safetensors has for them.
STORAGES = {
    "torch.BFloat16Storage": "BF16",
    "torch.BoolStorage": "BOOL",
    "torch.ByteStorage": "U8",
    "torch.CharStorage": "I8",
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.ShortStorage": "I16",
}
DTYPES = {
    "torch.bfloat16": "BF16",
    "torch.bool": "BOOL",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.int8": "I8",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.uint8": "U8",
}
UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


def kind_of(value: object) -> str:
    """Return what a value is, in words."""
    kinds = {Table: "a dictionary", str: "text", View: "a tensor", Storage: "a storage"}
    return "None" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def shown(value: object) -> str:
    """Return how a message names a value, which may be anything, of any size."""
    text = str(value) if isinstance(value, Name | str) else kind_of(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def call(function: object, arguments: tuple[object, ...]) -> object:
    """Return what a call that a pickle describes would make.

    Raises
    ------
    ValueError
        If it is none of those that tensors need.
    """
    found = _CALLS.get(str(function)) if isinstance(function, Name) else None
    if found is None:
        raise ValueError(f"it calls {shown(function)}")
    made, counts = found
    if len(arguments) not in counts:
        raise ValueError(f"it calls {function} with {len(arguments)} arguments")
    return made(*arguments)


def _ordered_dict() -> Table:
    return Table([])


def _size(shape: object) -> object:
    return shape


def _tensor(storage: object, offset: object, shape: object, strides: object) -> View:
    return _view(storage, offset, shape, strides)


def _tensor_v2(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _requires_grad: object,
    _hooks: object,
    metadata: object = None,
) -> View:
    return _view(storage, offset, shape, strides, metadata=metadata)


def _tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _requires_grad: object,
    _hooks: object,
    dtype: object,
    metadata: object = None,
) -> View:
    if not isinstance(dtype, Name):
        raise ValueError("it makes a tensor of no dtype")  # noqa: TRY004 - the file is wrong
    return _view(storage, offset, shape, strides, dtype, metadata)


def _view(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    dtype: Name | None = None,
    metadata: object = None,
) -> View:
    if metadata is not None and not (isinstance(metadata, Table) and not metadata.pairs):
        raise ValueError(
            "it has a tensor whose numbers are to be negated or conjugated when they are read "
            "(resolve_neg() and resolve_conj() do it before)"
        )
    if not isinstance(storage, Storage):
        raise ValueError("it makes a tensor of no storage")  # noqa: TRY004 - the file is wrong
    return View(storage, offset, shape, strides, dtype)


def _parameter(
    tensor: object, _requires_grad: object, _hooks: object, _state: object = None
) -> View:
    if not isinstance(tensor, View):
        raise ValueError("it makes a parameter of no tensor")  # noqa: TRY004 - the file is wrong
    return tensor


def _from_type(function: object, kind: object, arguments: object, _state: object) -> View:
    is_tensor = isinstance(function, Name) and str(function) in _TENSORS
    if not is_tensor or not isinstance(kind, Name) or str(kind) not in _TENSOR_TYPES:
        raise ValueError(f"it has a {shown(kind)} made by {shown(function)}, no plain tensor")
    if not isinstance(arguments, tuple):
        raise ValueError("it makes a tensor of nothing")  # noqa: TRY004 - the file is wrong
    made = call(function, arguments)
    assert isinstance(made, View)
    return made


_TENSORS: dict[str, tuple[Callable[..., object], tuple[int, ...]]] = {
    "torch._utils._rebuild_tensor": (_tensor, (4,)),
    "torch._utils._rebuild_tensor_v2": (_tensor_v2, (6, 7)),
    "torch._utils._rebuild_tensor_v3": (_tensor_v3, (7, 8)),
    "torch._utils._rebuild_parameter": (_parameter, (3,)),
    "torch._utils._rebuild_parameter_with_state": (_parameter, (4,)),
}
#: What would be called, what is made instead, and of how many arguments.
_CALLS: dict[str, tuple[Callable[..., object], tuple[int, ...]]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": (_from_type, (4,)),
    "collections.OrderedDict": (_ordered_dict, (0,)),
    "torch.Size": (_size, (1,)),
}
KNOWN_NAMES = frozenset({*_CALLS, *_TENSOR_TYPES, *STORAGES, *UNTYPED, *DTYPES})
