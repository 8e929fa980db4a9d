// The kernels for one instruction set. setup.py compiles this file once for each, with L2L_LEVEL as
// the name of its namespace, so that no two copies of a function can be mistaken for one another.
#include "backward.h"

namespace L2L_LEVEL {
namespace {

template <class T>
bool function(const char* name, const T* x, T* y, int64_t n) {
  using V = vec_t<T>;
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
    for (int64_t at = 0; at < n; at += width<T>) {
      const int64_t count = n - at < width<T> ? n - at : width<T>;
      V v = all<V>(1);
      std::memcpy(&v, x + at, count * sizeof(T));
      v = table[i](v);
      std::memcpy(y + at, &v, count * sizeof(T));
    }
    return true;
  }
  return false;
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
          function<T>};
}

}  // namespace

#define L2L_QUOTE_(x) #x
#define L2L_QUOTE(x) L2L_QUOTE_(x)
extern const l2l::Level level;
const l2l::Level level = {L2L_QUOTE(L2L_LEVEL), kernels<float>(), kernels<double>()};

}  // namespace L2L_LEVEL
