#include "../attention_fwd.cuh"

namespace fastlm {

template cudaError_t attention_fwd_of<256>(const AttentionParams&, cudaStream_t);

}  // namespace fastlm
