// The derivative of an unroll, back through time, as one block of threads runs it.
//
//   block of threads i of the grid: a run of blocks of coordinates, one after the other
//     scratch   h, c of every step | what the first layer read | dh, dc | sums      (global memory)
//     shared    x = [below; prev; one] | cells = c | d_gates [4H] | weights
//
//   forward()          steps 0, 1, ...: h and c into scratch
//   layer_backward()   steps ..., 1, 0, layers top down, each in phases:
//     x, cells, weights --> shared; the head's part of dh
//     weights x --> the gates anew --> d_gates in shared, dc
//     d_gates, x --> sums (sums.h); the weights of the way back --> shared
//     weights d_gates --> dh of the layer and of the one below
#pragma once

#include "forward.h"
#include "sums.h"

namespace L2L_NAMESPACE {

using l2l::Backward;

template <class T>
struct BackwardArguments {
  Shape shape;
  Backward<T> call;
  const T* phi;
  Eq5<T> eq5;
  BackwardLayout<T> layout;
  T* scratch;     // [grid][layout.size]
  double* d_phi;  // [grid][P]
  int64_t grid;   // blocks of threads, each of which takes a run of blocks of coordinates
};

template <int C, class T, class Team>
struct BackwardBlock {
  static constexpr int block_lanes = warp_lanes * C, pitch = block_lanes + 4;
  const Team& team;
  const BackwardArguments<T>& a;
  const Shape& shape;
  const Backward<T>& call;
  const Lanes lanes;
  const int H, L, warps;
  T *const scratch, *const x;

  L2L_INLINE BackwardBlock(const Team& team_, const BackwardArguments<T>& a_, T* scratch_,
                           T* shared, int64_t block)
      : team(team_),
        a(a_),
        shape(a_.shape),
        call(a_.call),
        lanes(lanes_of(a_.shape, block, block_lanes)),
        H(int(shape.hidden)),
        L(int(shape.layers)),
        warps(team_.threads / warp_lanes),
        scratch(scratch_),
        x(shared) {}

  // Found anew at each use, from what lies in constant memory: registers are short.
  L2L_INLINE T* h() const { return scratch; }
  L2L_INLINE T* c() const { return scratch + a.layout.c; }
  L2L_INLINE T* in(int64_t step) const { return scratch + a.layout.in + step * 3 * block_lanes; }
  L2L_INLINE T* dh(int layer) const { return scratch + a.layout.dh + layer * H * block_lanes; }
  L2L_INLINE T* dc(int layer) const { return scratch + a.layout.dc + layer * H * block_lanes; }
  L2L_INLINE T* d_in() const { return scratch + a.layout.d_in; }
  L2L_INLINE T* head_sums() const { return scratch + a.layout.head; }
  L2L_INLINE T* cells() const { return x + a.layout.cells; }
  L2L_INLINE T* d_gates() const { return x + a.layout.d_gates; }
  L2L_INLINE T* weights(int room, int thread) const {
    return x + a.layout.weights + thread / warp_lanes * room;
  }

  // The rows of a layer in h or c, after `step` steps.
  L2L_INLINE T* at(T* base, int64_t step, int layer) const {
    return base + (step * L + layer) * H * block_lanes;
  }

  // Where in the state the h of a unit begins; units are counted through all layers.
  L2L_INLINE int64_t state_row(int unit) const {
    return (2 * (unit / H) * H + unit % H) * shape.states();
  }

  // f(columns, j, rows of h and c in the state, index in scratch) for all that a thread has of
  // them.
  template <class F>
  L2L_INLINE void each_of_state(int thread, F f) const {
    const int lane = thread % warp_lanes;
    const StateColumns<C> columns(lanes, lane);
    for (int row = thread / warp_lanes; row < L * H; row += warps) {
      const int64_t first = state_row(row), second = first + H * shape.states();
#pragma unroll
      for (int j = 0; j < C; ++j)
        f(columns, j, first, second, row * block_lanes + lane + warp_lanes * j);
    }
  }

  L2L_INLINE void begin() const {
    team([&](int thread) {
      each_of_state(thread, [&](const auto& columns, int j, int64_t first, int64_t second, int i) {
        h()[i] = columns.load(call.state + first, j);
        c()[i] = columns.load(call.state + second, j);
        dh(0)[i] = call.d_next_state ? columns.load(call.d_next_state + first, j) : T(0);
        dc(0)[i] = call.d_next_state ? columns.load(call.d_next_state + second, j) : T(0);
      });
      for (int i = thread; i < (H + 1) * block_lanes; i += team.threads) head_sums()[i] = 0;
      for (int64_t i = a.layout.sums + thread; i < a.layout.size; i += team.threads) scratch[i] = 0;
    });
  }

