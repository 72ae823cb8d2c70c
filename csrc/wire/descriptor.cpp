#include "wire/descriptor.h"

#include <cstdio>

#include "base/error.h"
#include "wire/codec_format.h"

namespace ringcomm {

std::string describe(const Descriptor& d, uint32_t seq) {
  std::string text;
  if (!is_barrier(d.op)) {
    text = dtype_name(d.dtype);
    if (!is_exchange(d.op)) text += concat(" x ", d.count);
    if (reduces(d.op)) text += concat(", ", reduce_op_name(d.reduce_op));
    const bool is_list = (d.flags & kFlagList) != 0;
    if (!is_list && d.root >= 0) text += concat(", root ", d.root);
    if (!is_exchange(d.op)) text += concat(", ", algo_name(d.algo));
    if (is_list) {
      char sizes[9];
      std::snprintf(sizes, sizeof(sizes), "%08x", d.region);
      text += concat(", of a list of ", d.root, d.root == 1 ? " array" : " arrays", ", sizes #", sizes);
    } else if (d.region != 0) {
      text += concat(" in symmetric array ", d.region);
    }
    if (d.codec_up != 0 || d.codec_down != 0) {
      text += concat(", codec ", codec_name(static_cast<CodecId>(d.codec_up)), " up, ",
                     codec_name(static_cast<CodecId>(d.codec_down)), " down");
      if ((d.flags & kFlagStochastic) != 0) text += " stochastic";
      if ((d.flags & kFlagOwnerResidual) != 0) text += " with owner_residual";
    }
    if ((d.flags & kFlagOnDevice) != 0) text += ", on GPUs";
  }
  if (d.tag[0] != 0) {
    text += concat(text.empty() ? "" : ", ", "tag '", std::string(d.tag, strnlen(d.tag, kTagBytes)), "'");
  }
  return text.empty() ? concat(op_name(d.op), " #", seq) : concat(op_name(d.op), " #", seq, " (", text, ")");
}

}  // namespace ringcomm
