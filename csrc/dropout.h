// The dropout of a call, without torch; fastlm/reference/dropout.py is the definition.
#pragma once

#include <cstdint>

namespace fastlm {

// Which elements are dropped, and what the others are multiplied by. The seed is on the device, so
// that a CUDA graph can advance it; nullptr drops nothing.
struct Dropout {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
  float scale = 1.0f;
};

}  // namespace fastlm
