// What a vector (simd.h) and a plain number (scalar.h) have in common.
//
//   simd.h or scalar.h --scalar_t, integers_t, shifted--> bits.h --minimum, maximum, pow2--> cell.h
#pragma once

#include <cstdint>
#include <cstring>

#include "call.h"

namespace L2L_NAMESPACE {

template <class To, class From>
L2L_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The right operand where either is NaN, as in x86's minps and maxps.
template <class V>
L2L_INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}
template <class V>
L2L_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline constexpr int mantissa_bits = sizeof(scalar_t<V>) == 4 ? 23 : 52;
template <class V>
inline constexpr int exponent_bias = sizeof(scalar_t<V>) == 4 ? 127 : 1023;

// y = n + r with n whole and |r| <= 1/2, where `power` is for `pow2` to make 2^n of: 0 at the lower
// end, inf at bias + 1, beyond which y must not be.
template <class V>
struct Split {
  V power, r;
};
template <class V>
L2L_INLINE Split<V> split(V y) {
  using T = scalar_t<V>;
  // To add it rounds to a whole number, and leaves the exponent of 2^n in the last bits.
  constexpr T magic = T(3) * (int64_t(1) << (mantissa_bits<V> - 1)) + exponent_bias<V>;
  y = maximum(broadcast<V>(T(-exponent_bias<V>)), y);
  const V power = y + magic;
  return {power, y - (power - magic)};
}

// f·2^n
template <class V>
L2L_INLINE V pow2(V f, V power) {
  // A product, so that a NaN in f stays one: an integer added to its bits could make it a number.
  return f * bit_cast<V>(shifted<V>(bit_cast<integers_t<V>>(power), mantissa_bits<V>));
}

}  // namespace L2L_NAMESPACE
