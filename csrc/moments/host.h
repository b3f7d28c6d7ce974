// The ops' memory and types, on every device. See common/host.h.
#pragma once

#include "common/host.h"
#include "common/layout.h"
#include "moments/math.h"

namespace kdfast {
namespace moments {

template <class Backend>
Tensor channel_moments(Tensor x) {
  const Backend backend(x);
  const ScalarType dtype = accumulator(x, std::nullopt);
  Tensor out = empty(x, dtype, {2, x.size(1)});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    if (x.size(1) > 0) backend.moments(x, Order(x), data<A>(out));
  });
  return out;
}

template <class Backend>
Tensor channel_moments_backward(Tensor grad, Tensor x, Tensor moments) {
  const Backend backend(x);
  Tensor out = gradient(x, x, true);
  dispatch_accumulator(moments.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    if (x.size(0) > 0) backend.template backward<A>(matrix(grad), x, Order(x), matrix(moments), out);
  });
  return out;
}

// -> loss, statistics [2, kStatistics, C]
template <class Backend>
TwoTensors standardized_error(Tensor student, Tensor teacher, double epsilon) {
  const Backend backend(student);
  const ScalarType dtype = accumulator(student, teacher);
  Tensor loss = empty(student, dtype, {}), statistics = empty(student, dtype, {2, kStatistics, student.size(1)});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.error(student, teacher, Order(student), epsilon, data<A>(statistics), data<A>(loss));
  });
  return {loss, statistics};
}

template <class Backend>
TwoTensors standardized_error_backward(Tensor grad, Tensor student, Tensor teacher, Tensor statistics,
                                       bool need_student, bool need_teacher) {
  const Backend backend(student);
  Tensor to_student = gradient(student, student, need_student), to_teacher = gradient(teacher, student, need_teacher);
  dispatch_accumulator(statistics.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    if (student.size(0) > 0) {
      backend.error_backward(column(grad), student, teacher, Order(student), data<const A>(statistics),
                             MapGrad(to_student, need_student), MapGrad(to_teacher, need_teacher));
    }
  });
  return {to_student, to_teacher};
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments<Backend>));
  m.impl("channel_moments_backward", TORCH_BOX(&channel_moments_backward<Backend>));
  m.impl("standardized_error", TORCH_BOX(&standardized_error<Backend>));
  m.impl("standardized_error_backward", TORCH_BOX(&standardized_error_backward<Backend>));
}

}  // namespace moments
}  // namespace kdfast
