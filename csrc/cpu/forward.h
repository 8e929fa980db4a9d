// One step of φ for a range of coordinates: Eq. 5, the LSTM, the head, θ + u.
//
//                    64 lanes
//    below [F]   |====|xxxx|=====|      for each tile of lanes x, for each unit:
//    prev  [H]   |====|xxxx|=====|        4 gates = bias + w [below; prev], in registers
//    c     [H]   |====|xxxx|=====|        cell: the unit's row of c and h
//
// It lies in the thread's scratch, w in the packed φ. The c of a whole block is read and written
// where the state is, and h is written there too. The last layer's h gives u. Meanwhile the cache
// is asked for the state of the next block.
#pragma once

#include "block.h"

namespace L2L_NAMESPACE {

// The scaled gates of one unit for a tile of lanes; w is the unit's part of Packed::Layer::forward.
template <class T>
inline void unit_gates(vec_t<T> (&gates)[4][tile], const T* w, const T* below, int64_t F,
                       const T* prev, int64_t H) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
    for (int t = 0; t < tile; ++t) gates[j][t] = broadcast<vec_t<T>>(w[j]);
  multiply(gates, w + 4, below, F);
  multiply(gates, w + 4 + 4 * F, prev, H);
}

// One layer: below [F][lanes], prev (its last h) [H][lanes], H rows c -> h [H][lanes], H rows
// next_c. With `kept` [H][5][lanes] it also writes what the backward reads; without, h goes to H
// rows next_h too, and next_c may be c. Calls meanwhile(unit, lane) before the products of each
// tile.
template <bool keep, class T, class C, class Next, class Meanwhile>
void layer_forward(const T* w, const T* below, int64_t F, const T* prev, int64_t H, const C& c,
                   const Next& next_c, T* h, const Next& next_h, const Meanwhile& meanwhile,
                   T* kept = nullptr) {
  using V = vec_t<T>;
  const int64_t unit_size = 4 * (1 + F + H);
  // A tile's h waits for the gates of the next: two chains of functions, neither of which waits for
  // the other.
  V c_last[tile] = {}, o_last[tile] = {};
  T *h_last = nullptr, *kept_last = nullptr;
  int64_t unit_last = 0, lane_last = 0;
  const auto output = [&] {
#pragma GCC unroll 4
    for (int t = 0; t < tile; ++t) {
      T* const to = h_last + t * width<T>;
      if constexpr (keep) {
        const V tanh_c = tanh_of_state(c_last[t]);
        store(kept_last + 4 * lanes + t * width<T>, tanh_c);
        store(to, V(o_last[t] * tanh_c));
      } else {
        const V out = cell_output(o_last[t], c_last[t]);
        store(to, out);
        store(next_h.at(unit_last, lane_last + t * width<T>), out);
      }
    }
  };
  // Unit by unit, so that its weights and rows stay near; but tile by tile where much is kept.
  const int64_t tiles = lanes / tile_lanes<T>, outer = keep ? tiles : H, inner = keep ? H : tiles;
  for (int64_t i = 0; i < outer; ++i)
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t unit = keep ? j : i, lane = (keep ? i : j) * tile_lanes<T>;
      V gates[4][tile];
      meanwhile(unit, lane);
      unit_gates(gates, w + unit * unit_size, below + lane, F, prev + lane, H);
      if (h_last) output();
      h_last = h + unit * lanes + lane;
      if constexpr (keep) kept_last = kept + 5 * unit * lanes + lane;
      unit_last = unit, lane_last = lane;
#pragma GCC unroll 4
      for (int t = 0; t < tile; ++t) {
        c_last[t] = load<V>(c.at(unit, lane + t * width<T>));
        if constexpr (keep) {
          const auto a =
              cell_state_keep(gates[0][t], gates[1][t], gates[2][t], gates[3][t], c_last[t]);
          T* into = kept_last + t * width<T>;
          store(into, a.i);
          store(into + lanes, a.f);
          store(into + 2 * lanes, a.g);
          store(into + 3 * lanes, a.o);
          o_last[t] = a.o;
        } else {
          c_last[t] = cell_state(gates[0][t], gates[1][t], gates[2][t], c_last[t]);
          o_last[t] = sigmoid_divisor(gates[3][t]);
        }
        store(next_c.at(unit, lane + t * width<T>), c_last[t]);
      }
    }
  output();
}

