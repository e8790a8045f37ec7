/* The C interface of megalodon_ops: one function per kernel, on DLPack tensors.
 *
 * Every function returns a megalodon_status; on anything but MEGALODON_OK, megalodon_last_error() holds the message
 * (thread-local, valid until the next failing call on the same thread) and no output has been written.
 *
 * Conventions, the same for every function:
 *   - inputs come first, then outputs (DLTensor*, written), then the stream (a cudaStream_t; ignored for CPU tensors);
 *   - optional tensors are NULL when absent; the gradient of an absent input is a tensor of shape [0];
 *   - tensors are compact and row-major (strides NULL or the compact strides) and live on one device;
 *   - no two outputs share memory; what is updated in place shares none with another state or activation of the call;
 *   - activations are float32, bfloat16, float16 or float64; parameters, states and statistics ("stat") are float32, or
 *     float64 when the activation is float64; counts and positions are int64 and at least 0, which is checked on the
 *     CPU alone; masks are bool;
 *   - nothing is allocated: FUNCTION_outputs takes the same inputs, checks them and fills one megalodon_spec per
 * output, which is what the caller allocates. A last output named `workspace` is scratch memory of that many bytes.
 */
#ifndef MEGALODON_H_
#define MEGALODON_H_

#include <stdint.h>

#if defined(__has_include)
#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#endif
#endif

#ifndef DLPACK_DLL /* no <dlpack/dlpack.h>: declare the part of the DLPack ABI that is used here */
#define DLPACK_DLL
typedef enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3 } DLDeviceType;
typedef struct {
  int32_t device_type; /* a DLDeviceType */
  int32_t device_id;
} DLDevice;
typedef enum { kDLInt = 0U, kDLUInt = 1U, kDLFloat = 2U, kDLBfloat = 4U, kDLComplex = 5U, kDLBool = 6U } DLDataTypeCode;
typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;
typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} DLTensor;
#endif

#if defined(_WIN32)
#define MEGALODON_API __declspec(dllexport)
#else
#define MEGALODON_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MEGALODON_MAX_NDIM 8

typedef enum {
  MEGALODON_OK = 0,
  MEGALODON_VALUE_ERROR = 1,     /* a wrong shape, size or number */
  MEGALODON_TYPE_ERROR = 2,      /* a wrong dtype or kind of argument */
  MEGALODON_NOT_IMPLEMENTED = 3, /* valid, and not built yet */
  MEGALODON_RUNTIME_ERROR = 4    /* the device or the system failed */
} megalodon_status;

typedef struct {
  DLDataType dtype;
  int32_t ndim;
  int64_t shape[MEGALODON_MAX_NDIM];
} megalodon_spec;

MEGALODON_API const char* megalodon_last_error(void);
MEGALODON_API const char* megalodon_version(void);
/* The CUDA version the GPU kernels were built with, or "" in a build without them. Touches no driver. */
MEGALODON_API const char* megalodon_cuda_version(void);

/* The instruction set the CPU kernels run: "portable", "avx2", "avx512" or "avx512_bf16" (avx512 but for
 * the bf16 kernels that multiply it in pairs, or round to it, by instructions of their own, to which subnormal numbers
 * are zeros). Starts as the best the CPU has.
 * set_isa takes one of them or "auto"; not thread-safe against running kernels. */
MEGALODON_API const char* megalodon_isa(void);
MEGALODON_API int megalodon_set_isa(const char* name);

/* Threads. By default a pool of our own, of set_num_threads threads (initially one per core). set_parallel_for replaces
 * it with the caller's engine, so that two pools never compete: it calls task(begin, end, context) on disjoint ranges
 * that cover [begin, end), each of at least `grain` items (but for the last), and returns 0. NULL restores our own. */
typedef int32_t (*megalodon_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                          void (*task)(int64_t begin, int64_t end, void* context), void* context);
MEGALODON_API void megalodon_set_parallel_for(megalodon_parallel_for engine);
MEGALODON_API int megalodon_set_num_threads(int64_t count);
MEGALODON_API int64_t megalodon_num_threads(void); /* of our own pool */

