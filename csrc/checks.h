// What the operators say of tensors that they cannot take.
//
//   theta_step_(thetas, gradients, states, phi)
//     the first of the list, thetas[0]      float32 or float64
//     First::check of every other           its device and dtype, the shape, contiguous
//     check_apart                           what is written lies in nothing else
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "call.h"

namespace l2l {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string text(Sizes sizes) {
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

// A tensor of a call by its argument, and by its place where that is a list.
struct Name {
  const char* argument;
  int64_t at = -1;
};
inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.argument;
  if (name.at >= 0) out << '[' << name.at << ']';
  return out;
}

// The memory of a call in place: what it writes must not lie in what else it reads or writes.
struct Range {
  uintptr_t begin, end;
  Name name;
  bool written;

  Range(const Tensor& tensor, const Name& name_, bool written_)
      : begin(reinterpret_cast<uintptr_t>(tensor.const_data_ptr())),
        end(begin + tensor.numel() * tensor.element_size()),
        name(name_),
        written(written_) {}
};
inline void check_apart(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  const Range *last = nullptr, *last_written = nullptr;  // of those before, which end last
  for (const Range& range : ranges) {
    if (range.begin == range.end) continue;
    const Range* other = range.written ? last : last_written;
    if (other && other->end > range.begin) {
      const Range &a = range.written ? range : *other, &b = range.written ? *other : range;
      STD_TORCH_CHECK(false, a.name, " and ", b.name, " share memory: pass ", b.name, ".clone()");
    }
    if (!last || range.end > last->end) last = &range;
    if (range.written && (!last_written || range.end > last_written->end)) last_written = &range;
  }
}

inline void check_contiguous(const Tensor& tensor, const Name& name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous: pass ", name, ".contiguous()");
}

// The tensor of a call whose dtype and device the others share.
struct First {
  const Tensor& tensor;
  const Name name;

  void check(const Tensor& other, const Name& other_name, bool fits, Sizes sizes) const {
    STD_TORCH_CHECK(other.device() == tensor.device(), other_name, " is not on ",
                    text(tensor.device()), ", where ", name, " is");
    STD_TORCH_CHECK(other.scalar_type() == tensor.scalar_type(), other_name, " and ", name,
                    " differ in dtype: all tensors of a call share one");
    STD_TORCH_CHECK(fits, other_name, " has shape ", text(other.sizes()), ", expected ",
                    text(sizes));
    check_contiguous(other, other_name);
  }
  void check(const Tensor& other, const Name& other_name, Sizes sizes) const {
    check(other, other_name, other.sizes() == sizes, sizes);
  }
  // A state [L, 2, H, ...]: of a tensor with axes of its own, the state has them too.
  void check_state(const Tensor& state, const Name& state_name, const Shape& shape) const {
    const int64_t sizes[] = {shape.layers, 2, shape.hidden, shape.states()};
    const bool fits = state.dim() >= 4 && state.sizes().slice(0, 3) == Sizes(sizes, 3) &&
                      state.numel() == 2 * shape.layers * shape.hidden * shape.states();
    check(state, state_name, fits, sizes);
  }
};

// Checks what every operator takes, and says what shape of problem it is, but for N.
inline Shape check(const First& first, const Tensor& state, const Name& state_name,
                   const Tensor& phi, double p, double output_scale, bool theta_input, bool odd) {
  const auto dtype = first.tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, first.name,
                  " must be float32 or float64");
  STD_TORCH_CHECK(state.sizes().size() >= 4 && state.size(0) >= 1 && state.size(2) >= 1, state_name,
                  " has shape ", text(state.sizes()), ", expected [L, 2, H, M]");
  const Shape shape{0, state.size(0), state.size(2), {p, output_scale, theta_input, odd}};
  STD_TORCH_CHECK(shape.hidden <= max_hidden, state_name, " has ", shape.hidden,
                  " units, the fused kernels take at most ", max_hidden);
  STD_TORCH_CHECK(p > 0 && p <= max_p, "p is ", p, ": it must be above 0 and at most ", max_p);
  STD_TORCH_CHECK(std::isfinite(output_scale), "output_scale is ", output_scale,
                  ": it must be finite");
  check_contiguous(first.tensor, first.name);
  first.check(phi, {"phi"}, {shape.phi()});
  return shape;
}

// The same of an operator on one vector: `first` has the axes [N], or [steps, N].
inline Shape check(const First& first, size_t axes, const Tensor& state, const Tensor& phi,
                   double p, double output_scale, bool theta_input, bool odd) {
  const auto sizes = first.tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == axes, first.name, " has shape ", text(sizes), ", expected ",
                  axes == 1 ? "[N]" : "[T, N]");
  const Shape shape =
      check(first, state, {"state"}, phi, p, output_scale, theta_input, odd).of(sizes[axes - 1]);
  first.check(state, {"state"}, {shape.layers, 2, shape.hidden, shape.states()});
  return shape;
}

}  // namespace l2l
