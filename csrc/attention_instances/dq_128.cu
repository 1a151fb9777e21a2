#include "../attention_dq.cuh"

namespace fastlm {

template cudaError_t attention_dq_of<128>(const AttentionBackwardParams&, cudaStream_t);

}  // namespace fastlm
