// The operators for any device: their results and dtypes. The memory of results and scratch is
// PyTorch's.
//
//                 tensors                                 checked (checks.h), results made here
//                    |
//     Shape, Step<T>, Backward<T>                         call.h, with T the tensors' dtype
//        |           |             |
//       Cpu         Cuda        Emulated                  a Device
//   cpu/cpu.cpp  cuda/cuda.cpp  cuda/emulated.cpp
//
// A `Device` has
//   Guard(const Tensor&)                                  makes the tensor's device the current one
//   step(const Shape&, const std::vector<Step<T>>&, const Tensor& phi)     the shape's N is unused
//   backward(const Shape&, const Backward<T>&, const Tensor& phi, T* d_phi)
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace l2l {

template <class T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls f(T()) with the dtype of a tensor, on its device.
template <class Device, class F>
void with_dtype(const Tensor& tensor, F f) {
  const typename Device::Guard guard(tensor);
  if (tensor.scalar_type() == ScalarType::Float)
    f(float());
  else
    f(double());
}

template <class Device>
void theta_step_(const std::vector<Tensor>& thetas, const std::vector<Tensor>& gradients,
                 const std::vector<Tensor>& states, const Tensor& phi, double p,
                 double output_scale, bool theta_input, bool odd) {
  const size_t count = thetas.size();
  STD_TORCH_CHECK(gradients.size() == count && states.size() == count, "there are ", count,
                  " thetas, ", gradients.size(), " gradients and ", states.size(),
                  " states: give each theta one of both");
  if (!count) return;
  const First first{thetas[0], {"thetas", 0}};
  const Shape shape =
      check(first, states[0], {"states", 0}, phi, p, output_scale, theta_input, odd);
  std::vector<Range> ranges = {{phi, {"phi"}, false}};
  ranges.reserve(1 + 3 * count);
  for (size_t i = 0; i < count; ++i) {
    const auto at = int64_t(i);
    const Name theta{"thetas", at}, gradient{"gradients", at}, state{"states", at};
    if (i) first.check(thetas[i], theta, thetas[i].sizes());
    first.check(gradients[i], gradient, thetas[i].sizes());
    first.check_state(states[i], state, shape.of(thetas[i].numel()));
    ranges.insert(
        ranges.end(),
        {{thetas[i], theta, true}, {gradients[i], gradient, false}, {states[i], state, true}});
  }
  check_apart(ranges);
  with_dtype<Device>(phi, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Step<T>> calls;
    calls.reserve(count);
    for (size_t i = 0; i < count; ++i)
      calls.push_back({thetas[i].numel(), in<T>(thetas[i]), in<T>(gradients[i]), in<T>(states[i]),
                       out<T>(thetas[i]), out<T>(states[i])});
    Device::step(shape, calls, phi);
  });
}

