// The ops' arguments, memory and types, on every device. See common/host.h.
#pragma once

#include "common/host.h"
#include "common/labels.h"
#include "common/row_stats.h"
#include "common/temperature.h"
#include "divergence/math.h"

namespace kdfast {
namespace divergence {

// What the ops read. A row of weight 0 is masked: it is not read, its value and its gradients are 0.
template <class A>
struct Inputs {
  Matrix student, teacher;
  int64_t rows, cols;
  Column weight, skews;
  Labels labels;  // classes that rows leave out
  Temperature<A> temperature, teacher_temperature;
  Stats<A> stats;
  bool standardize, moments;

  KD_HD bool is_masked(int64_t row) const { return weight.data && read<A>(weight, row) == 0; }
  KD_HD A weight_of(int64_t row) const { return weight.data ? read<A>(weight, row) : A(1); }
  KD_HD double skew_of(int64_t row) const { return skews.data ? read<double>(skews, row) : -1.0; }  // below 0: none
  KD_HD int64_t skipped(int64_t row) const { return labels.index ? labels.at(row) : -1; }
  KD_HD A of_std(A std) const { return standardize ? A(kStdEps) + std : A(1); }

  // log2(e) / T of a row's side.
  KD_HD A rate(bool of_teacher, int64_t row, A std) const {
    return divide((of_teacher ? teacher_temperature : temperature).rate(row), of_std(std));
  }
  KD_HD LogSoftmax<A> side(bool of_teacher, int64_t row) const {
    const int64_t first = of_teacher ? kSide : 0;
    return {stats.softmax(first, row), rate(of_teacher, row, stats[first + kStd][row])};
  }
  KD_HD SideGrad<A> grad(bool of_teacher, int64_t row, A factor) const {
    const int64_t first = of_teacher ? kSide : 0;
    return side_grad([&](int64_t k) { return stats[first + k][row]; }, factor,
                     (of_teacher ? teacher_temperature : temperature)[row], standardize, cols);
  }
};

// Which divergence.
struct Form {
  int64_t kind;
  double a, b, skew;

  // That of a row, which may have a skew of its own. KL(p || p) and KL(q || q) weigh nothing.
  template <class A>
  KD_HD Form of_row(const Inputs<A>& in, int64_t row) const {
    const double own = in.skews.data ? in.skew_of(row) : skew;
    if (kind != kSkewed) return *this;
    return {kind, own == 1 ? 0 : a, own == 0 ? 0 : b, own};
  }
};

// f(terms) of a kind: what else there is to know is told by numbers.
template <class A, class F>
void dispatch_kind(const Form& form, const F& f) {
  const A a = A(form.a), b = A(form.b);
  switch (form.kind) {
    case kVariation: return f(Variation<A>{});
    case kCrossEntropy: return f(CrossEntropy<A>{});
    case kAlphaBeta: return f(AlphaBeta<A, kUnknown>{a, b});
    default: return f(Skewed<A, kAny, kAnyMixture>{a, b, A(form.skew), A(1 - form.skew)});
  }
}

// f(terms) of a row's form, with a type for each that a loop of a CPU is worth.
template <class A, class F>
void dispatch_form(const Form& form, const F& f) {
  const A a = A(form.a), b = A(form.b), p = A(form.skew), q = A(1 - form.skew);
  if (form.kind == kVariation) return f(Variation<A>{});
  if (form.kind == kCrossEntropy) return f(CrossEntropy<A>{});
  if (form.kind == kSkewed) {
    if (a == 0 && b == 0) return f(Nothing<A>{});
    if (p == 0) return f(Skewed<A, kOfP, kIsQ>{a, b, p, q});
    if (q == 0) return f(Skewed<A, kOfQ, kIsP>{a, b, p, q});
    if (b == 0) return f(Skewed<A, kOfP, kBetween>{a, b, p, q});
    return a == 0 ? f(Skewed<A, kOfQ, kBetween>{a, b, p, q}) : f(Skewed<A, kOfBoth, kBetween>{a, b, p, q});
  }
  switch (AlphaBeta<A, kUnknown>{a, b}.exponents()) {
    case kOnlyA: return f(AlphaBeta<A, kOnlyA>{a, b});
    case kOnlyB: return f(AlphaBeta<A, kOnlyB>{a, b});
    case kOpposite: return f(AlphaBeta<A, kOpposite>{a, b});
    case kNone: return f(AlphaBeta<A, kNone>{a, b});
    default: return f(AlphaBeta<A, kGeneral>{a, b});
  }
}

// ---- one row of a loss
template <class A>
struct RowValue {
  Inputs<A> in;
  const A* values;
  A scale;

