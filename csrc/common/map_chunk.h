// Maps read and written in pieces that fit into the L1 cache, as the accumulation type A, on the CPU.
#pragma once

#include <algorithm>

#include "common/chunk.h"
#include "common/layout.h"

namespace kdfast {

constexpr int64_t kMapGrain = 32 * 1024;  // elements that are worth a thread: fewer take less time than to wake one

inline int64_t grain_for(int64_t elements) { return std::max<int64_t>(1, kMapGrain / std::max<int64_t>(elements, 1)); }

// Elements [begin, begin + n) of a sample in the given order: in place where that is possible, else copied.
template <class A>
const A* read(const Map& x, const Order& order, int64_t sample, int64_t begin, int64_t n, A* buffer) {
  const int64_t offset = sample * x.sample;
  const bool dense = is_dense(x, order);
  if (dense && x.dtype == kDtype<A>) return static_cast<const A*>(x.data) + offset + begin;
  dispatch_float(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(x.data) + offset;
    if (dense) return widen(from + begin, 1, n, buffer);
    int64_t outer = begin / order.inner, inner = begin % order.inner;
    for (int64_t done = 0, run; done < n; done += run) {
      run = std::min(order.inner - inner, n - done);
      widen(from + outer * x.outer + inner * x.inner, x.inner, run, buffer + done);
      ++outer;
      inner = 0;
    }
  });
  return buffer;
}

// Where to put n elements of a dense output: straight into it if that holds A, else into `buffer`, for `write`; null
// if there is no output.
template <class A>
A* target(const MapGrad& out, int64_t at, A* buffer) {
  if (!out.data) return nullptr;
  return out.dtype == kDtype<A> ? static_cast<A*>(out.data) + at : buffer;
}

template <class A>
void write(const MapGrad& out, int64_t at, int64_t n, const A* values) {
  if (!out.data || out.dtype == kDtype<A>) return;
  dispatch_float(out.dtype, [&](auto tag) {
    using T = decltype(tag);
    narrow(values, n, static_cast<T*>(out.data) + at);
  });
}

}  // namespace kdfast
