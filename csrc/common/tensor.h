// The little that the kernels need of a tensor, through the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "common/huge_pages.h"
#include "common/macros.h"

namespace kdfast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A 2-D tensor of any floating-point type and any strides, in elements. A null pointer stands for an absent tensor.
struct Matrix {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t row_stride = 0, col_stride = 0;
};

inline Matrix matrix(const Tensor& x) { return {x.data_ptr(), x.scalar_type(), x.stride(0), x.stride(1)}; }

inline Matrix matrix(const std::optional<Tensor>& x) { return x ? matrix(*x) : Matrix{}; }

// condition ? a : b, field by field: a choice between two parameters of a kernel would put both into local memory.
KD_HD Matrix choose(bool condition, const Matrix& a, const Matrix& b) {
  return {condition ? a.data : b.data, condition ? a.dtype : b.dtype, condition ? a.row_stride : b.row_stride,
          condition ? a.col_stride : b.col_stride};
}

// A 1-D (or expanded 0-d) tensor, read with the stride 0 where it has one element for all rows.
struct Column {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t stride = 0;
};

inline Column column(const Tensor& x) { return {x.data_ptr(), x.scalar_type(), x.dim() == 0 ? 0 : x.stride(0)}; }

inline Column column(const std::optional<Tensor>& x) { return x ? column(*x) : Column{}; }

// One column of a matrix, or the only one.
inline Column column(const std::optional<Tensor>& x, int64_t index) {
  if (!x || x->dim() < 2) return column(x);
  char* first = static_cast<char*>(x->data_ptr()) + index * x->stride(1) * static_cast<int64_t>(x->element_size());
  return {first, x->scalar_type(), x->stride(0)};
}

// The dtype of an accumulation type.
template <class A>
constexpr ScalarType kDtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;

// f(T{}) with T the C++ type of a floating-point dtype.
template <class F>
KD_HD void dispatch_float(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    default: return f(BFloat16{});
  }
}

KD_HD int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// ---- one element, as A
template <class A>
KD_HD A read_one(const void* data, ScalarType dtype, int64_t offset) {
  switch (dtype) {
    case ScalarType::Float: return static_cast<A>(static_cast<const float*>(data)[offset]);
    case ScalarType::Double: return static_cast<A>(static_cast<const double*>(data)[offset]);
    case ScalarType::Half: return static_cast<A>(static_cast<const Half*>(data)[offset]);
    default: return static_cast<A>(static_cast<const BFloat16*>(data)[offset]);
  }
}

template <class A>
KD_HD A read_one(const Matrix& m, int64_t row, int64_t col) {
  return read_one<A>(m.data, m.dtype, row * m.row_stride + col * m.col_stride);
}

template <class A>
KD_HD void write_one(const Matrix& m, int64_t row, int64_t col, A value) {
  const int64_t offset = row * m.row_stride + col * m.col_stride;
  switch (m.dtype) {
    case ScalarType::Float: static_cast<float*>(m.data)[offset] = static_cast<float>(value); return;
    case ScalarType::Double: static_cast<double*>(m.data)[offset] = static_cast<double>(value); return;
    case ScalarType::Half: static_cast<Half*>(m.data)[offset] = static_cast<Half>(value); return;
    default: static_cast<BFloat16*>(m.data)[offset] = static_cast<BFloat16>(value);
  }
}

template <class A>
KD_HD A read(const Column& c, int64_t row) {
  return read_one<A>(c.data, c.dtype, row * c.stride);
}

// ---- memory and types
// Uninitialised, contiguous, on the device of `like`.
inline Tensor empty(const Tensor& like, ScalarType dtype, std::vector<int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  code, device_type, device_index, &handle));
  Tensor x(handle);
  const size_t bytes = x.numel() * x.element_size();
#if defined(KD_SIMT)
  if (bytes > 0) memset(x.data_ptr(), 0xff, bytes);  // NaN in every dtype: an element that no kernel writes shows
#else
  if (device_type == aoti_torch_device_type_cpu()) advise_huge_pages(x.data_ptr(), bytes);
#endif
  return x;
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

// Sums are kept in float64 if an input is float64, else in float32.
inline ScalarType accumulator(const Tensor& a, const std::optional<Tensor>& b) {
  return is_double(a) || (b && is_double(*b)) ? ScalarType::Double : ScalarType::Float;
}

// The same of tensors that have one dtype.
inline ScalarType accumulator(const std::vector<Tensor>& a, const std::optional<Tensor>& b) {
  return accumulator(a[0], b);
}

// f(A{}) with the accumulation type.
template <class F>
void dispatch_accumulator(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace kdfast