  L2L_INLINE void forward() const {
    for (int64_t step = 0; step < call.steps; ++step) {
      team([&](int thread) {
        const int64_t row = step * shape.coordinates + lanes.start;
        inputs<block_lanes>(thread, team.threads, shape, a.eq5, lanes, call.gradients + row,
                            shape.form.theta_input ? call.thetas + row : nullptr, in(step),
                            block_lanes);
      });
      for (int layer = 0; layer < L; ++layer) {
        layer_forward<C, ScratchColumns>(
            team, Layer<T>(shape, a.phi, layer), lanes,
            Rows<T>{layer ? at(h(), step + 1, layer - 1) : in(step), at(h(), step, layer),
                    at(c(), step, layer), at(h(), step + 1, layer), at(c(), step + 1, layer),
                    block_lanes},
            x, cells(), pitch, weights(0, 0));
      }
    }
  }

  // u = s·(head·h + bias): the head's sums, and dh of the top layer.
  L2L_INLINE void head_backward(int thread, int64_t step) const {
    const T* head = head_of(shape, a.phi);
    const T* cotangent = call.cotangents + step * shape.coordinates + lanes.start;
    const T* top = at(h(), step + 1, L - 1);
    for (int i = thread; i < (H + 1) * block_lanes; i += team.threads) {
      const int lane = i % block_lanes, inside = lanes.inside(lane);
      T d = inside < 0 ? T(0) : T(shape.form.output_scale) * cotangent[inside];
      if (lanes.negated(lane)) d = -d;
      head_sums()[i] += i < H * block_lanes ? d * top[i] : d;
      if (i < H * block_lanes) dh(L - 1)[i] += head[i / block_lanes] * d;
    }
  }

  L2L_INLINE void layer_backward(int64_t step, int index) const {
    const Layer<T> layer(shape, a.phi, index);
    const int columns = layer.columns(), room = (1 + columns) * tile_gates;
    const int back = 4 * H * tile_columns, back_tiles = ceil_div(columns, tile_columns);
    for (int first = 0; first < layer.tiles(); first += warps) {
      team([&](int thread) {
        const int tile = first + thread / warp_lanes;
        if (tile < layer.tiles()) layer.stage(thread % warp_lanes, tile, weights(room, thread));
        if (first) return;
        const Rows<T> rows = {index ? at(h(), step + 1, index - 1) : in(step),
                              at(h(), step, index),
                              at(c(), step, index),
                              nullptr,
                              nullptr,
                              block_lanes};
        stage_layer<C, ScratchColumns>(thread, team.threads, layer, lanes, rows, x, cells(), pitch);
        for (int lane = thread; lane < block_lanes; lane += team.threads)
          x[columns * pitch + lane] = 1;
        if (index == L - 1) head_backward(thread, step);
        await_copies();
      });
      team([&](int thread) {
        const int tile = first + thread / warp_lanes, lane = thread % warp_lanes;
        if (tile >= layer.tiles()) return;
        T d_h[tile_units][C], d_c[tile_units][C];  // on their way while the gates are computed
#pragma unroll
        for (int q = 0; q < tile_units; ++q)
#pragma unroll
          for (int j = 0; j < C; ++j) {
            const int unit = least(tile * tile_units + q, H - 1);
            d_h[q][j] = dh(index)[unit * block_lanes + lane + warp_lanes * j];
            d_c[q][j] = dc(index)[unit * block_lanes + lane + warp_lanes * j];
          }
        T gates[tile_gates][C];
        tile_forward(gates, weights(room, thread), x + lane, pitch, columns);
#pragma unroll
        for (int q = 0; q < tile_units; ++q) {
          const int unit = tile * tile_units + q;
          if (unit >= H) return;
#pragma unroll
          for (int j = 0; j < C; ++j) {
            const int l = lane + warp_lanes * j;
            const T c = cells()[unit * pitch + l];
            T next_c = c, h;
            auto kept = cell_keep(gates[4 * q][j], gates[4 * q + 1][j], gates[4 * q + 2][j],
                                  gates[4 * q + 3][j], next_c, h);
            cell_backward(kept, c, d_h[q][j], d_c[q][j]);
            dc(index)[unit * block_lanes + l] = d_c[q][j];
            T* to = d_gates() + unit * pitch + l;
            to[0] = kept.i, to[H * pitch] = kept.f;
            to[2 * H * pitch] = kept.g, to[3 * H * pitch] = kept.o;
          }
        }
      });
    }
    for (int first = 0; first < back_tiles; first += warps) {
      team([&](int thread) {
        const int tile = first + thread / warp_lanes;
        if (tile < back_tiles)
          layer.stage_transposed(thread % warp_lanes, tile, weights(back, thread));
        if (first) return;
        sum_outer<block_lanes>(thread, team.threads, a.layout.sum_tiles(index), d_gates(), x,
                               scratch + a.layout.sums_of(index));
      });
      team([&](int thread) {
        const int tile = first + thread / warp_lanes, lane = thread % warp_lanes;
        if (tile >= back_tiles) return;
        T sum[tile_columns][C] = {};
        multiply(sum, weights(back, thread), d_gates() + lane, pitch, 4 * H);
#pragma unroll
        for (int r = 0; r < tile_columns; ++r)
#pragma unroll
          for (int j = 0; j < C; ++j) {
            const int column = tile * tile_columns + r, l = lane + warp_lanes * j;
            if (column >= columns) continue;
            if (column >= layer.F)
              dh(index)[(column - layer.F) * block_lanes + l] = sum[r][j];
            else if (index)
              dh(index - 1)[column * block_lanes + l] += sum[r][j];
            else
              d_in()[column * block_lanes + l] = sum[r][j];
          }
      });
    }
  }

