// The forward of attention: which of the compiled head dims takes a call.
#include "attention.h"
#include "dispatch.h"

namespace fastlm {

cudaError_t attention_fwd(const AttentionParams& params, cudaStream_t stream) {
  return with_headdim(params.headdim, [&](auto headdim) {
    return attention_fwd_of<decltype(headdim)::value>(params, stream);
  });
}

}  // namespace fastlm
