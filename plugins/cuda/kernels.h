/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The three shadowc operators as CUDA kernels: a C interface that knows nothing of TensorRT.
 *
 * What each operator computes is defined in docs/ops.md and shadowc/spec/oracle.py; here it has GPU layouts
 * and types. Letters: B batch, S new tokens, Z sparse tail, L predicted layers, N units of a layer, E hidden,
 * F neurons, H heads, D head size, T cache capacity; MB is 1 (one mask for the whole batch) or B.
 *
 * Rules for all functions
 * - Pointers named in the structs are device pointers unless marked "host", aligned to 16 bytes, row-major,
 * dense.
 * - shadowc_*_check and shadowc_*_workspace look at sizes only: pointers may be null.
 * - shadowc_*_workspace gives bytes; it never shrinks when batch, tokens, tail, layers, units or capacity
 * grow, and stops growing at SHADOWC_CHUNK_ROWS rows (batch * tokens, or batch * tail for the selection).
 * - shadowc_*_enqueue only launches kernels on the given stream: no allocation, no synchronisation, no host
 * read of device data, so it can be captured into a CUDA graph. The workspace (aligned to 256 bytes) may hold
 * anything before, and is free for others once the stream has passed.
 * - Results do not depend on the order in which threads run: the same inputs give the same bits. How the sums
 * of a row are rounded depends on the rows beside it in its tile, since the units that any of them needs are
 * summed together.
 * - What lies in device memory can be garbage (autotuning): masks are bits, positions are clamped, so that
 * nothing outside the named tensors is read or written.
 * - Return values: SHADOWC_OK, a negative SHADOWC_* code for arguments (nothing was launched then), or a
 * positive cudaError_t of a launch. shadowc_error_text explains each.
 */
#ifndef SHADOWC_CUDA_KERNELS_H_
#define SHADOWC_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Rows (tokens of all batch entries) per pass over the weights, and rows that share one read of a record. */
#define SHADOWC_CHUNK_ROWS 64
#define SHADOWC_TILE_ROWS 16

#define SHADOWC_MAX_HEAD_SIZE 128
#define SHADOWC_MAX_LAYERS 64 /* of shadowc_select */

typedef enum { SHADOWC_F32 = 0, SHADOWC_F16 = 1, SHADOWC_BF16 = 2, SHADOWC_I8 = 3 } shadowc_dtype;

typedef enum {
  SHADOWC_OK = 0,
  SHADOWC_BAD_SIZE =
      -1, /* a size below its minimum, tail > tokens, layer outside layers, heads * head_size != hidden,
             units that are not heads or ceil(neurons / block), product beyond 31 bits */
  SHADOWC_BAD_TYPE = -2,    /* act is none of F32, F16, BF16; weight is neither act nor I8 */
  SHADOWC_BAD_BATCH = -3,   /* batch of mask or density is neither 1 nor the batch of the operator */
  SHADOWC_BAD_POINTER = -4, /* a required pointer is null or not aligned to 16 bytes */
  SHADOWC_BAD_HEAD = -5,    /* head_size above SHADOWC_MAX_HEAD_SIZE */
  SHADOWC_BAD_LAYERS = -6   /* layers above SHADOWC_MAX_LAYERS, or more than that many exempt indices */
} shadowc_status;

/* Which units of a layer run, for the last Z of S tokens; earlier tokens are dense. A unit runs unless
   score < threshold. A dense layer has scores [1,1,1,N] of 0 and threshold [1,1,1] of -inf. */
typedef struct {
  const float* scores;    /* [MB,Z,L,N] */
  const float* threshold; /* [MB,Z,L] */
  int batch;              /* MB */
  int tail;               /* Z: 0 ... S; tail 1 with batch 1 and tokens > 1 masks the last token only */
  int layers;             /* L */
  int units;              /* N */
  int layer;              /* which of the L rows */
} shadowc_mask;

/* threshold and active from scores and a density: k = floor(density * n + 0.5) units of n stay, ties stay
 * too. */
typedef struct {
  int batch;         /* B >= 1 */
  int tail;          /* Z >= 0 */
  int layers;        /* L: 1 ... SHADOWC_MAX_LAYERS */
  int units;         /* N >= 1 */
  int global;        /* 0: rank within each layer; 1: over all layers that are not exempt */
  int min_active;    /* units that every layer keeps at least; <= 0 means none */
  int density_batch; /* 1 or B */
  int exempt_count;
  const int*
      exempt; /* host [exempt_count]; indices that are no layer (-1) exempt nothing; read before return */
  const float* scores;  /* [B,Z,L,N]; NaN ranks as +inf and is always active */
  const float* density; /* [density_batch], clamped to 0 ... 1, NaN means 1 */
  float* threshold;     /* [B,Z,L] */
  int32_t* active;      /* [B,Z,L] units that are not below the threshold; or null */
} shadowc_select;

