// The ops' memory and types, on every device. See common/host.h.
//
// Channels of maps compared as distributions over their positions, read position after position: of channels_last maps
// that is as they lie. Statistics [kStats, B C] are those of softmax_kl, whose rows are the channels here.
#pragma once

#include "common/host.h"
#include "common/layout.h"
#include "softmax_kl/math.h"

namespace kdfast {
namespace channel_kl {

using softmax_kl::KlGrad;
using softmax_kl::KlState;

// Rows of the statistics. The third one is that of KL(student || teacher), which is not made here.
enum { kMaxS, kSumS, kUnused, kMaxT, kSumT, kKl, kStats };

template <class A>
struct Statistics {
  A* data;
  int64_t rows;

  KD_HD A& at(int64_t statistic, int64_t row) const { return data[statistic * rows + row]; }

  template <class S>
  KD_HD void set(int64_t row, const KlState<A, S>& state, A kl) const {
    const Softmax<A> t = state.p(), s = state.q();
    at(kMaxS, row) = s.max;
    at(kSumS, row) = s.sum;
    at(kUnused, row) = 0;
    at(kMaxT, row) = t.max;
    at(kSumT, row) = t.sum;
    at(kKl, row) = kl;
  }
  KD_HD Softmax<A> student(int64_t row) const { return {at(kMaxS, row), at(kSumS, row)}; }
  KD_HD Softmax<A> teacher(int64_t row) const { return {at(kMaxT, row), at(kSumT, row)}; }

  // Whether its KL is to be summed up in terms that do not cancel.
  KD_HD bool is_near(int64_t row) const { return at(kKl, row) < A(kNear) && at(kSumT, row) != 0; }
  KD_HD NearRow<A> near(int64_t row, A rate) const {
    return {at(kMaxT, row), at(kMaxS, row), at(kSumT, row), at(kSumS, row), rate, true};
  }
  KD_HD KlGrad<A> gradient(int64_t row, A scale, A rate) const {
    return softmax_kl::kl_grad(teacher(row), student(row), at(kKl, row), scale, rate);
  }
};

// A map's elements, position after position.
inline Order position_order(const Tensor& x) { return Order(x, true); }

// The gradient, in that order.
inline Tensor position_gradient(const Tensor& x, bool needed) {
  if (!needed) return nothing(x);
  return torch::stable::transpose(empty(x, x.scalar_type(), {x.size(0), x.size(2), x.size(1)}), 1, 2);
}

// -> loss, statistics
template <class Backend>
TwoTensors channel_kl(Tensor student, Tensor teacher, double temperature) {
  const Backend backend(student);
  const ScalarType dtype = accumulator(student, teacher);
  const int64_t rows = student.size(0) * student.size(1);
  Tensor loss = empty(student, dtype, {}), statistics = empty(student, dtype, {kStats, rows});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.template forward<A>(student, teacher, position_order(student), temperature,
                                Statistics<A>{data<A>(statistics), rows}, data<A>(loss));
  });
  return {loss, statistics};
}

template <class Backend>
TwoTensors channel_kl_backward(Tensor grad, Tensor student, Tensor teacher, Tensor statistics, double temperature,
                               bool need_student, bool need_teacher) {
  const Backend backend(student);
  Tensor to_student = position_gradient(student, need_student), to_teacher = position_gradient(teacher, need_teacher);
  dispatch_accumulator(statistics.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    if (student.numel() == 0) return;
    const int64_t rows = student.size(0) * student.size(1);
    backend.template backward<A>(column(grad), student, teacher, position_order(student), temperature,
                                 Statistics<A>{data<A>(statistics), rows}, MapGrad(to_student, need_student),
                                 MapGrad(to_teacher, need_teacher));
  });
  return {to_student, to_teacher};
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("channel_kl", TORCH_BOX(&channel_kl<Backend>));
  m.impl("channel_kl_backward", TORCH_BOX(&channel_kl_backward<Backend>));
}

}  // namespace channel_kl
}  // namespace kdfast
