// The operators for any device: checks of the tensors, results, dtypes. The memory of results and
// scratch is PyTorch's.
//
//                 tensors                                 checked here, results made here
//                    |
//     Shape, Step<T>, Backward<T>, Preprocess<T>          call.h, with T the tensors' dtype
//        |           |             |
//       Cpu         Cuda        Emulated                  a Device
//   cpu/cpu.cpp  cuda/cuda.cpp  cuda/emulated.cpp
//
// A `Device` has
//   Guard(const Tensor&)                                  makes the tensor's device the current one
//   step(const Shape&, const Step<T>&, const Tensor& phi)
//   backward(const Shape&, const Backward<T>&, const Tensor& phi, T* d_phi)
//   preprocess(const Tensor& gradient, const Preprocess<T>&)
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "call.h"

namespace l2l {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + "]";
}

inline std::string text(const torch::stable::Device& device) {
  return device.is_cpu() ? "the CPU" : "cuda:" + std::to_string(device.index());
}

// What a device says where a block of threads has not the shared memory for a shape.
inline void check_fits(bool fits, const Shape& shape) {
  STD_TORCH_CHECK(fits, shape.hidden, " units need more shared memory than this GPU has: use a ",
                  "smaller LSTM, float32, or the reference");
}

// Of a call in place: what it writes must not lie in what it reads beside.
inline void check_apart(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  const auto range = [](const Tensor& tensor) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    return std::pair{begin, begin + tensor.numel() * tensor.element_size()};
  };
  const auto [a_begin, a_end] = range(a);
  const auto [b_begin, b_end] = range(b);
  STD_TORCH_CHECK(a_end <= b_begin || b_end <= a_begin, a_name, " and ", b_name,
                  " share memory: pass ", b_name, ".clone()");
}

inline void check_p(double p) {
  STD_TORCH_CHECK(p > 0 && p <= max_p, "p is ", p, ": it must be above 0 and at most ", max_p);
}

inline void check_dtype(const Tensor& tensor, const char* name) {
  const auto dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                  " must be float32 or float64");
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous: pass ", name, ".contiguous()");
}

// The tensor of a call whose dtype and device the others share.
struct First {
  const Tensor& tensor;
  const char* name;

  void check(const Tensor& other, const char* other_name,
             std::initializer_list<int64_t> sizes) const {
    STD_TORCH_CHECK(other.device() == tensor.device(), other_name, " is not on ",
                    text(tensor.device()), ", where ", name, " is");
    STD_TORCH_CHECK(other.scalar_type() == tensor.scalar_type(), other_name, " and ", name,
                    " differ in dtype: all tensors of a call share one");
    STD_TORCH_CHECK(other.sizes().size() == sizes.size() &&
                        std::equal(sizes.begin(), sizes.end(), other.sizes().begin()),
                    other_name, " has shape ", text(other.sizes()), ", expected ",
                    text(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size())));
    check_contiguous(other, other_name);
  }
};

// Checks what every operator takes, and says what shape of problem it is. `first` has the axes
// [N], or [steps, N].
inline Shape check(const First& first, size_t axes, const Tensor& state, const Tensor& phi,
                   double p, double output_scale, bool theta_input, bool odd) {
  const auto sizes = first.tensor.sizes();
  check_dtype(first.tensor, first.name);
  STD_TORCH_CHECK(sizes.size() == axes, first.name, " has shape ", text(sizes), ", expected ",
                  axes == 1 ? "[N]" : "[T, N]");
  STD_TORCH_CHECK(state.sizes().size() == 4 && state.size(0) >= 1 && state.size(2) >= 1,
                  "state has shape ", text(state.sizes()), ", expected [L, 2, H, M]");
  Shape shape{sizes[axes - 1], state.size(0), state.size(2), {p, output_scale, theta_input, odd}};
  STD_TORCH_CHECK(shape.hidden <= max_hidden, "state has ", shape.hidden,
                  " units, the fused kernels take at most ", max_hidden);
  check_p(p);
  STD_TORCH_CHECK(std::isfinite(output_scale), "output_scale is ", output_scale,
                  ": it must be finite");
  check_contiguous(first.tensor, first.name);
  first.check(state, "state", {shape.layers, 2, shape.hidden, shape.states()});
  first.check(phi, "phi", {shape.phi()});
  return shape;
}

