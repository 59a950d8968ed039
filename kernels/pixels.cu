// Passes over the pixels of images (n, pixels, c), channels last, for squeeze-excitation (Hu et al., CVPR 2018) and
// pooling:
//
//     mean      y = sum x / pixels             gx = gy / pixels             (sums; scale without x)
//     product   y = x * by + plus              gx = gy * by, gby = sum gy * x, gplus = gy   (scale; sums with `with`)
//     ReLU      y = max(x, 0)                  gx = gy if y > 0, else 0
//     sigmoid   y = 1 / (1 + exp(-x))          gx = gy * y * (1 - y)
//
// Values may be read through their norm (Seen). c is a multiple of the elements per access. A thread owns the channels
// of one access; all sums run in an order that depends only on the sizes, so results are deterministic.
#include "common.cuh"

// y (n, c) = factor * sum over the pixels of x, times `with` if that is not null. A block per image: each of its lines
// sums every lines-th pixel, then the lines are joined in order. Bytes per element: the size of T, twice with `with`.
// Grid: n. Shared: lines * c floats.
template <class T>
__device__ void sums(const T* x, const float* constants, const float* slopes, const T* with, i64 pixels, int c, float factor, T* y) {
    DYNAMIC_SHARED(float, shared);
    constexpr int N = PER_ACCESS<T>;
    const Share<T> share(c);
    const i64 first = blockIdx.x * pixels * c;
    if (share.works()) {
        const int channel = share.group * N;
        const Seen<N> seen(constants, slopes, c, channel);
        float sum[N] = {};
        for (i64 pixel = share.line; pixel < pixels; pixel += share.lines) {
            const i64 place = first + pixel * c + channel;
            const Pack<T> pack = load(x + place);
            if (with) {
                const Pack<T> other = load(with + place);
#pragma unroll
                for (int i = 0; i < N; i++) sum[i] += seen(pack.at[i], i) * other.at[i];
            } else {
#pragma unroll
                for (int i = 0; i < N; i++) sum[i] += seen(pack.at[i], i);
            }
        }
#pragma unroll
        for (int i = 0; i < N; i++) shared[share.line * c + channel + i] = sum[i];
    }
    __syncthreads();
    for (int channel = threadIdx.x; channel < c; channel += blockDim.x) {
        float sum = 0.f;
        for (int line = 0; line < share.lines; line++) sum += shared[line * c + channel];
        y[i64(blockIdx.x) * c + channel] = from_f32<T>(factor * sum);
    }
}

#define SUMS(T)                                                                                              \
    KERNEL(pixels_sums_##T)                                                                                  \
    (const T* x, const float* constants, const float* slopes, const T* with, i64 pixels, int c, float factor, T* y) { \
        sums(x, constants, slopes, with, pixels, c, factor, y);                                              \
    } \
    EXPORT(pixels_sums_##T)
SUMS(f32)
SUMS(bf16)
SUMS(f16)

// y = x * by * factor + plus; by is (n, c), x is 1 if null, plus 0 if null; rows are n * pixels. y may be x or plus.
// Bytes per element: the size of T for each of x, plus and y. Grid: any; a thread keeps its channels.
template <class T>
__device__ void scale(const T* x, const float* constants, const float* slopes, const T* by, float factor, const T* plus,
                      const float* plus_constants, const float* plus_slopes, i64 rows, i64 pixels, int c, T* y) {
    constexpr int N = PER_ACCESS<T>;
    const Share<T> share(c);
    if (!share.works()) return;
    const int channel = share.group * N;
    const Seen<N> seen(constants, slopes, c, channel), seen_plus(plus_constants, plus_slopes, c, channel);
    for (i64 row = i64(blockIdx.x) * share.lines + share.line; row < rows; row += i64(gridDim.x) * share.lines) {
        const i64 place = row * c + channel;
        Pack<T> pack = load(by + row / pixels * c + channel);
#pragma unroll
        for (int i = 0; i < N; i++) pack.at[i] *= factor;
        if (x) {
            const Pack<T> value = load(x + place);
#pragma unroll
            for (int i = 0; i < N; i++) pack.at[i] *= seen(value.at[i], i);
        }
        if (plus) {
            const Pack<T> other = load(plus + place);
#pragma unroll
            for (int i = 0; i < N; i++) pack.at[i] += seen_plus(other.at[i], i);
        }
        store(y + place, pack);
    }
}

#define SCALE(T)                                                                                              \
    KERNEL(pixels_scale_##T)                                                                                  \
    (const T* x, const float* constants, const float* slopes, const T* by, float factor, const T* plus,       \
     const float* plus_constants, const float* plus_slopes, i64 rows, i64 pixels, int c, T* y) {              \
        scale(x, constants, slopes, by, factor, plus, plus_constants, plus_slopes, rows, pixels, c, y);       \
    } \
    EXPORT(pixels_scale_##T)
SCALE(f32)
SCALE(bf16)
SCALE(f16)

// y = max(x, 0) (kind 0; a NaN stays NaN) or 1 / (1 + exp(-x)) (kind 1); len is a multiple of the elements per access.
// Bytes per element: twice the size of T. Grid: any.
template <class T> __device__ void activate(const T* x, i64 len, int kind, T* y) {
    constexpr int N = PER_ACCESS<T>;
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < len; i += i64(gridDim.x) * blockDim.x * N) {
        Pack<T> pack = load(x + i);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float value = pack.at[k];
            pack.at[k] = kind == 0 ? (value < 0.f ? 0.f : value) : 1.f / (1.f + expf(-value));
        }
        store(y + i, pack);
    }
}

#define ACTIVATE(T)                                                                                         \
    KERNEL(pixels_activate_##T)(const T* x, i64 len, int kind, T* y) { activate(x, len, kind, y); } \
    EXPORT(pixels_activate_##T)
ACTIVATE(f32)
ACTIVATE(bf16)
ACTIVATE(f16)

// gx = gy times the derivative of the activation, from its result y: y > 0 (kind 0) or y (1 - y) (kind 1). Bytes per
// element: three times the size of T. Grid: any.
template <class T> __device__ void activate_grad(const T* y, const T* gy, i64 len, int kind, T* gx) {
    constexpr int N = PER_ACCESS<T>;
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < len; i += i64(gridDim.x) * blockDim.x * N) {
        Pack<T> pack = load(gy + i);
        const Pack<T> result = load(y + i);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const float value = result.at[k];
            pack.at[k] *= kind == 0 ? (value > 0.f ? 1.f : 0.f) : value * (1.f - value);
        }
        store(gx + i, pack);
    }
}

#define ACTIVATE_GRAD(T)                                                                                           \
    KERNEL(pixels_activate_grad_##T)(const T* y, const T* gy, i64 len, int kind, T* gx) {                          \
        activate_grad(y, gy, len, kind, gx);                                                                       \
    } \
    EXPORT(pixels_activate_grad_##T)
ACTIVATE_GRAD(f32)
ACTIVATE_GRAD(bf16)
ACTIVATE_GRAD(f16)
