// The kernels of the GPU, as one block of threads runs them.
//
// A block has 32·C lanes, each a column of the state: a coordinate, or in the odd form its m(x) or
// its m(-x). A warp computes 4 units of a layer for all of them, a thread for the lanes l, l + 32,
// ...: a register tile of 16 gates by C lanes. What a layer reads, [below; prev], is staged in
// shared memory, and beside it the weights of the units at work, of which all threads of a warp
// read the same.
//
// `team(f)` runs f(thread) on all threads of a block, which then meet: on a GPU one call and a
// barrier (cuda.cu), on the host a loop over the threads (emulated.cpp). So a kernel is a sequence
// of phases, and whatever goes from one to the next lies in shared memory or in scratch.
#pragma once

#include <type_traits>

#include "../cell.h"

namespace L2L_LEVEL {

using l2l::Backward;
using l2l::Shape;
using l2l::Step;

constexpr int warp_lanes = 32, most_warps = 5;
constexpr int tile_units = 4, tile_gates = 4 * tile_units;  // of a warp going forward
constexpr int tile_columns = 8;                             // of a warp going back
template <class T>
constexpr int tile_sums = sizeof(T) == 4 ? 8 : 4;  // rows and columns of dφ that a thread sums

template <class T>
L2L_INLINE T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
L2L_INLINE T least(T a, T b) {
  return b < a ? b : a;
}

// n consecutive elements, 16 bytes at a time; `from` is aligned to that.
template <int n, class T>
L2L_INLINE void load_row(T (&to)[n], const T* from) {
  constexpr int some = 16 / sizeof(T);
  static_assert(n % some == 0, "");
  struct alignas(16) Piece {
    T of[some];
  };
#pragma unroll
  for (int i = 0; i < n; i += some) {
    const Piece piece = *reinterpret_cast<const Piece*>(from + i);
#pragma unroll
    for (int j = 0; j < some; ++j) to[i + j] = piece.of[j];
  }
}

template <int n, class T>
L2L_INLINE void store_row(T* to, const T (&from)[n]) {
  constexpr int some = 16 / sizeof(T);
  struct alignas(16) Piece {
    T of[some];
  };
#pragma unroll
  for (int i = 0; i < n; i += some) {
    Piece piece;
#pragma unroll
    for (int j = 0; j < some; ++j) piece.of[j] = from[i + j];
    *reinterpret_cast<Piece*>(to + i) = piece;
  }
}

// *to = present ? *from : 0, from global to shared memory, done when `await_copies` returns. `from`
// may be anywhere where nothing is present.
template <class T>
L2L_INLINE void copy(T* to, const T* from, bool present) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :
               : "r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "n"(sizeof(T)),
                 "r"(present ? int(sizeof(T)) : 0)
               : "memory");
#else
  *to = present ? *from : T(0);
#endif
}
L2L_INLINE void await_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

// The coordinates of a block, and which column of an array each of its lanes stands for.
struct Lanes {
  int64_t start, N;  // the first coordinate; all coordinates
  int count, half;   // coordinates of the block; the first lane of m(-x), 0 if the form is not odd

  // Which of the block's coordinates; -1 where a lane has none.
  L2L_INLINE int inside(int lane) const {
    const int at = negated(lane) ? lane - half : lane;
    return at < count ? at : -1;
  }
  L2L_INLINE bool negated(int lane) const { return half && lane >= half; }
  L2L_INLINE int64_t column(int lane) const {
    const int at = inside(lane);
    return at < 0 ? -1 : start + at + (negated(lane) ? N : 0);
  }
};
L2L_INLINE Lanes lanes_of(const Shape& shape, int64_t block, int lanes) {
  const int room = shape.form.odd ? lanes / 2 : lanes;
  const int64_t start = block * room;
  return {start, shape.coordinates, int(least<int64_t>(room, shape.coordinates - start)),
          shape.form.odd ? room : 0};
}