/* block_step: one decoding step of a whole block, x (B, D) to y (B, D). Updated in place: k_cache (B, C, H, S), v_cache
 * (B, C, H, E), count (B), mean, var (B, G), h (B, D, N, 2); position (B) is read. Parameters as in the ops they belong
 * to; weights (out, in) and biases of linear layers and ffn_alpha (D) have the activation's type. rmsnorm_weight,
 * norm_weight with norm_bias, fc3_weight and ffn_alpha are optional. sliding: as in chunk_attention_step; the rotary
 * position is then the absolute one. */
MEGALODON_API int megalodon_block_step_forward_outputs(
    const DLTensor* x, DLTensor* k_cache, DLTensor* v_cache, DLTensor* count, DLTensor* mean, DLTensor* var,
    DLTensor* h, const DLTensor* position, const DLTensor* timenorm_weight, const DLTensor* timenorm_bias,
    const DLTensor* cema_alpha, const DLTensor* cema_delta, const DLTensor* cema_theta, const DLTensor* cema_gamma,
    const DLTensor* cema_omega, const DLTensor* rmsnorm_weight, const DLTensor* wv_weight, const DLTensor* wv_bias,
    const DLTensor* wz_weight, const DLTensor* wz_bias, const DLTensor* wr_weight, const DLTensor* wr_bias,
    const DLTensor* wh1_weight, const DLTensor* wh1_bias, const DLTensor* wh2_weight, const DLTensor* gamma,
    const DLTensor* beta, const DLTensor* norm_weight, const DLTensor* norm_bias, const DLTensor* fc1_weight,
    const DLTensor* fc2_weight, const DLTensor* fc3_weight, const DLTensor* ffn_alpha, int64_t num_groups,
    int64_t num_heads, int64_t chunk_size, double rope_base, double eps, int64_t sliding, megalodon_spec* outputs);
MEGALODON_API int megalodon_block_step_forward(
    const DLTensor* x, DLTensor* k_cache, DLTensor* v_cache, DLTensor* count, DLTensor* mean, DLTensor* var,
    DLTensor* h, const DLTensor* position, const DLTensor* timenorm_weight, const DLTensor* timenorm_bias,
    const DLTensor* cema_alpha, const DLTensor* cema_delta, const DLTensor* cema_theta, const DLTensor* cema_gamma,
    const DLTensor* cema_omega, const DLTensor* rmsnorm_weight, const DLTensor* wv_weight, const DLTensor* wv_bias,
    const DLTensor* wz_weight, const DLTensor* wz_bias, const DLTensor* wr_weight, const DLTensor* wr_bias,
    const DLTensor* wh1_weight, const DLTensor* wh1_bias, const DLTensor* wh2_weight, const DLTensor* gamma,
    const DLTensor* beta, const DLTensor* norm_weight, const DLTensor* norm_bias, const DLTensor* fc1_weight,
    const DLTensor* fc2_weight, const DLTensor* fc3_weight, const DLTensor* ffn_alpha, int64_t num_groups,
    int64_t num_heads, int64_t chunk_size, double rope_base, double eps, int64_t sliding, DLTensor* y,
    DLTensor* workspace, void* stream);

/* cema_kernel: k_t = Re sum_n c_n q_n^t, the impulse response of cema without omega. Parameters as for cema, float32 or
 * float64; k, dk (D, length). */
MEGALODON_API int megalodon_cema_kernel_forward_outputs(const DLTensor* alpha, const DLTensor* delta,
                                                        const DLTensor* theta, const DLTensor* gamma, int64_t length,
                                                        megalodon_spec* outputs);
MEGALODON_API int megalodon_cema_kernel_forward(const DLTensor* alpha, const DLTensor* delta, const DLTensor* theta,
                                                const DLTensor* gamma, int64_t length, DLTensor* k, DLTensor* workspace,
                                                void* stream);