template <class Device>
std::tuple<Tensor, Tensor> theta_step(const Tensor& theta, const Tensor& gradient,
                                      const Tensor& state, const Tensor& phi, double p,
                                      double output_scale, bool theta_input, bool odd) {
  const First first{theta, {"theta"}};
  const Shape shape = check(first, 1, state, phi, p, output_scale, theta_input, odd);
  first.check(gradient, {"gradient"}, {shape.coordinates});
  Tensor next_theta = torch::stable::empty_like(theta);
  Tensor next_state = torch::stable::empty_like(state);
  with_dtype<Device>(theta, [&](auto zero) {
    using T = decltype(zero);
    Device::step(shape,
                 std::vector<Step<T>>{{shape.coordinates, in<T>(theta), in<T>(gradient),
                                       in<T>(state), out<T>(next_theta), out<T>(next_state)}},
                 phi);
  });
  return {next_theta, next_state};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> theta_step_backward(
    const Tensor& theta, const Tensor& gradient, const Tensor& state, const Tensor& phi,
    const Tensor& d_next_theta, const Tensor& d_next_state, double p, double output_scale,
    bool theta_input, bool odd) {
  const First first{theta, {"theta"}};
  const Shape shape = check(first, 1, state, phi, p, output_scale, theta_input, odd);
  first.check(gradient, {"gradient"}, {shape.coordinates});
  first.check(d_next_theta, {"d_next_theta"}, {shape.coordinates});
  first.check(d_next_state, {"d_next_state"}, {shape.layers, 2, shape.hidden, shape.states()});
  Tensor d_theta = torch::stable::empty_like(theta);
  Tensor d_gradient = torch::stable::empty_like(gradient);
  Tensor d_state = torch::stable::empty_like(state);
  Tensor d_phi = torch::stable::empty_like(phi);
  with_dtype<Device>(theta, [&](auto zero) {
    using T = decltype(zero);
    Device::backward(
        shape,
        Backward<T>{1, in<T>(gradient), in<T>(state), in<T>(d_next_theta), in<T>(theta), nullptr,
                    in<T>(d_next_state), out<T>(d_theta), out<T>(d_gradient), out<T>(d_state)},
        phi, out<T>(d_phi));
  });
  return {d_theta, d_gradient, d_state, d_phi};
}

template <class Device>
Tensor unroll_meta_gradient(const Tensor& gradients, const Tensor& state, const Tensor& cotangents,
                            const Tensor& phi, const std::optional<Tensor>& thetas, double p,
                            double output_scale, bool theta_input, bool odd) {
  const First first{gradients, {"gradients"}};
  const Shape shape = check(first, 2, state, phi, p, output_scale, theta_input, odd);
  const int64_t steps = gradients.size(0);
  first.check(cotangents, {"cotangents"}, {steps, shape.coordinates});
  if (thetas) first.check(*thetas, {"thetas"}, {steps, shape.coordinates});
  STD_TORCH_CHECK(thetas || !theta_input,
                  "thetas is missing: phi sees theta, pass the theta [T, N] that each update saw");
  Tensor d_phi = torch::stable::empty_like(phi);
  with_dtype<Device>(gradients, [&](auto zero) {
    using T = decltype(zero);
    Device::backward(
        shape,
        Backward<T>{steps, in<T>(gradients), in<T>(state), in<T>(cotangents),
                    thetas ? in<T>(*thetas) : nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
        phi, out<T>(d_phi));
  });
  return d_phi;
}

// The operators' names and signatures, for a namespace of PyTorch's.
template <class Library>
void define(Library& m) {
#define L2L_FORM "*, float p, float output_scale, bool theta_input, bool odd"
  m.def(
      "theta_step_(Tensor(a!)[] thetas, Tensor[] gradients, Tensor(b!)[] states, Tensor "
      "phi, " L2L_FORM ") -> ()");
  m.def("theta_step(Tensor theta, Tensor gradient, Tensor state, Tensor phi, " L2L_FORM
        ") -> (Tensor, Tensor)");
  m.def(
      "theta_step_backward(Tensor theta, Tensor gradient, Tensor state, Tensor phi, "
      "Tensor d_next_theta, Tensor d_next_state, " L2L_FORM
      ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "unroll_meta_gradient(Tensor gradients, Tensor state, Tensor cotangents, Tensor phi, "
      "Tensor? thetas, " L2L_FORM ") -> Tensor");
#undef L2L_FORM
}

}  // namespace l2l

// Every operator for a device; `m` is of STABLE_TORCH_LIBRARY_IMPL.
#define L2L_IMPLEMENT(m, Device)                                               \
  m.impl("theta_step_", TORCH_BOX(&l2l::theta_step_<Device>));                 \
  m.impl("theta_step", TORCH_BOX(&l2l::theta_step<Device>));                   \
  m.impl("theta_step_backward", TORCH_BOX(&l2l::theta_step_backward<Device>)); \
  m.impl("unroll_meta_gradient", TORCH_BOX(&l2l::unroll_meta_gradient<Device>))
