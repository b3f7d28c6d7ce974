// Arguments and memory layouts shared by CPU and CUDA: the statistics that a forward leaves for its backward.
#pragma once

#include "common/labels.h"
#include "common/row_stats.h"
#include "common/temperature.h"
#include "common/tensor.h"
#include "softmax_kl/math.h"

namespace kdfast {
namespace softmax_kl {

// softmax_kl: student max, sum, KL of the student's side; teacher max, sum, KL of the teacher's side.
constexpr int64_t kStudent = 0, kTeacher = 3, kKl = 2, kKlStats = 6;

// softmax_kl_topk: the same, and max, sum of the student's classes that the teacher leaves out.
constexpr int64_t kTopKRest = 6, kTopKStats = 8;

// cross_entropy_kl: student max, sum at T, sum at 1; weight of the row's cross-entropy; mass of its target; teacher;
// KL.
constexpr int64_t kSum1 = 2, kCeWeight = 3, kMass = 4, kCeTeacher = 5, kCeKl = 7, kCeStats = 8;

// dkd: student max, sum of the non-target classes, log-odds of the target; the same of the teacher; KL of the rest, and
// that of the target against the rest.
constexpr int64_t kOdds = 2, kRestKl = 6, kTargetKl = 7, kDkdStats = 8;

// `count` logits of each row, their classes, and one logit for all other classes.
struct TopK {
  Matrix values;
  const int64_t* index;
  int64_t row_stride, col_stride, count;
  Column rest;

  KD_HD int64_t at(int64_t row, int64_t i) const { return index[row * row_stride + i * col_stride]; }
};

inline TopK top_k(const Tensor& values, const Tensor& indices, const std::optional<Tensor>& rest) {
  return {matrix(values),    static_cast<const int64_t*>(indices.data_ptr()),
          indices.stride(0), indices.stride(1),
          indices.size(1),   column(rest)};
}

// What the ops read; without a teacher its matrix is null, and without weights their column. A row of weight 0 is
// masked: it is not read, its value and its gradients are 0.
template <class A>
struct Inputs {
  Matrix student, teacher;
  int64_t rows, cols;
  Temperature<A> temperature;
  Stats<A> stats;
  Column weight, ce_weight;  // the latter of a cross-entropy beside a KL

  KD_HD A weight_of(int64_t row) const { return weight.data ? read<A>(weight, row) : A(1); }
  KD_HD A ce_weight_of(int64_t row) const { return ce_weight.data ? read<A>(ce_weight, row) : A(1); }
  KD_HD bool is_masked(int64_t row) const { return weight.data && read<A>(weight, row) == 0; }
};

// What a backward reads beside the inputs, and writes; matrices are null where no gradient is needed.
struct Gradients {
  Column upstream;
  Matrix student, teacher;

  // The gradient of a row's divergence, but for its temperature.
  template <class A>
  KD_HD A of_row(const Inputs<A>& in, int64_t row, A scale) const {
    return read<A>(upstream, row) * scale * in.weight_of(row);
  }
};

// Coefficients of one row's gradient in cross_entropy_kl: that of the KL, and coef * exp(z - max) - uniform - target *
// P. A term without weight adds 0 whatever it is, so its inputs are not read.
template <class A>
struct CeGrad {
  KlGrad<A> kl;
  A coef, uniform, target;
  bool has_kl, has_ce;
};

template <class A>
KD_HD CeGrad<A> ce_grad(const Stats<A>& stats, int64_t row, int64_t cols, A rate, A grad, A kl_scale, A smoothing) {
  const Softmax<A> student = stats.softmax(kStudent, row), student_1{student.max, stats[kSum1][row]};
  const A kl = grad * kl_scale, ce = grad * stats[kCeWeight][row];
  return {kl_grad(stats.softmax(kCeTeacher, row), student, stats[kCeKl][row], kl, rate),
          ce * stats[kMass][row] * student_1.inverse(),
          divide(ce * smoothing, static_cast<A>(cols)),
          ce * (1 - smoothing),
          kl != 0,
          ce != 0};
}

// Coefficients of one row's gradient in dkd, and the gradients at the target class.
template <class A>
struct DkdGrad {
  KlGrad<A> rest;
  A student, teacher;
  bool has_rest;  // else the gradients of the other classes are 0
};

template <class A>
KD_HD DkdGrad<A> dkd_grad(const Stats<A>& stats, int64_t row, A rate, A alpha, A beta, A scale) {
  const Softmax<A> student = stats.softmax(kStudent, row), teacher = stats.softmax(kTeacher, row);
  const A odds_s = stats[kStudent + kOdds][row], odds_t = stats[kTeacher + kOdds][row];
  const A target = scale * alpha, rest = scale * beta;
  const A slope_s = target == 0 ? A(0) : target * target_grad_q(odds_t, odds_s),
          slope_t = target == 0 ? A(0) : target * target_grad_p(odds_t, odds_s);
  // The target's log-odds fall with the log-sum of the other classes.
  const KlGrad<A> g = kl_grad(teacher, student, stats[kRestKl][row], rest, rate, slope_s, slope_t);
  return {g, slope_s, slope_t, target != 0 || rest != 0};
}

}  // namespace softmax_kl
}  // namespace kdfast
