// Mean and variance of a channel, from parts of its values that each know their own.
//
// Two parts a and b of n_a and n_b values, with squares = sum (x - mean)^2 (Chan, Golub and LeVeque 1979):
//
//   gap = mean_b - mean_a, n = n_a + n_b
//   mean = mean_a + gap n_b / n,  squares = squares_a + squares_b + gap^2 n_a n_b / n,  variance = squares / n
//
// No large number is taken from another: however far from 0 the values lie, the variance keeps its digits.
// With g and h the gradients of mean and variance, the slope in x is (g + 2 h (x - mean)) / n.
// Includes no torch header; shared by CPU and CUDA.
#pragma once

#include "common/vector_math.h"

namespace kdfast {
namespace moments {

template <class A>
struct Part {
  A count, mean, squares;

  // An infinite value makes the mean infinite, not NaN.
  KD_HD void add(const Part& other) {
    if (other.count == A(0)) return;
    const A total = count + other.count, share = other.count / total, gap = other.mean - mean;
    mean = is_finite(gap) ? mean + gap * share : mean + other.mean;
    squares += other.squares + gap * gap * (count * share);
    count = total;
  }
  KD_HD A variance() const { return count > A(0) ? squares / count : A(0); }

  KD_HD static bool is_finite(A x) { return x - x == A(0); }
};

// Of values that were summed as x - shift and (x - shift)^2, with a shift among or between them.
template <class A>
KD_HD Part<double> shifted_part(double count, A shift, A sum, A squares) {
  const double offset = static_cast<double>(sum) / count, rest = static_cast<double>(squares) - sum * offset;
  const double mean = Part<A>::is_finite(shift) ? shift + offset : static_cast<double>(shift);
  return {count, mean, rest < 0 ? 0 : rest};  // a NaN stays one
}

template <class A>
struct Slope {
  A mean, of_mean, of_variance;

  KD_HD A operator()(A x) const { return of_mean + of_variance * (x - mean); }
};

}  // namespace moments
}  // namespace kdfast
