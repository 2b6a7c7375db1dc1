"""Arrays and records at addresses, so that a kernel takes one pointer for all its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype
from numba.core import types

from runtime.kernels.vectors import intrinsic


def _make_array(element: Any) -> Callable[..., Any]:
    array = types.Array(element, 1, "C")

    @intrinsic
    def at(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            made = context.make_array(array)(context, builder)
            made.data = builder.inttoptr(args[0], context.get_data_type(element).as_pointer())
            # No bound is checked; Numba adds the extent to a negative index, and 0 leaves it alone.
            made.shape = ir.Constant(ir.ArrayType(ir.IntType(64), 1), [0])
            return made._getvalue()

        return array(types.intp), codegen

    return at


bytes_at = _make_array(types.uint8)
int16_at = _make_array(types.int16)
int32_at = _make_array(types.int32)
intp_at = _make_array(types.intp)
float32_at = _make_array(types.float32)


def make_record(dtype: np.dtype[Any]) -> Callable[..., Any]:
    """A function for kernels that reads the record of a structured type at an address."""
    record = from_dtype(dtype)

    @intrinsic
    def at(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.intp), codegen

    return at


@intrinsic
def call_at(typingctx: Any, address: Any, arguments: Any, begin: Any, end: Any, slot: Any) -> Any:
    """Calls a native kernel, see ``runtime.kernels.native``."""
    number = ir.IntType(64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [number] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), list(args[1:]))

    return types.void(*(types.intp,) * 5), codegen


@intrinsic
def read_clock(typingctx: Any, function: Any, clock: Any, target: Any) -> Any:
    """Calls libc's ``clock_gettime`` at an address; the time goes to ``target`` as two int64, seconds and ns."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), ir.IntType(64)])
        call = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(call, [builder.trunc(args[1], ir.IntType(32)), args[2]])

    return types.void(*(types.intp,) * 3), codegen
