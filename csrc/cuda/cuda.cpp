// The module l2l_ref.backend._C_cuda: importing it registers the operators on CUDA. The schemas are
// those that l2l_ref.backend._C registers.
//
//   torch.ops.l2l_ref.*, CUDA tensors --operators.h--> Cuda --kernels.h--> kernels.cu
//                                        scratch: tensors; the stream: PyTorch's current one
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../operators.h"
#include "kernels.h"

namespace py = pybind11;

namespace l2l {
namespace {

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

struct Cuda {
  struct Guard : torch::stable::accelerator::DeviceGuard {
    explicit Guard(const Tensor& tensor) : DeviceGuard(tensor.get_device_index()) {}
  };

  template <class T>
  static void step(const Shape& shape, const std::vector<Step<T>>& calls, const Tensor& phi) {
    check_fits(cuda::Kernels<T>::step(shape, calls, in<T>(phi), phi.get_device_index(),
                                      current_stream(phi)),
               shape);
  }

  template <class T>
  static void backward(const Shape& shape, const Backward<T>& call, const Tensor& phi, T* d_phi) {
    const int device = phi.get_device_index();
    const cuda::Scratch sizes = cuda::Kernels<T>::backward_scratch(shape, call.steps, device);
    const Tensor elements = torch::stable::new_empty(phi, {sizes.elements});
    const Tensor doubles = torch::stable::new_empty(phi, {sizes.doubles}, ScalarType::Double);
    check_fits(cuda::Kernels<T>::backward(shape, call, in<T>(phi), d_phi, out<T>(elements),
                                          out<double>(doubles), device, current_stream(phi)),
               shape);
  }
};

}  // namespace
}  // namespace l2l

STABLE_TORCH_LIBRARY_IMPL(l2l_ref, CUDA, m) { L2L_IMPLEMENT(m, l2l::Cuda); }

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "The fused operators on CUDA; l2l_ref.backend.ops has them as functions.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["nvcc"] = L2L_NVCC;
        info["architectures"] = L2L_ARCHITECTURES;
        info["torch"] = L2L_TORCH_VERSION;
        info["spilled"] = L2L_SPILLED;
        return info;
      },
      "How the module was built: the CUDA toolkit, the architectures, torch, and for each "
      "architecture how many bytes of registers go through local memory.");
  m.def(
      "serves",
      [](int layers, int units, bool float64, int device) {
        const l2l::Shape shape = {
            1, layers, units, {1, 1, true, true}};  // the form that takes most
        return float64 ? l2l::cuda::Kernels<double>::serves(shape, device)
                       : l2l::cuda::Kernels<float>::serves(shape, device);
      },
      py::arg("layers"), py::arg("units"), py::arg("float64"), py::arg("device"),
      "Whether a GPU has shared memory enough for an LSTM.");
  m.def("use_tensor_cores", &l2l::cuda::use_tensor_cores, py::arg("on"),
        "Whether steps in float32 of up to 20 units multiply on tensor cores, as three products of "
        "TF32 numbers; off at first.");
}
