// What CPU and CUDA agree on: how networks are passed, and the statistics that a forward leaves for its backward.
#pragma once

#include <string>

#include "common/labels.h"
#include "common/temperature.h"
#include "common/tensor.h"
#include "ensemble/math.h"

namespace kdfast {
namespace ensemble {

constexpr int64_t kMost = 128;  // networks in one call

// Matrices [rows, cols] of one dtype and any strides.
struct Networks {
  void* data[kMost];
  int64_t row_stride[kMost], col_stride[kMost];
  ScalarType dtype;
  int64_t count;

  KD_HD Matrix operator[](int64_t i) const { return {data[i], dtype, row_stride[i], col_stride[i]}; }
};

inline Networks networks_of(const std::vector<Tensor>& tensors) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  STD_TORCH_CHECK(count >= 1 && count <= kMost, "kdfast: from 1 to ", kMost, " networks, got ", count);
  Networks networks;
  networks.dtype = tensors[0].scalar_type();
  networks.count = count;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(tensors[i].scalar_type() == networks.dtype, "kdfast: networks of one call have one dtype");
    networks.data[i] = tensors[i].data_ptr();
    networks.row_stride[i] = tensors[i].stride(0);
    networks.col_stride[i] = tensors[i].stride(1);
  }
  return networks;
}

// Weights [rows, targets, networks] of any strides. A null pointer stands for the least logits. Without the last
// network and its target, that network leads: no target has it, and its own is the mean of the others.
struct Mix {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t row_stride = 0, target_stride = 0, network_stride = 0;
  int64_t targets = 0, networks = 0;  // in memory
  int64_t leader = -1;                // which network leads, if one does
  double share = 0;                   // of each other network in its target

  KD_HD bool is_implied(int64_t target, int64_t network) const {
    return leader >= 0 && (target == leader || network == leader);
  }
  KD_HD double implied(int64_t network) const { return network == leader ? 0 : share; }

  KD_HD Column column(int64_t row, int64_t target) const {
    const int64_t offset = row * row_stride + target * target_stride;
    const int64_t size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    return {static_cast<char*>(data) + offset * size, dtype, network_stride};
  }
};

// Of `count` networks.
inline Mix mix_of(const std::optional<Tensor>& mix, int64_t count) {
  Mix m;
  if (!mix) return m;
  m.data = mix->data_ptr();
  m.dtype = mix->scalar_type();
  m.row_stride = mix->stride(0);
  m.target_stride = mix->stride(1);
  m.network_stride = mix->stride(2);
  m.targets = mix->size(1);
  m.networks = mix->size(2);
  if (m.networks < count) {
    m.leader = m.networks;
    m.share = 1 / static_cast<double>(m.networks);
  }
  return m;
}

inline int64_t targets_of(const std::optional<Tensor>& mix, int64_t count) {
  return mix ? mix->size(1) + (mix->size(2) < count) : 1;
}

// mixed_logits_kl: maxima of the networks; of the learners sums at T, sums at 1, masses, slopes; of the targets maxima,
// sums at T, sums at 1.
template <class A>
struct MixedStats {
  A* data;
  int64_t rows, networks, learners, targets;

  KD_HD A& at(int64_t k, int64_t row) const { return data[k * rows + row]; }
  KD_HD A& max(int64_t i, int64_t row) const { return at(i, row); }
  KD_HD A& sum(int64_t i, int64_t row) const { return at(networks + i, row); }
  KD_HD A& sum_1(int64_t i, int64_t row) const { return at(networks + learners + i, row); }
  KD_HD A& mass(int64_t i, int64_t row) const { return at(networks + 2 * learners + i, row); }
  KD_HD A& slope(int64_t i, int64_t row) const { return at(networks + 3 * learners + i, row); }
  KD_HD A& target_max(int64_t r, int64_t row) const { return at(networks + 4 * learners + r, row); }
  KD_HD A& target_sum(int64_t r, int64_t row) const { return at(networks + 4 * learners + targets + r, row); }
  KD_HD A& target_sum_1(int64_t r, int64_t row) const { return at(networks + 4 * learners + 2 * targets + r, row); }
  KD_HD Softmax<A> learner(int64_t i, int64_t row) const { return {max(i, row), sum(i, row)}; }
  KD_HD Softmax<A> target(int64_t r, int64_t row) const { return {target_max(r, row), target_sum(r, row)}; }
};

inline int64_t mixed_stats(int64_t networks, int64_t learners, int64_t targets) {
  return networks + 4 * learners + 3 * targets;
}

// teachers_kl: max, sum at T, sum at 1 of the student; maxima, sums, divergences of the teachers. Of the reverse kind
// the first divergence is that of the row.
template <class A>
struct TeacherStats {
  A* data;
  int64_t rows, count;

  KD_HD A& at(int64_t k, int64_t row) const { return data[k * rows + row]; }
  KD_HD A& sum_1(int64_t row) const { return at(2, row); }
  KD_HD A& value(int64_t m, int64_t row) const { return at(3 + 2 * count + m, row); }
  KD_HD Softmax<A> student(int64_t row) const { return {at(0, row), at(1, row)}; }
  KD_HD Softmax<A> teacher(int64_t m, int64_t row) const { return {at(3 + m, row), at(3 + count + m, row)}; }
  KD_HD void set_teacher(int64_t m, int64_t row, Softmax<A> side) const {
    at(3 + m, row) = side.max;
    at(3 + count + m, row) = side.sum;
  }
};

inline int64_t teacher_stats(int64_t count) { return 3 + 3 * count; }

inline Kind kind_of(const std::string& kind) {
  STD_TORCH_CHECK(kind == "kl" || kind == "cross_entropy" || kind == "reverse_kl", "kdfast: unknown kind ", kind);
  return kind == "kl" ? Kind::kKl : kind == "cross_entropy" ? Kind::kCrossEntropy : Kind::kReverse;
}

}  // namespace ensemble
}  // namespace kdfast
