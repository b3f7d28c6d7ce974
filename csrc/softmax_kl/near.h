// KL(p || q) of a piece of near rows, on the CPU.
#pragma once

#include "common/vector_loop.h"
#include "softmax_kl/math.h"

namespace kdfast {
namespace softmax_kl {

// In nats.
template <class A>
KD_MULTIVERSION A near_sum(const A* z_p, const A* z_q, int64_t n, NearRow<A> row) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED { return row.term(z_p[i], z_q[i]); });
}

}  // namespace softmax_kl
}  // namespace kdfast