/* y = fc2(relu(fc1(x))) over the active blocks of neurons. With nothing active y is exactly b2, rounded to
 * act. */
typedef struct {
  shadowc_dtype act;    /* of x, y */
  shadowc_dtype weight; /* of w1, w2t: act or I8 */
  int batch, tokens;    /* B >= 1, S >= 0 */
  int hidden, neurons;  /* E, F >= 1 */
  int block;            /* neurons per unit >= 1; the last unit may be short: units = ceil(F / block) */
  int skip_zeros; /* 1: do not read the w2t row of a neuron whose ReLU is 0 in every row; changes no bit */
  shadowc_mask mask;
  const void* x;       /* act [B,S,E] */
  const void* w1;      /* weight [F,E] */
  const void* w2t;     /* weight [F,E]: fc2 transposed */
  const float* scales; /* [F,2]: factors of the w1 and the w2t row; ones for float weights */
  const float* b1;     /* [F] */
  const float* b2;     /* [E] */
  void* y;             /* act [B,S,E]; may not overlap x */
  int64_t* read; /* [2] or null: neurons read, once per tile of SHADOWC_TILE_ROWS consecutive rows that needs
                    them, and the bytes of weights and scales read for them */
} shadowc_ffn;

/* Self-attention of the active heads over a cache of fixed capacity. Slots start ... past + own token are
   seen; no other slot is read. A query that sees no slot has context 0; with no active head y is exactly bo,
   rounded to act. */
typedef struct {
  shadowc_dtype act;    /* of x, y, context and the cache */
  shadowc_dtype weight; /* of wq, wk, wv, wot: act or I8 */
  int batch, tokens;    /* B >= 1, S >= 0 */
  int hidden;           /* E = H * D */
  int heads,
      head_size;     /* H >= 1, 1 <= D <= SHADOWC_MAX_HEAD_SIZE; D * sizeof(act) in 16-byte steps is fast */
  int capacity;      /* T >= 1 */
  int kv_active;     /* 0: K/V of every head are written; 1: of active heads only (fixed masks) */
  shadowc_mask mask; /* units = H */
  const void* x;     /* act [B,S,E] */
  const void *wq, *wk, *wv; /* weight [H*D,E] */
  const void* wot; /* weight [H*D,E]: out_proj transposed; row h*D+d is what context element d of h adds */
  const float* scales;    /* [H,4,D]: factors of the rows of wq, wk, wv, wot; ones for float weights */
  const float* bqkv;      /* [H,3,D] */
  const float* bo;        /* [E] */
  const void* past_key;   /* act [B,H,T,D] */
  const void* past_value; /* act [B,H,T,D] */
  void* present_key;      /* act [B,H,T,D]; equal to past_key: updated in place; else slots start ... past are
                             copied. No other overlap. Slots outside start ... past + S - 1 keep what they hold. */
  void* present_value;    /* the same for past_value */
  const int64_t* start;   /* [B] first slot that holds a real token */
  const int64_t* past;    /* [B] slots filled before this call */
  void* y;                /* act [B,S,E] */
  void* context;          /* act [B,S,E] before out_proj; 0 for inactive heads; or null */
  int64_t* read; /* [2] or null: head records and bytes read, per tile as for shadowc_ffn; a record of which
                    only K and V are read counts as one with half the bytes. (-1, -1) if any past is
                    negative, past + S > T, or start is outside 0 ... past + S: what does not fit was
                    dropped, and the outputs mean nothing. */
} shadowc_attention;

/* 0 or the negative code that enqueue would return for these sizes and types. */
int shadowc_select_check(const shadowc_select* args);
int shadowc_ffn_check(const shadowc_ffn* args);
int shadowc_attention_check(const shadowc_attention* args);

/* Bytes of workspace; 0 if the check fails. */
size_t shadowc_select_workspace(const shadowc_select* args);
size_t shadowc_ffn_workspace(const shadowc_ffn* args);
size_t shadowc_attention_workspace(const shadowc_attention* args);

int shadowc_select_enqueue(const shadowc_select* args, void* workspace, cudaStream_t stream);
int shadowc_ffn_enqueue(const shadowc_ffn* args, void* workspace, cudaStream_t stream);
int shadowc_attention_enqueue(const shadowc_attention* args, void* workspace, cudaStream_t stream);

/* One sentence for a return value of the functions above; never null, valid forever. */
const char* shadowc_error_text(int status);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SHADOWC_CUDA_KERNELS_H_ */
