// A step of φ, as one block of threads runs it.
//
//   global memory                   shared memory                   registers of a thread
//   gradient, theta --Eq. 5------>  x: below [F][lanes]   --+
//   state: h ---------copied----->     prev  [H][lanes]   --+--> 16 gates by C lanes --+
//   phi --------------scaled----->  weights of 4 units,   --+                          +--> cell
//                                     of each warp its own                             |
//   state: c ---------copied----->  cells [H][lanes]  ---------------------------------+
//   next state <------------------------------------------------------------------------- h, c
//   next theta <-- theta + u, from the top layer's h in the next state
//
// `team(f)` runs f(thread) on all threads of a block, which then meet: on a GPU one call and a
// barrier (kernels.cu), on the host a loop over the threads (emulated.cpp). So a kernel is a
// sequence of phases, and whatever goes from one to the next lies in shared memory or in scratch.
// `lane` is a thread's place in its warp.
#pragma once

#include "block.h"

namespace L2L_NAMESPACE {

using l2l::Step;

// Rows into shared memory, shared out among the warps. All loads are under way at once, none
// through registers: `await_copies` before the threads meet.
template <int C, class Columns, class T>
L2L_INLINE void stage_rows(int thread, int threads, const Columns& columns, const T* from,
                           int64_t stride, int rows, T* to, int pitch) {
  const int warps = threads / warp_lanes, lane = thread % warp_lanes;
  for (int row = thread / warp_lanes; row < rows; row += warps)
#pragma unroll
    for (int j = 0; j < C; ++j)
      columns.copy(to + row * pitch + lane + warp_lanes * j, from + row * stride, j);
}

// sum[r][j] += Σ_k w[k][r]·x[k][32·j]
template <int R, int C, class T>
L2L_INLINE void multiply(T (&sum)[R][C], const T* w, const T* x, int pitch, int K) {
#pragma unroll(R* C < 64 ? 2 : 1)
  for (int k = 0; k < K; ++k, w += R, x += pitch) {
    T weight[R], in[C];
    load_row(weight, w);
#pragma unroll
    for (int j = 0; j < C; ++j) in[j] = x[warp_lanes * j];
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int j = 0; j < C; ++j) sum[r][j] += weight[r] * in[j];
  }
}

// The scaled gates of a tile of units; w from Layer::stage, x [below; prev] at the thread's lane.
template <int C, class T>
L2L_INLINE void tile_forward(T (&gates)[tile_gates][C], const T* w, const T* x, int pitch, int K) {
  T bias[tile_gates];
  load_row(bias, w);
#pragma unroll
  for (int r = 0; r < tile_gates; ++r)
#pragma unroll
    for (int j = 0; j < C; ++j) gates[r][j] = bias[r];
  multiply(gates, w + tile_gates, x, pitch, K);
}

// What the first layer reads, from a block's gradients and θ.
template <int block_lanes, class T>
L2L_INLINE void inputs(int thread, int threads, const Shape& shape, const Eq5<T>& eq5,
                       const Lanes& lanes, const T* gradient, const T* theta, T* to, int pitch) {
  for (int lane = thread; lane < block_lanes; lane += threads) {
    const int at = lanes.inside(lane);
    const T sign = lanes.negated(lane) ? T(-1) : T(1);
    T log_size, direction;
    eq5.forward(at < 0 ? T(0) : sign * gradient[at], log_size, direction);
    to[lane] = log_size;
    to[pitch + lane] = direction;
    if (shape.form.theta_input)
      to[2 * pitch + lane] = clamped_theta(at < 0 ? T(0) : sign * theta[at]);
  }
}

// Eq. 3-4 for a block's coordinates: θ + u from the top layer's h in the state.
template <class T>
L2L_INLINE void add_update(int thread, int threads, const Shape& shape, const T* head, const T* h,
                           int count, const T* theta, T* next_theta) {
  const int H = int(shape.hidden);
  const int64_t M = shape.states(), minus = shape.coordinates;  // from m(x) to m(-x)
  const bool odd = shape.form.odd;
  for (int at = thread; at < count; at += threads) {
    T u = odd ? T(0) : head[H];  // the bias of m(x) - m(-x) cancels
#pragma unroll 4
    for (int unit = 0; unit < H; ++unit) {
      const T* row = h + unit * M;
      u += head[unit] * (odd ? row[at] - row[minus + at] : row[at]);
    }
    next_theta[at] = theta[at] + T(shape.form.output_scale) * u;
  }
}

// ---- a layer, a step ----

// h and c of a layer's units: rows of `stride` columns, from one step or layer to the next.
template <class T>
struct Rows {
  const T *below, *prev, *c;  // below may be null: it is in shared memory already
  T *next_h, *next_c;
  int64_t stride;
};

// What a layer reads, into shared memory: x is [below; prev], and `cells` takes c.
template <int C, class Columns, class T>
L2L_INLINE void stage_layer(int thread, int threads, const Layer<T>& layer, const Lanes& lanes,
                            const Rows<T>& rows, T* x, T* cells, int pitch) {
  const Columns columns(lanes, thread % warp_lanes);
  if (rows.below)
    stage_rows<C>(thread, threads, columns, rows.below, rows.stride, layer.F, x, pitch);
  stage_rows<C>(thread, threads, columns, rows.prev, rows.stride, layer.H, x + layer.F * pitch,
                pitch);
  stage_rows<C>(thread, threads, columns, rows.c, rows.stride, layer.H, cells, pitch);
}

