// The module l2l_ref.backend._C: importing it registers the operators; what it binds itself says
// how it was built.
//
//   import l2l_ref.backend._C
//     +-- torch.ops.l2l_ref.*            defined here; run by cpu/cpu.cpp and cuda/cuda.cpp
//     +-- torch.ops.l2l_ref_emulated.*   defined and run by cuda/emulated.cpp
//     +-- build_info, use_instruction_set, function, multiply_adds
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#include "operators.h"

namespace py = pybind11;

namespace {

#ifdef __clang__
constexpr const char* compiler = "clang " __clang_version__;
#else
constexpr const char* compiler = "gcc " __VERSION__;
#endif

void use_instruction_set(const std::string& name) {
  if (!l2l::use_instruction_set(name))
    throw py::value_error("this machine has no kernels '" + name +
                          "': choose one of build_info()['kernels']");
}

// x [n] -> [n]
template <class T>
py::array_t<T> function(const std::string& name, const py::array_t<T, py::array::c_style>& x) {
  py::array_t<T> y(x.size());
  if (!l2l::instruction_set().of<T>().function(name.c_str(), x.data(), y.mutable_data(), x.size()))
    throw py::value_error("no function '" + name + "'");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(l2l_ref, m) { l2l::define(m); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "The fused operators; l2l_ref.backend.ops has them as functions.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = compiler;
        info["torch"] = L2L_TORCH_VERSION;
        info["stable_abi"] = L2L_STABLE_ABI;
        py::list kernels;
        for (const l2l::InstructionSet* set : l2l::instruction_sets()) kernels.append(set->name);
        info["kernels"] = kernels;
        info["kernel"] = l2l::instruction_set().name;
        return info;
      },
      "How the module was built: compiler, the torch it was built with and the oldest it runs "
      "with, the kernels that this machine can run and the one in use.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"),
        "Use the kernels of another instruction set, one of build_info()['kernels'].");
  m.def(
      "multiply_adds",
      [](int64_t rounds) { return l2l::instruction_set().of<float>().multiply_adds(rounds); },
      py::arg("rounds"),
      "Rounds of independent multiply-adds in float32, on one thread; returns how many they were.");
  m.def("function", &function<float>, py::arg("name"), py::arg("x").noconvert(),
        "exp2, exp2m1, log, sigmoid or tanh as the kernels compute it: x [n] -> [n], float32 or "
        "float64.");
  m.def("function", &function<double>, py::arg("name"), py::arg("x").noconvert());
}
