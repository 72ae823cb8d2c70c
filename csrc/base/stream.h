// A CUDA stream, for headers that must do without the CUDA toolkit: the type is cudaStream_t. Null is
// the default stream.
#pragma once

struct CUstream_st;

namespace ringcomm {
using Stream = CUstream_st*;
}  // namespace ringcomm
