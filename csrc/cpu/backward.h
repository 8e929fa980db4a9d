// The derivative of an unroll, back through time, one block of coordinates at a time.
//
//   step                        0             1               last
//   unroll_forward    state ----+---> h, c ---+---> ... ------+---> h, c     keeps inputs, h, c,
//   unroll_backward   dh, dc <--+-- dh, dc <--+---- ... <-----+---- 0        gates; reads them
//                               |             |               |
//                               +-------------+---- Sums -----+              head, layers top down
//
// What a block keeps grows with the steps: 1.5 MB for the paper's φ and 20 of them.
#pragma once

#include "forward.h"
#include "sums.h"

namespace L2L_NAMESPACE {

using l2l::Backward;

// to [columns][lanes] = wᵀ·d, or += if `add`; w from pack_transposed, d [gates][lanes].
template <class T>
void multiply_transposed(const T* w, const T* d, int64_t gates, int64_t columns, bool add, T* to) {
  using V = vec_t<T>;
  for (int64_t lane = 0; lane < lanes; lane += tile_lanes<T>)
    for (int64_t k = 0; k < columns; k += 4) {
      V sum[4][tile] = {};
      multiply(sum, w + k * gates, d + lane, gates);
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) {
        if (k + j == columns) break;
#pragma GCC unroll 4
        for (int t = 0; t < tile; ++t) {
          T* at = to + (k + j) * lanes + lane + t * width<T>;
          store(at, add ? V(load<V>(at) + sum[j][t]) : sum[j][t]);
        }
      }
    }
}

template <class T>
struct BackwardScratch {
  Arena<T> arena;
  int64_t F, states;  // states: elements of h (or c) of all layers
  T *theta, *gradient, *cotangent, *d_in;
  T* in;                // [steps][F][lanes]
  T *h, *c;             // [steps + 1][L][H][lanes]
  T* kept;              // [steps][L][H][5][lanes]: i, f, g, o, tanh c
  T *dh, *dc;           // [L][H][lanes]
  T *d_gates, *d_rows;  // [gate row][lanes] and its transpose
  T *one, *zero;
  Sums<T> sums;

  BackwardScratch(const Shape& shape, int64_t steps, T* memory)
      : arena{memory},
        F(shape.inputs()),
        states(shape.layers * shape.hidden * lanes),
        sums(shape, arena) {
    theta = arena.take(lanes), gradient = arena.take(lanes), cotangent = arena.take(lanes);
    one = arena.take(lanes), zero = arena.take(lanes);
    d_in = arena.take(F * lanes);
    in = arena.take(steps * F * lanes);
    h = arena.take((steps + 1) * states), c = arena.take((steps + 1) * states);
    kept = arena.take(5 * steps * states);
    dh = arena.take(states), dc = arena.take(states);
    d_gates = arena.take(sums.rows * lanes), d_rows = arena.take(sums.rows * lanes);
  }
};

template <class T>
void unroll_forward(const Shape& shape, const Backward<T>& call, const Packed<const T>& packed,
                    const BackwardScratch<T>& s, const Block<T>& block) {
  const Eq5<T> eq5(shape.form.p);
  const int64_t H = shape.hidden, L = shape.layers, M = shape.states(), N = shape.coordinates;
  for (int64_t layer = 0; layer < L; ++layer) {
    block.load_states(s.h + layer * H * lanes, call.state + 2 * layer * H * M, H);
    block.load_states(s.c + layer * H * lanes, call.state + (2 * layer + 1) * H * M, H);
  }
  for (int64_t step = 0; step < call.steps; ++step) {
    block.load_signed(s.gradient, call.gradients + step * N);
    if (shape.form.theta_input) block.load_signed(s.theta, call.thetas + step * N);
    inputs(shape, eq5, s.gradient, s.theta, s.in + step * s.F * lanes);
    const T* below = s.in + step * s.F * lanes;
    for (int64_t layer = 0; layer < L; ++layer) {
      const int64_t now = step * s.states + layer * H * lanes, next = now + s.states;
      layer_forward<true>(
          packed[layer].forward, below, shape.width(layer), s.h + now, H, ScratchRows<T>{s.c + now},
          ScratchRows<T>{s.c + next}, s.h + next, ScratchRows<T>{}, [](int64_t, int64_t) {},
          s.kept + 5 * now);
      below = s.h + next;
    }
  }
}

// u = s·(head·h + bias): the head's part of dφ, and dh [H][lanes] of the top layer.
template <class T>
void head_backward(const Shape& shape, const T* head, const T* cotangent, const T* h, T* dh,
                   T* sums) {
  using V = vec_t<T>;
  for (int64_t lane = 0; lane < lanes; lane += width<T>) {
    const V d = T(shape.form.output_scale) * load<V>(cotangent + lane);
    T* sum = sums;
    for (int64_t unit = 0; unit < shape.hidden; ++unit, sum += width<T>) {
      const int64_t at = unit * lanes + lane;
      store(sum, V(load<V>(sum) + d * load<V>(h + at)));
      store(dh + at, V(load<V>(dh + at) + head[unit] * d));
    }
    store(sum, V(load<V>(sum) + d));
  }
}

