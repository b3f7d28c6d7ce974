// Rows read and written by pieces that stay in the first-level cache, as the accumulation type A, on the CPU.
#pragma once

#include "common/tensor.h"

namespace kdfast {

constexpr int64_t kChunk = 1024;  // three such buffers of floats are a third of a 32 KiB cache
constexpr int64_t kLanes = 16;    // floats in the widest vector; pieces are padded to whole vectors

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// f(begin, n) for the pieces of a row: whole vectors, then, if there are any, the last few elements.
template <class F>
KD_HD void for_pieces(int64_t cols, const F& f) {
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const int64_t n = cols - begin < kChunk ? cols - begin : kChunk, whole = n / kLanes * kLanes;
    if (whole > 0) f(begin, whole);
    if (whole < n) f(begin + whole, n - whole);
  }
}

template <class T, class A>
KD_MULTIVERSION void widen(const T* from, int64_t stride, int64_t n, A* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i * stride]);
  }
}

template <class A, class T>
KD_MULTIVERSION void narrow(const A* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

template <class A>
KD_MULTIVERSION A max_of(const A* z, int64_t n, A start) {
  A top = start;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = z[i] > top ? z[i] : top;
  return top;
}

template <class A>
constexpr ScalarType kDtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;

// Elements [begin, begin + n) of a row, and `absent` up to a whole vector: in place where that is possible, else
// copied.
template <class A>
const A* read(const Matrix& m, int64_t row, int64_t begin, int64_t n, A absent, A* buffer) {
  const int64_t offset = row * m.row_stride + begin * m.col_stride;
  if (m.dtype == kDtype<A> && m.col_stride == 1 && n % kLanes == 0) return static_cast<const A*>(m.data) + offset;
  dispatch_float(m.dtype, [&](auto tag) {
    using T = decltype(tag);
    widen(static_cast<const T*>(m.data) + offset, m.col_stride, n, buffer);
  });
  for (int64_t i = n; i < padded(n); ++i) buffer[i] = absent;
  return buffer;
}

template <class A>
A read_one(const Matrix& m, int64_t row, int64_t col) {
  A value = 0;
  dispatch_float(m.dtype, [&](auto tag) {
    using T = decltype(tag);
    value = static_cast<A>(static_cast<const T*>(m.data)[row * m.row_stride + col * m.col_stride]);
  });
  return value;
}

// Where to put whole vectors of a contiguous output: straight into it if they fit there, else into `buffer`, for
// `write`.
template <class A>
A* target(const Matrix& m, int64_t row, int64_t begin, int64_t n, A* buffer) {
  return m.dtype == kDtype<A> && n % kLanes == 0 ? static_cast<A*>(m.data) + row * m.row_stride + begin : buffer;
}

template <class A>
void write(const Matrix& m, int64_t row, int64_t begin, int64_t n, const A* values) {
  dispatch_float(m.dtype, [&](auto tag) {
    using T = decltype(tag);
    T* to = static_cast<T*>(m.data) + row * m.row_stride + begin;
    if (static_cast<const void*>(values) != to) narrow(values, n, to);
  });
}

template <class A>
void write_one(const Matrix& m, int64_t row, int64_t col, A value) {
  write(m, row, col, 1, &value);
}

template <class A>
A read(const Column& c, int64_t row) {
  A value = 0;
  dispatch_float(c.dtype, [&](auto tag) {
    using T = decltype(tag);
    value = static_cast<A>(static_cast<const T*>(c.data)[row * c.stride]);
  });
  return value;
}

}  // namespace kdfast
