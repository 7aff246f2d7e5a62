#include "emulation.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

namespace emulation {
namespace {

constexpr size_t STACK = 128*1024;

// threads that wait for each other
struct Group {
    int size = 0, arrived = 0;
    unsigned generation = 0;
    float values[SIMD_WIDTH];
};

struct Fiber {
    ucontext_t context;
    Thread thread;
    Group * simdgroup;
    bool done;
};

struct Machine {
    ucontext_t scheduler;
    const Kernel * kernel;
    Group threadgroup;
    std::vector<Group> simdgroups;
    std::vector<Fiber> fibers;
    std::vector<std::vector<char>> stacks;
    Fiber * current;
    unsigned long events; // threads that ended and barriers that opened
};

Machine machine;

void start() {
    (*machine.kernel)(machine.current->thread);
    machine.current->done = true;
    machine.events++;
}

void wait(Group & group) {
    Fiber * self = machine.current;
    const unsigned generation = group.generation;
    if (++group.arrived == group.size) {
        group.arrived = 0;
        group.generation++;
        machine.events++;
        return;
    }
    while (group.generation == generation) {
        swapcontext(&self->context, &machine.scheduler);
    }
}

void run_threadgroup() {
    for (bool alive = true; alive;) {
        alive = false;
        const unsigned long before = machine.events;
        for (Fiber & fiber : machine.fibers) {
            if (!fiber.done) {
                machine.current = &fiber;
                swapcontext(&machine.scheduler, &fiber.context);
                alive = true;
            }
        }
        if (alive && machine.events == before) {
            fprintf(stderr, "the threads of a threadgroup wait at different barriers, or some of them have ended\n");
            abort();
        }
    }
}

} // namespace

int     lane()                { return machine.current->thread.index%SIMD_WIDTH; }
void    threadgroup_barrier() { wait(machine.threadgroup); }
void    simdgroup_barrier()   { wait(*machine.current->simdgroup); }
float * exchange()            { return machine.current->simdgroup->values; }

std::map<std::string, Entry> & kernels() {
    static std::map<std::string, Entry> all;
    return all;
}

void run(const Kernel & kernel, const Dispatch & dispatch) {
    const Size & n = dispatch.threads;
    const int threads = n.x*n.y*n.z;
    machine.kernel = &kernel;
    machine.fibers.resize(threads);
    while ((int) machine.stacks.size() < threads) {
        machine.stacks.emplace_back(STACK);
    }
    for (int group = 0; group < dispatch.grid.x*dispatch.grid.y*dispatch.grid.z; group++) {
        const Size position = { group%dispatch.grid.x, group/dispatch.grid.x%dispatch.grid.y, group/dispatch.grid.x/dispatch.grid.y };
        // what a kernel reads before it was written must not look like a result
        std::vector<char> memory(dispatch.threadgroup_memory, (char) 0x7F);
        machine.threadgroup = Group();
        machine.threadgroup.size = threads;
        machine.simdgroups.assign((threads + SIMD_WIDTH - 1)/SIMD_WIDTH, Group());
        for (int i = 0; i < threads; i++) {
            Fiber & fiber = machine.fibers[i];
            fiber.thread = { &dispatch, memory.data(), position, { i%n.x, i/n.x%n.y, i/n.x/n.y }, i };
            fiber.simdgroup = &machine.simdgroups[i/SIMD_WIDTH];
            fiber.simdgroup->size++;
            fiber.done = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = machine.stacks[i].data();
            fiber.context.uc_stack.ss_size = STACK;
            fiber.context.uc_link = &machine.scheduler;
            makecontext(&fiber.context, start, 0);
        }
        run_threadgroup();
    }
}

} // namespace emulation
