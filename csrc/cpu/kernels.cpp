// The kernels for one instruction set. setup.py compiles this file once for each, with
// L2L_NAMESPACE as the name of its namespace, so that no two copies of a function can be mistaken
// for one another.
//
//   block.h -> forward.h, sums.h -> backward.h -> kernels.cpp --+-- -mavx512f ... --> avx512::
//                                                               +-- -mavx2 -mfma ---> avx2::
//                                                               +-------------------> baseline::
#include "kernels.h"

#include "backward.h"

namespace L2L_NAMESPACE {
namespace {

// y [n] = name(x [n]), in vectors of V; false for a name it does not know.
template <class V>
bool function(const char* name, const scalar_t<V>* x, scalar_t<V>* y, int64_t n) {
  using T = scalar_t<V>;
  constexpr int64_t width = sizeof(V) / sizeof(T);
  V (*const table[])(V) = {
      [](V v) { return exp2(v); },
      [](V v) { return exp2m1(v); },
      [](V v) { return log(v); },
      [](V v) { return V(1 / sigmoid_divisor(V(T(sigmoid_scale) * v))); },
      [](V v) {
        v = tanh_numerator(V(T(tanh_scale) * v));
        return V(v / (v + 2));
      },
  };
  const char* const names[] = {"exp2", "exp2m1", "log", "sigmoid", "tanh"};
  for (int i = 0; i < 5; ++i) {
    if (std::strcmp(name, names[i])) continue;
    for (int64_t at = 0; at < n; at += width) {
      const int64_t count = n - at < width ? n - at : width;
      V v = broadcast<V>(1);
      std::memcpy(&v, x + at, count * sizeof(T));
      v = table[i](v);
      std::memcpy(y + at, &v, count * sizeof(T));
    }
    return true;
  }
  return false;
}

// `rounds` of `sums` multiply-adds, none of which waits for another; how many numbers that were.
template <class V, int sums>
int64_t multiply_adds(int64_t rounds) {
  using T = scalar_t<V>;
  V sum[sums];
  for (int i = 0; i < sums; ++i) sum[i] = broadcast<V>(T(i));
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 32
    for (int i = 0; i < sums; ++i) sum[i] = sum[i] * T(0.5) + T(1);
  for (int i = 1; i < sums; ++i) sum[0] += sum[i];
  [[maybe_unused]] volatile T used = sum[0][0];
  return rounds * sums * int64_t(sizeof(V) / sizeof(T));
}

template <class T>
constexpr l2l::Kernels<T> kernels() {
  return {[](const Shape& shape) { return size_t(Packed<T>(shape, nullptr).size); },
          pack<T>,
          Block<T>::room,
          [](const Shape& shape) { return size_t(StepScratch<T>(shape, nullptr).size); },
          step<T>,
          [](const Shape& shape, int64_t steps) {
            return size_t(BackwardScratch<T>(shape, steps, nullptr).arena.used);
          },
          backward<T>,
          function<vec_t<T>>,
          multiply_adds<vec_t<T>, registers * 5 / 8>};
}

}  // namespace

#define L2L_QUOTE_(x) #x
#define L2L_QUOTE(x) L2L_QUOTE_(x)
extern const l2l::InstructionSet instruction_set;
const l2l::InstructionSet instruction_set = {kernels<float>(), kernels<double>(),
                                             L2L_QUOTE(L2L_NAMESPACE)};

}  // namespace L2L_NAMESPACE
