// The ops' checks, memory and types, on every device. See common/host.h.
#pragma once

#include "common/host.h"
#include "teachers/layout.h"

namespace kdfast {
namespace teachers {

template <class A>
Teachers<A> make_op(const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& labels,
                    const std::optional<Tensor>& weight, Kind kind, const std::optional<Tensor>& temperatures,
                    double temperature, const Tensor& stats) {
  const int64_t rows = student.size(0), count = static_cast<int64_t>(teachers.size());
  return {matrix(student),
          networks_of(teachers),
          labels_of(labels),
          column(weight),
          {temperature, temperatures},
          rows,
          student.size(1),
          kind,
          Stats<A>{data<A>(stats), rows, count}};
}

template <class Backend>
TwoTensors teachers_forward(Tensor student, std::vector<Tensor> teachers, std::optional<Tensor> labels,
                            std::optional<Tensor> weight, std::optional<Tensor> temperatures, std::string kind,
                            double temperature, double scale, int64_t divisor, double ce_scale, int64_t ce_divisor) {
  const Backend backend(student);
  const int64_t rows = student.size(0), count = static_cast<int64_t>(teachers.size());
  const ScalarType dtype = accumulator(teachers, student);
  Tensor loss = empty(student, dtype, {}), stats = empty(student, dtype, {stats_count(count), rows});
  const Scales scales{scale / divisor, labels ? ce_scale : 0, double(ce_divisor)};
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.forward(make_op<A>(student, teachers, labels, weight, kind_of(kind), temperatures, temperature, stats),
                    scales, loss);
  });
  return {loss, stats};
}

template <class Backend>
TwoTensors teachers_backward(Tensor grad, Tensor student, std::vector<Tensor> teachers, std::optional<Tensor> labels,
                             std::optional<Tensor> weight, std::optional<Tensor> temperatures, Tensor stats,
                             std::string kind, double temperature, double scale, int64_t divisor, double ce_scale,
                             int64_t ce_divisor, bool need_student, bool need_teachers) {
  const Backend backend(student);
  const int64_t rows = student.size(0), cols = student.size(1), count = static_cast<int64_t>(teachers.size());
  const MatrixGrad to_student = matrix_grad(student, need_student, grad);
  Tensor to_teachers =
      need_teachers ? empty(teachers[0], teachers[0].scalar_type(), {count, rows, cols}) : nothing(grad);
  const Scales scales{scale / divisor, ce_scale, double(ce_divisor)};
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.backward(make_op<A>(student, teachers, labels, weight, kind_of(kind), temperatures, temperature, stats),
                     column(grad), scales, to_student.m, network_grads(to_teachers, need_teachers));
  });
  return {to_student.tensor, to_teachers};
}

template <class Backend>
ThreeTensors aekd(Tensor student, std::vector<Tensor> teachers, std::optional<Tensor> temperatures, double temperature,
                  double scale, int64_t divisor, double slack, bool normalize) {
  const Backend backend(student);
  const int64_t rows = student.size(0), count = static_cast<int64_t>(teachers.size());
  const ScalarType dtype = accumulator(teachers, student);
  Tensor loss = empty(student, dtype, {}), stats = empty(student, dtype, {stats_count(count), rows});
  Tensor weights = empty(student, dtype, {count});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const Teachers<A> op =
        make_op<A>(student, teachers, std::nullopt, weights, Kind::kKl, temperatures, temperature, stats);
    backend.aekd(op, scale / divisor, slack, normalize, data<A>(weights), loss);
  });
  return {loss, stats, weights};
}

template <class Backend>
Tensor simplex_minimum(Tensor gram, Tensor slope, double cap) {
  const Backend backend(gram);
  const int64_t count = slope.size(0);
  Tensor a = empty(slope, ScalarType::Double, {count});
  Tensor memory = empty(slope, ScalarType::Double, {simplex_memory(count) + count * count + count});
  backend.simplex_minimum(matrix(gram), column(slope), count, cap, data<double>(memory), data<double>(a));
  return a;
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("teachers_kl", TORCH_BOX(&teachers_forward<Backend>));
  m.impl("teachers_kl_backward", TORCH_BOX(&teachers_backward<Backend>));
  m.impl("aekd", TORCH_BOX(&aekd<Backend>));
  m.impl("simplex_minimum", TORCH_BOX(&simplex_minimum<Backend>));
}

}  // namespace teachers
}  // namespace kdfast
