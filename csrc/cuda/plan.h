// How many lanes, warps and blocks a launch has: from a shape and what the GPU has. And which
// tensors a step's has: as many as its table holds.
//
//   C:  8 --> 4 --> 2 --> 1                   at C = 1, warps:  5 --> 4 --> ... --> 1
//   the first with blocks for every           the first that fits a block's shared memory;
//   processor and room for two on each        where none does, shared = 0: the shape is refused
#pragma once

#include <vector>

#include "forward.h"
#include "sums.h"

namespace L2L_NAMESPACE {

struct Machine {
  int processors;
  int64_t shared_block, shared_processor;  // bytes that a block may have, that a processor has
};
struct Plan {
  int width, warps;  // C; warps of a block
  int64_t grid;      // blocks of threads
  int64_t shared;    // bytes; 0 if even the smallest block needs more than there is
};

template <class T>
constexpr int step_width = sizeof(T) == 4 ? 8 : 2;  // the largest C: its tile fills the registers
template <class T>
constexpr int backward_width = sizeof(T) == 4 ? 4 : 1;
constexpr int blocks_each = 2;  // blocks of threads that a processor should have at once

using Elements = int64_t (*)(const Shape&, int lanes, int warps);  // of shared memory

// The widest tile with which every processor has work and room for two blocks, or else the
// narrowest; as many warps as share the tiles of units evenly, or as fit. blocks(lanes) of all
// coordinates.
template <class T, class Blocks>
Plan plan(const Shape& shape, const Machine& machine, int width, Elements elements,
          const Blocks& blocks_of) {
  const int tiles = int(ceil_div<int64_t>(shape.hidden, tile_units));
  for (;; width /= 2) {
    const int lanes = warp_lanes * width;
    const int64_t blocks = blocks_of(lanes);
    for (int warps = ceil_div(tiles, ceil_div(tiles, most_warps)); warps >= 1; --warps) {
      const int64_t shared = elements(shape, lanes, warps) * int64_t(sizeof(T));
      const bool fits = shared <= machine.shared_block;
      const bool well =
          blocks >= machine.processors && blocks_each * (shared + 1024) <= machine.shared_processor;
      if (fits && (well || width == 1)) return {width, warps, blocks, shared};
      if (width > 1) break;  // fewer warps are for a tile that cannot shrink
    }
    if (width == 1) return {1, 1, blocks, 0};
  }
}
L2L_INLINE int64_t blocks_of(const Shape& shape, int lanes) {
  return ceil_div<int64_t>(shape.states(), lanes);
}

// Launches of a step: f(arguments, plan), each of up to `most_tensors`. False, before the first,
// where the shape needs more shared memory than there is.
template <class T, class F>
bool each_launch(const Shape& shape, const std::vector<Step<T>>& calls, const T* phi,
                 const Machine& machine, Elements elements, F f) {
  for (size_t at = 0; at < calls.size(); at += most_tensors) {
    StepArguments<T> arguments = {shape, phi, Eq5<T>(shape.form.p)};
    int& count = arguments.count = int(least<size_t>(calls.size() - at, most_tensors));
    for (int i = 0; i < count; ++i) arguments.calls[i] = calls[at + i];
    const auto blocks = [&](int lanes) {
      int64_t sum = 0;
      for (int i = 0; i < count; ++i) {
        arguments.first[i] = int(sum);
        sum += blocks_of(shape.of(arguments.calls[i].coordinates), lanes);
      }
      return sum;
    };
    const Plan chosen = plan<T>(shape, machine, step_width<T>, elements, blocks);
    if (!chosen.shared) return false;
    if (chosen.grid) f(arguments, chosen);
  }
  return true;
}
template <class T>
Plan plan_backward(const Shape& shape, const Machine& machine) {
  Plan chosen = plan<T>(shape, machine, backward_width<T>, backward_shared<T>,
                        [&](int lanes) { return blocks_of(shape, lanes); });
  chosen.grid = least<int64_t>(chosen.grid, blocks_each * machine.processors);
  return chosen;
}
template <class T>
BackwardLayout<T> layout_of(const Shape& shape, int64_t steps, const Plan& plan) {
  return {shape, steps, warp_lanes * plan.width, plan.warps};
}

// Calls f(std::integral_constant<int, C>()) with the C of a plan.
template <int most, class F>
void with_width(int width, F f) {
  if (width == most)
    f(std::integral_constant<int, most>());
  else if constexpr (most > 1)
    with_width<most / 2>(width, f);
}

}  // namespace L2L_NAMESPACE
