// The ops' memory and types, on every device. See common/host.h.
#pragma once

#include "common/host.h"
#include "softmax_kl/layout.h"

namespace kdfast {
namespace softmax_kl {

// ---- one row of a loss, from its statistics
template <class A>
struct SoftmaxKlValue {
  Inputs<A> in;
  Shares<A> shares;
  A scale;

  KD_HD A operator()(int64_t row) const {
    const A t = in.temperature[row];
    return row_value(in.stats[kTeacher + kKl][row], in.stats[kStudent + kKl][row], shares, in.weight_of(row),
                     scale * (t * t));
  }
};

// Scales the row's weight for the backward, too.
template <class A>
struct CrossEntropyValue {
  Inputs<A> in;
  const A* ce;
  const double* kept;  // null: the cross-entropy is not divided by the rows kept
  A kl_scale;
  double ce_scale;

  KD_HD A operator()(int64_t row) const {
    const A share = static_cast<A>(kept ? ce_scale / max(*kept, 1.0) : ce_scale), t = in.temperature[row];
    const A weight = in.stats[kCeWeight][row] *= share;
    return row_value_ce(in.stats[kCeKl][row], ce[row], kl_scale * (t * t) * in.weight_of(row), weight);
  }
};

// Whether a row's label is not ignored.
template <class A>
struct KeptValue {
  Stats<A> stats;

  KD_HD double operator()(int64_t row) const { return stats[kCeWeight][row] != 0; }
};

template <class A>
struct DkdValue {
  Inputs<A> in;
  A alpha, beta, scale;

  KD_HD A operator()(int64_t row) const {
    const A t = in.temperature[row];
    return row_value_dkd(in.stats[kTargetKl][row], in.stats[kRestKl][row], alpha, beta,
                         scale * (t * t) * in.weight_of(row));
  }
};

// ---- the ops
template <class A>
Inputs<A> inputs(const Tensor& student, const std::optional<Tensor>& teacher, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& temperatures, double temperature, const Tensor& stats) {
  return {matrix(student),    matrix(teacher),   student.size(0),  student.size(1), {temperature, temperatures},
          stats_of<A>(stats), column(weight, 0), column(weight, 1)};
}

template <class Backend>
TwoTensors softmax_kl(Tensor student, Tensor teacher, std::optional<Tensor> weight, std::optional<Tensor> temperatures,
                      double temperature, double beta, int64_t divisor, bool reduce) {
  const Backend backend(student);
  const ScalarType dtype = accumulator(student, teacher);
  Tensor loss = empty_loss(student, dtype, reduce), stats = empty(student, dtype, {kKlStats, student.size(0)});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const Inputs<A> in = inputs<A>(student, teacher, weight, temperatures, temperature, stats);
    const Shares<A> shares(beta);
    backend.softmax_kl(in, shares);
    const SoftmaxKlValue<A> value{in, shares, A(1.0 / divisor)};
    backend.reduce(value, in.rows, reduce, loss, data<A>(loss));
  });
  return {loss, stats};
}

template <class Backend>
TwoTensors softmax_kl_backward(Tensor grad, Tensor student, Tensor teacher, std::optional<Tensor> weight,
                               std::optional<Tensor> temperatures, Tensor stats, double temperature, double beta,
                               int64_t divisor, bool need_student, bool need_teacher) {
  const Backend backend(student);
  const MatrixGrad to_student = matrix_grad(student, need_student, grad),
                   to_teacher = matrix_grad(teacher, need_teacher, grad);
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.softmax_kl_backward(inputs<A>(student, teacher, weight, temperatures, temperature, stats), Shares<A>(beta),
                                A(1.0 / divisor), Gradients{column(grad), to_student.m, to_teacher.m});
  });
  return {to_student.tensor, to_teacher.tensor};
}

template <class Backend>
TwoTensors softmax_kl_topk(Tensor student, Tensor values, Tensor indices, std::optional<Tensor> rest,
                           std::optional<Tensor> weight, std::optional<Tensor> temperatures, double temperature,
                           double scale, int64_t divisor, bool reduce) {
  const Backend backend(student);
  const ScalarType dtype = accumulator(student, values);
  Tensor loss = empty_loss(student, dtype, reduce), stats = empty(student, dtype, {kTopKStats, student.size(0)});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const Inputs<A> in = inputs<A>(student, std::nullopt, weight, temperatures, temperature, stats);
    backend.softmax_kl_topk(in, top_k(values, indices, rest));
    const SoftmaxKlValue<A> value{in, Shares<A>(0), A(scale / divisor)};
    backend.reduce(value, in.rows, reduce, loss, data<A>(loss));
  });
  return {loss, stats};
}

template <class Backend>
Tensor softmax_kl_topk_backward(Tensor grad, Tensor student, Tensor values, Tensor indices, std::optional<Tensor> rest,
                                std::optional<Tensor> weight, std::optional<Tensor> temperatures, Tensor stats,
                                double temperature, double scale, int64_t divisor) {
  const Backend backend(student);
  const MatrixGrad to_student = matrix_grad(student, true, grad);
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.softmax_kl_topk_backward(inputs<A>(student, std::nullopt, weight, temperatures, temperature, stats),
                                     top_k(values, indices, rest), A(scale / divisor),
                                     Gradients{column(grad), to_student.m, Matrix{}});
  });
  return to_student.tensor;
}

