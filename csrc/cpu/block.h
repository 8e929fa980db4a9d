// How a block of coordinates lies in cache, and φ beside it.
//
//            a row of memory: N or M columns              a row of the block: 64 lanes
//   plain    ...|64 columns|.......................       |0          ...          63|
//   odd      ...|32: m(x)|..............|32: m(-x)|.      |0 ... m(x) 31|32 .. m(-x) 63|
//               start                   start + N
//
// In the odd form the lanes 32... are m(-x) of the coordinates in the lanes 0...31: only loading, u
// and storing know of the form.
#pragma once

#include "../cell.h"

namespace L2L_NAMESPACE {

using l2l::Shape;

constexpr int64_t lanes = 64;

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, registers = 32;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, registers = 16;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, registers = 32;
#else
constexpr int vector_bytes = 16, registers = 16;
#endif

template <class T>
constexpr int width = vector_bytes / int(sizeof(T));
template <class T>
using vec_t = typename Vec<T, width<T>>::type;

// A register tile is 4 rows (the gates of a unit) by `tile` vectors of lanes.
constexpr int tile = registers == 32 ? 4 : 2;
template <class T>
constexpr int64_t tile_lanes = tile * width<T>;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory for a block, cut from one piece: with a null base it only counts.
template <class T>
struct Arena {
  T* base;
  int64_t used = 0;

  T* take(int64_t size) {
    T* at = base ? base + used : nullptr;
    used += round_up(size, 64 / sizeof(T));
    return at;
  }
};

// φ as the kernels read it.
template <class T>
struct Packed {
  struct Layer {
    T* forward;  // [unit][bias, below..., prev...][i, f, g, o], scaled as cell.h wants its gates
    T *below, *prev;  // w_ihᵀ and w_hhᵀ for the backward: [ceil(columns / 4)][gate row][4]
  };
  T* head;  // [H], bias
  int64_t size;

  Packed(const Shape& shape, T* memory) {
    Arena<T> arena{memory};
    const int64_t gates = 4 * shape.hidden;
    head = arena.take(shape.hidden + 1);
    for (int64_t layer = 0; layer < shape.layers && layer < 2; ++layer) {
      const int64_t before = arena.used, F = shape.width(layer);
      first[layer].forward = arena.take(gates * (1 + F + shape.hidden));
      first[layer].below = arena.take(round_up(F, 4) * gates);
      first[layer].prev = arena.take(round_up(shape.hidden, 4) * gates);
      stride = arena.used - before;
    }
    size = arena.used + (shape.layers > 2 ? (shape.layers - 2) * stride : 0);
  }
  Layer operator[](int64_t layer) const {
    if (layer < 2) return first[layer];
    const int64_t further = (layer - 1) * stride;  // all layers but the first are of one size
    return {first[1].forward + further, first[1].below + further, first[1].prev + further};
  }

 private:
  Layer first[2] = {};
  int64_t stride = 0;
};

// w [rows, columns] -> [ceil(columns / 4)][rows][4], zeros beyond.
template <class T>
void pack_transposed(const T* w, int64_t rows, int64_t columns, T* to) {
  for (int64_t k = 0; k < columns; k += 4)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = k; j < k + 4; ++j) *to++ = j < columns ? w[row * columns + j] : T(0);
}

template <class T>
void pack(const Shape& shape, const T* phi, T* memory) {
  const Packed<T> packed(shape, memory);
  const int64_t H = shape.hidden, gates = 4 * H;
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    const int64_t F = shape.width(layer);
    const T *w_ih = phi, *w_hh = w_ih + gates * F, *b_ih = w_hh + gates * H, *b_hh = b_ih + gates;
    phi = b_hh + gates;
    T* to = packed[layer].forward;
    for (int64_t unit = 0; unit < H; ++unit)
      for (int64_t k = -1; k < F + H; ++k)
        for (int64_t gate = 0; gate < 4; ++gate) {
          const int64_t row = gate * H + unit;
          const T weight = k < 0   ? b_ih[row] + b_hh[row]
                           : k < F ? w_ih[row * F + k]
                                   : w_hh[row * H + k - F];
          *to++ = T(gate == 2 ? tanh_scale : sigmoid_scale) * weight;
        }
    pack_transposed(w_ih, gates, F, packed[layer].below);
    pack_transposed(w_hh, gates, H, packed[layer].prev);
  }
  std::memcpy(packed.head, phi, (H + 1) * sizeof(T));
}

