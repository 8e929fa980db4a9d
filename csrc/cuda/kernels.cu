// The launches of the kernels on a GPU.
//
//   step         step_kernel         a block of threads for each block of coordinates of a tensor
//   backward     backward_kernel     at most two blocks a processor, each a run of coordinates
//                reduce_kernel       then a thread for each element of d_phi, from [grid][P]
#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "backward.h"
#include "kernels.h"
#include "plan.h"
#include "tensor_cores.h"

namespace l2l::cuda {
namespace {

using namespace L2L_NAMESPACE;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call would meet it again
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

Machine machine_of(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
}

std::atomic<bool> tensor_cores = false;

struct Team {
  int threads;

  template <class F>
  __device__ __forceinline__ void operator()(F f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
  template <class F>
  __device__ __forceinline__ void warps(F f) const {
    f(Warp{int(threadIdx.x) / warp_lanes, int(threadIdx.x) % warp_lanes});
    __syncthreads();
  }
};

constexpr int most_threads = most_warps * warp_lanes;

template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

template <int C, template <int> class Products, class T>
__global__ void __launch_bounds__(most_threads, blocks_each)
    step_kernel(const __grid_constant__ StepArguments<T> arguments) {
  L2L_NAMESPACE::step<C, Products>(Team{int(blockDim.x)}, arguments, blockIdx.x,
                                   shared_memory<T>());
}

template <int C, class T>
__global__ void __launch_bounds__(most_threads, blocks_each)
    backward_kernel(const __grid_constant__ BackwardArguments<T> arguments) {
  L2L_NAMESPACE::backward<C>(Team{int(blockDim.x)}, arguments, blockIdx.x, shared_memory<T>());
}

template <class T>
__global__ void reduce_kernel(const double* sums, int64_t grid, int64_t size, T* to) {
  const int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e < size) reduce(sums, grid, size, e, to);
}

// A kernel's limit on shared memory is all that the device has, whatever this launch takes: it
// belongs to the kernel, and another thread may be about to launch the same. Set once for each
// device.
template <class Arguments>
void allow_shared_memory(void (*kernel)(Arguments), const Machine& machine, int device) {
  static std::mutex mutex;
  static std::set<std::pair<void (*)(Arguments), int>> done;
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(machine.shared_block)));
  done.insert({kernel, device});
}

template <class Arguments>
void launch(void (*kernel)(Arguments), const Plan& plan, const Machine& machine,
            const Arguments& arguments, int device, void* stream) {
  if (plan.grid > 0x7fffffff) throw std::runtime_error("too many coordinates for one launch");
  allow_shared_memory(kernel, machine, device);
  kernel<<<unsigned(plan.grid), plan.warps * warp_lanes, plan.shared,
           static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError());
}

}  // namespace

void use_tensor_cores(bool on) { tensor_cores = on; }

template <class T>
bool Kernels<T>::step(const Shape& shape, const std::vector<Step<T>>& calls, const T* phi,
                      int device, void* stream) {
  const bool tensor = tensor_cores && takes_tensor_cores<T>(shape) &&
                      attribute(cudaDevAttrComputeCapabilityMajor, device) >= 8;  // for TF32
  const Machine machine = machine_of(device);
  const auto one = [&](const StepArguments<T>& arguments, const Plan& plan) {
    with_width<step_width<T>>(plan.width, [&](auto width) {
      if constexpr (sizeof(T) == sizeof(float))
        if (tensor)
          return launch(step_kernel<width, Tensored, T>, plan, machine, arguments, device, stream);
      launch(step_kernel<width, Multiplied, T>, plan, machine, arguments, device, stream);
    });
  };
  return each_launch(shape, calls, phi, machine, tensor ? tensor_shared : step_shared, one);
}

template <class T>
bool Kernels<T>::serves(const Shape& shape, int device) {
  const Machine machine = machine_of(device);
  const auto blocks = [&](int lanes) { return blocks_of(shape, lanes); };
  return plan<T>(shape, machine, step_width<T>, step_shared, blocks).shared &&
         plan_backward<T>(shape, machine).shared;
}

template <class T>
Scratch Kernels<T>::backward_scratch(const Shape& shape, int64_t steps, int device) {
  const Plan plan = plan_backward<T>(shape, machine_of(device));
  return {plan.grid * layout_of<T>(shape, steps, plan).size, plan.grid * shape.phi()};
}

template <class T>
bool Kernels<T>::backward(const Shape& shape, const Backward<T>& call, const T* phi, T* d_phi,
                          T* elements, double* doubles, int device, void* stream) {
  const Machine machine = machine_of(device);
  const Plan plan = plan_backward<T>(shape, machine);
  if (!plan.shared) return false;
  const BackwardArguments<T> arguments = {
      shape,    call,    phi,      Eq5<T>(shape.form.p), layout_of<T>(shape, call.steps, plan),
      elements, doubles, plan.grid};
  if (plan.grid)
    with_width<backward_width<T>>(plan.width, [&](auto width) {
      launch(backward_kernel<width, T>, plan, machine, arguments, device, stream);
    });
  constexpr int threads = 128;
  reduce_kernel<<<unsigned(ceil_div<int64_t>(shape.phi(), threads)), threads, 0,
                  static_cast<cudaStream_t>(stream)>>>(doubles, plan.grid, shape.phi(), d_phi);
  check(cudaGetLastError());
  return true;
}

template struct Kernels<float>;
template struct Kernels<double>;

}  // namespace l2l::cuda
