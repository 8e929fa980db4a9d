// The operators on the CPU: checks the tensors, picks the kernels for this machine, shares the work
// among PyTorch's own threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "emulated.h"

namespace avx512 {
extern const l2l::Level level;
}
namespace avx2 {
extern const l2l::Level level;
}
namespace baseline {
extern const l2l::Level level;
}

namespace l2l {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<const Level*>& active() {
  static std::atomic<const Level*> level = levels().front();
  return level;
}

}  // namespace

std::vector<const Level*> levels() {
  std::vector<const Level*> here;
#ifdef L2L_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    here.push_back(&avx512::level);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    here.push_back(&avx2::level);
#endif
  here.push_back(&baseline::level);
  here.push_back(&emulated::level);
  return here;
}

const Level& level() { return *active().load(); }

bool use_level(const std::string& name) {
  for (const Level* level : levels())
    if (name == level->name) {
      active() = level;
      return true;
    }
  return false;
}

namespace {

// ---- checks ----

std::string text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + "]";
}

void check_like(const Tensor& theta, const Tensor& tensor, const char* name,
                std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, where theta is");
  STD_TORCH_CHECK(tensor.scalar_type() == theta.scalar_type(), name,
                  " and theta differ in dtype: all tensors of a call share one");
  STD_TORCH_CHECK(
      tensor.sizes().size() == sizes.size() &&
          std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin()),
      name, " has shape ", text(tensor.sizes()), ", expected ",
      text(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size())));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous: pass ", name,
                  ".contiguous()");
}

// Checks what every operator takes, and says what shape of problem it is.
Shape check(const Tensor& theta, const Tensor& state, const Tensor& phi, double p,
            double output_scale, bool theta_input, bool odd) {
  const auto dtype = theta.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "theta must be float32 or float64");
  STD_TORCH_CHECK(theta.sizes().size() == 1, "theta has shape ", text(theta.sizes()),
                  ", expected [N]");
  STD_TORCH_CHECK(state.sizes().size() == 4 && state.size(0) >= 1 && state.size(2) >= 1,
                  "state has shape ", text(state.sizes()), ", expected [L, 2, H, M]");
  Shape shape{theta.size(0), state.size(0), state.size(2), {p, output_scale, theta_input, odd}};
  STD_TORCH_CHECK(shape.hidden <= max_hidden, "state has ", shape.hidden,
                  " units, the fused kernels take at most ", max_hidden);
  STD_TORCH_CHECK(p > 0 && p <= max_p, "p is ", p, ": it must be above 0 and at most ", max_p);
  check_like(theta, theta, "theta", {shape.coordinates});
  check_like(theta, state, "state", {shape.layers, 2, shape.hidden, shape.states()});
  check_like(theta, phi, "phi", {shape.phi()});
  return shape;
}

// ---- memory and threads ----

template <class T>
struct Memory {  // 64-byte aligned, uninitialised
  explicit Memory(size_t size) : at(static_cast<T*>(::operator new(size * sizeof(T), alignment))) {}
  ~Memory() { ::operator delete(at, alignment); }
  Memory(const Memory&) = delete;
  static constexpr std::align_val_t alignment{64};
  T* const at;
};

// A thread's memory, kept from call to call and never shrunk: a warm in-place step allocates nothing.
enum class Use { packed, scratch };
template <class T, Use>
T* kept_memory(size_t size) {
  thread_local std::unique_ptr<Memory<T>> memory;
  thread_local size_t room = 0;
  if (size > room) {
    room = 0;  // should there be no memory
    memory.reset();
    memory = std::make_unique<Memory<T>>(size);
    room = size;
  }
  return memory->at;
}

template <class T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
const T* pack(const Kernels<T>& kernels, const Shape& shape, const Tensor& phi) {
  T* packed = kept_memory<T, Use::packed>(kernels.packed_size(shape));
  kernels.pack(shape, in<T>(phi), packed);
  return packed;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- the operators ----

void check_taken(bool taken, const Shape& shape) {
  STD_TORCH_CHECK(taken, shape.hidden, " units need more shared memory than the GPU has");
}

template <class T>
void run_step(const Shape& shape, const Step<T>& call, const Tensor& phi) {
  constexpr int64_t grain = 4;  // blocks: some 20 µs, worth waking a thread for
  const Kernels<T>& kernels = level().kernels<T>();
  if (kernels.whole_step) return check_taken(kernels.whole_step(shape, call, in<T>(phi)), shape);
  const T* packed = pack(kernels, shape, phi);
  const int64_t block = kernels.block(shape);
  torch::stable::parallel_for(
      0, ceil_div(shape.coordinates, block), grain, [&](int64_t begin, int64_t end) {
        T* scratch = kept_memory<T, Use::scratch>(kernels.step_scratch(shape));
        kernels.step(shape, call, packed, scratch, begin * block,
                     std::min(end * block, shape.coordinates));
      });
}

// The coordinates are cut into segments without regard to the number of threads, each with a sum of
// its own, and the sums are added in order: the same bits whatever the threads.
template <class T>
void run_backward(const Shape& shape, Backward<T> call, const Tensor& phi, T* d_phi) {
  constexpr int64_t sums_bytes = 32 << 20;  // as many as fit, but 8 for the threads' sake
  const Kernels<T>& kernels = level().kernels<T>();
  if (kernels.whole_backward)
    return check_taken(kernels.whole_backward(shape, call, in<T>(phi), d_phi), shape);
  const T* packed = pack(kernels, shape, phi);
  const int64_t block = kernels.block(shape), blocks = ceil_div(shape.coordinates, block);
  const int64_t size = shape.phi(), fitting = sums_bytes / int64_t(size * sizeof(double));
  const int64_t segments = std::min<int64_t>(blocks, std::clamp<int64_t>(fitting, 8, 64));
  std::vector<double> sums(segments * size, 0.0);
  torch::stable::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    const Memory<T> scratch(kernels.backward_scratch(shape, call.steps));
    for (int64_t segment = begin; segment < end; ++segment) {
      Backward<T> part = call;
      part.d_phi = sums.data() + segment * size;
      kernels.backward(shape, part, packed, scratch.at, segment * blocks / segments * block,
                       std::min((segment + 1) * blocks / segments * block, shape.coordinates));
    }
  });
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t segment = 0; segment < segments; ++segment) sum += sums[segment * size + i];
    d_phi[i] = T(sum);
  }
}

