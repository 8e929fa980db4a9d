// The kernels for one instruction set. setup.py compiles this file once for each, with
// L2L_NAMESPACE as the name of its namespace, so that no two copies of a function can be mistaken
// for one another.
//
//   block.h -> forward.h, sums.h -> backward.h -> kernels.cpp --+-- -mavx512f ... --> avx512::
//                                                               +-- -mavx2 -mfma ---> avx2::
//                                                               +-------------------> baseline::
#include "kernels.h"

#include "../functions.h"
#include "backward.h"

namespace L2L_NAMESPACE {
namespace {

template <class T>
constexpr l2l::Kernels<T> kernels() {
  return {[](const Shape& shape) { return size_t(Packed<T>(shape, nullptr).size); },
          pack<T>,
          Block<T>::room,
          [](const Shape& shape) { return size_t(StepScratch<T>(shape, nullptr).size); },
          step<T>,
          [](const Shape& shape, int64_t steps) {
            return size_t(BackwardScratch<T>(shape, steps, nullptr).arena.used);
          },
          backward<T>,
          preprocess<T>,
          function<vec_t<T>>,
          multiply_adds<vec_t<T>, registers * 5 / 8>};
}

}  // namespace

#define L2L_QUOTE_(x) #x
#define L2L_QUOTE(x) L2L_QUOTE_(x)
extern const l2l::InstructionSet instruction_set;
const l2l::InstructionSet instruction_set = {L2L_QUOTE(L2L_NAMESPACE), kernels<float>(),
                                             kernels<double>()};

}  // namespace L2L_NAMESPACE
