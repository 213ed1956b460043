// Runs kernels on a CPU: reads launches from standard input until its end, carries each out, and writes its buffers back.
//
// A launch (little-endian):  u32 length and bytes of the function's name; u32 grid x, y, z; u32 block; u32 shared bytes;
//   u32 seed of the order of threads; u32 buffers, each u64 bytes and its content; u32 arguments, each u32 kind and its value:
//   0 memory (u32 buffer, u64 first byte), 1 null, 2 i32, 3 f32, 4 u64.
// The answer: u32 0 and the content of every buffer, or u32 1, u32 length and a sentence.
//
// Every buffer is an allocation of its exact size, so the address sanitizer ends the program at the first access beyond one.
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../add_norm.cu"
#include "../attention.cu"
#include "../bias_act.cu"
#include "../dense.cu"
#include "../embed_norm.cu"
#include "../gather.cu"
#include "../pool.cu"
#include "../softmax.cu"
#include "../unpack.cu"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// Small: the sanitizer clears a stack's shadow at every switch. Fragments are what fills it, 20 KiB of them.
constexpr size_t STACK = 64 * 1024;
constexpr int WARP = 32;

struct Barrier {
    unsigned arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    // Two of them, taken in turn: a lane that writes the next value cannot overtake one that still reads the last.
    uint32_t values[2][WARP];
};

struct Fiber {
    ucontext_t context{};
    std::unique_ptr<unsigned char[]> stack;
    unsigned index = 0;
    bool done = true;
    // What it waits for: the barrier, and the generation that was current when it came.
    Barrier* barrier = nullptr;
    unsigned generation = 0;
    unsigned exchanges = 0, collectives = 0;
};

struct Call {
    virtual void run() = 0;
    virtual ~Call() = default;
};

static ucontext_t scheduler;
static const void* scheduler_stack;
static size_t scheduler_stack_bytes;
static std::vector<std::unique_ptr<Fiber>> fibers;
static std::vector<Warp> warps;
static Barrier block;
static Fiber* running;
static Call* call;
static unsigned char* block_shared;
static uint64_t state;

void fail(const char* what) {
    std::fprintf(stderr, "emulation: block (%u, %u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, what);
    std::exit(3);
}

unsigned char* shared() { return block_shared; }
int lane() { return static_cast<int>(threadIdx.x % WARP); }
void count_collective() { ++running->collectives; }

static void leave() {
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_stack_bytes);
    swapcontext(&running->context, &scheduler);
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
}

static void fiber_main() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    for (;;) {
        call->run();
        running->done = true;
        leave();
    }
}

static void wait_at(Barrier& barrier, unsigned threads) {
    running->barrier = &barrier;
    running->generation = barrier.generation;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    // The last to come leaves too: on a device it has no right to go first.
    leave();
}

void block_barrier() { wait_at(block, blockDim.x); }
void warp_barrier() { wait_at(warps[threadIdx.x / WARP].barrier, WARP); }

uint32_t exchange(uint32_t value, int from) {
    Warp& warp = warps[threadIdx.x / WARP];
    uint32_t* values = warp.values[running->exchanges++ % 2];
    values[lane()] = value;
    warp_barrier();
    return from >= 0 && from < WARP ? values[from] : value;
}

static void enter(Fiber& fiber) {
    running = &fiber;
    threadIdx = {fiber.index, 0, 0};
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), STACK);
    swapcontext(&scheduler, &fiber.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

// A number below `end`, from the launch's seed.
static unsigned chance(unsigned end) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>((state >> 33) % end);
}

