// Runs kernels on the CPU for the tests. The threads of a block run one after the other, and blocks too. A thread that
// waits at a barrier or shuffle keeps its fiber, and others go on, in an order that a seed determines. Shared memory starts as NaN. A barrier that some
// threads miss aborts. This finds errors in arithmetic and indices, and missing barriers by chance. It cannot find
// races between blocks or misaligned accesses other than those of 16 bytes by `load` and `store`, and shows neither
// registers nor speed.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }

// The upper half of an f32.
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline float of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return of_bits(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return {uint16_t(0x7fff)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half h) {
    const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
    const float sign = h.bits >> 15 ? -1.f : 1.f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexpf(float(1024 + mantissa), exponent - 25) : ldexpf(float(mantissa), -24));
}
inline __half __float2half(float x) {
    const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
    const float size = fabsf(x);
    if (x != x) return {uint16_t(0x7fff)};
    if (size >= 65520.f) return {uint16_t(sign | 0x7c00)};
    // Rounds to the last digit that f16 holds, halves to even.
    int exponent;
    frexpf(size, &exponent);
    const float digit = ldexpf(1.f, (exponent < -13 ? -13 : exponent) - 11);
    const float rounded = rintf(size / digit) * digit;
    if (rounded < ldexpf(1.f, -14)) return {uint16_t(sign | uint16_t(ldexpf(rounded, 24)))};
    const uint32_t bits = bits_of(rounded);
    return {uint16_t(sign | ((bits >> 23) - 112) << 10 | (bits >> 13 & 1023))};
}

namespace host {
// The running thread's position, and what it has of its block.
struct Running { dim3 thread_idx, block_idx, block_dim, grid_dim; void* shared; int lane; };
extern __thread Running running;
void block_barrier();
// Publishes `bytes` to the other lanes of the warp, waits for all of them, and reads the value that lane `from`
// published.
void shuffle(void* value, size_t bytes, int from);
inline int lane() { return running.lane; }
// Aborts the process with a message.
[[noreturn]] void fail(const char* what);

// A kernel: its name, the types of its arguments (one letter each), and a function that calls it with pointers to them.
struct Entry {
    const char* name;
    const char* types;
    void (*call)(void** args);
    const Entry* next;
    Entry(const char* name, const char* types, void (*call)(void**));
};

template <class T> constexpr char LETTER = 'p';
template <> constexpr char LETTER<int> = 'i';
template <> constexpr char LETTER<long long> = 'l';
template <> constexpr char LETTER<float> = 'f';

template <auto kernel> struct Call;
template <class... A, void (*kernel)(A...)> struct Call<kernel> {
    static_assert(((std::is_pointer_v<A> || LETTER<A> != 'p') && ...), "int, long long, float or a pointer");
    static constexpr char types[] = {LETTER<A>..., 0};
    template <size_t... I> static void unpack(void** args, std::index_sequence<I...>) { kernel(*static_cast<A*>(args[I])...); }
    static void call(void** args) { unpack(args, std::index_sequence_for<A...>()); }
};

// Returns the value of lane `from`; all lanes of the warp must call it.
template <class T> T shuffle(T value, int from) {
    static_assert(sizeof(T) <= 8);
    shuffle(&value, sizeof(T), from);
    return value;
}
}  // namespace host

#define KERNEL(name) static void name
#define EXPORT(name) static const host::Entry export_##name(#name, host::Call<name>::types, host::Call<name>::call);
#define CHECK_ALIGNED(p) (reinterpret_cast<uintptr_t>(p) % 16 ? host::fail("a misaligned access of 16 bytes") : void())
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(host::running.shared)
#define threadIdx (host::running.thread_idx)
#define blockIdx (host::running.block_idx)
#define blockDim (host::running.block_dim)
#define gridDim (host::running.grid_dim)
#define __syncthreads() host::block_barrier()

template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return host::shuffle(value, host::lane() ^ mask); }
template <class T> T __shfl_down_sync(unsigned, T value, int by) {
    return host::shuffle(value, host::lane() + by < 32 ? host::lane() + by : host::lane());
}
