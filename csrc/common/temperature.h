// The temperature of a row: one number for all, or a tensor that only the kernel reads, so that the host never waits
// and a compiled graph serves every temperature.
#pragma once

#include "common/tensor.h"
#include "common/vector_math.h"

namespace kdfast {

template <class A>
class Temperature {
 public:
  Temperature(double value, const std::optional<Tensor>& tensor)
      : tensor_(tensor ? column(*tensor) : Column{}), exact_(value), value_(A(value)), rate_(A(kLog2E / value)) {}

  KD_HD A operator[](int64_t row) const { return tensor_.data ? A(read(row)) : value_; }

  KD_HD double exact(int64_t row) const { return tensor_.data ? read(row) : exact_; }

  // log2(e) / T: logits times this are exponents of 2.
  KD_HD A rate(int64_t row) const { return tensor_.data ? A(kLog2E / read(row)) : rate_; }

 private:
  KD_HD double read(int64_t row) const {
    double value = 0;
    dispatch_float(tensor_.dtype, [&](auto tag) {
      using T = decltype(tag);
      value = static_cast<double>(static_cast<const T*>(tensor_.data)[row * tensor_.stride]);
    });
    return value;
  }

  Column tensor_;
  double exact_;
  A value_, rate_;
};

}  // namespace kdfast
