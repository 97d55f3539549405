// bfloat16: the upper half of a float32.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float from_bfloat16(uint16_t number) {
    const uint32_t bits = uint32_t{number} << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof bits);
    return wide;
}

inline uint16_t to_bfloat16(float number) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return static_cast<uint16_t>(number != number ? 0x7fc0 : rounded >> 16);
}

}  // namespace
