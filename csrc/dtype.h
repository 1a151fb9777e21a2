// The dtypes of tensors, without torch.
#pragma once

#include <cstdint>

namespace fastlm {

enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16 };

inline int element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace fastlm
