// The module l2l_ref.backend._C: importing it registers the operators; what it binds itself says
// how it was built.
//
//   import l2l_ref.backend._C
//     +-- torch.ops.l2l_ref.*            defined here; run by cpu/cpu.cpp and cuda/cuda.cpp
//     +-- torch.ops.l2l_ref_emulated.*   defined and run by cuda/emulated.cpp
//     +-- build_info, use_instruction_set, function, multiply_adds
//     +-- emulated.use_machine, emulated.function
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cpu.h"
#include "cuda/emulated.h"
#include "operators.h"

namespace py = pybind11;

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "another compiler";
#endif
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const l2l::InstructionSet* set : l2l::instruction_sets()) names.push_back(set->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  if (l2l::use_instruction_set(name)) return;
  std::string names;
  for (const std::string& known : kernel_names()) names += (names.empty() ? "" : ", ") + known;
  throw py::value_error("this machine has no kernels '" + name + "': choose one of " + names);
}

// function(name, x [n]) -> [n] of T; `compute` takes a T of either kind.
template <class T, class F>
void bind_function(py::module_& m, F compute, const char* doc) {
  m.def(
      "function",
      [compute](const std::string& name, const py::array_t<T, py::array::c_style>& x) {
        py::array_t<T> y(x.size());
        if (!compute(name.c_str(), x.data(), y.mutable_data(), int64_t(x.size())))
          throw py::value_error("no function '" + name + "'");
        return y;
      },
      py::arg("name"), py::arg("x").noconvert(), doc);
}

template <class F>
void bind_functions(py::module_& m, F compute) {
  bind_function<float>(m, compute,
                       "exp2, exp2m1, log, sigmoid or tanh as the kernels compute it: x [n] -> "
                       "[n], float32 or float64.");
  bind_function<double>(m, compute, "");
}

}  // namespace

STABLE_TORCH_LIBRARY(l2l_ref, m) { l2l::define(m); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "The fused operators; l2l_ref.backend.ops has them as functions.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = compiler();
        info["torch"] = L2L_TORCH_VERSION;
        info["stable_abi"] = L2L_STABLE_ABI;
        info["kernels"] = kernel_names();
        info["kernel"] = l2l::instruction_set().name;
        return info;
      },
      "How the module was built: compiler, the torch it was built with and the oldest it runs "
      "with, the kernels that this machine can run and the one in use.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"),
        "Use the kernels of another instruction set, one of build_info()['kernels'].");
  m.def(
      "multiply_adds",
      [](int64_t rounds) { return l2l::instruction_set().f32.multiply_adds(rounds); },
      py::arg("rounds"),
      "Rounds of independent multiply-adds in float32, on one thread; returns how many they were.");
  bind_functions(m, [](const char* name, const auto* x, auto* y, int64_t n) {
    using T = std::decay_t<decltype(*y)>;
    return l2l::instruction_set().kernels<T>().function(name, x, y, n);
  });

  py::module_ host =
      m.def_submodule("emulated", "The GPU's kernels on the host, torch.ops.l2l_ref_emulated.*");
  host.def("use_machine", &emulated::use_machine, py::arg("processors"), py::arg("shared_block"),
           py::arg("shared_processor"), py::arg("tensor_cores") = false,
           "The GPU that the kernels imagine: its processors, the bytes of shared memory that a "
           "block of threads may have and that a processor has, and whether its tensor cores are "
           "used.");
  bind_functions(host, [](auto... call) { return emulated::compute(call...); });
}
