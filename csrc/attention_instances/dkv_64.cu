#include "../attention_dkv.cuh"

namespace fastlm {

template cudaError_t attention_dkv_of<64>(const AttentionBackwardParams&, cudaStream_t);

}  // namespace fastlm
