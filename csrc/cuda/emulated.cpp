// The GPU's kernels on the host, for the tests: the same launches, thread by thread and phase by
// phase.
//
//   blocks, one after the other     phase   threads, one after the other
//     shared memory: NaN at first     0      0 31 30 29 ...
//     scratch: NaN at first           1      7 18 29  8 ...
//                                     2     14  1 20  7 ...
//
// Where a barrier is missing, or memory is read that nobody wrote, the results are wrong: the
// threads of a phase run in an order that changes from phase to phase, and memory starts as NaN.
#define L2L_SCALAR
#define L2L_NAMESPACE emulated
#include <limits>
#include <vector>

#include "../operators.h"
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

// The third Device of operators.h, after cpu.cpp's and cuda.cpp's.
struct Emulated {
  struct Guard {
    explicit Guard(const l2l::Tensor&) {}
  };

  template <class T>
  static void step(const Shape& shape, const std::vector<Step<T>>& calls, const l2l::Tensor& phi) {
    const bool tensor = tensor_cores && takes_tensor_cores<T>(shape);
    const auto one = [&](const StepArguments<T>& arguments, const Plan& plan) {
      with_width<step_width<T>>(plan.width, [&](auto width) {
        launch<T>(plan, [&](const Team& team, int64_t block, T* shared) {
          if constexpr (sizeof(T) == sizeof(float))
            if (tensor) return emulated::step<width, Tensored>(team, arguments, block, shared);
          emulated::step<width, Multiplied>(team, arguments, block, shared);
        });
      });
    };
    l2l::check_fits(each_launch(shape, calls, l2l::in<T>(phi), machine,
                                tensor ? tensor_shared : step_shared, one),
                    shape);
  }

  template <class T>
  static void backward(const Shape& shape, const Backward<T>& call, const l2l::Tensor& phi,
                       T* d_phi) {
    const Plan plan = plan_backward<T>(shape, machine);
    l2l::check_fits(plan.shared, shape);
    const BackwardLayout<T> layout = layout_of<T>(shape, call.steps, plan);
    const int64_t size = shape.phi();
    std::vector<T> scratch = garbage<T>(plan.grid * layout.size);
    std::vector<double> sums = garbage<double>(plan.grid * size);
    const BackwardArguments<T> arguments = {
        shape,  call,           l2l::in<T>(phi), Eq5<T>(shape.form.p),
        layout, scratch.data(), sums.data(),     plan.grid};
    with_width<backward_width<T>>(plan.width, [&](auto width) {
      launch<T>(plan, [&](const Team& team, int64_t block, T* shared) {
        emulated::backward<width>(team, arguments, block, shared);
      });
    });
    for (int64_t e = 0; e < size; ++e) reduce(sums.data(), plan.grid, size, e, d_phi);
  }
};

// The GPU that the kernels imagine: see Machine.
void use_machine(int64_t processors, int64_t shared_block, int64_t shared_processor,
                 bool use_tensor_cores) {
  machine = {int(processors), shared_block, shared_processor};
  tensor_cores = use_tensor_cores;
}

}  // namespace
}  // namespace emulated

// A namespace of its own: l2l_ref's operators on the CPU are cpu.cpp's.
STABLE_TORCH_LIBRARY(l2l_ref_emulated, m) {
  l2l::define(m);
  m.def(
      "use_machine(int processors, int shared_block, int shared_processor, bool tensor_cores) "
      "-> ()");
}
STABLE_TORCH_LIBRARY_IMPL(l2l_ref_emulated, CPU, m) { L2L_IMPLEMENT(m, emulated::Emulated); }
STABLE_TORCH_LIBRARY_IMPL(l2l_ref_emulated, CompositeExplicitAutograd, m) {
  m.impl("use_machine", TORCH_BOX(&emulated::use_machine));
}