// sum[j] += Σ_k w[k][j]·x[k] for the rows j of a register tile: w [K][4], x [K][lanes].
template <class T>
inline void multiply(vec_t<T> (&sum)[4][tile], const T* w, const T* x, int64_t K) {
  using V = vec_t<T>;
#pragma GCC unroll 4
  for (int64_t k = 0; k < K; ++k, w += 4, x += lanes) {
    V in[tile];
#pragma GCC unroll 4
    for (int t = 0; t < tile; ++t) in[t] = load<V>(x + t * width<T>);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V weight = broadcast<V>(w[j]);
#pragma GCC unroll 4
      for (int t = 0; t < tile; ++t) sum[j][t] += weight * in[t];
    }
  }
}

// Rows of a block in scratch, and in an array, whose columns of m(-x) lie further on.
template <class T>
struct ScratchRows {
  T* first;

  T* at(int64_t row, int64_t lane) const { return first + row * lanes + lane; }
};
template <class T>
struct ArrayRows {
  T *low, *high;  // lane 0 of row 0, for the first half of the lanes and for the second
  int64_t stride;

  T* at(int64_t row, int64_t lane) const {
    return (lane < lanes / 2 ? low : high) + row * stride + lane;
  }
};

// Which coordinates a block holds; moves them between its lanes and arrays of N or M columns. Lanes
// without a coordinate hold zeros, with which nothing overflows and no derivative appears.
template <class T>
struct Block {
  int64_t start, count;
  int64_t half;  // the first lane of m(-x), 0 if the form is not odd
  int64_t skip;  // to the next block, 0 if there is none
  int64_t N, M;
  bool whole;  // every lane has a coordinate

  static int64_t room(const Shape& shape) { return shape.form.odd ? lanes / 2 : lanes; }

  Block(const Shape& shape, int64_t start_, int64_t end)
      : start(start_),
        half(shape.form.odd ? lanes / 2 : 0),
        N(shape.coordinates),
        M(shape.states()) {
    count = end - start < room(shape) ? end - start : room(shape);
    skip = end - start > count ? count : 0;
    whole = count == room(shape);
  }

  // Rows of M columns, of a whole block; of one that is not, those of `scratch`.
  template <class U>
  ArrayRows<U> rows(U* array) const {
    U* const low = array + start;
    return {low, half ? low + N - half : low, M};
  }
  template <class U>
  ArrayRows<U> rows(U* array, T* scratch) const {
    return whole ? rows(array) : ArrayRows<U>{scratch, scratch, lanes};
  }
  // Asks the cache for a tile of lanes of a row of the next block.
  void fetch_next(const T* array, int64_t row, int64_t lane) const {
    if (!skip) return;
#pragma GCC unroll 4
    for (int64_t i = 0; i < tile_lanes<T>; i += 64 / sizeof(T))
      __builtin_prefetch(rows(array).at(row, lane + i) + skip);
    asm volatile("");  // GCC leaves out a function that does nothing but fetch
  }

  // rows of M columns
  void load_states(T* to, const T* from, int64_t rows) const {
    from += start;
    for (int64_t row = 0; row < rows; ++row, to += lanes, from += M) {
      if (whole && !half) {
        copy<lanes>(to, from);
      } else if (whole) {
        copy<lanes / 2>(to, from);
        copy<lanes / 2>(to + half, from + N);
      } else {
        std::memset(to, 0, lanes * sizeof(T));
        std::memcpy(to, from, count * sizeof(T));
        if (half) std::memcpy(to + half, from + N, count * sizeof(T));
      }
    }
  }
  void store_states(T* to, const T* from, int64_t rows) const {
    to += start;
    for (int64_t row = 0; row < rows; ++row, from += lanes, to += M) {
      if (whole && !half) {
        copy<lanes>(to, from);
      } else if (whole) {
        copy<lanes / 2>(to, from);
        copy<lanes / 2>(to + N, from + half);
      } else {
        std::memcpy(to, from, count * sizeof(T));
        if (half) std::memcpy(to + N, from + half, count * sizeof(T));
      }
    }
  }

  // One row of N columns, which m(-x) sees negated.
  void load_signed(T* to, const T* from) const {
    std::memset(to, 0, lanes * sizeof(T));
    std::memcpy(to, from + start, count * sizeof(T));
    if (half)
      for (int64_t lane = 0; lane < half; ++lane) to[half + lane] = -to[lane];
  }
  // The derivative with respect to what was loaded so.
  void store_signed(T* to, const T* from) const {
    for (int64_t lane = 0; lane < count; ++lane)
      to[start + lane] = half ? from[lane] - from[half + lane] : from[lane];
  }

 private:
  // A whole run of lanes: vector moves, where memcpy would start a string instruction each time.
  template <int64_t n>
  static void copy(T* to, const T* from) {
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < n; lane += width<T>)
      store(to + lane, load<vec_t<T>>(from + lane));
  }
};

}  // namespace L2L_NAMESPACE
