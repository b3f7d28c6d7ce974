// The ops' memory and types, on every device. See common/host.h.
#pragma once

#include "common/host.h"
#include "nce/math.h"

namespace kdfast {
namespace nce {

inline ScalarType accumulator(const Tensor& student, const Tensor& teacher, const Tensor& bank_student,
                              const Tensor& bank_teacher) {
  const bool wide = is_double(student) || is_double(teacher) || is_double(bank_student) || is_double(bank_teacher);
  return wide ? ScalarType::Double : ScalarType::Float;
}

// What both directions read: the student's anchors on the teacher's bank, and the reverse.
struct Inputs {
  const Tensor &student, &teacher, &bank_student, &bank_teacher, &index, &z_student, &z_teacher;
  double temperature;
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> nce(Tensor student, Tensor teacher, Tensor bank_student, Tensor bank_teacher,
                                               Tensor index, Tensor z_student, Tensor z_teacher, double temperature,
                                               bool need_grad, bool need_scores) {
  const Backend backend(student);
  const ScalarType dtype = accumulator(student, teacher, bank_student, bank_teacher);
  const int64_t rows = index.size(0), columns = index.size(1), dim = student.size(1);
  const auto grad = [&] { return need_grad ? empty(student, dtype, {rows, dim}) : nothing(student, dtype); };
  Tensor loss = empty(student, dtype, {}), student_grad = grad(), teacher_grad = grad();
  Tensor scores = need_scores ? empty(student, dtype, {2, rows, columns}) : nothing(student, dtype);
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.score(Inputs{student, teacher, bank_student, bank_teacher, index, z_student, z_teacher, temperature},
                  data<A>(loss), data<A>(student_grad, need_grad), data<A>(teacher_grad, need_grad),
                  data<A>(scores, need_scores));
  });
  return {loss, student_grad, teacher_grad, scores};
}

template <class Backend>
Tensor nce_log_sums(Tensor student, Tensor teacher, Tensor bank_student, Tensor bank_teacher, Tensor index,
                    Tensor z_student, Tensor z_teacher, double temperature) {
  const Backend backend(student);
  Tensor out = empty(student, ScalarType::Double, {2});
  dispatch_accumulator(accumulator(student, teacher, bank_student, bank_teacher), [&](auto tag) {
    using A = decltype(tag);
    backend.template log_sums<A>(
        Inputs{student, teacher, bank_student, bank_teacher, index, z_student, z_teacher, temperature},
        data<double>(out));
  });
  return out;
}

template <class Backend>
void update_bank(Tensor bank, Tensor rows, Tensor index, double momentum) {
  const Backend backend(bank);
  dispatch_accumulator(kdfast::accumulator(bank, rows), [&](auto tag) {
    using A = decltype(tag);
    backend.update(bank, rows, index, static_cast<A>(momentum));
  });
}

template <class Backend>
Tensor draw_negatives(Tensor index, int64_t k, int64_t n_data, Tensor seed, std::optional<Tensor> labels,
                      std::optional<Tensor> table) {
  const Backend backend(index);
  const auto pointer = [](const std::optional<Tensor>& x) { return x ? data<const int64_t>(*x) : nullptr; };
  Tensor out = empty(index, ScalarType::Long, {index.size(0), k + 1});
  backend.draw(index, Source{0, n_data, pointer(table), pointer(labels)}, data<const uint64_t>(seed), k + 1,
               data<int64_t>(out));
  return out;
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("nce", TORCH_BOX(&nce<Backend>));
  m.impl("nce_log_sums", TORCH_BOX(&nce_log_sums<Backend>));
  m.impl("update_bank", TORCH_BOX(&update_bank<Backend>));
  m.impl("draw_negatives", TORCH_BOX(&draw_negatives<Backend>));
}

}  // namespace nce
}  // namespace kdfast
