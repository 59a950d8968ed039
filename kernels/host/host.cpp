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

// Runs threads until one of them has to wait; then it is that thread's until the thread is done.
struct Fiber {
    ucontext_t context;
    // Where the fiber resumes; unlike context switches, jumps make no system call.
    jmp_buf place;
    bool is_started = false;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(STACK);
    // The thread that waits on it; none if below 0.
    int thread = -1;
};

struct Warp {
    int alive, waiting;
    unsigned generation;
    // Values of this generation of shuffles and of the previous one, which a slow lane may still read.
    unsigned char left[2][WARP][SLOT];
    bool has_left[2][WARP];
};

struct Block {
    std::vector<unsigned char> shared;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::function<void()> body;
    ucontext_t scheduler;
    jmp_buf scheduler_place;
    // The threads in the order of their starts, and how many have started.
    std::vector<int> order;
    size_t num_started;
    Fiber* fiber;
    int alive, waiting;
    unsigned generation;
};

thread_local Block state;

const Entry*& first_entry() {
    static const Entry* first = nullptr;
    return first;
}

Warp& warp_of(int thread) { return state.warps[size_t(thread / WARP)]; }

// Makes this thread the running one.
void enter(int thread) {
    const unsigned at = unsigned(thread);
    const dim3 size = running.block_dim;
    running.thread_idx = {at % size.x, at / size.x % size.y, at / size.x / size.y};
    running.lane = thread % WARP;
    state.fiber->thread = thread;
}

void yield() {
    if (_setjmp(state.fiber->place) == 0) _longjmp(state.scheduler_place, 1);
}

void run_on_fiber();

// Lets a fiber run until a thread has to wait, or no thread is left.
void resume(Fiber& fiber) {
    if (_setjmp(state.scheduler_place) != 0) return;
    state.fiber = &fiber;
    if (fiber.is_started) {
        if (fiber.thread >= 0) enter(fiber.thread);
        _longjmp(fiber.place, 1);
    }
    fiber.is_started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_on_fiber, 0);
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

void run_on_fiber() {
    for (;;) {
        while (state.num_started < state.order.size()) {
            enter(state.order[state.num_started++]);
            state.body();
            Warp& warp = warp_of(state.fiber->thread);
            state.alive--;
            open_block_barrier();
            warp.alive--;
            open_warp_barrier(warp);
        }
        state.fiber->thread = -1;
        yield();
    }
}

// A value that changes whenever any thread makes progress.
unsigned long progress() {
    unsigned long sum = state.generation + unsigned(state.waiting) + 1000003ul * unsigned(state.alive);
    for (const Warp& warp : state.warps) sum = sum * 31 + warp.generation * 64 + unsigned(warp.waiting);
    return sum;
}

void run_block() {
    const size_t num = state.order.size();
    // All bits set: NaN in every float type.
    std::fill(state.shared.begin(), state.shared.end(), 0xff);
    state.warps.assign((num + WARP - 1) / WARP, Warp{});
    for (size_t i = 0; i < num; i++) warp_of(int(i)).alive++;
    state.alive = int(num);
    state.waiting = 0;
    state.num_started = 0;
    size_t used = 0;
    while (state.num_started < num) {
        if (used == state.fibers.size()) state.fibers.push_back(std::make_unique<Fiber>());
        resume(*state.fibers[used++]);
    }
    while (state.alive > 0) {
        const unsigned long before = progress();
        for (size_t i = 0; i < used; i++)
            if (state.fibers[i]->thread >= 0) resume(*state.fibers[i]);
        if (progress() == before) fail("the threads of a block wait for each other at different barriers");
    }
    const auto is_poison = [](unsigned char byte) { return byte == 0xff; };
    if (!std::all_of(state.shared.end() - GUARD, state.shared.end(), is_poison)) fail("a write past the shared memory of a block");
}
}  // namespace

Entry::Entry(const char* name, const char* types, void (*call)(void**)) : name(name), types(types), call(call), next(first_entry()) {
    first_entry() = this;
}

__thread Running running;

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
    Warp& warp = warp_of(state.fiber->thread);
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
    host::running.grid_dim = {grid[0], grid[1], grid[2]};
    host::running.block_dim = {block[0], block[1], block[2]};
    state.shared.resize(shared_bytes + host::GUARD);
    host::running.shared = state.shared.data();
    state.body = [=] { entry->call(args); };
    state.order.resize(threads);
    std::iota(state.order.begin(), state.order.end(), 0);
    std::mt19937 random(seed);
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                if (seed) std::shuffle(state.order.begin(), state.order.end(), random);
                host::running.block_idx = {x, y, z};
                host::run_block();
            }
    return nullptr;
}

// Returns the types of a kernel's arguments; null if there is no such kernel.
extern "C" const char* host_types(const char* name) {
    const host::Entry* entry = host::first_entry();
    while (entry && strcmp(entry->name, name) != 0) entry = entry->next;
    return entry ? entry->types : nullptr;
}
