// Small passes around matrix products: bias, column sums, type conversions, element-wise products (dropout).
#include "common.cuh"

// y (rows, c) += bias (c). A thread per element. Bytes per element: 8.
KERNEL(rows_add)(float* y, const float* bias, i64 rows, int c) {
    const i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < rows * c) y[i] += bias[i % c];
}
EXPORT(rows_add)

// sums (c) of the columns of x (rows, c), in the order of the rows. A thread per column: for few rows. Reads 4 bytes
// per element.
KERNEL(rows_sum)(const float* x, i64 rows, int c, float* sums) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= c) return;
    float sum = 0.f;
    for (i64 row = 0; row < rows; row++) sum += x[row * c + column];
    sums[column] = sum;
}
EXPORT(rows_sum)

// y (num, d) = the rows of x (k, d) that `index` (num) names. Bytes per element: 8. Grid: any.
KERNEL(rows_select)(const float* x, const i64* index, i64 num, int d, float* y) {
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < num * d; i += i64(gridDim.x) * blockDim.x) {
        y[i] = x[index[i / d] * d + i % d];
    }
}
EXPORT(rows_select)

// The rows of x (k, d) that `index` (num) names, each once, = y (num, d). Bytes per element: 8. Grid: any.
KERNEL(rows_replace)(float* x, const i64* index, i64 num, int d, const float* y) {
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < num * d; i += i64(gridDim.x) * blockDim.x) {
        x[index[i / d] * d + i % d] = y[i];
    }
}
EXPORT(rows_replace)

// y = x as T; len is a multiple of the elements per access. Bytes per element: 4 + the size of T. Grid: any.
template <class T> __device__ void convert(const float* x, i64 len, T* y) {
    constexpr int N = PER_ACCESS<T>;
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < len; i += i64(gridDim.x) * blockDim.x * N) {
        Pack<T> pack;
#pragma unroll
        for (int k = 0; k < N; k += 4) {
            const Pack<float> part = load(x + i + k);
#pragma unroll
            for (int l = 0; l < 4; l++) pack.at[k + l] = part.at[l];
        }
        store(y + i, pack);
    }
}

#define CONVERT(T)                                                                       \
    KERNEL(rows_convert_##T)(const float* x, i64 len, T* y) { convert(x, len, y); } \
    EXPORT(rows_convert_##T)
CONVERT(bf16)
CONVERT(f16)

// y = x in f32; len is a multiple of the elements per access. Bytes per element: 4 + the size of T. Grid: any.
template <class T> __device__ void widen(const T* x, i64 len, float* y) {
    constexpr int N = PER_ACCESS<T>;
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < len; i += i64(gridDim.x) * blockDim.x * N) {
        const Pack<T> pack = load(x + i);
#pragma unroll
        for (int k = 0; k < N; k += 4) {
            Pack<float> part;
#pragma unroll
            for (int l = 0; l < 4; l++) part.at[l] = pack.at[k + l];
            store(y + i + k, part);
        }
    }
}

#define WIDEN(T)                                                                   \
    KERNEL(rows_widen_##T)(const T* x, i64 len, float* y) { widen(x, len, y); } \
    EXPORT(rows_widen_##T)
WIDEN(bf16)
WIDEN(f16)

// y = a * b; len is a multiple of the elements per access; y may be a or b. Bytes per element: 3 times the size of T.
// Grid: any.
template <class T> __device__ void multiply(const T* a, const T* b, i64 len, T* y) {
    constexpr int N = PER_ACCESS<T>;
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < len; i += i64(gridDim.x) * blockDim.x * N) {
        Pack<T> pack = load(a + i);
        const Pack<T> other = load(b + i);
#pragma unroll
        for (int k = 0; k < N; k++) pack.at[k] *= other.at[k];
        store(y + i, pack);
    }
}

#define MULTIPLY(T)                                                                                   \
    KERNEL(rows_multiply_##T)(const T* a, const T* b, i64 len, T* y) { multiply(a, b, len, y); } \
    EXPORT(rows_multiply_##T)
MULTIPLY(f32)
MULTIPLY(bf16)
MULTIPLY(f16)
