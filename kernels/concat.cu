// Concatenation of channels, y = (x_1, x_2, ...) for rows of channels, and its backward pass: gx_k = the channels of gy
// that are those of x_k, plus `other` if that is not null. x may be read through its norm (Seen). Channels are counted
// without padding.
#include "common.cuh"

// Writes `c` channels of x, rows of x_channels, from the channel x_first on, to the `width` channels of y, rows of
// y_channels, from y_first on; those after the first c become 0. `other` lies as y does. A thread per element, since the
// channels of a part need not begin at an access. Bytes per element: twice the size of T, three times with `other`. Grid:
// any.
template <class T>
__device__ void copy(const T* x, const float* constants, const float* slopes, int x_channels, int x_first, const T* other,
                     i64 rows, int c, int width, T* y, int y_channels, int y_first) {
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * width; i += i64(gridDim.x) * blockDim.x) {
        const i64 row = i / width;
        const int channel = i % width;
        const i64 place = row * y_channels + y_first + channel;
        float value = 0.f;
        if (channel < c) {
            const Seen<1> seen(constants, slopes, x_channels, x_first + channel);
            value = seen(to_f32(x[row * x_channels + x_first + channel]), 0);
            if (other) value += to_f32(other[place]);
        }
        y[place] = from_f32<T>(value);
    }
}

#define COPY(T)                                                                                                  \
    KERNEL(concat_copy_##T)                                                                                        \
    (const T* x, const float* constants, const float* slopes, int x_channels, int x_first, const T* other, i64 rows, \
     int c, int width, T* y, int y_channels, int y_first) {                                                      \
        copy(x, constants, slopes, x_channels, x_first, other, rows, c, width, y, y_channels, y_first);          \
    } \
    EXPORT(concat_copy_##T)
COPY(f32)
COPY(bf16)
COPY(f16)
