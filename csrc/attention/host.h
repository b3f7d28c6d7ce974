// The ops' memory and types, on every device. See common/host.h.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "attention/math.h"
#include "common/host.h"

namespace kdfast {
namespace attention {

// Whether the channels of a position are neighbours in memory.
inline bool is_channels_last(const Tensor& x) { return x.stride(1) == 1 && x.stride(2) != 1; }

template <class Backend>
ThreeTensors attention_transfer(Tensor student, Tensor teacher, int64_t p, bool need_student, bool need_teacher) {
  const Backend backend(student);
  const int64_t batch = student.size(0), positions = student.size(2);
  const ScalarType dtype = accumulator(student, teacher);
  Tensor loss = empty(student, dtype, {});
  // Attention maps, which the backend replaces by the slopes of the loss.
  Tensor maps_s = empty(student, dtype, {batch, positions}), maps_t = empty(student, dtype, {batch, positions});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.transfer(student, teacher, p, need_student, need_teacher, data<A>(maps_s), data<A>(maps_t), loss);
  });
  return {loss, need_student ? maps_s : nothing(student, dtype), need_teacher ? maps_t : nothing(student, dtype)};
}

template <class Backend>
Tensor attention_transfer_backward(Tensor grad, Tensor slope, Tensor x, int64_t p) {
  const Backend backend(x);
  const bool last = is_channels_last(x);
  const int64_t batch = x.size(0), rows = x.size(last ? 2 : 1), cols = x.size(last ? 1 : 2);
  const Tensor memory = empty(x, x.scalar_type(), {batch, rows, cols});
  const Matrix out{memory.data_ptr(), x.scalar_type(), cols, 1};
  dispatch_accumulator(slope.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.gradient(column(grad), data<const A>(slope), x, p, out);
  });
  return last ? torch::stable::transpose(memory, 1, 2) : memory;
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("attention_transfer", TORCH_BOX(&attention_transfer<Backend>));
  m.impl("attention_transfer_backward", TORCH_BOX(&attention_transfer_backward<Backend>));
}

}  // namespace attention
}  // namespace kdfast
