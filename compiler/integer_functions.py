"""Bodies of the integer operators in standard operators; docs/operators.md is the definition.

All sums are of whole numbers below 2**24 and so exact in float32, in any order: projection and correlation
are plain ``Conv`` nodes, whose weights depend on initializers alone.  What rounds is written so that no
program may fuse it into something that rounds otherwise.
"""

from __future__ import annotations

from runtime.opset import EXPONENT_LIMIT

_POWERS = ", ".join(repr(2.0**exponent) for exponent in range(-EXPONENT_LIMIT, EXPONENT_LIMIT + 1))

# The projection is compared with that of the centre instead of subtracting it: both are below 2**24, their
# difference need not be.  For the same reason squares, below 2**18, are summed in two halves of 9 bits.
_ENCODE = """
<domain: "%(domain)s", opset_import: ["" : %(opset)d]>
LshEncodeInteger <kernel_shape, strides, dilations, pads, tile_size, exponent, low, high, norm_scale>
  (X, projection, centre) => (codes, norms)
{
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  keep = Constant <value_ints = [0]> ()
  rest = Constant <value_ints = [-1]> ()
  axis_1 = Constant <value_ints = [1]> ()

  powers_of_two = Constant <value_floats = [%(powers)s]> ()
  exponent_of_one = Constant <value_int = %(exponent_limit)d> ()
  e = Constant <value_int: int = @exponent> ()
  place_of_power = Add (e, exponent_of_one)
  power = Gather (powers_of_two, place_of_power)
  scaled = Mul (X, power)
  rounded = Round (scaled)
  least_whole = Constant <value_int: int = @low> ()
  greatest_whole = Constant <value_int: int = @high> ()
  least = Cast <to = 1> (least_whole)
  greatest = Cast <to = 1> (greatest_whole)
  q = Clip (rounded, least, greatest)
  spatial = Constant <value_ints = [2, 3]> ()
  pad_sizes = Constant <value_ints: ints = @pads> ()
  image = Pad (q, pad_sizes, , spatial)

  kernel = Constant <value_ints: ints = @kernel_shape> ()
  channels = Shape (centre)
  k_vector = Shape <start = 0, end = 1> (projection)
  f_vector = Shape <start = 1, end = 2> (projection)
  f = Squeeze (f_vector)
  tile = Constant <value_int: int = @tile_size> ()
  f_less_one = Sub (f, one)
  last_tile = Div (f_less_one, tile)
  tile_count = Add (last_tile, one)
  tiles = Reshape (tile_count, rest)
  feature_index = Range (zero, f, one)
  tile_index = Range (zero, tile_count, one)
  tile_of_feature = Div (feature_index, tile)
  tile_column = Unsqueeze (tile_index, axis_1)
  is_member = Equal (tile_of_feature, tile_column)
  member = Cast <to = 1> (is_member)
  member_rows = Unsqueeze (member, axis_1)
  P = Cast <to = 1> (projection)
  P_tiles = Mul (member_rows, P)
  filter_shape = Concat <axis = 0> (rest, channels, kernel)
  P_filters = Reshape (P_tiles, filter_shape)
  member_filters = Reshape (member, filter_shape)
  per_channel = Constant <value_ints = [-1, 1, 1]> ()
  centre_float = Cast <to = 1> (centre)
  centre_pixel = Reshape (centre_float, per_channel)
  centre_shape = Concat <axis = 0> (channels, kernel)
  centre_window = Expand (centre_pixel, centre_shape)
  centre_products = Mul (P_filters, centre_window)
  window_axes = Constant <value_ints = [1, 2, 3]> ()
  centre_sums = ReduceSum <keepdims = 0> (centre_products, window_axes)
  z_of_centre = Reshape (centre_sums, per_channel)

  z = Conv <kernel_shape: ints = @kernel_shape, strides: ints = @strides, dilations: ints = @dilations>
    (image, P_filters)
  out_size = Shape <start = 2, end = 4> (z)
  is_positive = GreaterOrEqual (z, z_of_centre)
  bits_flat = Cast <to = 1> (is_positive)
  bits_shape = Concat <axis = 0> (keep, tiles, k_vector, rest)
  bits = Reshape (bits_flat, bits_shape)
  seven = Constant <value_int = 7> ()
  eight = Constant <value_int = 8> ()
  powers = Constant <value_floats = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]> ()
  no_power = Constant <value_float = 0.0> ()
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
  codes_shape = Concat <axis = 0> (keep, out_size, tiles, rest)
  codes = Reshape (code_bytes_last, codes_shape)

  v = Sub (image, centre_pixel)
  squares = Mul (v, v)
  half_base = Constant <value_float = 512.0> ()
  half_share = Constant <value_float = 0.001953125> ()
  squares_shared = Mul (squares, half_share)
  upper = Floor (squares_shared)
  upper_whole = Mul (upper, half_base)
  lower = Sub (squares, upper_whole)
  upper_sum = Conv <kernel_shape: ints = @kernel_shape, strides: ints = @strides, dilations: ints = @dilations>
    (upper, member_filters)
  lower_sum = Conv <kernel_shape: ints = @kernel_shape, strides: ints = @strides, dilations: ints = @dilations>
    (lower, member_filters)
  upper_double = Cast <to = 11> (upper_sum)
  lower_double = Cast <to = 11> (lower_sum)
  base_double = Cast <to = 11> (half_base)
  upper_energy = Mul (upper_double, base_double)
  energy = Add (upper_energy, lower_double)
  lengths = Sqrt (energy)
  norm_scale_float = Constant <value_float: float = @norm_scale> ()
  norm_scale_double = Cast <to = 11> (norm_scale_float)
  half = Constant <value = double {0.5}> ()
  norm_limit = Constant <value = double {255.0}> ()
  lengths_scaled = Mul (lengths, norm_scale_double)
  lengths_raised = Add (lengths_scaled, half)
  norms_floor = Floor (lengths_raised)
  norms_whole = Min (norms_floor, norm_limit)
  norms_bytes = Cast <to = 2> (norms_whole)
  norms = Transpose <perm = [0, 2, 3, 1]> (norms_bytes)
}
"""

