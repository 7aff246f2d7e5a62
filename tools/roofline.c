// Reads memory from beginning to end with several threads, as generation reads weights: prints gigabytes per second for
// each round. roofline.py builds and runs it.
// usage: roofline THREADS ROUNDS BYTES

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t vector_t __attribute__((vector_size(64)));

typedef struct {
    const vector_t *    from;
    size_t              n;
    int                 rounds;
    pthread_barrier_t * barrier;
    uint64_t            sum;
} share_t;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9*(double) t.tv_nsec;
}

static void read_share(share_t * s) {
    vector_t sum[4] = {{0}, {0}, {0}, {0}};
    for (size_t i = 0; i + 4 <= s->n; i += 4) {
        for (int k = 0; k < 4; k++) { sum[k] += s->from[i + (size_t) k]; }
    }
    for (int k = 0; k < 4; k++) {
        for (int e = 0; e < 8; e++) { s->sum += sum[k][e]; }
    }
}

static void * run(void * argument) {
    share_t * s = argument;
    for (int round = 0; round < s->rounds; round++) {
        pthread_barrier_wait(s->barrier);
        read_share(s);
        pthread_barrier_wait(s->barrier);
    }
    return NULL;
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s THREADS ROUNDS BYTES\n", argv[0]);
        return 2;
    }
    const int threads = atoi(argv[1]), rounds = atoi(argv[2]);
    const size_t share = (size_t) strtoull(argv[3], NULL, 10)/(size_t) threads/256*256, bytes = share*(size_t) threads;
    // large pages, which interleaved weights have too
    uint8_t * data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    share_t * shares = calloc((size_t) threads, sizeof(share_t));
    pthread_t * ids = calloc((size_t) threads, sizeof(pthread_t));
    if (data == MAP_FAILED || shares == NULL || ids == NULL) {
        perror("memory");
        return 1;
    }
#if defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    memset(data, 1, bytes);
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, (unsigned) threads + 1);
    for (int t = 0; t < threads; t++) {
        shares[t] = (share_t) { (const vector_t *) (data + (size_t) t*share), share/sizeof(vector_t), rounds, &barrier, 0 };
        if (pthread_create(&ids[t], NULL, run, &shares[t]) != 0) {
            perror("thread");
            return 1;
        }
    }
    for (int round = 0; round < rounds; round++) {
        pthread_barrier_wait(&barrier);
        const double start = now();
        pthread_barrier_wait(&barrier);
        printf("%.3f\n", (double) bytes/(now() - start)/1e9);
    }
    uint64_t sum = 0;
    for (int t = 0; t < threads; t++) {
        pthread_join(ids[t], NULL);
        sum += shares[t].sum;
    }
    return sum == 0; // which the compiler can't know
}
