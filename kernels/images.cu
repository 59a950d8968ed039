// Image normalisation: 8-bit RGB pixels to the input of the first convolution.
#include "common.cuh"

// y (pixels, c) = (x / 255 - mean) / std of the three channels of x (pixels, 3), in reverse order if `is_bgr`, with
// zeros in the channels after them, because convolutions read full accesses. c is the number of elements per access. A
// thread per pixel. Bytes per pixel: 3 + 16.
template <class T>
__device__ void normalise(const unsigned char* x, i64 pixels, float mean, float std, int is_bgr, T* y) {
    const i64 pixel = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (pixel >= pixels) return;
    Pack<T> pack = {};
#pragma unroll
    for (int channel = 0; channel < 3; channel++) {
        const float value = x[pixel * 3 + (is_bgr ? 2 - channel : channel)];
        pack.at[channel] = (value / 255.f - mean) / std;
    }
    store(y + pixel * PER_ACCESS<T>, pack);
}

#define NORMALISE(T)                                                                                       \
    KERNEL(images_normalise_##T)(const unsigned char* x, i64 pixels, float mean, float std, int is_bgr, T* y) { \
        normalise(x, pixels, mean, std, is_bgr, y);                                                        \
    } \
    EXPORT(images_normalise_##T)
NORMALISE(f32)
NORMALISE(bf16)
NORMALISE(f16)
