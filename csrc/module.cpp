// The module l2l_ref._engine: importing it registers the operators; what it binds itself says how
// it was built.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/cpu.h"
#include "cuda/emulated.h"

namespace py = pybind11;

namespace {

#define L2L_FORM "*, float p, float output_scale, bool theta_input, bool odd"

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "another compiler";
#endif
}

std::vector<std::string> level_names() {
  std::vector<std::string> names;
  for (const l2l::Level* level : l2l::levels()) names.push_back(level->name);
  return names;
}

void use_level(const std::string& name) {
  if (l2l::use_level(name)) return;
  std::string names;
  for (const std::string& known : level_names()) names += (names.empty() ? "" : ", ") + known;
  throw py::value_error("this machine has no kernels '" + name + "': choose one of " + names);
}

template <class T>
py::array_t<T> function(const std::string& name, const py::array_t<T, py::array::c_style>& x) {
  py::array_t<T> y(x.size());
  if (!l2l::level().kernels<T>().function(name.c_str(), x.data(), y.mutable_data(), x.size()))
    throw py::value_error("no function '" + name + "'");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(l2l_ref, m) {
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
}

PYBIND11_MODULE(_engine, m) {
  m.doc() = "The fused operators; l2l_ref.fused has them as functions.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = compiler();
        info["torch"] = L2L_TORCH_VERSION;
        info["stable_abi"] = L2L_STABLE_ABI;
        info["kernels"] = level_names();
        info["kernel"] = l2l::level().name;
        return info;
      },
      "How the module was built: compiler, the torch it was built with and the oldest it runs "
      "with, "
      "the kernels that this machine can run and the one in use.");
  m.def("use_level", &use_level, py::arg("name"),
        "Use the kernels of another instruction set, one of build_info()['kernels'].");
  m.def("emulate", &emulated::set_machine, py::arg("processors"), py::arg("shared_block"),
        py::arg("shared_processor"), py::arg("tensor_cores") = false,
        "The GPU that the kernels 'emulated' imagine: its processors, the bytes of shared memory "
        "that "
        "a block of threads may have and that a processor has, and whether its tensor cores are "
        "used.");
  m.def("function", &function<float>, py::arg("name"), py::arg("x").noconvert(),
        "exp2, exp2m1, log, sigmoid or tanh as the kernels compute it: x [n] -> [n], float32 or "
        "float64.");
  m.def("function", &function<double>, py::arg("name"), py::arg("x").noconvert());
}