template <class Backend>
TwoTensors cross_entropy_kl(Tensor student, std::optional<Tensor> teacher, Tensor labels, std::optional<Tensor> weight,
                            std::optional<Tensor> temperatures, double temperature, double kl_scale, int64_t kl_divisor,
                            double ce_scale, int64_t ce_divisor, double smoothing, int64_t ignore_index, bool ce_mean,
                            bool reduce) {
  const Backend backend(student);
  const int64_t rows = student.size(0);
  const ScalarType dtype = accumulator(student, teacher);
  Tensor loss = empty_loss(student, dtype, reduce), stats = empty(student, dtype, {kCeStats, rows});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    using Rows = typename Backend::template Memory<A>;
    using Count = typename Backend::template Memory<double>;
    const Inputs<A> in = inputs<A>(student, teacher, weight, temperatures, temperature, stats);
    Rows ce(student, rows);
    Count kept(student, ce_mean ? 1 : 0);
    backend.cross_entropy_kl(in, labels_of(labels), ignore_index, A(smoothing), ce.data());
    if (ce_mean) backend.reduce(KeptValue<A>{in.stats}, rows, true, student, kept.data());
    const CrossEntropyValue<A> value{in, ce.data(), ce_mean ? kept.data() : nullptr, A(kl_scale / kl_divisor),
                                     ce_mean ? ce_scale : ce_scale / ce_divisor};
    backend.reduce(value, rows, reduce, loss, data<A>(loss));
  });
  return {loss, stats};
}

template <class Backend>
TwoTensors cross_entropy_kl_backward(Tensor grad, Tensor student, std::optional<Tensor> teacher, Tensor labels,
                                     std::optional<Tensor> weight, std::optional<Tensor> temperatures, Tensor stats,
                                     double temperature, double kl_scale, int64_t kl_divisor, double smoothing,
                                     bool need_student, bool need_teacher) {
  const Backend backend(student);
  const MatrixGrad to_student = matrix_grad(student, need_student, grad),
                   to_teacher = matrix_grad(teacher ? *teacher : student, need_teacher, grad);
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.cross_entropy_kl_backward(inputs<A>(student, teacher, weight, temperatures, temperature, stats),
                                      labels_of(labels), A(kl_scale / kl_divisor), A(smoothing),
                                      Gradients{column(grad), to_student.m, to_teacher.m});
  });
  return {to_student.tensor, to_teacher.tensor};
}

template <class Backend>
TwoTensors dkd(Tensor student, Tensor teacher, Tensor labels, std::optional<Tensor> weight,
               std::optional<Tensor> temperatures, double temperature, double alpha, double beta, int64_t divisor,
               bool reduce) {
  const Backend backend(student);
  const ScalarType dtype = accumulator(student, teacher);
  Tensor loss = empty_loss(student, dtype, reduce), stats = empty(student, dtype, {kDkdStats, student.size(0)});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const Inputs<A> in = inputs<A>(student, teacher, weight, temperatures, temperature, stats);
    backend.dkd(in, labels_of(labels));
    const DkdValue<A> value{in, A(alpha), A(beta), A(1.0 / divisor)};
    backend.reduce(value, in.rows, reduce, loss, data<A>(loss));
  });
  return {loss, stats};
}

template <class Backend>
TwoTensors dkd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor labels, std::optional<Tensor> weight,
                        std::optional<Tensor> temperatures, Tensor stats, double temperature, double alpha, double beta,
                        int64_t divisor, bool need_student, bool need_teacher) {
  const Backend backend(student);
  const MatrixGrad to_student = matrix_grad(student, need_student, grad),
                   to_teacher = matrix_grad(teacher, need_teacher, grad);
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.dkd_backward(inputs<A>(student, teacher, weight, temperatures, temperature, stats), labels_of(labels),
                         A(alpha), A(beta), A(1.0 / divisor), Gradients{column(grad), to_student.m, to_teacher.m});
  });
  return {to_student.tensor, to_teacher.tensor};
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("softmax_kl", TORCH_BOX(&softmax_kl<Backend>));
  m.impl("softmax_kl_backward", TORCH_BOX(&softmax_kl_backward<Backend>));
  m.impl("softmax_kl_topk", TORCH_BOX(&softmax_kl_topk<Backend>));
  m.impl("softmax_kl_topk_backward", TORCH_BOX(&softmax_kl_topk_backward<Backend>));
  m.impl("cross_entropy_kl", TORCH_BOX(&cross_entropy_kl<Backend>));
  m.impl("cross_entropy_kl_backward", TORCH_BOX(&cross_entropy_kl_backward<Backend>));
  m.impl("dkd", TORCH_BOX(&dkd<Backend>));
  m.impl("dkd_backward", TORCH_BOX(&dkd_backward<Backend>));
}

}  // namespace softmax_kl
}  // namespace kdfast
