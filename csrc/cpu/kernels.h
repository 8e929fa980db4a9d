// The kernels as cpu.cpp and module.cpp see them: a table for each instruction set that kernels.cpp
// is compiled for.
//
//                        avx512   avx2   baseline
//   Kernels<float>       |      |      |        |      step, backward, ...
//   Kernels<double>      |      |      |        |
//                            ^ instruction_set(): the column in use, whose kernels cpu.cpp calls
//
// A kernel works on the coordinates [begin, end) of a call and no others, so that threads can share
// its arguments.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../call.h"

namespace l2l {

// `packed` is φ as `pack` lays it out, `scratch` is memory for one thread; their sizes are numbers
// of elements.
template <class T>
struct Kernels {
  size_t (*packed_size)(const Shape&);
  void (*pack)(const Shape&, const T* phi, T* packed);
  int64_t (*block)(const Shape&);  // coordinates that share a pass
  size_t (*step_scratch)(const Shape&);
  void (*step)(const Shape&, const Step<T>&, const T* packed, T* scratch, int64_t begin,
               int64_t end);
  size_t (*backward_scratch)(const Shape&, int64_t steps);
  void (*backward)(const Shape&, const Backward<T>&, const T* packed, T* scratch, int64_t begin,
                   int64_t end);
  // The functions of cell.h, for tests: y [n] = name(x [n]); false for a name it does not know.
  bool (*function)(const char* name, const T* x, T* y, int64_t n);
  int64_t (*multiply_adds)(int64_t rounds);  // of this type, for benchmarks; how many they were
};

struct InstructionSet : Kernels<float>, Kernels<double> {
  const char* name;

  template <class T>
  const Kernels<T>& of() const {
    return *this;
  }
};

std::vector<const InstructionSet*> instruction_sets();  // that this machine can run, fastest first
const InstructionSet& instruction_set();                // the fastest, until another is chosen
bool use_instruction_set(const std::string& name);      // false for one that is not here

}  // namespace l2l
