// What module.cpp shows of the CPU's kernels.
//
//   the machine --> instruction_sets() --the fastest, or use_instruction_set--> instruction_set()
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace l2l {

std::vector<const InstructionSet*> instruction_sets();  // that this machine can run, fastest first
const InstructionSet& instruction_set();  // that is in use: the fastest, until another is chosen
bool use_instruction_set(const std::string& name);  // false for one that is not here

}  // namespace l2l