// Where a thread finds its C lanes l, l + apart, ... in a row of the state. Both halves of a
// block's lanes are runs of columns, so two offsets say it all.
template <int C, int apart = warp_lanes>
struct StateColumns {
  int64_t first, second;
  unsigned present;  // a bit for each lane that has a coordinate

  StateColumns() = default;
  L2L_INLINE StateColumns(const Lanes& lanes, int lane) : first(lanes.start + lane), second(first) {
    if (C == 1) {
      first = lanes.column(lane);
      present = first >= 0;
      return;
    }
    constexpr int length = C / 2, further = apart * length;
    if (lanes.half) second += lanes.N - further;
    const int left = lanes.count - lane, left_second = lanes.half ? left : left - further;
    present = run(left) | run(left_second) << length;
  }
  // C / 2 lanes: a bit for each that has a coordinate, when so many are left from the first on.
  L2L_INLINE static unsigned run(int coordinates) {
    const int most = C / 2, many = ceil_div(greater(coordinates, 0), apart);
    return (1u << least(many, most)) - 1;
  }
  L2L_INLINE static constexpr bool in_second(int j) { return C > 1 && j >= C / 2; }
  L2L_INLINE bool has(int j) const { return present >> j & 1; }
  L2L_INLINE int64_t at(int j) const { return (in_second(j) ? second : first) + apart * j; }

  template <class T>
  L2L_INLINE T load(const T* row, int j) const {  // 0 where a lane has no coordinate
    return has(j) ? row[at(j)] : T(0);
  }
  template <class T>
  L2L_INLINE void copy(T* to, const T* row, int j) const {
    L2L_LEVEL::copy(to, row + at(j), has(j));
  }
  template <class T>
  L2L_INLINE void store(T* row, int j, T value) const {
    if (has(j)) row[at(j)] = value;
  }
};

// The same of scratch, which has a column for every lane.
struct ScratchColumns {
  int lane;

  L2L_INLINE ScratchColumns(const Lanes&, int lane_) : lane(lane_) {}
  template <class T>
  L2L_INLINE void copy(T* to, const T* row, int j) const {
    L2L_LEVEL::copy(to, row + lane + warp_lanes * j, true);
  }
  template <class T>
  L2L_INLINE void store(T* row, int j, T value) const {
    row[lane + warp_lanes * j] = value;
  }
};

// A layer's part of φ: w_ih [4H, F], w_hh [4H, H], b_ih [4H], b_hh [4H], one after the other.
template <class T>
struct Layer {
  const T* w_ih;
  int H, F;

  L2L_INLINE Layer(const Shape& shape, const T* phi, int layer)
      : w_ih(phi), H(int(shape.hidden)), F(int(shape.width(layer))) {
    const int64_t gates = 4 * H;
    if (layer) w_ih += gates * (shape.inputs() + H + 2) + (layer - 1) * gates * (2 * H + 2);
  }
  L2L_INLINE const T* w_hh() const { return w_ih + 4 * H * F; }
  L2L_INLINE T bias(int row) const {
    const T* both = w_hh() + 4 * H * H;
    return both[row] + both[4 * H + row];
  }
  L2L_INLINE int tiles() const { return ceil_div(H, tile_units); }
  L2L_INLINE int columns() const { return F + H; }  // of [below; prev]
  L2L_INLINE T weight(int row, int column) const {
    return column < F ? w_ih[row * F + column] : w_hh()[row * H + column - F];
  }