// What the first layer reads: [F][lanes] from gradient and θ [lanes].
template <class T>
void inputs(const Shape& shape, const Eq5<T>& eq5, const T* gradient, const T* theta, T* to) {
  using V = vec_t<T>;
  for (int64_t lane = 0; lane < lanes; lane += width<T>) {
    V log_size, direction;
    eq5.forward(load<V>(gradient + lane), log_size, direction);
    store(to + lane, log_size);
    store(to + lanes + lane, direction);
    if (shape.form.theta_input) store(to + 2 * lanes + lane, clamped_theta(load<V>(theta + lane)));
  }
}

// Eq. 3-4: θ += u, u = s·(head·h + bias), from the top layer's h [H][lanes]. Odd: u = m(x) - m(-x).
template <class T>
void add_update(const Shape& shape, const T* head, const T* h, int64_t half, T* theta) {
  using V = vec_t<T>;
  const T scale = T(shape.form.output_scale);
  alignas(64) T out[lanes];
  for (int64_t lane = 0; lane < lanes; lane += width<T>) {
    V sum = broadcast<V>(head[shape.hidden]);
    for (int64_t unit = 0; unit < shape.hidden; ++unit)
      sum += head[unit] * load<V>(h + unit * lanes + lane);
    store(out + lane, sum);
  }
  if (half) {
    for (int64_t lane = 0; lane < half; ++lane) {
      theta[lane] += scale * (out[lane] - out[half + lane]);
      theta[half + lane] = -theta[lane];
    }
  } else {
    for (int64_t lane = 0; lane < lanes; ++lane) theta[lane] += scale * out[lane];
  }
}

template <class T>
struct StepScratch {
  T *theta, *gradient, *in, *prev, *c;
  T* h[2];  // of a layer and the one below
  int64_t size;

  StepScratch(const Shape& shape, T* memory) {
    Arena<T> arena{memory};
    theta = arena.take(lanes), gradient = arena.take(lanes);
    in = arena.take(shape.inputs() * lanes);
    for (T** rows : {&prev, &c, &h[0], &h[1]}) *rows = arena.take(shape.hidden * lanes);
    size = arena.used;
  }
};

template <class T>
void step(const Shape& shape, const l2l::Step<T>& call, const T* packed_phi, T* memory,
          int64_t begin, int64_t end) {
  const Packed<const T> packed(shape, packed_phi);
  const StepScratch<T> scratch(shape, memory);
  const Eq5<T> eq5(shape.form.p);
  const int64_t H = shape.hidden, M = shape.states();
  for (int64_t start = begin; start < end; start += Block<T>::room(shape)) {
    const Block<T> block(shape, start, end);
    block.load_signed(scratch.theta, call.theta);
    block.load_signed(scratch.gradient, call.gradient);
    inputs(shape, eq5, scratch.gradient, scratch.theta, scratch.in);
    const T* below = scratch.in;
    for (int64_t layer = 0; layer < shape.layers; ++layer) {
      const T *last_h = call.state + 2 * layer * H * M, *last_c = last_h + H * M;
      T *next_h = call.next_state + 2 * layer * H * M, *next_c = next_h + H * M;
      T* h = scratch.h[layer % 2];
      block.load_states(scratch.prev, last_h, H);
      if (!block.whole) block.load_states(scratch.c, last_c, H);
      const auto fetch = [&](int64_t unit, int64_t lane) {
        block.fetch_next(last_h, unit, lane);
        block.fetch_next(last_c, unit, lane);
      };
      layer_forward<false>(packed[layer].forward, below, shape.width(layer), scratch.prev, H,
                           block.rows(last_c, scratch.c), block.rows(next_c, scratch.c), h,
                           block.rows(next_h, h), fetch);
      if (!block.whole) {
        block.store_states(next_h, h, H);
        block.store_states(next_c, scratch.c, H);
      }
      below = h;
    }
    add_update(shape, packed.head, below, block.half, scratch.theta);
    std::memcpy(call.next_theta + start, scratch.theta, block.count * sizeof(T));
  }
}

}  // namespace L2L_NAMESPACE
