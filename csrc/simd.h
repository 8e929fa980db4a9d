// One vector type for every instruction set: V is a GCC/Clang vector, cell.h is written with its
// operators.
//
//   float     |0|1|2|3|                               baseline, NEON: 4, or 2 double
//   float     |0|1|2|3|4|5|6|7|                       AVX2: 8, or 4 double
//   float     |0|1|2|3|4|5|6|7|8|9|a|b|c|d|e|f|       AVX-512: 16, or 8 double
//
// A lane is a coordinate; where dφ is summed (cpu/sums.h), a row of gates. What has an instruction
// of its own on a wider machine is specialised here and nowhere else.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#ifndef __clang__  // GCC 12 warns of its own header
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace L2L_NAMESPACE {

template <class T, int W>
struct Vec {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};

// The integer of a float's size.
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
};
template <>
struct Bits<double> {
  using type = int64_t;
};

template <class V>
struct Traits;  // the scalar type, and integers as wide as V
template <class T, int W>
struct TraitsOf {
  using scalar = T;
  using integers = typename Vec<typename Bits<T>::type, W>::type;
};
template <>
struct Traits<Vec<float, 4>::type> : TraitsOf<float, 4> {};
template <>
struct Traits<Vec<float, 8>::type> : TraitsOf<float, 8> {};
template <>
struct Traits<Vec<float, 16>::type> : TraitsOf<float, 16> {};
template <>
struct Traits<Vec<double, 2>::type> : TraitsOf<double, 2> {};
template <>
struct Traits<Vec<double, 4>::type> : TraitsOf<double, 4> {};
template <>
struct Traits<Vec<double, 8>::type> : TraitsOf<double, 8> {};

template <class V>
using scalar_t = typename Traits<V>::scalar;
template <class V>
using integers_t = typename Traits<V>::integers;

template <class V>
inline V load(const scalar_t<V>* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
inline void store(scalar_t<V>* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
template <class V>
inline V broadcast(scalar_t<V> x) {
  return x - V{};  // x in every lane, signed zeros included
}

// Integers as floating-point numbers.
template <class V>
inline V from_integers(integers_t<V> n) {
  return __builtin_convertvector(n, V);
}

template <class V>
inline V quotient(V a, V b) {
  return a / b;
}
// Each whole number times 2^bits.
template <class V>
inline integers_t<V> shifted(integers_t<V> n, int bits) {
  return n << bits;
}

}  // namespace L2L_NAMESPACE

#include "bits.h"

namespace L2L_NAMESPACE {

// y = n + r with n whole and |r| <= 1/2. The general form keeps n within [-127, 128] (float) or
// [-1023, 1024] (double), where 2^n is 0 at one end and inf at the other.
template <class V>
inline Split<V> split(V y) {
  using T = scalar_t<V>;
  constexpr T limit = exponent_bias<V> + 1;
  y = minimum(broadcast<V>(limit), y);
  y = maximum(broadcast<V>(1 - limit), y);
  constexpr T magic = T(3) * (int64_t(1) << (mantissa_bits<V> - 1));  // adding it rounds to whole
  V n = (y + magic) - magic;
  return {n, y - n};
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define L2L_SHUFFLE 1
#endif
#endif
#ifdef L2L_SHUFFLE
template <class V, int... i>
inline void interleave(V a, V b, V& low, V& high, std::integer_sequence<int, i...>) {
  constexpr int W = sizeof...(i);
  low = __builtin_shufflevector(a, b, (i / 2 + i % 2 * W)...);
  high = __builtin_shufflevector(a, b, (W / 2 + i / 2 + i % 2 * W)...);
}
#endif
// Rows and columns of a square of W vectors change places.
template <class V, int W>
inline void transpose_square(V (&m)[W]) {
#ifdef L2L_SHUFFLE
  // log2(W) perfect shuffles of the rows: each interleaves row i with row i + W/2.
  for (int stage = 1; stage < W; stage *= 2) {
    V next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i)
      interleave(m[i], m[i + W / 2], next[2 * i], next[2 * i + 1],
                 std::make_integer_sequence<int, W>());
    std::memcpy(m, next, sizeof next);
  }
#else
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const auto x = m[i][j];
      m[i][j] = m[j][i];
      m[j][i] = x;
    }
#endif
}

#if defined(__AVX512F__) && defined(__AVX512DQ__)
// Three instructions, right at infinities too: reduce gives 0 there, scalef inf or 0.
using F16 = Vec<float, 16>::type;
using D8 = Vec<double, 8>::type;
template <>
inline Split<F16> split(F16 y) {
  return {(F16)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          (F16)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
template <>
inline F16 pow2(F16 f, F16 n) {
  return (F16)_mm512_scalef_ps((__m512)f, (__m512)n);
}
template <>
inline F16 minimum(F16 a, F16 b) {
  return (F16)_mm512_min_ps((__m512)a, (__m512)b);
}
template <>
inline F16 maximum(F16 a, F16 b) {
  return (F16)_mm512_max_ps((__m512)a, (__m512)b);
}
template <>
inline Split<D8> split(D8 y) {
  return {(D8)_mm512_roundscale_pd((__m512d)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          (D8)_mm512_reduce_pd((__m512d)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
template <>
inline D8 pow2(D8 f, D8 n) {
  return (D8)_mm512_scalef_pd((__m512d)f, (__m512d)n);
}
template <>
inline D8 minimum(D8 a, D8 b) {
  return (D8)_mm512_min_pd((__m512d)a, (__m512d)b);
}
template <>
inline D8 maximum(D8 a, D8 b) {
  return (D8)_mm512_max_pd((__m512d)a, (__m512d)b);
}
#endif

}  // namespace L2L_NAMESPACE
