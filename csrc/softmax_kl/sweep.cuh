// The sums of a row, or of another run of logits, that a thread takes kStep at a time.
#pragma once

#include "common/rows.cuh"
#include "softmax_kl/math.h"

namespace kdfast {
namespace softmax_kl {

// Logits beyond the end of a row are -inf and add nothing.
template <class A>
__device__ void kl_update(KlState<A, A>& s, const A (&z_p)[kStep], const A (&z_q)[kStep], A rate) {
  const A top_p = max_of(z_p, s.max_p), top_q = max_of(z_q, s.max_q);
  if (top_p > s.max_p || top_q > s.max_q) s.rebase(top_p, top_q, rate);
  const A max_p = finite_max(s.max_p), max_q = finite_max(s.max_q);
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    const A c_p = z_p[i] - max_p, c_q = z_q[i] - max_q;
    const A e_p = exp2(c_p * rate);
    s.sum_p += e_p;
    s.sum_q += exp2(c_q * rate);
    s.dot += kl_term(e_p, c_p - c_q);
  }
}

}  // namespace softmax_kl
}  // namespace kdfast