  // Adds the block's sums to d_phi [P], which is packed like φ.
  L2L_INLINE void flush(double* d_phi, bool first) const {
    team([&](int thread) {
      for (int64_t e = thread; e < shape.phi(); e += team.threads) {
        const T sum = sum_of<block_lanes>(shape, a.layout, scratch, e);
        d_phi[e] = first ? double(sum) : d_phi[e] + double(sum);
      }
    });
  }

  // To what a single step took, as in cpu/backward.h.
  L2L_INLINE void step_backward() const {
    team([&](int thread) {
      each_of_state(thread, [&](const auto& columns, int j, int64_t first, int64_t second, int i) {
        columns.store(call.d_state + first, j, dh(0)[i]);
        columns.store(call.d_state + second, j, dc(0)[i]);
      });
      for (int at = thread; at < lanes.count; at += team.threads) {
        const int64_t i = lanes.start + at;
        T d_gradient = 0, d_theta = 0;
        for (int sign = 1; sign >= (lanes.half ? -1 : 1); sign -= 2) {
          const T* d = d_in() + (sign < 0 ? lanes.half + at : at);
          d_gradient += sign * a.eq5.backward(sign * call.gradients[i], d[0], d[block_lanes]);
          if (shape.form.theta_input)
            d_theta += sign * clamped_theta_backward(T(sign * call.thetas[i]), d[2 * block_lanes]);
        }
        call.d_gradient[i] = d_gradient;
        call.d_theta[i] = d_theta + call.cotangents[i];
      }
    });
  }
};

// The run of coordinates' blocks of one block of threads.
template <int C, class T, class Team>
L2L_INLINE void backward(const Team& team, const BackwardArguments<T>& a, int64_t index,
                         T* shared) {
  constexpr int block_lanes = warp_lanes * C;
  const int64_t room = a.shape.form.odd ? block_lanes / 2 : block_lanes;
  const int64_t blocks = ceil_div(a.shape.coordinates, room);
  const int64_t first = index * blocks / a.grid, last = (index + 1) * blocks / a.grid;
  T* scratch = a.scratch + index * a.layout.size;
  for (int64_t block = first; block < last; ++block) {
    const BackwardBlock<C, T, Team> part(team, a, scratch, shared, block);
    part.begin();
    part.forward();
    for (int64_t step = a.call.steps - 1; step >= 0; --step)
      for (int layer = part.L - 1; layer >= 0; --layer) part.layer_backward(step, layer);
    if (a.call.d_gradient) part.step_backward();
    part.flush(a.d_phi + index * a.shape.phi(), block == first);
  }
}

}  // namespace L2L_NAMESPACE
