// A layer on tensor cores, for float and up to 20 units: the products of `tile_forward` as three
// products of TF32 numbers. x = high + low, both with 11 digits of their own, and
// w·x = w_high·x_high + w_high·x_low + w_low·x_high but for 2^-22 of it. An infinite x is NaN here.
//
//     A: a warp's weights              B: x in shared memory           D
//     16 gates of 4 units              8 rows of [below; prev]         16 gates
//     by 8 rows of [below; prev]       by 8 lanes                      by 8 lanes
//     |high|, |low|: kept         *    |high|, |low|: on the way   ->  + bias --> cell
//     5 of them, side by side          5 of them, one under another    4 of them at work
//
// Threads of a warp hold parts of matrices together, so code is written for a whole warp: `Each<V>`
// is a V of every thread, `each(f)` runs f(lane) in every thread. On a GPU a thread knows only its
// own.
#pragma once

#include "forward.h"

namespace L2L_NAMESPACE {

constexpr int steps_of_k = 5;          // of 8 rows of [below; prev]
constexpr int most_tensor_units = 20;  // then [below; prev] has 40 rows
constexpr int tensor_lanes = 8;        // of a matrix; a warp has several at work
constexpr int at_work = 4;
constexpr int tensor_padding = 8;  // of rows in shared memory: 8 lanes by 4 rows, 32 banks

L2L_INLINE float high_part(float x) { return bit_cast<float>(bit_cast<int32_t>(x) & ~0x1fff); }

// The operands of mma.m16n8k8, in the registers of a thread (PTX ISA, "Matrix Fragments for
// mma.m16n8k8"): with g = lane / 4 and t = lane % 4,
struct A {  // [16][8]: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
  float of[4];
};
struct B {  // [8][8]: (t, g), (t + 4, g)
  float of[2];
};
struct D {  // [16][8]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
  float of[4];
};

#ifdef __CUDACC__
struct Warp {
  int index, lane;

  template <class V>
  struct Each {
    V own;
    L2L_INLINE V& operator[](int) { return own; }
  };
  template <class F>
  L2L_INLINE void each(F f) const {
    f(lane);
  }
  // d += a·b
  L2L_INLINE void multiply(Each<D>& d, const Each<A>& a, const Each<B>& b) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const auto bits = [](float x) { return __float_as_uint(x); };
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d.own.of[0]), "+f"(d.own.of[1]), "+f"(d.own.of[2]), "+f"(d.own.of[3])
        : "r"(bits(a.own.of[0])), "r"(bits(a.own.of[1])), "r"(bits(a.own.of[2])),
          "r"(bits(a.own.of[3])), "r"(bits(b.own.of[0])), "r"(bits(b.own.of[1])));
#endif
  }
  // Lanes l and l + 16 change values.
  L2L_INLINE void exchange(Each<float>& x) const {
#ifdef __CUDA_ARCH__
    x.own = __shfl_xor_sync(0xffffffffu, x.own, 16);
#endif
  }
};
#else
struct Warp {
  int index;

  template <class V>
  struct Each {
    V of[warp_lanes];
    V& operator[](int lane) { return of[lane]; }
  };
  template <class F>
  void each(F f) const {
    for (int lane = 0; lane < warp_lanes; ++lane) f(lane);
  }
  void multiply(Each<D>& d, Each<A>& a, Each<B>& b) const {
    float left[16][8], right[8][8];
    each([&](int lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][t + i / 2 * 4] = high_part(a[lane].of[i]);
      for (int i = 0; i < 2; ++i) right[t + i * 4][g] = high_part(b[lane].of[i]);
    });
    each([&](int lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 8; ++k)
          d[lane].of[i] += left[g + i / 2 * 8][k] * right[k][2 * t + i % 2];
    });
  }
  void exchange(Each<float>& x) const {
    for (int lane = 0; lane < 16; ++lane) {
      const float value = x[lane];
      x[lane] = x[lane + 16];
      x[lane + 16] = value;
    }
  }
};
#endif

