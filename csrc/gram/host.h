// The ops' memory and types, on every device. See common/host.h.
#pragma once

#include "common/host.h"
#include "gram/math.h"

namespace kdfast {
namespace gram {

template <class Backend>
Tensor inner_products(Tensor a, std::optional<Tensor> b) {
  const Backend backend(a);
  const ScalarType dtype = accumulator(a, b);
  Tensor out = empty(a, dtype, {a.size(0), a.size(1), b ? b->size(1) : a.size(1)});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.template inner_products<A>(a, b, out);
  });
  return out;
}

template <class Backend>
Tensor weighted_sums(Tensor weights, Tensor x, std::optional<Tensor> factor) {
  const Backend backend(x);
  Tensor out = empty(x, x.scalar_type(), {weights.size(0), weights.size(1), x.size(2)});
  dispatch_accumulator(weights.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.template weighted_sums<A>(weights, x, column(factor), out);
  });
  return out;
}

template <class Backend>
ThreeTensors compare_grams(Tensor student, Tensor teacher, std::string kind, double eps,
                           std::vector<double> coefficients, bool need_student, bool need_teacher) {
  const Backend backend(student);
  const std::vector<int64_t> shape{student.size(0), student.size(1), student.size(2)};
  const ScalarType dtype = student.scalar_type();
  Tensor loss = empty(student, dtype, {});
  Tensor weights_s = need_student ? empty(student, dtype, shape) : nothing(student);
  Tensor weights_t = need_teacher ? empty(student, dtype, shape) : nothing(student);
  const double scale = 1 / std::max<double>(1, student.numel());
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    A* const weights[2] = {data<A>(weights_s, need_student), data<A>(weights_t, need_teacher)};
    dispatch_comparison<A>(kind, scale, eps, coefficients,
                           [&](const auto& f) { backend.compare(f, student, teacher, weights, loss); });
  });
  return {loss, weights_s, weights_t};
}

// -> the loss, and its slopes in the unit positions [B, N, C] of both.
template <class Backend>
ThreeTensors affinity(Tensor student, Tensor teacher, std::string kind, double eps, bool need_student,
                      bool need_teacher) {
  const Backend backend(student);
  const int64_t batch = student.size(0), positions = student.size(2);
  const ScalarType dtype = accumulator(student, teacher);
  const auto slope = [&](const Tensor& x, bool needed) {
    return needed ? empty(student, dtype, {batch, positions, x.size(1)}) : nothing(student, dtype);
  };
  Tensor loss = empty(student, dtype, {}), slope_s = slope(student, need_student),
         slope_t = slope(teacher, need_teacher);
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    A* const slopes[2] = {data<A>(slope_s, need_student), data<A>(slope_t, need_teacher)};
    dispatch_affinity<A>(kind, [&](const auto& f) { backend.affinity(f, {student, teacher}, eps, slopes, loss); });
  });
  return {loss, slope_s, slope_t};
}

template <class Backend>
Tensor affinity_backward(Tensor grad, Tensor slope, Tensor x, double eps) {
  const Backend backend(x);
  Tensor out = empty(x, x.scalar_type(), {x.size(0), x.size(1), x.size(2)});
  dispatch_accumulator(slope.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.affinity_backward(column(grad), slope, x, static_cast<A>(eps), out);
  });
  return out;
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("inner_products", TORCH_BOX(&inner_products<Backend>));
  m.impl("weighted_sums", TORCH_BOX(&weighted_sums<Backend>));
  m.impl("compare_grams", TORCH_BOX(&compare_grams<Backend>));
  m.impl("affinity", TORCH_BOX(&affinity<Backend>));
  m.impl("affinity_backward", TORCH_BOX(&affinity_backward<Backend>));
}

}  // namespace gram
}  // namespace kdfast