MEGALODON_API int megalodon_cema_kernel_backward_outputs(const DLTensor* dk, const DLTensor* alpha,
                                                         const DLTensor* delta, const DLTensor* theta,
                                                         const DLTensor* gamma, megalodon_spec* outputs);
MEGALODON_API int megalodon_cema_kernel_backward(const DLTensor* dk, const DLTensor* alpha, const DLTensor* delta,
                                                 const DLTensor* theta, const DLTensor* gamma, DLTensor* dalpha,
                                                 DLTensor* ddelta, DLTensor* dtheta, DLTensor* dgamma,
                                                 DLTensor* workspace, void* stream);

/* fft_conv: y_t = sum over s <= t of k_s x_(t-s), a causal convolution per channel. x, y (B, L, D); k (D, L). */
MEGALODON_API int megalodon_fft_conv_forward_outputs(const DLTensor* x, const DLTensor* k, megalodon_spec* outputs);
MEGALODON_API int megalodon_fft_conv_forward(const DLTensor* x, const DLTensor* k, DLTensor* y, DLTensor* workspace,
                                             void* stream);
MEGALODON_API int megalodon_fft_conv_backward_outputs(const DLTensor* dy, const DLTensor* x, const DLTensor* k,
                                                      megalodon_spec* outputs);
MEGALODON_API int megalodon_fft_conv_backward(const DLTensor* dy, const DLTensor* x, const DLTensor* k, DLTensor* dx,
                                              DLTensor* dk, DLTensor* workspace, void* stream);
/* cema: h_t = a x_t + q h_(t-1), y_t = Re sum_n g h_t + omega x_t. x, y, dy, dx (B, L, D); alpha, delta (D, N);
 * theta, omega (D); gamma (D, N, 2); h0, h, dh, dh0 (B, D, N, 2), last axis (re, im). h0, dh, cu_seqlens optional.
 * algorithm: "auto", "scan" or "fft". With cu_seqlens (segments + 1), of int32 or int64, x, y, dy and dx are a packed
 * row (1, T, D), states have a row per segment, and "fft" is the scan. The values of cu_seqlens are checked on the CPU;
 * on a GPU wrong ones give wrong results, within the tensors. */
MEGALODON_API int megalodon_cema_forward_outputs(const DLTensor* x, const DLTensor* alpha, const DLTensor* delta,
                                                 const DLTensor* theta, const DLTensor* gamma, const DLTensor* omega,
                                                 const DLTensor* h0, const DLTensor* cu_seqlens, const char* algorithm,
                                                 megalodon_spec* outputs);
MEGALODON_API int megalodon_cema_forward(const DLTensor* x, const DLTensor* alpha, const DLTensor* delta,
                                         const DLTensor* theta, const DLTensor* gamma, const DLTensor* omega,
                                         const DLTensor* h0, const DLTensor* cu_seqlens, const char* algorithm,
                                         DLTensor* y, DLTensor* h, DLTensor* workspace, void* stream);
MEGALODON_API int megalodon_cema_backward_outputs(const DLTensor* dy, const DLTensor* dh, const DLTensor* x,
                                                  const DLTensor* alpha, const DLTensor* delta, const DLTensor* theta,
                                                  const DLTensor* gamma, const DLTensor* omega, const DLTensor* h0,
                                                  const DLTensor* cu_seqlens, const char* algorithm,
                                                  megalodon_spec* outputs);
MEGALODON_API int megalodon_cema_backward(const DLTensor* dy, const DLTensor* dh, const DLTensor* x,
                                          const DLTensor* alpha, const DLTensor* delta, const DLTensor* theta,
                                          const DLTensor* gamma, const DLTensor* omega, const DLTensor* h0,
                                          const DLTensor* cu_seqlens, const char* algorithm, DLTensor* dx,
                                          DLTensor* dalpha, DLTensor* ddelta, DLTensor* dtheta, DLTensor* dgamma,
                                          DLTensor* domega, DLTensor* dh0, DLTensor* workspace, void* stream);

