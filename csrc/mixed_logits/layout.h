// Arguments and memory layouts shared by CPU and CUDA: the op, and the statistics that a forward leaves for its
// backward.
#pragma once

#include "common/labels.h"
#include "common/networks.h"
#include "common/temperature.h"
#include "mixed_logits/math.h"

namespace kdfast {
namespace mixed_logits {

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

  KD_HD int64_t offset(int64_t row, int64_t target, int64_t network) const {
    return row * row_stride + target * target_stride + network * network_stride;
  }
  template <class A>
  KD_HD A get(int64_t row, int64_t target, int64_t network) const {
    return read_one<A>(data, dtype, offset(row, target, network));
  }
  template <class A>
  KD_HD void put(int64_t row, int64_t target, int64_t network, A value) const {
    write_one(Matrix{data, dtype, 1, 0}, offset(row, target, network), 0, value);
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

// Maxima of the networks; of the learners sums at T, sums at 1, masses, slopes; of the targets maxima, sums at T, sums
// at 1.
template <class A>
struct Stats {
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

inline int64_t stats_count(int64_t networks, int64_t learners, int64_t targets) {
  return networks + 4 * learners + 3 * targets;
}

// mixed_logits_kl: the first `learners` networks learn, from one target or from one each.
template <class A>
struct MixedLogits {
  Networks networks;
  Mix mix;
  Labels labels;
  Column ramp;
  Temperature<A> temperature;
  int64_t rows, cols, learners, targets;
  A eps;
  double kl_scale, ce_scale;
  bool target_ce;
  Stats<A> stats;

  KD_HD A rate() const { return temperature.rate(0); }
  KD_HD double ramp_value() const { return ramp.data ? read<double>(ramp, 0) : 1.0; }
  KD_HD int64_t target_of(int64_t learner) const { return targets == 1 ? 0 : learner; }
  // Of network m in target r.
  KD_HD A weight(int64_t row, int64_t r, int64_t m) const {
    return mix.is_implied(r, m) ? static_cast<A>(mix.implied(m)) : mix.get<A>(row, r, m);
  }
};

// What the backward writes. The targets have a gradient if the divergences go through them, or if they have a
// cross-entropy of their own; it then reaches every network, else only the learners have a gradient.
struct Gradients {
  Column upstream;
  NetworkGrads networks;
  Mix mix;
  double ce_scale, divisor;  // of a cross-entropy: the CPU multiplies before it divides
  bool through_targets, has_target_grads;
};

}  // namespace mixed_logits
}  // namespace kdfast
