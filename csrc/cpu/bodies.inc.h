// All kernels over the F of the vec_<isa>.h included before. Everything here has internal linkage, so that no
// ISA's code can be linked in place of another's; hence also no std templates.

#include <math.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "dispatch.h"

namespace gvendi {
namespace {

GV_INLINE int64_t thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace

#include "hadamard.inc.h"
//
#include "assign.inc.h"
#include "covariance.inc.h"
#include "doubles.inc.h"
#include "fold_hadamard.inc.h"
#include "gain.inc.h"
#include "linear_sketch.inc.h"
#include "softmax_fold.inc.h"
#include "spectrum.inc.h"
#include "token_sketch.inc.h"
#include "vector_sketch.inc.h"
// after linear_sketch and token_sketch, for a row's sketch and its fold
#include "expert_sketch.inc.h"
// after vector_sketch, for load_at
#include "dense_sketch.inc.h"
// after spectrum
#include "entropy.inc.h"

}  // namespace gvendi
