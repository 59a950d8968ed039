// Max pooling and nearest upsampling of images (n, h, w, c), channels last:
//
//     max pooling     y = largest x of the window      gx = sum of the gy of the windows whose first largest x it is
//     upsampling      y[r, s] = x[r / f, s / f]        gx = sum of gy over the square
//
// x may be read through its norm (Seen); `other`, if it is not null, is added to gx. c is a multiple of the elements per
// access. A thread owns the channels of one access of a pixel of the result, and its sums run in the order of the rows,
// so results are deterministic.
#include "common.cuh"

__device__ inline int not_below(int x, int least) { return x < least ? least : x; }
__device__ inline int not_above(int x, int most) { return x > most ? most : x; }

// Windows of pooling over an image of h by w pixels, to ho by wo.
struct Windows {
    int h, w, ho, wo, size, stride, padding;
    // First pixel of window i along a side, and the one after its last.
    __device__ int begin(int i) const { return not_below(i * stride - padding, 0); }
    __device__ int end(int i, int side) const { return not_above(i * stride - padding + size, side); }
    // First and last window that reads a pixel along a side.
    __device__ int first(int pixel) const { return not_below((pixel + padding - size + stride) / stride, 0); }
    __device__ int last(int pixel, int windows) const { return not_above((pixel + padding) / stride, windows - 1); }
};

// The largest values of a window, and their pixels in the image; of equal ones the first, and a NaN is larger than all.
template <class T> struct Largest {
    static constexpr int N = PER_ACCESS<T>;
    float value[N];
    int pixel[N];
    __device__ Largest(const T* image, const Seen<N>& seen, const Windows& s, int row, int column, int c, int channel) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            value[i] = -INFINITY;
            pixel[i] = s.begin(row) * s.w + s.begin(column);
        }
        for (int y = s.begin(row); y < s.end(row, s.h); y++)
            for (int x = s.begin(column); x < s.end(column, s.w); x++) {
                const Pack<T> pack = load(image + i64(y * s.w + x) * c + channel);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    const float found = seen(pack.at[i], i);
                    if (found > value[i] || found != found) {
                        value[i] = found;
                        pixel[i] = y * s.w + x;
                    }
                }
            }
    }
};

// y (n, ho, wo, c) = max pooling of x (n, h, w, c); rows are n * ho * wo. Bytes per element of y: the size of T, and as
// much for each pixel of the window. Grid: any; a thread keeps its channels.
template <class T>
__device__ void max_pool(const T* x, const float* constants, const float* slopes, i64 rows, Windows s, int c, T* y) {
    constexpr int N = PER_ACCESS<T>;
    const Share<T> share(c);
    if (!share.works()) return;
    const int channel = share.group * N;
    const Seen<N> seen(constants, slopes, c, channel);
    for (i64 row = i64(blockIdx.x) * share.lines + share.line; row < rows; row += i64(gridDim.x) * share.lines) {
        const i64 image = row / (s.ho * s.wo);
        const int window = row % (s.ho * s.wo);
        const Largest<T> largest(x + image * s.h * s.w * c, seen, s, window / s.wo, window % s.wo, c, channel);
        Pack<T> pack;
#pragma unroll
        for (int i = 0; i < N; i++) pack.at[i] = largest.value[i];
        store(y + row * c + channel, pack);
    }
}

