/* Mean and deviation of each channel on CPUs, in one pass over memory. Loaded by channels.py.
 *
 * In memory x is (outer, channels, inner): inner = 1 where channels come last. Sums are of differences from a channel's
 * first element, float32 over CHUNK elements and float64 beyond; no bit depends on the number of threads.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

enum { LANES = 16, CHUNK = 4096, PARTS = 16 };

typedef struct {
    const void *x;
    int64_t outer, channels, inner;
    int dtype;
} Job;

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE floats values_at(const void *x, int64_t i, int dtype) {
    if (dtype == F32) return *(const floats *)((const float *)x + i);
    return (floats)(__builtin_convertvector(*(const halves *)((const uint16_t *)x + i), words) << 16);
}

INLINE double sum_of(floats v) {
    double sum = 0;
    for (int l = 0; l < LANES; l++) sum += v[l];
    return sum;
}

/* Adds the sums over runs of one channel, the first at `at`. */
INLINE void add_runs(const Job *job, int dtype, int64_t at, double *sum, double *square) {
    const void *x = job->x;
    float shift = value_at(x, at, dtype);
    floats s[2] = {{0}}, q[2] = {{0}};
    int64_t taken = 0;
    for (int64_t o = 0; o < job->outer; o++, at += job->channels * job->inner)
        for (int64_t from = at, end = at + job->inner; from < end;) {
            int64_t m = end - from < CHUNK ? end - from : CHUNK, i = from;
            for (from += m; i + 2 * LANES <= from; i += 2 * LANES)
                for (int j = 0; j < 2; j++) {
                    floats d = values_at(x, i + j * LANES, dtype) - shift;
                    s[j] += d, q[j] += d * d;
                }
            for (; i < from; i++) {
                float d = value_at(x, i, dtype) - shift;
                s[0][i % LANES] += d, q[0][i % LANES] += d * d;
            }
            taken += m;
            if (taken < CHUNK && (from < end || o + 1 < job->outer)) continue;
            *sum += sum_of(s[0] + s[1]), *square += sum_of(q[0] + q[1]);
            for (int j = 0; j < 2; j++) s[j] = q[j] = (floats){0};
            taken = 0;
        }
}

/* Adds the sums over rows from..to - 1, which hold one element of each of `n` channels. `room`: two floats a channel. */
INLINE void add_rows(const Job *job, int dtype, int64_t from, int64_t to, float *room, double *sum, double *square) {
    enum { ROWS = CHUNK / LANES };
    const void *x = job->x;
    int64_t n = job->channels;
    float *restrict s = room, *restrict q = room + n;
    for (; from < to; from += ROWS) {
        int64_t end = to - from < ROWS ? to : from + ROWS;
        memset(room, 0, sizeof(float) * (size_t)(2 * n));
        for (int64_t r = from; r < end; r++)
            for (int64_t c = 0; c < n; c++) {
                float d = value_at(x, r * n + c, dtype) - value_at(x, c, dtype);
                s[c] += d, q[c] += d * d;
            }
        for (int64_t c = 0; c < n; c++) sum[c] += s[c], square[c] += q[c];
    }
}

#define WORKER(suffix, attribute)                                                                            \
    attribute static void runs_##suffix(const Job *job, int64_t at, double *sum, double *square) {           \
        if (job->dtype == F32)                                                                               \
            add_runs(job, F32, at, sum, square);                                                             \
        else                                                                                                 \
            add_runs(job, BF16, at, sum, square);                                                            \
    }                                                                                                        \
    attribute static void rows_##suffix(const Job *job, int64_t from, int64_t to, float *room, double *sum,  \
                                        double *square) {                                                    \
        if (job->dtype == F32)                                                                               \
            add_rows(job, F32, from, to, room, sum, square);                                                 \
        else                                                                                                 \
            add_rows(job, BF16, from, to, room, sum, square);                                                \
    }

WORKER(plain, )
#ifdef X86
WORKER(avx2, __attribute__((target("avx2"))))
#endif

static void sum_channels(const Job *job, double *sum, double *square, int threads) {
#pragma omp parallel for num_threads(threads) if (job->outer * job->channels * job->inner > 1 << 14)
    for (int64_t c = 0; c < job->channels; c++) BEST(runs)(job, c * job->inner, sum + c, square + c);
}

/* Behind `sum` and `square` come those of the other parts, then what each part works in. */
static void sum_rows(const Job *job, double *sum, double *square, int threads) {
    int64_t n = job->channels, count = job->outer;
    float *room = (float *)(sum + 2 * PARTS * n);
#pragma omp parallel for num_threads(threads) if (count * n > 1 << 14)
    for (int64_t p = 0; p < PARTS; p++)
        BEST(rows)(job, count * p / PARTS, count * (p + 1) / PARTS, room + 2 * p * n, sum + 2 * p * n,
                   square + 2 * p * n);
    for (int64_t p = 1; p < PARTS; p++)
        for (int64_t c = 0; c < 2 * n; c++) sum[c] += sum[2 * p * n + c]; /* the squares lie behind them */
}

/* `mean` and `inverse`: one float32 a channel, `inverse` of the square root of variance + `eps`; 0 and 1 for a channel
 * that is not finite. Returns 0, or 1 where memory ran out. x is not empty. */
EXPORT int dropit_statistics(const void *x, float *mean, float *inverse, int64_t outer, int64_t channels, int64_t inner,
                             int dtype, float eps, int threads) {
    const Job job = {x, outer, channels, inner, dtype};
    size_t room = (size_t)(2 * channels) * (inner == 1 ? PARTS : 1);
    double *sum = calloc(room, sizeof(double) + (inner == 1 ? sizeof(float) : 0)), *square = sum + channels;
    if (!sum) return 1;
    (inner == 1 ? sum_rows : sum_channels)(&job, sum, square, threads < 1 ? 1 : threads);
    double count = (double)outer * (double)inner;
    for (int64_t c = 0; c < channels; c++) {
        double from_first = sum[c] / count, variance = square[c] / count - from_first * from_first;
        mean[c] = (float)((double)value_at(x, c * inner, dtype) + from_first);
        inverse[c] = (float)(1 / sqrt((variance < 0 ? 0 : variance) + (double)eps));
        if (!(inverse[c] > 0) || !isfinite(mean[c])) mean[c] = 0, inverse[c] = 1;
    }
    free(sum);
    return 0;
}
