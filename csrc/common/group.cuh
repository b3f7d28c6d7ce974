// A row belongs to a group of threads: a warp for short rows, a block for long ones. Sums run in a fixed order.
#pragma once

#include "common/raw.cuh"

namespace kdfast {

constexpr int kWarp = 32;
constexpr int kBlock = 256;    // threads
constexpr int kMinBlocks = 1;  // per multiprocessor: without it, ptxas spills registers to fit more blocks
constexpr int kWarps = kBlock / kWarp;

// The same for a kernel that sums in A: more blocks hide more of the memory's latency, and 32-bit sums leave registers
// for them. What does not fit shows as stack in .ci/cuda_kernels.json.
template <class A>
constexpr int min_blocks(int of_float = 3) {
  return sizeof(A) == 4 ? of_float : kMinBlocks;
}

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

// One 16-byte store. The compiler would split that of a Packed into its elements.
template <class T>
__device__ void store(Packed<T>* to, const Packed<T>& pack) {
  __stcg(reinterpret_cast<uint4*>(to), bits<uint4>(pack));
}

template <class T, class A>
__device__ void write_step(T* to, int64_t left, const A (&from)[kStep]) {
  if (left >= kStep && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
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

// A step of a row that is being loaded. The dtype is the same for all threads, so a branch on it costs no divergence,
// and one kernel serves every pair of dtypes.
template <class A>
struct Step {
  Raw<A, kStep, true> raw;
  ScalarType dtype;
  int64_t left;  // elements until the end of the row

  // `fill` beyond its end.
  __device__ void convert(A fill, A (&to)[kStep]) const {
    raw.convert(dtype, to);
    if (left >= kStep) return;
#pragma unroll
    for (int i = 0; i < kStep; ++i) to[i] = i < left ? to[i] : fill;
  }
};

// Elements [col, col + kStep).
template <class A>
__device__ Step<A> load(const Matrix& m, int64_t row, int64_t col, int64_t cols) {
  Step<A> step;
  step.dtype = m.dtype;
  step.left = cols - col;
  const int64_t offset = row * m.row_stride + col * m.col_stride;
  const char* from = static_cast<const char*>(m.data) + offset * bytes_of(m.dtype);
  const bool wide = sizeof(A) == 4 && m.dtype == ScalarType::Double;
  if (!wide && m.col_stride == 1 && step.left >= kStep && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    step.raw.load(from, m.dtype);
  } else {
    const int64_t first = opaque(offset), stride = opaque(m.col_stride);
    step.raw.gather(m.data, m.dtype, [&](int i) { return Element{i < step.left, first + i * stride}; });
  }
  return step;
}

template <class A>
__device__ void read(const Matrix& m, int64_t row, int64_t col, int64_t cols, A fill, A (&to)[kStep]) {
  load<A>(m, row, col, cols).convert(fill, to);
}

// The same columns of two matrices, which are loaded at once.
template <class A>
__device__ void read(const Matrix& a, const Matrix& b, int64_t row, int64_t col, int64_t cols, A fill, A (&to_a)[kStep],
                     A (&to_b)[kStep]) {
  const Step<A> step_a = load<A>(a, row, col, cols), step_b = load<A>(b, row, col, cols);
  step_a.convert(fill, to_a);
  step_b.convert(fill, to_b);
}

template <class A>
__device__ void write(const Matrix& m, int64_t row, int64_t col, int64_t cols, const A (&from)[kStep]) {
  const int64_t offset = opaque(row * m.row_stride + col), left = cols - col;
  switch (m.dtype) {
    case ScalarType::Float: return write_step(static_cast<float*>(m.data) + offset, left, from);
    case ScalarType::Double: return write_step(static_cast<double*>(m.data) + offset, left, from);
    case ScalarType::Half: return write_step(static_cast<Half*>(m.data) + offset, left, from);
    default: return write_step(static_cast<BFloat16*>(m.data) + offset, left, from);
  }
}

}  // namespace kdfast
