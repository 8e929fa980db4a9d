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

// Whether both `step` and `backward` have shared memory enough on the device.
template <class T>
bool serves(const Shape&, int device);

// float and double. False where the shape needs more shared memory than the device has. One launch
// for every 72 tensors.
template <class T>
bool step(const Shape&, const std::vector<Step<T>>&, const T* phi, int device, void* stream);

// What `backward` works in: elements of T, and doubles. Sizes of the device, not of the load on it.
struct Scratch {
  int64_t elements, doubles;
};
template <class T>
Scratch backward_scratch(const Shape&, int64_t steps, int device);
template <class T>
bool backward(const Shape&, const Backward<T>&, const T* phi, T* d_phi, T* elements,
              double* doubles, int device, void* stream);

template <class T>
void preprocess(const Preprocess<T>&, void* stream);

}  // namespace l2l::cuda