template <class T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls f(T()) with the dtype of a tensor.
template <class F>
void with_dtype(const Tensor& tensor, F f) {
  if (tensor.scalar_type() == ScalarType::Float)
    f(float());
  else
    f(double());
}

template <class Device>
void theta_step_(const Tensor& theta, const Tensor& gradient, const Tensor& state,
                 const Tensor& phi, double p, double output_scale, bool theta_input, bool odd) {
  const First first{theta, "theta"};
  const Shape shape = check(first, 1, state, phi, p, output_scale, theta_input, odd);
  first.check(gradient, "gradient", {shape.coordinates});
  check_apart(theta, "theta", state, "state");
  check_apart(theta, "theta", gradient, "gradient");
  check_apart(theta, "theta", phi, "phi");
  check_apart(state, "state", gradient, "gradient");
  check_apart(state, "state", phi, "phi");
  const typename Device::Guard guard(theta);
  with_dtype(theta, [&](auto zero) {
    using T = decltype(zero);
    Device::step(shape,
                 Step<T>{in<T>(theta), in<T>(gradient), in<T>(state), out<T>(theta), out<T>(state)},
                 phi);
  });
}

template <class Device>
std::tuple<Tensor, Tensor> theta_step(const Tensor& theta, const Tensor& gradient,
                                      const Tensor& state, const Tensor& phi, double p,
                                      double output_scale, bool theta_input, bool odd) {
  const First first{theta, "theta"};
  const Shape shape = check(first, 1, state, phi, p, output_scale, theta_input, odd);
  first.check(gradient, "gradient", {shape.coordinates});
  Tensor next_theta = torch::stable::empty_like(theta);
  Tensor next_state = torch::stable::empty_like(state);
  const typename Device::Guard guard(theta);
  with_dtype(theta, [&](auto zero) {
    using T = decltype(zero);
    Device::step(shape,
                 Step<T>{in<T>(theta), in<T>(gradient), in<T>(state), out<T>(next_theta),
                         out<T>(next_state)},
                 phi);
  });
  return {next_theta, next_state};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> theta_step_backward(
    const Tensor& theta, const Tensor& gradient, const Tensor& state, const Tensor& phi,
    const Tensor& d_next_theta, const Tensor& d_next_state, double p, double output_scale,
    bool theta_input, bool odd) {
  const First first{theta, "theta"};
  const Shape shape = check(first, 1, state, phi, p, output_scale, theta_input, odd);
  first.check(gradient, "gradient", {shape.coordinates});
  first.check(d_next_theta, "d_next_theta", {shape.coordinates});
  first.check(d_next_state, "d_next_state", {shape.layers, 2, shape.hidden, shape.states()});
  Tensor d_theta = torch::stable::empty_like(theta);
  Tensor d_gradient = torch::stable::empty_like(gradient);
  Tensor d_state = torch::stable::empty_like(state);
  Tensor d_phi = torch::stable::empty_like(phi);
  const typename Device::Guard guard(theta);
  with_dtype(theta, [&](auto zero) {
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
  const First first{gradients, "gradients"};
  const Shape shape = check(first, 2, state, phi, p, output_scale, theta_input, odd);
  const int64_t steps = gradients.size(0);
  first.check(cotangents, "cotangents", {steps, shape.coordinates});
  if (thetas) first.check(*thetas, "thetas", {steps, shape.coordinates});
  STD_TORCH_CHECK(thetas || !theta_input,
                  "thetas is missing: phi sees theta, pass the theta [T, N] that each update saw");
  Tensor d_phi = torch::stable::empty_like(phi);
  const typename Device::Guard guard(gradients);
  with_dtype(gradients, [&](auto zero) {
    using T = decltype(zero);
    Device::backward(
        shape,
        Backward<T>{steps, in<T>(gradients), in<T>(state), in<T>(cotangents),
                    thetas ? in<T>(*thetas) : nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
        phi, out<T>(d_phi));
  });
  return d_phi;
}

// Eq. 5 alone: [2, *gradient.shape].
template <class Device>
Tensor preprocess(const Tensor& gradient, double p) {
  check_dtype(gradient, "gradient");
  check_p(p);
  check_contiguous(gradient, "gradient");
  std::vector<int64_t> sizes = {2};
  sizes.insert(sizes.end(), gradient.sizes().begin(), gradient.sizes().end());
  Tensor result = torch::stable::new_empty(gradient, sizes);
  const typename Device::Guard guard(gradient);
  with_dtype(gradient, [&](auto zero) {
    using T = decltype(zero);
    Device::preprocess(
        gradient, Preprocess<T>{p, gradient.numel(), in<T>(gradient), nullptr, out<T>(result)});
  });
  return result;
}

template <class Device>
Tensor preprocess_backward(const Tensor& gradient, const Tensor& d_result, double p) {
  check_dtype(gradient, "gradient");
  check_p(p);
  const auto sizes = d_result.sizes();
  STD_TORCH_CHECK(
      sizes.size() == gradient.sizes().size() + 1 && sizes[0] == 2 &&
          std::equal(gradient.sizes().begin(), gradient.sizes().end(), sizes.begin() + 1) &&
          d_result.scalar_type() == gradient.scalar_type() &&
          d_result.device() == gradient.device() && gradient.is_contiguous() &&
          d_result.is_contiguous(),
      "d_result must be contiguous like gradient, with a first dimension of 2");
  Tensor d_gradient = torch::stable::empty_like(gradient);
  const typename Device::Guard guard(gradient);
  with_dtype(gradient, [&](auto zero) {
    using T = decltype(zero);
    Device::preprocess(gradient, Preprocess<T>{p, gradient.numel(), in<T>(gradient),
                                               in<T>(d_result), out<T>(d_gradient)});
  });
  return d_gradient;
}

// The operators' names and signatures, for a namespace of PyTorch's.
template <class Library>
void define(Library& m) {
#define L2L_FORM "*, float p, float output_scale, bool theta_input, bool odd"
  m.def("theta_step_(Tensor(a!) theta, Tensor gradient, Tensor(b!) state, Tensor phi, " L2L_FORM
        ") -> ()");
  m.def("theta_step(Tensor theta, Tensor gradient, Tensor state, Tensor phi, " L2L_FORM
        ") -> (Tensor, Tensor)");
  m.def(
      "theta_step_backward(Tensor theta, Tensor gradient, Tensor state, Tensor phi, "
      "Tensor d_next_theta, Tensor d_next_state, " L2L_FORM
      ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "unroll_meta_gradient(Tensor gradients, Tensor state, Tensor cotangents, Tensor phi, "
      "Tensor? thetas, " L2L_FORM ") -> Tensor");
  m.def("preprocess(Tensor gradient, *, float p) -> Tensor");
  m.def("preprocess_backward(Tensor gradient, Tensor d_result, *, float p) -> Tensor");
#undef L2L_FORM
}

}  // namespace l2l

// Every operator for a device; `m` is of STABLE_TORCH_LIBRARY_IMPL.
#define L2L_IMPLEMENT(m, Device)                                                 \
  m.impl("theta_step_", TORCH_BOX(&l2l::theta_step_<Device>));                   \
  m.impl("theta_step", TORCH_BOX(&l2l::theta_step<Device>));                     \
  m.impl("theta_step_backward", TORCH_BOX(&l2l::theta_step_backward<Device>));   \
  m.impl("unroll_meta_gradient", TORCH_BOX(&l2l::unroll_meta_gradient<Device>)); \
  m.impl("preprocess", TORCH_BOX(&l2l::preprocess<Device>));                     \
  m.impl("preprocess_backward", TORCH_BOX(&l2l::preprocess_backward<Device>))
