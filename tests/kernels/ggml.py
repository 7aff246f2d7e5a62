"""Call functions of ggml's shared libraries with numpy arrays instead of pointers."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d2q_edge.formats.tensor_types import D2Q2, D2Q3, TensorType

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
VEC_DOT = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_float),
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
)
FROM_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", FROM_FLOAT),
        ("from_float_ref", FROM_FLOAT),
    )


class CpuTraits(ctypes.Structure):
    """struct ggml_type_traits_cpu of ggml-cpu.h."""

    _fields_ = (
        ("from_float", FROM_FLOAT),
        ("vec_dot", VEC_DOT),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


def address(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    """Return a pointer to a contiguous array's data."""
    if not array.flags.c_contiguous:
        raise ValueError("not contiguous")
    return array.ctypes.data_as(ctypes.c_void_p)


def activation_type(t: TensorType) -> str:
    """Return the name of the 8-bit type of the other operand of `t`'s dot product, with blocks of 256 or 32."""
    return "q8_K" if t in (D2Q2, D2Q3) else "q8_0"


class Ggml:
    """libggml-base and libggml-cpu of one build."""

    def __init__(self, directory: Path) -> None:
        self.base = ctypes.CDLL(str(directory / f"libggml-base{SUFFIX}"))
        self.cpu = ctypes.CDLL(str(directory / f"libggml-cpu{SUFFIX}"))
        self.base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.base.ggml_type_name.restype = ctypes.c_char_p
        self.base.ggml_row_size.restype = ctypes.c_size_t
        self.base.ggml_d2q_table_sha256.restype = ctypes.c_char_p
        self.base.ggml_validate_row_data.restype = ctypes.c_bool
        self.base.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        self.base.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
        self.cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(CpuTraits)
        self.cpu.ggml_cpu_init()

    def traits(self, type_id: int) -> TypeTraits:
        return self.base.ggml_get_type_traits(type_id).contents  # type: ignore[no-any-return]

    def cpu_traits(self, type_id: int) -> CpuTraits:
        return self.cpu.ggml_get_type_traits_cpu(type_id).contents  # type: ignore[no-any-return]

    def dequantize(self, t: TensorType, packed: U8) -> F32:
        """Dequantize packed rows to float32 [rows, columns]."""
        columns = packed.shape[1] // t.type_size * t.block_size
        out = np.full((len(packed), columns), np.nan, np.float32)
        self.traits(t.id).to_float(address(packed), address(out), out.size)
        return out

    def quantize(self, t: TensorType, weights: F32, importance: F32 | None = None) -> U8:
        """Pack float32 [rows, columns] with the reference encoder."""
        rows, columns = weights.shape
        out = np.zeros((rows, t.row_bytes(columns)), np.uint8)
        written = self.base.ggml_quantize_chunk(
            t.id,
            address(weights),
            address(out),
            ctypes.c_int64(0),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            None if importance is None else address(importance),
        )
        if written != out.size:
            raise ValueError(f"{written} bytes written, {out.size} expected")
        return out

    def validate(self, t: TensorType, packed: U8) -> bool:
        return bool(self.base.ggml_validate_row_data(t.id, address(packed), ctypes.c_size_t(packed.size)))

    def activations(self, t: TensorType, x: F32) -> tuple[U8, F32]:
        """Quantize x for the dot product of `t` with the CPU backend; return the bytes and the dequantized values."""
        name = activation_type(t)
        size = self.base.ggml_row_size(self.cpu_traits(t.id).vec_dot_type, ctypes.c_int64(x.size))
        packed = np.zeros(size, np.uint8)
        self.cpu_traits(self.cpu_traits(t.id).vec_dot_type).from_float(address(x), address(packed), x.size)
        values = np.empty_like(x)
        getattr(self.base, f"dequantize_row_{name}")(address(packed), address(values), ctypes.c_int64(x.size))
        return packed, values

    def vec_dot(self, t: TensorType, columns: int, row: U8, activations: U8, generic: bool = False) -> float:
        """Compute a dot product with the CPU backend's function, or with the portable one."""
        result = ctypes.c_float(float("nan"))
        name = f"ggml_vec_dot_{t.name}_{activation_type(t)}_generic"
        function = VEC_DOT((name, self.cpu)) if generic else self.cpu_traits(t.id).vec_dot
        function(columns, ctypes.byref(result), 0, address(row), 0, address(activations), 0, 1)
        return result.value
