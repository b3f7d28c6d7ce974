// Rows of logits and who works on them: a warp on a short one, a block on a long one.
#pragma once

#include "common/group.cuh"
#include "common/softmax.h"

namespace kdfast {

constexpr int64_t kShortRow = 2048;             // up to here a warp reads a row, above it a block
constexpr int64_t kPiece = 8 * kBlock * kStep;  // elements of a long row that a block differentiates

template <int kThreads>
__device__ int64_t group_index() {
  return int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
}

// f(col) for the first column of each step of this thread, in columns [begin, end).
template <int kThreads, class F>
__device__ void for_steps(int64_t begin, int64_t end, const F& f) {
  for (int64_t col = begin + (threadIdx.x % kThreads) * kStep; col < end; col += kThreads * kStep) f(col);
}

// What one of the group has written is there for all.
template <int kThreads>
__device__ void group_sync() {
  if constexpr (kThreads == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

template <class A>
__device__ A max_of(const A (&z)[kStep], A top) {
#pragma unroll
  for (int i = 0; i < kStep; ++i) top = max(top, z[i]);
  return top;
}

template <int kThreads>
__device__ bool is_leader() {
  return threadIdx.x % kThreads == 0;
}

// The largest logit of a row, 0 where all are masked; every thread gets it.
template <int kThreads, class A>
__device__ A row_max(const Matrix& m, int64_t row, int64_t cols) {
  A top = -infinity<A>();
  for_steps<kThreads>(0, cols, [&](int64_t col) {
    A z[kStep];
    read(m, row, col, cols, -infinity<A>(), z);
    top = max_of(z, top);
  });
  return finite_max(group_reduce<kThreads>(top, Max{}));
}

// One of the values of a loss, for sums.
template <class A>
struct Each {
  const A* values;

  __device__ A operator()(int64_t i) const { return values[i]; }
};

// A long row is shared by several blocks in the backward, so that few rows still fill the device.
struct Part {
  int64_t row, begin, end;
};

template <int kThreads>
__device__ Part part(int64_t cols) {
  const int64_t index = group_index<kThreads>();
  if (kThreads == kWarp) return {index, 0, cols};
  const int64_t parts = (cols + kPiece - 1) / kPiece, begin = index % parts * kPiece;
  return {index / parts, begin, begin + kPiece < cols ? begin + kPiece : cols};
}

// Starts one of a kernel's two forms over all rows; `parts`: groups to a row in the form for long rows.
template <class... P, class... Q>
void launch_rows(const OnDevice& device, void (*warp)(P...), void (*block)(P...), int64_t rows, int64_t cols,
                 int64_t parts, Q... args) {
  if (rows == 0) return;
  if (cols <= kShortRow) {
    launch(device, {blocks_for(rows, kBlock / kWarp), kBlock}, warp, args...);
  } else {
    launch(device, {rows * parts, kBlock}, block, args...);
  }
}

}  // namespace kdfast
