"""Calls the program of main.cpp: one ggml operation on the emulated Metal device, numpy in, numpy out."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
OPERATIONS = {"mul_mat": 0, "mul_mat_id": 1, "get_rows": 2, "dequantize": 3, "cpy": 4}
GGML_TYPES = {"float32": 0, "float16": 1, "int32": 26}


@dataclass(frozen=True)
class Quantized:
    """Packed blocks: uint8 [..., rows, bytes] with ggml's number of the type and the columns of a row."""

    type_id: int
    columns: int
    data: npt.NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-1], self.columns)


Operand = Quantized | npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.int32]


class Unsupported(Exception):
    """The device's supports_op declined: ggml would run the operation elsewhere."""


@dataclass(frozen=True)
class Result:
    """What an operation gave, flat, and the host names of the kernels that computed it."""

    values: F32
    kernels: tuple[str, ...]


def _describe(operand: Operand) -> tuple[list[int], bytes]:
    sizes = [1] * (4 - len(operand.shape)) + list(operand.shape)
    if isinstance(operand, Quantized):
        return [operand.type_id, *reversed(sizes)], operand.data.tobytes()
    return [GGML_TYPES[operand.dtype.name], *reversed(sizes)], operand.tobytes()


class Emulator:
    """The program; every call is a process of its own, so that a kernel that crashes fails one test."""

    def __init__(self, program: Path) -> None:
        self.program = program

    def run(self, operation: str, *operands: Operand) -> Result:
        """Run an operation.

        Raises:
            Unsupported: the device declines it.
            RuntimeError: it crashed, or ggml aborted; the message is the program's.
        """
        described = [_describe(operand) for operand in operands]
        numbers = [OPERATIONS[operation], *(n for sizes, _ in described for n in sizes), *[0] * 5 * (3 - len(operands))]
        request = np.array(numbers, np.int64).tobytes() + b"".join(data for _, data in described)
        done = subprocess.run([self.program], input=request, capture_output=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}")
        line, _, values = done.stdout.partition(b"\n")
        if line == b"unsupported":
            raise Unsupported(operation)
        return Result(np.frombuffer(values, np.float32), tuple(line.decode().split()))

    def dequantize(self, weights: Quantized) -> F32:
        """float32 [..., rows, columns] as ggml's portable C code dequantizes."""
        return self.run("dequantize", weights).values.reshape(weights.shape)