# n (k - 2 d) is a sum of n times products of +-1, so a Conv of +-n with +-1 gives the sum over tiles and taps.
# acc * scale is exact in float64, so its cast rounds once, and there is no float32 product next to a sum
# or to the Conv that a program could fuse with it.
_CONV = """
<domain: "%(domain)s", opset_import: ["" : %(opset)d]>
%(name)s <hash_length, strides, dilations, clip_min, clip_max>
  (codes, norms, weight_codes, scale, bias%(residual)s) => (Y)
{
  keep = Constant <value_ints = [0]> ()
  rest = Constant <value_ints = [-1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  axis_3 = Constant <value_ints = [3]> ()
  k = Constant <value_int: int = @hash_length> ()
  bits_end = Reshape (k, rest)
  shift = Constant <value = uint8[8, 1, 1] {0, 1, 2, 3, 4, 5, 6, 7}> ()
  bit_mask = Constant <value = uint8 {1}> ()
  eight_vector = Constant <value_ints = [8]> ()
  byte_count = Shape <start = 4, end = 5> (weight_codes)
  bit_count = Mul (byte_count, eight_vector)
  kept = Constant <value_ints = [0, 0]> ()

  image_size = Shape <start = 1, end = 3> (codes)
  code_planes = Transpose <perm = [0, 3, 4, 1, 2]> (codes)
  code_column = Unsqueeze (code_planes, axis_3)
  code_shifted = BitShift <direction = "RIGHT"> (code_column, shift)
  code_bits = BitwiseAnd (code_shifted, bit_mask)
  bits_shape = Concat <axis = 0> (kept, bit_count, image_size)
  bits_full = Reshape (code_bits, bits_shape)
  bits = Slice (bits_full, keep, bits_end, axis_2)
  is_set = Cast <to = 9> (bits)
  norm_planes = Transpose <perm = [0, 3, 1, 2]> (norms)
  norm_float = Cast <to = 1> (norm_planes)
  norm_column = Unsqueeze (norm_float, axis_2)
  norm_negative = Neg (norm_column)
  signal_tiles = Where (is_set, norm_column, norm_negative)
  signal_shape = Concat <axis = 0> (keep, rest, image_size)
  signal = Reshape (signal_tiles, signal_shape)

  kernel = Shape <start = 1, end = 3> (weight_codes)
  weight_planes = Transpose <perm = [0, 3, 4, 1, 2]> (weight_codes)
  weight_column = Unsqueeze (weight_planes, axis_3)
  weight_shifted = BitShift <direction = "RIGHT"> (weight_column, shift)
  weight_bits = BitwiseAnd (weight_shifted, bit_mask)
  weight_bits_shape = Concat <axis = 0> (kept, bit_count, kernel)
  weight_bits_full = Reshape (weight_bits, weight_bits_shape)
  weight_bits_used = Slice (weight_bits_full, keep, bits_end, axis_2)
  weight_is_set = Cast <to = 9> (weight_bits_used)
  plus = Constant <value_float = 1.0> ()
  minus = Constant <value_float = -1.0> ()
  weight_tiles = Where (weight_is_set, plus, minus)
  weight_shape = Concat <axis = 0> (keep, rest, kernel)
  %(weight)s = Reshape (weight_tiles, weight_shape)%(planes)s

  sums = Conv <strides: ints = @strides, dilations: ints = @dilations> (signal, weight)
  per_channel = Constant <value_ints = [-1, 1, 1]> ()
  scale_column = Reshape (scale, per_channel)
  bias_column = Reshape (bias, per_channel)
  scale_double = Cast <to = 11> (scale_column)
  sums_double = Cast <to = 11> (sums)
  product = Mul (sums_double, scale_double)
  scaled = Cast <to = 1> (product)
  with_bias = Add (scaled, bias_column)
%(add)s
  least = Constant <value_float: float = @clip_min> ()
  greatest = Constant <value_float: float = @clip_max> ()
  Y = Clip (total, least, greatest)
}
"""

