// Elements of arrays as f32, and products of matrices, for the libraries of the stand-in.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <vector>

#include "host.h"

namespace stand_in {

enum class Element { F32, F16, BF16 };

inline size_t bytes_of(Element element) { return element == Element::F32 ? 4 : 2; }

inline float get(const void* array, size_t at, Element element) {
    switch (element) {
        case Element::F32: return static_cast<const float*>(array)[at];
        case Element::F16: return __half2float(static_cast<const __half*>(array)[at]);
        default: return __bfloat162float(static_cast<const __nv_bfloat16*>(array)[at]);
    }
}

inline void set(void* array, size_t at, Element element, float value) {
    switch (element) {
        case Element::F32: static_cast<float*>(array)[at] = value; break;
        case Element::F16: static_cast<__half*>(array)[at] = __float2half(value); break;
        default: static_cast<__nv_bfloat16*>(array)[at] = __float2bfloat16(value);
    }
}

// A factor as tensor cores read it under TF32: 10 bits of mantissa, to nearest.
inline float tf32(float x) { return isfinite(x) ? of_bits((bits_of(x) + 0x1000) & ~0x1fffu) : x; }

// c: (m, n) += a: (m, k) * b: (k, n), all row by row without gaps.
void multiply(size_t m, size_t n, size_t k, const float* a, const float* b, float* c);

}  // namespace stand_in
