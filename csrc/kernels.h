// The kernels as cpu.cpp sees them: one table for each instruction set that kernels.cpp is compiled
// for.
//
// Arrays are contiguous, in the layouts of l2l_ref/equations.py. A call works on the coordinates
// [begin, end) and no others, so that threads can share its arguments.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define L2L_INLINE __host__ __device__ __forceinline__
#else
#define L2L_INLINE inline
#endif

namespace l2l {

constexpr int64_t max_hidden = 256;  // engine.MAX_HIDDEN
constexpr double max_p = 80;         // equations.MAX_P

struct Form {
  double p, output_scale;
  bool theta_input, odd;
};

struct Shape {
  int64_t coordinates, layers, hidden;  // N, L, H
  Form form;

  L2L_INLINE int64_t inputs() const { return form.theta_input ? 3 : 2; }  // F
  L2L_INLINE int64_t width(int64_t layer) const {
    return layer ? hidden : inputs();
  }  // what it reads
  L2L_INLINE int64_t states() const { return form.odd ? 2 * coordinates : coordinates; }  // M
  L2L_INLINE int64_t phi() const {                                                        // P
    int64_t size = hidden + 1;
    for (int64_t layer = 0; layer < layers; ++layer)
      size += 4 * hidden * (width(layer) + hidden + 2);
    return size;
  }
};

template <class T>
struct Step {
  const T *theta, *gradient, *state;  // [N], [N], [L, 2, H, M]
  T *next_theta, *next_state;         // may be the same arrays as theta and state
};

template <class T>
struct Backward {
  int64_t steps;                            // T
  const T *gradients, *state, *cotangents;  // [T, N], [L, 2, H, M], [T, N]
  const T* thetas;                          // [T, N]; may be null where φ does not see θ
  double* d_phi;                            // [P], added to
  // Of a single step only (T = 1); null otherwise.
  const T* d_next_state;              // [L, 2, H, M]
  T *d_theta, *d_gradient, *d_state;  // [N], [N], [L, 2, H, M]
};

// Eq. 5 alone: result [2, size] of gradient [size], or if d_result [2, size] is there the
// derivative [size] with respect to gradient.
template <class T>
struct Preprocess {
  double p;
  int64_t size;
  const T *gradient, *d_result;
  T* result;
};

// `packed` is φ as `pack` lays it out, `scratch` is memory for one thread; their sizes are numbers
// of elements.
template <class T>
struct Kernels {
  size_t (*packed_size)(const Shape&);
  void (*pack)(const Shape&, const T* phi, T* packed);
  int64_t (*block)(const Shape&);  // coordinates that share a pass
  size_t (*step_scratch)(const Shape&);
  void (*step)(const Shape&, const Step<T>&, const T* packed, T* scratch, int64_t begin,
               int64_t end);
  size_t (*backward_scratch)(const Shape&, int64_t steps);
  void (*backward)(const Shape&, const Backward<T>&, const T* packed, T* scratch, int64_t begin,
                   int64_t end);
  void (*preprocess)(const Preprocess<T>&, int64_t begin, int64_t end);
  // The functions of cell.h, for tests: y [n] = name(x [n]); false for a name it does not know.
  bool (*function)(const char* name, const T* x, T* y, int64_t n);
  // Instead of all before `preprocess`, of the kernels that share their work out themselves: a
  // whole call, with φ as it is [P]. False where they cannot take the shape.
  bool (*whole_step)(const Shape&, const Step<T>&, const T* phi);
  bool (*whole_backward)(const Shape&, const Backward<T>&, const T* phi, T* d_phi);
};

struct Level {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;

  template <class T>
  const Kernels<T>& kernels() const {
    if constexpr (sizeof(T) == sizeof(float))
      return f32;
    else
      return f64;
  }
};

}  // namespace l2l
