// A student against many teachers, row by row, and AE-KD's weights of the teachers.
//
// Notation of common/softmax.h. With q the student's softmax and p_m those of the teachers, the kinds are
//   kKl            sum_m w_m KL(p_m || q)
//   kCrossEntropy  sum_m sum p_m (-log q)
//   kReverse       KL(q || r), r the mean of the p_m
// AE-KD's w minimise |sum_m w_m g_m|^2 on the simplex, with g_m the mean gradient of KL(p_m || q) in the student's
// logits: q - p_m, summed over the batch. Includes no torch header; shared by CPU and CUDA.
#pragma once

#include "common/simplex.h"
#include "common/softmax.h"

namespace kdfast {
namespace teachers {

enum class Kind { kKl, kCrossEntropy, kReverse };

template <class A>
KD_HD A divergence_term(A e_p, A c_p, A c_q, bool cross) {
  return kl_term(e_p, cross ? -c_q : c_p - c_q);
}

// Gradient of a divergence in the teacher's logits: scale p (log ratio - divergence), logarithms in bits.
template <class A>
KD_HD A teacher_term(A p, A log_p, A log_q, A divergence, A scale, bool cross) {
  return p == 0 ? A(0) : scale * p * ((cross ? A(0) : log_p) - log_q - divergence);
}

// log2 of the mean of probabilities, from the largest of their logarithms and the sum of exp2 of the distances to it.
template <class A>
KD_HD A mean_log(A top, A sum, A count) {
  const A log = is_masked(top) ? top : top + (fast_log2(sum) - fast_log2(count));
  return sum == sum ? log : sum;  // NaN if one of them is
}

template <class A>
KD_HD A reverse_term(A q, A log_q, A log_r) {
  return q == 0 ? A(0) : q * (log_q - log_r);
}

// The same of near rows, in nats.
template <class A>
KD_HD A near_reverse_term(A q, A log_q, A log_r) {
  return near_term(q, exp2(log_r), A(kLn2) * (log_q - log_r));
}

template <class A>
KD_HD A reverse_grad(A q, A log_q, A log_r, A kl, A scale) {
  return q == 0 || kl == infinity<A>() ? A(0) : scale * q * (log_q - log_r - kl);
}

// ---- AE-KD
// AE-KD's weights from G of any magnitude, which is overwritten; `lengths` [count].
KD_HD void aekd_weights(double* gram, int64_t count, double slack, bool normalize, double* memory, double* lengths,
                        double* weights) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = max(largest, gram[i * count + i]);
  for (int64_t i = 0; i < count; ++i) {
    const double length = largest > 0 ? std::sqrt(gram[i * count + i] / largest) : 0;
    // A teacher whose mean gradient is 0 takes all weight.
    lengths[i] = normalize ? max(length, 1e-12) : 1;
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      gram[i * count + j] = largest > 0 ? gram[i * count + j] / largest / (lengths[i] * lengths[j]) : 0;
    }
  }
  simplex_minimum(gram, nullptr, count, slack, memory, weights);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    weights[i] /= lengths[i];
    sum += weights[i];
  }
  for (int64_t i = 0; i < count && normalize; ++i) weights[i] /= sum;
}

}  // namespace teachers
}  // namespace kdfast
