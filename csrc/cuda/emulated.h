// What module.cpp sees of the GPU's kernels on the host.
//
//   tests --use_machine--> the GPU imagined --> torch.ops.l2l_ref_emulated.*
#pragma once

#include <cstdint>

namespace emulated {

// The GPU that is imagined: its processors, the bytes of shared memory that a block of threads may
// have and that a processor has, and whether its tensor cores are used.
void use_machine(int processors, int64_t shared_block, int64_t shared_processor,
                 bool use_tensor_cores);

// y [n] = name(x [n]) with the functions of cell.h; false for a name it does not know.
bool compute(const char* name, const float* x, float* y, int64_t n);
bool compute(const char* name, const double* x, double* y, int64_t n);

}  // namespace emulated
