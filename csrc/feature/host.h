// The ops' memory and types, on every device. See common/host.h.
#pragma once

#include "common/host.h"
#include "common/layout.h"
#include "feature/math.h"

namespace kdfast {
namespace feature {

// feature_error: which terms, over what they are summed, and the factor of the sums.
struct ErrorSettings {
  int64_t kind;
  double boundary;
  int64_t over;
  double scale;
};

// The gradients of both maps.
struct MapGrads {
  Tensor student, teacher;
  MapGrad to_student, to_teacher;

  MapGrads(const Tensor& s, const Tensor& t, bool need_student, bool need_teacher)
      : student(gradient(s, s, need_student)),
        teacher(gradient(t, s, need_teacher)),
        to_student(student, need_student),
        to_teacher(teacher, need_teacher) {}
};

template <class Backend>
Tensor feature_error(Tensor student, Tensor teacher, std::optional<Tensor> margin, int64_t kind, double boundary,
                     int64_t over, int64_t divisor) {
  const Backend backend(student);
  const ScalarType dtype = accumulator(student, teacher);
  Tensor out = over == kTotal ? empty(student, dtype, {})
                              : empty(student, dtype, {over == kSample ? student.size(0) : student.size(1)});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.error(student, teacher, margin, ErrorSettings{kind, boundary, over, 1.0 / static_cast<double>(divisor)},
                  data<A>(out));
  });
  return out;
}

template <class Backend>
TwoTensors feature_error_backward(Tensor grad, Tensor student, Tensor teacher, std::optional<Tensor> margin,
                                  int64_t kind, double boundary, int64_t over, int64_t divisor, bool need_student,
                                  bool need_teacher) {
  const Backend backend(student);
  const MapGrads grads(student, teacher, need_student, need_teacher);
  dispatch_accumulator(accumulator(student, teacher), [&](auto tag) {
    using A = decltype(tag);
    backend.template error_backward<A>(grad, student, teacher, margin,
                                       ErrorSettings{kind, boundary, over, 1.0 / static_cast<double>(divisor)}, grads);
  });
  return {grads.student, grads.teacher};
}

template <class Backend>
TwoTensors normalized_error(Tensor student, Tensor teacher, int64_t power) {
  const Backend backend(student);
  const ScalarType dtype = accumulator(student, teacher);
  Tensor loss = empty(student, dtype, {}), stats = empty(student, dtype, {4, student.size(0)});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.normalized(student, teacher, power, data<A>(stats), data<A>(loss));
  });
  return {loss, stats};
}

template <class Backend>
TwoTensors normalized_error_backward(Tensor grad, Tensor student, Tensor teacher, Tensor stats, int64_t power,
                                     bool need_student, bool need_teacher) {
  const Backend backend(student);
  const MapGrads grads(student, teacher, need_student, need_teacher);
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.normalized_backward(column(grad), student, teacher, data<const A>(stats), power, grads);
  });
  return {grads.student, grads.teacher};
}

template <class Backend>
Tensor pyramid_error(Tensor student, Tensor teacher) {
  const Backend backend(student);
  const ScalarType dtype = accumulator(student, teacher);
  Tensor loss = empty(student, dtype, {});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.pyramid(student, teacher, data<A>(loss));
  });
  return loss;
}

template <class Backend>
TwoTensors pyramid_error_backward(Tensor grad, Tensor student, Tensor teacher, bool need_student, bool need_teacher) {
  const Backend backend(student);
  const MapGrads grads(student, teacher, need_student, need_teacher);
  dispatch_accumulator(accumulator(student, teacher), [&](auto tag) {
    using A = decltype(tag);
    backend.template pyramid_backward<A>(column(grad), student, teacher, grads);
  });
  return {grads.student, grads.teacher};
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("feature_error", TORCH_BOX(&feature_error<Backend>));
  m.impl("feature_error_backward", TORCH_BOX(&feature_error_backward<Backend>));
  m.impl("normalized_error", TORCH_BOX(&normalized_error<Backend>));
  m.impl("normalized_error_backward", TORCH_BOX(&normalized_error_backward<Backend>));
  m.impl("pyramid_error", TORCH_BOX(&pyramid_error<Backend>));
  m.impl("pyramid_error_backward", TORCH_BOX(&pyramid_error_backward<Backend>));
}

}  // namespace feature
}  // namespace kdfast
