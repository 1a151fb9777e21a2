// What all bindings need of torch's stable ABI: pointers and dtypes of tensors, results, the device
// and stream to launch on, and errors. Users' mistakes are caught in Python; here are none left.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../dropout.h"
#include "../dtype.h"

// The host build of tests/simt registers the same operators for tensors on the CPU.
#ifdef FASTLM_SIMT
#define FASTLM_DISPATCH_KEY CPU
namespace simt {
const char* failure();
}
#else
#define FASTLM_DISPATCH_KEY CUDA
// In libtorch_cuda alone, so weak: the library also loads where torch is built for the CPU.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** stream);
#endif

namespace fastlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: throw std::runtime_error("fastlm_cuda: takes float32, float16 and bfloat16");
  }
}

inline void* data_of(const Tensor& x) { return x.data_ptr(); }
inline void* data_of(const MaybeTensor& x) { return x.has_value() ? x->data_ptr() : nullptr; }

// A new contiguous tensor on the device of `like`; without a dtype, an empty one, for what is not
// wanted. Not by torch::stable::new_empty, which goes through the dispatcher.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape,
                        std::optional<ScalarType> dtype) {
  std::vector<int64_t> sizes(shape);
  if (!dtype.has_value()) sizes = {0};
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
    strides[i] = stride;
  }
  using torch::stable::detail::from, torch::stable::detail::to;
  const auto code = to<int32_t>(from(dtype.value_or(ScalarType::Float)));
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), code, device_type, device_index,
                                                  &handle));
  Tensor result(handle);
#ifdef FASTLM_SIMT
  // NaN of every dtype: what a kernel forgets to write must not pass for a result.
  if (result.numel() > 0) {
    std::memset(result.data_ptr(), 0xff, result.numel() * result.element_size());
  }
#endif
  return result;
}

// nullptr for what `new_empty` made of no dtype, and for other tensors without elements.
inline void* data_or_null(const Tensor& x) { return x.numel() > 0 ? x.data_ptr() : nullptr; }

inline RowTensor row_tensor(const Tensor& x) {
  return {data_or_null(x), dtype_of(x.scalar_type()), x.dim() == 2 ? x.stride(0) : 0};
}
inline RowTensor row_tensor(const MaybeTensor& x) {
  return x.has_value() ? row_tensor(*x) : RowTensor{nullptr, Dtype::kFloat32, 0};
}

// torch.promote_types of float32, float16 and bfloat16.
inline ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// Makes a tensor's device the current one while it lives; knows torch's stream there.
class LaunchScope {
 public:
#ifdef FASTLM_SIMT
  explicit LaunchScope(const Tensor&) {}
#else
  explicit LaunchScope(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr ||
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) != 0) {
      throw std::runtime_error("fastlm_cuda: torch gives no CUDA stream");
    }
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#ifndef FASTLM_SIMT
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// Raises what a launcher returned, in Python a RuntimeError.
inline void check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
#ifdef FASTLM_SIMT
  throw std::runtime_error(std::string(op) + ": " + simt::failure());
#else
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
#endif
}

// An argument from torch's stack. TORCH_BOX would do, but for strings: torch's own conversion (up to
// 2.13 at least) leaks one a call.
template <typename T>
T argument(StableIValue value) {
  if constexpr (std::is_same_v<T, std::string>) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    const char* text = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    std::string copy(text, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return copy;
  } else {
    return torch::stable::detail::to<T>(value);
  }
}

template <typename Result, typename... Args, size_t... I>
void call_boxed(Result (*op)(Args...), StableIValue* stack, std::index_sequence<I...>) {
  std::tuple<std::decay_t<Args>...> args{argument<std::decay_t<Args>>(stack[I])...};
  if constexpr (std::is_same_v<Result, Tensor>) {
    stack[0] = torch::stable::detail::from(std::apply(op, args));
  } else {
    const auto push = [stack](const auto&... tensor) {
      StableIValue* next = stack;
      ((*next++ = torch::stable::detail::from(tensor)), ...);
    };
    std::apply(push, std::apply(op, args));
  }
}

template <typename Result, typename... Args>
constexpr size_t arguments_of(Result (*)(Args...)) {
  return sizeof...(Args);
}

// What torch calls for operator Op, a function that returns a tensor or a tuple of tensors:
// m.impl("norm_fwd", boxed<norm_fwd>).
template <auto Op>
void boxed(StableIValue* stack, uint64_t inputs, uint64_t) {
  constexpr size_t expected = arguments_of(Op);
  if (inputs != expected) throw std::runtime_error("fastlm_cuda: not the schema of this library");
  call_boxed(Op, stack, std::make_index_sequence<expected>());
}

// The dropout of a call as kernels take it.
inline Dropout dropout_of(const MaybeTensor& seed, double p) {
  Dropout dropout;
  if (!seed.has_value() || p <= 0.0) return dropout;
  dropout.seed = static_cast<const int64_t*>(seed->data_ptr());
  // To nearest, ties to even, as Python's round.
  const double words = std::nearbyint(p * 4294967296.0);
  dropout.threshold = words >= 4294967295.0 ? 0xffffffffu : static_cast<uint32_t>(words);
  dropout.scale = p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
  return dropout;
}

}  // namespace fastlm