  // The units of a tile, scaled as cell.h wants its gates: [bias, below..., prev...][unit][gate].
  // Every warp stages its own: a thread one gate, of every other row.
  L2L_INLINE void stage(int lane, int tile, T* to) const {
    const int unit = tile * tile_units + lane % tile_gates / 4, gate = lane % 4;
    const T scale = unit < H ? T(gate == 2 ? tanh_scale : sigmoid_scale) : T(0);
    const int row = unit < H ? gate * H + unit : 0, half = lane / tile_gates;
    to += lane % tile_gates;
    if (!half) *to = scale * bias(row);
    stage_every(to + tile_gates, w_ih + row * F, 1, scale, half, 2, F, tile_gates);
    stage_every(to + (1 + F) * tile_gates, w_hh() + row * H, 1, scale, half, 2, H, tile_gates);
  }
  // A tile of columns for the way back: [gate row][column]. A thread stages one column.
  L2L_INLINE void stage_transposed(int lane, int tile, T* to) const {
    const int of_tile = lane % tile_columns, column = tile * tile_columns + of_tile;
    const T scale = column < columns() ? T(1) : T(0);
    const T* from = column < F ? w_ih + column : w_hh() + (column < columns() ? column - F : 0);
    stage_every(to + of_tile, from, column < F ? F : H, scale, lane / tile_columns,
                warp_lanes / tile_columns, 4 * H, tile_columns);
  }

 private:
  // to[i·pitch] = scale·from[i·stride] for i = first, first + step, ...
  L2L_INLINE static void stage_every(T* to, const T* from, int stride, T scale, int first, int step,
                                     int end, int pitch) {
#pragma unroll 2  // more cost registers, and the copies of the state take longer
    for (int i = first; i < end; i += step) to[i * pitch] = scale * from[i * stride];
  }
};
template <class T>
L2L_INLINE const T* head_of(const Shape& shape, const T* phi) {  // [H], bias
  return phi + shape.phi() - shape.hidden - 1;
}

