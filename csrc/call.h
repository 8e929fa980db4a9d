// What a call is: its numbers and arrays, the same for every device.
//
//   theta, gradient [N]   state [L, 2, H, M]   phi [P]       the sizes and the form: Shape
//            |                    |               |
//            +--------------------+---------------+---> Step        next theta, next state; a list
//                                                 +---> Backward    d_phi; of one step all the rest
//
// Arrays are contiguous, in the layouts of l2l_ref/equations.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define L2L_INLINE __host__ __device__ __forceinline__
#else
#define L2L_INLINE inline
#endif

namespace l2l {

constexpr int64_t max_hidden = 256;  // backend.MAX_HIDDEN
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
  L2L_INLINE Shape of(int64_t N) const { return {N, layers, hidden, form}; }
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
  int64_t coordinates;                // N, of this tensor
  const T *theta, *gradient, *state;  // [N], [N], [L, 2, H, M]
  T *next_theta, *next_state;         // may be the same arrays as theta and state
};

template <class T>
struct Backward {
  int64_t steps;
  const T *gradients, *state, *cotangents;  // [steps, N], [L, 2, H, M], [steps, N]
  const T* thetas;                          // [steps, N]; may be null where φ does not see θ
  double* d_phi;                            // [P], added to
  // Of a single step only (steps = 1); null otherwise.
  const T* d_next_state;              // [L, 2, H, M]
  T *d_theta, *d_gradient, *d_state;  // [N], [N], [L, 2, H, M]
};

}  // namespace l2l
