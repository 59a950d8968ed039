// Runtime of host.h. Needs POSIX contexts: Linux; not tried on macOS.
#ifdef __APPLE__
#define _XOPEN_SOURCE 700
#endif
#include "host.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace host {
namespace {
constexpr size_t STACK = 64 * 1024;
constexpr int WARP = 32, SLOT = 8;
// Guard bytes after the shared memory of a block, which no kernel may change.
constexpr size_t GUARD = 256;

struct Fiber {
    ucontext_t context;
    // Where the fiber resumes; unlike context switches, jumps make no system call.
    jmp_buf place;
    bool is_started;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(STACK);
    dim3 idx;
    bool is_done;
};

struct Warp {
    int alive, waiting;
    unsigned generation;
    // Values of this generation of shuffles and of the previous one, which a slow lane may still read.
    unsigned char left[2][WARP][SLOT];
    bool has_left[2][WARP];
};

struct Block {
    dim3 grid, block, idx;
    std::vector<unsigned char> shared;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::function<void()> body;
    ucontext_t scheduler;
    jmp_buf scheduler_place;
    int current, alive, waiting;
    unsigned generation;
};

thread_local Block state;

const Entry*& first_entry() {
    static const Entry* first = nullptr;
    return first;
}

int warp_of(int thread) { return thread / WARP; }

void yield() {
    if (_setjmp(state.fibers[size_t(state.current)].place) == 0) _longjmp(state.scheduler_place, 1);
}

// Lets a thread run until it yields.
void resume(Fiber& fiber) {
    if (_setjmp(state.scheduler_place) != 0) return;
    if (fiber.is_started) _longjmp(fiber.place, 1);
    fiber.is_started = true;
    swapcontext(&state.scheduler, &fiber.context);
}

void open_block_barrier() {
    if (state.waiting > 0 && state.waiting == state.alive) {
        state.waiting = 0;
        state.generation++;
    }
}

void open_warp_barrier(Warp& warp) {
    if (warp.waiting > 0 && warp.waiting == warp.alive) {
        warp.waiting = 0;
        warp.generation++;
        memset(warp.has_left[warp.generation % 2], 0, sizeof warp.has_left[0]);
    }
}

void run_fiber() {
    state.body();
    state.fibers[state.current].is_done = true;
    state.alive--;
    open_block_barrier();
    Warp& warp = state.warps[warp_of(state.current)];
    warp.alive--;
    open_warp_barrier(warp);
    yield();
}

// A value that changes whenever any thread makes progress.
unsigned long progress() {
    unsigned long sum = state.generation + unsigned(state.waiting) + 1000003ul * unsigned(state.alive);
    for (const Warp& warp : state.warps) sum = sum * 31 + warp.generation * 64 + unsigned(warp.waiting);
    return sum;
}

void run_block(const std::vector<int>& order) {
    const dim3 size = state.block;
    const int num = int(order.size());
    // All bits set: NaN in every float type.
    std::fill(state.shared.begin(), state.shared.end(), 0xff);
    state.warps.assign(size_t(num + WARP - 1) / WARP, Warp{});
    state.alive = num;
    state.waiting = 0;
    for (int i = 0; i < num; i++) {
        Fiber& fiber = state.fibers[size_t(i)];
        const unsigned at = unsigned(i);
        fiber.is_started = fiber.is_done = false;
        fiber.idx = {at % size.x, at / size.x % size.y, at / size.x / size.y};
        state.warps[size_t(warp_of(i))].alive++;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    while (state.alive > 0) {
        const unsigned long before = progress();
        for (int thread : order) {
            if (state.fibers[size_t(thread)].is_done) continue;
            state.current = thread;
            resume(state.fibers[size_t(thread)]);
        }
        if (progress() == before) fail("the threads of a block wait for each other at different barriers");
    }
    const auto is_poison = [](unsigned char byte) { return byte == 0xff; };
    if (!std::all_of(state.shared.end() - GUARD, state.shared.end(), is_poison)) fail("a write past the shared memory of a block");
}
}  // namespace

Entry::Entry(const char* name, const char* types, void (*call)(void**)) : name(name), types(types), call(call), next(first_entry()) {
    first_entry() = this;
}

dim3 thread_idx() { return state.fibers[size_t(state.current)].idx; }
dim3 block_idx() { return state.idx; }
dim3 block_dim() { return state.block; }
dim3 grid_dim() { return state.grid; }
void* shared() { return state.shared.data(); }
int lane() { return state.current % WARP; }

void fail(const char* what) {
    fprintf(stderr, "kernel on the host: %s\n", what);
    abort();
}

void block_barrier() {
    const unsigned generation = state.generation;
    state.waiting++;
    open_block_barrier();
    while (state.generation == generation) yield();
}

void shuffle(void* value, size_t bytes, int from) {
    Warp& warp = state.warps[size_t(warp_of(state.current))];
    const unsigned generation = warp.generation, now = generation % 2;
    memcpy(warp.left[now][lane()], value, bytes);
    warp.has_left[now][lane()] = true;
    warp.waiting++;
    open_warp_barrier(warp);
    while (warp.generation == generation) yield();
    if (!warp.has_left[now][from]) fail("a shuffle reads a lane that does not take part");
    memcpy(value, warp.left[now][from], bytes);
}
}  // namespace host

// Runs a kernel on all blocks; returns an error message, or null. A seed of 0 keeps the threads in order.
extern "C" const char* host_launch(const char* name, const unsigned grid[3], const unsigned block[3], size_t shared_bytes, const char* types,
                                   void** args, unsigned seed) {
    using host::state;
    const host::Entry* entry = host::first_entry();
    while (entry && strcmp(entry->name, name) != 0) entry = entry->next;
    if (!entry) return "there is no such kernel";
    if (strcmp(entry->types, types) != 0) return entry->types;
    const size_t threads = size_t(block[0]) * block[1] * block[2];
    if (threads == 0 || threads > 1024) return "a block has 1 to 1024 threads";
    if (shared_bytes > 48 * 1024) return "a block has up to 48 KiB of shared memory";
    state.grid = {grid[0], grid[1], grid[2]};
    state.block = {block[0], block[1], block[2]};
    state.shared.resize(shared_bytes + host::GUARD);
    state.body = [=] { entry->call(args); };
    while (state.fibers.size() < threads) state.fibers.emplace_back();
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 random(seed);
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                if (seed) std::shuffle(order.begin(), order.end(), random);
                state.idx = {x, y, z};
                host::run_block(order);
            }
    return nullptr;
}