// The units of a tile for all lanes of a block. Its 16 gates are rows of A, gate by gate. So a
// thread comes by two gates of a unit for two lanes; its partner 16 lanes on has the other two, and
// each gives the other what it needs for one of the lanes.
template <int block_lanes>
L2L_INLINE void tile_tensor(const Warp& warp, const Layer<float>& layer, int tile,
                            const Lanes& lanes, const Rows<float>& rows, const float* x,
                            const float* cells) {
  constexpr int pitch = block_lanes + tensor_padding,
                batches = block_lanes / tensor_lanes / at_work;
  using Columns = StateColumns<block_lanes / tensor_lanes, tensor_lanes>;
  Warp::Each<A> high[steps_of_k], low[steps_of_k];
  Warp::Each<D> bias;
  const int steps = ceil_div(layer.columns(), 8);
  warp.each([&](int lane) {
    const int g = lane / 4, t = lane % 4, unit = tile * tile_units + g % 4;
#pragma unroll
    for (int second = 0; second < 2; ++second) {  // rows g and g + 8
      const int gate = g / 4 + 2 * second, row = unit < layer.H ? gate * layer.H + unit : 0;
      const float scale = unit < layer.H ? float(gate == 2 ? tanh_scale : sigmoid_scale) : 0.0f;
      const float sum = scale * layer.bias(row);
      bias[lane].of[2 * second] = bias[lane].of[2 * second + 1] = sum;
#pragma unroll
      for (int k = 0; k < steps_of_k; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // columns t and t + 4
          const int column = 8 * k + t + 4 * i;
          const float w = column < layer.columns() ? scale * layer.weight(row, column) : 0.0f;
          high[k][lane].of[2 * i + second] = high_part(w);
          low[k][lane].of[2 * i + second] = w - high_part(w);
        }
    }
  });
  Warp::Each<Columns> columns;
  const auto own_lane = [](int lane) { return 2 * (lane % 4) + lane / 16; };  // of 8, in the end
  warp.each([&](int lane) { columns[lane] = Columns(lanes, own_lane(lane)); });
#pragma unroll 1
  for (int batch = 0; batch < batches; ++batch) {
    Warp::Each<D> d[at_work];
#pragma unroll
    for (int n = 0; n < at_work; ++n) warp.each([&](int lane) { d[n][lane] = bias[lane]; });
#pragma unroll
    for (int k = 0; k < steps_of_k; ++k) {
      if (k >= steps) break;
#pragma unroll
      for (int n = 0; n < at_work; ++n) {
        Warp::Each<B> x_high, x_low;
        warp.each([&](int lane) {
          const float* from =
              x + (8 * k + lane % 4) * pitch + (batch * at_work + n) * tensor_lanes + lane / 4;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float value = from[4 * i * pitch];
            x_high[lane].of[i] = high_part(value);
            x_low[lane].of[i] = value - high_part(value);
          }
        });
        warp.multiply(d[n], low[k], x_high);
        warp.multiply(d[n], high[k], x_low);
        warp.multiply(d[n], high[k], x_high);
      }
    }
#pragma unroll
    for (int n = 0; n < at_work; ++n) {
      Warp::Each<float> first, second;
      warp.each([&](int lane) {
        const D own = d[n][lane];
        first[lane] = lane < 16 ? own.of[1] : own.of[0];
        second[lane] = lane < 16 ? own.of[3] : own.of[2];
      });
      warp.exchange(first);
      warp.exchange(second);
      warp.each([&](int lane) {
        const D own = d[n][lane];
        const bool later = lane >= 16;
        const int unit = tile * tile_units + lane / 4 % 4;
        if (unit >= layer.H) return;
        const int j = batch * at_work + n;
        float h, c = cells[unit * pitch + j * tensor_lanes + own_lane(lane)];
        cell(later ? first[lane] : own.of[0], later ? own.of[1] : first[lane],
             later ? second[lane] : own.of[2], later ? own.of[3] : second[lane], c, h);
        columns[lane].store(rows.next_h + unit * rows.stride, j, h);
        columns[lane].store(rows.next_c + unit * rows.stride, j, c);
      });
    }
  }
}

// For `step`.
template <int C>
struct Tensored {
  static constexpr int block_lanes = warp_lanes * C, pitch = block_lanes + tensor_padding;

  L2L_INLINE static int rows(const Shape& shape) { return ceil_div(rows_read(shape), 8) * 8; }
  template <class Team>
  L2L_INLINE static void layer(const Team& team, const Layer<float>& layer, const Lanes& lanes,
                               const Rows<float>& rows, float* x, float* cells, float*) {
    team([&](int thread) {
      stage_layer<C, StateColumns<C>>(thread, team.threads, layer, lanes, rows, x, cells, pitch);
      const int from = layer.columns() * pitch, to = ceil_div(layer.columns(), 8) * 8 * pitch;
      for (int i = from + thread; i < to; i += team.threads) x[i] = 0;  // its weights are 0 too
      await_copies();
    });
    static_assert(most_tensor_units <= most_warps * tile_units, "a warp for every tile");
    team.warps([&](const Warp& warp) {
      tile_tensor<block_lanes>(warp, layer, warp.index, lanes, rows, x, cells);
    });
  }
};

inline int64_t tensor_shared(const Shape& shape, int lanes, int) {
  return (Tensored<1>::rows(shape) + shape.hidden) * (lanes + tensor_padding);
}
template <class T>
bool takes_tensor_cores(const Shape& shape) {
  return std::is_same<T, float>::value && shape.hidden <= most_tensor_units;
}

}  // namespace L2L_NAMESPACE