#define MAX_POOL(T)                                                                                              \
    KERNEL(pool_max_##T)                                                                                    \
    (const T* x, const float* constants, const float* slopes, i64 rows, int h, int w, int ho, int wo, int size,  \
     int stride, int padding, int c, T* y) {                                                                     \
        max_pool(x, constants, slopes, rows, Windows{h, w, ho, wo, size, stride, padding}, c, y);                \
    } \
    EXPORT(pool_max_##T)
MAX_POOL(f32)
MAX_POOL(bf16)
MAX_POOL(f16)

// gx (n, h, w, c) = gradient of max pooling, plus other; rows are n * h * w. A thread looks at every window that reads
// its pixel, and finds its largest values again. Bytes per element of gx: the size of T, twice with `other`, and for each
// of those windows as much as its pixels and its gy. Grid: any; a thread keeps its channels.
template <class T>
__device__ void max_pool_grad(const T* x, const float* constants, const float* slopes, const T* gy, const T* other,
                              i64 rows, Windows s, int c, T* gx) {
    constexpr int N = PER_ACCESS<T>;
    const Share<T> share(c);
    if (!share.works()) return;
    const int channel = share.group * N;
    const Seen<N> seen(constants, slopes, c, channel);
    for (i64 row = i64(blockIdx.x) * share.lines + share.line; row < rows; row += i64(gridDim.x) * share.lines) {
        const i64 image = row / (s.h * s.w);
        const int pixel = row % (s.h * s.w);
        Pack<T> sum = {};
        if (other) sum = load(other + row * c + channel);
        for (int v = s.first(pixel / s.w); v <= s.last(pixel / s.w, s.ho); v++)
            for (int u = s.first(pixel % s.w); u <= s.last(pixel % s.w, s.wo); u++) {
                const Largest<T> largest(x + image * s.h * s.w * c, seen, s, v, u, c, channel);
                const Pack<T> of_window = load(gy + ((image * s.ho + v) * s.wo + u) * c + channel);
#pragma unroll
                for (int i = 0; i < N; i++) sum.at[i] += largest.pixel[i] == pixel ? of_window.at[i] : 0.f;
            }
        store(gx + row * c + channel, sum);
    }
}

#define MAX_POOL_GRAD(T)                                                                                         \
    KERNEL(pool_max_grad_##T)                                                                               \
    (const T* x, const float* constants, const float* slopes, const T* gy, const T* other, i64 rows, int h, int w, \
     int ho, int wo, int size, int stride, int padding, int c, T* gx) {                                          \
        max_pool_grad(x, constants, slopes, gy, other, rows, Windows{h, w, ho, wo, size, stride, padding}, c, gx); \
    } \
    EXPORT(pool_max_grad_##T)
MAX_POOL_GRAD(f32)
MAX_POOL_GRAD(bf16)
MAX_POOL_GRAD(f16)

// y (n, h * factor, w * factor, c) = x (n, h, w, c) upsampled; rows are those of y, `width` its pixels per row. Bytes
// per element of y: twice the size of T. Grid: any; a thread keeps its channels.
template <class T>
__device__ void upsample(const T* x, const float* constants, const float* slopes, i64 rows, int width, int factor, int c,
                         T* y) {
    constexpr int N = PER_ACCESS<T>;
    const Share<T> share(c);
    if (!share.works()) return;
    const int channel = share.group * N;
    const Seen<N> seen(constants, slopes, c, channel);
    for (i64 row = i64(blockIdx.x) * share.lines + share.line; row < rows; row += i64(gridDim.x) * share.lines) {
        // Images end with whole squares, so rows of pixels are counted through all of them.
        const i64 from = row / width / factor * (width / factor) + row % width / factor;
        Pack<T> pack = load(x + from * c + channel);
#pragma unroll
        for (int i = 0; i < N; i++) pack.at[i] = seen(pack.at[i], i);
        store(y + row * c + channel, pack);
    }
}

#define UPSAMPLE(T)                                                                                               \
    KERNEL(pool_upsample_##T)                                                                                     \
    (const T* x, const float* constants, const float* slopes, i64 rows, int width, int factor, int c, T* y) {     \
        upsample(x, constants, slopes, rows, width, factor, c, y);                                                \
    } \
    EXPORT(pool_upsample_##T)
UPSAMPLE(f32)
UPSAMPLE(bf16)
UPSAMPLE(f16)

// gx (n, h, w, c) = sums of gy over the squares, plus other; rows are those of gx, `width` its pixels per row. Bytes per
// element of gx: factor * factor + 1 times the size of T, and once more with `other`. Grid: any; a thread keeps its
// channels.
template <class T>
__device__ void upsample_grad(const T* gy, const T* other, i64 rows, int width, int factor, int c, T* gx) {
    constexpr int N = PER_ACCESS<T>;
    const Share<T> share(c);
    if (!share.works()) return;
    const int channel = share.group * N;
    for (i64 row = i64(blockIdx.x) * share.lines + share.line; row < rows; row += i64(gridDim.x) * share.lines) {
        Pack<T> sum = {};
        if (other) sum = load(other + row * c + channel);
        for (int v = 0; v < factor; v++)
            for (int u = 0; u < factor; u++) {
                const i64 from = (row / width * factor + v) * width * factor + row % width * factor + u;
                const Pack<T> pack = load(gy + from * c + channel);
#pragma unroll
                for (int i = 0; i < N; i++) sum.at[i] += pack.at[i];
            }
        store(gx + row * c + channel, sum);
    }
}

#define UPSAMPLE_GRAD(T)                                                                       \
    KERNEL(pool_upsample_grad_##T)                                                             \
    (const T* gy, const T* other, i64 rows, int width, int factor, int c, T* gx) {             \
        upsample_grad(gy, other, rows, width, factor, c, gx);                                  \
    } \
    EXPORT(pool_upsample_grad_##T)
UPSAMPLE_GRAD(f32)
UPSAMPLE_GRAD(bf16)
UPSAMPLE_GRAD(f16)