/* chunk_attention: causal softmax attention inside chunks of chunk_size tokens, nothing across chunks; scores unscaled.
 * q, k (B, L, H, S); v, o (B, L, H, E); lse (B, H, L). Token 0 of row b stands at position[b]; the tokens of its chunk
 * that came before are k_cache (B, C, H, S), v_cache (B, C, H, E), [:, :position % C]; the three all or none. Dropout
 * of keys with dropout_p and seed. With cu_seqlens (segments + 1) B is 1 and the segments of the row are what rows are
 * otherwise, also in the caches and position. sliding (0 or 1): attention to the chunk_size tokens up to and including
 * each; the caches then hold as many before token 0, position p in slot p % chunk_size.
 * dropout_mode: "key", before the softmax, or "weight", after it. */
MEGALODON_API int megalodon_chunk_attention_forward_outputs(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                                                            int64_t chunk_size, double dropout_p, int64_t seed,
                                                            const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                            const DLTensor* v_cache, const DLTensor* position,
                                                            int64_t sliding, const char* dropout_mode,
                                                            megalodon_spec* outputs);
MEGALODON_API int megalodon_chunk_attention_forward(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                                                    int64_t chunk_size, double dropout_p, int64_t seed,
                                                    const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                    const DLTensor* v_cache, const DLTensor* position, int64_t sliding,
                                                    const char* dropout_mode, DLTensor* o, DLTensor* lse,
                                                    DLTensor* workspace, void* stream);
MEGALODON_API int megalodon_chunk_attention_backward_outputs(const DLTensor* dout, const DLTensor* q, const DLTensor* k,
                                                             const DLTensor* v, const DLTensor* o, const DLTensor* lse,
                                                             int64_t chunk_size, double dropout_p, int64_t seed,
                                                             const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                             const DLTensor* v_cache, const DLTensor* position,
                                                             int64_t sliding, const char* dropout_mode,
                                                             megalodon_spec* outputs);
MEGALODON_API int megalodon_chunk_attention_backward(const DLTensor* dout, const DLTensor* q, const DLTensor* k,
                                                     const DLTensor* v, const DLTensor* o, const DLTensor* lse,
                                                     int64_t chunk_size, double dropout_p, int64_t seed,
                                                     const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                     const DLTensor* v_cache, const DLTensor* position, int64_t sliding,
                                                     const char* dropout_mode, DLTensor* dq, DLTensor* dk, DLTensor* dv,
                                                     DLTensor* dk_cache, DLTensor* dv_cache, DLTensor* workspace,
                                                     void* stream);

/* chunk_attention_step: writes k (B, H, S), v (B, H, E) to slot position[b] % chunk_size of k_cache (B, C, H, S),
 * v_cache (B, C, H, E) and attends with q (B, H, S) to that slot and those below; sliding (0 or 1): to the last
 * chunk_size tokens, that one included. o (B, H, E); position (B). */
MEGALODON_API int megalodon_chunk_attention_step_forward_outputs(const DLTensor* q, const DLTensor* k,
                                                                 const DLTensor* v, DLTensor* k_cache,
                                                                 DLTensor* v_cache, const DLTensor* position,
                                                                 int64_t chunk_size, int64_t sliding,
                                                                 megalodon_spec* outputs);
MEGALODON_API int megalodon_chunk_attention_step_forward(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                                                         DLTensor* k_cache, DLTensor* v_cache, const DLTensor* position,
                                                         int64_t chunk_size, int64_t sliding, DLTensor* o,
                                                         DLTensor* workspace, void* stream);

/* linear_step: y = x weight^T + bias for the few rows of a decoding step. x (B, in), weight (out, in), bias (out) or
 * none, y (B, out), all of one activation dtype. Inference only. */
MEGALODON_API int megalodon_linear_step_forward_outputs(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                                                        megalodon_spec* outputs);
MEGALODON_API int megalodon_linear_step_forward(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                                                DLTensor* y, DLTensor* workspace, void* stream);

