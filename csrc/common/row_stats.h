// The statistics that a forward over rows of logits leaves for its backward.
#pragma once

#include "common/softmax.h"
#include "common/tensor.h"

namespace kdfast {

// Statistics of all rows, one after another in memory: stats[k] is the k-th of them, for every row.
template <class A>
struct Stats {
  A* data;
  int64_t rows;

  KD_HD A* operator[](int64_t k) const { return data + k * rows; }
  KD_HD Softmax<A> softmax(int64_t k, int64_t row) const { return {(*this)[k][row], (*this)[k + 1][row]}; }
  KD_HD void set_softmax(int64_t k, int64_t row, Softmax<A> s) const {
    (*this)[k][row] = s.max;
    (*this)[k + 1][row] = s.sum;
  }
  KD_HD void clear(int64_t count, int64_t row) const {
    for (int64_t k = 0; k < count; ++k) (*this)[k][row] = 0;
  }
};

template <class A>
Stats<A> stats_of(const Tensor& stats) {
  return {static_cast<A*>(stats.data_ptr()), stats.size(1)};
}

}  // namespace kdfast
