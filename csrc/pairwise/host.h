// The ops' memory and types, on every device. See common/host.h.
#pragma once

#include "common/host.h"
#include "pairwise/math.h"

namespace kdfast {
namespace pairwise {

template <class Backend>
Tensor pairwise_distance(Tensor x, std::optional<Tensor> y, bool squared) {
  const Backend backend(x);
  const ScalarType dtype = accumulator(x, y);
  Tensor out = empty(x, dtype, {x.size(0), y ? y->size(0) : x.size(0)});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.distances(x, y, squared, data<A>(out));
  });
  return out;
}

template <class Backend>
Tensor weighted_differences(Tensor weights, Tensor x, std::optional<Tensor> y, std::optional<Tensor> factor) {
  const Backend backend(x);
  Tensor out = empty(x, x.scalar_type(), {x.size(0), x.size(1)});
  dispatch_accumulator(weights.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.template weighted_differences<A>(weights, x, y ? *y : x, column(factor), out);
  });
  return out;
}

// -> the loss, and its gradient dL/dp [rows, rows] in the squared distances of the student, for weighted_differences.
template <class Backend>
TwoTensors rkd(Tensor student, Tensor teacher, double distance_weight, double angle_weight, bool need_grad) {
  const Backend backend(student);
  const int64_t rows = student.size(0);
  const ScalarType dtype = accumulator(student, teacher);
  Tensor loss = empty(student, dtype, {});
  Tensor grad = need_grad ? empty(student, dtype, {rows, rows}) : nothing(student, dtype);
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.rkd(student, teacher, distance_weight, angle_weight, grad, data<A>(grad, need_grad), data<A>(loss));
  });
  return {loss, grad};
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("pairwise_distance", TORCH_BOX(&pairwise_distance<Backend>));
  m.impl("weighted_differences", TORCH_BOX(&weighted_differences<Backend>));
  m.impl("rkd", TORCH_BOX(&rkd<Backend>));
}

}  // namespace pairwise
}  // namespace kdfast
