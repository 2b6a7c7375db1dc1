"""Arrays and records at addresses, so that a kernel takes one pointer for all its arguments."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype
from numba.core import cgutils, types

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


def _counter(builder: Any, address: Any, bits: int = 64) -> Any:
    return builder.inttoptr(address, ir.IntType(bits).as_pointer())


@intrinsic
def add_at(typingctx: Any, address: Any, number: Any) -> Any:
    """Adds to an int64 that other threads use too; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _counter(builder, args[0]), args[1], "seq_cst")

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def swap_at(typingctx: Any, address: Any, number: Any) -> Any:
    """Replaces an int64 that other threads use too; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _counter(builder, args[0]), args[1], "seq_cst")

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def swap_byte_at(typingctx: Any, address: Any, number: Any) -> Any:
    """Replaces a byte that other threads use too; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = builder.trunc(args[1], ir.IntType(8))
        was = builder.atomic_rmw("xchg", _counter(builder, args[0], 8), byte, "seq_cst")
        return builder.zext(was, ir.IntType(64))

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def compare_swap_at(typingctx: Any, address: Any, expected: Any, number: Any) -> Any:
    """Replaces an int64 that other threads use too, if it is what is expected; returns whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(_counter(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.intp, types.intp, types.intp), codegen


@intrinsic
def load_at(typingctx: Any, address: Any) -> Any:
    """An int64 that other threads use too; what they wrote before changing it is seen after it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_counter(builder, args[0]), "seq_cst", 8)

    return types.intp(types.intp), codegen


_PAUSES = {  # LLVM's intrinsic and its arguments
    "x86_64": ("llvm.x86.sse2.pause", ()),
    "amd64": ("llvm.x86.sse2.pause", ()),
    "aarch64": ("llvm.aarch64.hint", (1,)),  # yield
    "arm64": ("llvm.aarch64.hint", (1,)),
}


@intrinsic
def pause(typingctx: Any) -> Any:
    """Passes a moment in a loop that waits for another thread, where the processor has an instruction for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = _PAUSES.get(platform.machine().lower())
        if found is not None:
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [number] * len(found[1]))
            function = cgutils.get_or_insert_function(builder.module, kind, found[0])
            builder.call(function, [number(value) for value in found[1]])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_plain(typingctx: Any, function: Any) -> Any:
    """Calls ``int function(void)`` at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])

    return types.void(types.intp), codegen
