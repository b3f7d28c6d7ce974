// A row belongs to a group of threads: a warp for short rows, a block for long ones. Sums run in a fixed order.
#pragma once

#include "common/launch.cuh"
#include "common/vector_math.h"

namespace kdfast {

constexpr int kWarp = 32;
constexpr int kBlock = 256;    // threads
constexpr int kMinBlocks = 1;  // per multiprocessor: without it, ptxas spills registers to fit more blocks
constexpr int kWarps = kBlock / kWarp;
constexpr int kStep = 8;  // consecutive elements of a thread: 16-byte accesses for every dtype

struct Add {
  template <class A>
  KD_HD A operator()(A a, A b) const {
    return a + b;
  }
};

struct Max {
  template <class A>
  KD_HD A operator()(A a, A b) const {
    return max(a, b);
  }
};

// Every thread of the group gets the result, bit for bit the same.
template <int kThreads, class A, class Op>
__device__ A group_reduce(A x, Op op) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, distance));
  if constexpr (kThreads > kWarp) {
    KD_SHARED(A, warps, kThreads / kWarp);
    __syncthreads();  // the previous reduction has been read
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = warps[0];
    for (int i = 1; i < kThreads / kWarp; ++i) x = op(x, warps[i]);
  }
  return x;
}

template <class T>
struct alignas(16) Packed {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// One 16-byte store. The compiler would split that of a Packed into its elements.
template <class T>
__device__ void store(Packed<T>* to, const Packed<T>& pack) {
  __stcg(reinterpret_cast<uint4*>(to), bits<uint4>(pack));
}

template <class T>
__device__ bool is_packed(const T* at, int64_t stride, int64_t left) {
  return stride == 1 && left >= kStep && reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

template <class T, class A>
__device__ void read_step(const T* from, int64_t stride, int64_t left, A fill, A (&to)[kStep]) {
  if (is_packed(from, stride, left)) {
    const Packed<T>* packs = reinterpret_cast<const Packed<T>*>(from);
#pragma unroll
    for (int i = 0; i < kStep / Packed<T>::kSize; ++i) {
      const Packed<T> pack = packs[i];
#pragma unroll
      for (int j = 0; j < Packed<T>::kSize; ++j) to[i * Packed<T>::kSize + j] = static_cast<A>(pack.x[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kStep; ++i) to[i] = i < left ? static_cast<A>(from[i * stride]) : fill;
  }
}

template <class T, class A>
__device__ void write_step(T* to, int64_t left, const A (&from)[kStep]) {
  if (is_packed(to, 1, left)) {
    Packed<T>* packs = reinterpret_cast<Packed<T>*>(to);
#pragma unroll
    for (int i = 0; i < kStep / Packed<T>::kSize; ++i) {
      Packed<T> pack;
#pragma unroll
      for (int j = 0; j < Packed<T>::kSize; ++j) pack.x[j] = static_cast<T>(from[i * Packed<T>::kSize + j]);
      store(packs + i, pack);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (i < left) to[i] = static_cast<T>(from[i]);
    }
  }
}

// Elements [col, col + kStep) of a row; `fill` beyond its end. The dtype is the same for all threads, so the switch
// costs no divergence, and one kernel serves every pair of dtypes.
template <class A>
__device__ void read(const Matrix& m, int64_t row, int64_t col, int64_t cols, A fill, A (&to)[kStep]) {
  const int64_t offset = row * m.row_stride + col * m.col_stride, left = cols - col;
  switch (m.dtype) {
    case ScalarType::Float: return read_step(static_cast<const float*>(m.data) + offset, m.col_stride, left, fill, to);
    case ScalarType::Double:
      return read_step(static_cast<const double*>(m.data) + offset, m.col_stride, left, fill, to);
    case ScalarType::Half: return read_step(static_cast<const Half*>(m.data) + offset, m.col_stride, left, fill, to);
    default: return read_step(static_cast<const BFloat16*>(m.data) + offset, m.col_stride, left, fill, to);
  }
}

template <class A>
__device__ void write(const Matrix& m, int64_t row, int64_t col, int64_t cols, const A (&from)[kStep]) {
  const int64_t offset = row * m.row_stride + col, left = cols - col;
  switch (m.dtype) {
    case ScalarType::Float: return write_step(static_cast<float*>(m.data) + offset, left, from);
    case ScalarType::Double: return write_step(static_cast<double*>(m.data) + offset, left, from);
    case ScalarType::Half: return write_step(static_cast<Half*>(m.data) + offset, left, from);
    default: return write_step(static_cast<BFloat16*>(m.data) + offset, left, from);
  }
}

}  // namespace kdfast
