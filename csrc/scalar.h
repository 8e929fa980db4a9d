// The names of simd.h for one lane, V = float or double: what a thread of a GPU computes with.
//
//   a warp    thread 0   thread 1  ...  thread 31
//   V           |0|        |1|            |31|         a number of each, in its own registers
//
// Included by nvcc for the device, and by a C++ compiler for the tests that run the GPU's kernels
// on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "call.h"

namespace L2L_NAMESPACE {

template <class V>
using scalar_t = V;
template <class V>
using integers_t = std::conditional_t<sizeof(V) == sizeof(float), int32_t, int64_t>;

template <class V>
L2L_INLINE V broadcast(scalar_t<V> x) {
  return x;
}
template <class V>
L2L_INLINE V from_integers(integers_t<V> n) {
  return V(n);
}
template <class V>
L2L_INLINE integers_t<V> shifted(integers_t<V> n, int bits) {
  using Unsigned = typename std::make_unsigned<integers_t<V>>::type;  // a shift of what is negative
  return integers_t<V>(Unsigned(n) << bits);
}

// a / b to 2 ulp; 0 where 1 / b would be subnormal.
template <class V>
L2L_INLINE V quotient(V a, V b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == sizeof(float)) {
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(b));
    return a * b;
  }
#endif
  return a / b;
}

// 2^y to 2 ulp; on a GPU, 0 where it would be subnormal.
template <class V>
L2L_INLINE V exp2(V y) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == sizeof(float)) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(y));
    return y;
  }
#endif
  return ::exp2(y);
}

}  // namespace L2L_NAMESPACE

#include "bits.h"
