// Shared by all kernel files: 16-byte accesses, conversions to f32, rows of channels with their norm, sums over a warp
// and a block.
//
// The files compile in two ways: with nvcc for the GPU, and with a C++ compiler for the tests (MASKINV_HOST), where
// `host.h` runs the threads of a block one after the other.
#pragma once

#ifdef MASKINV_HOST
#include "host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// Shared memory of a block; the launch sets its size.
extern __shared__ __align__(16) unsigned char dynamic_shared[];
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(dynamic_shared)
#define KERNEL(name) extern "C" __global__ void name
// Follows each kernel: the host build registers it by name.
#define EXPORT(name)
#define CHECK_ALIGNED(p)
#endif

// Type names as in the suffixes of the kernels.
typedef float f32;
typedef __nv_bfloat16 bf16;
typedef __half f16;
typedef long long i64;

constexpr int WARP = 32;

__device__ inline float to_f32(float x) { return x; }
__device__ inline float to_f32(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_f32(f16 x) { return __half2float(x); }

template <class T> __device__ inline T from_f32(float x);
template <> __device__ inline float from_f32<float>(float x) { return x; }
template <> __device__ inline bf16 from_f32<bf16>(float x) { return __float2bfloat16(x); }
template <> __device__ inline f16 from_f32<f16>(float x) { return __float2half(x); }

// Elements of one 16-byte access.
template <class T> constexpr int PER_ACCESS = 16 / sizeof(T);

// Elements of one access, in f32.
template <class T> struct Pack {
    float at[PER_ACCESS<T>];
};

// Reads one access; `p` must be aligned to 16 bytes.
template <class T> __device__ inline Pack<T> load(const T* p) {
    CHECK_ALIGNED(p);
    union { uint4 bits; T at[PER_ACCESS<T>]; } raw = {*reinterpret_cast<const uint4*>(p)};
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < PER_ACCESS<T>; i++) pack.at[i] = to_f32(raw.at[i]);
    return pack;
}

template <class T> __device__ inline void store(T* p, const Pack<T>& pack) {
    union { uint4 bits; T at[PER_ACCESS<T>]; } raw = {uint4{0, 0, 0, 0}};
#pragma unroll
    for (int i = 0; i < PER_ACCESS<T>; i++) raw.at[i] = from_f32<T>(pack.at[i]);
    CHECK_ALIGNED(p);
    *reinterpret_cast<uint4*>(p) = raw.bits;
}

// Division of the rows among the threads of a block: `groups` accesses per row, `lines` rows at once.
template <class T> struct Share {
    int groups, lines, group, line;
    __device__ explicit Share(int c) {
        groups = c / PER_ACCESS<T>;
        lines = blockDim.x / groups;
        group = threadIdx.x % groups;
        line = threadIdx.x / groups;
    }
    __device__ bool works() const { return line < lines; }
};

// Scale, shift and slope for the channels of one access; the identity where there is no norm.
template <int N> struct Seen {
    float scale[N], shift[N], slope[N];
    // `constants` and `slopes` may be null.
    __device__ Seen(const float* constants, const float* slopes, int c, int channel) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            scale[i] = constants ? constants[channel + i] : 1.f;
            shift[i] = constants ? constants[c + channel + i] : 0.f;
            slope[i] = slopes ? slopes[channel + i] : 1.f;
        }
    }
    __device__ float operator()(float x, int i) const {
        const float z = x * scale[i] + shift[i];
        return z > 0.f ? z : slope[i] * z;
    }
};

// Sum over the lanes of a warp, in the same order for every lane and every run. All lanes must take part.
template <class A> __device__ inline A warp_sum(A x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Sum over the threads of a one-dimensional block of full warps, returned to every thread. `shared` holds one element
// per warp and may be reused after the next barrier.
template <class A> __device__ inline A block_sum(A x, A* shared) {
    const int warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    A sum = shared[0];
    for (int w = 1; w < warps; w++) sum += shared[w];
    return sum;
}