static void run_block(size_t shared_bytes) {
    const unsigned threads = blockDim.x;
    while (fibers.size() < threads) {
        auto fiber = std::make_unique<Fiber>();
        fiber->index = static_cast<unsigned>(fibers.size());
        fiber->stack = std::make_unique<unsigned char[]>(STACK);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = STACK;
        makecontext(&fiber->context, fiber_main, 0);
        fibers.push_back(std::move(fiber));
    }
    void* memory = nullptr;
    if (shared_bytes && posix_memalign(&memory, 128, shared_bytes)) fail("no memory");
    if (memory) std::memset(memory, 0xff, shared_bytes);
    block_shared = static_cast<unsigned char*>(memory);
    warps.assign((threads + WARP - 1) / WARP, Warp{});
    block = Barrier{};
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = *fibers[t];
        fiber.done = false;
        fiber.barrier = nullptr;
        fiber.exchanges = fiber.collectives = 0;
    }
    const unsigned count = threads / WARP;
    for (unsigned left = threads; left > 0;) {
        bool moved = false;
        const unsigned begin = chance(count), direction = chance(2);
        for (unsigned w = 0; w < count; ++w) {
            const unsigned warp = (begin + (direction ? w : count - w)) % count;
            // Up to some barriers of its own ahead of the other warps.
            for (unsigned turns = 1 + chance(16); turns > 0; --turns) {
                const bool backwards = chance(2);
                bool moved_here = false;
                for (unsigned i = 0; i < WARP; ++i) {
                    Fiber& fiber = *fibers[warp * WARP + (backwards ? WARP - 1 - i : i)];
                    if (fiber.done || (fiber.barrier && fiber.barrier->generation == fiber.generation)) continue;
                    fiber.barrier = nullptr;
                    enter(fiber);
                    moved_here = true;
                    left -= fiber.done;
                }
                if (!moved_here) break;
                moved = true;
            }
        }
        if (!moved) fail("a barrier or a shuffle that not every thread reaches");
    }
    for (unsigned t = 0; t < threads; ++t) {
        if (fibers[t]->collectives != fibers[t - t % WARP]->collectives) {
            fail("an operation on fragments that not every lane of a warp makes");
        }
    }
    std::free(memory);
}

struct Argument {
    uint32_t kind;
    unsigned char* memory;
    uint64_t bits;
};

template <class A> static bool fits(const Argument& argument) {
    if constexpr (std::is_pointer_v<A>) return argument.kind <= 1;
    else if constexpr (std::is_same_v<A, float>) return argument.kind == 3;
    else if constexpr (sizeof(A) == 8) return argument.kind == 4;
    else return argument.kind == 2;
}

template <class A> static A value_of(const Argument& argument) {
    if constexpr (std::is_pointer_v<A>) {
        return reinterpret_cast<A>(argument.kind == 0 ? argument.memory : nullptr);
    } else {
        A value;
        std::memcpy(&value, &argument.bits, sizeof value);
        return value;
    }
}

template <class... A> struct Typed : Call {
    void (*function)(A...);
    std::tuple<A...> values;

    Typed(void (*f)(A...), std::tuple<A...> v) : function(f), values(std::move(v)) {}
    void run() override { std::apply(function, values); }
};

using Maker = std::unique_ptr<Call> (*)(const std::vector<Argument>&);

template <class... A, size_t... I>
static std::unique_ptr<Call> make(void (*f)(A...), const std::vector<Argument>& arguments, std::index_sequence<I...>) {
    if (arguments.size() != sizeof...(A) || !(fits<A>(arguments[I]) && ...)) return nullptr;
    return std::make_unique<Typed<A...>>(f, std::tuple<A...>(value_of<A>(arguments[I])...));
}

template <class... A> static std::unique_ptr<Call> bind(void (*f)(A...), const std::vector<Argument>& arguments) {
    return make(f, arguments, std::index_sequence_for<A...>{});
}

#define ENTRY(name) {#name, [](const std::vector<Argument>& arguments) { return bind(name, arguments); }},
#define FLOATS(name) ENTRY(name##_f32) ENTRY(name##_f16) ENTRY(name##_bf16)

