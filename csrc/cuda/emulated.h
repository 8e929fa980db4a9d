// What module.cpp and cpu.cpp see of the GPU's kernels on the host.
#pragma once

#include <cstdint>

#include "../cpu/kernels.h"

namespace emulated {

extern const l2l::Level level;

// The GPU that is imagined: its processors, the bytes of shared memory that a block of threads may
// have and that a processor has, and whether its tensor cores are used.
void set_machine(int processors, int64_t shared_block, int64_t shared_processor,
                 bool use_tensor_cores);

}  // namespace emulated
