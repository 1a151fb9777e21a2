#include "../attention_dkv.cuh"

namespace fastlm {

template cudaError_t attention_dkv_of<128>(const AttentionBackwardParams&, cudaStream_t);

}  // namespace fastlm