// One layer for a block.
template <int C, class Columns, class T, class Team>
L2L_INLINE void layer_forward(const Team& team, const Layer<T> layer, const Lanes& lanes,
                              const Rows<T> rows, T* x, T* cells, int pitch, T* weights) {
  const int warps = team.threads / warp_lanes, room = (1 + layer.columns()) * tile_gates;
  for (int first = 0; first < layer.tiles(); first += warps) {
    team([&](int thread) {
      const int tile = first + thread / warp_lanes, lane = thread % warp_lanes;
      if (first == 0)
        stage_layer<C, Columns>(thread, team.threads, layer, lanes, rows, x, cells, pitch);
      if (tile < layer.tiles()) layer.stage(lane, tile, weights + thread / warp_lanes * room);
      await_copies();
    });
    team([&](int thread) {
      const int tile = first + thread / warp_lanes, lane = thread % warp_lanes;
      if (tile >= layer.tiles()) return;
      T gates[tile_gates][C];
      tile_forward(gates, weights + thread / warp_lanes * room, x + lane, pitch, layer.columns());
      const Columns columns(lanes, lane);
#pragma unroll
      for (int q = 0; q < tile_units; ++q) {
        const int unit = tile * tile_units + q;
        if (unit >= layer.H) return;
        T *next_h = rows.next_h + unit * rows.stride, *next_c = rows.next_c + unit * rows.stride;
#pragma unroll
        for (int j = 0; j < C; ++j) {
          T h, c = cells[unit * pitch + lane + warp_lanes * j];
          cell(gates[4 * q][j], gates[4 * q + 1][j], gates[4 * q + 2][j], gates[4 * q + 3][j], c,
               h);
          columns.store(next_h, j, h);
          columns.store(next_c, j, c);
        }
      }
    });
  }
}

constexpr int most_tensors = 72;  // of a launch, whose arguments may have 4 KB

template <class T>
struct StepArguments {
  Shape shape;  // but for N, which is a tensor's
  const T* phi;
  Eq5<T> eq5;
  int count;
  int first[most_tensors];  // block of each tensor
  Step<T> calls[most_tensors];

  // The last tensor that begins at a block or before it.
  L2L_INLINE int tensor_of(int64_t block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};
static_assert(sizeof(StepArguments<double>) <= 4096, "CUDA's limit");

// The most rows that any layer reads.
L2L_INLINE int rows_read(const Shape& shape) {
  const int H = int(shape.hidden), F = int(shape.inputs());
  return H + (shape.layers > 1 && H > F ? H : F);
}
// Elements of shared memory: [below; prev], c, weights.
L2L_INLINE int64_t step_shared(const Shape& shape, int lanes, int warps) {
  return (rows_read(shape) + shape.hidden) * lanes +
         int64_t(warps) * (1 + rows_read(shape)) * tile_gates;
}

// `Products` computes a layer: the rows that it reads in shared memory, their pitch, and
// layer(team, layer, lanes, rows, x, cells, weights).
template <int C>
struct Multiplied {  // with fused multiply-adds
  static constexpr int pitch = warp_lanes * C;

  L2L_INLINE static int rows(const Shape& shape) { return rows_read(shape); }
  template <class T, class Team>
  L2L_INLINE static void layer(const Team& team, const Layer<T>& layer, const Lanes& lanes,
                               const Rows<T>& rows, T* x, T* cells, T* weights) {
    layer_forward<C, StateColumns<C>>(team, layer, lanes, rows, x, cells, pitch, weights);
  }
};

template <int C, template <int> class Products, class T, class Team>
L2L_INLINE void step(const Team& team, const StepArguments<T>& a, int64_t block, T* shared) {
  constexpr int block_lanes = warp_lanes * C, pitch = Products<C>::pitch;
  const int tensor = a.tensor_of(block);
  const Step<T>& call = a.calls[tensor];
  const Shape shape = a.shape.of(call.coordinates);
  const Lanes lanes = lanes_of(shape, block - a.first[tensor], block_lanes);
  const int64_t M = shape.states(), H = shape.hidden;
  T *x = shared, *cells = x + Products<C>::rows(shape) * pitch, *weights = cells + H * pitch;
  team([&](int thread) {
    inputs<block_lanes>(thread, team.threads, shape, a.eq5, lanes, call.gradient + lanes.start,
                        call.theta + lanes.start, x, pitch);
  });
  for (int layer = 0; layer < shape.layers; ++layer) {
    const int64_t h = 2 * layer * H * M, c = h + H * M, below = h - 2 * H * M;
    Products<C>::layer(team, Layer<T>(shape, a.phi, layer), lanes,
                       Rows<T>{layer ? call.next_state + below : nullptr, call.state + h,
                               call.state + c, call.next_state + h, call.next_state + c, M},
                       x, cells, weights);
  }
  team([&](int thread) {
    const T* h = call.next_state + 2 * (shape.layers - 1) * H * M + lanes.start;
    add_update(thread, team.threads, shape, head_of(shape, a.phi), h, lanes.count,
               call.theta + lanes.start, call.next_theta + lanes.start);
  });
}

}  // namespace L2L_NAMESPACE
