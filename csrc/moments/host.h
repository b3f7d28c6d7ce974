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

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments<Backend>));
  m.impl("channel_moments_backward", TORCH_BOX(&channel_moments_backward<Backend>));
}

}  // namespace moments
}  // namespace kdfast
