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
#ifdef __SSE2__
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

template <class V>
using scalar_t = std::decay_t<decltype(std::declval<V&>()[0])>;
template <class V>
using integers_t = decltype(V{} < V{});  // as wide as V

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

// `split` of any y. Where it rounds down instead, r is in [0, 1).
template <class V>
inline constexpr bool rounds_down = false;
template <class V>
inline Split<V> split_any(V y) {
  return split(minimum(broadcast<V>(exponent_bias<V> + 1), y));
}

#if __has_builtin(__builtin_shufflevector)
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
#if __has_builtin(__builtin_shufflevector)
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

#ifdef __SSE2__
// minps is just that, but GCC makes a comparison and a blend of it.
#define L2L_MINIMUM(T, W, prefix, suffix)                                \
  template <>                                                            \
  inline Vec<T, W>::type minimum(Vec<T, W>::type a, Vec<T, W>::type b) { \
    return (Vec<T, W>::type)prefix##_min_##suffix(a, b);                 \
  }                                                                      \
  template <>                                                            \
  inline Vec<T, W>::type maximum(Vec<T, W>::type a, Vec<T, W>::type b) { \
    return (Vec<T, W>::type)prefix##_max_##suffix(a, b);                 \
  }
L2L_MINIMUM(float, 4, _mm, ps)
L2L_MINIMUM(double, 2, _mm, pd)
#ifdef __AVX__
L2L_MINIMUM(float, 8, _mm256, ps)
L2L_MINIMUM(double, 4, _mm256, pd)
#endif
#ifdef __AVX512F__
L2L_MINIMUM(float, 16, _mm512, ps)
L2L_MINIMUM(double, 8, _mm512, pd)
#endif
#undef L2L_MINIMUM
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
// Right at infinities too: reduce gives 0 there, scalef inf or 0. The difference is exact, and on
// Intel's CPUs half of what rounding costs; scalef rounds down by itself.
using F16 = Vec<float, 16>::type;
using D8 = Vec<double, 8>::type;
template <>
inline Split<F16> split(F16 y) {
  const F16 r = (F16)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return {y - r, r};
}
template <>
inline constexpr bool rounds_down<F16> = true;
template <>
inline Split<F16> split_any(F16 y) {
  return {y, (F16)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
template <>
inline F16 pow2(F16 f, F16 power) {
  return (F16)_mm512_scalef_ps((__m512)f, (__m512)power);
}
template <>
inline Split<D8> split(D8 y) {
  const D8 r = (D8)_mm512_reduce_pd((__m512d)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return {y - r, r};
}
template <>
inline Split<D8> split_any(D8 y) {
  return split(y);
}
template <>
inline D8 pow2(D8 f, D8 power) {
  return (D8)_mm512_scalef_pd((__m512d)f, (__m512d)power);
}
#endif

}  // namespace L2L_NAMESPACE
