// What the values of a map are stored as; they are computed in float, double ones in double.
#pragma once

#include <cstddef>

namespace xrk::cpu {

enum Storage : int { S_F32, S_F64, S_F16, S_BF16, STORAGES };

constexpr std::size_t storage_bytes[STORAGES] = {4, 8, 2, 2};

}  // namespace xrk::cpu
