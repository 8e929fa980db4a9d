// The CUDA kernels, without a header of CUDA or PyTorch.
//
//   cuda.cpp, operators.h        kernels.h          kernels.cu
//   PyTorch, the C++ compiler --pointers, stream--> CUDA, nvcc
//
// All pointers are to memory of `device`, which must be the current one; work is queued on
// `stream`, a cudaStream_t. What CUDA refuses is a std::runtime_error.
#pragma once

#include <vector>

#include "../call.h"

namespace l2l::cuda {

// Whether `step` may take the tensor cores (tensor_cores.h), where it has them; off at first.
void use_tensor_cores(bool on);

// What `backward` works in: elements of T, and doubles. Sizes of the device, not of the load on it.
struct Scratch {
  int64_t elements, doubles;
};

// T is float or double. `step` and `backward` are false where the shape needs more shared memory
// than the device has.
template <class T>
struct Kernels {
  static bool serves(const Shape&, int device);  // whether there is enough for both
  static bool step(const Shape&, const std::vector<Step<T>>&, const T* phi, int device,
                   void* stream);  // one launch for every 72 tensors
  static Scratch backward_scratch(const Shape&, int64_t steps, int device);
  static bool backward(const Shape&, const Backward<T>&, const T* phi, T* d_phi, T* elements,
                       double* doubles, int device, void* stream);
};

}  // namespace l2l::cuda
