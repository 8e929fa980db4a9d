// What module.cpp shows of the CPU's kernels.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace l2l {

std::vector<const Level*> levels();       // that this machine can run, the fastest first
const Level& level();                     // that is in use: the fastest, until use_level chooses
bool use_level(const std::string& name);  // false for one that is not here

}  // namespace l2l