/* qk_norm_rope: z (B, L, H S) normalised per head, scaled by (gamma + 1) / sqrt(S), shifted by beta and rotated by the
 * token's place in its chunk. gamma, beta (2, H S), row 0 for q; position (B) or NULL: 0; q, k (B, L, H, S);
 * rstd (B, L, H). With cu_seqlens (segments + 1), int32 or int64, 0, ascending, T: z (1, T, H S) is a packed row, the
 * positions start anew in every segment, and position is (segments). */
MEGALODON_API int megalodon_qk_norm_rope_forward_outputs(const DLTensor* z, const DLTensor* gamma, const DLTensor* beta,
                                                         int64_t num_heads, int64_t chunk_size, double rope_base,
                                                         const DLTensor* position, double eps,
                                                         const DLTensor* cu_seqlens, megalodon_spec* outputs);
MEGALODON_API int megalodon_qk_norm_rope_forward(const DLTensor* z, const DLTensor* gamma, const DLTensor* beta,
                                                 int64_t num_heads, int64_t chunk_size, double rope_base,
                                                 const DLTensor* position, double eps, const DLTensor* cu_seqlens,
                                                 DLTensor* q, DLTensor* k, DLTensor* rstd, DLTensor* workspace,
                                                 void* stream);
MEGALODON_API int megalodon_qk_norm_rope_backward_outputs(const DLTensor* dq, const DLTensor* dk, const DLTensor* z,
                                                          const DLTensor* gamma, const DLTensor* beta,
                                                          const DLTensor* rstd, int64_t num_heads, int64_t chunk_size,
                                                          double rope_base, const DLTensor* position, double eps,
                                                          const DLTensor* cu_seqlens, megalodon_spec* outputs);
MEGALODON_API int megalodon_qk_norm_rope_backward(const DLTensor* dq, const DLTensor* dk, const DLTensor* z,
                                                  const DLTensor* gamma, const DLTensor* beta, const DLTensor* rstd,
                                                  int64_t num_heads, int64_t chunk_size, double rope_base,
                                                  const DLTensor* position, double eps, const DLTensor* cu_seqlens,
                                                  DLTensor* dz, DLTensor* dgamma, DLTensor* dbeta, DLTensor* workspace,
                                                  void* stream);

/* layer_norm: y = (x - mean) / sqrt(var + eps) * (weight + 1) + bias, biased variance; weight and bias both or neither.
 * x, y (..., D); weight, bias (D); mean, rstd (...). */
MEGALODON_API int megalodon_layer_norm_forward_outputs(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                                                       double eps, megalodon_spec* outputs);
MEGALODON_API int megalodon_layer_norm_forward(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                                               double eps, DLTensor* y, DLTensor* mean, DLTensor* rstd, void* stream);
MEGALODON_API int megalodon_layer_norm_backward_outputs(const DLTensor* dy, const DLTensor* x, const DLTensor* weight,
                                                        const DLTensor* mean, const DLTensor* rstd,
                                                        megalodon_spec* outputs);
MEGALODON_API int megalodon_layer_norm_backward(const DLTensor* dy, const DLTensor* x, const DLTensor* weight,
                                                const DLTensor* mean, const DLTensor* rstd, DLTensor* dx,
                                                DLTensor* dweight, DLTensor* dbias, DLTensor* workspace, void* stream);

/* rms_norm: y = x / sqrt(mean(x^2) + eps) * (weight + 1). x, y (..., D); weight (D); rstd (...). */
MEGALODON_API int megalodon_rms_norm_forward_outputs(const DLTensor* x, const DLTensor* weight, double eps,
                                                     megalodon_spec* outputs);
MEGALODON_API int megalodon_rms_norm_forward(const DLTensor* x, const DLTensor* weight, double eps, DLTensor* y,
                                             DLTensor* rstd, void* stream);
