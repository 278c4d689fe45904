/* The backward of attention from query, key and value alone, in float32. Loaded by attention.py.
 *
 * What autograd's own backward needs besides, the output and the log-sum-exp of each row, would have to be made again by
 * a second forward. Here the scores of a few rows are in cache anyway, so that their softmax costs no extra product:
 * five products a head in the place of seven.
 *
 *     P = softmax(scale Q K^T + mask)    dV = P^T dO    dP = dO V^T    dS = P (dP - sum(dP P))
 *     dQ = scale dS K                    dK = scale dS^T Q
 *
 * One head at a time on each thread, ROWS queries at a time. Every operand is copied to a workspace whose rows are whole
 * vectors, so that one product routine does all five, whatever the strides and the size of a head.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#define WORKER __attribute__((target("avx2,fma")))
#else
#define WORKER
#endif

#if defined(__GNUC__)

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 8, WIDE = 2 * LANES, TALL = 6, ROWS = 48 };

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* A tensor (batch, heads, rows, size), its last dimension contiguous. A mask: (batch, heads, queries, keys). */
typedef struct {
    float *data;
    int64_t batch, head, row; /* strides, in elements */
} View;

typedef struct {
    View q, k, v, grad, dq, dk, dv, mask; /* mask.data may be NULL */
    int64_t batch, heads, kv_heads, queries, keys, size;
    float scale;
    int causal;
} Job;

INLINE int64_t padded(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

/* The length of a row of scores: an odd number of WIDEs, so that the rows of a column are not all in one cache set. */
INLINE int64_t spread(int64_t n) { return padded(n) / WIDE % 2 ? padded(n) : padded(n) + WIDE; }

INLINE floats load(const float *p) { return *(const floats *)p; }

/* C[rows, WIDE] (+)= A[rows, k] B[k, WIDE]; A has any strides */
INLINE void tile(int rows, int64_t k, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
                 float *c, int64_t c_row, int add) {
    floats left[TALL], right[TALL];
    for (int r = 0; r < rows; r++) {
        left[r] = add ? load(c + r * c_row) : (floats){0};
        right[r] = add ? load(c + r * c_row + LANES) : (floats){0};
    }
    for (int64_t i = 0; i < k; i++, a += a_column, b += b_row) {
        floats b0 = load(b), b1 = load(b + LANES);
        for (int r = 0; r < rows; r++) {
            left[r] += a[r * a_row] * b0;
            right[r] += a[r * a_row] * b1;
        }
    }
    for (int r = 0; r < rows; r++) {
        *(floats *)(c + r * c_row) = left[r];
        *(floats *)(c + r * c_row + LANES) = right[r];
    }
}

/* C[m, n] (+)= A[m, k] B[k, n], n in whole WIDEs; b_next: from WIDE columns of B to the next */
INLINE void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_column, const float *b,
                    int64_t b_row, int64_t b_next, float *c, int64_t c_row, int add) {
    for (int64_t j = 0; j < n; j += WIDE, b += b_next) {
        int64_t i = 0;
        for (; i + TALL <= m; i += TALL)
            tile(TALL, k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row + j, c_row, add);
        for (; i + 2 <= m; i += 2)
            tile(2, k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row + j, c_row, add);
        if (i < m) tile(1, k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row + j, c_row, add);
    }
}

/* e^x for x <= 0, exactly 0 from -87 down; NaN stays. Relative error below 2e-7. */
INLINE floats exponential(floats x) {
    floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the integer is in the low bits */
    floats n = shifted - 12582912.0f;
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ints power = ((ints)shifted) << 23;
    floats value = (floats)((ints)p + power);
    ints gone = x <= -87.0f;
    return (floats)((ints)value & ~gone);
}

INLINE float sum_of(floats v) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}

/* scores -> probabilities, dp -> gradient of the scores: one row of n, in whole vectors */
INLINE void soften(float *scores, float *dp, int64_t n) {
    floats most = load(scores);
    for (int64_t j = LANES; j < n; j += LANES) {
        floats s = load(scores + j);
        ints more = s > most;
        most = (floats)(((ints)s & more) | ((ints)most & ~more));
    }
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    if (top == -INFINITY) { /* every key is masked: no gradient */
        memset(scores, 0, sizeof(float) * (size_t)n);
        memset(dp, 0, sizeof(float) * (size_t)n);
        return;
    }
    floats total = {0}, dot = {0};
    for (int64_t j = 0; j < n; j += LANES) {
        floats e = exponential(load(scores + j) - top);
        total += e;
        dot += e * load(dp + j);
        *(floats *)(scores + j) = e;
    }
    float scale = 1.0f / sum_of(total), delta = sum_of(dot) * scale;
    for (int64_t j = 0; j < n; j += LANES) {
        floats p = load(scores + j) * scale;
        *(floats *)(scores + j) = p;
        *(floats *)(dp + j) = p * (load(dp + j) - delta);
    }
}

/* rows of `size` into rows of `wide`, zeros behind them */
INLINE void gather(const float *from, int64_t row, int64_t rows, int64_t size, int64_t wide, float by, float *to) {
    for (int64_t i = 0; i < rows; i++, from += row, to += wide) {
        for (int64_t d = 0; d < size; d++) to[d] = from[d] * by;
        for (int64_t d = size; d < wide; d++) to[d] = 0;
    }
}

