// The forward of attention: which of the compiled head dims takes a call.
#include "attention.h"

namespace fastlm {

cudaError_t attention_fwd(const AttentionParams& params, cudaStream_t stream) {
  if (params.headdim <= 32) return attention_fwd_of<32>(params, stream);
  if (params.headdim <= 64) return attention_fwd_of<64>(params, stream);
  if (params.headdim <= 96) return attention_fwd_of<96>(params, stream);
  if (params.headdim <= 128) return attention_fwd_of<128>(params, stream);
  return attention_fwd_of<256>(params, stream);
}

}  // namespace fastlm
