"""Model-local functions: each operator of ``io.bitbybit`` in standard operators.

A stock ONNX runtime inlines these bodies; what depends on initializers alone (unpacked weights,
projections cut in tiles) it computes once, at load.  docs/operators.md is the definition.
The bodies of the integer operators are in ``compiler.integer_functions``.
"""

from __future__ import annotations

from functools import cache

from onnx import FunctionProto, parser

from compiler import integer_functions
from runtime.opset import (
    DOMAIN,
    LSH_CONV,
    LSH_CONV_ADD,
    LSH_CONV_ADD_INTEGER,
    LSH_CONV_INTEGER,
    LSH_ENCODE,
    LSH_ENCODE_INTEGER,
    ONNX_OPSET,
)

# Arithmetic is float64, as docs/operators.md demands; codes and their distances are whole numbers and
# exact in float32.  Windows are gathered by one index for each (ky, kx, y, x).
_WINDOW_INDEX = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  zero_vector = Constant <value_ints = [0]> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  stride = Constant <value_ints: ints = @strides> ()
  dilation = Constant <value_ints: ints = @dilations> ()
  kernel_less_one = Sub (kernel, one)
  reach = Mul (dilation, kernel_less_one)
  room = Sub (size, reach)
  room_less_one = Sub (room, one)
  steps = Div (room_less_one, stride)
  out_size = Add (steps, one)
  positions = ReduceProd <keepdims = 1> (out_size)
  kernel_y = Gather (kernel, zero)
  kernel_x = Gather (kernel, one)
  out_y = Gather (out_size, zero)
  out_x = Gather (out_size, one)
  stride_y = Gather (stride, zero)
  stride_x = Gather (stride, one)
  dilation_y = Gather (dilation, zero)
  dilation_x = Gather (dilation, one)
  width = Gather (size, one)
  ky = Range (zero, kernel_y, one)
  kx = Range (zero, kernel_x, one)
  y = Range (zero, out_y, one)
  x = Range (zero, out_x, one)
  ky_rows = Mul (ky, dilation_y)
  kx_columns = Mul (kx, dilation_x)
  y_rows = Mul (y, stride_y)
  x_columns = Mul (x, stride_x)
  ky_axes = Constant <value_ints = [1, 2, 3]> ()
  kx_axes = Constant <value_ints = [1, 2]> ()
  ky_grid = Unsqueeze (ky_rows, ky_axes)
  kx_grid = Unsqueeze (kx_columns, kx_axes)
  y_grid = Unsqueeze (y_rows, axis_1)
  row = Add (ky_grid, y_grid)
  column = Add (kx_grid, x_columns)
  row_start = Mul (row, width)
  pixel_index = Add (row_start, column)