MEGALODON_API int megalodon_rms_norm_backward_outputs(const DLTensor* dy, const DLTensor* x, const DLTensor* weight,
                                                      const DLTensor* rstd, megalodon_spec* outputs);
MEGALODON_API int megalodon_rms_norm_backward(const DLTensor* dy, const DLTensor* x, const DLTensor* weight,
                                              const DLTensor* rstd, DLTensor* dx, DLTensor* dweight,
                                              DLTensor* workspace, void* stream);

/* silu_mul: y = silu(a) * b, or silu(a) without b; silu(u) = u / (1 + exp(-u)). a, b, y of one shape. */
MEGALODON_API int megalodon_silu_mul_forward_outputs(const DLTensor* a, const DLTensor* b, megalodon_spec* outputs);
MEGALODON_API int megalodon_silu_mul_forward(const DLTensor* a, const DLTensor* b, DLTensor* y, void* stream);
MEGALODON_API int megalodon_silu_mul_backward_outputs(const DLTensor* dy, const DLTensor* a, const DLTensor* b,
                                                      megalodon_spec* outputs);
MEGALODON_API int megalodon_silu_mul_backward(const DLTensor* dy, const DLTensor* a, const DLTensor* b, DLTensor* da,
                                              DLTensor* db, void* stream);
/* timestep_norm: every group of D / num_groups channels normalised by its mean and variance over all time steps so far,
 * which is also a state that streams: ops/timestep_norm.h. x, y (B, L, D); weight, bias (D); count (B); mean, var (B,
 * G), given all three or none; padding_mask (B, L), true = padded; step_mean, step_rstd (B, L, G). With cu_seqlens
 * (segments + 1), int32 or int64, 0, ascending, T: x (1, T, D) is a packed row, every segment has its own statistics,
 * and count, mean and var have a row per segment. */
MEGALODON_API int megalodon_timestep_norm_forward_outputs(const DLTensor* x, const DLTensor* weight,
                                                          const DLTensor* bias, int64_t num_groups, double eps,
                                                          const DLTensor* count, const DLTensor* mean,
                                                          const DLTensor* var, const DLTensor* padding_mask,
                                                          const DLTensor* cu_seqlens, megalodon_spec* outputs);
MEGALODON_API int megalodon_timestep_norm_forward(const DLTensor* x, const DLTensor* weight, const DLTensor* bias,
                                                  int64_t num_groups, double eps, const DLTensor* count,
                                                  const DLTensor* mean, const DLTensor* var,
                                                  const DLTensor* padding_mask, const DLTensor* cu_seqlens, DLTensor* y,
                                                  DLTensor* last_count, DLTensor* last_mean, DLTensor* last_var,
                                                  DLTensor* step_mean, DLTensor* step_rstd, DLTensor* workspace,
                                                  void* stream);
MEGALODON_API int megalodon_timestep_norm_backward_outputs(const DLTensor* dy, const DLTensor* dmean,
                                                           const DLTensor* dvar, const DLTensor* x,
                                                           const DLTensor* weight, const DLTensor* count,
                                                           const DLTensor* mean, const DLTensor* var,
                                                           const DLTensor* padding_mask, const DLTensor* cu_seqlens,
                                                           const DLTensor* step_mean, const DLTensor* step_rstd,
                                                           int64_t num_groups, double eps, megalodon_spec* outputs);
MEGALODON_API int megalodon_timestep_norm_backward(const DLTensor* dy, const DLTensor* dmean, const DLTensor* dvar,
                                                   const DLTensor* x, const DLTensor* weight, const DLTensor* count,
                                                   const DLTensor* mean, const DLTensor* var,
                                                   const DLTensor* padding_mask, const DLTensor* cu_seqlens,
                                                   const DLTensor* step_mean, const DLTensor* step_rstd,
                                                   int64_t num_groups, double eps, DLTensor* dx, DLTensor* dweight,
                                                   DLTensor* dbias, DLTensor* dmean0, DLTensor* dvar0,
                                                   DLTensor* workspace, void* stream);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* MEGALODON_H_ */
