// Work shared by the threads of the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace kdfast {

// f(begin, end) for ranges that make up [0, n), one to a thread and of at least `grain`. Where a range ends depends on
// the number of threads, and what f does for any i must not.
template <class F>
void for_ranges(int64_t n, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { f(begin, end); });
}

// f(i) for i in [0, n), at least `grain` of them to a thread. What belongs to one i is one thread's, in one order: so
// no result depends on the number of threads.
template <class F>
void for_each(int64_t n, int64_t grain, const F& f) {
  for_ranges(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace kdfast