// A layer's units: dh, and dc in place, [H][lanes] -> d_gates [i, f, g, o][H][lanes].
template <class T>
void units_backward(const T* kept, const T* c, const T* dh, T* dc, int64_t H, T* d_gates) {
  using V = vec_t<T>;
  for (int64_t unit = 0; unit < H; ++unit)
    for (int64_t lane = 0; lane < lanes; lane += width<T>) {
      const T* from = kept + 5 * unit * lanes + lane;
      const int64_t at = unit * lanes + lane;
      Activations<V> a = {load<V>(from), load<V>(from + lanes), load<V>(from + 2 * lanes),
                          load<V>(from + 3 * lanes), load<V>(from + 4 * lanes)};
      V d = load<V>(dc + at);
      cell_backward(a, load<V>(c + at), load<V>(dh + at), d);
      store(dc + at, d);
      store(d_gates + at, a.i);
      store(d_gates + H * lanes + at, a.f);
      store(d_gates + 2 * H * lanes + at, a.g);
      store(d_gates + 3 * H * lanes + at, a.o);
    }
}

template <class T>
void unroll_backward(const Shape& shape, const Backward<T>& call, const Packed<const T>& packed,
                     const BackwardScratch<T>& s, const Block<T>& block) {
  const int64_t H = shape.hidden, L = shape.layers, M = shape.states(), N = shape.coordinates;
  for (int64_t layer = 0; layer < L; ++layer) {
    T *dh = s.dh + layer * H * lanes, *dc = s.dc + layer * H * lanes;
    if (call.d_next_state) {
      block.load_states(dh, call.d_next_state + 2 * layer * H * M, H);
      block.load_states(dc, call.d_next_state + (2 * layer + 1) * H * M, H);
    } else {
      std::memset(dh, 0, H * lanes * sizeof(T));
      std::memset(dc, 0, H * lanes * sizeof(T));
    }
  }
  const T* x[2 * l2l::max_hidden + 4];
  for (int64_t step = call.steps - 1; step >= 0; --step) {
    block.load_signed(s.cotangent, call.cotangents + step * N);
    const int64_t top = (L - 1) * H * lanes;
    head_backward(shape, packed.head, s.cotangent, s.h + (step + 1) * s.states + top, s.dh + top,
                  s.sums.head());
    for (int64_t layer = L - 1; layer >= 0; --layer) {
      const int64_t now = step * s.states + layer * H * lanes, F = shape.width(layer);
      T *dh = s.dh + layer * H * lanes, *dc = s.dc + layer * H * lanes;
      units_backward(s.kept + 5 * now, s.c + now, dh, dc, H, s.d_gates);
      transpose(s.d_gates, s.sums.rows, s.d_rows);

      const T* below = layer ? s.h + now + s.states - H * lanes : s.in + step * F * lanes;
      const int64_t inputs = s.sums.inputs(F);
      for (int64_t k = 0; k < inputs; ++k)
        x[k] = k < F       ? below + k * lanes
               : k < F + H ? s.h + now + (k - F) * lanes
                           : (k == F + H ? s.one : s.zero);
      outer(s.d_rows, s.sums.rows, x, inputs, s.sums.layer(layer));

      if (step || call.d_state)
        multiply_transposed(packed[layer].prev, s.d_gates, 4 * H, H, false, dh);
      if (layer)
        multiply_transposed(packed[layer].below, s.d_gates, 4 * H, H, true, dh - H * lanes);
      else if (call.d_gradient)
        multiply_transposed(packed[0].below, s.d_gates, 4 * H, F, false, s.d_in);
    }
  }
}

// To what a single step took: the state, the gradient, and θ (through the third input, and as it is
// through θ + u).
template <class T>
void step_backward(const Shape& shape, const Backward<T>& call, const BackwardScratch<T>& s,
                   const Block<T>& block) {
  using V = vec_t<T>;
  const int64_t H = shape.hidden, M = shape.states();
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    block.store_states(call.d_state + 2 * layer * H * M, s.dh + layer * H * lanes, H);
    block.store_states(call.d_state + (2 * layer + 1) * H * M, s.dc + layer * H * lanes, H);
  }
  const Eq5<T> eq5(shape.form.p);
  alignas(64) T d_gradient[lanes], d_theta[lanes] = {};
  for (int64_t lane = 0; lane < lanes; lane += width<T>) {
    store(d_gradient + lane, eq5.backward(load<V>(s.gradient + lane), load<V>(s.d_in + lane),
                                          load<V>(s.d_in + lanes + lane)));
    if (shape.form.theta_input)
      store(d_theta + lane,
            clamped_theta_backward(load<V>(s.theta + lane), load<V>(s.d_in + 2 * lanes + lane)));
  }
  block.store_signed(call.d_gradient, d_gradient);
  block.store_signed(call.d_theta, d_theta);
  for (int64_t lane = 0; lane < block.count; ++lane)
    call.d_theta[block.start + lane] += s.cotangent[lane];
}

template <class T>
void backward(const Shape& shape, const Backward<T>& call, const T* packed_phi, T* memory,
              int64_t begin, int64_t end) {
  constexpr int flush_every = 16;  // blocks: often enough that their sum keeps its digits in T
  const Packed<const T> packed(shape, packed_phi);
  const BackwardScratch<T> scratch(shape, call.steps, memory);
  scratch.sums.clear();
  std::memset(scratch.d_gates, 0, scratch.sums.rows * lanes * sizeof(T));  // the padding's zeros
  std::memset(scratch.zero, 0, lanes * sizeof(T));
  for (int64_t lane = 0; lane < lanes; ++lane) scratch.one[lane] = 1;
  int blocks = 0;
  for (int64_t start = begin; start < end; start += Block<T>::room(shape)) {
    const Block<T> block(shape, start, end);
    unroll_forward(shape, call, packed, scratch, block);
    unroll_backward(shape, call, packed, scratch, block);
    if (call.d_gradient) step_backward(shape, call, scratch, block);
    if (++blocks % flush_every == 0) scratch.sums.flush(shape, call.d_phi);
  }
  scratch.sums.flush(shape, call.d_phi);
}

}  // namespace L2L_NAMESPACE
