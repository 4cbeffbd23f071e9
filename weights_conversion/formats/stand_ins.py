"""What stands in a loaded pickle for the tensors, storages and other objects that were pickled. They all are inert.

Tensors become StoredTensor, members of enumerations EnumMember, whatever else training leaves in a file Foreign.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}
# Numpy's random state and the like: needed by training only, kept as a name.
_OPAQUE = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("torch", "device"),
}
# Enumerations that training leaves in its args.
ENUMS = {
    ("megatron.model.enums", "AttnMaskType"),
    ("megatron.model.enums", "AttnType"),
    ("megatron.model.enums", "LayerType"),
    ("megatron.model.enums", "ModelType"),
    ("megatron.model.enums", "PositionEmbeddingType"),
    ("megatron.core.enums", "ModelType"),
    ("megatron.core.transformer.enums", "AttnBackend"),
    ("megatron.core.transformer.enums", "AttnMaskType"),
    ("megatron.core.transformer.enums", "AttnType"),
    ("megatron.core.transformer.enums", "LayerType"),
    ("megatron.core.transformer.enums", "ModelType"),
    ("signal", "Signals"),
}


@dataclass(frozen=True)
class Storage:
    """A `persistent_load` entry: the record `data/<key>` and its element type (None: untyped bytes)."""

    key: str
    dtype: torch.dtype | None
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a storage; `offset` and `stride` count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class EnumMember:
    """Stands for a member of an enumeration that lives in the training code."""

    enum: str
    value: object


class Foreign:
    """Stands for a class, a function, or what a pickle makes of one: its name, which is never imported nor called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: object) -> Foreign:
        first = args[0] if args else None  # of getattr, copyreg and the like: the class that is meant
        return Foreign(first.name if isinstance(first, Foreign) else self.name)

    def __setstate__(self, state: object) -> None:
        pass

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype | None


def _rebuild_tensor(
    storage: object, offset: object, size: object, stride: object, requires_grad: object = False, *_: object
) -> StoredTensor:
    if type(requires_grad) is not bool:
        raise pickle.UnpicklingError("a malformed tensor")
    return _stored(storage, getattr(storage, "dtype", None), offset, size, stride)


def _rebuild_tensor_v3(
    storage: object, offset: object, size: object, stride: object, requires_grad: object, hooks: object,
    dtype: object, *_: object,
) -> StoredTensor:  # fmt: skip
    return _stored(storage, dtype, offset, size, stride)


def _stored(storage: object, dtype: object, offset: object, size: object, stride: object) -> StoredTensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a malformed tensor")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > 64:
        raise pickle.UnpicklingError("a tensor with malformed sizes")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor with malformed sizes")
    return StoredTensor(storage, dtype, offset, size, stride)  # type: ignore[arg-type]


def _rebuild_parameter(data: object, *_: object) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise pickle.UnpicklingError("a parameter without a tensor")
    return data


def _rebuild_from_type(function: object, kind: object, arguments: object, *_: object) -> StoredTensor:
    """A tensor on which training (FSDP for one) has hung attributes, or a Parameter."""
    if function not in (_rebuild_tensor, _rebuild_tensor_v3, _rebuild_parameter) or kind not in _TENSOR_TYPES:
        raise pickle.UnpicklingError(f"a tensor of {getattr(kind, 'name', kind)!r}, where a plain one was expected")
    if not isinstance(arguments, tuple):
        raise pickle.UnpicklingError("a malformed tensor")
    return function(*arguments)  # type: ignore[operator]


_TENSOR, _PARAMETER = Foreign("torch.Tensor"), Foreign("torch.nn.parameter.Parameter")
_TENSOR_TYPES = (_TENSOR, _PARAMETER)


def _size(*values: Any) -> tuple:
    if values and not isinstance(values[0], (list, tuple)):  # whose copies are counted
        raise pickle.UnpicklingError("a malformed torch.Size")
    return tuple(values[0]) if values else ()


def storage_of(pid: Any) -> Storage:
    """A persistent entry."""
    kind, storage_type, key, _, numel, *view = pid  # a view of another storage, as torch before 0.4 knew them
    if kind != "storage" or view not in ([], [None]) or not isinstance(storage_type, _StorageType):
        raise pickle.UnpicklingError("an unknown persistent entry")
    if type(key) is not str or type(numel) is not int or numel < 0:
        raise pickle.UnpicklingError("a malformed storage")
    return Storage(key, storage_type.dtype, numel)


def member_of(owner: object, name: object, *_: object) -> EnumMember:
    """What Python 3.11.0 to 3.11.3 pickle as getattr(class of an enumeration, name). Nothing is looked up."""
    if type(name) is not str or name.startswith("_") or not callable(owner):
        raise pickle.UnpicklingError("getattr of what is no enumeration")
    return EnumMember(getattr(owner, "name", "an enumeration"), name)


# All that a checkpoint's pickle may name, with what stands for it (beside ENUMS, Namespace and OrderedDict).
GLOBALS: Mapping[tuple[str, str], Any] = {
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Tensor"): _TENSOR,
    ("torch.nn.parameter", "Parameter"): _PARAMETER,
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{(module, name): Foreign(f"{module}.{name}") for module, name in _OPAQUE},
}
