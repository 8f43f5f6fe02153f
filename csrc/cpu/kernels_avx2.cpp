#include "words_avx2.h"
//
#include "bodies.inc.h"

namespace gvendi {
const Kernels kernels_avx2 = {
    fold_hadamard, linear_sketch, expert_sketch, token_sketch,       vector_sketch, softmax_fold,
    covariance,    gain,          dense_sketch,  dense_token_sketch, entropy,       assign};
}  // namespace gvendi
