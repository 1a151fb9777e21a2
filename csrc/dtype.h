// Tensors and their dtypes, without torch.
#pragma once

#include <cstdint>

namespace fastlm {

enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16 };

inline int element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// (rows, cols) with last stride 1, or (cols,); nullptr: absent, or not wanted. Any alignment:
// accesses are wider where all pointers and strides of a call allow it.
struct RowTensor {
  void* ptr;
  Dtype dtype;
  int64_t stride;  // of rows, in elements
};

}  // namespace fastlm
