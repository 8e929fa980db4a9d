// The arithmetic of one coordinate, written once for any vector type V (simd.h) and for plain
// numbers, as a thread of a GPU works on them (scalar.h): the functions, Eq. 5, and the LSTM cell
// with its backward. Its twin in PyTorch is l2l_ref/equations.py.
//
//   gradient --Eq. 5--> two numbers --+
//   theta ----clamp---> one number ---+--> below --+
//                                          prev  --+--weights--> i f g o --+
//                                          (cpu/ and cuda/ multiply)  c ---+--cell--> c, h
//
// Gates arrive scaled: the weights of i, f, o are packed times -log2(e), those of g times
// 2·log2(e). Then sigmoid(x) = 1 / (1 + 2^y) and tanh(x) = (2^y - 1) / (2^y + 1), with no product
// left to do before the powers of two.
#pragma once

#include <cmath>

#include "call.h"
#ifdef L2L_SCALAR
#include "scalar.h"
#else
#include "simd.h"
#endif

namespace L2L_NAMESPACE {

constexpr double log2_e = 1.4426950408889634;
constexpr double sigmoid_scale = -log2_e, tanh_scale = 2 * log2_e;
constexpr double theta_scale = 10, theta_clamp = 5;  // φ's third input is clamp(10·θ, ±5)

// Horner's rule; the coefficients are minimax fits, the relative error beside each.
template <class T, int n>
struct Coefficients {
  T of[n];
};
template <class V, class T, int n>
L2L_INLINE V polynomial(Coefficients<T, n> c, V x) {
  V sum = broadcast<V>(c.of[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) sum = sum * x + c.of[i];
  return sum;
}

template <class T>
struct Fit;
template <>
struct Fit<float> {
  // 2^r, |r| <= 1/2: 1.4e-7; 0 <= r < 1: 8.7e-8
  template <bool from_zero>
  static L2L_INLINE constexpr Coefficients<float, 6> exp2() {
    if (from_zero)
      return {{1.0f, 0.6931513f, 0.24016444f, 0.055799924f, 0.0090170437f, 0.0018671305f}};
    return {{1.0f, 0.69314697f, 0.2402212f, 0.055507133f, 0.0096755413f, 0.0013276473f}};
  }
  // (2^r - 1) / r: 1.1e-8
  static L2L_INLINE constexpr Coefficients<float, 6> exp2m1() {
    return {{0.69314718f, 0.24022649f, 0.055503573f, 0.0096182376f, 0.0013390736f, 0.00015403512f}};
  }
  // 2·atanh(√z) / √z, z <= 0.0295: 6.9e-10
  static L2L_INLINE constexpr Coefficients<float, 4> log() {
    return {{2.0f, 0.66666816f, 0.39974743f, 0.29927052f}};
  }
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Fit<double> {
  // |r| <= 1/2: 3.1e-18
  template <bool from_zero>
  static L2L_INLINE constexpr Coefficients<double, 12> exp2() {
    static_assert(!from_zero, "");
    return {{1.0, 0.6931471805599453, 0.24022650695910155, 0.055504108664819925,
             0.009618129107588335, 0.0013333558146789923, 0.00015403530462514432,
             1.5252733489988525e-05, 1.32154330896764e-06, 1.0178198021671931e-07,
             7.074105613508143e-09, 4.435282706957277e-10}};
  }
  // 2.3e-19
  static L2L_INLINE constexpr Coefficients<double, 12> exp2m1() {
    return {{0.6931471805599453, 0.24022650695910072, 0.055504108664821625, 0.009618129107628437,
             0.001333355814640663, 0.00015403530393466168, 1.5252733841278434e-05,
             1.3215486721358577e-06, 1.0178057169304503e-07, 7.054932271604157e-09,
             4.45580485154588e-10, 2.5678429104123612e-11}};
  }
  // 7.7e-21
  static L2L_INLINE constexpr Coefficients<double, 9> log() {
    return {{2.0, 0.6666666666666666, 0.4000000000000759, 0.2857142856879206, 0.22222222680735929,
             0.18181773448107766, 0.15387173128658563, 0.13248496224926834, 0.1326446979650844}};
  }
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
};

// 2^y: 0 at -inf, inf at inf. The general form knows no subnormal numbers: 0 below 2^-126.5, and
// inf from 2^127.5 on.
#ifndef L2L_SCALAR
template <class V>
L2L_INLINE V exp2(V y) {
  auto [power, r] = split_any(y);
  return pow2(polynomial(Fit<scalar_t<V>>::template exp2<rounds_down<V>>(), r), power);
}
#endif

// 2^y - 1, accurate near 0. y must not overflow.
template <class V>
L2L_INLINE V exp2m1(V y) {
  auto [power, r] = split(y);
  power = pow2(broadcast<V>(1), power);
  return power * (r * polynomial(Fit<scalar_t<V>>::exp2m1(), r)) + (power - 1);
}

// sigmoid(x) = 1 / sigmoid_divisor(y), y = sigmoid_scale·x.
template <class V>
L2L_INLINE V sigmoid_divisor(V y) {
  return 1 + exp2(y);
}

// tanh(x) = t / (t + 2) with t = tanh_numerator(y), y = tanh_scale·x.
template <class V>
L2L_INLINE V tanh_numerator(V y) {
  constexpr scalar_t<V> saturated = 2 * mantissa_bits<V> + 4;  // tanh is 1 long before
  return exp2m1(minimum(broadcast<V>(saturated), y));
}

// log(x) for normal x > 0; inf and NaN stay what they are.
template <class V>
L2L_INLINE V log(V x) {
  using T = scalar_t<V>;
  using I = integers_t<V>;
  constexpr int shift = mantissa_bits<V>;
  const I root_half = bit_cast<I>(broadcast<V>(T(0.70710678118654752)));
  I n = (bit_cast<I>(x) - root_half) >> shift;  // x = m·2^n, m in [1/√2, √2)
  V m = bit_cast<V>(bit_cast<I>(x) - (shifted<V>(n, shift))), power = from_integers<V>(n);
  V s = (m - 1) / (m + 1);
  V y = power * Fit<T>::ln2_high +
        (power * Fit<T>::ln2_low + s * polynomial(Fit<T>::log(), V(s * s)));
  return x < broadcast<V>(T(INFINITY)) ? y : x;
}

template <class V>
L2L_INLINE V magnitude(V x) {
  using I = integers_t<V>;
  return bit_cast<V>(bit_cast<I>(x) & ~bit_cast<I>(broadcast<V>(-scalar_t<V>(0))));
}

// Eq. 5: (log|g| / p, sign g) where |g| >= e^-p, else (-1, e^p·g).
template <class T>
struct Eq5 {
  T p, smallest, slope;  // e^-p, e^p

  explicit Eq5(double p_) : p(T(p_)), smallest(T(std::exp(-p_))), slope(T(std::exp(p_))) {}

  template <class V>
  L2L_INLINE void forward(V g, V& log_size, V& direction) const {
    V size = magnitude(g);
    auto large = size >= smallest;
    log_size = large ? log(size) / p : broadcast<V>(-1);
    direction = large ? (g < 0 ? broadcast<V>(-1) : broadcast<V>(1)) : slope * g;
  }

  // The derivative with respect to g, from those with respect to the two numbers.
  template <class V>
  L2L_INLINE V backward(V g, V d_log_size, V d_direction) const {
    return magnitude(g) >= smallest ? d_log_size / p / g : d_direction * slope;  // p·g overflows
  }
};

template <class V>
L2L_INLINE V clamped_theta(V theta) {
  using T = scalar_t<V>;
  return maximum(broadcast<V>(T(-theta_clamp)),
                 minimum(broadcast<V>(T(theta_clamp)), T(theta_scale) * theta));
}
template <class V>
L2L_INLINE V clamped_theta_backward(V theta, V d) {
  using T = scalar_t<V>;
  V size = magnitude(V(T(theta_scale) * theta));
  return size <= T(theta_clamp) ? T(theta_scale) * d : V{};
}

// One unit of an LSTM layer: scaled gates and c -> the next c, and of that h.
template <class V>
L2L_INLINE V cell_state(V i, V f, V g, V c) {
  const V t = tanh_numerator(g);
  return quotient(c, sigmoid_divisor(f)) + quotient(t, V(sigmoid_divisor(i) * (t + 2)));
}
template <class V>
L2L_INLINE V cell_output(V divisor_o, V c) {
  const V t = tanh_numerator(V(scalar_t<V>(tanh_scale) * c));
  return quotient(t, V(divisor_o * (t + 2)));
}
template <class V>
L2L_INLINE void cell(V i, V f, V g, V o, V& c, V& h) {
  c = cell_state(i, f, g, c);
  h = cell_output(sigmoid_divisor(o), c);
}

// What the backward of a unit needs: the gates after their functions, and tanh of the next c.
template <class V>
struct Activations {
  V i, f, g, o, tanh_c;
};
template <class V>
L2L_INLINE Activations<V> cell_state_keep(V i, V f, V g, V o, V& c) {
  const V t = tanh_numerator(g), one = broadcast<V>(1);
  Activations<V> a;
  a.i = quotient(one, sigmoid_divisor(i)), a.f = quotient(one, sigmoid_divisor(f));
  a.o = quotient(one, sigmoid_divisor(o));
  a.g = quotient(t, V(t + 2));
  c = a.f * c + a.i * a.g;
  return a;
}
template <class V>
L2L_INLINE V tanh_of_state(V c) {
  const V t = tanh_numerator(V(scalar_t<V>(tanh_scale) * c));
  return quotient(t, V(t + 2));
}
template <class V>
L2L_INLINE Activations<V> cell_keep(V i, V f, V g, V o, V& c, V& h) {
  auto a = cell_state_keep(i, f, g, o, c);
  a.tanh_c = tanh_of_state(c);
  h = a.o * a.tanh_c;
  return a;
}

// Backward of a unit: dh and dc (of its results) and c (before) -> dc (before), and into `a` the
// derivatives with respect to the unscaled gates.
template <class V>
L2L_INLINE void cell_backward(Activations<V>& a, V c, V dh, V& dc) {
  V d = dc + dh * a.o * (1 - a.tanh_c * a.tanh_c);
  dc = d * a.f;
  a.o = dh * a.tanh_c * a.o * (1 - a.o);
  a.f = d * c * a.f * (1 - a.f);
  V di = d * a.g * a.i * (1 - a.i);
  a.g = d * a.i * (1 - a.g * a.g);
  a.i = di;
}

}  // namespace L2L_NAMESPACE