"""

# A float32 sum of distinct powers of two below 256 is exact, so packing is a product.
_ENCODE = """
<domain: "%(domain)s", opset_import: ["" : %(opset)d]>
LshEncode <kernel_shape, strides, dilations, pads, tile_size> (X, projection, centre) => (codes, norms)
{
  spatial = Constant <value_ints = [2, 3]> ()
  pad_sizes = Constant <value_ints: ints = @pads> ()
  padded = Pad (X, pad_sizes, , spatial)
  per_channel = Constant <value_ints = [-1, 1, 1]> ()
  centre_pixel = Reshape (centre, per_channel)
  image = Sub (padded, centre_pixel)
  kernel = Constant <value_ints: ints = @kernel_shape> ()
  size = Shape <start = 2, end = 4> (image)
%(window_index)s
  join_pixels = Constant <value_ints = [0, 0, -1]> ()
  pixels = Reshape (image, join_pixels)
  taken = Gather <axis = 2> (pixels, pixel_index)
  join = Constant <value_ints = [0, -1]> ()
  window_shape = Concat <axis = 0> (join, positions)
  windows = Reshape (taken, window_shape)

  tile = Constant <value_int: int = @tile_size> ()
  tile_vector = Unsqueeze (tile, axis_0)
  features = Shape <start = 1, end = 2> (projection)
  features_and_tile = Add (features, tile_vector)
  features_rounded = Sub (features_and_tile, one)
  tiles = Div (features_rounded, tile_vector)
  features_full = Mul (tiles, tile_vector)
  features_short = Sub (features_full, features)
  fill = Concat <axis = 0> (zero_vector, features_short)
  windows_full = Pad (windows, fill, , axis_1)
  projection_full = Pad (projection, fill, , axis_1)
  projection_shape = Concat <axis = 0> (join, tile_vector)
  projection_tiles = Reshape (projection_full, projection_shape)
  projection_order = Transpose <perm = [1, 0, 2]> (projection_tiles)
  P = Cast <to = 11> (projection_order)
  v_shape = Concat <axis = 0> (zero_vector, tiles, tile_vector, positions)
  v_float = Reshape (windows_full, v_shape)
  v = Cast <to = 11> (v_float)

  squares = Mul (v, v)
  energy = ReduceSum <keepdims = 0> (squares, axis_2)
  lengths = Sqrt (energy)
  lengths_float = Cast <to = 1> (lengths)
  lengths_last = Transpose <perm = [0, 2, 1]> (lengths_float)
  norms_shape = Concat <axis = 0> (zero_vector, out_size, tiles)
  norms = Reshape (lengths_last, norms_shape)

  z = MatMul (P, v)
  threshold = Constant <value = double {0.0}> ()
  is_positive = GreaterOrEqual (z, threshold)
  bits = Cast <to = 1> (is_positive)
  seven = Constant <value_int = 7> ()
  eight = Constant <value_int = 8> ()
  powers = Constant <value_floats = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]> ()
  no_power = Constant <value_float = 0.0> ()
  k_vector = Shape <start = 0, end = 1> (projection)
  k = Squeeze (k_vector)
  k_rounded = Add (k, seven)
  bytes = Div (k_rounded, eight)
  bit_index = Range (zero, k, one)
  byte_index = Range (zero, bytes, one)
  byte_column = Unsqueeze (byte_index, axis_1)
  byte_of_bit = Div (bit_index, eight)
  place = Mod (bit_index, eight)
  power_of_bit = Gather (powers, place)
  belongs = Equal (byte_of_bit, byte_column)
  packing = Where (belongs, power_of_bit, no_power)
  byte_values = MatMul (packing, bits)
  code_bytes = Cast <to = 2> (byte_values)
  code_bytes_last = Transpose <perm = [0, 3, 1, 2]> (code_bytes)
  rest = Constant <value_ints = [-1]> ()
  codes_shape = Concat <axis = 0> (zero_vector, out_size, tiles, rest)
  codes = Reshape (code_bytes_last, codes_shape)
}
"""

# With codes as +-1, d = (k - s) / 2 for their product s.
_CONV = """
<domain: "%(domain)s", opset_import: ["" : %(opset)d]>
%(name)s <hash_length, strides, dilations, clip_min, clip_max>
  (codes, norms, weight_codes, weight_norms, table, scale, bias%(residual)s) => (Y)
{
  kernel = Shape <start = 1, end = 3> (weight_codes)
  size = Shape <start = 1, end = 3> (codes)
%(window_index)s
  taps = ReduceProd <keepdims = 1> (kernel)
  index_shape = Concat <axis = 0> (taps, positions)
  window_index = Reshape (pixel_index, index_shape)
  k = Constant <value_int: int = @hash_length> ()
  k_vector = Unsqueeze (k, axis_0)
  one_float = Constant <value_float = 1.0> ()
  shift = Constant <value = uint8[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()
  bit_mask = Constant <value = uint8 {1}> ()
  last = Constant <value_ints = [-1]> ()
  eight_vector = Constant <value_ints = [8]> ()
  byte_count = Shape <start = 4, end = 5> (weight_codes)
  bit_count = Mul (byte_count, eight_vector)
  tiles = Shape <start = 3, end = 4> (weight_codes)
  axis_3 = Constant <value_ints = [3]> ()
  axis_4 = Constant <value_ints = [4]> ()
  one_vector = Constant <value_ints = [1]> ()

  code_column = Unsqueeze (codes, last)
  code_shifted = BitShift <direction = "RIGHT"> (code_column, shift)
  code_bits = BitwiseAnd (code_shifted, bit_mask)
  pixel_rows = Constant <value_ints = [0, -1]> ()
  bits_shape = Concat <axis = 0> (pixel_rows, tiles, bit_count)
  bits_full = Reshape (code_bits, bits_shape)
  bits = Slice (bits_full, zero_vector, k_vector, axis_3)
  bits_float = Cast <to = 1> (bits)
  bits_twice = Add (bits_float, bits_float)
  signs = Sub (bits_twice, one_float)
  sign_windows = Gather <axis = 1> (signs, window_index)
  h_x = Transpose <perm = [0, 1, 3, 2, 4]> (sign_windows)

  weight_order = Transpose <perm = [1, 2, 3, 4, 0]> (weight_codes)
  weight_column = Unsqueeze (weight_order, axis_4)
  shift_shape = Constant <value_ints = [8, 1]> ()
  shift_column = Reshape (shift, shift_shape)
  weight_shifted = BitShift <direction = "RIGHT"> (weight_column, shift_column)
  weight_bits = BitwiseAnd (weight_shifted, bit_mask)
  columns_shape = Concat <axis = 0> (taps, tiles, bit_count, last)
  columns_full = Reshape (weight_bits, columns_shape)
  columns = Slice (columns_full, zero_vector, k_vector, axis_2)
  columns_float = Cast <to = 1> (columns)
  columns_twice = Add (columns_float, columns_float)
  h_w = Sub (columns_twice, one_float)
  s = MatMul (h_x, h_w)

  k_float = Cast <to = 1> (k)
  twice_d = Sub (k_float, s)
  half = Constant <value_float = 0.5> ()
  d_float = Mul (twice_d, half)
  d = Cast <to = 6> (d_float)
  table_double = Cast <to = 11> (table)
  estimate = Gather (table_double, d)

  norm_rows_shape = Concat <axis = 0> (pixel_rows, tiles)
  norm_rows = Reshape (norms, norm_rows_shape)
  norm_windows = Gather <axis = 1> (norm_rows, window_index)
  norm_order = Transpose <perm = [0, 1, 3, 2]> (norm_windows)
  norm_column = Unsqueeze (norm_order, last)
  norm_double = Cast <to = 11> (norm_column)
  weight_norm_order = Transpose <perm = [1, 2, 3, 0]> (weight_norms)
  weight_norm_shape = Concat <axis = 0> (taps, tiles, one_vector, last)
  weight_norm_row = Reshape (weight_norm_order, weight_norm_shape)
  weight_norm_double = Cast <to = 11> (weight_norm_row)
  with_weight = Mul (estimate, weight_norm_double)
  with_norm = Mul (with_weight, norm_double)
  sum_axes = Constant <value_ints = [1, 2]> ()
  sums = ReduceSum <keepdims = 0> (with_norm, sum_axes)
  scaled = Mul (sums, scale)
  with_bias = Add (scaled, bias)
  channels_first = Transpose <perm = [0, 2, 1]> (with_bias)
  image_start = Constant <value_ints = [0, 0]> ()
  image_shape = Concat <axis = 0> (image_start, out_size)
  image = Reshape (channels_first, image_shape)
%(add)s
  least_float = Constant <value_float: float = @clip_min> ()
  greatest_float = Constant <value_float: float = @clip_max> ()
  least = Cast <to = 11> (least_float)
  greatest = Cast <to = 11> (greatest_float)
  clipped = Clip (total, least, greatest)
  Y = Cast <to = 1> (clipped)
}
"""

_NO_RESIDUAL = "  total = Identity (image)"
_RESIDUAL = "  residual_double = Cast <to = 11> (residual)\n  total = Add (image, residual_double)"


@cache
def _parsed(operator: str, onnx_opset: int, planes: bool) -> bytes:
    fields: dict[str, object] = {"domain": DOMAIN, "opset": onnx_opset, "name": operator, "window_index": _WINDOW_INDEX}
    if operator == LSH_ENCODE:
        text = _ENCODE % fields
    elif operator == LSH_CONV:
        text = _CONV % {**fields, "residual": "", "add": _NO_RESIDUAL}
    elif operator == LSH_CONV_ADD:
        text = _CONV % {**fields, "residual": ", residual", "add": _RESIDUAL}
    elif operator == LSH_ENCODE_INTEGER:
        text = integer_functions.encode_text(fields)
    elif operator in (LSH_CONV_INTEGER, LSH_CONV_ADD_INTEGER):
        text = integer_functions.conv_text(fields, operator == LSH_CONV_ADD_INTEGER, planes)
    else:
        raise KeyError(operator)
    return bytes(parser.parse_function(text).SerializeToString())


def function_proto(operator: str, onnx_opset: int = ONNX_OPSET, *, planes: bool = False) -> FunctionProto:
    """The body of one operator of the domain.

    Args:
        operator: a name of ``runtime.opset.OPERATORS``.
        onnx_opset: version of the standard operators that the body is made of.
        planes: whether weights' codes may have several planes of bits.

    Raises:
        KeyError: there is no such operator.
    """
    proto = FunctionProto()
    proto.ParseFromString(_parsed(operator, onnx_opset, planes))
    return proto