# Each plane of a weight's code counts twice as much as the one before it.
_PLANES = """
  counts = Constant <value_floats = [1.0, 2.0, 4.0, 8.0]> ()
  outputs = Shape (scale)
  row_shape = Shape <start = 1> (weight_rows)
  planes_shape = Concat <axis = 0> (rest, outputs, row_shape)
  weight_planes_apart = Reshape (weight_rows, planes_shape)
  plane_count = Shape <start = 0, end = 1> (weight_planes_apart)
  counts_used = Slice (counts, keep, plane_count, keep)
  per_plane = Constant <value_ints = [-1, 1, 1, 1, 1]> ()
  count_column = Reshape (counts_used, per_plane)
  weight_counted = Mul (weight_planes_apart, count_column)
  weight = ReduceSum <keepdims = 0> (weight_counted, keep)"""

_NO_RESIDUAL = "  total = Identity (with_bias)"
_RESIDUAL = "  total = Add (with_bias, residual)"


def encode_text(fields: dict[str, object]) -> str:
    """Source of ``LshEncodeInteger``'s body."""
    return _ENCODE % {**fields, "powers": _POWERS, "exponent_limit": EXPONENT_LIMIT}


def conv_text(fields: dict[str, object], has_residual: bool, planes: bool) -> str:
    """Source of the body of ``LshConvInteger``, or of ``LshConvAddInteger``, for codes of one plane or more."""
    residual = {"residual": ", residual", "add": _RESIDUAL} if has_residual else {"residual": "", "add": _NO_RESIDUAL}
    weight = {"weight": "weight_rows", "planes": _PLANES} if planes else {"weight": "weight", "planes": ""}
    return _CONV % {**fields, **residual, **weight}
