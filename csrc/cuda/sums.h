// How dφ is summed over the lanes of a block of threads.
//
//                  columns of [below; prev; one] -->
//   gate rows    |n by n|      |      |    a thread's tile, in registers: n rows by n columns,
//     of         |      |      |      |      summed over the lanes of its split
//   d_gates      |      |      |      |    times `splits`, where threads would have no tile
//
//   tiles in scratch, T --sum_of--> [grid][P], double --reduce, in order--> d_phi [P], T
#pragma once

#include "forward.h"

namespace L2L_NAMESPACE {

// How the sums of a layer's dφ are shared out: a thread sums n gate rows by n columns of
// [below; prev; one] over the lanes of a split.
template <int n>
struct SumTiles {
  int row_tiles, column_tiles, splits;

  L2L_INLINE SumTiles(int H, int F, int lanes, int threads)
      : row_tiles(ceil_div(4 * H, n)), column_tiles(ceil_div(F + H + 1, n)) {
    splits = 1;
    while (2 * splits * row_tiles * column_tiles <= threads && 8 * splits <= lanes) splits *= 2;
  }
  L2L_INLINE int count() const { return row_tiles * column_tiles * splits; }
  // Rows are dealt out in turn, so that neighbours read neighbours; columns in runs.
  L2L_INLINE int tile(int row, int column, int split) const {
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
  // layers' sums [tiles][n][n]
  int64_t c, in, dh, dc, d_in, head, sums, size;
  SumTiles<n> first, rest;  // of the first layer and of each other one
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
  L2L_INLINE const SumTiles<n>& sum_tiles(int layer) const { return layer ? rest : first; }
  L2L_INLINE int64_t sums_of(int layer) const {
    return sums + (layer ? n * n * (first.count() + (layer - 1) * int64_t(rest.count())) : 0);
  }
};
template <class T>
int64_t backward_shared(const Shape& shape, int lanes, int warps) {
  return BackwardLayout<T>(shape, 0, lanes, warps).shared;
}

// Adds a thread's part of the sums of d [rows] times x [columns], up to whole tiles of both: what
// lies beyond is summed with them and never read.
template <int block_lanes, class T>
L2L_INLINE void sum_outer(int thread, int threads, const SumTiles<tile_sums<T>> tiles, const T* d,
                          const T* x, T* sums) {
  constexpr int pitch = block_lanes + 4, n = tile_sums<T>;
  const int count = tiles.count(), of_split = tiles.row_tiles * tiles.column_tiles;
  for (int tile = thread; tile < count; tile += threads) {
    const int row = tile % tiles.row_tiles, column = tile % of_split / tiles.row_tiles * n;
    const int lanes = block_lanes / tiles.splits, first = tile / of_split * lanes;
    T sum[n][n], *to = sums + tile * n * n;
#pragma unroll
    for (int i = 0; i < n; ++i) load_row(sum[i], to + i * n);
#pragma unroll 1
    for (int lane = first; lane < first + lanes; lane += 4) {
      T a[n][4];
#pragma unroll
      for (int i = 0; i < n; ++i) load_row(a[i], d + (row + i * tiles.row_tiles) * pitch + lane);
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

// One element of a block's dφ, from its sums in scratch.
template <int block_lanes, class T>
L2L_INLINE T sum_of(const Shape& shape, const BackwardLayout<T>& layout, const T* scratch,
                    int64_t e) {
  const int H = int(shape.hidden), L = int(shape.layers);
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
    const auto& tiles = layout.sum_tiles(index);
    const T* sums = scratch + layout.sums_of(index);
    for (int split = 0; split < tiles.splits; ++split)
      sum += sums[tiles.tile(row, column, split) * tile_sums<T> * tile_sums<T> +
                  tiles.element(row, column)];
    return sum;
  }
  const T* head = scratch + layout.head;
  for (int lane = 0; lane < block_lanes; ++lane) sum += head[e * block_lanes + lane];
  return sum;
}

// One element of dφ: the sums of all blocks, in order.
template <class T>
L2L_INLINE void reduce(const double* d_phi, int64_t grid, int64_t size, int64_t e, T* to) {
  double sum = 0;
#pragma unroll 8
  for (int64_t block = 0; block < grid; ++block) sum += d_phi[block * size + e];
  to[e] = T(sum);
}

}  // namespace L2L_NAMESPACE
