// Arguments and memory layouts shared by CPU and CUDA: the op, and the statistics that a forward leaves for its
// backward.
#pragma once

#include <string>

#include "common/labels.h"
#include "common/networks.h"
#include "common/temperature.h"
#include "teachers/math.h"

namespace kdfast {
namespace teachers {

// Max, sum at T, sum at 1 of the student; maxima, sums, divergences of the teachers. Of the reverse kind the first
// divergence is that of the row.
template <class A>
struct Stats {
  A* data;
  int64_t rows, count;

  KD_HD A& at(int64_t k, int64_t row) const { return data[k * rows + row]; }
  KD_HD A& sum_1(int64_t row) const { return at(2, row); }
  KD_HD A& value(int64_t m, int64_t row) const { return at(3 + 2 * count + m, row); }
  KD_HD Softmax<A> student(int64_t row) const { return {at(0, row), at(1, row)}; }
  KD_HD void set_student(int64_t row, Softmax<A> s, A sum_1) const {
    at(0, row) = s.max;
    at(1, row) = s.sum;
    at(2, row) = sum_1;
  }
  KD_HD Softmax<A> teacher(int64_t m, int64_t row) const { return {at(3 + m, row), at(3 + count + m, row)}; }
  KD_HD void set_teacher(int64_t m, int64_t row, Softmax<A> s) const {
    at(3 + m, row) = s.max;
    at(3 + count + m, row) = s.sum;
  }

  // The weighted sum of a row's divergences; without `weight` every teacher has weight 1.
  KD_HD A divergence(const Column& weight, bool reverse, int64_t row) const {
    A sum = reverse ? value(0, row) : A(0);
    for (int64_t m = 0; !reverse && m < count; ++m) {
      sum += weighted(weight.data ? read<A>(weight, m) : A(1), value(m, row));
    }
    return sum;
  }
};

inline int64_t stats_count(int64_t teachers) { return 3 + 3 * teachers; }

inline Kind kind_of(const std::string& kind) {
  STD_TORCH_CHECK(kind == "kl" || kind == "cross_entropy" || kind == "reverse_kl", "kdfast: unknown kind ", kind);
  return kind == "kl" ? Kind::kKl : kind == "cross_entropy" ? Kind::kCrossEntropy : Kind::kReverse;
}

// teachers_kl, and aekd with the kind kKl. Without `weight` every teacher has weight 1.
template <class A>
struct Teachers {
  Matrix student;
  Networks teachers;
  Labels labels;
  Column weight;
  Temperature<A> temperature;
  int64_t rows, cols;
  Kind kind;
  Stats<A> stats;

  KD_HD A rate() const { return temperature.rate(0); }
  KD_HD bool is_cross() const { return kind == Kind::kCrossEntropy; }
  KD_HD bool is_reverse() const { return kind == Kind::kReverse; }
  KD_HD A weight_of(int64_t m) const { return weight.data ? read<A>(weight, m) : A(1); }
};

// Copies the problem, which may have any strides, into the end of `memory`, and solves it.
KD_HD void read_and_solve(const Matrix& gram, const Column& slope, int64_t count, double cap, double* memory,
                          double* a) {
  double *g = memory + simplex_memory(count), *s = g + count * count;
  for (int64_t i = 0; i < count; ++i) {
    s[i] = read<double>(slope, i);
    for (int64_t j = 0; j < count; ++j) g[i * count + j] = read_one<double>(gram, i, j);
  }
  simplex_minimum(g, s, count, cap, memory, a);
}

// Factors of the divergences, without those of T, and of the cross-entropy. The CPU's backward multiplies by
// `ce_scale` before it divides by `ce_divisor`.
struct Scales {
  double kl, ce_scale, ce_divisor;

  double ce() const { return ce_scale / ce_divisor; }
};

}  // namespace teachers
}  // namespace kdfast
