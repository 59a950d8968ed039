// Convolution kernels besides the matrix products: patches of the input as rows of a matrix (im2col), their gradient
// back to pixels, and grouped convolutions with small groups, depthwise ones among them. Activations are (n, h, w, c),
// c a multiple of the elements per access; a thread owns one access of one pixel. Filters are (outputs, kh, kw, c). For
// groups of m channels, as many in as out, they are (kh, kw, m, c): for each output channel, the weights of its group's
// m input channels. m divides the elements per access.
#include "common.cuh"

// Sizes of a convolution with square filters of side k.
struct Sizes {
    int h, w, c, out_h, out_w, k, stride, pad;
};

#define SIZES_ARGS int h, int w, int c, int out_h, int out_w, int k, int stride, int pad
#define SIZES Sizes{h, w, c, out_h, out_w, k, stride, pad}

// Place of a thread's access among `pixels` of images (height, width) with c channels; not valid for surplus threads.
template <class T> struct Place {
    i64 image;
    int row, column, channel;
    bool is_valid;
    __device__ Place(i64 pixels, int height, int width, int c) {
        const int groups = c / PER_ACCESS<T>;
        const i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x, pixel = i / groups;
        is_valid = pixel < pixels;
        channel = int(i % groups) * PER_ACCESS<T>;
        column = int(pixel % width);
        row = int(pixel / width % height);
        image = pixel / width / height;
    }
};

// patches (n * out_h * out_w, k * k * c) of x, with zeros outside it. A thread writes one access at all k * k places of
// a patch. Bytes per element of the patches: twice the size of T; most reads come from the cache.
template <class T> __device__ void gather(const T* x, i64 n, Sizes s, T* patches) {
    const Place<T> place(n * s.out_h * s.out_w, s.out_h, s.out_w, s.c);
    if (!place.is_valid) return;
    T* to = patches + ((place.image * s.out_h + place.row) * s.out_w + place.column) * s.k * s.k * s.c + place.channel;
    for (int i = 0; i < s.k; i++) {
        for (int j = 0; j < s.k; j++, to += s.c) {
            const int row = place.row * s.stride + i - s.pad, column = place.column * s.stride + j - s.pad;
            const bool is_inside = row >= 0 && row < s.h && column >= 0 && column < s.w;
            store(to, is_inside ? load(x + ((place.image * s.h + row) * s.w + column) * s.c + place.channel) : Pack<T>{});
        }
    }
}

// Output pixel that input pixel `at` contributes to at place `tap` of the filter, or -1.
__device__ inline int output_of(int at, int tap, int stride, int pad, int outputs) {
    const int from = at + pad - tap;
    return from >= 0 && from % stride == 0 && from / stride < outputs ? from / stride : -1;
}

// gx from the gradient of the patches. Each pixel sums over the places it was copied to, so no two threads add to the
// same element.
template <class T> __device__ void scatter(const T* patches, i64 n, Sizes s, T* gx) {
    const Place<T> place(n * s.h * s.w, s.h, s.w, s.c);
    if (!place.is_valid) return;
    Pack<T> sum = {};
    for (int i = 0; i < s.k; i++) {
        const int row = output_of(place.row, i, s.stride, s.pad, s.out_h);
        for (int j = 0; j < s.k && row >= 0; j++) {
            const int column = output_of(place.column, j, s.stride, s.pad, s.out_w);
            if (column < 0) continue;
            const i64 patch = (place.image * s.out_h + row) * s.out_w + column;
            const Pack<T> pack = load(patches + ((patch * s.k + i) * s.k + j) * s.c + place.channel);
#pragma unroll
            for (int l = 0; l < PER_ACCESS<T>; l++) sum.at[l] += pack.at[l];
        }
    }
    store(gx + ((place.image * s.h + place.row) * s.w + place.column) * s.c + place.channel, sum);
}

// y (n, out_h, out_w, c) of a grouped convolution with m channels per group.
template <class T> __device__ void grouped(const T* x, const T* filter, i64 n, Sizes s, int m, T* y) {
    const Place<T> place(n * s.out_h * s.out_w, s.out_h, s.out_w, s.c);
    if (!place.is_valid) return;
    Pack<T> sum = {};
    for (int i = 0; i < s.k; i++) {
        const int row = place.row * s.stride + i - s.pad;
        for (int j = 0; j < s.k && row >= 0 && row < s.h; j++) {
            const int column = place.column * s.stride + j - s.pad;
            if (column < 0 || column >= s.w) continue;
            const Pack<T> px = load(x + ((place.image * s.h + row) * s.w + column) * s.c + place.channel);
            for (int from = 0; from < m; from++) {
                const Pack<T> pw = load(filter + ((i * s.k + j) * m + from) * s.c + place.channel);
#pragma unroll
                for (int l = 0; l < PER_ACCESS<T>; l++) sum.at[l] += px.at[l / m * m + from] * pw.at[l];
            }
        }
    }
    store(y + ((place.image * s.out_h + place.row) * s.out_w + place.column) * s.c + place.channel, sum);
}