// ---- what threads do in a phase; `lane` is the thread's in its warp ----

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
template <int P, class T>
L2L_INLINE void inputs(int thread, int threads, const Shape& shape, const Eq5<T>& eq5,
                       const Lanes& lanes, const T* gradient, const T* theta, T* to, int pitch) {
  for (int lane = thread; lane < P; lane += threads) {
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

template <class T>
struct StepArguments {
  Shape shape;
  Step<T> call;
  const T* phi;
  Eq5<T> eq5;
};

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
  constexpr int P = warp_lanes * C, pitch = Products<C>::pitch;
  const Shape& shape = a.shape;
  const Step<T>& call = a.call;
  const Lanes lanes = lanes_of(shape, block, P);
  const int64_t M = shape.states(), H = shape.hidden;
  T *x = shared, *cells = x + Products<C>::rows(shape) * pitch, *weights = cells + H * pitch;
  team([&](int thread) {
    inputs<P>(thread, team.threads, shape, a.eq5, lanes, call.gradient + lanes.start,
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

// ---- back through time ----

// How the sums of a layer's dφ are shared out: a thread sums n gate rows by n columns of
// [below; prev; one] over the lanes of a split.
template <int n>
struct Tasks {
  int row_tiles, column_tiles, splits;

  L2L_INLINE Tasks(int H, int F, int lanes, int threads)
      : row_tiles(ceil_div(4 * H, n)), column_tiles(ceil_div(F + H + 1, n)) {
    splits = 1;
    while (2 * splits * row_tiles * column_tiles <= threads && 8 * splits <= lanes) splits *= 2;
  }
  L2L_INLINE int count() const { return row_tiles * column_tiles * splits; }
  // Rows are dealt out in turn, so that neighbours read neighbours; columns in runs.
  L2L_INLINE int task(int row, int column, int split) const {
    return (split * column_tiles + column / n) * row_tiles + row % row_tiles;
  }
  L2L_INLINE int element(int row, int column) const { return row / row_tiles * n + column % n; }
};

// Where a block's arrays begin, in elements: in its scratch, where h is first, and in shared
// memory, where [below; prev; one] is. Rows in shared memory are 4 elements longer than there are
// lanes: threads that read different rows at once then meet in different banks.
template <class T>
struct BackwardLayout {
  static constexpr int n = tile_sums<T>;
  // h and c [steps + 1][L][H][lanes], what the first layer reads [steps][3][lanes], dh and dc
  // [L][H][lanes], d of what the first layer read [3][lanes], the head's sums [H + 1][lanes], the
  // layers' sums [tasks][n][n]
  int64_t c, in, dh, dc, d_in, head, sums, size;
  Tasks<n> first, rest;  // of the first layer and of each other one
  // c [H], the gates' derivatives [4H], weights; whole tiles where `sum_outer` reads
  int cells, d_gates, weights, shared;

  BackwardLayout(const Shape& shape, int64_t steps, int lanes, int warps)
      : first(int(shape.hidden), int(shape.inputs()), lanes, warps * warp_lanes),
        rest(int(shape.hidden), int(shape.hidden), lanes, warps * warp_lanes) {
    const int64_t H = shape.hidden, units = shape.layers * H * lanes;
    c = (steps + 1) * units;
    in = 2 * c;
    dh = in + steps * 3 * lanes;
    dc = dh + units;
    d_in = dc + units;
    head = d_in + 3 * lanes;
    sums = head + (H + 1) * lanes;
    size = sums + n * n * (first.count() + (shape.layers - 1) * int64_t(rest.count()));

    const int pitch = lanes + 4, hidden = int(H);
    const int forward = (1 + rows_read(shape)) * tile_gates, back = 4 * hidden * tile_columns;
    cells = ceil_div(rows_read(shape) + 1, n) * n * pitch;
    d_gates = cells + hidden * pitch;
    weights = d_gates + ceil_div(4 * hidden, n) * n * pitch;
    shared = weights + warps * (forward > back ? forward : back);
  }
  L2L_INLINE const Tasks<n>& tasks(int layer) const { return layer ? rest : first; }
  L2L_INLINE int64_t sums_of(int layer) const {
    return sums + (layer ? n * n * (first.count() + (layer - 1) * int64_t(rest.count())) : 0);
  }
};
template <class T>
int64_t backward_shared(const Shape& shape, int lanes, int warps) {
  return BackwardLayout<T>(shape, 0, lanes, warps).shared;
}

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

// Adds a thread's part of the sums of d [rows] times x [columns], up to whole tiles of both: what
// lies beyond is summed with them and never read.
template <int P, class T>
L2L_INLINE void sum_outer(int thread, int threads, const Tasks<tile_sums<T>> tasks, const T* d,
                          const T* x, T* sums) {
  constexpr int pitch = P + 4, n = tile_sums<T>;
  const int count = tasks.count(), tiles = tasks.row_tiles * tasks.column_tiles;
  for (int task = thread; task < count; task += threads) {
    const int row = task % tasks.row_tiles, column = task % tiles / tasks.row_tiles * n;
    const int lanes = P / tasks.splits, first = task / tiles * lanes;
    T sum[n][n], *to = sums + task * n * n;
#pragma unroll
    for (int i = 0; i < n; ++i) load_row(sum[i], to + i * n);
#pragma unroll 1
    for (int lane = first; lane < first + lanes; lane += 4) {
      T a[n][4];
#pragma unroll
      for (int i = 0; i < n; ++i) load_row(a[i], d + (row + i * tasks.row_tiles) * pitch + lane);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        T b[4];
        load_row(b, x + (column + j) * pitch + lane);
#pragma unroll
        for (int i = 0; i < n; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[i][j] += a[i][k] * b[k];
      }
    }
#pragma unroll
    for (int i = 0; i < n; ++i) store_row(to + i * n, sum[i]);
  }
}

template <int C, class T, class Team>
struct BackwardBlock {
  static constexpr int P = warp_lanes * C, pitch = P + 4;
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
        lanes(lanes_of(a_.shape, block, P)),
        H(int(shape.hidden)),
        L(int(shape.layers)),
        warps(team_.threads / warp_lanes),
        scratch(scratch_),
        x(shared) {}

  // Found anew at each use, from what lies in constant memory: registers are short.
  L2L_INLINE T* h() const { return scratch; }
  L2L_INLINE T* c() const { return scratch + a.layout.c; }
  L2L_INLINE T* in(int64_t step) const { return scratch + a.layout.in + step * 3 * P; }
  L2L_INLINE T* dh(int layer) const { return scratch + a.layout.dh + layer * H * P; }
  L2L_INLINE T* dc(int layer) const { return scratch + a.layout.dc + layer * H * P; }
  L2L_INLINE T* d_in() const { return scratch + a.layout.d_in; }
  L2L_INLINE T* head_sums() const { return scratch + a.layout.head; }
  L2L_INLINE T* cells() const { return x + a.layout.cells; }
  L2L_INLINE T* d_gates() const { return x + a.layout.d_gates; }
  L2L_INLINE T* weights(int room, int thread) const {
    return x + a.layout.weights + thread / warp_lanes * room;
  }

  // The rows of a layer in h or c, after `step` steps.
  L2L_INLINE T* at(T* base, int64_t step, int layer) const {
    return base + (step * L + layer) * H * P;
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
      for (int j = 0; j < C; ++j) f(columns, j, first, second, row * P + lane + warp_lanes * j);
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
      for (int i = thread; i < (H + 1) * P; i += team.threads) head_sums()[i] = 0;
      for (int64_t i = a.layout.sums + thread; i < a.layout.size; i += team.threads) scratch[i] = 0;
    });
  }

  L2L_INLINE void forward() const {
    for (int64_t step = 0; step < call.steps; ++step) {
      team([&](int thread) {
        const int64_t row = step * shape.coordinates + lanes.start;
        inputs<P>(thread, team.threads, shape, a.eq5, lanes, call.gradients + row,
                  shape.form.theta_input ? call.thetas + row : nullptr, in(step), P);
      });
      for (int layer = 0; layer < L; ++layer) {
        layer_forward<C, ScratchColumns>(
            team, Layer<T>(shape, a.phi, layer), lanes,
            Rows<T>{layer ? at(h(), step + 1, layer - 1) : in(step), at(h(), step, layer),
                    at(c(), step, layer), at(h(), step + 1, layer), at(c(), step + 1, layer), P},
            x, cells(), pitch, weights(0, 0));
      }
    }
  }

  // u = s·(head·h + bias): the head's sums, and dh of the top layer.
  L2L_INLINE void head_backward(int thread, int64_t step) const {
    const T* head = head_of(shape, a.phi);
    const T* cotangent = call.cotangents + step * shape.coordinates + lanes.start;
    const T* top = at(h(), step + 1, L - 1);
    for (int i = thread; i < (H + 1) * P; i += team.threads) {
      const int lane = i % P, inside = lanes.inside(lane);
      T d = inside < 0 ? T(0) : T(shape.form.output_scale) * cotangent[inside];
      if (lanes.negated(lane)) d = -d;
      head_sums()[i] += i < H * P ? d * top[i] : d;
      if (i < H * P) dh(L - 1)[i] += head[i / P] * d;
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
                              P};
        stage_layer<C, ScratchColumns>(thread, team.threads, layer, lanes, rows, x, cells(), pitch);
        for (int lane = thread; lane < P; lane += team.threads) x[columns * pitch + lane] = 1;
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
            d_h[q][j] = dh(index)[unit * P + lane + warp_lanes * j];
            d_c[q][j] = dc(index)[unit * P + lane + warp_lanes * j];
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
            dc(index)[unit * P + l] = d_c[q][j];
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
        sum_outer<P>(thread, team.threads, a.layout.tasks(index), d_gates(), x,
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
              dh(index)[(column - layer.F) * P + l] = sum[r][j];
            else if (index)
              dh(index - 1)[column * P + l] += sum[r][j];
            else
              d_in()[column * P + l] = sum[r][j];
          }
      });
    }
  }

  // Adds the block's sums to d_phi [P], which is packed like φ.
  L2L_INLINE void flush(double* d_phi, bool first) const {
    team([&](int thread) {
      for (int64_t e = thread; e < shape.phi(); e += team.threads) {
        const T sum = sum_of(e);
        d_phi[e] = first ? double(sum) : d_phi[e] + double(sum);
      }
    });
  }
  L2L_INLINE T sum_of(int64_t e) const {
    T sum = 0;
    for (int index = 0; index < L; ++index) {
      const int F = int(shape.width(index)), rows = 4 * H;
      const int64_t size = int64_t(rows) * (F + H + 2);
      if (e >= size) {
        e -= size;
        continue;
      }
      const int at = int(e), recurrent = at - rows * F, bias = recurrent - rows * H;
      const int row = bias >= 0 ? bias % rows : (recurrent >= 0 ? recurrent / H : at / F);
      const int column = bias >= 0 ? F + H : (recurrent >= 0 ? F + recurrent % H : at % F);
      const auto& tasks = a.layout.tasks(index);
      const T* sums = scratch + a.layout.sums_of(index);
      for (int split = 0; split < tasks.splits; ++split)
        sum += sums[tasks.task(row, column, split) * tile_sums<T> * tile_sums<T> +
                    tasks.element(row, column)];
      return sum;
    }
    for (int lane = 0; lane < P; ++lane) sum += head_sums()[e * P + lane];
    return sum;
  }

  // To what a single step took, as in backward.h.
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
          d_gradient += sign * a.eq5.backward(sign * call.gradients[i], d[0], d[P]);
          if (shape.form.theta_input)
            d_theta += sign * clamped_theta_backward(T(sign * call.thetas[i]), d[2 * P]);
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
  constexpr int P = warp_lanes * C;
  const int64_t room = a.shape.form.odd ? P / 2 : P;
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

// One element of dφ: the sums of all blocks, in order.
template <class T>
L2L_INLINE void reduce(const double* d_phi, int64_t grid, int64_t size, int64_t e, T* to) {
  double sum = 0;
#pragma unroll 8
  for (int64_t block = 0; block < grid; ++block) sum += d_phi[block * size + e];
  to[e] = T(sum);
}

// Eq. 5 alone, for an element.
template <class T>
struct PreprocessArguments {
  l2l::Preprocess<T> call;
  Eq5<T> eq5;
};
template <class T>
L2L_INLINE void preprocess(const PreprocessArguments<T>& a, int64_t at) {
  const auto& call = a.call;
  const T g = call.gradient[at];
  if (call.d_result)
    call.result[at] = a.eq5.backward(g, call.d_result[at], call.d_result[call.size + at]);
  else
    a.eq5.forward(g, call.result[at], call.result[call.size + at]);
}

// ---- launches ----

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

// The widest tile with which every processor has work and room for two blocks, or else the
// narrowest; as many warps as share the tiles of units evenly, or as fit.
template <class T>
Plan plan(const Shape& shape, const Machine& machine, int width,
          int64_t (*elements)(const Shape&, int, int)) {
  const int tiles = int(ceil_div<int64_t>(shape.hidden, tile_units));
  for (;; width /= 2) {
    const int lanes = warp_lanes * width;
    const int64_t blocks = ceil_div(shape.states(), int64_t(lanes));
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
template <class T>
Plan plan_step(const Shape& shape, const Machine& machine,
               int64_t (*elements)(const Shape&, int, int)) {
  return plan<T>(shape, machine, step_width<T>, elements);
}
template <class T>
Plan plan_backward(const Shape& shape, const Machine& machine) {
  Plan chosen = plan<T>(shape, machine, backward_width<T>, backward_shared<T>);
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

}  // namespace L2L_LEVEL
