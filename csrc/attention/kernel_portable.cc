// The kernels for any CPU.
#include "isa_portable.h"

#include "kernel.h"
#include "layer_kernel.h"
#include "sampled_softmax_kernel.h"
#include "softmax_kernel.h"

namespace freshet::attention {
const Kernels kPortableKernels = {"portable", scratch_floats, forward_task, backward_task, &kLayerKernels,
                                  &kSoftmaxKernels, &kSampledSoftmaxKernels};
}  // namespace freshet::attention
