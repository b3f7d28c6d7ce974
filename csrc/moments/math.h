// Mean and variance of a channel, from parts of its values that each know their own.
//
// Two parts a and b of n_a and n_b values, with squares = sum (x - mean)^2 (Chan, Golub and LeVeque 1979):
//
//   gap = mean_b - mean_a, n = n_a + n_b
//   mean = mean_a + gap n_b / n,  squares = squares_a + squares_b + gap^2 n_a n_b / n,  variance = squares / n
//
// No large number is taken from another: however far from 0 the values lie, the variance keeps its digits.
// With g and h the gradients of mean and variance, the slope in x is (g + 2 h (x - mean)) / n.
//
// Standardised maps: x' = (x - mean) / (epsilon + std), std of n - 1. The loss of two is the sum of (s' - t')^2 / 2
// over all elements, D that of (s' - t')^2 over a channel. With a = (std / (epsilon + std))^2, sums of s'^2 are (n - 1)
// a, so that those of (s' - t') s' follow from D: the slopes are, k = (a_s - a_t + D / (n - 1)) / (2 sqrt(a_s)),
//
//   in s: (s' - t' - k_s s') / (epsilon + std_s),  in t: (t' - s' - k_t t') / (epsilon + std_t)
//
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

// A sum over a channel.
struct Sum {
  double value;

  KD_HD void add(const Sum& other) { value += other.value; }
};

// How a channel is standardised. The mean is in two numbers, so that a large one costs no digits.
template <class A>
struct Standard {
  A mean, rest, scale, ratio;  // of the other side's scale to this one's

  KD_HD A centered(A x) const { return x - mean - rest; }
  KD_HD A operator()(A x) const { return centered(x) * scale; }
  // x' - y'. The difference comes before the scale: exactly 0 between equal maps, however the compiler contracts.
  KD_HD A gap(A x, A y, const Standard& of_y) const { return (centered(x) - of_y.centered(y) * ratio) * scale; }
};

// Rows of the statistics [2, kStatistics, C], for student and teacher: a `Standard`, then a, which becomes k.
constexpr int64_t kStatistics = 5;

// A side of a channel; the teacher's comes second.
template <class A>
KD_HD void store_standard(const Part<double>& part, double epsilon, int64_t channels, bool of_teacher, A* statistics) {
  const double std = std::sqrt(part.squares / (part.count - 1)), scale = 1 / (std + epsilon);
  A* to = statistics + (of_teacher ? kStatistics * channels : 0);
  to[0] = static_cast<A>(part.mean);
  to[channels] = static_cast<A>(part.mean - static_cast<double>(to[0]));
  to[2 * channels] = static_cast<A>(scale);
  to[4 * channels] = static_cast<A>(std * scale * (std * scale));
  if (!of_teacher) return;
  const A of_s = statistics[2 * channels], of_t = to[2 * channels];
  statistics[3 * channels] = of_t / of_s;
  to[3 * channels] = of_s / of_t;
}

template <class A>
KD_HD Standard<A> standard(const A* from, int64_t channels) {
  return {from[0], from[channels], from[2 * channels], from[3 * channels]};
}

// a becomes k, on both sides; mean_square = D / (n - 1).
template <class A>
KD_HD void store_slopes(A mean_square, int64_t channels, A* statistics) {
  A &of_student = statistics[4 * channels], &of_teacher = statistics[(kStatistics + 4) * channels];
  const A s = of_student, t = of_teacher;
  of_student = s == A(0) ? A(0) : (s - t + mean_square) / (2 * std::sqrt(s));  // a NaN stays one
  of_teacher = t == A(0) ? A(0) : (t - s + mean_square) / (2 * std::sqrt(t));
}

template <class A>
struct Slope {
  A mean, of_mean, of_variance;

  KD_HD A operator()(A x) const { return of_mean + of_variance * (x - mean); }
};

}  // namespace moments
}  // namespace kdfast