// Gradient of the input of a grouped convolution with m channels per group.
template <class T> __device__ void grouped_grad_x(const T* gy, const T* filter, i64 n, Sizes s, int m, T* gx) {
    const Place<T> place(n * s.h * s.w, s.h, s.w, s.c);
    if (!place.is_valid) return;
    Pack<T> sum = {};
    for (int i = 0; i < s.k; i++) {
        const int row = output_of(place.row, i, s.stride, s.pad, s.out_h);
        for (int j = 0; j < s.k && row >= 0; j++) {
            const int column = output_of(place.column, j, s.stride, s.pad, s.out_w);
            if (column < 0) continue;
            const Pack<T> pg = load(gy + ((place.image * s.out_h + row) * s.out_w + column) * s.c + place.channel);
            for (int from = 0; from < m; from++) {
                const Pack<T> pw = load(filter + ((i * s.k + j) * m + from) * s.c + place.channel);
#pragma unroll
                for (int l = 0; l < PER_ACCESS<T>; l++) sum.at[l / m * m + from] += pg.at[l] * pw.at[l];
            }
        }
    }
    store(gx + ((place.image * s.h + place.row) * s.w + place.column) * s.c + place.channel, sum);
}

// Gradient of the filters of a grouped convolution with m channels per group, one sum per chunk of `chunk` output
// pixels: `parts` (chunks, k * k, m, c), f32. Grid: chunks, k * k * m. Shared: lines * c floats, where a line is the
// threads that cover the channels of one pixel.
template <class T>
__device__ void grouped_grad_w(const T* x, const T* gy, i64 n, Sizes s, int m, i64 chunk, float* parts) {
    DYNAMIC_SHARED(float, shared);
    constexpr int N = PER_ACCESS<T>;
    const int groups = s.c / N, lines = blockDim.x / groups, channel = threadIdx.x % groups * N, line = threadIdx.x / groups;
    const int from = blockIdx.y % m, i = blockIdx.y / m / s.k, j = blockIdx.y / m % s.k;
    const i64 pixels = n * s.out_h * s.out_w, begin = blockIdx.x * chunk, end = begin + chunk < pixels ? begin + chunk : pixels;
    if (line < lines) {
        float sum[N] = {};
        for (i64 pixel = begin + line; pixel < end; pixel += lines) {
            const int row = int(pixel / s.out_w % s.out_h) * s.stride + i - s.pad, column = int(pixel % s.out_w) * s.stride + j - s.pad;
            if (row < 0 || row >= s.h || column < 0 || column >= s.w) continue;
            const i64 image = pixel / s.out_w / s.out_h;
            const Pack<T> px = load(x + ((image * s.h + row) * s.w + column) * s.c + channel), pg = load(gy + pixel * s.c + channel);
#pragma unroll
            for (int l = 0; l < N; l++) sum[l] += px.at[l / m * m + from] * pg.at[l];
        }
#pragma unroll
        for (int l = 0; l < N; l++) shared[line * s.c + channel + l] = sum[l];
    }
    __syncthreads();
    for (int channel = threadIdx.x; channel < s.c; channel += blockDim.x) {
        float sum = 0.f;
        for (int line = 0; line < lines; line++) sum += shared[line * s.c + channel];
        parts[(i64(blockIdx.x) * s.k * s.k * m + blockIdx.y) * s.c + channel] = sum;
    }
}

#define CONV(T)                                                                                                    \
    KERNEL(conv_gather_##T)(const T* x, i64 n, SIZES_ARGS, T* patches) { gather(x, n, SIZES, patches); }           \
    EXPORT(conv_gather_##T)                                                                                        \
    KERNEL(conv_scatter_##T)(const T* patches, i64 n, SIZES_ARGS, T* gx) { scatter(patches, n, SIZES, gx); }       \
    EXPORT(conv_scatter_##T)                                                                                       \
    KERNEL(conv_grouped_##T)(const T* x, const T* filter, i64 n, SIZES_ARGS, int m, T* y) {                        \
        if (m == 1) grouped(x, filter, n, SIZES, 1, y);                                                            \
        else grouped(x, filter, n, SIZES, m, y);                                                                   \
    }                                                                                                              \
    EXPORT(conv_grouped_##T)                                                                                       \
    KERNEL(conv_grouped_grad_x_##T)(const T* gy, const T* filter, i64 n, SIZES_ARGS, int m, T* gx) {               \
        if (m == 1) grouped_grad_x(gy, filter, n, SIZES, 1, gx);                                                   \
        else grouped_grad_x(gy, filter, n, SIZES, m, gx);                                                          \
    }                                                                                                              \
    EXPORT(conv_grouped_grad_x_##T)                                                                                \
    KERNEL(conv_grouped_grad_w_##T)(const T* x, const T* gy, i64 n, SIZES_ARGS, int m, i64 chunk, float* parts) {  \
        if (m == 1) grouped_grad_w(x, gy, n, SIZES, 1, chunk, parts);                                              \
        else grouped_grad_w(x, gy, n, SIZES, m, chunk, parts);                                                     \
    }                                                                                                              \
    EXPORT(conv_grouped_grad_w_##T)
CONV(f32)
CONV(bf16)
CONV(f16)
