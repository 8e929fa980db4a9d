// How dφ is summed over the lanes of a block: gate rows in the vector's lanes.
//
//   d_gates [4H][64 lanes] --transpose--> d_rows [64 lanes][4H]
//
//                    gate rows -->
//     below [F]   |tile|    |    |      tile: 4 inputs by 1 to 5 vectors of gate rows in registers,
//     prev  [H]   |    |    |    |        += x[input][lane] * d_rows[lane][gate rows], all lanes
//     one         |    |    |    |
//                   Sums, in T  --flush, every 16 blocks-->  d_phi [P], in double
#pragma once

#include "block.h"

namespace L2L_NAMESPACE {

// dφ while it is summed. Of a layer: [input][gate row]; the inputs are below, prev, one (the bias),
// and zeros up to a multiple of 4; the rows are padded to whole vectors. Of the head: [H][width],
// bias [width], lanes still apart.
template <class T>
struct Sums {
  T* memory;
  int64_t H, layers, rows, size;
  int64_t first, rest;  // elements of the first layer and of each other one

  Sums(const Shape& shape, Arena<T>& arena)
      : H(shape.hidden), layers(shape.layers), rows(round_up(4 * shape.hidden, width<T>)) {
    first = inputs(shape.inputs()) * rows;
    rest = inputs(H) * rows;
    size = first + (layers - 1) * rest + (H + 1) * width<T>;
    memory = arena.take(size);
  }
  int64_t inputs(int64_t F) const { return round_up(F + H + 1, 4); }
  T* layer(int64_t index) const { return memory + (index ? first + (index - 1) * rest : 0); }
  T* head() const { return layer(layers); }

  void clear() const { std::memset(memory, 0, size * sizeof(T)); }

  // Adds everything to d_phi [P], which is packed like φ, and clears.
  void flush(const Shape& shape, double* to) const {
    const int64_t gates = 4 * H;
    for (int64_t index = 0; index < layers; ++index) {
      const T* from = layer(index);
      for (const int64_t columns : {shape.width(index), H}) {
        for (int64_t row = 0; row < gates; ++row, to += columns)
          for (int64_t k = 0; k < columns; ++k) to[k] += from[k * rows + row];
        from += columns * rows;
      }
      for (int bias = 0; bias < 2; ++bias, to += gates)
        for (int64_t row = 0; row < gates; ++row) to[row] += from[row];
    }
    for (int64_t unit = 0; unit <= H; ++unit)
      for (int64_t lane = 0; lane < width<T>; ++lane) to[unit] += head()[unit * width<T> + lane];
    clear();
  }
};

// sums[k][row] += Σ_lane x[k][lane]·d[lane][row] for 4 inputs k and `vectors` vectors of rows.
template <int vectors, class T>
inline void outer_tile(const T* d, int64_t rows, const T* const* x, T* sums) {
  using V = vec_t<T>;
  V sum[4][vectors] = {};
  for (int64_t lane = 0; lane < lanes; ++lane, d += rows) {
    V in[vectors];
#pragma GCC unroll 5
    for (int v = 0; v < vectors; ++v) in[v] = load<V>(d + v * width<T>);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const V factor = broadcast<V>(x[k][lane]);
#pragma GCC unroll 5
      for (int v = 0; v < vectors; ++v) sum[k][v] += factor * in[v];
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
#pragma GCC unroll 5
    for (int v = 0; v < vectors; ++v) {
      T* to = sums + k * rows + v * width<T>;
      store(to, V(load<V>(to) + sum[k][v]));
    }
}

template <class T>
void outer(const T* d, int64_t rows, const T* const* x, int64_t inputs, T* sums) {
  for (int64_t k = 0; k < inputs; k += 4, x += 4, sums += 4 * rows) {
    int64_t row = 0;
    const auto go = [&](auto vectors) {
      outer_tile<vectors>(d + row, rows, x, sums + row);
      row += vectors * width<T>;
    };
    while (row < rows) {
      const int64_t left = (rows - row) / width<T>;
      if (registers == 32 && left % 5 == 0)
        go(std::integral_constant<int, 5>());
      else if (registers == 32 && left >= 4)
        go(std::integral_constant<int, 4>());
      else if (left >= 2)
        go(std::integral_constant<int, 2>());
      else
        go(std::integral_constant<int, 1>());
    }
  }
}

// [rows][lanes] -> [lanes][rows]; rows is a whole number of vectors.
template <class T>
void transpose(const T* from, int64_t rows, T* to) {
  constexpr int W = width<T>;
  using V = vec_t<T>;
  for (int64_t row = 0; row < rows; row += W)
    for (int64_t lane = 0; lane < lanes; lane += W) {
      V square[W];
      for (int i = 0; i < W; ++i) square[i] = load<V>(from + (row + i) * lanes + lane);
      transpose_square(square);
      for (int i = 0; i < W; ++i) store(to + (lane + i) * rows + row, square[i]);
    }
}

}  // namespace L2L_NAMESPACE
