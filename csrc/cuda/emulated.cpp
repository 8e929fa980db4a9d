// The GPU's kernels on the host, for the tests: the same launches, thread by thread and phase by
// phase. Where a barrier is missing, or memory is read that nobody wrote, the results are wrong:
// the threads of a phase run in an order that changes from phase to phase, and memory starts as
// NaN.
#define L2L_SCALAR
#define L2L_LEVEL emulated
#include "emulated.h"

#include <limits>
#include <vector>

#include "../functions.h"
#include "backward.h"
#include "plan.h"
#include "tensor_cores.h"

namespace emulated {
namespace {

Machine machine = {2, 227 << 10, 228 << 10};  // few processors, so that small problems fill them
bool tensor_cores = false;

struct Team {
  int threads;
  mutable int phase = 0;

  template <class F>
  void operator()(F f) const {
    constexpr int strides[] = {1, 11, 13, 17, 19};  // no divisors of 32·1 ... 32·8
    const int stride = strides[phase % 5], first = 7 * phase % threads;
    for (int i = 0; i < threads; ++i)
      f(phase % 2 ? (first + i * stride) % threads : (first + (threads - i) * stride) % threads);
    ++phase;
  }
  template <class F>
  void warps(F f) const {  // f(warp)
    for (int index = threads / warp_lanes - 1; index >= 0; --index) f(Warp{index});
    ++phase;
  }
};

template <class T>
std::vector<T> garbage(int64_t size) {
  return std::vector<T>(size, std::numeric_limits<T>::quiet_NaN());
}

// f(team, block, shared memory) for every block.
template <class T, class F>
void launch(const Plan& plan, F f) {
  for (int64_t block = 0; block < plan.grid; ++block) {
    std::vector<T> shared = garbage<T>(plan.shared / sizeof(T));
    f(Team{plan.warps * warp_lanes}, block, shared.data());
  }
}

template <class T>
bool step_on_host(const Shape& shape, const Step<T>& call, const T* phi) {
  const bool tensor = tensor_cores && takes_tensor_cores<T>(shape);
  const Plan plan = plan_step<T>(shape, machine, tensor ? tensor_shared : step_shared);
  if (!plan.shared) return false;
  const StepArguments<T> arguments = {shape, call, phi, Eq5<T>(shape.form.p)};
  with_width<step_width<T>>(plan.width, [&](auto width) {
    launch<T>(plan, [&](const Team& team, int64_t block, T* shared) {
      if constexpr (sizeof(T) == sizeof(float))
        if (tensor) return step<width, Tensored>(team, arguments, block, shared);
      step<width, Multiplied>(team, arguments, block, shared);
    });
  });
  return true;
}

template <class T>
bool backward_on_host(const Shape& shape, const Backward<T>& call, const T* phi, T* d_phi) {
  const Plan plan = plan_backward<T>(shape, machine);
  if (!plan.shared) return false;
  const BackwardLayout<T> layout = layout_of<T>(shape, call.steps, plan);
  std::vector<T> scratch = garbage<T>(plan.grid * layout.size);
  std::vector<double> sums = garbage<double>(plan.grid * shape.phi());
  const BackwardArguments<T> arguments = {shape,  call,           phi,         Eq5<T>(shape.form.p),
                                          layout, scratch.data(), sums.data(), plan.grid};
  with_width<backward_width<T>>(plan.width, [&](auto width) {
    launch<T>(plan, [&](const Team& team, int64_t block, T* shared) {
      backward<width>(team, arguments, block, shared);
    });
  });
  for (int64_t e = 0; e < shape.phi(); ++e) reduce(sums.data(), plan.grid, shape.phi(), e, d_phi);
  return true;
}

template <class T>
void preprocess_on_host(const l2l::Preprocess<T>& call, int64_t begin, int64_t end) {
  const PreprocessArguments<T> arguments = {call, Eq5<T>(call.p)};
  for (int64_t at = begin; at < end; ++at) preprocess(arguments, at);
}

template <class T>
l2l::Kernels<T> kernels() {
  l2l::Kernels<T> table = {};
  table.preprocess = preprocess_on_host<T>;
  table.whole_step = step_on_host<T>;
  table.whole_backward = backward_on_host<T>;
  table.function = function<T>;
  return table;
}

}  // namespace

const l2l::Level level = {"emulated", kernels<float>(), kernels<double>()};

void set_machine(int processors, int64_t shared_block, int64_t shared_processor,
                 bool use_tensor_cores) {
  machine = {processors, shared_block, shared_processor};
  tensor_cores = use_tensor_cores;
}

}  // namespace emulated
