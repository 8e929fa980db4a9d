// How a block of coordinates lies in a block of threads, and φ beside it.
//
//   lane of the block    0  1 ... 31 | 32 33 ... 63 | ... 32 C - 1     a column of the state each
//   thread of a warp     0  1 ... 31 |  0  1 ... 31 | ... 31           so a thread has C lanes
//   odd form             m(x) in the first half     | m(-x) in the second
//
//   warp 0   units  0 ...  3    for all lanes: a thread has a register tile of 16 gates by C lanes
//   warp 1   units  4 ...  7
//
// A block has 32·C lanes, each a column of the state: a coordinate, or in the odd form its m(x) or
// its m(-x). What a layer reads, [below; prev], is staged in shared memory, and beside it the
// weights of the units at work, of which all threads of a warp read the same.
#pragma once

#include <type_traits>

#include "../cell.h"

namespace L2L_NAMESPACE {

using l2l::Shape;

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
    const int most = C / 2, many = ceil_div(maximum(coordinates, 0), apart);
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
    L2L_NAMESPACE::copy(to, row + at(j), has(j));
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
    L2L_NAMESPACE::copy(to, row + lane + warp_lanes * j, true);
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

}  // namespace L2L_NAMESPACE