static const std::map<std::string, Maker> KERNELS = {
    ENTRY(unpack_u8) ENTRY(unpack_u16) ENTRY(unpack_u32) ENTRY(unpack_u64)
    ENTRY(gather_u8) ENTRY(gather_u16) ENTRY(gather_u32) ENTRY(gather_u64)
    FLOATS(embed_norm) FLOATS(add_norm) FLOATS(bias_act) FLOATS(masked_softmax) FLOATS(pool)
    ENTRY(attention_f32_32) ENTRY(attention_f32_64) ENTRY(attention_f32_128)
    ENTRY(attention_f16_32) ENTRY(attention_f16_64) ENTRY(attention_f16_128)
    ENTRY(attention_bf16_32) ENTRY(attention_bf16_64) ENTRY(attention_bf16_128)
    ENTRY(dense_f32)
};

template <class T> static bool read(T& to) { return std::fread(&to, sizeof to, 1, stdin) == 1; }
template <class T> static T take() {
    T value;
    if (!read(value)) {
        std::fprintf(stderr, "emulation: a launch that ends early\n");
        std::exit(4);
    }
    return value;
}
static void take_bytes(void* to, size_t bytes) {
    if (bytes && std::fread(to, bytes, 1, stdin) != 1) {
        std::fprintf(stderr, "emulation: a launch that ends early\n");
        std::exit(4);
    }
}

static void refuse(const std::string& why) {
    const uint32_t head[2] = {1, static_cast<uint32_t>(why.size())};
    std::fwrite(head, sizeof head, 1, stdout);
    std::fwrite(why.data(), 1, why.size(), stdout);
}

struct Buffer {
    void* bytes = nullptr;
    size_t count = 0;

    explicit Buffer(size_t n) : count(n) {
        // As a device aligns its allocations.
        if (posix_memalign(&bytes, 256, n)) fail("no memory");
    }
    Buffer(Buffer&& other) noexcept : bytes(std::exchange(other.bytes, nullptr)), count(other.count) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(bytes); }
};

static bool run_one() {
    uint32_t name_len;
    if (!read(name_len)) return false;
    std::string name(name_len, '\0');
    take_bytes(name.data(), name_len);
    gridDim.x = take<uint32_t>();
    gridDim.y = take<uint32_t>();
    gridDim.z = take<uint32_t>();
    blockDim = {take<uint32_t>(), 1, 1};
    const auto shared_bytes = take<uint32_t>();
    state = take<uint32_t>();
    std::vector<Buffer> buffers;
    for (auto left = take<uint32_t>(); left > 0; --left) {
        buffers.emplace_back(take<uint64_t>());
        take_bytes(buffers.back().bytes, buffers.back().count);
    }
    std::vector<Argument> arguments;
    for (auto left = take<uint32_t>(); left > 0; --left) {
        Argument argument{take<uint32_t>(), nullptr, 0};
        switch (argument.kind) {
            case 0: {
                const auto buffer = take<uint32_t>();
                const auto at = take<uint64_t>();
                argument.memory = static_cast<unsigned char*>(buffers.at(buffer).bytes) + at;
                break;
            }
            case 1: break;
            case 4: argument.bits = take<uint64_t>(); break;
            default: argument.bits = take<uint32_t>(); break;
        }
        arguments.push_back(argument);
    }

    const auto kernel = KERNELS.find(name);
    const auto bound = kernel == KERNELS.end() ? nullptr : kernel->second(arguments);
    if (!bound) {
        refuse(kernel == KERNELS.end() ? "no kernel " + name : name + " takes other arguments");
    } else if (blockDim.x == 0 || blockDim.x > 1024 || blockDim.x % WARP || shared_bytes > 48 * 1024) {
        refuse(name + ": a block that no device takes, or one without whole warps");
    } else {
        call = bound.get();
        for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
            for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
                for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block(shared_bytes);
        const uint32_t good = 0;
        std::fwrite(&good, sizeof good, 1, stdout);
        for (const Buffer& buffer : buffers) std::fwrite(buffer.bytes, 1, buffer.count, stdout);
    }
    std::fflush(stdout);
    return true;
}

}  // namespace emulation

int main() {
    while (emulation::run_one()) {
    }
}