INLINE void scatter(const float *from, int64_t wide, int64_t rows, int64_t size, float by, float *to, int64_t row) {
    for (int64_t i = 0; i < rows; i++, from += wide, to += row)
        for (int64_t d = 0; d < size; d++) to[d] = from[d] * by;
}

INLINE void transpose(const float *from, int64_t row, int64_t rows, int64_t size, float *to) {
    for (int64_t first = 0; first < rows; first += WIDE, to += size * WIDE)
        for (int64_t i = 0; i < WIDE; i++)
            for (int64_t d = 0; d < size; d++) to[d * WIDE + i] = first + i < rows ? from[(first + i) * row + d] : 0;
}

INLINE float *at(const View *view, int64_t b, int64_t h) { return view->data + b * view->batch + h * view->head; }

/* What one thread works in, in floats. */
INLINE int64_t room(const Job *job) {
    int64_t wide = padded(job->size), keys = spread(job->keys);
    return 2 * job->size * keys + 3 * job->keys * wide + 3 * ROWS * wide + 2 * ROWS * keys;
}

/* All query heads that share one key and value head of one element of the batch. */
WORKER static void one_head(const Job *job, int64_t b, int64_t h, float *space) {
    const int64_t size = job->size, wide = padded(size), all = spread(job->keys), group = job->heads / job->kv_heads;
    float *kt = space, *vt = kt + size * all, *k = vt + size * all, *dk = k + job->keys * wide,
          *dv = dk + job->keys * wide, *q = dv + job->keys * wide, *grad = q + ROWS * wide, *dq = grad + ROWS * wide,
          *p = dq + ROWS * wide, *ds = p + ROWS * all;
    transpose(at(&job->k, b, h), job->k.row, job->keys, size, kt);
    transpose(at(&job->v, b, h), job->v.row, job->keys, size, vt);
    gather(at(&job->k, b, h), job->k.row, job->keys, size, wide, 1, k);
    memset(dk, 0, sizeof(float) * (size_t)(2 * job->keys * wide)); /* dv is behind it */
    for (int64_t head = h * group; head < (h + 1) * group; head++)
        for (int64_t first = 0; first < job->queries; first += ROWS) {
            int64_t rows = job->queries - first < ROWS ? job->queries - first : ROWS;
            int64_t keys = job->causal && first + rows < job->keys ? first + rows : job->keys, n = padded(keys);
            gather(at(&job->q, b, head) + first * job->q.row, job->q.row, rows, size, wide, job->scale, q);
            gather(at(&job->grad, b, head) + first * job->grad.row, job->grad.row, rows, size, wide, 1, grad);
            product(rows, n, size, q, wide, 1, kt, WIDE, size * WIDE, p, all, 0);
            product(rows, n, size, grad, wide, 1, vt, WIDE, size * WIDE, ds, all, 0);
            for (int64_t i = 0; i < rows; i++) {
                int64_t seen = job->causal && first + i + 1 < keys ? first + i + 1 : keys;
                if (job->mask.data) {
                    const float *mask = at(&job->mask, b, head) + (first + i) * job->mask.row;
                    for (int64_t j = 0; j < seen; j++) p[i * all + j] += mask[j];
                }
                for (int64_t j = seen; j < n; j++) p[i * all + j] = -INFINITY;
                soften(p + i * all, ds + i * all, n);
            }
            product(keys, wide, rows, p, 1, all, grad, wide, WIDE, dv, wide, 1);
            product(keys, wide, rows, ds, 1, all, q, wide, WIDE, dk, wide, 1);
            product(rows, wide, keys, ds, all, 1, k, wide, WIDE, dq, wide, 0);
            scatter(dq, wide, rows, size, job->scale, at(&job->dq, b, head) + first * job->dq.row, job->dq.row);
        }
    scatter(dk, wide, job->keys, size, 1, at(&job->dk, b, h), job->dk.row);
    scatter(dv, wide, job->keys, size, 1, at(&job->dv, b, h), job->dv.row);
}

/* views: q, k, v, grad, dq, dk, dv, mask, each of its pointer; strides: batch, head and row of each.
 * sizes: batch, heads, key and value heads, queries, keys, size of a head. 0 where it is done, else nothing is. */
int dropit_attention_backward(float *const *views, const int64_t *strides, const int64_t *sizes, float scale,
                              int causal, int threads) {
    Job job;
    View *view[] = {&job.q, &job.k, &job.v, &job.grad, &job.dq, &job.dk, &job.dv, &job.mask};
    for (int i = 0; i < 8; i++) *view[i] = (View){views[i], strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
    job.batch = sizes[0], job.heads = sizes[1], job.kv_heads = sizes[2];
    job.queries = sizes[3], job.keys = sizes[4], job.size = sizes[5];
    job.scale = scale, job.causal = causal;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *space = malloc(sizeof(float) * (size_t)room(&job));
        if (!space) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        int skip;
#pragma omp atomic read
        skip = failed;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < job.batch * job.kv_heads; i++)
            if (!skip) one_head(&job, i / job.kv_heads, i % job.kv_heads, space);
        free(space);
    }
    return failed;
}

/* Whether this machine has what the function above is compiled for. */
int dropit_attention_runs(void) {
#ifdef X86
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0; /* nobody has measured it elsewhere */
#endif
}

#else

int dropit_attention_backward(float *const *views, const int64_t *strides, const int64_t *sizes, float scale,
                              int causal, int threads) {
    return 1;
}

int dropit_attention_runs(void) { return 0; }

#endif
