// Rows read and written by pieces that stay in the first-level cache, as the accumulation type A, on the CPU.
#pragma once

#include "common/tensor.h"

namespace kdfast {

constexpr int64_t kChunk = 1024;  // three such buffers of floats are a third of a 32 KiB cache

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
constexpr ScalarType kDtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;

// Elements [begin, begin + n) of a row: in place where they are contiguous A, else copied to `buffer`.
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

// Where to put elements of a contiguous output: straight into it if it holds A, else into `buffer`, for `write`.
template <class A>
A* target(const Matrix& m, int64_t row, int64_t begin, A* buffer) {
  return m.dtype == kDtype<A> ? static_cast<A*>(m.data) + row * m.row_stride + begin : buffer;
}

template <class A>
void write(const Matrix& m, int64_t row, int64_t begin, int64_t n, const A* values) {
  if (m.dtype == kDtype<A>) return;
  dispatch_float(m.dtype, [&](auto tag) {
    using T = decltype(tag);
    narrow(values, n, static_cast<T*>(m.data) + row * m.row_stride + begin);
  });
}

template <class A>
void write_one(const Matrix& m, int64_t row, int64_t col, A value) {
  *target(m, row, col, &value) = value;
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
