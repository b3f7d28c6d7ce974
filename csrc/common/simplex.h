// The convex quadratic programme  min_a a' G a / 2 + slope' a,  sum a = 1,  0 <= a <= cap,  in float64.
//
// An active-set method: solve for the free weights with the others at their bounds, move there as far as the bounds
// allow, and fix the weight that stopped the move. If none did, free the weight whose bound costs most; if none costs
// anything, a is optimal.
// Includes no torch header; shared by CPU and CUDA.
#pragma once

#include "common/vector_math.h"

namespace kdfast {

constexpr double kRidge = 1e-13, kTolerance = 1e-13;

// Scratch memory of a problem, in doubles.
KD_HD int64_t simplex_memory(int64_t count) { return count * count + 4 * count; }

// Solves R' R x = x in place, R the Cholesky factor [n, n] in the upper triangle of rows of `count`.
KD_HD void solve_factored(const double* r, int64_t count, int64_t n, double* x) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < i; ++k) x[i] -= r[k * count + i] * x[k];
    x[i] /= r[i * count + i];
  }
  for (int64_t i = n; i-- > 0;) {
    for (int64_t k = i + 1; k < n; ++k) x[i] -= r[i * count + k] * x[k];
    x[i] /= r[i * count + i];
  }
}

struct SimplexProblem {
  const double *gram, *slope;  // [count, count]; [count] or null
  int64_t count;
  double cap, ridge;
  double* a;
  double *factor, *ones, *x, *bound, *free;  // bound: -1 at 0, 1 at cap, 0 free; free: indices of the free weights
  int64_t n = 0;                             // free weights

  KD_HD SimplexProblem(const double* gram, const double* slope, int64_t count, double cap, double* memory, double* a)
      : gram(gram), slope(slope), count(count), cap(cap), a(a), factor(memory) {
    ones = factor + count * count;
    x = ones + count;
    bound = x + count;
    free = bound + count;
    double largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      largest = max(largest, gram[i * count + i]);
      bound[i] = 0;
    }
    ridge = kRidge * (largest > 0 ? largest : 1);
  }

  KD_HD int64_t free_at(int64_t i) const { return static_cast<int64_t>(free[i]); }

  // Row i of the free weights' system: G_FF ones = 1 and G_FF x = -(slope + G a_fixed), and its Cholesky factor.
  KD_HD void factor_row(int64_t i) {
    const int64_t row = free_at(i);
    ones[i] = 1;
    x[i] = slope ? -slope[row] : 0;
    for (int64_t j = 0; j < count; ++j) {
      if (bound[j] != 0) x[i] -= gram[row * count + j] * a[j];
    }
    for (int64_t j = i; j < n; ++j) {
      double sum = gram[row * count + free_at(j)] + (i == j ? ridge : 0);
      for (int64_t k = 0; k < i; ++k) sum -= factor[k * count + i] * factor[k * count + j];
      // Rounding may leave nothing of a diagonal entry of a singular G.
      factor[i * count + j] = i == j ? std::sqrt(max(sum, ridge * kRidge)) : sum / factor[i * count + i];
    }
  }

  // x: the free weights' optimum with the others at their bounds, mu ones + x with mu from their sum.
  KD_HD void solve_free() {
    n = 0;
    double rest = 1;
    for (int64_t i = 0; i < count; ++i) {
      if (bound[i] == 0)
        free[n++] = static_cast<double>(i);
      else
        rest -= a[i];
    }
    for (int64_t i = 0; i < n; ++i) factor_row(i);
    solve_factored(factor, count, n, ones);
    solve_factored(factor, count, n, x);
    double sum_ones = 0, sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum_ones += ones[i];
      sum += x[i];
    }
    const double mu = n > 0 ? (rest - sum) / sum_ones : 0;
    for (int64_t i = 0; i < n; ++i) x[i] += mu * ones[i] - a[free_at(i)];
  }

  // Moves by x, at most to the first bound. -> whether it got to one, which is then fixed.
  KD_HD bool move_to_bound() {
    double length = 1;
    int64_t stopped = -1;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = free_at(i);
      const double room = x[i] > 0 ? (cap - a[at]) / x[i] : x[i] < 0 ? -a[at] / x[i] : 1;
      if (room < length) {
        length = room > 0 ? room : 0;
        stopped = i;
      }
    }
    for (int64_t i = 0; i < n; ++i) a[free_at(i)] += length * x[i];
    if (stopped < 0) return false;
    const int64_t at = free_at(stopped);
    bound[at] = x[stopped] > 0 ? 1 : -1;
    a[at] = x[stopped] > 0 ? cap : 0;
    return true;
  }

  KD_HD double gradient(int64_t i) const {
    double g = (slope ? slope[i] : 0) + ridge * a[i];
    for (int64_t j = 0; j < count; ++j) g += gram[i * count + j] * a[j];
    return g;
  }

  // Frees the weight whose bound costs most: all free weights have one gradient. -> whether there is one.
  KD_HD bool release_bound() {
    int64_t low = -1, high = -1;
    double lowest = 0, highest = 0, common = 0, size = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double g = gradient(i);
      size = max(size, std::fabs(g));
      if (bound[i] == 0) common += g / static_cast<double>(n);
      if (bound[i] < 0 && (low < 0 || g < lowest)) low = i, lowest = g;
      if (bound[i] > 0 && (high < 0 || g > highest)) high = i, highest = g;
    }
    const double least = kTolerance * size;
    if (n == 0) {  // every weight is at a bound: free a pair
      if (low < 0 || high < 0 || !(highest - lowest > least)) return false;
      bound[low] = bound[high] = 0;
      return true;
    }
    const double up = low < 0 ? -1 : common - lowest, down = high < 0 ? -1 : highest - common;
    if (!(max(up, down) > least)) return false;
    bound[up >= down ? low : high] = 0;
    return true;
  }
};

// a [count] = argmin_a a' G a / 2 + slope' a with sum a = 1 and 0 <= a <= cap, for a convex G [count, count]; slope may
// be null.
KD_HD void simplex_minimum(const double* gram, const double* slope, int64_t count, double cap, double* memory,
                           double* a) {
  for (int64_t i = 0; i < count; ++i) a[i] = 1.0 / static_cast<double>(count);
  if (cap * static_cast<double>(count) <= 1) return;
  SimplexProblem problem(gram, slope, count, cap, memory, a);
  for (int64_t step = 0; step < 64 + 16 * count; ++step) {
    problem.solve_free();
    if (!problem.move_to_bound() && !problem.release_bound()) return;
  }
}

}  // namespace kdfast
