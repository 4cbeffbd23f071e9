"""Reads the pickle inside a torch file without torch, without its data, and without running anything it names.

Stricter than `torch.load(weights_only=True)`: every global on the list below becomes an inert stand-in (a tensor
becomes a `StoredTensor`, its place in the file), so nothing is imported, called or allocated on a file's behalf.
Anything else is refused by name.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from typing import Any

import torch

from weights_conversion.config import ConversionError

MAX_PICKLE_BYTES = 1 << 30

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
# Numpy's random state and the like: needed by training only, kept as an object that holds nothing.
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
_ENUMS = {
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


class _Opaque:
    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype | None


def _rebuild_tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_: object) -> StoredTensor:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise pickle.UnpicklingError("a tensor without a typed storage")
    return _stored(storage, storage.dtype, offset, size, stride)


def _rebuild_tensor_v3(
    storage: Storage, offset: int, size: tuple, stride: tuple, requires_grad: object, hooks: object,
    dtype: torch.dtype, *_: object,
) -> StoredTensor:  # fmt: skip
    return _stored(storage, dtype, offset, size, stride)


def _stored(storage: Storage, dtype: object, offset: object, size: object, stride: object) -> StoredTensor:
    if not isinstance(dtype, torch.dtype) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise pickle.UnpicklingError("a malformed tensor")
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor with malformed sizes")
    return StoredTensor(storage, dtype, int(offset), size, stride)  # type: ignore[arg-type]


def _rebuild_parameter(data: StoredTensor, *_: object) -> StoredTensor:
    return data


def _same(*values: object) -> tuple:
    return tuple(values[0]) if values else ()  # type: ignore[call-overload]


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._where = where
        # Classes of its own, so that no file can touch a shared one. torch hangs `_metadata` on an OrderedDict.
        arguments, ordered = type("Arguments", (), {}), type("OrderedDict", (dict,), {})
        self._allowed: dict[tuple[str, str], Any] = {
            ("argparse", "Namespace"): arguments,
            ("collections", "OrderedDict"): ordered,
            ("torch", "Size"): _same,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("torch.storage", "UntypedStorage"): _StorageType(None),
            **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
            **{("torch", name): dtype for name, dtype in _DTYPES.items()},
            **dict.fromkeys(_OPAQUE, _Opaque),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        if (module, name) in _ENUMS:
            return lambda value=None, *_: EnumMember(name, value)
        raise ConversionError(
            f"{self._where} asks for {module}.{name}, which no checkpoint of these models needs: it was not loaded; "
            "re-save the file without it if you trust where it comes from"
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _, numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("an unknown persistent entry")
        if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError("a malformed storage")
        return Storage(key, storage_type.dtype, numel)


def load(data: bytes, where: str) -> Any:
    """The object in a pickle, tensors as StoredTensor and Namespaces as plain objects. Errors name `where`."""
    try:
        _check_lengths(data)
        return _Unpickler(data, where).load()
    except ConversionError:
        raise
    except RecursionError as error:
        raise ConversionError(f"{where} is nested too deeply to be a checkpoint") from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise ConversionError(f"{where} holds a damaged pickle ({type(error).__name__}: {error})") from error


def _check_lengths(data: bytes) -> None:
    """Refuses opcodes that would make the unpickler allocate more than the file holds."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError("a memo index beyond the end of the pickle")
