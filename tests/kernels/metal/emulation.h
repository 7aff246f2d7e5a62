// Runs the threads of a Metal threadgroup on one CPU thread: a fiber for each, has_codebooks where Metal synchronizes.
// Knows threadgroups, simdgroups and how a kernel's arguments are passed; knows no kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulation {

constexpr int SIMD_WIDTH = 32;

struct Size { int x, y, z; };

// what Metal passes for a parameter of a kernel, by its attribute
enum class Argument { buffer, threadgroup_memory, threadgroup_position, thread_position, thread_index, lane, simdgroup, threads };

// one dispatch as the host encoded it
struct Dispatch {
    std::vector<void *> buffers;
    size_t threadgroup_memory = 0;
    Size grid, threads;
};

// ---- synchronization: called by the thread that runs ----

int  lane();
void threadgroup_barrier();
void simdgroup_barrier();
// one value for each lane of the simdgroup that runs, for functions that exchange values between lanes
float * exchange();

// ---- kernels ----

struct Thread {
    const Dispatch * dispatch;
    char * threadgroup_memory;
    Size position, thread;
    int index;
};

using Kernel = std::function<void(const Thread &)>;

struct Constant {
    int index;
    void * value;
    size_t size;
};

struct Library {
    std::vector<Constant> constants;
};

struct Entry {
    Kernel kernel;
    const Library * library;
};

// every kernel of every translated source, by its host name
std::map<std::string, Entry> & kernels();

// the table at the end of a translated source
struct Registration {
    Library library;
    Registration(std::initializer_list<std::pair<const char *, Kernel>> functions, std::initializer_list<Constant> constants) {
        library.constants = constants;
        for (const auto & [name, kernel] : functions) {
            kernels()[name] = { kernel, &library };
        }
    }
};

// all threadgroups of a dispatch, one after the other; aborts where threads of one group don't reach the same barrier
void run(const Kernel & kernel, const Dispatch & dispatch);

template <typename P>
P position(const Size & s) {
    if constexpr (std::is_integral_v<P>) {
        return (P) s.x;
    } else {
        return P(s.x, s.y, s.z);
    }
}

template <Argument A, typename P>
P pass(const Thread & t, int buffer) {
    if constexpr (A == Argument::buffer) {
        if constexpr (std::is_reference_v<P>) {
            return *static_cast<std::remove_reference_t<P> *>(t.dispatch->buffers.at(buffer));
        } else {
            return static_cast<P>(t.dispatch->buffers.at(buffer));
        }
    } else if constexpr (A == Argument::threadgroup_memory) {
        return t.threadgroup_memory;
    } else if constexpr (A == Argument::threadgroup_position) {
        return position<P>(t.position);
    } else if constexpr (A == Argument::thread_position) {
        return position<P>(t.thread);
    } else if constexpr (A == Argument::threads) {
        return position<P>(t.dispatch->threads);
    } else {
        return (P) (A == Argument::thread_index ? t.index : A == Argument::lane ? t.index%SIMD_WIDTH : t.index/SIMD_WIDTH);
    }
}

template <Argument... A, typename... P, size_t... I>
Kernel bind_indexed(void (*function)(P...), std::index_sequence<I...>) {
    static_assert(sizeof...(A) == sizeof...(P));
    return [function](const Thread & t) {
        constexpr Argument all[] = { A... };
        const auto buffer = [&](size_t i) {
            int before = 0;
            for (size_t j = 0; j < i; j++) {
                before += all[j] == Argument::buffer;
            }
            return before;
        };
        function(pass<A, P>(t, buffer(I))...);
    };
}

template <Argument... A, typename... P>
Kernel bind(void (*function)(P...)) {
    return bind_indexed<A...>(function, std::index_sequence_for<P...>());
}

} // namespace emulation