  KD_HD A operator()(int64_t row) const {
    const A weight = in.weight_of(row);
    return weight == 0 ? A(0) : scale * (weight * values[row]);
  }
};

// What a backward writes; matrices are null where no gradient is needed.
struct Gradients {
  Column upstream;
  Matrix student, teacher;

  template <class A>
  KD_HD A of_row(const Inputs<A>& in, int64_t row, A scale) const {
    return read<A>(upstream, row) * scale * in.weight_of(row);
  }
};

// ---- the ops
// teacher_temperature: 0 for the student's.
template <class A>
Inputs<A> inputs(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& labels, const std::optional<Tensor>& skews,
                 const std::optional<Tensor>& temperatures, const std::optional<Tensor>& teacher_temperatures,
                 double temperature, double teacher_temperature, const Tensor& stats, bool standardize, bool moments) {
  const Temperature<A> of_student(temperature, temperatures);
  return {matrix(student),
          matrix(teacher),
          student.size(0),
          student.size(1),
          column(weight),
          column(skews),
          labels_of(labels),
          of_student,
          teacher_temperature == 0 ? of_student : Temperature<A>(teacher_temperature, teacher_temperatures),
          stats_of<A>(stats),
          standardize,
          moments};
}

template <class Backend>
TwoTensors divergence(Tensor student, Tensor teacher, std::optional<Tensor> weight, std::optional<Tensor> labels,
                      std::optional<Tensor> skews, std::optional<Tensor> temperatures,
                      std::optional<Tensor> teacher_temperatures, double temperature, double teacher_temperature,
                      int64_t kind, double a, double b, double skew, bool standardize, bool moments, double scale,
                      int64_t divisor, bool reduce) {
  const Backend backend(student);
  const int64_t rows = student.size(0);
  const ScalarType dtype = accumulator(student, teacher);
  Tensor loss = empty_loss(student, dtype, reduce), stats = empty(student, dtype, {kStats, rows});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const Inputs<A> in = inputs<A>(student, teacher, weight, labels, skews, temperatures, teacher_temperatures,
                                   temperature, teacher_temperature, stats, standardize, moments);
    typename Backend::template Memory<A> values(student, rows);
    backend.divergence(in, Form{kind, a, b, skew}, values.data());
    backend.reduce(RowValue<A>{in, values.data(), A(scale / divisor)}, rows, reduce, loss, data<A>(loss));
  });
  return {loss, stats};
}

template <class Backend>
TwoTensors divergence_backward(Tensor grad, Tensor student, Tensor teacher, std::optional<Tensor> weight,
                               std::optional<Tensor> labels, std::optional<Tensor> skews,
                               std::optional<Tensor> temperatures, std::optional<Tensor> teacher_temperatures,
                               Tensor stats, double temperature, double teacher_temperature, int64_t kind, double a,
                               double b, double skew, bool standardize, double scale, int64_t divisor,
                               bool need_student, bool need_teacher) {
  const Backend backend(student);
  const MatrixGrad to_student = matrix_grad(student, need_student, grad),
                   to_teacher = matrix_grad(teacher, need_teacher, grad);
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    const Inputs<A> in = inputs<A>(student, teacher, weight, labels, skews, temperatures, teacher_temperatures,
                                   temperature, teacher_temperature, stats, standardize, false);
    backend.divergence_backward(in, Form{kind, a, b, skew}, A(scale / divisor),
                                Gradients{column(grad), to_student.m, to_teacher.m});
  });
  return {to_student.tensor, to_teacher.tensor};
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("divergence", TORCH_BOX(&divergence<Backend>));
  m.impl("divergence_backward", TORCH_BOX(&divergence_backward<Backend>));
}

}  // namespace divergence
}  // namespace kdfast