// Calls f(T()) with the dtype of theta.
template <class F>
void with_dtype(const Tensor& theta, F f) {
  if (theta.scalar_type() == ScalarType::Float)
    f(float());
  else
    f(double());
}

void theta_step_(const Tensor& theta, const Tensor& gradient, const Tensor& state,
                 const Tensor& phi, double p, double output_scale, bool theta_input, bool odd) {
  const Shape shape = check(theta, state, phi, p, output_scale, theta_input, odd);
  check_like(theta, gradient, "gradient", {shape.coordinates});
  with_dtype(theta, [&](auto zero) {
    using T = decltype(zero);
    run_step<T>(shape, {in<T>(theta), in<T>(gradient), in<T>(state), out<T>(theta), out<T>(state)},
                phi);
  });
}

std::tuple<Tensor, Tensor> theta_step(const Tensor& theta, const Tensor& gradient,
                                      const Tensor& state, const Tensor& phi, double p,
                                      double output_scale, bool theta_input, bool odd) {
  const Shape shape = check(theta, state, phi, p, output_scale, theta_input, odd);
  check_like(theta, gradient, "gradient", {shape.coordinates});
  Tensor next_theta = torch::stable::empty_like(theta);
  Tensor next_state = torch::stable::empty_like(state);
  with_dtype(theta, [&](auto zero) {
    using T = decltype(zero);
    run_step<T>(shape,
                {in<T>(theta), in<T>(gradient), in<T>(state), out<T>(next_theta),
                 out<T>(next_state)},
                phi);
  });
  return {next_theta, next_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> theta_step_backward(
    const Tensor& theta, const Tensor& gradient, const Tensor& state, const Tensor& phi,
    const Tensor& d_next_theta, const Tensor& d_next_state, double p, double output_scale,
    bool theta_input, bool odd) {
  const Shape shape = check(theta, state, phi, p, output_scale, theta_input, odd);
  check_like(theta, gradient, "gradient", {shape.coordinates});
  check_like(theta, d_next_theta, "d_next_theta", {shape.coordinates});
  check_like(theta, d_next_state, "d_next_state",
             {shape.layers, 2, shape.hidden, shape.states()});
  Tensor d_theta = torch::stable::empty_like(theta);
  Tensor d_gradient = torch::stable::empty_like(gradient);
  Tensor d_state = torch::stable::empty_like(state);
  Tensor d_phi = torch::stable::empty_like(phi);
  with_dtype(theta, [&](auto zero) {
    using T = decltype(zero);
    run_backward<T>(shape,
                    {1, in<T>(theta), in<T>(gradient), in<T>(state), in<T>(d_next_theta), nullptr,
                     in<T>(d_next_state), out<T>(d_theta), out<T>(d_gradient), out<T>(d_state)},
                    phi, out<T>(d_phi));
  });
  return {d_theta, d_gradient, d_state, d_phi};
}

Tensor unroll_meta_gradient(const Tensor& theta, const Tensor& gradients, const Tensor& state,
                            const Tensor& cotangents, const Tensor& phi, double p,
                            double output_scale, bool theta_input, bool odd) {
  const Shape shape = check(theta, state, phi, p, output_scale, theta_input, odd);
  STD_TORCH_CHECK(gradients.sizes().size() == 2, "gradients has shape ", text(gradients.sizes()),
                  ", expected [T, N]");
  const int64_t steps = gradients.size(0);
  check_like(theta, gradients, "gradients", {steps, shape.coordinates});
  check_like(theta, cotangents, "cotangents", {steps, shape.coordinates});
  Tensor d_phi = torch::stable::empty_like(phi);
  with_dtype(theta, [&](auto zero) {
    using T = decltype(zero);
    run_backward<T>(shape,
                    {steps, in<T>(theta), in<T>(gradients), in<T>(state), in<T>(cotangents),
                     nullptr, nullptr, nullptr, nullptr, nullptr},
                    phi, out<T>(d_phi));
  });
  return d_phi;
}

}  // namespace
}  // namespace l2l

STABLE_TORCH_LIBRARY_IMPL(l2l_ref, CPU, m) {
  m.impl("theta_step_", TORCH_BOX(&l2l::theta_step_));
  m.impl("theta_step", TORCH_BOX(&l2l::theta_step));
  m.impl("theta_step_backward", TORCH_BOX(&l2l::theta_step_backward));
  m.impl("unroll_meta_gradient", TORCH_BOX(&l2l::unroll_meta_gradient));
}
