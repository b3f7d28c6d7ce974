// Rows read and written in pieces that fit into the L1 cache, as the accumulation type A, on the CPU.
#pragma once

#include "common/tensor.h"

namespace kdfast {

constexpr int64_t kChunk = 1024;  // three such buffers of floats are a third of a 32 KiB cache

// f(begin, n) for the pieces of columns [from, to).
template <class F>
void for_pieces(int64_t from, int64_t to, const F& f) {
  for (int64_t begin = from; begin < to; begin += kChunk) f(begin, to - begin < kChunk ? to - begin : kChunk);
}

template <class T, class A>
void widen(const T* from, int64_t stride, int64_t n, A* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i * stride]);
  }
}

template <class A, class T>
void narrow(const A* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

// The largest of `start` and all z. Four parts side by side: a single one would wait for each comparison.
template <class A>
A max_of(const A* z, int64_t n, A start) {
  const int64_t part = n / 64 * 16;
  const A *z_1 = z + part, *z_2 = z_1 + part, *z_3 = z_2 + part;
  A top = start, top_1 = start, top_2 = start, top_3 = start;
#pragma omp simd reduction(max : top, top_1, top_2, top_3)
  for (int64_t i = 0; i < part; ++i) {
    top = z[i] > top ? z[i] : top;
    top_1 = z_1[i] > top_1 ? z_1[i] : top_1;
    top_2 = z_2[i] > top_2 ? z_2[i] : top_2;
    top_3 = z_3[i] > top_3 ? z_3[i] : top_3;
  }
#pragma omp simd reduction(max : top)
  for (int64_t i = 4 * part; i < n; ++i) top = z[i] > top ? z[i] : top;
  top = top_1 > top ? top_1 : top;
  top_2 = top_3 > top_2 ? top_3 : top_2;
  return top_2 > top ? top_2 : top;
}

// Elements [begin, begin + n) of a row: in place where that is possible, else copied.
template <class A>
const A* read(const Matrix& m, int64_t row, int64_t begin, int64_t n, A* buffer) {
  const int64_t offset = row * m.row_stride + begin * m.col_stride;
  if (m.dtype == kDtype<A> && m.col_stride == 1) return static_cast<const A*>(m.data) + offset;
  dispatch_float(m.dtype, [&](auto tag) {
    using T = decltype(tag);
    widen(static_cast<const T*>(m.data) + offset, m.col_stride, n, buffer);
  });
  return buffer;
}

// Prefetches a row of up to kChunk elements into L2, if it exists and is read in place. Rows begin on different pages,
// where the hardware prefetcher has to start anew. Always inlined: GCC drops calls of a function without side effects.
template <class A>
KD_INLINED inline void prefetch(const Matrix& m, int64_t row, int64_t rows, int64_t cols) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 64;
  if (row >= rows || cols > kChunk || m.dtype != kDtype<A> || m.col_stride != 1) return;
  const char* from = reinterpret_cast<const char*>(static_cast<const A*>(m.data) + row * m.row_stride);
  const int64_t bytes = cols * static_cast<int64_t>(sizeof(A));
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at, 0, 2);
#endif
}

// Where to put elements of a contiguous output: straight into it if they have its type, else into `buffer`, for
// `write`.
template <class A>
A* target(const Matrix& m, int64_t row, int64_t begin, A* buffer) {
  return m.dtype == kDtype<A> ? static_cast<A*>(m.data) + row * m.row_stride + begin : buffer;
}

template <class A>
void write(const Matrix& m, int64_t row, int64_t begin, int64_t n, const A* values) {
  dispatch_float(m.dtype, [&](auto tag) {
    using T = decltype(tag);
    T* to = static_cast<T*>(m.data) + row * m.row_stride + begin;
    if (static_cast<const void*>(values) != to) narrow(values, n, to);
  });
}

}  // namespace kdfast
