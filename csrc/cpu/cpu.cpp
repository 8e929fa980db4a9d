// The operators on the CPU: picks the kernels for this machine, shares the work among PyTorch's own
// threads.
//
//   step       | block | block || block | block | ...     of all tensors of the call: a thread
//                                                          takes some, with its own scratch and one
//                                                          packed phi, and writes its own
//   backward   | segment 0  | segment 1  | ...            however many threads: at most 64
//                   |             |
//               d_phi [P]     d_phi [P]    in double       added in order --> d_phi [P]
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "../operators.h"
#include "kernels.h"

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace avx512 {
extern const l2l::InstructionSet instruction_set;
}
namespace avx2 {
extern const l2l::InstructionSet instruction_set;
}
namespace baseline {
extern const l2l::InstructionSet instruction_set;
}

namespace l2l {
namespace {

std::atomic<const InstructionSet*>& active() {
  static std::atomic<const InstructionSet*> set = instruction_sets().front();
  return set;
}

}  // namespace

std::vector<const InstructionSet*> instruction_sets() {
  std::vector<const InstructionSet*> here;
#ifdef L2L_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    here.push_back(&avx512::instruction_set);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    here.push_back(&avx2::instruction_set);
#endif
  here.push_back(&baseline::instruction_set);
  return here;
}

const InstructionSet& instruction_set() { return *active().load(); }

bool use_instruction_set(const std::string& name) {
  for (const InstructionSet* set : instruction_sets())
    if (name == set->name) {
      active() = set;
      return true;
    }
  return false;
}

namespace {

// ---- memory and threads ----

template <class T>
struct Memory {  // 64-byte aligned, uninitialised
  explicit Memory(size_t size) : at(static_cast<T*>(::operator new(size * sizeof(T), alignment))) {}
  ~Memory() { ::operator delete(at, alignment); }
  Memory(const Memory&) = delete;
  static constexpr std::align_val_t alignment{64};
  T* const at;
};

// A thread's memory, kept from call to call and never shrunk: a warm in-place step allocates
// nothing.
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
const T* pack(const Kernels<T>& kernels, const Shape& shape, const Tensor& phi) {
  T* packed = kept_memory<T, Use::packed>(kernels.packed_size(shape));
  kernels.pack(shape, in<T>(phi), packed);
  return packed;
}

// parallel_for, with the fork and join of OpenMP in words that the thread sanitizer understands.
template <class F>
void parallel(int64_t size, int64_t grain, F body) {
#ifdef __SANITIZE_THREAD__
  static char fork, join;
  const auto told = [body](int64_t begin, int64_t end) {
    __tsan_acquire(&fork);
    body(begin, end);
    __tsan_release(&join);
  };
  __tsan_release(&fork);
  torch::stable::parallel_for(0, size, grain, told);
  __tsan_acquire(&join);
#else
  torch::stable::parallel_for(0, size, grain, body);
#endif
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- the device ----

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  template <class T>
  static void step(const Shape& shape, const std::vector<Step<T>>& calls, const Tensor& phi) {
    constexpr int64_t grain = 4;  // blocks: some 20 µs, worth waking a thread for
    const Kernels<T>& kernels = instruction_set().of<T>();
    const T* packed = pack(kernels, shape, phi);
    const int64_t block = kernels.block(shape);
    std::vector<int64_t> first = {0};  // block of each tensor
    for (const Step<T>& call : calls)
      first.push_back(first.back() + ceil_div(call.coordinates, block));
    parallel(first.back(), grain, [&](int64_t begin, int64_t end) {
      T* scratch = kept_memory<T, Use::scratch>(kernels.step_scratch(shape));
      size_t at = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
      for (; begin < end; begin = first[++at]) {
        const int64_t N = calls[at].coordinates, last = std::min(end, first[at + 1]);
        kernels.step(shape.of(N), calls[at], packed, scratch, (begin - first[at]) * block,
                     std::min((last - first[at]) * block, N));
      }
    });
  }

  // The coordinates are cut into segments without regard to the number of threads, each with a sum
  // of its own, and the sums are added in order: the same bits whatever the threads.
  template <class T>
  static void backward(const Shape& shape, const Backward<T>& call, const Tensor& phi, T* d_phi) {
    constexpr int64_t sums_bytes = 32 << 20;  // as many as fit, but 8 for the threads' sake
    const Kernels<T>& kernels = instruction_set().of<T>();
    const T* packed = pack(kernels, shape, phi);
    const int64_t block = kernels.block(shape), blocks = ceil_div(shape.coordinates, block);
    const int64_t size = shape.phi(), fitting = sums_bytes / int64_t(size * sizeof(double));
    const int64_t segments = std::min<int64_t>(blocks, std::clamp<int64_t>(fitting, 8, 64));
    std::vector<double> sums(segments * size, 0.0);
    parallel(segments, 1, [&](int64_t begin, int64_t end) {
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
};

}  // namespace
}  // namespace l2l

STABLE_TORCH_LIBRARY_IMPL(l2l_ref, CPU, m) { L2L_IMPLEMENT(m, l2l::Cpu); }
